"""The sample data in an empty cluster, by the command line and over the wire, read back with the SDK."""

import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from datetime import timedelta
from typing import Any, NamedTuple

import pytest
from couchbase.cluster import Cluster
from couchbase.exceptions import DocumentNotFoundException

from tests.emulator.process import EmulatorProcess
from tests.emulator.sdk import connect
from tests.sample_data import AUTH, AWKWARD, COLLECTIONS, IMAGES, INDEXES, SCOPE, TOKEN_KEY, USERS, picture, profile
from tests.service import ROOT, settings_for

PROFILES = 60  # the awkward ones are among them
SEED = 3
RUN_SECONDS = 60


class Run(NamedTuple):
    """How a run of the command line ended."""

    code: int
    out: str
    error: str


def start(settings: dict[str, str], *arguments: str) -> subprocess.Popen[str]:
    """Start the command line with these settings, and none of this process's own."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("COUCHBASE_", "SAMPLE_"))}
    return subprocess.Popen(
        [sys.executable, "-m", "tests.sample_data", *arguments],
        cwd=ROOT,
        env=kept | settings,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str]) -> Run:
    """Wait for its end."""
    with process:
        try:
            out, error = process.communicate(timeout=RUN_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            raise
    return Run(process.returncode, out, error)


def provision(settings: dict[str, str], *arguments: str) -> Run:
    """Run the command line."""
    return finish(start(settings, *arguments))


@pytest.fixture(scope="module")
def emulator() -> Iterator[EmulatorProcess]:
    """A cluster with an empty bucket."""
    with EmulatorProcess(empty=True) as process:
        yield process


@pytest.fixture(scope="module")
def settings(emulator: EmulatorProcess) -> dict[str, str]:
    """What points the command line at that cluster."""
    return settings_for(emulator)


@pytest.fixture(scope="module")
def unanswered(settings: dict[str, str]) -> Iterator[subprocess.Popen[str]]:
    """A run against a port where nobody listens, begun early: the SDK gives up after 10 s."""
    with socket.create_server(("127.0.0.1", 0)) as unused:
        port = unused.getsockname()[1]
    process = start(settings | {"COUCHBASE_HOST": f"couchbase://127.0.0.1:{port}"})
    yield process
    if process.poll() is None:  # its test was not among those that ran
        process.kill()
        finish(process)


@pytest.fixture(scope="module")
def first(settings: dict[str, str], unanswered: subprocess.Popen[str]) -> Run:
    """The first run into the empty bucket."""
    return provision(settings, f"--profiles={PROFILES}", f"--seed={SEED}", "--batch=25")


@pytest.fixture(scope="module")
def cluster(emulator: EmulatorProcess, first: Run) -> Iterator[Cluster]:
    """The SDK, connected to the filled cluster."""
    with connect(emulator) as connected:
        yield connected


def documents(cluster: Cluster, emulator: EmulatorProcess, collection: str) -> dict[str, Any]:
    """Return the records of a collection, got one by one by their ids."""
    opened = cluster.bucket(emulator.bucket).scope(SCOPE).collection(collection)
    keys = [f"{collection}:{number}" for number in range(1, PROFILES + 1)]
    with pytest.raises(DocumentNotFoundException):
        opened.get(f"{collection}:{PROFILES + 1}")
    return {key: opened.get(key).content_as[dict] for key in keys}


def token_in(cluster: Cluster, emulator: EmulatorProcess) -> str:
    """Return the token that the service would read."""
    token = cluster.bucket(emulator.bucket).scope(SCOPE).collection(AUTH).get(TOKEN_KEY).content_as[dict]["token"]
    assert isinstance(token, str)
    return token


def test_a_token_that_it_made_up_is_all_of_standard_output(
    first: Run, cluster: Cluster, emulator: EmulatorProcess
) -> None:
    """So that `TOKEN=$(python -m tests.sample_data)` works; it is the one that is stored."""
    assert first.code == 0, first.error
    assert re.fullmatch(r"[A-Za-z0-9_-]{43}\n", first.out)
    assert token_in(cluster, emulator) == first.out.strip()
    assert first.error == f"sample_data: {PROFILES} profiles and pictures are in sample_app.{SCOPE}\n"


def test_every_document_can_be_read(cluster: Cluster, emulator: EmulatorProcess) -> None:
    """Each is what the generators make."""
    for number, stored in enumerate(documents(cluster, emulator, USERS).values(), start=1):
        assert stored == profile(number, SEED)
    for number, stored in enumerate(documents(cluster, emulator, IMAGES).values(), start=1):
        assert stored == picture(number, SEED)


def test_the_schema_is_there(cluster: Cluster, emulator: EmulatorProcess) -> None:
    """Scope, collections, and both indexes online."""
    bucket = cluster.bucket(emulator.bucket)
    scopes = {
        scope.name: {collection.name for collection in scope.collections}
        for scope in bucket.collections().get_all_scopes()
    }
    assert scopes[SCOPE] == set(COLLECTIONS)
    indexes = bucket.scope(SCOPE).collection(USERS).query_indexes().get_all_indexes()
    assert {index.name: index.state for index in indexes} == dict.fromkeys(INDEXES, "online")


@pytest.mark.parametrize("name", ["nickname", "user_id"])
def test_the_awkward_values_are_found_by_a_query(name: str, cluster: Cluster, emulator: EmulatorProcess) -> None:
    """As they are, and as nothing else."""
    scope = cluster.bucket(emulator.bucket).scope(SCOPE)
    for number, values in AWKWARD.items():
        if name in values:
            statement = f"SELECT RAW record_id FROM `{USERS}` WHERE `{name}` = $value"  # noqa: S608 - constants
            found = list(scope.query(statement, named_parameters={"value": values[name]}, timeout=timedelta(minutes=1)))
            assert found == [number]


def test_a_second_run_keeps_the_token(
    first: Run, settings: dict[str, str], cluster: Cluster, emulator: EmulatorProcess
) -> None:
    """It does no harm otherwise: the same records are there."""
    before = documents(cluster, emulator, USERS)
    second = provision(settings, f"--profiles={PROFILES}", f"--seed={SEED}")
    assert second == (0, "", first.error)
    assert documents(cluster, emulator, USERS) == before
    assert token_in(cluster, emulator) == first.out.strip()


def test_a_given_token_is_stored_and_kept(
    settings: dict[str, str], cluster: Cluster, emulator: EmulatorProcess
) -> None:
    """A flag or the environment gives it; the run after that keeps it; it is shown to nobody."""
    for given, arguments, token in (
        ({}, ["--token=by-flag"], "by-flag"),
        ({"SAMPLE_TOKEN": "by-environment"}, [], "by-environment"),
        ({}, [], "by-environment"),
    ):
        run = provision(settings | given, "--profiles=0", *arguments)
        assert (run.code, run.out) == (0, "")
        assert token not in run.error
        assert token_in(cluster, emulator) == token


def test_a_token_document_that_is_of_no_use_is_replaced(
    settings: dict[str, str], cluster: Cluster, emulator: EmulatorProcess
) -> None:
    """The service would end with exit code 1 because of it."""
    cluster.bucket(emulator.bucket).scope(SCOPE).collection(AUTH).upsert(TOKEN_KEY, {"token": 5})
    run = provision(settings, "--profiles=0")
    assert run.code == 0
    assert token_in(cluster, emulator) == run.out.strip()


def test_failures_that_pass_are_survived(settings: dict[str, str], cluster: Cluster, emulator: EmulatorProcess) -> None:
    """A node that is out of memory for a while (0x82, which the SDK does not try again) costs time only."""
    emulator.fault("status", status=0x82, operation="set", count=70)
    try:
        run = provision(settings, f"--profiles={PROFILES}", f"--seed={SEED + 1}")
    finally:
        emulator.clear()
    assert run.code == 0, run.error
    stored = documents(cluster, emulator, USERS)
    assert stored == {f"{USERS}:{number}": profile(number, SEED + 1) for number in range(1, PROFILES + 1)}


def test_missing_permission_is_one_line(first: Run, settings: dict[str, str], emulator: EmulatorProcess) -> None:
    """It says what the user may not do, and the role that it needs."""
    emulator.fault("query_error", code=13014, msg="User does not have credentials", http_status=401)
    try:
        run = provision(settings)
    finally:
        emulator.clear()
    assert run.code == 1
    assert run.out == ""
    assert re.fullmatch(r"sample_data: user 'demo' may not create index .* the role Query Manage Index\n", run.error)


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (5000, "GSI CreateIndex() - cause: Fails to create index. Memory quota is not enough."),
        (4000, "the index is not supported by this edition"),
        (10000, "authorization failed"),
        (12014, "the index is invalid"),
    ],
)
def test_an_index_that_is_refused_for_good_is_said_at_once(
    first: Run, settings: dict[str, str], emulator: EmulatorProcess, code: int, message: str
) -> None:
    """In one line, with the server's reason; a second try would not be refused."""
    emulator.fault("query_error", code=code, msg=message, count=1)
    try:
        run = provision(settings, "--profiles=1")
    finally:
        emulator.clear()
    assert (run.code, run.out) == (1, "")
    assert re.fullmatch(rf"sample_data: cannot create index .*{re.escape(message)}.*\n", run.error)


def test_an_index_that_is_refused_for_a_while_is_waited_for(
    first: Run, settings: dict[str, str], emulator: EmulatorProcess
) -> None:
    """A node that does not know the collection yet, and an index service that starts."""
    starts = "Index Service can be in bootstrap. Please retry the operation at a later time."
    emulator.fault("query_error", code=12003, msg="Keyspace not found", http_status=404, count=2)
    emulator.fault("query_error", code=5000, msg=starts, http_status=500, count=2)
    try:
        run = provision(settings, "--profiles=1")
    finally:
        emulator.clear()
    assert (run.code, run.out) == (0, "")


@pytest.mark.parametrize(
    ("changed", "line"),
    [
        (
            {"COUCHBASE_PASSWORD": "'wrong'"},
            r"Couchbase refuses user 'demo': check COUCHBASE_USER and COUCHBASE_PASSWORD \(it .* a quote\)",
        ),
        (
            {"COUCHBASE_PASSWORD": "wrong"},
            r"Couchbase refuses user 'demo': check COUCHBASE_USER and COUCHBASE_PASSWORD",
        ),
        ({"COUCHBASE_BUCKET": "nope"}, r"bucket 'nope' does not exist: create it, .*couchbase-cli bucket-create.*"),
    ],
)
def test_what_is_wrong_with_the_cluster_is_one_line(
    changed: dict[str, str], line: str, settings: dict[str, str]
) -> None:
    """No traceback, exit code 1, nothing on standard output, and never the password."""
    run = provision(settings | changed)
    assert (run.code, run.out) == (1, "")
    assert re.fullmatch(f"sample_data: {line}\n", run.error)
    assert (settings | changed)["COUCHBASE_PASSWORD"] not in run.error


def test_bad_input_is_one_line(settings: dict[str, str]) -> None:
    """Exit code 2, from the real command line."""
    run = provision(settings, "--profiles=many")
    assert run == (2, "", "sample_data: argument --profiles: must be a number from 0 to 5000000, not 'many'\n")


def test_nobody_there_is_one_line(unanswered: subprocess.Popen[str]) -> None:
    """It names the address, and what to check."""
    run = finish(unanswered)
    assert (run.code, run.out) == (1, "")
    assert re.fullmatch(
        r"sample_data: nobody answers as Couchbase at couchbase://127\.0\.0\.1:[0-9]+: check COUCHBASE_HOST .*\n",
        run.error,
    )
