"""Every route, status and header of the contract, through the real SDK and real sockets."""

import base64
import io
import json
import os
import shutil
import subprocess
from collections import defaultdict
from collections.abc import Iterator
from typing import Any
from urllib.parse import quote

import pytest
from couchbase.options import UpsertOptions
from couchbase.transcoder import RawBinaryTranscoder
from PIL import Image

import micro_svc_demo
from tests import sample_data
from tests.functional.conftest import COUNT
from tests.load.hostile import open_connections
from tests.service import Certificates, ServiceProcess, administrator_settings, settings_for

SEED = sample_data.DEFAULT_SEED
PROFILES = list(sample_data.profiles(COUNT, SEED))


@pytest.fixture(scope="module", params=["http", "https"])
def service(request: pytest.FixtureRequest, database, certificates: Certificates) -> Iterator[ServiceProcess]:
    """The service, in plain and with TLS."""
    settings, tls = (certificates.settings, certificates.client()) if request.param == "https" else ({}, None)
    with ServiceProcess(settings_for(database) | settings, tls=tls) as running:
        yield running


def by(field: str) -> dict[str, list[dict[str, Any]]]:
    """Group the profiles by a field, ordered by document id as text."""
    grouped = defaultdict(list)
    for profile in sorted(PROFILES, key=lambda profile: f"user_data:{profile['record_id']}"):
        grouped[profile[field]].append(profile)
    return grouped


@pytest.fixture(scope="module")
def scope(database) -> Any:
    """The SDK's scope of the same database, to change documents behind the service's back."""
    settings = micro_svc_demo.read_settings([], administrator_settings(database))
    cluster = micro_svc_demo.open_cluster(settings)
    yield cluster.bucket(settings.couchbase_bucket).scope(settings.couchbase_scope)
    cluster.close()


@pytest.mark.parametrize("record_id", [1, 2, 500, 1000])
def test_profile_by_id(service: ServiceProcess, database, record_id: int) -> None:
    answer = service.get(f"/api/v1/id/{record_id}", database.token)
    assert answer.status == 200
    assert answer.json() == [PROFILES[record_id - 1]]
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["cache-control"] == "private, no-cache"
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["etag"].strip('"')
    assert answer.headers["x-request-id"] and answer.headers["date"]


def test_the_document_passes_through_byte_for_byte(service: ServiceProcess, database, scope) -> None:
    """White space, order, number format and escapes are the stored ones: nothing is decoded on the way."""
    raw = b'{ "z":1.0,"a" :1e2, "n":"\\u00e9\xc3\xa9" }'
    scope.collection("user_data").upsert("user_data:raw-bytes", raw)
    try:
        assert service.get("/api/v1/id/raw-bytes", database.token).body == b"[" + raw + b"]"
    finally:
        scope.collection("user_data").remove("user_data:raw-bytes")


AWKWARD = sorted(
    (route, field, row[field])
    for row in sample_data.AWKWARD.values()
    for route, field in (("nickname", "nickname"), ("username", "user_id"))
    if field in row
)


@pytest.mark.parametrize(("route", "field", "text"), AWKWARD, ids=lambda value: ascii(value)[:30])
def test_awkward_names_are_found_exactly(service: ServiceProcess, database, route: str, field: str, text: str) -> None:
    """Quotes, slashes, percent signs, emoji, right-to-left text: each finds its own profiles and no other's."""
    answer = service.get(f"/api/v1/{route}/{quote(text, safe='')}", database.token)
    if len(quote(text, safe="")) > micro_svc_demo.MAX_TARGET_BYTES:
        assert answer.status == 414
    else:
        assert answer.status == 200
        assert answer.json() == by(field)[text]


@pytest.mark.parametrize(
    "text",
    [
        'x" OR 1=1 --',
        "x' OR '1'='1",
        "x` OR 1=1 --",
        "$value",
        "%",
        "_",
        "*",
        '"; DROP INDEX user_data.by_nickname; --',
        "\\",
        '\\" OR true OR "',
        "nickname",
        "null",
        '{"$gt": ""}',
    ],
)
@pytest.mark.parametrize(("route", "field"), [("nickname", "nickname"), ("username", "user_id")])
def test_injection_matches_nothing_or_exactly_that_name(
    service: ServiceProcess, database, route: str, field: str, text: str
) -> None:
    answer = service.get(f"/api/v1/{route}/{quote(text, safe='')}", database.token)
    expected = by(field)[text]
    assert answer.status == (200 if expected else 404)
    assert not expected or answer.json() == expected


def test_username(service: ServiceProcess, database) -> None:
    profile = PROFILES[41]
    answer = service.get(f"/api/v1/username/{quote(profile['user_id'], safe='')}", database.token)
    assert (answer.status, answer.json()) == (200, [profile])
    assert "etag" not in answer.headers


def test_lookups_are_ordered_by_document_id_and_paged_by_links(service: ServiceProcess, database) -> None:
    nickname, expected = max(by("nickname").items(), key=lambda item: len(item[1]))
    assert len(expected) > 2, "the sample data has no nickname that several profiles share"
    whole = service.get(f"/api/v1/nickname/{quote(nickname, safe='')}", database.token)
    assert whole.json() == expected
    assert "link" not in whole.headers
    path: str | None = f"/api/v1/nickname/{quote(nickname, safe='')}?limit=2"
    got: list[Any] = []
    while path is not None:
        answer = service.get(path, database.token)
        assert len(answer.json()) <= 2
        got += answer.json()
        link = answer.headers.get("link")
        path = None if link is None else link[1 : link.index(">")]
    assert got == expected
    beyond = f"/api/v1/nickname/{quote(nickname, safe='')}?offset={len(expected)}"
    assert service.get(beyond, database.token).status == 404


@pytest.mark.parametrize("record_id", [1, 2, 3, 4])
def test_picture(service: ServiceProcess, database, record_id: int) -> None:
    """Record and raw picture are of the same bytes, and Pillow opens them as what Content-Type says."""
    expected = sample_data.picture(record_id, SEED)
    record = service.get(f"/api/v1/picture/record/{record_id}", database.token)
    assert (record.status, record.json()) == (200, [expected])
    raw = service.get(f"/api/v1/picture/raw/{record_id}", database.token)
    assert (raw.status, raw.body) == (200, base64.b64decode(expected["image"]))
    assert raw.headers["content-type"] == f"image/{expected['type']}"
    assert raw.headers["etag"] == record.headers["etag"]
    with Image.open(io.BytesIO(raw.body)) as image:
        assert image.format is not None and image.format.lower() == expected["type"]


def test_picture_without_usable_content_is_422(service: ServiceProcess, database, scope) -> None:
    images = scope.collection("user_images")
    for record in ({}, {"type": "png"}, {"type": "png", "image": "*"}, {"type": "a b", "image": "QQ=="}):
        images.upsert("user_images:broken", json.dumps(record))
        try:
            assert service.get("/api/v1/picture/raw/broken", database.token).status == 422
            assert service.get("/api/v1/picture/record/broken", database.token).json() == [record]
        finally:
            images.remove("user_images:broken")


STORED = {
    "an object": (b'{"a": 1}', 200),
    "objects in it": (b' {"a": {"b": {}}}\n', 200),
    "binary": (b"\x00\x01", 500),
    "nothing": (b"", 500),
    "white space": (b" \n", 500),
    "cut off": (b'{"a": {"b": 1}', 500),
    "cut off in its only object": (b'{"a": 1', 500),
    "several objects": (b'{"a": 1},{"a": 2}', 500),
    "brackets between objects": (b'{"a": 1}],[{"a": 2}', 500),
    "an array": (b'[{"a": 1}]', 500),
    "a text": (b'"a"', 500),
    "null": (b"null", 500),
    "another encoding": ('{"a": {}}'.encode("utf-16-le"), 500),
    "too deep": (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, 500),
}


@pytest.mark.parametrize("kind", STORED)
@pytest.mark.parametrize("route", ["id", "picture/record"])
def test_a_stored_value_is_sent_if_it_is_a_json_object(
    service: ServiceProcess, database, scope, route: str, kind: str
) -> None:
    """Its bytes count, not its flags, which here say binary; anything else is 500, and the log says what to do."""
    value, status = STORED[kind]
    collection = {"id": "user_data"}.get(route, "user_images")
    stored = scope.collection(collection)
    stored.upsert(f"{collection}:kind", value, UpsertOptions(transcoder=RawBinaryTranscoder()))
    try:
        answer = service.get(f"/api/v1/{route}/kind", database.token)
    finally:
        stored.remove(f"{collection}:kind")
    assert answer.status == status
    if status == 200:
        assert answer.body == b"[" + value + b"]"
    else:
        assert answer.json()["detail"] == "the document is not JSON"
        assert service.wait_for("couchbase failure")["advice"] == "store this document as JSON"


def test_etag_follows_the_document(service: ServiceProcess, database, scope) -> None:
    """304 while the document is the same, 200 and another tag after a change."""
    users = scope.collection("user_data")
    users.upsert("user_data:changing", '{"n": 1}')
    try:
        first = service.get("/api/v1/id/changing", database.token)
        again = service.get("/api/v1/id/changing", database.token, If_None_Match=first.headers["etag"])
        assert (again.status, again.body, again.headers["etag"]) == (304, b"", first.headers["etag"])
        users.upsert("user_data:changing", '{"n": 2}')
        changed = service.get("/api/v1/id/changing", database.token, If_None_Match=first.headers["etag"])
        assert (changed.status, changed.json()) == (200, [{"n": 2}])
        assert changed.headers["etag"] != first.headers["etag"]
    finally:
        users.remove("user_data:changing")


def base_of(service: ServiceProcess) -> str:
    """Return the beginning of the API's URLs."""
    return f"http{'s' * bool(service.tls)}://127.0.0.1:{service.port}"


@pytest.mark.skipif(not shutil.which("curl"), reason="needs curl (Debian's package curl)")
@pytest.mark.parametrize("path", ["id/1", "nickname/nobody", "username/nobody", "picture/record/1", "picture/raw/1"])
def test_curl_gets_the_same(service: ServiceProcess, database, certificates: Certificates, path: str) -> None:
    """A second client of TLS, which knows the authority and nothing else."""
    given = ["--cacert", str(certificates.ca_file), "-H", f"Authorization: Bearer {database.token}"]
    command = [
        "curl",
        "-sS",
        *given,
        "-w",
        "%{stderr}%{http_code} %{http_version}",
        f"{base_of(service)}/api/v1/{path}",
    ]
    done = subprocess.run(command, capture_output=True, check=True, timeout=20)
    answer = service.get(f"/api/v1/{path}", database.token)
    assert done.stderr.decode() == f"{answer.status} 1.1"
    if answer.status == 200:
        assert done.stdout == answer.body


FETCHES = """
const [base, token] = process.argv.slice(1);
const url = `${base}/api/v1/id/1`, headers = {Authorization: `Bearer ${token}`};
for (const [method, fields, status] of [["GET", {"If-None-Match": "*"}, 304], ["OPTIONS", {}, 204], ["HEAD", {}, 200]])
  for (let number = 0; number < 300; number++) {
    const answer = await fetch(url, {method, headers: {...headers, ...fields}});
    if (answer.status !== status || await answer.text() !== "") process.exit(1);
  }
console.log("done");
process.stdin.resume();
"""


@pytest.mark.skipif(not shutil.which("node"), reason="needs Node, for its fetch (Debian's package nodejs)")
def test_answers_without_a_body_leave_the_connection_to_the_next(
    service: ServiceProcess, database, certificates: Certificates
) -> None:
    """Node's fetch, while it runs, has few connections open after hundreds of 304s, 204s and answers to HEAD."""
    command = ["node", "--input-type=module", "--eval", FETCHES, "--", base_of(service), database.token]
    environment = os.environ | {"NODE_EXTRA_CA_CERTS": str(certificates.ca_file)}
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment) as node:
        assert node.stdin and node.stdout
        try:
            assert node.stdout.readline() == b"done\n"
            assert open_connections(service) < 10
        finally:
            node.stdin.close()
            node.kill()


@pytest.mark.parametrize(
    "path", ["/api/v1/id/0", "/api/v1/id/none", "/api/v1/nickname/nobody", "/api/v1/picture/record/0"]
)
def test_missing_is_404(service: ServiceProcess, database, path: str) -> None:
    answer = service.get(path, database.token, X_Request_ID="mine-1")
    assert answer.status == 404
    assert answer.headers["content-type"] == "application/problem+json"
    problem = answer.json()
    assert (problem["title"], problem["status"], problem["request_id"]) == ("Not Found", 404, "mine-1")


@pytest.mark.parametrize(
    "path",
    ["/api/v1/id/%zz", "/api/v1/id/%ff", f"/api/v1/id/{'x' * 237}", "/api/v1/nickname/x?limit=0"]
    + ["/api/v1/nickname/x?limit=1001", "/api/v1/username/x?offset=-1", "/api/v1/username/x?limit=a"],
)
def test_malformed_parameters_are_400(service: ServiceProcess, database, path: str) -> None:
    assert service.get(path, database.token).status == 400


@pytest.mark.parametrize(
    "path",
    ["/api/v1/id/1", "/api/v1/nickname/x", "/api/v1/username/x", "/api/v1/picture/record/1", "/api/v1/picture/raw/1"],
)
@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_every_route_wants_the_token(service: ServiceProcess, database, path: str, method: str) -> None:
    for fields in ({}, {"Authorization": "Bearer wrong"}, {"X_Access_Token": "wrong"}):
        answer = service.request(method, path, **fields)
        assert (answer.status, answer.headers["www-authenticate"]) == (401, "Bearer")
    assert service.request(method, path, X_Access_Token=database.token).status in {200, 404}
    assert service.request(method, path, database.token).status in {200, 404}


def test_head(service: ServiceProcess, database) -> None:
    for path in ("/api/v1/id/1", "/api/v1/picture/raw/1", "/api/v1/id/0", "/healthz"):
        got, headed = (service.request(method, path, database.token, X_Request_ID="1") for method in ("GET", "HEAD"))
        assert headed.body == b""
        assert (headed.status, headed.headers | {"date": ""}) == (got.status, got.headers | {"date": ""})


def test_other_methods_are_405(service: ServiceProcess, database) -> None:
    for method in ("POST", "PUT", "DELETE", "PATCH"):
        answer = service.request(method, "/api/v1/id/1", database.token)
        assert (answer.status, answer.headers["allow"]) == (405, "GET, HEAD, OPTIONS")


def test_probes_and_metrics(service: ServiceProcess) -> None:
    for port in (service.port, service.metrics_port):
        assert service.get("/healthz", port=port).json() == {"status": "alive"}
        ready = {"status": "ready", "breakers": {"key-value": "closed", "query": "closed"}}
        assert service.get("/readyz", port=port).json() == ready
    assert service.get("/metrics").status == 404
    metrics = service.get("/metrics", port=service.metrics_port)
    assert metrics.status == 200
    assert b"couchbase_ready 1" in metrics.body


def test_missing_index_tells_the_operator_the_statement(service: ServiceProcess, emulator, scope) -> None:
    """Without its index a lookup is 500; the log has the CREATE INDEX statement that mends it, and it does."""
    [before] = [row for row in scope.query("SELECT RAW name FROM system:indexes WHERE name = 'by_nickname'")] or [None]
    assert before == "by_nickname"
    scope.query("DROP INDEX by_nickname ON user_data").execute()
    try:
        answer = service.get("/api/v1/nickname/nobody", emulator.token)
        assert (answer.status, answer.json()["detail"]) == (500, "the database's schema is incomplete")
        advice = service.wait_for("couchbase failure")["advice"]
        assert "CREATE INDEX by_nickname IF NOT EXISTS" in advice
    finally:
        for statement in micro_svc_demo.MISSING_INDEX.split("\n"):
            scope.query(statement).execute()
    assert service.get("/api/v1/nickname/nobody", emulator.token).status == 404
