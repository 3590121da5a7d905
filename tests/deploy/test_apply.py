"""What kubectl itself, where there is one, does when `apply` is typed again and when the autoscaler takes over."""

import copy
import re
import shlex
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.deploy.api_server import ApiServer
from tests.deploy.commands import SECTION
from tests.service import ROOT

KUBECTL_SECONDS = 60
HAND_OVER, BACK = (
    block.strip().splitlines()
    for block in re.findall(r"^```\n(.*?)^```$", SECTION.partition("**Autoscaling.**")[2], re.MULTILINE | re.DOTALL)[:2]
)
"""README's commands from `k8s/` to `k8s/autoscaling/`, and back."""

Shell = Callable[[str], list[str]]


@pytest.fixture
def server() -> Iterator[ApiServer]:
    with ApiServer() as running:
        yield running


@pytest.fixture
def shell(server: ApiServer, tmp_path: Path) -> Shell:
    """Types a command line of README's; returns the lines that it prints."""
    kubectl = shutil.which("kubectl")
    if kubectl is None:
        pytest.skip("needs kubectl (kubernetes.io/docs/tasks/tools)")
    # validation asks for the whole OpenAPI document; test_manifests does it by the schemas
    (tmp_path / "kubectl").write_text(
        f'#!/bin/sh\n[ "$1 $2" = "apply -k" ] || [ "$1 $2" = "apply -f" ] && set -- "$@" --validate=false\n'
        f'exec {shlex.quote(kubectl)} --server {server.url} "$@"\n'
    )
    (tmp_path / "kubectl").chmod(0o755)

    def run(line: str) -> list[str]:
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", line],  # noqa: S607  # wherever it is
            cwd=ROOT,
            env={"PATH": f"{tmp_path}:/usr/bin:/bin", "HOME": str(tmp_path)},
            capture_output=True,
            text=True,
            timeout=KUBECTL_SECONDS,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()

    return run


@pytest.mark.parametrize(
    "folder", ["k8s/", "k8s/autoscaling/", "k8s/gateway/", "k8s/gateway/envoy/", "k8s/sample-data/"]
)
def test_second_apply_changes_nothing(shell: Shell, server: ApiServer, folder: str) -> None:
    """It says so too, but for the PodDisruptionBudget: kubectl always sends a selector that policy/v1 has replaced."""
    first, made = shell(f"kubectl apply -k {folder}"), copy.deepcopy(server.objects)
    second = shell(f"kubectl apply -k {folder}")
    assert server.objects == made
    assert {line.rpartition(" ")[2] for line in first} == {"created"}
    changed = [line for line in second if not line.endswith(" unchanged")]
    assert changed in ([], ["poddisruptionbudget.policy/demopy configured"])


def test_hand_over_keeps_every_replica(shell: Shell, server: ApiServer) -> None:
    """There and back by README's commands: nothing is ever set but the number that runs."""
    shell("kubectl apply -k k8s/")
    [running] = server.replicas
    for line in HAND_OVER:
        shell(line)
    assert shell("kubectl apply -k k8s/autoscaling/")
    for line in BACK:
        shell(line)
    assert set(server.replicas) == {running} and running > 1
    assert not [path for path in server.objects if "horizontalpodautoscalers" in path]


def test_without_the_hand_over_one_replica_is_left(shell: Shell, server: ApiServer) -> None:
    """The test above can fail: the API's default takes the place of a number that is taken out."""
    shell("kubectl apply -k k8s/")
    shell(HAND_OVER[-1])
    assert server.replicas[-1] == 1
