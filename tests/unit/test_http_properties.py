"""Properties of the HTTP/1.1 parser and framer, over made-up and mutated requests; h11 is the second opinion."""

import re
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any, NamedTuple

import h11
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import micro_svc_demo as service

REFUSALS = {400, 414, 417, 431, 501, 505}
EXAMPLES = 400

# ── What is sent: requests of parts that are mostly right, and bytes that are put into them ─────────────────────────

WORDS = [b"GET", b"HEAD", b"OPTIONS", b"POST"]
TARGETS = [b"/", b"/api/v1/id/1?a=b", b"/%zz", b"http://b:81/p?q", b"HTTP://b", b"https://[::1]?x"]
VERSIONS = [b"HTTP/1.1"] * 4 + [b"HTTP/1.0"] * 2 + [b"HTTP/1.2"]
LINES = [
    b"OPTIONS * HTTP/1.1",
    b"CONNECT a:80 HTTP/1.1",
    b"GET * HTTP/1.1",
    b"GET a:80 HTTP/1.1",
    b"get / HTTP/1.1",
] + [
    b"GET " + rest
    for rest in (b"/a#b HTTP/1.1", b"x HTTP/1.1", b"/ HTTP/2.0", b"/ HTTP/1.10", b"/ http/1.1", b" / HTTP/1.1")
]
HARMLESS = [
    b"Content-Length: 0",
    b"Expect: 100-continue",
    b"Expect: 100-Continue",
    b"Connection: close, X-One",
    b"Accept: a",
    b"Accept:\tb \t",
    b"X-Empty:",
    b"X: caf\xc3\xa9",
    b"Cookie: a=b",
    b"Authorization: Bearer t",
]
HARMFUL = [
    b"Host: [::1]:80",
    b"Host: [1::2::]",
    b"Host: a~b!$&'()*+,;=%41",
    b"host:",
    b"Content-Length: 5",
    b"Content-Length: 05",
    b"Content-Length: 5, 5",
    b"Transfer-Encoding: chunked",
    b"Transfer-Encoding: Chunked",
    b"Transfer-Encoding: gzip, chunked",
    b"Transfer_Encoding: chunked",
    b"Expect: tea",
]
BODIES = [
    b"",
    b"",
    b"hello",
    b"5\r\nhello\r\n0\r\n\r\n",
]
ODDITIES = [
    b"\r",
    b"\n",
    b"\r\n",
    b"\0",
    b"\t",
    b" ",
    b":",
    b"\x7f",
    b"\x80",
    b"\xff",
    b",",
    b";",
    b"#",
    b"_",
    b"\r\n ",
]


@st.composite
def requests(draw: st.DrawFn) -> bytes:
    """Return a request of known parts."""
    line = b" ".join(draw(st.sampled_from(part)) for part in (WORDS, TARGETS, VERSIONS))
    line = draw(st.sampled_from([line] * 40 + LINES))
    fields = [b"Host: a", *draw(st.lists(st.sampled_from(HARMLESS * 3 + HARMFUL), max_size=4))]
    fields = draw(st.sampled_from([fields, fields, fields, fields[1:]]))
    before = draw(st.sampled_from([b"", b"", b"", b"", b"\r\n", b"\r\n", b"\r\n\r\n"]))
    return before + b"\r\n".join([line, *fields]) + b"\r\n\r\n" + draw(st.sampled_from(BODIES))


@st.composite
def mutated(draw: st.DrawFn) -> bytes:
    """Return a few requests, into which some bytes were put, and from which some were taken."""
    raw = bytearray(b"".join(draw(st.lists(requests(), min_size=1, max_size=3))))
    for _ in range(draw(st.integers(0, 4))):
        start = draw(st.integers(0, len(raw)))
        length = draw(st.sampled_from([0, 0, 1, 2, 10]))
        raw[start : start + length] = draw(st.sampled_from(ODDITIES) | st.binary(max_size=3))
    return bytes(raw)


ANYTHING = st.binary(max_size=300) | requests() | mutated()


class Result(NamedTuple):
    """What the service makes of a stream of bytes."""

    heads: list[service.Head]
    status: int | None  # of the refusal that ended it
    partial: bool
    refused: bool  # whether it takes no more: after a refusal, or a head with a body


def read(*pieces: bytes) -> Result:
    """Feed the pieces to a framer."""
    framer = service.Framer()
    found = [item for piece in pieces for item in framer.feed(piece)]
    [*_, last] = found or [None]
    status = last.status if isinstance(last, service.ProblemError) else None
    return Result(found[:-1] if status else found, status, framer.partial, framer.refused)


class TestRemembering:
    """A connection remembers the fields of its last request: what came before changes nothing of what comes."""

    BEGINNINGS = (
        [b"%b /x HTTP/1.%d" % (word, minor) for word in (b"GET", b"HEAD") for minor in (0, 1)]
        + [b"GET http://b:81/p HTTP/1.1", b"OPTIONS * HTTP/1.1", b"GET /a#b HTTP/1.1", b"", b"\r\nGET /y HTTP/1.1"]
        + [b"GET /z HTTP/1.1\r\nGET /y HTTP/1.1", b"GET  /x HTTP/1.1", b"GET /x HTTP/1.1\x00"]
    )
    ENDS = (
        [b"", b"Host: a\r\n", b"Host: a\r\nAuthorization: Bearer t\r\n", b"Host: a\r\nExpect: 100-continue\r\n"]
        + [b"Host: a\r\nContent-Length: 0\r\n", b"Host: a\r\nX: %b\r\n" % (b"x" * 2000), b"Host: ?\r\n", b"X: y\r\n"]
        + [b"GET /y HTTP/1.1\r\nHost: a\r\n", b"Host: a\r\nContent-Length: 5\r\n"]
    )

    @settings(max_examples=EXAMPLES, deadline=None)
    @given(st.lists(st.tuples(st.sampled_from(BEGINNINGS), st.sampled_from(ENDS)), min_size=2, max_size=8))
    @example([(b"\r\nGET /y HTTP/1.1", b"Host: a\r\n"), (b"GET /z HTTP/1.1", b"GET /y HTTP/1.1\r\nHost: a\r\n")])
    @example([(b"GET http://b:81/p HTTP/1.1", b"Host: a\r\n"), (b"GET /x HTTP/1.1", b"Host: a\r\n")])
    @example([(b"GET /x HTTP/1.0", b"X: y\r\n"), (b"GET /x HTTP/1.1", b"X: y\r\n")])
    def test_each_request_is_read_as_the_first_would_be(self, parts: list[tuple[bytes, bytes]]) -> None:
        framer = service.Framer()
        for beginning, end in parts:
            raw = b"%b\r\n%b\r\n" % (beginning, end)
            fresh = read(raw)
            found = framer.feed(raw)
            statuses = [item.status for item in found if isinstance(item, service.ProblemError)]
            assert [item for item in found if isinstance(item, service.Head)] == fresh.heads
            assert statuses == ([fresh.status] if fresh.status else [])
            if fresh.refused or fresh.partial:
                framer = service.Framer()


class TestTotality:
    """Whatever comes is a request or a problem; any other exception fails these tests by itself."""

    @settings(max_examples=EXAMPLES, deadline=None)
    @given(ANYTHING)
    def test_any_bytes(self, raw: bytes) -> None:
        result = read(raw)
        assert result.status is None or result.status in REFUSALS
        bodies = [service.announces_body(head) for head in result.heads]
        assert not any(bodies[:-1]), "a head behind a body"
        assert result.refused == (any(bodies) or result.status is not None)
        for head in result.heads:
            assert head.version in {"HTTP/1.0", "HTTP/1.1"}
            assert head.target.startswith("/") or head.method in {"OPTIONS", "CONNECT"}
            assert re.fullmatch("[!-~]+", head.target) and "#" not in head.target
            assert all(re.fullmatch(r"[!#$%&'*+.^_`|~0-9a-z-]+", name) for name in head.fields)
            assert not any(re.search(r"[\x00-\x08\x0a-\x1f\x7f]", value) for value in head.fields.values())

    @settings(max_examples=EXAMPLES, deadline=None)
    @given(ANYTHING)
    def test_any_bytes_as_a_head(self, raw: bytes) -> None:
        """The parser alone, on what the framer would never hand it."""
        for text in (raw, raw + b"\r\n\r\n"):
            try:
                service.announces_body(service.parse_head(text))
            except service.ProblemError as problem:
                assert problem.status in REFUSALS

    @settings(max_examples=EXAMPLES, deadline=None)
    @given(mutated(), st.data())
    def test_any_pieces(self, raw: bytes, data: st.DataObject) -> None:
        """The same bytes amount to the same, whole, in pieces and in single bytes."""
        whole = read(raw)
        cuts = sorted(data.draw(st.lists(st.integers(0, len(raw)), max_size=6)))
        assert read(*(raw[start:end] for start, end in zip([0, *cuts], [*cuts, len(raw)], strict=True))) == whole
        assert read(*(raw[index : index + 1] for index in range(len(raw)))) == whole

    @settings(max_examples=50, deadline=None)
    @given(
        st.integers(8100, 8300) | st.integers(16300, 16500),
        st.integers(0, 16500),
        st.sampled_from([b"", b"\0", b"\n", b"\r", b" ", b"\xff"]),
        st.booleans(),
        st.data(),
    )
    def test_any_pieces_near_the_bounds(
        self, size: int, position: int, oddity: bytes, in_target: bool, data: st.DataObject
    ) -> None:
        """Also where one part is about as long as it may be, and something is wrong with it."""
        before, after = (
            (b"GET /", b" HTTP/1.1\r\nHost: a\r\n\r\n")
            if in_target
            else (
                b"GET / HTTP/1.1\r\nHost: a\r\nX: ",
                b"\r\n\r\n",
            )
        )
        raw = bytearray(before + b"x" * (size - len(before) - len(after)) + after)
        raw[min(position, size) : min(position, size)] = oddity
        whole = read(bytes(raw))
        for cut in data.draw(st.lists(st.integers(1, len(raw) - 1), min_size=1, max_size=20)):
            assert read(bytes(raw[:cut]), bytes(raw[cut:])) == whole, cut

    @settings(max_examples=100, deadline=None)
    @given(mutated(), st.integers(1, 3))
    def test_room_changes_nothing(self, raw: bytes, room: int) -> None:
        """Taken a few at a time, the same heads come out in the same order."""
        framer = service.Framer()
        found = framer.feed(raw, room)
        while more := framer.feed(b"", room):
            assert len(more) <= room
            found += more
        whole = service.Framer().feed(raw)
        assert [getattr(item, "status", item) for item in found] == [getattr(item, "status", item) for item in whole]


# ── Linear time ───────────────────────────────────────────────────────────────────────────────────────────────────────

# Each makes a stream of about so many bytes, of one kind, that never gets to its end, or only just.
STREAMS: dict[str, Callable[[int], bytes]] = {
    "target": lambda size: b"GET /" + b"x" * size,
    "value": lambda size: b"GET / HTTP/1.1\r\nX: " + b"y" * size,
    "spaces": lambda size: b"GET / HTTP/1.1\r\nX: " + b" " * size,
    "tabs and letters": lambda size: b"GET / HTTP/1.1\r\nX: " + b"\ty" * (size // 2),
    "name": lambda size: b"GET / HTTP/1.1\r\n" + b"X" * size,
    "fields": lambda size: b"GET / HTTP/1.1\r\n" + b"A:b\r\n" * (size // 5),
    "repeated host": lambda size: b"GET / HTTP/1.1\r\n" + b"Host: a\r\n" * (size // 9),
    "carriage returns": lambda size: b"GET / HTTP/1.1\r\nX: y" + b"\r" * size,
    "pipeline": lambda size: b"GET / HTTP/1.1\r\nHost: a\r\n\r\n" * (size // 27),
    "empty lines": lambda size: b"\r\n" * (size // 2),
    "body": lambda size: b"GET / HTTP/1.1\r\nHost: a\r\nContent-Length: 65536\r\n\r\n" + b"x" * size,
    "chunks": lambda size: (
        b"GET / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n" + b"1\r\nx\r\n" * (size // 6)
    ),
}


def calls(work: Callable[[], object]) -> int:
    """Return how many functions, Python's and C's, are called by `work`: a count, which no other load changes."""
    count = 0

    def profile(_frame: Any, event: str, _argument: Any) -> None:
        nonlocal count
        count += event in {"call", "c_call"}

    before = sys.getprofile()
    sys.setprofile(profile)
    try:
        work()
    finally:
        sys.setprofile(before)
    return count


class Meter(bytearray):
    """The framer's inbox, which counts the bytes that its searches and copies may have to look at."""

    examined = 0

    def find(self, *arguments: Any) -> int:
        sub, start, end = (*arguments, *(0, len(self))[len(arguments) - 1 :])
        found = super().find(sub, start, end)
        Meter.examined += max(0, (min(end, len(self)) if found < 0 else found + len(sub)) - start)
        return found

    def __getitem__(self, key: Any) -> Any:
        Meter.examined += len(range(*key.indices(len(self)))) if isinstance(key, slice) else 1
        return super().__getitem__(key)


class MeteredPattern:
    """A compiled pattern, which counts the bytes that lie before it, or that it took where it matched."""

    def __init__(self, pattern: re.Pattern[Any]) -> None:
        self._pattern = pattern

    def match(self, text: Any, *bounds: int) -> Any:
        return self._count(self._pattern.match(text, *bounds), text, *bounds)

    def search(self, text: Any, *bounds: int) -> Any:
        return self._count(self._pattern.search(text, *bounds), text, *bounds)

    def fullmatch(self, text: Any, *bounds: int) -> Any:
        return self._count(self._pattern.fullmatch(text, *bounds), text, *bounds)

    def findall(self, text: Any, start: int = 0) -> Any:
        Meter.examined += len(text) - start
        return self._pattern.findall(text, start)

    def _count(self, found: Any, text: Any, start: int = 0, end: int = 1 << 60) -> Any:
        Meter.examined += (found.end() if found else min(end, len(text))) - start
        return found


@pytest.fixture
def examined(monkeypatch: pytest.MonkeyPatch) -> Callable[[bytes, int], int]:
    """Feed a stream in pieces of a size and return how many bytes were handed to searches, matches and copies."""
    for name, value in vars(service).items():
        if isinstance(value, re.Pattern):
            monkeypatch.setattr(service, name, MeteredPattern(value))

    def run(stream: bytes, piece: int) -> int:
        framer = service.Framer()
        framer.inbox = Meter()
        Meter.examined = 0
        for start in range(0, len(stream), piece):
            framer.feed(stream[start : start + piece])
        return Meter.examined

    return run


SMALL, LARGE = 4000, 8000  # both below every bound: a refusal would end the work early


class TestLinearTime:
    """Work grows as the bytes do. Counted, not timed, as far as something can be counted."""

    @pytest.mark.parametrize("name", STREAMS)
    @pytest.mark.parametrize("piece", [1, 1000])
    def test_calls(self, name: str, piece: int) -> None:
        """Twice the bytes call at most twice the functions; so none is called for what was there before."""

        def work(size: int) -> int:
            stream, framer = STREAMS[name](size), service.Framer()
            pieces = [stream[start : start + piece] for start in range(0, len(stream), piece)]
            return calls(lambda: [framer.feed(part) for part in pieces])

        assert work(LARGE) <= 2.2 * work(SMALL) + 40

    @pytest.mark.parametrize("name", STREAMS)
    def test_bytes_examined(self, name: str, examined: Callable[[bytes, int], int]) -> None:
        """Twice the bytes, one at a time, have at most twice as many of them looked at."""
        small, large = STREAMS[name](SMALL), STREAMS[name](LARGE)
        assert examined(large, 1) <= 2.2 * examined(small, 1) + 2000

    @pytest.mark.parametrize("name", STREAMS)
    def test_time_of_a_head_of_any_size(self, name: str) -> None:
        """What the regular-expression engine does inside one call cannot be counted from Python, so its time is taken.

        Sizes are 32 times apart, and far beyond what the framer lets through: linear work grows 32 times, quadratic
        1,024 times. The processor time of the process is used, the least of five runs, and the bound lies between.
        """

        def least(size: int) -> float:
            raw = STREAMS[name](size) + b"\r\n\r\n"
            runs = []
            for _ in range(5):
                started = time.process_time()
                with suppress(service.ProblemError):
                    service.parse_head(raw)
                runs.append(time.process_time() - started)
            return min(runs)

        assert least(32 * 16_384) <= 180 * max(least(16_384), 0.000_01)


# ── h11 as the second opinion ─────────────────────────────────────────────────────────────────────────────────────────


class Second(NamedTuple):
    """What h11 makes of the first request."""

    method: str
    target: str
    version: str
    fields: list[tuple[str, str]]


def second_opinion(raw: bytes) -> Second | str | None:
    """Return the first request as h11 reads it, why it refuses it, or None if it wants more."""
    parser = h11.Connection(h11.SERVER)
    parser.receive_data(raw)
    try:
        event = parser.next_event()
    except h11.RemoteProtocolError as error:
        return str(error)
    if not isinstance(event, h11.Request):
        return None
    return Second(
        event.method.decode(),
        event.target.decode("latin-1"),
        f"HTTP/{event.http_version.decode()}",
        [(name.decode(), value.decode("latin-1")) for name, value in event.headers],
    )


def joined(fields: list[tuple[str, str]]) -> dict[str, str]:
    """Join repeated fields as RFC 9110, 5.3 says."""
    values: dict[str, list[str]] = {}
    for name, value in fields:
        values.setdefault(name, []).append(value)
    return {name: ", ".join(value) for name, value in values.items()}


class Difference(NamedTuple):
    """A way in which an accepted request may differ from what h11 reads, and what makes the two alike again."""

    reason: str
    applies: Callable[[bytes, service.Head], bool]
    prepare: Callable[[bytes], bytes] = lambda raw: raw
    rewrite: Callable[[Second], Second] = lambda second: second


def _absolute(second: Second) -> Second:
    found = re.fullmatch(r"(?i:https?)://([^/?]+)(.*)", second.target)
    assert found
    fields = [(name, value) for name, value in second.fields if name != "host"] + [("host", found[1])]
    rest = found[2]
    return second._replace(target=rest if rest.startswith("/") else "/" + rest, fields=fields)


DIFFERENCES = {
    "empty line": Difference(
        "one empty line before the request line is ignored (RFC 9112, 2.2: SHOULD); h11 refuses it",
        lambda raw, head: raw.startswith(b"\r\n"),
        prepare=lambda raw: raw.removeprefix(b"\r\n"),
    ),
    "absolute form": Difference(
        "the target is reduced to its path and query, and the authority replaces Host (RFC 9112, 3.2.2); h11 leaves "
        "both to the application",
        lambda raw, head: re.match(rb"(?:\r\n)?[A-Z][A-Z0-9_-]* (?i:https?)://", raw) is not None,
        rewrite=_absolute,
    ),
    "version": Difference(
        "a later minor version is read as HTTP/1.1 (RFC 9110, 2.5); h11 hands it on",
        lambda raw, head: re.match(rb"(?:\r\n)?[^\r\n]* HTTP/1\.[2-9]\r\n", raw) is not None,
        rewrite=lambda second: second._replace(version="HTTP/1.1"),
    ),
    "coding": Difference(
        "codings have no case (RFC 9112, 7); h11 hands `chunked` on in lower case, the service as it was sent",
        lambda raw, head: head.fields.get("transfer-encoding", "chunked") != "chunked",
        rewrite=lambda second: second._replace(
            fields=[
                (name, "Chunked" if name == "transfer-encoding" and value == "chunked" else value)
                for name, value in second.fields
            ]
        ),
    ),
}


def as_read(second: Second) -> tuple[str, str, str, dict[str, str]]:
    """Return it in the service's own terms; a coding in lower case, as h11 has it."""
    return second.method, second.target, second.version, joined(second.fields)


def compare(raw: bytes) -> set[str]:
    """Assert that h11 reads the first accepted request as the service does; return which differences were at work."""
    heads = read(raw).heads
    if not heads:
        return set()
    head, found = heads[0], set()
    second_raw = raw
    for name, difference in DIFFERENCES.items():
        if difference.applies(raw, head):
            found.add(name)
            second_raw = difference.prepare(second_raw)
    second = second_opinion(second_raw)
    assert isinstance(second, Second), f"h11 refuses what is accepted: {second}"
    for name in found:
        second = DIFFERENCES[name].rewrite(second)
    ours = head.fields
    if "coding" in found:
        ours = ours | {"transfer-encoding": ours["transfer-encoding"].title()}
    assert (head.method, head.target, head.version, ours) == as_read(second)
    return found


LISTED = {
    "empty line": b"\r\nGET / HTTP/1.1\r\nHost: a\r\n\r\n",
    "absolute form": b"GET http://b:81?q HTTP/1.1\r\nHost: a\r\n\r\n",
    "version": b"GET / HTTP/1.2\r\nHost: a\r\n\r\n",
    "coding": b"GET / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: cHUNKED\r\n\r\n0\r\n\r\n",
}


class TestSecondOpinion:
    @settings(max_examples=1500, deadline=None)
    @given(
        requests() | mutated() | st.binary(max_size=60).map(lambda middle: b"GET " + middle + b"\r\nHost: a\r\n\r\n")
    )
    @example(b"GET / HTTP/1.0\r\n\r\n")
    @example(b"GET / HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\nContent-Length: 5\r\n\r\nhello")
    def test_what_is_accepted_h11_accepts_alike(self, raw: bytes) -> None:
        """Method, target, version and fields are the same, but for the differences listed."""
        compare(raw)

    @pytest.mark.parametrize("name", DIFFERENCES)
    def test_each_difference_is_real(self, name: str) -> None:
        """A difference that is listed happens; one that no longer does has to go from the list."""
        raw = LISTED[name]
        assert compare(raw) == {name}
        second, [head] = second_opinion(raw), read(raw).heads
        assert not isinstance(second, Second) or as_read(second) != head

    @settings(max_examples=EXAMPLES, deadline=None)
    @given(st.lists(st.tuples(st.sampled_from([b"X-A", b"x-a", b"X-B"]), st.binary(max_size=8)), max_size=5))
    def test_values_are_the_same(self, fields: list[tuple[bytes, bytes]]) -> None:
        """Also with any bytes in the values of the fields."""
        lines = b"".join(b"%b: %b\r\n" % item for item in fields)
        compare(b"GET / HTTP/1.1\r\nHost: a\r\n" + lines + b"\r\n")

    def test_the_strategies_reach_what_they_are_for(self) -> None:
        """Enough of what is made up is accepted, else the comparison would prove nothing."""
        counts = {"accepted": 0, "refused": 0}

        @settings(max_examples=EXAMPLES, deadline=None, database=None)
        @given(requests())
        def count(raw: bytes) -> None:
            counts["accepted" if read(raw).heads else "refused"] += 1

        count()
        assert min(counts.values()) > EXAMPLES // 5, counts
