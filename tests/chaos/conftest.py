"""An emulator whose faults are used, and the service in front of it with short time-outs."""

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest

from tests.chaos.clients import wait_until
from tests.chaos.scenes import Scene
from tests.emulator.process import EmulatorProcess
from tests.service import ROOT, ServiceProcess, settings_for

TOKEN = "chaos-tests"
PROFILES, PICTURES = 200, 20
TIMEOUT_SECONDS, QUERY_TIMEOUT_SECONDS = 0.4, 0.6
SHORT = {
    "COUCHBASE_TIMEOUT_MS": str(round(TIMEOUT_SECONDS * 1000)),
    "COUCHBASE_QUERY_TIMEOUT_MS": str(round(QUERY_TIMEOUT_SECONDS * 1000)),
}
PATIENCE_MS = 5000
# what an answer may take beyond its time-out: 0.1 s of the service's own, and as much for the emulator and the client
GRACE_SECONDS = 0.2
WELL_SECONDS = 5.0  # after a fault has ended, or one has begun, until the service is well, or not ready


@pytest.fixture(scope="session", autouse=True)
def only_with_the_emulator() -> None:
    """Nothing here is for a cluster of somebody's own."""
    if os.environ.get("COUCHBASE_TEST_HOST"):
        pytest.skip("needs the emulator's faults, and COUCHBASE_TEST_HOST names a real cluster")


@pytest.fixture(scope="module")
def running() -> Iterator[EmulatorProcess]:
    """The emulator."""
    with EmulatorProcess(profiles=PROFILES, pictures=PICTURES, token=TOKEN) as process:
        yield process


@pytest.fixture(scope="module")
def started(running: EmulatorProcess) -> Iterator[ServiceProcess]:
    """The service, in front of it."""
    with ServiceProcess(settings_for(running) | SHORT) as process:
        yield process


@pytest.fixture
def database(running: EmulatorProcess) -> Iterator[EmulatorProcess]:
    """The emulator; its faults end with the test, and so do the connections on which an answer is due in minutes."""
    yield running
    endless = any(fault.get("ms", 0) > PATIENCE_MS for fault in running.faults()["active"])
    running.clear()
    if endless:
        running.fault("drop")


@pytest.fixture
def service(database: EmulatorProcess, started: ServiceProcess) -> ServiceProcess:
    """The service, well again after what the test before has done to it."""

    def well() -> bool:
        paths = ("/api/v1/id/1", "/api/v1/nickname/nobody", "/readyz")
        answers = [started.get(path, TOKEN) for path in paths]
        if [answer.status for answer in answers] != [200, 404, 200]:
            return False
        return set(answers[-1].json()["breakers"].values()) == {"closed"}

    wait_until(well, "well after the test before")
    number = started.get("/nowhere").headers["x-request-id"]
    while started.wait_for("request")["request_id"] != number:  # what the log says from now on is of this test
        pass
    return started


SOAK_SECONDS = 60
SOAK = ("-m", "tests.chaos.soak", "--seconds", str(SOAK_SECONDS), "--rate", "100", "--seed", "1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put what takes longest first, so that other processes have the other tests meanwhile."""
    items.sort(key=lambda item: "tests/chaos/test_soak.py" not in item.nodeid)


@contextlib.contextmanager
def soaking() -> Iterator["subprocess.Popen[str]"]:
    """Have a soak under way."""
    process = subprocess.Popen(  # noqa: S603 - the interpreter itself
        [sys.executable, *SOAK], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    try:
        yield process
    finally:
        process.send_signal(signal.SIGINT)  # if it has not ended yet: it takes its own processes along
        process.communicate(timeout=30)


@pytest.fixture(autouse=True)
def all_scenes(request: pytest.FixtureRequest) -> None:
    """Start all scenes of a module with its first test."""
    Scene.begin(request.module.__name__)


@pytest.fixture(scope="session", autouse=True)
def last_scene() -> Iterator[None]:
    """Leave no scene behind."""
    yield
    Scene.end()
