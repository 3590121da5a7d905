"""The circuit breakers, end to end: what reaches the wire, what the caller gets, what the log and /readyz say."""

import itertools
import statistics
import time

from micro_svc_demo import Breaker
from tests.chaos.clients import Load, ask_at_once, by_status, wait_until
from tests.chaos.conftest import TOKEN, WELL_SECONDS
from tests.emulator.process import EmulatorProcess
from tests.service import ServiceProcess

IDS = [f"/api/v1/id/{number}" for number in range(1, 9)]  # a batch asks once for what several want
ID, LOOKUP = IDS[0], "/api/v1/nickname/nobody"


def queries(database: EmulatorProcess) -> int:
    """Return how many queries have reached the wire."""
    return int(database.stats()["requests"]["query"])


def gets(database: EmulatorProcess) -> int:
    """Return how many gets have reached the wire."""
    return int(database.stats()["operations"].get("get", 0))


def states_since(service: ServiceProcess, mark: int, name: str) -> list[str]:
    """Return the states that the log tells of one breaker since a mark."""
    return [line["state"] for line in service.lines[mark:] if line["message"] == "breaker" and line["service"] == name]


def breakers(service: ServiceProcess) -> dict[str, str]:
    """Return what /readyz says of the breakers."""
    states: dict[str, str] = service.get("/readyz").json()["breakers"]
    return states


def test_the_breaker_of_query(database: EmulatorProcess, service: ServiceProcess) -> None:
    """Five failures open it; then only a probe after 1 s and one after 2 reach the wire; once it is well it closes."""
    mark = len(service.lines)
    database.fault("query_error", code=5000)
    before = queries(database)
    for number in range(5):
        assert breakers(service)["query"] == "closed"
        assert service.get(LOOKUP, TOKEN).status == 503
        assert queries(database) == before + number + 1
    opened = time.monotonic()
    assert breakers(service) == {"key-value": "closed", "query": "open"}
    moments: list[float] = []
    counted = before + 5
    while len(moments) < 2:
        answer = service.get(LOOKUP, TOKEN)
        assert answer.status == 503
        assert 1 <= int(answer.headers["retry-after"]) <= 4
        now = time.monotonic()
        assert now < opened + 60
        if (arrived := queries(database)) != counted:
            assert arrived == counted + 1, "more than one probe"
            counted = arrived
            moments.append(now)
        time.sleep(0.01)
    for pause, (earlier, later) in zip((1, 2), itertools.pairwise([opened, *moments]), strict=False):
        # jitter; and how long after the pause this test comes to ask, which may ask for the first probe at once
        assert 0.8 * pause - 0.1 < later - earlier < pause + 1
    assert service.get(ID, TOKEN).status == 200
    assert service.get("/readyz").status == 200
    database.clear()
    wait_until(lambda: service.get(LOOKUP, TOKEN).status == 404, "closed by the next probe")
    assert breakers(service)["query"] == "closed"
    wait_until(lambda: states_since(service, mark, "query")[-1] == "closed", "logged")
    assert states_since(service, mark, "query")[:7] == ["open", *["half-open", "open"] * 2, "half-open", "closed"]
    assert by_status(ask_at_once(service.port, [LOOKUP] * 8, TOKEN)) == {404: 8}


def test_the_breaker_of_key_value(database: EmulatorProcess, service: ServiceProcess) -> None:
    """Five time-outs open it; then documents are refused without asking, and it is not ready until it closes."""
    mark = len(service.lines)
    database.fault("latency", service="kv", ms=600_000)
    answers: list[int] = []

    def opened() -> bool:
        answers.extend(record.status for record in ask_at_once(service.port, IDS[:5], TOKEN))
        return states_since(service, mark, "key-value")[:1] == ["open"]

    wait_until(opened, "open")
    # 503: who has waited for the time-out before Couchbase was asked; and one of the five may be the background check's
    assert set(answers) <= {503, 504} and answers.count(504) >= Breaker.threshold - 1

    def refused() -> bool:
        before = gets(database)
        answer = service.get(ID, TOKEN)
        return answer.status == 503 and int(answer.headers["retry-after"]) >= 1 and gets(database) == before

    wait_until(refused, "refused without asking, but for probes")
    wait_until(lambda: service.get("/readyz").status == 503, "not ready")
    assert any("breaker" in reason for reason in service.get("/readyz").json()["reasons"])
    assert service.get(LOOKUP, TOKEN).status == 404
    database.clear()
    database.fault("drop")
    service.wait_until_ready()
    wait_until(lambda: service.get(ID, TOKEN).status == 200, "documents")
    wait_until(lambda: states_since(service, mark, "key-value")[-1] == "closed", "closed")
    states = states_since(service, mark, "key-value")
    assert all(earlier != later for earlier, later in itertools.pairwise(states))
    assert "closed" not in states[:-1]


def test_while_it_is_open_only_single_probes_reach_the_wire(database: EmulatorProcess, service: ServiceProcess) -> None:
    """Clients ask for documents as fast as they can for three seconds: a handful of gets is all that arrives."""
    database.fault("latency", service="kv", ms=600_000)
    assert 504 in by_status(ask_at_once(service.port, IDS, TOKEN))
    before = 0
    # where it was open late, all vBuckets have been looked at meanwhile: a thousand gets are on their way
    while before + 1 < (before := gets(database)):
        time.sleep(0.3)
    with Load(service.port, itertools.repeat(ID), lambda: TOKEN, clients=4) as load:
        time.sleep(3)
    assert len(load.records) > 100
    assert gets(database) - before <= 4
    assert set(by_status(load.records)) <= {503, 504}
    assert by_status(load.records).get(504, 0) <= 4


def test_a_404_is_no_failure(database: EmulatorProcess, service: ServiceProcess) -> None:
    """However many documents and matches there are not, the breakers stay closed."""
    mark = len(service.lines)
    assert by_status(ask_at_once(service.port, ["/api/v1/id/none"] * 20 + [LOOKUP] * 8, TOKEN)) == {404: 28}
    assert breakers(service) == {"key-value": "closed", "query": "closed"}
    assert states_since(service, mark, "query") == states_since(service, mark, "key-value") == []


def test_failures_must_be_in_a_row(database: EmulatorProcess, service: ServiceProcess) -> None:
    """Four failures, a success, four failures: closed."""
    mark = len(service.lines)
    for _ in range(2):
        database.fault("query_error", code=5000, count=4)
        assert [service.get(LOOKUP, TOKEN).status for _ in range(5)] == [503] * 4 + [404]
    assert states_since(service, mark, "query") == []


def test_a_failing_operation_opens_it_though_the_token_can_be_read(
    database: EmulatorProcess, service: ServiceProcess
) -> None:
    """The background check's success does not close it at once again: within two seconds it changes a few times."""
    mark = len(service.lines)
    database.fault("status", status=0x84, operation="get")
    with Load(service.port, itertools.repeat(ID), lambda: TOKEN, clients=2) as load:
        time.sleep(2)
    states = states_since(service, mark, "key-value")
    assert states[0] == "open"
    assert len(states) <= 8, states
    assert set(by_status(load.records)) == {503}


def test_a_refusal_takes_less_than_a_millisecond(database: EmulatorProcess, service: ServiceProcess) -> None:
    """By the access log's own measure, for documents and lookups; half of them, as this machine has others to serve."""
    database.fault("latency", service="kv", ms=600_000)
    database.fault("query_error", code=5000)
    ask_at_once(service.port, IDS, TOKEN)
    for _ in range(5):
        service.get(LOOKUP, TOKEN)
    for path in (ID, LOOKUP):
        mark = len(service.lines)
        for _ in range(40):
            assert service.get(path, TOKEN).status in {503, 504}
        lines: list[float] = []

        def written(mark: int = mark, lines: list[float] = lines) -> bool:
            found = [line for line in service.lines[mark:] if line["message"] == "request" and line["status"] == 503]
            lines[:] = [line["duration_ms"] for line in found]
            return len(lines) >= 30

        wait_until(written, "the lines")
        assert statistics.median(lines) < 1.0


def test_after_long_trouble_all_is_well_within_5_s(database: EmulatorProcess, service: ServiceProcess) -> None:
    """Pauses between probes have grown to 8 s: a service that is back is not left alone so long."""
    mark = len(service.lines)
    database.fault("freeze")
    both = ("key-value", "query")
    with Load(service.port, itertools.cycle([ID, LOOKUP]), lambda: TOKEN, rate=40):
        wait_until(
            lambda: all(states_since(service, mark, name).count("open") >= 4 for name in both), "three failed probes"
        )
        database.clear()
        back = time.monotonic()
        for path, status in ((ID, 200), (LOOKUP, 404)):
            wait_until(lambda path=path, status=status: service.get(path, TOKEN).status == status, path)
    assert time.monotonic() - back < WELL_SECONDS
