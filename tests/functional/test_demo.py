"""The demo, from its command line: what it prints works, and it leaves nothing behind however it ends."""

import base64
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from tests.sample_data import picture, profile
from tests.service import ROOT

PROFILES = 330  # the nickname of profile 1 comes again with 321
START_SECONDS = 60.0
STOP_SECONDS = 30.0
LAST_LINE = "Ctrl-C ends it.\n"
PARTS = {"tests.emulator", "micro_svc_demo.py"}

needs_signals = pytest.mark.skipif(os.name == "nt", reason="needs POSIX signals")


class RunningDemo:
    """The demo's process, with a directory of its own for temporary files."""

    def __init__(self, directory: Path, *arguments: str) -> None:
        self.directory = directory
        self.lines: list[str] = []
        self.children: dict[int, str] = {}
        self._errors = (directory.parent / f"{directory.name}.stderr").open("w+")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.demo", *arguments],
            cwd=ROOT,
            env=os.environ | {"TMPDIR": str(directory), "COUCHBASE_PASSWORD_FILE": "/nowhere"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
        )

    def wait_until_ready(self) -> None:
        """Read what it prints until it has printed all."""
        assert self.process.stdout is not None
        watchdog = threading.Timer(START_SECONDS, self.process.kill)
        watchdog.start()
        try:
            for line in self.process.stdout:
                self.lines.append(line)
                if line == LAST_LINE:
                    self.children = descendants(self.process.pid)
                    return
        finally:
            watchdog.cancel()
        raise AssertionError(f"it ended: {self.lines} {self.errors()}")

    def stop(self, number: int | None = None) -> int:
        """Send it a signal, if any, and return its exit code."""
        if number is not None:
            self.process.send_signal(number)
        try:
            return self.process.wait(STOP_SECONDS)
        finally:
            self.process.kill()  # nothing happens where it has ended

    def errors(self) -> str:
        """Return what it has written to stderr."""
        self._errors.seek(0)
        return self._errors.read()

    def close(self) -> None:
        """Give the files back, and end what a demo that failed its test has left behind."""
        for pid, (_, command) in processes().items():
            if self.children.get(pid) == command:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        assert self.process.stdout is not None
        self.process.stdout.close()
        self._errors.close()


@pytest.fixture
def run_demo(tmp_path: Path) -> Iterator[Any]:
    """Return what starts a demo on free ports; it has ended at the end of the test."""
    started: list[RunningDemo] = []

    def run(*arguments: str) -> RunningDemo:
        directory = tmp_path / "temporary"
        directory.mkdir()
        started.append(RunningDemo(directory, *arguments))
        return started[-1]

    yield run
    for demo in started:
        if demo.process.poll() is None:
            demo.stop(signal.SIGTERM)
        demo.close()


SMALL = ("--port=0", "--metrics-port=0", f"--profiles={PROFILES}")


def processes() -> dict[int, tuple[int, str]]:
    """Return the parent and the command line of each process that is not a zombie."""
    command = shutil.which("ps")
    if command is None:
        pytest.skip("needs ps")
    listing = subprocess.run(
        [command, "-A", "-o", "pid=,ppid=,stat=,args="], capture_output=True, text=True, check=True, timeout=60
    ).stdout
    rows = (line.split(None, 3) for line in listing.splitlines())
    return {int(row[0]): (int(row[1]), row[3]) for row in rows if not row[2].startswith("Z")}


def descendants(pid: int) -> dict[int, str]:
    """Return the command lines of the processes that a process has started, and of those that they have."""
    everything = processes()
    found: dict[int, str] = {}
    while fresh := {
        child: command
        for child, (parent, command) in everything.items()
        if parent in {pid, *found} and child not in found
    }:
        found |= fresh
    return found


def part(children: dict[int, str], name: str) -> int:
    """Return the id of the part of the demo whose command line has this."""
    [pid] = [pid for pid, command in children.items() if name in command]
    return pid


def curl_lines(demo: RunningDemo) -> dict[str, list[str]]:
    """Return the printed commands by the text above each."""
    above = dict(zip(demo.lines[1:], demo.lines, strict=False))
    return {above[line].strip(): shlex.split(line) for line in demo.lines if line.startswith("  curl ")}


def answer(command: list[str], directory: Path) -> bytes:
    """Run a printed command and return the body, or with `-i` head and body; without curl by the same request."""
    if shutil.which("curl"):
        done = subprocess.run(command, cwd=directory, capture_output=True, check=True, timeout=60)
        return (directory / command[command.index("-o") + 1]).read_bytes() if "-o" in command else done.stdout
    return without_curl(command)


def without_curl(command: list[str]) -> bytes:
    """Send the request that a printed command would."""
    import http.client  # noqa: PLC0415 - hardly ever needed
    from urllib.parse import urlsplit  # noqa: PLC0415

    address = urlsplit(command[-1])
    header = command[command.index("-H") + 1].split(": ", 1) if "-H" in command else None
    connection = http.client.HTTPConnection(str(address.hostname), address.port, timeout=60)
    try:
        connection.request("GET", address.path, headers=dict([header]) if header else {})
        response = connection.getresponse()
        head = f"HTTP/1.1 {response.status} {response.reason}\r\n".encode() if "-i" in command else b""
        return head + response.read()
    finally:
        connection.close()


@needs_signals
def test_what_is_printed_works_and_ctrl_c_ends_it(run_demo: Any, tmp_path: Path) -> None:
    """Every route's line is run as printed; the defaults' seed is the sample data's. Ctrl-C is exit code 0.

    The page comes first, and needs nothing from another machine.
    """
    demo = run_demo(*SMALL, '--token=it\'s-a-"token"')
    demo.wait_until_ready()
    answers = {heading: answer(command, tmp_path) for heading, command in curl_lines(demo).items()}
    nicknamed = [profile(number) for number in (1, 321)]
    page = re.findall(r"http://127\.0\.0\.1:[0-9]+/docs", "".join(demo.lines[:2]))
    [script] = re.findall(rb'src="(http://127\.0\.0\.1:[^"]+)"', answer(["curl", "-sS", *page], tmp_path))
    assert len(answer(["curl", "-sS", script.decode()], tmp_path)) > 100_000
    raw = answers.pop("The picture itself, into a file:")
    assert raw == base64.b64decode(picture(1)["image"])
    assert raw.startswith(b"\x89PNG")
    assert answers.pop("A wrong token, which gets 401:").startswith(b"HTTP/1.1 401 ")
    assert b"# TYPE " in answers.pop("Metrics for Prometheus:")
    assert {heading: json.loads(body) for heading, body in answers.items()} == {
        "A profile by its id:": [profile(1)],
        "Profiles by nickname, which several may share:": nicknamed,
        "Profiles by username:": [profile(1)],
        "A picture's record:": [picture(1)],
        "Whether it is alive:": {"status": "alive"},
        "Whether it is ready:": {"status": "ready", "breakers": {"key-value": "closed", "query": "closed"}},
    }
    assert demo.stop(signal.SIGINT) == 0
    assert demo.errors().splitlines() == [
        "demo: starting an emulated Couchbase and 330 profiles…",
        "sample_data: 330 profiles and pictures are in sample_app.profiles",
        "demo: stopped",
    ]


README = (ROOT / "README.md").read_text(encoding="utf-8").partition("\n## Encrypted\n")[2].partition("\n## ")[0]
COMMANDS = [line.removeprefix(".venv/bin/python -m tests.demo ") for line in README.splitlines()]
DEMOS, CURLS = ([line for line in COMMANDS if line.startswith(start)] for start in ("--tls", "curl "))


@needs_signals
@pytest.mark.skipif(not shutil.which("curl"), reason="needs curl")
@pytest.mark.parametrize(("flags", "curl"), [*zip(DEMOS, CURLS, strict=True)])
def test_readmes_commands_for_tls_work(run_demo: Any, tmp_path: Path, flags: str, curl: str) -> None:
    """As typed but for ports and folder: curl gets in with what README names, and with nothing less."""
    folder = str(tmp_path / "certificates")
    demo = run_demo(*SMALL, *flags.replace("certificates", folder).split())
    demo.wait_until_ready()
    port = re.findall(r"In a browser: https://127\.0\.0\.1:([0-9]+)/docs", "".join(demo.lines))[0]
    command = curl.replace("certificates", folder).replace("8080", port).split()
    assert json.loads(answer([*command, "-sS"], tmp_path)) == {"status": "alive"}
    for index in (index for index, word in enumerate(command) if word.startswith("--")):
        lacking = [*command[:index], *command[index + 2 :], "-sS"]
        assert subprocess.run(lacking, capture_output=True, check=False, timeout=20).returncode != 0
    printed = curl_lines(demo)
    assert json.loads(answer(printed["A profile by its id:"], tmp_path)) == [profile(1)]
    assert b"# TYPE " in answer(printed["Metrics for Prometheus:"], tmp_path)
    assert demo.stop(signal.SIGINT) == 0


def test_mutual_needs_tls(run_demo: Any) -> None:
    demo = run_demo("--mutual")
    assert (demo.stop(), demo.errors()) == (2, "demo: --mutual needs --tls\n")


@needs_signals
def test_sigterm_leaves_nothing_behind(run_demo: Any) -> None:
    """No process, no temporary file (certificates, here), and both ports free again."""
    demo = run_demo(*SMALL, "--tls")
    demo.wait_until_ready()
    children = demo.children
    assert len(children) == len(PARTS)
    assert all(any(name in command for name in PARTS) for command in children.values())
    ports = {int(port) for port in re.findall(r"https?://127\.0\.0\.1:([0-9]+)", "".join(demo.lines))}
    assert len(ports) == 2
    assert demo.stop(signal.SIGTERM) == 0
    assert not children.keys() & processes().keys()
    assert list(demo.directory.iterdir()) == []
    for port in ports:
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", port), timeout=5)


@needs_signals
def test_no_secret_is_on_a_command_line(run_demo: Any) -> None:
    """Neither the password, nor a token that nobody gave as a flag, is where every user of the machine can see it."""
    demo = run_demo(*SMALL)
    demo.wait_until_ready()
    children = demo.children
    token = next(line.removeprefix("Its token is ").strip() for line in demo.lines if line.startswith("Its token is "))
    environment = Path(f"/proc/{part(children, 'micro_svc_demo.py')}/environ")
    if not environment.exists():
        pytest.skip("needs /proc")
    settings = dict(entry.split("=", 1) for entry in environment.read_text().split("\0") if "=" in entry)
    assert len(settings["COUCHBASE_PASSWORD"]) >= 16
    assert not [
        command for command in children.values() if token in command or settings["COUCHBASE_PASSWORD"] in command
    ]


@needs_signals
def test_sigterm_while_it_starts_leaves_nothing_behind(run_demo: Any) -> None:
    """It is halfway through filling the emulator, which would take a minute."""
    demo = run_demo("--port=0", "--metrics-port=0", "--profiles=200000")
    deadline = time.monotonic() + START_SECONDS
    while not any("tests.sample_data" in command for command in descendants(demo.process.pid).values()):
        assert time.monotonic() < deadline
        time.sleep(0.05)  # there is no event for what another process starts
    demo.children = children = descendants(demo.process.pid)
    assert demo.stop(signal.SIGTERM) == 0
    assert not children.keys() & processes().keys()
    assert "Traceback" not in demo.errors()


@needs_signals
@pytest.mark.parametrize("name", sorted(PARTS))
def test_it_ends_when_a_part_dies(run_demo: Any, name: str) -> None:
    """One line says which; exit code 1; the other part is ended."""
    demo = run_demo(*SMALL)
    demo.wait_until_ready()
    children = demo.children
    os.kill(part(children, name), signal.SIGKILL)
    assert demo.stop() == 1
    title = {"tests.emulator": "emulator", "micro_svc_demo.py": "service"}[name]
    assert demo.errors().splitlines()[-1] == f"demo: the {title} has ended (exit code -9)"
    assert not children.keys() & processes().keys()


@pytest.mark.parametrize("flag", ["--port", "--metrics-port"])
def test_a_port_in_use_is_one_line(run_demo: Any, flag: str) -> None:
    """Before anything is started; it names the port and the flag."""
    family = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET
    with socket.create_server(("", 0), family=family, dualstack_ipv6=socket.has_dualstack_ipv6()) as taken:
        port = taken.getsockname()[1]
        free = {"--port": "--metrics-port", "--metrics-port": "--port"}[flag]
        demo = run_demo(f"{flag}={port}", f"{free}=0")
        assert demo.stop() == 1
    assert demo.errors() == (
        f"demo: port {port} cannot be used: Address already in use; choose another with {flag}, 0 for any\n"
    )


@pytest.mark.parametrize("arguments", [["--profiles=0"], ["--port=65536"], ["--token=two words"], ["surplus"]])
def test_bad_input_is_one_line(run_demo: Any, arguments: list[str]) -> None:
    """Exit code 2, no traceback."""
    demo = run_demo(*arguments)
    assert demo.stop() == 2
    assert re.fullmatch(r"demo: [^\n]+\n", demo.errors())
