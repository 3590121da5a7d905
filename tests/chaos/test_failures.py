"""The failure map at work, and that no answer is later than its time-out plus 100 ms whatever Couchbase does."""

import itertools
import time
from collections.abc import Iterator
from typing import Any

import pytest

from tests.chaos.clients import Load, Record, allowance, ask_at_once, by_status
from tests.chaos.conftest import GRACE_SECONDS, QUERY_TIMEOUT_SECONDS, SHORT, TIMEOUT_SECONDS, TOKEN
from tests.emulator.process import EmulatorProcess
from tests.emulator.sdk import connect
from tests.load.clients import threads
from tests.service import ServiceProcess, settings_for

ID, PICTURE, LOOKUP = "/api/v1/id/1", "/api/v1/picture/raw/1", "/api/v1/nickname/nobody"
HOUR_MS = 600_000


def advice_since(service: ServiceProcess, mark: int) -> list[str]:
    """Return what the log has advised since a mark, one for each failure."""
    return [line.get("advice", "") for line in service.lines[mark:] if line["message"] == "couchbase failure"]


def ask_in_time(service: ServiceProcess, path: str, status: int) -> None:
    """Ask for one thing: the status is this, and it comes within the time-out."""
    answers = ask_at_once(service.port, [path], TOKEN)
    assert by_status(answers) == {status: 1}
    assert ("retry-after" in answers[0].headers) == (status == 503)
    seconds = QUERY_TIMEOUT_SECONDS if path == LOOKUP else TIMEOUT_SECONDS
    assert answers[0].seconds < seconds + GRACE_SECONDS + allowance(answers.lag_seconds)


@pytest.mark.parametrize(
    ("key_value_status", "status", "advice"),
    [
        (0x01, 404, None),
        (0x04, 500, "see the error"),
        (0x07, 504, ""),
        (0x08, 503, "bucket"),
        (0x09, 503, ""),
        (0x24, 503, "COUCHBASE_USER"),
        (0x30, 503, ""),
        (0x82, 503, ""),
        (0x84, 503, ""),
        (0x85, 503, ""),
        (0x86, 503, ""),
        (0x88, 500, "tests.sample_data"),
        (0x8C, 500, "tests.sample_data"),
        (0x7777, 500, "see the error"),
    ],
    ids=lambda value: hex(value) if isinstance(value, int) else None,
)
def test_each_status_of_key_value(
    database: EmulatorProcess, service: ServiceProcess, key_value_status: int, status: int, advice: str | None
) -> None:
    """What the server answers to a get becomes the caller's status, in time, and the operator's advice."""
    mark = len(service.lines)
    database.fault("status", status=key_value_status, operation="get")
    ask_in_time(service, ID, status)
    service.wait_for("request" if advice is None else "couchbase failure")
    given = advice_since(service, mark)
    assert given == [] if advice is None else given and advice in given[0]


@pytest.mark.parametrize(
    ("code_and_http_status", "status", "advice"),
    [
        ((1000, 400), 503, ""),
        ((1065, 400), 500, "see the error"),
        ((1080, 408), 504, ""),
        ((1191, 429), 503, ""),
        ((3000, 400), 500, "see the error"),
        ((4000, 404), 500, "CREATE INDEX"),
        ((5000, 500), 503, ""),
        ((5000, 200), 503, ""),
        ((12003, 404), 500, "tests.sample_data"),
        ((12016, 404), 500, "CREATE INDEX"),
        ((13014, 401), 503, "COUCHBASE_USER"),
        ((2120, 401), 503, "COUCHBASE_USER"),
        ((12008, 500), 503, ""),
        ((12015, 200), 503, ""),
        ((14007, 500), 503, ""),
    ],
)
def test_each_error_of_query(
    database: EmulatorProcess, service: ServiceProcess, code_and_http_status: tuple[int, int], status: int, advice: str
) -> None:
    """What the server answers to a query becomes the caller's status, in time, and the operator's advice."""
    code, http_status = code_and_http_status
    judge_query(database, service, {"code": code, "http_status": http_status}, status, advice)


CUT_OFF = '{"requestID": "x", "results": [{"record_id": 1'
SCANS = "User does not have credentials to use sequential scans. Add role query_use_sequential_scans on default:x"


@pytest.mark.parametrize(
    ("fault", "status", "advice"),
    [
        ({"code": 13014, "http_status": 401, "msg": SCANS}, 500, "CREATE INDEX by_nickname"),
        ({"code": 12345, "retry": True}, 503, ""),
        ({"code": 5000, "http_status": 200, "body": CUT_OFF}, 503, ""),
        *[({"code": 5000, "http_status": number, "body": "<html>"}, 503, "") for number in (200, 500, 502, 503)],
        *[({"code": 5000, "http_status": number, "body": ""}, 503, "") for number in (200, 429, 500, 502, 503)],
        ({"code": 5000, "http_status": 401, "body": "<html>"}, 503, "COUCHBASE_USER"),
    ],
    ids=str,
)
def test_what_else_a_query_is_answered(
    database: EmulatorProcess, service: ServiceProcess, fault: dict[str, Any], status: int, advice: str
) -> None:
    """What the code alone does not say: a missing index of 7.6 and newer, "come again", and bodies that are no JSON."""
    judge_query(database, service, fault, status, advice)


def judge_query(
    database: EmulatorProcess, service: ServiceProcess, fault: dict[str, Any], status: int, advice: str
) -> None:
    """Have a query fail; its status, its time and the advice must be these."""
    mark = len(service.lines)
    database.fault("query_error", **fault)
    ask_in_time(service, LOOKUP, status)
    service.wait_for("couchbase failure")
    given = advice_since(service, mark)
    assert given and advice in given[0]


@pytest.fixture(scope="module")
def incomplete() -> Iterator[tuple[EmulatorProcess, ServiceProcess]]:
    """A database that has lost its index on nicknames and its collection of pictures since the service started."""
    with (
        # of 7.2: to an administrator 7.6 says nothing of a missing index
        EmulatorProcess(profiles=10, pictures=3, token=TOKEN, release="7.2") as own,
        ServiceProcess(settings_for(own) | SHORT) as service,
    ):
        with connect(own) as cluster:
            scope = cluster.bucket(own.bucket).scope("profiles")
            indexes = list(scope.query("SELECT RAW name FROM system:indexes WHERE keyspace_id = 'user_data'"))
            for name in indexes:
                list(scope.query(f"DROP INDEX `{name}` ON user_data"))
            cluster.bucket(own.bucket).collections().drop_collection("profiles", "user_images")
        yield own, service


def test_a_missing_index(incomplete) -> None:
    """500 for the caller, and the statement to create it for the operator."""
    _, service = incomplete
    assert service.get(LOOKUP, TOKEN).status == 500
    line = service.wait_for("couchbase failure")
    assert "CREATE INDEX" in line["advice"] and "nickname" in line["advice"]


def test_a_missing_index_of_which_a_newer_server_says_other_things(
    database: EmulatorProcess, service: ServiceProcess
) -> None:
    """However often it is asked for, it opens no breaker: the other lookup may have its index."""
    database.fault("query_error", code=13014, http_status=401, msg=SCANS)
    answers = [service.get(LOOKUP, TOKEN).status for _ in range(7)]
    database.clear()
    assert answers == [500] * 7
    assert service.get(LOOKUP, TOKEN).status == 404


def test_an_unknown_collection(incomplete) -> None:
    """500 for the caller, the provisioning command for the operator, and profiles are served all the same."""
    _, service = incomplete
    for _ in range(7):  # more than opens a breaker: it speaks of the schema, not of the service
        ask_in_time(service, PICTURE, 500)
        assert "tests.sample_data" in service.wait_for("couchbase failure")["advice"]
    assert service.get(ID, TOKEN).status == 200
    assert service.get("/readyz").status == 200


def test_a_collection_that_is_made_again() -> None:
    """What is missing in it is 404 from the first request on, though the SDK has to ask for it twice."""
    with (
        EmulatorProcess(profiles=1, pictures=1, token=TOKEN) as own,
        ServiceProcess(settings_for(own) | {"COUCHBASE_TIMEOUT_MS": "20000"}) as service,
        connect(own) as cluster,
    ):
        assert service.get(PICTURE, TOKEN).status == 200
        collections = cluster.bucket(own.bucket).collections()
        collections.drop_collection("profiles", "user_images")
        collections.create_collection("profiles", "user_images")
        assert service.get(PICTURE, TOKEN).status == 404


# ---- deadlines ----

IDS = [f"/api/v1/id/{number}" for number in range(1, 9)]
PICTURES = [f"/api/v1/picture/record/{number}" for number in range(1, 9)]
LOOKUPS = [f"/api/v1/nickname/nobody-{number}" for number in range(4)]
MIXED = [*IDS, *PICTURES, *LOOKUPS]
DEADLINES = dict.fromkeys(IDS + PICTURES, TIMEOUT_SECONDS) | dict.fromkeys(LOOKUPS, QUERY_TIMEOUT_SECONDS)


def assert_in_time(records: list[Record], lag_seconds: float, failures: set[int]) -> None:
    """Every answer is in time, and one that is allowed; failures come with the reason for coming back."""
    late = [
        (record.path, record.status, round(record.seconds, 3), f"at {record.started:.3f}")
        for record in records
        if record.seconds > DEADLINES[record.path] + GRACE_SECONDS + allowance(lag_seconds)
    ]
    assert late == []
    for record in records:
        assert record.status in failures | {404 if record.path in LOOKUPS else 200}, record


@pytest.mark.parametrize(
    ("fault", "parameters", "failures"),
    [
        ("freeze", {"service": "kv"}, {503, 504}),
        ("freeze", {"service": "query"}, {503, 504}),
        ("freeze", {}, {503, 504}),
        ("latency", {"service": "kv", "ms": HOUR_MS}, {503, 504}),
        ("latency", {"service": "query", "ms": HOUR_MS}, {503, 504}),
        ("latency", {"service": "kv", "ms": round(TIMEOUT_SECONDS * 800)}, {503, 504}),
        ("latency", {"service": "query", "ms": round(QUERY_TIMEOUT_SECONDS * 800)}, {503, 504}),
        ("temporary_failure", {}, {503, 504}),
        ("query_error", {"code": 4040, "http_status": 404}, {503, 504}),
        ("query_error", {"code": 4070, "http_status": 500}, {503, 504}),
    ],
    ids=str,
)
def test_nobody_waits_longer_than_the_time_out(
    database: EmulatorProcess, service: ServiceProcess, fault: str, parameters: dict[str, Any], failures: set[int]
) -> None:
    """Profiles, pictures and lookups at once, twice: while nothing is known of the fault yet, and when it is."""
    database.fault(fault, **parameters)
    for _ in range(2):
        answers = ask_at_once(service.port, MIXED, TOKEN)
        assert_in_time(answers, answers.lag_seconds, failures)


def test_a_freeze_in_the_middle_of_a_busy_time(database: EmulatorProcess, service: ServiceProcess) -> None:
    """Batches of several collections are on their way when the answers stop: none waits for one after the other."""
    paths = itertools.cycle(IDS + PICTURES)
    with Load(service.port, paths, lambda: TOKEN, clients=48) as load:
        while len(load.records) < 500:
            time.sleep(0.01)
        database.fault("latency", ms=30, service="kv")  # long enough for a batch to fill while another is under way
        time.sleep(0.3)
        database.fault("freeze", service="kv")
        time.sleep(3 * TIMEOUT_SECONDS)
        database.clear()
    assert_in_time(load.records, load.lag.worst_seconds, {503, 504})
    assert 504 in by_status(load.records)


def test_connections_that_are_cut_again_and_again(database: EmulatorProcess, service: ServiceProcess) -> None:
    """All connections to Couchbase are cut ten times while clients ask."""
    with Load(service.port, itertools.cycle(MIXED), lambda: TOKEN, clients=8) as load:
        for _ in range(10):
            database.fault("drop")
            time.sleep(0.1)
    assert_in_time(load.records, load.lag.worst_seconds, {503, 504})
    assert len(load.records) > 100


def test_queries_that_the_sdk_never_gives_back(database: EmulatorProcess, service: ServiceProcess) -> None:
    """Their callers get 504 in time, their workers are given up, and the service goes on with new ones: all eight."""
    for _ in range(3):  # twelve of them: more than there are workers; four at once: less than opens the breaker
        database.fault("query_error", code=4040, http_status=404)
        answers = ask_at_once(service.port, LOOKUPS, TOKEN)
        database.clear()
        assert by_status(answers) == {504: 4}
        for record in answers:
            late = record.seconds - QUERY_TIMEOUT_SECONDS
            assert 0 < late < GRACE_SECONDS + allowance(answers.lag_seconds)
        assert service.get(LOOKUPS[0], TOKEN).status == 404
    for _ in range(12):
        service.wait_for("a query is overdue; its worker is given up")
    database.fault("latency", service="query", ms=100)
    assert by_status(ask_at_once(service.port, LOOKUPS * 2, TOKEN)) == {404: 8}


def test_a_query_service_that_has_forgotten_its_statements(database: EmulatorProcess) -> None:
    """It costs one 504 and one thread; statements go unprepared for a minute from then on."""
    paths = ("/api/v1/nickname/nobody", "/api/v1/username/nobody")
    with ServiceProcess(settings_for(database) | SHORT) as service:

        def ask() -> list[int]:
            return [service.get(path, TOKEN).status for path in paths]

        assert ask() == [404, 404]
        before = threads(service.process.pid)
        database.fault("forget")
        assert ask() == [504, 404]
        for _ in range(20):
            assert ask() == [404, 404]
        assert threads(service.process.pid) == before + 1


def test_threads_that_ask_while_a_query_is_given_up(database: EmulatorProcess, service: ServiceProcess) -> None:
    """Neither a lookup nor a profile of somebody else is held up by it."""
    with Load(service.port, itertools.cycle(IDS + LOOKUPS), lambda: TOKEN, clients=4) as load:
        for _ in range(3):
            database.fault("query_error", code=4040, http_status=404, count=1)
            time.sleep(QUERY_TIMEOUT_SECONDS)
    assert_in_time(load.records, load.lag.worst_seconds, {504})
    assert by_status(load.records)[504] <= 3
