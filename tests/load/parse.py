"""How long parsing a request takes: ``python -m tests.load.parse`` prints µs a request, as a Markdown table.

The service's parser, the standard library's and h11 read the same heads, which are made up from a seed after those that
real clients send; each round has new ones, so that nothing is gained by remembering a head. What is taken is the
processor time of this process; the parsers alternate, and of each the best round counts, which is the one that other
processes disturbed least.
"""

import argparse
import random
import sys
import time
from collections.abc import Callable, Sequence
from http.server import BaseHTTPRequestHandler
from io import BytesIO

import h11

import micro_svc_demo as service
from tests.sample_data import OneLineParser, whole_number

KINDS = ("curl", "browser", "proxied", "wrk")
LEAST_RATIO = 3.5  # how many times as fast as the standard library's parser the service's has to be
HEADS = 100  # of each kind


def head(kind: str, source: random.Random) -> bytes:
    """Return one request head as this kind of client sends it; `source` decides the details."""
    target = source.choice(
        [
            f"/api/v1/id/{source.randint(1, 10**6)}",
            f"/api/v1/nickname/{source.choice('abcdef')}{source.randint(1, 9999)}?limit={source.randint(1, 1000)}",
            f"/api/v1/picture/raw/{source.randint(1, 10**6)}",
        ]
    )
    token = f"Authorization: Bearer {source.getrandbits(160):040x}"
    host = f"Host: profiles-{source.randint(1, 9)}.example.org"
    address = ".".join(str(source.randint(1, 254)) for _ in range(4))
    fields = {
        "curl": [host, "User-Agent: curl/8.5.0", "Accept: */*", token],
        "wrk": [host, token],
        "proxied": [
            host,
            f"X-Request-ID: {source.getrandbits(128):032x}",
            f"X-Real-IP: {address}",
            f"X-Forwarded-For: {address}, 10.0.{source.randint(0, 254)}.7",
            "X-Forwarded-Host: profiles.example.org",
            "X-Forwarded-Port: 443",
            "X-Forwarded-Proto: https",
            "X-Forwarded-Scheme: https",
            f"traceparent: 00-{source.getrandbits(128):032x}-{source.getrandbits(64):016x}-01",
            f"User-Agent: app/{source.randint(1, 9)}.{source.randint(0, 40)}",
            "Accept: application/json",
            token,
        ],
        "browser": [
            host,
            "Connection: keep-alive",
            'sec-ch-ua: "Chromium";v="130", "Not?A_Brand";v="99"',
            "sec-ch-ua-mobile: ?0",
            'sec-ch-ua-platform: "Linux"',
            "Upgrade-Insecure-Requests: 1",
            f"User-Agent: Mozilla/5.0 (X11; Linux x86_64) AppleWebKit/537.36 Chrome/{source.randint(90, 130)}.0.0.0",
            "Accept: text/html,application/xhtml+xml,application/xml;q=0.9,image/avif,image/webp,*/*;q=0.8",
            "Sec-Fetch-Site: none",
            "Sec-Fetch-Mode: navigate",
            "Sec-Fetch-Dest: document",
            "Accept-Encoding: gzip, deflate, br, zstd",
            "Accept-Language: en-GB,en;q=0.9",
            f"Cookie: session={source.getrandbits(128):032x}; theme=dark",
            token,
        ],
    }[kind]
    return "\r\n".join([f"GET {target} HTTP/1.1", *fields, "", ""]).encode()


class _StandardHandler(BaseHTTPRequestHandler):
    """The standard library's handler, as far as its parser needs it, reading from memory."""

    def __init__(self, raw: bytes) -> None:
        self.rfile = BytesIO(raw)
        self.wfile = BytesIO()
        self.raw_requestline = self.rfile.readline(65537)


def parse_standard(raw: bytes) -> int:
    """Parse with the standard library; return the number of fields."""
    handler = _StandardHandler(raw)
    handler.parse_request()
    return len(handler.headers)


def parse_h11(raw: bytes) -> int:
    """Parse with h11; return the number of fields."""
    parser = h11.Connection(h11.SERVER)
    parser.receive_data(raw)
    event = parser.next_event()
    assert isinstance(event, h11.Request)
    return len(list(event.headers))


FRAMER = service.Framer()  # one for all heads, as a connection has that is kept


def parse_service(raw: bytes) -> int:
    """Parse with the service, framing included; return the number of fields."""
    [found] = FRAMER.feed(raw)
    assert isinstance(found, service.Head)
    return len(found.fields)


PARSERS: dict[str, Callable[[bytes], int]] = {
    "service": parse_service,
    "standard library": parse_standard,
    "h11": parse_h11,
}


def measure(source: random.Random, rounds: int) -> dict[str, dict[str, float]]:
    """Return µs a request by kind and parser: the best of `rounds` rounds."""
    best: dict[str, dict[str, float]] = {kind: dict.fromkeys(PARSERS, float("inf")) for kind in KINDS}
    for number in range(rounds):
        print(f"\rround {number + 1} of {rounds}", end="", file=sys.stderr, flush=True)
        for kind in KINDS:
            raws = [head(kind, source) for _ in range(HEADS)]
            for name, parse in PARSERS.items():
                started = time.process_time()
                for raw in raws:
                    parse(raw)
                seconds = time.process_time() - started
                best[kind][name] = min(best[kind][name], seconds / len(raws) * 1e6)
    print(file=sys.stderr)
    return best


def table(heads: dict[str, list[bytes]], best: dict[str, dict[str, float]]) -> tuple[str, float]:
    """Return the figures as Markdown, and how many times as fast as the standard library the service is over all."""
    lines = [
        "| heads | bytes | fields | service, µs | standard library, µs | h11, µs | × standard library | × h11 |",
        "|---|---|---|---|---|---|---|---|",
    ]
    rows = dict(best)
    rows["all"] = {name: sum(row[name] for row in best.values()) / len(best) for name in PARSERS}
    for kind, row in rows.items():
        raws = heads.get(kind) or [raw for some in heads.values() for raw in some]
        size = sum(map(len, raws)) / len(raws)
        count = sum(raw.count(b"\r\n") - 2 for raw in raws) / len(raws)
        ours, standard, other = (row[name] for name in PARSERS)
        lines.append(
            f"| {kind} | {size:.0f} | {count:.0f} | {ours:.1f} | {standard:.1f} | {other:.1f} "
            f"| {standard / ours:.1f} | {other / ours:.1f} |"
        )
    return "\n".join(lines), rows["all"]["standard library"] / rows["all"]["service"]


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print; return 0, 1 if the service's parser is not fast enough, 2 for a bad command line."""
    parser = OneLineParser(prog="python -m tests.load.parse", description=(__doc__ or "").partition("\n")[0])
    parser.formatter_class = argparse.ArgumentDefaultsHelpFormatter
    parser.add_argument("--rounds", type=whole_number(1, 1000), default=60, help="rounds, of which the best counts")
    parser.add_argument("--seed", type=whole_number(0, 2**31), default=1, help="what the heads are made from")
    options = parser.parse_args(argv)
    source = random.Random(options.seed)
    heads = {kind: [head(kind, source) for _ in range(HEADS)] for kind in KINDS}
    for raw in heads["browser"] + heads["curl"]:
        assert len({parse(raw) for parse in PARSERS.values()}) == 1, "the parsers disagree"
    text, ratio = table(heads, measure(source, options.rounds))
    print(text)
    if ratio < LEAST_RATIO:
        print(f"too slow: {ratio:.1f} times as fast as the standard library, not {LEAST_RATIO:.0f}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
