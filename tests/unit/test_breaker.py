"""The circuit breaker: its transitions as a table, and the bounds of its pauses."""

import itertools
import random
from collections.abc import Callable

import pytest

import micro_svc_demo as service

CLOSED, HALF_OPEN, OPEN = service.Breaker.STATES
THRESHOLD = service.Breaker.threshold

FAIL, SUCCEED, ALLOWED, REFUSED = "fail", "succeed", "allowed", "refused"
OLD_FAIL, OLD_SUCCEED = "an earlier call fails", "an earlier call succeeds"  # made before the state changed last

# Each row: a name; then events as (seconds, event, the state after it). ALLOWED and REFUSED are calls of `allow`.
# The jitter draws its upper bound, so that pauses are exactly 1, 2, 4, 5, 5, … seconds.
FOUR_FAILURES = [(0.0, FAIL, CLOSED)] * (THRESHOLD - 1)
OPENED = [*FOUR_FAILURES, (0.0, FAIL, OPEN)]
TRANSITIONS: dict[str, list[tuple[float, str, str]]] = {
    "closed allows": [(0.0, ALLOWED, CLOSED), (1e6, ALLOWED, CLOSED)],
    "success leaves it closed": [(0.0, SUCCEED, CLOSED), (0.0, ALLOWED, CLOSED)],
    "four failures are not enough": [*FOUR_FAILURES, (0.0, ALLOWED, CLOSED)],
    "five in a row open it": [*OPENED, (0.0, REFUSED, OPEN)],
    "in a row: a success between starts the count again": [
        *FOUR_FAILURES,
        (0.0, SUCCEED, CLOSED),
        *FOUR_FAILURES,
        (0.0, FAIL, OPEN),
    ],
    "time does not forget failures": [*FOUR_FAILURES, (1e6, FAIL, OPEN)],
    "open refuses until the pause is over": [*OPENED, (0.5, REFUSED, OPEN), (0.999, REFUSED, OPEN)],
    "then one probe, and no second": [
        *OPENED,
        (1.0, ALLOWED, HALF_OPEN),
        (1.0, REFUSED, HALF_OPEN),
        (5.0, REFUSED, HALF_OPEN),
    ],
    "the probe's success closes": [*OPENED, (1.0, ALLOWED, HALF_OPEN), (1.1, SUCCEED, CLOSED), (1.1, ALLOWED, CLOSED)],
    "once closed it takes five again": [
        *OPENED,
        (1.0, ALLOWED, HALF_OPEN),
        (1.1, SUCCEED, CLOSED),
        *[(1.2, FAIL, CLOSED)] * (THRESHOLD - 1),
        (1.2, FAIL, OPEN),
        (2.19, REFUSED, OPEN),
        (2.2, ALLOWED, HALF_OPEN),
    ],
    "the probe's failure doubles the pause": [
        *OPENED,
        (1.0, ALLOWED, HALF_OPEN),
        (1.5, FAIL, OPEN),
        (3.49, REFUSED, OPEN),
        (3.5, ALLOWED, HALF_OPEN),
    ],
    "up to 5 s": [
        *OPENED,
        (1.0, ALLOWED, HALF_OPEN),
        (1.0, FAIL, OPEN),
        (3.0, ALLOWED, HALF_OPEN),
        (3.0, FAIL, OPEN),
        (7.0, ALLOWED, HALF_OPEN),
        (7.0, FAIL, OPEN),
        (11.9, REFUSED, OPEN),
        (12.0, ALLOWED, HALF_OPEN),
        (12.0, FAIL, OPEN),
        (16.9, REFUSED, OPEN),
        (17.0, ALLOWED, HALF_OPEN),
    ],
    "failures change nothing while open": [
        *OPENED,
        *[(0.9, FAIL, OPEN), (0.9, OLD_FAIL, OPEN)] * 20,
        (0.99, REFUSED, OPEN),
        (1.0, ALLOWED, HALF_OPEN),
    ],
    "an earlier call's failure is not the probe's": [
        *OPENED,
        (1.0, ALLOWED, HALF_OPEN),
        *[(1.1, OLD_FAIL, HALF_OPEN)] * 9,
        (1.2, REFUSED, HALF_OPEN),
        (1.3, FAIL, OPEN),
        (3.29, REFUSED, OPEN),
        (3.3, ALLOWED, HALF_OPEN),
    ],
    "nor is its success": [
        *OPENED,
        (0.5, OLD_SUCCEED, OPEN),
        (1.0, ALLOWED, HALF_OPEN),
        (1.1, OLD_SUCCEED, HALF_OPEN),
        (1.2, SUCCEED, CLOSED),
    ],
    "nor does either count once it is closed": [
        *OPENED,
        (1.0, ALLOWED, HALF_OPEN),
        (1.2, SUCCEED, CLOSED),
        *[(1.3, OLD_FAIL, CLOSED)] * 9,
        (1.4, ALLOWED, CLOSED),
    ],
    "a lost probe is replaced": [
        *OPENED,
        (1.0, ALLOWED, HALF_OPEN),
        (5.9, REFUSED, HALF_OPEN),
        (6.0, ALLOWED, HALF_OPEN),
    ],
}


def largest(_low: float, high: float) -> float:
    """Stand in for the jitter: no randomness."""
    return high


def run(breaker: service.Breaker, seconds: float, event: str) -> None:
    """Do one event of the table."""
    if event in {FAIL, OLD_FAIL}:
        breaker.failed(seconds if event == FAIL else -1.0, seconds)
    elif event in {SUCCEED, OLD_SUCCEED}:
        breaker.succeeded(seconds if event == SUCCEED else -1.0)
    else:
        assert breaker.allow(seconds) == (event == ALLOWED)


def opened(*jitter: Callable[[float, float], float]) -> service.Breaker:
    """Return a breaker that has opened at 0."""
    breaker = service.Breaker(lambda _: None, *jitter)
    for _ in range(THRESHOLD):
        breaker.failed(0.0, 0.0)
    assert breaker.state == OPEN
    return breaker


@pytest.mark.parametrize("name", TRANSITIONS)
def test_transitions(name: str) -> None:
    """Each event leads to the state that the table says, and the listener hears each change once."""
    changes: list[str] = []
    breaker = service.Breaker(changes.append, largest)
    for number, (seconds, event, after) in enumerate(rows := TRANSITIONS[name]):
        run(breaker, seconds, event)
        assert breaker.state == after, f"event {number}: {event} at {seconds}"
    assert changes == [
        after for before, after in itertools.pairwise([CLOSED, *(row[2] for row in rows)]) if before != after
    ]


def test_the_listener_hears_a_state_when_it_is_there() -> None:
    """Whoever is told of a change sees it in the breaker, too."""
    seen: list[tuple[str, str]] = []
    breaker = service.Breaker(lambda state: seen.append((state, breaker.state)), largest)
    for seconds, event, _ in TRANSITIONS["the probe's success closes"]:
        run(breaker, seconds, event)
    assert seen == [(OPEN, OPEN), (HALF_OPEN, HALF_OPEN), (CLOSED, CLOSED)]


def test_jitter_shortens_each_pause_by_a_fifth_at_most() -> None:
    """Nothing is let through before 80 % of the pause, something always after all of it; and the draws do differ."""
    for pause, failed_probes in ((1.0, 0), (2.0, 1), (4.0, 2), (5.0, 3), (5.0, 9)):
        allowed_at = set()
        for seed in range(50):
            breaker, now = opened(random.Random(seed).uniform), 0.0
            for _ in range(failed_probes):
                now += 100.0
                assert breaker.allow(now)
                breaker.failed(now, now)
            assert not breaker.allow(now + 0.799 * pause)
            steps = (now + pause * (0.8 + 0.005 * step) for step in range(41))
            allowed_at.add(next(at for at in steps if breaker.allow(at)) - now)
        assert max(allowed_at) <= pause + 1e-6
        assert max(allowed_at) - min(allowed_at) > 0.1 * pause


def test_real_breakers_of_replicas_do_not_probe_in_step() -> None:
    """Without a jitter of its own each breaker draws another pause."""
    moments = set()
    for _ in range(20):
        breaker = opened()
        moments.add(next(step for step in range(1001) if breaker.allow(step / 1000)))
    assert len(moments) > 10
    assert min(moments) >= 800


@pytest.mark.parametrize("seconds", [0.0, 0.3, 0.99, 1.0, 5.0])
def test_retry_after_is_a_whole_second_at_least(seconds: float) -> None:
    assert opened(largest).retry_after_seconds(seconds) == 1


def test_retry_after_follows_the_pause() -> None:
    """It never says more than the longest pause, and while a probe is under way not more than is worth waiting."""
    breaker, now = opened(largest), 0.0
    for before, pause in itertools.pairwise((1, 2, 4, 5, 5)):
        now += 100.0
        assert breaker.allow(now)
        assert breaker.retry_after_seconds(now) <= before
        breaker.failed(now, now)
        assert breaker.retry_after_seconds(now) == pause
        assert breaker.retry_after_seconds(now + pause - 0.5) == 1
