"""The OpenAPI document is valid, complete, and says what the service does."""

import ast
import base64
import fnmatch
import json
from collections.abc import Iterator
from typing import Any

import pytest
from couchbase.options import UpsertOptions
from couchbase.transcoder import RawBinaryTranscoder
from jsonschema import Draft202012Validator
from openapi_spec_validator import OpenAPIV31SpecValidator

import micro_svc_demo
from tests import sample_data
from tests.emulator.process import EmulatorProcess
from tests.service import ROOT, Answer, ServiceProcess, settings_for

DOCUMENT: dict[str, Any] = json.loads(micro_svc_demo.openapi())
PATHS: list[str] = sorted(DOCUMENT["paths"])
# The document's description says that these are not listed.
UNLISTED = {"date", "content-length", "content-type", "connection", "keep-alive"}
UNLISTED |= {"x-request-id", "x-content-type-options", "cache-control"}


def resolved(part: Any) -> Any:
    """Return what a part of the document says, references to components followed."""
    while isinstance(part, dict) and "$ref" in part:
        _, _, kind, name = part["$ref"].split("/")
        part = DOCUMENT["components"][kind][name]
    return part


def validator(schema: dict[str, Any]) -> Draft202012Validator:
    """Return a validator for one of the document's schemas, which may refer to its components."""
    whole = {"components": DOCUMENT["components"]} | schema
    return Draft202012Validator(whole, format_checker=Draft202012Validator.FORMAT_CHECKER)


def operations() -> Iterator[tuple[str, dict[str, Any]]]:
    for path in PATHS:
        yield path, DOCUMENT["paths"][path]["get"]


def responses() -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield every answer that is described, with a name for it."""
    for path, operation in operations():
        for status, response in operation["responses"].items():
            yield f"{path} {status}", resolved(response)
    for status, response in DOCUMENT["components"]["responses"].items():
        yield f"components {status}", response


def test_it_is_valid(document: dict[str, Any]) -> None:
    OpenAPIV31SpecValidator(document).validate()


def test_it_is_the_code_s(document: dict[str, Any]) -> None:
    assert document == DOCUMENT
    assert document["info"]["version"] == micro_svc_demo.__version__


def test_it_has_exactly_the_routes_of_do_get() -> None:
    """Each route template and path of the dispatch chain is in the document, and the other way round."""
    tree = ast.parse((ROOT / "micro_svc_demo.py").read_text(encoding="utf-8"))
    do_get = next(node for node in ast.walk(tree) if isinstance(node, ast.AsyncFunctionDef) and node.name == "do_GET")
    tested = {
        (node.left.id, constant.value)
        for node in ast.walk(do_get)
        if isinstance(node, ast.Compare) and isinstance(node.left, ast.Name)
        for constant in node.comparators
        if isinstance(constant, ast.Constant)
    }
    paths = {value for name, value in tested if name == "path"}
    prefixes = {value for name, value in tested if name == "route"}
    assert len(paths) >= 5 and len(prefixes) >= 5, "do_GET no longer compares `path` and `route` with constants"
    assert {path for path in PATHS if "{" not in path} == paths
    assert {path.rpartition("/")[0] for path in PATHS if "{" in path} == prefixes
    assert {path.rpartition("/")[2].strip("{}") for path in PATHS if "{" in path} == {"id", "nickname", "username"}
    assert set(PATHS) <= set(micro_svc_demo.ROUTES), "a route that metrics and log would call by another name"


def test_every_token_protected_route_says_so() -> None:
    for path, operation in operations():
        wanted = [{"bearer": []}, {"token": []}] if path.startswith("/api/") else []
        assert operation["security"] == wanted, path
        assert ("401" in operation["responses"]) == path.startswith("/api/"), path


def test_it_says_which_of_two_tokens_counts() -> None:
    assert "`Authorization: Bearer`" in DOCUMENT["components"]["securitySchemes"]["token"]["description"]


def test_every_status_of_the_code_is_described() -> None:
    """Each status that a ProblemError in the code is made with has an answer of its own among the components."""
    tree = ast.parse((ROOT / "micro_svc_demo.py").read_text(encoding="utf-8"))
    made = {row.status for row in micro_svc_demo.FAILURES} | {micro_svc_demo.UNEXPECTED.status}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "ProblemError":
            status = node.args[0]
            if isinstance(status, ast.Constant):
                made.add(status.value)
    assert {400, 401, 404, 405, 408, 422, 503, 504} <= made
    assert {int(status) for status in DOCUMENT["components"]["responses"]} == made | {304}


def example_of(described: dict[str, Any]) -> Any:
    return described.get("example", described["schema"].get("default"))


def test_everything_that_can_have_an_example_has_a_valid_one() -> None:
    """But If-Match and If-None-Match: Swagger UI would send it with every request that it tries out."""
    components = DOCUMENT["components"]
    parameters = [row for row in components["parameters"].values() if row["in"] != "header"]
    bodies = [body for _, response in responses() for body in response.get("content", {}).values() if "schema" in body]
    assert len(parameters) == len(components["parameters"]) - 2 and len(bodies) > 40
    for described in [*parameters, *components["headers"].values(), *bodies]:
        validator(described["schema"]).validate(example_of(described))


def test_examples_say_what_they_are_examples_of() -> None:
    """The record's picture is a picture, and each problem has the status that it is an example of."""
    record = DOCUMENT["paths"]["/api/v1/picture/record/{id}"]["get"]["responses"]["200"]["content"]["application/json"]
    assert base64.b64decode(record["example"][0]["image"], validate=True).startswith(b"\x89PNG\r\n\x1a\n")
    for name, response in responses():
        problem = response.get("content", {}).get("application/problem+json")
        assert (problem is not None) == (int(name[-3:]) >= 400)
        if problem:
            assert problem["example"]["status"] == int(name[-3:])


def test_the_sample_profiles_are_as_described() -> None:
    """Every field of every profile is described, with its type; nothing is described that no profile has."""
    schema = DOCUMENT["components"]["schemas"]["Profile"]
    checked = validator(schema)
    for profile in sample_data.profiles(200, sample_data.DEFAULT_SEED):
        checked.validate(profile)
        assert set(profile) == set(schema["properties"])


def check(path: str, answer: Answer) -> None:
    """Assert that an answer is as its route's description says: status, header fields, media type, body."""
    described = DOCUMENT["paths"][path]["get"]["responses"]
    assert str(answer.status) in described, f"{path}: {answer.status} is not described"
    check_against(resolved(described[str(answer.status)]), path, answer)


def check_against(response: dict[str, Any], path: str, answer: Answer) -> None:
    """Assert that an answer has what is described, and nothing else."""
    fields = {name.lower() for name in response["headers"]}
    missing, further = fields - set(answer.headers), set(answer.headers) - fields - UNLISTED
    allowed = {"link", "x-couchbase-replica"}  # their descriptions say so
    allowed |= {"content-security-policy"} if answer.status == 304 and "/raw/" not in path else set()
    assert missing <= allowed and not further, f"{path} {answer}"
    assert answer.headers["x-request-id"] and answer.headers["x-content-type-options"] == "nosniff"
    cached = "no-cache" if path in {"/openapi.json", "/docs"} else "no-store"
    cached = "private, no-cache" if path.startswith("/api/") else cached
    assert answer.headers["cache-control"] == (cached if answer.status < 400 else "no-store"), f"{path} {answer}"
    if "content" not in response:
        assert answer.body == b""
        return
    [(media_type, body)] = response["content"].items()
    given = answer.headers["content-type"].partition(";")[0]
    assert fnmatch.fnmatchcase(given, media_type), f"{path}: {given} is not {media_type}"
    if "schema" in body:
        validator(body["schema"]).validate(answer.json())
    elif "example" in body:
        assert answer.json() == body["example"]


def examples(path: str) -> str:
    """Return the path with its parameters' examples."""
    parameters = map(resolved, DOCUMENT["paths"][path]["get"]["parameters"])
    return path.format(**{row["name"]: example_of(row) for row in parameters})


@pytest.mark.parametrize("path", PATHS)
def test_the_example_is_answered_as_described(service: ServiceProcess, database: EmulatorProcess, path: str) -> None:
    """With the examples for parameters, each route answers its 200; HEAD has the same header fields, and no body."""
    port = service.metrics_port if path == "/metrics" else service.port
    got, head = (
        service.request(method, examples(path), database.token, port, X_Request_ID="mine") for method in ("GET", "HEAD")
    )
    assert got.status == head.status == 200
    check(path, got)
    unlike = {"date"} | ({"content-length"} if path == "/metrics" else set())
    assert {name: value for name, value in head.headers.items() if name not in unlike} == {
        name: value for name, value in got.headers.items() if name not in unlike
    }
    assert head.body == b""


@pytest.mark.parametrize("path", [path for path in PATHS if path.startswith("/api/")])
def test_refusals_are_answered_as_described(service: ServiceProcess, database: EmulatorProcess, path: str) -> None:
    """Each route's 304, 400, 401, 404 and 412 are as described."""
    example, token = examples(path), database.token
    answers = {
        400: service.get(example.rpartition("/")[0] + "/%zz", token),
        401: service.get(example, "wrong"),
        404: service.get(example.rpartition("/")[0] + "/nobody", token),
    }
    if "304" in DOCUMENT["paths"][path]["get"]["responses"]:
        answers[304] = service.get(example, token, If_None_Match="*")
        answers[412] = service.get(example, token, If_Match='"another"')
    for status, answer in answers.items():
        assert answer.status == status
        check(path, answer)


def test_pages_and_their_links_are_as_described(service: ServiceProcess, database: EmulatorProcess) -> None:
    path = "/api/v1/nickname/{nickname}"
    answer = service.get(f"{examples(path)}?limit=1", database.token)
    assert answer.status == 200 and "link" in answer.headers, "the example's nickname is not shared"
    check(path, answer)
    for query in ("limit=0", f"limit={micro_svc_demo.MAX_LIMIT + 1}", "limit=a", "offset=-1", "offset=0&offset=0"):
        answer = service.get(f"{examples(path)}?{query}", database.token)
        assert answer.status == 400
        check(path, answer)


@pytest.mark.parametrize("path", PATHS)
def test_requests_that_no_route_takes_are_answered_as_described(service: ServiceProcess, path: str) -> None:
    for status, fields, suffix in (
        (414, {}, "?" + "x" * micro_svc_demo.MAX_TARGET_BYTES),
        (431, {"X": "x" * micro_svc_demo.MAX_HEAD_BYTES}, ""),
        (413, {"Content-Length": "5"}, ""),
        (417, {"Expect": "miracles"}, ""),
        (501, {"Transfer-Encoding": "gzip"}, ""),
    ):
        answer = service.get(examples(path) + suffix, **fields)
        assert answer.status == status and answer.headers["connection"] == "close"
        check(path, answer)


@pytest.mark.parametrize("path", PATHS)
def test_other_methods_are_answered_as_described(service: ServiceProcess, path: str) -> None:
    """OPTIONS has the methods; any other method, known or not, is the 405 of the components."""
    assert "any other, known or not, is answered 405" in DOCUMENT["info"]["description"]
    assert service.request("OPTIONS", examples(path)).headers["allow"] == "GET, HEAD, OPTIONS"
    for method, fields in (("POST", {}), ("POST", {"Content-Length": "5"}), ("NOBODY-KNOWS", {})):
        answer = service.request(method, examples(path), **fields)
        assert answer.status == 405 and answer.headers.get("connection") == ("close" if fields else None)
        check_against(DOCUMENT["components"]["responses"]["405"], path, answer)


def test_failures_are_answered_as_described(database: EmulatorProcess) -> None:
    """While Couchbase is frozen: 504, then 503, with what the document says that they have."""
    paths = ("/api/v1/id/{id}", "/api/v1/nickname/{nickname}", "/api/v1/picture/raw/{id}")
    seen = set()
    with ServiceProcess(
        settings_for(database) | {"COUCHBASE_TIMEOUT_MS": "300", "COUCHBASE_QUERY_TIMEOUT_MS": "300"}
    ) as own:
        database.fault("freeze", service="kv")
        database.fault("freeze", service="query")
        try:
            for path in paths * 7:  # more than the breakers' threshold
                answer = own.get(examples(path), database.token)
                check(path, answer)
                seen.add(answer.status)
            own.wait_until_ready(False)
            check("/readyz", own.get("/readyz"))
            assert own.get("/readyz").json()["reasons"]
        finally:
            database.clear()
    assert seen == {503, 504}


@pytest.fixture(scope="module")
def scope(database: EmulatorProcess) -> Iterator[Any]:
    """The SDK's scope of the same database, to store what the sample data has none of."""
    settings = micro_svc_demo.read_settings([], settings_for(database))
    cluster = micro_svc_demo.open_cluster(settings)
    yield cluster.bucket(settings.couchbase_bucket).scope(settings.couchbase_scope)
    cluster.close()


def test_an_unusable_picture_is_answered_as_described(
    service: ServiceProcess, database: EmulatorProcess, scope: Any
) -> None:
    images = scope.collection("user_images")
    images.upsert("user_images:broken", json.dumps({"record_id": 0, "type": "png"}))
    try:
        answer = service.get("/api/v1/picture/raw/broken", database.token)
        assert answer.status == 422
        check("/api/v1/picture/raw/{id}", answer)
        check("/api/v1/picture/record/{id}", service.get("/api/v1/picture/record/broken", database.token))
    finally:
        images.remove("user_images:broken")


def test_a_document_that_is_not_json_is_answered_as_described(database: EmulatorProcess, scope: Any) -> None:
    users = scope.collection("user_data")
    users.upsert("user_data:binary", b"\x00", UpsertOptions(transcoder=RawBinaryTranscoder()))
    try:
        with ServiceProcess(settings_for(database)) as own:  # of its own, as it logs an error
            answer = own.get("/api/v1/id/binary", database.token)
        assert answer.status == 500
        check("/api/v1/id/{id}", answer)
    finally:
        users.remove("user_data:binary")
