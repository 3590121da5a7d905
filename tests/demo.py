"""Emulator, sample data and service in one command: ``python -m tests.demo``.

Prints `curl` lines for every route, and stays until Ctrl-C or SIGTERM; nothing is left behind then. Each part is a
process of its own, started by the command line that one would use by hand. Everything that happens (a line, the end of
a process, a signal) arrives in one queue, which the main thread reads: so a signal is an event like any other.
"""

import argparse
import json
import os
import queue
import re
import shlex
import signal
import socket
import ssl
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

from tests.contract import swagger_ui
from tests.sample_data import DEFAULT_SEED, MAX_PROFILES, OneLineParser, token_text, whole_number
from tests.service import Certificates

ROOT = Path(__file__).resolve().parents[1]
START_SECONDS = 60.0  # for a process to say that it is ready
RECORDS_A_SECOND = 200  # far less than what sample_data writes: for its time-out
STOP_SECONDS = 10.0  # for a process to end before it is killed
REQUEST_SECONDS = 5.0
NOT_ENCRYPTED = "the connection to Couchbase is not encrypted"  # as it should be, within one machine
OWN_SETTINGS = ("COUCHBASE_", "SERVICE_", "EMULATOR_", "SAMPLE_")  # none of the caller's may get into the demo


class DemoError(Exception):
    """The demo cannot go on; the message is one line for its user."""


class Stopped(Exception):
    """Somebody wants the demo to end."""


class Event(NamedTuple):
    """Something that happened: a signal (`child` is None), a line of a child, or (`line` is None) its end."""

    child: "Child | None"
    line: str | None


class Events:
    """What happens, in order. `SimpleQueue.put` may be called by a signal handler at any moment."""

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self.put = self._queue.put

    def next(self, deadline: float | None = None) -> Event | None:
        """Return the next event, None at the deadline (monotonic seconds).

        Raises:
            Stopped: It was a signal.
        """
        try:
            event = self._queue.get(timeout=None if deadline is None else max(0.0, deadline - time.monotonic()))
        except queue.Empty:
            return None
        if event.child is None:
            raise Stopped
        return event


class Child:
    """A process of the demo; the end of the block is its end."""

    def __init__(self, name: str, command: Sequence[str], settings: dict[str, str], events: Events) -> None:
        """Prepare to run Python with `command`, with `settings` in the environment; its lines go to `events`."""
        self.name = name
        self._command = [sys.executable, *command]
        self._environment = {
            name: value for name, value in os.environ.items() if not name.startswith(OWN_SETTINGS)
        } | settings
        self._events = events

    def __enter__(self) -> Self:
        """Start it, in a session of its own: Ctrl-C in a terminal is for the demo, which ends the others in order."""
        self._process = subprocess.Popen(  # noqa: S603 - the interpreter itself
            self._command,
            cwd=ROOT,
            env=self._environment,
            stdin=subprocess.PIPE,  # its end tells the emulator that the demo is gone, however that came about
            stdout=subprocess.PIPE,
            start_new_session=True,
            encoding="utf-8",
            errors="replace",
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._watcher = threading.Thread(target=self._watch, daemon=True)
        self._reader.start()
        self._watcher.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Ask it to end, then make it."""
        process = self._process
        process.terminate()  # nothing happens where it has ended already
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(STOP_SECONDS)
        self._watcher.join(STOP_SECONDS)
        self._reader.join(STOP_SECONDS)
        for stream in (process.stdin, process.stdout):
            assert stream is not None
            with suppress(OSError):
                stream.close()

    def _read(self) -> None:
        """Pass its lines on."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._events.put(Event(self, line.rstrip("\n")))

    def _watch(self) -> None:
        """Pass on that it has ended, after its lines."""
        self._process.wait()
        self._reader.join()
        self._events.put(Event(self, None))

    def exit_code(self) -> int:
        """Return the exit code of a process that has ended; a signal's number is negative."""
        return self._process.wait(STOP_SECONDS)


def check_ports(arguments: argparse.Namespace) -> None:
    """Find out before anything starts whether the ports are free.

    Raises:
        DemoError: One is not.
    """
    dual = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if dual else socket.AF_INET
    with ExitStack() as held:  # both at once: they may be the same
        for flag, port in (("--port", arguments.port), ("--metrics-port", arguments.metrics_port)):
            try:
                held.enter_context(socket.create_server(("", port), family=family, dualstack_ipv6=dual))
            except OSError as error:
                reason = os.strerror(error.errno or 0)
                raise DemoError(
                    f"port {port} cannot be used: {reason}; choose another with {flag}, 0 for any"
                ) from error


class Demo:
    """The three processes and what they say."""

    def __init__(self, arguments: argparse.Namespace, events: Events) -> None:
        self._arguments = arguments
        self._events = events

    def run(self) -> None:
        """Run until somebody wants it to end.

        Raises:
            Stopped: Somebody does.
            DemoError: A part of it does not work.
        """
        with ExitStack() as stack:
            # the exits run in reverse: the service drains while its database is still there
            say(f"starting an emulated Couchbase and {self._arguments.profiles:,} profiles…")
            command = ["-m", "tests.emulator", "--empty", "--until-stdin-closes"]
            emulator = stack.enter_context(Child("emulator", command, {}, self._events))
            settings = self._settings_for(json.loads(self._line_of(emulator, bool)))
            token = self._fill(settings)
            settings["DOCS_ASSETS_URL"] = stack.enter_context(swagger_ui.served(swagger_ui.directory()))
            tls, context, flags = self._encrypted(stack)
            service = stack.enter_context(self._service(settings | tls))
            listening = json.loads(self._line_of(service, lambda line: '"listening"' in line))
            base, metrics = f"http://127.0.0.1:{listening['port']}", f"http://127.0.0.1:{listening['metrics_port']}"
            base = base.replace("http:", "https:") if tls else base
            self._line_of(service, lambda line: '"message": "ready"' in line)
            print(guide(base, metrics, token, first_profile(base, token, context), flags), flush=True)
            while True:
                self._look(None)

    def _settings_for(self, emulator: dict[str, Any]) -> dict[str, str]:
        return {
            "COUCHBASE_HOST": emulator["connection_string"],
            "COUCHBASE_USER": emulator["user"],
            "COUCHBASE_PASSWORD": emulator["password"],
            "COUCHBASE_BUCKET": emulator["bucket"],
        }

    def _encrypted(self, stack: ExitStack) -> tuple[dict[str, str], ssl.SSLContext | None, str]:
        """Make certificates if wanted; return the service's settings, and what clients need: this one, and curl."""
        if self._arguments.tls is None:
            return {}, None, ""
        folder = Path(self._arguments.tls or stack.enter_context(tempfile.TemporaryDirectory()))
        try:
            folder.mkdir(mode=0o700, exist_ok=True)
            made = Certificates(folder)
            client = made.client_file("demo")
        except OSError as error:
            raise DemoError(f"{folder} cannot be written to: {os.strerror(error.errno or 0)}") from error
        if not self._arguments.mutual:
            return made.settings, made.client(), f"--cacert {shlex.quote(str(made.ca_file))} "
        flags = f"--cacert {shlex.quote(str(made.ca_file))} --cert {shlex.quote(str(client))} "
        context = made.client()
        context.load_cert_chain(client)
        return made.settings | {"SERVICE_TLS_CLIENT_CA": str(made.ca_file)}, context, flags

    def _fill(self, settings: dict[str, str]) -> str:
        """Put the sample data in, over the wire; return the service's token."""
        profiles, seed = self._arguments.profiles, self._arguments.seed
        given = {"SAMPLE_TOKEN": self._arguments.token} if self._arguments.token else {}
        command = ["-m", "tests.sample_data", f"--profiles={profiles}", f"--seed={seed}"]
        seconds = START_SECONDS + profiles / RECORDS_A_SECOND
        with Child("sample data", command, settings | given, self._events) as filler:
            token = self._arguments.token or self._line_of(filler, bool, seconds)
            self._line_of(filler, lambda line: not line, seconds)  # its end
        return token

    def _service(self, settings: dict[str, str]) -> Child:
        arguments = self._arguments
        return Child(
            "service",
            ["micro_svc_demo.py"],
            settings
            | {
                "SERVICE_PORT": str(arguments.port),
                "METRICS_PORT": str(arguments.metrics_port),
                "SHUTDOWN_SECONDS": "5",
                "LOG_LEVEL": "info",  # its first line says which ports it has
                "ACCESS_LOG": "true" if arguments.verbose else "false",
            },
            self._events,
        )

    def _line_of(self, child: Child, wanted: Callable[[str], object], seconds: float = START_SECONDS) -> str:
        """Wait for a line of a child; what else happens meanwhile is looked at."""
        deadline = time.monotonic() + seconds
        while (event := self._look(deadline)) is not None:
            if event.child is child and wanted(event.line or ""):
                return event.line or ""
        raise DemoError(f"the {child.name} was not ready within {seconds:.0f} s")

    def _look(self, deadline: float | None) -> Event | None:
        """Wait for the next event; log lines are shown, and None is returned at the deadline.

        Raises:
            Stopped: It was a signal.
            DemoError: A process has ended that should not have.
        """
        event = self._events.next(deadline)
        if event is None or event.child is None:
            return None
        if event.line is None:
            code = event.child.exit_code()
            if event.child.name != "sample data" or code:
                raise DemoError(f"the {event.child.name} has ended (exit code {code})")
        elif event.child.name == "service":
            self._show(event.line)
        return event

    def _show(self, line: str) -> None:
        """Show a log line of the service: all of them if asked to, else what is wrong."""
        if self._arguments.verbose:
            print(line, file=sys.stderr, flush=True)
        elif re.search('"level": "(error|warning)"', line) and NOT_ENCRYPTED not in line:
            say(f"the service says: {line}")


def first_profile(base: str, token: str, context: ssl.SSLContext | None) -> dict[str, Any]:
    """Ask the service for profile 1, whose values the examples are made of.

    Raises:
        DemoError: It does not answer as it should.
    """
    request = urllib.request.Request(f"{base}/api/v1/id/1", headers={"Authorization": f"Bearer {token}"})  # noqa: S310
    try:
        with urllib.request.urlopen(request, timeout=REQUEST_SECONDS, context=context) as response:  # noqa: S310
            profile: dict[str, Any] = json.load(response)[0]
    except (OSError, ValueError, LookupError) as error:
        raise DemoError(f"the service does not answer a request for profile 1: {error}") from error
    return profile


def guide(base: str, metrics: str, token: str, profile: dict[str, Any], flags: str) -> str:
    """Return what to try: a heading and a `curl` line for each, the API's with `flags`."""
    api, bearer = f"{base}/api/v1", shlex.quote(f"Authorization: Bearer {token}")
    curl = f"curl -sS {flags}"
    nickname, user_id = (urllib.parse.quote(profile[name], safe="") for name in ("nickname", "user_id"))
    examples = [
        ("A profile by its id", f"{curl}-H {bearer} {api}/id/1"),
        ("Profiles by nickname, which several may share", f"{curl}-H {bearer} {api}/nickname/{nickname}"),
        ("Profiles by username", f"{curl}-H {bearer} {api}/username/{user_id}"),
        ("A picture's record", f"{curl}-H {bearer} {api}/picture/record/1"),
        ("The picture itself, into a file", f"{curl}-H {bearer} -o picture-1.png {api}/picture/raw/1"),
        ("Whether it is alive", f"{curl}{base}/healthz"),
        ("Whether it is ready", f"{curl}{base}/readyz"),
        ("A wrong token, which gets 401", f"{curl}-i -H 'Authorization: Bearer wrong' {api}/id/1"),
        ("Metrics for Prometheus", f"curl -sS {metrics}/metrics"),
    ]
    lines = [f"\nThe service is ready. In a browser: {base}/docs", f"Its token is {token}", ""]
    for heading, command in examples:
        lines += [f"{heading}:", f"  {command}", ""]
    return "\n".join([*lines, "Ctrl-C ends it."])


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    flags = OneLineParser(
        prog="demo",
        description="Run the service with an emulated Couchbase and sample data, until Ctrl-C.",
        allow_abbrev=False,
    )
    port = whole_number(0, 65_535)
    flags.add_argument("--profiles", type=whole_number(1, MAX_PROFILES), default=1000, metavar="N", help="default 1000")
    flags.add_argument("--port", type=port, default=8080, metavar="PORT", help="of the API; default 8080, 0 for any")
    flags.add_argument(
        "--metrics-port", type=port, default=9090, metavar="PORT", help="of /metrics; default 9090, 0 for any"
    )
    flags.add_argument(
        "--seed", type=whole_number(0, 2**31), default=DEFAULT_SEED, metavar="N", help="another, other profiles"
    )
    flags.add_argument("--token", type=token_text, metavar="T", help="the service's token; a random one by default")
    flags.add_argument(
        "--tls", nargs="?", const="", metavar="DIR", help="HTTPS; authority and certificates are made, and kept in DIR"
    )
    flags.add_argument("--mutual", action="store_true", help="with --tls: only for clients with a certificate")
    flags.add_argument("--verbose", action="store_true", help="show the service's whole log, not only what is wrong")
    return flags


def say(message: str) -> None:
    """Tell the user something that is not a result: on stderr."""
    print(f"demo: {message}", file=sys.stderr, flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code: 0 after a signal, 1 if a part fails, 2 for bad input."""
    flags = parser()
    arguments = flags.parse_args(argv)
    if arguments.mutual and arguments.tls is None:
        flags.error("--mutual needs --tls")
    events = Events()
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), lambda *_: events.put(Event(None, None)))
    try:
        check_ports(arguments)
        Demo(arguments, events).run()
    except Stopped:
        say("stopped")
    except DemoError as error:
        say(str(error))
        return 1
    except (
        BrokenPipeError
    ):  # nobody reads what it prints, `head` say; and the interpreter must not try again at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
