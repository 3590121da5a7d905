"""As much of a Kubernetes API server as `kubectl apply` needs: it keeps objects, and gives a Deployment its default.

A patch is merged as RFC 7396 says. That is what a strategic one means as long as it has no lists and no directives, and
any other is refused.
"""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self

KINDS = {
    "v1": {"configmaps": "ConfigMap", "serviceaccounts": "ServiceAccount", "services": "Service"},
    "apps/v1": {"deployments": "Deployment"},
    "autoscaling/v2": {"horizontalpodautoscalers": "HorizontalPodAutoscaler"},
    "batch/v1": {"jobs": "Job"},
    "cert-manager.io/v1": {"certificates": "Certificate", "issuers": "Issuer"},
    "gateway.envoyproxy.io/v1alpha1": {"backendtrafficpolicies": "BackendTrafficPolicy"},
    "gateway.networking.k8s.io/v1": {
        "backendtlspolicies": "BackendTLSPolicy",
        "gateways": "Gateway",
        "httproutes": "HTTPRoute",
    },
    "networking.k8s.io/v1": {"networkpolicies": "NetworkPolicy"},
    "policy/v1": {"poddisruptionbudgets": "PodDisruptionBudget"},
}
"""The kinds that there are, by group and version and by their names in paths; all of them in namespaces."""
SHORT_NAMES = {"horizontalpodautoscalers": ["hpa"]}
VERBS = ["create", "delete", "get", "list", "patch"]

Object = dict[str, Any]


class Handler(BaseHTTPRequestHandler):
    """Answers for the objects of its server."""

    server: "ApiServer"
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        """Answer what kinds there are, or with an object."""
        path = self.path.partition("?")[0]
        group = path.removeprefix("/apis/").removeprefix("/api/")
        if path == "/api":
            self.answer({"kind": "APIVersions", "versions": ["v1"]})
        elif path == "/apis":
            versions = [{"groupVersion": name, "version": name.partition("/")[2]} for name in KINDS if "/" in name]
            groups = [
                {"name": each["groupVersion"].partition("/")[0], "versions": [each], "preferredVersion": each}
                for each in versions
            ]
            self.answer({"kind": "APIGroupList", "apiVersion": "v1", "groups": groups})
        elif group in KINDS:
            resources = [
                {"name": name, "singularName": "", "shortNames": SHORT_NAMES.get(name, []), "namespaced": True}
                | {"kind": kind, "verbs": VERBS}
                for name, kind in KINDS[group].items()
            ]
            self.answer({"kind": "APIResourceList", "groupVersion": group, "resources": resources})
        elif path in self.server.objects:
            self.answer(self.server.objects[path])
        else:
            self.answer({"kind": "Status", "status": "Failure", "reason": "NotFound", "code": 404}, 404)

    def do_POST(self) -> None:
        """Keep a new object."""
        made = self.content()
        path = f"{self.path.partition('?')[0]}/{made['metadata']['name']}"
        self.server.objects[path] = made
        self.changed(path)

    def do_PATCH(self) -> None:
        """Change an object."""
        path = self.path.partition("?")[0]
        merge(self.server.objects[path], self.content())
        self.changed(path)

    def do_DELETE(self) -> None:
        """Forget an object."""
        self.content()  # options, which would be the next request else
        del self.server.objects[self.path.partition("?")[0]]
        self.answer({"kind": "Status", "status": "Success"})

    def changed(self, path: str) -> None:
        """Complete an object as the API server does, note a Deployment's replicas, and answer with the object."""
        found = self.server.objects[path]
        if found["kind"] == "Deployment":
            self.server.replicas.append(found["spec"].setdefault("replicas", 1))
        self.answer(found)

    def content(self) -> Object:
        """Return the object or patch that was sent."""
        sent: Object = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        return sent

    def answer(self, body: Object, status: int = 200) -> None:
        """Send an answer."""
        text = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, format: str, *args: Any) -> None:
        """Log nothing."""


def merge(target: Object, patch: Object) -> None:
    """Merge a patch into an object; raises ValueError for one that only a real API server can merge."""
    for name, value in patch.items():
        if name.startswith("$") or isinstance(value, list):
            raise ValueError(f"cannot merge {name!r}")
        if value is None:
            target.pop(name, None)
        elif isinstance(value, dict):
            merge(target.setdefault(name, {}), value)
        else:
            target[name] = value


class ApiServer(ThreadingHTTPServer):
    """A context manager that listens on a free port of this machine.

    Attributes:
        objects: What there is, by path.
        replicas: The number that a Deployment had after each of its changes.
    """

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.objects: dict[str, Object] = {}
        self.replicas: list[int] = []
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self._thread = threading.Thread(target=self.serve_forever, daemon=True)

    def __enter__(self) -> Self:
        """Start it."""
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Stop it."""
        self.shutdown()
        self._thread.join()
        self.server_close()
