"""The emulator's faults, two nodes and their documents, as the real SDK sees them."""

import contextlib
import http.client
import json
import zlib
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import pytest
from couchbase.cluster import Cluster
from couchbase.collection import Collection
from couchbase.exceptions import (
    AmbiguousTimeoutException,
    AuthenticationException,
    CouchbaseException,
    DocumentNotFoundException,
    RequestCanceledException,
    TemporaryFailException,
    UnAmbiguousTimeoutException,
)
from couchbase.options import GetMultiOptions, GetOptions, QueryOptions

from tests.emulator.process import EmulatorProcess
from tests.emulator.raw import RawClient, packet
from tests.emulator.sdk import connect

PROFILES = 200
SHORT, PATIENT = timedelta(seconds=1), timedelta(seconds=20)  # SHORT: of what is not answered; enough for all else
MINUTE_MS = 60_000
KEYS = [f"user_data:{number}" for number in range(1, PROFILES + 1)]
QUERY = "SELECT RAW name FROM system:indexes WHERE keyspace_id = 'user_data'"


def node_of(key: str) -> int:
    """Return which of two nodes has a key: the first has the lower half of the 1,024 vBuckets."""
    return ((zlib.crc32(key.encode()) >> 16) & 0x7FFF) % 1024 // 512


@pytest.fixture(scope="module")
def running() -> Iterator[EmulatorProcess]:
    """Two nodes that hold replicas of each other's documents."""
    with EmulatorProcess(nodes=2, replicas=1, profiles=PROFILES, pictures=0, token="T") as process:
        yield process


@pytest.fixture
def emulator(running: EmulatorProcess) -> Iterator[EmulatorProcess]:
    """The emulator, and no fault on before or after a test."""
    yield running
    running.clear()


@pytest.fixture(scope="module")
def cluster(running: EmulatorProcess) -> Iterator[Cluster]:
    """The SDK's cluster object, connected."""
    with connect(running) as connected:
        yield connected


@pytest.fixture(scope="module")
def users(cluster: Cluster) -> Collection:
    """The collection of the profiles."""
    return cluster.bucket("sample_app").scope("profiles").collection("user_data")


def get(users: Collection, key: str, timeout: timedelta = PATIENT) -> dict[str, Any]:
    """Get a document within `timeout`."""
    document: dict[str, Any] = users.get(key, GetOptions(timeout=timeout)).content_as[dict]
    return document


def operations(emulator: EmulatorProcess, name: str) -> int:
    """Return how many requests of one operation have reached the wire."""
    return int(emulator.stats()["operations"].get(name, 0))


# ---- two nodes ----


def test_documents_are_spread_over_the_nodes(emulator: EmulatorProcess, users: Collection) -> None:
    """Each node is asked for its own documents, by the CRC of their keys, and for no others."""
    before = [node["operations"].get("get", 0) for node in emulator.stats()["nodes"]]
    assert len(users.get_multi(KEYS).results) == PROFILES
    after = [node["operations"].get("get", 0) for node in emulator.stats()["nodes"]]
    expected = [sum(node_of(key) == node for key in KEYS) for node in (0, 1)]
    assert min(expected) > PROFILES // 4
    assert [now - then for now, then in zip(after, before, strict=True)] == expected


def test_a_stopped_node_takes_only_its_documents_with_it(emulator: EmulatorProcess, users: Collection) -> None:
    """The other node's documents are served, its own have their replicas there, and all is back when it is."""
    lost = next(key for key in KEYS if node_of(key) == 1)
    kept = next(key for key in KEYS if node_of(key) == 0)
    get(users, lost)
    emulator.stop_node(1)
    try:
        assert get(users, kept)
        with pytest.raises(UnAmbiguousTimeoutException):
            get(users, lost, SHORT)
        assert users.get_any_replica(lost).is_replica
        result = users.get_multi([kept, lost], GetMultiOptions(timeout=SHORT))
        assert list(result.results) == [kept]
        assert list(result.exceptions) == [lost]
    finally:
        emulator.start_node(1)
    assert get(users, lost)


def test_any_node_will_do_to_start_from(emulator: EmulatorProcess) -> None:
    """Each node knows of the other."""
    second = f"couchbase://127.0.0.1:{emulator.nodes[1]['plain']['kv']}"
    with connect(emulator, connection_string=second) as own:
        found = own.bucket("sample_app").scope("profiles").collection("user_data").get_multi(KEYS)
        assert len(found.results) == PROFILES


def test_the_wrong_node_says_so(emulator: EmulatorProcess) -> None:
    """It answers "not my vBucket" with the configuration, in which the right one is; replicas: the other way round."""
    key = KEYS[0].encode()
    for node in (0, 1):
        with RawClient(emulator.nodes[node]["plain"]["kv"]) as client:
            client.open_bucket(emulator.user, emulator.password)
            status, extras_and_id = client.ask(0xBB, value=b"profiles.user_data")
            assert status == 0
            prefixed = extras_and_id[-1:] + key
            get_status, config = client.ask(0x00, prefixed, at=key)
            replica_status, _ = client.ask(0x83, prefixed, at=key)
            if node == node_of(KEYS[0]):
                assert (get_status, replica_status) == (0x00, 0x07)
            else:
                assert (get_status, replica_status) == (0x07, 0x00)
                servers = json.loads(config)["vBucketServerMap"]["serverList"]
                assert servers == [f"$HOST:{each['plain']['kv']}" for each in emulator.nodes]


def test_latency_keeps_the_order(emulator: EmulatorProcess) -> None:
    """What comes after a request that waits is answered after it, and what is behind latency is not lost."""
    with RawClient(emulator.kv_port) as client:
        client.open_bucket(emulator.user, emulator.password)
        emulator.fault("latency", ms=50, operation="noop")
        client.send(packet(0x0A) * 100 + packet(0xB5) + packet(0xEE))
        assert [client.reply()[0] for _ in range(102)] == [0x00] * 101 + [0x81]


# ---- faults of key-value ----


def test_latency_makes_requests_wait_side_by_side(emulator: EmulatorProcess, users: Collection) -> None:
    """Two hundred requests that wait 100 ms each, one after another, would take 20 s; together they pass in time."""
    emulator.fault("latency", ms=100, operation="get")
    result = users.get_multi(KEYS, GetMultiOptions(timeout=timedelta(seconds=15)))
    assert len(result.results) == PROFILES


def test_latency_is_really_waited_for(emulator: EmulatorProcess, users: Collection) -> None:
    """A minute is too long for a get, not for what the fault is not about."""
    emulator.fault("latency", ms=MINUTE_MS, operation="get", node=node_of(KEYS[0]))
    with pytest.raises(UnAmbiguousTimeoutException):
        get(users, KEYS[0], SHORT)
    elsewhere = next(key for key in KEYS if node_of(key) != node_of(KEYS[0]))
    assert get(users, elsewhere)
    emulator.clear("latency")
    emulator.fault("drop", service="kv")  # The replies that still wait hold up all after them, in order.
    assert get(users, KEYS[0])


def test_temporary_failures_are_retried_by_the_sdk(emulator: EmulatorProcess, users: Collection) -> None:
    """Three failures reach the SDK, and the fourth answer is the document."""
    before = operations(emulator, "get")
    emulator.fault("temporary_failure", count=3)
    assert get(users, KEYS[0])
    assert operations(emulator, "get") - before == 4
    assert emulator.faults()["active"] == []


def test_temporary_failure_without_a_count_lasts(emulator: EmulatorProcess, users: Collection) -> None:
    """Until it is switched off."""
    emulator.fault("temporary_failure", operation="get")
    with pytest.raises(TemporaryFailException):
        get(users, KEYS[0], SHORT)
    assert users.exists(KEYS[0]).exists
    emulator.clear("temporary_failure")
    assert get(users, KEYS[0])


def test_any_status_for_the_next_requests(emulator: EmulatorProcess, users: Collection) -> None:
    """Such as "not found" for one get of a document that is there."""
    emulator.fault("status", status=0x01, operation="get", count=1)
    with pytest.raises(DocumentNotFoundException):
        get(users, KEYS[0])
    assert get(users, KEYS[0])


def test_dropped_connections_are_made_anew(emulator: EmulatorProcess, users: Collection) -> None:
    """Both nodes' connections are cut once; the next request finds others."""
    get(users, KEYS[0])
    before = operations(emulator, "hello")
    emulator.fault("drop")
    assert get(users, KEYS[0])
    assert operations(emulator, "hello") > before


def test_a_frozen_node_answers_when_it_thaws(emulator: EmulatorProcess, users: Collection) -> None:
    """Requests time out, new connections get no word, and afterwards the same connections go on."""
    emulator.fault("freeze", service="kv")
    with pytest.raises(UnAmbiguousTimeoutException):
        get(users, KEYS[0], SHORT)
    with pytest.raises(UnAmbiguousTimeoutException), connect(emulator, timeout_seconds=0.4):
        pass
    hellos = operations(emulator, "hello")
    emulator.clear("freeze")
    assert get(users, KEYS[0])
    with connect(emulator):
        pass
    assert operations(emulator, "hello") > hellos


# ---- faults of query and management ----


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        ({"code": 5999, "msg": "a test", "http_status": 400}, '[{"code": 5999, "msg": "a test"}]'),
        ({"code": 12008, "retry": True}, '"retry": true}]'),
        ({"body": "<html>Bad Gateway", "http_status": 502}, "<html>Bad Gateway"),
        ({"body": '{"results":[{"row": 1},', "http_status": 200}, '"results":[{"row": 1},'),
    ],
)
def test_query_errors(emulator: EmulatorProcess, cluster: Cluster, fault: dict[str, Any], says: str) -> None:
    """Any code, status and text, a body that is no JSON, rows that are cut off: for as many queries as asked for."""
    emulator.fault("query_error", count=1, **fault)
    with pytest.raises(CouchbaseException) as caught:
        list(cluster.query(QUERY))
    context = str(caught.value.context)
    assert f"'http_status': {fault.get('http_status', 500)}" in context and says in context
    assert len(list(cluster.query(QUERY))) == 2


@pytest.mark.parametrize("fault", [{"name": "freeze", "service": "query"}, {"name": "latency", "ms": MINUTE_MS}])
def test_slow_and_frozen_queries_time_out(emulator: EmulatorProcess, cluster: Cluster, fault: dict[str, Any]) -> None:
    """Queries do, key-value does not."""
    emulator.fault(**{"service": "query"} | fault)
    with pytest.raises(CouchbaseException):
        list(cluster.query(QUERY, QueryOptions(timeout=SHORT)))
    assert get(cluster.bucket("sample_app").scope("profiles").collection("user_data"), KEYS[0])
    emulator.clear()
    assert len(list(cluster.query(QUERY))) == 2


def test_queries_of_a_stopped_node_go_to_the_other(emulator: EmulatorProcess, cluster: Cluster) -> None:
    """One query service is enough, though the SDK may cancel the queries that it sends to the one that is gone."""
    answered = 0
    emulator.stop_node(0)
    try:
        for _ in range(4):
            with contextlib.suppress(RequestCanceledException):
                answered += len(list(cluster.query(QUERY))) == 2
    finally:
        emulator.start_node(0)
    assert answered


def test_frozen_management_times_out(emulator: EmulatorProcess) -> None:
    """And answers when it is switched off again."""
    with connect(emulator, timeout_seconds=1.5) as own:
        manager = own.bucket("sample_app").collections()
        emulator.fault("freeze", service="management")
        with pytest.raises(AmbiguousTimeoutException):
            manager.get_all_scopes()
        emulator.clear("freeze")
        assert len(list(manager.get_all_scopes())) == 2


# ---- token and password ----


def test_the_token_changes_and_goes(emulator: EmulatorProcess, cluster: Cluster) -> None:
    """In the document that the service reads it from."""
    tokens = cluster.bucket("sample_app").scope("profiles").collection("service_auth")
    emulator.set_token("another")
    assert tokens.get("service_auth:1").content_as[dict] == {"token": "another"}
    emulator.set_token(None)
    with pytest.raises(DocumentNotFoundException):
        tokens.get("service_auth:1")
    emulator.set_token("T")
    assert tokens.get("service_auth:1").content_as[dict] == {"token": "T"}


def test_a_changed_password_is_asked_for(emulator: EmulatorProcess, users: Collection) -> None:
    """Of those who sign in from then on; who is signed in stays so."""
    emulator.set_password(emulator.user, "changed")
    try:
        with pytest.raises(AuthenticationException), connect(emulator):
            pass
        with connect(emulator, password="changed") as own:
            assert len(list(own.query(QUERY))) == 2
        assert get(users, KEYS[0])
    finally:
        emulator.set_password(emulator.user, emulator.password)


# ---- the faults' port ----


def ask(emulator: EmulatorProcess, method: str, path: str, body: str | None = None) -> tuple[int, dict[str, Any]]:
    """Send one request to the faults' port; return the status and the decoded body."""
    connection = http.client.HTTPConnection("127.0.0.1", emulator.faults_port, timeout=20)
    try:
        connection.request(method, path, body)
        response = connection.getresponse()
        return response.status, json.loads(response.read())
    finally:
        connection.close()


def test_the_port_says_what_it_takes_and_what_is_on(emulator: EmulatorProcess) -> None:
    """Every fault with its parameters, and those that are on with what they were given."""
    emulator.fault("latency", ms=1, service="query")
    emulator.fault("latency", ms=2, service="kv")
    emulator.fault("latency", ms=3, service="query")
    emulator.fault("temporary_failure", count=5)
    described = emulator.faults()
    assert {"latency", "temporary_failure", "status", "query_error", "drop", "freeze"} <= set(described["faults"])
    assert "ms" in described["faults"]["latency"]["parameters"]
    assert described["active"] == [
        {"fault": "latency", "ms": 2, "service": "kv"},
        {"fault": "latency", "ms": 3, "service": "query"},
        {"fault": "temporary_failure", "count": 5, "remaining": 5},
    ]
    emulator.clear("latency")
    assert [fault["fault"] for fault in emulator.faults()["active"]] == ["temporary_failure"]
    emulator.clear()
    assert emulator.faults()["active"] == []


@pytest.mark.parametrize(
    ("method", "path", "body", "says"),
    [
        ("PUT", "/faults/nothing", "{}", "there is no fault 'nothing'"),
        ("DELETE", "/faults/nothing", None, "there is no fault 'nothing'"),
        ("PUT", "/faults/latency", "{", "must be JSON"),
        ("PUT", "/faults/latency", "[]", "must be a JSON object"),
        ("PUT", "/faults/latency", None, "needs the parameter 'ms'"),
        ("PUT", "/faults/latency", '{"ms": "5"}', "ms must be an integer"),
        ("PUT", "/faults/latency", '{"ms": true}', "ms must be an integer"),
        ("PUT", "/faults/latency", '{"ms": -1}', "ms must be from 0 to"),
        ("PUT", "/faults/latency", '{"ms": 1, "service": "search"}', "service must be one of kv, query, management"),
        ("PUT", "/faults/latency", '{"ms": 1, "service": "query", "operation": "get"}', "operation is for"),
        ("PUT", "/faults/latency", '{"ms": 1, "operation": "fetch"}', "operation must be one of"),
        ("PUT", "/faults/latency", '{"ms": 1, "speed": 2}', "latency has no parameter 'speed'"),
        ("PUT", "/faults/temporary_failure", '{"count": 0}', "count must be from 1"),
        ("PUT", "/faults/drop", '{"node": 7}', "node must be from 0 to 1"),
        ("POST", "/nodes/7/stop", None, "node must be from 0 to 1"),
        ("PUT", "/token", "{}", "needs the parameter 'token'"),
        ("PUT", "/token", '{"token": 5}', "token must be a text"),
        ("PUT", "/password", '{"user": "demo"}', "needs the parameter 'password'"),
    ],
)
def test_bad_input_is_400_and_says_why(
    emulator: EmulatorProcess, method: str, path: str, body: str | None, says: str
) -> None:
    """And switches nothing on."""
    status, answer = ask(emulator, method, path, body)
    assert status == 400
    assert says in answer["error"]
    assert emulator.faults()["active"] == []


def test_stats_count_connections(emulator: EmulatorProcess) -> None:
    """One more client is more connections, by node and service, until it goes."""
    before = emulator.stats()["nodes"][0]["connections"]["kv"]
    with connect(emulator) as own:
        own.bucket("sample_app").scope("profiles").collection("user_data").get(KEYS[0])
        assert emulator.stats()["nodes"][0]["connections"]["kv"] > before
