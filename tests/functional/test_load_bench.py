"""The benchmark itself: it measures, checks answers before it does, judges honestly, and says what is missing."""

import csv
import json
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.functional.conftest import COUNT
from tests.load import __main__ as command_line
from tests.load import (
    bench_backend,
    bench_capacity,
    bench_charts,
    bench_check,
    bench_plan,
    bench_processes,
    bench_report,
)
from tests.load.bench_backend import Backend
from tests.load.bench_report import Results
from tests.service import ROOT, ServiceProcess, administrator_settings, free_port, settings_for

SCENARIOS = (
    "by-id-32,wrong-token,nickname,picture,new-connection,latency-1ms-32,two-processes-32,other-log,other-affinity"
    ",tls-by-id-32"
)
LOAD = ROOT / "tests" / "load"
JMETER_HOME = Path("/usr/share/jmeter")


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the benchmark's command line."""
    return subprocess.run(
        [sys.executable, "-m", "tests.load", *arguments],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=250,
        check=False,
    )


@pytest.mark.skipif(shutil.which("wrk") is None, reason="needs wrk (Debian's package wrk)")
def test_it_measures_our_service(tmp_path: Path) -> None:
    """One second of each scenario: every figure is there, nothing fails, and the pages and the chart are written."""
    flags = ["--services", "ours", "--only", f"{SCENARIOS},sdk", "--seconds", "1", "--repeat", "1", "--warm-up", "0"]
    done = run(*flags, "--output", str(tmp_path))
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "services.json").read_text()
    results = json.loads(text)
    assert {row["scenario"].removesuffix("-32") for row in results["measurements"]} == {
        name.removesuffix("-32") for name in SCENARIOS.split(",")
    }
    for row in results["measurements"]:
        [figures] = row["rounds"]
        assert figures["failures"] == 0, row
        positive = ("requests_per_second", "p50_ms", "p99_ms", "p999_ms", "cpu_us", "resident_mb", "startup_ms")
        assert [name for name in positive if figures[name] <= 0] == [], (row["scenario"], figures)
    memory = {row["scenario"]: row["rounds"][0]["resident_mb"] for row in results["measurements"]}
    assert memory["two-processes-32"] > 1.5 * memory["by-id-32"]
    assert all(row["rounds"][0]["requests_per_second"] > 0 for row in results["sdk"])
    assert str(Path.home()) not in text and str(ROOT) not in text and socket.gethostname() not in text
    assert "| by id, 32 connections | micro_svc_demo |" in (tmp_path / "README.md").read_text()
    assert (tmp_path / "services.svg").read_text().startswith("<?xml")
    assert "| 1,000,000 |" in (tmp_path / "CAPACITY.md").read_text()
    assert "| target | measured |" in done.stdout
    assert "] micro_svc_demo, log on, by-id-32: " in done.stderr


@pytest.mark.skipif(shutil.which("wrk") is None, reason="needs wrk (Debian's package wrk)")
def test_a_service_that_answers_otherwise_is_not_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """That is an error, of exit code 1."""
    monkeypatch.setattr(bench_check, "differences", lambda *_: ["profile 1: another body"])
    code = command_line.main(["--services", "plain", "--only", "by-id-32", "--output", str(tmp_path)])
    complaint = "HTTPServer, log off: it answers otherwise than micro_svc_demo, so it is not measured: profile 1"
    assert code == 1
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"python -m tests.load: {complaint}")
    assert json.loads((tmp_path / "services.json").read_text())["measurements"] == []


@pytest.mark.skipif(not (shutil.which("git") and shutil.which("wrk")), reason="needs git and wrk (Debian's packages)")
def test_against_another_commit_gives_ratios(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of each figure, and it is the commit's own service that runs: its other header is noticed. No file is written.

    Without a checkout, or for a name that no commit has, it is one line and exit code 2.
    """
    monkeypatch.setattr(command_line, "ROOT", tmp_path)
    monkeypatch.setattr(command_line, "RESULTS", tmp_path / "results")
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    complaint = "python -m tests.load: git has no commit 'abc' of this service here; is this a checkout?\n"
    assert (command_line.main(["--against", "abc"]), capsys.readouterr().err) == (2, complaint)
    (tmp_path / "micro_svc_demo.py").write_text((ROOT / "micro_svc_demo.py").read_text().replace("nosniff", "sniff"))
    author = ["-c", "user.name=Test", "-c", "user.email=test@example.com", "-c", "commit.gpgsign=false"]
    for command in (["init", "--quiet"], ["add", "."], [*author, "commit", "--quiet", "--message", "Test"]):
        subprocess.run(["git", *command], cwd=tmp_path, timeout=60, check=True)  # noqa: S607  # found by its name
    assert (command_line.main(["--against", "abc"]), capsys.readouterr().err) == (2, complaint)
    flags = ["--only", "by-id-1,by-id-8", "--seconds", "1", "--repeat", "2", "--warm-up", "0"]
    code = command_line.main(["--against", "HEAD", *flags])
    printed = capsys.readouterr()
    assert code == 0, printed.err
    assert "the other commit: it answers otherwise, which may cost or save time: profile 1: x-content" in printed.err
    whose = re.findall(r"micro_svc_demo, log on(, the other commit)?, by-id-1: ", printed.err)
    assert [bool(each) for each in whose] == [False, True, True, False]
    _, _, one, eight, memory = printed.out.splitlines()
    for line, name, count in ((one, "by-id-1", 4), (eight, "by-id-8", 4), (memory, "resident memory", 1)):
        ratios = re.findall(r"(\d+\.\d\d) \((\d+\.\d\d)–(\d+\.\d\d)\)", line)
        assert line.startswith(name) and len(ratios) == count, line
        assert all(0 < float(low) <= float(median) <= float(high) for median, low, high in ratios), line
    assert not (tmp_path / "results").exists()


def test_what_several_wrk_count_is_added_up() -> None:
    """But for times: of those the largest counts."""
    one = {"requests": 300, "duration_us": 1_000_000, "p99_us": 700, "timeouts": 0}
    other = {"requests": 200, "duration_us": 1_000_002, "p99_us": 400, "timeouts": 1}
    sums = {"requests": 500, "duration_us": 1_000_002, "p99_us": 700, "timeouts": 1}
    assert bench_processes.combined([one, other]) == sums


class TestCommandLine:
    @pytest.mark.parametrize(
        ("arguments", "complaint"),
        [
            (["--seconds", "0"], "must be a number from 1 to 600"),
            (["--services", "nginx"], "there is no 'nginx'"),
            (["--only", "nothing"], "there is no 'nothing'"),
            (["--only", "by-id"], "needs --output"),
            (["--quick"], "needs --output"),
            (["--quick", "--full"], "not allowed with"),
            (["--cluster", "--grid"], "need the emulator"),
            (["--no-services"], "needs --grid or --growth"),
            (["--against", "HEAD", "--grid"], "--against does not go with --grid"),
            (["--against", "HEAD", "--only", "sdk"], "--against does not measure sdk"),
            (["--unknown"], "--unknown"),
        ],
    )
    def test_bad_input_is_one_line_and_2(
        self, arguments: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        with pytest.raises(SystemExit) as ended:
            command_line.main(arguments)
        [line] = capsys.readouterr().err.splitlines()
        assert ended.value.code == 2
        assert complaint in line

    def test_a_missing_tool_is_one_line_and_2(self, tmp_path: Path) -> None:
        done = run("--quick", "--output", str(tmp_path), PATH=str(tmp_path))
        assert done.returncode == 2
        assert done.stderr == "python -m tests.load: wrk is missing: Debian has it as the package wrk\n"

    def test_no_results_is_one_line_and_2(self, tmp_path: Path) -> None:
        done = run("--verdict", "--output", str(tmp_path))
        assert (done.returncode, done.stderr) == (2, "python -m tests.load: there are no results yet\n")

    def test_every_scenario_can_be_chosen(self) -> None:
        """By its own name and by its group's."""
        for name in bench_plan.NAMES:
            if name != "sdk":
                assert bench_plan.services_plan(("ours",), (name,))


@pytest.fixture(scope="module")
def backend(database: Any) -> Iterator[Backend]:
    """The tests' database, used as a cluster of one's own would be."""
    with bench_backend.cluster(administrator_settings(database)) as backend:
        yield backend


@pytest.fixture(scope="module")
def alone(database: Any) -> Iterator[ServiceProcess]:
    """Our service, with its own defaults."""
    with ServiceProcess(settings_for(database)) as running:
        yield running


class TestCheck:
    def test_equal_answers_pass(self, backend: Backend, alone: ServiceProcess) -> None:
        reference = bench_check.answers(alone.port, backend)
        assert bench_check.differences(alone.port, backend, reference) == []

    def test_a_picture_has_the_size_that_is_measured(self, backend: Backend, alone: ServiceProcess) -> None:
        answer = alone.get("/api/v1/picture/raw/bench-7", backend.token)
        assert (answer.status, len(answer.body)) == (200, bench_plan.PICTURE_BYTES)

    def test_differences_are_found(self, backend: Backend, alone: ServiceProcess) -> None:
        """In status, body, media type, and each header."""
        reference = bench_check.answers(alone.port, backend)
        good = reference[0]
        for changed, what in [
            (good._replace(status=404), "status"),
            (good._replace(body=b"[{}]"), "another body"),
            (good._replace(headers=good.headers | {"content-type": "text/plain"}), "Content-Type"),
            (good._replace(headers=good.headers | {"cache-control": "no-store"}), "cache-control"),
            (good._replace(headers=good.headers | {"x-request-id": "other"}), "x-request-id"),
            (good._replace(headers={k: v for k, v in good.headers.items() if k != "etag"}), "etag not expected"),
        ]:
            found = bench_check.differences(alone.port, backend, [changed, *reference[1:]])
            assert any(line.startswith(f"profile 1: {what}") for line in found)

    def test_a_service_that_is_gone_differs(self, backend: Backend, alone: ServiceProcess) -> None:
        reference = bench_check.answers(alone.port, backend)
        assert len(bench_check.differences(free_port(), backend, reference)) == len(reference)


def measured(service: str, scenario: str, access_log: bool, **figures: float) -> dict[str, Any]:
    """Return a row with three rounds, of which the median is what is given."""
    base = {"requests_per_second": 1000.0, "p50_ms": 1.0, "p99_ms": 2.0, "p999_ms": 3.0, "failures": 0, "cpu_us": 50.0}
    base |= {"bytes": 600.0, "resident_mb": 60.0, "startup_ms": 300.0}
    base |= {"service_cores": 1.0, "database_cores": 0.1, "wrk_cores": 0.2, "other_cores": 0.0}
    middle = base | figures
    low = {name: value / 2 for name, value in middle.items()}
    high = {name: value * 2 for name, value in middle.items()}
    processes = 2 if scenario.startswith("two") else 1
    row = {"service": service, "scenario": scenario, "access_log": access_log, "processes": processes}
    return row | {
        "connections": int(scenario.rpartition("-")[2]) if scenario != "picture" else 32,
        "latency_ms": 0,
        "documents": 1000,
        "rounds": [high, low, middle],
    }


@pytest.fixture
def part() -> dict[str, Any]:
    """Made-up results in which our service is four times as fast as Express and costs a quarter."""
    rows = []
    for service, rate, cpu, memory in (("ours", 4000.0, 50.0, 60.0), ("express", 1000.0, 200.0, 150.0)):
        for scenario in ("by-id-1", "by-id-32", "by-id-1000", "picture", "two-processes-32", "other-log-32"):
            log = (service == "ours") != (scenario == "other-log-32")
            figures = {"requests_per_second": rate, "cpu_us": cpu, "resident_mb": memory, "p99_ms": cpu, "p50_ms": cpu}
            rows.append(measured(service, scenario, log, **figures))
    rounds = [{"requests_per_second": rate, "cpu_us": 30.0} for rate in (5000.0, 3000.0, 8000.0)]
    loop = {"loop": bench_report.SDK_CEILING, "threads": 8, "batch": 1, "rounds": rounds}
    machine = {"processor": "P", "cores": 2, "memory_gb": 8.0, "kernel": "Linux"}
    about = {"date": "2020-01-01", "backend": "the emulator", "seconds": 1, "repeat": 3, "machine": machine}
    return about | {"versions": {"wrk": "4"}, "measurements": rows, "sdk": [loop]}


class TestReport:
    def test_results_are_json_with_a_measurement_a_line(self, part: dict[str, Any]) -> None:
        text = bench_report.as_json(part)
        assert json.loads(text) == part
        rows = text.partition('"measurements": [\n')[2].partition("\n ]")[0].splitlines()
        assert [json.loads(row.removesuffix(",")) for row in rows] == part["measurements"]

    def test_median_and_spread(self, part: dict[str, Any]) -> None:
        row = Results(part).row("ours", "by-id-32")
        assert row is not None
        assert bench_report.figure(row, "requests_per_second") == (4000.0, 2000.0, 8000.0)

    def test_verdict(self, part: dict[str, Any]) -> None:
        """Met, missed and not measured, each as it is."""
        checks = {check.what: check for check in bench_report.verdict(Results(part))}
        assert checks["requests/s by id, 32 connections, against Express"][1:] == ("≥ 4.00 ×", "4.00 ×", True)
        assert checks["requests/s by id, 32 connections, against FastAPI"][2:] == ("not measured", None)
        assert checks["CPU a request against Express"].met is False
        assert checks["share of the SDK's own rate (plain gets, 8 threads), 32 connections"][2:] == ("80.0%", False)
        assert checks["two processes, requests/s at 32 connections"][2:] == ("4,000", False)
        assert checks["1,000 connections, failures"].met is True
        for row in part["measurements"]:
            row["rounds"][1]["failures"] = 1  # in one round of three: the median would hide it
        checks = {check.what: check for check in bench_report.verdict(Results(part))}
        assert checks["1,000 connections, failures"].met is False

    def test_ratios_are_of_the_same_round(self) -> None:
        """Twice, three and four times as fast in that round; a round that only one of both finished is left out."""
        rates = [(2000.0, 1000.0), (1200.0, 300.0), (30.0, 10.0), (9e9,)]
        rounds: list[list[dict[str, Any]]] = [[] for _ in rates]
        for rows, pair in zip(rounds, rates, strict=True):
            for other_commit, rate in enumerate(pair):
                row = measured("ours", "by-id-32", False, requests_per_second=rate)
                rows.append(row | {"other_commit": bool(other_commit), "rounds": row["rounds"][2:]})
        lines = bench_report.against_lines(rounds)
        assert re.split(" {2,}", lines[1]) == ["by-id-32", "3.00 (2.00–4.00)", *["1.00 (1.00–1.00)"] * 3]
        assert lines[2:] == ["resident memory after by-id-32: 1.00 (1.00–1.00), 60.0 MB as it is"]

    def test_tables_name_each_scenario_once(self, part: dict[str, Any]) -> None:
        page = bench_report.document({"services": part})
        assert page.count("| by id, 32 connections |") == 1
        assert "4,000 (2,000–8,000)" in page
        assert "on 2 cores of P" in page

    def test_tls_has_a_table_of_its_own(self, part: dict[str, Any]) -> None:
        """With the share of plain; where nothing was measured there is none."""
        assert "## With TLS" not in bench_report.document({"services": part})
        memory = Results(part).after_run_mb("ours")
        for service, rate in (("ours", 3000.0), ("express", 600.0)):
            figures = {"requests_per_second": rate, "cpu_us": 70.0, "resident_mb": 999.0, "p99_ms": 9.0, "p50_ms": 5.0}
            part["measurements"].append(measured(service, "tls-by-id-32", service == "ours", **figures))
        page = bench_report.document({"services": part})
        table = page.partition("## With TLS")[2].partition("\n## ")[0]
        assert "| by id, 32 connections | micro_svc_demo | 3,000 (1,500–6,000) | 75% | 5.00 | 9.00 | " in table
        assert "| by id, 32 connections | Express | 600 (300–1,200) | 60% |" in table
        assert page.partition("## Services")[2].partition("\n## ")[0].count("3,000 (") == 0
        assert Results(part).after_run_mb("ours") == memory

    def test_charts_are_the_same_bytes_each_time(self, part: dict[str, Any], tmp_path: Path) -> None:
        growth = {"connections": part["measurements"][:2], "documents": part["measurements"][:1]}
        for name in ("one", "two"):
            bench_charts.services_chart(part, tmp_path / f"{name}.svg")
            bench_charts.growth_chart(growth, tmp_path / f"{name}-growth.svg")
        for suffix in (".svg", "-growth.svg"):
            texts = [(tmp_path / f"{name}{suffix}").read_text() for name in ("one", "two")]
            assert texts[0] == texts[1]
            assert str(tmp_path) not in texts[0] and "<dc:date>" not in texts[0] and "/" + "usr" not in texts[0]

    def test_capacity(self, part: dict[str, Any]) -> None:
        """Of 4,000 requests/s a process and 50 µs, at most 60 % used."""
        cost = bench_capacity.cost_of(Results(part), "ours")
        assert cost is not None
        assert (cost.pods(10_000), cost.pods(100_000)) == (5, 42)
        assert cost.cores(100_000) == pytest.approx(8.33, abs=0.01)
        assert (bench_capacity.nodes_for(10_000, 600), bench_capacity.nodes_for(1_000_000, 600)) == (1, 34)
        assert bench_capacity.nodes_for(1_000_000, 60_000) == 80  # the network decides
        page = bench_capacity.document(part)
        assert "| 100,000 | 42 | 8.33 |" in page
        assert "Express takes 4.0 × the cores" in page


def run_program(command: list[str]) -> subprocess.CompletedProcess[str]:
    """Run a program to its end."""
    return subprocess.run(command, capture_output=True, text=True, timeout=250, check=False)


def jmeter(arguments: list[str]) -> subprocess.CompletedProcess[str]:
    """Run JMeter without a window; Debian 12's, which opens no plan by itself, with what it lacks."""
    program = shutil.which("jmeter")
    if program is None:
        pytest.skip("needs jmeter (Debian's packages jmeter and jmeter-http)")
    if not list((JMETER_HOME / "lib" / "ext").glob("*http*.jar")) and JMETER_HOME.exists():
        pytest.skip("needs JMeter's HTTP sampler (Debian's package jmeter-http)")
    done = run_program([program, *arguments])
    if "ForbiddenClassException" not in done.stdout + done.stderr:
        return done
    if shutil.which("javac") is None:
        pytest.skip("this jmeter can open no plan at all (its XStream refuses), and mending that needs a JDK")
    folders = [f"{JMETER_HOME}/bin/ApacheJMeter.jar", f"{JMETER_HOME}/lib/*", f"{JMETER_HOME}/lib/ext/*"]
    java = ["java", f"-Djmeter.home={JMETER_HOME}", "-cp", ":".join(folders), str(LOAD / "JMeter.java")]
    return run_program([*java, *arguments])


def test_the_jmeter_plan_runs(database: Any, tmp_path: Path) -> None:
    """For two seconds: both groups ask for what they should, at random, and every answer is 200."""
    results, properties = tmp_path / "results.csv", tmp_path / "load.properties"
    saved = "jmeter.save.saveservice."
    plan = str(LOAD / "profiles.jmx")
    with ServiceProcess(settings_for(database)) as service:
        properties.write_text(
            f"port={service.port}\ntoken={database.token}\nthreads=4\npicturethreads=1\nseconds=2\nids={COUNT}\n"
            f"{saved}output_format=csv\n{saved}print_field_names=true\n{saved}url=true\n"
        )
        done = jmeter(["-n", "-t", plan, "-q", str(properties), "-l", str(results), "-j", str(tmp_path / "jmeter.log")])
    assert done.returncode == 0 and results.exists(), done.stdout + done.stderr
    with results.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["responseCode"] for row in rows} == {"200"}
    by_label: dict[str, set[str]] = {}
    for row in rows:
        by_label.setdefault(row["label"], set()).add(row["URL"])
    assert set(by_label) == {"GET /api/v1/id/{random}", "GET /api/v1/picture/raw/{random}"}
    assert all(len(urls) > 10 for urls in by_label.values())
