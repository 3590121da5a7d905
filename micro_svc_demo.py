#!/usr/bin/env python3
r"""A user-profile microservice: HTTP in front of Couchbase, on the standard library and the Couchbase SDK.

The file reads from top to bottom: settings, log, problems, the HTTP/1.1 parser, tokens, the store (Couchbase), the
contract (OpenAPI), the handler (routes), the server (event loop and workers), and `main`, which ties them together.

The way of a request: the event loop reads it, a worker answers it, and whoever finishes last writes it::

    sockets -> event loop -> local queue      -> 1 worker: probes, errors, whatever needs no Couchbase
                          -> documents queue  -> few workers: all that waits becomes one batch, one get_multi
                                  \-> queries queue -> THREADS workers: one SQL++ statement each
"""

from __future__ import annotations

import _thread
import argparse
import base64
import binascii
import bisect
import contextlib
import ctypes
import errno
import functools
import hashlib
import hmac
import http.client
import importlib.metadata
import ipaddress
import itertools
import json
import math
import mmap
import os
import queue
import random
import re
import resource
import secrets
import select
import selectors
import signal
import socket
import ssl
import stat
import sys
import threading
import time
import zlib
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from datetime import timedelta
from email.utils import formatdate
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import MappingProxyType
from typing import Any, NamedTuple, NoReturn, TypeAlias
from urllib.parse import quote, unquote_to_bytes

from couchbase import exceptions as cb
from couchbase.auth import PasswordAuthenticator
from couchbase.cluster import Cluster
from couchbase.diagnostics import EndpointState, PingState, ServiceType
from couchbase.n1ql import QueryScanConsistency
from couchbase.options import (
    ClusterOptions,
    ClusterTimeoutOptions,
    GetAnyReplicaOptions,
    GetOptions,
    LookupInOptions,
    PingOptions,
    QueryOptions,
    TLSVerifyMode,
)
from couchbase.serializer import Serializer
from couchbase.subdocument import get as path_get
from couchbase.transcoder import RawJSONTranscoder

__version__ = "1.0.0"

# ── Settings ──────────────────────────────────────────────────────────────────────────────────────────────────────────
# One row a setting: environment variable, flag, default, check and help all come from the fields of `Settings`.


class SettingsError(Exception):
    """A setting is missing or has a value that is not allowed; the message is one line for the operator."""


def _integer(low: int, high: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if not re.fullmatch(r"[0-9]{1,9}", text) or not low <= int(text) <= high:
            raise ValueError(text)
        return int(text)

    return parse


def _choice(*allowed: str) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if text.lower() not in allowed:
            raise ValueError(text)
        return text.lower()

    return parse


def _matching(pattern: str) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if not re.fullmatch(pattern, text):
            raise ValueError(text)
        return text

    return parse


def _boolean(text: str) -> bool:
    return {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}[text.lower()]


def _file(text: str) -> str:
    if not os.access(text, os.R_OK) or os.path.isdir(text):
        raise ValueError(text)
    return text


def _metrics_port(text: str) -> int | None:
    return None if text.lower() == "off" else _integer(0, 65535)(text)


Network: TypeAlias = ipaddress.IPv4Network | ipaddress.IPv6Network


def _networks(text: str) -> tuple[Network, ...]:
    return tuple(ipaddress.ip_network(part.strip()) for part in text.split(",") if part.strip())


REQUIRED = object()


def _setting(
    env: str, default: object, allowed: str, meaning: str, parse: Callable[[str], object], *, flag: bool = True
) -> Any:
    """Describe one setting: its field's metadata is all that `read_settings`, `--help` and README's table need."""
    name = "--" + env.lower().removeprefix("service_").replace("_", "-") if flag else None
    return field(
        repr=flag,  # what may not be a flag may not be printed either
        metadata={
            "env": env,
            "default": default,
            "allowed": allowed,
            "meaning": meaning,
            "parse": parse,
            "flag": name,
        },
    )


_HOST = r"[A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\]"
_HOSTS = rf"(?:{_HOST})(?::[0-9]{{1,5}})?(?:,(?:{_HOST})(?::[0-9]{{1,5}})?)*"
# It gets into a page and its policy: nothing that means something there.
_ASSETS_URL = rf"https?://(?:{_HOST})(?::[0-9]{{1,5}})?(?:/[A-Za-z0-9@._~-]+)*"
_COUCHBASE_NAME = r"[A-Za-z0-9_%.-]{1,251}"


@dataclass(frozen=True, slots=True)
class Settings:
    """What the operator can choose; every value is checked before anything starts."""

    # fmt: off
    couchbase_host: str = _setting(
        "COUCHBASE_HOST", REQUIRED, "host[:port], several with commas, or couchbase[s]://…",
        "the cluster", _matching(rf"{_HOSTS}|couchbases?://{_HOSTS}/?(?:\?[!-~]*)?"))
    couchbase_user: str = _setting(
        "COUCHBASE_USER", REQUIRED, "a user name", "who asks", _matching(r"[^\x00-\x1f\x7f]{1,128}"))
    couchbase_password: str = _setting(
        "COUCHBASE_PASSWORD", None, "text", "that user's password", _matching(r"[^\x00]{1,1024}"), flag=False)
    couchbase_password_file: str | None = _setting(
        "COUCHBASE_PASSWORD_FILE", None, "a readable file", "the file with the password instead", _file)
    couchbase_bucket: str = _setting(
        "COUCHBASE_BUCKET", "sample_app", "a bucket's name", "the bucket", _matching(_COUCHBASE_NAME))
    couchbase_scope: str = _setting(
        "COUCHBASE_SCOPE", "profiles", "a scope's name", "the scope of the collections", _matching(_COUCHBASE_NAME))
    couchbase_tls: bool = _setting(
        "COUCHBASE_TLS", "true", "true or false", "TLS to Couchbase, unless the host is a whole URL", _boolean)
    couchbase_tls_ca: str | None = _setting(
        "COUCHBASE_TLS_CA", None, "a readable PEM file", "the only roots to trust", _file)
    couchbase_tls_verify: bool = _setting(
        "COUCHBASE_TLS_VERIFY", "true", "true or false", "whether certificates are verified", _boolean)
    couchbase_network: str = _setting(
        "COUCHBASE_NETWORK", "auto", "auto, default or external",
        "which of the nodes' addresses to use", _choice("auto", "default", "external"))
    couchbase_timeout_ms: int = _setting(
        "COUCHBASE_TIMEOUT_MS", "2500", "10 to 60000", "time-out of a key-value operation", _integer(10, 60_000))
    couchbase_query_timeout_ms: int = _setting(
        "COUCHBASE_QUERY_TIMEOUT_MS", "5000", "10 to 120000", "time-out of a query", _integer(10, 120_000))
    port: int = _setting(
        "SERVICE_PORT", "8080", "0 to 65535", "where the API listens; 0 picks a free port", _integer(0, 65_535))
    metrics_port: int | None = _setting(
        "METRICS_PORT", "9090", "0 to 65535, or off", "where /metrics and the probes listen", _metrics_port)
    workers: int = _setting("WORKERS", "1", "1 to 64", "processes", _integer(1, 64))
    threads: int = _setting("THREADS", "8", "1 to 256", "query workers a process", _integer(1, 256))
    max_connections: int = _setting(
        "MAX_CONNECTIONS", "10000", "1 to 1000000", "clients a process", _integer(1, 1_000_000))
    token_refresh_seconds: int = _setting(
        "TOKEN_REFRESH_SECONDS", "30", "1 to 86400", "how often the token is read again", _integer(1, 86_400))
    shutdown_seconds: int = _setting(
        "SHUTDOWN_SECONDS", "20", "0 to 3600", "how long running requests may take to finish", _integer(0, 3600))
    cpu_affinity: str = _setting(
        "CPU_AFFINITY", "auto", "auto or off",
        "auto: a process keeps to one processor at a time, the least used", _choice("auto", "off"))
    trusted_proxies: tuple[Network, ...] = _setting(
        "TRUSTED_PROXIES", "", "addresses or networks, with commas",
        "whose X-Forwarded-For names the client", _networks)
    docs_assets_url: str = _setting(
        "DOCS_ASSETS_URL", "https://cdn.jsdelivr.net/npm/swagger-ui-dist@5.33.1", "http[s]://host[:port][/path]",
        "where /docs loads Swagger UI from: exactly this version", _matching(_ASSETS_URL))
    log_level: str = _setting(
        "LOG_LEVEL", "info", "debug, info, warning or error",
        "the least level that is logged", _choice("debug", "info", "warning", "error"))
    access_log: bool = _setting("ACCESS_LOG", "true", "true or false", "a log line a request", _boolean)
    # fmt: on

    @property
    def connection_string(self) -> str:
        """The cluster as the SDK takes it. A whole URL wins over `COUCHBASE_TLS`."""
        if "://" in self.couchbase_host:
            return self.couchbase_host
        return f"couchbase{'s' if self.couchbase_tls else ''}://{self.couchbase_host}"


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise SettingsError(message)


def read_settings(argv: Sequence[str], environ: Mapping[str, str], description: str | None = __doc__) -> Settings:
    """Read every setting: a flag wins over the environment, the environment over the default; empty means not set.

    Args:
        argv: the command line without the program's name.
        environ: the environment.
        description: what `--help` says first.

    Raises:
        SettingsError: for the first setting that is missing or has a value that is not allowed.
        SystemExit: after `--help` and `--version`.
    """
    rows = [(row.name, dict(row.metadata)) for row in fields(Settings)]
    parser = _Parser(
        description=(description or "").partition("\n")[0],
        epilog="Flags win over the environment. COUCHBASE_PASSWORD comes from the environment or a file only.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    for name, row in rows:
        if row["flag"]:
            default = "required" if row["default"] is REQUIRED else f"default {row['default'] or 'none'}"
            summary = f"{row['env']}: {row['meaning']} ({row['allowed']}; {default})"
            parser.add_argument(row["flag"], dest=name, metavar="X", help=summary.replace("%", "%%"))
    given = vars(parser.parse_args(argv))
    values: dict[str, Any] = {}
    for name, row in rows:
        text: Any = given.get(name)
        if text is None:  # an empty flag is a mistake; an empty variable is how YAML and shells say "not set"
            text = environ.get(row["env"]) or row["default"]
        where = f"{row['env']} ({row['flag']})" if row["flag"] else row["env"]
        if text is REQUIRED:
            raise SettingsError(f"{where} is missing; allowed: {row['allowed']}")
        if text is None:
            values[name] = None
            continue
        try:
            values[name] = row["parse"](text)
        except (ValueError, KeyError):
            shown = f"{text[:60]!r} is not allowed" if row["flag"] else "its value is not allowed"
            raise SettingsError(f"{where}: {shown}; allowed: {row['allowed']}") from None
    return _with_password(Settings(**values))


def _with_password(settings: Settings) -> Settings:
    """Take the password from its file, where one is named."""
    path = settings.couchbase_password_file
    if bool(path) == bool(settings.couchbase_password):
        what = "are both set" if path else "are both missing"
        raise SettingsError(f"COUCHBASE_PASSWORD and COUCHBASE_PASSWORD_FILE {what}; allowed: one of the two")
    if not path:
        return settings
    try:
        with open(path, encoding="utf-8") as file:
            password = file.read(4096).rstrip("\r\n")
    except (OSError, ValueError):
        password = ""
    if not password:
        raise SettingsError(
            "COUCHBASE_PASSWORD_FILE: no password in it; allowed: a readable file with one line of text"
        )
    return replace(settings, couchbase_password=password)


# ── Log ───────────────────────────────────────────────────────────────────────────────────────────────────────────────


class SecondClock:
    """Wall-clock texts that are made once a second, because formatting a date costs more than parsing a request."""

    def __init__(self) -> None:
        self._made: tuple[int, str, str] = (-1, "", "")

    def _texts(self, second: int) -> tuple[int, str, str]:
        made = self._made
        if made[0] != second:
            # one assignment of a whole tuple: other threads see the old texts or the new ones, never a mixture
            stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(second))
            made = self._made = (second, formatdate(second, usegmt=True), stamp)
        return made

    def http_date(self) -> str:
        """Return now as an IMF-fixdate (RFC 9110, 5.6.7)."""
        return self._texts(int(time.time()))[1]

    def rfc3339(self) -> str:
        """Return now as RFC 3339 in UTC with milliseconds."""
        now = time.time()
        return f"{self._texts(int(now))[2]}.{int(now % 1 * 1000):03d}Z"


CLOCK = SecondClock()


MAX_LINE_BYTES = 2048
PIPE_BYTES = 4096  # PIPE_BUF of Linux: what a pipe takes without mixing it with another process's


class Log:
    """JSON lines on standard output: one an event, one an answered request."""

    LEVELS = ("debug", "info", "warning", "error")

    stall_ms = 100  # how long a full pipe is waited for, once

    def __init__(
        self, level: str = "info", *, access: bool = True, descriptor: int = 1, worker: int = 0, shared: bool = False
    ) -> None:
        """Open the log.

        Args:
            level: the least that is written.
            access: whether answered requests are.
            descriptor: where to.
            worker: the number of this worker process, part of each line.
            shared: whether other processes write there too; then no write is larger than a pipe keeps whole.
        """
        self.access = access and level in {"debug", "info"}
        self.debug = level == "debug"
        self.worker = worker
        self.dropped = 0  # lines, since the start of this process
        self._lock = threading.Lock()
        self._least = self.LEVELS.index(level)
        self._rest = b""  # of a line that has been written in part
        self._stalled = False
        self._descriptor, self._most = descriptor, 1 << 30
        if stat.S_ISFIFO(os.fstat(descriptor).st_mode):
            self._most = PIPE_BYTES if shared else self._most
            with contextlib.suppress(OSError):  # Linux: one of one's own, so that nobody else's gets non-blocking
                self._descriptor = os.open(f"/proc/self/fd/{descriptor}", os.O_WRONLY | os.O_NONBLOCK)

    def event(self, level: str, message: str, **details: object) -> None:
        """Write one event; `details` become members. Values are escaped by JSON, so none can forge a line."""
        if self.LEVELS.index(level) >= self._least:
            line = {"time": CLOCK.rfc3339(), "level": level, "message": message, "worker": self.worker, **details}
            text = json.dumps(line, default=str)
            if len(text) >= MAX_LINE_BYTES:
                text = json.dumps(
                    {name: value[:200] if isinstance(value, str) else value for name, value in line.items()}
                )
            self.lines([text[: MAX_LINE_BYTES - 1] + "\n"])

    def requests(self, handlers: Sequence[ProfileHandler]) -> None:
        """Write a line for each answered request of a batch.

        They share the time: formatting it for each took 3 of the 11 µs that a line cost, what does not change within
        the batch another 4. Every value is from a closed set or has been checked for its characters: nothing needs
        escaping.
        """
        stamp, lines = CLOCK.rfc3339(), []
        constant: dict[tuple[str, str, int], str] = {}
        operation, spent = None, ""
        for handler in handlers:
            key = (handler.route, handler.command, handler.status)
            head = constant.get(key)
            if head is None:
                quiet = handler.route in QUIET_ROUTES
                head = (
                    ""
                    if quiet and not self.debug
                    else (
                        f'{{"time": "{stamp}", "level": "{"debug" if quiet else "info"}", "message": "request", '
                        f'"worker": {self.worker}, "method": "{handler.command or "-"}", '
                        f'"route": "{handler.route or "-"}", "status": {handler.status}, "request_id": "'
                    )
                )
                constant[key] = head
            if not head:
                continue
            if handler.operation is not operation:
                operation = handler.operation
                spent = f', "couchbase_ms": {operation.seconds * 1000:.3f}' if operation else ""
            traced = trace_id(handler.headers["traceparent"]) if "traceparent" in handler.headers else ""
            lines.append(
                f'{head}{handler.request_id}", "bytes": {len(handler.response)}, '
                f'"duration_ms": {handler.seconds * 1000:.3f}, "client": "{handler.client}"{spent}'
                + (f', "trace_id": "{traced}"}}\n' if traced else "}\n")
            )
        self.lines(lines)

    def lines(self, lines: list[str]) -> None:
        """Write whole lines, several with one system call.

        A log that nobody reads must not hold up the service: what a full pipe does not take is dropped and counted.
        A closed one stops nobody.
        """
        data = "".join(lines).encode()
        with self._lock:
            while data:
                end = len(data) if len(data) <= self._most else data.rfind(b"\n", 0, self._most) + 1 or len(data)
                self._write(data[:end])
                data = data[end:]

    def _write(self, lines: bytes) -> None:
        """Write what is left of a line that has been begun, then these; what a full pipe does not take is dropped."""
        data = self._rest + lines
        written = self._put(data)
        if written < len(data) and not self._stalled:
            poll = select.poll()
            poll.register(self._descriptor, select.POLLOUT)
            poll.poll(self.stall_ms)
            written += self._put(data[written:])
        left = data[written:]
        self._stalled = bool(left)
        begun = data[written - 1 : written] != b"\n" if written else bool(self._rest)
        cut = left.find(b"\n") + 1 if begun else 0
        self._rest = left[:cut]
        self.dropped += left.count(b"\n", cut)

    def _put(self, data: bytes) -> int:
        try:
            return os.write(self._descriptor, data)
        except BlockingIOError:
            return 0
        except OSError:  # closed: there is nobody to miss it
            return len(data)


def describe(error: BaseException) -> str:
    """Name an exception for the log in one short line, without the keys and statements of the SDK's own texts.

    `str()` and the properties of some SDK exceptions raise exceptions of their own: the class is enough then.
    """
    kind = type(error).__name__
    try:
        if not isinstance(error, cb.CouchbaseException):
            return f"{kind}: {str(error)[:500]}"
        context = error_context(error)
        parts = [str(error.message)[:300]]
        parts += [f"{name}={context[name]}" for name in _TELLING if context.get(name)]
        return f"{kind}: {', '.join(parts)}"
    except Exception:  # whatever it is, the class is still worth logging
        return kind


_TELLING = (
    "first_error_code",
    "first_error_message",
    "status_code",
    "http_status",
    "last_dispatched_to",
    "retry_reasons",
)


def error_context(error: BaseException) -> dict[str, Any]:
    """Return what the SDK knows about a failure; empty if it knows nothing."""
    try:
        return dict(error.error_context._get_base())  # type: ignore[attr-defined]  # has no public accessor for all
    except Exception:
        return {}


# ── Problems ──────────────────────────────────────────────────────────────────────────────────────────────────────────


class ProblemError(Exception):
    """Raised anywhere while a request is answered, and answered in one place as a problem document (RFC 9457)."""

    def __init__(
        self, status: int, detail: str, *headers: str, reasons: Sequence[str] = (), rejected: str = ""
    ) -> None:
        """Make a problem.

        Args:
            status: the HTTP status.
            detail: what went wrong, for the caller; never a secret, never another's data.
            *headers: whole header fields (`Name: value`) that belong to this status.
            reasons: further explanations, a member of their own.
            rejected: why the request was refused before it was worked on (one of REASONS), for the metrics.
        """
        super().__init__(detail)
        self.rejected = rejected
        self.status = status
        self.detail = detail
        self.headers = headers
        self.reasons = reasons

    def document(self, request_id: str) -> bytes:
        """Return the body of the answer."""
        members: dict[str, object] = {
            "title": HTTPStatus(self.status).phrase,
            "status": self.status,
            "detail": self.detail,
            "request_id": request_id,
        }
        if self.reasons:
            members["reasons"] = self.reasons
        return json.dumps(members).encode()


def unavailable(detail: str, *, seconds: int = 1, reasons: Sequence[str] = (), rejected: str = "") -> ProblemError:
    """Return a 503 that tells the caller when to come back (RFC 9110, 10.2.3)."""
    return ProblemError(503, detail, f"Retry-After: {seconds}", reasons=reasons, rejected=rejected)


# ── HTTP/1.1 messages (RFC 9112) ──────────────────────────────────────────────────────────────────────────────────────

MAX_TARGET_BYTES = 8192
MAX_HEAD_BYTES = 16384
MAX_FIELDS = 100
MAX_BODY_BYTES = 65536
_END_OF_HEAD = b"\r\n\r\n"

# Possessive quantifiers (`++`, `*+`) keep every match linear: no input makes the engine go back.
_NAME = r"[!#$%&'*+\-.^_`|~0-9A-Za-z]++"
_FIELD = rf"({_NAME}):[ \t]*+([\t -~\x80-\xff]*+)\r\n"
_REQUEST_LINE = re.compile(r"([A-Z][A-Z0-9_-]{0,31}) ([!-\"$-~]++) (HTTP/1\.[01])")
_FIELD_LINE = re.compile(_FIELD)
_FIELD_LINES = re.compile(f"(?:{_FIELD})*+\r\n")
_FIELD_NAME = re.compile(_NAME)
# What a head may be made of between its line ends, and what must be left of it without that.
_TEXT = bytes(byte for byte in range(256) if byte == ord("\t") or (byte >= ord(" ") and byte != 0x7F))  # noqa: PLR2004
_LINE_ENDS = b"\r\n" * MAX_HEAD_BYTES
_BARE_LINE_END = re.compile(rb"(?<!\r)\n|\r[^\n]")
_AUTHORITY = re.compile(rf"(?:{_HOST})(?::[0-9]{{0,5}})?")
_ABSOLUTE_FORM = re.compile(r"https?://([^/?]*)(.*)", re.IGNORECASE | re.DOTALL)
_CHUNK_LINE = re.compile(rb"([0-9A-Fa-f]{1,8})(?:;[\t -~]{0,256})?\r\n")
# What can still become a head, or the line before a chunk.
_BEGINNING = re.compile(rb"(?:\r\n)?(?:[A-Z][A-Z0-9_-]{0,31}(?: |\Z)|\Z)|\r\Z")
_CHUNK_LINE_BEGINNING = re.compile(rb"(?:[0-9A-Fa-f]{1,8}(?:;[\t -~]{0,256})?)?\r?\Z")
_MAX_BEGINNING_BYTES = 40
_MAX_REQUEST_LINE_BYTES = MAX_TARGET_BYTES + 64
_MOST_REMEMBERED_BYTES = 1024  # of fields, a connection

# Fields of which a second one would leave it open which of the two counts.
_SINGLE_FIELDS = frozenset(
    ("authorization", "content-length", "content-type", "expect", "host", "transfer-encoding", "x-access-token")
)
# What a gateway that turns dashes into underscores (as CGI does) would take for the framing.
_DISGUISED_FIELDS = frozenset(("content_length", "transfer_encoding"))
# What may not come after the body, where it would change how the message before it is read (RFC 9110, 6.5.1).
_FORBIDDEN_TRAILERS = (
    _SINGLE_FIELDS
    | _DISGUISED_FIELDS
    | {"cache-control", "connection", "content-encoding", "content-range", "cookie", "keep-alive", "max-forwards"}
    | {"if-match", "if-modified-since", "if-none-match", "if-range", "if-unmodified-since", "range"}
    | {"proxy-authorization", "te", "trailer", "upgrade"}
)


class Head(NamedTuple):
    """A parsed request head: field names are in lower case, values without the white space around them."""

    method: str
    target: str
    version: str
    fields: dict[str, str]


def parse_head(raw: bytes) -> Head:
    """Parse one request head, strictly.

    Args:
        raw: the bytes from the request line to the empty line, both included.

    Raises:
        ProblemError: 400, 414 or 431; the connection cannot go on after it.
    """
    text = raw.decode("latin-1")
    lines = text.split("\r\n")
    if raw.translate(None, _TEXT) != _LINE_ENDS[: 2 * len(lines) - 2]:
        raise ProblemError(400, "a control character, or a line that ends with a bare CR or LF")
    if not lines[0]:
        del lines[0]
    if lines[-2:] != ["", ""]:
        raise ProblemError(400, "the head does not end with an empty line")
    line = _REQUEST_LINE.fullmatch(lines[0])
    if line is None:
        raise ProblemError(400, "malformed request line")
    method, target, version = line.groups()
    del lines[-2:], lines[0]
    found: dict[str, str] = {}
    padded = "\t" in text or ":  " in text or " \r" in text  # white space around a value is not part of it
    for row in lines:
        name, colon, value = row.partition(": ")
        known = _KNOWN_NAMES.get(name) if colon and not padded else None
        if known is None:  # a new name, or not the usual one space after the colon
            known, value = _parse_field(row)
        found[known] = value
    if len(found) != len(lines):
        found = _join_repeated(map(_parse_field, lines))
    if len(target) > MAX_TARGET_BYTES:
        raise ProblemError(414, f"the target is longer than {MAX_TARGET_BYTES} bytes")
    if len(lines) > MAX_FIELDS or len(raw) > MAX_HEAD_BYTES:
        raise ProblemError(431, f"the head has more than {MAX_FIELDS} fields or {MAX_HEAD_BYTES} bytes")
    host = found.get("host")
    if (host is None and version == "HTTP/1.1") or (host and not _is_authority(host)):
        raise ProblemError(400, "missing or malformed Host")
    if target[0] != "/":
        target = _origin_form(method, target, found)
    if "expect" in found and version == "HTTP/1.1" and found["expect"].lower() != "100-continue":
        raise ProblemError(417, "the only expectation that can be met is 100-continue")
    return tuple.__new__(Head, (method, target, version, found))  # half the time of Head's own


# Field names as sent, and in lower case: the few hundred that come by again and again are looked up, not checked again.
_KNOWN_NAMES: dict[str, str] = {}
_MOST_KNOWN_NAMES, _LONGEST_KNOWN_NAME = 512, 64


def _parse_field(row: str) -> tuple[str, str]:
    """Return one field's name in lower case, and its value without the white space around it."""
    name, colon, value = row.partition(":")
    known = _KNOWN_NAMES.get(name)
    if known is None or not colon:
        known = name.lower()
        if not colon or not _FIELD_NAME.fullmatch(name):
            raise ProblemError(400, "malformed header field")
        if known in _DISGUISED_FIELDS:
            raise ProblemError(400, "a framing field under a disguised name")
        if len(_KNOWN_NAMES) < _MOST_KNOWN_NAMES and len(name) <= _LONGEST_KNOWN_NAME:
            _KNOWN_NAMES[name] = known
    return known, value.strip(" \t")


@functools.lru_cache(maxsize=256)
def _is_authority(text: str) -> bool:
    """Tell whether this is a host with an optional port (RFC 3986, 3.2.2); the few that are asked for come by often."""
    return _AUTHORITY.fullmatch(text) is not None


def _join_repeated(pairs: Iterable[tuple[str, str]]) -> dict[str, str]:
    """Join the values of repeated fields with commas (RFC 9110, 5.3), except where only one is allowed."""
    joined: dict[str, str] = {}
    for name, value in pairs:
        if name not in joined:
            joined[name] = value
        elif name not in _SINGLE_FIELDS:
            joined[name] = f"{joined[name]}, {value}"
        elif name != "content-length" or joined[name] != value:
            raise ProblemError(400, f"more than one {name}")
    return joined


def _origin_form(method: str, target: str, found: dict[str, str]) -> str:
    """Reduce an absolute-form target to its path and query; its authority replaces Host (RFC 9112, 3.2.2).

    The other two forms belong to one method each: `*` to OPTIONS, a bare authority to CONNECT.
    """
    if (method == "OPTIONS" and target == "*") or (method == "CONNECT" and _AUTHORITY.fullmatch(target)):
        return target
    absolute = _ABSOLUTE_FORM.fullmatch(target)
    if absolute is None or not absolute[1] or not _AUTHORITY.fullmatch(absolute[1]):
        raise ProblemError(400, "the target is neither a path nor an absolute http URL")
    found["host"] = absolute[1]
    rest = absolute[2]
    return rest if rest.startswith("/") else f"/{rest}"


def body_length(head: Head) -> int | None:
    """Return how many bytes of body follow, None for a chunked one (RFC 9112, 6.3).

    Raises:
        ProblemError: 400 for framing that two parsers could read in two ways, 413 for more than is worth skipping.
    """
    length, coding = head.fields.get("content-length"), head.fields.get("transfer-encoding")
    if coding is not None:
        if length is not None or head.version == "HTTP/1.0" or coding.lower() != "chunked":
            raise ProblemError(400, "Transfer-Encoding is not exactly chunked, or stands beside Content-Length")
        return None
    if length is None:
        return 0
    if not re.fullmatch(r"[0-9]{1,18}", length):
        raise ProblemError(400, "malformed Content-Length")
    if int(length) > MAX_BODY_BYTES:
        raise ProblemError(413, f"the body is longer than {MAX_BODY_BYTES} bytes")
    return int(length)


class Framer:
    """Cuts a client's bytes into whole request heads; bodies are skipped. Pure: bytes in, heads out."""

    __slots__ = (
        *("_again", "_body", "_fields", "_head", "_inbox", "_line_seen", "_scanned", "_skipped", "_trailers"),
        *("expects_continue", "refused"),
    )

    def __init__(self) -> None:
        self._inbox = bytearray()
        self._scanned = 0  # how much of the inbox is known to hold no end of head
        self._line_seen = False  # the request line is whole, and well-formed
        self._head: Head | None = None  # a head whose body is still coming
        self._body: int | None = 0  # bytes of it to skip; None: chunked
        self._skipped = 0
        self._trailers = False  # the last chunk is behind
        self._fields = b""  # as they came with the last request, which is `_again`
        self._again: Head | None = None
        self.expects_continue = False  # the client waits for a 100 before it sends the body
        self.refused = False

    @property
    def partial(self) -> bool:
        """Whether a request has begun that is not whole yet."""
        if self._head is None and not self._inbox:
            return False
        # an empty line before the next request begins nothing yet
        return self._head is not None or not b"\r\n".startswith(self._inbox)

    def take_whole(self, data: bytes) -> Head | None:
        """Return the head if the data is one whole request without a body and nothing else: the common case.

        Most clients send the same fields with each request of a connection: those are parsed once, which takes 1.2
        instead of 2.1 µs. Whatever is wrong with the request is for `feed` to find.
        """
        if self._inbox or self._head is not None or not data.endswith(_END_OF_HEAD) or len(data) > MAX_TARGET_BYTES:
            return None
        line, _, fields = data.partition(b"\r\n")
        if fields == self._fields and self._again is not None:
            found, again = _REQUEST_LINE.fullmatch(line.decode("latin-1")), self._again
            if found is not None and found[3] == again.version and found[2][0] == "/":
                return tuple.__new__(Head, (found[1], found[2], again.version, again.fields))
        try:
            head = parse_head(data)
        except ProblemError:
            return None
        if "content-length" in head.fields or "transfer-encoding" in head.fields:
            return None
        if len(fields) <= _MOST_REMEMBERED_BYTES and b" /" in line:  # else the target has changed Host
            self._fields, self._again = fields, head
        return head

    def feed(self, data: bytes, room: int = 1 << 30) -> list[Head | ProblemError]:
        """Take what was received; return the heads that are whole now.

        Args:
            data: the bytes; may be empty, to get what an earlier call had no room for.
            room: how many heads to return at most, at least 1.

        Returns:
            The heads, and last of all the problem that ends the stream, if there is one.
        """
        if self.refused:
            return []
        whole = self.take_whole(data)
        if whole is not None:
            return [whole]
        self._inbox += data
        found: list[Head | ProblemError] = []
        try:
            while len(found) < room and (head := self._next()) is not None:
                found.append(head)
        except ProblemError as problem:
            found.append(problem)
            self.refuse()
        return found

    def refuse(self) -> None:
        """Forget what is buffered and take no more: after a malformed message nothing on the stream can be trusted."""
        self.refused = True
        self.expects_continue = False
        self._inbox = bytearray()
        self._head = None

    def _next(self) -> Head | None:
        if self._head is None:
            end = self._inbox.find(_END_OF_HEAD, max(0, self._scanned - 3))
            if end < 0 or end > MAX_TARGET_BYTES:  # below that size no bound can be missed
                self._check_beginning(len(self._inbox) if end < 0 else end + 4)
            if end < 0:
                return None
            head = parse_head(bytes(self._inbox[: end + 4]))
            del self._inbox[: end + 4]
            self._scanned, self._line_seen = 0, False
            self._head, self._body, self._skipped, self._trailers = head, body_length(head), 0, False
            self.expects_continue = head.version == "HTTP/1.1" and "expect" in head.fields and self._body != 0
        if self._inbox:
            self.expects_continue = False  # it did not wait
        if not (self._skip_chunks() if self._body is None else self._skip_bytes(self._body)):
            return None
        whole, self._head = self._head, None
        return whole

    def _check_beginning(self, length: int) -> None:
        """Refuse early what can never become a valid head, so that nobody waits for its end.

        Looks at the same bytes in the same order however they were cut, so that the answer is the same too.
        """
        inbox, length, scanned = self._inbox, min(length, MAX_HEAD_BYTES + 1), self._scanned
        if not self._line_seen:
            self._scan(min(length, _MAX_REQUEST_LINE_BYTES))
            if scanned < _MAX_BEGINNING_BYTES and not _BEGINNING.match(inbox[:_MAX_BEGINNING_BYTES]):
                raise ProblemError(400, "malformed request line")
            line_end = inbox.find(b"\n", max(2, scanned), _MAX_REQUEST_LINE_BYTES)
            if line_end >= 0:
                line = inbox[:line_end].decode("latin-1").removeprefix("\r\n").removesuffix("\r")
                if not _REQUEST_LINE.fullmatch(line):
                    raise ProblemError(400, "malformed request line")
            elif length > _MAX_REQUEST_LINE_BYTES:
                raise ProblemError(414, f"the target is longer than {MAX_TARGET_BYTES} bytes")
            self._line_seen = line_end >= 0
        self._scan(length)
        if length > MAX_HEAD_BYTES:
            raise ProblemError(431, f"the head is longer than {MAX_HEAD_BYTES} bytes")

    def _scan(self, length: int) -> None:
        """Look for bare line ends among the bytes that are new, so that each is looked at once."""
        bare = _BARE_LINE_END.search(self._inbox, max(0, self._scanned - 1), length)
        if bare:
            raise ProblemError(400, "a line ends with a bare CR or LF")
        self._scanned = max(self._scanned, length)

    def _skip_bytes(self, left: int) -> bool:
        taken = min(left, len(self._inbox))
        del self._inbox[:taken]
        self._body = left - taken
        return not self._body

    def _skip_chunks(self) -> bool:
        """Skip whole chunks, then the trailer fields (RFC 9112, 7.1)."""
        inbox = self._inbox
        while not self._trailers:
            line = _CHUNK_LINE.match(inbox)
            if line is None:
                if not _CHUNK_LINE_BEGINNING.match(inbox):
                    raise ProblemError(400, "malformed chunk")
                return False
            size = int(line[1], 16)
            if self._skipped + size > MAX_BODY_BYTES:
                raise ProblemError(413, f"the body is longer than {MAX_BODY_BYTES} bytes")
            end = line.end() + size
            if size:
                if not b"\r\n".startswith(inbox[end : end + 2]):
                    raise ProblemError(400, "a chunk is longer than its size")
                if len(inbox) < end + 2:
                    return False
                end += 2
            else:
                self._trailers = True
            del inbox[:end]
            self._skipped += size
        return self._skip_trailers()

    def _skip_trailers(self) -> bool:
        inbox = self._inbox
        if inbox.startswith(b"\r\n"):
            del inbox[:2]
            return True
        end = inbox.find(_END_OF_HEAD, max(0, self._scanned - 3))
        if end < 0:
            self._scan(len(inbox))
            if len(inbox) > MAX_HEAD_BYTES:
                raise ProblemError(431, f"the trailer fields are longer than {MAX_HEAD_BYTES} bytes")
            return False
        if end + 4 > MAX_HEAD_BYTES:
            raise ProblemError(431, f"the trailer fields are longer than {MAX_HEAD_BYTES} bytes")
        block = inbox[: end + 4].decode("latin-1")
        names = {name.lower() for name, _ in _FIELD_LINE.findall(block)}
        if _FIELD_LINES.fullmatch(block) is None or not names.isdisjoint(_FORBIDDEN_TRAILERS):
            raise ProblemError(400, "malformed or forbidden trailer field")
        del inbox[: end + 4]
        self._scanned = 0
        return True


def decode_segment(segment: str) -> str:
    """Percent-decode one path segment or query value as strict UTF-8 (RFC 3986, 2.1).

    Raises:
        ProblemError: 400 for a lone `%`, bytes that are not UTF-8, or control characters.
    """
    if "%" in segment:
        if segment.count("%") != len(re.findall("%[0-9A-Fa-f]{2}", segment)):
            raise ProblemError(400, "malformed percent-encoding")
        try:
            segment = unquote_to_bytes(segment).decode("utf-8")
        except UnicodeDecodeError:
            raise ProblemError(400, "the percent-encoded bytes are not UTF-8") from None
        if any(character < " " or character == "\x7f" for character in segment):
            raise ProblemError(400, "control characters are not allowed")
    return segment


class Page(NamedTuple):
    """The part of a result that is asked for."""

    limit: int
    offset: int


DEFAULT_LIMIT, MAX_LIMIT, MAX_OFFSET = 100, 1000, 1_000_000_000


def parse_page(query: str) -> Page:
    """Read `limit` and `offset` from a query string; other parameters are ignored.

    Raises:
        ProblemError: 400 if one is repeated, not a decimal number, or out of range.
    """
    values = {"limit": DEFAULT_LIMIT, "offset": 0}
    ranges = {"limit": (1, MAX_LIMIT), "offset": (0, MAX_OFFSET)}
    seen = set()
    for name, _, text in (part.partition("=") for part in query.split("&")):
        if name not in values:
            continue
        low, high = ranges[name]
        if name in seen or not re.fullmatch(r"[0-9]{1,10}", text) or not low <= int(text) <= high:
            raise ProblemError(400, f"{name} must be one number from {low} to {high}")
        seen.add(name)
        values[name] = int(text)
    return Page(**values)


# ── Tokens ────────────────────────────────────────────────────────────────────────────────────────────────────────────


class Tokens:
    """The bearer token that callers must show, and the one before it for one more period."""

    def __init__(self, period_seconds: float) -> None:
        self.period_seconds = period_seconds
        self._current: bytes | None = None
        self._previous: bytes | None = None
        self._previous_until = 0.0

    @property
    def known(self) -> bool:
        """Whether a token has been read yet."""
        return self._current is not None

    def adopt(self, token: str, now: float) -> bool:
        """Take the token as read at `now` (monotonic seconds); tell whether it is a new one."""
        fresh = token.encode()
        if fresh == self._current:
            return False
        self._previous, self._previous_until = self._current, now + self.period_seconds
        self._current = fresh
        return True

    def accepts(self, given: str, now: float) -> bool:
        """Compare in constant time. A token that no header can carry (not latin-1) is simply wrong."""
        shown = given.encode("latin-1", "replace")
        matches = self._current is not None and hmac.compare_digest(shown, self._current)
        if self._previous is not None and now < self._previous_until:
            matches |= hmac.compare_digest(shown, self._previous)
        return matches


# ── Metrics ───────────────────────────────────────────────────────────────────────────────────────────────────────────

ROUTES = (
    "/api/v1/id/{id}",
    "/api/v1/nickname/{nickname}",
    "/api/v1/username/{username}",
    "/api/v1/picture/record/{id}",
    "/api/v1/picture/raw/{id}",
    "/healthz",
    "/readyz",
    "/metrics",
    "/openapi.json",
    "/docs",
    "other",
)
METHODS = ("GET", "HEAD", "OPTIONS", "other")
STATUSES = (200, 204, 304, 400, 401, 404, 405, 408, 413, 414, 417, 422, 431, 500, 503, 504)
OPERATIONS = ("get", "get_multi", "get_any_replica", "lookup_in", "query")
OUTCOMES = ("ok", "not_found", "timeout", "unavailable", "error")
REASONS = ("malformed", "too_large", "too_slow", "overloaded", "not_ready")
SERVICES = ("key-value", "query")
# Seconds; the finest are those of a cache hit on the same machine, the last is the longest time-out allowed.
BUCKETS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)


class Family(NamedTuple):
    """One metric: its name, its kind, its labels, each of a closed set of values."""

    name: str
    kind: str
    help: str
    labels: tuple[tuple[str, tuple[object, ...]], ...] = ()
    gauge_of: str = "sum"  # how the rows of the workers become one value


FAMILIES = (
    Family(
        "http_requests_total",
        "counter",
        "Answered requests.",
        (("route", ROUTES), ("method", METHODS), ("status", STATUSES)),
    ),
    Family("http_request_duration_seconds", "histogram", "From a whole request to its answer.", (("route", ROUTES),)),
    Family("http_queue_seconds", "histogram", "From a whole request to the worker that takes it."),
    Family("http_requests_in_flight", "gauge", "Requests that wait or are being answered."),
    Family("http_connections", "gauge", "Open client connections."),
    Family("http_rejected_total", "counter", "Requests refused before they were worked on.", (("reason", REASONS),)),
    Family(
        "couchbase_operations_total",
        "counter",
        "Finished operations.",
        (("operation", OPERATIONS), ("outcome", OUTCOMES)),
    ),
    Family(
        "couchbase_operation_duration_seconds", "histogram", "Duration of operations.", (("operation", OPERATIONS),)
    ),
    Family(
        "couchbase_breaker_state", "gauge", "0 closed, 1 half-open, 2 open.", (("service", SERVICES),), gauge_of="max"
    ),
    Family("couchbase_ready", "gauge", "Whether profiles can be served.", gauge_of="max"),
    Family("auth_failures_total", "counter", "Requests without a valid token."),
    Family("log_lines_dropped_total", "counter", "Log lines that a full pipe did not take."),
    Family("process_cpu_seconds_total", "counter", "CPU time of all worker processes."),
    Family("process_resident_memory_bytes", "gauge", "Resident memory of all worker processes."),
    Family("process_open_fds", "gauge", "Open file descriptors of all worker processes."),
)


def _cells(family: Family) -> list[tuple[str, ...]]:
    """Return the keys of a family's numbers: name and label values; for histograms each bucket's and the sum's."""
    keys = [(family.name, *map(str, values)) for values in itertools.product(*(values for _, values in family.labels))]
    if family.kind == "histogram":
        return [(*key, part) for key in keys for part in (*map(str, BUCKETS), "+Inf", "sum")]
    return keys


COLUMNS = {key: number for number, key in enumerate(key for family in FAMILIES for key in _cells(family))}
_GAUGE_COLUMNS = [COLUMNS[key] for family in FAMILIES if family.kind == "gauge" for key in _cells(family)]
_IN_MICROSECONDS = frozenset(("process_cpu_seconds_total",))
_PER_PROCESS = ("process_cpu_seconds_total", "log_lines_dropped_total")  # begin at 0 in each new process
_FIRST_BUCKET = str(BUCKETS[0])
_SUM = len(BUCKETS) + 1  # behind the first bucket: the others, +Inf, and then the sum


class Metrics:
    """Numbers of all worker processes, in memory made before the fork: a row each, so that nobody waits for another.

    Counters outlive the worker that counted: one that takes a dead one's place goes on with its row. Times are whole
    microseconds.
    """

    def __init__(self, rows: int) -> None:
        self._cells = memoryview(mmap.mmap(-1, rows * len(COLUMNS) * 8)).cast("Q")
        self._lock = threading.Lock()
        self._started = time.time()
        self._bases: dict[str, int] = {}
        self._finished: deque[Operation] = deque()
        self.use_row(0)

    def use_row(self, row: int) -> None:
        """Count in this row from now on, on top of what is there."""
        width = len(COLUMNS)
        self.row = row
        self._own = self._cells[row * width : (row + 1) * width]
        self._bases = {name: self._own[COLUMNS[name,]] for name in _PER_PROCESS}

    def add(self, *key: str) -> None:
        """Count one."""
        with self._lock:
            self._own[COLUMNS[key]] += 1

    def put(self, value: int, *key: str) -> None:
        """Set a gauge."""
        self._own[COLUMNS[key]] = value

    def put_total(self, value: int, name: str) -> None:
        """Set a counter of this process's own, which began at 0 when the process did."""
        self._own[COLUMNS[name,]] = self._bases[name] + value

    def _observe(self, seconds: float, first: int) -> None:
        self._own[first + bisect.bisect_left(BUCKETS, seconds)] += 1
        self._own[first + _SUM] += int(seconds * 1e6)

    def operation(self, done: Operation) -> None:
        """Note a finished Couchbase operation: it is counted with the answers, which must not wait for that."""
        self._finished.append(done)

    def answers(self, handlers: Iterable[ProfileHandler]) -> None:
        """Count the answers of a whole batch, and the operations that have finished, under one lock."""
        own, waited_us = self._own, 0
        with self._lock:
            while self._finished:
                done = self._finished.popleft()
                own[COLUMNS["couchbase_operations_total", done.name, done.outcome]] += 1
                self._observe(done.seconds, COLUMNS["couchbase_operation_duration_seconds", done.name, _FIRST_BUCKET])
            for handler in handlers:
                where = _ANSWER_COLUMNS.get((handler.route, handler.command, handler.status))
                if where is None:  # a method or route that is not in the closed sets
                    route = handler.route if handler.route in ROUTES else "other"
                    command = handler.command if handler.command in METHODS else "other"
                    where = _ANSWER_COLUMNS[route, command, handler.status]
                count, first = where
                own[count] += 1
                own[first + bisect.bisect_left(BUCKETS, handler.seconds)] += 1
                own[first + _SUM] += int(handler.seconds * 1e6)
                own[_QUEUE_COLUMN + bisect.bisect_left(BUCKETS, handler.queue_seconds)] += 1
                waited_us += int(handler.queue_seconds * 1e6)
            own[_QUEUE_COLUMN + _SUM] += waited_us

    def clear_gauges(self, row: int) -> None:
        """Forget what a worker that has died last said of itself; its counters stay."""
        for column in _GAUGE_COLUMNS:
            self._cells[row * len(COLUMNS) + column] = 0

    def column(self, *key: str) -> list[int]:
        """Return one number of every row."""
        return self._cells[COLUMNS[key] :: len(COLUMNS)].tolist()

    def render(self) -> bytes:
        """Return all in Prometheus' text format, version 0.0.4."""
        lines = []
        for family in FAMILIES:
            lines += [f"# HELP {family.name} {family.help}", f"# TYPE {family.name} {family.kind}"]
            combine = max if family.gauge_of == "max" else sum
            for values in itertools.product(*(values for _, values in family.labels)):
                key = (family.name, *map(str, values))
                labels = [f'{label}="{value}"' for (label, _), value in zip(family.labels, values, strict=True)]
                if family.kind == "histogram":
                    lines += self._histogram(key, labels)
                    continue
                number: float = combine(self.column(*key))
                if number or family.name != "http_requests_total":  # the one with too many to name those at zero
                    number = number / 1e6 if family.name in _IN_MICROSECONDS else number
                    lines.append(f"{family.name}{_braces(labels)} {number}")
        lines += ["# HELP process_start_time_seconds Start of the service.", "# TYPE process_start_time_seconds gauge"]
        lines.append(f"process_start_time_seconds {self._started:.3f}")
        lines += ["# HELP process_max_fds Limit of open file descriptors a process.", "# TYPE process_max_fds gauge"]
        lines.append(f"process_max_fds {resource.getrlimit(resource.RLIMIT_NOFILE)[0]}")
        lines += ["# HELP build_info The service's version.", "# TYPE build_info gauge"]
        lines.append(f'build_info{{version="{__version__}"}} 1')
        return "\n".join([*lines, ""]).encode()

    def _histogram(self, key: tuple[str, ...], labels: list[str]) -> list[str]:
        lines, count = [], 0
        for bound in (*map(str, BUCKETS), "+Inf"):
            count += sum(self.column(*key, bound))
            lines.append(f"{key[0]}_bucket{_braces([*labels, f'le={chr(34)}{bound}{chr(34)}'])} {count}")
        if not count and labels:
            return []
        total = sum(self.column(*key, "sum")) / 1e6
        return [*lines, f"{key[0]}_sum{_braces(labels)} {total}", f"{key[0]}_count{_braces(labels)} {count}"]


def _braces(labels: list[str]) -> str:
    return f"{{{','.join(labels)}}}" if labels else ""


# Where the numbers of an answer are, by what a handler knows of it: looked up once a request.
_ANSWER_COLUMNS = {
    (route, method, status): (
        COLUMNS["http_requests_total", route, method, str(status)],
        COLUMNS["http_request_duration_seconds", route, _FIRST_BUCKET],
    )
    for route in ROUTES
    for method in METHODS
    for status in STATUSES
}
_QUEUE_COLUMN = COLUMNS["http_queue_seconds", _FIRST_BUCKET]


def process_usage() -> tuple[int, int, int]:
    """Return this process's CPU time (µs), resident memory (bytes) and open descriptors; 0 for what is not known."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    cpu = int((used.ru_utime + used.ru_stime) * 1e6)
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            resident = int(file.read().split()[1]) * resource.getpagesize()
        return cpu, resident, len(os.listdir("/proc/self/fd"))
    except OSError:  # not Linux: the peak is the nearest that there is
        return cpu, used.ru_maxrss * (1 if sys.platform == "darwin" else 1024), 0


# ── Processor ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def busy_seconds(stat: str) -> dict[int, float]:
    """Return for how long each processor has been busy since the machine started.

    Args:
        stat: the text of /proc/stat (proc_stat(5)).
    """
    busy = {}
    for line in stat.splitlines():
        if name := re.match(r"cpu([0-9]+) ", line):
            user, nice, system, _idle, _waiting, *others = map(int, line.split()[1:9])
            busy[int(name[1])] = sum((user, nice, system, *others)) / os.sysconf("SC_CLK_TCK")
    return busy


def calmer_processors(home: int, others: Mapping[int, float], margin: float = 0.25) -> list[int]:
    """Return the processors that other processes leave enough more of to be worth moving to; often none.

    Args:
        home: the one that is kept to now.
        others: the share of each, 0 to 1, that other processes use.
        margin: how much more.
    """
    return [processor for processor, share in others.items() if share <= others[home] - margin]


def do_nothing() -> None:
    """Do nothing: where there is no `Processor` to do something."""


class Processor:
    """Keeps all threads of this process on one processor at a time, and moves them when others crowd it.

    Python runs one of them at a time, and the SDK's own in turns with it. Where each hand-over wakes up another
    processor it costs more than the work that is handed over. With 32 clients, on two processors that a database and a
    load generator share (requests/s and CPU a request; lookups by nickname behind them):

    - wherever the kernel puts them: 21,700/s, 45 µs; 2,200/s
    - on one processor: 24,800/s, 37 µs; 4,500/s
    - and not interrupting each other when one wakes up (SCHED_BATCH, sched(7)): 26,700/s, 33 µs; 4,900/s
    """

    look_seconds = 1.0
    crowded_share = 0.4  # of the processor in others' use
    trim_seconds = 30.0
    arena_max = -8  # M_ARENA_MAX of glibc's malloc.h

    def __init__(self, number: int) -> None:
        """Keep the calling thread, and those that it will start, to one of the processors that it may use.

        Args:
            number: which of them to begin with, counted round; the processes of a service begin with different ones.

        Raises:
            OSError, KeyError, AttributeError: this system does not let it, does not tell, or has no such thing.
        """
        self._allowed = sorted(os.sched_getaffinity(0))
        self.home = self._allowed[number % len(self._allowed)]
        self.crowded = True  # until it is known better
        self._seen = self._look()
        self._trimmed = self._seen[0]
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
        os.sched_setaffinity(0, {self.home})
        # Threads that never run at the same time need no heaps of their own (mallopt(3)), and what each of those keeps
        # for itself adds up: 90 instead of 102 MB at the end of the benchmark.
        with contextlib.suppress(AttributeError):  # not glibc
            ctypes.CDLL(None).mallopt(self.arena_max, 1)

    def _look(self) -> tuple[float, float, dict[int, float]]:
        """Return now, this process's CPU seconds, and the busy seconds of the processors it may use."""
        with open("/proc/stat", encoding="ascii") as file:
            busy = busy_seconds(file.read())
        used = resource.getrusage(resource.RUSAGE_SELF)
        return time.monotonic(), used.ru_utime + used.ru_stime, {number: busy[number] for number in self._allowed}

    def give_way(self) -> None:
        """Let this process's other threads go first, but not others' processes: those would take a turn of ms each.

        Beside one that is always busy, a lone client's p50 is 0.14 ms; it was 3.9 ms when way was given there too.
        """
        if not self.crowded:
            os.sched_yield()

    def _trim(self) -> None:
        """Give back what lies free between what is in use of the heap (malloc_trim(3)), which is nobody else's to do.

        It takes 0.5 ms after profiles, and 3 ms after pictures, of which it gives back 5 of 82 MB.
        """
        with contextlib.suppress(AttributeError):  # not glibc
            ctypes.CDLL(None).malloc_trim(0)

    def keep(self) -> bool:
        """Move to a calmer processor if others crowd this one; tell whether it has. Now and then, trim the heap.

        Raises:
            OSError, KeyError: this system does not let it any more, or does not tell.
        """
        if time.monotonic() < self._seen[0] + self.look_seconds:
            return False
        (then, used_then, busy_then), (now, used, busy) = self._seen, self._look()
        self._seen = now, used, busy
        if now >= self._trimmed + self.trim_seconds:
            self._trimmed = now
            self._trim()
        others = {number: (busy[number] - busy_then[number]) / (now - then) for number in self._allowed}
        others[self.home] -= (used - used_then) / (now - then)
        self.crowded = others[self.home] > self.crowded_share
        calmer = calmer_processors(self.home, others)
        # by chance, as two processes that have met on one processor must not go on meeting
        if not calmer or random.getrandbits(1):
            return False
        self.home = random.choice(calmer)  # noqa: S311  # not a secret
        moved: set[str] = set()
        while left := set(os.listdir("/proc/self/task")) - moved:  # threads that one just moved starts come along
            for thread in left:
                with contextlib.suppress(ProcessLookupError):  # it has ended
                    os.sched_setaffinity(int(thread), {self.home})
            moved |= left
        return True


# ── Traces ────────────────────────────────────────────────────────────────────────────────────────────────────────────


class Operation(NamedTuple):
    """A finished Couchbase operation, as metrics, log and traces tell it."""

    name: str  # one of OPERATIONS
    target: str  # the collection, or the statement without its parameters
    started: float  # monotonic seconds
    seconds: float
    outcome: str  # one of OUTCOMES
    size: int = 1  # keys


_TRACEPARENT = re.compile(r"[0-9a-f]{2}-(?!0{32})([0-9a-f]{32})-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}(?:-.*)?")


def trace_id(traceparent: str) -> str:
    """Return the trace id of a W3C traceparent, or nothing if it is none."""
    found = _TRACEPARENT.fullmatch(traceparent)
    return found[1] if found and not traceparent.startswith("ff") else ""


def start_tracing(environ: Mapping[str, str]) -> Any:
    """Set OpenTelemetry up by its own OTEL_… variables; return a tracer, or None where nothing is traced.

    A provider that is there already (`opentelemetry-instrument` sets one) is used as it is. Otherwise an exporter must
    be named by OTEL_TRACES_EXPORTER, or an endpoint be given, and the SDK be installed: it reads the other variables.
    """
    wanted = [environ.get(f"OTEL_{name}") for name in ("TRACES_EXPORTER", "EXPORTER_OTLP_ENDPOINT")]
    wanted.append(environ.get("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"))
    if not any(wanted) or wanted[0] == "none" or environ.get("OTEL_SDK_DISABLED", "").lower() == "true":
        return None
    try:  # optional, and slow to import
        from opentelemetry import trace  # noqa: PLC0415
        from opentelemetry.sdk.trace import TracerProvider  # noqa: PLC0415
        from opentelemetry.sdk.trace.export import BatchSpanProcessor  # noqa: PLC0415
    except ImportError:
        return None
    if isinstance(trace.get_tracer_provider(), trace.ProxyTracerProvider):
        provider = TracerProvider()
        for name in (wanted[0] or "otlp").split(","):
            provider.add_span_processor(BatchSpanProcessor(_span_exporter(name.strip(), environ)))
        trace.set_tracer_provider(provider)
    return trace.get_tracer("micro_svc_demo", __version__)


def _span_exporter(name: str, environ: Mapping[str, str]) -> Any:
    """Return the exporter of a name that OTEL_TRACES_EXPORTER may have; packages announce theirs as entry points.

    Raises:
        FatalError: no installed package has it.
    """
    if name == "otlp":
        protocol = environ.get("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL") or environ.get(
            "OTEL_EXPORTER_OTLP_PROTOCOL", "grpc"
        )
        name = f"otlp_proto_{protocol.partition('/')[0]}"
    for entry in importlib.metadata.entry_points(group="opentelemetry_traces_exporter", name=name):
        return entry.load()()
    raise FatalError(f"OTEL_TRACES_EXPORTER: no installed package has the exporter {name!r}")


def stop_tracing() -> None:
    """Send what is not sent yet."""
    from opentelemetry import trace  # noqa: PLC0415  # there, as there was a tracer

    shutdown = getattr(trace.get_tracer_provider(), "shutdown", None)
    if shutdown:
        shutdown()


def record_spans(tracer: Any, handler: ProfileHandler, namespace: str) -> None:
    """Record an answered request as a server span, and its Couchbase operation as a child.

    Names and attributes are those of OpenTelemetry's semantic conventions for HTTP and databases. Paths, keys and
    parameters are left out: nicknames and usernames are personal data.
    """
    from opentelemetry import propagate, trace  # noqa: PLC0415  # there, as there is a tracer
    from opentelemetry.trace import SpanKind, Status, StatusCode  # noqa: PLC0415

    offset = time.time() - time.monotonic()

    def nanoseconds(moment: float) -> int:
        return int((moment + offset) * 1e9)

    route = handler.route or "other"
    span = tracer.start_span(
        f"{handler.command or 'HTTP'} {route}",
        context=propagate.extract(handler.headers),
        kind=SpanKind.SERVER,
        start_time=nanoseconds(handler.started),
        attributes={
            "http.request.method": handler.command or "_OTHER",
            "http.route": route,
            "http.response.status_code": handler.status,
            "url.scheme": "http",
            "network.protocol.version": handler.request_version.removeprefix("HTTP/"),
            "client.address": handler.client,
        },
    )
    if handler.status >= HTTPStatus.INTERNAL_SERVER_ERROR:
        span.set_status(Status(StatusCode.ERROR))
        span.set_attribute("error.type", str(handler.status))
    if done := handler.operation:
        attributes = {"db.system.name": "couchbase", "db.operation.name": done.name, "db.namespace": namespace}
        attributes["db.query.text" if done.name == "query" else "db.collection.name"] = done.target
        if done.size > 1:
            attributes["db.operation.batch.size"] = str(done.size)
        child = tracer.start_span(
            done.name if done.name == "query" else f"{done.name} {done.target}",
            context=trace.set_span_in_context(span),
            kind=SpanKind.CLIENT,
            start_time=nanoseconds(done.started),
            attributes=attributes,
        )
        if done.outcome not in {"ok", "not_found"}:
            child.set_status(Status(StatusCode.ERROR))
            child.set_attribute("error.type", done.outcome)
        child.end(nanoseconds(done.started + done.seconds))
    span.end(nanoseconds(handler.started + handler.seconds))


# ── Circuit breaker ───────────────────────────────────────────────────────────────────────────────────────────────────


class Breaker:
    """Stops asking a service that does not answer, and finds out with single probes when it does again.

    closed: every call is allowed; `threshold` failures in a row open it. open: none is, until the pause is over; then
    one call is let through as a probe. half-open: that probe decides: success closes, failure opens for twice as long.
    """

    CLOSED, HALF_OPEN, OPEN = STATES = ("closed", "half-open", "open")
    threshold = 5
    first_seconds, most_seconds = 1.0, 15.0
    check_seconds = 2.0  # after which an open one may be looked at by the background check, in the longest pause too
    lost_seconds = 30.0  # a probe that has not come back by then is counted as lost, and another allowed

    def __init__(
        self, changed: Callable[[str], None], jitter: Callable[[float, float], float] = random.uniform
    ) -> None:
        """Make a closed one.

        Args:
            changed: called with the new state after each change.
            jitter: draws a number between two, so that replicas do not probe in step.
        """
        self.state = self.CLOSED
        self._changed = changed
        self._jitter = jitter
        self._lock = threading.Lock()
        self._failures = 0  # in a row
        self._pause_seconds = self.first_seconds
        self._probe_at = 0.0
        self._since = 0.0  # when the state changed last

    def allow(self, now: float) -> bool:
        """Tell whether a call may be made at `now` (monotonic seconds); if so, its outcome must be told."""
        if self.state == self.CLOSED:
            return True
        with self._lock:
            if self.state == self.CLOSED:
                return True
            if now < self._probe_at:
                return False
            self._probe_at = now + self.lost_seconds
            self._since = now
            self.state = self.HALF_OPEN
        self._changed(self.HALF_OPEN)
        return True

    def succeeded(self, started: float) -> None:
        """Take note that a call made at `started` was answered."""
        if not self._failures:
            return
        with self._lock:
            if started < self._since:
                return
            self._failures = 0
            self._pause_seconds = self.first_seconds
            changed = self.state != self.CLOSED
            self.state = self.CLOSED
        if changed:
            self._changed(self.CLOSED)

    def failed(self, started: float, now: float) -> None:
        """Take note that a call made at `started` failed for a reason that speaks of the service.

        Calls that were under way when the state changed last do not count: they say nothing new.
        """
        with self._lock:
            if started < self._since or self.state == self.OPEN:
                return
            self._failures += 1
            if self.state == self.CLOSED and self._failures < self.threshold:
                return
            if self.state == self.HALF_OPEN:
                self._pause_seconds = min(self.most_seconds, self._pause_seconds * 2)
            self._open(now)
        self._changed(self.OPEN)

    def trip(self, now: float) -> None:
        """Open at once: the service is known to be down."""
        with self._lock:
            changed = self.state == self.CLOSED
            if changed:
                self._failures = self.threshold
                self._open(now)
        if changed:
            self._changed(self.OPEN)

    def may_be_checked(self, now: float) -> bool:
        """Tell whether the background check may ask though the pause is not over; what it learns changes no pause."""
        return self.state == self.OPEN and now >= self._since + self.check_seconds

    def retry_after_seconds(self, now: float) -> int:
        """Return after how many whole seconds it may be worth asking again, at least 1."""
        wait = self._probe_at - now if self.state == self.OPEN else self._pause_seconds
        return max(1, math.ceil(wait))

    def _open(self, now: float) -> None:
        self.state = self.OPEN
        self._since = now
        self._probe_at = now + self._pause_seconds * self._jitter(0.8, 1.0)


# ── The store: Couchbase ──────────────────────────────────────────────────────────────────────────────────────────────

USERS, IMAGES, AUTH = "user_data", "user_images", "service_auth"
TOKEN_KEY, TOKEN_PATH = "service_auth:1", "token"
MAX_KEY_BYTES = 246
MAX_CONFIG_BYTES = 8 << 20

# Constant texts: a caller's value is only ever a named parameter.
PROFILES_BY_NICKNAME, PROFILES_BY_USERNAME = (
    f"SELECT RAW p FROM `{USERS}` AS p WHERE p.`{name}` = $value ORDER BY META(p).id LIMIT $limit OFFSET $offset"  # noqa: S608
    for name in ("nickname", "user_id")
)


class FatalError(Exception):
    """Something that waiting cannot cure; the message is one line that says what to do."""


class Document(NamedTuple):
    """A document as stored: raw JSON, and the CAS that changes with every mutation."""

    value: bytes
    cas: int
    replica: bool = False  # from a replica, because the node of the active copy is down


class _RowBytes(Serializer):  # type: ignore[misc]  # the SDK's class is untyped
    """Passes query rows through as the bytes they came in."""

    def serialize(self, value: object) -> bytes:
        return json.dumps(value, ensure_ascii=False).encode()

    def deserialize(self, value: bytes) -> bytes:
        return value


class Failure(NamedTuple):
    """What one kind of SDK exception means to the caller and to the operator."""

    exceptions: tuple[type[Exception], ...]
    status: int
    detail: str
    advice: str = ""
    outage: bool = False  # speaks of the service, not of the request: counts for the breaker


PROVISION = "create the schema: python -m tests.sample_data --help"
MISSING_INDEX = (
    f"CREATE INDEX by_nickname IF NOT EXISTS ON `{USERS}`(nickname); "
    f"CREATE INDEX by_user_id IF NOT EXISTS ON `{USERS}`(user_id)"
)
_OUT_OF_REACH, _SCHEMA = "Couchbase is out of reach", "the database's schema is incomplete"
_NO_SCHEMA = Failure(
    (cb.ScopeNotFoundException, cb.CollectionNotFoundException, cb.KeyspaceNotFoundException), 500, _SCHEMA, PROVISION
)
_NO_INDEX = Failure((cb.QueryIndexNotFoundException,), 500, _SCHEMA, MISSING_INDEX)

# In this order: the first row that fits counts.
FAILURES = (
    Failure((cb.DocumentNotFoundException,), 404, "no such document"),
    Failure(
        (cb.AmbiguousTimeoutException, cb.UnAmbiguousTimeoutException, cb.TimeoutException),
        504,
        "Couchbase did not answer in time",
        outage=True,
    ),
    Failure(
        (cb.AuthenticationException,),
        503,
        _OUT_OF_REACH,
        "Couchbase refuses the user: check COUCHBASE_USER, its password, and that it may read this scope",
        outage=True,
    ),
    Failure(
        (
            cb.TemporaryFailException,
            cb.ServiceUnavailableException,
            cb.RequestCanceledException,
            cb.MissingConnectionException,
            cb.InternalServerFailureException,
            cb.RateLimitedException,
            cb.QuotaLimitedException,
            cb.HTTPException,
            cb.DocumentUnretrievableException,
        ),
        503,
        _OUT_OF_REACH,
        outage=True,
    ),
    Failure((cb.DocumentLockedException,), 503, "the document is locked"),
    Failure(
        (cb.BucketNotFoundException, cb.BucketDoesNotExistException),
        503,
        _OUT_OF_REACH,
        f"the bucket is gone: create it again, then {PROVISION}",
        outage=True,
    ),
    _NO_SCHEMA,
    _NO_INDEX,
    Failure((cb.ValueFormatException,), 500, "the document is not JSON", "store this document as JSON"),
)
UNEXPECTED = Failure((), 500, "unexpected failure", "not foreseen: see the error")


# What the SDK has no class of its own for: by the query service's code, and by the reason of a retry.
_FAILURES_BY_CODE = {4000: _NO_INDEX, 12003: _NO_SCHEMA, 12021: _NO_SCHEMA}
_COLLECTION_UNKNOWN = "key_value_collection_outdated"


def failure_of(error: BaseException) -> Failure:
    """Return the row of the failure map for an exception."""
    context = error_context(error)
    by_code = _FAILURES_BY_CODE.get(context.get("first_error_code") or 0)
    if by_code or _COLLECTION_UNKNOWN in (context.get("retry_reasons") or ()):
        return by_code or _NO_SCHEMA
    return next((row for row in FAILURES if isinstance(error, row.exceptions)), UNEXPECTED)


def outcome_of(error: BaseException) -> str:
    """Return what the metrics call a failure: one of OUTCOMES."""
    return {404: "not_found", 504: "timeout", 503: "unavailable"}.get(failure_of(error).status, "error")


class NodeMap(NamedTuple):
    """Which node holds which key: each key belongs to one of 1024 vBuckets, each vBucket to a node."""

    nodes: tuple[int, ...]  # by vBucket: the index of the node with the active copy
    replicas: bool

    def node(self, key: str) -> int:
        """Return the index of the node that holds a key's active copy (the hash is Couchbase's CRC32 variant)."""
        return self.nodes[(zlib.crc32(key.encode()) >> 16 & 0x7FFF) % len(self.nodes)]


def parse_node_map(config: Any) -> NodeMap:
    """Read a bucket's configuration as `/pools/default/b/BUCKET` has it.

    Raises:
        KeyError, TypeError, ValueError: it is not one.
    """
    rows = config["vBucketServerMap"]["vBucketMap"]
    count = len(config["vBucketServerMap"]["serverList"])
    nodes = tuple(int(row[0]) % count for row in rows)  # -1, no active copy: counted as the last node's
    if not nodes:
        raise ValueError("no vBuckets")
    return NodeMap(nodes, any(copy >= 0 for row in rows for copy in row[1:]))


def authenticator(settings: Settings) -> PasswordAuthenticator:
    """Return what the SDK shows to the cluster, and the roots that it trusts."""
    return PasswordAuthenticator(
        settings.couchbase_user, settings.couchbase_password, cert_path=settings.couchbase_tls_ca
    )


def tls_context(settings: Settings) -> ssl.SSLContext:
    """Return the settings' idea of TLS for this process's own connections: 1.2 at least, as `ssl` has it by default."""
    context = ssl.create_default_context(cafile=settings.couchbase_tls_ca)
    if not settings.couchbase_tls_verify:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context


def seed_addresses(settings: Settings) -> list[tuple[str, int | None]]:
    """Return the hosts of the connection string with their ports, None for a default port."""
    hosts = settings.connection_string.partition("://")[2].partition("?")[0].rstrip("/").split(",")
    parsed = (re.fullmatch(r"(\[.*\]|[^:]*)(?::([0-9]+))?", host) for host in hosts)
    return [(found[1].strip("[]"), int(found[2]) if found[2] else None) for found in parsed if found]


def check_certificates(settings: Settings) -> str:
    """Look at each seed's certificate before the SDK does.

    The SDK says no more than "time-out" if it is no good, and does not compare its host name at all (4.6.3).

    Returns:
        What is doubtful but for the SDK to decide, as it has Mozilla's roots besides the system's; empty if nothing is.

    Raises:
        FatalError: it is expired, for another host, or of an issuer that COUCHBASE_TLS_CA does not have.
    """
    doubt = ""
    if not settings.connection_string.startswith("couchbases:") or not settings.couchbase_tls_verify:
        return doubt
    try:
        context = tls_context(settings)
    except ssl.SSLError as error:
        raise FatalError(f"COUCHBASE_TLS_CA has no usable certificate: {error.reason}") from error
    for host, port in seed_addresses(settings):
        address = (host, port or 11207)
        try:
            with socket.create_connection(address, 5) as plain, context.wrap_socket(plain, server_hostname=host):
                pass
        except ssl.SSLCertVerificationError as error:
            refusal = f"the certificate of {host} is refused ({error.verify_message})"
            unknown_issuer = error.verify_code in {18, 19, 20, 21}  # X509_V_ERR_… of OpenSSL
            if unknown_issuer and settings.couchbase_tls_ca is None:
                doubt = f"{refusal}: set COUCHBASE_TLS_CA to the certificate of its authority"
                continue
            raise FatalError(f"{refusal}: check COUCHBASE_HOST and COUCHBASE_TLS_CA") from error
        except OSError:
            continue  # not there, a name that only DNS SRV knows, or no TLS: the SDK tries it in its own way
    return doubt


def fetch_bucket_config(settings: Settings, addresses: list[tuple[str, str, str]], timeout_seconds: float) -> Any:
    """Fetch the bucket's configuration from the first management service that gives it.

    Args:
        settings: for bucket, user and TLS.
        addresses: the management services as (address, ":", port).
        timeout_seconds: for each of them.

    Raises:
        OSError: none did.
    """
    login = base64.b64encode(f"{settings.couchbase_user}:{settings.couchbase_password}".encode()).decode()
    path = f"/pools/default/b/{quote(settings.couchbase_bucket, safe='')}"
    tls = settings.connection_string.startswith("couchbases:")
    # certificates name hosts, and the SDK reports addresses: with TLS the seeds' names are used
    hosts = [host for host, _ in seed_addresses(settings)] if tls else []
    for address, _, port in addresses:
        for host in hosts or [address.strip("[]")]:
            connection = (
                http.client.HTTPSConnection(host, int(port), timeout=timeout_seconds, context=tls_context(settings))
                if tls
                else http.client.HTTPConnection(host, int(port), timeout=timeout_seconds)
            )
            with contextlib.suppress(OSError, ValueError, http.client.HTTPException), contextlib.closing(connection):
                connection.request("GET", path, headers={"Authorization": f"Basic {login}"})
                response = connection.getresponse()
                body = response.read(MAX_CONFIG_BYTES)
                if response.status == HTTPStatus.OK:
                    return json.loads(body)
    raise OSError("no management service gives the bucket's configuration")


def open_cluster(settings: Settings) -> Any:
    """Connect to the cluster as the settings say; nothing of the SDK's own tracing, metrics or telemetry runs.

    Raises:
        CouchbaseException: wrong credentials, or nobody answers within the SDK's bootstrap time-out (10 s).
    """
    verify = {} if settings.couchbase_tls_verify else {"tls_verify": TLSVerifyMode.NONE}
    return Cluster.connect(
        settings.connection_string,
        ClusterOptions(
            authenticator(settings),
            timeout_options=ClusterTimeoutOptions(
                kv_timeout=timedelta(milliseconds=settings.couchbase_timeout_ms),
                query_timeout=timedelta(milliseconds=settings.couchbase_query_timeout_ms),
                management_timeout=timedelta(seconds=5),
            ),
            enable_tracing=False,
            enable_metrics=False,
            enable_app_telemetry=False,
            network=settings.couchbase_network,
            transcoder=RawJSONTranscoder(),
            **verify,
        ),
    )


class ProfileStore:
    """Owns the SDK: connects, reads the token, gets documents, runs queries, and knows what a failure means.

    Key-value has a circuit breaker for each node, as one that is down must not take the others' documents along;
    while nobody can say which keys are whose, one for all of them. Queries have one.
    """

    check_seconds = 2.0  # between two background checks
    check_timeout = timedelta(seconds=1)
    probe_timeout = timedelta(milliseconds=250)
    adhoc_seconds = 60.0
    ping_seconds = 60.0
    trouble_seconds = 5.0  # without a key-value failure, until documents are fetched in batches again

    def __init__(self, settings: Settings, log: Log, metrics: Metrics) -> None:
        self._settings = settings
        self._log = log
        self._metrics = metrics
        self._thread = threading.local()
        self._cluster: Any = None
        self._scope: Any = None
        self._collections: dict[str, Any] = {}
        self.timeout_seconds = settings.couchbase_timeout_ms / 1000
        self.query_timeout_seconds = settings.couchbase_query_timeout_ms / 1000
        self.tokens = Tokens(settings.token_refresh_seconds)
        self.query_breaker = self._breaker("query")
        self._node_map: NodeMap | None = None
        self._management: list[tuple[str, str, str]] = []  # where the node map comes from: (address, ":", port)
        self._pinged_at = -math.inf
        self._node_breakers = [self._breaker("key-value")]
        self._troubled = False
        self._last_failure = 0.0
        self._token_read_at = 0.0
        self._unanswered = ""  # why the last background check was not answered
        self._answering_nodes = 0  # how many did when it was not: the token's node may be the only one that is down
        self._adhoc_until = 0.0
        self.suspicion = threading.Event()  # set to have the next check at once

    def _breaker(self, service: str) -> Breaker:
        def changed(state: str) -> None:
            self._log.event("info" if state == Breaker.CLOSED else "warning", "breaker", service=service, state=state)
            self.suspicion.set()

        return Breaker(changed)

    # state: for the server, /readyz and the metrics

    @property
    def troubled(self) -> bool:
        """Whether a key-value operation has failed lately: then no document may wait for another's failure."""
        if self._troubled and time.monotonic() > self._last_failure + self.trouble_seconds:
            self._troubled = any(breaker.state != Breaker.CLOSED for breaker in self._node_breakers)
            if not self._troubled:
                for breaker in self._node_breakers:  # batches do not tell of each success
                    breaker.succeeded(self._last_failure + self.trouble_seconds)
        return self._troubled

    def suspect(self, seconds: float) -> None:
        """Take note of trouble for some seconds; the background check looks into it at once.

        Args:
            seconds: a failure is worth `trouble_seconds`; what may be mere slowness one, as documents got one by one
                cost several times as much, and a busy machine must not be made busier.
        """
        self._last_failure = max(self._last_failure, time.monotonic() - self.trouble_seconds + seconds)
        self._troubled = True
        self.suspicion.set()

    def breaker_states(self) -> dict[str, str]:
        """Return the state of each service's breaker: key-value is as well as its best node."""
        best = min((breaker.state for breaker in self._node_breakers), key=Breaker.STATES.index)
        return {"key-value": best, "query": self.query_breaker.state}

    def unready_reasons(self) -> list[str]:
        """Say why this process should get no requests; empty means it should."""
        if not self.tokens.known:
            return ["Couchbase: not connected yet"]
        reasons = []
        if self.breaker_states()["key-value"] == Breaker.OPEN:
            reasons.append("Couchbase: the breaker of key-value is open")
        if self._unanswered and not self._answering_nodes:
            reasons.append("Couchbase: the background check is not answered")
        periods = 3 * self.tokens.period_seconds
        if not self._unanswered and time.monotonic() > self._token_read_at + periods:
            reasons.append(f"Couchbase: the token could not be read for {periods:.0f} s")
        return reasons

    # connecting

    def connect(self) -> None:
        """Open the cluster and the bucket; blocks for at most about 20 s.

        Raises:
            FatalError: wrong credentials or no such bucket.
            CouchbaseException: anything that may pass.
        """
        settings = self._settings
        doubt = check_certificates(settings)
        try:
            cluster = open_cluster(settings)
        except cb.InvalidArgumentException as error:
            raise FatalError(f"the SDK refuses COUCHBASE_HOST or its options: {describe(error)}") from error
        except (cb.UnAmbiguousTimeoutException, cb.AmbiguousTimeoutException) as error:
            if doubt:
                raise FatalError(doubt) from error
            raise
        except cb.AuthenticationException as error:
            raise FatalError(
                f"Couchbase refuses user {settings.couchbase_user!r}: check COUCHBASE_USER and COUCHBASE_PASSWORD"
            ) from error
        try:
            self._scope = cluster.bucket(settings.couchbase_bucket).scope(settings.couchbase_scope)
        except cb.CouchbaseException as error:
            self._explain_bucket(cluster)
            cluster.close()
            if isinstance(error, cb.BucketNotFoundException):  # at once: the server refuses it to this user
                raise FatalError(
                    f"bucket {settings.couchbase_bucket!r} does not exist, or user {settings.couchbase_user!r} has no "
                    "role for it: check COUCHBASE_BUCKET and the user's roles"
                ) from error
            raise
        self._collections = {name: self._scope.collection(name) for name in (USERS, IMAGES, AUTH)}
        self._cluster = cluster

    def _explain_bucket(self, cluster: Any) -> None:
        """Tell a bucket that is missing from one that is slow: on the wire both look like a time-out, so ask."""
        name = self._settings.couchbase_bucket
        try:
            cluster.buckets().get_bucket(name)
        except cb.BucketDoesNotExistException as error:
            raise FatalError(
                f"bucket {name!r} does not exist: create it, or correct COUCHBASE_BUCKET (then {PROVISION})"
            ) from error
        except cb.AuthenticationException as error:
            raise FatalError(
                f"Couchbase refuses user {self._settings.couchbase_user!r} for bucket {name!r}: "
                "check COUCHBASE_PASSWORD and the user's roles"
            ) from error
        except cb.CouchbaseException:  # not allowed to ask, or nobody there: the first failure stands
            return

    def _explain_schema(self) -> None:
        """Raise FatalError if the scope or the token's collection is known to be missing."""
        settings = self._settings
        try:
            scopes = self._cluster.bucket(settings.couchbase_bucket).collections().get_all_scopes()
        except cb.CouchbaseException:
            return
        existing = {scope.name: {collection.name for collection in scope.collections} for scope in scopes}
        if settings.couchbase_scope not in existing:
            raise FatalError(
                f"bucket {settings.couchbase_bucket!r} has no scope {settings.couchbase_scope!r}: {PROVISION}"
            )
        if AUTH not in existing[settings.couchbase_scope]:
            raise FatalError(f"collection {AUTH!r} does not exist in scope {settings.couchbase_scope!r}: {PROVISION}")

    def close(self) -> None:
        """Close the connections to the cluster."""
        if self._cluster is not None:
            with contextlib.suppress(cb.CouchbaseException):
                self._cluster.close()

    def read_token(self, timeout: timedelta | None = None) -> None:
        """Read the service's token by a sub-document lookup and adopt it.

        Args:
            timeout: for this lookup; the setting's if None.

        Raises:
            FatalError: scope, collection or token document are missing, or hold no usable token.
            CouchbaseException: anything that may pass.
        """
        options = LookupInOptions(timeout=timeout or timedelta(seconds=self.timeout_seconds))
        started = time.monotonic()
        try:
            found = self._collections[AUTH].lookup_in(TOKEN_KEY, [path_get(TOKEN_PATH)], options)
            token = json.loads(found.content_as[bytes](0))
            self._done("lookup_in", AUTH, started, "ok")
        except cb.DocumentNotFoundException as error:
            self._done("lookup_in", AUTH, started, "not_found")
            raise FatalError(f"the token document {TOKEN_KEY!r} does not exist in {AUTH!r}: {PROVISION}") from error
        except (cb.PathNotFoundException, cb.PathMismatchException, cb.DocumentNotJsonException) as error:
            self._done("lookup_in", AUTH, started, "not_found")
            raise FatalError(f"the token document {TOKEN_KEY!r} has no field {TOKEN_PATH!r}: {PROVISION}") from error
        except Exception as error:
            self._done("lookup_in", AUTH, started, outcome_of(error))
            raise
        if not isinstance(token, str) or not re.fullmatch(r"[!-~]{1,4096}", token):
            raise FatalError(
                f"the token in {TOKEN_KEY!r} is not text of 1 to 4096 visible ASCII characters: {PROVISION}"
            )
        self._token_read_at = time.monotonic()
        if self.tokens.adopt(token, self._token_read_at):
            self._log.event("info", "token adopted")

    def start(self) -> None:
        """Connect where that is still to be done, and read the token for the first time.

        Raises:
            FatalError: what waiting cannot cure.
            CouchbaseException: anything that may pass.
        """
        if self._cluster is None:
            self.connect()
        try:
            self.read_token()
        except cb.CouchbaseException:
            self._explain_schema()
            raise
        self._read_node_map()

    def check(self) -> None:
        """Look whether Couchbase is well and the token still the same: the background check."""
        if self.query_breaker.may_be_checked(time.monotonic()):
            self._look_at_queries()
        if self.troubled:
            self._look_at_nodes()
        breaker, started = self._node_breaker(TOKEN_KEY), time.monotonic()
        try:
            self._read_token_again(breaker)
        except FatalError as error:  # it answers, but there is no token to be had: the last one stays
            self._unanswered = ""
            self._log.event("warning", "the token could not be read again; the last one stays", error=str(error))
        except Exception as error:
            if not self._unanswered:
                self._log.event("warning", "the background check is not answered", error=describe(error))
            self._unanswered = describe(error)
            self._failed(breaker, started)
            self._renew_password()  # a wrong one looks like a time-out: the SDK tries to sign in again and again
        else:
            self._unanswered = ""
        if self.troubled and (self._answering_nodes or not self._unanswered):  # else nobody could say
            self._read_node_map()  # nodes may have changed their parts

    def _look_at_queries(self) -> None:
        """Close the breaker of queries if one is answered: by now its pauses may be long."""
        started = time.monotonic()
        options = QueryOptions(  # not prepared, as a forgotten statement would never come back (`give_up_query`)
            adhoc=True,
            read_only=True,
            named_parameters={"value": "", "limit": 1, "offset": 0},
            timeout=self.probe_timeout,
            serializer=_RowBytes(),
        )
        with contextlib.suppress(Exception):  # it stays open; requests' own probes go on
            list(self._scope.query(PROFILES_BY_NICKNAME, options))
            self.query_breaker.succeeded(started)

    def _renew_password(self) -> None:
        """Take a password that has been changed from its file again, without a restart."""
        try:
            settings = _with_password(replace(self._settings, couchbase_password=""))
        except SettingsError:
            return
        if settings.couchbase_password != self._settings.couchbase_password:
            self._settings = settings
            self._cluster.set_authenticator(authenticator(settings))
            self._log.event("info", "password read again from its file")

    def _read_token_again(self, breaker: Breaker) -> None:
        """Read it with little patience at first: while its node is down, requests for others' documents wait."""
        try:
            self.read_token(self.probe_timeout)
        except cb.CouchbaseException:
            self._look_at_nodes()
            if breaker.state == Breaker.OPEN:
                raise
            self.read_token(self.check_timeout)

    def _look_at_nodes(self) -> None:
        """Find out which nodes are down, and open or close their breakers before requests have to find out.

        One whose breaker is closed is known to be down when it does not answer twice while another does: the threads
        of the requests that wait for it are missing to the others' documents.
        """
        endpoints = self._cluster.diagnostics().endpoints.get(ServiceType.KeyValue, [])
        lost = any(endpoint.state != EndpointState.Connected for endpoint in endpoints)
        answering, silent = 0, []
        for node, breaker in enumerate(self._node_breakers):
            started, was_closed = time.monotonic(), breaker.state == Breaker.CLOSED
            allowed = breaker.allow(started)
            if not allowed and not breaker.may_be_checked(started):
                continue
            if self._answers(node):
                answering += 1
                if not was_closed:
                    breaker.succeeded(started)
                continue
            if not allowed:
                continue
            breaker.failed(started, time.monotonic())
            if lost:
                breaker.trip(time.monotonic())
            elif was_closed:
                silent.append((node, breaker))
        for node, breaker in silent:
            if answering and not self._answers(node):
                breaker.trip(time.monotonic())
        self._answering_nodes = answering

    def _answers(self, node: int) -> bool:
        """Ask a node for a document that does not exist, in the way that requests ask."""
        node_map = self._node_map
        if node_map is not None and node not in node_map.nodes:
            return True  # it holds nothing, so nobody waits for it
        keys = (f"probe:{number}" for number in itertools.count())
        key = next(key for key in keys if node_map is None or node_map.node(key) == node)
        try:
            self._collections[USERS].get(key, GetOptions(timeout=self.probe_timeout))
        except cb.DocumentNotFoundException:
            return True
        except Exception:
            return False
        return True

    def _read_node_map(self) -> None:
        """Ask the cluster which node holds which keys.

        What goes wrong leaves the last answer in place: this only makes the failure of single nodes cheaper.
        """
        timeout_seconds = self.check_timeout.total_seconds()
        try:
            try:
                config = fetch_bucket_config(self._settings, self._management, timeout_seconds)
            except OSError:  # none is known yet, or they are gone: there may be others
                if not self._find_management():
                    raise
                config = fetch_bucket_config(self._settings, self._management, timeout_seconds)
            node_map = parse_node_map(config)
        except Exception as error:
            self._log.event("debug", "no node map", error=describe(error))
            return
        count = max(node_map.nodes) + 1
        if count != len(self._node_breakers):
            self._node_breakers = [self._breaker(f"key-value node {node}") for node in range(count)]
        self._node_map = node_map

    def _find_management(self) -> bool:
        """Ask the SDK for the addresses of the management services that answer; tell whether there are any.

        Once a minute at most: each ping of a service over HTTP costs 21 kB of memory that the SDK (4.6.3) never gives
        back.
        """
        now = time.monotonic()
        if now < self._pinged_at + self.ping_seconds:
            return False
        self._pinged_at = now
        options = PingOptions(service_types=[ServiceType.Management], timeout=self.check_timeout)
        endpoints = self._cluster.ping(options).endpoints[ServiceType.Management]
        found = [endpoint.remote.rpartition(":") for endpoint in endpoints if endpoint.state == PingState.OK]
        self._management = found or self._management
        return bool(found)

    # documents and rows

    def _node_breaker(self, key: str) -> Breaker:
        """Return the breaker of the node that holds a key."""
        breakers, node_map = self._node_breakers, self._node_map
        if node_map is None or len(breakers) == 1:
            return breakers[0]
        return breakers[node_map.node(key) % len(breakers)]

    def _done(self, name: str, target: str, started: float, outcome: str, size: int = 1) -> None:
        """Count an operation that has just finished."""
        done = Operation(name, target, started, time.monotonic() - started, outcome, size)
        self._thread.done = done
        self._metrics.operation(done)

    def last_operation(self) -> Operation | None:
        """Return the operation that the calling thread has finished last, once."""
        done, self._thread.done = getattr(self._thread, "done", None), None
        return done

    def _failed(self, breaker: Breaker, started: float) -> None:
        self.suspect(self.trouble_seconds)
        breaker.failed(started, time.monotonic())

    def get(self, collection: str, key: str, timeout_seconds: float | None = None) -> Document:
        """Get one document.

        Args:
            collection: its collection.
            key: its key.
            timeout_seconds: for this operation; the setting's if None.

        Raises:
            ProblemError: 404, or what the failure means.
        """
        now = time.monotonic()
        breaker = self._node_breaker(key)
        if not breaker.allow(now):
            return self._get_replica(collection, key, breaker, now)
        try:
            if timeout_seconds is None:
                result = self._collections[collection].get(key)
            else:
                options = GetOptions(timeout=timedelta(seconds=timeout_seconds))
                result = self._collections[collection].get(key, options)
            document = Document(result.value, result.cas)
        except Exception as error:
            self._done("get", collection, now, outcome_of(error))
            raise self._document_problem(error, breaker, now) from error
        self._done("get", collection, now, "ok")
        breaker.succeeded(now)
        return document

    def _get_replica(self, collection: str, key: str, breaker: Breaker, now: float) -> Document:
        """Get a document whose node is down from a replica, if the cluster keeps any."""
        if self._node_map is None or not self._node_map.replicas:
            raise unavailable(_OUT_OF_REACH, seconds=breaker.retry_after_seconds(now))
        try:
            options = GetAnyReplicaOptions(timeout=self.probe_timeout)
            result = self._collections[collection].get_any_replica(key, options)
            document = Document(result.value, result.cas, replica=bool(result.is_replica))
        except Exception as error:  # also a document that does not exist: the node that would know is down
            self._done("get_any_replica", collection, now, outcome_of(error))
            raise unavailable(_OUT_OF_REACH, seconds=breaker.retry_after_seconds(now)) from error
        self._done("get_any_replica", collection, now, "ok")
        return document

    def get_many(
        self, collection: str, keys: list[str], timeout_seconds: float | None = None
    ) -> dict[str, Document | ProblemError]:
        """Get several documents at once: one hand-over between the threads of Python and the SDK for all of them."""
        found: dict[str, Document | ProblemError] = {}
        started, outcome = time.monotonic(), "ok"
        try:
            options = {} if timeout_seconds is None else {"timeout": timedelta(seconds=timeout_seconds)}
            answer = self._collections[collection].get_multi(keys, return_exceptions=True, **options)
        except Exception as error:
            self._done("get_multi", collection, started, outcome_of(error), len(keys))
            return dict.fromkeys(keys, self._document_problem(error, self._node_breaker(keys[0]), started))
        for key, result in answer.results.items():
            try:
                found[key] = tuple.__new__(Document, (result.value, result.cas, False))  # half the time of its own
            except Exception as error:
                found[key] = self._document_problem(error, self._node_breaker(key), started)
            else:
                if self._troubled:
                    self._node_breaker(key).succeeded(started)
        for key, failure in answer.exceptions.items():
            found[key] = self._document_problem(failure, self._node_breaker(key), started)
            outcome = outcome if failure_of(failure).status == HTTPStatus.NOT_FOUND else outcome_of(failure)
        self._done("get_multi", collection, started, outcome, len(keys))
        return found

    def _document_problem(self, error: Exception, breaker: Breaker, started: float) -> ProblemError:
        if failure_of(error).outage:
            self._failed(breaker, started)
        else:
            breaker.succeeded(started)
        return self.problem(error, "get")

    def query(self, statement: str, parameters: dict[str, object], timeout_seconds: float | None = None) -> list[bytes]:
        """Run a prepared, read-only statement; its rows come back as raw JSON.

        Args:
            statement: SQL++ with named parameters.
            parameters: their values.
            timeout_seconds: for this query; the setting's if None.

        Raises:
            ProblemError: what the failure means.
        """
        now = time.monotonic()
        breaker = self.query_breaker
        if not breaker.allow(now):
            raise unavailable(_OUT_OF_REACH, seconds=breaker.retry_after_seconds(now))
        options = QueryOptions(
            adhoc=now < self._adhoc_until,
            read_only=True,
            named_parameters=parameters,
            timeout=timedelta(seconds=timeout_seconds or self.query_timeout_seconds),
            scan_consistency=QueryScanConsistency.NOT_BOUNDED,
            serializer=_RowBytes(),
        )
        try:
            rows = list(self._scope.query(statement, options))
        except Exception as error:
            self._done("query", statement, now, outcome_of(error))
            if failure_of(error).outage:
                breaker.failed(now, time.monotonic())
            else:
                breaker.succeeded(now)
            raise self.problem(error, "query") from error
        self._done("query", statement, now, "ok")
        breaker.succeeded(now)
        return rows

    def give_up_query(self, started: float, now: float) -> None:
        """Take note of a query that the SDK has not given back.

        What makes it wait for ever is a server that has forgotten a prepared statement, by a restart, say: the SDK
        (4.3 to 4.6) prepares it again and loses the rows, and the thread and the connection with them. As a server
        that goes on forgetting would cost one of each a query, for a minute statements are not prepared.
        """
        self.query_breaker.failed(started, now)
        self._adhoc_until = now + self.adhoc_seconds

    def problem(self, error: Exception, operation: str) -> ProblemError:
        """Say what a failure of the SDK means to the caller, and tell the operator what to do about it."""
        failure = failure_of(error)
        if failure.status != HTTPStatus.NOT_FOUND:
            level = "error" if failure.advice else "warning"
            advice = {"advice": failure.advice} if failure.advice else {}
            self._log.event(level, "couchbase failure", operation=operation, error=describe(error), **advice)
        if failure.status == HTTPStatus.SERVICE_UNAVAILABLE:
            return unavailable(failure.detail)
        return ProblemError(failure.status, failure.detail)


def time_left(started: float, timeout_seconds: float, late_seconds: float) -> float | None:
    """Return for how many seconds Couchbase may still be asked for a request of `started` (monotonic).

    None, for the setting's, if it is not late: another time-out costs an operation up to a tenth more.
    """
    waited = time.monotonic() - started
    return None if waited < late_seconds else max(0.01, timeout_seconds - waited)


class QueryPending(BaseException):  # a signal, not an error: passes every `except Exception`
    """`do_GET` asked for a query, which is not a document worker's to run."""


class Batch:
    """What a document worker's handlers see as the store: notes which documents they ask for, then gets them all."""

    def __init__(self, store: ProfileStore) -> None:
        self._store = store
        self._wanted: dict[str, dict[str, None]] = {}  # a set in the order of asking: get_multi takes each key once
        self._found: dict[str, dict[str, Document | ProblemError]] = {}  # by collection
        self._operations: dict[str, Operation | None] = {}
        self.operation: Operation | None = None  # the one that brought what was asked for last

    def get(self, collection: str, key: str) -> Document | None:
        """Return the document if `fetch` has brought it; if not, note that it is wanted and return None.

        Raises:
            ProblemError: it could not be got.
        """
        brought = self._found.get(collection)
        found = brought.get(key) if brought else None
        if found is None:
            self._wanted.setdefault(collection, {})[key] = None
            return None
        self.operation = self._operations.get(collection)
        if isinstance(found, ProblemError):
            raise found
        return found

    def query(self, statement: str, parameters: dict[str, object]) -> list[bytes]:
        """Refuse, always: queries have workers of their own.

        Raises:
            QueryPending: always.
        """
        raise QueryPending

    def fetch(self, timeout_seconds: float | None = None) -> None:
        """Get what is wanted of one collection, in one operation; another collection's is asked for again.

        Args:
            timeout_seconds: for the operation; the setting's if None.
        """
        collection, wanted = next(iter(self._wanted.items()))
        self._wanted = {}
        keys = list(wanted)
        found = self._store.get_many(collection, keys, timeout_seconds)
        for key in wanted.keys() - found.keys():
            found[key] = ProblemError(500, "unexpected failure")
        self._found.setdefault(collection, {}).update(found)
        self._operations[collection] = self._store.last_operation()


class Alone(Batch):
    """The store for one request by itself: it gets its document at once, within what is left of its time."""

    late_seconds = 0.005  # sooner than a batch is late, whose oldest request sets the time-out for all

    def __init__(self, store: ProfileStore, started: float) -> None:
        super().__init__(store)
        self._started = started

    def get(self, collection: str, key: str) -> Document:
        """Get the document.

        Raises:
            ProblemError: it could not be got.
        """
        try:
            left = time_left(self._started, self._store.timeout_seconds, self.late_seconds)
            return self._store.get(collection, key, left)
        finally:
            self.operation = self._store.last_operation()


class ForQuery(Alone):
    """The store for one request that has come to a query worker."""

    def query(self, statement: str, parameters: dict[str, object]) -> list[bytes]:
        """Run the query.

        Raises:
            ProblemError: it failed.
        """
        left = time_left(self._started, self._store.query_timeout_seconds, self.late_seconds)
        try:
            return self._store.query(statement, parameters, left)
        finally:
            self.operation = self._store.last_operation()


# ── Contract ──────────────────────────────────────────────────────────────────────────────────────────────────────────
# What the service promises, for machines (OpenAPI 3.1) and for people (Swagger UI on it). Limits are the constants that
# the code checks, and the problems in it are made by `ProblemError`.

# As published in the npm package swagger-ui-dist, of the version in DOCS_ASSETS_URL's default:
# openssl dgst -sha384 -binary FILE | openssl base64 -A
SWAGGER_UI_SCRIPT, SWAGGER_UI_SCRIPT_INTEGRITY = (
    "swagger-ui-bundle.js",
    "sha384-ZPehFMQommnnuaZ4rpxgkgTT2DKFVp4hZC/7pLit+9Lek9T1YGSo23eHFbvNkXkw",
)
SWAGGER_UI_STYLE, SWAGGER_UI_STYLE_INTEGRITY = (
    "swagger-ui.css",
    "sha384-Ov4/wv3j2bmct8cDc5X4ngJZohVPzEmc6uDPH8WeljUxO5vtoykvMEfbu9Vh6RaW",
)
HTML_TYPE = "text/html; charset=utf-8"
# Nothing is sent to a validator of others, and a token is forgotten with the page.
_DOCS_SCRIPT = (
    'window.SwaggerUIBundle?.({url: "/openapi.json", dom_id: "#docs", validatorUrl: null, persistAuthorization: false, '
    'supportedSubmitMethods: ["get"], tryItOutEnabled: true, displayRequestDuration: true})'
)


@functools.cache
def docs_page(assets_url: str) -> bytes:
    """Return a page that loads Swagger UI from `assets_url`; without it, the page still links to the document."""
    return f"""<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<meta name="referrer" content="no-referrer">
<title>User profiles</title>
<link rel="icon" href="data:,">
<link rel="stylesheet" href="{assets_url}/{SWAGGER_UI_STYLE}"
 integrity="{SWAGGER_UI_STYLE_INTEGRITY}" crossorigin="anonymous">
<div id="docs"><p>Swagger UI comes here, unless {assets_url} is out of reach.
 The document itself: <a href="/openapi.json">/openapi.json</a></p></div>
<script src="{assets_url}/{SWAGGER_UI_SCRIPT}"
 integrity="{SWAGGER_UI_SCRIPT_INTEGRITY}" crossorigin="anonymous"></script>
<script>{_DOCS_SCRIPT}</script>
</html>
""".encode()


@functools.cache
def docs_policy(assets_url: str) -> str:
    """Return the page's Content-Security-Policy, as a whole header field: only what Swagger UI can't do without."""
    initialiser = base64.b64encode(hashlib.sha256(_DOCS_SCRIPT.encode()).digest()).decode()
    sources = {
        "default-src": "'none'",
        # whole URLs, as an origin that hosts every package would allow any other script of its; the page's own by hash
        "script-src": f"{assets_url}/{SWAGGER_UI_SCRIPT} 'sha256-{initialiser}'",
        "style-src": f"{assets_url}/{SWAGGER_UI_STYLE}",
        "img-src": "data: blob:",  # the style sheet's icons; the pictures that come as answers
        "connect-src": "'self'",  # the document, and what is tried out
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
    }
    return "Content-Security-Policy: " + "; ".join(f"{name} {value}" for name, value in sources.items())


_JSON: TypeAlias = dict[str, Any]


def _ref(kind: str, name: str) -> _JSON:
    return {"$ref": f"#/components/{kind}/{name}"}


def _parameter(name: str, where: str, description: str, example: object, **schema: object) -> _JSON:
    """Describe one parameter.

    Only those in the path are required. A header field's example stays in the schema: Swagger UI would send any other
    with every request that is tried out.
    """
    described = {"name": name, "in": where, "description": description}
    if where == "header":
        return {**described, "schema": {**schema, "examples": [example]}}
    return {**described, "required": where == "path", "schema": schema, "example": example}


# Name: description, example, pattern of the whole value.
_HEADER_FIELDS = {
    "X-Request-ID": ("the caller's, if it is sane, or a new one", "3f9c2a-1d", r"[A-Za-z0-9._-]{1,64}"),
    "X-Content-Type-Options": ("the body is what its type says", "nosniff", "nosniff"),
    "ETag": ("changes whenever the document does", '"18a5c91f20b30000"', '"[0-9a-f]+"'),
    "Cache-Control": ("for the caller alone, who asks anew", "private, no-cache", "private, no-cache"),
    "Link": (
        "the next page, while more remain",
        '</api/v1/nickname/doc?limit=2&offset=2>; rel="next"',
        '<[!-~]+>; rel="next"',
    ),
    "X-Couchbase-Replica": ("from a replica, which may lag: the node of the document is down", "true", "true"),
    "Content-Security-Policy": (
        "what the body may do as a page",
        "default-src 'none'; sandbox",
        "default-src 'none'; .+",
    ),
    "WWW-Authenticate": ("the scheme", "Bearer", "Bearer"),
    "Retry-After": ("after how many seconds to come back", "1", "[1-9][0-9]*"),
    "Allow": ("the methods there are", "GET, HEAD", "GET, HEAD"),
}


def _headers(always: str, sometimes: str = "") -> _JSON:
    """Describe the header fields of one answer, named with spaces between them. Every answer has two more."""
    required = dict.fromkeys(f"X-Request-ID X-Content-Type-Options {always}".split(), True)
    described = {}
    for name in [*required, *sometimes.split()]:
        description, example, pattern = _HEADER_FIELDS[name]
        schema = {"type": "string", "pattern": f"^{pattern}$"}
        described[name] = {
            "required": name in required,
            "description": description,
            "schema": schema,
            "example": example,
        }
    return described


def _problem(status: int, detail: str, *, always: str = "", sometimes: str = "", reasons: Sequence[str] = ()) -> _JSON:
    """Describe an answer that is a problem document, with `detail` for an example."""
    example = json.loads(ProblemError(status, detail, reasons=reasons).document("3f9c2a-1d"))
    return {
        "description": HTTPStatus(status).phrase,
        "headers": _headers(always, sometimes),
        "content": {PROBLEM_TYPE: {"schema": _ref("schemas", "Problem"), "example": example}},
    }


def _route(name: str, tag: str, summary: str, answer: _JSON, statuses: Iterable[int] = (), *parameters: _JSON) -> _JSON:
    """Describe one route.

    Args:
        name: of the operation.
        tag: what it belongs to; all but `operation` want a token.
        summary: what it is for.
        answer: its 200.
        statuses: what else it may answer, beside what any request may get.
        *parameters: what it takes.
    """
    others = sorted({*statuses, 400, 408, 413, 414, 417, 431, 500, 503})
    security: _JSON = {} if tag == "operation" else {"security": [{"bearer": []}, {"token": []}]}
    return {
        "get": {
            "operationId": name,
            "tags": [tag],
            "summary": summary,
            "parameters": [*parameters, _ref("parameters", "X-Request-ID")],
            "responses": {"200": answer} | {str(status): _ref("responses", str(status)) for status in others},
            **security,
        }
    }


def _answer(description: str, media_type: str, body: _JSON, always: str = "", sometimes: str = "") -> _JSON:
    """Describe a 200: its body (schema and example) and its header fields."""
    return {"description": description, "headers": _headers(always, sometimes), "content": {media_type: body}}


_PICTURE_EXAMPLE = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mP8z8BQDwAEhQGAhKmMIQAAAABJRU5ErkJggg=="
_PROFILE_EXAMPLE: _JSON = {
    "record_id": 1,
    "name": "Tina Walker",
    "nickname": "doc",
    "picture": 1,
    "user_id": "twalker1",
    "email": "tina.walker1@example.org",
    "email_verified": True,
    "first_name": "Tina",
    "last_name": "Walker",
    "address": "1334 Deanna Crossing Apt. 325",
    "city": "Matthewbury",
    "state": "IL",
    "zip_code": "60872",
    "phone": "+1-285-555-0143",
    "date_of_birth": "1959-12-01",
}
_METRICS_SERVER: _JSON = {
    "url": "http://{host}:{port}",
    "description": "the metrics port",
    "variables": {"host": {"default": "localhost"}, "port": {"default": "9090"}},
}
_NO_CONTROLS = r"^[^\x00-\x1f\x7f]+$"
_RECORD_EXAMPLE: _JSON = {"record_id": 1, "type": "png", "image": _PICTURE_EXAMPLE}


def _schemas() -> _JSON:
    text, integer = {"type": "string"}, {"type": "integer"}
    profile = {name: integer if isinstance(value, int) else text for name, value in _PROFILE_EXAMPLE.items()}
    profile |= {
        "picture": {**integer, "description": "the id of a picture"},
        "user_id": {**text, "description": "the username"},
        "email": {**text, "format": "email"},
        "email_verified": {"type": "boolean"},
        "date_of_birth": {**text, "format": "date"},
    }
    record = {
        "record_id": integer,
        "type": {**text, "description": f"of the media type image/…; usable if it matches `{_PICTURE_TYPE.pattern}`"},
        "image": {**text, "contentEncoding": "base64"},
    }
    problem = {
        "title": {**text, "description": "the status in words"},
        "status": {**integer, "minimum": 400, "maximum": 599},
        "detail": {**text, "description": "what went wrong, for the caller"},
        "request_id": {**text, "description": "the same as in X-Request-ID"},
        "reasons": {"type": "array", "items": text, "minItems": 1, "description": "why it is not ready"},
    }
    breakers = {name: {"enum": list(Breaker.STATES)} for name in ("key-value", "query")}
    closed = {"type": "object", "additionalProperties": False}
    stored = {"type": "object", "required": ["record_id"], "description": "As stored: nothing is changed or left out."}
    return {
        "Profile": {**stored, "properties": profile},
        "PictureRecord": {**stored, "properties": record},
        "Problem": {
            **closed,
            "description": "A problem document (RFC 9457).",
            "required": ["title", "status", "detail", "request_id"],
            "properties": problem,
        },
        "Alive": {**closed, "required": ["status"], "properties": {"status": {"const": "alive"}}},
        "Ready": {
            **closed,
            "required": ["status", "breakers"],
            "properties": {
                "status": {"const": "ready"},
                "breakers": {**closed, "required": list(breakers), "properties": breakers},
            },
        },
    }


def _responses() -> _JSON:
    """Describe all answers but the 200s; below /api/ they also say that nobody else may keep them."""
    private = "Cache-Control"
    return {
        "304": {
            "description": "Not Modified: If-None-Match names the ETag",
            "headers": _headers(f"{private} ETag", "X-Couchbase-Replica Content-Security-Policy"),
        },
        "400": _problem(400, f"limit must be one number from 1 to {MAX_LIMIT}", sometimes=private),
        "401": _problem(401, "a valid bearer token is required", always=f"{private} WWW-Authenticate"),
        "404": _problem(404, "no such document", sometimes=private),
        "405": _problem(405, "POST is not supported", always="Allow", sometimes=private),
        "408": _problem(408, "the request did not arrive in time", sometimes=private),
        "413": _problem(413, f"the body is longer than {MAX_BODY_BYTES} bytes", sometimes=private),
        "414": _problem(414, f"the target is longer than {MAX_TARGET_BYTES} bytes", sometimes=private),
        "417": _problem(417, "the only expectation that can be met is 100-continue", sometimes=private),
        "422": _problem(422, "the picture record has no usable type or base64 image", always=private),
        "431": _problem(431, f"the head is longer than {MAX_HEAD_BYTES} bytes", sometimes=private),
        "500": _problem(500, "unexpected failure", sometimes=private),
        "503": _problem(503, "not ready", always="Retry-After", sometimes=private, reasons=["draining"]),
        "504": _problem(504, "Couchbase did not answer in time", always=private),
    }


def _paths() -> _JSON:
    def some(schema: str, example: _JSON, most: int = 1) -> _JSON:
        listed = {"type": "array", "items": _ref("schemas", schema), "minItems": 1, "maxItems": most}
        return {"schema": listed, "example": [example]}

    def id_of(collection: str) -> _JSON:
        longest = MAX_KEY_BYTES - len(f"{collection}:")
        text = {"type": "string", "minLength": 1, "maxLength": longest, "pattern": _NO_CONTROLS}
        return _parameter("id", "path", f"at most {longest} bytes of UTF-8, no control characters", "1", **text)

    def name(field: str, example: str) -> _JSON:
        return _parameter(field, "path", "matched exactly", example, type="string", minLength=1, pattern=_NO_CONTROLS)

    def local(schema: _JSON, example: object) -> _JSON:
        return {"schema": schema, "example": example}

    private, tagged, replica = "Cache-Control", "Cache-Control ETag", "X-Couchbase-Replica"
    unless, limit, offset = (_ref("parameters", name) for name in ("If-None-Match", "limit", "offset"))
    profile, record = some("Profile", _PROFILE_EXAMPLE), some("PictureRecord", _RECORD_EXAMPLE)
    page = _answer("one page", JSON_TYPE, some("Profile", _PROFILE_EXAMPLE, MAX_LIMIT), private, "Link")
    alive = local(_ref("schemas", "Alive"), {"status": "alive"})
    breakers = {"key-value": Breaker.CLOSED, "query": Breaker.CLOSED}
    ready = local(_ref("schemas", "Ready"), {"status": "ready", "breakers": breakers})
    text = {"type": "string"}
    metrics = local(text, "# HELP couchbase_ready Whether Couchbase answers.\n# TYPE couchbase_ready gauge\n")
    # fmt: off
    return {
        "/api/v1/id/{id}": _route(
            "profile_by_id", "profiles", "The profile with this id",
            _answer("the profile", JSON_TYPE, profile, tagged, replica), (304, 401, 404, 504), id_of(USERS), unless),
        "/api/v1/nickname/{nickname}": _route(
            "profiles_by_nickname", "profiles", "The profiles with this nickname, ordered by document id",
            page, (401, 404, 504), name("nickname", "doc"), limit, offset),
        "/api/v1/username/{username}": _route(
            "profiles_by_username", "profiles", "The profiles with this username (user_id), ordered by document id",
            page, (401, 404, 504), name("username", "twalker1"), limit, offset),
        "/api/v1/picture/record/{id}": _route(
            "picture_record", "pictures", "The record of a picture",
            _answer("the record", JSON_TYPE, record, tagged, replica), (304, 401, 404, 504), id_of(IMAGES), unless),
        "/api/v1/picture/raw/{id}": _route(
            "picture", "pictures", "The picture itself",
            _answer("the picture", "image/*", {}, f"{tagged} Content-Security-Policy", replica),
            (304, 401, 404, 422, 504), id_of(IMAGES), unless),
        "/healthz": _route(
            "healthz", "operation", "Whether the process can answer", _answer("it can", JSON_TYPE, alive)),
        "/readyz": _route(
            "readyz", "operation", "Whether it can serve profiles; 503 with the reasons if it can't",
            _answer("it can", JSON_TYPE, ready)),
        "/metrics": {"servers": [_METRICS_SERVER]} | _route(
            "metrics", "operation", "Prometheus' text format, on the metrics port; 404 on the other",
            _answer("the metrics", "text/plain", metrics), (404,)),
        "/openapi.json": _route(
            "openapi", "operation", "This document",
            _answer("OpenAPI 3.1", JSON_TYPE, local({"type": "object"}, {"openapi": "3.1.0"}))),
        "/docs": _route(
            "docs", "operation", "Swagger UI on this document",
            _answer("a page", "text/html", local(text, "<!doctype html>"), "Content-Security-Policy")),
    }
    # fmt: on


_DESCRIPTION = """User profiles and pictures out of Couchbase.

`HEAD` works wherever `GET` does, `OPTIONS` says which methods there are, and any other method is answered 405 with
`Allow`. Unknown query parameters are ignored. Errors are problem documents (RFC 9457). Every answer has an
`X-Request-ID`: quote it to the operator. HTTP's own `Date`, `Content-Length` and `Connection` are not listed."""


def _parameters() -> _JSON:
    count = {"type": "integer", "minimum": 1, "maximum": MAX_LIMIT, "default": DEFAULT_LIMIT}
    start = {"type": "integer", "minimum": 0, "maximum": MAX_OFFSET, "default": 0}
    sane = f"returned, and logged, if it matches `{_SANE_REQUEST_ID.pattern}`; otherwise a new one is made"
    rows = [
        _parameter("limit", "query", "how many at most", DEFAULT_LIMIT, **count),
        _parameter("offset", "query", "how many to leave out", 0, **start),
        _parameter("If-None-Match", "header", "the ETag that the caller has", '"18a5c91f20b30000"', type="string"),
        _parameter("X-Request-ID", "header", sane, "3f9c2a-1d", type="string"),
    ]
    return {row["name"]: row for row in rows}


@functools.cache
def openapi() -> bytes:
    """Return the OpenAPI document as JSON; made once, as it stays the same."""
    document = {
        "openapi": "3.1.0",
        "info": {"title": "User profiles", "version": __version__, "description": _DESCRIPTION},
        "servers": [{"url": "/"}],
        "tags": [
            {"name": "profiles", "description": "for applications"},
            {"name": "pictures", "description": "for applications"},
            {"name": "operation", "description": "for Kubernetes, Prometheus and people"},
        ],
        "paths": _paths(),
        "components": {
            "schemas": _schemas(),
            "responses": _responses(),
            "parameters": _parameters(),
            "securitySchemes": {
                "bearer": {"type": "http", "scheme": "bearer", "description": "Authorization: Bearer TOKEN"},
                "token": {"type": "apiKey", "in": "header", "name": "x-access-token", "description": "the same token"},
            },
        },
    }
    return json.dumps(document, ensure_ascii=False).encode()


# ── The handler: one request in, one answer out ───────────────────────────────────────────────────────────────────────

JSON_TYPE, PROBLEM_TYPE = "application/json", "application/problem+json"
CHALLENGE = "WWW-Authenticate: Bearer"
ALLOW = "Allow: GET, HEAD"
CONTENT_POLICY = "Content-Security-Policy: default-src 'none'; sandbox"  # a picture opened as a page may run nothing
QUIET_ROUTES = frozenset(("/healthz", "/readyz", "/metrics"))  # logged at debug: probes and scrapes come by the second
_REJECTED = {400: "malformed", 417: "malformed", 413: "too_large", 414: "too_large", 431: "too_large", 408: "too_slow"}
_REPLICA = ((), ("X-Couchbase-Replica: true",))
HTTP_NO_CONTENT = 204  # an int, as comparing with an HTTPStatus costs ten times as much
_SANE_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_PICTURE_TYPE = re.compile(r"[a-z0-9][a-z0-9.+-]{0,31}")
_STATUS_LINES = {status.value: f"HTTP/1.1 {status.value} {status.phrase}\r\n" for status in HTTPStatus}


class Pictures:
    """Decoded pictures for those who ask again: to decode one of 20 kB takes 80 µs, as long as all else about it.

    Each is used only with the CAS of the record as Couchbase has it now, so none is ever out of date.
    """

    bound_bytes = 16 << 20
    entry_bytes = 400  # about what keeping one takes beside the picture itself

    def __init__(self) -> None:
        self._pictures: OrderedDict[str, tuple[int, str, bytes]] = OrderedDict()  # the last one used is the last
        self._lock = threading.Lock()
        self._bytes = 0

    def get(self, path: str, cas: int) -> tuple[str, bytes] | None:
        """Return media type and picture, if they are here and of this CAS."""
        with self._lock:
            kept = self._pictures.get(path)
            if kept is None or kept[0] != cas:
                return None
            self._pictures.move_to_end(path)
            return kept[1:]

    def put(self, path: str, cas: int, media_type: str, picture: bytes) -> None:
        """Keep a picture; those that nobody has used for longest make room."""
        if len(picture) > self.bound_bytes // 8:
            return
        with self._lock:
            self._drop(path)
            self._pictures[path] = (cas, media_type, picture)
            self._bytes += len(picture) + self.entry_bytes
            while self._bytes > self.bound_bytes:
                self._drop(next(iter(self._pictures)))

    def _drop(self, path: str) -> None:
        gone = self._pictures.pop(path, None)
        if gone is not None:
            self._bytes -= len(gone[2]) + self.entry_bytes


class ProfileHandler(BaseHTTPRequestHandler):
    """Answers one request: whole request bytes in, whole answer bytes out, no socket in between."""

    # What is not known yet, as class attributes: an instance is made for each request, and most never change.
    server: ProfileServer
    connection: Connection  # where the request came from, and the answer goes to
    headers: Mapping[str, str] = MappingProxyType({})  # type: ignore[assignment]  # the base's are an email.message.Message
    command = path = query = route = client = request_id = ""
    request_version = "HTTP/1.1"
    response = b""
    status = 0
    seconds = queue_seconds = 0.0
    operation: Operation | None = None
    close_connection = True  # until the request is known to be well-formed
    _parsed = _authorized = False
    _wanted: tuple[str, str, Callable[[Document], None]] | None = None  # a document, and what to do with it

    def __init__(
        self, request: Head | ProblemError, client_address: tuple[str, int], server: ProfileServer, *, internal: bool
    ) -> None:
        """Prepare; the base class's `__init__` would read from a socket until the connection ends.

        Args:
            request: one request head, or why the bytes received are not one.
            client_address: who asks.
            server: for its store's state, tokens and log.
            internal: whether it came in by the metrics port.
        """
        self.client_address = client_address
        self.server = server
        self.request = request
        self.client = client_address[0]
        self.started = time.monotonic()
        self._internal = internal

    def respond(self, store: Batch) -> bytes:
        """Run the method's handler with what `store` has and return the answer.

        Args:
            store: where documents and query rows come from.

        Returns:
            The answer; empty while `store` does not have the document that it is made of: call again when it has.

        Raises:
            QueryPending: call again, with a store that runs queries.
        """
        self.store = store
        store.operation = None
        try:
            if not self._parsed:
                self.queue_seconds = time.monotonic() - self.started
                self.parse_request()
                if self.queue_seconds > self.server.queue_seconds:
                    raise unavailable("overloaded: the request waited too long for a worker", rejected="overloaded")
            if self._wanted is None:
                method = getattr(self, "do_" + self.command, None)
                if method is None:
                    raise ProblemError(405, f"{self.command} is not supported", ALLOW)
                method()
            else:
                wanted, self._wanted = self._wanted, None
                self._send_when_found(*wanted)
            if not self.response:
                return b""
            self.operation = store.operation
        except ProblemError as problem:
            self.operation = store.operation
            self.send_problem(problem)
            problem.__traceback__ = None  # it leads to the batch, which has the problem: only a scan would free them
        except Exception as error:
            self.server.log.event("error", "unexpected failure", route=self.route, error=describe(error))
            self.send_problem(ProblemError(500, "unexpected failure"))
        self.log_request(self.status, len(self.response))
        return self.response

    def refuse(self, problem: ProblemError, route: str) -> bytes:
        """Return the answer that a problem makes, whatever the request asks for."""
        with contextlib.suppress(ProblemError):
            self.parse_request()
        self.route = route
        self.send_problem(problem)
        self.log_request(self.status, len(self.response))
        return self.response

    def parse_request(self) -> bool:
        """Take over what `parse_head` found; the base's parser is lenient, and slow.

        Raises:
            ProblemError: the request is malformed; the connection closes.
        """
        self._parsed = True
        try:
            if isinstance(self.request, ProblemError):
                raise self.request
            self.command, self.path, self.request_version, self.headers = self.request
        finally:
            given = self.headers.get("x-request-id")
            self.request_id = given if given and _SANE_REQUEST_ID.fullmatch(given) else self.server.new_request_id()
        options = self.headers.get("connection")
        if options is None:
            self.close_connection = self.request_version == "HTTP/1.0"
        else:
            named = {option.strip().lower() for option in options.split(",")}
            self.close_connection = "close" in named or (
                self.request_version == "HTTP/1.0" and "keep-alive" not in named
            )
        return True

    def do_GET(self) -> None:
        """Answer by route; callers are applications (`/api/`), Kubernetes (probes) and Prometheus (`/metrics`)."""
        path, _, self.query = self.path.partition("?")
        route, _, parameter = path.rpartition("/")
        if not self._authorized and path.startswith("/api/"):
            self.require_token()
        if route == "/api/v1/id":
            self.route = "/api/v1/id/{id}"
            self.send_stored(USERS, parameter, self.send_document)
        elif route == "/api/v1/nickname":
            self.route = "/api/v1/nickname/{nickname}"
            self.send_matches(PROFILES_BY_NICKNAME, route, parameter)
        elif route == "/api/v1/username":
            self.route = "/api/v1/username/{username}"
            self.send_matches(PROFILES_BY_USERNAME, route, parameter)
        elif route == "/api/v1/picture/record":
            self.route = "/api/v1/picture/record/{id}"
            self.send_stored(IMAGES, parameter, self.send_document)
        elif route == "/api/v1/picture/raw":
            self.route = "/api/v1/picture/raw/{id}"
            self.send_stored(IMAGES, parameter, self.send_picture)
        elif path == "/healthz":
            self.send_local(b'{"status": "alive"}')
        elif path == "/readyz":
            self.send_readiness()
        elif path == "/openapi.json":
            self.send_local(openapi())
        elif path == "/docs":
            assets_url = self.server.settings.docs_assets_url
            self.send_local(docs_page(assets_url), HTML_TYPE, docs_policy(assets_url))
        elif path == "/metrics" and self._internal:
            self.send_local(self.server.scrape(), "text/plain; version=0.0.4; charset=utf-8")
        else:
            raise ProblemError(404, "no such route")

    def do_OPTIONS(self) -> None:
        """Say which methods there are (RFC 9110, 9.3.7)."""
        self.send(204, b"", "", None, ALLOW)

    def do_HEAD(self) -> None:
        """Answer as GET would, without the body: `send` leaves it out."""
        self.do_GET()

    # what the branches are made of

    def require_token(self) -> None:
        """Check the caller's token.

        Raises:
            ProblemError: 401, or 503 while the token is not known yet.
        """
        if not self.server.connected:
            raise unavailable("not ready yet", rejected="not_ready")
        given = self.headers.get("authorization")
        if given is None:
            token = self.headers.get("x-access-token")
        else:
            scheme, _, credentials = given.partition(" ")
            token = credentials.strip(" ") if scheme.lower() == "bearer" else None
        if token is None or not self.server.store.tokens.accepts(token, time.monotonic()):
            self.server.metrics.add("auth_failures_total")
            raise ProblemError(401, "a valid bearer token is required", CHALLENGE)
        self._authorized = True  # if the request is run again, it need not be checked again

    def send_stored(self, collection: str, parameter: str, send: Callable[[Document], None]) -> None:
        """Answer with `{collection}:{parameter}` in the way of `send`, as soon as the store has it.

        Raises:
            ProblemError: 400 for an id that no key can hold, 404 for none, and what the store raises.
        """
        key = f"{collection}:{self.decoded(parameter)}"
        if len(key) > MAX_KEY_BYTES // 4 and len(key.encode()) > MAX_KEY_BYTES:
            raise ProblemError(400, f"the id makes a key of more than {MAX_KEY_BYTES} bytes")
        self._send_when_found(collection, key, send)

    def _send_when_found(self, collection: str, key: str, send: Callable[[Document], None]) -> None:
        document = self.store.get(collection, key)
        if document is None:
            self._wanted = (collection, key, send)
        else:
            send(document)

    def decoded(self, parameter: str) -> str:
        """Decode a path parameter.

        Raises:
            ProblemError: 404 if it is empty, 400 if it is malformed.
        """
        if not parameter:
            raise ProblemError(404, "no such route")
        return decode_segment(parameter)

    def send_document(self, document: Document) -> None:
        """Answer with one document in a list, or 304 if the caller has it."""
        self.send(200, b"[%b]" % document.value, JSON_TYPE, document.cas, *_REPLICA[document.replica])

    def send_picture(self, document: Document) -> None:
        """Answer with the picture inside the record.

        Raises:
            ProblemError: 422 if there is none.
        """
        path = self.path.partition("?")[0]
        picture = self.server.pictures.get(path, document.cas)
        if picture is None:
            picture = decode_picture(document.value)
            self.server.pictures.put(path, document.cas, *picture)
        media_type, image = picture
        self.send(200, image, media_type, document.cas, CONTENT_POLICY, *_REPLICA[document.replica])

    def send_matches(self, statement: str, route: str, parameter: str) -> None:
        """Answer with one page of the profiles that match, and a link to the next while more remain.

        Raises:
            ProblemError: 404 if none matches.
        """
        value = self.decoded(parameter)
        page = parse_page(self.query)
        rows = self.store.query(
            statement, {"value": value, "limit": page.limit + 1, "offset": page.offset}
        )  # one row more than asked for tells whether more remain
        if not rows:
            raise ProblemError(404, "no match")
        links = []
        if len(rows) > page.limit and page.offset + page.limit <= MAX_OFFSET:
            following = f"{route}/{quote(value, safe='')}?limit={page.limit}&offset={page.offset + page.limit}"
            links.append(f'Link: <{following}>; rel="next"')
        self.send(200, b"[%b]" % b",".join(rows[: page.limit]), JSON_TYPE, None, *links)

    def send_local(self, body: bytes, content_type: str = JSON_TYPE, *headers: str) -> None:
        """Answer with something that the process itself knows."""
        self.route = self.path.partition("?")[0]
        self.send(200, body, content_type, None, *headers)

    def send_readiness(self) -> None:
        """Answer whether requests for data are welcome.

        Raises:
            ProblemError: 503 with the reasons.
        """
        self.route = "/readyz"
        if reasons := self.server.unready_reasons():
            raise unavailable("not ready", reasons=reasons)
        self.send_local(json.dumps({"status": "ready", "breakers": self.server.store.breaker_states()}).encode())

    def send_problem(self, problem: ProblemError) -> None:
        """Answer with a problem document."""
        rejected = problem.rejected or ("" if self.path else _REJECTED.get(problem.status, ""))
        if rejected:
            self.server.metrics.add("http_rejected_total", rejected)
        self.send(problem.status, problem.document(self.request_id), PROBLEM_TYPE, None, *problem.headers)

    def send(self, status: int, body: bytes, content_type: str, cas: int | None = None, *headers: str) -> None:
        """Put the whole answer together.

        Args:
            status: the HTTP status; a 200 becomes 304 if `cas` is what the caller has.
            body: what GET answers; HEAD gets its length.
            content_type: the body's media type.
            cas: what the ETag is made of, None for no ETag.
            *headers: further whole header fields.
        """
        # what is not there is empty: putting all together at once takes half the time of one after the other
        typed = tag = cached = kept = further = ""
        if status != HTTP_NO_CONTENT:  # which may not have a length (RFC 9110, 8.6)
            typed = f"Content-Type: {content_type}\r\nContent-Length: {len(body)}\r\n"
        if cas is not None:
            tag = f'ETag: "{cas:x}"\r\n'
            if "if-none-match" in self.headers and _names_tag(self.headers["if-none-match"], tag[6:-2]):
                status, body = 304, b""
        if self.server.lets_clients_go and not self.connection.waiting:
            self.close_connection = True
        if self.path.startswith("/api/"):
            cached = "Cache-Control: private, no-cache\r\n"
        if self.close_connection:
            kept = "Connection: close\r\n"
        elif self.request_version == "HTTP/1.0":
            kept = "Connection: keep-alive\r\n"
        if headers:
            further = "\r\n".join((*headers, ""))
        if self.command == "HEAD":
            body = b""
        self.status = status
        head = (
            f"{_STATUS_LINES[status]}Date: {CLOCK.http_date()}\r\nX-Request-ID: {self.request_id}\r\n"
            f"X-Content-Type-Options: nosniff\r\n{typed}{tag}{cached}{kept}{further}\r\n"
        )
        self.response = head.encode("latin-1") + body

    def log_request(self, code: int | str = "-", size: int | str = "-") -> None:
        """Note what log, metrics and traces will say of this answer; `Log.requests` writes the line, once a batch."""
        server = self.server
        self.seconds = time.monotonic() - self.started
        if server.settings.trusted_proxies:
            self.client = client_behind(server.settings.trusted_proxies, self.client, self.headers)
        if server.tracer:
            record_spans(server.tracer, self, server.namespace)


def decode_picture(record: bytes) -> tuple[str, bytes]:
    """Return the media type and the bytes of the picture in a record.

    Raises:
        ProblemError: 422 if there is none.
    """
    try:
        members = json.loads(record)
        kind, image = members["type"], base64.b64decode(members["image"], validate=True)
    except (ValueError, TypeError, KeyError, binascii.Error):
        kind, image = None, b""
    if not isinstance(kind, str) or not _PICTURE_TYPE.fullmatch(kind) or not image:
        raise ProblemError(422, "the picture record has no usable type or base64 image")
    return f"image/{kind}", image


def client_behind(trusted: Sequence[Network], peer: str, headers: Mapping[str, str]) -> str:
    """Return the client's address: the last one that a trusted proxy has put into X-Forwarded-For, else the peer's."""
    last = headers.get("x-forwarded-for", "").rpartition(",")[2].strip()
    try:
        if last and any(ipaddress.ip_address(peer) in network for network in trusted):
            return str(ipaddress.ip_address(last))
    except ValueError:
        pass
    return peer


def _names_tag(given: str, tag: str) -> bool:
    """Tell whether If-None-Match names the tag, by weak comparison (RFC 9110, 8.8.3.2 and 13.1.2)."""
    return given == "*" or tag in (item.strip().removeprefix("W/") for item in given.split(","))


# ── The server: event loop and workers ────────────────────────────────────────────────────────────────────────────────


class Connection(Framer):
    """A client's socket and what is under way on it. The loop reads and closes; `lock` guards `busy` and `waiting`."""

    __slots__ = (
        "address",
        "busy",
        "closing",
        "deadline",
        "ended",
        "events",
        "internal",
        "lock",
        "outbox",
        "socket",
        "waiting",
    )

    def __init__(self, client: socket.socket, address: tuple[str, int], deadline: float, *, internal: bool) -> None:
        super().__init__()
        self.socket = client
        self.address = address
        self.internal = internal
        self.lock = threading.Lock()
        self.busy = False  # a request of it is queued or being answered
        self.waiting: deque[Head | ProblemError] = deque()  # whole requests behind that one, in order
        self.outbox = b""  # what the socket would not take yet of one answer
        self.ended = False  # the client has sent its last byte
        self.closing = False  # after the outbox is written nothing more is answered
        self.deadline = deadline  # monotonic seconds; of what, depends on the state
        self.events = 0  # what the selector watches


class QueryQueue:
    """The bulkhead in front of the query workers: bounded, and nobody waits in it for long."""

    bound = 1024
    patience_seconds = 0.25

    def __init__(self) -> None:
        self._waiting: deque[tuple[float, ProfileHandler | None]] = deque()
        self._filled = threading.Condition()

    def __len__(self) -> int:
        return len(self._waiting)

    def put(self, handler: ProfileHandler | None) -> bool:
        """Append; False if there is no room."""
        with self._filled:
            if handler is not None and len(self._waiting) >= self.bound:
                return False
            self._waiting.append((time.monotonic(), handler))
            self._filled.notify()
        return True

    def get(self) -> ProfileHandler | None:
        """Wait for the next."""
        with self._filled:
            while not self._waiting:
                self._filled.wait()
            return self._waiting.popleft()[1]

    def expired(self, now: float) -> list[ProfileHandler]:
        """Take out those that have waited too long."""
        late: list[ProfileHandler] = []
        with self._filled:
            while self._waiting and now - self._waiting[0][0] > self.patience_seconds:
                handler = self._waiting[0][1]
                if handler is None:
                    break
                self._waiting.popleft()
                late.append(handler)
        return late


class DocumentQueue:
    """What waits for workers that get documents. To append and to call a worker are two steps.

    Waking a document worker for each request costs more than the request: it would find one, and fetch it by itself.
    One is called for all that has come in one look at the sockets.
    """

    def __init__(self) -> None:
        self._waiting: deque[ProfileHandler] = deque()
        self._lock = threading.Lock()
        self._idle: list[threading.Lock] = []  # a held one for each worker that waits; releasing it is the call
        self._hired = 0  # workers that end when nobody calls them
        self._missed = 0  # calls that found no worker idle
        self._ended = False

    def __len__(self) -> int:
        return len(self._waiting)

    def put(self, handler: ProfileHandler | None) -> None:
        """Append; nobody is woken before `call`. None ends all workers."""
        if handler is not None:
            self._waiting.append(handler)
            return
        with self._lock:
            self._ended = True
            while self._idle:
                self._idle.pop().release()

    def call(self) -> bool:
        """Wake an idle worker if anything waits; tell whether there was one. If not, the next one idle takes the call.

        The one that went idle last, as its caches are warm and what malloc keeps for it is of use again; and only that
        one: each that `queue.SimpleQueue` wakes wakes the next, for nothing.
        """
        if not self._waiting:
            return False
        with self._lock:
            if self._idle:
                self._idle.pop().release()
                return True
            self._missed = min(self._missed + 1, len(self._waiting))
            return False

    def hire(self, most: int) -> bool:
        """Count one more worker, which the caller is to start; False if there are so many already."""
        with self._lock:
            if self._hired >= most:
                return False
            self._hired += 1
            return True

    def wait(self, seconds: float = -1) -> bool:
        """Wait for a call.

        Args:
            seconds: for how long, -1 for ever.

        Returns:
            False if the worker is to end: all are, or there was no call in this time.
        """
        called = threading.Lock()
        with self._lock:
            if self._ended:
                return False
            if self._missed:
                self._missed -= 1
                return True
            called.acquire()
            self._idle.append(called)
        if not called.acquire(timeout=seconds):
            with self._lock:
                if called in self._idle:  # else there has been a call just now
                    self._idle.remove(called)
                    self._hired -= 1
                    return False
        return not self._ended

    def oldest(self) -> float:
        """Return when what has waited longest came (monotonic seconds); infinite if nothing waits."""
        try:
            return self._waiting[0].started
        except IndexError:
            return math.inf

    def take(self, most: int) -> list[ProfileHandler]:
        """Take out as many as there are, at most so many; does not wait."""
        with self._lock:
            return [self._waiting.popleft() for _ in range(min(most, len(self._waiting)))]


Handlers: TypeAlias = "queue.SimpleQueue[ProfileHandler | None] | QueryQueue"


class ProfileServer(ThreadingHTTPServer):
    """Serves many clients with few threads.

    The thread that calls `serve_forever` runs the event loop: it accepts, reads, flushes and keeps the deadlines.
    A connection costs a thread only while a whole request of its own is being answered.
    """

    allow_reuse_address = True
    request_queue_size = 1024
    # The least that still serves 256 clients of a database 5 ms away (the grid in tests/load/results); what is not full
    # does not wait, but each batch costs about 70 µs, however small.
    document_workers = 3
    batch_size = 64
    alone_workers = 64  # while key-value is in trouble each document has a thread; started when none is idle
    alone_seconds = 10.0  # without a call one ends: malloc keeps memory for each
    stuck_seconds = 0.25  # with no document worker coming back for the next batch, something may be wrong
    late_seconds = 0.05  # a batch whose oldest request has waited for longer has so much less time for Couchbase
    overdue_seconds = 0.05  # after its time-out a query that the SDK still holds is given up
    receive_bytes = 16_384
    max_waiting = 16  # whole requests of one connection behind the one being answered; then reading pauses
    head_seconds = 10.0
    idle_seconds = 75.0
    write_seconds = 30.0
    linger_seconds = 2.0  # after the last answer: the client may still be sending, and closing would reset it
    accept_pause_seconds = 0.2  # without free descriptors
    drain_idle_seconds = 1.0  # how long a drain waits for the next request of an idle connection

    def __init__(self, settings: Settings, store: ProfileStore, log: Log, metrics: Metrics) -> None:
        """Bind both ports; nothing is served before `serve_forever`.

        Raises:
            OSError: a port is in use.
        """
        self.settings = settings
        self.store = store
        self.log = log
        self.metrics = metrics
        self.tracer: Any = None
        self.namespace = f"{settings.couchbase_bucket}.{settings.couchbase_scope}"
        self.draining = False
        self.queue_seconds = settings.couchbase_timeout_ms / 1000  # a caller that waited as long has given up
        self._request_numbers = itertools.count(1)
        self._request_prefix = ""
        self._drain_deadline = 0.0
        self._drain_started = 0.0
        self._connections: set[Connection] = set()
        self._local: queue.SimpleQueue[ProfileHandler | None] = queue.SimpleQueue()
        self._documents = DocumentQueue()
        self._turn = threading.Lock()
        self.pictures = Pictures()
        self._alone = DocumentQueue()
        self._queries = QueryQueue()
        self._running: set[ProfileHandler] = set()  # queries that a worker has in hand
        self._lock = threading.Lock()  # of `_running`
        self._minding_queries = False
        self._documents_taken = 0.0
        self.connected = False  # Couchbase has been reached, and the other processes know: data may be asked for
        self._is_ready = False
        self._clients = 0
        self._asked: deque[Connection] = deque()
        self._awake = False
        self._wake_end: socket.socket | None = None
        self._stopping = False
        self.supervisor: int | None = None  # the parent's process id, if this is one worker of several
        self.first_processor = random.randrange(1 << 16)  # noqa: S311  # not a secret; before the fork, for all workers
        self.give_way: Callable[[], None] = do_nothing  # to the threads of this process that wait for the processor
        self._accept_at = 0.0  # monotonic seconds; infinite while the listeners are watched
        self._stepped_back = False
        self.address_family = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET
        self.metrics_socket: socket.socket | None = None
        super().__init__(("", settings.port), ProfileHandler)  # type: ignore[arg-type]  # made by _enqueue
        try:
            if settings.metrics_port is not None:
                self.metrics_socket = self._listen(settings.metrics_port)
        except OSError:
            self.server_close()
            raise

    @property
    def metrics_port(self) -> int | None:
        """The port of the metrics and probes, None if there is none."""
        return self.metrics_socket.getsockname()[1] if self.metrics_socket else None

    def server_bind(self) -> None:
        """Bind without the base class's reverse name look-up, which may hang for seconds."""
        self.socket.close()
        self.socket = self._listen(self.settings.port)
        self.server_address = self.socket.getsockname()
        self.server_name, self.server_port = str(self.server_address[0]), int(self.server_address[1])

    def _listen(self, port: int) -> socket.socket:
        family = self.address_family
        listener = socket.create_server(
            ("", port),
            family=family,
            backlog=self.request_queue_size,
            dualstack_ipv6=family == socket.AF_INET6,
            reuse_port=hasattr(socket, "SO_REUSEPORT"),  # the next version starts beside this one, then this one drains
        )
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # accepted sockets inherit it
        listener.setblocking(False)
        return listener

    def server_close(self) -> None:
        """Close both listening sockets."""
        super().server_close()
        if self.metrics_socket:
            self.metrics_socket.close()

    def new_request_id(self) -> str:
        """Return an id for a request whose caller gave none; unique among all processes."""
        return f"{self._request_prefix}-{next(self._request_numbers):x}"

    def unready_reasons(self) -> list[str]:
        """Say why requests for data are not welcome; empty means ready. Speaks for all worker processes.

        One that is ready is enough: the others leave new clients to it.
        """
        if self.draining:
            return ["draining"]
        if any(self.metrics.column("couchbase_ready")):
            return []
        return self.store.unready_reasons() or ["not ready yet"]

    @property
    def lets_clients_go(self) -> bool:
        """Whether a client is to come again for its next request: this process drains, or only another is ready."""
        return self.draining or (not self._is_ready and any(self.metrics.column("couchbase_ready")))

    def tell_ready(self) -> None:
        """Tell all worker processes, and once a change the log, whether this one can serve profiles."""
        reasons = ["draining"] if self.draining else self.store.unready_reasons()
        with self._turn:  # nobody gets a profile here and then, from a process that has not been told, none
            self.metrics.put(not reasons, "couchbase_ready")
            self.connected = self.store.tokens.known
        for service, state in self.store.breaker_states().items():
            self.metrics.put(Breaker.STATES.index(state), "couchbase_breaker_state", service)
        if self._is_ready == bool(reasons):
            self._is_ready = not reasons
            self.log.event("warning" if reasons else "info", "not ready" if reasons else "ready", reasons=reasons)

    def publish(self) -> None:
        """Put this process's gauges where the others can read them."""
        cpu, resident, descriptors = process_usage()
        self.metrics.answers(())  # operations that no answer has followed: the background check's
        self.metrics.put_total(cpu, "process_cpu_seconds_total")
        self.metrics.put_total(self.log.dropped, "log_lines_dropped_total")
        self.metrics.put(resident, "process_resident_memory_bytes")
        self.metrics.put(descriptors, "process_open_fds")
        self.metrics.put(sum(connection.busy for connection in list(self._connections)), "http_requests_in_flight")

    def scrape(self) -> bytes:
        """Return the metrics of the whole service; the other processes' gauges are a second old at most."""
        self.publish()
        return self.metrics.render()

    # the event loop

    def serve_forever(self, poll_interval: float = 1.0) -> None:
        """Serve until drained (`shutdown`).

        Args:
            poll_interval: seconds between two looks at the deadlines.
        """
        self._request_prefix = secrets.token_hex(6)  # here, not before: after a fork each process needs its own
        self._selector = selectors.DefaultSelector()
        wake_end, wakeup = socket.socketpair()
        wake_end.setblocking(False)
        wakeup.setblocking(False)
        self._selector.register(wakeup, selectors.EVENT_READ, self._obey)
        self._wake_end = wake_end
        self._start_workers()
        next_look = 0.0
        try:
            while not (self.draining and self._is_drained()):
                ready = self._selector.select(self._patience(poll_interval))
                with self._turn:
                    for (client, _, _, data), events in ready:
                        if not isinstance(data, Connection):
                            data(client)
                            continue
                        if events & selectors.EVENT_WRITE:
                            self._flush(data)
                        if events & selectors.EVENT_READ:
                            self._receive(data)
                    called = self._documents.call()
                if called and len(ready) == 1:  # a lone client's worker goes first, then the SDK's thread with its key
                    self.give_way()
                    self.give_way()
                now = time.monotonic()
                if now >= self._accept_at:
                    self._watch_listeners()
                if self._minding_queries:
                    self._mind_queries(now)
                if self._documents:
                    self._mind_documents(now)
                if now >= next_look or self._stopping:
                    next_look = now + poll_interval
                    self.service_actions()
        finally:
            self._stop_workers()
            for connection in list(self._connections):
                self._close(connection)
            self._selector.close()
            self._wake_end = None
            wake_end.close()
            wakeup.close()

    def _patience(self, poll_interval: float) -> float:
        """Return for how many seconds the loop may sleep."""
        if self._stopping:
            return 0.02
        if self._minding_queries:
            poll_interval = self.overdue_seconds
        elif self._documents:
            poll_interval = self.stuck_seconds
        return max(0.0, min(poll_interval, self._accept_at - time.monotonic()))

    def shutdown(self) -> None:
        """Drain: no new connections, running requests finish, then `serve_forever` returns. Any thread, any signal."""
        self._stopping = True
        self._wake()

    def service_actions(self) -> None:
        """Keep the deadlines; called about once a second."""
        now = time.monotonic()
        if self.supervisor and os.getppid() != self.supervisor:  # killed: nobody would pass signals on any more
            self.shutdown()
        self.publish()
        if self._stopping and not self.draining:
            self._begin_drain(now)
        for connection in list(self._connections):
            if connection.busy and not connection.outbox:
                continue
            if now >= connection.deadline:
                self._expire(connection)
            elif self.draining and not connection.partial and not connection.busy and not connection.closing:
                connection.deadline = min(connection.deadline, self._drain_started + self.drain_idle_seconds)

    def _mind_queries(self, now: float) -> None:
        """Answer for queries that wait too long, and for those that the SDK does not give back in time.

        Some errors of the query service (4040: no such prepared statement) leave the SDK's thread waiting for ever:
        the caller gets its 504, and another worker takes the lost one's place.
        """
        self._minding_queries = False  # before looking: who comes after this sets it again
        for handler in self._queries.expired(now):
            self._refuse(handler, unavailable("overloaded: no query worker is free", rejected="overloaded"))
        latest = now - self.store.query_timeout_seconds - self.overdue_seconds
        for handler in list(self._running):
            if handler.started < latest and self._take_from_running(handler):
                self.log.event("error", "a query is overdue; its worker is given up", route=handler.route)
                self.store.give_up_query(handler.started, now)
                self._start_worker(self._queries, self._answer_query)
                self._refuse(handler, ProblemError(504, "Couchbase did not answer in time"))
        if self._running or len(self._queries):
            self._minding_queries = True

    def _take_from_running(self, handler: ProfileHandler) -> bool:
        """Make a running query one's own to answer; False if another has."""
        with self._lock:
            mine = handler in self._running
            self._running.discard(handler)
        return mine

    def _mind_documents(self, now: float) -> None:
        """When every document worker is stuck with its batch, let those that wait go on alone."""
        if now - max(self._documents.oldest(), self._documents_taken) > self.stuck_seconds:
            self.store.suspect(1.0)
            for handler in self._documents.take(len(self._documents)):
                self._put_alone(handler)

    def _refuse(self, lost: ProfileHandler, problem: ProblemError) -> None:
        """Answer in place of a worker, which may still have the request's own handler in hand."""
        handler = self._handler(lost.connection, lost.request)
        self._reply(handler, handler.refuse(problem, lost.route))
        self._account([handler])

    def _expire(self, connection: Connection) -> None:
        """End a connection whose time is up: with an answer if half a request is there."""
        if connection.partial and not connection.closing and not connection.outbox:
            connection.refuse()
            self._submit(connection, [ProblemError(408, f"the request was not whole within {self.head_seconds:.0f} s")])
        else:
            self._close(connection)

    def _begin_drain(self, now: float) -> None:
        """Let nobody in any more. Before anyone is told to close: who then comes back must not find this socket."""
        self._drain_started = now
        self._drain_deadline = now + self.settings.shutdown_seconds
        self._stop_watching(self.socket)
        while self._accept(self.socket):  # whoever the kernel has already let in
            pass
        self.socket.close()
        self.draining = True
        self.metrics.put(0, "couchbase_ready")

    def _is_drained(self) -> bool:
        return time.monotonic() >= self._drain_deadline or all(connection.internal for connection in self._connections)

    def _watch_listeners(self) -> None:
        self._accept_at = math.inf
        for listener in (self.socket, self.metrics_socket):
            if listener and listener.fileno() >= 0 and listener not in self._selector.get_map():
                self._selector.register(listener, selectors.EVENT_READ, self._accept)

    def _stop_watching(self, listener: socket.socket) -> None:
        if listener in self._selector.get_map():
            self._selector.unregister(listener)

    def _accept(self, listener: socket.socket) -> bool:
        """Accept who waits, as many at once as are this process's share. Tell whether there may be more."""
        most = 64
        if not self._stopping and listener is self.socket and self.settings.workers > 1:
            seconds, most = self._share()
            if seconds:
                self._accept_at = time.monotonic() + seconds
                self._stop_watching(listener)
                return False
        for _ in range(most):
            try:
                client, address = listener.accept()
            except OSError as error:
                if error.errno in {errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM}:
                    # level-triggered, the listener would be ready for ever: look again when some may be free
                    self.log.event("error", "cannot accept", error=describe(error), connections=len(self._connections))
                    self._accept_at = time.monotonic() + self.accept_pause_seconds
                    self._stop_watching(listener)
                return False
            client.setblocking(False)
            internal = listener is self.metrics_socket
            host = address[0].removeprefix("::ffff:")
            connection = Connection(client, (host, address[1]), time.monotonic() + self.idle_seconds, internal=internal)
            self._connections.add(connection)
            self._count_client(connection, 1)
            self._watch(connection, selectors.EVENT_READ)
            if len(self._connections) > self.settings.max_connections and not internal:
                connection.refuse()
                self._submit(connection, [unavailable("too many connections", rejected="overloaded")])
        return True

    def _count_client(self, connection: Connection, change: int) -> None:
        """Keep the gauge of open connections: those of the metrics port are not clients'."""
        if not connection.internal:
            self._clients += change
            self.metrics.put(self._clients, "http_connections")

    def _share(self) -> tuple[float, int]:
        """Return for how many seconds the next clients are left to other processes, and how many are taken at once.

        A process that is not ready leaves clients to those that are. One that has more clients than another gives it
        the chance to be faster, once: a process that hangs must not keep clients waiting. An eighth more or less does
        not count, so that a crowd that comes at once is let in by more and more at a time.
        """
        ready = self.metrics.column("couchbase_ready")
        if not any(ready):
            return 0.0, 1
        if not ready[self.metrics.row]:
            return 0.05, 1
        least = min(count for count, good in zip(self.metrics.column("http_connections"), ready, strict=True) if good)
        self._stepped_back = not self._stepped_back and self._clients > least + least // 8
        return 0.005 if self._stepped_back else 0.0, 1 + least // 8

    def _watch(self, connection: Connection, events: int) -> None:
        """Have the selector watch for these events; 0 for none."""
        if events == connection.events or connection.socket.fileno() < 0:
            return
        if not events:
            self._selector.unregister(connection.socket)
        elif connection.events:
            self._selector.modify(connection.socket, events, connection)
        else:
            self._selector.register(connection.socket, events, connection)
        connection.events = events

    def _receive(self, connection: Connection) -> None:
        try:
            data = connection.socket.recv(self.receive_bytes)
        except BlockingIOError:
            return
        except OSError:
            self._close(connection)
            return
        if (
            not (connection.busy or connection.closing or connection.refused)
            and (head := connection.take_whole(data)) is not None
        ):
            connection.busy = True  # no worker has it, so nobody else looks
            self._enqueue(connection, head)
        elif not data:
            self._end_of_input(connection)
        elif connection.closing:
            return  # lingering: what still comes is read only so that closing does not reset the connection
        else:
            self._frame(connection, data)

    def _frame(self, connection: Connection, data: bytes) -> None:
        """Queue the requests that are whole now, and read on only if there is room for more of them."""
        room = self.max_waiting - len(connection.waiting)
        was_partial = connection.partial
        requests = connection.feed(data, room) if data or room > 0 else []
        if requests:
            self._submit(connection, requests)
        if connection.partial:
            if (requests or not was_partial) and not connection.outbox:
                connection.deadline = time.monotonic() + self.head_seconds
            if connection.expects_continue and self._occupy(connection):
                connection.expects_continue = False
                connection.outbox = b"HTTP/1.1 100 Continue\r\n\r\n"
                self._flush(connection)
        if len(requests) >= room:  # there may be more in the buffer: `_next_request` asks for them
            self._watch(connection, connection.events & ~selectors.EVENT_READ)
            if not connection.busy:  # it has answered them all before it could see that reading is paused
                self._ask(connection)
        elif connection.ended and connection.partial:
            connection.refuse()
            self._submit(connection, [ProblemError(400, "the request ended before it was whole")])
        elif not connection.events & selectors.EVENT_READ and not connection.ended:
            self._watch(connection, connection.events | selectors.EVENT_READ)

    def _occupy(self, connection: Connection) -> bool:
        """Mark a connection as busy; False if it was already."""
        with connection.lock:
            was_busy, connection.busy = connection.busy, True
        return not was_busy

    def _end_of_input(self, connection: Connection) -> None:
        """The client has sent its last byte; it may still wait for answers (half-closed)."""
        connection.ended = True
        self._watch(connection, connection.events & ~selectors.EVENT_READ)
        if not connection.closing:
            self._frame(connection, b"")
        with connection.lock:
            owed = connection.busy
        if not owed:
            self._close(connection)

    def _submit(self, connection: Connection, requests: list[Head | ProblemError]) -> None:
        """Queue whole requests: the first if the connection is not busy, the others behind it."""
        with connection.lock:
            connection.waiting.extend(requests)
            if connection.busy:
                return
            connection.busy = True
            request = connection.waiting.popleft()
        self._enqueue(connection, request)

    def _enqueue(self, connection: Connection, request: Head | ProblemError) -> None:
        handler = self._handler(connection, request)
        if isinstance(request, ProblemError) or not request.target.startswith("/api/"):
            self._local.put(handler)
        elif self.store.troubled:
            self._put_alone(handler)
        else:
            self._documents.put(handler)

    def _handler(self, connection: Connection, request: Head | ProblemError) -> ProfileHandler:
        """Make the handler of one request that came on a connection."""
        handler = ProfileHandler(request, connection.address, self, internal=connection.internal)
        handler.connection = connection
        return handler

    def _put_alone(self, handler: ProfileHandler) -> None:
        """Queue a request whose document is fetched by itself."""
        self._alone.put(handler)
        if not self._alone.call() and self._alone.hire(self.alone_workers):
            # Not a `threading.Thread`: to start one waits until it runs, and on a busy processor the loop has no time.
            _thread.start_new_thread(self._work_documents, (self._alone, self._answer_alone, self.alone_seconds))

    def _put_query(self, handler: ProfileHandler) -> None:
        """Queue a lookup; with no room it is refused at once."""
        if not self._queries.put(handler):
            self._refuse(handler, unavailable("overloaded: too many queries wait", rejected="overloaded"))
        else:
            self._mind()

    def _mind(self) -> None:
        """Have the loop look after the queries."""
        if not self._minding_queries:
            self._minding_queries = True
            self._wake()

    def _wake(self) -> None:
        """Make the loop look at what it is asked for."""
        if not self._awake and self._wake_end is not None:
            self._awake = True
            with contextlib.suppress(OSError):
                self._wake_end.send(b"\0")

    def _ask(self, connection: Connection) -> None:
        """Have the loop flush or close a connection, or read from it again: only the loop touches the selector."""
        self._asked.append(connection)
        self._wake()

    def _obey(self, wakeup: socket.socket) -> None:
        with contextlib.suppress(BlockingIOError):
            wakeup.recv(4096)
        self._awake = False  # before looking: what is asked for after this wakes the loop again
        while self._asked:
            connection = self._asked.popleft()
            if connection in self._connections:
                self._flush(connection)

    def _flush(self, connection: Connection) -> None:
        """Write what is left of an answer, then go on to what comes after it."""
        if connection.outbox:
            try:
                sent = connection.socket.send(connection.outbox)
            except BlockingIOError:
                sent = 0
            except OSError:
                self._close(connection)
                return
            connection.outbox = connection.outbox[sent:]
            if connection.outbox:
                self._watch(connection, connection.events | selectors.EVENT_WRITE)
                return
            self._watch(connection, connection.events & ~selectors.EVENT_WRITE)
            if not connection.closing:
                self._next_request(connection)
                return
        if connection.closing:
            self._linger(connection)
            return
        self._frame(connection, b"")  # what there was no room for
        if connection.ended and not connection.busy:
            self._close(connection)

    def _linger(self, connection: Connection) -> None:
        """Close in two steps (RFC 9112, 9.6), so that the last answer is not lost to a reset."""
        connection.deadline = time.monotonic() + self.linger_seconds
        connection.busy = False
        try:
            connection.socket.shutdown(socket.SHUT_WR)
        except OSError:
            self._close(connection)
            return
        if connection.ended:
            self._close(connection)
        else:
            self._watch(connection, selectors.EVENT_READ)

    def _close(self, connection: Connection) -> None:
        if connection in self._connections:
            self._connections.discard(connection)
            self._count_client(connection, -1)
            self._watch(connection, 0)
            with connection.lock:  # a worker may be sending: its descriptor must not become another client's
                connection.closing = True
                connection.waiting.clear()
                connection.socket.close()

    # the workers

    def _start_workers(self) -> None:
        self._workers: list[tuple[threading.Thread, Handlers | DocumentQueue]] = []
        self._start_worker(self._local, self._answer_local)
        work = functools.partial(self._work_documents, self._documents, self._answer_documents)
        for _ in range(self.document_workers):
            self._start_thread(self._documents, work)
        for _ in range(self.settings.threads):
            self._start_worker(self._queries, self._answer_query)

    def _start_worker(self, waiting: Handlers, answer: Callable[[ProfileHandler], bool | None]) -> None:
        self._start_thread(waiting, functools.partial(self._work, waiting, answer))

    def _start_thread(self, waiting: Handlers | DocumentQueue, work: Callable[[], None]) -> None:
        thread = threading.Thread(target=work, daemon=True)
        self._workers.append((thread, waiting))
        thread.start()

    def _stop_workers(self) -> None:
        self._alone.put(None)
        for _, waiting in self._workers:
            waiting.put(None)
        deadline = time.monotonic() + 1.0
        for thread, _ in self._workers:
            thread.join(max(0.0, deadline - time.monotonic()))

    def _work(self, waiting: Handlers, answer: Callable[[ProfileHandler], bool | None]) -> None:
        """Answer what comes by a queue until None does, or `answer` returns False: the worker has been replaced.

        Nothing else that goes wrong with one request ends the worker.
        """
        while (handler := waiting.get()) is not None:
            try:
                if answer(handler) is False:
                    return
            except Exception as error:
                self._fail([handler], error)

    def _work_documents(
        self, waiting: DocumentQueue, answer: Callable[[list[ProfileHandler]], None], seconds: float = -1
    ) -> None:
        """Answer what waits whenever there is a call; nothing that goes wrong ends the worker.

        Args:
            waiting: what there is to answer.
            answer: called with an empty list, into which it takes what it answers.
            seconds: the worker ends when there has been no call for so long; -1: never.
        """
        while waiting.wait(seconds):
            pending: list[ProfileHandler] = []
            try:
                answer(pending)
            except Exception as error:
                self._fail(pending, error)

    def _fail(self, handlers: list[ProfileHandler], error: Exception) -> None:
        """Give up the connections of requests that cannot be answered."""
        for handler in handlers:
            handler.connection.closing = True
            self._ask(handler.connection)
        with contextlib.suppress(Exception):  # whatever fails, the worker goes on
            self.log.event("error", "worker failure", error=describe(error))

    def _answer_local(self, handler: ProfileHandler) -> None:
        """Answer what needs no Couchbase, so that probes and refusals never wait for it."""
        try:
            response = handler.respond(Batch(self.store))
        except QueryPending:
            response = b""
        if response:
            self._reply(handler, response)
            self._account([handler])
        else:  # it does need Couchbase: an absolute-form target, say
            self._documents.put(handler)
            self._documents.call()

    def _answer_documents(self, pending: list[ProfileHandler]) -> None:
        """Take all that waits into `pending`, let each say what it wants, get that at once, and answer.

        The loop and the workers take turns with all but the waiting for Couchbase: the interpreter lets only one run at
        a time anyway, but changes between those that could at each system call, which costs as much as the call. A
        request that is alone has no one to take turns with, nor to be got with.
        """
        batch, answered = Batch(self.store), []
        with self._turn:
            self._documents_taken = time.monotonic()
            pending += self._documents.take(self.batch_size)
            self._documents.call()  # the next, for what is left
            if len(pending) > 1:
                answered = self._answer_those(pending, batch)
        while pending:
            if self.store.troubled:
                for handler in pending:
                    self._put_alone(handler)
                break
            started = pending[0].started
            if len(pending) == 1:
                answered += self._answer_those(pending, Alone(self.store, started))
                break
            batch.fetch(time_left(started, self.store.timeout_seconds, self.late_seconds))
            with self._turn:
                answered += self._answer_those(pending, batch)
        # Who waits for the turn goes on first: lines are written while Couchbase is asked for the next batch. With 32
        # clients, 30,200 instead of 27,800 requests/s.
        self.give_way()
        self._account(answered)

    def _answer_those(self, pending: list[ProfileHandler], batch: Batch) -> list[ProfileHandler]:
        """Answer with what the batch has, and return who has been answered; who wants a document first stays.

        All answers are made before the first is sent. Sent without a pause they keep a receiver of several awake, and
        to wake it up again costs more than to send: with 32 clients, 32,500 instead of 30,200 requests/s.
        """
        ready: list[ProfileHandler] = []
        waiting: list[ProfileHandler] = []
        for handler in pending:
            try:
                response = handler.respond(batch)
            except QueryPending:
                self._put_query(handler)
            else:
                (ready if response else waiting).append(handler)
        pending[:] = waiting
        for handler in ready:
            self._reply(handler, handler.response)
        return ready

    def _answer_alone(self, pending: list[ProfileHandler]) -> None:
        """Take one request into `pending` and get its document by itself, so that it waits for no other's failure."""
        pending += self._alone.take(1)
        if pending:
            self._account(self._answer_those(pending, Alone(self.store, pending[0].started)))

    def _answer_query(self, handler: ProfileHandler) -> bool:
        """Run one SQL++ statement; False if it took so long that another worker has taken this one's place."""
        with self._lock:
            self._running.add(handler)
        self._mind()
        response = handler.respond(ForQuery(self.store, handler.started))
        if not self._take_from_running(handler):
            return False
        self._reply(handler, response)
        self._account([handler])
        return True

    def _account(self, handlers: Sequence[ProfileHandler]) -> None:
        """Count and log answers that have been sent."""
        self.metrics.answers(handlers)
        if self.log.access:
            self.log.requests(handlers)

    def _reply(self, handler: ProfileHandler, response: bytes) -> None:
        """Send an answer; what the socket will not take at once is left to the loop."""
        connection = handler.connection
        with connection.lock:
            try:
                sent = connection.socket.send(response)
            except BlockingIOError:
                sent = 0
            except OSError:  # the client is gone
                sent = len(response)
                handler.close_connection = True
            if sent == len(response) and not handler.close_connection:
                request = self._release(connection)
            else:
                connection.deadline = time.monotonic() + self.write_seconds
                connection.closing = handler.close_connection
                connection.outbox = response[sent:]
                request = None
        self._go_on(connection, request)

    def _next_request(self, connection: Connection) -> None:
        """Go on to the connection's next request, if one waits."""
        with connection.lock:
            request = self._release(connection)
        self._go_on(connection, request)

    def _release(self, connection: Connection) -> Head | ProblemError | None:
        """Return the next request that waits, else mark the connection as free; its lock must be held.

        It must be one step: else a request that arrived in between would never be answered.
        """
        if connection.waiting:
            return connection.waiting.popleft()
        connection.deadline = time.monotonic() + (self.head_seconds if connection.partial else self.idle_seconds)
        connection.busy = False
        return None

    def _go_on(self, connection: Connection, request: Head | ProblemError | None) -> None:
        """Queue the next request, and ask the loop for what only it can do: flush, close, read on, send a 100."""
        if request is not None:
            self._enqueue(connection, request)
            self._documents.call()
        if (
            connection.outbox
            or connection.closing
            or connection.ended
            or connection.expects_continue
            or not connection.events & selectors.EVENT_READ
        ):
            self._ask(connection)


# ── Main: from the command line to the last answer ────────────────────────────────────────────────────────────────────


STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)
MIN_CHECK_SECONDS = 0.2
CRASHED = 70  # EX_SOFTWARE of sysexits.h: a worker that ended so is started again


def backoff(low: float = 0.2, high: float = 5.0) -> Iterator[float]:
    """Yield seconds to wait between tries: doubling from `low` to `high`, with jitter so that replicas spread out."""
    delay = low
    while True:
        yield delay * random.uniform(0.5, 1.0)  # noqa: S311  # not a secret
        delay = min(high, delay * 2)


def settle(server: ProfileServer) -> Callable[[], None]:
    """Keep this process to one processor, if the settings want it and the system lets it.

    Returns:
        What is to be called about once a second, so that it stays a good one.
    """
    if server.settings.cpu_affinity == "off":
        return do_nothing
    try:
        processor = Processor(server.first_processor + server.metrics.row)
    except (OSError, KeyError, AttributeError) as error:
        server.log.event("debug", "no processor of its own", error=describe(error))
        return do_nothing
    server.give_way = processor.give_way
    server.log.event("debug", "keeps to one processor", processor=processor.home)

    def keep() -> None:
        try:
            if processor.keep():
                server.log.event("debug", "moved to another processor", processor=processor.home)
        except (OSError, KeyError) as error:
            server.log.event("debug", "cannot look for a calmer processor", error=describe(error))

    return keep


def keep_ready(
    server: ProfileServer, stop: threading.Event, fatal: Callable[[str], None], keep_processor: Callable[[], None]
) -> None:
    """Connect and read the token, again and again until both work; then look every two seconds whether all is well.

    Args:
        server: whose store to look after, and whom to tell when it is ready.
        stop: ends it, within the next check.
        fatal: called with the reason once waiting cannot cure the failure.
        keep_processor: called after each look.
    """
    store, log = server.store, server.log
    for delay in backoff():
        try:
            store.start()
            break
        except FatalError as error:
            fatal(str(error))
            return
        except Exception as error:
            log.event("warning", "Couchbase is not there yet", error=describe(error), retry_seconds=round(delay, 1))
        if stop.wait(delay):
            return
    server.tell_ready()
    while not stop.wait(MIN_CHECK_SECONDS):
        interval = min(store.check_seconds, store.tokens.period_seconds) * random.uniform(0.7, 1.0)  # noqa: S311
        store.suspicion.wait(interval - MIN_CHECK_SECONDS)
        store.suspicion.clear()
        try:
            store.check()
        except Exception as error:
            log.event("error", "the background check failed", error=describe(error))
        server.tell_ready()
        keep_processor()


def serve(server: ProfileServer, report: Callable[[str], None]) -> int:
    """Run one process's server until a signal or a fatal failure; return the exit code."""
    failed: list[str] = []
    stop = threading.Event()

    def fatal(message: str) -> None:
        failed.append(message)
        report(message)
        server.shutdown()

    for number in STOP_SIGNALS:
        signal.signal(number, lambda *_: server.shutdown())
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)  # `supervise` forks with them blocked
    try:
        server.tracer = start_tracing(os.environ)  # here: an exporter's threads would not survive a fork
    except FatalError as error:
        fatal(str(error))
    keep_processor = settle(server)  # before the first thread, as those inherit it
    keeper = threading.Thread(target=keep_ready, args=(server, stop, fatal, keep_processor), daemon=True)
    keeper.start()
    server.serve_forever()
    for number in STOP_SIGNALS:  # a second one must not kill what is about to end with its own exit code
        signal.signal(number, signal.SIG_IGN)
    server.server_close()
    stop.set()
    server.store.suspicion.set()
    keeper.join(0.5)
    if server.tracer:
        stop_tracing()
    server.log.event("info", "stopped")
    if keeper.is_alive():  # inside the SDK, which cannot be interrupted while it connects
        os._exit(1 if failed else 0)
    server.store.close()
    return 1 if failed else 0


def supervise(server: ProfileServer) -> int:
    """Fork the workers, restart one that dies, pass signals on; return the exit code.

    The SDK connects in the workers: its threads would not survive a fork.
    """
    log, settings = server.log, server.settings
    reports, report = os.pipe()
    os.set_blocking(reports, False)
    children: dict[int, int] = {}
    stopping: list[int] = []

    supervisor = os.getpid()

    def tell_parent(message: str) -> None:
        os.write(report, message.encode()[:4096])

    def start(worker: int) -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)  # until the worker has handlers of its own
        child = os.fork()
        if child:
            children[child] = worker
            signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
            return
        code = CRASHED
        try:
            log.worker = worker
            server.metrics.use_row(worker - 1)
            server.supervisor = supervisor
            code = serve(server, tell_parent)
        except Exception as error:
            log.event("error", "worker failure", error=describe(error))
        finally:
            os._exit(code)

    def stop(number: int, _frame: object) -> None:
        stopping.append(number)
        server.server_close()  # else clients would wait for an accept that never comes
        for child in list(children):
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGTERM)

    for number in STOP_SIGNALS:
        signal.signal(number, stop)
    for worker in range(1, settings.workers + 1):
        start(worker)
    code = 0
    delays = backoff(0.1)
    while children:
        child, status = os.wait()
        worker = children.pop(child, 0)
        server.metrics.clear_gauges(worker - 1)
        exited = os.waitstatus_to_exitcode(status)
        if stopping:
            code = max(code, int(exited != 0))
        elif exited == 1:
            with contextlib.suppress(BlockingIOError):
                log.event("error", "cannot serve", advice=os.read(reports, 4096).decode())
            code = 1
            stop(signal.SIGTERM, None)
        else:
            log.event("error", "a worker died; starting another", died=worker, exit_code=exited)
            time.sleep(next(delays))
            if not stopping:
                start(worker)
    return code


def is_taken(port: int) -> bool:
    """Tell whether somebody listens on a port, which binding with SO_REUSEPORT would not."""
    try:
        socket.create_server(("", port)).close()
    except OSError:
        return True
    return False


def main(argv: Sequence[str] | None = None) -> int:
    """Run the service; return the exit code: 0 after a drain, 1 if it cannot serve, 2 for a bad setting."""
    try:
        settings = read_settings(sys.argv[1:] if argv is None else argv, os.environ)
    except SettingsError as error:
        print(f"micro_svc_demo: {error}", file=sys.stderr)
        return 2
    log = Log(settings.log_level, access=settings.access_log, shared=settings.workers > 1)
    shared = [port for port in (settings.port, settings.metrics_port) if port and is_taken(port)]
    try:
        metrics = Metrics(settings.workers)
        server = ProfileServer(settings, ProfileStore(settings, log, metrics), log, metrics)
    except OSError as error:
        ports = f"SERVICE_PORT {settings.port} or METRICS_PORT {settings.metrics_port}"
        print(f"micro_svc_demo: cannot listen on {ports}: {error.strerror}", file=sys.stderr)
        return 1
    log.event(
        "info",
        "listening",
        version=__version__,
        address=server.server_address[0],
        port=server.server_port,
        metrics_port=server.metrics_port,
        cluster=settings.connection_string,
        bucket=settings.couchbase_bucket,
        scope=settings.couchbase_scope,
        workers=settings.workers,
        threads=settings.threads,
    )
    if shared:
        log.event("warning", "another process serves on the same ports; clients are shared with it", ports=shared)
    if not settings.couchbase_tls_verify:
        log.event("warning", "Couchbase's certificate is not verified: COUCHBASE_TLS_VERIFY is false")
    if settings.connection_string.startswith("couchbase:"):
        log.event("warning", "the connection to Couchbase is not encrypted")
    if settings.workers > 1:
        return supervise(server)
    return serve(server, lambda message: log.event("error", "cannot serve", advice=message))


if __name__ == "__main__":
    sys.exit(main())
