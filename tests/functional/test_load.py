"""Many clients at once: each gets its own document back, in order, also when requests are pipelined."""

import asyncio
import json
import random
import socket

import aiohttp
import pytest

from tests import sample_data
from tests.functional.conftest import COUNT
from tests.service import ServiceProcess

CLIENTS = 32
REQUESTS = 20_000
PROFILES = {str(profile["record_id"]): [profile] for profile in sample_data.profiles(COUNT, sample_data.DEFAULT_SEED)}


async def client(session: aiohttp.ClientSession, url: str, ids: list[str]) -> int:
    """Ask for these profiles one after the other; return how many were right."""
    right = 0
    for record_id in ids:
        async with session.get(f"{url}/api/v1/id/{record_id}", headers={"X-Request-ID": record_id}) as answer:
            body = await answer.read()
            expected = PROFILES.get(record_id)
            assert answer.headers["X-Request-ID"] == record_id
            assert answer.status == (200 if expected else 404)
            assert expected is None or json.loads(body) == expected
            right += 1
    return right


def test_each_client_gets_its_own_documents(service: ServiceProcess, database) -> None:
    """32 clients, 20,000 requests over random ids, some of them missing: every body is compared."""
    draw = random.Random(7)
    shares = [[str(draw.randint(1, COUNT + 20)) for _ in range(REQUESTS // CLIENTS)] for _ in range(CLIENTS)]

    async def run() -> int:
        connector = aiohttp.TCPConnector(limit=CLIENTS)
        headers = {"Authorization": f"Bearer {database.token}"}
        timeout = aiohttp.ClientTimeout(total=100)
        async with aiohttp.ClientSession(connector=connector, headers=headers, timeout=timeout) as session:
            url = f"http://127.0.0.1:{service.port}"
            return sum(await asyncio.gather(*(client(session, url, share) for share in shares)))

    assert asyncio.run(run()) == REQUESTS


@pytest.mark.parametrize("count", [2, 16, 200])
def test_pipelined_requests_are_answered_in_order(service: ServiceProcess, database, count: int) -> None:
    """More of them than may wait, too: reading pauses and goes on."""
    ids = [str(1 + number % 40) for number in range(count)]
    paths = [f"/api/v1/id/{record_id}" if number % 5 else "/healthz" for number, record_id in enumerate(ids)]
    field = f"Authorization: Bearer {database.token}"
    requests = [
        f"GET {path} HTTP/1.1\r\nHost: a\r\nX-Request-ID: {number}\r\n{field}\r\n\r\n"
        for number, path in enumerate(paths)
    ]
    last = "GET /healthz HTTP/1.1\r\nHost: a\r\nX-Request-ID: last\r\nConnection: close\r\n\r\n"
    received = b""
    with socket.create_connection(("127.0.0.1", service.port), timeout=30) as stream:
        stream.sendall(("".join(requests) + last).encode())
        while data := stream.recv(65536):
            received += data
    answers = received.split(b"HTTP/1.1 200 OK\r\n")[1:]
    assert len(answers) == count + 1
    for number, (record_id, path, answer) in enumerate(zip(ids, paths, answers, strict=False)):
        head, _, body = answer.partition(b"\r\n\r\n")
        assert f"X-Request-ID: {number}\r\n".encode() in head + b"\r\n"
        assert json.loads(body) == ({"status": "alive"} if path == "/healthz" else PROFILES[record_id])
