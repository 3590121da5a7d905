"""Starting while Couchbase is not there, or does not answer."""

import time
from collections.abc import Iterator

import pytest

from tests.chaos.clients import Lag, allowance, wait_until
from tests.chaos.conftest import GRACE_SECONDS, TOKEN
from tests.chaos.scenes import Scene
from tests.emulator.process import EmulatorProcess
from tests.service import ServiceProcess, free_port, settings_for

ID = "/api/v1/id/1"


@pytest.fixture
def absent() -> Iterator[tuple[int, ServiceProcess]]:
    """The service, just started, and the port where it will find Couchbase."""
    port = free_port()
    settings = {"COUCHBASE_HOST": f"couchbase://127.0.0.1:{port}", "COUCHBASE_USER": "demo", "COUCHBASE_PASSWORD": "p"}
    process = ServiceProcess(settings).start()
    yield port, process
    assert process.stop() == 0


def test_probes_from_the_first_moment(absent: tuple[int, ServiceProcess]) -> None:
    """From its first line on it is alive and not ready, and goes on being so."""
    _, service = absent
    started = time.monotonic()
    with Lag() as lag:
        statuses = [
            service.get(path, port=port).status
            for path in ("/healthz", "/readyz")
            for port in (service.port, service.metrics_port)
        ]
        seconds = time.monotonic() - started
    assert seconds < GRACE_SECONDS + allowance(lag.worst_seconds)
    assert statuses == [200, 200, 503, 503]
    while time.monotonic() < started + 2:
        assert [service.get(path).status for path in ("/healthz", "/readyz")] == [200, 503]
        time.sleep(0.05)
    assert service.get(ID, TOKEN).status == 503


def test_it_becomes_ready_when_couchbase_appears(absent: tuple[int, ServiceProcess]) -> None:
    """By itself, with no error."""
    port, service = absent
    time.sleep(1)
    with EmulatorProcess(profiles=5, pictures=0, token=TOKEN, kv_port=port, password="p"):
        wait_until(lambda: service.get("/readyz").status == 200, "ready")
        assert service.get(ID, TOKEN).status == 200
    assert [line for line in service.lines if line["level"] == "error"] == []


def start_frozen(frozen: str | None) -> float:
    """Start the service in front of a database that accepts and never answers; return how long after it was ready."""
    with EmulatorProcess(profiles=5, pictures=0, token=TOKEN) as database:
        database.fault("freeze", **({} if frozen is None else {"service": frozen}))
        service = ServiceProcess(settings_for(database)).start()
        try:
            assert [service.get(path).status for path in ("/healthz", "/readyz")] == [200, 503]
            time.sleep(3)
            assert [service.get(path).status for path in ("/healthz", "/readyz")] == [200, 503]
            database.clear()
            seconds = wait_until(lambda: service.get("/readyz").status == 200, "ready")
            assert service.get(ID, TOKEN).status == 200
            assert [line for line in service.lines if line["level"] == "error"] == []
        finally:
            assert service.stop() == 0
    return seconds


FROZEN = {"key-value": Scene(start_frozen, "kv"), "everything": Scene(start_frozen, None)}


@pytest.mark.parametrize("name", FROZEN)
def test_couchbase_is_frozen_at_the_start(name: str) -> None:
    """Alive, not ready and in no hurry to end; ready within ten seconds of the thaw: a try is under way for as long."""
    assert FROZEN[name].outcome() < 10


def test_tries_are_made_with_growing_pauses_up_to_five_seconds(database: EmulatorProcess) -> None:
    """Each pause that the log tells of is what is then waited for, 0.2 s at first; and each is drawn anew."""
    database.fault("status", status=0x84, operation="lookup_in")
    services = [ServiceProcess(settings_for(database)).start() for _ in range(2)]
    try:
        told = [
            [service.wait_for("Couchbase is not there yet")["retry_seconds"] for _ in range(5)] for service in services
        ]
    finally:
        for service in services:
            service.stop()
    for pauses in told:
        assert 0.1 <= pauses[0] <= 0.2
        assert pauses == sorted(pauses)
        assert 1.6 <= pauses[4] <= 3.2
    assert told[0] != told[1]
