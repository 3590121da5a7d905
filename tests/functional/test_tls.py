"""The API port with TLS: who gets in, what a handshake may cost, how a certificate is renewed; the rest as in plain."""

import base64
import contextlib
import os
import re
import signal
import socket
import ssl
import struct
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

import micro_svc_demo
from tests.chaos.clients import wait_until
from tests.emulator.process import EmulatorProcess
from tests.functional.test_hostile import ImpatientService, complaints
from tests.load.clients import Conversation, request
from tests.load.hostile import client_hello
from tests.service import Certificates, ServiceProcess, administrator_settings, settings_for

WAIT_SECONDS = 15.0
NOBODY = {"COUCHBASE_HOST": "couchbase://127.0.0.1:1", "COUCHBASE_USER": "u", "COUCHBASE_PASSWORD": "p"}
HELLO = client_hello()


@pytest.fixture(scope="module")
def secure(database, certificates: Certificates) -> Iterator[ServiceProcess]:
    """The service with TLS, which tells all."""
    settings = settings_for(database) | certificates.settings | {"LOG_LEVEL": "debug"}
    with ServiceProcess(settings, tls=certificates.client()) as running:
        yield running


@pytest.fixture(scope="module")
def mutual(database, certificates: Certificates) -> Iterator[ServiceProcess]:
    """The service that lets in only clients with a certificate of the authority."""
    ca = {"SERVICE_TLS_CLIENT_CA": str(certificates.ca_file), "LOG_LEVEL": "debug"}
    settings = settings_for(database) | certificates.settings | ca
    with ServiceProcess(settings, tls=certificates.client("billing")) as running:
        yield running


@pytest.fixture(scope="module")
def large(database) -> Iterator[bytes]:
    """A picture of 3 MB."""
    settings = micro_svc_demo.read_settings([], administrator_settings(database))
    cluster = micro_svc_demo.open_cluster(settings)
    images = cluster.bucket(settings.couchbase_bucket).scope(settings.couchbase_scope).collection("user_images")
    picture = os.urandom(3_000_000)
    images.upsert("user_images:large", f'{{"type": "png", "image": "{base64.b64encode(picture).decode()}"}}')
    yield picture
    images.remove("user_images:large")
    cluster.close()


def metric(service: ServiceProcess, name: str) -> float | None:
    """Return a sample of the metrics, None if there is none."""
    text = service.get("/metrics", port=service.metrics_port).body.decode()
    found = re.search(rf"^{re.escape(name)} (\S+)$", text, re.MULTILINE)
    return float(found[1]) if found else None


def listening(service: ServiceProcess) -> dict[str, Any]:
    """Return the start-up line."""
    return next(line for line in service.lines if line["message"] == "listening")


def greeted(port: int, context: ssl.SSLContext) -> ssl.SSLSocket:
    """Return a client that has finished its handshake.

    Raises:
        OSError: it is refused, or refuses.
    """
    plain = socket.create_connection(("127.0.0.1", int(port)), timeout=WAIT_SECONDS)
    try:
        return context.wrap_socket(plain, server_hostname="127.0.0.1")
    except OSError:
        plain.close()
        raise


def peer_of(port: int, context: ssl.SSLContext) -> Any:
    """Return the certificate that a new client gets."""
    with greeted(port, context) as client:
        return client.getpeercert()


def test_until_when_the_certificate_is_valid(secure: ServiceProcess, service: ServiceProcess) -> None:
    """The start-up line and a metric have it from the certificate; without TLS there is no such sample."""
    expires = ssl.cert_time_to_seconds(peer_of(secure.port, secure.tls)["notAfter"])
    text = datetime.fromtimestamp(expires, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    assert (listening(secure)["tls"], listening(secure)["certificate_until"]) == (True, text)
    assert metric(secure, "tls_certificate_expiry_seconds") == expires
    assert listening(service)["tls"] is False and "certificate_until" not in listening(service)
    assert metric(service, "tls_certificate_expiry_seconds") is None


@pytest.mark.parametrize("version", ["TLSv1.2", "TLSv1.3"])
def test_versions_and_protocol(secure: ServiceProcess, certificates: Certificates, version: str) -> None:
    """Both versions; of what the client offers, HTTP/1.1 is taken."""
    context = certificates.client()
    context.set_alpn_protocols(["h2", "http/1.1"])
    context.maximum_version = ssl.TLSVersion[version.replace(".", "_")]
    with greeted(secure.port, context) as client:
        assert (client.version(), client.selected_alpn_protocol()) == (version, "http/1.1")


def test_nothing_older_and_the_default_ciphers(certificates: Certificates) -> None:
    settings = micro_svc_demo.read_settings([], NOBODY | certificates.settings)
    context, _ = micro_svc_demo.server_context(settings)
    default = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    assert context.minimum_version == ssl.TLSVersion.TLSv1_2
    assert context.get_ciphers() == default.get_ciphers()


class TestNoHandshake:
    @pytest.mark.parametrize(
        ("sent", "answer", "counted"),
        [
            (b"", b"", 0),
            (HELLO[:100], b"", 0),
            (b"GET /healthz HTTP/1.1\r\nHost: a\r\n\r\n", b"HTTP/1.1 400 Bad Request\r\n", 1),
            (b"SSH-2.0-client\r\n", b"", 1),
            (b"\x16\x03\x01\xff\xff" + b"x" * 2000, b"\x15\x03", 1),
        ],
        ids=["nothing", "half a hello", "plain HTTP", "another protocol", "a broken hello"],
    )
    def test_is_quick_and_quiet(self, secure: ServiceProcess, sent: bytes, answer: bytes, counted: int) -> None:
        """A short plain 400, an alert or nothing; then the end, hardly a word in the log, and the next is served."""
        name = 'http_rejected_total{reason="tls"}'
        before = metric(secure, name)
        with Conversation(int(secure.port)) as client:
            client.send(sent)
            client.end()
            received = b""
            with contextlib.suppress(ConnectionResetError):
                while data := client.socket.recv(4096):
                    received += data
        assert received.startswith(answer) and len(received) < 200 and (answer or not received)
        assert before is not None and metric(secure, name) == before + counted
        assert secure.get("/healthz").status == 200
        assert complaints(secure) == []

    def test_a_reset_and_a_client_that_trusts_another_are_quiet(self, secure: ServiceProcess) -> None:
        with Conversation(int(secure.port)) as client:
            client.send(HELLO)
            client.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        with pytest.raises(ssl.SSLCertVerificationError):
            peer_of(secure.port, ssl.create_default_context())
        line = secure.wait_for("TLS failed")
        while "UNKNOWN_CA" not in line["error"]:
            line = secure.wait_for("TLS failed")
        assert line["level"] == "debug" and complaints(secure) == []

    def test_has_the_time_of_a_head(self, database, certificates: Certificates) -> None:
        """However far it has come, and however often a byte comes; who has finished has an idle client's time."""
        with contextlib.ExitStack() as stack:
            settings = settings_for(database) | certificates.settings
            running = ImpatientService(settings, tls=certificates.client(), head_seconds=1.0)
            stack.enter_context(running)
            patient = stack.enter_context(Conversation(running.port))
            clients = [stack.enter_context(Conversation(int(running.port))) for _ in range(4)]
            for client, sent in zip(clients, (b"", HELLO[:-5], HELLO, HELLO[:50]), strict=True):
                client.send(sent)
            for number in range(50, len(HELLO)):
                if clients[3].has_news(0.1):
                    break
                clients[3].send(HELLO[number : number + 1])
            else:
                raise AssertionError("a byte now and then wins time")
            for client in clients[:3]:
                with contextlib.suppress(ConnectionResetError):
                    while client.socket.recv(4096):
                        pass  # its end of the handshake, as far as that went
            assert patient.ask(request("/healthz")).status == 200

    def test_of_one_client_too_many(self, certificates: Certificates) -> None:
        """With a handshake it gets its 503, without one it is closed, and the log says that nothing has been sent."""
        running = ServiceProcess(NOBODY | certificates.settings, "--max-connections", "1", tls=certificates.client())
        running.start()
        try:
            with Conversation(running.port) as first:
                with Conversation(running.port) as second, Conversation(int(running.port)) as silent:
                    reply = second.ask(request("/healthz"))
                    assert (reply.status, reply.headers["connection"]) == (503, "close")
                    second.wait_for_end()
                    silent.wait_for_end()
                lines = [running.wait_for("request") for _ in range(2)]
                assert [line["status"] for line in lines] == [503, 503]
                assert [line["bytes"] for line in lines if line.get("cut_off")] == [0]
                assert first.ask(request("/healthz")).status == 200
        finally:
            running.stop()


class TestMutual:
    @pytest.mark.parametrize("name", ["billing", 'a", "status": 200, "x": "\\', "Zoë\u202e"])
    def test_the_clients_name_is_in_the_log(
        self, mutual: ServiceProcess, database, certificates: Certificates, name: str
    ) -> None:
        """As it is, and escaped, so that it forges nothing; a caller's own X-Request-ID tells which line."""
        with contextlib.ExitStack() as stack:
            stack.callback(setattr, mutual.port, "tls", mutual.tls)
            mutual.port.tls = certificates.client(name)  # type: ignore[attr-defined]
            assert mutual.get("/api/v1/id/1", database.token, X_Request_ID="named").status == 200
        while (line := mutual.wait_for("request"))["request_id"] != "named":
            pass
        assert (line["client_cert"], line["status"]) == (name, 200)
        assert mutual.raw_lines[-1].isascii()

    def test_without_a_certificate_or_with_anothers_nobody_gets_in(
        self, mutual: ServiceProcess, certificates: Certificates, tmp_path: Path
    ) -> None:
        """Of TLS 1.3 the client's side is through before it is refused; no request is answered, and nothing said."""
        stranger = certificates.client()
        Certificates(tmp_path).authority.issue_cert("x", common_name="billing").configure_cert(stranger)
        for context in (certificates.client(), stranger):
            with greeted(mutual.port, context) as client, pytest.raises((ssl.SSLError, ConnectionError)):
                client.sendall(request("/healthz"))
                assert not client.recv(1), "it was answered"
                raise ConnectionError("closed")
            assert mutual.wait_for("TLS failed")["level"] == "debug"
        assert complaints(mutual) == []

    def test_the_metrics_port_wants_none(self, mutual: ServiceProcess) -> None:
        assert mutual.get("/readyz", port=mutual.metrics_port).status == 200


class TestRotation:
    """While Couchbase is not there, which must not hold it up."""

    @pytest.fixture
    def mounted(self, tmp_path: Path) -> Iterator[tuple[ServiceProcess, Any]]:
        """A service whose files are links into a folder that is a link, as kubelet makes them; how to change that."""

        def swap(certificates: Certificates) -> None:
            (tmp_path / "..new").symlink_to(certificates.cert.parent)
            (tmp_path / "..new").rename(tmp_path / "..data")

        def make(name: str) -> Certificates:
            (tmp_path / name).mkdir()
            return Certificates(tmp_path / name)

        first = make("first")
        swap(first)
        settings = {
            f"SERVICE_TLS_{name}": str(tmp_path / path) for name, path in (("CERT", "tls.crt"), ("KEY", "tls.key"))
        }
        settings["SERVICE_TLS_CLIENT_CA"] = str(tmp_path / "ca.pem")
        for path in ("tls.crt", "tls.key", "ca.pem"):
            (tmp_path / path).symlink_to(f"..data/{path}")
        running = ServiceProcess(NOBODY | settings, "--token-refresh-seconds", "1", tls=first.client("a")).start()
        try:
            yield running, (first, make, swap)
        finally:
            running.stop()

    def test_new_clients_get_what_is_new(self, mounted: tuple[ServiceProcess, Any]) -> None:
        """Certificate, key and the clients' authority; who is connected goes on, and the log and the metric tell."""
        running, (first, make, swap) = mounted
        with Conversation(running.port) as old:
            assert old.ask(request("/healthz")).status == 200
            second = make("second")
            second.renew(not_after=datetime.now(UTC).replace(microsecond=0) + timedelta(days=3))
            swap(second)
            line = running.wait_for("certificate renewed", 5)
            assert line["certificate_until"] > f"{datetime.now(UTC):%Y-%m-%d}"
            expires = ssl.cert_time_to_seconds(peer_of(running.port, second.client("b"))["notAfter"])
            assert metric(running, "tls_certificate_expiry_seconds") == expires < time.time() + 4 * 86_400
            with pytest.raises(ssl.SSLCertVerificationError):
                peer_of(running.port, first.client("a"))
            assert old.ask(request("/healthz")).status == 200

    def test_what_is_no_use_is_told_once_and_changes_nothing(self, mounted: tuple[ServiceProcess, Any]) -> None:
        """A key of another certificate, one that has expired, files that are gone: until there is something better."""
        running, (first, make, swap) = mounted
        broken = make("broken")
        broken.key.write_bytes(first.key.read_bytes())
        expired = make("expired")
        expired.renew(not_after=datetime.now(UTC) - timedelta(hours=1))
        for certificates, why in ((broken, "mismatch"), (expired, "expired")):
            swap(certificates)
            line = running.wait_for("the certificate was not renewed; the one before stays", 5)
            assert why in line["error"] and line["level"] == "error"
            assert running.get("/healthz").status == 200
        first.cert.rename(first.cert.with_suffix(".gone"))
        swap(first)
        assert "No such file" in running.wait_for("the certificate was not renewed; the one before stays", 5)["error"]
        first.cert.with_suffix(".gone").rename(first.cert)
        running.wait_for("certificate renewed", 5)
        assert sum(line["level"] == "error" for line in running.lines) == 3
        assert running.get("/healthz").status == 200


class TestAsInPlain:
    def test_close_notify_leaves_the_answers_under_way(self, secure: ServiceProcess, database) -> None:
        """200 pipelined requests, then TLS' word for a client's end alone: 200 answers, then the service's own."""
        incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        assert secure.tls is not None
        tls = secure.tls.wrap_bio(incoming, outgoing, server_hostname="127.0.0.1")
        with Conversation(int(secure.port)) as client:

            def exchange(step: Any) -> Any:
                while True:
                    with contextlib.suppress(ssl.SSLWantReadError):
                        return step()
                    client.send(outgoing.read())
                    data = client.socket.recv(65_536)
                    assert data, "cut off"
                    incoming.write(data)

            exchange(tls.do_handshake)
            for number in range(200):
                path = f"/api/v1/id/{1 + number % 50}" if number % 3 else "/healthz"
                tls.write(request(path, database.token, f"X-Request-ID: {number}"))
            with pytest.raises(ssl.SSLWantReadError):
                tls.unwrap()
            client.send(outgoing.read())
            received = b""
            with contextlib.suppress(ssl.SSLZeroReturnError):  # by the service's own word
                while data := exchange(lambda: tls.read(65_536)):
                    received += data
            assert re.findall(rb"^X-Request-ID: (\d+)\r$", received, re.MULTILINE) == [b"%d" % n for n in range(200)]
            assert received.count(b"HTTP/1.1 200 OK\r\n") == 200
            assert client.socket.recv(1) == b""

    def test_a_client_of_plain_http_can_read_its_400(self, secure: ServiceProcess) -> None:
        with Conversation(int(secure.port)) as client:
            reply = client.ask(request("/healthz"))
            assert (reply.status, reply.headers["connection"], reply.body) == (400, "close", b"speak HTTPS here\n")

    def test_a_slow_reader_of_large_pictures_gets_them_whole(
        self, secure: ServiceProcess, database, large: bytes
    ) -> None:
        """Three pipelined, of which the buffers take the least part; others are answered meanwhile."""
        with Conversation(secure.port, 4096) as client:
            client.send(request("/api/v1/picture/raw/large", database.token) * 3)
            assert secure.get("/api/v1/id/1", database.token).status == 200
            for _ in range(3):
                reply = client.answer()
                assert reply is not None and (reply.status, reply.body) == (200, large)

    def test_an_answer_that_is_not_taken_whole_is_logged_so(
        self, secure: ServiceProcess, database, large: bytes
    ) -> None:
        with Conversation(secure.port, 4096) as client:
            client.send(request("/api/v1/picture/raw/large", database.token, "X-Request-ID: left"))
            assert client.has_news(WAIT_SECONDS)
        while (line := secure.wait_for("request"))["request_id"] != "left":
            pass
        assert line["cut_off"] is True and 0 < line["bytes"] < len(large)

    def test_drain(self, clean_faults: EmulatorProcess, certificates: Certificates) -> None:
        """A request under way is answered, an idle client gets TLS' word for the end, who shakes hands is let go."""
        settings = settings_for(clean_faults) | certificates.settings
        with ServiceProcess(settings, tls=certificates.client()) as service:
            clean_faults.fault("latency", ms=700, operation="get")
            before = clean_faults.stats()["operations"].get("get", 0)
            ports = (service.port, service.port, int(service.port))
            with contextlib.ExitStack() as stack:
                busy, idle, halfway = (stack.enter_context(Conversation(port)) for port in ports)
                halfway.send(HELLO)
                busy.send(request("/api/v1/id/1", clean_faults.token))
                wait_until(lambda: clean_faults.stats()["operations"].get("get", 0) > before, "it is asked")
                service.process.send_signal(signal.SIGTERM)
                reply = busy.answer()
                assert reply is not None and (reply.status, reply.headers["connection"]) == (200, "close")
                busy.wait_for_end()
                idle.wait_for_end()
                assert service.process.wait(20) == 0
        assert [line for line in service.lines if line["level"] == "error"] == []
