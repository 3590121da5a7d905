"""The emulator's command line: ``python -m tests.emulator --profiles 1000 --token T``."""

import argparse
import asyncio
import contextlib
import json
import os
import re
import signal
import sys
import threading
from dataclasses import fields

from tests.emulator import DEFAULT_PICTURES, Emulator, Options
from tests.emulator.engine import RELEASES
from tests.emulator.nodes import PortInUseError
from tests.emulator.tls import CERTIFICATES
from tests.emulator.users import Role
from tests.sample_data import MAX_PROFILES, OneLineParser, whole_number

try:
    from uvloop import new_event_loop
except ImportError:  # It is only faster.
    from asyncio import new_event_loop  # type: ignore[assignment]

MAX_PORT = 65_535
USAGE_ERROR = 2


def name(text: str) -> str:
    """Check a bucket's or user's name."""
    if not re.fullmatch(r"[A-Za-z0-9_.%-]{1,100}", text):
        raise argparse.ArgumentTypeError(f"must be 1 to 100 letters, digits, _ . %% or -, not {text!r}")
    return text


def roles(text: str) -> tuple[Role, ...]:
    """Check the roles of a user, which have commas between them."""
    try:
        return tuple(map(Role.parse, text.split(",")))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error).replace("%", "%%")) from None


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line; its defaults are those of `Options`."""
    port = whole_number(0, MAX_PORT)
    flags = OneLineParser(
        prog="emulator",
        description="An in-memory stand-in for Couchbase Server. Prints one line of JSON when it is ready; "
        "EMULATOR_PASSWORD in the environment is the user's password, EMULATOR_SECOND_PASSWORD the second user's; "
        "otherwise they are random.",
    )
    flags.add_argument("--host", help="the address to listen on")
    flags.add_argument("--nodes", type=int, choices=(1, 2), help="how many nodes")
    flags.add_argument("--replicas", type=int, choices=(0, 1), help="replicas of each document (needs two nodes)")
    for service in ("kv", "query", "management", "faults", "kv-tls", "query-tls", "management-tls"):
        flags.add_argument(f"--{service}-port", type=port, metavar="PORT", help="0, the default, is a free one")
    flags.add_argument("--tls", action="store_true", help="listen on TLS ports too")
    flags.add_argument("--tls-cert", choices=CERTIFICATES, help="which certificate the TLS ports show")
    flags.add_argument("--user", type=name, help="who may sign in, and do everything")
    flags.add_argument(
        "--second-user", type=name, metavar="USER", help="who else may sign in, and do what --roles says"
    )
    flags.add_argument("--roles", type=roles, metavar="ROLE,...", help="such as data_reader[bucket:scope:collection]")
    flags.add_argument("--bucket", type=name, help="the bucket's name")
    flags.add_argument("--token", help="the token of the service; random by default")
    flags.add_argument("--profiles", type=whole_number(0, MAX_PROFILES), metavar="N", help="how many sample profiles")
    flags.add_argument(
        "--pictures",
        type=whole_number(0, MAX_PROFILES),
        metavar="N",
        help=f"how many pictures; by default one a profile, up to {DEFAULT_PICTURES}",
    )
    flags.add_argument(
        "--seed", type=whole_number(0, 2**31), metavar="N", help="what the sample data is generated from"
    )
    flags.add_argument("--empty", action="store_true", help="leave the bucket without scopes and collections")
    flags.add_argument("--release", choices=RELEASES, help="which release's query service it plays")
    flags.add_argument("--until-stdin-closes", action="store_true", help="end when the standard input does")
    flags.set_defaults(**{option.name: option.default for option in fields(Options)})
    return flags


def options_from(arguments: list[str]) -> tuple[Options, bool]:
    """Return the options that the command line asks for, and whether to end with the standard input."""
    flags = parser()
    given = vars(flags.parse_args(arguments))
    until_stdin_closes = given.pop("until_stdin_closes")
    options = Options(**given)
    options.password = os.environ.get("EMULATOR_PASSWORD") or None
    options.second_password = os.environ.get("EMULATOR_SECOND_PASSWORD") or None
    if bool(options.roles) != bool(options.second_user) or options.second_user == options.user:
        flags.error("--second-user and --roles go together, and it must be another than --user")
    if options.replicas and options.nodes == 1:
        flags.error("--replicas 1 needs --nodes 2")
    if options.empty and (options.profiles or options.pictures or options.token is not None):
        flags.error("--empty goes with neither --profiles nor --pictures nor --token")
    return options, until_stdin_closes


async def serve(options: Options, until_stdin_closes: bool) -> None:
    """Run an emulator until SIGTERM, SIGINT or, if asked for, the end of the standard input."""
    emulator = Emulator(options)
    await emulator.start()
    ended = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, ended.set)
    if until_stdin_closes:
        threading.Thread(target=wait_for_stdin, args=(loop, ended), daemon=True).start()
    try:
        print(json.dumps(emulator.description()), flush=True)
        await ended.wait()
    finally:
        await emulator.stop()


def wait_for_stdin(loop: asyncio.AbstractEventLoop, ended: asyncio.Event) -> None:
    """Set `ended` when the standard input is at its end: a thread, as not every kind of file can be polled."""
    with contextlib.suppress(OSError):
        while os.read(sys.stdin.fileno(), 4096):
            pass
    with contextlib.suppress(RuntimeError):  # The loop has ended by itself.
        loop.call_soon_threadsafe(ended.set)


def main() -> int:
    """Run the command line and return its exit code."""
    options, until_stdin_closes = options_from(sys.argv[1:])
    runner = asyncio.Runner(loop_factory=new_event_loop)
    try:
        with runner, contextlib.suppress(KeyboardInterrupt, BrokenPipeError):
            runner.run(serve(options, until_stdin_closes))
    except (PortInUseError, OSError) as error:
        print(f"emulator: {error}", file=sys.stderr)
        return USAGE_ERROR
    return 0


if __name__ == "__main__":
    sys.exit(main())
