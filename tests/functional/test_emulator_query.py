"""The emulator's query service, as the real SDK sees it, and as plain HTTP shows it."""

import base64
import http.client
import json
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import pytest
from couchbase.cluster import Cluster
from couchbase.collection import Collection
from couchbase.exceptions import (
    CouchbaseException,
    InternalServerFailureException,
    KeyspaceNotFoundException,
    ParsingFailedException,
    QueryIndexAlreadyExistsException,
    QueryIndexNotFoundException,
    ScopeNotFoundException,
)
from couchbase.management.options import WatchQueryIndexOptions
from couchbase.options import QueryOptions
from couchbase.scope import Scope

from micro_svc_demo import PROFILES_BY_NICKNAME as LOOKUP
from tests.emulator.process import EmulatorProcess
from tests.emulator.sdk import connect

PROFILES = 300
HTTP_SECONDS = 30
CONTEXT = "`sample_app`.`profiles`"  # as the SDK has it: what is prepared in it is prepared for the SDK too
READER = "data_reader[sample_app:profiles:user_data],query_select[sample_app:profiles:user_data]"
SCANNER = READER + ",query_use_sequential_scans[sample_app:profiles:user_data]"
PARAMETERS = {"value": "x", "limit": 100, "offset": 0}
LOOKUP_REQUEST = {"statement": LOOKUP, "query_context": CONTEXT} | {f"${name}": PARAMETERS[name] for name in PARAMETERS}
DROP, CREATE = "DROP INDEX by_nickname ON user_data", "CREATE INDEX by_nickname ON user_data(nickname)"
DEFERRED = CREATE + ' WITH {"defer_build": true}'


@pytest.fixture(scope="module")
def emulator() -> Iterator[EmulatorProcess]:
    """One emulator for all tests here, with a user who may do no more than the service."""
    with EmulatorProcess(profiles=PROFILES, tls=True, second_user="reader", roles=READER) as process:
        yield process


@pytest.fixture(scope="module")
def cluster(emulator: EmulatorProcess) -> Iterator[Cluster]:
    """The SDK's cluster object, connected."""
    with connect(emulator) as connected:
        connected.wait_until_ready(timedelta(seconds=30))
        yield connected


@pytest.fixture(scope="module")
def scope(cluster: Cluster) -> Scope:
    """The scope of the profiles."""
    return cluster.bucket("sample_app").scope("profiles")


@pytest.fixture(scope="module")
def users(scope: Scope) -> Collection:
    """The collection of the profiles."""
    return scope.collection("user_data")


@pytest.fixture
def without_index(scope: Scope) -> Iterator[None]:
    """The index on nicknames is gone, and back after the test."""
    scope.query(DROP).execute()
    yield
    scope.query(CREATE.replace(" ON", " IF NOT EXISTS ON")).execute()
    if index_states(scope.collection("user_data"))["by_nickname"] != "online":
        scope.query("BUILD INDEX ON user_data(by_nickname)").execute()


def lookup(scope: Scope, nickname: str, *, adhoc: bool = False, **parameters: int) -> list[Any]:
    """Look a nickname up as the service does: a prepared, read-only query of the scope."""
    named = PARAMETERS | {"value": nickname} | parameters
    timeout = timedelta(seconds=20)
    return list(scope.query(LOOKUP, QueryOptions(adhoc=adhoc, read_only=True, named_parameters=named, timeout=timeout)))


def index_states(users: Collection) -> dict[str, str]:
    """Return the states of a collection's indexes by name."""
    return {index.name: index.state for index in users.query_indexes().get_all_indexes()}


def post(
    emulator: EmulatorProcess, body: dict[str, Any] | bytes, user: tuple[str, str] | None = None
) -> tuple[int, dict[str, Any]]:
    """Post to the query service, as an administrator or as `user`; return the status and the reply."""
    credentials = ":".join(user or (emulator.user, emulator.password))
    headers = {"Authorization": "Basic " + base64.b64encode(credentials.encode()).decode()}
    connection = http.client.HTTPConnection("127.0.0.1", emulator.query_port, timeout=HTTP_SECONDS)
    try:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        connection.request("POST", "/query/service", data, headers)
        response = connection.getresponse()
        reply: dict[str, Any] = json.loads(response.read())
        return response.status, reply
    finally:
        connection.close()


def error(answer: tuple[int, dict[str, Any]]) -> tuple[int, int]:
    """Return the HTTP status and the code of a reply that says of itself that it failed."""
    status, reply = answer
    assert reply["status"] == "fatal" and "results" not in reply
    return status, reply["errors"][0]["code"]


# ---- lookups ----


@pytest.mark.parametrize("adhoc", [False, True])
def test_lookup(scope: Scope, users: Collection, adhoc: bool) -> None:
    """A lookup gives whole profiles: prepared for the first time, by its prepared name later, or not prepared."""
    wanted = users.get("user_data:7").content_as[dict]
    for _ in range(3):
        assert wanted in lookup(scope, wanted["nickname"], adhoc=adhoc)
    assert lookup(scope, "nobody has this", adhoc=adhoc) == []


@pytest.mark.parametrize(
    "nickname", ["O'Neil", 'say "hi"', "' OR 1=1 --", "`x`", "a\\b", "💥\n\t\x00", "%", "{}", "$limit"]
)
def test_a_parameter_is_data(scope: Scope, users: Collection, nickname: str) -> None:
    """Quotes and anything else in a parameter find that very text, and are never syntax."""
    users.upsert("odd", {"nickname": nickname})
    try:
        assert lookup(scope, nickname) == [{"nickname": nickname}]
        assert lookup(scope, nickname + "x") == []
    finally:
        users.remove("odd")


def test_writes_show_at_once(scope: Scope, users: Collection) -> None:
    """What key-value writes, changes and removes is what the next query finds; what is no text is not found."""
    users.upsert("fresh", {"nickname": "fresh", "n": 1})
    assert lookup(scope, "fresh") == [{"nickname": "fresh", "n": 1}]
    users.upsert("fresh", {"nickname": "stale"})
    assert lookup(scope, "fresh") == []
    for other in ({"nickname": ["stale"]}, ["nickname"], {}, {"nickname": "stale"}):
        users.upsert("fresh", other)
    assert lookup(scope, "stale") == [{"nickname": "stale"}]
    users.remove("fresh")
    assert lookup(scope, "stale") == []


def test_pages_are_ordered_by_document_id(scope: Scope, users: Collection) -> None:
    """LIMIT and OFFSET walk through the matches in the order of their ids, without gaps or repeats."""
    ids = [f"page:{number:02}" for number in range(25)]
    for document_id in reversed(ids):
        users.upsert(document_id, {"nickname": "paged", "id": document_id})
    try:
        pages = [lookup(scope, "paged", limit=10, offset=offset) for offset in range(0, 30, 10)]
        assert [row["id"] for page in pages for row in page] == ids
    finally:
        for document_id in ids:
            users.remove(document_id)


def test_whole_reply_and_a_forgotten_statement(emulator: EmulatorProcess) -> None:
    """A prepared statement is executed by the name in the reply until the service forgets it: then it is 4040."""
    prepare = LOOKUP_REQUEST | {"statement": f"PREPARE {LOOKUP}", "auto_execute": True, "client_context_id": 'a"b'}
    status, reply = post(emulator, prepare)
    assert (status, list(reply)) == (200, ["requestID", "clientContextID", "prepared", "results", "status"])
    assert (reply["clientContextID"], reply["results"], reply["status"]) == ('a"b', [], "success")
    execute = LOOKUP_REQUEST | {"prepared": reply["prepared"]}
    del execute["statement"]
    assert post(emulator, execute)[0] == 200
    emulator.fault("forget")
    assert error(post(emulator, execute)) == (404, 4040)
    assert post(emulator, prepare)[0] == 200
    assert post(emulator, execute)[0] == 200


# ---- errors ----


@pytest.mark.parametrize(
    ("statement", "kind", "code"),
    [
        ("SELECT 1", InternalServerFailureException, 1020),
        (f"{DROP}; {CREATE}", ParsingFailedException, 3000),
        (CREATE, QueryIndexAlreadyExistsException, 4300),
        ("DROP INDEX nothing ON user_data", QueryIndexNotFoundException, 12016),
        ("BUILD INDEX ON user_data(nothing)", QueryIndexNotFoundException, 12016),
    ],
)
def test_errors_become_the_sdks_exceptions(
    scope: Scope, statement: str, kind: type[CouchbaseException], code: int
) -> None:
    """Each error is raised as what the SDK makes of the server's, at once and not after retries."""
    with pytest.raises(kind) as caught:
        list(scope.query(statement, QueryOptions(timeout=timedelta(seconds=20))))
    assert caught.value.context.first_error_code == code


def test_unknown_names(cluster: Cluster, scope: Scope) -> None:
    """A statement about what is not there says what: the scope, or the collection (here: without a scope)."""
    with pytest.raises(ScopeNotFoundException):
        list(cluster.bucket("sample_app").scope("nothing").query(DROP))
    with pytest.raises(KeyspaceNotFoundException):
        list(cluster.query(DROP))


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (b"{", (400, 1040)),
        (b"[1]", (400, 1040)),
        (b"[" * 100_000, (400, 1040)),
        (b"\xff", (400, 1040)),
        (b"{}", (400, 1050)),
        (b'{"statement": 5}', (400, 1050)),
        (b'{"prepared": "nothing"}', (404, 4040)),
        (json.dumps(LOOKUP_REQUEST | {"$limit": "5"}).encode(), (400, 1020)),
        (json.dumps(LOOKUP_REQUEST | {"$value": None}).encode(), (400, 1020)),
        (json.dumps(LOOKUP_REQUEST | {"statement": f"PREPARE {LOOKUP}"}).encode(), (400, 1020)),
    ],
)
def test_bad_requests(emulator: EmulatorProcess, body: bytes, expected: tuple[int, int]) -> None:
    """What cannot be read, or is not as this project asks, is refused with its code and HTTP status."""
    assert error(post(emulator, body)) == expected


def test_wrong_password(emulator: EmulatorProcess, scope: Scope) -> None:
    """HTTP 401 and code 2120, of which the SDK makes another exception than of key-value's refusal."""
    assert error(post(emulator, LOOKUP_REQUEST, ("demo", "wrong"))) == (401, 2120)
    emulator.set_password(emulator.user, "another")
    try:
        with pytest.raises(InternalServerFailureException) as caught:
            lookup(scope, "x", adhoc=True)
        assert caught.value.context.first_error_code == 2120
    finally:
        emulator.set_password(emulator.user, emulator.password)
    assert lookup(scope, "nobody has this") == []


# ---- indexes ----


def test_without_an_index_an_administrator_scans(scope: Scope, users: Collection, without_index: None) -> None:
    """Silently, and finds the same in the same order."""
    for key in ("scan:2", "scan:1"):
        users.upsert(key, {"nickname": "scanned", "key": key})
    found = lookup(scope, "scanned")
    scope.query(CREATE).execute()
    assert [row["key"] for row in found] == ["scan:1", "scan:2"]
    assert found == lookup(scope, "scanned")
    for key in ("scan:2", "scan:1"):
        users.remove(key)


def test_without_an_index_others_are_refused(emulator: EmulatorProcess, without_index: None) -> None:
    """HTTP 401 and 13014, for want of a role of its own, which names itself."""
    answer = post(emulator, LOOKUP_REQUEST, ("reader", emulator.second_password))
    assert error(answer) == (401, 13014)
    assert answer[1]["errors"][0]["msg"].startswith(
        "User does not have credentials to use sequential scans. Add role query_use_sequential_scans on "
    )
    with EmulatorProcess(profiles=1, second_user="scanner", roles=SCANNER) as other:
        assert post(other, LOOKUP_REQUEST | {"statement": DROP})[0] == 200
        assert post(other, LOOKUP_REQUEST, ("scanner", other.second_password))[0] == 200


def test_release_7_2_knows_no_scans() -> None:
    """There a missing index is 4000 for everybody."""
    with EmulatorProcess(profiles=1, release="7.2") as emulator:
        assert post(emulator, LOOKUP_REQUEST)[0] == 200
        assert post(emulator, LOOKUP_REQUEST | {"statement": DROP})[0] == 200
        assert error(post(emulator, LOOKUP_REQUEST)) == (404, 4000)


def test_a_deferred_index_is_of_no_use_until_it_is_built(
    emulator: EmulatorProcess, scope: Scope, users: Collection, without_index: None
) -> None:
    """Creating it again changes nothing; ``system:indexes`` tells its state; built, it knows what came meanwhile."""
    reader = ("reader", emulator.second_password)
    scope.query(DEFERRED).execute()
    for statement in (CREATE, DEFERRED):
        scope.query(statement.replace(" ON", " IF NOT EXISTS ON")).execute()
    assert index_states(users) == {"by_nickname": "deferred", "by_user_id": "online"}
    assert error(post(emulator, LOOKUP_REQUEST, reader)) == (401, 13014)
    users.upsert("late", {"nickname": "late"})
    scope.query("BUILD INDEX ON user_data(by_nickname)").execute()
    users.query_indexes().watch_indexes(["by_nickname"], WatchQueryIndexOptions(timeout=timedelta(seconds=20)))
    status, reply = post(emulator, LOOKUP_REQUEST | {"$value": "late"}, reader)
    users.remove("late")
    assert (status, reply["results"]) == (200, [{"nickname": "late"}])


def test_the_sdks_list_of_indexes(users: Collection) -> None:
    """With all that the SDK wants to know of each."""
    listed = users.query_indexes().get_all_indexes()
    assert [(index.name, list(index.index_key), index.type) for index in listed] == [
        ("by_nickname", ["`nickname`"], "gsi"),
        ("by_user_id", ["`user_id`"], "gsi"),
    ]
    assert {(index.bucket_name, index.scope_name, index.collection_name) for index in listed} == {
        ("sample_app", "profiles", "user_data")
    }
