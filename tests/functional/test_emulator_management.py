"""The emulator's management side, as the real SDK sees it, and its command line."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import pytest
from couchbase.cluster import Cluster
from couchbase.diagnostics import PingState, ServiceType
from couchbase.exceptions import (
    BucketDoesNotExistException,
    CollectionAlreadyExistsException,
    CollectionNotFoundException,
    DocumentNotFoundException,
    InvalidArgumentException,
    ScopeAlreadyExistsException,
    ScopeNotFoundException,
)

from tests.emulator.process import ROOT, EmulatorFailedError, EmulatorProcess
from tests.emulator.sdk import connect


@pytest.fixture(scope="module")
def emulator() -> Iterator[EmulatorProcess]:
    """Two nodes with an empty bucket, to be provisioned."""
    with EmulatorProcess(nodes=2, empty=True) as process:
        yield process


@pytest.fixture(scope="module")
def cluster(emulator: EmulatorProcess) -> Iterator[Cluster]:
    """The SDK's cluster object, connected."""
    with connect(emulator) as connected:
        yield connected


def test_ping_reaches_every_service_of_both_nodes(cluster: Cluster) -> None:
    """What the configuration lists is served; a bucket's ping is about its key-value connections."""
    bucket = cluster.bucket("sample_app")
    cluster.wait_until_ready(timedelta(seconds=30))
    states = [endpoint.state for endpoint in bucket.ping().endpoints[ServiceType.KeyValue]]
    assert states == [PingState.OK, PingState.OK]
    endpoints = cluster.ping().endpoints
    for service in (ServiceType.KeyValue, ServiceType.Query, ServiceType.Management):
        assert len({endpoint.remote for endpoint in endpoints[service]}) == 2
        assert {endpoint.state for endpoint in endpoints[service]} == {PingState.OK}


def test_provisioning_scopes_and_collections(cluster: Cluster) -> None:
    """What is made can be used at once; what is dropped is gone with its documents."""
    manager = cluster.bucket("sample_app").collections()
    assert [scope.name for scope in manager.get_all_scopes()] == ["_default"]
    manager.create_scope("shop")
    manager.create_collection("shop", "orders")
    names = {scope.name: [collection.name for collection in scope.collections] for scope in manager.get_all_scopes()}
    assert names == {"_default": ["_default"], "shop": ["orders"]}
    orders = cluster.bucket("sample_app").scope("shop").collection("orders")
    orders.upsert("1", {"v": 1})
    assert orders.get("1").content_as[dict] == {"v": 1}
    manager.drop_collection("shop", "orders")
    manager.create_collection("shop", "orders")
    with pytest.raises(DocumentNotFoundException):
        cluster.bucket("sample_app").scope("shop").collection("orders").get("1")


def test_what_exists_is_not_made_twice_and_what_does_not_is_not_dropped(cluster: Cluster) -> None:
    """Each refusal becomes the SDK's own exception."""
    manager = cluster.bucket("sample_app").collections()
    manager.create_scope("twice")
    manager.create_collection("twice", "one")
    with pytest.raises(ScopeAlreadyExistsException):
        manager.create_scope("twice")
    with pytest.raises(CollectionAlreadyExistsException):
        manager.create_collection("twice", "one")
    with pytest.raises(ScopeNotFoundException):
        manager.create_collection("nothing", "one")
    with pytest.raises(CollectionNotFoundException):
        manager.drop_collection("twice", "nothing")
    with pytest.raises(ScopeNotFoundException):
        manager.drop_collection("nothing", "one")


@pytest.mark.parametrize("name", ["_hidden", "%20", "with space", "x" * 252, "ä"])
def test_names_that_are_not_allowed(cluster: Cluster, name: str) -> None:
    """The server's rules for names hold."""
    with pytest.raises(InvalidArgumentException):
        cluster.bucket("sample_app").collections().create_scope(name)


def test_buckets(cluster: Cluster) -> None:
    """The SDK can describe the bucket; an unknown one does not exist."""
    assert cluster.buckets().get_bucket("sample_app").num_replicas == 0
    with pytest.raises(BucketDoesNotExistException):
        cluster.buckets().get_bucket("nothing")


# ---- the command line ----


def test_the_ready_line_and_a_clean_end() -> None:
    """One line of JSON when ready; SIGTERM ends it with exit code 0, and its certificates are gone."""
    command = [sys.executable, "-m", "tests.emulator", "--tls", "--token", "secret", "--user", "someone"]
    environment = os.environ | {"EMULATOR_PASSWORD": "from the environment"}
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        ready = json.loads(process.stdout.readline())
        assert (ready["user"], ready["password"], ready["token"]) == ("someone", "from the environment", "secret")
        assert ready["connection_string"] == f"couchbase://127.0.0.1:{ready['kv_port']}"
        assert ready["nodes"][0]["plain"]["kv"] == ready["kv_port"]
        assert os.path.exists(ready["ca_file"])
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
        assert process.stdout.read() == b""
        assert not os.path.exists(ready["ca_file"])


def test_it_ends_with_its_standard_input() -> None:
    """So that tests leave nothing behind; the process helper ends it this way."""
    with EmulatorProcess() as process:
        pid = process.pid
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_random_secrets_differ() -> None:
    """Without a token and password of its own, each emulator has others."""
    with EmulatorProcess() as one, EmulatorProcess() as two:
        assert one.password != two.password
        assert one.token != two.token


@pytest.mark.parametrize("flag", ["kv_port", "management_tls_port"])
def test_a_port_in_use_is_one_line_and_exit_code_2(emulator: EmulatorProcess, flag: str) -> None:
    """Whoever starts a second one on the same port is told so."""
    with (
        pytest.raises(EmulatorFailedError, match=f"^exit code 2: .*port {emulator.kv_port} .*in use$"),
        EmulatorProcess(tls=True, **{flag: emulator.kv_port}),
    ):
        pass


@pytest.mark.parametrize(
    "flags",
    [
        {"kv_port": 65536},
        {"kv_port": -1},
        {"nodes": 3},
        {"replicas": 1},
        {"profiles": "many"},
        {"bucket": "a/b"},
        {"tls_cert": "good-enough"},
        {"release": "8.0"},
        {"empty": True, "profiles": 5},
        {"nothing": 1},
    ],
)
def test_a_bad_flag_is_one_line_and_exit_code_2(flags: dict[str, Any]) -> None:
    """Nothing starts, and the line says what is wrong."""
    with pytest.raises(EmulatorFailedError) as failed, EmulatorProcess(**flags):
        pass
    assert str(failed.value).startswith("exit code 2: emulator: ")
    assert "\n" not in str(failed.value)
