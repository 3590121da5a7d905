"""A server that is ready, but serves nobody, in front of a store whose answers are known."""

import asyncio
from collections.abc import Callable, Iterator
from unittest.mock import Mock

import pytest

import micro_svc_demo as service


class Shelf(service.ProfileStore):
    """A store whose answers are known: documents, or what is raised in their place, and rows."""

    def __init__(self, *arguments: object) -> None:
        super().__init__(*arguments)  # type: ignore[arg-type]
        self.database.connect, self.database.fetch_token = lambda: None, lambda: "secret"  # type: ignore[method-assign]
        self.documents: dict[tuple[str, str], service.Document | Exception] = {}
        self.rows: list[bytes] = []
        self.asked: list[object] = []

    async def get(self, collection: str, key: str) -> service.Document:  # type: ignore[override]
        """Return a document, or raise what stands in its place; 404 if there is nothing."""
        self.asked.append((collection, key))
        found = self.documents.get((collection, key), service.ProblemError(404, "no such document"))
        if isinstance(found, Exception):
            raise found
        return found

    async def query(self, statement: str, parameters: dict[str, object]) -> list[bytes]:  # type: ignore[override]
        """Return a page of the rows."""
        self.asked.append((statement, parameters))
        assert isinstance(parameters["offset"], int) and isinstance(parameters["limit"], int)
        return self.rows[parameters["offset"] :][: parameters["limit"]]


@pytest.fixture
def settings() -> service.Settings:
    """A port that is free, no metrics port, one query thread."""
    environment = {"COUCHBASE_HOST": "db", "COUCHBASE_USER": "u", "COUCHBASE_PASSWORD": "p"}
    return service.read_settings(["--port", "0", "--metrics-port", "off", "--threads", "1"], environment)


@pytest.fixture
def server(settings: service.Settings) -> Iterator[service.ProfileServer]:
    """The server; its store is the shelf."""
    log, metrics = service.Log("error"), service.Metrics()
    bound = service.ProfileServer(settings, Shelf(settings, log, metrics), log, metrics)
    asyncio.run(bound.store.health.start())
    yield bound
    bound.server_close()
    log.close()


@pytest.fixture
def shelf(server: service.ProfileServer) -> service.ProfileStore:
    """The server's store, to be filled."""
    return server.store


@pytest.fixture
def handle(server: service.ProfileServer) -> Callable[..., service.ProfileHandler]:
    """Have a request answered; return its handler."""

    def handle(
        path: str, *fields: str, method: str = "GET", version: str = "1.1", internal: bool = False, more: bytes = b""
    ) -> service.ProfileHandler:
        async def receive() -> service.ProfileHandler:
            connection, transport = service.Connection(server, internal=internal), Mock()
            transport.get_extra_info.return_value = ("192.0.2.1", 1)
            connection.connection_made(transport)
            lines = [f"{method} {path} HTTP/{version}", "Host: a", *fields, "", ""]
            connection.data_received("\r\n".join(lines).encode("latin-1") + more)
            handler = server.answered.pop()
            transport.write.assert_called_once_with(handler.response)
            return handler

        return asyncio.run(receive())

    return handle
