"""The handler: a whole request in, a whole answer out; the store stands ready-made behind it."""

import base64
import json
import math
import queue
import threading
from collections.abc import Iterator
from email.utils import parsedate_to_datetime
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

import micro_svc_demo as service
from tests.chaos.clients import wait_until
from tests.service import Answer

TOKEN = "secret"
PROFILE = service.Document(b'{"record_id": 5}', 0x1F)
PICTURE = service.Document(json.dumps({"type": "png", "image": base64.b64encode(b"\x89PNG").decode()}).encode(), 0x2F)


class Shelf:
    """What the handler asks for documents and rows: a store whose answers are known."""

    def __init__(self) -> None:
        self.documents = {("user_data", "user_data:5"): PROFILE, ("user_images", "user_images:5"): PICTURE}
        self.rows: list[bytes] = []
        self.asked: list[object] = []
        self.operation = None

    def get(self, collection: str, key: str) -> service.Document:
        self.asked.append((collection, key))
        try:
            return self.documents[collection, key]
        except KeyError:
            raise service.ProblemError(404, "no such document") from None

    def query(self, statement: str, parameters: dict[str, object]) -> list[bytes]:
        self.asked.append((statement, parameters))
        assert isinstance(parameters["offset"], int) and isinstance(parameters["limit"], int)
        return self.rows[parameters["offset"] :][: parameters["limit"]]


@pytest.fixture
def shelf() -> Shelf:
    return Shelf()


@pytest.fixture
def server() -> Iterator[service.ProfileServer]:
    """A server that is bound and knows its token, but serves nobody."""
    settings = service.read_settings(
        ["--port", "0", "--metrics-port", "off", "--log-level", "error"],
        {"COUCHBASE_HOST": "db", "COUCHBASE_USER": "u", "COUCHBASE_PASSWORD": "p"},
    )
    log = service.Log("error")
    metrics = service.Metrics(1)
    bound = service.ProfileServer(settings, service.ProfileStore(settings, log, metrics), log, metrics)
    bound.store.tokens.adopt(TOKEN, 0.0)
    bound.store._token_read_at = math.inf
    bound.tell_ready()
    yield bound
    bound.server_close()


def parse(raw: bytes) -> Answer:
    head, _, body = raw.partition(b"\r\n\r\n")
    first, *lines = head.decode("latin-1").split("\r\n")
    pairs = [line.split(": ", 1) for line in lines]
    assert len({name for name, _ in pairs}) == len(pairs), "a header field twice"
    return Answer(int(first.split(" ")[1]), {name.lower(): value for name, value in pairs}, body)


@pytest.fixture
def ask(server: service.ProfileServer, shelf: Shelf):
    def ask(path: str, *fields: str, method: str = "GET", version: str = "1.1", internal: bool = False) -> Answer:
        lines = [f"{method} {path} HTTP/{version}", "Host: a", *fields]
        raw = ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")
        handler = service.ProfileHandler(service.parse_head(raw), ("192.0.2.1", 1), server, internal=internal)
        handler.connection = SimpleNamespace(waiting=())  # type: ignore[assignment]  # no further request of it
        return parse(handler.respond(shelf))

    return ask


BEARER = f"Authorization: Bearer {TOKEN}"


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
    "record",
    [
        b"not json",
        b"[]",
        b"{}",
        b'{"type": "png"}',
        b'{"image": "QQ=="}',
        b'{"type": "png", "image": ""}',
        b'{"type": "png", "image": "Q"}',
        b'{"type": "png", "image": "QQ==\\n"}',
        b'{"type": "png", "image": 1}',
        b'{"type": 1, "image": "QQ=="}',
        b'{"type": "png\\r\\nX: y", "image": "QQ=="}',
        b'{"type": "../png", "image": "QQ=="}',
        b'{"type": "", "image": "QQ=="}',
    ],
)
def test_unusable_picture_record_is_422(ask, shelf: Shelf, record: bytes) -> None:
    shelf.documents["user_images", "user_images:5"] = service.Document(record, 1)
    assert ask("/api/v1/picture/raw/5", BEARER).status == 422


def test_a_picture_is_decoded_once_for_each_cas(ask, shelf: Shelf) -> None:
    """That it is not decoded again shows by a record which could not be, under the same CAS."""
    record = json.dumps({"type": "png", "image": base64.b64encode(b"first").decode()}).encode()
    shelf.documents["user_images", "user_images:5"] = service.Document(record, 1)
    assert ask("/api/v1/picture/raw/5", BEARER).body == b"first"
    shelf.documents["user_images", "user_images:5"] = service.Document(b"{}", 1)
    again = ask("/api/v1/picture/raw/5?x=1", BEARER)
    assert (again.body, again.headers["content-type"], again.headers["etag"]) == (b"first", "image/png", '"1"')
    assert ask("/api/v1/picture/raw/05", BEARER).status == 404
    shelf.documents["user_images", "user_images:5"] = service.Document(record.replace(b"png", b"gif"), 2)
    assert ask("/api/v1/picture/raw/5", BEARER).headers["content-type"] == "image/gif"
    shelf.documents["user_images", "user_images:5"] = service.Document(b"{}", 3)
    assert ask("/api/v1/picture/raw/5", BEARER).status == 422


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 3), st.integers(0, 700)), max_size=60))
def test_pictures_that_are_kept_have_a_bound(steps: list[tuple[int, int, int]]) -> None:
    """However they come and go, what is kept is below it, right, and the last one that fits is there."""
    pictures = service.Pictures()
    pictures.bound_bytes, pictures.entry_bytes = 4000, 10
    model: dict[str, tuple[int, bytes]] = {}
    for number, cas, size in steps:
        path, picture = f"/{number}", bytes([cas]) * size
        pictures.put(path, cas, "image/png", picture)
        if size <= 500:
            model[path] = (cas, picture)
            assert pictures.get(path, cas) == ("image/png", picture)
        kept = {path: pictures.get(path, cas) for path, (cas, _) in model.items()}
        assert sum(len(each[1]) + 10 for each in kept.values() if each) <= 4000
        assert all(each is None or each == ("image/png", model[path][1]) for path, each in kept.items())
        assert all(pictures.get(path, cas + 1) is None for path, (cas, _) in model.items())
    assert pictures._bytes == sum(len(each[2]) + 10 for each in pictures._pictures.values())


@pytest.mark.parametrize("route", ["nickname", "username"])
def test_lookup_passes_the_value_as_a_parameter(ask, shelf: Shelf, route: str) -> None:
    shelf.rows = [b'{"a": 1}', b'{"b": 2}']
    answer = ask(f"/api/v1/{route}/x%22%20OR%201%3D1%20--", BEARER)
    assert answer.body == b'[{"a": 1},{"b": 2}]'
    assert "etag" not in answer.headers and "link" not in answer.headers
    [(statement, parameters)] = shelf.asked
    assert parameters == {"value": 'x" OR 1=1 --', "limit": 101, "offset": 0}
    assert "OR 1=1" not in statement


def test_lookup_without_match_is_404(ask) -> None:
    assert ask("/api/v1/nickname/nobody", BEARER).status == 404


def test_pages_are_linked_until_the_last(ask, shelf: Shelf) -> None:
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


def test_bad_page_is_400_before_any_query(ask, shelf: Shelf) -> None:
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


def test_key_length(ask, shelf: Shelf) -> None:
    """The bound counts UTF-8 bytes of the whole key."""
    most = service.MAX_KEY_BYTES - len("user_data:")
    assert ask("/api/v1/id/" + "x" * most, BEARER).status == 404
    assert ask("/api/v1/id/" + "x" * (most + 1), BEARER).status == 400
    assert ask("/api/v1/id/" + "%C3%A9" * (most // 2), BEARER).status == 404
    assert ask("/api/v1/id/" + "%C3%A9" * (most // 2 + 1), BEARER).status == 400


class TestToken:
    @pytest.mark.parametrize(
        "field", [BEARER, f"authorization: bearer  {TOKEN} ", f"x-access-token: {TOKEN}", f"X-Access-Token: {TOKEN}"]
    )
    def test_accepted(self, ask, field: str) -> None:
        assert ask("/api/v1/id/5", field).status == 200

    @pytest.mark.parametrize(
        "fields",
        [
            (),
            ("Authorization: Bearer",),
            ("Authorization: Bearer wrong",),
            (f"Authorization: {TOKEN}",),
            (f"Authorization: Basic {TOKEN}",),
            (f"Authorization: Bearer {TOKEN}x",),
            (f"Authorization: Bearer {TOKEN} {TOKEN}",),
            ("Authorization: Bearer \xff",),
            ("x-access-token: wrong",),
            ("x-access-token:",),
            ("Authorization: Bearer wrong", f"x-access-token: {TOKEN}"),
            (f"Cookie: token={TOKEN}",),
        ],
    )
    @pytest.mark.parametrize("path", ["/api/v1/id/5", "/api/v1/nickname/x", "/api/v1/picture/raw/5", "/api/nope"])
    def test_refused_on_every_api_route_before_anything_is_asked(self, ask, shelf: Shelf, path: str, fields) -> None:
        answer = ask(path, *fields)
        assert answer.status == 401
        assert answer.headers["www-authenticate"] == "Bearer"
        assert answer.headers["cache-control"] == "private, no-cache"
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

    def test_a_missing_document_stays_missing(self, ask) -> None:
        assert ask("/api/v1/id/6", BEARER, "If-None-Match: *").status == 404


@pytest.mark.parametrize(
    "path", ["/api/v1/id/5", "/api/v1/id/6", "/api/v1/picture/raw/5", "/healthz", "/readyz", "/nope", "/api/v1/id/%"]
)
def test_head_is_get_without_the_body(ask, path: str) -> None:
    got, headed = ask(path, BEARER, "X-Request-ID: same"), ask(path, BEARER, "X-Request-ID: same", method="HEAD")
    assert headed.body == b""
    assert got.status == headed.status
    assert got.headers | {"date": ""} == headed.headers | {"date": ""}


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "TRACE", "M-SEARCH"])
def test_other_methods_are_405(ask, method: str) -> None:
    answer = ask("/api/v1/id/5", BEARER, method=method)
    assert (answer.status, answer.headers["allow"]) == (405, "GET, HEAD")


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
    fields = [option] if option else []
    assert ask("/healthz", *fields, version=version).headers.get("connection") == closes


def test_malformed_request_is_answered_and_closes(server: service.ProfileServer, shelf: Shelf) -> None:
    [problem] = service.Framer().feed(b"nonsense\r\n\r\n")
    handler = service.ProfileHandler(problem, ("192.0.2.1", 1), server, internal=False)
    answer = parse(handler.respond(shelf))
    assert (answer.status, answer.headers["connection"]) == (400, "close")
    assert handler.close_connection


def test_unexpected_failure_is_500_without_a_trace(ask, shelf: Shelf) -> None:
    shelf.documents = None  # type: ignore[assignment]
    answer = ask("/api/v1/id/5", BEARER)
    assert answer.status == 500
    assert b"NoneType" not in answer.body


def test_not_ready(ask, server: service.ProfileServer) -> None:
    """Before the token is known the API answers 503, liveness does not care."""
    server.store.tokens = service.Tokens(30)
    server.tell_ready()
    answer = ask("/api/v1/id/5", BEARER)
    assert (answer.status, answer.headers["retry-after"]) == (503, "1")
    assert ask("/healthz").status == 200
    ready = ask("/readyz")
    assert (ready.status, ready.headers["retry-after"]) == (503, "1")
    assert ready.json()["reasons"]


def test_draining(ask, server: service.ProfileServer) -> None:
    server.draining = True
    assert ask("/readyz").json()["reasons"] == ["draining"]
    answer = ask("/api/v1/id/5", BEARER)
    assert (answer.status, answer.headers["connection"]) == (200, "close")


def test_metrics_only_on_their_own_port(ask) -> None:
    assert ask("/metrics").status == 404
    answer = ask("/metrics", internal=True)
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    assert b"couchbase_ready 1\n" in answer.body


def test_an_operation_without_an_answer_is_counted_too(server: service.ProfileServer, ask) -> None:
    """The background check's, say: operations are counted with answers, and nobody may ask for any."""
    server.metrics.operation(service.Operation("lookup_in", "service_auth", 0.0, 0.001, "ok", 1))
    found = ask("/metrics", internal=True).body.decode()
    assert 'couchbase_operations_total{operation="lookup_in",outcome="ok"} 1\n' in found
    assert 'couchbase_operation_duration_seconds_count{operation="lookup_in"} 1\n' in found


def test_a_request_that_waited_too_long_is_503(server: service.ProfileServer, shelf: Shelf) -> None:
    server.queue_seconds = -1.0
    raw = f"GET /api/v1/id/5 HTTP/1.1\r\nHost: a\r\n{BEARER}\r\n\r\n".encode()
    handler = service.ProfileHandler(service.parse_head(raw), ("192.0.2.1", 1), server, internal=False)
    assert parse(handler.respond(shelf)).status == 503
    assert shelf.asked == []


class TestBatch:
    """Several handlers, one fetch: each gets its own document."""

    class Store:
        def __init__(self) -> None:
            self.calls: list[tuple[str, list[str]]] = []

        def last_operation(self) -> None:
            return None

        def get_many(
            self, collection: str, keys: list[str], _timeout_seconds: float | None
        ) -> dict[str, service.Document | service.ProblemError]:
            self.calls.append((collection, keys))
            found: dict[str, service.Document | service.ProblemError]
            found = {key: service.Document(key.encode(), 1) for key in keys if not key.endswith(("8", "9"))}
            return found | {key: service.ProblemError(404, "no such document") for key in keys if key.endswith("8")}

    def test_wanted_documents_are_fetched_at_once(self) -> None:
        store = self.Store()
        batch = service.Batch(store)  # type: ignore[arg-type]
        keys = ["user_data:1", "user_data:2", "user_data:1", "user_data:8", "user_data:9"]
        for key in keys:
            assert batch.get("user_data", key) is None
        assert batch.get("user_images", "user_images:8") is None
        batch.fetch()
        assert store.calls == [("user_data", ["user_data:1", "user_data:2", "user_data:8", "user_data:9"])]
        assert batch.get("user_data", "user_data:2") == service.Document(b"user_data:2", 1)
        for key, status in (("user_data:8", 404), ("user_data:9", 500)):
            with pytest.raises(service.ProblemError) as raised:
                batch.get("user_data", key)
            assert raised.value.status == status
        assert batch.get("user_images", "user_images:8") is None
        batch.fetch()
        assert store.calls[1:] == [("user_images", ["user_images:8"])]
        with pytest.raises(service.ProblemError):
            batch.get("user_images", "user_images:8")

    def test_queries_are_for_other_workers(self) -> None:
        with pytest.raises(service.QueryPending):
            service.Batch(self.Store()).query("SELECT 1", {})  # type: ignore[arg-type]


class TestDocumentQueue:
    """Who is called, and that no call is lost."""

    class Crew:
        """Workers of a queue, which come back one by one; each tells its name when it has been called."""

        def __init__(self) -> None:
            self.documents = service.DocumentQueue()
            self.called: queue.SimpleQueue[str] = queue.SimpleQueue()

        def begin(self, name: str) -> threading.Thread:
            """Have one more worker wait for one call."""

            def work() -> None:
                self.called.put(name if self.documents.wait() else f"{name} ended")

            idle = len(self.documents._idle)
            thread = threading.Thread(target=work, daemon=True)
            thread.start()
            wait_until(lambda: len(self.documents._idle) > idle, 5, f"{name} idle")
            return thread

    def test_the_last_to_go_idle_is_called_first_and_alone(self) -> None:
        crew = self.Crew()
        threads = [crew.begin(name) for name in ("first", "second", "third")]
        assert not crew.documents.call()  # nothing waits
        crew.documents.put(object())  # type: ignore[arg-type]
        for name in ("third", "second", "first"):
            assert crew.documents.call()
            assert crew.called.get(timeout=5) == name
        for thread in threads:
            thread.join(5)
        assert crew.called.empty()

    def test_a_call_that_finds_nobody_idle_is_kept(self) -> None:
        documents = service.DocumentQueue()
        for _ in range(2):
            documents.put(object())  # type: ignore[arg-type]
            assert not documents.call()
        assert documents.wait() and documents.wait()  # neither blocks

    def test_the_end_is_for_all(self) -> None:
        crew = self.Crew()
        threads = [crew.begin(name) for name in ("first", "second")]
        crew.documents.put(None)
        assert {crew.called.get(timeout=5), crew.called.get(timeout=5)} == {"first ended", "second ended"}
        assert not crew.documents.wait()
        for thread in threads:
            thread.join(5)

    def test_a_worker_that_nobody_calls_ends(self) -> None:
        """And another may take its place; a call that has come meanwhile is not lost with it."""
        documents = service.DocumentQueue()
        assert documents.hire(2) and documents.hire(2) and not documents.hire(2)
        documents.put(object())  # type: ignore[arg-type]
        assert not documents.call()
        assert documents.wait(0.01)
        assert not documents.wait(0.01)
        assert not documents.call()
        assert documents.hire(2) and not documents.hire(2)
        assert documents.wait(0.01)

    def test_calls_are_not_more_than_what_waits(self) -> None:
        documents = service.DocumentQueue()
        documents.put(object())  # type: ignore[arg-type]
        for _ in range(3):
            documents.call()
        assert documents.wait(0.01) and not documents.wait(0.01)

    def test_most_that_are_taken(self) -> None:
        documents = service.DocumentQueue()
        handlers = [object() for _ in range(5)]
        for handler in handlers:
            documents.put(handler)  # type: ignore[arg-type]
        assert [documents.take(3), documents.take(3), documents.take(3)] == [handlers[:3], handlers[3:], []]
