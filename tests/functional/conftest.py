"""A database for the functional tests, the emulator or a real cluster, and the service in front of it."""

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.deploy.kustomize import one, render
from tests.deploy.pod import service_roles
from tests.emulator.process import EmulatorProcess
from tests.service import ROOT, Certificates, ServiceProcess, settings_for

COUNT = 1000
PROVISION_SECONDS = 300
TOKEN = "functional-tests"


@dataclass(frozen=True)
class RealCluster:
    """A Couchbase cluster of one's own, named by the environment; the second user is the service's."""

    connection_string: str
    user: str
    password: str
    bucket: str
    second_user: str
    second_password: str
    token: str


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leave out what would say nothing of the cluster that COUCHBASE_TEST_HOST names."""
    if os.environ.get("COUCHBASE_TEST_HOST"):
        reason = "does not ask the cluster that COUCHBASE_TEST_HOST names"
        for item in items:
            own = item.path.parent == Path(__file__).parent
            if own and "database" not in getattr(item, "fixturenames", ()):
                item.add_marker(pytest.mark.skip(reason=reason))


def real_cluster() -> RealCluster:
    """Return the cluster that COUCHBASE_TEST_HOST names, with COUCHBASE_TEST_USER, _PASSWORD and _BUCKET.

    It is filled first, unless COUCHBASE_TEST_TOKEN says that it has been, and with which token. The service signs in as
    COUCHBASE_TEST_SERVICE_USER with COUCHBASE_TEST_SERVICE_PASSWORD, if there is one, else as that first user.
    """
    given = {name: os.environ[f"COUCHBASE_TEST_{name}"] for name in ("HOST", "USER", "PASSWORD", "BUCKET")}
    token = os.environ.get("COUCHBASE_TEST_TOKEN")
    if not token:
        subprocess.run(  # noqa: S603  # the interpreter itself
            [sys.executable, "-m", "tests.sample_data", "--profiles", str(COUNT), "--token", TOKEN],
            cwd=ROOT,
            env=os.environ | {f"COUCHBASE_{name}": value for name, value in given.items()},
            timeout=PROVISION_SECONDS,
            check=True,
        )
    user = os.environ.get("COUCHBASE_TEST_SERVICE_USER") or given["USER"]
    password = os.environ.get("COUCHBASE_TEST_SERVICE_PASSWORD") or given["PASSWORD"]
    return RealCluster(*given.values(), user, password, token or TOKEN)


@pytest.fixture(scope="session")
def database() -> Iterator[EmulatorProcess | RealCluster]:
    """The database with the sample data; tests leave it as they found it.

    The service's user has the roles of `k8s/couchbase` and no others, so that nothing works by more.
    """
    if os.environ.get("COUCHBASE_TEST_HOST"):
        yield real_cluster()
    else:
        objects = render(ROOT / "k8s/couchbase")
        users = {"second_user": one(objects, "CouchbaseUser")["metadata"]["name"], "roles": service_roles(objects)}
        with EmulatorProcess(profiles=COUNT, token=TOKEN, **users) as emulator:
            yield emulator


@pytest.fixture(scope="session")
def emulator(database: EmulatorProcess | RealCluster) -> EmulatorProcess:
    """The database, if it can be made to fail."""
    if not isinstance(database, EmulatorProcess):
        pytest.skip("needs the emulator's faults, and COUCHBASE_TEST_HOST names a real cluster")
    return database


@pytest.fixture(scope="session")
def service(database: EmulatorProcess | RealCluster) -> Iterator[ServiceProcess]:
    """The service, ready."""
    with ServiceProcess(settings_for(database)) as running:
        yield running


@pytest.fixture(scope="session")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    """What the service needs to speak TLS; tests that change the files make their own."""
    return Certificates(tmp_path_factory.mktemp("certificates"))


@pytest.fixture
def clean_faults(emulator: EmulatorProcess) -> Iterator[EmulatorProcess]:
    """The emulator, with every fault switched off afterwards."""
    yield emulator
    emulator.clear()
