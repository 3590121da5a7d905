"""What the service counts, in the format that Prometheus reads."""

import http.client
import socket
import time
from collections import Counter

from prometheus_client.parser import text_string_to_metric_families

import micro_svc_demo
from tests.emulator.process import EmulatorProcess
from tests.service import ServiceProcess, settings_for

Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


def scrape(service: ServiceProcess) -> Samples:
    """Read the metrics as Prometheus would."""
    answer = service.get("/metrics", port=service.metrics_port)
    assert answer.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    samples = {}
    for family in text_string_to_metric_families(answer.body.decode()):
        for sample in family.samples:
            key = (sample.name, frozenset(sample.labels.items()))
            assert key not in samples, f"{key} twice"
            samples[key] = sample.value
    return samples


def scrape_with(service: ServiceProcess, requests: float, **labels: str) -> Samples:
    """Read the metrics once they have so many requests: answers are counted right after they have been sent."""
    deadline = time.monotonic() + 60
    while total(samples := scrape(service), "http_requests_total", **labels) < requests:
        assert time.monotonic() < deadline, total(samples, "http_requests_total", **labels)
    return samples


def value(samples: Samples, name: str, **labels: str) -> float:
    return samples.get((name, frozenset(labels.items())), 0.0)


def total(samples: Samples, name: str, **labels: str) -> float:
    """Sum all samples of a name that have these labels."""
    wanted = set(labels.items())
    return sum(number for (sample, has), number in samples.items() if sample == name and wanted <= has)


def test_sums_match_a_counted_load(database) -> None:
    """Every request of a known load is in the counters, histograms and operations."""
    with ServiceProcess(settings_for(database)) as service:
        service.wait_for("ready")  # the token's own look-ups are done then
        token, picture = database.token, "/api/v1/picture/raw/1"
        load = [("/api/v1/id/1", token, 200)] * 30 + [("/api/v1/id/none", token, 404)] * 10
        load += [("/api/v1/nickname/nobody", token, 404)] * 7 + [(picture, token, 200)] * 5 + [(picture, "x", 401)] * 4
        load += [("/nope", "", 404)] * 3 + [("/api/v1/username/%zz", token, 400)] * 2
        before = scrape(service)
        assert Counter(service.get(path, shown).status == status for path, shown, status in load) == {True: len(load)}
        assert service.request("POST", "/api/v1/id/1", token).status == 405
        assert service.request("BREW", "/api/v1/id/1", token).status == 405
        samples = scrape_with(
            service, total(before, "http_requests_total") + len(load) + 3
        )  # 2 of POST, BREW; 1 scrape

    def counted(name: str, **labels: str) -> float:
        return total(samples, name, **labels) - total(before, name, **labels)

    by_id, raw = "/api/v1/id/{id}", "/api/v1/picture/raw/{id}"
    assert counted("http_requests_total", route=by_id, method="GET", status="200") == 30
    assert counted("http_requests_total", route=by_id, method="GET", status="404") == 10
    assert counted("http_requests_total", route=raw, method="GET", status="200") == 5
    assert counted("http_requests_total", route="/api/v1/nickname/{nickname}", status="404") == 7
    assert counted("http_requests_total", route="other", method="GET", status="404") == 3
    assert counted("http_requests_total", method="other", status="405") == 2
    assert counted("auth_failures_total") == 4
    assert counted("couchbase_operations_total", operation="get", outcome="ok") == 35
    assert counted("couchbase_operations_total", operation="get", outcome="not_found") == 10
    assert counted("couchbase_operations_total", operation="query", outcome="ok") == 7
    assert counted("couchbase_operation_duration_seconds_count", operation="query") == 7
    for route in (by_id, raw):
        requests = total(samples, "http_requests_total", route=route)
        assert value(samples, "http_request_duration_seconds_count", route=route) == requests
        assert value(samples, "http_request_duration_seconds_bucket", route=route, le="+Inf") == requests
        assert value(samples, "http_request_duration_seconds_sum", route=route) > 0
    assert counted("http_queue_seconds_count") == total(samples, "http_requests_total") - total(
        before, "http_requests_total"
    )
    assert value(samples, "couchbase_ready") == 1
    assert value(samples, "build_info", version=micro_svc_demo.__version__) == 1
    assert value(samples, "couchbase_breaker_state", service="query") == 0
    assert value(samples, "process_resident_memory_bytes") > 10e6
    assert value(samples, "process_open_fds") > 5
    assert value(samples, "process_cpu_seconds_total") > 0
    assert abs(value(samples, "process_start_time_seconds") - time.time()) < 60


def test_names_and_units_are_prometheus_conventions(service: ServiceProcess) -> None:
    """Counters end in _total, times are seconds, sizes bytes; every family has help and type; buckets only grow."""
    text = service.get("/metrics", port=service.metrics_port).body.decode()
    families = {family.name: family for family in text_string_to_metric_families(text)}
    assert set(families) >= {name.removesuffix("_total") for name in micro_svc_demo.FAMILIES}
    for family in families.values():
        assert family.documentation
        assert family.type in {"counter", "gauge", "histogram"}
        assert "_ms" not in family.name and "milli" not in family.name
        if family.type == "histogram":
            assert family.name.endswith("_seconds")
            rows: dict[frozenset[tuple[str, str]], list[tuple[float, float]]] = {}
            for sample in family.samples:
                if sample.name.endswith("_bucket"):
                    labels = dict(sample.labels)
                    bound = float(labels.pop("le"))
                    rows.setdefault(frozenset(labels.items()), []).append((bound, sample.value))
            for buckets in rows.values():
                counts = [count for _, count in sorted(buckets)]
                assert counts == sorted(counts)
                assert len(counts) == len(micro_svc_demo.BUCKETS) + 1


def test_gauges_follow(clean_faults: EmulatorProcess) -> None:
    """In flight while requests wait for Couchbase, connections while they are open, readiness and breaker."""
    own = clean_faults
    settings = settings_for(own) | {"COUCHBASE_QUERY_TIMEOUT_MS": "300"}
    with ServiceProcess(settings) as service:
        idle = [socket.create_connection(("127.0.0.1", service.port), timeout=10) for _ in range(3)]
        deadline = time.monotonic() + 60
        while value(scrape(service), "http_connections") < 3:
            assert time.monotonic() < deadline
        own.fault("latency", ms=1500, operation="get")
        waiting = [http.client.HTTPConnection("127.0.0.1", service.port, timeout=20) for _ in range(4)]
        for connection in waiting:
            connection.request("GET", "/api/v1/id/1", headers={"Authorization": f"Bearer {own.token}"})
        while value(scrape(service), "http_requests_in_flight") < 4:
            assert time.monotonic() < deadline
        for connection in waiting:
            assert connection.getresponse().read()
            connection.close()
        own.clear()
        own.fault("freeze", service="query")
        while service.get("/api/v1/nickname/x", own.token).status != 503:
            pass
        assert value(scrape(service), "couchbase_operations_total", operation="query", outcome="timeout") == 5
        service.wait_for("breaker")
        while value(scrape(service), "couchbase_breaker_state", service="query") == 0:
            assert time.monotonic() < deadline + 20
        for stream in idle:
            stream.close()


def test_refusals_have_their_reason(service: ServiceProcess) -> None:
    rows = [(b"nonsense\r\n\r\n", "malformed"), (b"GET /" + b"x" * 17000, "too_large")]
    for raw, reason in [*rows, (b"GET / HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n\r\n", "too_large")]:
        before = scrape(service)
        with socket.create_connection(("127.0.0.1", service.port), timeout=10) as stream:
            stream.sendall(raw)
            assert stream.recv(4096).startswith(b"HTTP/1.1 4")
        counted = value(scrape(service), "http_rejected_total", reason=reason)  # counted before the answer is sent
        assert counted == value(before, "http_rejected_total", reason=reason) + 1
