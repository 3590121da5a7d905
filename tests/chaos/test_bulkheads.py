"""Bulkheads: frozen queries cost documents nothing, nobody queues for long, one failing document holds up no other."""

import contextlib
import itertools
import os
import re
import signal
import socket
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

from couchbase.options import UpsertOptions
from couchbase.transcoder import RawBinaryTranscoder

from tests.chaos.clients import Load, allowance, ask_at_once, by_status, wait_until
from tests.chaos.conftest import GRACE_SECONDS, SHORT, TOKEN
from tests.emulator.process import EmulatorProcess
from tests.emulator.sdk import connect
from tests.load.clients import Conversation, request, threads
from tests.service import ROOT, ServiceProcess, settings_for

IDS = [f"/api/v1/id/{number}" for number in range(1, 101)]
LOOKUP = "/api/v1/nickname/nobody"
WORKERS = 8  # the default of THREADS
PATIENCE_SECONDS = 0.25
SLICE_SECONDS, SETTLE_SECONDS = 0.6, 0.2
SLICES_AT_MOST, ENOUGH_ANSWERS = 10, 100
ROUNDS = 9
TOO_MANY = "MAX_CONNECTIONS is more than the limit of open files (ulimit -n) lets in"


class Slice(NamedTuple):
    """What was measured for a moment: answers a second, and the time that 99 % of them took at most."""

    rate: float
    tail_seconds: float


def measure(load: Load) -> Slice:
    """Look at a load for a moment, when the one before is over; every answer must be right.

    The moment lasts until there are enough answers to speak of a tail: the machine may stand still for longer than it.
    """
    time.sleep(SETTLE_SECONDS)
    started = time.monotonic()
    for _ in range(SLICES_AT_MOST):
        time.sleep(SLICE_SECONDS)
        ended = time.monotonic()
        answers = load.since(started, ended)
        if len(answers) >= ENOUGH_ANSWERS:
            break
    assert by_status(answers).keys() == {200}
    tail = statistics.quantiles((record.seconds for record in answers), n=100)[98]
    return Slice(len(answers) / (ended - started), tail)


def test_documents_do_not_notice_frozen_queries() -> None:
    """Their throughput is within 20 % and their p99 within twice of what they have without.

    Slices without and with the freeze take turns. Each with is compared with the two without around it, so that what
    else the machine does meanwhile falls on both sides; what counts is the median of these comparisons.
    """
    slices: list[Slice] = []
    with (
        EmulatorProcess(profiles=200, pictures=5, token=TOKEN) as database,
        ServiceProcess(settings_for(database) | {"ACCESS_LOG": "false"}) as service,
        Load(service.port, itertools.cycle(IDS), lambda: TOKEN, clients=8) as load,
        Load(service.port, itertools.repeat(LOOKUP), lambda: TOKEN, rate=20) as lookups,
    ):
        measure(load)
        for _ in range(ROUNDS):
            slices.append(measure(load))
            database.fault("freeze", service="query")
            slices.append(measure(load))
            database.clear()
        slices.append(measure(load))
    assert {503, 504} & set(by_status(lookups.records)), "the freeze was not felt at all"
    rates, tails = [], []
    for number in range(1, len(slices), 2):
        before, frozen, after = slices[number - 1 : number + 2]
        rates.append(frozen.rate / ((before.rate + after.rate) / 2))
        tails.append(frozen.tail_seconds / ((before.tail_seconds + after.tail_seconds) / 2))
    assert statistics.median(rates) > 0.8, rates
    assert statistics.median(tails) < 2, tails


def test_no_query_waits_long_for_a_worker(database: EmulatorProcess, service: ServiceProcess) -> None:
    """With every worker stuck, the next queries get 503 after 250 ms, and not before; the stuck ones their 504."""
    database.fault("freeze", service="query")
    records = ask_at_once(service.port, [LOOKUP] * (2 * WORKERS), TOKEN)
    refused = [record for record in records if record.status == 503]
    assert by_status(records) == {503: WORKERS, 504: WORKERS}
    for record in refused:
        assert PATIENCE_SECONDS <= record.seconds < PATIENCE_SECONDS + GRACE_SECONDS + allowance(records.lag_seconds)
        assert record.headers["retry-after"] == "1"
        assert b"overloaded" in record.body


def test_a_short_queue_is_no_refusal(database: EmulatorProcess, service: ServiceProcess) -> None:
    """Three times as many queries as workers, 20 ms each: all are answered."""
    database.fault("latency", service="query", ms=20)
    assert by_status(ask_at_once(service.port, [LOOKUP] * (3 * WORKERS), TOKEN)) == {404: 3 * WORKERS}


def operations(service: ServiceProcess) -> dict[str, int]:
    """Return how often the service has asked for one document and for several, by its metrics."""
    metrics = service.get("/metrics", port=service.metrics_port).body.decode()
    return {
        name: sum(
            int(line.split()[-1]) for line in metrics.splitlines() if f'operation="{name}"' in line and "_total" in line
        )
        for name in ("get", "get_multi")
    }


def test_after_a_failure_documents_are_fetched_one_by_one(database: EmulatorProcess, service: ServiceProcess) -> None:
    """Then none waits for another's failure; after five seconds without one they are fetched in batches again."""

    def batches() -> int:
        before = operations(service)
        assert by_status(ask_at_once(service.port, IDS[:40], TOKEN)) == {200: 40}
        after = operations(service)
        many = after["get_multi"] - before["get_multi"]
        assert after["get"] - before["get"] == 40 or many
        return many

    database.fault("latency", service="kv", operation="get", ms=20)  # so that requests do wait for the workers
    wait_until(batches, "five seconds without a failure")
    failed = time.monotonic()
    database.fault("status", status=0x84, operation="get", count=1)
    assert service.get(IDS[0], TOKEN).status == 503
    while time.monotonic() < failed + 4:
        assert batches() == 0 or time.monotonic() > failed + 5
        time.sleep(0.5)
    wait_until(batches, "five seconds without a failure")


def test_threads_for_trouble_end_when_it_is_over(database: EmulatorProcess) -> None:
    """Each keeps memory for itself, so they are as many as are needed, and end when they are not."""
    with ServiceProcess(settings_for(database)) as service:
        pid = service.process.pid
        database.fault("latency", service="kv", operation="get", ms=200)
        assert by_status(ask_at_once(service.port, IDS[:40], TOKEN)) == {200: 40}
        calm = threads(pid)
        database.fault("status", status=0x84, operation="get", count=1)
        assert service.get(IDS[0], TOKEN).status == 503
        with ThreadPoolExecutor(1) as pool:  # as soon as they are idle, half of them end each second
            asked = pool.submit(ask_at_once, service.port, IDS[:40], TOKEN)
            wait_until(lambda: calm + 20 < threads(pid), "a thread for each document")
            assert by_status(asked.result()) == {200: 40}
        # one more: the background check has had a second thread for looking at vBuckets
        assert threads(pid) <= calm + 41
        wait_until(lambda: threads(pid) <= calm + 1, "the threads' end")
        assert service.get(IDS[0], TOKEN).status == 200


WITHOUT_THREADS = """
import _thread, os, signal, sys, threading
import micro_svc_demo

def refuse(*_, **__):
    raise RuntimeError("can't start new thread")

def from_now_on(*_):
    _thread.start_new_thread = refuse
    for name in ("_start_new_thread", "_start_joinable_thread"):  # the second from Python 3.13 on
        setattr(threading, name, refuse)
    print("none", file=sys.stderr, flush=True)

signal.signal(signal.SIGUSR1, from_now_on)
if sys.argv[1:]:
    from_now_on()
os._exit(micro_svc_demo.main([]))
"""


def test_no_thread_can_be_started_in_an_outage(database: EmulatorProcess) -> None:
    """Requests are refused where one is needed, the log says so once in five seconds, and all goes on."""
    service = ServiceProcess(settings_for(database) | SHORT)
    service.command = ("-c", WITHOUT_THREADS)
    with service:
        assert by_status(ask_at_once(service.port, IDS[:40], TOKEN)) == {200: 40}
        service.process.send_signal(signal.SIGUSR1)
        assert service.process.stderr is not None and service.process.stderr.readline() == "none\n"
        database.fault("freeze", service="kv")
        started = time.monotonic()
        answers = [answer for _ in range(4) for answer in ask_at_once(service.port, [*IDS[:40], LOOKUP], TOKEN)]
        assert by_status(answers).keys() == {503, 504}
        assert any(b"no thread can be started" in answer.body for answer in answers)
        database.clear()
        wait_until(lambda: service.get("/readyz").status == 200, "ready")
        wait_until(lambda: service.get(IDS[0], TOKEN).status == 200, "documents are back")
        seconds = time.monotonic() - started
        assert service.stop() == 0
    lines = [line for line in service.lines if line["message"] == "no thread can be started"]
    assert 1 <= len(lines) <= 1 + seconds / 5


def test_no_thread_can_be_started_at_the_start(database: EmulatorProcess) -> None:
    command = [sys.executable, "-c", WITHOUT_THREADS, "none"]
    ports = {"SERVICE_PORT": "0", "METRICS_PORT": "0"}
    environment = os.environ | settings_for(database) | ports
    ended = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert (ended.returncode, ended.stdout) == (1, "")
    assert re.fullmatch("none\nmicro_svc_demo: cannot start with [^\n]*can't start new thread\n", ended.stderr)


LIMITED = """
import os, resource, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (128, 200))
os.execv(sys.executable, [sys.executable, "micro_svc_demo.py"])
"""


def test_clients_leave_descriptors_for_probes(database: EmulatorProcess) -> None:
    """The soft limit is raised to the hard one, and MAX_CONNECTIONS lowered below that: who comes then gets 503."""
    service = ServiceProcess(settings_for(database))
    service.command = ("-c", LIMITED)
    head = request("/healthz", "")
    with service, contextlib.ExitStack() as held:
        assert service.wait_for(TOO_MANY)["clients"] == 136
        statuses = []
        for _ in range(400):
            client = held.enter_context(Conversation(service.port))
            client.send(head)
            with contextlib.suppress(ConnectionResetError):
                statuses.append(client.answer().status)
            if len(statuses) % 40 == 0:
                assert service.get("/readyz", port=service.metrics_port).status == 200
        assert statuses.count(200) == 136
        assert statuses.count(503) > 8
    assert [line for line in service.lines if line["level"] == "error"] == []


# ---- large documents ----

MEGABYTE = 1_000_000


def store_picture(database: EmulatorProcess, number: int, megabytes: int) -> None:
    """Store a picture record of so many bytes."""
    record = b'{"type": "png", "image": "%b"}' % (b"QUJD" * (megabytes * MEGABYTE // 4))
    options = UpsertOptions(transcoder=RawBinaryTranscoder(), timeout=timedelta(seconds=60))
    with connect(database) as cluster:
        images = cluster.bucket(database.bucket).scope("profiles").collection("user_images")
        images.upsert(f"user_images:{number}", record, options)


def receive(port: int, path: str, times: int) -> list[int]:
    """Ask again and again on one connection; return the statuses. Of bodies only the length is looked at."""
    statuses, buffer = [], bytearray(1 << 18)
    with socket.create_connection(("127.0.0.1", port), 60) as stream:
        for _ in range(times):
            stream.sendall(f"GET {path} HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer {TOKEN}\r\n\r\n".encode())
            head = b""
            while b"\r\n\r\n" not in head:
                head += stream.recv(4096) or b"\r\n\r\n"
            head, _, body = head.partition(b"\r\n\r\n")
            length = re.search(rb"Content-Length: (\d+)", head)
            left = int(length[1]) - len(body) if length else 0
            while left > 0:
                left -= stream.recv_into(buffer) or left
            statuses.append(int(head[9:12] or 0))
    return statuses


def test_large_pictures_take_a_bounded_memory() -> None:
    """64 clients that ask for pictures of 3 MB (records of 4): all are answered, within a pod's 256 MiB."""
    clients, times = 64, 3
    with (
        EmulatorProcess(profiles=5, pictures=0, token=TOKEN) as database,
        ServiceProcess(settings_for(database) | {"COUCHBASE_TIMEOUT_MS": "20000"}) as service,
        ThreadPoolExecutor(clients) as pool,
    ):
        for number in range(16):
            store_picture(database, number, 4)
        paths = [f"/api/v1/picture/raw/{number % 16}" for number in range(clients)]
        answers = list(pool.map(receive, itertools.repeat(service.port), paths, itertools.repeat(times)))
        status = Path(f"/proc/{service.process.pid}/status").read_text()
    assert answers == [[200] * times] * clients
    peak = re.search(r"VmHWM:\s*(\d+) kB", status)
    assert peak and int(peak[1]) <= 220_000


def test_a_very_large_picture_hurts_nobody() -> None:
    """One of 19 MB, the first on the SDK's connection: it and all that is asked for beside it is answered."""
    with (
        EmulatorProcess(profiles=100, pictures=0, token=TOKEN) as database,
        ServiceProcess(
            settings_for(database) | {"COUCHBASE_TIMEOUT_MS": "7000"}
        ) as service,  # a busy machine is slower
    ):
        store_picture(database, 1, 19)
        with Load(service.port, itertools.cycle(IDS), lambda: TOKEN, rate=50) as load:
            assert receive(service.port, "/api/v1/picture/record/1", 5) == [200] * 5
        assert by_status(load.records).keys() == {200}
        assert [line for line in service.lines if line["message"] == "breaker"] == []
