"""A process keeps to one processor, leaves it when others crowd it, and can be told not to."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import pytest

import micro_svc_demo
from tests.service import ServiceProcess, settings_for

ALL = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set()
MOVE_SECONDS = 40.0
LOOK_SECONDS = 2.0  # between two looks of a service at the most
CALM_LOOKS = 12  # by the last it has moved, but for one time in thousands: of those that could it takes every second
pytestmark = pytest.mark.skipif(len(ALL) < 2, reason="needs Linux and two processors")


def processors(pid: int) -> set[frozenset[int]]:
    """Return the sets of processors that a process's threads may use."""
    threads = [int(thread) for thread in os.listdir(f"/proc/{pid}/task")]
    assert len(threads) > 4  # the event loop's, the log's, those that fetch, and the SDK's are there
    return {frozenset(os.sched_getaffinity(thread)) for thread in threads}


def policies(pid: int) -> set[int]:
    """Return the scheduling policies of a process's threads."""
    return {os.sched_getscheduler(int(thread)) for thread in os.listdir(f"/proc/{pid}/task")}


def heaps(pid: int) -> int:
    """Count the heaps that glibc has made for threads: 64 MB each, on a multiple of that, of which a part is in use."""
    count, size = 0, 64 << 20
    lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
    for used, unused in pairwise(line.split() for line in lines):
        start, end = (int(used[0].split("-")[0], 16), int(unused[0].split("-")[1], 16))
        count += used[1] == "rw-p" and unused[1] == "---p" and start % size == 0 and end - start == size
    return count


@contextmanager
def crowd(processor: int) -> Iterator[None]:
    """Keep a processor busy with what may run nowhere else."""
    code = f"import os\nos.sched_setaffinity(0, {{{processor}}})\nprint(flush=True)\nwhile True: pass"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as hog:
        try:
            assert hog.stdout is not None and hog.stdout.readline() == b"\n"
            yield
        finally:
            hog.kill()


def busy() -> dict[int, float]:
    """Return the busy seconds of each processor."""
    return micro_svc_demo.busy_seconds(Path("/proc/stat").read_text())


def wait_for_a_move(service: ServiceProcess, home: int) -> int | None:
    """Return where a crowded service has moved to; None if other tests have crowded all other processors too."""
    calm = 0
    deadline = time.monotonic() + MOVE_SECONDS
    while calm < CALM_LOOKS and time.monotonic() < deadline:
        before = busy()
        time.sleep(LOOK_SECONDS)  # what is measured
        for line in service.lines:
            if line["message"] == "moved to another processor":
                return int(line["processor"])
        shares = {number: (seconds - before[number]) / LOOK_SECONDS for number, seconds in busy().items()}
        calm += any(shares[number] < 0.5 for number in ALL - {home})
    assert calm < CALM_LOOKS, service.raw_lines
    return None


def test_all_threads_are_on_one_processor_and_leave_it_when_it_is_crowded(database) -> None:
    with ServiceProcess(settings_for(database) | {"LOG_LEVEL": "debug"}) as service:
        assert service.get("/api/v1/id/1", database.token).status == 200
        [home] = processors(service.process.pid)
        assert len(home) == 1
        assert policies(service.process.pid) == {os.SCHED_BATCH}
        assert heaps(service.process.pid) == 0
        with crowd(*home):
            moved = wait_for_a_move(service, *home)
        if moved is None:
            pytest.skip("other tests have crowded all other processors for 40 s")
        assert moved in ALL - home
        assert len(processors(service.process.pid)) == 1
        assert service.get("/api/v1/id/1", database.token).status == 200


def test_off_leaves_it_to_the_kernel(database) -> None:
    with ServiceProcess(settings_for(database), "--cpu-affinity", "off") as service:
        assert processors(service.process.pid) == {frozenset(ALL)}
        assert policies(service.process.pid) == {os.SCHED_OTHER}
        assert heaps(service.process.pid) > 0
