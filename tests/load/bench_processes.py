"""The processes of a measurement: the service, what it costs, and wrk."""

import contextlib
import http.client
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

from tests.load.bench_plan import EXPRESS, FASTAPI, OURS, THREADING, Scenario, Setup
from tests.load.bench_tools import PEERS, Tools
from tests.load.clients import cpu_seconds, resident_bytes
from tests.service import ROOT, ask

START_SECONDS = 30.0
STOP_SECONDS = 25.0
REQUEST_SECONDS = 10.0
POLL_SECONDS = 0.005
WRK_TIMEOUT_SECONDS = 10
WRK_GRACE_SECONDS = 60.0
ERROR_BYTES = 2000


class RunError(Exception):
    """A service, or wrk, did not do what it should; the message is one line."""


def free_port() -> int:
    """Return a port that nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


def command_for(setup: Setup, tools: Tools, port: int) -> list[str]:
    """Return the command line that starts a service."""
    if setup.service == OURS:
        if setup.document_workers is None:
            return [sys.executable, "micro_svc_demo.py"]
        return [sys.executable, "-m", "tests.load.bench_runner", str(setup.document_workers), str(setup.batch_size)]
    if setup.service == EXPRESS:
        return [tools.node, str(tools.express / "service.js")]
    if setup.service == FASTAPI:
        flags = f"--loop uvloop --http httptools --host 127.0.0.1 --port {port} --workers {setup.processes}"
        log = ["--access-log"] if setup.access_log else ["--no-access-log", "--log-level", "warning"]
        place = ["--app-dir", str(PEERS / "fastapi")]
        return [str(tools.fastapi), "-m", "uvicorn", "service:app", *place, *flags.split(), *log]
    threads = ["--threads"] if setup.service == THREADING else []
    return [sys.executable, str(PEERS / "plain" / "service.py"), *threads]


def keep_to_one_processor() -> None:
    """Do for the calling process what our service does for itself."""
    os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})


class Service:
    """A context manager around one life of a service: ready at the beginning of the block, gone at its end.

    Attributes:
        port: where it listens.
        startup_ms: from its start to its first answer with a profile.
    """

    def __init__(self, setup: Setup, tools: Tools, settings: dict[str, str], token: str) -> None:
        """Prepare; `settings` are the COUCHBASE_* variables."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("COUCHBASE", "SERVICE_"))}
        self.port = free_port()
        self.startup_ms = 0.0
        self._token = token
        self._command = command_for(setup, tools, self.port)
        self._kept = setup.other_affinity and setup.service != OURS
        self._environment = kept | settings
        self._environment |= {
            "SERVICE_PORT": str(self.port),
            "METRICS_PORT": "0",
            "WORKERS": str(setup.processes),
            "ACCESS_LOG": str(setup.access_log).lower(),
            "CPU_AFFINITY": "off" if setup.other_affinity else "auto",
            "NODE_ENV": "production",
        }
        # A file rather than a pipe: nobody has to read along, which would cost the processor that is measured.
        self._log = tempfile.TemporaryFile(mode="ab+")  # noqa: SIM115  # open as long as the process is

    def __enter__(self) -> Self:
        """Start it and wait for its first profile.

        Raises:
            RunError: it ended, or did not become ready in time.
        """
        started = time.monotonic()
        self._process = subprocess.Popen(  # noqa: S603  # this Python, Node.js or an installed uvicorn
            self._command,
            cwd=ROOT,
            env=self._environment,
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=keep_to_one_processor if self._kept else None,  # noqa: PLW1509  # this process has one thread
        )
        try:
            while not self._answers():
                if self._process.poll() is not None:
                    raise RunError(f"it ended at once: {self.last_words()}")
                if time.monotonic() - started > START_SECONDS:
                    raise RunError(f"it was not ready within {START_SECONDS:.0f} s: {self.last_words()}")
                time.sleep(POLL_SECONDS)
        except BaseException:
            self._end()
            raise
        self.startup_ms = (time.monotonic() - started) * 1000
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop it."""
        self._end()

    def _answers(self) -> bool:
        try:
            return (
                ask(
                    self.port, "/api/v1/id/1", {"Authorization": f"Bearer {self._token}"}, seconds=REQUEST_SECONDS
                ).status
                == http.HTTPStatus.OK
            )
        except (OSError, http.client.HTTPException):
            return False

    def _end(self) -> None:
        self._process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(STOP_SECONDS)
        with contextlib.suppress(ProcessLookupError):  # the group: its own processes that are left, and nobody else's
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait(STOP_SECONDS)
        self._log.close()

    def last_words(self) -> str:
        """Return the end of what it wrote, in one line."""
        self._log.seek(0, os.SEEK_END)
        self._log.seek(max(0, self._log.tell() - ERROR_BYTES))
        lines = self._log.read().decode(errors="replace").split("\n")
        return " / ".join(line.strip() for line in lines[-6:] if line.strip()) or "it said nothing"

    def forget_log(self) -> None:
        """Empty its log, which would otherwise grow by megabytes a second."""
        self._log.truncate(0)

    def processes(self) -> list[int]:
        """Return its processes: the one that was started and all that descend from it."""
        found, new = [], [self._process.pid]
        while new:
            pid = new.pop()
            found.append(pid)
            for children in Path(f"/proc/{pid}/task").glob("*/children"):
                with contextlib.suppress(OSError):  # a thread that has just ended
                    new += map(int, children.read_text().split())
        return found

    def cpu_seconds(self) -> float:
        """Return how much processor time all its processes have used."""
        return sum(cpu_seconds(pid) for pid in self.processes())

    def resident_mb(self) -> float:
        """Return how much memory all its processes hold; what they share counts for each."""
        return sum(resident_bytes(pid) for pid in self.processes()) / 1e6


@dataclass(frozen=True)
class Load:
    """What wrk is to do.

    Attributes:
        scenario: the kind of load.
        targets: the file with what to ask for, a target a line.
        token: the token that the services want.
        seconds: for how long.
        seed: what the targets are drawn by.
    """

    scenario: Scenario
    targets: Path
    token: str
    seconds: int
    seed: int


def run_wrk(tools: Tools, port: int, load: Load) -> dict[str, Any]:
    """Put load on a service; return what wrk counted.

    Raises:
        RunError: wrk failed.
    """
    scenario = load.scenario
    environment = os.environ | {
        "LOAD_HOST": "127.0.0.1",
        "LOAD_TARGETS": str(load.targets),
        "LOAD_TOKEN": load.token if scenario.right_token else "wrong",
        "LOAD_SEED": str(load.seed),
        "LOAD_CLOSE": str(scenario.new_connections).lower(),
    }
    flags = f"-t1 -c{scenario.connections} -d{load.seconds}s --timeout {WRK_TIMEOUT_SECONDS}s -s tests/load/wrk.lua"
    try:
        done = subprocess.run(  # noqa: S603  # wrk, with flags of numbers
            [tools.wrk, *flags.split(), f"http://127.0.0.1:{port}"],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            timeout=load.seconds + WRK_GRACE_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise RunError("wrk did not end") from None
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if done.returncode or not lines:
        raise RunError(f"wrk failed: {(done.stderr or done.stdout).strip()[-300:]}")
    counted: dict[str, Any] = json.loads(lines[-1].removeprefix("RESULT "))
    return counted


class Clocks(NamedTuple):
    """Processor seconds used so far: by the service, by the database, by wrk, and by the whole machine."""

    service: float
    database: float
    wrk: float
    machine: float

    @classmethod
    def read(cls, service: Service, database_pid: int | None) -> Self:
        """Read them all."""
        ended = resource.getrusage(resource.RUSAGE_CHILDREN)  # wrk has been waited for; the service has not
        fields = list(map(int, Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]))
        user, nice, system, _idle, _waiting, *others = fields[:8]  # interrupts, and what the hypervisor took
        return cls(
            service.cpu_seconds(),
            cpu_seconds(database_pid) if database_pid else 0.0,
            ended.ru_utime + ended.ru_stime,
            sum([user, nice, system, *others]) / os.sysconf("SC_CLK_TCK"),
        )


def measure(service: Service, tools: Tools, load: Load, database_pid: int | None) -> dict[str, float]:
    """Put load on a service and return its figures.

    A failure is an answer with a status of the wrong kind (errors where none are expected, or none where all should
    be), or a connection that was refused, broken or silent. `other_cores` is what neither service nor database nor wrk
    used: the machine was not quiet if it is much.
    """
    before = Clocks.read(service, database_pid)
    counted = run_wrk(tools, service.port, load)
    used = Clocks(*(after - begun for after, begun in zip(Clocks.read(service, database_pid), before, strict=True)))
    requests, seconds = counted["requests"], counted["duration_us"] / 1e6
    errors = counted["error_statuses"]
    wrong = errors if load.scenario.status < http.HTTPStatus.BAD_REQUEST else requests - errors
    broken = sum(counted[kind] for kind in ("connect_errors", "read_errors", "write_errors", "timeouts"))
    figures = {
        "requests_per_second": requests / seconds,
        "p50_ms": counted["p50_us"] / 1000,
        "p99_ms": counted["p99_us"] / 1000,
        "p999_ms": counted["p999_us"] / 1000,
        "failures": wrong + broken,
        "cpu_us": used.service * 1e6 / max(1, requests),
        "service_cores": used.service / seconds,
        "database_cores": used.database / seconds,
        "wrk_cores": used.wrk / seconds,
        "other_cores": max(0.0, used.machine - used.service - used.database - used.wrk) / seconds,
        "bytes": counted["bytes"] / max(1, requests),
        "resident_mb": service.resident_mb(),
        "startup_ms": service.startup_ms,
    }
    service.forget_log()
    return figures
