"""The same service in plain Python: `HTTPServer`, which serves one client at a time, or `ThreadingHTTPServer`.

What the benchmark compares with: the straight way with the standard library and the SDK's blocking API. The settings
come from the service's own environment variables, and SERVICE_PORT; the flag ``--threads`` chooses the second.
"""

import base64
import binascii
import hmac
import json
import os
import re
import signal
import sys
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, HTTPServer, ThreadingHTTPServer
from typing import Any, ClassVar
from urllib.parse import parse_qs, quote, unquote, urlsplit
from uuid import uuid4

from couchbase.auth import PasswordAuthenticator
from couchbase.cluster import Cluster
from couchbase.exceptions import CouchbaseException, DocumentNotFoundException, TimeoutException
from couchbase.options import ClusterOptions, QueryOptions
from couchbase.transcoder import RawJSONTranscoder

SANE_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
BY_NICKNAME, BY_USERNAME = (
    f"SELECT RAW p FROM `user_data` AS p WHERE p.`{field}` = $value ORDER BY META(p).id LIMIT $limit OFFSET $offset"  # noqa: S608
    for field in ("nickname", "user_id")
)


class ProblemError(Exception):
    """Something to be answered with a problem document (RFC 9457)."""

    def __init__(self, status: int, detail: str, **headers: str) -> None:
        super().__init__(detail)
        self.status = status
        self.detail = detail
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}


class Handler(BaseHTTPRequestHandler):
    """Answers one request."""

    scope: ClassVar[Any]
    token: ClassVar[bytes]
    access_log = False
    wbufsize = -1  # one packet an answer instead of one for the head and one for the body
    disable_nagle_algorithm = True

    def do_GET(self) -> None:
        """Answer by route."""
        given = self.headers.get("X-Request-ID", "")
        self.request_id = given if SANE_REQUEST_ID.fullmatch(given) else uuid4().hex
        try:
            self.route()
        except ProblemError as problem:
            self.send_problem(problem)
        except DocumentNotFoundException:
            self.send_problem(ProblemError(404, "no such document"))
        except TimeoutException:
            self.send_problem(ProblemError(504, "Couchbase did not answer in time"))
        except CouchbaseException:
            self.send_problem(ProblemError(503, "Couchbase is out of reach", Retry_After="1"))

    do_HEAD = do_GET

    def route(self) -> None:
        """Find out what is asked for, and send it."""
        url = urlsplit(self.path)
        route, _, parameter = url.path.rpartition("/")
        value = unquote(parameter)
        if url.path == "/healthz":
            self.send(200, b'{"status": "alive"}', "application/json")
            return
        self.require_token()
        if route == "/api/v1/id":
            self.send_document(self.scope.collection("user_data").get(f"user_data:{value}"))
        elif route == "/api/v1/picture/record":
            self.send_document(self.scope.collection("user_images").get(f"user_images:{value}"))
        elif route == "/api/v1/picture/raw":
            self.send_picture(self.scope.collection("user_images").get(f"user_images:{value}"))
        elif route == "/api/v1/nickname":
            self.send_matches(BY_NICKNAME, route, value, parse_qs(url.query))
        elif route == "/api/v1/username":
            self.send_matches(BY_USERNAME, route, value, parse_qs(url.query))
        else:
            raise ProblemError(404, "no such route")

    def require_token(self) -> None:
        """Refuse who does not show the token."""
        given = self.headers.get("Authorization")
        if given is None:
            token = self.headers.get("x-access-token")
        else:
            scheme, _, credentials = given.partition(" ")
            token = credentials.strip() if scheme.lower() == "bearer" else None
        if token is None or not hmac.compare_digest(token.encode(), self.token):
            raise ProblemError(401, "a valid bearer token is required", WWW_Authenticate="Bearer")

    def send_document(self, document: Any) -> None:
        """Answer with the stored JSON in a list."""
        self.send(200, b"[%b]" % document.value, "application/json", ETag=f'"{document.cas:x}"')

    def send_picture(self, document: Any) -> None:
        """Answer with the picture itself."""
        try:
            record = json.loads(document.value)
            kind, image = record["type"], base64.b64decode(record["image"], validate=True)
        except (ValueError, TypeError, KeyError, binascii.Error):
            raise ProblemError(422, "the picture record has no usable type or base64 image") from None
        policy = {"Content_Security_Policy": "default-src 'none'; sandbox"}
        self.send(200, image, f"image/{kind}", ETag=f'"{document.cas:x}"', **policy)

    def send_matches(self, statement: str, route: str, value: str, query: dict[str, list[str]]) -> None:
        """Answer with one page of profiles, and a link to the next."""
        try:
            limit, offset = int(query.get("limit", ["100"])[0]), int(query.get("offset", ["0"])[0])
        except ValueError:
            raise ProblemError(400, "limit and offset must be numbers") from None
        if not 1 <= limit <= 1000 or not 0 <= offset <= 1_000_000_000:
            raise ProblemError(400, "limit or offset is out of range")
        parameters = {"value": value, "limit": limit + 1, "offset": offset}
        options = QueryOptions(adhoc=False, read_only=True, named_parameters=parameters)
        rows = list(self.scope.query(statement, options))
        if not rows:
            raise ProblemError(404, "no match")
        headers = {}
        if len(rows) > limit:
            following = f"{route}/{quote(value, safe='')}?limit={limit}&offset={offset + limit}"
            headers["Link"] = f'<{following}>; rel="next"'
        self.send(200, json.dumps(rows[:limit]).encode(), "application/json", **headers)

    def send_problem(self, problem: ProblemError) -> None:
        """Answer with a problem document."""
        status = problem.status
        body = {
            "title": HTTPStatus(status).phrase,
            "status": status,
            "detail": problem.detail,
            "request_id": self.request_id,
        }
        self.send(status, json.dumps(body).encode(), "application/problem+json", **problem.headers)

    def send(self, status: int, body: bytes, content_type: str, **headers: str) -> None:
        """Answer; underscores in header names stand for dashes."""
        if "ETag" in headers and self.headers.get("If-None-Match") == headers["ETag"]:
            status, body = 304, b""
        self.send_response(status)
        self.send_header("X-Request-ID", self.request_id)
        self.send_header("X-Content-Type-Options", "nosniff")
        kept = status < HTTPStatus.BAD_REQUEST and self.path.startswith("/api/")
        self.send_header("Cache-Control", "private, no-cache" if kept else "no-store")
        if status != HTTPStatus.NOT_MODIFIED:
            self.send_header("Content-Type", content_type)
            self.send_header("Content-Length", str(len(body)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Write the access log's line, if there is to be one."""
        if self.access_log:
            super().log_message(format, *args)


class Threading(ThreadingHTTPServer):
    """A thread a connection, with room for many clients to wait for theirs."""

    request_queue_size = 1024


class OneAtATime(HTTPServer):
    """One client at a time, with room for many to wait."""

    request_queue_size = 1024


def main() -> None:
    """Connect, read the token and serve until SIGTERM."""
    cluster = Cluster.connect(
        os.environ["COUCHBASE_HOST"],
        ClusterOptions(
            PasswordAuthenticator(os.environ["COUCHBASE_USER"], os.environ["COUCHBASE_PASSWORD"]),
            enable_tracing=False,
            enable_metrics=False,
            transcoder=RawJSONTranscoder(),
        ),
    )
    scope = cluster.bucket(os.environ["COUCHBASE_BUCKET"]).scope(os.environ.get("COUCHBASE_SCOPE", "profiles"))
    Handler.scope = scope
    Handler.token = json.loads(scope.collection("service_auth").get("service_auth:1").value)["token"].encode()
    Handler.access_log = os.environ.get("ACCESS_LOG") == "true"
    server_class: type[HTTPServer] = OneAtATime
    if "--threads" in sys.argv[1:]:
        server_class = Threading
        Handler.protocol_version = "HTTP/1.1"  # the other would serve its first client until that one leaves
    server = server_class(("127.0.0.1", int(os.environ["SERVICE_PORT"])), Handler)
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    server.serve_forever()


if __name__ == "__main__":
    main()
