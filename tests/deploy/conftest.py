"""What the tests of image and manifests share: the manifests rendered, and the Dockerfile followed."""

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.deploy.dockerfile import Build
from tests.deploy.kustomize import Manifest, render
from tests.service import ROOT

KUSTOMIZATIONS = (
    "k8s",
    "k8s/autoscaling",
    "k8s/gateway",
    "k8s/gateway/envoy",
    "k8s/sample-data",
    "k8s/couchbase",
    "k8s/namespaces",
)


@pytest.fixture(scope="session", params=KUSTOMIZATIONS)
def rendered(request: pytest.FixtureRequest) -> list[Manifest]:
    """The objects of one kustomization after the other."""
    return render(ROOT / request.param)


@pytest.fixture(scope="session")
def base() -> list[Manifest]:
    """The objects of ``kubectl apply -k k8s/``."""
    return render(ROOT / "k8s")


@pytest.fixture(scope="session")
def build() -> Iterator[Build]:
    """The Dockerfile, followed into a folder that another user may enter (pytest's own are closed to others)."""
    folder = Path(tempfile.mkdtemp(prefix="image-"))
    folder.chmod(0o755)
    yield Build(ROOT, folder, {"VERSION": "1.2.3", "REVISION": "abc", "SOURCE": "elsewhere"})
    for path in (folder, *folder.rglob("*")):
        if path.is_dir() and not path.is_symlink():
            path.chmod(0o755)
    shutil.rmtree(folder)
