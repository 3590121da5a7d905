"""The emulator's query service, as the real SDK sees it, and as plain HTTP shows it."""

import base64
import http.client
import json
import threading
import urllib.parse
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import pytest
from couchbase.cluster import Cluster
from couchbase.collection import Collection
from couchbase.exceptions import (
    AmbiguousTimeoutException,
    AuthenticationException,
    CouchbaseException,
    InternalServerFailureException,
    InvalidArgumentException,
    KeyspaceNotFoundException,
    ParsingFailedException,
    QueryIndexAlreadyExistsException,
    QueryIndexNotFoundException,
    ScopeNotFoundException,
    UnAmbiguousTimeoutException,
)
from couchbase.management.options import (
    CreatePrimaryQueryIndexOptions,
    CreateQueryIndexOptions,
    DropPrimaryQueryIndexOptions,
    DropQueryIndexOptions,
    WatchQueryIndexOptions,
)
from couchbase.n1ql import QueryScanConsistency, QueryStatus
from couchbase.options import QueryOptions
from couchbase.scope import Scope
from couchbase.serializer import Serializer

from tests.emulator.process import EmulatorProcess
from tests.emulator.sdk import connect

PROFILES = 300
LOOKUP = "SELECT RAW d FROM user_data AS d WHERE d.nickname = $nickname ORDER BY META(d).id LIMIT $limit OFFSET $offset"
HTTP_SECONDS = 10


@pytest.fixture(scope="module")
def emulator() -> Iterator[EmulatorProcess]:
    """One emulator for all tests here."""
    with EmulatorProcess(profiles=PROFILES, tls=True) as process:
        yield process


@pytest.fixture(scope="module")
def cluster(emulator: EmulatorProcess) -> Iterator[Cluster]:
    """The SDK's cluster object, connected."""
    with connect(emulator) as connected:
        connected.wait_until_ready(timedelta(seconds=10))
        yield connected


@pytest.fixture(scope="module")
def scope(cluster: Cluster) -> Scope:
    """The scope of the profiles."""
    return cluster.bucket("sample_app").scope("profiles")


@pytest.fixture(scope="module")
def users(scope: Scope) -> Collection:
    """The collection of the profiles."""
    return scope.collection("user_data")


class Bytes(Serializer):
    """Leaves rows as the bytes that arrived; parameters are JSON."""

    def serialize(self, value: Any) -> bytes:
        """Make JSON of a parameter."""
        return json.dumps(value).encode()

    def deserialize(self, value: bytes) -> bytes:
        """Return a row as it is."""
        return value


def profile(users: Collection, number: int) -> dict[str, Any]:
    """Return a generated profile."""
    found: dict[str, Any] = users.get(f"user_data:{number}").content_as[dict]
    return found


def lookup(scope: Scope, nickname: str, **options: Any) -> list[Any]:
    """Look a nickname up as the service does: a prepared, read-only query of the scope."""
    parameters = {"nickname": nickname, "limit": 100, "offset": 0}
    query_options = QueryOptions(
        adhoc=False, read_only=True, named_parameters=parameters, timeout=timedelta(seconds=5), **options
    )
    return list(scope.query(LOOKUP, query_options))


# ---- queries ----


def test_prepared_lookup(scope: Scope, users: Collection) -> None:
    """A prepared lookup by nickname gives the whole profile, the first time and by its prepared name later."""
    wanted = profile(users, 7)
    for _ in range(3):
        assert wanted in lookup(scope, wanted["nickname"])
    assert lookup(scope, "nobody has this") == []


def test_rows_pass_through_a_serializer_of_ones_own(scope: Scope, users: Collection) -> None:
    """Rows may stay bytes."""
    wanted = profile(users, 8)
    rows = lookup(scope, wanted["nickname"], serializer=Bytes())
    assert all(type(row) is bytes for row in rows)
    assert wanted in [json.loads(row) for row in rows]


def test_prepared_lookups_on_many_threads(scope: Scope, users: Collection) -> None:
    """Concurrent prepared lookups each get their own rows."""
    profiles = [profile(users, number) for number in range(1, 41)]
    wrong: list[Any] = []

    def ask(part: list[dict[str, Any]]) -> None:
        wrong.extend(wanted for wanted in part if wanted not in lookup(scope, wanted["nickname"]))

    threads = [threading.Thread(target=ask, args=(profiles[start::8],)) for start in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert not any(thread.is_alive() for thread in threads)
    assert wrong == []


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
    """What key-value writes, changes and removes is what the next query finds."""
    users.upsert("fresh", {"nickname": "fresh", "n": 1})
    assert lookup(scope, "fresh") == [{"nickname": "fresh", "n": 1}]
    users.upsert("fresh", {"nickname": "stale"})
    assert lookup(scope, "fresh") == []
    users.remove("fresh")
    assert lookup(scope, "stale") == []


def test_pages_are_ordered_by_document_id(scope: Scope, users: Collection) -> None:
    """LIMIT and OFFSET walk through the matches in the order of their ids, without gaps or repeats."""
    ids = [f"page:{number:02}" for number in range(25)]
    for document_id in reversed(ids):
        users.upsert(document_id, {"nickname": "paged", "id": document_id})
    try:
        seen: list[str] = []
        for offset in range(0, 30, 10):
            parameters = {"nickname": "paged", "limit": 10, "offset": offset}
            page = scope.query(LOOKUP, QueryOptions(adhoc=False, named_parameters=parameters))
            seen += [row["id"] for row in page]
        assert seen == ids
    finally:
        for document_id in ids:
            users.remove(document_id)


def test_positional_parameters(cluster: Cluster, users: Collection) -> None:
    """Positional parameters arrive in order, in a query of the cluster by its full path."""
    wanted = profile(users, 9)
    statement = "SELECT RAW d.email FROM sample_app.profiles.user_data d WHERE nickname = $1 AND record_id = $2"
    options = QueryOptions(positional_parameters=[wanted["nickname"], 9])
    assert list(cluster.query(statement, options)) == [wanted["email"]]


def test_metadata(cluster: Cluster) -> None:
    """Status, signature, ids and metrics are where the SDK looks for them."""
    result = cluster.query("SELECT 1 AS one, 2 AS two", QueryOptions(metrics=True, client_context_id="mine"))
    assert list(result) == [{"one": 1, "two": 2}]
    metadata = result.metadata()
    metrics = metadata.metrics()
    assert metadata.status() is QueryStatus.SUCCESS
    assert metadata.signature() == {"one": "json", "two": "json"}
    assert metadata.client_context_id() == "mine"
    assert metadata.request_id()
    assert metrics is not None
    assert metrics.result_count().value == 1
    assert metrics.result_size().value == len('{"one":1,"two":2}')
    assert metrics.error_count().value == 0
    assert metrics.elapsed_time() > timedelta(0)


def test_without_metrics_there_are_none(emulator: EmulatorProcess) -> None:
    """Metrics and signature can be left out."""
    status, reply = post(emulator, {"statement": "SELECT 1", "metrics": False, "signature": False})
    assert (status, reply["status"]) == (200, "success")
    assert "metrics" not in reply
    assert "signature" not in reply


def test_scan_consistency(scope: Scope) -> None:
    """A consistency may be asked for; there is no other than the strongest."""
    options = QueryOptions(scan_consistency=QueryScanConsistency.REQUEST_PLUS)
    statement = "SELECT RAW COUNT(*) FROM user_data WHERE nickname IS NOT MISSING"
    assert list(scope.query(statement, options)) == [PROFILES]


# ---- errors ----

ERRORS: list[tuple[str, type[CouchbaseException], str]] = [
    ("SLECT 1", ParsingFailedException, "3000"),
    ("SELECT FROBNICATE(1)", ParsingFailedException, "3000"),
    ("SELECT * FROM user_data", QueryIndexNotFoundException, "4000"),
    ("SELECT * FROM nothing", KeyspaceNotFoundException, "12003"),
    ("SELECT * FROM sample_app.nothing.user_data", ScopeNotFoundException, "12021"),
    ("CREATE INDEX by_nickname ON user_data(nickname)", QueryIndexAlreadyExistsException, "4300"),
    ("DROP INDEX nothing ON user_data", QueryIndexNotFoundException, "12016"),
    ("DROP PRIMARY INDEX ON user_data", QueryIndexNotFoundException, "12004"),
    ("SELECT $missing", InternalServerFailureException, "5010"),
    ("UPSERT INTO user_data (KEY, VALUE) VALUES ('a', 1)", InternalServerFailureException, "1020"),
]


@pytest.mark.parametrize(("statement", "kind", "code"), ERRORS)
def test_errors_become_the_sdks_exceptions(
    scope: Scope, statement: str, kind: type[CouchbaseException], code: str
) -> None:
    """Each error is raised as what the SDK makes of the server's, at once and not after retries."""
    with pytest.raises(kind) as caught:
        list(scope.query(statement, QueryOptions(timeout=timedelta(seconds=5))))
    assert str(caught.value.context.first_error_code) == code


def test_readonly_query_may_not_write(scope: Scope) -> None:
    """A read-only query that would create something is refused with 1000, and creates nothing."""
    with pytest.raises(InternalServerFailureException) as caught:
        list(scope.query("CREATE INDEX never ON user_data(city)", QueryOptions(read_only=True)))
    assert caught.value.context.first_error_code == 1000
    assert "never" not in index_names(scope.collection("user_data"))


def test_unknown_request_parameter(scope: Scope) -> None:
    """A member of the request that the server does not know is an error."""
    with pytest.raises(InvalidArgumentException) as caught:
        list(scope.query("SELECT 1", QueryOptions(raw={"bogus": 1})))
    assert caught.value.context.first_error_code == 1065


def test_timeout_of_a_request(emulator: EmulatorProcess) -> None:
    """A request whose time is up ends with 1080 and status timeout."""
    status, reply = post(emulator, {"statement": "SELECT 1", "timeout": "1ns"})
    assert (status, reply["status"], reply["results"]) == (200, "timeout", [])
    assert reply["errors"] == [{"code": 1080, "msg": "Timeout 1ns exceeded"}]


def test_latency_becomes_a_timeout(emulator: EmulatorProcess, scope: Scope) -> None:
    """A query service that is slow on request makes the SDK's timeout come true; switched off, it answers again."""
    emulator.fault("latency", service="query", ms=3000)
    try:
        with pytest.raises((UnAmbiguousTimeoutException, AmbiguousTimeoutException)):
            list(scope.query("SELECT 1", QueryOptions(timeout=timedelta(seconds=0.3))))
    finally:
        emulator.clear()
    assert list(scope.query("SELECT RAW 1")) == [1]


def test_injected_error(emulator: EmulatorProcess, scope: Scope) -> None:
    """An error that was asked for is what the next query, and only it, fails with."""
    emulator.fault("query_error", code=5000, msg="made up", count=1)
    with pytest.raises(InternalServerFailureException) as caught:
        list(scope.query("SELECT 1"))
    assert caught.value.context.first_error_message == "made up"
    assert list(scope.query("SELECT RAW 1")) == [1]


# ---- indexes ----


def index_names(users: Collection) -> list[str]:
    """Return the names of a collection's indexes."""
    return [index.name for index in users.query_indexes().get_all_indexes()]


def test_collection_index_manager(users: Collection) -> None:
    """A collection's manager creates, lists, builds, watches and drops, and its options for repeating work."""
    manager = users.query_indexes()
    manager.create_primary_index()
    with pytest.raises(QueryIndexAlreadyExistsException):
        manager.create_primary_index()
    manager.create_primary_index(CreatePrimaryQueryIndexOptions(ignore_if_exists=True))
    manager.create_index("places", ["city", "state"], CreateQueryIndexOptions(deferred=True))
    with pytest.raises(QueryIndexAlreadyExistsException):
        manager.create_index("places", ["city"])
    listed = {index.name: index for index in manager.get_all_indexes()}
    assert sorted(listed) == ["#primary", "by_nickname", "by_user_id", "places"]
    places = listed["places"]
    assert (places.state, places.type, places.index_key) == ("deferred", "gsi", ["`city`", "`state`"])
    assert (places.bucket_name, places.scope_name, places.collection_name) == ("sample_app", "profiles", "user_data")
    assert listed["#primary"].is_primary
    manager.build_deferred_indexes()
    manager.watch_indexes(["places"], WatchQueryIndexOptions(timeout=timedelta(seconds=5)))
    manager.drop_index("places")
    with pytest.raises(QueryIndexNotFoundException):
        manager.drop_index("places")
    manager.drop_index("places", DropQueryIndexOptions(ignore_if_not_exists=True))
    manager.drop_primary_index()
    with pytest.raises(QueryIndexNotFoundException):
        manager.drop_primary_index()
    manager.drop_primary_index(DropPrimaryQueryIndexOptions(ignore_if_not_exists=True))
    assert index_names(users) == ["by_nickname", "by_user_id"]


def test_cluster_index_manager(cluster: Cluster) -> None:
    """The cluster's manager works on the bucket's default collection, and lists all of the bucket's indexes."""
    manager = cluster.query_indexes()
    manager.create_primary_index("sample_app")
    manager.create_index("sample_app", "by_x", ["x"])
    listed = {(index.name, index.collection_name) for index in manager.get_all_indexes("sample_app")}
    assert listed >= {("#primary", None), ("by_x", None), ("by_nickname", "user_data")}
    manager.drop_index("sample_app", "by_x")
    manager.drop_primary_index("sample_app")
    assert not any(index.collection_name is None for index in manager.get_all_indexes("sample_app"))


def test_index_makes_a_query_possible(scope: Scope, users: Collection) -> None:
    """A field cannot be searched without an index, and can with one; prepared or not."""
    statement = "SELECT RAW META().id FROM user_data WHERE zip_code = $1"
    options: Callable[[], QueryOptions] = lambda: QueryOptions(  # noqa: E731
        adhoc=False, positional_parameters=[profile(users, 3)["zip_code"]]
    )
    with pytest.raises(QueryIndexNotFoundException, match="No index available on keyspace"):
        list(scope.query(statement, options()))
    users.query_indexes().create_index("zips", ["zip_code"])
    assert "user_data:3" in list(scope.query(statement, options()))
    users.query_indexes().drop_index("zips")
    with pytest.raises(QueryIndexNotFoundException):
        list(scope.query(statement, options()))


# ---- HTTP ----


def post(
    emulator: EmulatorProcess,
    body: dict[str, Any] | bytes,
    content_type: str = "application/json",
    password: str | None = None,
) -> tuple[int, dict[str, Any]]:
    """Post to the query service; return the status and the reply."""
    credentials = f"{emulator.user}:{emulator.password if password is None else password}"
    headers = {
        "Content-Type": content_type,
        "Authorization": "Basic " + base64.b64encode(credentials.encode()).decode(),
    }
    connection = http.client.HTTPConnection("127.0.0.1", emulator.query_port, timeout=HTTP_SECONDS)
    try:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        connection.request("POST", "/query/service", data, headers)
        response = connection.getresponse()
        assert response.headers.get_content_type() == "application/json"
        reply: dict[str, Any] = json.loads(response.read())
        return response.status, reply
    finally:
        connection.close()


def test_whole_reply(emulator: EmulatorProcess) -> None:
    """A reply has all members that a real server's has."""
    request = {"statement": "PREPARE SELECT 1 AS one", "auto_execute": True, "client_context_id": 'a"b'}
    status, reply = post(emulator, request)
    assert status == 200
    assert list(reply) == ["requestID", "clientContextID", "prepared", "signature", "results", "status", "metrics"]
    assert (reply["clientContextID"], reply["results"], reply["status"]) == ('a"b', [{"one": 1}], "success")
    metrics = reply["metrics"]
    assert (metrics["resultCount"], metrics["resultSize"]) == (1, len('{"one":1}'))
    assert metrics["elapsedTime"].endswith("ms")


@pytest.mark.parametrize(
    ("request_", "status", "code"),
    [
        ({"statement": "SELECT"}, 400, 3000),
        ({"statement": "SELECT 1", "bogus": 1}, 400, 1065),
        ({"statement": 5}, 400, 1070),
        ({}, 400, 1050),
        ({"statement": "DELETE FROM x", "readonly": True}, 403, 1000),
        ({"statement": "SELECT * FROM sample_app.profiles.user_data"}, 404, 4000),
        ({"prepared": "nothing"}, 404, 4040),
        ({"statement": "CREATE INDEX by_nickname ON sample_app.profiles.user_data(x)"}, 409, 4300),
        ({"statement": "SELECT * FROM nothing"}, 424, 12003),
        ({"statement": "SELECT * FROM sample_app.nothing.x"}, 500, 12021),
    ],
)
def test_http_status_of_errors(emulator: EmulatorProcess, request_: dict[str, Any], status: int, code: int) -> None:
    """Each error has the HTTP status that the server gives it, and its reply is whole."""
    found, reply = post(emulator, request_)
    assert (found, reply["status"], [error["code"] for error in reply["errors"]]) == (status, "fatal", [code])
    assert reply["metrics"]["errorCount"] == 1


def test_forgotten_statements(emulator: EmulatorProcess) -> None:
    """A prepared statement can be executed until the service forgets it, and again once it is prepared again."""
    prepare, execute = {"statement": "PREPARE short AS SELECT 1 AS one"}, {"prepared": "short"}
    assert post(emulator, prepare)[0] == 200
    assert post(emulator, execute)[1]["results"] == [{"one": 1}]
    emulator.fault("forget")
    status, reply = post(emulator, execute)
    assert (status, reply["errors"][0]["code"]) == (404, 4040)
    assert post(emulator, prepare)[0] == 200
    assert post(emulator, execute)[1]["results"] == [{"one": 1}]


def test_form_encoded_request(emulator: EmulatorProcess, users: Collection) -> None:
    """A form does as well as JSON: parameters in it are JSON, flags are words."""
    wanted = profile(users, 5)
    form = {
        "statement": "SELECT RAW record_id FROM user_data WHERE nickname = $nick AND record_id = $1",
        "$nick": json.dumps(wanted["nickname"]),
        "args": "[5]",
        "readonly": "true",
        "query_context": "default:sample_app.profiles",
    }
    status, reply = post(emulator, urllib.parse.urlencode(form).encode(), "application/x-www-form-urlencoded")
    assert (status, reply["results"]) == (200, [5])
    form["readonly"] = "perhaps"
    status, reply = post(emulator, urllib.parse.urlencode(form).encode(), "application/x-www-form-urlencoded")
    assert (status, reply["errors"][0]["code"]) == (400, 1070)


@pytest.mark.parametrize(
    ("body", "content_type", "status", "code"),
    [
        (b"{", "application/json", 400, 1040),
        (b"[1]", "application/json", 400, 1040),
        (b"[" * 100_000, "application/json", 400, 1040),
        (b"\xff", "application/json", 400, 1040),
        (b'{"statement": "SELECT $x", "$x": NaN}', "application/json", 400, 1040),
        (b"statement=SELECT+1&statement=SELECT+2", "application/x-www-form-urlencoded", 400, 1060),
        (b"<a/>", "text/xml", 406, 1120),
        (b"$x=%7B&statement=SELECT+1", "application/x-www-form-urlencoded", 400, 1040),
    ],
)
def test_bad_body(emulator: EmulatorProcess, body: bytes, content_type: str, status: int, code: int) -> None:
    """A body that can't be read is the client's fault, and says so."""
    found, reply = post(emulator, body, content_type)
    assert (found, reply["errors"][0]["code"]) == (status, code)


def test_wrong_password(emulator: EmulatorProcess) -> None:
    """Without the right password the reply is 401 with the server's error."""
    status, reply = post(emulator, {"statement": "SELECT 1"}, password="wrong")
    assert (status, reply["errors"][0]["code"]) == (401, 13014)


def test_changed_password_is_noticed(emulator: EmulatorProcess, scope: Scope) -> None:
    """A connected SDK whose password is no longer right gets the exception that says so."""
    emulator.set_password(emulator.user, "another")
    try:
        with pytest.raises(AuthenticationException):
            list(scope.query("SELECT 1"))
    finally:
        emulator.set_password(emulator.user, emulator.password)
    assert list(scope.query("SELECT RAW 1")) == [1]


def test_long_query_does_not_hold_up_others(emulator: EmulatorProcess, users: Collection) -> None:
    """While one connection's query walks through many documents, key-value goes on."""
    users.query_indexes().create_primary_index()
    finished = threading.Event()
    replies: list[Any] = []

    def ask() -> None:
        slow = (
            "SELECT RAW COUNT(*) FROM sample_app.profiles.user_data WHERE first_name LIKE '%e%' OR last_name LIKE '%x'"
        )
        replies.extend(post(emulator, {"statement": slow}) for _ in range(20))
        finished.set()

    thread = threading.Thread(target=ask)
    thread.start()
    answered = 0
    while not finished.is_set():
        users.get("user_data:1")
        answered += 1
    thread.join(30)
    users.query_indexes().drop_primary_index()
    assert [status for status, _ in replies] == [200] * 20
    assert answered > 0


def test_ping(cluster: Cluster, emulator: EmulatorProcess) -> None:
    """The query service answers pings, by the SDK and without signing in."""
    endpoints = {kind.value: reports for kind, reports in cluster.ping().endpoints.items()}
    assert [report.state.value for report in endpoints["query"]] == ["ok"]
    connection = http.client.HTTPConnection("127.0.0.1", emulator.query_port, timeout=HTTP_SECONDS)
    try:
        connection.request("GET", "/admin/ping")
        response = connection.getresponse()
        assert (response.status, json.loads(response.read())) == (200, {"status": "OK"})
    finally:
        connection.close()


def test_queries_over_tls(emulator: EmulatorProcess) -> None:
    """Queries work over TLS with the emulator's own certificate authority."""
    address = emulator.tls_connection_string
    with connect(emulator, connection_string=address, ca_file=emulator.ca_file) as cluster:
        cluster.wait_until_ready(timedelta(seconds=10))
        assert list(cluster.query("SELECT RAW 1")) == [1]
