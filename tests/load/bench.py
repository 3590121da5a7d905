"""The run: each service alone and in turn, round after round, so that what disturbs the machine disturbs them all."""

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tests.load import bench_backend, bench_check, bench_plan
from tests.load.bench_backend import Backend
from tests.load.bench_plan import EXPRESS, FASTAPI, OURS, SDK_CEILING, SDK_ON_ONE_PROCESSOR, Lives, Scenario, Setup
from tests.load.bench_processes import Load, RunError, Service, keep_to_one_processor, measure, run_wrk
from tests.load.bench_tools import PEERS, Tools, output_of
from tests.service import ROOT

SDK_LOOPS = {
    SDK_CEILING: (8, 1, False),
    SDK_ON_ONE_PROCESSOR: (8, 1, True),
    "get_multi of 16, 1 thread": (1, 16, False),
    "get_multi of 16, 2 threads": (2, 16, False),
}
"""By name: threads, keys at once, and whether they are kept to one processor."""
SDK_GRACE_SECONDS = 60.0
WARM_UP = Scenario("warm-up", 32)
QUIET_CORES = 0.25
"""What other processes, and the kernel's work for nobody in particular, may use of a machine that counts as quiet."""
LIFE_SECONDS = 2.5
"""What starting, checking and stopping a service takes, for the estimate."""


@dataclass(frozen=True)
class Choices:
    """What a run is to do, as the command line asks for it."""

    services: tuple[str, ...]
    only: tuple[str, ...]
    seconds: int
    repeat: int
    warm_up_seconds: int
    real_cluster: bool

    @property
    def sdk(self) -> bool:
        """Whether the SDK alone is measured too."""
        return not self.only or "sdk" in self.only


@dataclass
class Run:
    """A run under way: what it has measured, and what went wrong.

    Attributes:
        tools: where wrk and the peers are.
        choices: what was asked for.
        say: prints a line of progress.
        total: how many measurements there will be.
    """

    tools: Tools
    choices: Choices
    say: Callable[[str], None]
    total: int = 0
    errors: list[str] = field(default_factory=list)
    _done: int = 0
    _started: float = field(default_factory=time.monotonic)
    _rejected: set[str] = field(default_factory=set)
    _differs: set[str] = field(default_factory=set)

    def lives(
        self, lives: Lives, backend: Backend, repeat: int = 1, alone: Sequence[dict[str, Any]] = ()
    ) -> list[dict[str, Any]]:
        """Measure every scenario of every setup, `repeat` times in turns; return one row for each.

        The SDK alone takes part in the turns, as the machine drifts: its rows are `alone`.
        A service that does not start, or (another commit aside) answers otherwise than ours, is an error: not measured.
        """
        rows: dict[tuple[Setup, str], dict[str, Any]] = {}
        with self._service(Setup(OURS, False), backend) as service:
            reference = bench_check.answers(service.ports[0], backend)
        for number in range(repeat):
            self._sdk(alone, backend)
            for setup, scenarios in lives:
                if setup.service in self._rejected:
                    continue
                try:
                    with self._service(setup, backend) as service:
                        wrong = bench_check.differences(service.ports[0], backend, reference)
                        if wrong and setup.other_commit:
                            if setup.service not in self._differs:
                                self.say(f"{setup}: it answers otherwise, which may cost or save time: {wrong[0]}")
                            self._differs.add(setup.service)
                        elif wrong:
                            self._rejected.add(setup.service)
                            why = f"it answers otherwise than {bench_plan.TITLES[OURS]}, so it is not measured"
                            raise RunError(f"{why}: {wrong[0]}")
                        for scenario, figures in self._measured(setup, scenarios, service, backend, number):
                            row = asdict(setup) | {"scenario": scenario.name, "connections": scenario.connections}
                            row |= {"latency_ms": scenario.latency_ms, "documents": backend.documents, "rounds": []}
                            rows.setdefault((setup, scenario.name), row)["rounds"].append(rounded(figures))
                except (RunError, OSError) as error:
                    self._fail(f"{setup}: {error}")
        return list(rows.values())

    def _service(self, setup: Setup, backend: Backend) -> Service:
        settings = backend.settings if setup.service == OURS else backend.peer_settings
        return Service(setup, self.tools, settings, backend.token)

    def _measured(
        self, setup: Setup, scenarios: list[Scenario], service: Service, backend: Backend, number: int
    ) -> Iterator[tuple[Scenario, dict[str, float]]]:
        """Warm a service up, and yield the figures of each scenario; `number` is the round's."""
        if self.choices.warm_up_seconds:
            seconds = self.choices.warm_up_seconds
            run_wrk(self.tools, service.ports, Load(WARM_UP, backend.targets["ids"], backend.token, seconds, number))
        for scenario in scenarios:
            targets, seed = backend.targets[scenario.targets], 1 + number * 1000
            load = Load(scenario, targets, backend.token, self.choices.seconds, seed)
            backend.delay(scenario.latency_ms)
            try:
                figures = measure(service, self.tools, load, backend.pid)
            finally:
                backend.delay(0)
            self._progress(f"{setup}, {scenario.name}", figures)
            yield scenario, figures

    def _sdk(self, rows: Sequence[dict[str, Any]], backend: Backend) -> None:
        for row in rows:
            try:
                figures = self._sdk_loop(row, backend)
            except RunError as error:
                self._fail(str(error))
                continue
            row["rounds"].append(rounded(figures))
            self._progress(f"SDK alone, {row['loop']}", figures)

    def _sdk_loop(self, row: dict[str, Any], backend: Backend) -> dict[str, float]:
        numbers = map(str, (row["threads"], row["batch"], self.choices.seconds, backend.documents))
        kept = {name: value for name, value in os.environ.items() if not name.startswith("COUCHBASE")}
        try:
            done = subprocess.run(  # noqa: S603  # this Python, with numbers
                [sys.executable, "-m", "tests.load.bench_sdk", *numbers],
                cwd=ROOT,
                env=kept | backend.settings,
                capture_output=True,
                text=True,
                timeout=self.choices.seconds + SDK_GRACE_SECONDS,
                check=False,
                preexec_fn=keep_to_one_processor if row["one_processor"] else None,  # one thread here
            )
        except subprocess.TimeoutExpired:
            raise RunError("the SDK's loop did not end") from None
        if done.returncode:
            raise RunError(f"the SDK's loop failed: {done.stderr.strip()[-300:]}")
        figures: dict[str, float] = json.loads(done.stdout)
        return figures

    def _fail(self, message: str) -> None:
        line = " ".join(message.split())
        self.errors.append(line)
        self.say(f"FAILED {line}")

    def _progress(self, what: str, figures: dict[str, float]) -> None:
        self._done += 1
        elapsed = time.monotonic() - self._started
        minutes, seconds = divmod(int(elapsed / self._done * max(0, self.total - self._done)), 60)
        parts = [f"{figures['requests_per_second']:,.0f}/s"]
        parts += [f"p99 {figures['p99_ms']:.1f} ms"] if "p99_ms" in figures else []
        parts += [f"{figures['cpu_us']:.0f} µs"]
        parts += [f"{figures['failures']:.0f} FAILURES"] if figures.get("failures") else []
        others = figures.get("other_cores", 0.0)
        parts += [f"others used {others:.1f} cores"] if others > QUIET_CORES else []
        self.say(f"[{self._done}/{self.total}, {minutes}:{seconds:02d} left] {what}: {', '.join(parts)}")


def rounded(figures: dict[str, float]) -> dict[str, float]:
    """Return figures with no more digits than mean something."""
    return {name: round(value, 3) if value < 100 else round(value, 1) for name, value in figures.items()}


# ── The parts: what is written into a file of its own ─────────────────────────────────────────────────────────────────


def services_lives(choices: Choices) -> Lives:
    """Return the comparison's lives; with a real cluster, without the latency that only the emulator can add."""
    lives = bench_plan.services_plan(choices.services, choices.only)
    if not choices.real_cluster:
        return lives
    return [(setup, [each for each in scenarios if not each.latency_ms]) for setup, scenarios in lives]


def compare(run: Run) -> dict[str, Any]:
    """Run the comparison of the services."""
    choices = run.choices
    with bench_backend.cluster(dict(os.environ)) if choices.real_cluster else bench_backend.emulated() as backend:
        alone: list[dict[str, Any]] = [
            {"loop": name, "threads": threads, "batch": batch, "one_processor": kept, "rounds": []}
            for name, (threads, batch, kept) in (SDK_LOOPS if choices.sdk else {}).items()
        ]
        return {"measurements": run.lives(services_lives(choices), backend, choices.repeat, alone), "sdk": alone}


def grid(run: Run) -> dict[str, Any]:
    """Run our service with other numbers of document workers and batch sizes."""
    with bench_backend.emulated() as backend:
        return {"measurements": run.lives(bench_plan.grid_plan(), backend)}


def growth(run: Run) -> dict[str, Any]:
    """Run with more and more connections, then with more and more documents."""
    services = run.choices.services
    with bench_backend.emulated() as backend:
        connections = run.lives(bench_plan.growth_plan(services), backend)
    documents = []
    for count in bench_plan.GROWTH_DOCUMENTS:
        run.say(f"filling the emulator with {count:,} profiles")
        with bench_backend.emulated(count, pictures=False) as backend:
            documents += run.lives(bench_plan.documents_plan(services), backend)
    return {"connections": connections, "documents": documents}


def against(run: Run) -> list[list[dict[str, Any]]]:
    """Run our service as it is and as another commit has it; return the rows of each round."""
    plan, rounds = services_lives(run.choices), []
    with bench_backend.emulated() as backend:
        for number in range(run.choices.repeat):
            order = (True, False) if number % 2 else (False, True)  # so that drift hits both alike
            turns = [(setup, [scenario]) for setup, scenarios in plan for scenario in scenarios]
            lives = [(replace(setup, other_commit=other), each) for setup, each in turns for other in order]
            rounds.append(run.lives(lives, backend))
    for row in (row for rows in rounds for row in rows):
        failures, rate = (row["rounds"][0][name] for name in ("failures", "requests_per_second"))
        if failures or not rate:
            whose = "the other commit" if row["other_commit"] else "the present state"
            run.errors.append(f"{row['scenario']}, {whose}: {failures:.0f} failures at {rate:,.0f} requests/s")
    return rounds


def count_all(parts: Iterable[str], choices: Choices) -> tuple[int, float]:
    """Return how many measurements the parts will make, and roughly how many seconds they take."""
    lives: Lives = []
    loops, seconds = 0, 0.0
    if "services" in parts:
        lives += services_lives(choices) * choices.repeat
        loops = len(SDK_LOOPS) * choices.repeat if choices.sdk else 0
    if "grid" in parts:
        lives += bench_plan.grid_plan()
    if "growth" in parts:
        lives += bench_plan.growth_plan(choices.services)
        lives += bench_plan.documents_plan(choices.services) * len(bench_plan.GROWTH_DOCUMENTS)
        seconds += 75  # filling the emulator
    measurements = sum(len(scenarios) for _, scenarios in lives)
    seconds += measurements * (choices.seconds + 0.3) + loops * (choices.seconds + 1)
    return measurements + loops, seconds + len(lives) * (LIFE_SECONDS + choices.warm_up_seconds)


def description(choices: Choices, tools: Tools) -> dict[str, Any]:
    """Describe machine, versions, date and choices, for the results; no host's name and no path."""
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "backend": "a Couchbase cluster" if choices.real_cluster else "the emulator",
        "seconds": choices.seconds,
        "repeat": choices.repeat,
        "machine": {
            "processor": _processor(),
            "cores": len(os.sched_getaffinity(0)),
            "memory_gb": round(int(Path("/proc/meminfo").read_text().split()[1]) / 1e6, 1),
            "kernel": f"{platform.system()} {platform.release()}",
        },
        "versions": _versions(choices, tools),
    }


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _versions(choices: Choices, tools: Tools) -> dict[str, str]:
    found = {"Python": platform.python_version(), "couchbase (Python)": version("couchbase")}
    words = output_of([tools.wrk, "-v"]).split()
    found["wrk"] = words[1].removeprefix("debian/") if len(words) > 1 else "unknown"
    if EXPRESS in choices.services:
        found["Node.js"] = output_of([tools.node, "--version"]).removeprefix("v")
        packages = json.loads((PEERS / "express" / "package.json").read_text())["dependencies"]
        found |= {f"{name} (Node.js)" if name == "couchbase" else name: pin for name, pin in packages.items()}
    if FASTAPI in choices.services:
        lines = (PEERS / "fastapi" / "requirements.txt").read_text().splitlines()
        pins = dict(line.split("==") for line in lines if "==" in line)
        found |= {name: pin for name, pin in pins.items() if name != "couchbase"}
    return found
