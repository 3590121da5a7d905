"""Clients that are slow, silent, greedy or gone: each costs the service a bounded amount, and the others are served.

Most tests lower the server's own time-outs, in a process of its own, so that they are over soon. None measures time:
they wait for what must happen, and fail if it does not.
"""

import json
import resource
import socket
import ssl
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from tests.chaos.clients import wait_until
from tests.emulator.process import EmulatorProcess
from tests.load.clients import Conversation, cpu_seconds, crowd, descriptors, request, resident_bytes, stuff
from tests.load.hostile import TOKEN as LOAD_TOKEN
from tests.load.hostile import UNDER_WAY, open_connections, stop_under_load
from tests.service import ROOT, Certificates, ServiceProcess, settings_for

WAIT_SECONDS = 60.0
PICTURE = "/api/v1/picture/raw/1"
ABORT = struct.pack("ii", 1, 0)  # SO_LINGER: closing sends a reset

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")


class ImpatientService(ServiceProcess):
    """The service with other time-outs for its connections."""

    def __init__(
        self, environment: dict[str, str], *arguments: str, tls: ssl.SSLContext | None = None, **knobs: float
    ) -> None:
        """Prepare; `knobs` are class attributes of `Connection`."""
        super().__init__(environment, *arguments, tls=tls)
        lines = [f"service.Connection.{name} = {value!r}" for name, value in knobs.items()]
        self.command = ("-c", "\n".join(["import sys, micro_svc_demo as service", *lines, "sys.exit(service.main())"]))


@pytest.fixture(scope="module", params=["plain", "tls"])
def tls(request: pytest.FixtureRequest, certificates: Certificates) -> tuple[dict[str, str], ssl.SSLContext | None]:
    """Whether the service speaks TLS: its settings for that, and what its clients need."""
    return (certificates.settings, certificates.client()) if request.param == "tls" else ({}, None)


@pytest.fixture(scope="module")
def hasty(database, tls) -> Iterator[ServiceProcess]:
    """The service with short time-outs."""
    knobs = {"head_seconds": 0.5, "write_seconds": 1.0, "linger_seconds": 0.3}
    with ImpatientService(settings_for(database) | {"IDLE_SECONDS": "1"} | tls[0], tls=tls[1], **knobs) as running:
        yield running


@pytest.fixture(scope="module")
def single(database, tls) -> Iterator[ServiceProcess]:
    """One process of the service, as it is."""
    with ServiceProcess(settings_for(database) | tls[0], tls=tls[1]) as running:
        yield running


def complaints(running: ServiceProcess) -> list[str]:
    """Return what the service has logged as a warning or an error since it was started, but for the settings' own."""
    return [
        line["message"]
        for line in running.lines
        if line["level"] in {"warning", "error"} and "not encrypted" not in line["message"]
    ]


HEAD = b"GET /api/v1/id/1 HTTP/1.1\r\nHost: a\r\n"
HALVES = [b"G", b"GET /api", b"HEAD /", HEAD, HEAD + b"X: y", HEAD + b"\r", b"\r\nGET"]


class TestTimeouts:
    def test_half_a_request_gets_408(self, hasty: ServiceProcess) -> None:
        """The rest of a request that has begun is not waited for without end, wherever it stops."""
        with ExitStack() as stack:
            clients = [stack.enter_context(Conversation(hasty.port)) for _ in HALVES]
            for client, half in zip(clients, HALVES, strict=True):
                client.send(half)
            for client, half in zip(clients, HALVES, strict=True):
                reply = client.answer("HEAD" if half.startswith(b"HEAD") else "GET")
                assert reply is not None and (reply.status, reply.headers["connection"]) == (408, "close"), half
                client.wait_for_end()

    def test_half_a_request_behind_a_whole_one_gets_408(self, hasty: ServiceProcess) -> None:
        with Conversation(hasty.port) as client:
            assert client.ask(request("/healthz") + HEAD).status == 200
            reply = client.answer()
            assert reply is not None and reply.status == 408
            client.wait_for_end()

    def test_a_byte_now_and_then_wins_no_time(self, hasty: ServiceProcess) -> None:
        """The time-out counts from the first byte of the head, not from the last."""
        endless = HEAD + b"X: " + b"y" * 100
        with Conversation(hasty.port) as client:
            sent = 0
            while not client.has_news(0.1):
                assert sent < len(endless), "no answer within 10 s of a head that should take half a second"
                client.send(endless[sent : sent + 1])
                sent += 1
            reply = client.answer()
            assert reply is not None and reply.status == 408

    def test_an_idle_connection_is_closed_without_a_word(self, hasty: ServiceProcess) -> None:
        """Also one that has had answers, and one that has sent an empty line."""
        for before in (b"", b"\r\n", request("/healthz")):
            with Conversation(hasty.port) as client:
                if before.startswith(b"GET"):
                    assert client.ask(before).headers["keep-alive"] == "timeout=1"
                else:
                    client.send(before)
                client.wait_for_end()

    def test_an_answer_that_is_not_taken_is_dropped(self, hasty: ServiceProcess, database) -> None:
        """The connection is closed, and what was kept for it is freed."""
        wait_until(lambda: open_connections(hasty) == 0, "connections of other tests stay")
        with crowd(hasty.port, 1, 4096) as [client]:
            taken = stuff([client], request(PICTURE, database.token) * 5000)
            assert taken > 0
            wait_until(lambda: open_connections(hasty) == 1, "it was not accepted")
            wait_until(lambda: open_connections(hasty) == 0, "it was not dropped")
            client.settimeout(WAIT_SECONDS)
            received = 0
            with pytest.raises((ConnectionResetError, ssl.SSLEOFError)):  # requests of its were not read
                while data := client.recv(65536):
                    received += len(data)
            assert received > 0
            while not (line := hasty.wait_for("request")).get("cut_off"):
                pass
            assert line["status"] == 200

    def test_a_slow_reader_is_not_cut_off_by_what_it_sends(self, database) -> None:
        """Half a request behind an answer that is being taken does not shorten the time to take it."""
        with (
            ImpatientService(settings_for(database), head_seconds=0.3, write_seconds=60.0) as running,
            Conversation(running.port, 4096) as client,
        ):
            asked = request(PICTURE, database.token) * 2000  # more of answers than all buffers take
            client.socket.setblocking(False)
            sent = client.socket.send(asked)
            wait_until(lambda: idle_now(running), "it goes on working")
            client.socket.settimeout(WAIT_SECONDS)
            for _ in range(sent // len(request(PICTURE, database.token))):
                reply = client.answer()
                assert reply is not None and reply.status == 200


def idle_now(running: ServiceProcess) -> bool:
    """Tell whether a service uses no processor time over an interval longer than its time-outs and looks at them."""
    before = cpu_seconds(running.process.pid)
    time.sleep(1.5)
    return cpu_seconds(running.process.pid) - before < 0.1


class TestBounds:
    def test_one_client_too_many_gets_503(self, database) -> None:
        """Without asking for anything; and when somebody leaves, the next one is welcome."""
        with ServiceProcess(settings_for(database) | {"MAX_CONNECTIONS": "5"}) as running:
            wait_until(lambda: open_connections(running) == 0, "the readiness checks' connections stay")
            clients = [Conversation(running.port) for _ in range(5)]
            for client in clients:
                assert client.ask(request("/healthz")).status == 200
            for _ in range(5):  # each is closed after a second
                with Conversation(running.port) as extra:
                    reply = extra.answer()
                    assert reply is not None and reply.status == 503
                    assert int(reply.headers["retry-after"]) >= 1
                    assert reply.headers["connection"] == "close"
                    extra.wait_for_end()
            for client in clients:
                assert client.ask(request("/api/v1/id/1", database.token)).status == 200
                client.socket.close()
            wait_until(lambda: running.get("/healthz").status == 200, "nobody is let in again")

    def test_probes_are_answered_beside_too_many_clients(self, database) -> None:
        """The metrics port is not the clients'."""
        with ServiceProcess(settings_for(database) | {"MAX_CONNECTIONS": "3"}) as running, crowd(running.port, 10):
            for path in ("/healthz", "/readyz", "/metrics"):
                assert running.get(path, port=running.metrics_port).status == 200

    def test_out_of_descriptors(self, database) -> None:
        """The service neither ends nor spins; its clients are served, and when descriptors come free, so are others."""
        with ServiceProcess(settings_for(database)) as running, Conversation(running.port) as old:
            pid = running.process.pid
            assert old.ask(request("/healthz")).status == 200
            limit = descriptors(pid) + 5
            resource.prlimit(pid, resource.RLIMIT_NOFILE, (limit, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
            with crowd(running.port, 50):
                running.wait_for("cannot accept")
                lines, used = len(running.lines), cpu_seconds(pid)
                time.sleep(1.5)  # an interval to look at
                assert cpu_seconds(pid) - used < 0.5, "it spins"
                assert len(running.lines) - lines < 30, "it floods the log"
                assert old.ask(request("/api/v1/id/1", database.token)).status == 200
            wait_until(lambda: running.get("/api/v1/id/1", database.token).status == 200, "nobody is let in again")
            assert running.process.poll() is None

    def test_gone_clients_leave_nothing_behind(self, single: ServiceProcess, database) -> None:
        """Resets and vanished clients, at any moment: no descriptor, hardly any memory, not a word in the log."""
        asked = request(PICTURE, database.token)
        moments = [
            b"",
            asked[:20],
            asked,
            asked * 30,
            asked[:-2] + b"Content-Length: 5\r\n\r\nhe",
            asked[:-2] + b"Transfer-Encoding: chunked\r\n\r\n",
            request("/api/v1/nickname/x", database.token),
            b"get / HTTP/1.1\r\n\r\n",
        ]
        pid = single.process.pid

        def come_and_go(count: int) -> None:
            for number in range(count):
                with Conversation(single.port) as client:
                    client.send(moments[number % len(moments)])
                    if number % 3:
                        client.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, ABORT)
            assert single.get("/healthz").status == 200  # behind them all: each has been accepted
            wait_until(lambda: open_connections(single) == 0, "connections stay open")

        come_and_go(2400)  # what is allocated once is allocated: with TLS the last of it after some 2,000
        before_descriptors, before_bytes = descriptors(pid), resident_bytes(pid)
        come_and_go(1200)
        assert descriptors(pid) <= before_descriptors + 8  # the SDK's own come and go
        assert resident_bytes(pid) - before_bytes < 4 << 20
        assert complaints(single) == []

    def test_clients_that_never_read_hold_no_worker(self, single: ServiceProcess, database) -> None:
        """Many more than there are workers; each has an answer waiting that its socket would not take."""
        with crowd(single.port, 40, 4096) as clients:
            assert stuff(clients, request(PICTURE, database.token) * 2000) > 0
            for path in ("/healthz", "/api/v1/id/1", PICTURE, "/api/v1/nickname/nobody-has-it") * 5:
                assert single.get(path, database.token).status == (404 if "nobody" in path else 200)
            assert open_connections(single) >= 40

    def test_what_is_kept_for_a_client_that_never_reads_is_bounded(self, single: ServiceProcess, database) -> None:
        """Reading pauses: the client cannot send on, and the service does not grow."""
        before = resident_bytes(single.process.pid)
        with crowd(single.port, 20, 4096) as clients:
            wait_until(
                lambda: stuff(clients, request(PICTURE, database.token) * 2000) == 0 and idle_now(single),
                "the service takes requests without end",
            )
            assert resident_bytes(single.process.pid) - before < 16 << 20


class TestStreams:
    def test_half_closed_client_gets_all_answers(self, single: ServiceProcess, database) -> None:
        """200 pipelined requests, then the client's end: 200 answers in order, then the service's end."""
        with Conversation(single.port) as client:
            for number in range(200):
                path = f"/api/v1/id/{1 + number % 50}" if number % 3 else "/healthz"
                client.send(request(path, database.token, f"X-Request-ID: {number}"))
            client.end()
            for number in range(200):
                reply = client.answer()
                assert reply is not None and reply.status == 200
                assert reply.headers["x-request-id"] == str(number)
            client.wait_for_end()

    def test_half_closed_client_gets_a_slow_answer(self, database, clean_faults: EmulatorProcess) -> None:
        """The answer comes long after the client's end."""
        with ServiceProcess(settings_for(database)) as running, Conversation(running.port) as client:
            clean_faults.fault("latency", ms=300, operation="get")
            client.send(request("/api/v1/id/1", database.token))
            client.end()
            reply = client.answer()
            assert reply is not None and reply.status == 200
            client.wait_for_end()

    @pytest.mark.parametrize(
        "last",
        [
            b"GET / HTTP/2.0\r\n\r\n",
            request("/nowhere", None, "Connection: close"),
            request("/nowhere", None, "Content-Length: 5"),
        ],
    )
    def test_nothing_is_routed_after_the_last_answer(self, single: ServiceProcess, database, last: bytes) -> None:
        """What a client sends behind a refusal, `close` or a body is read and dropped; in later packets, too."""
        late = request("/api/v1/id/1", database.token, "X-Request-ID: marked-late")
        with Conversation(single.port) as client:
            assert client.ask(last).headers["connection"] == "close"
            client.send(late)
            assert single.get("/healthz").status == 200  # through the same loop: by now the other has been read
            client.wait_for_end()
        with Conversation(single.port) as client:
            client.ask(late.replace(b"marked-late", b"marked-after"))
        while (line := single.wait_for("request"))["request_id"] != "marked-after":
            assert line["request_id"] != "marked-late", "it was routed"

    @pytest.mark.parametrize(
        ("field", "piece"),
        [
            ("Content-Length: 1048576", b"x" * 16_384),
            ("Transfer-Encoding: chunked", b"4000\r\n%b\r\n" % (b"x" * 16_384)),
        ],
    )
    def test_a_client_that_sends_its_body_first_gets_its_413(
        self, single: ServiceProcess, field: str, piece: bytes
    ) -> None:
        """1 MiB in pieces, and only then it reads: no reset has taken the answer away, and behind it comes the end."""
        with Conversation(single.port) as client:
            client.socket.sendall(request("/healthz", None, field))
            for _ in range(64):
                client.socket.sendall(piece)
            reply = client.answer()
            assert reply is not None and (reply.status, reply.headers["connection"]) == (413, "close")
            assert json.loads(reply.body)["status"] == 413
            client.wait_for_end()

    def test_a_slow_body_does_not_cost_its_client_the_answer(self, database) -> None:
        """Closing is put off as long as bytes come, well beyond the time that a silent client would have."""
        with (
            ImpatientService(settings_for(database), linger_seconds=1.0) as running,
            Conversation(running.port) as client,
        ):
            client.send(request("/healthz", None, "Content-Length: 1000000"))
            for _ in range(25):
                client.send(b"x" * 1000)
                time.sleep(0.1)  # the client's pace
            reply = client.answer()
            assert reply is not None and reply.status == 413
            client.wait_for_end()


def test_a_request_that_waited_too_long_is_not_worked_on(database, clean_faults: EmulatorProcess) -> None:
    """Lookups behind a slow one, longer than the time-out: 503 at once, and the database is not asked for them."""
    settings = settings_for(database) | {"THREADS": "1", "COUCHBASE_TIMEOUT_MS": "400"}
    with ServiceProcess(settings) as running:
        clean_faults.fault("latency", ms=900, service="query")
        before = clean_faults.stats()["requests"]["query"]
        clients = [Conversation(running.port) for _ in range(6)]
        for client in clients:
            client.send(request("/api/v1/nickname/nobody", database.token))
        replies = [client.answer() for client in clients]
        for client in clients:
            client.socket.close()
        statuses = sorted(reply.status for reply in replies if reply)
        assert statuses.count(503) >= 4 and set(statuses) <= {404, 503} and 404 in statuses
        assert all(int(reply.headers["retry-after"]) >= 1 for reply in replies if reply and reply.status == 503)
        assert clean_faults.stats()["requests"]["query"] - before <= 2


@pytest.fixture(scope="module")
def settings() -> Iterator[dict[str, str]]:
    """Settings of an emulator that has what the load asks for."""
    with EmulatorProcess(profiles=1000, token=LOAD_TOKEN) as emulator:
        yield settings_for(emulator)


class TestUnderLoad:
    """With 50 keep-alive clients that ask without a pause."""

    def test_sigterm_loses_no_request(self, settings: dict[str, str]) -> None:
        for _ in range(2):
            tally = stop_under_load(settings)
            assert tally.lost == {} and tally.answered >= UNDER_WAY


class TestMeasurements:
    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "tests.load.hostile", *arguments]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100, check=False)

    def test_quick(self) -> None:
        """It measures and prints every row; how the figures compare with the bounds is for quieter machines to say."""
        ended = self.run("--quick")
        assert ended.returncode in {0, 1}, ended.stderr
        rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in ended.stdout.splitlines()]
        assert rows[0] == ["what", "bound", "measured", ""]
        assert len(rows) == 2 + 6
        assert all(verdict == "good" for what, _, _, verdict in rows[2:] if not what.startswith("p99"))
        assert ended.returncode == any(row[3] == "MISSED" for row in rows)

    def test_bad_flag(self) -> None:
        ended = self.run("--quickly")
        assert (ended.returncode, ended.stdout, ended.stderr.count("\n")) == (2, "", 1)
