"""Schemathesis makes up requests from the OpenAPI document, valid ones and not, and holds the answers against it."""

import copy
from collections import Counter, defaultdict
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import schemathesis
from schemathesis.checks import CHECKS, load_all_checks
from schemathesis.engine import events, from_schema

import micro_svc_demo
from tests.emulator.process import EmulatorProcess
from tests.service import ServiceProcess

LOOKUP = "/api/v1/nickname/{nickname}"
VALID = ["2xx", "3xx", "401", "403", "404", "409", "412", "429", "5xx"]
EXAMPLES = 100  # an operation; what the document's examples and bounds suggest comes on top


class Run(NamedTuple):
    """What came of one run."""

    findings: list[str]
    statuses: dict[str, Counter[int]]  # by operation


def fits_a_key(_context: Any, parameters: dict[str, Any] | None) -> bool:
    """Leave out ids that only a schema that counts bytes could refuse: JSON Schema counts characters."""
    given = str((parameters or {}).get("id", ""))
    return len(given) > micro_svc_demo.MAX_KEY_BYTES or len(given.encode(errors="replace")) <= 234


def run(document: dict[str, Any], port: int, token: str) -> Run:
    """Run all phases but the stateful one, with every check and both kinds of data."""
    config = schemathesis.Config.from_dict(
        {
            "seed": 1,  # not each finds an id that no profile has
            "base-url": f"http://127.0.0.1:{port}",
            "request-timeout": 60,
            "headers": {"Authorization": f"Bearer {token}"},
            "generation": {"mode": "all", "max-examples": EXAMPLES, "database": "none"},
            # what Schemathesis takes by itself, and 412: a condition that is not met is no malformed one
            "checks": {"positive_data_acceptance": {"expected-statuses": VALID}},
            "phases": {"stateful": {"enabled": False}},  # nothing can be changed: there are no states
        }
    )
    schema = schemathesis.openapi.from_dict(document, config=config)
    schema.hook("filter_path_parameters")(fits_a_key)
    findings, statuses = [], defaultdict(Counter)
    for event in from_schema(schema).execute():
        if isinstance(event, events.NonFatalError | events.FatalError):
            findings.append(str(event.__dict__))
        if not isinstance(event, events.ScenarioFinished):
            continue
        for interaction in event.recorder.interactions.values():
            if interaction.response is not None:
                statuses[event.label][interaction.response.status_code] += 1
        for check in (check for checks in event.recorder.checks.values() for check in checks if check.failure_info):
            failure = check.failure_info.failure
            findings.append(f"{check.name}: {failure.title}: {failure.message}\n{check.failure_info.code_sample}")
    return Run(findings, statuses)


@pytest.fixture
def fresh(document: dict[str, Any]) -> dict[str, Any]:
    """A copy of the document that a test may change."""
    return copy.deepcopy(document)


def test_every_check_is_on() -> None:
    """By default Schemathesis leaves none of its checks out but a limit on time, which would need one."""
    load_all_checks()
    enabled = schemathesis.Config.from_dict({}).projects.default.checks
    off = {name for name in CHECKS.get_all_names() if not enabled.get_by_name(name=name).enabled}
    assert off <= {"max_response_time"}
    assert {"not_a_server_error", "negative_data_rejection", "ignored_auth", "unsupported_method"} <= set(
        CHECKS.get_all_names()
    )


def test_nothing_is_found(service: ServiceProcess, database: EmulatorProcess, fresh: dict[str, Any]) -> None:
    """Whatever is asked, the answer is one that the document describes, and none is a 5xx."""
    del fresh["paths"]["/metrics"]
    found = run(fresh, service.port, database.token)
    assert not found.findings, "\n\n".join(found.findings[:10])
    assert set(found.statuses) >= {f"GET {path}" for path in fresh["paths"]}
    for path in fresh["paths"]:
        seen = found.statuses[f"GET {path}"]
        assert seen[200] and seen[405], f"{path}: {seen}"
        assert not path.startswith("/api/") or (seen[404] and seen[401] and seen[400]), f"{path}: {seen}"
    assert [line for line in service.lines if line["level"] == "error"] == []


def test_nothing_is_found_on_the_metrics_port(
    service: ServiceProcess, database: EmulatorProcess, fresh: dict[str, Any]
) -> None:
    fresh["paths"] = {"/metrics": fresh["paths"]["/metrics"]}
    found = run(fresh, service.metrics_port, database.token)
    assert not found.findings, "\n\n".join(found.findings[:10])
    assert found.statuses["GET /metrics"][200]


def without_404(document: dict[str, Any]) -> None:
    del document["paths"][LOOKUP]["get"]["responses"]["404"]


def another_type(document: dict[str, Any]) -> None:
    document["components"]["schemas"]["Profile"]["properties"]["record_id"] = {"type": "string"}


def wider_limit(document: dict[str, Any]) -> None:
    document["components"]["parameters"]["limit"]["schema"]["maximum"] = 2000


def narrower_limit(document: dict[str, Any]) -> None:
    document["components"]["parameters"]["limit"]["schema"]["maximum"] = 500


def another_header(document: dict[str, Any]) -> None:
    document["components"]["headers"]["Link"]["schema"]["pattern"] = "^public$"


def another_media_type(document: dict[str, Any]) -> None:
    content = document["components"]["responses"]["404"]["content"]
    content["application/json"] = content.pop("application/problem+json")


def token_for_a_probe(document: dict[str, Any]) -> None:
    document["paths"]["/healthz"]["get"]["security"] = [{"bearer": []}]


@pytest.mark.parametrize(
    ("spoil", "checks"),
    [
        (without_404, "status_code_conformance"),
        (another_type, "response_schema_conformance"),
        (wider_limit, "positive_data_acceptance"),
        (narrower_limit, "negative_data_rejection"),
        (another_header, "response_headers_conformance"),
        (another_media_type, "content_type_conformance"),
        (token_for_a_probe, "ignored_auth missing_required_header"),
    ],
)
def test_a_document_that_is_wrong_is_found_out(
    service: ServiceProcess,
    database: EmulatorProcess,
    fresh: dict[str, Any],
    spoil: Callable[[dict[str, Any]], None],
    checks: str,
) -> None:
    """The same run finds a document out that says something else than the service does."""
    fresh["paths"] = {path: fresh["paths"][path] for path in (LOOKUP, "/healthz")}
    spoil(fresh)
    assert {finding.partition(":")[0] for finding in run(fresh, service.port, database.token).findings} == set(
        checks.split()
    )
