"""From start to stop: probes while Couchbase is not there, helpful refusals, token rotation, drain."""

import contextlib
import http.client
import os
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest

from tests.chaos.clients import wait_until
from tests.emulator.process import EmulatorProcess
from tests.service import ROOT, ServiceProcess, free_port, settings_for


def test_start_up_line(service: ServiceProcess, database) -> None:
    [line] = [line for line in service.lines if line["message"] == "listening"]
    assert line["level"] == "info"
    assert (line["port"], line["metrics_port"]) == (service.port, service.metrics_port)
    assert (line["cluster"], line["bucket"], line["scope"]) == (
        database.connection_string,
        database.bucket,
        "profiles",
    )
    assert line["threads"] == 8
    assert line["address"]


def test_nothing_secret_is_printed(database) -> None:
    """Neither the password nor the token reaches the log, whatever was asked."""
    settings = settings_for(database)
    service = ServiceProcess(settings | {"LOG_LEVEL": "debug"})
    with service:
        for token in (database.token, "marked-wrong-token"):
            for path in ("/api/v1/id/1", "/api/v1/nickname/marked-name", "/api/v1/id/%zz", "/nope/marked-path"):
                service.get(path, token)
    printed = "".join(service.raw_lines)
    assert '"message": "request"' in printed
    for secret in (settings["COUCHBASE_PASSWORD"], database.token, "marked-wrong-token", "marked-name", "marked-path"):
        assert secret not in printed


def test_access_log_has_a_line_a_request(database) -> None:
    with ServiceProcess(settings_for(database)) as service:
        service.get("/api/v1/id/1", database.token, X_Request_ID="abc")
        line = service.wait_for("request")
    assert (line["request_id"], line["method"], line["route"]) == ("abc", "GET", "/api/v1/id/{id}")
    assert (line["status"], line["client"]) == (200, "127.0.0.1")
    assert line["bytes"] > 0 and line["duration_ms"] > 0


def test_access_log_can_be_turned_off(database) -> None:
    with ServiceProcess(settings_for(database), "--access-log", "false") as service:
        assert service.get("/api/v1/id/1", database.token).status == 200
    assert [line for line in service.lines if line["message"] == "request"] == []


def test_couchbase_absent_at_start() -> None:
    """Alive but not ready at once; ready by itself when Couchbase appears."""
    port = free_port()
    settings = {"COUCHBASE_HOST": f"couchbase://127.0.0.1:{port}", "COUCHBASE_USER": "demo", "COUCHBASE_PASSWORD": "p"}
    service = ServiceProcess(settings).start()
    try:
        assert service.get("/healthz").status == 200
        ready = service.get("/readyz")
        assert (ready.status, ready.json()["reasons"]) == (503, ["Couchbase: not connected yet"])
        answer = service.get("/api/v1/id/1", "late")
        assert (answer.status, answer.headers["retry-after"]) == (503, "1")
        with EmulatorProcess(profiles=10, token="late", kv_port=port, password="p"):
            service.wait_until_ready()
            assert service.get("/api/v1/id/1", "late").status == 200
    finally:
        assert service.stop() == 0


def test_retries_are_logged_with_growing_pauses(emulator: EmulatorProcess) -> None:
    """A Couchbase that answers with temporary failures is tried again and again."""
    with EmulatorProcess(profiles=10, token="t") as own:
        own.fault("status", status=0x86, operation="lookup_in")
        service = ServiceProcess(settings_for(own) | {"COUCHBASE_TIMEOUT_MS": "100"}).start()
        try:
            pauses = [service.wait_for("Couchbase is not there yet")["retry_seconds"] for _ in range(4)]
            assert pauses[3] > pauses[0]
            own.clear()
            service.wait_until_ready()
        finally:
            service.stop()


class TestRefusals:
    """What waiting cannot cure ends the process: exit code 1, and one line that says what to do."""

    def refused(self, settings: dict[str, str], *arguments: str) -> str:
        service = ServiceProcess(settings, *arguments).start()
        try:
            advice: str = service.wait_for("cannot serve")["advice"]
            code = service.process.wait(20)
        finally:
            service.stop()
        assert code == 1
        assert len([line for line in service.lines if line["level"] == "error"]) == 1
        assert settings["COUCHBASE_PASSWORD"] not in "".join(service.raw_lines)
        return advice

    def test_wrong_password(self, database) -> None:
        advice = self.refused(settings_for(database) | {"COUCHBASE_PASSWORD": "marked-wrong"})
        assert advice.endswith("check COUCHBASE_USER and COUCHBASE_PASSWORD")

    @pytest.mark.parametrize("around", [" ", '"'])
    def test_password_with_something_around_it(self, database, around: str) -> None:
        settings = settings_for(database)
        password = settings["COUCHBASE_PASSWORD"]
        advice = self.refused(settings | {"COUCHBASE_PASSWORD": f"{around}{password}{around}"})
        assert advice.endswith(
            "check COUCHBASE_USER and COUCHBASE_PASSWORD (it begins or ends with a blank or a quote)"
        )
        assert password not in advice

    def test_missing_bucket(self, database) -> None:
        advice = self.refused(settings_for(database) | {"COUCHBASE_BUCKET": "nowhere"})
        assert "bucket 'nowhere' does not exist" in advice and "COUCHBASE_BUCKET" in advice


@pytest.mark.parametrize(
    ("scope", "token", "reason"),
    [
        ("elsewhere", "t", "(scope 'elsewhere')"),
        ("_default", "t", "(scope '_default')"),  # has no collections
        ("profiles", None, "'service_auth:1' does not exist"),
        ("profiles", "", "visible ASCII"),  # would let everybody in
    ],
    ids=["scope", "collection", "token document", "usable token"],
)
def test_what_is_missing_is_waited_for(scope: str, token: str | None, reason: str) -> None:
    """Log and readiness say what to do, and once that has been done the service is ready by itself."""
    with EmulatorProcess(profiles=1, token="t") as own:
        own.set_token(token)
        settings = settings_for(own) | {"COUCHBASE_SCOPE": scope, "COUCHBASE_TIMEOUT_MS": "1000"}
        service = ServiceProcess(settings).start()
        try:
            line = service.wait_for("Couchbase is not there yet")
            [said] = line["reasons"]
            assert reason in said and "python -m tests.sample_data" in said and line["level"] == "warning"
            assert (service.get("/healthz").status, service.get("/api/v1/id/1", "").status) == (200, 503)
            ready = service.get("/readyz")
            assert (ready.status, ready.json()["reasons"]) == (503, [said])
            provision = [sys.executable, "-m", "tests.sample_data", "--profiles", "1", "--token", "t"]
            subprocess.run(provision, cwd=ROOT, env=os.environ | settings, capture_output=True, timeout=60, check=True)
            service.wait_for("ready")
            assert service.get("/readyz").status == 200
            assert service.get("/api/v1/id/1", "t").status == 200
        finally:
            assert service.stop() == 0


def test_port_in_use_is_one_line(database) -> None:
    """Also where the other listener would share it."""
    with socket.create_server(("", 0), reuse_port=True) as taken:
        for name in ("SERVICE_PORT", "METRICS_PORT"):
            settings = {"SERVICE_PORT": "0", "METRICS_PORT": "0"} | {name: str(taken.getsockname()[1])}
            ended = subprocess.run(
                [sys.executable, str(ROOT / "micro_svc_demo.py")],
                env=dict(os.environ) | settings_for(database) | settings,
                capture_output=True,
                text=True,
                timeout=60,
                check=False,
            )
            assert (ended.returncode, ended.stdout) == (1, "")
            assert ended.stderr.count("\n") == 1 and "in use" in ended.stderr


def test_its_ports_are_free_once_it_has_ended(database) -> None:
    """The next one takes them at once, although the system still remembers a connection that the first has closed."""
    with (
        ServiceProcess(settings_for(database)) as first,
        socket.create_connection(("127.0.0.1", first.port), timeout=10) as idle,
    ):
        assert first.stop() == 0
        assert idle.recv(1) == b""
    ports = {"SERVICE_PORT": str(first.port), "METRICS_PORT": str(first.metrics_port)}
    with ServiceProcess(settings_for(database) | ports) as second:
        assert second.get("/api/v1/id/1", database.token).status == 200


class TestToken:
    def test_a_failed_re_read_keeps_the_token_and_is_logged(self) -> None:
        with (
            EmulatorProcess(profiles=10, token="t") as own,
            ServiceProcess(settings_for(own) | {"TOKEN_REFRESH_SECONDS": "1"}) as service,
        ):
            own.set_token(None)
            line = service.wait_for("the token could not be read again; the last one stays")
            assert line["level"] == "warning" and "does not exist" in line["error"]
            assert service.get("/api/v1/id/1", "t").status == 200


class TestDrain:
    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
    def test_running_requests_finish(self, clean_faults: EmulatorProcess, number: int) -> None:
        """A request that is under way when the signal comes is answered, with Connection: close; exit code 0."""
        own = clean_faults
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # `nohup` may have started these tests
        with ServiceProcess(settings_for(own) | {"COUCHBASE_TIMEOUT_MS": "20000"}) as service:
            own.fault("latency", ms=1500, operation="get")
            before = own.stats()["operations"].get("get", 0)
            connection = http.client.HTTPConnection("127.0.0.1", service.port, timeout=20)
            connection.request("GET", "/api/v1/id/1", headers={"Authorization": f"Bearer {own.token}"})
            while own.stats()["operations"].get("get", 0) == before:
                time.sleep(0.01)  # until the request is at the database
            service.process.send_signal(number)
            response = connection.getresponse()
            assert (response.status, response.getheader("Connection")) == (200, "close")
            assert response.read().startswith(b'[{"record_id"')
            connection.close()
            assert service.process.wait(20) == 0
            with pytest.raises(OSError, match="refused"):
                socket.create_connection(("127.0.0.1", service.port), timeout=5).close()

    def test_signals_of_no_meaning_are_ignored(self, database) -> None:
        """So is SIGHUP where `nohup` starts it."""
        before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
        try:
            service = ServiceProcess(settings_for(database)).start()
        finally:
            signal.signal(signal.SIGHUP, before)
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", service.port, timeout=20)) as client:
            for number in (signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
                service.process.send_signal(number)
                client.request("GET", "/healthz")
                response = client.getresponse()
                assert (response.read(), response.getheader("Connection")) == (b'{"status": "alive"}', None)
        assert service.stop() == 0

    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
    def test_a_signal_while_it_is_still_being_imported(self, tmp_path, number: int) -> None:
        """It ends at once, with exit code 0, having a handler: without one a container's first process goes on."""
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        (tmp_path / "couchbase.py").write_text("print('importing', flush=True); input()")
        service = ServiceProcess({"PYTHONPATH": str(tmp_path)})
        command = [sys.executable, *service.command]
        with subprocess.Popen(
            command, env=service.environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        ) as process:
            assert process.stdout is not None and process.stdout.readline() == b"importing\n"
            process.send_signal(number)
            assert process.wait(20) == 0

    def test_idle_connections_are_told_or_closed(self, database) -> None:
        """An idle keep-alive connection that asks once more is served; one that stays silent is closed."""
        with ServiceProcess(settings_for(database)) as service:
            talking = http.client.HTTPConnection("127.0.0.1", service.port, timeout=10)
            silent = socket.create_connection(("127.0.0.1", service.port), timeout=10)
            talking.request("GET", "/healthz")
            talking.getresponse().read()
            service.process.send_signal(signal.SIGTERM)

            def drains() -> bool:
                return b"draining" in service.get("/readyz", port=service.metrics_port).body

            wait_until(drains, "it says that it drains")
            talking.request("GET", "/healthz")
            response = talking.getresponse()
            assert (response.status, response.getheader("Connection")) == (200, "close")
            response.read()
            assert silent.recv(1) == b""
            assert service.process.wait(20) == 0
            talking.close()
            silent.close()

    def test_shutdown_seconds_bound_the_drain(self, clean_faults: EmulatorProcess) -> None:
        with ServiceProcess(settings_for(clean_faults), "--shutdown-seconds", "1") as service:
            clean_faults.fault("freeze", service="kv")
            connection = http.client.HTTPConnection("127.0.0.1", service.port, timeout=20)
            headers = {"Authorization": f"Bearer {clean_faults.token}"}
            connection.request("GET", "/api/v1/id/1", headers=headers)
            started = time.monotonic()
            service.process.send_signal(signal.SIGTERM)
            assert service.process.wait(20) == 0
            assert time.monotonic() - started < 10
            connection.close()


def test_a_client_that_vanishes_leaves_the_service_well(database) -> None:
    """Connections reset in the middle of requests: the next client is served, and nothing is logged about it."""
    with ServiceProcess(settings_for(database)) as service:
        head = f"GET /api/v1/picture/raw/1 HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer {database.token}\r\n\r\n"

        def vanish() -> None:
            stream = socket.create_connection(("127.0.0.1", service.port), timeout=10)
            stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")
            stream.sendall(head.encode() * 3)
            stream.close()  # with a reset

        threads = [threading.Thread(target=vanish) for _ in range(50)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert service.get("/api/v1/picture/raw/1", database.token).status == 200
    assert [line for line in service.lines if line["level"] == "error"] == []


def test_failures_of_the_database_have_their_status(clean_faults: EmulatorProcess) -> None:
    """A time-out is 504 and unavailability 503 with Retry-After, for documents and lookups alike."""
    own = clean_faults
    settings = settings_for(own) | {"COUCHBASE_TIMEOUT_MS": "1000", "COUCHBASE_QUERY_TIMEOUT_MS": "1000"}
    with ServiceProcess(settings) as service:
        own.fault("freeze", service="kv")
        assert service.get("/api/v1/id/1", own.token).status == 504
        own.clear()
        own.fault("freeze", service="query")
        assert service.get("/api/v1/nickname/x", own.token).status == 504
        assert service.get("/api/v1/id/1", own.token).status == 200
        own.clear()
        assert service.get("/api/v1/nickname/x", own.token).status == 404
