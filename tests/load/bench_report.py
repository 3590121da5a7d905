"""What the figures say: medians and spread, the Markdown tables, and the verdict on the targets."""

import json
import statistics
from collections.abc import Callable
from typing import Any, NamedTuple

from tests.load import bench_plan
from tests.load.bench_plan import EXPRESS, FASTAPI, OURS, PLAIN, SDK_CEILING, SDK_ON_ONE_PROCESSOR, THREADING, TITLES

Part = dict[str, Any]
"""One results file: `services`, `grid` or `growth`."""
SCENARIO_TITLES = {
    "by-id": "by id",
    "missing": "missing ids",
    "wrong-token": "wrong token",
    "nickname": "by nickname",
    "picture": "raw pictures, 20 kB",
    "new-connection": "by id, a new connection each",
    "latency-1ms": "by id, database 1 ms away",
    "latency-5ms": "by id, database 5 ms away",
    "two-processes": "by id, two processes",
    "other-log": "by id, the log the other way round",
    "other-affinity": "by id, the processor affinity the other way round",
    "tls-by-id": "by id",
    "tls-new-connection": "by id, a new connection and handshake each",
}


class Figure(NamedTuple):
    """What the rounds of one measurement say about one figure."""

    median: float
    low: float
    high: float


def as_json(part: Part) -> str:
    """Return a results file: JSON with a member a line, and of lists an entry a line."""
    members = []
    for name, value in part.items():
        text = json.dumps(value, ensure_ascii=False)
        if isinstance(value, list):
            text = "[\n" + ",\n".join(f"  {json.dumps(each, ensure_ascii=False)}" for each in value) + "\n ]"
        members.append(f" {json.dumps(name)}: {text}")
    return "{\n" + ",\n".join(members) + "\n}\n"


def figure(row: dict[str, Any], name: str) -> Figure:
    """Return the median of a row's rounds, and the least and most."""
    values = [each[name] for each in row["rounds"]]
    return Figure(statistics.median(values), min(values), max(values))


class Results:
    """The services' part, to be asked for single figures."""

    def __init__(self, part: Part) -> None:
        self._rows = {(row["service"], row["scenario"]): row for row in part["measurements"] if row["rounds"]}
        self.loops = {row["loop"]: row for row in part["sdk"] if row["rounds"]}

    def row(self, service: str, scenario: str) -> dict[str, Any] | None:
        """Return the row of a scenario: of the one setup of the service that has it."""
        return self._rows.get((service, scenario))

    def get(self, service: str, scenario: str, name: str) -> float | None:
        """Return a median; None if it was not measured."""
        row = self.row(service, scenario)
        return None if row is None else figure(row, name).median

    def sdk(self, name: str) -> float | None:
        """Return the operations a second of one of the SDK's loops."""
        return figure(self.loops[name], "requests_per_second").median if name in self.loops else None

    def after_run_mb(self, service: str) -> float | None:
        """Return how much memory the service held after the last scenario of its longest life."""
        alone = (row for row in self._rows.values() if (row["service"], row["processes"]) == (service, 1))
        rows = [row for row in alone if not row["scenario"].startswith(("other-", "tls-"))]
        return figure(rows[-1], "resident_mb").median if rows else None

    def services(self) -> list[str]:
        """Return which services were measured, ours first."""
        return [service for service in TITLES if any(key[0] == service for key in self._rows)]

    def scenarios(self) -> list[str]:
        """Return which scenarios were measured."""
        return list(dict.fromkeys(scenario for _, scenario in self._rows))


# ── The verdict ───────────────────────────────────────────────────────────────────────────────────────────────────────


class Check(NamedTuple):
    """One target: what it is about, what it must be, what it is, and whether that is enough (None: not measured)."""

    what: str
    target: str
    measured: str
    met: bool | None


def ratio(over: float | None, under: float | None) -> float | None:
    """Divide, where both were measured."""
    return None if over is None or not under else over / under


def _check(what: str, target: str, value: float | None, text: Callable[[float], str], met: bool) -> Check:
    return Check(what, target, "not measured", None) if value is None else Check(what, target, text(value), met)


def _at_least(what: str, value: float | None, least: float, text: Callable[[float], str]) -> Check:
    return _check(what, f"≥ {text(least)}", value, text, value is not None and value >= least)


def _times(value: float) -> str:
    return f"{value:.2f} ×"


def _lower(what: str, ours: float | None, theirs: float | None, unit: str, digits: int) -> Check:
    if ours is None or theirs is None:
        return Check(what, "lower", "not measured", None)
    return Check(what, "lower", f"{ours:.{digits}f} against {theirs:.{digits}f} {unit}", ours < theirs)


def verdict(results: Results) -> list[Check]:
    """Compare medians with the targets.

    Our service has everything on (access log, metrics, strict parsing) unless a row says otherwise; the others write
    no log in either case, which is the stricter reading of the comparison.
    """

    def compared(
        scenario: str, service: str, mine: str | None = None, name: str = "requests_per_second"
    ) -> float | None:
        return ratio(results.get(OURS, mine or scenario, name), results.get(service, scenario, name))

    checks = []
    for service, least, least_without_log in ((EXPRESS, 4.0, 4.0), (FASTAPI, 7.0, 7.0)):
        title = TITLES[service]
        on, off = compared("by-id-32", service), compared("by-id-32", service, "other-log-32")
        checks.append(_at_least(f"requests/s by id, 32 connections, against {title}", on, least, _times))
        checks.append(_at_least(f"the same with our log off, against {title}", off, least_without_log, _times))
    ours = results.get(OURS, "by-id-32", "requests_per_second")
    for scenario, connections in (("by-id-32", "32 connections"), ("by-id-256", "256 connections")):
        share = ratio(results.get(OURS, scenario, "requests_per_second"), results.sdk(SDK_CEILING))
        what = f"share of the SDK's own rate ({SDK_CEILING}), {connections}"
        checks.append(_at_least(what, share, 1.0, lambda value: f"{value:.1%}"))
    row = results.row(OURS, "by-id-1000")
    failures = None if row is None else figure(row, "failures").high
    worst = "{:.0f} in the worst round".format
    checks.append(_check("1,000 connections, failures", "0", failures, worst, failures == 0))
    p99 = [results.get(service, "by-id-1000", "p99_ms") for service in (OURS, EXPRESS)]
    checks.append(_lower("1,000 connections, p99 against Express", p99[0], p99[1], "ms", 1))
    kept = ratio(results.get(OURS, "by-id-1000", "requests_per_second"), ours)
    checks.append(_at_least("requests/s at 1,000 connections against 32", kept, 0.9, lambda value: f"{value:.0%}"))
    for service, most, text in ((EXPRESS, 1 / 6, "1/6"), (FASTAPI, 1 / 9, "1/9")):
        value = compared("by-id-32", service, name="cpu_us")
        what, met = f"CPU a request against {TITLES[service]}", value is not None and value <= most
        checks.append(_check(what, f"≤ {text}", value, lambda value: f"1/{1 / value:.2f}", met))
    p50 = [results.get(service, "by-id-1", "p50_ms") for service in (OURS, EXPRESS)]
    checks.append(_lower("latency of a single client, p50 against Express", p50[0], p50[1], "ms", 3))
    for service in (EXPRESS, FASTAPI):
        what = f"resident memory after the run against {TITLES[service]}"
        checks.append(_lower(what, results.after_run_mb(OURS), results.after_run_mb(service), "MB", 1))
    for service, least in ((EXPRESS, 2.2), (FASTAPI, 4.5)):
        what = f"raw pictures, requests/s against {TITLES[service]}"
        checks.append(_at_least(what, compared("picture", service), least, _times))
    both = results.get(OURS, "two-processes-32", "requests_per_second")
    checks.append(_at_least("two processes, requests/s at 32 connections", both, 15_000, lambda value: f"{value:,.0f}"))
    return checks


def verdict_lines(results: Results) -> list[str]:
    """Return the verdict as a Markdown table."""
    words = {True: "met", False: "**missed**", None: "not measured"}
    lines = ["| | target | measured | |", "|---|---|---|---|"]
    return lines + [
        f"| {each.what} | {each.target} | {each.measured} | {words[each.met]} |" for each in verdict(results)
    ]


def against_lines(rounds: list[list[dict[str, Any]]]) -> list[str]:
    """Return a table of our figures divided by the other commit's: the median of the rounds' ratios, and the range.

    Only figures of the same round are compared; a scenario that either lacks in a round is left out of that round.
    """
    pairs: dict[str, list[tuple[dict[str, float], dict[str, float]]]] = {}
    for rows in rounds:
        figures = {(row["scenario"], row["other_commit"]): row["rounds"][0] for row in rows}
        for scenario in (scenario for scenario, other in figures if not other and (scenario, True) in figures):
            pairs.setdefault(scenario, []).append((figures[scenario, False], figures[scenario, True]))

    def cell(scenario: str, name: str) -> str:
        ratios = [ours[name] / other[name] for ours, other in pairs[scenario] if ours[name] and other[name]]
        return f"{statistics.median(ratios):.2f} ({min(ratios):.2f}–{max(ratios):.2f})" if ratios else "–"

    columns = {"requests/s": "requests_per_second", "CPU a request": "cpu_us", "p50": "p50_ms", "p99": "p99_ms"}
    table = [["", *columns], *([each, *(cell(each, name) for name in columns.values())] for each in pairs)]
    lines = ["".join(f"{text:20}" for text in row).rstrip() for row in table]
    for last in list(pairs)[-1:]:
        held = statistics.median(ours["resident_mb"] for ours, _ in pairs[last])
        lines.append(f"resident memory after {last}: {cell(last, 'resident_mb')}, {held:.1f} MB as it is")
    return lines


def processor_note(results: Results) -> str:
    """Return what it does for each service to be kept to one processor, or not to be."""

    def rates(service: str) -> tuple[str, str]:
        both = (results.get(service, scenario, "requests_per_second") for scenario in ("other-affinity-32", "by-id-32"))
        other, usual = (number(rate or 0.0) for rate in both)
        return other, usual

    (free, kept), express, fastapi = rates(OURS), rates(EXPRESS), rates(FASTAPI)
    one, any_processor = (number(results.sdk(name) or 0.0) for name in (SDK_ON_ONE_PROCESSOR, SDK_CEILING))
    return (
        "A process keeps to one processor, which the others leave to the kernel: without that it answers "
        f"{free} instead of {kept} requests/s by id at 32 connections, while Express kept to one answers {express[0]} "
        f"instead of {express[1]} and FastAPI {fastapi[0]} instead of {fastapi[1]}. The SDK alone, kept to one, does "
        f"{one} plain gets a second instead of {any_processor}."
    )


# ── The tables ────────────────────────────────────────────────────────────────────────────────────────────────────────


def title_of(scenario: str, connections: int) -> str:
    """Say what a scenario is, for people."""
    noun = "connection" if connections == 1 else "connections"
    return f"{SCENARIO_TITLES.get(bench_plan.group_of(scenario), scenario)}, {connections:,} {noun}"


def number(value: float) -> str:
    """Write a number with about three digits."""
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def services_table(results: Results) -> list[str]:
    """Return one line for each scenario and service, with the spread of the requests a second."""
    head = "| scenario | service | requests/s (least–most) | p50 ms | p99 ms | p99.9 ms | failures | CPU µs | MB |"
    lines = [head, "|---|---|---|---|---|---|---|---|---|"]
    for scenario in [name for name in results.scenarios() if not name.startswith("tls-")]:
        shown = ""
        for service in results.services():
            row = results.row(service, scenario)
            if row is None:
                continue
            title = title_of(scenario, row["connections"])
            rate = figure(row, "requests_per_second")
            cells = [number(figure(row, name).median) for name in ("p50_ms", "p99_ms", "p999_ms")]
            failures = figure(row, "failures").high
            lines.append(
                f"| {title if title != shown else ''} | {TITLES[service]}{_note(row)} | "
                f"{rate.median:,.0f} ({rate.low:,.0f}–{rate.high:,.0f}) | {' | '.join(cells)} | {failures:,.0f} | "
                f"{number(figure(row, 'cpu_us').median)} | {number(figure(row, 'resident_mb').median)} |"
            )
            shown = title
    return lines


def tls_table(results: Results) -> list[str]:
    """Return what each service does with TLS, and what part that is of the same without."""
    lines = ["| scenario | service | requests/s (least–most) | of plain | p50 ms | p99 ms | failures | CPU µs |"]
    lines.append("|---|---|---|---|---|---|---|---|")
    for scenario in [name for name in results.scenarios() if name.startswith("tls-")]:
        for service in results.services():
            if (row := results.row(service, scenario)) is None:
                continue
            rate = figure(row, "requests_per_second")
            part = ratio(rate.median, results.get(service, scenario.removeprefix("tls-"), "requests_per_second"))
            cells = [f"{rate.median:,.0f} ({rate.low:,.0f}–{rate.high:,.0f})", f"{part:.0%}" if part else "–"]
            cells += [number(figure(row, name).median) for name in ("p50_ms", "p99_ms")]
            cells += [f"{figure(row, 'failures').high:,.0f}", number(figure(row, "cpu_us").median)]
            lines.append(f"| {title_of(scenario, row['connections'])} | {TITLES[service]} | {' | '.join(cells)} |")
    return lines


def _note(row: dict[str, Any]) -> str:
    if row["scenario"].startswith("other-log"):
        return ", log on" if row["access_log"] else ", log off"
    if row["scenario"].startswith("other-affinity"):
        return ", on any processor" if row["service"] == OURS else ", on one processor"
    return ""


def sdk_table(results: Results) -> list[str]:
    """Return the SDK's own rates, and what part of the ceiling each service passes on."""
    lines = ["| the SDK alone | operations/s (least–most) | CPU µs |", "|---|---|---|"]
    for row in results.loops.values():
        rate = figure(row, "requests_per_second")
        spread = f"{rate.median:,.0f} ({rate.low:,.0f}–{rate.high:,.0f})"
        lines.append(f"| {row['loop']} | {spread} | {number(figure(row, 'cpu_us').median)} |")
    lines += ["", "| | share of plain gets | start-up ms | MB after the run |", "|---|---|---|---|"]
    for service in results.services():
        share = ratio(results.get(service, "by-id-32", "requests_per_second"), results.sdk(SDK_CEILING))
        startup, memory = results.get(service, "by-id-32", "startup_ms"), results.after_run_mb(service)
        cells = [f"{share:.0%}" if share else "–"] + [number(value) if value else "–" for value in (startup, memory)]
        lines.append(f"| {TITLES[service]} | {' | '.join(cells)} |")
    return lines


def grid_table(part: Part) -> list[str]:
    """Return requests/s (and p99) by document workers and batch size, a table for each latency and crowd."""
    lines: list[str] = []
    rows = [row for row in part["measurements"] if row["rounds"]]
    for latency, connections in sorted({(row["latency_ms"], row["connections"]) for row in rows}):
        cells = {
            (row["document_workers"], row["batch_size"]): row
            for row in rows
            if (row["latency_ms"], row["connections"]) == (latency, connections)
        }
        workers, sizes = (sorted({key[place] for key in cells}) for place in (0, 1))
        lines += [f"**{latency} ms away, {connections} connections: requests/s (p99 ms)**", ""]
        lines += [
            f"| workers | {' | '.join(f'batches of {size}' for size in sizes)} |",
            "|---" * (len(sizes) + 1) + "|",
        ]
        for worker in workers:
            texts = [_cell(cells.get((worker, size))) for size in sizes]
            lines.append(f"| {worker} | {' | '.join(texts)} |")
        lines.append("")
    return lines[:-1]


def _cell(row: dict[str, Any] | None) -> str:
    if row is None:
        return "–"
    return f"{figure(row, 'requests_per_second').median:,.0f} ({number(figure(row, 'p99_ms').median)})"


def growth_table(part: Part) -> list[str]:
    """Return how rate and p99 grow with connections and documents."""
    lines: list[str] = []
    for key, column in (("connections", "connections"), ("documents", "documents")):
        rows = [row for row in part[key] if row["rounds"]]
        services = [service for service in TITLES if any(row["service"] == service for row in rows)]
        found = {(row["service"], row[column]): row for row in rows}
        lines += [f"| {column} | {' | '.join(f'{TITLES[service]}: requests/s (p99 ms)' for service in services)} |"]
        lines += ["|---" * (len(services) + 1) + "|"]
        for count in sorted({row[column] for row in rows}):
            lines.append(f"| {count:,} | {' | '.join(_cell(found.get((service, count))) for service in services)} |")
        lines.append("")
    return lines[:-1]


def circumstances(part: Part) -> str:
    """Say in a sentence or two on what, with what and when it was measured."""
    machine, versions = part["machine"], part["versions"]
    listed = ", ".join(f"{name} {text}" for name, text in versions.items())
    return (
        f"Measured on {part['date']} on {machine['cores']} cores of {machine['processor']} "
        f"({machine['memory_gb']:.0f} GB, {machine['kernel']}), which service, wrk and database ({part['backend']}) "
        f"share; {part['repeat']} × {part['seconds']} s each, medians.{_quietness(part)} {listed}."
    )


def _quietness(part: Part) -> str:
    """Say how much others took from the machine, where that was measured."""
    rows = [row for key in ("measurements", "connections", "documents") for row in part.get(key, ()) if row["rounds"]]
    values = [figure(row, "other_cores").median for row in rows]
    return f" Other processes used {statistics.median(values):.2f} cores meanwhile." if values else ""


LEGEND = (
    "micro_svc_demo runs with everything on: access log, metrics, strict parsing. The others write no log. A process "
    "of micro_svc_demo keeps to one processor, by default; the others run as they come. One scenario has the "
    "logs the other way round, another the processors. CPU is the processor time of the service's own processes by "
    "request, MB their resident memory at that point; failures are of the worst round. Two processes of micro_svc_demo "
    "are two services, each on a port of its own, those of the others two workers on one port. Two wrk load them at "
    "once, each with half of the connections: their figures are added up, and of each percentile the larger one counts."
)


def document(parts: dict[str, Part]) -> str:
    """Return the whole Markdown page of the results there are."""
    lines = ["# Results", "", "Generated by `python -m tests.load` from the JSON files beside it.", ""]
    if "services" in parts:
        results = Results(parts["services"])
        lines += [circumstances(parts["services"]), "", LEGEND, "", "![requests/s and p99](services.svg)", ""]
        lines += ["## Targets", "", *verdict_lines(results), "", "## Services", "", *services_table(results), ""]
        if {PLAIN, THREADING} & set(results.services()):
            lines += [PLAIN_NOTE, ""]
        if len(table := tls_table(results)) > TABLE_HEAD:
            lines += ["## With TLS", "", *table, "", TLS_NOTE, ""]
        lines += ["## The SDK alone", "", *sdk_table(results), ""]
    if "grid" in parts:
        lines += ["## Document workers and batch size", "", circumstances(parts["grid"]), ""]
        lines += ["Our service with the log off.", "", *grid_table(parts["grid"]), ""]
    if "growth" in parts:
        lines += ["## Growth", "", circumstances(parts["growth"]), "", *growth_table(parts["growth"]), ""]
        lines += ["![growth](growth.svg)", ""]
    return "\n".join(lines)


TABLE_HEAD = 2
TLS_NOTE = (
    "Each has a certificate of the same kind (ECDSA, P-256) and its library's own choice of versions and ciphers."
)
PLAIN_NOTE = (
    "HTTPServer serves one client at a time and therefore closes after each answer (HTTP/1.0); ThreadingHTTPServer "
    "keeps connections (HTTP/1.1), a thread each."
)
