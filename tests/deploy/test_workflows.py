"""The workflows: well-formed, with few rights, of fixed versions, and doing what they are there for.

`actionlint` would say more, but its package downloads it from elsewhere while it is installed.
"""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.deploy.dockerfile import Build
from tests.deploy.kustomize import load, render
from tests.service import ROOT

WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))
CHECK_SECONDS = 60
USER_TEXT = re.compile(r"\$\{\{[^}]*github\.(event\.|head_ref)")
"""What whoever opens a pull request may write: in a script it would be run."""

Job = dict[str, Any]


@pytest.fixture(params=WORKFLOWS, ids=lambda path: path.name)
def path(request: pytest.FixtureRequest) -> Path:
    found: Path = request.param
    return found


@pytest.fixture
def workflow(path: Path) -> dict[str, Any]:
    return load(path)


@pytest.fixture
def image_job() -> Job:
    job: Job = load(ROOT / ".github/workflows/image.yml")["jobs"]["image"]
    return job


def step(job: Job, action: str) -> dict[str, Any]:
    """Return the only step of a job that uses an action."""
    [found] = [each for each in job["steps"] if each.get("uses", "").startswith(f"{action}@")]
    return found


def test_it_is_a_workflow(path: Path) -> None:
    """By the schema of GitHub's own, which `check-jsonschema` brings along."""
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.github-workflows", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=CHECK_SECONDS, check=False)
    assert done.returncode == 0, done.stdout


def test_rights_are_given_by_the_job_and_few(workflow: dict[str, Any]) -> None:
    assert workflow["permissions"] == {}
    writes = {
        (name, right)
        for name, job in workflow["jobs"].items()
        for right, level in job["permissions"].items()
        if level == "write"
    }
    assert writes <= {("image", "packages"), ("image", "id-token")}


def test_actions_are_of_a_full_version(workflow: dict[str, Any]) -> None:
    """A tag of three numbers, or a commit: not a branch, and not a tag that moves."""
    for job in workflow["jobs"].values():
        for each in job["steps"]:
            if "uses" in each:
                assert re.fullmatch(r"[\w.-]+/[\w./-]+@(v\d+\.\d+\.\d+|[0-9a-f]{40})", each["uses"])


def test_jobs_end_and_checkouts_keep_no_token(workflow: dict[str, Any]) -> None:
    for job in workflow["jobs"].values():
        assert job["timeout-minutes"] <= 60
        assert step(job, "actions/checkout")["with"]["persist-credentials"] is False


def test_no_foreign_text_in_scripts(path: Path, workflow: dict[str, Any]) -> None:
    scripts = [each["run"] for job in workflow["jobs"].values() for each in job["steps"] if "run" in each]
    assert not any("${{" in script for script in scripts), "values come by the environment"
    assert not USER_TEXT.search("\n".join(scripts))


def test_steps_refer_to_steps_before_them(workflow: dict[str, Any]) -> None:
    for job in workflow["jobs"].values():
        seen: set[str] = set()
        for each in job["steps"]:
            assert set(re.findall(r"steps\.([\w-]+)\.", str(each))) <= seen
            seen |= {each["id"]} if "id" in each else set()


def test_image_comes_after_the_tests(image_job: Job) -> None:
    assert image_job["needs"] == "test"
    tests = load(ROOT / ".github/workflows/image.yml")["jobs"]["test"]
    assert any(each.get("run") == ".ci/run" for each in tests["steps"]) and (ROOT / ".ci/run").exists()


def test_image_is_built_for_both_platforms_with_sbom_and_provenance(image_job: Job) -> None:
    given = step(image_job, "docker/build-push-action")["with"]
    assert given["platforms"].split(",") == ["linux/amd64", "linux/arm64"]
    assert given["sbom"] is True and given["provenance"] == "mode=max"


def test_image_is_signed_by_its_digest(image_job: Job) -> None:
    """Without a key: by the workflow's identity."""
    assert image_job["permissions"]["id-token"] == "write"
    step(image_job, "sigstore/cosign-installer")
    [signing] = [each for each in image_job["steps"] if "cosign sign" in each.get("run", "")]
    assert "@${DIGEST}" in signing["run"] and "--key" not in signing["run"]
    assert signing["env"]["DIGEST"] == "${{ steps.build.outputs.digest }}"


def test_nothing_is_pushed_for_a_pull_request(image_job: Job) -> None:
    assert image_job["env"]["PUSH"] == "${{ github.event_name != 'pull_request' }}"
    assert step(image_job, "docker/build-push-action")["with"]["push"] == "${{ env.PUSH }}"
    for action in ("docker/login-action", "sigstore/cosign-installer"):
        assert step(image_job, action)["if"] == "env.PUSH == 'true'"


def test_targets_and_arguments_are_the_dockerfiles(image_job: Job, build: Build) -> None:
    """And the images' names are those that the manifests take."""
    images = {each["name"]: each["target"] for each in image_job["strategy"]["matrix"]["include"]}
    assert set(images.values()) <= build.stages.keys()
    assert list(build.stages)[-1] == images["demopy"]
    arguments = re.findall(r"^(\w+)=", step(image_job, "docker/build-push-action")["with"]["build-args"], re.MULTILINE)
    for target in images.values():
        declared = {value.partition("=")[0] for name, value in build.stages[target][1] if name == "ARG"}
        assert set(arguments) == declared
    used = {
        container["image"].partition(":")[0]
        for path in ("k8s", "k8s/sample-data")
        for each in render(ROOT / path)
        if each["kind"] in ("Deployment", "Job")
        for container in each["spec"]["template"]["spec"]["containers"]
    }
    assert used == images.keys()
