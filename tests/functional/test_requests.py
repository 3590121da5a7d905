"""The corpus in `requests/`: each raw request gets the answers that stand beside it, however its bytes are cut.

A case is a line of JSON in a file for its kind:

- `name`; `raw`: the bytes, as Latin-1 text
- `answers`: the statuses, in order; `closed`: whether the server closes the connection then; `why`: the reason
- `methods`, `routes`, `headers`: of each answer, where they matter: the request's method (else GET), the access log's
  route, header fields that the answer must have
- `half_closed`: the client sends its end after the bytes

In `raw`, `{{repeat:TEXT:65536}}` stands for so many times that text, `{{count:TEXT:40}}` for it with 1, 2, … for its #.
"""

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

import micro_svc_demo as service
from tests.load.clients import Conversation, request
from tests.service import Answer, ServiceProcess, settings_for

CORPUS = Path(__file__).parent / "requests"
REFUSALS = {400, 408, 413, 414, 417, 431, 501, 505}
TOKEN = "functional-tests"
SMALL_BYTES = 6000  # up to this, every position is cut; in larger ones every position near the ends and the bounds
CUTS = {65_536: (300, 97), 1 << 30: (50, 9973)}  # up to a size: bytes near each bound, and the stride, a prime
MARK = re.compile(r"\{\{(repeat|count):(.+?):([0-9]+)\}\}", re.DOTALL)


@dataclass(frozen=True)
class Case:
    """One raw request, or several, and what must come of it."""

    name: str
    raw: bytes = field(repr=False)
    answers: list[int]
    closed: bool
    why: str
    methods: list[str] = field(default_factory=list)
    routes: list[str] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    half_closed: bool = False

    @property
    def refused(self) -> bool:
        """Whether the last answer refuses the message itself, not what it asks for."""
        return self.closed and bool(self.answers) and self.answers[-1] in REFUSALS


def expand(mark: re.Match[str]) -> str:
    kind, text, times = mark[1], mark[2], int(mark[3])
    return text * times if kind == "repeat" else "".join(text.replace("#", str(n)) for n in range(1, times + 1))


def read_cases() -> Iterator[Case]:
    for path in sorted(CORPUS.glob("*.jsonl")):
        for row in map(json.loads, path.read_text(encoding="utf-8").splitlines()):
            row["name"] = f"{path.stem}/{row['name']}"
            row["raw"] = MARK.sub(expand, row["raw"]).encode("latin-1")
            yield Case(**row)


CASES = {case.name: case for case in read_cases()}
CUT_OVER_SOCKETS = [
    "request_line/plain",
    "request_line/version-2.0",
    "fields/folded-with-space",
    "content_length/body-that-looks-like-a-request",
    "chunks/then-a-request",
    "methods/post-with-body-is-not-allowed",
    "pipelines/good-then-body-then-good",
    "pipelines/good-then-malformed-then-good",
    "pipelines/different-methods",
    "connection/half-closed-inside-the-second-head",
]


@pytest.fixture(scope="module")
def single(database) -> Iterator[ServiceProcess]:
    """One process of the service, for all cases."""
    with ServiceProcess(settings_for(database)) as running:
        yield running


def exchange(port: int, case: Case, pieces: Iterable[bytes]) -> list[Answer]:
    """Send the pieces; return the answers, having checked that the connection then is closed, or is not."""
    methods = iter(case.methods)
    with Conversation(port) as client:
        for piece in pieces:
            client.send(piece)
        if case.half_closed:
            client.end()
        replies = [client.answer(next(methods, "GET")) for _ in case.answers]
        if not case.closed:
            last = client.ask(request("/healthz", None, "Connection: close"))
            assert last.status == 200, "the connection does not go on"
        client.wait_for_end()
    assert None not in replies, f"closed after {len([reply for reply in replies if reply])} answers"
    return [reply for reply in replies if reply]


def settle(running: ServiceProcess, mark: str) -> None:
    """Wait until the access log has what was asked before: a failed case does not spoil the next one."""
    mark = mark.replace("/", ".")[:64]
    with Conversation(running.port) as client:
        client.ask(request("/nowhere", None, f"X-Request-ID: {mark}"))
    while running.wait_for("request")["request_id"] != mark:
        pass


def logged(running: ServiceProcess, request_ids: list[str]) -> list[dict[str, Any]]:
    """Return the access log's lines with these ids, in their order; no other request may have been logged."""
    missing, found = list(request_ids), {}
    while missing:
        line = running.wait_for("request")
        assert line["request_id"] in missing, f"something that should have been refused was answered: {line}"
        missing.remove(line["request_id"])
        found[line["request_id"]] = line
    return [found[request_id] for request_id in request_ids]


@pytest.mark.parametrize("case", CASES.values(), ids=lambda case: case.name)
def test_answers(single: ServiceProcess, case: Case) -> None:
    """The answers are those beside the request; what is refused is never routed; the next client is served."""
    settle(single, f"before-{case.name}")
    replies = exchange(single.port, case, [case.raw])
    assert [reply.status for reply in replies] == case.answers, case.why
    for reply, fields in zip(replies, case.headers, strict=False):
        assert fields.items() <= reply.headers.items()
    after = exchange(single.port, CASES["request_line/plain"], [CASES["request_line/plain"].raw])
    lines = logged(single, [reply.headers["x-request-id"] for reply in [*replies, *after]])
    assert [line["status"] for line in lines] == [*case.answers, 200]
    if case.refused:
        assert lines[-2]["route"] == "-", "it was routed"
        assert (lines[-2]["method"] == "-") == (case.answers[-1] != 413)  # of a head with a body it is known
        assert (replies[-1].headers["connection"], replies[-1].headers["cache-control"]) == ("close", "no-store")
    if case.routes:
        assert [line["route"] for line in lines[:-1]] == case.routes


def test_no_refused_request_reaches_the_database(single: ServiceProcess, emulator) -> None:
    """All that is refused as a whole, sent once more: the database is not asked for a single document."""
    before = emulator.stats()["operations"].get("get", 0)
    for case in CASES.values():
        if case.refused and len(case.answers) == 1:
            exchange(single.port, case, [case.raw])
    assert emulator.stats()["operations"].get("get", 0) == before


def test_corpus_is_complete() -> None:
    """At least 150 cases, refused and accepted, each with a name of its own and a reason."""
    assert len(CASES) == len(list(read_cases()))
    assert len([case for case in CASES.values() if case.refused]) >= 100
    assert len([case for case in CASES.values() if not case.refused]) >= 50
    assert {status for case in CASES.values() if case.refused for status in case.answers[-1:]} == REFUSALS - {408}
    assert all(len(case.why) > 10 and "\n" not in case.why for case in CASES.values())


def outcome(pieces: Iterable[bytes]) -> tuple[list[service.Head | int], bool, bool]:
    """Return what the pieces amount to: heads and the status of a refusal; whether more is wanted, and taken."""
    framer = service.Framer()
    items = [item for piece in pieces for item in framer.feed(piece)]
    made = [item.status if isinstance(item, service.ProblemError) else item for item in items]
    return made, framer.partial, framer.refused


def positions(length: int) -> Iterable[int]:
    """Return where to cut: everywhere; in a large request near its ends and its bounds, and at a stride between."""
    if length <= SMALL_BYTES:
        return range(1, length)
    bounds = (0, service.MAX_TARGET_BYTES, service.MAX_HEAD_BYTES, length)
    edge, stride = next(cut for size, cut in CUTS.items() if length <= size)
    near = {bound + offset for bound in bounds for offset in range(-edge, edge)}
    return sorted(position for position in near | set(range(0, length, stride)) if 0 < position < length)


@pytest.mark.parametrize("case", CASES.values(), ids=lambda case: case.name)
def test_cut_into_two(case: Case) -> None:
    """The same bytes in two pieces give the same heads, or the same refusal; a head with a body is the last one."""
    raw = case.raw
    whole = made, _, _ = outcome([raw])
    if made and isinstance(made[-1], service.Head) and service.announces_body(made[-1]):
        assert case.answers[-1] in {405, 413} and len(made) == len(case.answers)
    elif not case.half_closed:
        refused = [item for item in made if isinstance(item, int)]
        assert refused == (case.answers[-1:] if case.refused else [])
    for position in positions(len(raw)):
        assert outcome([raw[:position], raw[position:]]) == whole, position


@pytest.mark.parametrize("case", CASES.values(), ids=lambda case: case.name)
def test_cut_into_single_bytes(case: Case) -> None:
    raw = case.raw
    assert outcome(raw[index : index + 1] for index in range(len(raw))) == outcome([raw])


@pytest.mark.parametrize("name", CUT_OVER_SOCKETS)
def test_cut_over_sockets(single: ServiceProcess, name: str) -> None:
    """Single bytes, and two pieces at a few positions, through the real server."""
    case = CASES[name]
    raw = case.raw
    ways = [[raw[index : index + 1] for index in range(len(raw))]]
    ways += [[raw[:cut], raw[cut:]] for cut in range(1, len(raw), max(1, len(raw) // 7))]
    for pieces in ways:
        replies = exchange(single.port, case, pieces)
        assert [reply.status for reply in replies] == case.answers
