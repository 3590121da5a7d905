"""The part of Kubernetes that a rolling update is made of, played with processes on this machine.

A `Balancer` stands for a Service: new connections go to the replicas that are ready, in turn; a connection that is made
stays where it is. A `Deployment` stands for the controller and the kubelet: it starts a replica, asks its readiness
probe every period, and ends one as pods are ended: out of the Service's list at once, which load balancers hear of some
time later; the preStop pause; SIGTERM; and SIGKILL when the grace period is over.
"""

import asyncio
import contextlib
import signal
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from http import HTTPStatus

from tests.deploy.pod import Pod
from tests.service import ServiceProcess

CHUNK = 65_536
READY_SECONDS = 60


@dataclass(frozen=True)
class Timings:
    """What the manifest says of time, in seconds, divided by a scale so that a test need not wait for all of it.

    Attributes:
        period: Between two readiness probes.
        failures: How many of them must fail before a replica isn't ready any more.
        pause: The preStop pause.
        grace: From the decision to end a pod to SIGKILL.
        drain: What the service is told as SHUTDOWN_SECONDS, a whole number.
        notice: How long load balancers go on using a pod that was taken off the list.
    """

    period: float
    failures: int
    pause: float
    grace: float
    drain: int
    notice: float

    @classmethod
    def of(cls, pod: Pod, scale: float) -> "Timings":
        """Return a pod's timings; load balancers are taken to need three fifths of the pause to notice."""
        probe = pod.container["readinessProbe"]
        return cls(
            period=probe["periodSeconds"] / scale,
            failures=probe["failureThreshold"],
            pause=pod.pause_seconds / scale,
            grace=pod.grace_seconds / scale,
            drain=int(int(pod.environment["SHUTDOWN_SECONDS"]) / scale),
            notice=0.6 * pod.pause_seconds / scale,
        )


class Balancer:
    """Hands new connections to the ports in its list, in turn; it never tries a second one for the same client."""

    def __init__(self) -> None:
        self.ports: list[int] = []
        self.refused = 0
        self._next = 0
        self._writers: set[asyncio.StreamWriter] = set()

    async def __aenter__(self) -> "Balancer":
        """Listen; `port` says where."""
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port: int = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        """Stop listening and cut what is left."""
        self._server.close()
        for writer in list(self._writers):
            writer.transport.abort()
        while self._writers:
            await asyncio.sleep(0)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._next += 1
        port = self.ports[self._next % len(self.ports)]
        try:
            inner_reader, inner_writer = await asyncio.open_connection("127.0.0.1", port)
        except OSError:
            self.refused += 1
            writer.close()
            return
        await asyncio.gather(self._pump(reader, inner_writer), self._pump(inner_reader, writer))

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        with contextlib.suppress(OSError):
            while data := await reader.read(CHUNK):
                writer.write(data)
                await writer.drain()
        self._writers.discard(writer)
        writer.close()


class Deployment:
    """Replicas behind a balancer, started, asked and ended by a manifest's timings."""

    def __init__(self, balancer: Balancer, timings: Timings, make: Callable[[], ServiceProcess]) -> None:
        """Prepare; `make` returns a process that is not started yet."""
        self.replicas: list[ServiceProcess] = []
        self.exit_codes: list[int] = []
        self._balancer = balancer
        self._timings = timings
        self._make = make
        self._probes: dict[ServiceProcess, asyncio.Task[None]] = {}

    async def __aenter__(self) -> "Deployment":
        """Begin with no replica."""
        return self

    async def __aexit__(self, *_: object) -> None:
        """End all replicas at once."""
        for probe in self._probes.values():
            probe.cancel()
        for replica in self.replicas:
            await asyncio.to_thread(replica.stop)

    async def add(self) -> ServiceProcess:
        """Start a replica and wait until its readiness probe has put it on the balancer's list."""
        replica = self._make()
        self.replicas.append(replica)
        await asyncio.to_thread(replica.start)
        ready = asyncio.Event()
        self._probes[replica] = asyncio.create_task(self._probe(replica, ready))
        async with asyncio.timeout(READY_SECONDS):
            await ready.wait()
        return replica

    async def _probe(self, replica: ServiceProcess, ready: asyncio.Event) -> None:
        """Ask /readyz every period: one answer of 200 puts the replica on the list, several failures off it."""
        failures = 0
        while True:
            try:
                answer = await asyncio.to_thread(replica.get, "/readyz", port=replica.metrics_port)
                failures = 0 if answer.status == HTTPStatus.OK else failures + 1
            except OSError:
                failures += 1
            if failures == 0 and replica.port not in self._balancer.ports:
                self._balancer.ports.append(replica.port)
                ready.set()
            elif failures >= self._timings.failures:
                self._take_off(replica)
            await asyncio.sleep(self._timings.period)

    def _take_off(self, replica: ServiceProcess) -> None:
        with contextlib.suppress(ValueError):
            self._balancer.ports.remove(replica.port)

    async def remove(self, replica: ServiceProcess) -> None:
        """End a replica as a pod is ended; its exit code is added to `exit_codes`."""
        timings = self._timings
        self._probes.pop(replica).cancel()
        asyncio.get_running_loop().call_later(timings.notice, self._take_off, replica)
        await asyncio.sleep(timings.pause)
        replica.process.send_signal(signal.SIGTERM)
        try:
            await asyncio.to_thread(replica.process.wait, timings.grace - timings.pause)
        except subprocess.TimeoutExpired:
            replica.process.kill()
        self.replicas.remove(replica)
        self.exit_codes.append(await asyncio.to_thread(replica.stop))
