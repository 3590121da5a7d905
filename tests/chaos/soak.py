"""Mixed load while faults come and go, every answer judged: ``python -m tests.chaos.soak --help``.

An emulator and the service run in processes of their own. Clients ask for profiles, lookups, pictures, documents that
do not exist, and with bad tokens, at a steady rate. A schedule drawn from the seed switches faults on and off. Every
answer must be one that the contract allows at that moment, with the body that was stored, within its deadline.
"""

import asyncio
import base64
import contextlib
import json
import random
import re
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from tests import sample_data
from tests.chaos.clients import Client, Lag, Record, allowance
from tests.emulator.process import EmulatorProcess
from tests.load.clients import descriptors, resident_bytes, threads
from tests.sample_data import OneLineParser, whole_number
from tests.service import ServiceProcess, settings_for

PROFILES, PICTURES = 500, 50
TOKEN = "soak"
TIMEOUT_SECONDS, QUERY_TIMEOUT_SECONDS = 0.8, 1.2
GRACE_SECONDS = 0.2  # 0.1 s of the service's own, and as much for the emulator and the client
LOCAL_SECONDS = 0.5  # for what the service knows by itself: refusals, probes
PATIENCE_SECONDS = 0.25  # for which a query waits for a thread: where the machine is late by more it may be refused
RECOVERY_SECONDS = 5.0  # after a fault, until everything is as if it had not been
CALM_SECONDS = 2.0  # at most between two faults; now and then, the recovery besides
REPORT_SECONDS = 5.0
MAX_WRONG_SHOWN = 20
DRIFT = 0.1
DRIFT_FLOOR = {"threads": 0.0, "descriptors": 5.0, "memory MB": 5.0}  # what 10 % of little must not be blamed for
MIX = ("profile",) * 10 + ("lookup",) * 3 + ("picture",) * 3 + ("missing",) * 2 + ("bad token",) + ("probe",)


class Expected(NamedTuple):
    """What is right for one request if nothing is wrong: the status, a judge of the body, and the deadline."""

    status: int
    is_right: Callable[[bytes], bool]
    deadline_seconds: float


class Question(NamedTuple):
    """One request and what is to be said to it; `service` is what of Couchbase it needs, None for nothing."""

    kind: str
    path: str
    token: str | None
    service: str | None
    expected: Expected


class Fault(NamedTuple):
    """One fault of the schedule: its name in the table, what it touches, and how it begins."""

    kind: str
    services: frozenset[str]
    begin: Callable[[EmulatorProcess], None]


BOTH = frozenset({"kv", "query"})
KV, QUERY = frozenset({"kv"}), frozenset({"query"})
# A query service that forgets its prepared statements is not among them: the SDK keeps a thread for each query that it
# loses by that, which `test_failures.py` shows, and which would hide what else might grow.
FAULTS = (
    Fault("freeze key-value", KV, lambda emulator: emulator.fault("freeze", service="kv")),
    Fault("freeze query", QUERY, lambda emulator: emulator.fault("freeze", service="query")),
    Fault("freeze everything", BOTH, lambda emulator: emulator.fault("freeze")),
    Fault("slow key-value", KV, lambda emulator: emulator.fault("latency", service="kv", ms=200)),
    Fault("slow query", QUERY, lambda emulator: emulator.fault("latency", service="query", ms=400)),
    Fault("key-value slower than its time-out", KV, lambda emulator: emulator.fault("latency", service="kv", ms=1500)),
    Fault("drop key-value", KV, lambda emulator: emulator.fault("drop", service="kv")),
    Fault("drop everything", BOTH, lambda emulator: emulator.fault("drop")),
    Fault("temporary failures", KV, lambda emulator: emulator.fault("temporary_failure")),
    Fault("some temporary failures", KV, lambda emulator: emulator.fault("temporary_failure", count=30)),
    Fault("query errors", QUERY, lambda emulator: emulator.fault("query_error", code=5000)),
    Fault("node stops", BOTH, lambda emulator: emulator.stop_node(0)),
)


@dataclass
class Results:
    """What the table says."""

    statuses: Counter[int] = field(default_factory=Counter)
    kinds: Counter[str] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)
    worst_seconds: float = 0.0
    worst_path: str = "-"
    wrong: int = 0
    examples: list[str] = field(default_factory=list)

    def blame(self, what: str) -> None:
        """Count something that is wrong, and keep the first few."""
        self.wrong += 1
        if len(self.examples) < MAX_WRONG_SHOWN:
            self.examples.append(what)


class Stock:
    """What is stored, and so what each request must be answered with."""

    def __init__(self, seed: int) -> None:
        """Make the same data as the emulator."""
        self._profiles = {number: sample_data.profile(number, seed) for number in range(1, PROFILES + 1)}
        self._raw = {number: sample_data.encode(profile) for number, profile in self._profiles.items()}
        self._pictures = {number: sample_data.picture(number, seed) for number in range(1, PICTURES + 1)}
        self._by_username: dict[str, list[dict[str, Any]]] = {}
        for profile in sorted(self._profiles.values(), key=lambda profile: f"user_data:{profile['record_id']}"):
            self._by_username.setdefault(profile["user_id"], []).append(profile)
        self._usernames = [name for name in self._by_username if re.fullmatch(r"[a-z0-9._-]+", name)]

    def draw(self, source: random.Random) -> Question:
        """Draw a request."""
        kind = source.choice(MIX)
        number = source.randint(1, PROFILES)
        picture = source.randint(1, PICTURES)
        if kind == "profile":
            return Question(
                kind, f"/api/v1/id/{number}", TOKEN, "kv",
                Expected(200, (b"[%b]" % self._raw[number]).__eq__, TIMEOUT_SECONDS),
            )  # fmt: skip
        if kind == "lookup":
            name = source.choice(self._usernames)
            rows = self._by_username[name]
            expected = Expected(200, lambda body: json.loads(body) == rows, QUERY_TIMEOUT_SECONDS)
            return Question(kind, f"/api/v1/username/{name}", TOKEN, "query", expected)
        if kind == "picture":
            stored = self._pictures[picture]
            if source.random() < 0.5:
                image = base64.b64decode(stored["image"])
                expected = Expected(200, image.__eq__, TIMEOUT_SECONDS)
                return Question(kind, f"/api/v1/picture/raw/{picture}", TOKEN, "kv", expected)
            whole = b"[%b]" % sample_data.encode(stored)
            expected = Expected(200, whole.__eq__, TIMEOUT_SECONDS)
            return Question(kind, f"/api/v1/picture/record/{picture}", TOKEN, "kv", expected)
        if kind == "missing":
            path, service, seconds = source.choice(
                (
                    (f"/api/v1/id/{PROFILES + number}", "kv", TIMEOUT_SECONDS),
                    (f"/api/v1/picture/raw/{PICTURES + number}", "kv", TIMEOUT_SECONDS),
                    (f"/api/v1/nickname/nobody-{number}", "query", QUERY_TIMEOUT_SECONDS),
                )
            )
            return Question(kind, path, TOKEN, service, Expected(404, is_problem(404), seconds))
        if kind == "bad token":
            token = source.choice((None, "x", TOKEN + "x", "é"))
            return Question(kind, f"/api/v1/id/{number}", token, None, Expected(401, is_problem(401), LOCAL_SECONDS))
        return Question(kind, "/healthz", None, None, Expected(200, b'{"status": "alive"}'.__eq__, LOCAL_SECONDS))


def is_problem(status: int) -> Callable[[bytes], bool]:
    """Return a judge of problem documents."""

    def judge(body: bytes) -> bool:
        return json.loads(body)["status"] == status

    return judge


class Weather:
    """When which service of Couchbase was disturbed: what an answer may be depends on it."""

    def __init__(self) -> None:
        """Begin with fair weather."""
        self._spells: list[tuple[frozenset[str], float, float]] = []
        self.current: Fault | None = None

    def begins(self, fault: Fault) -> None:
        """A fault is about to be switched on."""
        self.current = fault
        self._spells.append((fault.services, time.monotonic(), float("inf")))

    def ends(self) -> None:
        """It has been switched off."""
        services, began, _ = self._spells[-1]
        self._spells[-1] = services, began, time.monotonic()
        self.current = None

    def disturbs(self, service: str, started: float, ended: float) -> bool:
        """Tell whether a service was disturbed, or may not have recovered, at any time of a request."""
        return any(
            service in services and started < end + RECOVERY_SECONDS and ended > began
            for services, began, end in self._spells[-5:]
        )


class Usage(NamedTuple):
    """What the service's process holds."""

    threads: int
    descriptors: int
    memory_bytes: int

    @classmethod
    def of(cls, pid: int) -> "Usage":
        """Read it from Linux's /proc."""
        return cls(threads(pid), descriptors(pid), resident_bytes(pid))

    def rows(self) -> dict[str, float]:
        """Return it by name, in the units of the table."""
        return {"threads": self.threads, "descriptors": self.descriptors, "memory MB": self.memory_bytes / 1e6}


class Soak:
    """One run."""

    def __init__(self, seconds: float, rate: float, seed: int) -> None:
        """Prepare.

        Args:
            seconds: how long the load and the faults last.
            rate: requests a second.
            seed: what the data, the requests and the schedule are drawn from.
        """
        self.seconds, self.rate, self.seed = seconds, rate, seed
        self.results = Results()
        self._weather = Weather()
        self._stock = Stock(sample_data.DEFAULT_SEED)
        self._idle: deque[Client] = deque()
        self._lag = Lag()
        self._before: Usage | None = None
        self._after: Usage | None = None

    def run(self) -> bool:
        """Do it, print the table, and tell whether nothing was wrong."""
        settings = {
            "COUCHBASE_TIMEOUT_MS": str(round(TIMEOUT_SECONDS * 1000)),
            "COUCHBASE_QUERY_TIMEOUT_MS": str(round(QUERY_TIMEOUT_SECONDS * 1000)),
            "ACCESS_LOG": "false",
        }
        with (
            EmulatorProcess(profiles=PROFILES, pictures=PICTURES, token=TOKEN) as emulator,
            ServiceProcess(settings_for(emulator) | settings) as service,
            self._lag,
        ):
            asyncio.run(self._run(emulator, service))
        self._print_table()
        return self.results.wrong == 0

    async def _run(self, emulator: EmulatorProcess, service: ServiceProcess) -> None:
        source = random.Random(f"{self.seed}:requests")
        async with asyncio.TaskGroup() as group:
            background = [group.create_task(work) for work in (self._lag.watch_loop(), self._report())]
            await self._load(service, source, self._warm_up(emulator))
            self._before = await self._measure(service)
            await self._load(service, source, self._schedule(emulator))
            await self._settle(service)
            for task in background:
                task.cancel()

    async def _warm_up(self, emulator: EmulatorProcess) -> None:
        """Let every fault pass before the first measurement: what the first of its kind needs then stays."""
        await asyncio.sleep(CALM_SECONDS)
        for fault in FAULTS:
            await self._play(emulator, fault, TIMEOUT_SECONDS * 2)
        await asyncio.sleep(RECOVERY_SECONDS + 1)

    async def _schedule(self, emulator: EmulatorProcess) -> None:
        """Switch faults on and off; each kind comes once before one comes twice."""
        source = random.Random(f"{self.seed}:faults")
        deadline = time.monotonic() + self.seconds
        bag: list[Fault] = []
        while True:
            bag = bag or source.sample(FAULTS, len(FAULTS))
            lasts, calm = source.uniform(0.5, 3.0), source.uniform(0.3, CALM_SECONDS)
            if source.random() < 0.3:
                calm += RECOVERY_SECONDS  # so that there are times when everything must be well
            if time.monotonic() + lasts + calm + RECOVERY_SECONDS > deadline:
                break
            await self._play(emulator, bag.pop(), lasts)
            await asyncio.sleep(calm)
        await asyncio.sleep(max(0.0, deadline - time.monotonic()))

    async def _play(self, emulator: EmulatorProcess, fault: Fault, seconds: float) -> None:
        """Have one fault for so long. The emulator's calls block, so they run in a thread."""
        self.results.faults[fault.kind] += 1
        self._weather.begins(fault)
        await asyncio.to_thread(fault.begin, emulator)
        await asyncio.sleep(seconds)
        await asyncio.to_thread(emulator.clear)
        await asyncio.to_thread(emulator.start_node, 0)
        self._weather.ends()

    async def _load(self, service: ServiceProcess, source: random.Random, until: Any) -> None:
        """Ask at the rate until a coroutine is done, then wait for the last answers."""
        async with asyncio.TaskGroup() as group:
            last = group.create_task(until)
            due = time.monotonic()
            while not last.done():
                group.create_task(self._ask(service.port, self._stock.draw(source)))
                due = max(due + 1 / self.rate, time.monotonic() - 1.0)
                await asyncio.sleep(max(0.0, due - time.monotonic()))

    async def _ask(self, port: int, question: Question) -> None:
        client = self._idle.pop() if self._idle else Client(port)
        record = await client.get(question.path, question.token)
        self._idle.append(client)
        if record.status == 503 or record.seconds > question.expected.deadline_seconds + GRACE_SECONDS:
            await asyncio.sleep(0.1)  # until it is known how late the machine was
        self._judge(question, record)

    def _judge(self, question: Question, record: Record) -> None:
        """Count an answer, and say what is wrong with it."""
        results, expected = self.results, question.expected
        ended = record.started + record.seconds
        results.statuses[record.status] += 1
        results.kinds[question.kind] += 1
        if record.seconds > results.worst_seconds:
            results.worst_seconds, results.worst_path = record.seconds, record.path
        lag = self._lag.worst_between(record.started, ended)  # what the machine was late by is not the service's fault
        disturbed = question.service is not None and self._weather.disturbs(question.service, record.started, ended)
        refused = question.service == "query" and record.status == 503 and lag > PATIENCE_SECONDS
        where = f"{question.kind} {record.path} at {record.started:.1f} ({record.seconds * 1000:.0f} ms): "
        if self._weather.current:
            where += f"[{self._weather.current.kind}] "
        if record.status == expected.status:
            if not is_so(expected.is_right, record.body):
                results.blame(where + f"{record.status} with a wrong body: {record.body[:100]!r}")
        elif refused or (record.status in {503, 504} and disturbed):
            if not is_so(is_problem(record.status), record.body):
                results.blame(where + f"{record.status} without a problem document: {record.body[:100]!r}")
            if (record.status == 503) != ("retry-after" in record.headers):
                results.blame(where + f"{record.status} and Retry-After do not go together")
        else:
            results.blame(where + f"{record.status} instead of {expected.status}: {record.body[:100]!r}")
        if record.seconds > expected.deadline_seconds + GRACE_SECONDS + allowance(lag):
            late_by = f"{expected.deadline_seconds * 1000:.0f} ms (the machine {lag * 1000:.0f} ms)"
            results.blame(where + f"later than {late_by}")

    async def _settle(self, service: ServiceProcess) -> None:
        """After the last fault everything is 200 within 5 s, and what the process holds is what it held."""
        source = random.Random(f"{self.seed}:end")
        questions = [self._stock.draw(source) for _ in range(200)]
        for question in questions:
            record = await Client(service.port).get(question.path, question.token)
            self._judge(question, record)
        ready = await Client(service.port).get("/readyz")
        if ready.status != 200:
            self.results.blame(f"/readyz answers {ready.status} in the end: {ready.body[:200]!r}")
        self._after = await self._measure(service)
        assert self._before is not None
        for (name, before), after in zip(self._before.rows().items(), self._after.rows().values(), strict=True):
            if abs(after - before) > max(DRIFT * before, DRIFT_FLOOR[name]):
                self.results.blame(f"{name}: {before:.1f} before, {after:.1f} after")

    async def _measure(self, service: ServiceProcess) -> Usage:
        """Look at what the service holds while nobody is connected."""
        for client in self._idle:
            client.close()
        self._idle.clear()
        await asyncio.sleep(8.0)  # until the service has noticed, and ended half of its idle threads, and half of those
        return Usage.of(service.process.pid)

    async def _report(self) -> None:
        started = time.monotonic()
        while True:
            await asyncio.sleep(REPORT_SECONDS)
            weather = self._weather.current.kind if self._weather.current else "no fault"
            line = f"{time.monotonic() - started:5.0f} s: {self.results.statuses.total()} answers, "
            line += f"{self.results.wrong} wrong; {weather}"
            print(line, file=sys.stderr, flush=True)

    def _print_table(self) -> None:
        """Print what was seen."""
        results = self.results
        print(f"seed {self.seed}, {self.seconds:.0f} s at {self.rate:.0f} requests/s")
        print(f"requests       {results.statuses.total():>9,}")
        for kind, count in sorted(results.kinds.items()):
            print(f"  {kind:<12} {count:>9,}")
        print("answers by status")
        for status, count in sorted(results.statuses.items()):
            print(f"  {status:<12} {count:>9,}")
        print(f"faults         {results.faults.total():>9,}")
        for kind, count in sorted(results.faults.items()):
            print(f"  {kind:<36} {count:>3}")
        print(f"worst latency  {results.worst_seconds * 1000:>9.0f} ms ({results.worst_path})")
        print(f"  the machine itself was late by {self._lag.worst_seconds * 1000:.0f} ms at most")
        if self._before and self._after:
            print("the service's process, before and after")
            for (name, before), after in zip(self._before.rows().items(), self._after.rows().values(), strict=True):
                print(f"  {name:<12} {before:>9.1f} {after:>9.1f}")
        print(f"wrong          {results.wrong:>9,}")
        for example in results.examples:
            print(f"  {example}")
        sys.stdout.flush()


def is_so(judge: Callable[[bytes], bool], body: bytes) -> bool:
    """Tell what a judge says of a body; one that it cannot read is wrong."""
    with contextlib.suppress(ValueError, KeyError, TypeError):
        return judge(body)
    return False


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return 0 if nothing was wrong, 1 if something was."""
    flags = OneLineParser(prog="soak", description="Mixed load on the service while faults of Couchbase come and go.")
    flags.add_argument("--seconds", type=whole_number(20, 86_400), default=600, metavar="N", help="how long (600)")
    flags.add_argument("--rate", type=whole_number(1, 2000), default=150, metavar="N", help="requests a second (150)")
    flags.add_argument("--seed", type=whole_number(0, 10**9 - 1), metavar="N", help="draws the schedule (random)")
    given = flags.parse_args(argv)
    if not Path("/proc/self/task").exists():
        flags.error("needs Linux's /proc to see what the service's process holds")
    seed = random.randrange(10**9) if given.seed is None else given.seed
    return 0 if Soak(given.seconds, given.rate, seed).run() else 1


if __name__ == "__main__":
    sys.exit(main())
