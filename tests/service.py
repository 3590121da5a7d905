"""The service in a process of its own, for tests: started by its command line, asked over real sockets."""

import contextlib
import http.client
import json
import os
import queue
import random
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import trustme

ROOT = Path(__file__).resolve().parents[1]
START_SECONDS = STOP_SECONDS = REQUEST_SECONDS = 60.0  # far above what a busy machine takes


class Answer(NamedTuple):
    """One HTTP answer; `headers` has the names in lower case."""

    status: int
    headers: dict[str, str]
    body: bytes

    def json(self) -> Any:
        """Return the decoded body."""
        return json.loads(self.body)


class TlsPort(int):
    """A port on 127.0.0.1 where TLS is spoken, and what a client needs for that."""

    tls: ssl.SSLContext

    @classmethod
    def of(cls, port: int, tls: ssl.SSLContext) -> Self:
        """Make one of a number."""
        made = cls(port)
        made.tls = tls
        return made


class Certificates:
    """An authority of the tests' own, and the files of a certificate by it, for the service's settings."""

    def __init__(self, directory: Path) -> None:
        """Make both, with all files in a directory."""
        self.authority, self.ca_file = trustme.CA(), directory / "ca.pem"
        self.authority.cert_pem.write_to_path(self.ca_file)
        self.cert, self.key = directory / "tls.crt", directory / "tls.key"
        self.settings = {"SERVICE_TLS_CERT": str(self.cert), "SERVICE_TLS_KEY": str(self.key)}
        self.renew()

    def renew(self, **validity: Any) -> None:
        """Put another certificate in place of the service's."""
        made = self.authority.issue_cert("localhost", "127.0.0.1", "::1", **validity)
        made.private_key_pem.write_to_path(self.key)
        self.cert.write_bytes(b"".join(pem.bytes() for pem in made.cert_chain_pems))

    def client(self, name: str | None = None) -> ssl.SSLContext:
        """Return what a client needs that trusts the authority; with a name, one that has a certificate itself."""
        context = ssl.create_default_context(cafile=str(self.ca_file))
        if name is not None:
            context.load_cert_chain(self.client_file(name))
        return context

    def client_file(self, name: str) -> Path:
        """Make a certificate for a client; return the file with it and its key."""
        path = self.ca_file.with_name("client.pem")
        self.authority.issue_cert("client.example", common_name=name).private_key_and_cert_chain_pem.write_to_path(path)
        return path


def ask(
    port: int, path: str, headers: Mapping[str, str], method: str = "GET", seconds: float = REQUEST_SECONDS
) -> Answer:
    """Send one request on a connection of its own.

    Raises:
        OSError, http.client.HTTPException: there is no answer.
    """
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=seconds)
    if isinstance(port, TlsPort):
        connection = http.client.HTTPSConnection("127.0.0.1", int(port), timeout=seconds, context=port.tls)
    with contextlib.closing(connection):
        connection.request(method, path, headers=headers)
        response = connection.getresponse()
        fields = {name.lower(): value for name, value in response.getheaders()}
        return Answer(response.status, fields, response.read())


def free_port() -> int:
    """Return a port that nobody listens on; it is none of those that the system gives to clients meanwhile."""
    while True:
        port = random.randrange(20_000, 32_000)
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port


def settings_for(database: Any) -> dict[str, str]:
    """Return the environment that points the service at a database: anything with the emulator process's attributes.

    The service signs in as the second user, if there is one: the first may do everything.
    """
    return administrator_settings(database) | {
        "COUCHBASE_USER": getattr(database, "second_user", database.user),
        "COUCHBASE_PASSWORD": getattr(database, "second_password", database.password),
    }


def administrator_settings(database: Any) -> dict[str, str]:
    """Return the environment for one who may write to a database, too."""
    return {
        "COUCHBASE_HOST": database.connection_string,
        "COUCHBASE_USER": database.user,
        "COUCHBASE_PASSWORD": database.password,
        "COUCHBASE_BUCKET": database.bucket,
    }


class ServiceProcess:
    """A context manager around `python micro_svc_demo.py`, on free ports.

    Args:
        environment: settings; of this process's own environment only what Python and coverage need is passed on.
        arguments: flags after the script's name.
        tls: what a client needs, where the settings have it speak TLS.
    """

    command: tuple[str, ...] = (str(ROOT / "micro_svc_demo.py"),)

    def __init__(self, environment: dict[str, str], *arguments: str, tls: ssl.SSLContext | None = None) -> None:
        """Prepare; `start` or a `with` block starts it."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("COUCHBASE", "SERVICE_"))}
        self.environment = kept | {"SERVICE_PORT": "0", "METRICS_PORT": "0"} | environment
        self.arguments, self.tls = arguments, tls
        self.lines: list[dict[str, Any]] = []
        self.raw_lines: list[str] = []
        self._arrived: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()

    def start(self) -> Self:
        """Start it and wait for its `listening` line."""
        self.process = subprocess.Popen(  # noqa: S603  # the interpreter itself, with flags from the test
            [sys.executable, *self.command, *self.arguments],
            cwd=ROOT,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        listening = self.wait_for("listening")
        self.port: int = listening["port"]
        if self.tls:
            self.port = TlsPort.of(self.port, self.tls)
        self.metrics_port: int = listening["metrics_port"]
        return self

    def __enter__(self) -> Self:
        """Start it and wait until it is ready."""
        self.start()
        try:
            self.wait_until_ready()
        except BaseException:
            self.stop(signal.SIGKILL)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop it."""
        self.stop()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for text in self.process.stdout:
            self.raw_lines.append(text)
            line = json.loads(text)
            self.lines.append(line)
            self._arrived.put(line)
        self._arrived.put(None)

    def wait_for(self, message: str, seconds: float = START_SECONDS) -> dict[str, Any]:
        """Return the next log line with this message; lines before it are passed over."""
        deadline = time.monotonic() + seconds
        while True:
            try:
                line = self._arrived.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                raise AssertionError(f"no line {message!r} within {seconds} s; there are {self.raw_lines}") from None
            if line is None:
                assert self.process.stderr is not None
                raise AssertionError(f"it ended: {self.raw_lines} {self.process.stderr.read()}")
            if line["message"] == message:
                return line

    def wait_until_ready(self, ready: bool = True, seconds: float = START_SECONDS) -> None:
        """Ask /readyz until it answers 200, or 503 if `ready` is false."""
        deadline = time.monotonic() + seconds
        while (status := self.get("/readyz").status) != (200 if ready else 503):
            if time.monotonic() > deadline:
                raise AssertionError(f"/readyz still answers {status}: {self.raw_lines[-5:]}")
            if self.process.poll() is not None:
                raise AssertionError(f"it ended: {self.raw_lines[-5:]}")
            time.sleep(0.02)  # nothing to wait on: readiness is state inside another process

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Send it a signal, wait for its end and return its exit code."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        try:
            code = self.process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            code = self.process.wait(STOP_SECONDS)
        self._reader.join(STOP_SECONDS)
        for stream in (self.process.stdout, self.process.stderr):
            assert stream is not None
            stream.close()
        return code

    def request(
        self, method: str, path: str, token: str | None = None, port: int | None = None, **headers: str
    ) -> Answer:
        """Send one request on a connection of its own; underscores in header names stand for dashes."""
        fields = {name.replace("_", "-"): value for name, value in headers.items()}
        if token is not None:
            fields["Authorization"] = f"Bearer {token}"
        return ask(port or self.port, path, fields, method)

    def get(self, path: str, token: str | None = None, port: int | None = None, **headers: str) -> Answer:
        """Send one GET."""
        return self.request("GET", path, token, port, **headers)
