"""Two nodes, one of which stops: the other's documents do not notice, its own fail fast or come from replicas."""

import random
import time
import zlib
from collections.abc import Iterator
from typing import NamedTuple

import pytest

from tests import sample_data
from tests.chaos.clients import Load, Record, allowance, by_status
from tests.chaos.conftest import GRACE_SECONDS, TOKEN
from tests.chaos.scenes import Scene
from tests.emulator.process import EmulatorProcess
from tests.service import ServiceProcess, settings_for

PROFILES = 200
RATE = 100.0
TIMEOUT_SECONDS = 2.5  # the default
CROWD_SECONDS = 0.4  # dozens of answers end at once beside other scenes; `test_failures.py` looks at single ones
BEFORE_SECONDS, DOWN_SECONDS, RECOVERY_SECONDS = 1.5, 7.0, 5.0


def node_of(path: str) -> int:
    """Return which of two nodes has a profile: the first has the lower half of the 1,024 vBuckets."""
    key = "user_data:" + path.rpartition("/")[2]
    return ((zlib.crc32(key.encode()) >> 16) & 0x7FFF) % 1024 // 512


ABSENT = [next(f"nobody-{n}" for n in range(99) if node_of(f"/nobody-{n}") == node) for node in (0, 1)]
"""An id for each node that no profile has."""


def ids() -> Iterator[str]:
    """Yield random profiles."""
    source = random.Random(4)
    while True:
        yield f"/api/v1/id/{source.randint(1, PROFILES)}"


def split(records: list[Record], lost: int) -> tuple[list[Record], list[Record]]:
    """Return the answers about documents of the living node, and those about documents of the other."""
    return (
        [record for record in records if node_of(record.path) != lost],
        [record for record in records if node_of(record.path) == lost],
    )


def right_body(record: Record) -> bool:
    """Tell whether it is the profile that was asked for."""
    number = int(record.path.rpartition("/")[2])
    return record.body == b"[%b]" % sample_data.encode(sample_data.profile(number))


class Seen(NamedTuple):
    """All answers, when the node went and came back, and what was asked while it was gone."""

    load: Load
    gone: float
    back: float
    readiness: int
    absent: int


def play(lost: int, loss: str, replicas: int) -> Seen:
    """Lose one of two nodes and get it back, at 100 requests/s."""
    with (
        EmulatorProcess(nodes=2, replicas=replicas, profiles=PROFILES, pictures=0, token=TOKEN) as database,
        ServiceProcess(settings_for(database) | {"ACCESS_LOG": "false"}) as service,
        Load(service.port, ids(), lambda: TOKEN, rate=RATE) as load,
    ):
        time.sleep(BEFORE_SECONDS)
        gone = time.monotonic()
        if loss == "stop":
            database.stop_node(lost)
        else:
            database.fault("freeze", node=lost)
        time.sleep(DOWN_SECONDS)
        readiness = service.get("/readyz").status
        absent = service.get(f"/api/v1/id/{ABSENT[lost]}", TOKEN).status
        back = time.monotonic()
        database.clear()
        database.start_node(lost)
        time.sleep(RECOVERY_SECONDS + 1.5)
    return Seen(load, gone, back, readiness, absent)


SCENES = {
    "stop 0": (0, Scene(play, 0, "stop", 0)),
    "freeze 1": (1, Scene(play, 1, "freeze", 0)),
    "stop 1, with replicas": (1, Scene(play, 1, "stop", 1)),
}


@pytest.mark.parametrize("name", SCENES)
def test_the_living_nodes_documents(name: str) -> None:
    """Of those, 99 % are answered 200 within 1 s from the first moment on; half of the documents is ready enough."""
    lost, scene = SCENES[name]
    seen = scene.outcome()
    before = seen.load.since(seen.gone - BEFORE_SECONDS + 0.2, seen.gone - 0.2)
    assert by_status(before).keys() == {200}
    living, _ = split(seen.load.since(seen.gone, seen.back), lost)
    assert len(living) > 0.3 * RATE * DOWN_SECONDS
    limit = 1.0 + allowance(seen.load.lag.worst_seconds)
    good = [record for record in living if record.status == 200 and record.seconds < limit]
    assert len(good) >= 0.99 * len(living), by_status(living)
    assert all(right_body(record) for record in good)
    assert all("x-couchbase-replica" not in record.headers for record in good)
    assert seen.readiness == 200


@pytest.mark.parametrize("name", ["stop 0", "freeze 1"])
def test_the_lost_nodes_documents(name: str) -> None:
    """503 or 504 within their time-out, and 503 at once when the node is known to be down."""
    lost, scene = SCENES[name]
    seen = scene.outcome()
    _, others = split(seen.load.since(seen.gone + 0.1, seen.back), lost)
    assert len(others) > 0.3 * RATE * DOWN_SECONDS
    sure = [record for record in others if record.started < seen.back - TIMEOUT_SECONDS]  # its answer came before
    assert by_status(sure).keys() <= {503, 504}
    slack = GRACE_SECONDS + allowance(seen.load.lag.worst_seconds)
    assert [record for record in others if record.seconds > TIMEOUT_SECONDS + slack + CROWD_SECONDS] == []
    known = [record for record in others if record.started > seen.gone + 4]
    fast = [record for record in known if record.status == 503 and record.seconds < slack]
    assert len(fast) >= len(known) - 3, by_status(known)  # a probe now and then takes its time
    assert all("retry-after" in record.headers for record in others if record.status == 503)
    assert seen.absent in {503, 504}


@pytest.mark.parametrize("name", SCENES)
def test_the_node_returns(name: str) -> None:
    """All is well within five seconds: every document is its own, from its own node."""
    seen = SCENES[name][1].outcome()
    after = seen.load.since(seen.back + RECOVERY_SECONDS)
    assert len(after) > 0.9 * RATE
    assert by_status(after).keys() == {200}
    assert all(right_body(record) and "x-couchbase-replica" not in record.headers for record in after)


def test_documents_of_a_lost_node_come_from_replicas() -> None:
    """When the node is known to be down: 200, the right body, and marked as a replica's."""
    lost, scene = SCENES["stop 1, with replicas"]
    seen = scene.outcome()
    _, others = split(seen.load.since(seen.gone + 4, seen.back), lost)
    from_replicas = [record for record in others if record.status == 200]
    assert len(from_replicas) >= len(others) - 3, by_status(others)  # a probe now and then asks the node itself
    # such a probe, if it is under way when the node returns, is answered by the node
    unmarked = [record for record in from_replicas if record.headers.get("x-couchbase-replica") != "true"]
    assert len(unmarked) <= 3
    assert all(right_body(record) for record in from_replicas)
    assert seen.absent in {404, 503}  # 503: the node that would know is down
