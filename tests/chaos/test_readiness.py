"""Readiness follows Couchbase within five seconds, both ways; liveness never does."""

import itertools
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import NamedTuple

import pytest

from tests.chaos.clients import Load, by_status, polling, wait_until
from tests.chaos.conftest import SHORT, TOKEN, WELL_SECONDS
from tests.chaos.scenes import Scene
from tests.emulator.process import EmulatorProcess
from tests.service import ServiceProcess, settings_for

IDS = [f"/api/v1/id/{number}" for number in range(1, 51)]
Fault = Callable[[EmulatorProcess], None]


def freeze(database: EmulatorProcess) -> None:
    """Nothing is answered any more; the connections stay."""
    database.fault("freeze")


def freeze_key_value(database: EmulatorProcess) -> None:
    """The same of key-value alone."""
    database.fault("freeze", service="kv")


def stop(database: EmulatorProcess) -> None:
    """All ports are closed and all connections cut."""
    for node in range(len(database.nodes)):
        database.stop_node(node)


def recover(database: EmulatorProcess) -> None:
    """Undo it."""
    database.clear()
    for node in range(len(database.nodes)):
        database.start_node(node)


class Case(NamedTuple):
    """One way of losing Couchbase."""

    fault: Fault
    nodes: int
    asked: bool  # whether clients ask meanwhile: without, only the background check can find out
    slow: bool = False  # with the default time-outs

    def __str__(self) -> str:
        """Name it for the test's id."""
        load = "asked" if self.asked else "idle"
        return f"{self.fault.__name__}-{self.nodes}-{load}" + ("-default-timeouts" if self.slow else "")


CASES = [
    Case(freeze, 1, asked=False),
    Case(freeze, 1, asked=True, slow=True),
    Case(freeze_key_value, 1, asked=True),
    Case(stop, 1, asked=False, slow=True),
    Case(stop, 1, asked=True),
    Case(freeze, 2, asked=False),
    Case(freeze, 2, asked=True),
    Case(stop, 2, asked=False),
]


class Outcome(NamedTuple):
    """What was seen: after how many seconds not ready, ready again, and all well; what liveness said all the time."""

    lost_seconds: float
    back_seconds: float
    well_seconds: float
    liveness: set[int]


def serves_all(service: ServiceProcess) -> bool:
    """Tell whether every document is served."""
    return all(service.get(path, TOKEN).status == 200 for path in IDS)


def play(case: Case) -> Outcome:
    """Lose Couchbase and get it back."""
    with ExitStack() as stack:
        database = stack.enter_context(EmulatorProcess(nodes=case.nodes, profiles=50, pictures=0, token=TOKEN))
        settings = settings_for(database) | ({} if case.slow else SHORT) | {"ACCESS_LOG": "false"}
        service = stack.enter_context(ServiceProcess(settings))
        if case.asked:
            stack.enter_context(Load(service.port, itertools.cycle(IDS), lambda: TOKEN, rate=20))
        seen = stack.enter_context(polling(lambda: service.get("/healthz").status))
        time.sleep(0.5)
        case.fault(database)
        lost = wait_until(lambda: service.get("/readyz").status == 503, f"not ready: {case}")
        wait_until(lambda: len(seen) > 20, "liveness")
        recover(database)
        back = wait_until(lambda: service.get("/readyz").status == 200, f"ready again: {case}")
        well = back + wait_until(lambda: serves_all(service), f"all documents: {case}")
        return Outcome(lost, back, well, {status for _, status in seen})


def slow_down() -> tuple[set[int], set[int], int]:
    """Have each document take 1.5 s, of the 4 that it may; return what clients and readiness said, and how often.

    A busy machine may add two seconds: it takes part of them before the service even knows that all is slow.
    """
    with ExitStack() as stack:
        database = stack.enter_context(EmulatorProcess(profiles=50, pictures=0, token=TOKEN))
        settings = settings_for(database) | {"ACCESS_LOG": "false", "COUCHBASE_TIMEOUT_MS": "4000"}
        service = stack.enter_context(ServiceProcess(settings))
        for operation in ("get", "lookup_in"):
            database.fault("latency", ms=1500, service="kv", operation=operation)
        seen = stack.enter_context(polling(lambda: service.get("/readyz").status))
        with Load(service.port, itertools.cycle(IDS), lambda: TOKEN, clients=16) as load:
            wait_until(lambda: len(load.records) >= 16 * 6, "six answers a client")
        return set(by_status(load.records)), {status for _, status in seen}, len(seen)


SLOW = Scene(slow_down)
SCENES = {str(case): Scene(play, case) for case in CASES}


@pytest.mark.parametrize("name", SCENES)
def test_losing_couchbase(name: str) -> None:
    """Not ready within five seconds of the loss, ready and well within five of the return, alive throughout."""
    outcome = SCENES[name].outcome()
    assert outcome.liveness == {200}
    assert outcome.lost_seconds < WELL_SECONDS
    assert outcome.back_seconds < WELL_SECONDS
    assert outcome.well_seconds < WELL_SECONDS


def test_slow_is_not_down() -> None:
    """As long as Couchbase answers within the time-out no request fails, and the process stays ready."""
    statuses, readiness, polls = SLOW.outcome()
    assert (statuses, readiness) == ({200}, {200})
    assert polls > 20


def test_readiness_does_not_depend_on_queries(database: EmulatorProcess, service: ServiceProcess) -> None:
    """Documents are served while queries fail: the process stays ready, and says which breaker is open."""
    database.fault("query_error", code=5000)
    for _ in range(6):
        service.get("/api/v1/nickname/nobody", TOKEN)
    answer = service.get("/readyz")
    assert (answer.status, answer.json()["breakers"]) == (200, {"key-value": "closed", "query": "open"})
