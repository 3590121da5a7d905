"""A database for the functional tests, the emulator or a real cluster, and the service in front of it."""

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from tests.emulator.process import EmulatorProcess
from tests.service import ROOT, Certificates, ServiceProcess, settings_for

COUNT = 1000
PROVISION_SECONDS = 300


@dataclass(frozen=True)
class RealCluster:
    """A Couchbase cluster of one's own, named by the environment."""

    connection_string: str
    user: str
    password: str
    bucket: str
    token: str


def real_cluster() -> RealCluster:
    """Provision the cluster that COUCHBASE_TEST_HOST names, with COUCHBASE_TEST_USER, _PASSWORD and _BUCKET."""
    environment = {name: os.environ[f"COUCHBASE_TEST_{name}"] for name in ("HOST", "USER", "PASSWORD", "BUCKET")}
    cluster = RealCluster(*environment.values(), token="functional-tests")
    settings = {f"COUCHBASE_{name}": value for name, value in environment.items()}
    subprocess.run(  # noqa: S603  # the interpreter itself
        [sys.executable, "-m", "tests.sample_data", "--profiles", str(COUNT), "--token", cluster.token],
        cwd=ROOT,
        env=os.environ | settings,
        timeout=PROVISION_SECONDS,
        check=True,
    )
    return cluster


@pytest.fixture(scope="session")
def database() -> Iterator[EmulatorProcess | RealCluster]:
    """The database with the sample data; tests leave it as they found it."""
    if os.environ.get("COUCHBASE_TEST_HOST"):
        yield real_cluster()
    else:
        # of 7.2: as an administrator, whom 7.6 lets scan, nobody would notice that an index is missing
        with EmulatorProcess(profiles=COUNT, token="functional-tests", release="7.2") as emulator:
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
