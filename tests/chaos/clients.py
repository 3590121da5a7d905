"""Clients that keep asking while things go wrong, and note when each answer came and how long it took."""

import asyncio
import contextlib
import glob
import itertools
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

import h11

CLIENT_SECONDS = 8.0  # until a client gives up: far above every deadline, so that a late answer is seen as late
RECEIVE_BYTES = 65_536


class Record(NamedTuple):
    """One answer: which path, when it was asked for (monotonic seconds), and what came after how long.

    Status 0: no whole answer came, and `body` says why.
    """

    path: str
    started: float
    seconds: float
    status: int
    headers: dict[str, str]
    body: bytes


class Client:
    """One connection, made when it is needed and again when the server has closed it."""

    def __init__(self, port: int) -> None:
        """Prepare to ask the server at this port of 127.0.0.1."""
        self._port = port
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def get(self, path: str, token: str | None = None) -> Record:
        """Send one GET and note its answer; the time is from before connecting until the last byte."""
        started = time.monotonic()
        try:
            async with asyncio.timeout(CLIENT_SECONDS):
                reply = await self._exchange(path, token)
        except (OSError, EOFError, TimeoutError, h11.RemoteProtocolError) as error:
            self.close()
            reply = 0, {}, repr(error).encode()
        return Record(path, started, time.monotonic() - started, *reply)

    async def _exchange(self, path: str, token: str | None) -> tuple[int, dict[str, str], bytes]:
        if self._streams is not None and self._streams[0].at_eof():  # closed by the server, as it was idle for long
            self.close()
        if self._streams is None:
            self._streams = await asyncio.open_connection("127.0.0.1", self._port)
        reader, writer = self._streams
        authorization = f"Authorization: Bearer {token}\r\n" if token else ""
        writer.write(f"GET {path} HTTP/1.1\r\nHost: a\r\n{authorization}\r\n".encode("latin-1"))
        parser = h11.Connection(h11.CLIENT)
        parser.send(h11.Request(method="GET", target="/", headers=[("Host", "a")]))
        parser.send(h11.EndOfMessage())
        status, headers, body = 0, {}, []
        while True:
            event = parser.next_event()
            if event is h11.NEED_DATA:
                data = await reader.read(RECEIVE_BYTES)
                parser.receive_data(data)
                if not data and not status:
                    raise EOFError("closed without an answer")
            elif isinstance(event, h11.Response):
                status = event.status_code
                headers = {name.decode(): value.decode("latin-1") for name, value in event.headers}
            elif isinstance(event, h11.Data):
                body.append(bytes(event.data))
            elif isinstance(event, h11.EndOfMessage):
                break
            else:
                raise EOFError(f"cut off: {event}")
        if headers.get("connection") == "close":
            self.close()
        return status, headers, b"".join(body)

    def close(self) -> None:
        """Close the connection, if there is one."""
        if self._streams is not None:
            self._streams[1].transport.abort()
            self._streams = None


class Lag:
    """A context manager that notes how late this machine is: what no server is to blame for.

    A thread on each processor sleeps and looks at the clock, under the policy that the service gives itself: a single
    processor may stand still while the others go on. `watch_loop` does the same for an event loop.
    """

    TICK_SECONDS = 0.01
    LEAST_SECONDS = 0.005  # less is not noted

    def __init__(self) -> None:
        """Prepare."""
        self.worst_seconds = 0.0  # of all the time
        self._late: deque[tuple[float, float]] = deque(maxlen=2000)
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._watch, args=(number,)) for number in self._processors()]

    def __enter__(self) -> Self:
        """Begin."""
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End; what has been noted stays."""
        self._stop.set()
        for thread in self._threads:
            thread.join(10)
            assert not thread.is_alive()

    def worst_between(self, since: float, until: float) -> float:
        """Return how late it was at worst between two recent moments (monotonic seconds), in seconds."""
        return max((late for moment, late in list(self._late) if since <= moment + late and moment <= until), default=0)

    async def watch_loop(self) -> None:
        """Note how late the event loop is, until cancelled."""
        while True:
            started = time.monotonic()
            await asyncio.sleep(self.TICK_SECONDS)
            self._note(started)

    @staticmethod
    def _processors() -> list[int]:
        if not hasattr(os, "sched_getaffinity"):  # not Linux
            return []
        return sorted(os.sched_getaffinity(0))

    def _watch(self, processor: int) -> None:
        os.sched_setaffinity(0, {processor})  # of this thread alone
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
        while not self._stop.is_set():
            started = time.monotonic()
            time.sleep(self.TICK_SECONDS)  # not `_stop.wait`: a thread that waits for a lock is woken by another one
            self._note(started)

    def _note(self, started: float) -> None:
        late = time.monotonic() - started - self.TICK_SECONDS
        if late > self.LEAST_SECONDS:
            self._late.append((started + self.TICK_SECONDS, late))
            self.worst_seconds = max(self.worst_seconds, late)


@dataclass
class Load:
    """Clients that ask, in a thread of their own, until the block ends; `records` has the answers as they come.

    With a `rate` it is open: so many requests a second, however long the answers take. Without, it is closed: each of
    the `clients` asks again as soon as it has its answer.

    Args:
        port: the service's.
        paths: what to ask for, in turn.
        token: what to be authorised with, asked for with each request.
        clients: of a closed load.
        rate: requests a second of an open one.
    """

    port: int
    paths: Iterator[str]
    token: Callable[[], str]
    clients: int = 1
    rate: float | None = None
    records: list[Record] = field(default_factory=list)
    lag: Lag = field(default_factory=Lag)

    def __enter__(self) -> Self:
        """Start asking."""
        self.lag.__enter__()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()), daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop, and wait for the last answers."""
        self._stop.set()
        self._thread.join(2 * CLIENT_SECONDS)
        self.lag.__exit__(kind, error, trace)
        assert not self._thread.is_alive()

    def since(self, moment: float, until: float = float("inf")) -> list[Record]:
        """Return what was asked for from one moment up to another (monotonic seconds)."""
        return [record for record in list(self.records) if moment <= record.started < until]

    async def _run(self) -> None:
        idle: list[Client] = []
        watcher = asyncio.create_task(self.lag.watch_loop())
        async with asyncio.TaskGroup() as group:
            if self.rate is None:
                for _ in range(self.clients):
                    group.create_task(self._keep_asking())
            else:
                due = time.monotonic()
                while not self._stop.is_set():
                    group.create_task(self._ask_once(idle))
                    due += 1 / self.rate
                    await asyncio.sleep(max(0.0, due - time.monotonic()))
        watcher.cancel()
        for client in idle:
            client.close()
        await asyncio.sleep(0.01)  # the loop closes what has been aborted in its next rounds

    async def _keep_asking(self) -> None:
        client = Client(self.port)
        while not self._stop.is_set():
            self.records.append(await client.get(next(self.paths), self.token()))
        client.close()

    async def _ask_once(self, idle: list[Client]) -> None:
        client = idle.pop() if idle else Client(self.port)
        self.records.append(await client.get(next(self.paths), self.token()))
        idle.append(client)


def allowance(lag_seconds: float) -> float:
    """Return what an answer may be late by on a machine that is so busy: client, service and emulator all take part."""
    return 3 * lag_seconds


def waited_for_processors() -> dict[str, float]:
    """Return for how long each thread of the processes started by this one has been ready to run, and did not (in s).

    What runs a little at a time is hardly ever late beside processes that are always busy; what runs for longer is.
    Linux tells it in `/proc/PID/task/TID/schedstat`, as the second number, in ns.
    """
    waited = {"": 0.0}  # not Linux
    children = " ".join(map(text_of, glob.glob("/proc/self/task/*/children"))).split()
    for path in itertools.chain.from_iterable(glob.iglob(f"/proc/{child}/task/*/schedstat") for child in children):
        if numbers := text_of(path).split():
            waited[path] = int(numbers[1]) / 1e9
    return waited


def text_of(path: str) -> str:
    """Return what is in a file of Linux's /proc; empty if the thread that it tells of has ended."""
    with contextlib.suppress(OSError):
        return Path(path).read_text()
    return ""


class Answers(list[Record]):
    """Answers in the order of the questions, and how late the machine was at worst while they were waited for."""

    lag_seconds: float = 0.0


def ask_at_once(port: int, paths: Sequence[str], token: str) -> Answers:
    """Ask for all of these at the same time, each on a connection of its own."""

    async def run() -> Answers:
        answers = Answers()
        clients = [Client(port) for _ in paths]
        for client in clients:  # connected, so that all requests leave at once
            await client.get("/healthz")
        questions = zip(clients, paths, strict=True)
        waited = waited_for_processors()
        with Lag() as lag:
            watcher = asyncio.create_task(lag.watch_loop())
            answers += await asyncio.gather(*(client.get(path, token) for client, path in questions))
            watcher.cancel()
        longest = max(seconds - waited.get(thread, 0.0) for thread, seconds in waited_for_processors().items())
        answers.lag_seconds = max(lag.worst_seconds, longest)
        for client in clients:
            client.close()
        return answers

    return asyncio.run(run())


def wait_until(condition: Callable[[], object], what: str, seconds: float = 60.0) -> float:
    """Wait for a condition that nothing announces; return after how many seconds it held.

    Args:
        condition: is looked at again and again.
        what: to say if it does not come to hold.
        seconds: the deadline; by default far above what a busy machine takes.

    Raises:
        AssertionError: it does not hold in time.
    """
    started = time.monotonic()
    while not condition():
        assert time.monotonic() < started + seconds, f"not within {seconds} s: {what}"
        time.sleep(0.02)
    return time.monotonic() - started


def by_status(records: Iterable[Record]) -> dict[int, int]:
    """Count answers by status."""
    counts: dict[int, int] = {}
    for record in records:
        counts[record.status] = counts.get(record.status, 0) + 1
    return dict(sorted(counts.items()))


@contextlib.contextmanager
def polling(get: Callable[[], int], pause_seconds: float = 0.05) -> Iterator[list[tuple[float, int]]]:
    """Note a status again and again, as (monotonic seconds when asked, status), while the block runs."""
    seen: list[tuple[float, int]] = []
    stop = threading.Event()

    def poll() -> None:
        while not stop.is_set():
            moment = time.monotonic()
            seen.append((moment, get()))
            stop.wait(pause_seconds)

    thread = threading.Thread(target=poll, daemon=True)
    thread.start()
    try:
        yield seen
    finally:
        stop.set()
        thread.join(30)
        assert not thread.is_alive()
