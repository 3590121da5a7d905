"""The charts, as SVG: small, readable on white and dark pages, and the same bytes for the same figures."""

import re
from pathlib import Path
from typing import Any

from tests.load.bench_plan import EXPRESS, FASTAPI, OURS, PLAIN, THREADING, TITLES
from tests.load.bench_report import Part, Results, figure
from tests.load.bench_tools import ToolError

COLOURS = {OURS: "#0b6e4f", EXPRESS: "#c8553d", FASTAPI: "#3a6ea5", PLAIN: "#9a9a9a", THREADING: "#5f5f5f"}
STYLE: Any = {
    "svg.hashsalt": "micro_svc_demo",  # else the ids in the file are random
    "svg.fonttype": "none",  # text stays text, in the reader's own font
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
}
BARS = ("by-id-1", "by-id-32", "by-id-1000", "missing", "picture", "two-processes-32")
LABELS = ("1 client", "32", "1,000", "missing", "pictures", "2 proc.")


def _pyplot() -> Any:
    """Import matplotlib, without a screen.

    Raises:
        ToolError: it is not installed.
    """
    try:
        import matplotlib as mpl  # noqa: PLC0415  # only the charts need it
    except ImportError:
        raise ToolError("matplotlib is missing: pip install -r tests/requirements.txt") from None
    mpl.use("svg")
    mpl.rcParams.update(STYLE)
    from matplotlib import pyplot  # noqa: PLC0415

    return pyplot


def _save(pyplot: Any, drawing: Any, axes: Any, path: Path) -> None:
    """Name the services once, below everything, and write the drawing: an axis, a bar or a curve a line."""
    handles, labels = axes.get_legend_handles_labels()
    drawing.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False, fontsize=8)
    drawing.savefig(path, format="svg", metadata={"Date": None, "Creator": None})
    pyplot.close(drawing)
    path.write_text(re.sub(r"\s*\n(?! {0,3}<[^/])\s*", " ", path.read_text()).rstrip() + "\n")


def services_chart(part: Part, path: Path) -> None:
    """Draw requests a second and p99 of every service, by scenario; the whiskers are the least and most."""
    pyplot = _pyplot()
    results = Results(part)
    shown = [(name, label) for name, label in zip(BARS, LABELS, strict=True) if name in results.scenarios()]
    services = results.services()
    drawing, (rates, delays) = pyplot.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    width = 0.8 / max(1, len(services))
    for index, service in enumerate(services):
        rows = [(place, results.row(service, name)) for place, (name, _) in enumerate(shown)]
        for axes, name in ((rates, "requests_per_second"), (delays, "p99_ms")):
            found = [(place, figure(row, name)) for place, row in rows if row is not None]
            medians = [each.median for _, each in found]
            spread = [[each.median - each.low for _, each in found], [each.high - each.median for _, each in found]]
            places = [place + (index - (len(services) - 1) / 2) * width for place, _ in found]
            axes.bar(
                places, medians, width, yerr=spread, color=COLOURS[service], label=TITLES[service], error_kw={"lw": 0.8}
            )
    for axes, title in ((rates, "requests/s"), (delays, "p99 in ms")):
        axes.set_xticks(range(len(shown)), [label for _, label in shown])
        axes.set_title(title, loc="left")
        axes.grid(axis="y", lw=0.4)
    delays.set_yscale("log")
    _save(pyplot, drawing, rates, path)


def growth_chart(part: Part, path: Path) -> None:
    """Draw requests a second and p99 over connections and over documents."""
    pyplot = _pyplot()
    drawing, grid = pyplot.subplots(2, 2, figsize=(9, 5.4), layout="constrained")
    for axes_row, key in zip(grid, ("connections", "documents"), strict=True):
        rows = [row for row in part[key] if row["rounds"]]
        for service in TITLES:
            mine = sorted((row for row in rows if row["service"] == service), key=lambda row: row[key])
            for axes, name in zip(axes_row, ("requests_per_second", "p99_ms"), strict=True):
                values = [figure(row, name).median for row in mine]
                if mine:
                    axes.plot(
                        [row[key] for row in mine], values, "o-", ms=3, color=COLOURS[service], label=TITLES[service]
                    )
        for axes, title in zip(axes_row, ("requests/s", "p99 in ms"), strict=True):
            axes.set_xscale("log")
            axes.set_title(f"{title} by {key}", loc="left")
            axes.grid(lw=0.4)
        axes_row[0].set_ylim(bottom=0)
        axes_row[1].set_yscale("log")
        for axes in axes_row:
            axes.xaxis.set_major_formatter(lambda value, _place: f"{value:,.0f}")
    _save(pyplot, drawing, grid[0][0], path)
