"""A process keeps to one processor, leaves it when others crowd it, and can be told not to."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import pytest

from tests.service import ROOT, ServiceProcess, settings_for

ALL = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set()
MOVE_SECONDS = 120.0  # other tests may crowd the other processors meanwhile
pytestmark = pytest.mark.skipif(len(ALL) < 2, reason="needs Linux and two processors")


def processors(pid: int) -> set[frozenset[int]]:
    """Return the sets of processors that a process's threads may use."""
    threads = [int(thread) for thread in os.listdir(f"/proc/{pid}/task")]
    assert len(threads) > 8  # the workers and the SDK's threads are there
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


def test_all_threads_are_on_one_processor_and_leave_it_when_it_is_crowded(database) -> None:
    with ServiceProcess(settings_for(database) | {"LOG_LEVEL": "debug"}) as service:
        assert service.get("/api/v1/id/1", database.token).status == 200
        [home] = processors(service.process.pid)
        assert len(home) == 1
        assert policies(service.process.pid) == {os.SCHED_BATCH}
        assert heaps(service.process.pid) == 0
        with crowd(*home):
            moved = service.wait_for("moved to another processor", MOVE_SECONDS)
            assert moved["processor"] in ALL - home
        assert len(processors(service.process.pid)) == 1
        assert service.get("/api/v1/id/1", database.token).status == 200


def test_the_processes_of_a_service_begin_on_different_processors(database) -> None:
    with ServiceProcess(settings_for(database) | {"WORKERS": "2", "LOG_LEVEL": "debug"}) as service:
        for _ in range(2):
            service.wait_for("ready")
        chosen = {line["processor"] for line in service.lines if line["message"] == "keeps to one processor"}
        children = Path(f"/proc/{service.process.pid}/task/{service.process.pid}/children").read_text().split()
        assert [len(processors(int(child))) for child in children] == [1, 1]
    assert len(chosen) == 2 and chosen <= ALL


def test_off_leaves_it_to_the_kernel(database) -> None:
    with ServiceProcess(settings_for(database), "--cpu-affinity", "off") as service:
        assert processors(service.process.pid) == {frozenset(ALL)}
        assert policies(service.process.pid) == {os.SCHED_OTHER}
        assert heaps(service.process.pid) > 0


def test_memory_that_lies_free_goes_back() -> None:
    """Of a heap whose last block is in use the kernel gets nothing back by itself."""
    code = """
import os
import micro_svc_demo
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
processor = micro_svc_demo.Processor(0)
processor.look_seconds = processor.trim_seconds = 0
blocks = [b"x" * 20_000 for _ in range(4_000)]
last = blocks[-1]
full = resident()
del blocks
freed = resident()
processor.keep()
print(full, freed, resident())
"""
    command = [sys.executable, "-c", code]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=True)
    full, freed, trimmed = map(int, ended.stdout.split())
    assert full - freed < 10_000_000
    assert freed - trimmed > 60_000_000
