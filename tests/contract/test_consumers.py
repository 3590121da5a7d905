"""What callers rely on, as they wrote it down (Pact files in `consumers`), replayed against the service by Pact."""

import contextlib
import json
import os
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from couchbase.exceptions import DocumentNotFoundException
from pact import Verifier

import micro_svc_demo
from tests.emulator.process import EmulatorProcess
from tests.service import ServiceProcess, settings_for

CONTRACTS = sorted((Path(__file__).parent / "consumers").glob("*.json"))
PROVIDER = "micro_svc_demo"
os.environ["PACT_DO_NOT_TRACK"] = "true"  # else its core reports each verification to its makers
REQUEST_TIMEOUT_MS = 60_000
STOP_SECONDS = 10


def response_of(contract: str, description: str) -> Any:
    """Return the body that an exchange's answer has."""
    exchanges = json.loads((Path(__file__).parent / "consumers" / contract).read_text(encoding="utf-8"))["interactions"]
    [body] = [row["response"]["body"]["content"] for row in exchanges if row["description"] == description]
    return body


PROFILE = response_of("storefront-profile-by-id.json", "a profile by id")[0]
PICTURE = {"record_id": 7001, "type": "png", "image": response_of("directory-raw-picture.json", "a raw picture")}
# What is stored in each state that an exchange may begin with: collection, document; None for no document.
STATES: dict[str, tuple[str, dict[str, Any] | None]] = {
    "profile 7001 exists": ("user_data", PROFILE),
    "profile 7001 does not exist": ("user_data", None),
    "picture 7001 exists": ("user_images", PICTURE),
    "picture 7001 does not exist": ("user_images", None),
    "picture 7001 has no image": ("user_images", {"record_id": 7001, "type": "png"}),
}


@pytest.fixture(scope="module")
def states(database: EmulatorProcess) -> Iterator[str]:
    """The URL where Pact asks for the state that the next exchange begins with."""
    settings = micro_svc_demo.read_settings([], settings_for(database))
    cluster = micro_svc_demo.open_cluster(settings)
    scope = cluster.bucket(settings.couchbase_bucket).scope(settings.couchbase_scope)

    def store(collection: str, document: dict[str, Any] | None) -> None:
        key = f"{collection}:7001"
        if document is not None:
            scope.collection(collection).upsert(key, json.dumps(document))
            return
        with contextlib.suppress(DocumentNotFoundException):
            scope.collection(collection).remove(key)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            name = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["state"]
            if name in STATES:
                store(*STATES[name])
            self.send_response(200 if name in STATES else 404)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            """Say nothing: Pact reports what fails."""

    # not Pact's own server for this, which leaves its listening socket open
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()
        thread.join(STOP_SECONDS)
    store("user_data", None)
    store("user_images", None)
    cluster.close()


def verify(contract: Path, service: ServiceProcess, states: str) -> None:
    """Replay a contract's exchanges; raises RuntimeError unless all are answered as they say."""
    verifier = Verifier(PROVIDER, host="127.0.0.1").add_transport(url=f"http://127.0.0.1:{service.port}")
    verifier.set_request_timeout(REQUEST_TIMEOUT_MS).set_error_on_empty_pact().set_coloured_output(enabled=False)
    verifier.state_handler(states, body=True).add_source(contract).verify()


@pytest.mark.parametrize("contract", CONTRACTS, ids=lambda contract: contract.stem)
def test_the_contract_is_kept(service: ServiceProcess, states: str, contract: Path) -> None:
    verify(contract, service, states)


@pytest.mark.parametrize("contract", CONTRACTS, ids=lambda contract: contract.stem)
def test_a_contract_that_is_not_kept_is_found_out(
    service: ServiceProcess, states: str, contract: Path, tmp_path: Path
) -> None:
    """With one answer changed, the status or the body, verification fails."""
    for member, value in (("status", 299), ("body", {"contentType": "application/json", "content": [{"a": 1}]})):
        changed = json.loads(contract.read_text(encoding="utf-8"))
        changed["interactions"][0]["response"][member] = value
        path = tmp_path / f"{member}.json"
        path.write_text(json.dumps(changed), encoding="utf-8")
        with pytest.raises(RuntimeError, match="Failed to execute verifier"):
            verify(path, service, states)


def test_there_is_a_contract_of_each_of_the_two_commonest_callers() -> None:
    paths = {
        exchange["request"]["path"].rpartition("/")[0]
        for contract in CONTRACTS
        for exchange in json.loads(contract.read_text(encoding="utf-8"))["interactions"]
    }
    assert paths == {"/api/v1/id", "/api/v1/picture/raw"}
