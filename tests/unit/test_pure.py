"""The small pure parts: paging, percent-decoding, tokens, back-off, problems, tags, dates; and the log."""

import contextlib
import datetime
import ipaddress
import itertools
import json
import os
import pty
import random
import re
import socket
import tempfile
import time
import tty
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock
from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st

import micro_svc_demo as service
from tests.chaos.clients import wait_until


class TestPage:
    def test_defaults(self) -> None:
        assert service.parse_page("") == (100, 0)

    def test_given_and_unknown_parameters(self) -> None:
        """Unknown parameters are ignored, also malformed ones."""
        assert service.parse_page("limit=7&x=%zz&offset=14&y") == (7, 14)

    @pytest.mark.parametrize("limit", ["1", "1000"])
    def test_bounds_are_allowed(self, limit: str) -> None:
        assert service.parse_page(f"limit={limit}") == (int(limit), 0)

    @pytest.mark.parametrize(
        "query",
        ["limit=0", "limit=1001", "limit=-1", "limit=+1", "limit=1.0", "limit=", "limit", "limit=0x1", "limit=%31"]
        + ["limit=1&limit=2", "offset=-1", "offset=1000000001", "offset=99999999999", "limit=1_0", "limit= 1"],
    )
    def test_anything_else_is_400(self, query: str) -> None:
        with pytest.raises(service.ProblemError) as raised:
            service.parse_page(query)
        assert raised.value.status == 400


class TestDecodeSegment:
    @pytest.mark.parametrize(
        ("segment", "text"),
        [("plain", "plain"), ("a%20b", "a b"), ("a+b", "a+b"), ("%2F%3f", "/?"), ("%F0%9F%98%80", "😀"), ("%25", "%")],
    )
    def test_decodes(self, segment: str, text: str) -> None:
        assert service.decode_segment(segment) == text

    @pytest.mark.parametrize(
        "segment",
        ["%", "%4", "%zz", "a%", "%%41", "%ff", "%c3", "%ed%a0%80", "%c0%af", "%f4%90%80%80", "%00", "%0d%0a", "%7F"],
    )
    def test_refuses(self, segment: str) -> None:
        """Broken escapes, bytes that are not UTF-8 (overlong, surrogates, beyond Unicode) and control characters."""
        with pytest.raises(service.ProblemError) as raised:
            service.decode_segment(segment)
        assert raised.value.status == 400

    def test_an_empty_one_belongs_to_no_route(self) -> None:
        with pytest.raises(service.ProblemError) as raised:
            service.decode_segment("")
        assert raised.value.status == 404

    @given(st.text(st.characters(min_codepoint=32, exclude_characters="\x7f", exclude_categories=["Cs"]), min_size=1))
    def test_quoting_and_decoding_round_trip(self, text: str) -> None:
        assert service.decode_segment(quote(text, safe="")) == text


class TestTokens:
    def test_nothing_is_accepted_before_a_token_is_known(self) -> None:
        tokens = service.Tokens(30)
        assert tokens.current is None
        assert not tokens.accepts("", 0)

    def test_only_the_token_is_accepted(self) -> None:
        tokens = service.Tokens(30)
        assert tokens.adopt("secret", now=0)
        assert tokens.current == b"secret"
        assert tokens.accepts("secret", 0)
        assert not any(tokens.accepts(wrong, 0) for wrong in ("", "secre", "secret ", "Secret", "sécret", "\u20ac"))

    def test_the_previous_token_is_good_for_one_more_period(self) -> None:
        tokens = service.Tokens(30)
        tokens.adopt("old", now=0)
        assert tokens.adopt("new", now=100)
        assert tokens.accepts("old", 129.9)
        assert tokens.accepts("new", 129.9)
        assert not tokens.accepts("old", 130)
        assert tokens.accepts("new", 10_000)

    def test_reading_the_same_token_again_changes_nothing(self) -> None:
        """Else each re-read would make the previous token good for another period."""
        tokens = service.Tokens(30)
        tokens.adopt("old", now=0)
        tokens.adopt("new", now=100)
        assert not tokens.adopt("new", now=120)
        assert not tokens.accepts("old", 131)


class TestBackoff:
    def test_doubles_to_its_bound_with_jitter(self) -> None:
        random.seed(1)
        delays = list(itertools.islice(service.backoff(0.2, 5.0), 12))
        for delay, most in zip(delays, [0.2, 0.4, 0.8, 1.6, 3.2] + [5.0] * 7, strict=True):
            assert most / 2 <= delay <= most
        assert len(set(delays)) == len(delays)


class TestProblem:
    def test_document(self) -> None:
        problem = service.ProblemError(503, "why", "Retry-After: 1", reasons=["a", "b"])
        assert json.loads(problem.document("id-1")) == {
            "title": "Service Unavailable",
            "status": 503,
            "detail": "why",
            "request_id": "id-1",
            "reasons": ["a", "b"],
        }


class TestTag:
    @pytest.mark.parametrize("given_tags", ["*", '"1f"', 'W/"1f"', '"0", "1f"', '"0",W/"1f" ,"2"'])
    def test_matches(self, given_tags: str) -> None:
        assert service._names_tag(given_tags, '"1f"', 'W/"1f"')

    @pytest.mark.parametrize("given_tags", ["", '"1F"', "1f", '"1f', '"11f"', 'w/"1f"', 'W/W/"1f"'])
    def test_does_not_match(self, given_tags: str) -> None:
        assert not service._names_tag(given_tags, '"1f"', 'W/"1f"')


@pytest.mark.parametrize(
    ("forwarded", "client"),
    [
        ("", "10.0.0.1"),
        ("192.0.2.7", "192.0.2.7"),
        ("198.51.100.1, 192.0.2.7", "192.0.2.7"),
        ("198.51.100.1,192.0.2.7 ,10.0.0.3,\t10.0.0.2", "192.0.2.7"),
        ("10.0.0.4, 10.0.0.3", "10.0.0.4"),
        ("192.0.2.7:4711", "192.0.2.7"),
        ("[2001:db8::1]:4711", "2001:db8::1"),
        ("[2001:db8::1]", "2001:db8::1"),
        ("2001:DB8:0::1", "2001:db8::1"),
        ("::ffff:192.0.2.7", "192.0.2.7"),
        ("192.0.2.7, [::ffff:10.0.0.3]:80", "192.0.2.7"),
        ("192.0.2.7, fd00::1", "192.0.2.7"),
        ('fe80::1%"', "10.0.0.1"),
        ("fe80::1%eth0", "10.0.0.1"),
        ("[fe80::1%1]:80", "10.0.0.1"),
        ("192.0.2.7, unknown, 10.0.0.3", "10.0.0.3"),
        ("192.0.2.7, , 10.0.0.3", "10.0.0.3"),
        ("192.0.2.7,", "10.0.0.1"),
        ("192.0.2.7:port", "10.0.0.1"),
        ("192.0.2.256", "10.0.0.1"),
        ("2001:db8::1::", "10.0.0.1"),
        ("[192.0.2.7", "10.0.0.1"),
        ('"192.0.2.7"', "10.0.0.1"),
    ],
)
def test_client_behind_trusted_proxies(forwarded: str, client: str) -> None:
    """From the right the first that is not trusted; what is no address ends the search."""
    trusted = [ipaddress.ip_network("10.0.0.0/8"), ipaddress.ip_network("fd00::/8")]
    assert service.client_behind(trusted, "10.0.0.1", {"x-forwarded-for": forwarded}) == client
    for peer in ("192.0.2.1", "2001:db8::2", ""):
        assert service.client_behind(trusted, peer, {"x-forwarded-for": forwarded}) == peer


@given(st.text() | st.lists(st.text('0123456789abcdef:.%[], "', max_size=20), max_size=4).map(",".join))
def test_a_client_is_an_address_whatever_is_forwarded(forwarded: str) -> None:
    client = service.client_behind([ipaddress.ip_network("0.0.0.0/0")], "10.0.0.1", {"x-forwarded-for": forwarded})
    assert str(ipaddress.ip_address(client)) == client and "%" not in client


def test_date_of_an_answer() -> None:
    assert service.http_date(784111777) == "Sun, 06 Nov 1994 08:49:37 GMT"


def open_output(kind: str) -> tuple[int, int]:
    """Return the descriptors to read from and to write to."""
    if kind == "file":
        with tempfile.NamedTemporaryFile() as file:
            return os.open(file.name, os.O_RDONLY), os.open(file.name, os.O_WRONLY)
    if kind == "socket":
        reading, writing = (each.detach() for each in socket.socketpair())
    elif kind == "pty":
        reading, writing = pty.openpty()
        tty.setraw(writing)
    else:
        reading, writing = os.pipe()
        os.set_blocking(writing, kind == "pipe")
    return reading, writing


def read_lines(reading: int, until: bytes = b"no such text") -> list[dict[str, Any]]:
    """Return the lines up to a text, or all."""
    data = b""
    with contextlib.suppress(OSError):  # which is how a pty ends
        while until not in data and (more := os.read(reading, 65_536)):
            data += more
    return [json.loads(line) for line in data.decode().splitlines(keepends=True)]


def answered(number: int) -> Any:
    """Return as much of a handler as a line needs."""
    handler = {
        "route": "/api/v1/id/{id}",
        "command": "GET",
        "status": 200,
        "response": b"",
        "cut_off": "",
        "connection": SimpleNamespace(client_cert=""),
        "seconds": 0.001,
    }
    handler |= {"client": "192.0.2.1", "operation": None, "headers": {}, "request_id": f"{number:09d}"}
    return SimpleNamespace(**handler)


class TestLog:
    def read(self, level: str, *events: tuple[str, str, str]) -> list[dict[str, Any]]:
        reading, writing = open_output("file")
        log = service.Log(level, descriptor=writing)
        for least, message, text in events:
            log.event(least, message, text=text)
        log.close(5)
        os.close(writing)
        return read_lines(reading)

    def test_a_value_cannot_forge_a_line(self) -> None:
        [line] = self.read("info", ("info", "m", 'a\r\n{"level": "error"}\x1b[31m'))
        assert line["text"] == 'a\r\n{"level": "error"}\x1b[31m'

    def test_level_is_a_threshold(self) -> None:
        lines = self.read("warning", ("info", "quiet", ""), ("warning", "loud", ""), ("error", "loudest", ""))
        assert [line["message"] for line in lines] == ["loud", "loudest"]

    def test_time_is_utc_to_the_millisecond(self) -> None:
        before = datetime.datetime.now(datetime.UTC)
        [line] = self.read("info", ("info", "m", ""))
        assert re.fullmatch(r"[0-9-]{10}T[0-9:]{8}\.[0-9]{3}\+00:00", line["time"])
        late = datetime.datetime.fromisoformat(line["time"]) - before
        assert datetime.timedelta(milliseconds=-1) <= late < datetime.timedelta(minutes=1)

    @pytest.mark.parametrize("kind", ["file", "pipe", "non-blocking pipe", "socket", "pty"])
    def test_all_is_written_to_every_kind_of_output(self, kind: str) -> None:
        """In order, and at the latest when it is closed."""
        reading, writing = open_output(kind)
        log = service.Log(descriptor=writing)
        for number in range(3):
            log.event("info", "event", number=number)
            log.requests([answered(number), answered(number)])
        log.close(5)
        os.close(writing)
        lines = read_lines(reading)
        assert [line["message"] for line in lines] == ["event", "request", "request"] * 3
        assert log.dropped == 0
        os.close(reading)

    @pytest.mark.parametrize("kind", ["pipe", "non-blocking pipe", "socket", "pty"])
    def test_nobody_waits_for_who_does_not_read(self, kind: str) -> None:
        """Beyond the bound requests' lines are dropped whole, and counted; events' are not; closing takes no time."""
        reading, writing = open_output(kind)
        log = service.Log(descriptor=writing)
        log.bound_bytes = 1 << 16
        handlers = [answered(number) for number in range(4200)]  # 800 kB of lines; a socket holds 200

        def fill() -> int:
            before = log.dropped
            for start in range(0, len(handlers), 7):
                log.requests(handlers[start : start + 7])
            return log.dropped - before

        dropped = fill()
        log.event("error", "the last")
        assert dropped == log.dropped > 0
        *lines, last = read_lines(reading, b"the last")
        assert last["message"] == "the last"
        received = [line["request_id"] for line in lines]
        assert received == sorted(set(received))
        assert len(received) + dropped == len(handlers)
        wait_until(lambda: fill() < len(handlers), "lines are taken again")
        while fill() < len(handlers):  # until it is full
            pass
        started = time.monotonic()
        log.close(0.2)
        assert time.monotonic() - started < 15  # on a busy machine; else it would wait without end
        os.close(reading)
        log.close(5)
        os.close(writing)

    def test_an_output_that_is_closed_at_the_other_end_stops_nobody(self) -> None:
        reading, writing = os.pipe()
        os.close(reading)
        log = service.Log(descriptor=writing)
        log.event("info", "unheard")
        log.close(5)
        os.close(writing)

    def test_a_closed_output_is_not_taken_for_what_opens_next(self) -> None:
        with tempfile.TemporaryFile() as file:
            lower, number = os.pipe()
            os.close(lower)
            os.close(number)
            log = service.Log(descriptor=number)
            os.dup2(file.fileno(), number)  # a client's connection, say
            log.event("info", "unheard")
            log.close(5)
            os.close(number)
            assert file.seek(0, os.SEEK_END) == 0

    def test_an_exception_whose_str_raises_is_described(self) -> None:
        class Broken(Exception):
            def __str__(self) -> str:
                raise RuntimeError("no text")

        assert service.describe(Broken()) == "Broken"


class TestProcessors:
    STAT = """cpu  700 20 300 9000 50 10 20 30 0 0
cpu0 500 10 200 4000 25 5 10 15 0 0
cpu11 200 10 100 5000 25 5 10 15 0 0
intr 12345 0 9
ctxt 99
"""

    def test_busy_is_all_but_idle_and_waiting(self) -> None:
        """In seconds, by processor, without the line for all of them."""
        ticks = os.sysconf("SC_CLK_TCK")
        assert service.busy_seconds(self.STAT) == {0: 740 / ticks, 11: 340 / ticks}

    @pytest.mark.parametrize(
        ("others", "calmer"),
        [
            ({0: 0.9, 1: 0.1, 2: 0.8, 3: 0.5}, [1, 3]),
            ({0: 0.2, 1: 0.0}, []),
            ({0: 0.25, 1: 0.0}, [1]),
            ({0: 1.0, 1: 1.0}, []),
            ({0: 1.0}, []),
        ],
    )
    def test_only_what_is_calmer_by_a_quarter_is_worth_moving_to(
        self, monkeypatch: pytest.MonkeyPatch, others: dict[int, float], calmer: list[int]
    ) -> None:
        """By the seconds that others have used, without what this process has used where it is pinned."""
        processor = service.Processor(Mock(cpu_affinity="off"))
        assert not processor.keep()
        processor.pinned, processor._allowed, offered = 0, list(others), []
        busy = [dict.fromkeys(others, 10.0), {number: 10.0 + seconds for number, seconds in others.items()}]
        busy[1][0] += 1.0  # by this process
        monkeypatch.setattr(service, "busy_seconds", lambda _stat: busy.pop(0))
        monkeypatch.setattr(time, "process_time", iter((5.0, 6.0)).__next__)
        monkeypatch.setattr(os, "sched_setaffinity", lambda *_: None)
        monkeypatch.setattr(random, "getrandbits", lambda _: 0)
        monkeypatch.setattr(random, "choice", lambda found: offered.extend(found) or found[0])
        assert not processor.keep(), "nothing to compare with"
        assert processor.keep() == bool(calmer)
        assert offered == calmer
