"""Requests to the query service: the members that they may have, and what they mean."""

import functools
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tests.emulator.sqlpp_errors import (
    BAD_VALUE,
    MISSING_VALUE,
    MULTIPLE_VALUES,
    TIMEOUT,
    UNKNOWN_PARAMETER,
    UNKNOWN_VALUE,
    WRONG_TYPE,
    QueryError,
    not_supported,
)
from tests.emulator.sqlpp_expressions import Parameters

NAMESPACE = "default"
SCAN_CONSISTENCIES = frozenset({"not_bounded", "at_plus", "request_plus", "statement_plus"})

TEXT, FLAG, LIST, ANY = "string", "boolean", "array", ""
REQUEST_PARAMETERS = {
    **dict.fromkeys(("statement", "prepared", "encoded_plan", "client_context_id", "query_context", "timeout"), TEXT),
    **dict.fromkeys(("scan_consistency", "scan_wait", "profile", "namespace", "format", "encoding"), TEXT),
    **dict.fromkeys(("readonly", "metrics", "signature", "pretty", "auto_execute"), FLAG),
    **dict.fromkeys(("preserve_expiry", "tximplicit"), FLAG),
    "args": LIST,
    **dict.fromkeys(("compression", "scan_vector", "scan_vectors", "scan_cap", "pipeline_cap", "pipeline_batch"), ANY),
    **dict.fromkeys(("max_parallelism", "use_fts", "use_cbo", "use_replica", "creds", "controls"), ANY),
    **dict.fromkeys(("auto_prepare", "memory_quota", "n1ql_feat_ctrl", "max_index_api", "error_limit"), ANY),
    **dict.fromkeys(("durability_level", "kvtimeout", "numatrs", "txid", "txdata", "txstmtnum", "txtimeout"), ANY),
    **dict.fromkeys(("atrcollection", "sort_projection"), ANY),
}
"""The members of a request that the server knows, besides ``$name``, and the types that are checked."""
TYPES: dict[str, type] = {TEXT: str, FLAG: bool, LIST: list}

CONTEXT_NAME = r"(?:`([^`]+)`|([A-Za-z0-9_%-]+))"
CONTEXT = re.compile(rf"(?:(?:{NAMESPACE}|`{NAMESPACE}`)?:)?(?:{CONTEXT_NAME}\.{CONTEXT_NAME})?")
DURATION = re.compile(r"(?:[0-9]+(?:\.[0-9]*)?(?:ns|us|µs|ms|s|m|h))+|[0-9]+")
DURATION_PART = re.compile(r"([0-9]+(?:\.[0-9]*)?)(ns|us|µs|ms|s|m|h)?")
SECONDS = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0, "": 1.0}


@dataclass(frozen=True)
class Request:
    """A checked request."""

    text: str | None
    prepared: str | None
    context: str
    parameters: Parameters
    readonly: bool
    auto_execute: bool
    timeout_text: str
    deadline: float


def check_request(request: Mapping[str, Any]) -> Request:
    """Check the members of a request.

    Raises:
        QueryError: 1065 for one that there is none of, 1070 for a wrong type, 1030 and 1040 for a bad value, 1050 and
            1060 if there is no statement or more than one.
    """
    parameters: Parameters = {}
    for name, value in request.items():
        if name.startswith("$") and len(name) > 1:
            parameters[name[1:]] = value
            continue
        kind = REQUEST_PARAMETERS.get(name)
        if kind is None:
            raise QueryError(UNKNOWN_PARAMETER, f"Unrecognized parameter in request: {name}")
        if kind and type(value) is not TYPES[kind]:
            raise QueryError(WRONG_TYPE, f"{name} has to be of type {kind}")
    get = request.get
    for position, value in enumerate(get("args", ()), 1):
        parameters[str(position)] = value
    text, prepared = get("statement"), get("prepared")
    if not text and not prepared:
        raise QueryError(MISSING_VALUE, "No statement or prepared value")
    if text and prepared:
        raise QueryError(MULTIPLE_VALUES, "Multiple values for statement and prepared.")
    consistency = get("scan_consistency")
    if consistency is not None and consistency.lower() not in SCAN_CONSISTENCIES:
        raise QueryError(UNKNOWN_VALUE, f"Unknown scan_consistency value: {consistency}")
    if get("tximplicit") or get("txid"):
        raise not_supported("A transaction")
    timeout = get("timeout", "")
    seconds = parse_duration(timeout) if timeout else 0.0
    deadline = time.monotonic() + seconds if seconds > 0 else float("inf")
    context = get("query_context", "")
    return Request(
        text, prepared, context, parameters, get("readonly", False), get("auto_execute", False), timeout, deadline
    )


@functools.lru_cache(maxsize=64)
def parse_duration(text: str) -> float:
    """Return the seconds that a duration such as ``1m30s`` or ``500ms`` is; raises QueryError 1040."""
    positive = text.removeprefix("-")
    if not DURATION.fullmatch(positive):
        raise QueryError(BAD_VALUE, f"Error processing timeout - cause: invalid duration {text}")
    seconds = sum(float(value) * SECONDS[unit] for value, unit in DURATION_PART.findall(positive))
    return seconds if positive == text else -seconds


@functools.lru_cache(maxsize=64)
def parse_context(text: str) -> tuple[str, str] | None:
    """Return the bucket and the scope that a ``query_context`` names, None for none; raises QueryError 1040."""
    match = CONTEXT.fullmatch(text)
    if match is None:
        raise QueryError(BAD_VALUE, f"Error processing query_context - cause: invalid path {text}")
    bucket, scope = match[1] or match[2], match[3] or match[4]
    return (bucket, scope) if bucket else None


def check_time(request: Request) -> None:
    """Raise QueryError 1080 if the request's time is up."""
    if time.monotonic() > request.deadline:
        raise QueryError(TIMEOUT, f"Timeout {request.timeout_text} exceeded")
