"""The service on the emulator, and the OpenAPI document that it serves."""

from collections.abc import Iterator
from typing import Any

import pytest

from tests.emulator.process import EmulatorProcess
from tests.service import ServiceProcess, settings_for


@pytest.fixture(scope="session")
def database() -> Iterator[EmulatorProcess]:
    """The emulator, with enough profiles for a nickname to be shared; tests leave it as they found it."""
    with EmulatorProcess(profiles=400, token="contract-tests") as emulator:
        yield emulator


@pytest.fixture(scope="session")
def service(database: EmulatorProcess) -> Iterator[ServiceProcess]:
    """The service, ready."""
    with ServiceProcess(settings_for(database)) as running:
        yield running


@pytest.fixture(scope="session")
def document(service: ServiceProcess) -> dict[str, Any]:
    """The OpenAPI document, as a caller gets it."""
    answer = service.get("/openapi.json")
    assert (answer.status, answer.headers["content-type"]) == (200, "application/json")
    decoded: dict[str, Any] = answer.json()
    return decoded
