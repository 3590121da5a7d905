"""Traces: with an OpenTelemetry SDK each request is a server span and its Couchbase operation a child."""

import json
import subprocess
import sys

import pytest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

import micro_svc_demo as service
from tests.service import ROOT

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


class Store(service.Batch):
    """A store whose one operation has the outcome that the test wants."""

    def __init__(self, operation: service.Operation | None, problem: service.ProblemError | None = None) -> None:
        self.operation = None
        self._operation, self._problem = operation, problem

    def get(self, collection: str, key: str) -> service.Document:
        self.operation = self._operation
        if self._problem:
            raise self._problem
        return service.Document(b"{}", 1)

    def query(self, statement: str, parameters: dict[str, object]) -> list[bytes]:
        self.operation = self._operation
        return [b"{}"]


def spans(store: Store, path: str, *fields: str, method: str = "GET") -> list[ReadableSpan]:
    """Answer one request with a tracer that keeps its spans in memory; return them, children first."""
    settings = service.read_settings(
        ["--port", "0", "--metrics-port", "off", "--log-level", "error"],
        {"COUCHBASE_HOST": "db", "COUCHBASE_USER": "u", "COUCHBASE_PASSWORD": "p"},
    )
    log, metrics = service.Log("error"), service.Metrics(1)
    server = service.ProfileServer(settings, service.ProfileStore(settings, log, metrics), log, metrics)
    server.store.tokens.adopt("t", 0.0)
    server.tell_ready()
    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    server.tracer = provider.get_tracer("test")
    lines = [f"{method} {path} HTTP/1.1", "Host: a", "Authorization: Bearer t", *fields, "", ""]
    head = service.parse_head("\r\n".join(lines).encode())
    handler = service.ProfileHandler(head, ("192.0.2.1", 1), server, internal=False)
    handler.respond(store)
    server.server_close()
    return list(exporter.get_finished_spans())


def operation(name: str, target: str, outcome: str = "ok", size: int = 1) -> service.Operation:
    return service.Operation(name, target, service.time.monotonic(), 0.002, outcome, size)


def test_request_and_operation() -> None:
    """Names, kinds and attributes of the semantic conventions; the caller's trace goes on; no id, no key."""
    traceparent = f"traceparent: 00-{TRACE}-{PARENT}-01"
    child, server = spans(Store(operation("get_multi", "user_data", size=3)), "/api/v1/id/MARKED", traceparent)
    assert (server.name, server.kind) == ("GET /api/v1/id/{id}", SpanKind.SERVER)
    assert f"{server.context.trace_id:032x}" == TRACE
    assert server.parent is not None and f"{server.parent.span_id:016x}" == PARENT
    assert server.attributes is not None
    assert server.attributes["http.route"] == "/api/v1/id/{id}"
    assert server.attributes["http.response.status_code"] == 200
    assert (child.name, child.kind) == ("get_multi user_data", SpanKind.CLIENT)
    assert child.parent is not None and child.parent.span_id == server.context.span_id
    assert child.attributes is not None
    assert child.attributes["db.system.name"] == "couchbase"
    assert child.attributes["db.namespace"] == "sample_app.profiles"
    assert child.attributes["db.collection.name"] == "user_data"
    assert child.attributes["db.operation.batch.size"] == "3"
    assert child.end_time is not None and child.start_time is not None
    assert child.end_time - child.start_time == pytest.approx(2_000_000, abs=10_000)
    assert "MARKED" not in server.to_json() + child.to_json()


def test_query_has_its_statement_but_no_parameter() -> None:
    child, server = spans(Store(operation("query", service.PROFILES_BY_NICKNAME)), "/api/v1/nickname/MARKED")
    assert child.attributes is not None and child.attributes["db.query.text"] == service.PROFILES_BY_NICKNAME
    assert "MARKED" not in server.to_json() + child.to_json()


def test_failures_are_marked() -> None:
    problem = service.ProblemError(504, "slow")
    child, server = spans(Store(operation("get", "user_data", "timeout"), problem), "/api/v1/id/1")
    assert (server.status.status_code, child.status.status_code) == (StatusCode.ERROR, StatusCode.ERROR)
    assert child.attributes is not None and child.attributes["error.type"] == "timeout"
    [missing] = spans(Store(None), "/nope")
    assert missing.status.status_code is StatusCode.UNSET
    assert missing.parent is None


@pytest.mark.parametrize(
    ("traceparent", "expected"),
    [
        (f"00-{TRACE}-{PARENT}-01", TRACE),
        (f"01-{TRACE}-{PARENT}-00-more", TRACE),
        ("", ""),
        (f"ff-{TRACE}-{PARENT}-01", ""),
        (f"00-{'0' * 32}-{PARENT}-01", ""),
        (f"00-{TRACE}-{'0' * 16}-01", ""),
        (f"00-{TRACE.upper()}-{PARENT}-01", ""),
        (f'00-{TRACE}-{PARENT}-01", "forged": "', ""),
    ],
)
def test_trace_id_of_traceparent(traceparent: str, expected: str) -> None:
    assert service.trace_id(traceparent) == expected


def test_nothing_is_traced_unless_asked_for() -> None:
    assert service.start_tracing({}) is None
    assert service.start_tracing({"OTEL_TRACES_EXPORTER": "console", "OTEL_SDK_DISABLED": "true"}) is None


def test_sdk_is_configured_by_its_own_variables() -> None:
    """In a process of its own, as the configuration is global: a console exporter prints the span as JSON."""
    program = """
import os, micro_svc_demo
tracer = micro_svc_demo.start_tracing(os.environ)
tracer.start_span("one").end()
"""
    ended = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        env={"OTEL_TRACES_EXPORTER": "console", "OTEL_METRICS_EXPORTER": "none", "OTEL_SERVICE_NAME": "demopy"},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    span = json.loads(ended.stdout)
    assert span["name"] == "one"
    assert span["resource"]["attributes"]["service.name"] == "demopy"
