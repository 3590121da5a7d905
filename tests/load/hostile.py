"""What hostile and many clients do to the service: ``python -m tests.load.hostile`` prints a table of measurements.

Starts the emulator and the service, surrounds one good client with idle, half-sent and never-reading ones, counts what
5,000 idle connections cost, and stops the service under load, again and again. Each row has its bound; the exit code is
1 if one is missed. Needs Linux, for ``/proc``.

The good client is measured alone and beside the others in turns, close together in time, and the median of the turns'
ratios counts: what else the machine does at the moment falls on both sides of a turn.
"""

import argparse
import asyncio
import resource
import ssl
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

from tests.emulator.process import EmulatorFailedError, EmulatorProcess
from tests.load.clients import Conversation, cpu_seconds, crowd, request, resident_bytes, stuff
from tests.sample_data import OneLineParser
from tests.service import Certificates, ServiceProcess, settings_for

PROFILES = 1000
TOKEN = "hostile-clients"
MAX_RATIO = 2.0  # of the good client's p99, beside the others to alone
MAX_IDLE_BYTES = 30 << 20  # that the idle connections may add to the process
REPLY_SECONDS = SETTLE_SECONDS = 30.0
LOAD_CLIENTS = 50
UNDER_WAY = 500  # answers before the signal: by then every client has had some
SMALL_BUFFER_BYTES = 4096  # of a client that does not read: the sooner the service has to keep its answer


class NotPossibleError(Exception):
    """Something that the measurements need is missing; the message says what, in one line."""


class Scale(NamedTuple):
    """How much of everything."""

    turns: int
    requests: int  # of the good client, on each side of a turn
    others: int
    idle: int
    stops: int


FULL = Scale(turns=11, requests=500, others=300, idle=5000, stops=20)
QUICK = Scale(turns=1, requests=100, others=40, idle=300, stops=2)


class Row(NamedTuple):
    """One line of the table."""

    what: str
    bound: str
    measured: str
    good: bool


@dataclass
class Tally:
    """What many clients saw."""

    answered: int = 0
    lost: Counter[str] = field(default_factory=Counter)  # answers that were due, by what came instead
    under_way: asyncio.Event = field(default_factory=asyncio.Event)


def progress(text: str) -> None:
    """Say on stderr what is being done."""
    print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)


# ── One good client among others ──────────────────────────────────────────────────────────────────────────────────────


def p99_ms(port: int, count: int) -> float:
    """Ask for so many profiles, one after the other on one connection; return the 99th percentile in milliseconds.

    Raises:
        AssertionError: an answer was not 200.
        OSError: there was none.
    """
    taken = []
    with Conversation(port) as client:
        for number in range(count):
            asked = request(f"/api/v1/id/{1 + number % PROFILES}", TOKEN)
            started = time.perf_counter()
            reply = client.ask(asked)
            taken.append((time.perf_counter() - started) * 1000)
            assert reply.status == 200, reply
    return statistics.quantiles(taken, n=100)[98]


def settle(service: ServiceProcess) -> None:
    """Wait until the service has done what was asked of it, as far as it can: it uses hardly any time any more.

    Raises:
        AssertionError: it goes on working.
    """
    deadline = time.monotonic() + SETTLE_SECONDS
    used = cpu_seconds(service.process.pid)
    while time.monotonic() < deadline:
        time.sleep(0.2)  # processor time is not an event
        before, used = used, cpu_seconds(service.process.pid)
        if used - before <= 0.02:
            return
    raise AssertionError("the service keeps working for clients that ask for nothing more")


@contextmanager
def half_sent_heads(port: int, count: int) -> Iterator[None]:
    """Send half a head each, and wait."""
    with crowd(port, count) as clients:
        stuff(clients, request("/api/v1/id/1", TOKEN)[:-2])
        yield


@contextmanager
def never_readers(port: int, count: int) -> Iterator[None]:
    """Ask for pictures as long as the service takes requests, and read none of the answers."""
    with crowd(port, count, SMALL_BUFFER_BYTES) as clients:
        wanted = request("/api/v1/picture/raw/1", TOKEN) * 100
        for _ in range(3):
            stuff(clients, wanted)
        yield


def client_hello() -> bytes:
    """Return the first message of a TLS handshake."""
    outgoing = ssl.MemoryBIO()
    with suppress(ssl.SSLWantReadError):
        ssl.create_default_context().wrap_bio(ssl.MemoryBIO(), outgoing, server_hostname="localhost").do_handshake()
    return outgoing.read()


@contextmanager
def unfinished_handshakes(port: int, count: int) -> Iterator[None]:
    """Begin a TLS handshake each, have the service do its part, and wait."""
    with crowd(int(port), count) as clients:
        stuff(clients, client_hello())
        yield


Kinds = dict[str, Callable[[int, int], AbstractContextManager[object]]]
OTHERS: Kinds = {
    "idle connections": crowd,
    "half-sent heads": half_sent_heads,
    "clients that ask for pictures and never read": never_readers,
}
TLS_OTHERS: Kinds = {"unfinished TLS handshakes": unfinished_handshakes}


def good_client_rows(service: ServiceProcess, scale: Scale, kinds: Kinds) -> Iterator[Row]:
    """Measure the good client alone and beside the others, in turns."""
    p99_ms(service.port, scale.requests)  # nothing is cold any more
    for name, others in kinds.items():
        alone, beside = [], []
        for turn in range(scale.turns):
            progress(f"a good client beside {scale.others} {name}: turn {turn + 1} of {scale.turns}")
            alone.append(p99_ms(service.port, scale.requests))
            with others(service.port, scale.others):
                settle(service)
                beside.append(p99_ms(service.port, scale.requests))
            settle(service)
        ratio = statistics.median(there / here for here, there in zip(alone, beside, strict=True))
        yield Row(
            f"p99 of a good client beside {scale.others} {name}",
            f"≤ {MAX_RATIO:.0f} × alone, no failure",
            f"{statistics.median(beside):.2f} ms, alone {statistics.median(alone):.2f} ms: {ratio:.2f} ×, no failure",
            ratio <= MAX_RATIO,
        )


def open_connections(service: ServiceProcess) -> int:
    """Return how many connections the service says are open."""
    text = service.get("/metrics", port=service.metrics_port).body.decode()
    [line] = [line for line in text.splitlines() if line.startswith("http_connections ")]
    return int(float(line.split()[1]))


def idle_memory_row(service: ServiceProcess, scale: Scale) -> Row:
    """Measure what idle connections add to the process's memory."""
    progress(f"{scale.idle} idle connections")
    before = resident_bytes(service.process.pid)
    with crowd(service.port, scale.idle):
        deadline = time.monotonic() + SETTLE_SECONDS
        while open_connections(service) < scale.idle:
            assert time.monotonic() < deadline, "not all connections were accepted"
        added = resident_bytes(service.process.pid) - before
    return Row(
        f"memory added by {scale.idle:,} idle connections",
        f"≤ {MAX_IDLE_BYTES >> 20} MiB",
        f"{added / (1 << 20):.1f} MiB ({added / scale.idle / 1024:.1f} KiB each)",
        added <= MAX_IDLE_BYTES,
    )


# ── Stopping under load ───────────────────────────────────────────────────────────────────────────────────────────────


async def _answer(reader: asyncio.StreamReader) -> tuple[int, bool]:
    """Read one answer; return its status and whether the connection closes.

    Raises:
        asyncio.IncompleteReadError: it is cut short, or there is none.
    """
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
    lines = head.split("\r\n")
    fields = dict(line.lower().split(": ", 1) for line in lines[1:-2])
    await reader.readexactly(int(fields["content-length"]))
    return int(lines[0].split(" ")[1]), fields.get("connection") == "close"


async def keep_asking(port: int, first: int, tally: Tally) -> None:
    """Ask for profiles on kept connections, one request after the other, until a connection is refused.

    Args:
        port: where.
        first: id of the first profile.
        tally: where the outcome of each request goes.
    """
    number = first
    while True:
        try:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
        except OSError:
            return
        asked = 0
        try:
            closes = False
            while not closes:
                writer.write(request(f"/api/v1/id/{1 + number % PROFILES}", TOKEN))
                status, closes = await asyncio.wait_for(_answer(reader), REPLY_SECONDS)
                number, asked = number + 1, asked + 1
                if status == 200:
                    tally.answered += 1
                else:
                    tally.lost[f"status {status}"] += 1
                if tally.answered >= UNDER_WAY:
                    tally.under_way.set()
        except (OSError, EOFError, TimeoutError) as error:
            tally.lost[f"{type(error).__name__} on request {asked + 1} of a connection"] += 1
        finally:
            writer.close()


async def _under_load(port: int, stop: Callable[[], None]) -> Tally:
    """Run `stop` in a thread while many clients ask; return what they saw."""
    tally = Tally()
    tasks = [asyncio.create_task(keep_asking(port, client * 17, tally)) for client in range(LOAD_CLIENTS)]
    await asyncio.wait_for(tally.under_way.wait(), REPLY_SECONDS)
    await asyncio.to_thread(stop)
    await asyncio.wait_for(asyncio.gather(*tasks), REPLY_SECONDS)
    return tally


def stop_under_load(settings: dict[str, str]) -> Tally:
    """Start the service, let many clients ask, and send it SIGTERM; return what they saw.

    Raises:
        AssertionError: it did not end with exit code 0.
    """

    def stop() -> None:
        assert service.stop() == 0, service.raw_lines[-3:]

    with ServiceProcess(settings, "--access-log", "false") as service:
        return asyncio.run(_under_load(service.port, stop))


def stop_row(settings: dict[str, str], scale: Scale) -> Row:
    """Stop the service again and again."""
    tallies = []
    for run in range(scale.stops):
        progress(f"SIGTERM under load: run {run + 1} of {scale.stops}")
        tallies.append(stop_under_load(settings))
    lost = sum((tally.lost for tally in tallies), Counter[str]())
    good = sum(not tally.lost for tally in tallies)
    answered = sum(tally.answered for tally in tallies)
    details = f", lost: {', '.join(f'{count} × {why}' for why, count in lost.items())}" if lost else ""
    return Row(
        f"SIGTERM beside {LOAD_CLIENTS} keep-alive clients",
        f"no request lost, {len(tallies)} runs of {len(tallies)}",
        f"{good} of {len(tallies)} ({answered:,} requests answered, {lost.total()} lost{details})",
        good == len(tallies),
    )


# ── The command ───────────────────────────────────────────────────────────────────────────────────────────────────────


def _check_machine(scale: Scale) -> None:
    """See to it that the machine can do this.

    Raises:
        NotPossibleError: it cannot.
    """
    if not Path("/proc/self/statm").exists():
        raise NotPossibleError("needs Linux: there is no /proc to read the process's memory from")
    needed = scale.idle + 500
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < needed:
        raise NotPossibleError(f"needs {needed} descriptors a process, and the limit is {hard}: raise `ulimit -Hn`")
    if soft != resource.RLIM_INFINITY and soft < needed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))  # the processes started from here inherit it


def measure(scale: Scale) -> Iterator[Row]:
    """Start what is needed and measure everything; yields each row as it is known."""
    _check_machine(scale)
    progress("starting the emulator and the service")
    with EmulatorProcess(profiles=PROFILES, token=TOKEN) as database:
        settings = settings_for(database)
        with ServiceProcess(settings, "--access-log", "false") as service:
            yield idle_memory_row(service, scale)
            yield from good_client_rows(service, scale, OTHERS)
        with TemporaryDirectory() as folder:
            made = Certificates(Path(folder))
            with ServiceProcess(settings | made.settings, "--access-log", "false", tls=made.client()) as service:
                yield from good_client_rows(service, scale, TLS_OTHERS)
        yield stop_row(settings, scale)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print; return 0, 1 if a bound is missed, 2 if something is missing."""
    parser = OneLineParser(prog="python -m tests.load.hostile", description=(__doc__ or "").partition("\n")[0])
    parser.formatter_class = argparse.ArgumentDefaultsHelpFormatter
    parser.add_argument("--quick", action="store_true", help="a little of everything, to see that it works")
    options = parser.parse_args(argv)
    rows: list[Row] = []
    try:
        for row in measure(QUICK if options.quick else FULL):
            if not rows:
                progress("")
                print("| what | bound | measured | |\n|---|---|---|---|")
            progress("")
            rows.append(row)
            print(f"| {row.what} | {row.bound} | {row.measured} | {'good' if row.good else 'MISSED'} |", flush=True)
    except (NotPossibleError, EmulatorFailedError, AssertionError, OSError) as error:
        progress("")
        print(f"{parser.prog}: {' '.join(str(error).split())[:500] or type(error).__name__}", file=sys.stderr)
        return 2
    progress("")
    return 0 if all(row.good for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
