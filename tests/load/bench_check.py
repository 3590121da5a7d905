"""Whether two services answer alike: a peer that does less than ours does would win for the wrong reason."""

import http.client
import json
from typing import Any, NamedTuple
from urllib.parse import quote

from tests.load.bench_backend import Backend
from tests.service import Answer, ask

SAME_HEADERS = ("cache-control", "x-content-type-options", "x-request-id", "www-authenticate", "link")
REQUEST_ID = "the-same-for-all"


class Probe(NamedTuple):
    """One request, and what its answer must be."""

    what: str
    path: str
    status: int
    headers: dict[str, str]
    method: str = "GET"


def probes(backend: Backend) -> list[Probe]:
    """Return the requests that cover routes, token check and headers."""
    token = {"Authorization": f"Bearer {backend.token}", "X-Request-ID": REQUEST_ID}
    key = {"x-access-token": backend.token, "X-Request-ID": REQUEST_ID}
    wrong = {"Authorization": "Bearer wrong", "X-Request-ID": REQUEST_ID}
    nothing = {"X-Request-ID": REQUEST_ID}
    nickname, username = (quote(names[0], safe="") for names in (backend.nicknames, backend.usernames))
    return [
        *(Probe(f"profile {number}", f"/api/v1/id/{number}", 200, token) for number in (1, 2, backend.documents)),
        Probe("profile by x-access-token", "/api/v1/id/3", 200, key),
        Probe("profile by HEAD", "/api/v1/id/4", 200, token, "HEAD"),
        Probe("missing profile", f"/api/v1/id/{backend.documents + 1}", 404, token),
        Probe("profile, wrong token", "/api/v1/id/1", 401, wrong),
        Probe("profile, no token", "/api/v1/id/1", 401, nothing),
        *(Probe("nickname", f"/api/v1/nickname/{quote(name, safe='')}", 200, token) for name in backend.nicknames),
        Probe("nickname, one only", f"/api/v1/nickname/{nickname}?limit=1", 200, token),
        Probe("unknown nickname", "/api/v1/nickname/nobody-has-this", 404, token),
        Probe("nickname, wrong token", f"/api/v1/nickname/{nickname}", 401, wrong),
        Probe("username", f"/api/v1/username/{username}", 200, token),
        Probe("picture's record", "/api/v1/picture/record/bench-0", 200, token),
        Probe("picture", "/api/v1/picture/raw/bench-1", 200, token),
        Probe("missing picture", "/api/v1/picture/raw/none", 404, token),
        Probe("unknown route", "/api/v1/nothing/1", 404, token),
    ]


def answers(port: int, backend: Backend) -> list[Answer]:
    """Ask a service all of it.

    Raises:
        OSError, http.client.HTTPException: it does not answer.
    """
    return [ask(port, probe.path, probe.headers, probe.method) for probe in probes(backend)]


def differences(port: int, backend: Backend, reference: list[Answer]) -> list[str]:
    """Say what a service answers otherwise than the reference does; empty if nothing."""
    found: list[str] = []
    for probe, expected in zip(probes(backend), reference, strict=True):
        try:
            given = ask(port, probe.path, probe.headers, probe.method)
        except (OSError, http.client.HTTPException) as error:
            found.append(f"{probe.what}: {type(error).__name__}")
            continue
        found += [f"{probe.what}: {difference}" for difference in _compare(probe, expected, given)]
        if not found and "etag" in given.headers:
            again = ask(port, probe.path, probe.headers | {"If-None-Match": given.headers["etag"]}, probe.method)
            if again.status != http.HTTPStatus.NOT_MODIFIED or again.body:
                found.append(f"{probe.what}: {again.status} for its own ETag, not 304")
    return found


def _compare(probe: Probe, expected: Answer, given: Answer) -> list[str]:
    found = []
    if not given.status == expected.status == probe.status:
        why = f" ({given.body[:200].decode(errors='replace')})" if given.status >= http.HTTPStatus.BAD_REQUEST else ""
        found.append(f"status {given.status}{why}, the reference {expected.status}, expected {probe.status}")
    if _content(given) != _content(expected):
        found.append(f"another body ({len(given.body)} bytes, not {len(expected.body)})")
    if _media_type(given) != _media_type(expected):
        found.append(f"Content-Type {_media_type(given)}, not {_media_type(expected)}")
    for name in SAME_HEADERS:
        if given.headers.get(name) != expected.headers.get(name):
            found.append(f"{name} {given.headers.get(name)!r}, not {expected.headers.get(name)!r}")
    for name in ("etag", "date"):
        if (name in given.headers) != (name in expected.headers):
            found.append(f"{name} {'missing' if name in expected.headers else 'not expected'}")
    return found


def _media_type(answer: Answer) -> str:
    return answer.headers.get("content-type", "").partition(";")[0]


def _content(answer: Answer) -> Any:
    """Return JSON as what it says, as white space may differ, and anything else as it is."""
    if not _media_type(answer).endswith("json"):
        return answer.body
    try:
        return json.loads(answer.body) if answer.body else b""
    except ValueError:
        return answer.body
