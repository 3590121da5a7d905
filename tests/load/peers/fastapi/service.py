"""The same service on FastAPI, uvicorn (uvloop, httptools) and the SDK's asyncio API: what the benchmark compares with.

Written the way its makers recommend: a lifespan that owns the connection, routers with dependencies, security classes
for the token, pure ASGI middleware instead of `@app.middleware`, and a `Response` returned as it is where the body
already is JSON. Settings come from the service's own environment variables; uvicorn's flags say the rest::

    uvicorn service:app --loop uvloop --http httptools --no-access-log --workers 1 --port 8080
"""

import base64
import binascii
import os
import re
import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from http import HTTPStatus
from typing import Annotated, Any
from urllib.parse import quote
from uuid import uuid4

import orjson
from acouchbase.cluster import AsyncCluster
from couchbase.auth import PasswordAuthenticator
from couchbase.exceptions import CouchbaseException, DocumentNotFoundException, TimeoutException
from couchbase.options import ClusterOptions, QueryOptions
from couchbase.transcoder import RawJSONTranscoder
from fastapi import APIRouter, Depends, FastAPI, HTTPException, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.security import APIKeyHeader, HTTPAuthorizationCredentials, HTTPBearer
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException as AnyHTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

SANE_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
BY_NICKNAME, BY_USERNAME = (
    f"SELECT RAW p FROM `user_data` AS p WHERE p.`{field}` = $value ORDER BY META(p).id LIMIT $limit OFFSET $offset"  # noqa: S608
    for field in ("nickname", "user_id")
)

bearer = HTTPBearer(auto_error=False)
access_token = APIKeyHeader(name="x-access-token", auto_error=False)


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    """Connect, read the token, and close the connection at the end."""
    cluster = await AsyncCluster.connect(
        os.environ["COUCHBASE_HOST"],
        ClusterOptions(
            PasswordAuthenticator(os.environ["COUCHBASE_USER"], os.environ["COUCHBASE_PASSWORD"]),
            enable_tracing=False,
            enable_metrics=False,
            transcoder=RawJSONTranscoder(),
        ),
    )
    bucket = cluster.bucket(os.environ["COUCHBASE_BUCKET"])
    await bucket.on_connect()
    scope = bucket.scope(os.environ.get("COUCHBASE_SCOPE", "profiles"))
    app.state.scope = scope
    app.state.users, app.state.images = scope.collection("user_data"), scope.collection("user_images")
    token_document = await scope.collection("service_auth").get("service_auth:1")
    app.state.token = orjson.loads(token_document.value)["token"].encode()
    yield
    await cluster.close()


class CommonHeaders:
    """Gives every answer the headers that they all have."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if SANE_REQUEST_ID.fullmatch(given) else uuid4().hex
        scope.setdefault("state", {})["request_id"] = request_id

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers["X-Request-ID"] = request_id
                headers["X-Content-Type-Options"] = "nosniff"
                kept = message["status"] < 400 and scope["path"].startswith("/api/")
                headers["Cache-Control"] = "private, no-cache" if kept else "no-store"
            await send(message)

        await self.app(scope, receive, send_with_headers)


async def require_token(
    request: Request,
    credentials: Annotated[HTTPAuthorizationCredentials | None, Depends(bearer)],
    key: Annotated[str | None, Depends(access_token)],
) -> None:
    """Refuse who does not show the token."""
    token = credentials.credentials if credentials else key
    if token is None or not secrets.compare_digest(token.encode(), request.app.state.token):
        raise HTTPException(401, "a valid bearer token is required", {"WWW-Authenticate": "Bearer"})


router = APIRouter(prefix="/api/v1", dependencies=[Depends(require_token)])


def problem(request: Request, status: int, detail: str, headers: Any = None) -> Response:
    """Return a problem document (RFC 9457)."""
    body = {
        "title": HTTPStatus(status).phrase,
        "status": status,
        "detail": detail,
        "request_id": request.state.request_id,
    }
    return Response(orjson.dumps(body), status, headers, "application/problem+json")


def etag_of(request: Request, cas: int) -> tuple[str, bool]:
    """Return a document's entity tag, and whether the caller has that version."""
    etag = f'"{cas:x}"'
    return etag, request.headers.get("if-none-match") == etag


@router.api_route("/id/{record_id}", methods=["GET", "HEAD"])
async def by_id(request: Request, record_id: str) -> Response:
    """Answer with one profile."""
    return document_response(request, await request.app.state.users.get(f"user_data:{record_id}"))


@router.api_route("/picture/record/{record_id}", methods=["GET", "HEAD"])
async def picture_record(request: Request, record_id: str) -> Response:
    """Answer with one picture's record."""
    return document_response(request, await request.app.state.images.get(f"user_images:{record_id}"))


def document_response(request: Request, document: Any) -> Response:
    """Answer with the stored JSON in a list."""
    etag, unchanged = etag_of(request, document.cas)
    if unchanged:
        return Response(status_code=304, headers={"ETag": etag})
    return Response(b"[%b]" % document.value, headers={"ETag": etag}, media_type="application/json")


@router.api_route("/picture/raw/{record_id}", methods=["GET", "HEAD"])
async def picture(request: Request, record_id: str) -> Response:
    """Answer with the picture itself."""
    document = await request.app.state.images.get(f"user_images:{record_id}")
    etag, unchanged = etag_of(request, document.cas)
    if unchanged:
        return Response(status_code=304, headers={"ETag": etag})
    try:
        record = orjson.loads(document.value)
        kind, image = record["type"], base64.b64decode(record["image"], validate=True)
    except (ValueError, TypeError, KeyError, binascii.Error):
        raise HTTPException(422, "the picture record has no usable type or base64 image") from None
    headers = {"ETag": etag, "Content-Security-Policy": "default-src 'none'; sandbox"}
    return Response(image, headers=headers, media_type=f"image/{kind}")


Limit = Annotated[int, Query(ge=1, le=1000)]
Offset = Annotated[int, Query(ge=0, le=1_000_000_000)]


@router.api_route("/nickname/{value}", methods=["GET", "HEAD"])
async def by_nickname(request: Request, value: str, limit: Limit = 100, offset: Offset = 0) -> Response:
    """Answer with the profiles that have this nickname."""
    return await matches(request, BY_NICKNAME, value, limit, offset)


@router.api_route("/username/{value}", methods=["GET", "HEAD"])
async def by_username(request: Request, value: str, limit: Limit = 100, offset: Offset = 0) -> Response:
    """Answer with the profiles that have this username."""
    return await matches(request, BY_USERNAME, value, limit, offset)


async def matches(request: Request, statement: str, value: str, limit: int, offset: int) -> Response:
    """Answer with one page of profiles, and a link to the next."""
    parameters = {"value": value, "limit": limit + 1, "offset": offset}
    result = request.app.state.scope.query(
        statement, QueryOptions(adhoc=False, read_only=True, named_parameters=parameters)
    )
    rows = [row async for row in result.rows()]
    if not rows:
        raise HTTPException(404, "no match")
    headers = {}
    if len(rows) > limit:
        route = request.url.path.rpartition("/")[0]
        following = f"{route}/{quote(value, safe='')}?limit={limit}&offset={offset + limit}"
        headers["Link"] = f'<{following}>; rel="next"'
    return Response(orjson.dumps(rows[:limit]), headers=headers, media_type="application/json")


app = FastAPI(lifespan=lifespan)
app.include_router(router)
app.add_middleware(CommonHeaders)


@app.exception_handler(AnyHTTPException)
async def refused(request: Request, error: AnyHTTPException) -> Response:
    """Answer with a problem that a route or the framework raised."""
    detail = "no such route" if error.detail == "Not Found" else error.detail
    return problem(request, error.status_code, detail, error.headers)


@app.exception_handler(RequestValidationError)
async def invalid(request: Request, error: RequestValidationError) -> Response:
    """Answer 400 for a parameter out of range."""
    first = error.errors()[0]
    return problem(request, 400, f"{first['loc'][-1]}: {first['msg']}")


@app.exception_handler(DocumentNotFoundException)
async def not_found(request: Request, _: DocumentNotFoundException) -> Response:
    """Answer 404 for a document that there is not."""
    return problem(request, 404, "no such document")


@app.exception_handler(TimeoutException)
async def too_slow(request: Request, _: TimeoutException) -> Response:
    """Answer 504 for a database that did not answer in time."""
    return problem(request, 504, "Couchbase did not answer in time")


@app.exception_handler(CouchbaseException)
async def failed(request: Request, _: CouchbaseException) -> Response:
    """Answer 503 for a database that is out of reach."""
    return problem(request, 503, "Couchbase is out of reach", {"Retry-After": "1"})


@app.get("/healthz")
async def healthz() -> dict[str, str]:
    """Answer that the process lives."""
    return {"status": "alive"}
