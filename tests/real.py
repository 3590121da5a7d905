"""The functional tests against a real Couchbase Server, in a container: ``python -m tests.real``.

Each step gives command lines to a runner, in whose place tests put one of their own. The engine, Docker or Podman,
picks free ports; a server behind them has to tell them as its alternate address, as the SDK goes by what it tells.
"""

import argparse
import contextlib
import json
import os
import secrets
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from tests.deploy.kustomize import one, render
from tests.deploy.pod import service_roles
from tests.deploy.resources import mebibytes
from tests.functional.conftest import COUNT, TOKEN
from tests.sample_data import OneLineParser
from tests.service import ROOT

ENGINES = ("docker", "podman")
IMAGE = "couchbase:enterprise-7.6.6"
PORTS = {"mgmt": 8091, "kv": 11210, "n1ql": 8093}
"""What is asked of a server, by the names that alternate addresses have for them."""
ADMINISTRATOR = "Administrator"
RIGHTS = "tests/functional/test_rights.py"
COMMAND_SECONDS = 900.0  # `run` pulls the image
READY_SECONDS = 180.0
POLL_SECONDS = 1.0


class RealError(Exception):
    """It cannot go on; the message is one line for its user."""


class NoEngineError(RealError):
    """There is nothing that runs containers."""


Runner = Callable[[Sequence[str]], str]
"""Runs a command line and returns what it printed; raises RealError where it fails."""


def run_command(command: Sequence[str]) -> str:
    """Be the runner."""
    try:
        done = subprocess.run(  # noqa: S603 - the engine's, with what stands below
            command, capture_output=True, text=True, timeout=COMMAND_SECONDS, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise RealError(f"{command[0]}: {error}") from error
    if done.returncode:
        said = (done.stderr.strip() or done.stdout.strip()).splitlines()
        raise RealError(f"{command[0]} {command[1]} failed: {' '.join(said[-3:]) or done.returncode}")
    return done.stdout


class Plan(NamedTuple):
    """What `k8s/couchbase` asks for: names, memory in MiB, and the roles that the service's user has by its group."""

    bucket: str
    user: str
    group: str
    roles: str
    bucket_memory: int
    data_memory: int
    index_memory: int

    @classmethod
    def of_manifests(cls) -> "Plan":
        """Read it."""
        objects = render(ROOT / "k8s/couchbase")
        bucket, cluster = (one(objects, kind)["spec"] for kind in ("CouchbaseBucket", "CouchbaseCluster"))
        return cls(
            bucket["name"],
            one(objects, "CouchbaseUser")["metadata"]["name"],
            one(objects, "CouchbaseGroup")["metadata"]["name"],
            service_roles(objects),
            mebibytes(bucket["memoryQuota"]),
            mebibytes(cluster["cluster"]["dataServiceMemoryQuota"]),
            mebibytes(cluster["cluster"]["indexServiceMemoryQuota"]),
        )


@dataclass(frozen=True)
class Server:
    """A container with a Couchbase Server, and the passwords of its users."""

    run: Runner
    engine: str
    name: str = field(default_factory=lambda: f"demopy-real-{secrets.token_hex(4)}")
    # in hexadecimal: a command line would take one that begins with a dash for a flag
    password: str = field(default_factory=lambda: secrets.token_hex(16))
    service_password: str = field(default_factory=lambda: secrets.token_hex(16))

    def inside(self, *command: str) -> str:
        """Run a command in the container."""
        return self.run([self.engine, "exec", self.name, *command])

    def cli(self, verb: str, *flags: str) -> None:
        """Run Couchbase's own command line."""
        self.inside("couchbase-cli", verb, "-c", "127.0.0.1", *flags)

    def http(self, method: str, service: str, path: str, **form: str) -> str:
        """Ask one of the services as the administrator; return the body of an answer of 200."""
        fields = [word for name, value in form.items() for word in ("--data-urlencode", f"{name}={value}")]
        address = f"http://127.0.0.1:{PORTS[service]}{path}"
        user = f"{ADMINISTRATOR}:{self.password}"
        # not by --fail, which keeps the reason back
        said = self.inside("curl", "-sS", "-u", user, "-X", method, "-w", "\n%{http_code}", *fields, address)
        body, _, status = said.strip().rpartition("\n")
        if status != "200":
            raise RealError(f"{method} {path} was answered {status}: {body.strip()[:300]}")
        return body


def find_engine(run: Runner) -> str:
    """Return the first engine that answers.

    Raises:
        NoEngineError: None does.
    """
    reasons = []
    for engine in ENGINES:
        try:
            run([engine, "version"])
        except RealError as error:
            reasons.append(str(error))
        else:
            return engine
    raise NoEngineError(f"needs Docker or Podman, and neither answers ({'; '.join(reasons)})")


def start(server: Server, image: str) -> None:
    """Start the container, its ports published on free ones of this machine alone."""
    image = image if "/" in image else f"docker.io/library/{image}"  # Podman takes no short name for granted
    ports = [word for port in PORTS.values() for word in ("--publish", f"127.0.0.1::{port}")]
    server.run([server.engine, "run", "--detach", "--name", server.name, *ports, image])


def remove(server: Server) -> None:
    """Take the container down, with its volumes."""
    server.run([server.engine, "rm", "--force", "--volumes", server.name])


def published(server: Server) -> dict[str, int]:
    """Return the ports of this machine by service."""
    lines = {name: server.run([server.engine, "port", server.name, f"{port}/tcp"]) for name, port in PORTS.items()}
    return {name: int(line.splitlines()[0].rpartition(":")[2]) for name, line in lines.items()}


def wait_for(what: str, ask: Callable[[], str], seconds: float = READY_SECONDS) -> str:
    """Ask until there is an answer; there is nothing to wait on in a server that is not up."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            return ask()
        except RealError as error:
            if time.monotonic() > deadline:
                raise RealError(f"{what} was not there within {seconds:.0f} s: {error}") from error
        time.sleep(POLL_SECONDS)


def is_enterprise(server: Server) -> bool:
    """Wait for the server; tell its edition."""
    found = json.loads(wait_for("Couchbase Server", lambda: server.http("GET", "mgmt", "/pools")))
    return bool(found["isEnterprise"])


def initialise(server: Server, plan: Plan, ports: dict[str, int]) -> None:
    """Make a cluster of one node of it, reachable from this machine, with the bucket."""
    memory = ("--cluster-ramsize", str(plan.data_memory), "--cluster-index-ramsize", str(plan.index_memory))
    administrator = ("--cluster-username", ADMINISTRATOR, "--cluster-password", server.password)
    server.cli("cluster-init", "--services", "data,query,index", *administrator, *memory)
    told = {name: str(port) for name, port in ports.items()}
    server.http("PUT", "mgmt", "/node/controller/setupAlternateAddresses/external", hostname="127.0.0.1", **told)
    # as one node it can hold no replica
    bucket = ("--bucket", plan.bucket, "--bucket-type", "couchbase", "--bucket-replica", "0")
    quota = ("--bucket-ramsize", str(plan.bucket_memory))
    server.cli("bucket-create", "-u", ADMINISTRATOR, "-p", server.password, *bucket, *quota, "--wait")
    wait_for("the query service", lambda: server.http("GET", "n1ql", "/admin/ping"))


def make_user(server: Server, plan: Plan, enterprise: bool) -> None:
    """Make the service's user, who gets the roles by the group; in Community Edition the least that there is.

    The collections must be there: roles name them.
    """
    if enterprise:
        server.http("PUT", "mgmt", f"/settings/rbac/groups/{plan.group}", roles=plan.roles)
        has = {"roles": "", "groups": plan.group}
    else:
        has = {"roles": f"bucket_full_access[{plan.bucket}]"}
    server.http("PUT", "mgmt", f"/settings/rbac/users/local/{plan.user}", password=server.service_password, **has)


def settings_for_tests(server: Server, plan: Plan, ports: dict[str, int]) -> dict[str, str]:
    """Return what tells the functional tests of the cluster: with a token, that it is filled already."""
    return {
        "COUCHBASE_TEST_HOST": f"couchbase://127.0.0.1:{ports['kv']}?network=external",
        "COUCHBASE_TEST_USER": ADMINISTRATOR,
        "COUCHBASE_TEST_PASSWORD": server.password,
        "COUCHBASE_TEST_BUCKET": plan.bucket,
        "COUCHBASE_TEST_SERVICE_USER": plan.user,
        "COUCHBASE_TEST_SERVICE_PASSWORD": server.service_password,
        "COUCHBASE_TEST_TOKEN": TOKEN,
    }


def provision(settings: dict[str, str]) -> None:
    """Fill the bucket as the administrator."""
    names = ("HOST", "USER", "PASSWORD", "BUCKET")
    own = {f"COUCHBASE_{name}": settings[f"COUCHBASE_TEST_{name}"] for name in names}
    own["SAMPLE_TOKEN"] = settings["COUCHBASE_TEST_TOKEN"]
    if python(["tests.sample_data", "--profiles", str(COUNT)], own):
        raise RealError("the bucket could not be filled; the line above says why")


def python(module: Sequence[str], settings: dict[str, str]) -> int:
    """Run a module of Python's with these settings and no others of their kind; return its exit code."""
    others = {name: value for name, value in os.environ.items() if not name.startswith("COUCHBASE_")}
    command = [sys.executable, "-m", *module]
    done = subprocess.run(command, cwd=ROOT, env=others | settings, check=False)  # noqa: S603 - the interpreter itself
    return done.returncode


def say(message: str) -> None:
    """Tell the user what goes on: on stderr, as what the tests print is the result."""
    print(f"real: {message}", file=sys.stderr, flush=True)


def play(server: Server, arguments: argparse.Namespace) -> int:
    """Go through it all in a container that is to be started; return the exit code of the tests."""
    plan = Plan.of_manifests()
    say(f"starting {arguments.image} as {server.name}, by {server.engine} (which pulls it where it is not here)")
    start(server, arguments.image)
    enterprise = is_enterprise(server)
    ports = published(server)
    initialise(server, plan, ports)
    settings = settings_for_tests(server, plan, ports)
    provision(settings)
    make_user(server, plan, enterprise)
    left_out = []
    if not enterprise:
        say(f"Community Edition has neither groups nor roles by collection: {plan.user} may do all within the bucket,")
        say(f"and {RIGHTS}, which holds that user to less, is left out")
        left_out = [f"--ignore={RIGHTS}"]
    if arguments.keep:
        say("it stays; for tests of your own:")
        print("export", *(f"{name}='{value}'" for name, value in settings.items()), flush=True)
    return python(["pytest", "tests/functional", *left_out, *arguments.pytest], settings)


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    flags = OneLineParser(
        prog="real",
        description="Run the functional tests against a real Couchbase Server in a container, and take it down again.",
        epilog="What follows -- goes to pytest. The exit code is pytest's; 1 too if there is no server to be had, 2 if"
        " there is no engine.",
        allow_abbrev=False,
    )
    flags.add_argument("--image", default=IMAGE, help=f"such as couchbase:community-7.2.4; default {IMAGE}")
    flags.add_argument("--keep", action="store_true", help="leave the container, and print what points tests to it")
    flags.add_argument("pytest", nargs="*", metavar="FLAG", help=argparse.SUPPRESS)
    return flags


def main(argv: Sequence[str] | None = None, run: Runner = run_command) -> int:
    """Run the command line; return the exit code."""
    arguments = parser().parse_args(argv)
    try:
        server = Server(run, find_engine(run))
        try:
            return play(server, arguments)
        finally:
            if arguments.keep:
                say(f"to take it down: {server.engine} rm --force --volumes {server.name}")
            else:
                with contextlib.suppress(RealError):  # there is none, and why is on its way already
                    remove(server)
    except NoEngineError as error:
        say(str(error))
        return 2
    except RealError as error:
        say(str(error))
        return 1
    except KeyboardInterrupt:
        say("interrupted")
        return 130


if __name__ == "__main__":
    sys.exit(main())
