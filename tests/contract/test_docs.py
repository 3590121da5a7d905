"""The page with Swagger UI: what it may load, from where, and that it is exactly what was published."""

import base64
import hashlib
import re
from html.parser import HTMLParser

import pytest

import micro_svc_demo as service
from tests.contract import swagger_ui
from tests.emulator.process import EmulatorProcess
from tests.service import ServiceProcess, settings_for

ASSETS = "https://assets.example:8443/npm/swagger-ui-dist@5"
[DEFAULT] = [row["default"] for row in service.ROWS if row["name"] == "docs_assets_url"]


class Page(HTMLParser):
    """Collects what a page loads and runs."""

    def __init__(self, page: bytes) -> None:
        super().__init__()
        self.loaded: dict[str, dict[str, str | None]] = {}
        self.inline: list[str] = []
        self.tags: list[str] = []
        self._within: str | None = None
        self.feed(page.decode())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.tags.append(tag)
        self._within = tag
        assert not any(name.startswith("on") or name == "style" for name in given), "the policy forbids these"
        url = given.get("src") or (given["href"] if tag == "link" else None)
        if url and not url.startswith("data:"):
            self.loaded[url] = given

    def handle_endtag(self, tag: str) -> None:
        self._within = None

    def handle_data(self, data: str) -> None:
        if self._within == "script":
            self.inline.append(data)


def policy(assets_url: str) -> dict[str, str]:
    name, _, value = service.docs(assets_url)[1].strip().partition(": ")
    assert name == "Content-Security-Policy"
    pairs = [directive.partition(" ") for directive in value.split("; ")]
    assert len({name for name, _, _ in pairs}) == len(pairs)
    return {name: sources for name, _, sources in pairs}


def digest(algorithm: str, data: bytes) -> str:
    return f"{algorithm}-{base64.b64encode(hashlib.new(algorithm, data).digest()).decode()}"


def test_the_files_are_those_that_were_published() -> None:
    """The hashes in the page are those of the files of the default's version, in a package made by others."""
    page = Page(service.docs(DEFAULT)[0])
    assert set(page.loaded) == {f"{DEFAULT}/swagger-ui-bundle.js", f"{DEFAULT}/swagger-ui.css"}
    for url, given in page.loaded.items():
        assert given["crossorigin"] == "anonymous"
        assert given["integrity"] == digest("sha384", (swagger_ui.directory() / url.rpartition("/")[2]).read_bytes())
    version = DEFAULT.rpartition("@")[2]
    script = (swagger_ui.directory() / "swagger-ui-bundle.js").read_text(encoding="utf-8")
    assert re.search(r'PACKAGE_VERSION:"([^"]*)"', script)[1] == version  # type: ignore[index]


def test_the_policy_allows_what_the_page_has_and_nothing_else() -> None:
    page, allowed = Page(service.docs(ASSETS)[0]), policy(ASSETS)
    [script] = page.inline
    sources = allowed["script-src"].split(" ")
    assert sources == [f"{ASSETS}/swagger-ui-bundle.js", f"'{digest('sha256', script.encode())}'"]
    assert allowed["style-src"] == f"{ASSETS}/swagger-ui.css"
    assert allowed["default-src"] == "'none'"
    assert not {"'unsafe-inline'", "'unsafe-eval'", "*"} & set(" ".join(allowed.values()).split(" "))
    assert {allowed[name] for name in ("base-uri", "form-action", "frame-ancestors")} == {"'none'"}
    assert not {"form", "iframe", "base", "style", "object"} & set(page.tags)


def test_the_page_as_served(database: EmulatorProcess) -> None:
    """The setting gets into page and policy."""
    with ServiceProcess(settings_for(database), "--docs-assets-url", ASSETS) as own:
        answer = own.get("/docs")
    assert (answer.status, answer.headers["content-type"]) == (200, "text/html; charset=utf-8")
    assert answer.body == service.docs(ASSETS)[0]
    assert "Content-Security-Policy: " + answer.headers["content-security-policy"] == service.docs(ASSETS)[1].strip()


REQUIRED = {"COUCHBASE_HOST": "db", "COUCHBASE_USER": "u", "COUCHBASE_PASSWORD": "p"}


@pytest.mark.parametrize("url", [DEFAULT, ASSETS, "http://localhost:1", "http://[::1]:8000/a", "https://a"])
def test_an_assets_url_is_taken(url: str) -> None:
    assert service.read_settings([], REQUIRED | {"DOCS_ASSETS_URL": url}).docs_assets_url == url


@pytest.mark.parametrize(
    "url",
    ["a", "//a", "/a", "ftp://a", "https://", "https://a/", "https://a/;script-src *", "https://a/ *", "https://a/?b"]
    + ['https://a/"><script>', "https://a/'none'", "https://u@a", "https://a/,b", "https://a/%22", "https://a/&quot;"]
    + ["https://a\n/b", "https://a/#b", "https://a/b\n", "data:a", "javascript:a", "https://*.a", "https://ä"],
)
def test_an_assets_url_that_could_mean_something_to_page_or_policy_is_refused(url: str) -> None:
    with pytest.raises(service.SettingsError, match="DOCS_ASSETS_URL"):
        service.read_settings([], REQUIRED | {"DOCS_ASSETS_URL": url})
