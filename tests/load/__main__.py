"""The benchmark: ``python -m tests.load`` measures the service beside the others, one at a time, on one database.

It writes JSON, a Markdown page, charts and CAPACITY.md; progress goes to stderr, the verdict on the targets to stdout.
"""

import argparse
import json
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from micro_svc_demo import SettingsError
from tests.load import bench, bench_capacity, bench_charts, bench_report, bench_tools
from tests.load.bench_plan import AGAINST, IN_PRODUCTION, NAMES, OURS, QUICK, TITLES
from tests.load.bench_processes import RunError
from tests.sample_data import OneLineParser, whole_number
from tests.service import ROOT

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
PARTS = ("services", "grid", "growth")
FULL = {"seconds": 5, "repeat": 5}
DEFAULT = {"seconds": 4, "repeat": 3}
QUICK_RUN = {"seconds": 1, "repeat": 1}


def several(allowed: tuple[str, ...] | list[str]) -> Callable[[str], tuple[str, ...]]:
    """Return a converter for names with commas between them."""

    def convert(text: str) -> tuple[str, ...]:
        names = tuple(dict.fromkeys(text.split(",")))
        for name in names:
            if name not in allowed:
                raise argparse.ArgumentTypeError(f"there is no {name[:60]!r}; there are {', '.join(allowed)}")
        return names

    return convert


def parser() -> OneLineParser:
    """Return the parser of the command line."""
    flags = OneLineParser(
        prog="python -m tests.load",
        description="Measure the service beside the same service on Express, FastAPI and plain Python.",
        epilog="The default run takes about 20 minutes, --full an hour, --quick under two minutes; the peers are "
        "installed first, outside the checkout. Exit code 1: a service failed or answered otherwise than ours. "
        "2: bad input, or a tool is missing.",
        allow_abbrev=False,
    )
    size = flags.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="1 s each, once, the most telling scenarios, three services")
    size.add_argument("--full", action="store_true", help="5 s each, five times, and --grid and --growth")
    flags.add_argument(
        "--services", type=several(list(TITLES)), metavar="NAME,...", help=f"which of {', '.join(TITLES)}; default: all"
    )
    flags.add_argument(
        "--only", type=several(NAMES), metavar="NAME,...", help=f"which scenarios; default: all of {', '.join(NAMES)}"
    )
    flags.add_argument("--seconds", type=whole_number(1, 600), metavar="N", help="how long each measurement takes")
    flags.add_argument("--repeat", type=whole_number(1, 100), metavar="N", help="how many rounds")
    flags.add_argument(
        "--warm-up",
        type=whole_number(0, 600),
        default=1,
        metavar="N",
        help="seconds of load before measuring; default 1",
    )
    flags.add_argument("--grid", action="store_true", help="also document workers x batch sizes, by database latency")
    flags.add_argument(
        "--growth", action="store_true", help="also 10 to 5,000 connections, 1,000 to 1,000,000 documents"
    )
    flags.add_argument(
        "--no-services", action="store_true", help="leave the comparison out: only --grid or --growth is measured"
    )
    flags.add_argument(
        "--against",
        metavar="COMMIT",
        help="measure our service as another commit has it in turns with the present one, five rounds of 5 s each, "
        "and print the ratios; goes with --only, --seconds, --repeat and --warm-up",
    )
    flags.add_argument(
        "--cluster",
        action="store_true",
        help="use the cluster that the service's COUCHBASE_* settings name instead of the emulator; it must have the "
        "sample data; latency, grid and growth are left out",
    )
    flags.add_argument(
        "--output", type=Path, metavar="DIR", help="where the results go; needed for a part of a run. Default: results"
    )
    flags.add_argument(
        "--tools", type=Path, metavar="DIR", help="where the peers are installed; default: a folder in ~/.cache"
    )
    flags.add_argument(
        "--report", action="store_true", help="measure nothing: write page, charts and CAPACITY.md from the JSON again"
    )
    flags.add_argument("--verdict", action="store_true", help="measure nothing: print the verdict on the JSON there is")
    return flags


def choices_from(flags: OneLineParser, given: argparse.Namespace) -> tuple[list[str], bench.Choices]:
    """Return the parts to run and how, having refused what does not go together."""
    if given.against is not None:
        allowed = ("against", "only", "seconds", "repeat", "warm_up")
        for name, value in vars(given).items():
            if name not in allowed and value != flags.get_default(name):
                flags.error(f"--against does not go with --{name.replace('_', '-')}")
        if "sdk" in (given.only or ()):
            flags.error("--against does not measure sdk, which is the same for both")
    partial = (given.quick or given.services or given.only) and given.against is None
    parts = [] if given.no_services else ["services"]
    parts += ["grid"] if given.grid or given.full else []
    parts += ["growth"] if given.growth or given.full else []
    if not parts:
        flags.error("--no-services needs --grid or --growth")
    if given.no_services and (given.full or given.only):
        flags.error("--no-services goes with neither --full nor --only")
    if given.cluster and len(parts) > 1 - given.no_services:
        flags.error("--cluster goes with neither --grid nor --growth nor --full, which need the emulator")
    if (partial or given.cluster) and given.output is None and not (given.report or given.verdict):
        flags.error(
            "a part of a run, or one on a cluster, needs --output DIR: results would replace those of a whole run"
        )
    preset = FULL if given.full or given.against is not None else QUICK_RUN if given.quick else DEFAULT
    services = given.services or (IN_PRODUCTION if given.quick else tuple(TITLES))
    only = given.only or (QUICK if given.quick else ())
    if given.against is not None:
        services, only = (OURS,), given.only or AGAINST
    choices = bench.Choices(
        services=services,
        only=only,
        seconds=given.seconds or preset["seconds"],
        repeat=given.repeat or preset["repeat"],
        warm_up_seconds=given.warm_up,
        real_cluster=given.cluster,
    )
    return parts, choices


def say(line: str) -> None:
    """Print a line of progress."""
    print(line, file=sys.stderr, flush=True)


def measure(parts: list[str], choices: bench.Choices, tools: bench_tools.Tools, output: Path) -> list[str]:
    """Run the parts and write a file of JSON for each; return what went wrong."""
    total, seconds = bench.count_all(parts, choices)
    say(f"{total} measurements, about {max(1, round(seconds / 60))} min")
    run = bench.Run(tools, choices, say, total)
    measured: dict[str, Callable[[bench.Run], dict[str, Any]]] = {
        "services": bench.compare,
        "grid": bench.grid,
        "growth": bench.growth,
    }
    for part in parts:
        results = bench.description(choices, tools) | measured[part](run)
        if part != "services":
            results["repeat"] = 1
        (output / f"{part}.json").write_text(bench_report.as_json(results))
    return run.errors


def against(commit: str, choices: bench.Choices) -> list[str]:
    """Measure another commit in turns with the present one and print the ratios; return what went wrong.

    Raises:
        ToolError: git has no such commit, or a tool is missing.
    """
    tools = bench_tools.find([OURS], Path(), say)
    git = ["git", "-C", str(ROOT), "show", "--end-of-options", f"{commit}^{{commit}}:./micro_svc_demo.py"]
    if not (text := bench_tools.output_of(git)):
        raise bench_tools.ToolError(f"git has no commit {commit!r} of this service here; is this a checkout?")
    with tempfile.TemporaryDirectory(prefix="load-") as folder:
        path = Path(folder, "other_commit.py")  # a name of its own: coverage looks for the other after the tests
        path.write_text(text)
        total, seconds = bench.count_all(["services"], choices)
        say(f"{2 * total} measurements, about {max(1, round(2 * seconds / 60))} min")
        run = bench.Run(replace(tools, other_commit=path), choices, say, 2 * total)
        rounds = bench.against(run)
    print(f"the present state divided by {commit}: the median of the rounds' ratios (lowest–highest)")
    print("\n".join(bench_report.against_lines(rounds)))
    return run.errors


def load(output: Path) -> dict[str, bench_report.Part]:
    """Return the results there are.

    Raises:
        ToolError: there are none, or they can't be read.
    """
    try:
        paths = {part: output / f"{part}.json" for part in PARTS}
        found = {part: json.loads(path.read_text()) for part, path in paths.items() if path.exists()}
    except (OSError, ValueError) as error:
        raise bench_tools.ToolError(f"the results can't be read: {error}") from None
    if not found:
        raise bench_tools.ToolError("there are no results yet")
    return found


def report(parts: dict[str, bench_report.Part], output: Path) -> None:
    """Write page, charts and CAPACITY.md."""
    if "services" in parts and parts["services"]["measurements"]:
        bench_charts.services_chart(parts["services"], output / "services.svg")
        if text := bench_capacity.document(parts["services"]):
            (HERE if output == RESULTS else output).joinpath("CAPACITY.md").write_text(text)
    if "growth" in parts and parts["growth"]["connections"]:
        bench_charts.growth_chart(parts["growth"], output / "growth.svg")
    (output / "README.md").write_text(bench_report.document(parts))


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    flags = parser()
    given = flags.parse_args(argv)
    parts, choices = choices_from(flags, given)
    output: Path = (given.output or RESULTS).resolve()
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))  # thousands of connections, here and in what is started
    errors: list[str] = []
    try:
        if given.against is not None:
            errors = against(given.against, choices)
        else:
            output.mkdir(parents=True, exist_ok=True)
            if not (given.report or given.verdict):
                tools = bench_tools.find({*choices.services, OURS}, given.tools or bench_tools.default_folder(), say)
                started = time.monotonic()
                errors = measure(parts, choices, tools, output)
                say(f"done in {(time.monotonic() - started) / 60:.1f} min")
            results = load(output)
            if not given.verdict:
                report(results, output)
            if "services" in results:
                print("\n".join(bench_report.verdict_lines(bench_report.Results(results["services"]))))
    except (bench_tools.ToolError, SettingsError, OSError) as error:
        print(f"{flags.prog}: {error}", file=sys.stderr)
        return 2
    except RunError as error:
        errors.append(str(error))
    except KeyboardInterrupt:
        errors.append("interrupted")
    for line in errors:
        print(f"{flags.prog}: {line}", file=sys.stderr)
    return 1 if errors else 0


if __name__ == "__main__":
    sys.exit(main())
