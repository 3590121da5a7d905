"""TLS on memory: however the bytes are cut or damaged, a connection sees what was sent, or less of it."""

import asyncio
import contextlib
import re
import ssl
from collections.abc import Iterator
from unittest.mock import Mock

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import micro_svc_demo as service
from tests.load.clients import request
from tests.service import Certificates

BODY = b'{"record_id": 1}'
ASKED = b"".join(request(path, "secret") for path in ("/healthz", "/api/v1/id/1", "/nowhere"))
MANY = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module")
def contexts(tmp_path_factory: pytest.TempPathFactory) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """What the two sides need."""
    made = Certificates(tmp_path_factory.mktemp("certificates"))
    required = {"COUCHBASE_HOST": "db", "COUCHBASE_USER": "u", "COUCHBASE_PASSWORD": "p"}
    context, _ = service.server_context(service.read_settings([], required | made.settings))
    return context, made.client()


class Wire:
    """A client and a `TlsConnection` with nothing but memory in between."""

    def __init__(self, server: service.ProfileServer, contexts: tuple[ssl.SSLContext, ssl.SSLContext]) -> None:
        server.tls = contexts[0]
        self.connection = service.TlsConnection(server)
        self.transport = Mock()
        self.transport.get_extra_info.return_value = ("192.0.2.1", 1)
        self.transport.get_write_buffer_size.return_value = 0
        self.incoming, self.outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.transport.write = self.incoming.write
        self.client = contexts[1].wrap_bio(self.incoming, self.outgoing, server_hostname="localhost")
        self.connection.connection_made(self.transport)

    def send(self, lengths: Iterator[int]) -> None:
        """Deliver what the client has to say, in pieces."""
        data = self.outgoing.read()
        while data:
            piece, data = data[: (length := next(lengths))], data[length:]
            self.connection.data_received(piece)

    def shake_hands(self, lengths: Iterator[int]) -> None:
        """Go through the handshake."""
        for _ in range(3):
            with contextlib.suppress(ssl.SSLWantReadError):
                self.client.do_handshake()
            self.send(lengths)

    def received(self) -> bytes:
        """Return what the client can decrypt by now."""
        data = b""
        while self.incoming.pending or self.client.pending():
            try:
                data += self.client.read(65_536)
            except ssl.SSLWantReadError:
                break
        return data


def endless(lengths: list[int]) -> Iterator[int]:
    """Repeat the lengths."""
    while True:
        yield from lengths


@MANY
@given(lengths=st.lists(st.one_of(st.integers(1, 40), st.integers(1, 4000)), min_size=1, max_size=20))
def test_however_cut_the_answers_are_the_same(
    server: service.ProfileServer, contexts: tuple[ssl.SSLContext, ssl.SSLContext], lengths: list[int]
) -> None:
    async def run() -> bytes:
        server.store.documents["user_data", "user_data:1"] = service.Document(BODY, 1)  # type: ignore[attr-defined]
        wire, pieces = Wire(server, contexts), endless(lengths)
        wire.shake_hands(pieces)
        for length in lengths:
            wire.client.write(ASKED[:length])  # records of all sizes
            wire.client.write(ASKED[length:] or b"\r\n")
        wire.send(pieces)
        received = b""
        for _ in range(4 * len(lengths)):
            await asyncio.sleep(0)
            received += wire.received()
        return received

    received = asyncio.run(run())
    server.answered.clear()
    assert received.count(b"HTTP/1.1 200 OK\r\n") == 2 * len(lengths)
    assert received.count(b"HTTP/1.1 404 Not Found\r\n") == len(lengths)


@MANY
@given(place=st.integers(0, 3000), bit=st.integers(0, 7))
def test_however_damaged_nothing_is_answered_but_what_was_asked(
    server: service.ProfileServer, contexts: tuple[ssl.SSLContext, ssl.SSLContext], place: int, bit: int
) -> None:
    """A bit is another in the handshake or behind it: no exception, and the answers are those of plain, or fewer."""

    async def run() -> list[bytes]:
        server.store.documents["user_data", "user_data:1"] = service.Document(BODY, 1)  # type: ignore[attr-defined]
        wire, seen = Wire(server, contexts), [0]
        receive = wire.connection.data_received

        def damage(piece: bytes) -> None:
            start, seen[0] = seen[0], seen[0] + len(piece)
            changed = bytearray(piece)
            if start <= place < seen[0]:
                changed[place - start] ^= 1 << bit
            if not wire.transport.close.called:
                receive(bytes(changed))

        wire.connection.data_received = damage  # type: ignore[method-assign]
        received = b""
        with contextlib.suppress(ssl.SSLError):  # of the client's side, which has been told, or has found out itself
            wire.shake_hands(endless([100]))
            wire.client.write(ASKED)
            wire.send(endless([100]))
            for _ in range(4):
                await asyncio.sleep(0)
                received += wire.received()
        return re.findall(rb"HTTP/1\.1 (\d+)", received)

    statuses = asyncio.run(run())
    server.answered.clear()
    assert statuses == [b"200", b"200", b"404"][: len(statuses)]
    assert len(statuses) == 3 or place < 1500, "all that is sent is less"


def test_an_answer_that_comes_after_tls_has_failed_is_cut_off(
    server: service.ProfileServer, contexts: tuple[ssl.SSLContext, ssl.SSLContext]
) -> None:
    """It must not raise where others' answers are made, and the log says that nothing of it was sent."""

    async def run() -> service.ProfileHandler:
        wire = Wire(server, contexts)
        wire.shake_hands(endless([1 << 20]))
        wire.client.write(request("/healthz"))
        wire.send(endless([1 << 20]))
        handler = server.answered.pop()
        wire.connection.data_received(b"\x17\x03\x03\x00\x20" + b"x" * 32)  # a record that nobody has encrypted
        wire.transport.close.assert_called_once_with()
        wire.connection.reply(handler)
        wire.transport.abort.assert_called_once_with()
        wire.connection.connection_lost(None)
        return server.answered.pop()

    handler = asyncio.run(run())
    assert (handler.response, handler.cut_off) == (b"", service.CUT_OFF)
    assert server.metrics.numbers["http_rejected_total", "tls"] == 1
