"""The log: one JSON line an event and an answered request, nothing personal, nothing secret, never forged."""

import datetime
import json
import os
import subprocess
import sys

import pytest

import micro_svc_demo
from tests.emulator.process import EmulatorProcess
from tests.service import ROOT, ServiceProcess, settings_for

TRACEPARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
MEMBERS = {"time", "level", "message", "worker", "request_id", "method", "route", "status", "bytes", "duration_ms"}


def test_members_of_a_request_line(database) -> None:
    with ServiceProcess(settings_for(database)) as service:
        service.get("/api/v1/id/1", database.token, X_Request_ID="abc", Traceparent=TRACEPARENT)
        service.get("/api/v1/nickname/nobody", database.token)
        service.get("/api/v1/id/1", "wrong")
        lines = [service.wait_for("request") for _ in range(3)]
    found, refused, missing = sorted(lines, key=lambda line: line["status"])  # each worker writes its own
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
        ("10.0.0.0/8", "192.0.2.7", "127.0.0.1"),
    ],
)
def test_client_is_the_last_forwarded_by_a_trusted_proxy(database, trusted: str, forwarded: str, client: str) -> None:
    with ServiceProcess(settings_for(database) | {"TRUSTED_PROXIES": trusted}) as service:
        service.get("/api/v1/id/1", database.token, X_Forwarded_For=forwarded)
        assert service.wait_for("request")["client"] == client


def test_a_log_that_nobody_reads_stops_nobody(database) -> None:
    """With the pipe full, lines are dropped and counted; requests are answered as ever."""
    reading, writing = os.pipe()
    environment = ServiceProcess(settings_for(database)).environment
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "micro_svc_demo.py")], env=environment, stdout=writing, stdin=subprocess.DEVNULL
    )
    try:
        listening = json.loads(os.read(reading, 4096).partition(b"\n")[0])
        service = ServiceProcess(settings_for(database))
        service.process, service.port, service.metrics_port = process, listening["port"], listening["metrics_port"]
        service.wait_until_ready()
        for _ in range(600):  # some 170 kB of lines; a pipe holds 64 KiB
            assert service.get("/api/v1/id/1", database.token).status == 200
        metrics = service.get("/metrics", port=service.metrics_port).body.decode()
        [dropped] = [line for line in metrics.splitlines() if line.startswith("log_lines_dropped_total ")]
        assert float(dropped.split()[1]) > 100
    finally:
        process.terminate()
        assert process.wait(20) == 0
        os.close(reading)
        os.close(writing)
