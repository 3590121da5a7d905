"""The password changes under way, and in its file: the service goes on without a restart."""

import itertools
import tempfile
import time
from pathlib import Path

from tests.chaos.clients import Load, wait_until
from tests.chaos.conftest import SHORT, TOKEN
from tests.chaos.scenes import Scene
from tests.emulator.process import EmulatorProcess
from tests.service import ServiceProcess, settings_for

LOOKUP = "/api/v1/nickname/nobody"
IDS = [f"/api/v1/id/{number}" for number in range(1, 11)]


def change_first_in_the_file() -> str:
    """Change it in the file, in Couchbase, and cut the connections, twice; return all that the service has printed."""
    with tempfile.TemporaryDirectory() as directory, EmulatorProcess(profiles=10, pictures=0, token=TOKEN) as database:
        path = Path(directory) / "password"
        path.write_text(database.password + "\n")
        settings = settings_for(database) | SHORT | {"COUCHBASE_PASSWORD_FILE": str(path), "ACCESS_LOG": "false"}
        del settings["COUCHBASE_PASSWORD"]
        with (
            ServiceProcess(settings) as service,
            Load(service.port, itertools.cycle(IDS), lambda: TOKEN, rate=20),
            Load(service.port, itertools.repeat(LOOKUP), lambda: TOKEN, rate=5),
        ):
            for number in range(2):
                password = f"changed-{number}"
                path.write_text(password + "\n")
                database.set_password(database.user, password)
                time.sleep(0.5)
                database.fault("drop")
                cut = time.monotonic()
                service.wait_for("password read again from its file")
                wait_until(lambda: service.get(IDS[0], TOKEN).status == 200, "documents are back")
                wait_until(lambda: service.get(LOOKUP, TOKEN).status == 404, "lookups are back")
                wait_until(lambda: service.get("/readyz").status == 200, "ready")
                assert time.monotonic() - cut < 15
            assert service.process.poll() is None
    return "".join(service.raw_lines)


def change_later_in_the_file() -> None:
    """Between the change in Couchbase and that in the file the service is alive and not ready; then it is well."""
    with tempfile.TemporaryDirectory() as directory, EmulatorProcess(profiles=10, pictures=0, token=TOKEN) as database:
        path = Path(directory) / "password"
        path.write_text(database.password)
        settings = settings_for(database) | SHORT | {"COUCHBASE_PASSWORD_FILE": str(path)}
        del settings["COUCHBASE_PASSWORD"]
        with ServiceProcess(settings) as service:
            database.set_password(database.user, "changed")
            database.fault("drop")
            wait_until(lambda: service.get("/readyz").status == 503, "not ready")
            time.sleep(2)
            assert service.get("/healthz").status == 200
            assert service.get(IDS[0], TOKEN).status in {503, 504}
            path.write_text("changed")
            wait_until(lambda: service.get("/readyz").status == 200, "ready")
            wait_until(lambda: service.get(IDS[0], TOKEN).status == 200, "documents are back")


FIRST, LATER = Scene(change_first_in_the_file), Scene(change_later_in_the_file)


def test_a_changed_password() -> None:
    """Old connections go on; when they are cut the file's new password is taken, for documents and lookups; unseen."""
    printed = FIRST.outcome()
    assert "password read again" in printed
    assert "changed-" not in printed


def test_a_password_that_changes_later_in_the_file() -> None:
    """It is found there when it is."""
    LATER.outcome()
