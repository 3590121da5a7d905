"""The log: one JSON line an event and an answered request, nothing personal, nothing secret, never forged."""

import contextlib
import datetime
import json
import os
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest

import micro_svc_demo
from tests.chaos.clients import wait_until
from tests.emulator.process import EmulatorProcess
from tests.load.clients import Conversation, request
from tests.service import ROOT, ServiceProcess, administrator_settings, free_port, settings_for

ABORT = struct.pack("ii", 1, 0)  # SO_LINGER: closing sends a reset
TRACEPARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
MEMBERS = {"time", "level", "message", "request_id", "method", "route", "status", "bytes", "duration_ms"}


def test_members_of_a_request_line(database) -> None:
    with ServiceProcess(settings_for(database)) as service:
        service.get("/api/v1/id/1", database.token, X_Request_ID="abc", Traceparent=TRACEPARENT)
        service.get("/api/v1/nickname/nobody", database.token)
        service.get("/api/v1/id/1", "wrong")
        lines = [service.wait_for("request") for _ in range(3)]
    found, refused, missing = sorted(lines, key=lambda line: line["status"])
    assert set(found) == MEMBERS | {"client", "couchbase_ms", "trace_id"}
    assert found["trace_id"] == TRACEPARENT.split("-")[1]
    assert datetime.datetime.fromisoformat(found["time"]).utcoffset() == datetime.timedelta(0)
    assert 0 < found["couchbase_ms"] <= found["duration_ms"]
    assert (missing["route"], missing["status"]) == ("/api/v1/nickname/{nickname}", 404)
    assert missing["couchbase_ms"] > 0
    assert refused["status"] == 401
    assert "couchbase_ms" not in refused and "trace_id" not in refused


def test_marked_secrets_are_in_no_output(clean_faults: EmulatorProcess) -> None:
    """Through every route and failure: token, password, documents, names, paths and header fields stay out."""
    own = clean_faults
    settings = settings_for(own) | {"LOG_LEVEL": "debug", "COUCHBASE_TIMEOUT_MS": "200"}
    settings |= {"COUCHBASE_QUERY_TIMEOUT_MS": "200", "TOKEN_REFRESH_SECONDS": "1"}
    with ServiceProcess(settings) as service:

        def ask_everything() -> None:
            for token in (own.token, "MARKED-wrong-token"):
                for path in (
                    "/api/v1/id/MARKED-id",
                    "/api/v1/id/1",
                    "/api/v1/nickname/MARKED-nickname",
                    "/api/v1/username/MARKED-username?limit=MARKED",
                    "/api/v1/picture/record/MARKED-picture",
                    "/api/v1/picture/raw/1",
                    "/api/v1/id/MARKED%zz",
                    "/MARKED-path",
                    "/readyz?MARKED-query",
                ):
                    service.get(path, token, X_Access_Token="MARKED-header", Cookie="MARKED-cookie")
                    service.request("POST", path, token)

        ask_everything()
        for fault in (
            {"name": "freeze", "service": "kv"},
            {"name": "freeze", "service": "query"},
            {"name": "temporary_failure", "count": 50},
            {"name": "query_error", "code": 4000, "msg": "No index available", "count": 5},
            {"name": "query_error", "code": 5000, "msg": "panic", "count": 5},
        ):
            own.fault(**fault)
            ask_everything()
            own.clear()
        own.set_token("MARKED-new-token")
        service.wait_for("token adopted")
    own.set_token("functional-tests")
    printed = "".join(service.raw_lines)
    for secret in ("MARKED", own.token, own.password, "date_of_birth"):  # the last is in every profile
        assert secret not in printed
    assert all(len(line.encode()) <= micro_svc_demo.MAX_LINE_BYTES for line in service.raw_lines)
    assert {line["status"] for line in service.lines if line["message"] == "request"} >= {200, 400, 401, 404, 405, 504}


def test_probes_and_scrapes_are_logged_at_debug_only(database) -> None:
    for level, expected in (("info", set()), ("debug", {"/healthz", "/readyz", "/metrics"})):
        with ServiceProcess(settings_for(database) | {"LOG_LEVEL": level}) as service:
            for path in ("/healthz", "/readyz", "/metrics"):
                assert service.get(path, port=service.metrics_port).status == 200
        assert {line["route"] for line in service.lines if line["message"] == "request"} == expected


@pytest.mark.parametrize(
    ("trusted", "forwarded", "client"),
    [
        ("", "192.0.2.7", "127.0.0.1"),
        ("127.0.0.0/8", "192.0.2.7", "192.0.2.7"),
        ("127.0.0.1", "10.9.9.9, 2001:db8::1", "2001:db8::1"),
        ("127.0.0.1", '10.9.9.9, "} forged', "127.0.0.1"),
        ("127.0.0.1", 'fe80::1%"', "127.0.0.1"),
        ("10.0.0.0/8", "192.0.2.7", "127.0.0.1"),
        ("127.0.0.1,10.0.0.0/8", "198.51.100.1, 192.0.2.7:4711, 10.1.2.3", "192.0.2.7"),
    ],
)
def test_client_is_the_first_from_the_right_that_is_no_trusted_proxy(
    database, trusted: str, forwarded: str, client: str
) -> None:
    with ServiceProcess(settings_for(database) | {"TRUSTED_PROXIES": trusted}) as service:
        service.get("/api/v1/id/1", database.token, X_Forwarded_For=forwarded)
        assert service.wait_for("request")["client"] == client


@pytest.fixture(scope="module")
def large(database) -> Iterator[str]:
    """The path of a document that no socket's buffers take at once."""
    settings = micro_svc_demo.read_settings([], administrator_settings(database))
    cluster = micro_svc_demo.open_cluster(settings)
    users = cluster.bucket(settings.couchbase_bucket).scope(settings.couchbase_scope).collection("user_data")
    users.upsert("user_data:large", json.dumps({"x": "y" * 12_000_000}))
    yield "/api/v1/id/large"
    users.remove("user_data:large")
    cluster.close()


@pytest.mark.parametrize("end", ["reset", "stop"])
def test_an_answer_that_is_cut_off_is_logged_as_that(database, large: str, end: str) -> None:
    """With the bytes that the kernel took, when the client leaves or the service stops; one behind it not at all.

    Of a client that leaves they are a second old at most.
    """
    with (
        ServiceProcess(settings_for(database) | {"SHUTDOWN_SECONDS": "0", "COUCHBASE_TIMEOUT_MS": "10000"}) as service,
        Conversation(service.port, 4096) as client,
    ):
        client.send(request(large, database.token) * 2)
        received = 0
        while received < 3_000_000:
            received += len(client.socket.recv(65_536))
        assert not [line for line in service.lines if line["message"] == "request"], "it is not sent yet"
        if end == "stop":
            assert service.stop() == 0
        else:
            client.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, ABORT)
            client.socket.close()
            service.wait_for("request")
        [line] = [line for line in service.lines if line["message"] == "request"]
    assert (line["status"], line["cut_off"]) == (200, True)
    assert (received if end == "stop" else 0) < line["bytes"] < 12_000_000


def test_an_answer_that_is_taken_slowly_is_logged_when_it_is_sent(database, large: str) -> None:
    with (
        ServiceProcess(settings_for(database) | {"COUCHBASE_TIMEOUT_MS": "10000"}) as service,
        Conversation(service.port, 4096) as client,
    ):
        body = client.ask(request(large, database.token)).body
        line = service.wait_for("request")
        assert "cut_off" not in line and len(body) < line["bytes"] < len(body) + 1000


def test_an_answer_to_a_client_that_is_gone_is_cut_off_whole(database, clean_faults: EmulatorProcess) -> None:
    settings = settings_for(database) | {"COUCHBASE_TIMEOUT_MS": "20000"}
    with ServiceProcess(settings) as service, Conversation(service.port) as client:
        clean_faults.fault("latency", ms=1500, operation="get")
        client.send(request("/api/v1/id/1", database.token))
        wait_until(lambda: clean_faults.stats()["operations"].get("get", 0) > 0, "it is asked for")
        client.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, ABORT)
        client.socket.close()
        line = service.wait_for("request")
    assert (line["status"], line["bytes"], line["cut_off"]) == (200, 0, True)


@contextlib.contextmanager
def writing_to(output: Any, database, port: int = 0) -> Iterator[ServiceProcess]:
    """Run a service whose standard output is a file, or closed (None); it ends in good time in any case."""
    service = ServiceProcess(settings_for(database) | {"SERVICE_PORT": str(port)})
    command = [sys.executable, *service.command]
    if output is None:
        command = ["sh", "-c", 'exec "$@" >&-', "sh", *command]
    service.process = subprocess.Popen(command, env=service.environment, cwd=ROOT, stdout=output)
    try:
        yield service
        service.process.terminate()
        assert service.process.wait(30) == 0
    finally:
        service.process.kill()
        service.process.wait(10)


@pytest.mark.parametrize("kind", ["pipe", "socket"])
def test_a_log_that_nobody_reads_stops_nobody(database, kind: str) -> None:
    """Lines are dropped and counted; requests are answered as ever."""
    reading, writing = os.pipe() if kind == "pipe" else (each.detach() for each in socket.socketpair())
    with writing_to(writing, database) as service:
        listening = json.loads(os.read(reading, 4096).partition(b"\n")[0])
        service.port, service.metrics_port = listening["port"], listening["metrics_port"]
        service.wait_until_ready()
        with Conversation(service.port) as client:
            for _ in range(100):  # 300 bytes a line: a million more than the bound
                client.send(request("/api/v1/id/1", "wrong", f"X-Request-ID: {'x' * 64}") * 100)
                assert {client.answer().status for _ in range(100)} == {401}
        assert service.get("/api/v1/id/1", database.token).status == 200
        metrics = service.get("/metrics", port=service.metrics_port).body.decode()
        [dropped] = [line for line in metrics.splitlines() if line.startswith("log_lines_dropped_total ")]
        assert 100 < float(dropped.split()[1]) < 5000
    os.close(reading)
    os.close(writing)


@pytest.mark.parametrize("path", [None, "/dev/full"], ids=["closed", "full"])
def test_without_any_output_requests_are_answered_as_ever(database, path: str | None) -> None:
    """No line gets into an answer, either: a socket may have the number that the standard output had."""
    port = free_port()

    def listens() -> bool:
        with socket.socket() as stream:
            return stream.connect_ex(("127.0.0.1", port)) == 0

    output = open(path, "wb") if path else contextlib.nullcontext()  # noqa: SIM115
    with output as file, writing_to(file, database, port) as service:
        wait_until(listens, "it listens")
        service.port = port
        service.wait_until_ready()
        with Conversation(port) as client:
            for _ in range(3):
                assert client.ask(request("/api/v1/id/1", database.token)).status == 200
