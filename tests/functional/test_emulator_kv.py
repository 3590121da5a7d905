"""The emulator's key-value side, as the real SDK sees it."""

import base64
import contextlib
import http.client
import json
import socket
import ssl
import struct
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import couchbase.subdocument as subdoc
import pytest
from couchbase.auth import PasswordAuthenticator
from couchbase.cluster import Cluster
from couchbase.collection import Collection
from couchbase.exceptions import (
    AuthenticationException,
    CouchbaseException,
    DocumentExistsException,
    DocumentNotFoundException,
    DocumentNotJsonException,
    InvalidArgumentException,
    PathMismatchException,
    PathNotFoundException,
    ScopeNotFoundException,
    UnAmbiguousTimeoutException,
    UnsupportedOperation,
)
from couchbase.options import (
    ClusterOptions,
    GetOptions,
    RemoveOptions,
    UpsertOptions,
)
from couchbase.transcoder import RawBinaryTranscoder, RawJSONTranscoder

from tests.emulator.process import EmulatorProcess
from tests.emulator.raw import RawClient, packet
from tests.emulator.sdk import connect
from tests.load.clients import resident_bytes

PROFILES = 200
SHORT = timedelta(seconds=0.7)
MAX_VALUE_BYTES = 20 * 1024 * 1024
DOCUMENT = {"name": "Ann", "tags": ["a", {"deep": "x"}, 3], "home": {"city": "Rome", "zip.code": "00100"}, "n": 1}


@pytest.fixture(scope="module")
def emulator() -> Iterator[EmulatorProcess]:
    """One emulator with TLS, for all tests here."""
    with EmulatorProcess(profiles=PROFILES, token="T", tls=True) as process:
        yield process


@pytest.fixture(scope="module")
def cluster(emulator: EmulatorProcess) -> Iterator[Cluster]:
    """The SDK's cluster object, connected."""
    with connect(emulator) as connected:
        yield connected


@pytest.fixture(scope="module")
def users(cluster: Cluster) -> Collection:
    """The collection of the profiles."""
    return cluster.bucket("sample_app").scope("profiles").collection("user_data")


@pytest.fixture
def key(users: Collection) -> Iterator[str]:
    """The key of a document that is there, `DOCUMENT`, and gone after the test."""
    users.upsert("test", DOCUMENT)
    yield "test"
    with contextlib.suppress(DocumentNotFoundException):
        users.remove("test")


# ---- whole documents ----


def test_the_token_document_and_the_profiles_are_there(cluster: Cluster, users: Collection) -> None:
    """What the command line promises is in the three collections."""
    scope = cluster.bucket("sample_app").scope("profiles")
    assert scope.collection("service_auth").get("service_auth:1").content_as[dict] == {"token": "T"}
    assert users.get(f"user_data:{PROFILES}").content_as[dict]["record_id"] == PROFILES


def test_values_come_back_byte_for_byte(users: Collection, key: str) -> None:
    """Neither the bytes nor the flags of a value are touched."""
    raw = b'{ "spaces" :  "kept", "\\u00e9": "\xc3\xa9" }'
    users.upsert(key, raw, UpsertOptions(transcoder=RawJSONTranscoder()))
    assert users.get(key, GetOptions(transcoder=RawJSONTranscoder())).content_as[bytes] == raw
    users.upsert(key, b"\x00\xff", UpsertOptions(transcoder=RawBinaryTranscoder()))
    assert users.get(key, GetOptions(transcoder=RawBinaryTranscoder())).content_as[bytes] == b"\x00\xff"


def test_exists(users: Collection, key: str) -> None:
    """Exists tells a document from none, with its CAS."""
    assert users.exists(key).exists
    assert users.exists(key).cas == users.get(key).cas
    assert not users.exists("nobody").exists


def test_insert_and_remove(users: Collection, key: str) -> None:
    """Insert wants no document, remove wants one; each change makes another CAS."""
    with pytest.raises(DocumentExistsException):
        users.insert(key, {})
    before = users.get(key).cas
    users.remove(key)
    with pytest.raises(DocumentNotFoundException):
        users.remove(key)
    assert users.insert(key, {"v": 1}).cas > before
    assert users.get(key).content_as[dict] == {"v": 1}


def test_get_multi_with_mixed_results(users: Collection) -> None:
    """What is there comes back, what isn't is an exception of its own key."""
    there = [f"user_data:{number}" for number in range(1, 101)]
    result = users.get_multi([*there, "nobody", "noone"], return_exceptions=True)
    assert sorted(result.results) == sorted(there)
    assert {type(error) for error in result.exceptions.values()} == {DocumentNotFoundException}
    assert sorted(result.exceptions) == ["nobody", "noone"]


def test_the_largest_value_and_one_byte_more(users: Collection) -> None:
    """20 MiB can be stored and read; more is refused, and the connection lives on."""
    transcoder, patient = RawBinaryTranscoder(), timedelta(seconds=30)
    users.upsert("large", b"x" * MAX_VALUE_BYTES, UpsertOptions(transcoder=transcoder, timeout=patient))
    stored = users.get("large", GetOptions(transcoder=transcoder, timeout=patient)).content_as[bytes]
    assert len(stored) == MAX_VALUE_BYTES
    with pytest.raises(CouchbaseException) as refused:
        too_large = b"x" * (MAX_VALUE_BYTES + 1)
        users.upsert("large", too_large, UpsertOptions(transcoder=transcoder, timeout=patient))
    assert refused.value.error_code == 104, "value_too_large"
    users.remove("large")


def test_keys_of_the_greatest_length(users: Collection) -> None:
    """246 bytes are a key in a collection of one's own, 247 are not."""
    with pytest.raises(DocumentNotFoundException):
        users.get("k" * 246)
    with pytest.raises(InvalidArgumentException):
        users.get("k" * 247)


# ---- parts of documents ----


@pytest.mark.parametrize(
    ("value", "error"),
    [
        ({"name": "Ann"}, None),
        ({"names": "Ann"}, PathNotFoundException),
        ([1], PathMismatchException),
        (b"\x00", DocumentNotJsonException),
    ],
)
def test_lookup_in_of_one_member(
    users: Collection, key: str, value: Any, error: type[CouchbaseException] | None
) -> None:
    """As the service reads its token: the member's value, or what is wrong with the document."""
    binary = UpsertOptions(transcoder=RawBinaryTranscoder())
    users.upsert(key, value, *([binary] if isinstance(value, bytes) else []))
    with pytest.raises(error) if error else contextlib.nullcontext():
        assert users.lookup_in(key, [subdoc.get("name")]).content_as[str](0) == "Ann"
    with pytest.raises(DocumentNotFoundException):
        users.lookup_in("nobody", [subdoc.get("name")])


REFUSED: list[Callable[[Collection, str], Any]] = [
    lambda users, key: users.replace(key, {}),
    lambda users, key: users.touch(key, SHORT),
    lambda users, key: users.get_and_lock(key, SHORT),
    lambda users, key: users.binary().increment(key),
    lambda users, key: users.mutate_in(key, [subdoc.upsert("name", 1)]),
    lambda users, key: users.lookup_in(key, [subdoc.get("name"), subdoc.get("n")]),
    lambda users, key: users.lookup_in(key, [subdoc.get("home.city")]),
    lambda users, key: users.lookup_in(key, [subdoc.exists("name")]),
    lambda users, key: users.upsert(key, {}, UpsertOptions(expiry=timedelta(minutes=5))),
    lambda users, key: users.remove(key, RemoveOptions(cas=1)),
]


@pytest.mark.parametrize("ask", REFUSED)
def test_what_the_project_does_not_use_is_refused(users: Collection, key: str, ask: Callable[..., Any]) -> None:
    """As by a server that does not support it: at once, and nothing has changed."""
    before = users.get(key).cas
    with pytest.raises(UnsupportedOperation):
        ask(users, key)
    assert users.get(key).cas == before


# ---- buckets, scopes, collections, sign-in ----


def test_an_unknown_collection_times_out(cluster: Cluster) -> None:
    """The SDK keeps asking for its id until the operation's time is over: "unknown collection" may be a delay."""
    with pytest.raises(UnAmbiguousTimeoutException):
        cluster.bucket("sample_app").scope("profiles").collection("nothing").get("a", GetOptions(timeout=SHORT))


def test_an_unknown_scope(cluster: Cluster) -> None:
    """This the SDK reports."""
    with pytest.raises(ScopeNotFoundException):
        cluster.bucket("sample_app").scope("nothing").collection("nothing").get("a")


def test_an_unknown_bucket_times_out(emulator: EmulatorProcess) -> None:
    """As with the real server, whose answer the SDK takes for a bucket that is being made."""
    with connect(emulator, timeout_seconds=1.5) as own, pytest.raises(UnAmbiguousTimeoutException):
        own.bucket("nothing")


def test_a_wrong_password_is_refused(emulator: EmulatorProcess) -> None:
    """Over key-value by SCRAM, over TLS by PLAIN, and over HTTP by Basic; so is an unknown user."""
    encrypted = {"connection_string": emulator.tls_connection_string, "ca_file": emulator.ca_file}
    for where in ({}, encrypted):
        with pytest.raises(AuthenticationException), connect(emulator, password="wrong", **where):
            pass
    with pytest.raises(AuthenticationException):
        Cluster(emulator.connection_string, ClusterOptions(PasswordAuthenticator("nobody", emulator.password)))
    connection = http.client.HTTPConnection("127.0.0.1", emulator.management_port, timeout=20)
    credentials = base64.b64encode(b"demo:wrong").decode()
    connection.request("GET", "/", headers={"Authorization": f"Basic {credentials}"})
    assert connection.getresponse().status == 401
    connection.close()


def test_tls_with_the_authority_trusted(emulator: EmulatorProcess) -> None:
    """The certificate is verified, PLAIN signs in, and documents come over the TLS ports."""
    with connect(emulator, connection_string=emulator.tls_connection_string, ca_file=emulator.ca_file) as own:
        assert own.bucket("sample_app").scope("profiles").collection("user_data").exists("user_data:1").exists


def test_tls_without_the_authority_is_refused(emulator: EmulatorProcess) -> None:
    """An authority that nobody trusts gets no connection."""
    with (
        pytest.raises(UnAmbiguousTimeoutException),
        connect(emulator, connection_string=emulator.tls_connection_string, timeout_seconds=0.7),
    ):
        pass


@pytest.mark.parametrize(
    ("kind", "problem"), [("expired", "certificate has expired"), ("wrong-host", "IP address mismatch")]
)
def test_bad_certificates_are_bad_in_the_way_asked_for(kind: str, problem: str) -> None:
    """Python's ssl says what is wrong with each, though their authority is trusted; the SDK refuses the expired one.

    SDK 4.6.3 connects to a server whose certificate is for another host: it verifies the chain, not the name.
    """
    with EmulatorProcess(tls=True, tls_cert=kind) as process:
        context = ssl.create_default_context(cafile=process.ca_file)
        address = ("127.0.0.1", process.nodes[0]["tls"]["kv"])
        with socket.create_connection(address, timeout=20) as plain, pytest.raises(ssl.SSLError, match=problem):
            context.wrap_socket(plain, server_hostname="127.0.0.1")
        if kind == "expired":
            string, authority = process.tls_connection_string, process.ca_file
            with (
                pytest.raises(UnAmbiguousTimeoutException),
                connect(process, connection_string=string, ca_file=authority, timeout_seconds=0.7),
            ):
                pass


# ---- raw packets ----


@pytest.mark.parametrize(
    "data",
    [
        b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"\x81" + packet(0x0A)[1:],
        b"\x08" + packet(0x0A)[1:],
        struct.pack(">BBHBBHLLQ", 0x80, 0x00, 9, 0, 0, 0, 4, 0, 0) + b"four",
        struct.pack(">BBHBBHLLQ", 0x80, 0x00, 0, 9, 0, 0, 4, 0, 0) + b"four",
        struct.pack(">BBHBBHLLQ", 0x80, 0x01, 0, 0, 0, 0, 0xFFFFFFFF, 0, 0),
    ],
    ids=["http", "reply-magic", "framing-magic", "key-longer-than-body", "extras-longer-than-body", "huge-body"],
)
def test_malformed_packets_cost_only_their_connection(
    emulator: EmulatorProcess, users: Collection, data: bytes
) -> None:
    """The connection is closed; others go on."""
    with RawClient(emulator.kv_port) as client:
        client.send(data)
        assert client.closed()
    assert users.exists("user_data:1").exists


def test_requests_may_come_in_any_pieces(emulator: EmulatorProcess) -> None:
    """Byte by byte or many at once, each request has its reply, in order."""
    with RawClient(emulator.kv_port) as client:
        for byte in packet(0x0A) + packet(0x20):
            client.send(bytes([byte]))
        assert client.reply() == (0, b"")
        assert client.reply() == (0, b"SCRAM-SHA512")
        client.send(packet(0x0A) * 100 + packet(0x20)[:10])
        assert [client.reply()[0] for _ in range(100)] == [0] * 100
        client.send(packet(0x20)[10:])
        assert client.reply()[0] == 0


def test_a_client_that_does_not_read_costs_little_memory(emulator: EmulatorProcess, users: Collection) -> None:
    """A thousand replies of a megabyte are made as they are read, in order and complete; others are served too."""
    size, gets = 1024 * 1024, 1000
    key = "m"  # so short that all requests come in one piece: of two the second waits until the client reads
    users.upsert(key, b"x" * size, UpsertOptions(transcoder=RawBinaryTranscoder()))
    with RawClient(emulator.kv_port) as client:
        client.open_bucket(emulator.user, emulator.password)
        (collection,) = client.ask(0xBB, value=b"profiles.user_data")[1][-1:]
        before = emulator.stats()["operations"].get("get", 0)
        client.send(packet(0x00, bytes([collection]) + key.encode(), at=key.encode()) * gets + packet(0x0A))
        while emulator.stats()["operations"].get("get", 0) < before + gets:
            assert users.exists("user_data:1").exists
        assert resident_bytes(emulator.pid) < 512 * 1024 * 1024
        for _ in range(100):
            status, body = client.reply()
            assert (status, len(body)) == (0, 4 + size)
    users.remove(key)


def test_nothing_is_served_before_sign_in_and_bucket(emulator: EmulatorProcess) -> None:
    """Without sign-in there is no access, without a bucket no document."""
    with RawClient(emulator.kv_port) as client:
        assert client.ask(0x00, b"key")[0] == 0x24
        assert client.ask(0xB5)[0] == 0x24
        assert client.ask(0x22, b"SCRAM-SHA512", value=b"c=biws,r=x,p=x")[0] == 0x20
        assert client.ask(0x21, b"SCRAM-SHA512", value=b"rubbish")[0] == 0x20
        assert client.ask(0x21, b"PLAIN", value=f"\0demo\0{emulator.password}".encode())[0] == 0x20
    with RawClient(emulator.kv_port) as client:
        client.open_bucket(emulator.user, emulator.password)
        assert client.ask(0x89, b"nothing")[0] == 0x01, "an unknown bucket, to one who may use them all"


def test_wrong_requests_have_their_status(emulator: EmulatorProcess) -> None:
    """Lengths that don't fit, unknown collections and commands, compressed values: refused; the connection stays."""
    with RawClient(emulator.kv_port) as client:
        client.open_bucket(emulator.user, emulator.password)
        default, unknown = b"\x00", b"\xff\x7f"
        assert client.ask(0x00, default, at=b"")[0] == 0x04, "no key"
        assert client.ask(0x00, b"\xff" * 6, at=b"")[0] == 0x04, "a collection's id without end"
        assert client.ask(0x00, default + b"k" * 251, at=b"k" * 251)[0] == 0x04, "a key of 251 bytes"
        assert client.ask(0x00, unknown + b"k", at=b"k")[0] == 0x88
        assert client.ask(0x01, default + b"k", extras=b"\0", value=b"{}", at=b"k")[0] == 0x04, "extras of one byte"
        assert client.ask(0xD0, default + b"k", value=b"\xc5\x00\x00\x09abc", at=b"k")[0] == 0x04, "a path cut short"
        assert client.ask(0xD0, default + b"k", value=b"\xc5\x00\x00\x01a.b", at=b"k")[0] == 0x83, "two paths"
        assert client.ask(0xBB, value=b"profiles.nothing")[0] == 0x88
        assert client.ask(0xBB, value=b"nothing.user_data")[0] == 0x8C
        assert client.ask(0xBB, value=b"profiles")[0] == 0x04
        assert client.ask(0xEE)[0] == 0x81
        compressed = bytearray(packet(0x01, default + b"k", b"\0" * 8, b"x", at=b"k"))
        compressed[5] = 0x02
        client.send(bytes(compressed))
        assert client.reply()[0] == 0x04
        status, config = client.ask(0xB5)
        assert status == 0
        assert len(json.loads(config)["vBucketServerMap"]["vBucketMap"]) == 1024
