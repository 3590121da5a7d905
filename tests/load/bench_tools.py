"""The tools and peers that the benchmark needs: looked for, and installed into a folder outside the checkout."""

import hashlib
import os
import re
import shutil
import subprocess
import sys
import venv
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from tests.load.bench_plan import EXPRESS, FASTAPI

PEERS = Path(__file__).resolve().parent / "peers"
INSTALL_SECONDS = 600.0
VERSION_SECONDS = 30.0
MIN_NODE = 18


class ToolError(Exception):
    """A tool is missing, or a peer can't be installed; the message is one line and says what to do."""


def default_folder() -> Path:
    """Return where the peers are installed unless ``--tools`` says otherwise."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "micro-svc-demo-load"


@dataclass(frozen=True)
class Tools:
    """Where what is needed was found; `fastapi` is the Python that has it, `express` the folder of its service."""

    wrk: str
    node: str = ""
    fastapi: Path = Path()
    express: Path = Path()
    other_commit: Path = Path()  # the service as it has it


def find(services: Iterable[str], folder: Path, say: Callable[[str], None]) -> Tools:
    """Look for what these services need, and install the peers among them that are not installed yet.

    Raises:
        ToolError: something is missing or can't be installed.
    """
    wrk = _program("wrk", "Debian has it as the package wrk")
    node, fastapi, express = "", Path(), Path()
    if EXPRESS in services:
        node = _program("node", f"Express needs Node.js {MIN_NODE} or newer; leave it out with --services")
        found = re.match(r"v(\d+)\.", output_of([node, "--version"]))
        if not found or int(found[1]) < MIN_NODE:
            raise ToolError(f"node is too old: Express needs Node.js {MIN_NODE} or newer; leave it out with --services")
        express = _install_express(folder, say)
    if FASTAPI in services:
        fastapi = _install_fastapi(folder, say)
    return Tools(wrk, node, fastapi, express)


def _program(name: str, advice: str) -> str:
    path = shutil.which(name)
    if path is None:
        raise ToolError(f"{name} is missing: {advice}")
    return path


def output_of(command: list[str]) -> str:
    """Run a program and return what it says; empty if it can't be run."""
    try:
        done = subprocess.run(  # noqa: S603  # a program found by its name, with constant flags
            command, capture_output=True, text=True, timeout=VERSION_SECONDS, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip()


def _place(folder: Path, name: str, pins: Path) -> tuple[Path, Path]:
    """Return a folder that is new whenever the pinned versions or this Python are, and its sign of completeness."""
    identity = hashlib.sha256(pins.read_bytes() + sys.version.encode()).hexdigest()[:12]
    place = folder / f"{name}-{identity}"
    return place, place / ".complete"


def _install_fastapi(folder: Path, say: Callable[[str], None]) -> Path:
    pins = PEERS / "fastapi" / "requirements.txt"
    place, complete = _place(folder, "fastapi", pins)
    python = place / "bin" / "python"
    if not complete.exists():
        say("installing FastAPI and uvicorn")
        _empty(place)
        venv.create(place, with_pip=True)
        flags = ["--quiet", "--disable-pip-version-check", "--no-input"]
        _run([str(python), "-m", "pip", "install", *flags, "--requirement", str(pins)], place)
        complete.touch()
    return python


def _install_express(folder: Path, say: Callable[[str], None]) -> Path:
    pins = PEERS / "express" / "package.json"
    place, complete = _place(folder, "express", pins)
    if not complete.exists():
        npm = _program("npm", "Express is installed by it; leave it out with --services")
        say("installing Express")
        _empty(place)
        shutil.copy(pins, place)
        _run([npm, "install", "--no-package-lock", "--omit=dev", "--no-audit", "--no-fund", "--loglevel=error"], place)
        complete.touch()
    shutil.copy(PEERS / "express" / "service.js", place)  # Node looks for packages beside the file itself
    return place


def _empty(place: Path) -> None:
    try:
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir(parents=True)
    except OSError as error:
        raise ToolError(f"{place} can't be written to ({error.strerror}); choose another folder with --tools") from None


def _run(command: list[str], place: Path) -> None:
    name = Path(command[0]).name
    try:
        done = subprocess.run(  # noqa: S603  # pip or npm, with constant flags
            command, cwd=place, capture_output=True, text=True, timeout=INSTALL_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        raise ToolError(f"{name} did not finish installing within {INSTALL_SECONDS:.0f} s") from None
    if done.returncode:
        lines = (done.stderr or done.stdout).strip().splitlines() or ["no message"]
        raise ToolError(f"{name} could not install what {place.name} needs: {lines[-1][:300]}")
