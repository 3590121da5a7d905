#!/usr/bin/env python3
r"""A user-profile microservice: HTTP in front of Couchbase, on the standard library and the Couchbase SDK.

Part one is the service, to be read in one sitting: settings, problems, the handler with its routes, the store with
the failure map, the server, `main`. Part two is the engine room, to be read when needed: HTTP/1.1 framing, connections,
the data loader and its pools, the SDK's calls, Couchbase's health, tokens, log, metrics, traces, the OpenAPI document.

All is done by the event loop's one thread, so no state has two owners and nothing needs a lock. Other threads make one
blocking call to Couchbase each and hand the result back to the loop. The way of a request::

    socket -> asyncio -> Connection.data_received -> Framer -> ProfileHandler.do_GET --await--+- get: a Batch of keys
    socket <- transport.write <- ProfileHandler.send <------- result, back in the loop -------+- query: rows
"""

from __future__ import annotations

import os
import signal

STOP_SIGNALS = [signal.SIGTERM, signal.SIGINT] + [signal.SIGHUP] * (signal.getsignal(signal.SIGHUP) != signal.SIG_IGN)
if __name__ == "__main__":  # before imports, which take long: a container's first process ignores what has no handler
    for number in (*STOP_SIGNALS, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, (lambda *_: os._exit(0)) if number in STOP_SIGNALS else signal.SIG_IGN)

import _thread
import argparse
import asyncio
import base64
import bisect
import contextlib
import ctypes
import functools
import gc
import hashlib
import hmac
import ipaddress
import itertools
import json
import math
import queue
import random
import re
import resource
import select
import selectors
import socket
import ssl
import sys
import threading
import time
import types
import zlib
from collections import OrderedDict, defaultdict, deque
from collections.abc import Awaitable, Callable, Collection, Coroutine, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, fields, replace
from datetime import UTC, datetime, timedelta
from email.utils import formatdate
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple, NoReturn, TypeAlias, cast
from urllib.parse import quote, unquote

from couchbase import exceptions as cb
from couchbase import options as cbo
from couchbase.auth import PasswordAuthenticator
from couchbase.cluster import Cluster
from couchbase.subdocument import get as path_get
from couchbase.transcoder import RawJSONTranscoder

__version__ = "1.0.0"

# ══ Part one: the service ═════════════════════════════════════════════════════════════════════════════════════════════

# ── Settings ──────────────────────────────────────────────────────────────────────────────────────────────────────────
# One row a setting: its name, default, check and meaning stand in `Settings`; `ROWS` has what is derived from them.

REQUIRED = object()
Network: TypeAlias = ipaddress.IPv4Network | ipaddress.IPv6Network
Check: TypeAlias = tuple[str, Callable[[str], Any]]  # what a value has to be, and what raises for any other


class SettingsError(Exception):
    """A setting is missing, not allowed, or refused by Couchbase; the message is one line for the operator."""


def _row(default: object, check: Check, meaning: str, *, secret: bool = False) -> Any:
    """Describe one setting; a secret is neither printed nor taken from the command line."""
    row = {"default": default, "allowed": check[0], "parse": check[1], "meaning": meaning, "secret": secret}
    return field(repr=not secret, metadata=row)


def _matching(pattern: str, allowed: str) -> Check:
    return allowed, lambda text: re.fullmatch(pattern, text)[0]  # type: ignore[index]  # None: not allowed


def _integer(low: int, high: int) -> Check:
    return f"{low} to {high}", lambda text: low + range(low, high + 1).index(int(_matching("[0-9]{1,9}", "")[1](text)))


def _choice(allowed: str) -> Check:
    return allowed, lambda text: {name: name for name in re.findall("[a-z]{3,}", allowed)}[text.lower()]


def _file(text: str) -> str:
    with open(text, "rb"):
        return text


_PEM = "a readable PEM file", _file
_HOST = r"(?:[A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\])(?::[0-9]{1,5})?"
_HOSTS = rf"{_HOST}(?:,{_HOST})*"
_CLUSTER_TEXT = "host[:port], several with commas, or couchbase[s]://..."
_CLUSTER = _matching(rf"{_HOSTS}|couchbases?://{_HOSTS}/?(?:\?[!-~]*)?", _CLUSTER_TEXT)
# It gets into a page and its policy: nothing that means something there.
_ASSETS = _matching(rf"https?://{_HOST}(?:/[A-Za-z0-9@._~-]+)*", "http[s]://host[:port][/path]")
_ASSETS_URL = "https://cdn.jsdelivr.net/npm/swagger-ui-dist@5.33.1"
_NAME = r"[A-Za-z0-9_%.-]{1,251}"
_SWITCH = "true or false", lambda text: ("false", "true", "0", "1", "no", "yes").index(text.lower()) % 2 == 1
_PORT_OR_OFF = "0 to 65535, or off", lambda text: None if text.lower() == "off" else _integer(0, 65535)[1](text)
_NETWORK, _NETWORKS = ipaddress.ip_network, re.compile(r"[^,\s](?:[^,]*[^,\s])?")
_PROXIES = "addresses or networks, with commas", lambda text: tuple(map(_NETWORK, _NETWORKS.findall(text)))


@dataclass(frozen=True, slots=True)
class Settings:
    """What the operator can choose; every value is checked before anything starts."""

    couchbase_host: str = _row(REQUIRED, _CLUSTER, "the cluster")
    couchbase_user: str = _row(REQUIRED, _matching(r"[^\x00-\x1f\x7f]{1,128}", "a user name"), "who asks")
    couchbase_password: str = _row(None, _matching(r"[^\0]{1,1024}", "text"), "that user's password", secret=True)
    couchbase_password_file: str | None = _row(None, ("a readable file", _file), "the file with the password instead")
    couchbase_bucket: str = _row("sample_app", _matching(_NAME, "a bucket's name"), "the bucket")
    couchbase_scope: str = _row("profiles", _matching(_NAME, "a scope's name"), "the scope of the collections")
    couchbase_tls: bool = _row("true", _SWITCH, "TLS to Couchbase, unless the host is a whole URL")
    couchbase_tls_ca: str | None = _row(None, _PEM, "the only roots to trust")
    couchbase_tls_verify: bool = _row("true", _SWITCH, "whether certificates are verified")
    couchbase_network: str = _row("auto", _choice("auto, default or external"), "which of the nodes' addresses to use")
    couchbase_timeout_ms: int = _row("2500", _integer(10, 60_000), "time-out of a key-value operation")
    couchbase_query_timeout_ms: int = _row("5000", _integer(10, 120_000), "time-out of a query")
    port: int = _row("8080", _integer(0, 65535), "where the API listens; 0 picks a free port")
    tls_cert: str | None = _row(None, _PEM, "the API speaks HTTPS with this certificate, its chain behind it")
    tls_key: str | None = _row(None, _PEM, "the key of that certificate")
    tls_client_ca: str | None = _row(None, _PEM, "only clients with a certificate of this authority get in")
    metrics_port: int | None = _row("9090", _PORT_OR_OFF, "where /metrics and the probes listen")
    threads: int = _row("8", _integer(1, 256), "query threads")
    max_connections: int = _row("10000", _integer(1, 1_000_000), "clients")
    idle_seconds: int = _row("75", _integer(1, 86_400), "keeps idle clients for longer than your load balancer does")
    token_refresh_seconds: int = _row("30", _integer(1, 86_400), "how often the token is read again")
    shutdown_seconds: int = _row("20", _integer(0, 3600), "how long running requests may take to finish")
    cpu_affinity: str = _row("auto", _choice("auto or off"), "auto: pinned to one processor at a time, the least used")
    trusted_proxies: tuple[Network, ...] = _row("", _PROXIES, "whose X-Forwarded-For names the client")
    docs_assets_url: str = _row(_ASSETS_URL, _ASSETS, "where /docs loads Swagger UI from: exactly this version")
    log_level: str = _row("info", _choice("debug, info, warning or error"), "the least level that is logged")
    access_log: bool = _row("true", _SWITCH, "a log line a request")

    @property
    def connection_string(self) -> str:
        """The cluster as the SDK takes it. A whole URL wins over `COUCHBASE_TLS`."""
        whole = "://" in self.couchbase_host
        return self.couchbase_host if whole else f"couchbase{'s' * self.couchbase_tls}://{self.couchbase_host}"

    @property
    def credentials(self) -> str:
        """Name what to check where Couchbase refuses the user, and what looks like a mistake in the password."""
        odd = self.couchbase_password != self.couchbase_password.strip().strip("'\"")
        return f"COUCHBASE_USER and COUCHBASE_PASSWORD{' (it begins or ends with a blank or a quote)' * odd}"


ROWS: list[dict[str, Any]] = [{"name": row.name, **row.metadata} for row in fields(Settings)]
for setting in ROWS:
    setting["env"] = re.sub("^(?=PORT|TLS)", "SERVICE_", setting["name"].upper())
    setting["flag"] = None if setting["secret"] else "--" + setting["name"].replace("_", "-")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise SettingsError(message)


def read_settings(argv: Sequence[str], environ: Mapping[str, str]) -> Settings:
    """Read flags, else variables, else defaults; raises SettingsError for a bad one, SystemExit after `--help`."""
    about = (__doc__ or "").partition("\n")[0]
    epilog = "Flags win over the environment. COUCHBASE_PASSWORD comes from the environment or a file only."
    parser = _Parser(description=about, epilog=epilog, allow_abbrev=False, argument_default=argparse.SUPPRESS)
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    for row in [row for row in ROWS if row["flag"]]:
        default = "required" if row["default"] is REQUIRED else f"default {row['default'] or 'none'}"
        summary = f"{row['env']}: {row['meaning']} ({row['allowed']}; {default})"
        parser.add_argument(row["flag"], dest=row["name"], metavar="X", help=summary.replace("%", "%%"))
    # an empty flag is a mistake; an empty variable is how YAML and shells say "not set"
    values = {row["name"]: environ.get(row["env"]) or row["default"] for row in ROWS} | vars(parser.parse_args(argv))
    for row in ROWS:
        text = values[row["name"]]
        where = f"{row['env']} ({row['flag']})" if row["flag"] else row["env"]
        if text is REQUIRED:
            raise SettingsError(f"{where} is missing; allowed: {row['allowed']}")
        try:
            values[row["name"]] = None if text is None else row["parse"](text.encode().decode())  # UTF-8 only
        except (ValueError, KeyError, TypeError, OSError):
            shown = "its value is not allowed" if row["secret"] else f"{text[:60]!r} is not allowed"
            raise SettingsError(f"{where}: {shown}; allowed: {row['allowed']}") from None
    if bool(values["tls_cert"]) != bool(values["tls_key"]) or (values["tls_client_ca"] and not values["tls_cert"]):
        raise SettingsError("SERVICE_TLS_CERT, SERVICE_TLS_KEY: allowed: both or none; both for SERVICE_TLS_CLIENT_CA")
    return _with_password(Settings(**values))


def _with_password(settings: Settings) -> Settings:
    """Take the password from its file, where one is named."""
    path, password = settings.couchbase_password_file, settings.couchbase_password
    if bool(path) == bool(password):
        what = "set" if path else "missing"
        raise SettingsError(f"COUCHBASE_PASSWORD and COUCHBASE_PASSWORD_FILE are both {what}; allowed: one of the two")
    if path:
        with contextlib.suppress(OSError), open(path, encoding="utf-8-sig", errors="replace") as file:
            password = file.read(4096).rstrip("\r\n")
    if not password or re.search("[\0\ufffd]", password):
        what = "not UTF-8 (UTF-16, perhaps)" if password else "no password in it"
        raise SettingsError(f"COUCHBASE_PASSWORD_FILE: {what}; allowed: a readable file with a line of text")
    return replace(settings, couchbase_password=password)


# ── Problems ──────────────────────────────────────────────────────────────────────────────────────────────────────────
# Whatever refuses a request or fails raises one; `ProfileHandler.resume` answers it.
class ProblemError(Exception):
    """Raised anywhere while a request is answered, and answered in one place as a problem document (RFC 9457)."""

    # `detail` and `members` are for the caller: never a secret, never another's data. `headers`, whole lines, stand in
    # for those of the status; `rejected` is for the metrics: why (one of REASONS) it was refused before any work on it.
    def __init__(self, status: int, detail: str, headers: str = "", rejected: str = "", **members: object) -> None:
        super().__init__(detail)
        self.status, self.detail, self.rejected, self.members = status, detail, rejected, members
        self.headers = headers or _FIELDS_BY_STATUS.get(status, "")

    def document(self, request_id: str) -> bytes:
        """Return the body of the answer."""
        more = f", {json.dumps(self.members)[1:]}" if self.members else "}"
        return f'{_problem(self.status, self.detail)}, "request_id": "{request_id}"{more}'.encode()  # of safe letters


@functools.lru_cache(maxsize=100)
def _problem(status: int, detail: str) -> str:
    """Return how its document begins."""
    return json.dumps({"title": HTTPStatus(status).phrase, "status": status, "detail": detail})[:-1]


# ── The handler: one request in, one answer out ───────────────────────────────────────────────────────────────────────
# A `Connection` makes one for each whole request. `do_GET` is a coroutine that awaits nothing but the store, which
# yields what it waits for; `resume` steps it, once at the beginning and once for each result, and answers problems.

JSON_TYPE, PROBLEM_TYPE, HTML_TYPE = "application/json", "application/problem+json", "text/html; charset=utf-8"
CONTENT_POLICY = "Content-Security-Policy: default-src 'none'; sandbox\r\n"  # as a page a picture may run nothing
ALLOW, REPLICA, MAX_KEY_BYTES = "Allow: GET, HEAD, OPTIONS\r\n", "X-Couchbase-Replica: true\r\n", 246
_FIELDS_BY_STATUS = {401: "WWW-Authenticate: Bearer\r\n", 405: ALLOW, 503: "Retry-After: 1\r\n"}  # of problems
_REJECTED = {**dict.fromkeys((400, 417, 501, 505), "malformed"), 414: "too_large", 431: "too_large", 408: "too_slow"}
QUIET_ROUTES = frozenset(("/healthz", "/readyz", "/metrics"))  # logged at debug: probes and scrapes come by the second
# Cache-Control of what is no problem, by route; that of documents is in `send`.
_CACHED = {"/openapi.json": "no-cache", "/docs": "no-cache"} | dict.fromkeys(("", *QUIET_ROUTES), "no-store")
_SANE_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_STATUS_LINES = {status.value: f"HTTP/1.1 {status.value} {status.phrase}\r\n" for status in HTTPStatus}


class ProfileHandler(BaseHTTPRequestHandler):
    """Answers one request: a request head in, whole answer bytes out, no socket in between."""

    server: ProfileServer
    headers: Mapping[str, str]  # type: ignore[assignment]  # the base has others
    query = route = ""
    response, status, seconds, queue_seconds = b"", 0, 0.0, 0.0
    operation: Operation | None = None  # the last one of Couchbase that was awaited
    cut_off = ""  # for the log, of an answer of which `response` has only what was sent

    def __init__(self, request: Head | ProblemError, connection: Connection, server: ProfileServer) -> None:
        """Take a request head, or why the bytes received are not one; the base class would read from a socket."""
        self.connection, self.server = connection, server
        self.client, self.started = connection.address, time.monotonic()
        head = Head("", "", "HTTP/1.1", {}) if isinstance(request, ProblemError) else request
        self.command, self.path, self.request_version, self.headers = head
        self.close_connection = self.request_version == "HTTP/1.0"
        if "connection" in self.headers:
            named = {option.strip().lower() for option in self.headers["connection"].split(",")}
            self.close_connection = "close" in named or (self.close_connection and "keep-alive" not in named)
        given = self.headers.get("x-request-id", "")
        self.request_id = given if given and _SANE_REQUEST_ID.fullmatch(given) else next(server.request_ids)
        method = None if connection.framer.refused else getattr(self, "do_" + self.command, None)
        self._steps: Coroutine[Wanted, Any, None] = method() if method else self._refuse(request)

    def resume(self, outcome: Document | list[bytes] | Exception | None = None) -> bool:
        """Begin, or go on with what the last await returns, or raises; return whether the answer is there."""
        try:
            awaited = self._steps.throw(outcome) if isinstance(outcome, Exception) else self._steps.send(outcome)
            self.server.store.loader.load(self, awaited)
            return False
        except StopIteration:
            return True
        except ProblemError as error:
            problem = error
        except Exception as error:
            self.server.log.event("error", "unexpected failure", route=self.route, error=describe(error))
            problem = ProblemError(500, "unexpected failure")
        if rejected := problem.rejected or ("" if self.path else _REJECTED.get(problem.status, "")):
            self.server.metrics.numbers["http_rejected_total", rejected] += 1
        self.send(problem.status, problem.document(self.request_id), PROBLEM_TYPE, None, problem.headers)
        problem.__traceback__ = None  # it leads to this frame, which has the problem
        return True

    async def _refuse(self, request: Head | ProblemError) -> None:
        if isinstance(request, ProblemError):
            raise request
        if not hasattr(self, "do_" + self.command):
            raise ProblemError(405, f"{self.command} is not supported")
        # of a request with a body the head is the last thing that is read
        raise ProblemError(413, "a request has no body here", rejected="too_large")

    async def do_GET(self) -> None:
        """Answer by route; callers are applications (`/api/`), Kubernetes (probes) and Prometheus (`/metrics`)."""
        path, _, self.query = self.path.partition("?")
        route, _, parameter = path.rpartition("/")
        if path.startswith("/api/"):
            self.require_token()
        else:
            self.route = path
        if route == "/api/v1/id":
            self.route = "/api/v1/id/{id}"
            value, cas, replica = await self.stored(USERS, parameter)
            self.send(200, b"[%b]" % value, JSON_TYPE, cas, REPLICA if replica else "")
        elif route == "/api/v1/nickname":
            self.route = "/api/v1/nickname/{nickname}"
            await self.send_matches(PROFILES_BY_NICKNAME, route, parameter)
        elif route == "/api/v1/username":
            self.route = "/api/v1/username/{username}"
            await self.send_matches(PROFILES_BY_USERNAME, route, parameter)
        elif route == "/api/v1/picture/record":
            self.route = "/api/v1/picture/record/{id}"
            value, cas, replica = await self.stored(IMAGES, parameter)
            self.send(200, b"[%b]" % value, JSON_TYPE, cas, REPLICA if replica else "")
        elif route == "/api/v1/picture/raw":
            self.route = "/api/v1/picture/raw/{id}"
            document = await self.stored(IMAGES, parameter)
            media_type, image = self.server.pictures.decoded(path, document)
            self.send(200, image, media_type, document.cas, CONTENT_POLICY + (REPLICA if document.replica else ""))
        elif path == "/healthz":
            self.send(200, b'{"status": "alive"}', JSON_TYPE)
        elif path == "/readyz":
            if reasons := self.server.unready_reasons():
                raise ProblemError(503, "not ready", reasons=reasons)
            ready = {"status": "ready", "breakers": self.server.store.health.breaker_states()}
            self.send(200, json.dumps(ready).encode(), JSON_TYPE)
        elif path == "/openapi.json":
            self.send(200, openapi(), JSON_TYPE)
        elif path == "/docs":
            page, policy = docs(self.server.settings.docs_assets_url)
            self.send(200, page, HTML_TYPE, None, policy)
        elif path == "/metrics" and self.connection.internal:
            self.send(200, self.server.scrape(), "text/plain; version=0.0.4; charset=utf-8")
        else:
            self.route = ""
            raise ProblemError(404, "no such route")

    do_HEAD = do_GET  # `send` leaves the body out

    async def do_OPTIONS(self) -> None:
        """Say which methods there are (RFC 9110, 9.3.7)."""
        self.send(204, b"", "", None, ALLOW)

    def require_token(self) -> None:
        """Check the caller's token: 401, or 503 while the service's own is not known yet."""
        tokens = self.server.store.tokens
        if not tokens.current:
            raise ProblemError(503, "not ready yet", rejected="not_ready")
        given = self.headers.get("authorization", "")
        if hmac.compare_digest(given.encode("latin-1", "replace"), b"Bearer " + tokens.current):  # as most do
            return
        scheme, _, credentials = given.partition(" ")  # another scheme is for a proxy, say
        token = credentials.strip(" ") if scheme.lower() == "bearer" else self.headers.get("x-access-token", "")
        if not tokens.accepts(token, self.started):
            self.server.metrics.numbers["auth_failures_total",] += 1
            raise ProblemError(401, "a valid bearer token is required")

    def stored(self, collection: str, parameter: str) -> Awaitable[Document]:
        """Return what to await for the document `{collection}:{parameter}`; 400 for an id that no key can hold."""
        if "%" in parameter or not parameter:
            parameter = decode_segment(parameter)
        key = f"{collection}:{parameter}"
        if len(key) > MAX_KEY_BYTES // 4 and len(key.encode()) > MAX_KEY_BYTES:
            raise ProblemError(400, f"the id makes a key of more than {MAX_KEY_BYTES} bytes")
        return self.server.store.get(collection, key)

    async def send_matches(self, statement: str, route: str, parameter: str) -> None:
        """Answer with one page of the profiles that match, and a link to the next while more remain; 404 if none."""
        value, (limit, offset) = decode_segment(parameter), parse_page(self.query)
        # one row more than asked for tells whether more remain
        rows = await self.server.store.query(statement, {"value": value, "limit": limit + 1, "offset": offset})
        if not rows:
            raise ProblemError(404, "no match")
        link = ""
        if len(rows) > limit and offset + limit <= MAX_OFFSET:
            link = f'Link: <{route}/{quote(value, safe="")}?limit={limit}&offset={offset + limit}>; rel="next"\r\n'
        self.send(200, b"[%b]" % b",".join(rows[:limit]), JSON_TYPE, None, link)

    def send(self, status: int, body: bytes, content_type: str, cas: int | None = None, headers: str = "") -> None:
        """Put the whole answer together; a 304 or 412 by `cas`, of which the ETag is made (RFC 9110, 13.2.2)."""
        server, given, framer = self.server, self.headers, self.connection.framer
        if cas is not None:
            tag = f'"{cas:x}"'
            headers = f"ETag: {tag}\r\n{headers}"
            if "if-match" in given and not _names_tag(given["if-match"], tag):
                raise ProblemError(412, "the document has another ETag")
            if "if-none-match" in given and _names_tag(given["if-none-match"], tag, f"W/{tag}"):
                status, body, content_type = 304, b"", ""
        # of a 204 there is nothing to describe, and of a 304 the caller has it (RFC 9110, 8.6 and 15.4.5)
        typed = f"Content-Type: {content_type}\r\nContent-Length: {len(body)}\r\n" if content_type else ""
        self.close_connection |= framer.refused or (server.draining and not framer.partial)
        kept = "Connection: close\r\n" if self.close_connection else server.kept[self.request_version]
        bodiless = self.command == "HEAD" or (not self.command and framer.refused_head)
        cached = "no-store" if status >= 400 else _CACHED.get(self.route, "private, no-cache")  # noqa: PLR2004
        head = (  # at once, which takes half the time of one field after the other
            f"{_STATUS_LINES[status]}Date: {server.date}\r\nX-Request-ID: {self.request_id}\r\n"
            f"X-Content-Type-Options: nosniff\r\n{typed}Cache-Control: {cached}\r\n{kept}{headers}\r\n"
        )
        self.status, self.response = status, head.encode("latin-1") + (b"" if bodiless else body)
        self.seconds = time.monotonic() - self.started


# ── The store: Couchbase ──────────────────────────────────────────────────────────────────────────────────────────────
# `ProfileStore` is what handlers ask. Behind it are, in part two, the `Loader` with its pools of threads, `Database`
# with the SDK's calls that they make, and `Health`, which judges by their outcomes whether Couchbase is well.

USERS, IMAGES, AUTH = "user_data", "user_images", "service_auth"
TOKEN_KEY, TOKEN_PATH = "service_auth:1", "token"
_INDEXED = ("nickname", "user_id")
# Constant texts: a caller's value is only ever a named parameter.
PROFILES_BY_NICKNAME, PROFILES_BY_USERNAME = (
    f"SELECT RAW p FROM `{USERS}` AS p WHERE p.`{name}` = $value ORDER BY META(p).id LIMIT $limit OFFSET $offset"  # noqa: S608
    for name in _INDEXED
)
PROVISION = "create the schema: python -m tests.sample_data --help"
# To be pasted one by one; the second of an index is for one that is there, but was made with `defer_build`.
_INDEX = "CREATE INDEX by_{0} IF NOT EXISTS ON `{1}`({0})\nBUILD INDEX ON `{1}`(by_{0})"
MISSING_INDEX = "\n".join(_INDEX.format(name, USERS) for name in _INDEXED)


class NoTokenError(Exception):
    """Couchbase answers, but has no usable token; the message is one line that says what to do."""


class Document(NamedTuple):
    """A document as stored: raw JSON, and the CAS that changes with every mutation."""

    value: bytes
    cas: int
    replica: bool = False  # from a replica, because the node of the active copy is down


class Operation(NamedTuple):
    """A finished Couchbase operation, as metrics, log and traces tell it."""

    name: str  # one of OPERATIONS
    target: str  # the collection, or the statement without its parameters
    started: float  # monotonic seconds
    seconds: float
    outcome: str  # one of OUTCOMES
    size: int = 1  # keys


Fetched: TypeAlias = tuple[Operation, dict[str, Document], dict[str, Exception]]  # by key; the SDK's exceptions


class Failure(NamedTuple):
    """What one kind of SDK exception means to the caller and to the operator."""

    exceptions: tuple[type[Exception], ...]
    status: int
    detail: str
    advice: str = ""
    outage: bool = False  # speaks of the service, not of the request: counts for the breaker

    @property
    def outcome(self) -> str:
        """Return what the metrics call it: one of OUTCOMES."""
        return {404: "not_found", 504: "timeout", 503: "unavailable"}.get(self.status, "error")


_OUT_OF_REACH, _SCHEMA = "Couchbase is out of reach", "the database's schema is incomplete"
_REFUSED = "Couchbase refuses the user: check COUCHBASE_USER, its password, and that it may read this scope"
_TIMEOUTS = (cb.AmbiguousTimeoutException, cb.UnAmbiguousTimeoutException, cb.TimeoutException)
_OUTAGES: tuple[Any, ...] = (cb.TemporaryFailException, cb.ServiceUnavailableException, cb.RequestCanceledException)
_OUTAGES += (cb.MissingConnectionException, cb.InternalServerFailureException, cb.RateLimitedException)
_OUTAGES += (cb.QuotaLimitedException, cb.HTTPException, cb.DocumentUnretrievableException)
_BUCKET = (cb.BucketNotFoundException, cb.BucketDoesNotExistException)
_UNKNOWN = (cb.ScopeNotFoundException, cb.CollectionNotFoundException, cb.KeyspaceNotFoundException)
_NOT_FOUND = Failure((cb.DocumentNotFoundException,), 404, "no such document")
_TIMED_OUT = Failure(_TIMEOUTS, 504, "Couchbase did not answer in time", outage=True)
_NO_ACCESS = Failure((cb.AuthenticationException,), 503, _OUT_OF_REACH, _REFUSED, outage=True)
_COME_AGAIN = Failure(_OUTAGES, 503, _OUT_OF_REACH, outage=True)
_LOCKED = Failure((cb.DocumentLockedException,), 503, "the document is locked")
_NO_BUCKET = Failure(_BUCKET, 503, _OUT_OF_REACH, f"the bucket is gone: create it again, then {PROVISION}", outage=True)
_NO_SCHEMA = Failure(_UNKNOWN, 500, _SCHEMA, PROVISION)
_NO_INDEX = Failure((cb.QueryIndexNotFoundException,), 500, _SCHEMA, MISSING_INDEX)
_NO_JSON = Failure((cb.ValueFormatException,), 500, "the document is not JSON", "store this document as JSON")
FAILURES = (_NOT_FOUND, _TIMED_OUT, _NO_ACCESS, _COME_AGAIN, _LOCKED, _NO_BUCKET, _NO_SCHEMA, _NO_INDEX, _NO_JSON)
# By the query service's code: indexes or data that are out of reach, and statements whose plan has changed meanwhile.
_BY_CODE = dict.fromkeys((4080, 4090, 12008, 12009, 12015, 12020, *range(14000, 15000)), _COME_AGAIN)
_BY_CODE |= {2120: _NO_ACCESS, 4000: _NO_INDEX, 12003: _NO_SCHEMA, 12021: _NO_SCHEMA}
UNEXPECTED = Failure((), 500, "unexpected failure", "not foreseen: see the error")


def failure_of(error: BaseException) -> Failure:
    """Return the row of the failure map for an exception."""
    if type(error) is cb.DocumentNotFoundException:  # by far the most frequent
        return _NOT_FOUND
    context, timed_out = error_context(error), isinstance(error, _TIMEOUTS)
    code, unauthorized = context.get("first_error_code") or 0, context.get("http_status") == HTTPStatus.UNAUTHORIZED
    # What the SDK has no class of its own for. A retry's reason explains only why there was no other answer.
    outdated = timed_out and "key_value_collection_outdated" in (context.get("retry_reasons") or ())
    scanning = unauthorized and "sequential scans" in str(context.get("first_error_message"))
    again = not timed_out and re.search(r'"retry"\s*:\s*true', str(context.get("http_body")).rpartition('"errors"')[2])
    torn = isinstance(error, cb.ParsingFailedException) and not code  # an answer that is no JSON, or not all of it
    rows = (outdated, _NO_SCHEMA), (scanning, _NO_INDEX), (unauthorized, _NO_ACCESS), (again or torn, _COME_AGAIN)
    row = _BY_CODE.get(code) or next((row for fits, row in rows if fits), None)
    return row or next((row for row in FAILURES if isinstance(error, row.exceptions)), UNEXPECTED)


class ProfileStore:
    """Gets documents and runs queries for handlers, and says what a failure means."""

    def __init__(self, settings: Settings, log: Log, metrics: Metrics) -> None:
        self._log, self.metrics = log, metrics
        self.database = Database(settings)
        self.tokens = Tokens(settings.token_refresh_seconds)
        self.health = Health(self.database, self.tokens, log, metrics)
        self.loader = Loader(self, settings.threads, log)

    @types.coroutine
    def get(self, collection: str, key: str) -> Generator[tuple[Source, str], Document, Document]:
        """Get one document; raises 503 where nobody is to be asked for it."""
        health, replica = self.health, False
        if health.degraded:
            replica = vbucket(key) in health.down
            (health.replica_breaker if replica else health.breaker).admit(time.monotonic())
        return (yield (collection, replica), key)

    @types.coroutine
    def query(self, statement: str, parameters: dict[str, object]) -> Generator[Query, list[bytes], list[bytes]]:
        """Get the rows of a statement, raw JSON each; raises 503 while the breaker is open, or too many wait."""
        if len(self.loader.waiting_queries) >= self.loader.most_queries:
            raise ProblemError(503, "overloaded: too many queries wait", rejected="overloaded")
        self.health.query_breaker.admit(time.monotonic())
        return (yield Query(self.loader, statement, parameters))

    def judge(self, fetched: Fetched) -> None:
        """Judge by what an operation on documents has brought whether Couchbase is well."""
        health, (done, documents, errors) = self.health, fetched
        self.metrics.finished.append(done)
        outages = [key for key, error in errors.items() if failure_of(error).outage] if errors else []
        if documents or len(outages) < len(errors):
            breaker = health.replica_breaker if done.name == "get_any_replica" else health.breaker
            breaker.fetched_at = done.started + done.seconds
            health.answered_at = max(health.answered_at, health.breaker.fetched_at)
            if breaker.failures:
                breaker.succeeded(done.started)
        for key in outages:
            health.failed(key, done)

    def problems(self, done: Operation, errors: Mapping[str, Exception]) -> dict[str, ProblemError]:
        """Say by key what the failures of an operation on documents mean to callers."""
        if done.name == "get_any_replica":  # also for what is not there: the node that would know is down
            return dict.fromkeys(errors, ProblemError(503, _OUT_OF_REACH))
        return {key: self.problem(error, "get") for key, error in errors.items()}

    def problem(self, error: Exception, operation: str) -> ProblemError:
        """Say what a failure of the SDK means to the caller, and tell the operator what to do about it."""
        failure = failure_of(error)
        if failure.status != HTTPStatus.NOT_FOUND:
            level, advice = ("error", {"advice": failure.advice}) if failure.advice else ("warning", {})
            self._log.event(level, "couchbase failure", operation=operation, error=describe(error), **advice)
        return ProblemError(failure.status, failure.detail)


# ── The server ────────────────────────────────────────────────────────────────────────────────────────────────────────
# `main` makes the one there is; connections and handlers find the store, the log and the metrics by it.
class ProfileServer(ThreadingHTTPServer):
    """One event loop serves all clients; threads are the store's pools'. The base classes name the hooks."""

    request_queue_size = 1024

    def __init__(self, settings: Settings, store: ProfileStore, log: Log, metrics: Metrics) -> None:
        """Bind both ports; OSError if one is in use, SettingsError if TLS is not possible. `serve_forever` serves."""
        self.settings, self.store, self.log, self.metrics = settings, store, log, metrics
        self.pictures = Pictures()
        self.tracer: Any = None
        self.processor: Processor | None = None
        self.request_ids = map(f"{os.urandom(6).hex()}-{{:x}}".format, itertools.count(1))  # made by no other process
        self.connections: set[Connection] = set()
        self.idle_seconds, timeout = settings.idle_seconds, f"Keep-Alive: timeout={settings.idle_seconds}\r\n"
        self.kept = {"HTTP/1.1": timeout, "HTTP/1.0": f"Connection: keep-alive\r\n{timeout}"}  # fields, by version
        self.draining = self._is_ready = False
        self.date = http_date(time.time())  # kept by `service_actions`, as to make one takes long
        self.clients, self.failure = 0, ""  # connections but those of the metrics port; what waiting cannot cure
        self.answered: list[ProfileHandler] = []  # in this turn, sent or cut off: still to be counted and logged
        self._stopping = asyncio.Event()
        self.tls: ssl.SSLContext | None = None  # for new clients; None: plain
        self.certificate: dict[str, Any] = {"tls": False}  # for the log
        self.certificate_expires, self._certificate_files = 0.0, list[Any]()  # in s of the epoch; as they were read
        self.renew_certificate()
        family = socket.AF_INET6 if (both := socket.has_dualstack_ipv6()) else socket.AF_INET
        listen = functools.partial(socket.create_server, family=family, dualstack_ipv6=both)
        self.metrics_socket = None if settings.metrics_port is None else listen(("", settings.metrics_port))
        # the base class's own binding has a reverse name look-up, which may hang for seconds
        super().__init__(("", settings.port), ProfileHandler, bind_and_activate=False)
        self.socket.close()
        self.socket = listen(self.server_address)
        self.server_address = self.socket.getsockname()

    def serve_forever(self, poll_interval: float = 1.0) -> None:
        """Serve until drained (`shutdown`, or one of STOP_SIGNALS); look at deadlines every `poll_interval` seconds."""
        with asyncio.Runner(loop_factory=lambda: asyncio.SelectorEventLoop(EndOfTurn(self))) as runner:
            runner.run(self._serve(poll_interval))

    def shutdown(self) -> None:
        """Drain: no new connections, running requests finish, then `serve_forever` returns."""
        self._stopping.set()

    async def _serve(self, poll_interval: float) -> None:
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(self._report)
        for number in STOP_SIGNALS:
            loop.add_signal_handler(number, self.shutdown)
        admit = functools.partial(TlsConnection if self.tls else Connection, self)
        # asyncio accepts `backlog` clients at a time, and as often fails where no descriptor is left
        listening = await loop.create_server(admit, sock=self.socket, backlog=8)
        self.socket.listen(self.request_queue_size)
        if self.metrics_socket:
            await loop.create_server(lambda: Connection(self, internal=True), sock=self.metrics_socket, backlog=8)
        self._keeper = loop.create_task(self._keep_ready())  # the loop itself would forget it; its end cancels it
        while not self._stopping.is_set():
            self.service_actions()
            self.store.loader.singles.shrink()
            with contextlib.suppress(OSError, KeyError):  # the system does not let it move
                if self.processor and self.processor.keep():
                    self.log.event("debug", "moved to another processor", processor=self.processor.pinned)
            try:
                self.renew_certificate()
            except SettingsError as error:
                self.log.event("error", "the certificate was not renewed; the one before stays", error=str(error))
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), poll_interval)
        # now it drains: nobody is let in any more, and all clients get their answers
        started, admitted = time.monotonic(), []
        with contextlib.suppress(OSError):  # none is left
            while True:
                admitted.append(self.socket.accept()[0])  # whoever the kernel has already let in
        listening.close()  # before anyone is told to close: who then comes back must not find this one
        for client in admitted:
            await loop.connect_accepted_socket(admit, client)
        self.draining = True
        self.tell_ready()
        while self.clients and time.monotonic() < started + self.settings.shutdown_seconds:
            for connection in self.connections:
                if connection.state == Connection.READING and not connection.framer.partial:
                    connection.deadline = min(connection.deadline, started + 1.0)  # for one more request
            self.service_actions()
            await asyncio.sleep(0.02)
        for number in STOP_SIGNALS:  # a second one must not kill what is about to end with its own exit code
            loop.remove_signal_handler(number)
            signal.signal(number, signal.SIG_IGN)
        for connection in self.connections:
            connection.close()

    def renew_certificate(self) -> None:
        """Take a certificate that is new for new clients; SettingsError: its files are no use."""
        paths = filter(None, (self.settings.tls_cert, self.settings.tls_key, self.settings.tls_client_ca))
        before, self._certificate_files = self._certificate_files, [None]  # one is gone, which is told once
        with contextlib.suppress(OSError):  # by the file and its time, as kubelet swaps a link to their folder
            self._certificate_files = [(file.st_ino, file.st_mtime_ns) for file in map(os.stat, paths)]
        if self._certificate_files != before:
            self.tls, self.certificate_expires = server_context(self.settings)
            until = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(self.certificate_expires))
            self.certificate = {"tls": True, "certificate_until": until}
            if before:
                self.log.event("info", "certificate renewed", **self.certificate)

    def service_actions(self) -> None:
        """Keep the answers' date, and the connections' deadlines."""
        now, self.date = time.monotonic(), http_date(time.time())
        for connection in self.store.loader.writing:
            if (unsent := connection.transport.get_write_buffer_size()) < connection.unsent:
                connection.unsent, connection.deadline = unsent, now + connection.write_seconds
        for connection in [each for each in self.connections if each.deadline <= now]:
            connection.expire()

    def _report(self, _loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """Log what goes wrong in the event loop, above all: no descriptor is left for a client."""
        message = "cannot accept" if "accept" in context["message"] else "event loop failure"
        error = describe(context["exception"]) if "exception" in context else context["message"]
        self.log.seldom("error", message, error=error, connections=len(self.connections))

    async def _keep_ready(self) -> None:
        """Connect and read the token, again and again until both work; then check now and then whether all is well."""
        health, period = self.store.health, self.store.tokens.period_seconds
        for delay in backoff():
            try:
                await health.start()
                break
            except SettingsError as error:  # which waiting cannot cure
                self.failure = str(error)
                self.log.event("error", "cannot serve", advice=self.failure)
                return self.shutdown()
            except Exception as error:
                why, seconds = {"error": describe(error), "reasons": self.unready_reasons()}, round(delay, 1)
                self.log.event("warning", "Couchbase is not there yet", **why, retry_seconds=seconds)
            await asyncio.sleep(delay)
        while True:
            self.tell_ready()
            await asyncio.sleep(min(health.check_seconds, period) * random.uniform(0.6, 0.9))  # noqa: S311  # no secret
            try:
                await health.check()
            except Exception as error:
                self.log.event("error", "the background check failed", error=describe(error))

    def unready_reasons(self) -> list[str]:
        """Say why requests for data are not welcome; empty means ready."""
        return ["draining"] if self.draining else self.store.health.unready_reasons()

    def tell_ready(self) -> None:
        """Tell the log, once a change, whether this process can serve profiles."""
        reasons = self.unready_reasons()
        if self._is_ready == bool(reasons):
            self._is_ready = not reasons
            self.log.event("warning" if reasons else "info", "not ready" if reasons else "ready", reasons=reasons)

    def scrape(self) -> bytes:
        """Return the metrics."""
        numbers = self.metrics.numbers
        numbers["couchbase_ready",] = not self.unready_reasons()
        for service, state in self.store.health.breaker_states().items():
            numbers["couchbase_breaker_state", service] = Breaker.STATES.index(state)
        numbers["http_connections",] = self.clients
        numbers["tls_certificate_expiry_seconds",] = self.certificate_expires
        numbers["http_requests_in_flight",] = sum(each.state == Connection.ANSWERING for each in self.connections)
        numbers["log_lines_dropped_total",] = self.log.dropped
        return self.metrics.render()


# ── Main: from the command line to the last answer ────────────────────────────────────────────────────────────────────
# Started by the last line of the file, or by a program that has set up tracing.
SPARE_DESCRIPTORS = 64  # for all but the clients: Couchbase, probes, clients that are refused
EXIT_SECONDS = 0.5  # for which the end waits for the collector of traces, the SDK, and the log


def backoff(low: float = 0.2, high: float = 5.0) -> Iterator[float]:
    """Yield seconds to wait between tries: doubling from `low` to `high`, with jitter so that replicas spread out."""
    delay = low
    while True:
        yield delay * random.uniform(0.5, 1.0)  # noqa: S311  # not a secret
        delay = min(high, delay * 2)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the service; return the exit code: 0 after a drain, 1 if it cannot serve, 2 for a bad setting."""
    try:
        settings = read_settings(sys.argv[1:] if argv is None else argv, os.environ)
        hard, wanted = resource.getrlimit(resource.RLIMIT_NOFILE)[1], settings.max_connections
        with contextlib.suppress(ValueError, OSError):  # the system allows less than it says
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        settings = replace(settings, max_connections=min(wanted, max(1, os.sysconf("SC_OPEN_MAX") - SPARE_DESCRIPTORS)))
        processor = Processor(settings)  # before the first thread, as those inherit it
        log, metrics = Log(settings.log_level, access=settings.access_log), Metrics()
        server = ProfileServer(settings, ProfileStore(settings, log, metrics), log, metrics)
    except SettingsError as error:
        print(f"micro_svc_demo: {error}", file=sys.stderr)
        return 2
    except (OSError, RuntimeError) as error:  # a port is in use, which it names; no thread can be started
        print(f"micro_svc_demo: cannot start with this SERVICE_PORT and METRICS_PORT: {error}", file=sys.stderr)
        return 1
    address, port, cluster = *server.server_address[:2], settings.connection_string
    metrics_port = server.metrics_socket.getsockname()[1] if server.metrics_socket else None
    listening = {"address": address, "port": port, "metrics_port": metrics_port, "cluster": cluster}
    listening |= {"bucket": settings.couchbase_bucket, "scope": settings.couchbase_scope, "threads": settings.threads}
    log.event("info", "listening", version=__version__, **listening, **server.certificate)
    server.processor, server.tracer = processor, find_tracer(log)
    if (most := settings.max_connections) < wanted:
        log.event("warning", "MAX_CONNECTIONS is more than the limit of open files (ulimit -n) lets in", clients=most)
    if not settings.couchbase_tls_verify:
        log.event("warning", "Couchbase's certificate is not verified: COUCHBASE_TLS_VERIFY is false")
    if cluster.startswith("couchbase:"):
        log.event("warning", "the connection to Couchbase is not encrypted")
    log.event("debug", "pinned to a processor", processor=processor.pinned)
    gc.set_threshold(20_000)  # not for what a thousand clients keep in flight, as there is hardly any garbage
    server.serve_forever()
    provider = sys.modules["opentelemetry.trace"].get_tracer_provider() if server.tracer else None  # sends what waits
    for call in filter(None, (getattr(provider, "shutdown", None), server.store.database.close)):  # either may block
        closing = threading.Thread(target=call, daemon=True)
        with contextlib.suppress(RuntimeError):  # no thread can be started
            closing.start()
            closing.join(EXIT_SECONDS)
    log.event("info", "stopped")
    log.close(EXIT_SECONDS)
    return 1 if server.failure else 0


# ══ Part two: the engine room ═════════════════════════════════════════════════════════════════════════════════════════

# ── HTTP/1.1 messages (RFC 9112) ──────────────────────────────────────────────────────────────────────────────────────
# Pure: bytes in, heads or problems out. A `Connection` feeds its `Framer` with what it receives.

MAX_TARGET_BYTES, MAX_HEAD_BYTES, MAX_FIELDS, _MOST_REMEMBERED_BYTES = 8192, 16384, 100, 1024
_END_OF_HEAD = b"\r\n\r\n"
_REQUEST_LINE = re.compile(r"([A-Z][A-Z0-9_-]{0,31}) ([!-\"$-~]++) (HTTP/[0-9]\.[0-9])")  # possessive: it is linear
_NAME_TEXT = r"[!#$%&'*+\-.^_`|~0-9A-Za-z]++"
_FIELD = re.compile(rf"^({_NAME_TEXT}):([\t -~\x80-\xff]*+)\r\n", re.MULTILINE)
# Of transfer codings: chunked is the last one, or not among them.
_CODINGS = re.compile(rf"(?:(?!chunked[ \t,]){_NAME_TEXT}[ \t]*,[ \t]*)*{_NAME_TEXT}", re.IGNORECASE)
_COMMON_LINE = re.compile(rb"GET (/[!-\"$-~]{0,%d}+) HTTP/1\.1\r\n" % (MAX_TARGET_BYTES - 1))
_BARE_LINE_END = re.compile(rb"(?<!\r)\n|\r[^\n]")
_AUTHORITY = re.compile(r"(?:\[([0-9A-Fa-f:.]+)\]|(?:[\w.~!$&'()*+,;=-]|%[0-9A-Fa-f]{2})+)(?::[0-9]{0,5})?", re.ASCII)
_ABSOLUTE_FORM = re.compile(r"(?i:https?)://([^/?]+)/?(.*)")
# What can still become a head: clients of other protocols need not wait for the time-out of one.
_BEGINNING = re.compile(rb"(?:\r\n)?(?:[A-Z][A-Z0-9_-]{0,31}(?: |\Z)|\Z)|\r\Z")
# Fields of which a second one would leave it open which of the two counts.
_SINGLE_FIELD = re.compile("authorization|content-length|content-type|expect|host|transfer-encoding|x-access-token")


class Head(NamedTuple):
    """A parsed request head: field names are in lower case, values without the white space around them."""

    method: str
    target: str
    version: str
    fields: dict[str, str]


def is_authority(text: str) -> bool:
    """Tell whether it is a host, a name or an address, with or without a port (RFC 3986, 3.2.2 and 3.2.3)."""
    with contextlib.suppress(ValueError):
        return bool((found := _AUTHORITY.fullmatch(text)) and (not found[1] or ipaddress.IPv6Address(found[1])))
    return False


def parse_head(raw: bytes) -> Head:
    """Parse one whole request head strictly; ProblemError: 400, 414, 417, 431 or 505, and the connection is done."""
    line, _, rest = raw.decode("latin-1").removeprefix("\r\n").partition("\r\n")
    if not (parts := _REQUEST_LINE.fullmatch(line)):
        raise ProblemError(400, "malformed request line, or it ends with a bare CR or LF")
    pairs = [(name.lower(), value.strip(" \t")) for name, value in _FIELD.findall(rest)]
    if len(pairs) != rest.count("\n") - 1 or not raw.endswith(_END_OF_HEAD):
        raise ProblemError(400, "malformed header field: with a control character, say, or with a bare CR or LF")
    method, target, version = parts.groups()
    if version[5] != "1":
        raise ProblemError(505, "the only major version is HTTP/1")
    version = "HTTP/1.0" if version == "HTTP/1.0" else "HTTP/1.1"  # which a later 1.x is read as (RFC 9110, 2.5)
    fields: dict[str, str] = {}
    for name, value in pairs:
        if name not in fields:
            fields[name] = value
        elif not _SINGLE_FIELD.fullmatch(name):
            fields[name] = f"{fields[name]}, {value}"  # RFC 9110, 5.3
        elif name != "content-length" or fields[name] != value:
            raise ProblemError(400, f"more than one {name}")
    if "content_length" in fields or "transfer_encoding" in fields:  # the framing, to gateways that turn - into _ (CGI)
        raise ProblemError(400, "a framing field under a disguised name")
    if len(target) > MAX_TARGET_BYTES:
        raise ProblemError(414, f"the target is longer than {MAX_TARGET_BYTES} bytes")
    if len(pairs) > MAX_FIELDS or len(raw) > MAX_HEAD_BYTES:
        raise ProblemError(431, f"the head has more than {MAX_FIELDS} fields or {MAX_HEAD_BYTES} bytes")
    if ("host" not in fields and version == "HTTP/1.1") or (fields.get("host") and not is_authority(fields["host"])):
        raise ProblemError(400, "missing or malformed Host")
    # the asterisk and the authority form belong to one method each
    if target[0] != "/" and (method, target) != ("OPTIONS", "*") and not (method == "CONNECT" and is_authority(target)):
        if not (absolute := _ABSOLUTE_FORM.fullmatch(target)) or not is_authority(absolute[1]):
            raise ProblemError(400, "the target is neither a path nor an absolute http URL")
        fields["host"], target = absolute[1], f"/{absolute[2]}"  # its authority replaces Host (RFC 9112, 3.2.2)
    if "expect" in fields and version == "HTTP/1.1" and fields["expect"].lower() != "100-continue":
        raise ProblemError(417, "the only expectation that can be met is 100-continue")
    return tuple.__new__(Head, (method, target, version, fields))  # half the time of Head's own


def announces_body(head: Head) -> bool:
    """Tell whether a body follows the head (RFC 9112, 6.3); 400 for framing that could be read in two ways, or 501."""
    length, coding = head.fields.get("content-length"), head.fields.get("transfer-encoding")
    if coding is not None and (length is not None or head.version == "HTTP/1.0" or not _CODINGS.fullmatch(coding)):
        raise ProblemError(400, "malformed Transfer-Encoding, or beside Content-Length, or in HTTP/1.0")
    if coding is not None and coding.lower() != "chunked":
        raise ProblemError(501, "the only transfer coding is chunked")
    if length is not None and not re.fullmatch(r"[0-9]{1,18}", length):
        raise ProblemError(400, "malformed Content-Length")
    return coding is not None or int(length or 0) > 0


class Framer:
    """Cuts a client's bytes into whole request heads. What follows a malformed head, or one with a body, is dropped."""

    def __init__(self) -> None:
        self.inbox, self.refused = bytearray(), False  # what is not returned yet; whether nothing more is taken
        self.refused_head = False  # whether what was refused is a HEAD, as far as it can be told
        self.partial = False  # whether the inbox has more than an empty line, which begins no request yet
        self._scanned = 0  # how much of the inbox is known to hold no end of head
        self._rest, self._parsed = b"", dict[str, str]()  # what came behind the last common line, and its fields

    def feed(self, data: bytes, room: int = 1 << 30) -> list[Head | ProblemError]:
        """Take what was received; return up to `room` whole heads, then what is wrong; however cut, always the same."""
        line = _COMMON_LINE.match(data)  # the common case: one request like the last, but for its target
        if line and self._rest and data[line.end() :] == self._rest and room and not (self.inbox or self.refused):
            return [tuple.__new__(Head, ("GET", line[1].decode("ascii"), "HTTP/1.1", self._parsed))]
        found: list[Head | ProblemError] = []
        if not self.refused:
            self.inbox += data
        try:
            while len(found) < room and not self.refused:
                end = self.inbox.find(_END_OF_HEAD, max(0, self._scanned - 3)) + len(_END_OF_HEAD)
                if not len(_END_OF_HEAD) <= end <= MAX_HEAD_BYTES:
                    end = min(len(self.inbox), MAX_HEAD_BYTES + 1)
                    bare = _BARE_LINE_END.search(self.inbox, max(0, self._scanned - 1), end)
                    if _BEGINNING.match(self.inbox) and not bare:  # else `parse_head` says what is wrong
                        if end > MAX_HEAD_BYTES and self.inbox.find(b"\r\n", 2, end) < 0:
                            raise ProblemError(414, f"the target is longer than {MAX_TARGET_BYTES} bytes")
                        if end > MAX_HEAD_BYTES:
                            raise ProblemError(431, f"the head is longer than {MAX_HEAD_BYTES} bytes")
                        self._scanned = end
                        break
                head = parse_head(raw := bytes(self.inbox[:end]))
                if announces_body(head):
                    self.refuse()
                elif (line := _COMMON_LINE.match(raw)) and len(raw) - line.end() < _MOST_REMEMBERED_BYTES:
                    self._rest, self._parsed = raw[line.end() :], head.fields  # most clients send the same again
                del self.inbox[:end]
                self._scanned = 0
                found.append(head)
        except ProblemError as problem:
            found.append(problem)
            self.refuse()
        self.partial = not b"\r\n".startswith(self.inbox)
        return found

    def refuse(self) -> None:
        """Forget what is buffered and take no more."""
        self.refused_head |= self.inbox.startswith((b"HEAD ", b"\r\nHEAD "))
        self.refused, self.partial, self.inbox = True, False, bytearray()


# ── Connections ───────────────────────────────────────────────────────────────────────────────────────────────────────
# asyncio calls the hooks `connection_made`, `data_received`, `eof_received`, `pause_writing`, `resume_writing` and
# `connection_lost`. One request at a time is answered; what has arrived behind it stays in the framer, and reading
# pauses when that is full.
#
#   state       waits for                          until its deadline        which moves it on
#   READING     the next request, or its rest      IDLE_SECONDS, or 10 s     closed, or answered 408
#   EXCESS      its first bytes: HEAD or not?      the next look             answered 503, as there are too many clients
#   ANSWERING   the store, for the answer          none: the store has its own time-outs
#   WRITING     the client to take its answer      WRITE 30 s                closed, unless more has gone meanwhile
#   LINGERING   the client's end                   LINGER 2 s without a byte closed
#
#   READING --a whole request, or a problem--> ANSWERING --sent--> READING, or after the last answer LINGERING
#                                              ANSWERING --sent in part--> WRITING --the rest is sent--> the same
#   The client's end closes READING and LINGERING at once, the others after the answers that are under way.


class EndOfTurn(selectors.DefaultSelector):
    """The event loop's selector: asked at the end of each turn, it has documents fetched and answers logged first."""

    gather_seconds = 0.001  # at most, for which more is read before documents are fetched

    def __init__(self, server: ProfileServer) -> None:
        super().__init__()
        self._server, self._until = server, 0.0  # when what waits is fetched whatever comes; monotonic seconds
        self._receiver, server.store.loader.sender = os.pipe()
        self._handed_back = self.register(self._receiver, selectors.EVENT_READ), selectors.EVENT_READ

    def _events(self, timeout: float | None) -> Any:
        """Return asyncio's next events; what threads have handed back is taken at once, not in a turn of its own."""
        events = super().select(timeout)
        if self._handed_back in events:
            events.remove(self._handed_back)
            self._server.store.loader.take_back()  # before the byte is read: answers go out sooner
            os.read(self._receiver, 4096)  # it does not block
            self._server.store.loader.take_back()  # those whose byte this has been
        return events

    def select(self, timeout: float | None = None) -> Any:
        """Return the next events."""
        server, loader = self._server, self._server.store.loader
        before = len(server.answered)
        if server.clients > 1 and (loader.waiting or loader.waiting_queries):
            # the larger a batch, the cheaper a key: whoever has come meanwhile is read first
            self._until = self._until or time.monotonic() + self.gather_seconds
            if time.monotonic() < self._until and (events := self._events(0)):
                return events
            self._until = 0.0
        if loader.waiting or loader.waiting_queries or loader.running:
            loader.dispatch()
            timeout = min(loader.look_seconds, loader.look_seconds if timeout is None else timeout)
        if len(server.answered) > before:  # who has been refused may have more requests
            timeout = 0
        if server.answered:
            handlers, server.answered = server.answered, []
            for handler in handlers if server.settings.trusted_proxies else ():
                handler.client = client_behind(server.settings.trusted_proxies, handler.client, handler.headers)
            server.metrics.answers(handlers)
            if server.log.access:
                server.log.requests(handlers)
            for handler in handlers if server.tracer else ():
                record_spans(server.tracer, handler)
        return self._events(timeout)


class Connection(asyncio.Protocol):
    """A client: bytes in, one request at a time, bytes out."""

    READING, EXCESS, ANSWERING, WRITING, LINGERING, CLOSED = range(6)
    head_seconds, write_seconds, linger_seconds = 10.0, 30.0, 2.0
    receive_bytes = 16_384  # at a time
    buffered_bytes = 32_768  # behind the request that is being answered; then reading pauses
    transport: Any  # asyncio's
    encrypted: Callable[[bytes], bytes] | None = None  # what is sent, in TLS

    def __init__(self, server: ProfileServer, *, internal: bool = False) -> None:  # internal: by the metrics port
        self.server, self.internal, self.framer = server, internal, Framer()
        self.state, self.deadline = self.READING, time.monotonic() + self.server.idle_seconds
        self.handler: ProfileHandler | None = None  # whose answer the client still takes
        self.ended, self.unsent = False, 0  # the client has sent its last byte; bytes of the answer, at the last look
        self.last, self.client_cert = False, ""  # whether nothing follows what is being written; for the log

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Let the client in, unless there are too many."""
        self.transport, server = transport, self.server
        self.transport.max_size = self.receive_bytes
        self.transport.set_write_buffer_limits(high=0)  # `pause_writing` means: not all of the answer is sent
        peer = transport.get_extra_info("peername")
        self.address = peer[0].removeprefix("::ffff:").partition("%")[0] if peer else ""  # it may be gone already
        server.connections.add(self)
        server.clients += not self.internal
        if server.clients > (most := server.settings.max_connections) and not self.internal:
            self.state, self.deadline = self.EXCESS, 0.0
            if server.clients > most + SPARE_DESCRIPTORS // 8:  # the others take no descriptor for longer
                self.eof_received()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the client; what the store still brings for it is thrown away."""
        self.state, self.deadline = self.CLOSED, math.inf
        self._written(self.unsent)
        self.server.connections.discard(self)
        self.server.clients -= not self.internal

    def data_received(self, data: bytes) -> None:
        """Begin to answer if a request is whole now and none is being answered."""
        if self.state == self.READING:
            self._next(data)
        elif self.state == self.LINGERING:
            self.deadline = min(time.monotonic() + self.linger_seconds, self.end_at)
        else:
            self.framer.feed(data, 0)
            if self.state == self.EXCESS:
                self.expire()
            if len(self.framer.inbox) > self.buffered_bytes:
                self.transport.pause_reading()

    def eof_received(self) -> bool:
        """Take note of the client's end: answers under way it still gets (half-closed)."""
        self.ended = True
        if self.state not in {self.ANSWERING, self.WRITING}:
            self.expire()
        return True  # asyncio is not to close

    def pause_writing(self) -> None:
        """Take note that the client does not take all of its answer at once."""
        self.state, self.deadline = self.WRITING, time.monotonic() + self.write_seconds
        self.unsent = self.transport.get_write_buffer_size()
        self.server.store.loader.writing.add(self)

    def _written(self, unsent: int) -> None:
        """Have an answer that was not sent at once counted and logged; `unsent` bytes of it are cut off."""
        self.server.store.loader.writing.discard(self)
        if handler := self.handler:
            if unsent:
                handler.response, handler.cut_off = handler.response[:-unsent], CUT_OFF
            self.server.answered.append(handler)
            self.handler = None

    def expire(self) -> None:
        """End a state that has lasted long enough, or that waits for more from a client that has ended."""
        if self.state == self.EXCESS:
            self._next(problem=ProblemError(503, "too many connections", rejected="overloaded"))
        elif self.state != self.READING or not self.framer.partial:
            self.close()
        elif self.ended:
            self._next(problem=ProblemError(400, "the request ended before it was whole"))
        else:
            self._next(problem=ProblemError(408, f"the request was not whole within {self.head_seconds:.0f} s"))

    def close(self) -> None:
        """Close at once; what the client has not taken by now is cut off."""
        self.unsent = self.transport.get_write_buffer_size()
        self._notify()
        (self.transport.abort if self.unsent else self.transport.close)()

    def _notify(self) -> None:
        """Say, before TCP does, that nothing more comes: for TLS, which has a word for it."""

    def _next(self, data: bytes = b"", problem: ProblemError | None = None) -> None:
        """Begin to answer a problem, or the next request if it is whole; else wait for its rest, or for another."""
        if self.state == self.CLOSED:
            return
        begun, self.state = self.framer.partial and self.state == self.READING, self.READING
        if problem:
            self.framer.refuse()
        if requests := [problem] if problem else self.framer.feed(data, 1):
            self.state, self.deadline = self.ANSWERING, math.inf
            handler = ProfileHandler(requests[0], self, self.server)
            if handler.resume():
                self.reply(handler)
        elif self.ended:
            self.expire()
        elif not begun:
            self.deadline = time.monotonic() + (self.head_seconds if self.framer.partial else self.server.idle_seconds)
            self.transport.resume_reading()

    def reply(self, handler: ProfileHandler) -> None:
        """Send an answer."""
        self.handler, self.last = handler, handler.close_connection
        if self.state == self.CLOSED:
            self._written(len(handler.response))
            return
        self.transport.write(self.encrypted(handler.response) if self.encrypted else handler.response)
        if self.state == self.WRITING:
            return
        if self.last or self.framer.inbox or self.ended:
            self.resume_writing()
        else:
            self.handler = None
            self.server.answered.append(handler)
            self.state, self.deadline = self.READING, time.monotonic() + self.server.idle_seconds

    def resume_writing(self) -> None:
        """Go on after an answer: with the next request, or close in two steps (RFC 9112, 9.6)."""
        self._written(0)
        if not self.last:  # not at once, as each of a thousand pipelined requests would be a call deeper
            self.state, self.deadline = self.ANSWERING, math.inf
            asyncio.get_running_loop().call_soon(self._next)
        elif self.ended:
            self.close()
        else:
            self._notify()
            self.state, self.deadline = self.LINGERING, time.monotonic() + self.linger_seconds
            self.end_at = time.monotonic() + self.write_seconds
            with contextlib.suppress(OSError):  # the client has gone
                self.transport.write_eof()
            self.transport.resume_reading()


# ── TLS ───────────────────────────────────────────────────────────────────────────────────────────────────────────────
# Not asyncio's own, in which a client's end cuts off the answers under way, what waits in the socket's transport counts
# as sent, and each connection has a buffer of 256 KiB (3.11 to 3.13). Here flow control and both ends are as in plain.
_PLAIN_HTTP = b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\nContent-Type: text/plain\r\n\r\nspeak HTTPS here\n"


class TlsConnection(Connection):
    """A client that speaks TLS, which is done in memory (`ssl.MemoryBIO`)."""

    def __init__(self, server: ProfileServer) -> None:
        super().__init__(server)
        self.deadline = time.monotonic() + self.head_seconds  # of the handshake
        self._open = self._ended = False  # after the handshake; our own end is sent
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.tls = cast("Any", server.tls).wrap_bio(self._incoming, self._outgoing, server_side=True)

    def data_received(self, data: bytes) -> None:
        """Shake hands, then decrypt and pass on."""
        plain, at_end = b"", False
        if self._ended:  # what it says is of no interest any more, only that it does
            return super().data_received(data)
        self._incoming.write(data)
        try:
            if not self._open:
                self.tls.do_handshake()
                self._open = True
                self.deadline += self.server.idle_seconds - self.head_seconds
                if certificate := self.tls.getpeercert():
                    names = dict(pair for part in certificate["subject"] for pair in part)
                    self.client_cert = f', "client_cert": {json.dumps(names.get("commonName", "-")[:64])}'
            while not at_end and (self._incoming.pending or self.tls.pending()):
                plain += (part := self.tls.read(self.receive_bytes))
                at_end = not part  # the client's own word for its end
        except ssl.SSLWantReadError:  # a record, or the handshake, is not whole
            pass
        except ssl.SSLError as error:
            self.server.metrics.numbers["http_rejected_total", "tls"] += 1
            self.server.log.event("debug", "TLS failed", error=describe(error), client=self.address)
            self.transport.write(_PLAIN_HTTP if error.reason == "HTTP_REQUEST" else self._outgoing.read())  # an alert
            return cast("None", self.transport.close())
        if self._outgoing.pending:  # of the handshake
            self.transport.write(self._outgoing.read())
        if plain:
            super().data_received(plain)
        if at_end:
            self.eof_received()
        return None

    def encrypted(self, data: bytes) -> bytes:
        """Return an answer as it is sent; where that is not possible, close."""
        rest, parts = memoryview(data), []
        try:
            while rest:
                rest = rest[self.tls.write(rest) :]  # a record: more than one would stay allocated
                parts.append(self._outgoing.read())
        except ssl.SSLError:  # to one client too many, before its handshake; or it has failed meanwhile
            self.pause_writing()
            self.unsent = len(rest)
            self.transport.abort()
        return b"".join(parts)

    def _notify(self) -> None:
        if not self._ended:
            self._ended = True
            with contextlib.suppress(ssl.SSLError):  # the client's own word is not there yet
                self.tls.unwrap()
            self.transport.write(self._outgoing.read())


def server_context(settings: Settings) -> tuple[ssl.SSLContext, float]:
    """Return what speaks TLS, and until when its certificate is valid (in s of the epoch); SettingsError: no use."""
    cert, what = cast("str", settings.tls_cert), "SERVICE_TLS_CERT, SERVICE_TLS_KEY"
    try:
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.set_alpn_protocols(["http/1.1"])
        context.load_cert_chain(cert, settings.tls_key, "")  # else it would ask the terminal for a passphrase
        # a client that trusts this certificate finds out whether it is valid, and until when
        client, to_server, to_client = ssl.create_default_context(cafile=cert), ssl.MemoryBIO(), ssl.MemoryBIO()
        client.check_hostname, client.verify_flags = False, ssl.VERIFY_X509_PARTIAL_CHAIN
        seen = client.wrap_bio(to_client, to_server)
        for side in [seen, context.wrap_bio(to_server, to_client, server_side=True)] * 2:
            with contextlib.suppress(ssl.SSLWantReadError):
                side.do_handshake()
        if settings.tls_client_ca:
            what, context.verify_mode = "SERVICE_TLS_CLIENT_CA", ssl.CERT_REQUIRED
            context.load_verify_locations(settings.tls_client_ca)
        return context, ssl.cert_time_to_seconds(cast("Any", seen.getpeercert())["notAfter"])
    except OSError as error:
        allowed = "PEM files with a certificate that is valid now and its key, without a passphrase"
        raise SettingsError(f"{what}: {error}; allowed: {allowed}") from error


# ── Parts of requests and answers ─────────────────────────────────────────────────────────────────────────────────────
# Pure functions of the handler's.

DEFAULT_LIMIT, MAX_LIMIT, MAX_OFFSET = 100, 1000, 1_000_000_000
_FORWARDED = re.compile(r"([0-9.]+)(?::[0-9]+)?|\[([0-9A-Fa-f:.]+)\](?::[0-9]+)?|([0-9A-Fa-f:.]+)")
_PICTURE_TYPE = re.compile(r"\s*(?:[Ii][Mm][Aa][Gg][Ee]/)?([A-Za-z0-9][A-Za-z0-9.+-]{0,31})\s*")
_BASE64 = bytes.maketrans(b"-_", b"+/")  # the letters that are safe in URLs to the others


def decode_segment(segment: str) -> str:
    """Percent-decode a path parameter as strict UTF-8 (RFC 3986, 2.1); ProblemError: 404 if empty, 400 if malformed."""
    if not segment:
        raise ProblemError(404, "no such route")
    if re.search("%(?![0-9A-Fa-f]{2})", segment):
        raise ProblemError(400, "malformed percent-encoding")
    if re.search("%(?:[01]|7[Ff])", segment):
        raise ProblemError(400, "control characters are not allowed")
    try:
        return unquote(segment, errors="strict")
    except UnicodeDecodeError:
        raise ProblemError(400, "the percent-encoded bytes are not UTF-8") from None


def parse_page(query: str) -> tuple[int, int]:
    """Return `limit` and `offset` of a query string; 400 if one is repeated, no decimal number or out of range."""
    values: dict[str, int] = {}
    for name, _, text in (part.partition("=") for part in query.split("&")):
        if name in {"limit", "offset"}:
            low, high = (1, MAX_LIMIT) if name == "limit" else (0, MAX_OFFSET)
            if name in values or not re.fullmatch(r"[0-9]{1,10}", text) or not low <= int(text) <= high:
                raise ProblemError(400, f"{name} must be one number from {low} to {high}")
            values[name] = int(text)
    return values.get("limit", DEFAULT_LIMIT), values.get("offset", 0)


def _names_tag(given: str, *tags: str) -> bool:
    """Tell whether If-Match or If-None-Match names one of the tags (RFC 9110, 13.1): by weak comparison also W/…."""
    return given == "*" or any(item.strip() in tags for item in given.split(","))


def decode_picture(record: bytes) -> tuple[str, bytes]:
    """Return the media type and the bytes of the picture in a record; ProblemError: 422 if there is none."""
    members, image = {}, b""
    with contextlib.suppress(ValueError, TypeError, RecursionError):
        members = dict(json.loads(record))
    kind, text = (value if isinstance(value := members.get(name), str) else "" for name in ("type", "image"))
    media_type, text = _PICTURE_TYPE.fullmatch(kind), text.lstrip()
    if text[:5].lower() == "data:":
        text = text.partition(";base64,")[2]
    with contextlib.suppress(ValueError):
        encoded = text.encode().translate(_BASE64, b" \t\r\n\v\f").rstrip(b"=")
        image = base64.b64decode(encoded + b"=" * (-len(encoded) % 4), validate=True)
    if not media_type or not image:
        unusable = [name for name, found in (("type", media_type), ("image", image)) if not found]
        raise ProblemError(422, f"the picture record has no usable {' and no usable '.join(unusable)}")
    return f"image/{media_type[1].lower()}", image


def client_behind(trusted: Sequence[Network], peer: str, headers: Mapping[str, str]) -> str:
    """Return the client's address: of the peer and X-Forwarded-For the first, from the right, that is not trusted."""
    with contextlib.suppress(ValueError):
        for entry in reversed(headers.get("x-forwarded-for", "").split(",")):
            address = ipaddress.ip_address(peer)
            found = _FORWARDED.fullmatch(entry.strip())  # what is no address, or has a zone, ends the search
            if not found or not any(address in network for network in trusted):
                break
            address = ipaddress.ip_address(found[found.lastindex or 0])
            peer = str(getattr(address, "ipv4_mapped", None) or address)
    return peer


# ── The data loader and the pools ─────────────────────────────────────────────────────────────────────────────────────
# The store yields a `Query`, or a document's source and key, and `ProfileHandler.resume` gives it to the `Loader`,
# which at the end of each turn of the event loop makes one `Batch` of the documents that wait (hence a data loader),
# and gives batches and queries to the threads of their pools. A thread does a job's `call` and hands back what came of
# it; in the loop `finish` takes it, and resumes the handlers.

Source: TypeAlias = tuple[str, bool]  # the collection, and whether replicas are asked
Wanted: TypeAlias = "tuple[Source, str] | Query"  # a document by its source and key, or rows
Waiting: TypeAlias = dict[str, list["ProfileHandler"]]  # for documents, by key
Jobs: TypeAlias = "queue.SimpleQueue[Batch | Query | None]"  # the way to a thread; None ends it


class Pool:
    """Threads that do one job each, started as they are needed, up to a bound; what it holds is the event loop's."""

    def __init__(self, most: int, log: Log) -> None:
        self.free, self._log = most, log  # free: for so many jobs, now
        self.idle: list[Jobs] = []  # threads, the last to go idle last

    def run(self, job: Batch | Query) -> None:
        """Have a job done; it is refused if the system starts no thread for it."""
        if self.idle:
            jobs = self.idle.pop()  # the last one, as its caches are warm
        else:
            jobs = queue.SimpleQueue()
            try:  # not a `threading.Thread`: to start one waits until it runs, and the event loop has no time for that
                _thread.start_new_thread(self._work, (jobs,))
            except RuntimeError as error:
                self._log.seldom("error", "no thread can be started", error=describe(error))
                return job.finish(ProblemError(503, "overloaded: no thread can be started", rejected="overloaded"))
        self.free -= 1
        return jobs.put(job)

    def _work(self, jobs: Jobs) -> None:
        while job := jobs.get():
            try:
                outcome: Any = job.call()
            except Exception as error:
                outcome = error
            job.loader.hand_back(self, jobs, job, outcome)

    def shrink(self) -> None:
        """End every other idle thread."""
        for jobs in self.idle[::2]:
            self.idle.remove(jobs)
            jobs.put(None)


class Query:
    """Rows that are wanted, and the job that brings them."""

    handler: ProfileHandler
    given_up, started = False, 0.0  # by the loader; monotonic seconds

    def __init__(self, loader: Loader, statement: str, parameters: dict[str, object]) -> None:
        self.loader, self._statement, self._parameters = loader, statement, parameters

    def call(self) -> list[bytes]:
        """Run the statement."""
        database, adhoc = self.loader.store.database, self.started < self.loader.adhoc_until
        seconds = database.query_timeout_seconds - self.handler.queue_seconds
        return database.run_query(self._statement, self._parameters, seconds, adhoc=adhoc)

    def finish(self, outcome: list[bytes] | Exception) -> None:
        """Answer with what came of it, and judge by it whether the query service is well."""
        store, now, breaker = self.loader.store, time.monotonic(), self.loader.store.health.query_breaker
        self.loader.running.discard(self)
        if not isinstance(outcome, ProblemError):  # else nothing has been asked for
            failure = failure_of(outcome) if isinstance(outcome, Exception) else None
            if failure and failure.outage:
                breaker.failed(self.started, now)
            else:
                breaker.succeeded(self.started)
            name = failure.outcome if failure else "ok"
            self.handler.operation = Operation("query", self._statement, self.started, now - self.started, name)
            store.metrics.finished.append(self.handler.operation)
            outcome = store.problem(outcome, "query") if isinstance(outcome, Exception) else outcome
        if self.handler.resume(outcome):
            self.handler.connection.reply(self.handler)


class Batch:
    """Documents of one collection that are fetched in one operation."""

    given_up = False

    def __init__(self, loader: Loader, source: Source, waiting: Waiting, now: float, held_bytes: int = 0) -> None:
        self.loader, self.waiting, self._started, self._bytes, keys = loader, waiting, now, held_bytes, list(waiting)
        database, waited = loader.store.database, now - waiting[keys[0]][0].started  # none has waited for longer
        seconds = max(0.01, database.timeout_seconds - waited) if waited > Loader.slack_seconds else 0.0
        self.call = functools.partial(database.fetch, source[0], keys, seconds, replica=source[1])

    def finish(self, outcome: Any) -> None:
        """Answer whoever waits; all answers are made before the first is sent: that wakes receivers up less often."""
        loader, answered = self.loader, []
        done, documents, errors = outcome if isinstance(outcome, tuple) else (None, {}, {})
        found = documents | loader.store.problems(done, errors) if errors else documents
        loader.fetching_bytes -= self._bytes
        for key, handlers in self.waiting.items():
            for handler in handlers:
                handler.operation, handler.queue_seconds = done, self._started - handler.started
                if handler.resume(found.get(key, outcome)):
                    answered.append(handler)
        for handler in answered:
            handler.connection.reply(handler)
        if done:  # now, as nobody waits for what follows
            loader.store.judge(outcome)
        if documents:
            size = len(next(iter(documents.values())).value)
            loader.sizes[done.target] += (size - loader.sizes[done.target]) // 4


class Loader:
    """Has documents and rows fetched by threads; what waits for one is bounded, and waits for a bounded time."""

    threads, batch_size, single_threads = 3, 128, 64  # for 256 clients, 5 ms away (tests/load/results)
    most_bytes = 16 << 20  # of large documents that are fetched and not sent yet: a pod has 256 MiB
    sending_seconds = 2.5  # for which an answer counts of which the client takes nothing: it must not stop others
    stall_seconds = 0.25  # with all threads busy and none back, something may be wrong
    slack_seconds = 0.02  # a request that has waited for longer has so much less time for Couchbase
    most_queries, query_wait_seconds = 1024, 0.25  # that wait for a thread, and for how long
    look_seconds, grace_seconds = 0.025, 0.03  # between two looks; a query that the SDK holds for longer is given up

    def __init__(self, store: ProfileStore, query_threads: int, log: Log) -> None:
        self.store, self._log = store, log
        self._dispatched_at = self.adhoc_until = 0.0  # monotonic seconds; until the latter, statements go unprepared
        self.waiting: dict[Source, Waiting] = {}  # in the order of asking
        self.sizes = {USERS: 0, IMAGES: 6 << 20}  # of a collection's documents lately: a mean; at first a guess
        self.fetching_bytes, self.writing = 0, set[Connection]()  # of large documents; who has an answer half sent
        self.waiting_queries, self.running = deque[Query](), set[Query]()
        self._queries, self._batches = Pool(query_threads, log), Pool(self.threads, log)  # apart: a bulkhead
        self.singles = Pool(self.single_threads, log)  # while degraded, for one document each
        self._ended, self.sender = deque[tuple[Pool, Jobs, Batch | Query, Any]](), -1  # handed back; wakes the loop

    def hand_back(self, *ended: Any) -> None:
        """Hand over to the event loop what came of a job: called by its thread."""
        self._ended.append(ended)
        os.write(self.sender, b"\0")  # a byte a job: that takes half of what `call_soon_threadsafe` does

    def take_back(self) -> None:
        """Take what came of jobs, and their threads for the next ones."""
        while self._ended:
            pool, jobs, job, outcome = self._ended.popleft()
            if job.given_up:  # another thread has taken this one's place
                jobs.put(None)
                continue
            pool.free += 1
            pool.idle.append(jobs)
            try:
                job.finish(outcome)
            except Exception as error:
                self._log.event("error", "event loop failure", error=describe(error))

    def load(self, handler: ProfileHandler, wanted: Wanted) -> None:
        """Have fetched what a handler waits for."""
        if isinstance(wanted, Query):
            wanted.handler = handler
            self.waiting_queries.append(wanted)
        else:
            waiting = self.waiting.setdefault(wanted[0], {})
            waiting.setdefault(wanted[1], []).append(handler)
            if len(waiting) == self.batch_size:
                self.dispatch()

    def _give_up(self, now: float) -> None:
        """Refuse or answer those for whom what they wait for may not come."""
        waiting = self.waiting_queries
        while waiting and now - waiting[0].handler.started > self.query_wait_seconds:
            waiting.popleft().finish(ProblemError(503, "overloaded: no query thread is free", rejected="overloaded"))
        latest = now - self.store.database.query_timeout_seconds - self.grace_seconds
        for query in [query for query in self.running if query.handler.started < latest]:
            # The SDK (4.3 to 4.6) never gives it back when the server has forgotten a prepared statement (4040): it
            # prepares it again and loses the rows, the thread and the connection. So for a minute none is prepared.
            query.given_up, self.adhoc_until = True, now + 60.0
            self._queries.free += 1
            self._log.event("error", "a query is overdue; its worker is given up", route=query.handler.route)
            query.finish(cb.TimeoutException("the SDK does not give it back"))

    def _fetch(self, pool: Pool, source: Source, keys: Collection[str], now: float) -> bool:
        """Have a collection's documents fetched, of large ones what the bound allows; tell whether any is."""
        waiting, size = self.waiting[source], self.sizes[source[0]]
        taken: Waiting = {}
        if size * self.batch_size * self.threads <= self.most_bytes:
            every = len(keys) == len(waiting)
            taken = self.waiting.pop(source) if every else {key: waiting.pop(key) for key in keys}
            pool.run(Batch(self, source, taken, now))
            return True
        sending = [each for each in self.writing if each.deadline - each.write_seconds > now - self.sending_seconds]
        held = self.fetching_bytes + sum(each.transport.get_write_buffer_size() for each in sending)
        room = max((self.most_bytes - held) // size, not held)
        answers = [*itertools.islice((key for key in keys for _ in waiting[key]), room)]
        for key in answers:
            taken.setdefault(key, []).append(waiting[key].pop(0))
            if not waiting[key]:
                del waiting[key]
        if not waiting:
            del self.waiting[source]
        if answers:
            self.fetching_bytes += size * len(answers)
            pool.run(Batch(self, source, taken, now, size * len(answers)))
        return bool(answers)

    def _refuse(self, source: Source, keys: list[str], now: float) -> None:
        """Refuse those who asked for documents so long ago that no caller would wait for them."""
        waiting = self.waiting[source]
        late = {key: waiting.pop(key) for key in keys}
        if not waiting:
            del self.waiting[source]
        Batch(self, source, late, now).finish(ProblemError(503, "overloaded: no thread is free", rejected="overloaded"))

    def dispatch(self) -> None:
        """Give what waits to threads, as far as they are free (else batches grow); collections take turns."""
        now = time.monotonic()
        if self.running or self.waiting_queries:
            self._give_up(now)
        latest = now - self.store.database.timeout_seconds
        for source, keys in [*self.waiting.items()]:
            if next(iter(keys.values()))[0].started < latest:
                self._refuse(source, [key for key, handlers in keys.items() if handlers[0].started < latest], now)
        if self.waiting and not self._batches.free and now - self._dispatched_at > self.stall_seconds:
            self.store.health.degrade(1.0)
        degraded, slow, turns = self.store.health.degraded, self.store.health.slow, [*self.waiting]
        while turns and self._batches.free and not degraded:
            source, self._dispatched_at = turns.pop(0), now
            few = [*itertools.islice(self.waiting[source], 1 if source[1] else self.batch_size)]
            if self._fetch(self._batches, source, few, now) and source in self.waiting:
                self.waiting[source] = self.waiting.pop(source)  # it comes behind the others
                turns.append(source)
        if degraded and slow is not None:
            for source, keys in [*self.waiting.items()]:
                for key in [*itertools.islice(keys, self.single_threads)]:
                    apart = vbucket(key) in slow and not source[1]
                    if keys[key][0].started < latest:
                        self._refuse(source, [key], now)
                    elif self.singles.free > self.single_threads // 2 * apart:  # what is slow takes half at most
                        self._fetch(self.singles, source, [key], now)
                    elif apart:  # others are looked at first the next time
                        keys[key] = keys.pop(key)
        while self.waiting_queries and self._queries.free:
            query = self.waiting_queries.popleft()
            query.started, query.handler.queue_seconds = now, now - query.handler.started
            self.running.add(query)
            self._queries.run(query)


# ── Couchbase: what other threads do ──────────────────────────────────────────────────────────────────────────────────
# The pools' threads, and the two of `Health`, make these calls; nothing here knows of requests or of the event loop.
class _AsBytes(RawJSONTranscoder):  # type: ignore[misc]  # the SDK's class is untyped
    """Passes documents and query rows through as the bytes they are: those count, not what a document's flags say."""

    decode_value = staticmethod(lambda value, _flags: value)
    serialize = deserialize = bytes  # of rows; the SDK serializes nothing by it


class Database:
    """The SDK, connected to one scope of one bucket; each method is a blocking call or a few, which threads make."""

    probe_seconds = 0.25  # a time-out: a probe can only find out sooner what requests' time-outs would

    def __init__(self, settings: Settings) -> None:
        self._settings, self.scope_name, self.connected = settings, settings.couchbase_scope, False
        self._cluster = self._scope = cast("Any", None)
        self._collections: dict[str, Any] = {}
        self.timeout_seconds = settings.couchbase_timeout_ms / 1000
        self.query_timeout_seconds = settings.couchbase_query_timeout_ms / 1000

    def fetch(self, collection: str, keys: list[str], seconds: float = 0.0, *, replica: bool = False) -> Fetched:
        """Get documents by one hand-over to the SDK (0 `seconds` spare a time-out's cost), or one's replica."""
        name = "get_any_replica" if replica else "get" if len(keys) == 1 else "get_multi"
        many, seconds = name == "get_multi", self.probe_seconds if replica else seconds
        options = {"timeout": timedelta(seconds=seconds)} if seconds else {}
        documents, outcome = dict[str, Document](), "ok"
        started, ask = time.monotonic(), getattr(self._collections[collection], name)
        try:
            answer = ask(keys if many else keys[0], **options)
            results = answer.results if many else {keys[0]: answer}
            errors = answer.exceptions if many and not answer.all_ok else {}
        except Exception as error:
            results, errors = {}, dict.fromkeys(keys, error)
        for key, result in results.items():  # `tuple.__new__` takes half the time of Document's own
            value = result.value
            simple = value.rfind(b"{") == 0 and value.find(b"}") == len(value) - 1  # one pair of braces: taken as it is
            try:
                if not simple and not isinstance(json.loads(value.decode()), dict):
                    raise ValueError("no object")
                documents[key] = tuple.__new__(Document, (value, result.cas, replica and result.is_replica))
            except (ValueError, RecursionError):
                errors[key] = cb.ValueFormatException("no JSON object")
        if errors:
            outcomes = {row.outcome for row in set(map(failure_of, errors.values()))}
            outcome = min(outcomes - {"not_found"} if many else outcomes, default="ok")  # a part may well be missing
        return Operation(name, collection, started, time.monotonic() - started, outcome, len(keys)), documents, errors

    def run_query(self, statement: str, parameters: dict[str, object], seconds: float, *, adhoc: bool) -> list[bytes]:
        """Return a read-only statement's rows as raw JSON; `adhoc` leaves it unprepared; raises what the SDK raises."""
        options = dict(read_only=True, serializer=_AsBytes(), adhoc=adhoc, named_parameters=parameters)
        timeout = timedelta(seconds=max(0.01, seconds))
        return list(self._scope.query(statement, cbo.QueryOptions(timeout=timeout, **options)))

    def fetch_token(self) -> str:
        """Return the service's token; NoTokenError if it answers that there is none, else what the SDK raises."""
        try:
            found = self._collections[AUTH].lookup_in(TOKEN_KEY, [path_get(TOKEN_PATH)])
            token = json.loads(found.content_as[bytes](0))
        except cb.DocumentNotFoundException as error:
            raise NoTokenError(f"the token document {TOKEN_KEY!r} does not exist in {AUTH!r}: {PROVISION}") from error
        except (cb.PathNotFoundException, cb.PathMismatchException, cb.DocumentNotJsonException) as error:
            raise NoTokenError(f"the token document {TOKEN_KEY!r} has no field {TOKEN_PATH!r}: {PROVISION}") from error
        if not isinstance(token, str) or not re.fullmatch(r"[!-~]{1,4096}", token):
            raise NoTokenError(f"the token in {TOKEN_KEY!r} is not 1 to 4096 visible ASCII characters: {PROVISION}")
        return token

    def probe(self, vbuckets: Collection[int], seconds: float) -> set[int]:
        """Ask for a document that does not exist in each vBucket, as requests ask; return those that were answered."""
        keys, timeout = {probe_keys()[number]: number for number in vbuckets}, timedelta(seconds=seconds)
        answer = self._collections[USERS].get_multi(list(keys), timeout=timeout)
        return {keys[key] for key, error in answer.exceptions.items() if not failure_of(error).outage}

    def connect(self) -> None:
        """Open the cluster and the bucket, within about 20 s; SettingsError for wrong credentials or no such bucket."""
        settings = self._settings
        user, bucket, doubt = settings.couchbase_user, settings.couchbase_bucket, check_certificates(settings)
        doubtful = _TIMEOUTS if doubt else ()
        try:
            cluster = open_cluster(settings)
        except cb.InvalidArgumentException as error:
            raise SettingsError(f"the SDK refuses COUCHBASE_HOST or its options: {describe(error)}") from error
        except cb.AuthenticationException as error:
            raise SettingsError(f"Couchbase refuses user {user!r}: check {settings.credentials}") from error
        except doubtful as error:
            raise SettingsError(doubt) from error
        try:
            self._scope = cluster.bucket(bucket).scope(settings.couchbase_scope)
        except cb.CouchbaseException as error:
            answer = error
            try:  # on the wire a bucket that is missing may look like one that is slow
                with contextlib.closing(cluster):
                    cluster.buckets().get_bucket(bucket)
            except cb.CouchbaseException as failure:
                answer = failure
            missing = f"bucket {bucket!r} does not exist"
            if isinstance(answer, cb.BucketDoesNotExistException):
                raise SettingsError(f"{missing}: create it, or correct COUCHBASE_BUCKET (then {PROVISION})") from error
            if isinstance(answer, cb.AuthenticationException) or isinstance(error, cb.BucketNotFoundException):
                roles = "check COUCHBASE_BUCKET, COUCHBASE_PASSWORD and the user's roles"  # the server refuses at once
                raise SettingsError(f"{missing}, or the user has no role for it: {roles}") from error
            raise  # it was not allowed to ask, or nobody was there: the first failure stands
        self._collections = {name: self._scope.collection(name) for name in (USERS, IMAGES, AUTH)}
        self._cluster, self.connected = cluster, True

    def renew_password(self) -> bool:
        """Take a password that has been changed from its file again; return whether there is one."""
        before = self._settings
        with contextlib.suppress(SettingsError):
            self._settings = _with_password(replace(before, couchbase_password=""))
        if self._settings != before:
            user, password = before.couchbase_user, self._settings.couchbase_password
            self._cluster.set_authenticator(PasswordAuthenticator(user, password, before.couchbase_tls_ca))
        return self._settings != before

    def close(self) -> None:
        """Close the connections to the cluster."""
        with contextlib.suppress(cb.CouchbaseException, AttributeError):  # there is none yet
            self._cluster.close()


def open_cluster(settings: Settings) -> Any:
    """Connect to the cluster as the settings say; nothing of the SDK's own tracing, metrics or telemetry runs."""
    user = PasswordAuthenticator(settings.couchbase_user, settings.couchbase_password, settings.couchbase_tls_ca)
    kv, management = timedelta(milliseconds=settings.couchbase_timeout_ms), timedelta(seconds=5)
    timeouts = cbo.ClusterTimeoutOptions(kv_timeout=kv, management_timeout=management)  # each query has its own
    options: dict[str, Any] = {"enable_tracing": False, "enable_metrics": False, "enable_app_telemetry": False}
    options |= {"network": settings.couchbase_network, "transcoder": _AsBytes(), "timeout_options": timeouts}
    options |= {} if settings.couchbase_tls_verify else {"tls_verify": cbo.TLSVerifyMode.NONE}
    return Cluster.connect(settings.connection_string, cbo.ClusterOptions(user, **options))


def check_certificates(settings: Settings) -> str:
    """Return doubt of an issuer; SettingsError: a bad certificate. The SDK times out, and compares no host (4.6.3)."""
    scheme, _, hosts = settings.connection_string.partition("://")
    if scheme != "couchbases" or not settings.couchbase_tls_verify:
        return ""
    try:
        context, doubt = ssl.create_default_context(cafile=settings.couchbase_tls_ca), ""
    except ssl.SSLError as error:
        raise SettingsError(f"COUCHBASE_TLS_CA has no usable certificate: {error.reason}") from error
    for seed in re.finditer(r"(?:\[(.*?)\]|([^:,/?\[]+))(?::([0-9]+))?(?:,|/|\Z)", hosts.partition("?")[0]):
        host, port = seed[1] or seed[2], int(seed[3] or 11207)
        try:
            with socket.create_connection((host, port), 5) as plain:
                context.wrap_socket(plain, server_hostname=host).close()
        except ssl.SSLCertVerificationError as error:
            refusal = f"the certificate of {host} is refused ({error.verify_message})"
            if settings.couchbase_tls_ca or error.verify_code not in {18, 19, 20, 21}:  # unknown issuer: X509_V_ERR_…
                raise SettingsError(f"{refusal}: check COUCHBASE_HOST and COUCHBASE_TLS_CA") from error
            # for the SDK to decide, as it has Mozilla's roots besides the system's
            doubt = f"{refusal}: set COUCHBASE_TLS_CA to the certificate of its authority"
        except OSError:
            continue  # not there, a name that only DNS SRV knows, or no TLS: the SDK tries it in its own way
    return doubt


# ── Breakers, vBuckets and Couchbase's health ─────────────────────────────────────────────────────────────────────────
# Each key belongs to one of 1024 vBuckets, by its hash alone, and each vBucket to a node. So a node that is down shows
# as vBuckets that are down, and nobody has to ask the cluster which node has which keys.

VBUCKETS = 1024  # of a server with fewer (a power of two), each holds the keys of several of these


def vbucket(key: str) -> int:
    """Return the number of a key's vBucket (Couchbase's variant of CRC-32)."""
    return (zlib.crc32(key.encode()) >> 16 & 0x7FFF) % VBUCKETS


@functools.cache
def probe_keys() -> dict[int, str]:
    """Return a key for each vBucket that no document has."""
    return {vbucket(key): key for key in (f"probe:{number}" for number in range(VBUCKETS * 16))}


# A breaker's states, who may call, and what moves it on:
#   closed      all                  `threshold` failures in a row                           -> open
#   open        none                 the pause is over, and somebody asks                    -> half-open
#   half-open   that one, a probe    its success -> closed; its failure -> open, for twice as long


class Breaker:
    """Stops asking a service that does not answer, and finds out with single probes when it does again."""

    CLOSED, HALF_OPEN, OPEN = STATES = ("closed", "half-open", "open")
    threshold, first_seconds, most_seconds = 5, 1.0, 5.0  # failures in a row; pauses, from the first to the longest

    def __init__(self, changed: Callable[[str], None], jitter: Callable[..., float] = random.uniform) -> None:
        """Make a closed one; `changed` hears of each new state, `jitter(low, high)` keeps replicas out of step."""
        self._changed, self._jitter, self._pause_seconds = changed, jitter, self.first_seconds
        self.state, self._since, self.failures = self.CLOSED, 0.0, 0  # since when, in monotonic s; in a row
        self._probe_at = self.fetched_at = 0.0  # the latter: when a document was last got from the service

    def allow(self, now: float) -> bool:
        """Tell whether a call may be made at `now` (monotonic seconds); if so, its outcome must be told."""
        allowed = self.state == self.CLOSED or now >= self._probe_at
        if allowed and self.state != self.CLOSED:
            self._probe_at = now + self.most_seconds  # for another, if nothing comes of this one
            self._turn(self.HALF_OPEN, now)
        return allowed

    def admit(self, now: float) -> None:
        """Raise a 503 unless a call may be made at `now`."""
        if not self.allow(now):
            raise ProblemError(503, _OUT_OF_REACH, f"Retry-After: {self.retry_after_seconds(now)}\r\n")

    def succeeded(self, started: float) -> None:
        """Take note that a call made at `started` was answered."""
        if self.failures and started >= self._since:
            self.failures, self._pause_seconds = 0, self.first_seconds
            self._turn(self.CLOSED, self._since)

    def failed(self, started: float, now: float) -> None:
        """Take note that a call made at `started` failed for a reason that speaks of the service."""
        if started < self._since or self.state == self.OPEN:
            return  # it was under way when the state changed last, and says nothing new
        self.failures += 1
        if self.state == self.HALF_OPEN:
            self._pause_seconds = min(self.most_seconds, self._pause_seconds * 2)
        if self.failures >= self.threshold:
            self._probe_at = now + self._pause_seconds * self._jitter(0.8, 1.0)
            self._turn(self.OPEN, now)

    def retry_after_seconds(self, now: float) -> int:
        """Return after how many whole seconds it may be worth asking again, at least 1."""
        return max(1, math.ceil(self._probe_at - now if self.state == self.OPEN else self._pause_seconds))

    def _turn(self, state: str, now: float) -> None:
        if state != self.state:
            self.state, self._since = state, now
            self._changed(state)


class Health:
    """Judges whether Couchbase is well: by what came of requests, and by a background check."""

    check_seconds = 1.5  # between two checks
    degraded_seconds = 5.0  # without a key-value failure, until documents are fetched in batches again
    look_seconds = 0.5  # between two looks at the vBuckets, while degraded

    def __init__(self, database: Database, tokens: Tokens, log: Log, metrics: Metrics) -> None:
        self._database, self._tokens, self._log, self._metrics = database, tokens, log, metrics
        self._threads = ThreadPoolExecutor(2)  # for the check's own calls; started now, as later none may be left
        self._threads.map(threading.Barrier(2).wait, [None] * 2)  # each waits for the other
        self.breaker, self.query_breaker, self.replica_breaker = (
            Breaker(functools.partial(self._tell, service)) for service in ("key-value", "query", "key-value replicas")
        )
        self.degraded = False  # key-value has failed lately: no document waits for another's failure
        self.slow: set[int] | None = None  # vBuckets that are not answered soon while others are; None: not known yet
        self.down = set[int]()  # of those, the ones that are not within a request's time-out either: slow is not down
        self._calm_at = self._token_read_at = 0.0  # when `degraded` may end; all of these in monotonic seconds
        self.answered_at, self._unanswered_at = 0.0, -1.0  # anything; when the last check began that was not
        self._missing = "not connected yet"  # or what else there has to be before a token can be read

    def _tell(self, service: str, state: str) -> None:
        self._log.event("info" if state == Breaker.CLOSED else "warning", "breaker", service=service, state=state)

    def failed(self, key: str, done: Operation) -> None:
        """Take note of a key-value failure that speaks of the service."""
        ended, breaker, quiet_seconds = done.started + done.seconds, self.replica_breaker, 5.0
        if done.name != "get_any_replica":
            self.degrade(self.degraded_seconds)
            slow = self.slow and vbucket(key) in self.slow
            breaker, quiet_seconds = self.breaker, math.inf if slow else 0.25
        # closed, it counts only while no other document is fetched: else one node of several fails, or replicas lack it
        if ended > breaker.fetched_at + quiet_seconds or breaker.state != Breaker.CLOSED:
            breaker.failed(done.started, ended)

    def degrade(self, seconds: float) -> None:
        """Have documents fetched one by one for some seconds: few where it may be mere slowness, as that costs more."""
        self._calm_at = max(self._calm_at, time.monotonic() + seconds)
        if not self.degraded:
            self.degraded, self.slow = True, None
            self._watcher = asyncio.ensure_future(self._watch_vbuckets())

    async def _watch_vbuckets(self) -> None:
        """Find out which vBuckets are slow, and which of them are down; of an open breaker this may be the probe."""
        probe, quick, patient = self._database.probe, self._database.probe_seconds, self._database.timeout_seconds
        while self.degraded:
            started, closed = time.monotonic(), self.breaker.state == Breaker.CLOSED
            with contextlib.suppress(Exception):  # then none is known to be slow
                if self.breaker.allow(started):
                    asked = {*range(VBUCKETS)} if closed else {random.randrange(VBUCKETS)}  # noqa: S311  # no secret
                    missing = asked - await self._call(probe, asked, quick if closed else patient)
                    if len(missing) < len(asked):
                        self.answered_at = max(self.answered_at, started)
                        self.breaker.succeeded(started)
                    elif closed:  # slow or down as a whole: the time-outs of requests will tell
                        self.degrade(1.0)
                    else:
                        self.breaker.failed(started, time.monotonic())
                    if closed and len(missing) < VBUCKETS:
                        self.slow, self.down = missing, self.down & missing
                        if fresh := missing - self.down:
                            self.down |= fresh - await self._call(probe, fresh, patient)
            self.slow = self.slow or set()
            await asyncio.sleep(self.look_seconds)
            self.degraded = bool(self.slow) or self.breaker.state != Breaker.CLOSED or time.monotonic() < self._calm_at

    def breaker_states(self) -> dict[str, str]:
        """Return the state of each service's breaker."""
        return {"key-value": self.breaker.state, "query": self.query_breaker.state}

    def unready_reasons(self) -> list[str]:
        """Say why this process should get no requests; empty means it should."""
        if not self._tokens.current:
            return [f"Couchbase: {self._missing}"]
        reasons = ["the breaker of key-value is open"] if self.breaker.state == Breaker.OPEN else []
        if self.answered_at < self._unanswered_at:
            reasons.append("the background check is not answered")
        elif time.monotonic() > self._token_read_at + (periods := 3 * self._tokens.period_seconds):
            reasons.append(f"the token could not be read for {periods:.0f} s")
        return [f"Couchbase: {reason}" for reason in reasons]

    async def _call(self, function: Callable[..., Any], *arguments: object) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._threads, function, *arguments)

    async def start(self) -> None:
        """Connect where that is still to be done, and read the token; SettingsError for what waiting cannot cure."""
        if not self._database.connected:
            await self._call(self._database.connect)
        started, outcome = time.monotonic(), "ok"
        try:
            token = await self._call(self._database.fetch_token)
        except Exception as error:
            failure, scope = failure_of(error), self._database.scope_name
            outcome, self.answered_at = failure.outcome, self.answered_at if failure.outage else time.monotonic()
            advice = f"{failure.detail} (scope {scope!r}): {failure.advice}"
            self._missing = advice if failure.advice else "not connected yet"
            if isinstance(error, NoTokenError):
                outcome, self._missing = "not_found", str(error)
            raise
        finally:
            ended = time.monotonic()
            self._metrics.finished.append(Operation("lookup_in", AUTH, started, ended - started, outcome))
        self.answered_at = self._token_read_at = ended
        if self._tokens.adopt(token, ended):
            self._log.event("info", "token adopted")

    async def check(self) -> None:
        """Look whether Couchbase is well and the token still the same; if nothing is answered, renew the password."""
        # while nothing is answered, a look at the token would take its whole time-out to say the same
        if not self.degraded or self.answered_at >= self._unanswered_at:
            started = time.monotonic()
            try:
                return await self.start()  # which is connected by now, and reads the token
            except Exception as error:
                if not failure_of(error).outage:  # an answer all the same: the token, or its collection, is gone
                    why = "the token could not be read again; the last one stays"
                    return self._log.event("warning", why, error=describe(error), advice=self._missing)
                if self.answered_at >= self._unanswered_at:
                    self._log.event("warning", "the background check is not answered", error=describe(error))
                self._unanswered_at = started
                self.failed(TOKEN_KEY, Operation("lookup_in", AUTH, started, time.monotonic() - started, ""))
        # a wrong password looks like a time-out, as the SDK tries again and again
        if await self._call(self._database.renew_password):
            self._log.event("info", "password read again from its file")


# ── Tokens and decoded pictures ───────────────────────────────────────────────────────────────────────────────────────
# What the handler asks on its way: whether a caller may, and for the bytes of a picture.
class Tokens:
    """The bearer token that callers must show, and the one before it for one more period."""

    def __init__(self, period_seconds: float) -> None:
        self.period_seconds = period_seconds
        self.current: bytes | None = None  # None: none has been read yet
        self._previous, self._previous_until = b"", 0.0

    def adopt(self, token: str, now: float) -> bool:
        """Take the token as read at `now` (monotonic seconds); tell whether it is a new one."""
        fresh, before = token.encode(), self.current
        if fresh != before:
            self.current, self._previous, self._previous_until = fresh, before or b"", now + self.period_seconds
        return fresh != before

    def accepts(self, given: str, now: float) -> bool:
        """Compare in constant time. A token that no header can carry (not latin-1) is simply wrong."""
        shown, previous = given.encode("latin-1", "replace"), self._previous if now < self._previous_until else b""
        return any(hmac.compare_digest(shown, token) for token in (self.current, previous) if token)


class Pictures:
    """Decoded pictures, as to decode one takes as long as all else; kept by path and CAS: none is out of date."""

    bound_bytes = 16 << 20
    entry_bytes = 400  # about what keeping one takes beside the picture itself

    def __init__(self) -> None:
        self._bytes, self._kept = 0, OrderedDict[tuple[str, int], tuple[str, bytes]]()  # last one used last

    def decoded(self, path: str, record: Document) -> tuple[str, bytes]:
        """Return media type and picture of the record that was asked for by a path; 422 if there is none."""
        if not (decoded := self._kept.pop((path, record.cas), None)):
            decoded = decode_picture(record.value)
            self._bytes += len(decoded[1]) + self.entry_bytes
        self._kept[path, record.cas] = decoded
        while self._bytes > self.bound_bytes:
            self._bytes -= len(self._kept.popitem(last=False)[1][1]) + self.entry_bytes
        return decoded


# ── Log ───────────────────────────────────────────────────────────────────────────────────────────────────────────────
# The event loop makes the lines and never waits: a thread of the log's own writes them, whatever standard output is.
http_date = functools.partial(formatdate, usegmt=True)  # of seconds of the epoch: an IMF-fixdate (RFC 9110, 5.6.7)

MAX_LINE_BYTES, CUT_OFF = 2048, ', "cut_off": true'
_TELLING = ("first_error_code", "first_error_message", "http_status", "last_dispatched_to", "retry_reasons")


class Log:
    """JSON lines on standard output: one an event, one an answered request."""

    LEVELS = ("debug", "info", "warning", "error")
    bound_bytes = 2 << 20  # of lines that wait to be written; then those of requests are dropped, at twice that events'
    gather_seconds = 0.01  # between two writes, so that the thread wakes up a hundred times a second at most

    def __init__(self, level: str = "info", *, access: bool = True, descriptor: int = 1) -> None:
        """Open the log: the least level that is written, whether answered requests are, and where to."""
        self._levels = self.LEVELS[self.LEVELS.index(level) :]
        self.access, self.debug = access and "info" in self._levels, "debug" in self._levels
        self.dropped, self._descriptor = 0, descriptor  # lines, since the start
        try:
            os.fstat(descriptor)
        except OSError:  # closed: what is opened next would get its number, a client's socket too
            self._descriptor = os.open(os.devnull, os.O_WRONLY)
        self._lines: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        self._put_bytes = self._written_bytes = 0  # each is changed by one thread only
        self._said: dict[str, float] = {}  # by `seldom`, and when, in monotonic seconds
        threading.Thread(target=self._write_all, daemon=True).start()

    def event(self, level: str, message: str, **details: object) -> None:
        """Write one event; `details` become members. Values are escaped by JSON, so none can forge a line."""
        if level in self._levels and self._put_bytes - self._written_bytes > 2 * self.bound_bytes:
            self.dropped += 1
        elif level in self._levels:
            now = datetime.now(UTC).isoformat(timespec="milliseconds")
            line = {"time": now, "level": level, "message": message, **details}
            text = json.dumps(line, default=str)
            if len(text) >= MAX_LINE_BYTES:
                cut = {name: value[:200] if isinstance(value, str) else value for name, value in line.items()}
                text = json.dumps(cut, default=str)[: MAX_LINE_BYTES - 1]
            self._put_bytes += len(text) + 1  # JSON is ASCII here
            self._lines.put(f"{text}\n".encode())

    def seldom(self, level: str, message: str, **details: object) -> None:
        """Write an event that may come with every request, once in five seconds."""
        if time.monotonic() > self._said.get(message, -math.inf) + 5.0:
            self._said[message] = time.monotonic()
            self.event(level, message, **details)

    def requests(self, handlers: Sequence[ProfileHandler]) -> None:
        """Write a line for each answered request; every value is from a closed set, or its characters were checked."""
        stamp, lines, operation, spent = datetime.now(UTC).isoformat(timespec="milliseconds"), [], None, ""
        for handler in handlers:
            quiet = handler.route in QUIET_ROUTES
            if quiet and not self.debug:
                continue
            if handler.operation is not operation:  # those of a batch share it
                operation = handler.operation
                spent = f', "couchbase_ms": {operation.seconds * 1000:.3f}' if operation else ""
            traced = TRACEPARENT.fullmatch(handler.headers["traceparent"]) if "traceparent" in handler.headers else None
            trace = f', "trace_id": "{traced[1]}"' if traced else ""
            lines.append(
                f'{{"time": "{stamp}", "level": "{"debug" if quiet else "info"}", "message": "request", '
                f'"method": "{handler.command or "-"}", "route": "{handler.route or "-"}", "status": {handler.status}, '
                f'"request_id": "{handler.request_id}", "bytes": {len(handler.response)}, '
                f'"duration_ms": {handler.seconds * 1000:.3f}, "client": "{handler.client}"'
                f"{handler.connection.client_cert}{spent}{trace}{handler.cut_off}}}\n"
            )
        data = "".join(lines).encode()
        if self._put_bytes - self._written_bytes + len(data) > self.bound_bytes:
            self.dropped += len(lines)
        elif data:
            self._put_bytes += len(data)
            self._lines.put(data)

    def _write_all(self) -> None:
        """Write what comes, in the log's thread; a closed output stops nobody."""
        while True:
            # all that is there, `block` being True: by `map`, as a generator would be a frame for each
            data = left = b"".join([self._lines.get(), *map(self._lines.get, [True] * self._lines.qsize())])
            with contextlib.suppress(OSError):
                while left:
                    select.select([], [self._descriptor], [], 1.0)  # somebody else may have made it non-blocking
                    with contextlib.suppress(BlockingIOError):
                        left = left[os.write(self._descriptor, left) :]
            self._written_bytes += len(data)
            time.sleep(self.gather_seconds)

    def close(self, seconds: float = 1.0) -> None:
        """Wait until all is written, for so long at most."""
        latest = time.monotonic() + seconds
        while self._written_bytes < self._put_bytes and time.monotonic() < latest:
            time.sleep(self.gather_seconds)


def describe(error: BaseException) -> str:
    """Name an exception for the log in one short line, without the keys and statements of the SDK's own texts."""
    kind, context = type(error).__name__, error_context(error)
    with contextlib.suppress(Exception):  # some of the SDK's raise one of their own for their text
        text = str(error.message)[:300] if isinstance(error, cb.CouchbaseException) else str(error)[:500]
        return ", ".join([f"{kind}: {text}", *(f"{name}={context[name]}" for name in _TELLING if context.get(name))])
    return kind


def error_context(error: BaseException) -> dict[str, Any]:
    """Return what the SDK knows about a failure; empty if it knows nothing."""
    with contextlib.suppress(Exception):
        return dict(error.error_context._get_base())  # type: ignore[attr-defined]  # has no public accessor for all
    return {}


# ── Metrics ───────────────────────────────────────────────────────────────────────────────────────────────────────────
# Counted at the end of each turn of the event loop, rendered for `/metrics`.
# fmt: off
ROUTES = ("/api/v1/id/{id}", "/api/v1/nickname/{nickname}", "/api/v1/username/{username}", "/api/v1/picture/raw/{id}",
          "/api/v1/picture/record/{id}", "/healthz", "/readyz", "/metrics", "/openapi.json", "/docs", "other")
METHODS = ("GET", "HEAD", "OPTIONS", "other")
STATUSES = (200, 204, 304, 400, 401, 404, 405, 408, 412, 413, 414, 417, 422, 431, 500, 501, 503, 504, 505)
OPERATIONS = ("get", "get_multi", "get_any_replica", "lookup_in", "query")
OUTCOMES = ("ok", "not_found", "timeout", "unavailable", "error")
REASONS = ("malformed", "too_large", "too_slow", "overloaded", "not_ready", "tls")
# Seconds; the finest are those of a cache hit on the same machine, the last is the longest time-out allowed.
BUCKETS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
# By name: kind, what it is, and its labels, each with its closed set of values.
FAMILIES: dict[str, tuple[str, str, dict[str, tuple[object, ...]]]] = {
    "http_requests_total": ("counter", "Answered requests.", {"route": ROUTES, "method": METHODS, "status": STATUSES}),
    "http_request_duration_seconds": ("histogram", "From a whole request to its answer.", {"route": ROUTES}),
    "http_queue_seconds": ("histogram", "From a whole request to the thread that takes it.", {}),
    "http_requests_in_flight": ("gauge", "Requests that wait or are being answered.", {}),
    "http_rejected_total": ("counter", "Requests refused before they were worked on.", {"reason": REASONS}),
    "couchbase_operations_total": ("counter", "Finished operations.", {"operation": OPERATIONS, "outcome": OUTCOMES}),
    "couchbase_operation_duration_seconds": ("histogram", "Duration of operations.", {"operation": OPERATIONS}),
    "couchbase_breaker_state": ("gauge", "0 closed, 1 half-open, 2 open.", {"service": ("key-value", "query")}),
    "couchbase_ready": ("gauge", "Whether profiles can be served.", {}),
    "auth_failures_total": ("counter", "Requests without a valid token.", {}),
    "log_lines_dropped_total": ("counter", "Log lines that nobody read in time.", {}),
    "process_cpu_seconds_total": ("counter", "CPU time of the process.", {}),
    "process_resident_memory_bytes": ("gauge", "Resident memory of the process.", {}),
    "process_open_fds": ("gauge", "Open file descriptors of the process.", {}),
    "http_connections": ("gauge", "Open client connections.", {}),
    "process_max_fds": ("gauge", "Limit of open file descriptors.", {}),
    "process_start_time_seconds": ("gauge", "Start of the service.", {}),
    "tls_certificate_expiry_seconds": ("gauge", "When the API's certificate expires; absent without TLS.", {}),
    "build_info": ("gauge", "The service's version.", {"version": (__version__,)})}
_ABSENT = ("http_requests_total", "tls_certificate_expiry_seconds")  # at zero: they are too many, or there is none
# fmt: on


class Metrics:
    """The numbers of this process: counters and gauges by key, histograms as a list of buckets with the sum behind."""

    def __init__(self) -> None:
        self.numbers = defaultdict[tuple[object, ...], float](float)  # by the family's name and its labels' values
        self._histograms = defaultdict[tuple[object, ...], list[float]](lambda: [0.0] * (len(BUCKETS) + 2))
        self.finished: list[Operation] = []  # counted with the answers, which must not wait for that
        self.numbers |= {("build_info", __version__): 1, ("process_start_time_seconds",): time.time()}

    def answers(self, handlers: Iterable[ProfileHandler]) -> None:
        """Count answers, and the operations that have finished."""
        numbers, histograms = self.numbers, self._histograms
        finished, self.finished = self.finished, []
        for done in finished:
            numbers["couchbase_operations_total", done.name, done.outcome] += 1
            taken = histograms["couchbase_operation_duration_seconds", done.name]
            taken[bisect.bisect_left(BUCKETS, done.seconds)] += 1
            taken[-1] += done.seconds
        queued = histograms["http_queue_seconds",]
        for handler in handlers:
            route, command = handler.route or "other", handler.command if handler.command in METHODS else "other"
            numbers["http_requests_total", route, command, handler.status] += 1
            taken = histograms["http_request_duration_seconds", route]
            taken[bisect.bisect_left(BUCKETS, handler.seconds)] += 1
            taken[-1] += handler.seconds
            queued[bisect.bisect_left(BUCKETS, handler.queue_seconds)] += 1
            queued[-1] += handler.queue_seconds

    def render(self) -> bytes:
        """Return all in Prometheus' text format, version 0.0.4."""
        self.answers(())  # operations that no answer has followed: the background check's
        self.numbers["process_cpu_seconds_total",] = time.process_time()
        self.numbers["process_max_fds",] = os.sysconf("SC_OPEN_MAX")
        with contextlib.suppress(OSError):  # not Linux
            with open("/proc/self/statm", encoding="ascii") as file:
                self.numbers["process_resident_memory_bytes",] = int(file.read().split()[1]) * resource.getpagesize()
            self.numbers["process_open_fds",] = len(os.listdir("/proc/self/fd"))
        lines, bounds = [], [*BUCKETS, "+Inf"]
        for name, (kind, meaning, values) in FAMILIES.items():
            lines += [f"# HELP {name} {meaning}", f"# TYPE {name} {kind}"]
            for key in itertools.product([name], *values.values()):
                labels = "".join(f'{label}="{value}",' for label, value in zip(values, key[1:], strict=True))
                braces = f"{{{labels[:-1]}}}" if labels else ""
                if key in self._histograms:
                    *buckets, total = self._histograms[key]
                    counts = list(itertools.accumulate(map(int, buckets)))
                    for bound, count in zip(bounds, counts, strict=True):
                        lines.append(f'{name}_bucket{{{labels}le="{bound}"}} {count}')
                    lines += [f"{name}_sum{braces} {total}", f"{name}_count{braces} {counts[-1]}"]
                elif kind != "histogram" and (self.numbers[key] or name not in _ABSENT):
                    lines.append(f"{name}{braces} {self.numbers[key]:.17g}")
        return "\n".join([*lines, ""]).encode()


# ── Traces ────────────────────────────────────────────────────────────────────────────────────────────────────────────
# `opentelemetry-instrument` sets OpenTelemetry up by its own OTEL_… variables. Without it nothing is traced.
# Names and attributes are of its semantic conventions; paths, keys and parameters, being personal data, are left out.

# W3C's header field; the group is the trace id
TRACEPARENT = re.compile(r"(?!ff)[0-9a-f]{2}-(?!0{32})([0-9a-f]{32})-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}(?:-.*)?")


def find_tracer(log: Log) -> Any:
    """Return a tracer if this process has a provider of them, else None, with a warning if it ought to have one."""
    trace: Any = sys.modules.get("opentelemetry.trace")
    with contextlib.suppress(Exception):  # a variable names what is not installed: it has said so on stderr
        if trace and not isinstance(trace.get_tracer_provider(), trace.ProxyTracerProvider):
            return trace.get_tracer("micro_svc_demo", __version__)
    if "opentelemetry.instrumentation" in sys.modules:  # the command that starts programs with a provider
        log.event("warning", "nothing is traced: check the OTEL_ variables and the packages that they name")
    return None


def record_spans(tracer: Any, handler: ProfileHandler) -> None:
    """Record an answered request as a server span, and its Couchbase operation as a child."""
    from opentelemetry import propagate, trace  # noqa: PLC0415  # there, as there is a tracer
    from opentelemetry.trace import SpanKind, StatusCode  # noqa: PLC0415

    wall, route, done = time.time_ns() - time.monotonic_ns(), handler.route or "other", handler.operation
    attributes: dict[str, object] = {"http.request.method": handler.command or "_OTHER", "http.route": route}
    attributes |= {"http.response.status_code": handler.status, "client.address": handler.client}
    attributes["url.scheme"] = "https" if handler.server.tls and not handler.connection.internal else "http"
    attributes["network.protocol.version"] = handler.request_version.removeprefix("HTTP/")
    name, parent = f"{handler.command or 'HTTP'} {route}", propagate.extract(handler.headers)
    span = tracer.start_span(name, parent, SpanKind.SERVER, attributes, start_time=wall + int(handler.started * 1e9))
    if handler.status >= 500:  # noqa: PLR2004
        span.set_status(StatusCode.ERROR)
        span.set_attribute("error.type", str(handler.status))
    if done:
        query, settings = done.name == "query", handler.server.settings
        namespace = f"{settings.couchbase_bucket}.{settings.couchbase_scope}"
        attributes = {"db.system.name": "couchbase", "db.operation.name": done.name, "db.namespace": namespace}
        attributes["db.query.text" if query else "db.collection.name"] = done.target
        attributes |= {"db.operation.batch.size": str(done.size)} if done.size > 1 else {}
        name, parent = done.name if query else f"{done.name} {done.target}", trace.set_span_in_context(span)
        child = tracer.start_span(name, parent, SpanKind.CLIENT, attributes, start_time=wall + int(done.started * 1e9))
        if done.outcome not in {"ok", "not_found"}:
            child.set_status(StatusCode.ERROR)
            child.set_attribute("error.type", done.outcome)
        child.end(wall + int((done.started + done.seconds) * 1e9))
    span.end(wall + int((handler.started + handler.seconds) * 1e9))


# ── Processor ─────────────────────────────────────────────────────────────────────────────────────────────────────────
# Python runs one thread at a time, and the SDK's own in turns with it: where each hand-over wakes up another processor
# it costs more than the work that is handed over ("other affinity" in tests/load/results).
def busy_seconds(stat: str) -> dict[int, float]:
    """Return for how long each processor has been busy since the machine started, by /proc/stat (proc_stat(5))."""
    # of user, nice, system, idle, iowait, irq, softirq and steal all but the two in the middle
    rows = re.findall(r"^cpu(\d+) (\d+) (\d+) (\d+) \d+ \d+ (\d+) (\d+) (\d+)", stat, re.MULTILINE)
    return {number: sum(ticks) / os.sysconf("SC_CLK_TCK") for number, *ticks in (map(int, row) for row in rows)}


class Processor:
    """Keeps all threads of this process pinned to one processor, and moves them when others crowd it."""

    pinned: int | None = None  # None: the settings do not want it, or the system does not let it

    def __init__(self, settings: Settings) -> None:
        """Pin the calling thread, and those that it will start."""
        mallopt = getattr(ctypes.CDLL(None), "mallopt", lambda *_: 0)  # glibc's, with the numbers of its malloc.h
        for option in (-3, -1):  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD: the SDK gets a large document by growing blocks
            mallopt(option, 64 << 20)
        with contextlib.suppress(OSError, AttributeError):
            if settings.cpu_affinity == "auto":
                self._allowed = sorted(os.sched_getaffinity(0))
                os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))  # the woken interrupt nobody (sched(7))
                os.sched_setaffinity(0, {random.choice(self._allowed)})  # noqa: S311  # not a secret
                # Threads that never run at the same time need no heaps of their own, whose memory adds up.
                mallopt(-8, 1)  # M_ARENA_MAX
                [self.pinned] = os.sched_getaffinity(0)
        self._seen: tuple[float, dict[int, float]] = 0.0, {}  # by `keep`: used by this process, and busy by processor

    def keep(self) -> bool:
        """Move to a calmer processor if others crowd this one; tell whether it has. Called once a second."""
        if self.pinned is None:
            return False
        with open("/proc/stat", encoding="ascii") as file:
            busy = busy_seconds(file.read())
        (used, before), self._seen = self._seen, (time.process_time(), busy)
        others = {number: busy[number] - before.get(number, busy[number]) for number in self._allowed}
        others[self.pinned] -= self._seen[0] - used
        calmer = [number for number, seconds in others.items() if seconds <= others[self.pinned] - 0.25]
        # by chance, as two processes that have met on one processor must not go on meeting
        if not calmer or random.getrandbits(1):
            return False
        self.pinned = random.choice(calmer)  # noqa: S311  # not a secret
        for _ in range(2):  # again for threads that those not moved yet have started meanwhile
            for thread in os.listdir("/proc/self/task"):
                with contextlib.suppress(ProcessLookupError):  # it has ended
                    os.sched_setaffinity(int(thread), {self.pinned})
        return True


# ── The contract, for machines (OpenAPI 3.1) and for people (Swagger UI on it) ────────────────────────────────────────
# Limits are the constants that the code checks, problems are made by `ProblemError`, schemas follow from examples.

_DESCRIPTION = f"""User profiles and pictures out of Couchbase; documents are sent as stored.
A stored value that is no JSON object is answered 500; between its only pair of braces nothing is looked at.

`HEAD` works wherever `GET` does, `OPTIONS` says which methods there are; any other, known or not, is answered 405.
Unknown query parameters are ignored. Errors are problem documents (RFC 9457). Header fields not listed below are
`X-Request-ID`, to be quoted to the operator, the caller's if it matches `{_SANE_REQUEST_ID.pattern}`; HTTP's own;
`X-Content-Type-Options: nosniff`; and `Cache-Control`: `private, no-cache` for 200 and 304 under `/api/`, `no-cache`
for this document and its page, else `no-store`."""
# fmt: off
_EXAMPLES: dict[str, dict[str, Any]] = {
    "Profile": {
        "record_id": 1, "name": "Tina Walker", "nickname": "doc", "picture": 1, "user_id": "twalker1",
        "email": "tina.walker1@example.org", "email_verified": True, "first_name": "Tina", "last_name": "Walker",
        "address": "1334 Deanna Crossing Apt. 325", "city": "Matthewbury", "state": "IL", "zip_code": "60872",
        "phone": "+1-285-555-0143", "date_of_birth": "1959-12-01"},
    "PictureRecord": {"record_id": 1, "type": "png", "image":
        "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mP8z8BQDwAEhQGAhKmMIQAAAABJRU5ErkJggg=="},
    "Problem": json.loads(ProblemError(503, "not ready", reasons=["draining"]).document("3f9c2a-1d"))}
_MEMBERS: dict[str, dict[str, Any]] = {  # what their types do not say
    "picture": {"description": "the id of a picture"}, "date_of_birth": {"format": "date"},
    "type": {"description": f"media type or what follows its `image/`; usable if it matches `{_PICTURE_TYPE.pattern}`"},
    "image": {"contentEncoding": "base64", "description":
        "also with white space, without padding, with the letters that are safe in URLs, or as a `data:` URL"},
    "reasons": {"description": "why it is not ready", "items": {"type": "string"}}}
_PATH = {"in": "path", "required": True, "schema": {"type": "string", "pattern": r"^[^\x00-\x1f\x7f]+$"}}
_PARAMETERS: dict[str, dict[str, Any]] = {
    "id": _PATH | {"description": f"up to {MAX_KEY_BYTES} bytes, collection and colon included", "example": "1"},
    "nickname": _PATH | {"description": "matched exactly", "example": "doc"},
    "username": _PATH | {"description": "matched exactly", "example": "twalker1"},
    "limit": {"in": "query", "schema": dict(type="integer", minimum=1, maximum=MAX_LIMIT, default=DEFAULT_LIMIT)},
    "offset": {"in": "query", "schema": dict(type="integer", minimum=0, maximum=MAX_OFFSET, default=0)},
    # no example: Swagger UI would send it with every request that it tries out
    "If-Match": {"in": "header", "description": "the ETag that it must have, or *", "schema": {"type": "string"}},
    "If-None-Match": {"in": "header", "description": "the ETag that the caller has", "schema": {"type": "string"}}}
_FIELDS: dict[str, dict[str, str]] = {  # of answers
    "ETag": {"example": '"18a5c91f20b30000"', "description": "changes whenever the document does"},
    "Link": {"example": '</api/v1/nickname/doc?limit=2&offset=2>; rel="next"', "description": "the next page, if any"},
    "X-Couchbase-Replica": {"example": "true", "description": "from a replica, which may lag; missing otherwise"},
    "Content-Security-Policy": {"example": "default-src 'none'; sandbox", "description": "what it may do as a page"},
    "WWW-Authenticate": {"example": "Bearer"}, "Allow": {"example": "GET, HEAD, OPTIONS"},
    "Retry-After": {"example": "1", "description": "in seconds"}}
_ANSWER_FIELDS = {304: "ETag X-Couchbase-Replica Content-Security-Policy", 401: "WWW-Authenticate", 405: "Allow",
                  503: "Retry-After"}
_ANY_ROUTE = "400 408 413 414 417 431 500 501 503 505"
_BY_ID = "id If-Match If-None-Match ETag X-Couchbase-Replica 304 401 404 412 504"
_BY_NAME = "limit offset Link 401 404 504"
# Tag, operation, path, summary; names of parameters, of the 200's header fields and of other answers; the 200's body:
# a list with this schema, or its content as OpenAPI says it.
_ROUTES: tuple[tuple[str, str, str, str, str, Any], ...] = (
    ("profiles", "profile_by_id", "/api/v1/id/{id}", "The profile with this id", _BY_ID, "Profile"),
    ("profiles", "profiles_by_nickname", "/api/v1/nickname/{nickname}",
     "The profiles with this nickname, ordered by document id", f"nickname {_BY_NAME}", "Profile"),
    ("profiles", "profiles_by_username", "/api/v1/username/{username}",
     "The profiles with this username (user_id), ordered by document id", f"username {_BY_NAME}", "Profile"),
    ("pictures", "picture_record", "/api/v1/picture/record/{id}", "The record of a picture", _BY_ID, "PictureRecord"),
    ("pictures", "picture", "/api/v1/picture/raw/{id}", "The picture itself",
     f"{_BY_ID} 422 Content-Security-Policy", {"image/*": {}}),
    ("operation", "healthz", "/healthz", "Liveness", "", {JSON_TYPE: {"example": {"status": "alive"}}}),
    ("operation", "readyz", "/readyz", "Readiness to serve profiles; 503 has the reasons why not", "",
     {JSON_TYPE: {"example": {"status": "ready", "breakers": {"key-value": "closed", "query": "closed"}}}}),
    ("operation", "metrics", "/metrics", "Prometheus' text format, on the metrics port", "404", {"text/plain": {}}),
    ("operation", "openapi", "/openapi.json", "This document", "", {JSON_TYPE: {}}),
    ("operation", "docs", "/docs", "Swagger UI on this document", "Content-Security-Policy", {"text/html": {}}))
_SECURITY = {"bearer": {"type": "http", "scheme": "bearer"}, "token": {
    "type": "apiKey", "in": "header", "name": "x-access-token", "description": "not beside `Authorization: Bearer`"}}
# Without `validatorUrl: null` a validator on the internet would be told the document's URL.
_SCRIPT = 'window.SwaggerUIBundle?.({url: "/openapi.json", dom_id: "#docs", validatorUrl: null, tryItOutEnabled: true})'
# fmt: on


def _refs(kind: str, known: Iterable[str], names: str) -> dict[str, Any]:
    return {name: {"$ref": f"#/components/{kind}/{name}"} for name in known if name in names.split()}


@functools.cache
def openapi() -> bytes:
    """Return the OpenAPI document as JSON; made once, as it stays the same."""
    types = {bool: "boolean", int: "integer", str: "string", list: "array"}
    components: dict[str, Any] = {"schemas": {}, "responses": {}, "securitySchemes": _SECURITY}
    components["parameters"] = {name: {"name": name} | described for name, described in _PARAMETERS.items()}
    components["headers"] = {name: {"schema": {"type": "string"}} | described for name, described in _FIELDS.items()}
    for name, example in _EXAMPLES.items():
        parts = {key: {"type": types[type(value)]} | _MEMBERS.get(key, {}) for key, value in example.items()}
        required = [key for key in ("record_id", "title", "status", "detail", "request_id") if key in example]
        components["schemas"][name] = {"type": "object", "required": required, "properties": parts}
    for status in STATUSES[2:]:  # all but 200 and 204
        phrase, fields = HTTPStatus(status).phrase, _refs("headers", _FIELDS, _ANSWER_FIELDS.get(status, ""))
        components["responses"][str(status)] = answer = {"description": phrase, "headers": fields}
        if status >= 400:  # noqa: PLR2004
            example = json.loads(ProblemError(status, phrase).document("3f9c2a-1d"))
            answer["content"] = {PROBLEM_TYPE: {"schema": {"$ref": "#/components/schemas/Problem"}, "example": example}}
    paths = {}
    for tag, name, path, summary, names, content in _ROUTES:
        body = content
        if isinstance(content, str):
            schema = {"type": "array", "minItems": 1, "maxItems": MAX_LIMIT if "limit" in names else 1}
            schema["items"] = {"$ref": f"#/components/schemas/{content}"}
            body = {JSON_TYPE: {"schema": schema, "example": [_EXAMPLES[content]]}}
        answer = {"description": summary, "headers": _refs("headers", _FIELDS, names), "content": body}
        operation: dict[str, Any] = {"operationId": name, "tags": [tag], "summary": summary}
        operation["security"] = [] if tag == "operation" else [{"bearer": []}, {"token": []}]
        operation["parameters"] = list(_refs("parameters", _PARAMETERS, names).values())
        operation["responses"] = {"200": answer} | _refs("responses", components["responses"], f"{names} {_ANY_ROUTE}")
        paths[path] = {"get": operation}
    info = {"title": "User profiles", "version": __version__, "description": _DESCRIPTION}
    document = {"openapi": "3.1.0", "info": info, "paths": paths, "components": components}
    return json.dumps(document, ensure_ascii=False).encode()


# The hashes are those of the npm package swagger-ui-dist, of the version in DOCS_ASSETS_URL's default:
# `openssl dgst -sha384 -binary FILE | openssl base64 -A`.
def docs(assets_url: str) -> tuple[bytes, str]:
    """Return a page that loads Swagger UI, or else still links to the document, and its policy's header field."""
    page = f"""<!doctype html><html lang="en"><meta charset="utf-8"><meta name="referrer" content="no-referrer">
<title>User profiles</title><link rel="icon" href="data:,">
<link rel="stylesheet" href="{assets_url}/swagger-ui.css" crossorigin="anonymous"
 integrity="sha384-Ov4/wv3j2bmct8cDc5X4ngJZohVPzEmc6uDPH8WeljUxO5vtoykvMEfbu9Vh6RaW">
<div id="docs">Swagger UI comes here, unless {assets_url} is out of reach.
 The document itself: <a href="/openapi.json">/openapi.json</a></div>
<script src="{assets_url}/swagger-ui-bundle.js" crossorigin="anonymous"
 integrity="sha384-ZPehFMQommnnuaZ4rpxgkgTT2DKFVp4hZC/7pLit+9Lek9T1YGSo23eHFbvNkXkw"></script>
<script>{_SCRIPT}</script></html>
"""
    own = base64.b64encode(hashlib.sha256(_SCRIPT.encode()).digest()).decode()
    # Only what Swagger UI can't do without: whole URLs, as an origin that hosts every package would allow any other
    # script of its; `data:` and `blob:` for the style sheet's icons, and for the pictures that come as answers.
    return page.encode(), (
        f"Content-Security-Policy: default-src 'none'; script-src {assets_url}/swagger-ui-bundle.js 'sha256-{own}'; "
        f"style-src {assets_url}/swagger-ui.css; img-src data: blob:; connect-src 'self'; base-uri 'none'; "
        "form-action 'none'; frame-ancestors 'none'\r\n"
    )


if __name__ == "__main__":
    os._exit(main())  # nothing more is waited for: a thread may be inside the SDK, which cannot be interrupted
