"""The token changes, goes and comes back while clients ask."""

import itertools
import time
from collections.abc import Callable
from contextlib import ExitStack

import pytest

from tests.chaos.clients import Load, Record, by_status, polling, wait_until
from tests.chaos.scenes import Scene
from tests.emulator.process import EmulatorProcess
from tests.emulator.sdk import connect
from tests.service import ServiceProcess, settings_for

IDS = [f"/api/v1/id/{number}" for number in range(1, 11)]
PERIOD_SECONDS = 1.0
LEEWAY_SECONDS = 3.0  # for what a busy machine adds
ROTATION_SECONDS = 2.0  # the period where a busy machine must have changed the token and asked within it
SETTINGS = {"TOKEN_REFRESH_SECONDS": "1", "ACCESS_LOG": "false"}


def rotate() -> list[Record]:
    """Change the token twice while clients ask, who change theirs half a period after the service; return answers."""
    token = "token-0"
    with (
        EmulatorProcess(profiles=10, pictures=0, token=token) as database,
        ServiceProcess(settings_for(database) | SETTINGS | {"TOKEN_REFRESH_SECONDS": "2"}) as service,
    ):
        valid = [token]
        with Load(service.port, itertools.cycle(IDS), lambda: valid[0], clients=6) as load:
            for number in range(1, 3):
                old, new = valid[0], f"token-{number}"
                database.set_token(new)
                adopted = wait_until(lambda new=new: service.get(IDS[0], new).status == 200, "the new token works")
                assert service.get(IDS[0], old).status == 200
                time.sleep(ROTATION_SECONDS / 2)
                valid[0] = new
                gone = wait_until(lambda old=old: service.get(IDS[0], old).status == 401, "the old token works no more")
                assert max(adopted, gone) < ROTATION_SECONDS + LEEWAY_SECONDS
    return load.records


def deleted(database: EmulatorProcess) -> None:
    """The document is gone."""
    database.set_token(None)


def replaced(value: object) -> Callable[[EmulatorProcess], None]:
    """Return a way of storing something else than a token document."""

    def store(database: EmulatorProcess) -> None:
        with connect(database) as cluster:
            cluster.bucket(database.bucket).scope("profiles").collection("service_auth").upsert("service_auth:1", value)

    return store


UNREADABLE = {
    "deleted": deleted,
    "without the field": replaced({"tokens": "x"}),
    "not a text": replaced({"token": 5}),
    "empty": replaced({"token": ""}),
    "not an object": replaced([1]),
}


def lose(name: str) -> tuple[float, list[str], set[int], float]:
    """Make the token unreadable under load, and good again.

    Returns:
        After how many seconds the service was not ready and why, what clients with the last token got all the time,
        and after how many seconds it was ready again.
    """
    with (
        EmulatorProcess(profiles=10, pictures=0, token="last") as database,
        ServiceProcess(settings_for(database) | SETTINGS) as service,
        Load(service.port, itertools.cycle(IDS), lambda: "last", rate=30) as load,
    ):
        UNREADABLE[name](database)
        lost = wait_until(lambda: service.get("/readyz").status == 503, "not ready")
        reasons: list[str] = service.get("/readyz").json()["reasons"]
        time.sleep(PERIOD_SECONDS)
        assert service.get("/healthz").status == 200
        database.set_token("last")
        back = wait_until(lambda: service.get("/readyz").status == 200, "ready again")
    return lost, reasons, set(by_status(load.records)), back


def lose_collection() -> tuple[float, list[int], list[str], float]:
    """Drop the token's collection while nobody asks for anything, and make it again.

    Returns:
        After how many seconds the service was not ready, what readiness said until a while after that, the reasons,
        and after how many seconds it was ready again.
    """
    with ExitStack() as stack:
        database = stack.enter_context(EmulatorProcess(profiles=10, pictures=0, token="last"))
        settings = settings_for(database) | SETTINGS | {"COUCHBASE_TIMEOUT_MS": "1000"}
        service = stack.enter_context(ServiceProcess(settings))  # the SDK asks for a collection again after 0.5 s
        collections = stack.enter_context(connect(database)).bucket(database.bucket).collections()
        collections.drop_collection("profiles", "service_auth")
        with polling(lambda: service.get("/readyz").status) as seen:
            lost = wait_until(lambda: seen and seen[-1][1] == 503, "not ready")
            time.sleep(3 * PERIOD_SECONDS)
        reasons: list[str] = service.get("/readyz").json()["reasons"]
        assert service.get(IDS[0], "last").status == 200
        collections.create_collection("profiles", "service_auth")
        database.set_token("last")
        back = wait_until(lambda: service.get("/readyz").status == 200, "ready again")
    return lost, [status for _, status in seen], reasons, back


COLLECTION = Scene(lose_collection)
ROTATION = Scene(rotate)
LOSSES = {name: Scene(lose, name) for name in UNREADABLE}


def test_rotation_under_load() -> None:
    """The new token works within a period, the old one for one more, then not; no valid token is ever refused."""
    records = ROTATION.outcome()
    assert by_status(records).keys() == {200}
    assert len(records) > 500


@pytest.mark.parametrize("name", LOSSES)
def test_a_token_that_cannot_be_read(name: str) -> None:
    """The last token stays good all the time; after three periods, not before, the service is not ready."""
    lost, reasons, statuses, back = LOSSES[name].outcome()
    # the last good reading was up to a period before the document went
    assert 2 * PERIOD_SECONDS - 0.1 < lost < 3 * PERIOD_SECONDS + LEEWAY_SECONDS
    assert any("token" in reason for reason in reasons)
    assert statuses == {200}
    assert back < 2 * PERIOD_SECONDS + LEEWAY_SECONDS


def test_a_token_whose_collection_is_gone() -> None:
    """It is as if the document alone were gone: data is served, and readiness goes once, not again and again."""
    lost, seen, reasons, back = COLLECTION.outcome()
    assert 2 * PERIOD_SECONDS - 0.1 < lost < 3 * PERIOD_SECONDS + LEEWAY_SECONDS
    assert seen == sorted(seen)
    assert any("token" in reason for reason in reasons)
    assert back < 2 * PERIOD_SECONDS + LEEWAY_SECONDS
