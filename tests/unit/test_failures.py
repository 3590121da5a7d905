"""The failure map: what each exception of the SDK means to the caller, and what the operator reads about it."""

import asyncio
import inspect
import json
import time
from collections.abc import Callable, Iterator
from typing import Any
from unittest.mock import Mock

import pytest
from couchbase import exceptions as cb

import micro_svc_demo as service

CLASSES = sorted(
    {kind for _, kind in inspect.getmembers(cb, inspect.isclass) if issubclass(kind, cb.CouchbaseException)},
    key=lambda kind: kind.__name__,
)

# What the caller gets, and whether the breaker counts it. "outage" speaks of the service, "request" of this request.
EXPECTED: dict[str, tuple[int, str]] = {
    "DocumentNotFoundException": (404, "request"),
    "AmbiguousTimeoutException": (504, "outage"),
    "UnAmbiguousTimeoutException": (504, "outage"),
    "TimeoutException": (504, "outage"),
    "AuthenticationException": (503, "outage"),
    "BucketDoesNotExistException": (503, "outage"),
    "BucketNotFoundException": (503, "outage"),
    "DocumentUnretrievableException": (503, "outage"),
    "HTTPException": (503, "outage"),
    "InternalServerFailureException": (503, "outage"),
    "MissingConnectionException": (503, "outage"),
    "ParsingFailedException": (503, "outage"),  # without a code: an answer that is no JSON, or is cut off
    "QuotaLimitedException": (503, "outage"),
    "RateLimitedException": (503, "outage"),
    "RequestCanceledException": (503, "outage"),
    "ServiceUnavailableException": (503, "outage"),
    "TemporaryFailException": (503, "outage"),
    "DocumentLockedException": (503, "request"),
    "CollectionNotFoundException": (500, "request"),
    "KeyspaceNotFoundException": (500, "request"),
    "QueryIndexNotFoundException": (500, "request"),
    "ScopeNotFoundException": (500, "request"),
    "ValueFormatException": (500, "request"),
    # what nothing but a mistake in this program, in the SDK or in the server brings about
    "CasMismatchException": (500, "request"),  # what the SDK makes of an "exists" in answer to a get
    "CouchbaseException": (500, "request"),
    "FeatureUnavailableException": (500, "request"),
    "InternalSDKException": (500, "request"),
    "InvalidArgumentException": (500, "request"),
    "UnsuccessfulOperationException": (500, "request"),
    "UnsupportedOperation": (500, "request"),
}

# Why the others cannot come of a get, a lookup of one path, a read-only query or a connect.
NEVER: dict[str, tuple[str, ...]] = {
    "analytics": (
        "AnalyticsLinkExistsException",
        "AnalyticsLinkNotFoundException",
        "DatasetAlreadyExistsException",
        "DatasetNotFoundException",
        "DataverseAlreadyExistsException",
        "DataverseNotFoundException",
    ),
    "creating and dropping buckets, scopes, collections, indexes, users and groups": (
        "BucketAlreadyExistsException",
        "BucketNotFlushableException",
        "CollectionAlreadyExistsException",
        "FeatureNotFoundException",
        "GroupNotFoundException",
        "InvalidIndexException",
        "QueryIndexAlreadyExistsException",
        "ScopeAlreadyExistsException",
        "UserNotFoundException",
        "WatchQueryIndexTimeoutException",
    ),
    "field-level encryption": (
        "CryptoException",
        "CryptoKeyNotFoundException",
        "DecrypterAlreadyExistsException",
        "DecrypterNotFoundException",
        "DecryptionFailureException",
        "EncrypterAlreadyExistsException",
        "EncrypterNotFoundException",
        "EncryptionFailureException",
        "InvalidCipherTextException",
        "InvalidCryptoKeyException",
    ),
    "eventing": (
        "EventingFunctionAlreadyDeployedException",
        "EventingFunctionCollectionNotFoundException",
        "EventingFunctionCompilationFailureException",
        "EventingFunctionIdenticalKeyspaceException",
        "EventingFunctionNotBootstrappedException",
        "EventingFunctionNotDeployedException",
        "EventingFunctionNotFoundException",
        "EventingFunctionNotUnDeployedException",
    ),
    "search and views": ("DesignDocumentNotFoundException", "NoChildrenException", "SearchIndexNotFoundException"),
    "transactions": (
        "TransactionCommitAmbiguous",
        "TransactionException",
        "TransactionExpired",
        "TransactionFailed",
        "TransactionOperationFailed",
    ),
    "writing, locking and counting": (
        "DeltaInvalidException",
        "DocumentExistsException",
        "DocumentNotLockedException",
        "DurabilityImpossibleException",
        "DurabilityInvalidLevelException",
        "DurabilitySyncWriteAmbiguousException",
        "DurabilitySyncWriteInProgressException",
        "InvalidValueException",
        "MissingTokenException",
        "MutationTokenOutdatedException",
        "NumberTooBigException",
    ),
    "range scans": ("RangeScanCompletedException",),
    "the SDK's data structures": ("QueueEmpty",),
    "a result that is iterated twice": ("AlreadyQueriedException",),
    "sub-document operations, of which `fetch_token` does the only one and knows their failures": (
        "DocumentNotJsonException",
        "PathExistsException",
        "PathInvalidException",
        "PathMismatchException",
        "PathNotFoundException",
        "PathTooBigException",
        "PathTooDeepException",
        "ValueTooDeepException",
    ),
}


def test_every_exception_of_the_sdk_is_accounted_for() -> None:
    """A class that a new SDK brings fails here until somebody says what it means; so does one that is gone."""
    listed = [*EXPECTED, *(name for names in NEVER.values() for name in names)]
    assert sorted(listed) == [kind.__name__ for kind in CLASSES]


@pytest.mark.parametrize(
    "kind", [kind for kind in CLASSES if kind.__name__ in EXPECTED], ids=lambda kind: kind.__name__
)
def test_the_row_of_each(kind: type[Exception]) -> None:
    status, counts = EXPECTED[kind.__name__]
    failure = service.failure_of(kind())
    assert (failure.status, failure.outage) == (status, counts == "outage")
    assert failure.detail


@pytest.mark.parametrize(
    "kind", [kind for kind in CLASSES if kind.__name__ not in EXPECTED], ids=lambda kind: kind.__name__
)
def test_what_cannot_come_is_an_unexpected_failure_if_it_comes(kind: type[Exception]) -> None:
    assert service.failure_of(kind.__new__(kind)) is service.UNEXPECTED


@pytest.mark.parametrize(
    "error", [ValueError("x"), RuntimeError("the cluster is closed"), KeyError("k"), OSError(5, "io")]
)
def test_other_exceptions_are_unexpected_failures(error: Exception) -> None:
    assert service.failure_of(error).status == 500
    assert not service.failure_of(error).outage


def test_no_row_is_out_of_reach() -> None:
    """The first row that fits counts: each class stands in one row, and none is behind a base class of its own."""
    earlier: list[type[Exception]] = []
    for row in service.FAILURES:
        for kind in row.exceptions:
            assert not any(issubclass(kind, before) for before in earlier)
        earlier += row.exceptions


# ---- what is logged and answered ----


@pytest.fixture
def log(tmp_path) -> Iterator[service.Log]:
    """A log that goes into a file."""
    with (tmp_path / "log").open("wb") as file:
        log = service.Log("debug", descriptor=file.fileno())
        yield log
        log.close()


@pytest.fixture
def logged(log: service.Log, tmp_path) -> Callable[[], list[dict[str, Any]]]:
    """Close the log, and return its lines."""

    def lines() -> list[dict[str, Any]]:
        log.close()
        return [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]

    return lines


@pytest.fixture
def store(settings: service.Settings, log: service.Log) -> service.ProfileStore:
    """A store that is connected to nothing."""
    return service.ProfileStore(settings, log, service.Metrics())


@pytest.mark.parametrize("name", EXPECTED)
def test_the_problem_of_each(store: service.ProfileStore, logged, name: str) -> None:
    """The caller learns the status and nothing of the insides; the log has one line, but for a document that is not."""
    status, _ = EXPECTED[name]
    problem = store.problem(getattr(cb, name)(), "get")
    assert problem.status == status
    assert problem.headers.startswith("Retry-After: ") == (status == 503)
    body = json.loads(problem.document("an-id"))
    assert body["status"] == status
    assert "Exception" not in body["detail"]
    lines = logged()
    if status == 404:
        assert lines == []
        return
    [line] = lines
    assert (line["message"], line["operation"]) == ("couchbase failure", "get")
    assert name in line["error"]
    assert (line["level"] == "error") == ("advice" in line)


def code(number: int, kind: type[Exception] = cb.CouchbaseException, **context: object) -> Exception:
    """Return a query's failure as the SDK has it for a code, of a class that it has for others too."""

    class Coded(kind):  # type: ignore[misc, valid-type]  # a parameter
        error_context = type("Context", (), {"_get_base": lambda _self: {"first_error_code": number} | context})()
        message = "Streaming operation failed"

    return Coded()


SCANS = "User does not have credentials to use sequential scans. Add role query_use_sequential_scans on …"
RETRY = {"http_body": '{"requestID": "x",\n"results": [],\n"errors": [{"code": 1, "msg": "x", "retry" : true}]}'}
ROW_SAYS_RETRY = {"http_body": '{"results": [{"retry": true}], "errors": [{"code": 1, "msg": "x", "retry": false}]}'}
OUTDATED: dict[str, object] = {"retry_reasons": {"key_value_collection_outdated"}}


@pytest.mark.parametrize(
    ("error", "status", "counts"),
    [
        *[(code(number), 503, "outage") for number in (4080, 4090, 12008, 12009, 12015, 12020, 14000, 14507, 14999)],
        (code(15000), 500, "request"),
        (code(12345, **RETRY), 503, "outage"),
        (code(12345, **ROW_SAYS_RETRY), 500, "request"),
        (code(3000, cb.ParsingFailedException), 500, "request"),
        (code(0, cb.ParsingFailedException), 503, "outage"),
        (code(1080, cb.UnAmbiguousTimeoutException), 504, "outage"),
        (code(1080, cb.UnAmbiguousTimeoutException, **RETRY), 504, "outage"),
        (code(2120, cb.InternalServerFailureException, http_status=401), 503, "outage"),
        (code(0, cb.ParsingFailedException, http_status=401), 503, "outage"),
        (code(13014, cb.AuthenticationException, http_status=401), 503, "outage"),
        (code(13014, cb.AuthenticationException, http_status=401, first_error_message=SCANS), 500, "request"),
        (code(0, cb.UnAmbiguousTimeoutException, **OUTDATED), 500, "request"),
        (code(0, cb.DocumentNotFoundException, **OUTDATED), 404, "request"),
        (code(0, cb.TemporaryFailException, **OUTDATED), 503, "outage"),
    ],
    ids=str,
)
def test_what_the_code_and_the_context_say(error: Exception, status: int, counts: str) -> None:
    """What may be tried again is an outage; a retry's reason counts only where nothing else was answered."""
    failure = service.failure_of(error)
    assert (failure.status, failure.outage) == (status, counts == "outage")


@pytest.mark.parametrize(
    ("error", "advice"),
    [
        (cb.QueryIndexNotFoundException(), "CREATE INDEX"),
        (code(4000), "CREATE INDEX"),
        (cb.CollectionNotFoundException(), "tests.sample_data"),
        (cb.ScopeNotFoundException(), "tests.sample_data"),
        (cb.KeyspaceNotFoundException(), "tests.sample_data"),
        (code(12003), "tests.sample_data"),
        (code(2120, cb.InternalServerFailureException), "COUCHBASE_USER"),
        (code(0, cb.ParsingFailedException, http_status=401), "COUCHBASE_USER"),
        (code(13014, cb.AuthenticationException, http_status=401, first_error_message=SCANS), "CREATE INDEX"),
        (cb.BucketNotFoundException(), "tests.sample_data"),
        (cb.AuthenticationException(), "COUCHBASE_USER"),
        (cb.ValueFormatException(), "JSON"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_the_operator_is_told_what_to_do(store: service.ProfileStore, logged, error: Exception, advice: str) -> None:
    store.problem(error, "query")
    [line] = logged()
    assert advice in line["advice"]
    assert line["level"] == "error"


def test_the_advice_for_a_missing_index_are_statements_for_both(store: service.ProfileStore, logged) -> None:
    store.problem(cb.QueryIndexNotFoundException(), "query")
    [line] = logged()
    create, build, *others = line["advice"].split("\n")  # each can be pasted and sent as it is
    assert create == "CREATE INDEX by_nickname IF NOT EXISTS ON `user_data`(nickname)"
    assert build == "BUILD INDEX ON `user_data`(by_nickname)"  # of one that is there, but deferred
    assert others == [statement.replace("nickname", "user_id") for statement in (create, build)]
    assert ";" not in line["advice"]


class Unspeakable(cb.UnAmbiguousTimeoutException):
    """A failure that cannot even be printed: each of its texts raises."""

    def __str__(self) -> str:
        raise RuntimeError("no text")

    __repr__ = __str__

    @property
    def message(self) -> str:
        raise AttributeError("no message")

    @property
    def error_context(self) -> Any:
        raise TypeError("no context")


class UnspeakableError(Exception):
    """The same, of no class of the SDK."""

    def __str__(self) -> str:
        raise RuntimeError("no text")


def test_an_exception_whose_text_raises_does_not_hurt(store: service.ProfileStore, logged) -> None:
    """It has its status by its class, and its class is what the log says."""
    assert store.problem(Unspeakable(), "get").status == 504
    assert store.problem(UnspeakableError(), "get").status == 500
    assert [line["error"] for line in logged()] == ["Unspeakable", "UnspeakableError"]


def test_an_exception_whose_text_raises_is_answered_by_the_store(store: service.ProfileStore, logged) -> None:
    """A lone get, one of several, and a query, as the SDK would raise it."""

    class Failing:
        def __getattr__(self, _name: str) -> Callable[..., Any]:
            def fail(*_args: object, **_options: object) -> Any:
                raise Unspeakable

            return fail

    store.database._collections, store.database._scope = {service.USERS: Failing()}, Failing()

    async def judge(*keys: str) -> list[int]:
        operation, _, errors = fetched = store.database.fetch(service.USERS, list(keys))
        store.judge(fetched)
        found = store.problems(operation, errors)
        assert (operation.outcome, operation.size, found.keys()) == ("timeout", len(keys), set(keys))
        return [problem.status for problem in found.values()]

    assert asyncio.run(judge("user_data:1")) == [504]
    assert asyncio.run(judge("user_data:1", "user_data:2")) == [504, 504]
    with pytest.raises(Unspeakable) as raised:
        store.database.run_query(service.PROFILES_BY_NICKNAME, {}, 1.0, adhoc=False)
    query = service.Query(store.loader, "", {})
    query.handler = Mock(resume=Mock(return_value=False))
    query.finish(raised.value)
    [[answer], _] = query.handler.resume.call_args
    assert isinstance(answer, service.ProblemError) and answer.status == 504
    assert query.handler.operation and query.handler.operation.outcome == "timeout"
    assert [line["error"] for line in logged() if line["message"] == "couchbase failure"] == ["Unspeakable"] * 4


def probed(store: service.ProfileStore, error: Exception, *, beside: bool = False) -> str:
    """Have a half-open breaker's probe raise an error; return the breaker's state.

    With `beside` an earlier call has been answered just before.
    """
    collection = Mock(get=Mock(side_effect=[Mock(value=b"{}", cas=1), error]))
    store.database._collections = {service.USERS: collection}
    breaker, before = store.health.breaker, time.monotonic() - 100.0
    for _ in range(breaker.threshold):
        breaker.failed(before, before)

    async def probe() -> None:
        earlier = store.database.fetch(service.USERS, ["user_data:2"])
        assert breaker.allow(time.monotonic())
        if beside:
            store.judge(earlier)
        assert breaker.state == breaker.HALF_OPEN
        store.judge(store.database.fetch(service.USERS, ["user_data:1"]))

    asyncio.run(probe())
    return breaker.state


@pytest.mark.parametrize("name", EXPECTED)
def test_what_a_probe_tells_the_breaker(store: service.ProfileStore, name: str) -> None:
    """A failure that is the request's own is an answer: with nothing told, all would be refused for half a minute."""
    expected = service.Breaker.OPEN if EXPECTED[name][1] == "outage" else service.Breaker.CLOSED
    assert probed(store, getattr(cb, name)()) == expected


def test_a_probe_that_fails_is_told_whatever_else_is_answered(store: service.ProfileStore) -> None:
    assert probed(store, cb.UnAmbiguousTimeoutException(), beside=True) == service.Breaker.OPEN


# ---- which vBucket has which key ----


def test_keys_belong_to_the_vbucket_that_couchbase_says() -> None:
    """CRC-32 of the key, its upper half less the sign, modulo the number of vBuckets: as the server does it."""
    assert [service.vbucket(key) for key in ("", "a", "user_data:1", "user_data:é")] == [0, 183, 664, 217]


def test_there_is_a_key_to_probe_each_vbucket_with() -> None:
    assert [service.vbucket(service.probe_keys()[number]) for number in range(1024)] == list(range(1024))
