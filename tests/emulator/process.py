"""An emulator in a process of its own, for tests: started by its command line, controlled over its faults' port."""

import http.client
import json
import os
import subprocess
import sys
import tempfile
import threading
import urllib.parse
from pathlib import Path
from types import TracebackType
from typing import Any, Self

ROOT = Path(__file__).resolve().parents[2]
STOP_SECONDS = REQUEST_SECONDS = 30.0
MAX_ERROR_BYTES = 65_536


class EmulatorFailedError(Exception):
    """The emulator did not start; the message has what it wrote to stderr."""


class EmulatorProcess:
    """A context manager around ``python -m tests.emulator``.

    The options are the command line's flags with underscores: ``EmulatorProcess(nodes=2, profiles=100, tls=True)``;
    `password` goes through the environment. What the emulator prints when it is ready becomes attributes:
    `connection_string`, `user`, `password`, `bucket`, `token`, `kv_port`, `query_port`, `management_port`,
    `faults_port`, `nodes`, with TLS `tls_connection_string` and `ca_file`, and with a second user
    (``second_user="reader", roles="data_reader[*]"``) `second_user` and `second_password`. The process ends with the
    block, and with the process that started it.
    """

    connection_string: str
    tls_connection_string: str
    ca_file: str
    user: str
    password: str
    second_user: str
    second_password: str
    bucket: str
    token: str
    kv_port: int
    query_port: int
    management_port: int
    faults_port: int
    nodes: list[dict[str, dict[str, int]]]

    def __init__(self, *, start_seconds: float = 60.0, password: str | None = None, **options: Any) -> None:
        """Prepare to start an emulator with these options, which must be ready within `start_seconds`."""
        self._start_seconds = start_seconds
        # not measured by coverage, which is about the service alone and would make each emulator half as slow again
        inherited = {name: value for name, value in os.environ.items() if name != "COVERAGE_PROCESS_CONFIG"}
        self._environment = inherited | ({} if password is None else {"EMULATOR_PASSWORD": password})
        self._flags = [flag for name, value in options.items() for flag in _flag(name, value)]
        self._process: subprocess.Popen[bytes] | None = None
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - open as long as the process is

    def __enter__(self) -> Self:
        """Start it and wait until it is ready; raises EmulatorFailedError with its stderr where it fails."""
        command = [sys.executable, "-m", "tests.emulator", "--until-stdin-closes", *self._flags]
        self._process = subprocess.Popen(  # noqa: S603 - the interpreter itself, with flags from the test
            command,
            cwd=ROOT,
            env=self._environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
        )
        assert self._process.stdout is not None
        # A process that is killed ends the read below; so nothing here waits for longer than this.
        watchdog = threading.Timer(self._start_seconds, self._process.kill)
        watchdog.start()
        try:
            line = self._process.stdout.readline()
        finally:
            watchdog.cancel()
        if not line:
            code, errors = self._end()
            raise EmulatorFailedError(f"exit code {code}: {errors}")
        self.__dict__.update(json.loads(line))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop it."""
        self.stop()

    def stop(self) -> None:
        """End the process, with force if it must be; raises EmulatorFailedError where it complained or ended badly."""
        code, errors = self._end()
        if code or errors:
            raise EmulatorFailedError(f"exit code {code}: {errors}")

    def _end(self) -> tuple[int, str]:
        """End the process; return its exit code and what it wrote to stderr."""
        process = self._process
        assert process is not None and process.stdin is not None and process.stdout is not None
        process.stdin.close()
        try:
            code = process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            code = process.wait(STOP_SECONDS)
        process.stdout.close()
        with self._errors:
            self._errors.seek(0)
            return code, self._errors.read(MAX_ERROR_BYTES).decode(errors="replace").strip()

    @property
    def pid(self) -> int:
        """The process's id."""
        assert self._process is not None
        return self._process.pid

    # ---- faults ----

    def fault(self, name: str, **parameters: Any) -> None:
        """Switch a fault on, or do it if it happens once; raises ValueError with what is wrong with it."""
        self._request("PUT", f"/faults/{urllib.parse.quote(name)}", parameters)

    def clear(self, name: str | None = None) -> None:
        """Switch a fault off, or all."""
        self._request("DELETE", "/faults" if name is None else f"/faults/{urllib.parse.quote(name)}")

    def stop_node(self, node: int) -> None:
        """Stop a node: its ports are closed and its connections cut."""
        self._request("POST", f"/nodes/{node}/stop")

    def start_node(self, node: int) -> None:
        """Start a node again, on its ports."""
        self._request("POST", f"/nodes/{node}/start")

    def set_token(self, token: str | None) -> None:
        """Change the service's token, or (None) delete its document."""
        self._request("PUT", "/token", {"token": token})

    def set_password(self, user: str, password: str) -> None:
        """Change a user's password, for sign-ins from now on."""
        self._request("PUT", "/password", {"user": user, "password": password})

    def stats(self) -> dict[str, Any]:
        """Return how many requests of each operation arrived and how many connections are open."""
        return self._request("GET", "/stats")

    def faults(self) -> dict[str, Any]:
        """Return the faults there are, and which are on."""
        return self._request("GET", "/")

    def _request(self, method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        connection = http.client.HTTPConnection("127.0.0.1", self.faults_port, timeout=REQUEST_SECONDS)
        try:
            connection.request(method, path, None if body is None else json.dumps(body))
            response = connection.getresponse()
            text = response.read().decode()
        finally:
            connection.close()
        if response.status != http.HTTPStatus.OK:
            raise ValueError(f"{response.status}: {text}")
        answer: dict[str, Any] = json.loads(text)
        return answer


def _flag(name: str, value: Any) -> list[str]:
    """Return the command-line flags for one option."""
    flag = "--" + name.replace("_", "-")
    if value is None or value is False:
        return []
    return [flag] if value is True else [f"{flag}={value}"]
