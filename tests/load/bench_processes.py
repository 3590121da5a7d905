"""The processes of a measurement: the service, what it costs, and wrk."""

import contextlib
import http.client
import json
import os
import py_compile
import resource
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Self

from tests.load.bench_plan import EXPRESS, FASTAPI, OURS, THREADING, Scenario, Setup
from tests.load.bench_tools import PEERS, Tools
from tests.load.clients import cpu_seconds, resident_bytes
from tests.service import ROOT, Certificates, TlsPort, ask, free_port

START_SECONDS = 30.0
STOP_SECONDS = 25.0
REQUEST_SECONDS = 10.0
POLL_SECONDS = 0.005
WRK_TIMEOUT_SECONDS = 10
WRK_GRACE_SECONDS = 60.0
ERROR_BYTES = 2000


class RunError(Exception):
    """A service, or wrk, did not do what it should; the message is one line."""


def command_for(setup: Setup, tools: Tools, port: int, tls: dict[str, str], folder: Path) -> list[str]:
    """Return the command line that starts a service.

    Args:
        setup: which one, and how.
        tools: where the others are.
        port: where it listens.
        tls: our settings for a certificate, if it is to have one.
        folder: for its files.
    """
    if setup.service == OURS:
        if setup.document_workers is None:
            source = tools.other_commit if setup.other_commit else ROOT / "micro_svc_demo.py"
            # as in the image: to compile it takes 7 MB, which the process keeps
            return [sys.executable, str(py_compile.compile(str(source), str(folder / "service.pyc"), doraise=True))]
        return [sys.executable, "-m", "tests.load.bench_runner", str(setup.document_workers), str(setup.batch_size)]
    if setup.service == EXPRESS:
        return [tools.node, str(tools.express / "service.js")]
    if setup.service == FASTAPI:
        flags = f"--loop uvloop --http httptools --host 127.0.0.1 --port {port} --workers {setup.processes}"
        log = ["--access-log"] if setup.access_log else ["--no-access-log", "--log-level", "warning"]
        place = ["--app-dir", str(PEERS / "fastapi")]
        place += ["--ssl-certfile", tls["SERVICE_TLS_CERT"], "--ssl-keyfile", tls["SERVICE_TLS_KEY"]] if tls else []
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
        ports: where each of its processes listens: every one of ours on its own port, all of another's on the same.
        startup_ms: from its start to the first answer with a profile on each port.
    """

    def __init__(self, setup: Setup, tools: Tools, settings: dict[str, str], token: str) -> None:
        """Prepare; `settings` are the COUCHBASE_* variables."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("COUCHBASE", "SERVICE_"))}
        count = setup.processes
        self.ports = [free_port() for _ in range(count)] if setup.service == OURS else [free_port()] * count
        self.startup_ms = 0.0
        self._token = token
        self._folder = tempfile.TemporaryDirectory()
        tls: dict[str, str] = {}
        if setup.tls:
            made = Certificates(Path(self._folder.name))
            self.ports, tls = [TlsPort.of(port, made.client()) for port in self.ports], made.settings
        self._commands = {port: command_for(setup, tools, port, tls, Path(self._folder.name)) for port in self.ports}
        self._kept = setup.other_affinity and setup.service != OURS
        self._environment = kept | settings | tls
        self._environment |= {"WORKERS": str(setup.processes)} if setup.service == EXPRESS else {}
        self._environment |= {
            "METRICS_PORT": "0",
            "ACCESS_LOG": str(setup.access_log).lower(),
            "CPU_AFFINITY": "off" if setup.other_affinity else "auto",
            "NODE_ENV": "production",
        }
        # A file rather than a pipe: nobody has to read along, which would cost the processor that is measured.
        self._log = tempfile.TemporaryFile(mode="ab+")  # noqa: SIM115  # open as long as the processes are
        self._started: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Self:
        """Start it and wait for its first profiles.

        Raises:
            RunError: it ended, or did not become ready in time.
        """
        started = time.monotonic()
        try:
            for port, command in self._commands.items():
                self._start(port, command)
            while not all(map(self._answers, self._commands)):
                if any(process.poll() is not None for process in self._started):
                    raise RunError(f"it ended at once: {self.last_words()}")
                if time.monotonic() - started > START_SECONDS:
                    raise RunError(f"it was not ready within {START_SECONDS:.0f} s: {self.last_words()}")
                time.sleep(POLL_SECONDS)
        except BaseException:
            self.__exit__()
            raise
        self.startup_ms = (time.monotonic() - started) * 1000
        return self

    def __exit__(self, *error: object) -> None:
        """Stop it."""
        for process in self._started:
            process.send_signal(signal.SIGTERM)
        for process in self._started:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(STOP_SECONDS)
            with contextlib.suppress(ProcessLookupError):  # the group: its own processes that are left
                os.killpg(process.pid, signal.SIGKILL)
            process.wait(STOP_SECONDS)
        self._log.close()
        self._folder.cleanup()

    def _start(self, port: int, command: list[str]) -> None:
        process = subprocess.Popen(  # noqa: S603  # this Python, Node.js or an installed uvicorn
            command,
            cwd=ROOT,
            env=self._environment | {"SERVICE_PORT": str(port)},
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=keep_to_one_processor if self._kept else None,  # noqa: PLW1509  # this process has one thread
        )
        self._started.append(process)

    def _answers(self, port: int) -> bool:
        headers = {"Authorization": f"Bearer {self._token}"}
        try:
            return ask(port, "/api/v1/id/1", headers, seconds=REQUEST_SECONDS).status == http.HTTPStatus.OK
        except (OSError, http.client.HTTPException):
            return False

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
        """Return its processes: those that were started and all that descend from them."""
        found, new = [], [process.pid for process in self._started]
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


def run_wrk(tools: Tools, ports: list[int], load: Load) -> dict[str, int]:
    """Put load on a service, by a wrk for each of its processes, all at once; return what they counted.

    Raises:
        RunError: wrk failed.
    """
    with contextlib.ExitStack() as stack:
        running = []
        for number, port in enumerate(ports):
            running.append(stack.enter_context(_start_wrk(tools, port, load, len(ports), number)))
            stack.callback(running[-1].kill)  # nothing happens where it has ended
        return combined([_counted(each, load.seconds) for each in running])


def _start_wrk(tools: Tools, port: int, load: Load, share: int, number: int) -> "subprocess.Popen[str]":
    """Start the wrk of this number, with its share of the connections and a seed of its own."""
    scenario = load.scenario
    environment = os.environ | {
        "LOAD_HOST": "127.0.0.1",
        "LOAD_TARGETS": str(load.targets),
        "LOAD_TOKEN": load.token if scenario.right_token else "wrong",
        "LOAD_SEED": str(load.seed + number),
        "LOAD_CLOSE": str(scenario.new_connections).lower(),
    }
    connections = scenario.connections // share
    flags = f"-t1 -c{connections} -d{load.seconds}s --timeout {WRK_TIMEOUT_SECONDS}s -s tests/load/wrk.lua"
    return subprocess.Popen(  # noqa: S603  # wrk, with flags of numbers
        [tools.wrk, *flags.split(), f"http{'s' * isinstance(port, TlsPort)}://127.0.0.1:{port}"],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def _counted(wrk: "subprocess.Popen[str]", seconds: int) -> dict[str, int]:
    """Wait for a wrk and return what it counted.

    Raises:
        RunError: it failed.
    """
    try:
        output, errors = wrk.communicate(timeout=seconds + WRK_GRACE_SECONDS)
    except subprocess.TimeoutExpired:
        raise RunError("wrk did not end") from None
    lines = [line for line in output.splitlines() if line.startswith("RESULT ")]
    if wrk.returncode or not lines:
        raise RunError(f"wrk failed: {(errors or output).strip()[-300:]}")
    counted: dict[str, int] = json.loads(lines[-1].removeprefix("RESULT "))
    return counted


def combined(counts: list[dict[str, int]]) -> dict[str, int]:
    """Return what several wrk counted at the same time as if it were one: sums, but the largest of the times."""
    return {name: (max if name.endswith("_us") else sum)(each[name] for each in counts) for name in counts[0]}


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
    counted = run_wrk(tools, service.ports, load)
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
