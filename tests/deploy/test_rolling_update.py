"""A rolling update, played through with processes: no request fails while every replica is replaced."""

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field, replace

import pytest

from tests.deploy.cluster import Balancer, Deployment, Timings
from tests.deploy.kustomize import Manifest, one
from tests.deploy.pod import Pod
from tests.emulator.process import EmulatorProcess
from tests.service import ServiceProcess, settings_for

SCALE = 5
"""The manifest's timings are divided by this: a pause of 5 s becomes 1 s. The service's own are as they are."""
TOKEN = "rolling"
PROFILES = 50
REQUEST_SECONDS = 30
REQUESTS = 500


@pytest.fixture(scope="module")
def database() -> Iterator[EmulatorProcess]:
    with EmulatorProcess(profiles=PROFILES, token=TOKEN) as emulator:
        yield emulator


@dataclass
class Load:
    """Clients that ask all the time, and what came of it: how many times each status, or each failure."""

    port: int
    outcomes: Counter[str] = field(default_factory=Counter)
    _number: int = 0

    async def one_connection_each(self) -> None:
        """Make a connection for every request."""
        while True:
            async with self._connection() as (reader, writer):
                await self._ask(reader, writer, "close")
            await asyncio.sleep(0.002)

    async def keep_alive(self, pause_seconds: float) -> None:
        """Use a connection for as long as the server lets it, with a pause between two requests."""
        while True:
            async with self._connection() as (reader, writer):
                while await self._ask(reader, writer, "keep-alive"):
                    await asyncio.sleep(pause_seconds)

    @contextlib.asynccontextmanager
    async def _connection(self) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        try:
            yield reader, writer
        finally:
            writer.close()

    async def _ask(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, connection: str) -> bool:
        """Send one request; return whether the connection may be used again. Nothing is ever asked twice."""
        self._number += 1
        path = f"/api/v1/id/{self._number % PROFILES + 1}"
        try:
            async with asyncio.timeout(REQUEST_SECONDS):
                head, body = await self._exchange(reader, writer, path, connection)
        except (OSError, EOFError, TimeoutError) as error:
            self.outcomes[type(error).__name__] += 1
            return False
        whole = body.startswith(b"[{") and body.endswith(b"}]")
        self.outcomes[head.split(" ", 2)[1] if whole else "not a profile"] += 1
        return "connection: close" not in head.lower()

    async def _exchange(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, path: str, connection: str
    ) -> tuple[str, bytes]:
        lines = (f"GET {path} HTTP/1.1", "Host: demopy", f"Authorization: Bearer {TOKEN}", f"Connection: {connection}")
        writer.write("\r\n".join((*lines, "", "")).encode())
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        [length] = [line.split(":")[1] for line in head.splitlines() if line.lower().startswith("content-length:")]
        return head, await reader.readexactly(int(length))

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Keep ten clients busy within the block; three of them leave their connections idle most of the time."""
        kinds = [self.one_connection_each() for _ in range(3)]
        kinds += [self.keep_alive(0.002) for _ in range(4)] + [self.keep_alive(0.3) for _ in range(3)]
        clients = [asyncio.create_task(kind) for kind in kinds]
        try:
            yield
        finally:
            for client in clients:
                client.cancel()
            ended = await asyncio.gather(*clients, return_exceptions=True)
        assert all(isinstance(each, asyncio.CancelledError) for each in ended), ended


async def update(pod: Pod, database: EmulatorProcess, timings: Timings, replicas: int, replaced: int) -> tuple:
    """Start replicas, replace some of them under load; return the outcomes, the exit codes and who was refused."""
    environment = pod.environment | settings_for(database) | {"SERVICE_PORT": "0", "METRICS_PORT": "0"}
    environment |= {"COUCHBASE_TLS_CA": "", "COUCHBASE_PASSWORD_FILE": "", "SHUTDOWN_SECONDS": str(timings.drain)}

    def make() -> ServiceProcess:
        return ServiceProcess(environment | {"ACCESS_LOG": "false"})

    async with Balancer() as balancer, Deployment(balancer, timings, make) as deployment:
        await asyncio.gather(*(deployment.add() for _ in range(replicas)))
        load = Load(balancer.port)
        async with load.running():
            for old in deployment.replicas[:replaced]:
                await deployment.add()  # the surge
                await deployment.remove(old)
        assert len(deployment.replicas) == replicas
        return load.outcomes, deployment.exit_codes, balancer.refused


def test_no_request_fails(base: list[Manifest], database: EmulatorProcess) -> None:
    """All four replicas are replaced, one after another, by the manifest's timings."""
    pod = Pod.of(base)
    replicas = one(base, "Deployment")["spec"]["replicas"]
    timings = Timings.of(pod, SCALE)
    outcomes, exit_codes, refused = asyncio.run(update(pod, database, timings, replicas, replicas))
    assert set(outcomes) == {"200"}, outcomes
    assert outcomes["200"] > REQUESTS, "there was hardly any load"
    assert exit_codes == [0] * replicas, "a replica was killed, or its drain had to be cut"
    assert refused == 0


def test_without_the_pause_requests_fail(base: list[Manifest], database: EmulatorProcess) -> None:
    """The test above can fail: load balancers that still send to a pod that has begun to drain are refused."""
    pod = Pod.of(base)
    timings = replace(Timings.of(pod, SCALE), pause=0.0)
    outcomes, _, refused = asyncio.run(update(pod, database, timings, replicas=2, replaced=1))
    assert refused > 0 and set(outcomes) > {"200"}
