"""Traces: with an OpenTelemetry SDK each request is a server span and its Couchbase operation a child."""

import sys
import time
from collections.abc import Callable
from unittest.mock import Mock

import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

import micro_svc_demo as service
from tests.service import ServiceProcess

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
UNTRACED = "nothing is traced: check the OTEL_ variables and the packages that they name"
Spans = Callable[..., list[ReadableSpan]]


def operation(name: str, target: str, outcome: str = "ok", size: int = 1) -> service.Operation:
    return service.Operation(name, target, time.monotonic(), 0.002, outcome, size)


@pytest.fixture
def spans(handle) -> Spans:
    """Answer one request and record its spans; return them, children first."""

    def spans(path: str, done: service.Operation | None = None, *fields: str, tls: object = None) -> list[ReadableSpan]:
        exporter, provider = InMemorySpanExporter(), TracerProvider()
        provider.add_span_processor(SimpleSpanProcessor(exporter))
        handler = handle(path, "Authorization: Bearer secret", *fields)
        handler.operation, handler.server.tls = done, tls
        service.record_spans(provider.get_tracer("test"), handler)
        return list(exporter.get_finished_spans())

    return spans


def test_the_scheme_is_that_of_the_port(spans: Spans) -> None:
    for tls, scheme in ((None, "http"), (object(), "https")):
        [server] = spans("/healthz", tls=tls)
        assert server.attributes is not None and server.attributes["url.scheme"] == scheme


def test_request_and_operation(spans: Spans, shelf) -> None:
    """Names, kinds and attributes of the semantic conventions; the caller's trace goes on; no id, no key."""
    shelf.documents["user_data", "user_data:MARKED"] = service.Document(b"{}", 1)
    done = operation("get_multi", "user_data", size=3)
    child, server = spans("/api/v1/id/MARKED", done, f"traceparent: 00-{TRACE}-{PARENT}-01")
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


def test_query_has_its_statement_but_no_parameter(spans: Spans, shelf) -> None:
    shelf.rows = [b"{}"]
    child, server = spans("/api/v1/nickname/MARKED?limit=7", operation("query", service.PROFILES_BY_NICKNAME))
    assert child.attributes is not None and child.attributes["db.query.text"] == service.PROFILES_BY_NICKNAME
    assert "MARKED" not in server.to_json() + child.to_json()


def test_failures_are_marked(spans: Spans, shelf) -> None:
    shelf.documents["user_data", "user_data:1"] = service.ProblemError(504, "slow")
    child, server = spans("/api/v1/id/1", operation("get", "user_data", "timeout"))
    assert (server.status.status_code, child.status.status_code) == (StatusCode.ERROR, StatusCode.ERROR)
    assert child.attributes is not None and child.attributes["error.type"] == "timeout"
    [missing] = spans("/nope")
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
    found = service.TRACEPARENT.fullmatch(traceparent)
    assert (found[1] if found else "") == expected


def test_there_is_a_tracer_where_a_provider_has_been_set(monkeypatch: pytest.MonkeyPatch) -> None:
    """As `opentelemetry-instrument` sets one; the API alone makes spans that go nowhere."""
    log = Mock()
    assert service.find_tracer(log) is None
    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(trace, "get_tracer_provider", lambda: provider)
    service.find_tracer(log).start_span("one").end()
    assert [span.name for span in exporter.get_finished_spans()] == ["one"]
    monkeypatch.delitem(sys.modules, "opentelemetry.trace")
    assert service.find_tracer(log) is None
    log.event.assert_not_called()


@pytest.mark.parametrize("variable", ["OTEL_TRACES_EXPORTER", "OTEL_PYTHON_TRACER_PROVIDER"])
def test_without_what_the_variables_name_it_serves_and_warns(variable: str) -> None:
    """What `opentelemetry-instrument` leaves behind when it finds no such exporter: its modules, and no provider."""
    couchbase = {"COUCHBASE_HOST": "couchbase://127.0.0.1:1", "COUCHBASE_USER": "u", "COUCHBASE_PASSWORD": "p"}
    process = ServiceProcess(couchbase | {variable: "nosuch"})
    failed = "import os, sys; sys.modules['opentelemetry.instrumentation'] = sys; import micro_svc_demo"
    process.command = ("-c", f"{failed}; os._exit(micro_svc_demo.main())")
    process.start()
    try:
        assert process.wait_for(UNTRACED)["level"] == "warning"
        assert process.get("/healthz").status == 200
    finally:
        assert process.stop() == 0


STUCK = """
import os, sys, time
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter
import micro_svc_demo

class Stuck(SpanExporter):
    def export(self, spans):
        print("exporting", file=sys.stderr, flush=True)
        time.sleep(60)

provider = TracerProvider()
provider.add_span_processor(BatchSpanProcessor(Stuck(), schedule_delay_millis=1))
trace.set_tracer_provider(provider)
os._exit(micro_svc_demo.main())
"""


def test_a_collector_that_does_not_answer_does_not_hold_the_end_up() -> None:
    """For more than two seconds, not for its minute; nor does a Couchbase that is not there."""
    couchbase = {"COUCHBASE_HOST": "couchbase://127.0.0.1:1", "COUCHBASE_USER": "u", "COUCHBASE_PASSWORD": "p"}
    process = ServiceProcess(couchbase)
    process.command = ("-c", STUCK)
    process.start()
    assert process.get("/healthz").status == 200
    assert process.process.stderr is not None and process.process.stderr.readline() == "exporting\n"
    started = time.monotonic()
    assert process.stop() == 0
    assert time.monotonic() - started < 15  # on a busy machine
