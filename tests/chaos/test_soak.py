"""A minute of mixed load and faults; and its command line."""

import subprocess
import sys

import pytest

from tests.chaos.conftest import SOAK_SECONDS, soaking
from tests.service import ROOT


def test_soak() -> None:
    """Every answer was allowed, right and in time; everything was well in the end; nothing has grown."""
    with soaking() as process:
        output, _ = process.communicate(timeout=SOAK_SECONDS + 200)
    assert process.returncode == 0, output
    assert "wrong                  0" in output
    for row in ("requests", "answers by status", "faults", "worst latency", "threads", "descriptors", "memory MB"):
        assert row in output


@pytest.mark.parametrize("flag", ["--seconds=0", "--seconds=x", "--rate=0", "--seed=-1", "--unknown"])
def test_bad_input_is_one_line(flag: str) -> None:
    ended = subprocess.run(
        [sys.executable, "-m", "tests.chaos.soak", flag],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr.count("\n") == 1


def test_help_has_the_defaults() -> None:
    ended = subprocess.run(
        [sys.executable, "-m", "tests.chaos.soak", "--help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert "600" in ended.stdout and "--seed" in ended.stdout
