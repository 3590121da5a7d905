"""A browser, and the service with Swagger UI served beside it."""

import os
import shutil
from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser, sync_playwright

from tests.contract import swagger_ui
from tests.emulator.process import EmulatorProcess
from tests.service import ServiceProcess, settings_for

FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    """The system's Chromium; without one, the tests are skipped."""
    path = next(
        (path for path in ("/usr/bin/chromium", shutil.which("chromium")) if path and os.access(path, os.X_OK)), ""
    )
    if not path:
        pytest.skip("needs a browser (Debian's package chromium)")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def database() -> Iterator[EmulatorProcess]:
    """The emulator with a few profiles."""
    with EmulatorProcess(profiles=50, token="browser-tests") as emulator:
        yield emulator


@pytest.fixture(scope="module")
def service(database: EmulatorProcess) -> Iterator[ServiceProcess]:
    """The service, ready; its page loads Swagger UI from this machine."""
    with (
        swagger_ui.served(swagger_ui.directory()) as url,
        ServiceProcess(settings_for(database) | {"DOCS_ASSETS_URL": url}) as running,
    ):
        yield running
