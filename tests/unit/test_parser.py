"""The HTTP/1.1 parser and framer: raw bytes in, heads or a problem out."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

import micro_svc_demo as service

GET = b"GET /x HTTP/1.1\r\nHost: a\r\n\r\n"


def refused(raw: bytes) -> int:
    with pytest.raises(service.ProblemError) as raised:
        service.parse_head(raw)
    return raised.value.status


class TestHead:
    def test_parts(self) -> None:
        raw = b"GET /p?q=1 HTTP/1.1\r\nHost: a:80\r\nX-One:\t one \t\r\nEmpty:\r\nUTF: \xc3\xa9\r\n\r\n"
        assert service.parse_head(raw) == (
            "GET",
            "/p?q=1",
            "HTTP/1.1",
            {"host": "a:80", "x-one": "one", "empty": "", "utf": "Ã©"},
        )

    def test_one_empty_line_may_stand_before(self) -> None:
        assert service.parse_head(b"\r\n" + GET).target == "/x"
        assert refused(b"\r\n\r\n" + GET) == 400

    def test_version_1_0_needs_no_host(self) -> None:
        assert service.parse_head(b"GET / HTTP/1.0\r\n\r\n").version == "HTTP/1.0"
        assert refused(b"GET / HTTP/1.1\r\n\r\n") == 400

    def test_repeated_fields_are_joined_where_lists_are_allowed(self) -> None:
        head = service.parse_head(b"GET / HTTP/1.1\r\nHost: a\r\nAccept: b\r\naccept: c\r\n\r\n")
        assert head.fields["accept"] == "b, c"

    @pytest.mark.parametrize("name", [b"Host", b"Authorization", b"X-Access-Token", b"Transfer-Encoding"])
    def test_repeated_single_fields_are_refused(self, name: bytes) -> None:
        raw = b"GET / HTTP/1.1\r\nHost: a\r\n%b: a\r\n%b: a\r\n\r\n" % (name, name)
        assert refused(raw) == 400

    def test_content_length_may_repeat_only_with_the_same_value(self) -> None:
        raw = b"GET / HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\nContent-Length: %b\r\n\r\n"
        assert service.parse_head(raw % b"1").fields["content-length"] == "1"
        assert refused(raw % b"2") == 400

    def test_absolute_form_wins_over_host(self) -> None:
        head = service.parse_head(b"GET http://b:81/p?q HTTP/1.1\r\nHost: a\r\n\r\n")
        assert (head.target, head.fields["host"]) == ("/p?q", "b:81")
        assert service.parse_head(b"GET HTTP://b?q HTTP/1.1\r\nHost: a\r\n\r\n").target == "/?q"

    @pytest.mark.parametrize(
        "line",
        [
            b"get / HTTP/1.1",
            b"GET  / HTTP/1.1",
            b"GET /  HTTP/1.1",
            b" GET / HTTP/1.1",
            b"GET\t/ HTTP/1.1",
            b"GET / HTTP/1.1 ",
            b"GET /",
            b"GET / HTTP/2.0",
            b"GET / HTTP/1.10",
            b"GET / HTTP/01.1",
            b"GET / http/1.1",
            b"GET / HTTP/1,1",
            b"GET /\xc3\xa9 HTTP/1.1",
            b"GET /a#b HTTP/1.1",
            b"GET /a\x00 HTTP/1.1",
            b"GET x HTTP/1.1",
            b"GET * HTTP/1.1",
            b"GET a:80 HTTP/1.1",
            b"GET http:///x HTTP/1.1",
            b"GET ftp://a/x HTTP/1.1",
            b"G\x7fT / HTTP/1.1",
            b"PROXY TCP4 1.1.1.1 2.2.2.2 1 2",
        ],
    )
    def test_malformed_request_line(self, line: bytes) -> None:
        assert refused(line + b"\r\nHost: a\r\n\r\n") == 400

    @pytest.mark.parametrize(
        "field",
        [
            b" X: folded-first",
            b"X : space before the colon",
            b": no name",
            b"no colon",
            b"X: a\r\n folded",
            b"X: nul\x00",
            b"X: bell\x07",
            b"X: delete\x7f",
            b"X: bare\rcarriage return",
            b"X: bare\nline feed",
            b"X\xe9: name not ASCII",
            b"X(: name not a token",
            b"Host: a/b",
            b"Host: a b",
            b"Host: a@b",
            b"Host: a:b",
        ],
    )
    def test_malformed_field(self, field: bytes) -> None:
        assert refused(b"GET / HTTP/1.1\r\n" + field + b"\r\nHost: a\r\n\r\n") == 400

    def test_bounds(self) -> None:
        """Up to the bound is taken, one more is refused."""
        raw = b"GET /%b HTTP/1.1\r\nHost: a\r\n\r\n"
        assert service.parse_head(raw % (b"x" * (service.MAX_TARGET_BYTES - 1)))
        assert refused(raw % (b"x" * service.MAX_TARGET_BYTES)) == 414
        raw = b"GET / HTTP/1.1\r\nHost: a\r\n%b\r\n"
        assert len(service.parse_head(raw % (b"X: y\r\n" * 99)).fields) == 2
        assert refused(raw % (b"X: y\r\n" * 100)) == 431
        padding = service.MAX_HEAD_BYTES - len(raw % b"X: \r\n")  # `%b` itself counts for two of the template
        assert service.parse_head(raw % b"X: %b\r\n" % (b"y" * padding))
        assert refused(raw % b"X: %b\r\n" % (b"y" * (padding + 3))) == 431

    @given(st.binary(max_size=200) | st.binary(max_size=60).map(lambda middle: b"GET " + middle + b"\r\n\r\n"))
    def test_any_bytes_are_a_head_or_a_problem(self, raw: bytes) -> None:
        try:
            head = service.parse_head(raw)
        except service.ProblemError as problem:
            assert problem.status in {400, 414, 431}
        else:
            assert head.target.startswith("/")


class TestBodyLength:
    def length(self, fields: bytes, version: bytes = b"1.1") -> int | None:
        return service.body_length(service.parse_head(b"GET / HTTP/%b\r\nHost: a\r\n%b\r\n" % (version, fields)))

    def test_lengths(self) -> None:
        assert self.length(b"") == 0
        assert self.length(b"Content-Length: 65536\r\n") == 65536
        assert self.length(b"Transfer-Encoding: chunked\r\n") is None

    @pytest.mark.parametrize(
        "fields",
        [
            b"Content-Length: +1\r\n",
            b"Content-Length: -1\r\n",
            b"Content-Length: 0x1\r\n",
            b"Content-Length: 1_0\r\n",
            b"Content-Length: 1, 1\r\n",
            b"Content-Length:\r\n",
            b"Content-Length: 1111111111111111111\r\n",
            b"Transfer-Encoding: chunked\r\nContent-Length: 1\r\n",
            b"Transfer-Encoding: gzip, chunked\r\n",
            b"Transfer-Encoding: identity\r\n",
            b"Transfer-Encoding:\r\n",
        ],
    )
    def test_ambiguous_framing_is_refused(self, fields: bytes) -> None:
        with pytest.raises(service.ProblemError) as raised:
            self.length(fields)
        assert raised.value.status == 400

    def test_transfer_encoding_in_http_1_0_is_refused(self) -> None:
        with pytest.raises(service.ProblemError):
            self.length(b"Transfer-Encoding: chunked\r\n", b"1.0")

    def test_more_than_is_worth_skipping_is_413(self) -> None:
        with pytest.raises(service.ProblemError) as raised:
            self.length(b"Content-Length: 65537\r\n")
        assert raised.value.status == 413


POST = b"POST /x HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n\r\n"
CHUNKED = b"POST /x HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n"
STREAMS = {
    "one": (GET, [GET]),
    "pipelined": (GET * 3, [GET] * 3),
    "body": (POST + b"12345" + GET, [POST, GET]),
    "chunks": (CHUNKED + b"3\r\nabc\r\nA;x=y\r\n0123456789\r\n0\r\n\r\n" + GET, [CHUNKED, GET]),
    "good, then bad": (GET + b"get / HTTP/1.1\r\n\r\n" + GET, [GET, 400]),
    "bare line feeds": (GET + b"GET / HTTP/1.1\nHost: a\n\n", [GET, 400]),
    "0.9": (b"GET /\r\n", [400]),
    "bad chunk": (CHUNKED + b"x\r\n" + GET, [400]),
    "chunk too long": (CHUNKED + b"1\r\nab\r\n" + GET, [400]),
    "trailers": (CHUNKED + b"1\r\na\r\n0\r\nX: y\r\nZ:\r\n\r\n" + GET, [CHUNKED, GET]),
    "forbidden trailer": (CHUNKED + b"0\r\nHost: y\r\n\r\n", [400]),
    "malformed trailer": (CHUNKED + b"0\r\nX : y\r\n\r\n", [400]),
    "chunks too many": (CHUNKED + b"FFFF\r\n" + b"x" * 65535 + b"\r\n2\r\n", [413]),
    "body too large": (b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 65537\r\n\r\n", [413]),
}


def outcome(found: list[service.Head | service.ProblemError]) -> list[service.Head | int]:
    return [item.status if isinstance(item, service.ProblemError) else item for item in found]


def expected_of(name: str) -> tuple[bytes, list[service.Head | int]]:
    stream, expected = STREAMS[name]
    return stream, [item if isinstance(item, int) else service.parse_head(item) for item in expected]


class TestFramer:
    @pytest.mark.parametrize("name", STREAMS)
    def test_whole(self, name: str) -> None:
        stream, expected = expected_of(name)
        assert outcome(service.Framer().feed(stream)) == expected

    @pytest.mark.parametrize("name", [name for name in STREAMS if name != "chunks too many"])
    def test_cut_at_every_position_and_into_single_bytes(self, name: str) -> None:
        stream, expected = expected_of(name)
        for position in range(1, len(stream)):
            framer = service.Framer()
            assert outcome(framer.feed(stream[:position]) + framer.feed(stream[position:])) == expected, position
        framer = service.Framer()
        assert outcome([item for byte in stream for item in framer.feed(bytes([byte]))]) == expected

    def test_partial(self) -> None:
        framer = service.Framer()
        assert not framer.partial
        framer.feed(GET[:5])
        assert framer.partial
        framer.feed(GET[5:])
        assert not framer.partial
        framer.feed(POST + b"123")
        assert framer.partial

    def test_endless_heads_are_refused(self) -> None:
        framer = service.Framer()
        assert outcome(framer.feed(b"GET /" + b"x" * 9000)) == [414]
        assert framer.feed(GET) == []
        framer = service.Framer()
        assert framer.feed(b"GET / HTTP/1.1\r\nX: ") == []
        assert outcome(framer.feed(b"y" * service.MAX_HEAD_BYTES)) == [431]
