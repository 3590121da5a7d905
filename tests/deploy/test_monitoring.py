"""Scrape configuration, alerts and dashboard: every query parses, and names metrics and labels that exist."""

import json
import re
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import promql_parser
import pytest
import yaml

import micro_svc_demo
from tests.service import ROOT

FOLDER = ROOT / "k8s" / "monitoring"
RULES = [
    rule
    for group in yaml.safe_load((FOLDER / "prometheusrule.yaml").read_text())["spec"]["groups"]
    for rule in group["rules"]
]
DASHBOARD = json.loads((FOLDER / "dashboard.json").read_text())
QUERIES = [(rule.get("alert") or rule["record"], rule["expr"]) for rule in RULES] + [
    (panel["title"], target["expr"].replace("$__rate_interval", "5m"))
    for panel in DASHBOARD["panels"]
    for target in panel["targets"]
]
LABELS = {name: set(labels) for name, (_, _, labels) in micro_svc_demo.FAMILIES.items()}
FOUND = [item for _, _, labels in micro_svc_demo.FAMILIES.values() for item in labels.items()]
VALUES = {label: set(map(str, values)) for label, values in FOUND}


def selectors(node: Any) -> Iterator[promql_parser.VectorSelector]:
    """Yield the vector selectors of a parsed query."""
    if isinstance(node, promql_parser.VectorSelector):
        yield node
    for name in ("expr", "lhs", "rhs", "vector_selector", "param"):
        child = getattr(node, name, None)
        if child is not None and not isinstance(child, str | float | int):
            yield from selectors(child)
    for child in getattr(node, "args", None) or []:
        yield from selectors(child)


def exposed_names() -> set[str]:
    """Return the names of the samples that the service exposes."""
    text = micro_svc_demo.Metrics().render().decode()
    types = dict(re.findall(r"^# TYPE (\S+) (\S+)$", text, re.MULTILINE))
    return set(types) | {f"{name}_bucket" for name, kind in types.items() if kind == "histogram"}


@pytest.mark.parametrize(("title", "query"), QUERIES, ids=lambda value: value[:30])
def test_query_names_what_exists(title: str, query: str) -> None:
    exposed = exposed_names()
    recorded = {rule["record"] for rule in RULES if "record" in rule}
    found = list(selectors(promql_parser.parse(query)))
    assert found, query
    for selector in found:
        assert selector.name in exposed | recorded, title
        family = re.sub(r"_bucket$", "", selector.name)
        for matcher in selector.matchers.matchers:
            assert matcher.name in LABELS[family], title
            if matcher.name in {"status", "route"}:
                values = VALUES[matcher.name]
                assert any(re.fullmatch(matcher.value, value) for value in values), f"{title}: matches nothing"
    for label in re.findall(r"by \(([^)]*)\)", query):
        for name in label.split(","):
            assert name.strip() in {"le", "version"}.union(*LABELS.values()), title


def test_the_golden_signals_have_alerts() -> None:
    alerts = {rule["alert"]: rule for rule in RULES if "alert" in rule}
    used = {selector.name for rule in alerts.values() for selector in selectors(promql_parser.parse(rule["expr"]))}
    assert {"http_request_duration_seconds_bucket", "http_queue_seconds_bucket", "couchbase_ready"} <= used
    assert any(name.startswith("demopy:http_errors:ratio") for name in used)
    for rule in alerts.values():
        assert rule["for"] and rule["labels"]["severity"] in {"page", "ticket"}
        assert rule["annotations"]["summary"] and rule["annotations"]["action"]


def test_a_certificate_that_expires_is_told_a_week_before() -> None:
    """By pod; one without TLS has no such sample, and the rule none to compare."""
    [rule] = [rule for rule in RULES if rule.get("alert") == "DemopyCertificateExpires"]
    assert rule["expr"] == f"tls_certificate_expiry_seconds - time() < 7 * {timedelta(days=1) // timedelta(seconds=1)}"
    assert b"\ntls_certificate_expiry_seconds " not in micro_svc_demo.Metrics().render()


def test_burn_rates_use_a_long_and_a_short_window() -> None:
    for rule in RULES:
        if "BudgetBurns" in rule.get("alert", ""):
            windows = [selector.name for selector in selectors(promql_parser.parse(rule["expr"]))]
            assert len(set(windows)) == 2


def test_every_metric_of_requests_and_couchbase_is_on_the_dashboard() -> None:
    shown = " ".join(query for _, query in QUERIES)
    facts = {"process_max_fds", "process_start_time_seconds", "build_info"}
    for name in micro_svc_demo.FAMILIES:
        assert name in shown or name in facts, name


def test_pod_monitor_selects_the_deployments_pods_and_port() -> None:
    monitor = yaml.safe_load((FOLDER / "podmonitor.yaml").read_text())["spec"]
    template = yaml.safe_load((ROOT / "k8s" / "base" / "deployment.yaml").read_text())["spec"]["template"]
    assert monitor["selector"]["matchLabels"].items() <= template["metadata"]["labels"].items()
    [endpoint] = monitor["podMetricsEndpoints"]
    ports = {port["name"]: port["containerPort"] for port in template["spec"]["containers"][0]["ports"]}
    assert ports[endpoint["port"]] == 9090
    assert endpoint["path"] == "/metrics"
