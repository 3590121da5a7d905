"""Swagger UI's files, as a package on PyPI brings them along, and a server for them."""

import functools
import importlib.util
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

STOP_SECONDS = 10


def directory() -> Path:
    """Return where the files are; the package itself is a Django application, and isn't imported."""
    found = importlib.util.find_spec("drf_spectacular_sidecar")
    assert found is not None and found.submodule_search_locations, "drf-spectacular-sidecar is not installed"
    return Path(found.submodule_search_locations[0], "static", "drf_spectacular_sidecar", "swagger-ui-dist")


class _Handler(SimpleHTTPRequestHandler):
    def end_headers(self) -> None:
        """Let pages of other origins have the files, as content delivery networks do: integrity needs it."""
        self.send_header("Access-Control-Allow-Origin", "*")
        super().end_headers()

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@contextmanager
def served(files: Path) -> Iterator[str]:
    """Serve a directory on a free port; yields its URL."""
    with ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(_Handler, directory=files)) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join(STOP_SECONDS)
