"""The handler: a whole request in, a whole answer out; the store stands ready-made behind it."""

import asyncio
import base64
import json
from collections.abc import Callable
from email.utils import parsedate_to_datetime
from unittest.mock import Mock

import pytest
from hypothesis import given
from hypothesis import strategies as st

import micro_svc_demo as service
from tests.service import Answer

BEARER = "Authorization: Bearer secret"
PROFILE = service.Document(b'{"record_id": 5}', 0x1F)


def picture(content: bytes, kind: str = "png") -> bytes:
    return json.dumps({"type": kind, "image": base64.b64encode(content).decode()}).encode()


PICTURE = service.Document(picture(b"\x89PNG"), 0x2F)


def parse(raw: bytes) -> Answer:
    head, _, body = raw.partition(b"\r\n\r\n")
    first, *lines = head.decode("latin-1").split("\r\n")
    pairs = [line.split(": ", 1) for line in lines]
    assert len({name for name, _ in pairs}) == len(pairs), "a header field twice"
    return Answer(int(first.split(" ")[1]), {name.lower(): value for name, value in pairs}, body)


@pytest.fixture
def ask(handle, shelf):
    shelf.documents = {("user_data", "user_data:5"): PROFILE, ("user_images", "user_images:5"): PICTURE}
    return lambda *request, **options: parse(handle(*request, **options).response)


def test_profile(ask) -> None:
    answer = ask("/api/v1/id/5", BEARER)
    assert (answer.status, answer.body) == (200, b'[{"record_id": 5}]')
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["content-length"] == str(len(answer.body))
    assert answer.headers["etag"] == '"1f"'
    assert answer.headers["cache-control"] == "private, no-cache"


def test_picture_record_and_raw(ask) -> None:
    assert ask("/api/v1/picture/record/5", BEARER).json() == [json.loads(PICTURE.value)]
    raw = ask("/api/v1/picture/raw/5", BEARER)
    assert (raw.status, raw.body, raw.headers["content-type"]) == (200, b"\x89PNG", "image/png")
    assert raw.headers["content-security-policy"] == "default-src 'none'; sandbox"


@pytest.mark.parametrize(
    ("record", "unusable"),
    [
        (b"not json", "type and no usable image"),
        (b"[]", "type and no usable image"),
        (b"{}", "type and no usable image"),
        (b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "type and no usable image"),
        (b'{"type": "png"}', "image"),
        (b'{"image": "QQ=="}', "type"),
        (b'{"type": null, "image": "QQ=="}', "type"),
        (b'{"type": "png", "image": ""}', "image"),
        (b'{"type": "png", "image": " =="}', "image"),
        (b'{"type": "png", "image": "Q"}', "image"),
        (b'{"type": "png", "image": "QQ==QQ=="}', "image"),
        (b'{"type": "png", "image": "QQ*="}', "image"),
        (b'{"type": "png", "image": "\\ud800"}', "image"),
        (b'{"type": "png", "image": "data:image/png,QQ=="}', "image"),
        (b'{"type": "png", "image": 1}', "image"),
        (b'{"type": 1, "image": "QQ=="}', "type"),
        (b'{"type": "png\\r\\nX: y", "image": "QQ=="}', "type"),
        (b'{"type": "../png", "image": "QQ=="}', "type"),
        (b'{"type": "text/png", "image": "QQ=="}', "type"),
        (b'{"type": "image/", "image": "QQ=="}', "type"),
        (b'{"type": "", "image": "QQ=="}', "type"),
    ],
    ids=lambda value: ascii(value)[:60],
)
def test_unusable_picture_record_is_422(ask, shelf, record: bytes, unusable: str) -> None:
    """The detail says which member it is."""
    shelf.documents["user_images", "user_images:5"] = service.Document(record, 1)
    answer = ask("/api/v1/picture/raw/5", BEARER)
    assert (answer.status, answer.json()["detail"]) == (422, f"the picture record has no usable {unusable}")


@pytest.mark.parametrize("kind", ["png", "PNG", "image/png", "Image/Png", " png\n"])
@pytest.mark.parametrize(
    "encode",
    [
        base64.b64encode,
        base64.encodebytes,  # in lines, with a new line at its end
        lambda content: b"\r\n ".join(base64.encodebytes(content).split()),
        base64.urlsafe_b64encode,
        lambda content: base64.b64encode(content).rstrip(b"="),
        lambda content: b"data:image/png;base64," + base64.b64encode(content),
        lambda content: b" DATA:;charset=x;base64," + base64.urlsafe_b64encode(content).rstrip(b"="),
    ],
    ids=["plain", "in lines", "indented lines", "url-safe", "without padding", "data URL", "all of it"],
)
def test_pictures_are_taken_as_people_store_them(encode: Callable[[bytes], bytes], kind: str) -> None:
    content = bytes(range(256)) * 2 + b"\xff"
    record = json.dumps({"type": kind, "image": encode(content).decode()}).encode()
    assert service.decode_picture(record) == ("image/png", content)


def test_a_picture_is_decoded_once_for_each_cas(ask, shelf) -> None:
    """That it is not decoded again shows by a record which could not be, under the same CAS."""
    key = "user_images", "user_images:5"
    shelf.documents[key] = service.Document(picture(b"first"), 1)
    assert ask("/api/v1/picture/raw/5", BEARER).body == b"first"
    shelf.documents[key] = service.Document(b"{}", 1)
    again = ask("/api/v1/picture/raw/5?x=1", BEARER)
    assert (again.body, again.headers["content-type"], again.headers["etag"]) == (b"first", "image/png", '"1"')
    assert ask("/api/v1/picture/raw/05", BEARER).status == 404
    shelf.documents[key] = service.Document(picture(b"first", "gif"), 2)
    assert ask("/api/v1/picture/raw/5", BEARER).headers["content-type"] == "image/gif"
    shelf.documents[key] = service.Document(b"{}", 3)
    assert ask("/api/v1/picture/raw/5", BEARER).status == 422


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(1, 3), st.integers(1, 1400)), max_size=60))
def test_pictures_that_are_kept_have_a_bound(steps: list[tuple[int, int, int]]) -> None:
    """However they come and go, what is kept is below it, right, and the last one is there."""
    pictures, seen = service.Pictures(), {}
    pictures.bound_bytes, pictures.entry_bytes = 4000, 10

    def kept(path: str, cas: int) -> bytes:
        try:
            return pictures.decoded(path, service.Document(b"{}", cas))[1]
        except service.ProblemError:
            return b""

    for number, cas, size in [*steps, (6, 1, 3990)]:  # the very last one fits if nothing has been counted twice
        path = f"/{number}"
        content = seen.setdefault((path, cas), bytes([cas]) * size)
        assert pictures.decoded(path, service.Document(picture(content), cas)) == ("image/png", content)
        assert kept(path, cas) == content
        found = {key: kept(*key) for key in seen}
        assert all(content in {b"", seen[key]} for key, content in found.items())
        assert sum(len(content) + 10 for content in found.values() if content) <= 4000


@pytest.mark.parametrize("route", ["nickname", "username"])
def test_lookup_passes_the_value_as_a_parameter(ask, shelf, route: str) -> None:
    shelf.rows = [b'{"a": 1}', b'{"b": 2}']
    answer = ask(f"/api/v1/{route}/x%22%20OR%201%3D1%20--", BEARER)
    assert answer.body == b'[{"a": 1},{"b": 2}]'
    assert "etag" not in answer.headers and "link" not in answer.headers
    [(statement, parameters)] = shelf.asked
    assert parameters == {"value": 'x" OR 1=1 --', "limit": 101, "offset": 0}
    assert "OR 1=1" not in statement


def test_lookup_without_match_is_404(ask) -> None:
    assert ask("/api/v1/nickname/nobody", BEARER).status == 404


def test_pages_are_linked_until_the_last(ask, shelf) -> None:
    """Following the links gives every row once, in order."""
    shelf.rows = [b"%d" % number for number in range(25)]
    path, got = "/api/v1/nickname/a%20%2F%3E?x=1&limit=10", []
    for _ in range(3):
        answer = ask(path, BEARER)
        got += answer.json()
        link = answer.headers.get("link")
        if link is None:
            break
        assert link.startswith("</api/v1/nickname/a%20%2F%3E?limit=10&offset=") and link.endswith('>; rel="next"')
        path = link[1 : link.index(">")]
    assert got == list(range(25))
    assert link is None


def test_bad_page_is_400_before_any_query(ask, shelf) -> None:
    assert ask("/api/v1/username/x?limit=1001", BEARER).status == 400
    assert shelf.asked == []


@pytest.mark.parametrize(
    "path",
    ["/", "/api", "/api/v1/id", "/api/v1/id/", "/api/v1/id/5/", "/api/v1/id/5/6", "/api/v2/id/5", "/API/v1/id/5"]
    + ["/api/v1/picture/5", "/api/v1/picture/raw/", "//api/v1/id/5", "/api/v1/nickname/", "/healthz/", "/metrics"],
)
def test_no_such_route_is_404(ask, path: str) -> None:
    answer = ask(path, BEARER)
    assert answer.status == 404
    assert answer.json()["detail"] == "no such route"


@pytest.mark.parametrize("path", ["/api/v1/id/%zz", "/api/v1/id/%ff", "/api/v1/nickname/%00", "/api/v1/picture/raw/%"])
def test_malformed_parameter_is_400(ask, path: str) -> None:
    assert ask(path, BEARER).status == 400


def test_key_length(ask, shelf) -> None:
    """The bound counts UTF-8 bytes of the whole key."""
    most = service.MAX_KEY_BYTES - len("user_data:")
    assert ask("/api/v1/id/" + "x" * most, BEARER).status == 404
    assert ask("/api/v1/id/" + "x" * (most + 1), BEARER).status == 400
    assert ask("/api/v1/id/" + "%C3%A9" * (most // 2), BEARER).status == 404
    assert ask("/api/v1/id/" + "%C3%A9" * (most // 2 + 1), BEARER).status == 400


class TestToken:
    @pytest.mark.parametrize(
        "field", [BEARER, "authorization: bearer  secret ", "x-access-token: secret", "X-Access-Token: secret"]
    )
    def test_accepted(self, ask, field: str) -> None:
        assert ask("/api/v1/id/5", field).status == 200

    @pytest.mark.parametrize("scheme", ["Basic dTpw", "Basic secret", "Negotiate", "Bearerx wrong", ""])
    def test_another_scheme_is_not_for_this_service(self, ask, scheme: str) -> None:
        """It may be a proxy's: x-access-token counts then."""
        assert ask("/api/v1/id/5", f"Authorization: {scheme}", "x-access-token: secret").status == 200

    @pytest.mark.parametrize(
        "fields",
        [
            (),
            ("Authorization: Bearer",),
            ("Authorization: Bearer wrong",),
            ("Authorization: secret",),
            ("Authorization: Basic secret",),
            ("Authorization: Bearer secretx",),
            ("Authorization: Bearer secret secret",),
            ("Authorization: Bearer \xff",),
            ("x-access-token: wrong",),
            ("x-access-token:",),
            ("Authorization: Bearer wrong", "x-access-token: secret"),
            ("Authorization: bearer", "x-access-token: secret"),
            ("Authorization: Basic secret", "x-access-token: wrong"),
            ("Cookie: token=secret",),
        ],
    )
    @pytest.mark.parametrize("path", ["/api/v1/id/5", "/api/v1/nickname/x", "/api/v1/picture/raw/5", "/api/nope"])
    def test_refused_on_every_api_route_before_anything_is_asked(self, ask, shelf, path: str, fields) -> None:
        answer = ask(path, *fields)
        assert answer.status == 401
        assert answer.headers["www-authenticate"] == "Bearer"
        assert answer.headers["cache-control"] == "no-store"
        assert shelf.asked == []

    def test_not_needed_elsewhere(self, ask) -> None:
        assert ask("/healthz").status == 200
        assert ask("/nope").status == 404


class TestConditional:
    @pytest.mark.parametrize("tags", ['"1f"', 'W/"1f"', '"0", "1f"', "*"])
    def test_not_modified(self, ask, tags: str) -> None:
        answer = ask("/api/v1/id/5", BEARER, f"If-None-Match: {tags}")
        assert (answer.status, answer.body) == (304, b"")
        assert answer.headers["etag"] == '"1f"'

    def test_modified(self, ask) -> None:
        assert ask("/api/v1/id/5", BEARER, 'If-None-Match: "20"').status == 200

    @pytest.mark.parametrize("path", ["/api/v1/id/5", "/api/v1/picture/record/5", "/api/v1/picture/raw/5"])
    @pytest.mark.parametrize("method", ["GET", "HEAD"])
    def test_not_the_one_that_must_match(self, ask, path: str, method: str) -> None:
        """Only If-Match's list counts, compared strongly: a weak tag never matches (RFC 9110, 13.1.1)."""
        tag = ask(path, BEARER).headers["etag"]
        for tags in ('"zz"', f"W/{tag}", tag[:-1], f'"0", W/{tag}', ""):
            assert ask(path, BEARER, f"If-Match: {tags}", method=method).status == 412, tags
        for tags in (tag, f'"0" ,{tag}', f"W/{tag},{tag}", "*"):
            assert ask(path, BEARER, f"If-Match: {tags}", method=method).status == 200, tags

    def test_if_match_comes_first(self, ask) -> None:
        """In the order of RFC 9110, 13.2.2."""
        for tag, status in (('"0"', 412), ('"1f"', 304)):
            assert ask("/api/v1/id/5", BEARER, f"If-Match: {tag}", 'If-None-Match: "1f"').status == status

    def test_the_answer_without_it_comes_before(self, ask, shelf) -> None:
        """A missing document stays missing; what has no ETag has no precondition (RFC 9110, 13.2.1)."""
        shelf.rows = [b"{}"]
        for condition in ("If-None-Match: *", 'If-Match: "0"'):
            assert ask("/api/v1/id/6", BEARER, condition).status == 404
            assert ask("/api/v1/id/5", condition).status == 401
            assert ask("/api/v1/nickname/x", BEARER, condition).status == 200
            assert ask("/healthz", condition).status == 200


@pytest.mark.parametrize(
    "path", ["/api/v1/id/5", "/api/v1/id/6", "/api/v1/picture/raw/5", "/healthz", "/readyz", "/nope", "/api/v1/id/%"]
)
def test_head_is_get_without_the_body(ask, path: str) -> None:
    got, headed = ask(path, BEARER, "X-Request-ID: same"), ask(path, BEARER, "X-Request-ID: same", method="HEAD")
    assert headed.body == b""
    assert got.status == headed.status
    assert got.headers | {"date": ""} == headed.headers | {"date": ""}


@pytest.mark.parametrize(
    ("path", "field", "status"),
    [("/#", "A: b", 400), ("/", "Content-Length: x", 400), ("/", "Content-Length: 5", 413), ("/", "Expect: x", 417)]
    + [("/" + "x" * service.MAX_TARGET_BYTES, "A: b", 414), ("/", "A: " + "b" * service.MAX_HEAD_BYTES, 431)],
)
def test_a_refused_head_has_no_body_but_its_length(ask, path: str, field: str, status: int) -> None:
    got, headed = ask(path, field), ask(path, field, method="HEAD")
    assert (got.status, headed.status, headed.body) == (status, status, b"")
    assert headed.headers["content-length"] == str(len(got.body))


@pytest.mark.parametrize(("first", "has_body"), [(b"HEAD /", False), (b"GET /", True), (b"", True), (None, True)])
def test_a_client_too_many_is_told_as_its_first_bytes_want(
    server: service.ProfileServer, first: bytes | None, has_body: bool
) -> None:
    """Whether it sends some, its end (`b""`), or nothing for a while; and it is told once."""

    async def answered() -> bytes:
        server.clients, written = server.settings.max_connections, asyncio.Event()
        connection, transport = service.Connection(server), Mock()
        transport.get_extra_info.return_value = ("192.0.2.1", 1)
        transport.write.side_effect = lambda _: written.set()
        connection.connection_made(transport)
        transport.write.assert_not_called()
        if first:
            connection.data_received(first)
        elif first is not None:
            connection.eof_received()
        else:
            connection.expire()
        await written.wait()
        transport.write.assert_called_once()
        return transport.write.call_args.args[0]

    answer = parse(asyncio.run(answered()))
    assert (answer.status, answer.headers["connection"], bool(answer.body)) == (503, "close", has_body)


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "TRACE", "M-SEARCH", "NOBODY_KNOWS"])
def test_other_methods_are_405(ask, method: str) -> None:
    answer = ask("/api/v1/id/5", BEARER, method=method)
    assert (answer.status, answer.headers["allow"]) == (405, "GET, HEAD, OPTIONS")


def test_every_answer_has_the_common_fields(ask) -> None:
    for path, fields in {"/api/v1/id/5": [BEARER], "/nope": [], "/healthz": [], "/api/v1/id/4": []}.items():
        answer = ask(path, *fields)
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert parsedate_to_datetime(answer.headers["date"])
        assert answer.headers["content-length"] == str(len(answer.body))
        if answer.status >= 400:
            assert answer.headers["content-type"] == "application/problem+json"
            problem = answer.json()
            assert set(problem) == {"title", "status", "detail", "request_id"}
            assert problem["status"] == answer.status
            assert problem["request_id"] == answer.headers["x-request-id"]


@pytest.mark.parametrize(
    ("path", "fields", "status", "cached"),
    [
        ("/api/v1/id/5", [BEARER], 200, "private, no-cache"),
        ("/api/v1/id/5", [BEARER, "If-None-Match: *"], 304, "private, no-cache"),
        ("/api/v1/picture/raw/5?x", [BEARER], 200, "private, no-cache"),
        ("/api/v1/id/5", [BEARER, 'If-Match: "0"'], 412, "no-store"),
        ("/api/v1/id/6", [BEARER], 404, "no-store"),
        ("/api/v1/id/5", [], 401, "no-store"),
        ("/openapi.json?x", [], 200, "no-cache"),
        ("/docs", [], 200, "no-cache"),
        ("/healthz?x", [], 200, "no-store"),
        ("/readyz", [], 200, "no-store"),
        ("/metrics", [], 200, "no-store"),
        ("/nope", [], 404, "no-store"),
        ("/docs", ["Content-Length: 5"], 413, "no-store"),
        ("/docs#", [], 400, "no-store"),
    ],
)
def test_what_a_cache_may_keep(ask, path: str, fields: list[str], status: int, cached: str) -> None:
    for method in ("GET", "HEAD"):
        answer = ask(path, *fields, method=method, internal=path == "/metrics")
        assert (answer.status, answer.headers["cache-control"]) == (status, cached)


@pytest.mark.parametrize("method", ["OPTIONS", "POST"])
def test_what_is_no_document_may_not_be_kept(ask, method: str) -> None:
    assert ask("/api/v1/id/5", BEARER, method=method).headers["cache-control"] == "no-store"


def test_request_id_is_the_callers_if_sane(ask) -> None:
    assert ask("/healthz", "X-Request-ID: abc-1._").headers["x-request-id"] == "abc-1._"
    made = {
        ask("/healthz", *fields).headers["x-request-id"]
        for fields in ([], ["X-Request-ID: a b"], ["X-Request-ID: " + "x" * 65], ['X-Request-ID: "'], ["X-Request-ID:"])
    }
    assert len(made) == 5
    assert not made & {"a b", "x" * 65, '"', ""}


@pytest.mark.parametrize(
    ("version", "option", "closes"),
    [
        ("1.1", "", None),
        ("1.1", "Connection: close", "close"),
        ("1.1", "Connection: x, CLOSE", "close"),
        ("1.1", "Connection: keep-alive", None),
        ("1.0", "", "close"),
        ("1.0", "Connection: Keep-Alive", "keep-alive"),
    ],
)
def test_connection(ask, version: str, option: str, closes: str | None) -> None:
    """A kept one's answers say for how long it is kept when idle."""
    fields = [option] if option else []
    for path in ("/healthz", "/api/v1/id/5", "/nope"):
        answer = ask(path, *fields, version=version)
        assert answer.headers.get("connection") == closes
        assert answer.headers.get("keep-alive") == (None if closes == "close" else "timeout=75")


def test_malformed_request_is_answered_and_closes(ask) -> None:
    answer = ask("/#")
    assert (answer.status, answer.headers["connection"]) == (400, "close")


def test_unexpected_failure_is_500_without_a_trace(ask, shelf) -> None:
    shelf.documents = None  # type: ignore[assignment]
    answer = ask("/api/v1/id/5", BEARER)
    assert answer.status == 500
    assert b"NoneType" not in answer.body


def test_not_ready(ask, server: service.ProfileServer) -> None:
    """Before the token is known the API answers 503, liveness does not care."""
    server.store.tokens.current = None
    answer = ask("/api/v1/id/5", BEARER)
    assert (answer.status, answer.headers["retry-after"]) == (503, "1")
    assert ask("/healthz").status == 200
    ready = ask("/readyz")
    assert (ready.status, ready.headers["retry-after"]) == (503, "1")
    assert ready.json()["reasons"] == ["Couchbase: not connected yet"]


def test_draining(ask, server: service.ProfileServer) -> None:
    """The last answer of a connection closes it."""
    server.draining = True
    assert ask("/readyz").json()["reasons"] == ["draining"]
    for more, closes in ((b"", "close"), (b"\r\n", "close"), (b"GET", None)):
        answer = ask("/api/v1/id/5", BEARER, more=more)
        assert (answer.status, answer.headers.get("connection")) == (200, closes)


def test_metrics_only_on_their_own_port(ask) -> None:
    assert ask("/metrics").status == 404
    answer = ask("/metrics", internal=True)
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    assert b"couchbase_ready 1\n" in answer.body


def test_an_operation_without_an_answer_is_counted_too(ask) -> None:
    """The look-up of the token: operations are counted with answers, and nobody has asked for any yet."""
    found = ask("/metrics", internal=True).body.decode()
    assert 'couchbase_operations_total{operation="lookup_in",outcome="ok"} 1\n' in found
    assert 'couchbase_operation_duration_seconds_count{operation="lookup_in"} 1\n' in found


def test_a_client_that_has_gone_before_its_last_answer_is_no_failure(server: service.ProfileServer) -> None:
    async def receive() -> None:
        connection, transport = service.Connection(server), Mock()
        transport.get_extra_info.return_value = ("192.0.2.1", 1)
        transport.write_eof.side_effect = OSError("not connected")  # as of a socket that was reset
        connection.connection_made(transport)
        connection.data_received(b"GET /healthz HTTP/1.0\r\n\r\n")
        assert connection.state == connection.LINGERING

    asyncio.run(receive())
