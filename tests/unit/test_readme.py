"""README says what is true: its settings table, routes and commands are those of the code."""

import ast
import json
import re

import micro_svc_demo as service
from tests.load import bench_report
from tests.service import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")


def rows() -> list[str]:
    """Return the settings table as the code has it."""
    lines = []
    for has in service.ROWS:
        default = f"`{has['default']}`" if has["default"] else "none"
        default = "required" if has["default"] is service.REQUIRED else default
        flag = f"`{has['flag']}`" if has["flag"] else "–"
        lines.append(f"| `{has['env']}` | {flag} | {default} | {has['allowed']} | {has['meaning']} |")
    return lines


def test_settings_table_is_that_of_the_code() -> None:
    table = README.partition("## Settings")[2].partition("\n## ")[0]
    assert [line for line in table.splitlines() if line.startswith("| `")] == rows()


def test_routes_are_those_of_do_get() -> None:
    """Each route template and path of the dispatch chain is in README, and the other way round."""
    tree = ast.parse((ROOT / "micro_svc_demo.py").read_text(encoding="utf-8"))
    do_get = next(node for node in ast.walk(tree) if isinstance(node, ast.AsyncFunctionDef) and node.name == "do_GET")
    texts = {node.value for node in ast.walk(do_get) if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    routes = {text for text in texts if text.startswith("/") and (text.endswith("}") or text.count("/") == 1)} - {"/"}
    assert len(routes) >= 8
    assert set(re.findall(r"^- `GET (\S+)`", README, re.MULTILINE)) == routes


def test_commands_name_files_and_modules_that_exist() -> None:
    for name in set(re.findall(r"-r (\S+\.txt)", README)):
        assert (ROOT / name).is_file(), name
    for name in set(re.findall(r"python -m (tests[\w.]*)", README)):
        path = ROOT / name.replace(".", "/")
        assert path.with_suffix(".py").is_file() or (path / "__main__.py").is_file(), name


def test_the_two_commands_stand_on_one_line_each() -> None:
    commands = re.findall(r"^python3 -m venv .*$", README, re.MULTILINE)
    assert [command.rpartition(" -m ")[2] for command in commands] == ["tests.demo", "pytest"]


def test_metrics_and_alerts_are_those_that_exist() -> None:
    section = README.partition("## Operating it")[2].partition("\n## ")[0]
    named = set(re.findall(r"`([a-z]+(?:_[a-z]+)+)(?:\{([a-z,]*)\})?`", section))
    labelled = {(name, ",".join(labels)) for name, (_, _, labels) in service.FAMILIES.items()}
    rendered = set(re.findall(r"^# TYPE (\S+)", service.Metrics().render().decode(), re.MULTILINE))
    assert {name for name, _ in named} == rendered
    assert labelled <= named
    rules = (ROOT / "k8s" / "monitoring" / "prometheusrule.yaml").read_text()
    assert set(re.findall(r"`(Demopy\w+)`", section)) == set(re.findall(r"alert: (\w+)", rules))


def test_the_verdict_is_that_of_the_results() -> None:
    section = README.partition("## How fast it is")[2].partition("\n## ")[0]
    part = json.loads((ROOT / "tests" / "load" / "results" / "services.json").read_text(encoding="utf-8"))
    results = bench_report.Results(part)
    table = [line for line in section.splitlines() if line.startswith("|")]
    assert table == bench_report.verdict_lines(results)
    assert bench_report.processor_note(results) in " ".join(section.split())
