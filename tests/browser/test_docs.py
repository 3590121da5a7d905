"""A person with a browser tries the service out on /docs."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Locator, Page, expect

from tests.contract import swagger_ui
from tests.emulator.process import EmulatorProcess
from tests.service import ServiceProcess, settings_for

WAIT_MS = 60_000
COLLECT = """
window.violations = [];
document.addEventListener("securitypolicyviolation", event =>
    window.violations.push(`${event.violatedDirective} ${event.blockedURI} ${event.sourceFile}:${event.lineNumber}`));
"""


class Complaints:
    """What the browser complains about on one page."""

    def __init__(self, page: Page) -> None:
        self._page = page
        self._heard: list[str] = []
        page.add_init_script(COLLECT)
        page.on("console", lambda message: message.type in {"error", "warning"} and self._heard.append(message.text))
        page.on("pageerror", lambda error: self._heard.append(str(error)))
        page.on("requestfailed", lambda request: self._heard.append(f"{request.url}: {request.failure}"))

    def take(self) -> list[str]:
        """Return what has come up since the last time."""
        heard, self._heard = self._heard, []
        return heard + self._page.evaluate("violations.splice(0)")


@pytest.fixture
def page(chromium: Browser) -> Iterator[Page]:
    context = chromium.new_context(viewport={"width": 1280, "height": 1000}, locale="en-US")
    context.set_default_timeout(WAIT_MS)
    yield context.new_page()
    context.close()


def execute(page: Page, operation: str) -> Locator:
    """Open an operation if it is closed, press Execute, and return its answer once it has come."""
    block = page.locator(f"[id='operations-{operation}']")
    if not block.locator("button.execute").is_visible():
        block.locator(".opblock-summary-control").click()
    with page.expect_request(lambda request: "/api/v1/" in request.url) as sent:
        block.get_by_role("button", name="Execute").click()
    assert not {"x-request-id", "if-none-match"} & set(sent.value.headers), "examples are not what a person asks for"
    assert sent.value.response() is not None
    return block.locator(".live-responses-table .response")


def test_authorize_try_and_log_out(page: Page, service: ServiceProcess, database: EmulatorProcess) -> None:
    """401 before and after, a profile and a picture in between; no error in the console, no violation of the policy."""
    complaints = Complaints(page)
    page.goto(f"http://127.0.0.1:{service.port}/docs")
    expect(page.locator(".opblock")).to_have_count(10)
    assert complaints.take() == []

    # without a token: the browser itself tells its console of any 401, and that is all it may tell
    profile = execute(page, "profiles-profile_by_id")
    expect(profile.locator(".response-col_status")).to_contain_text("401")
    refused = "Failed to load resource: the server responded with a status of 401 (Unauthorized)"
    assert complaints.take() == [refused]

    page.get_by_role("button", name="Authorize").first.click()
    page.get_by_label("auth-bearer-value").fill(database.token)
    page.get_by_role("button", name="Apply credentials").first.click()
    page.get_by_role("button", name="Close").first.click()

    profile = execute(page, "profiles-profile_by_id")
    expect(profile.locator(".response-col_status")).to_contain_text("200")
    expect(profile.locator(".response-col_description")).to_contain_text('"nickname": "doc"')

    answer = execute(page, "pictures-picture")
    expect(answer.locator(".response-col_status")).to_contain_text("200")
    picture = answer.locator("img")
    expect(picture).to_be_visible()
    page.wait_for_function("picture => picture.complete", arg=picture.element_handle())
    assert picture.evaluate("picture => picture.naturalWidth") == 128
    assert complaints.take() == []

    if target := os.environ.get("DOCS_SCREENSHOT"):
        answer.scroll_into_view_if_needed()
        page.screenshot(path=Path(target))

    page.get_by_role("button", name="Authorize").first.click()
    page.get_by_role("button", name="Remove authorization").click()
    page.get_by_role("button", name="Close").first.click()
    expect(execute(page, "profiles-profile_by_id").locator(".response-col_status")).to_contain_text("401")
    assert complaints.take() == [refused]


def test_a_lookup_with_a_limit(page: Page, service: ServiceProcess, database: EmulatorProcess) -> None:
    """Parameters have their examples and defaults, and get to the service; the other kind of token is taken too."""
    complaints = Complaints(page)
    page.goto(f"http://127.0.0.1:{service.port}/docs")
    page.get_by_role("button", name="Authorize").first.click()
    page.locator("#api_key_value").fill(database.token)
    page.get_by_role("button", name="Apply credentials").last.click()
    page.get_by_role("button", name="Close").first.click()
    page.locator("[id='operations-profiles-profiles_by_username'] .opblock-summary-control").click()
    expect(page.get_by_placeholder("limit")).to_have_value("100")
    page.get_by_placeholder("limit").fill("7")
    answer = execute(page, "profiles-profiles_by_username")
    expect(answer.locator(".response-col_status")).to_contain_text("200")
    expect(page.locator(".request-url")).to_contain_text("/api/v1/username/twalker1?limit=7&offset=0")
    assert complaints.take() == []


def test_a_script_that_was_tampered_with_does_not_run(page: Page, database: EmulatorProcess, tmp_path: Path) -> None:
    """One more byte, and the browser refuses the file; the page still says where the document is."""
    for name in ("swagger-ui-bundle.js", "swagger-ui.css"):
        (tmp_path / name).write_bytes((swagger_ui.directory() / name).read_bytes() + b" ")
    complaints = Complaints(page)
    with (
        swagger_ui.served(tmp_path) as url,
        ServiceProcess(settings_for(database) | {"DOCS_ASSETS_URL": url}) as own,
    ):
        page.goto(f"http://127.0.0.1:{own.port}/docs")
        assert page.evaluate("typeof SwaggerUIBundle") == "undefined"
        heard = [text for text in complaints.take() if "integrity" in text]
        assert len(heard) == 2
        with page.expect_navigation():
            page.get_by_role("link", name="/openapi.json").click()
        assert page.url.endswith("/openapi.json")
