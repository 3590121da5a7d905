"""The small pure parts: paging, percent-decoding, tokens, back-off, problems, tags, clock, log."""

import concurrent.futures
import datetime
import email.utils
import itertools
import json
import os
import random
import tempfile
import threading
import time
from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st

import micro_svc_demo as service


class TestPage:
    def test_defaults(self) -> None:
        assert service.parse_page("") == (100, 0)

    def test_given_and_unknown_parameters(self) -> None:
        """Unknown parameters are ignored, also malformed ones."""
        assert service.parse_page("limit=7&x=%zz&offset=14&y") == (7, 14)

    @pytest.mark.parametrize("limit", ["1", "1000"])
    def test_bounds_are_allowed(self, limit: str) -> None:
        assert service.parse_page(f"limit={limit}").limit == int(limit)

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

    @given(st.text(st.characters(min_codepoint=32, exclude_characters="\x7f", exclude_categories=["Cs"])))
    def test_quoting_and_decoding_round_trip(self, text: str) -> None:
        assert service.decode_segment(quote(text, safe="")) == text


class TestTokens:
    def test_nothing_is_accepted_before_a_token_is_known(self) -> None:
        tokens = service.Tokens(30)
        assert not tokens.known
        assert not tokens.accepts("", 0)

    def test_only_the_token_is_accepted(self) -> None:
        tokens = service.Tokens(30)
        assert tokens.adopt("secret", now=0)
        assert tokens.known
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
        assert service._names_tag(given_tags, '"1f"')

    @pytest.mark.parametrize("given_tags", ["", '"1F"', "1f", '"1f', '"11f"'])
    def test_does_not_match(self, given_tags: str) -> None:
        assert not service._names_tag(given_tags, '"1f"')


class TestClock:
    def test_texts_are_now(self) -> None:
        clock = service.SecondClock()
        parsed = email.utils.parsedate_to_datetime(clock.http_date())
        assert abs(parsed.timestamp() - time.time()) < 2
        stamp = datetime.datetime.fromisoformat(clock.rfc3339())
        assert stamp.utcoffset() == datetime.timedelta(0)
        assert abs(stamp.timestamp() - time.time()) < 1


class TestLog:
    def read(self, level: str, *events: tuple[str, str, str]) -> list[str]:
        with tempfile.TemporaryFile() as file:
            log = service.Log(level, descriptor=file.fileno())
            for least, message, text in events:
                log.event(least, message, text=text)
            file.seek(0)
            return file.read().decode().splitlines(keepends=True)

    def test_a_value_cannot_forge_a_line(self) -> None:
        lines = self.read("info", ("info", "m", 'a\r\n{"level": "error"}\x1b[31m'))
        assert len(lines) == 1
        assert "\x1b" not in lines[0]
        assert json.loads(lines[0])["text"] == 'a\r\n{"level": "error"}\x1b[31m'

    def test_level_is_a_threshold(self) -> None:
        lines = self.read("warning", ("info", "quiet", ""), ("warning", "loud", ""), ("error", "loudest", ""))
        assert [json.loads(line)["message"] for line in lines] == ["loud", "loudest"]

    def test_a_closed_pipe_stops_nobody(self) -> None:
        reading, writing = os.pipe()
        os.close(reading)
        service.Log(descriptor=writing).event("info", "unheard")
        os.close(writing)

    def test_many_threads_log_at_once(self) -> None:
        """Each line is whole, none is lost, no thread fails."""
        reading, writing = os.pipe()
        log = service.Log(descriptor=writing)
        received: list[str] = []

        def read() -> None:
            with os.fdopen(reading, encoding="utf-8") as file:
                received.extend(itertools.islice(file, 2000))

        reader = threading.Thread(target=read)
        reader.start()
        with concurrent.futures.ThreadPoolExecutor(16) as pool:
            list(pool.map(lambda number: log.event("info", "m", number=number), range(2000)))
        reader.join(30)
        os.close(writing)
        assert sorted(json.loads(line)["number"] for line in received) == list(range(2000))
        assert log.dropped == 0

    def test_a_full_pipe_loses_whole_lines_only(self) -> None:
        """What is read later are whole lines, in order; each that is missing is counted."""
        reading, writing = os.pipe()
        log = service.Log(descriptor=writing)
        log.stall_ms = 0
        lines = [f"{number:05d}{'x' * 94}\n" for number in range(2000)]  # 200 kB; a pipe holds 64 KiB
        for start in range(0, 1000, 7):
            log.lines(lines[start : start + 7])
        first = os.read(reading, 30_000)
        log.lines(lines[1500:1600])
        received = (first + os.read(reading, 1 << 20)).decode().splitlines(keepends=True)
        assert received == sorted(set(received) & set(lines))
        assert len(received) + log.dropped == 1001 + 100
        assert received[-1] > lines[1500]
        os.close(reading)
        os.close(writing)

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
        self, others: dict[int, float], calmer: list[int]
    ) -> None:
        assert service.calmer_processors(0, others) == calmer
