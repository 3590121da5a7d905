"""The workflows' shell scripts: clean, and README's Kubernetes commands are all in the one that types them."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.deploy.commands import BLOCKS, SECTION, UNTRIED, script
from tests.deploy.kustomize import load
from tests.deploy.test_workflows import WORKFLOWS
from tests.service import ROOT

RUN_SECONDS = 120
ADDRESS = "127.0.0.9"
"""In place of the cluster's network: the loopback's, so that the ports of real servers can be used without asking."""
STAND_IN = f"""#!/bin/sh
printf '%s\\n' "$(basename "$0") $*" >> "$CALLS"
case "$*" in
    "network inspect"*) printf '{ADDRESS}\\nfc00::1\\n\\n' ;;
    "get deployment"*) grep -qx 'kubectl apply -k k8s/' "$CALLS" ;;
    "get service"*jsonpath*) echo 10.96.0.10 ;;
    "get secret"* | "create secret"* | *view-last-applied*) echo 'kind: Secret' ;;
    "apply -f -" | *set-last-applied*) cat >/dev/null ;;
esac
"""


def scripts() -> dict[str, str]:
    """Return what the workflows run: each step's own lines, and the files of this checkout among them; and `.ci`."""
    steps = [
        (f"{path.name}: {name}", step["run"])
        for path in WORKFLOWS
        for name, job in load(path)["jobs"].items()
        for step in job["steps"]
        if "run" in step
    ]
    files = {text.strip() for _, text in steps if (ROOT / text.strip()).is_file()}
    assert files == {".ci/run", "tests/deploy/kind.sh"} and all(os.access(ROOT / name, os.X_OK) for name in files)
    files |= {str(path.relative_to(ROOT)) for path in (ROOT / ".ci").iterdir()}
    return dict(steps) | {name: (ROOT / name).read_text(encoding="utf-8") for name in sorted(files)}


@pytest.mark.parametrize("text", scripts().values(), ids=scripts())
def test_shellcheck_finds_nothing(text: str) -> None:
    command = [
        str(Path(sys.executable).with_name("shellcheck")),
        "--shell",
        "bash",
        "--enable",
        "quote-safe-variables",
        "-",
    ]
    done = subprocess.run(command, input=text, capture_output=True, text=True, timeout=RUN_SECONDS, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_only_the_operators_and_the_gateways_blocks_are_left_out() -> None:
    typed = script("localhost").splitlines()
    lines = re.findall(r"^(?:kubectl|helm) .*", SECTION, re.MULTILINE)
    left_out = "\n".join(UNTRIED).splitlines()
    assert [line for line in lines if line.replace("REGISTRY", "localhost") not in typed] == [
        line for line in left_out if line not in typed
    ]
    assert ["gateway" in block for block in UNTRIED] == [True, False]
    assert typed.count("check") == len(BLOCKS) - len(UNTRIED) >= 6


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs Linux's loopback, all of 127.0.0.0/8")
def test_commands_are_typed_in_readmes_order(tmp_path: Path) -> None:
    """By kind.sh, with stand-ins for kind, docker and kubectl; the emulator is real, and behind TLS.

    It is gone in the end: what it inherited would be read until then.
    """
    checkout, programs, calls = tmp_path / "checkout", tmp_path / "bin", tmp_path / "calls"
    programs.mkdir()
    for name in ("kind", "docker", "kubectl"):
        (programs / name).write_text(STAND_IN)
        (programs / name).chmod(0o755)
    for name in ("k8s", "tests"):
        shutil.copytree(ROOT / name, checkout / name, ignore=shutil.ignore_patterns("__pycache__", "results"))
    for name in ("README.md", "micro_svc_demo.py"):
        shutil.copy(ROOT / name, checkout)
    path = f"{programs}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        [checkout / "tests/deploy/kind.sh"],
        env=os.environ | {"PATH": path, "CALLS": str(calls)},
        capture_output=True,
        text=True,
        timeout=RUN_SECONDS,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    made = calls.read_text().splitlines()
    # of each line the first command; the shell takes the quotes away
    lines = re.findall(r"^kubectl [^|\n]*[^| \n]", script("localhost"), re.MULTILINE)
    left = iter(made)
    assert [line for line in lines if line.replace("'", "") not in left] == [], "not typed, or not in its order"
    asked = [line for line in made if "curl" in line]
    assert len(asked) == len(BLOCKS) - len(UNTRIED) - 2, "the service is there from the third block on"
    assert all(line.endswith(" http://10.96.0.10:8080/api/v1/id/7") for line in asked)
    assert load(checkout / "k8s/base/configmap.yaml")["data"]["COUCHBASE_HOST"] == ADDRESS
    assert "BEGIN CERTIFICATE" in (checkout / "ca.crt").read_text()
    for name in ("password", "admin-password", "token"):
        assert re.fullmatch(r"\S{20,}", (checkout / name).read_text()), "a new line would be a part of it"
