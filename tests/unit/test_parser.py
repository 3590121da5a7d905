"""The HTTP/1.1 parser and framer: raw bytes in, heads or a problem out."""

import ipaddress

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

    def test_versions(self) -> None:
        """Another major version is refused as such, a later minor one read as the latest that is known."""
        for major in (0, 2, 3, 9):
            assert refused(b"GET / HTTP/%d.1\r\n\r\n" % major) == 505
        for minor in range(2, 10):
            assert service.parse_head(b"GET / HTTP/1.%d\r\nHost: a\r\n\r\n" % minor).version == "HTTP/1.1"

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

    @given(st.ip_addresses(v=6), st.none() | st.integers(0, 65535))
    def test_every_ipv6_address_is_a_host(self, address: ipaddress.IPv6Address, port: int | None) -> None:
        suffix = "" if port is None else f":{port}"
        for text in (str(address), address.exploded, str(address).upper()):
            assert service.is_authority(f"[{text}]{suffix}")
            assert not service.is_authority(f"[{text}]{suffix}0x")
            assert not service.is_authority(f"[{text}:0]{suffix}") or "::" in text

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
            assert problem.status in {400, 414, 431, 505}
        else:
            assert head.target.startswith("/")


class TestBody:
    def announced(self, fields: bytes, version: bytes = b"1.1") -> bool:
        return service.announces_body(service.parse_head(b"GET / HTTP/%b\r\nHost: a\r\n%b\r\n" % (version, fields)))

    @pytest.mark.parametrize("fields", [b"", b"Content-Length: 0\r\n", b"Content-Length: 00\r\n"])
    def test_no_body(self, fields: bytes) -> None:
        assert not self.announced(fields)

    @pytest.mark.parametrize(
        "fields", [b"Content-Length: 1\r\n", b"Content-Length: %b\r\n" % (b"9" * 18), b"Transfer-Encoding: Chunked\r\n"]
    )
    def test_a_body(self, fields: bytes) -> None:
        assert self.announced(fields)

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
            b"Transfer-Encoding: chunked\r\nContent-Length: 0\r\n",
            b"Transfer-Encoding: gzip\r\nContent-Length: 1\r\n",
            b"Transfer-Encoding: chunked, gzip\r\n",
            b"Transfer-Encoding: chunked, chunked\r\n",
            b"Transfer-Encoding: gzip,\r\n",
            b"Transfer-Encoding: , gzip\r\n",
            b"Transfer-Encoding: gz ip\r\n",
            b"Transfer-Encoding:\r\n",
        ],
    )
    def test_ambiguous_framing_is_refused(self, fields: bytes) -> None:
        with pytest.raises(service.ProblemError) as raised:
            self.announced(fields)
        assert raised.value.status == 400

    @pytest.mark.parametrize("codings", [b"gzip", b"gzip, chunked", b"gzip ,\tbr,Chunked", b"identity", b"chunkedx"])
    def test_unknown_transfer_codings_are_501(self, codings: bytes) -> None:
        with pytest.raises(service.ProblemError) as raised:
            self.announced(b"Transfer-Encoding: %b\r\n" % codings)
        assert raised.value.status == 501

    def test_transfer_encoding_in_http_1_0_is_refused(self) -> None:
        with pytest.raises(service.ProblemError) as raised:
            self.announced(b"Transfer-Encoding: chunked\r\n", b"1.0")
        assert raised.value.status == 400


POST = b"POST /x HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n\r\n"
CHUNKED = b"POST /x HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n"
EMPTY = b"POST /x HTTP/1.1\r\nHost: a\r\nContent-Length: 0\r\n\r\n"
STREAMS = {
    "one": (GET, [GET]),
    "pipelined": (GET * 3, [GET] * 3),
    "length 0": (EMPTY + GET, [EMPTY, GET]),
    "body": (GET + POST + b"12345" + GET, [GET, POST]),
    "chunks": (GET + CHUNKED + b"3\r\nabc\r\n0\r\n\r\n" + GET, [GET, CHUNKED]),
    "malformed length": (GET + POST.replace(b"5", b"x") + b"12345" + GET, [GET, 400]),
    "good, then bad": (GET + b"get / HTTP/1.1\r\n\r\n" + GET, [GET, 400]),
    "bare line feeds": (GET + b"GET / HTTP/1.1\nHost: a\n\n", [GET, 400]),
    "0.9": (b"GET /\r\n\r\n", [400]),
    "another protocol": (b"\x16\x03\x01", [400]),
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

    @pytest.mark.parametrize("name", STREAMS)
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

    def test_what_follows_a_body_is_dropped(self) -> None:
        framer = service.Framer()
        assert len(framer.feed(POST[:-1])) == 0 and framer.partial and len(framer.inbox) == len(POST) - 1
        assert len(framer.feed(POST[-1:] + GET)) == 1
        assert framer.feed(GET) == []
        assert not framer.partial and len(framer.inbox) == 0

    def test_endless_heads_are_refused(self) -> None:
        for line, status in ((b"GET /", 414), (b"\r\nGET /", 414), (b"GET / HTTP/1.1\r\nX: ", 431)):
            framer = service.Framer()
            assert framer.feed(line + b"x" * (service.MAX_HEAD_BYTES - len(line))) == []
            assert outcome(framer.feed(b"x")) == [status]
            assert framer.feed(GET) == [] and len(framer.inbox) == 0
