"""The gateway's overlay is of one piece: listeners, routes, certificates, ports and time-outs fit the service's."""

import http.client
import re
import shutil
import socket
import ssl
from pathlib import Path
from typing import Any

import pytest
import trustme

from micro_svc_demo import ROWS
from tests.deploy.kustomize import Manifest, identity, load, one, render
from tests.deploy.pod import Pod
from tests.service import REQUEST_SECONDS, ROOT, ServiceProcess

README = (ROOT / "README.md").read_text(encoding="utf-8")
DEFAULTS = {row["env"]: row["default"] for row in ROWS}


@pytest.fixture(scope="module")
def gateway() -> list[Manifest]:
    return render(ROOT / "k8s/gateway")


def named(objects: list[Manifest], kind: str) -> dict[str, Manifest]:
    """Return the specs of a kind's objects by their names."""
    return {each["metadata"]["name"]: each["spec"] for each in objects if each["kind"] == kind}


def certificate_in(objects: list[Manifest], secret: str) -> Manifest:
    """Return the Certificate's spec that makes a Secret."""
    [found] = [spec for spec in named(objects, "Certificate").values() if spec["secretName"] == secret]
    return found


def authority_of(objects: list[Manifest], certificate: Manifest) -> Manifest:
    """Return the spec of the Certificate that signs another one."""
    return certificate_in(objects, named(objects, "Issuer")[certificate["issuerRef"]["name"]]["ca"]["secretName"])


def setting(objects: list[Manifest], name: str) -> str:
    """Return a setting as the pods have it."""
    value: str = one(objects, "ConfigMap")["data"].get(name, DEFAULTS[name])
    return value


def seconds(duration: str) -> float:
    """Return a duration that is written in seconds."""
    assert duration.endswith("s") and not duration.endswith("ms")
    return float(duration.removesuffix("s"))


def rules_for(path: str, rules: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the rules that match a path, the one with the longest prefix first: that one counts."""
    found = []
    for rule in rules:
        [match] = rule["matches"]
        prefix = match["path"]["value"].rstrip("/")  # by elements: the slash at its end is not looked at
        if path == prefix or path.startswith(f"{prefix}/"):
            found.append((len(prefix), rule))
    return [rule for _, rule in sorted(found, key=lambda pair: -pair[0])]


class TestEdge:
    def test_each_listener_has_its_route(self, gateway: list[Manifest]) -> None:
        """By name, and nothing but the redirect is on the plain one."""
        [(name, spec)] = named(gateway, "Gateway").items()
        listeners = {each["name"]: each for each in spec["listeners"]}
        routes = {}
        for route in named(gateway, "HTTPRoute").values():
            [parent] = route["parentRefs"]
            assert parent["name"] == name
            routes[parent["sectionName"]] = route["rules"]
        assert routes.keys() == listeners.keys() == {"https", "http"}
        assert (listeners["https"]["protocol"], listeners["https"]["port"]) == ("HTTPS", 443)
        assert (listeners["http"]["protocol"], listeners["http"]["port"]) == ("HTTP", 80)
        [redirect] = routes["http"]
        assert "backendRefs" not in redirect and rules_for("/", [redirect]) == [redirect]
        assert [each["requestRedirect"]["scheme"] for each in redirect["filters"]] == ["https"]

    def test_certificate_is_made(self, gateway: list[Manifest]) -> None:
        """The HTTPS listener's Secret is that of a Certificate for a host name, signed by a known authority."""
        [listener] = [each for each in one(gateway, "Gateway")["spec"]["listeners"] if each["protocol"] == "HTTPS"]
        [reference] = listener["tls"]["certificateRefs"]
        certificate = certificate_in(gateway, reference["name"])
        assert certificate["commonName"] in certificate["dnsNames"] and "server auth" in certificate["usages"]
        assert authority_of(gateway, certificate)["isCA"] is True

    def test_only_the_api_is_public(self, gateway: list[Manifest], base: list[Manifest]) -> None:
        """README's routes below /api/ go to the Service's port, all others nowhere."""
        rules = named(gateway, "HTTPRoute")["demopy"]["rules"]
        paths = re.findall(r"^- `GET (\S+)`", README, re.MULTILINE)
        assert {bool(rules_for(path, rules)) for path in paths if path.startswith("/api/v1/")} == {True}
        others = [path for path in [*paths, "/", "/api/", "/api/v10/id/1"] if not path.startswith("/api/v1/")]
        assert len(others) > 6 and not any(rules_for(path, rules) for path in others)
        service = one(base, "Service")
        for rule in rules:
            [backend] = rule["backendRefs"]
            assert backend["name"] == service["metadata"]["name"]
            assert backend["port"] in {port["port"] for port in service["spec"]["ports"]}

    def test_time_outs_fit_the_services(self, gateway: list[Manifest]) -> None:
        """The longest wait for Couchbase and a second: the service's 504 comes first. Pictures have no limit."""
        longest = max(int(setting(gateway, f"COUCHBASE_{which}TIMEOUT_MS")) for which in ("", "QUERY_")) / 1000
        rules = named(gateway, "HTTPRoute")["demopy"]["rules"]
        limits = {
            path: seconds(rules_for(path, rules)[0]["timeouts"]["request"])
            for path in ("/api/v1/id/1", "/api/v1/nickname/x", "/api/v1/picture/record/1", "/api/v1/picture/raw/1")
        }
        assert limits.pop("/api/v1/picture/raw/1") == 0
        assert set(limits.values()) == {longest + 1}


class TestLastHop:
    def test_policy_is_for_the_services_port(self, gateway: list[Manifest]) -> None:
        [target] = one(gateway, "BackendTLSPolicy")["spec"]["targetRefs"]
        service = one(gateway, "Service")
        assert target["name"] == service["metadata"]["name"]
        assert target["sectionName"] in {port["name"] for port in service["spec"]["ports"]}

    def test_gateway_trusts_the_pods_certificate(self, gateway: list[Manifest]) -> None:
        """Its host name is among the certificate's, and README makes the ConfigMap of the authority that signs it."""
        validation = one(gateway, "BackendTLSPolicy")["spec"]["validation"]
        [volume] = [each for each in Pod.of(gateway).spec["volumes"] if each["name"] == "tls"]
        certificate = certificate_in(gateway, volume["secret"]["secretName"])
        assert validation["hostname"] in certificate["dnsNames"] and "server auth" in certificate["usages"]
        service = one(gateway, "Service")["metadata"]
        assert validation["hostname"] == f"{service['name']}.{service['namespace']}.svc"
        authority = authority_of(gateway, certificate)
        assert named(gateway, "Issuer")[authority["issuerRef"]["name"]] == {"selfSigned": {}}
        [configmap] = validation["caCertificateRefs"]
        [file] = re.findall(
            rf"^kubectl get secret {authority['secretName']} -n demopy .*> (\S+)$", README, re.MULTILINE
        )
        assert f"\nkubectl create configmap {configmap['name']} -n demopy --from-file=ca.crt={file} " in README

    def test_pods_have_it_and_wait_for_it(self, gateway: list[Manifest]) -> None:
        """The settings name the files of the mounted Secret, which is none that may be missing."""
        pod = Pod.of(gateway)
        [volume] = [each for each in pod.spec["volumes"] if each["name"] == "tls"]
        [mount] = [each for each in pod.container["volumeMounts"] if each["name"] == "tls"]
        assert "optional" not in volume["secret"] and mount["readOnly"] is True
        files = {name: value for name, value in pod.environment.items() if name.startswith("SERVICE_TLS_")}
        assert files == {
            "SERVICE_TLS_CERT": f"{mount['mountPath']}/tls.crt",
            "SERVICE_TLS_KEY": f"{mount['mountPath']}/tls.key",
        }
        assert files.keys() <= DEFAULTS.keys()

    def test_service_is_what_the_policy_wants(self, gateway: list[Manifest], tmp_path: Path) -> None:
        """Started with the overlay's settings: TLS for whoever checks authority and name; probes stay plain."""
        pod, validation = Pod.of(gateway), one(gateway, "BackendTLSPolicy")["spec"]["validation"]
        [volume] = [each for each in pod.spec["volumes"] if each["name"] == "tls"]
        authority, names = trustme.CA(), certificate_in(gateway, volume["secret"]["secretName"])["dnsNames"]
        certificate = authority.issue_cert(*names)
        for name, blobs in (
            ("tls.crt", certificate.cert_chain_pems),
            ("tls.key", [certificate.private_key_pem]),
            ("password", [trustme.Blob(b"p")]),
        ):
            (tmp_path / name).write_bytes(b"".join(blob.bytes() for blob in blobs))
        mounts = "|".join(mount["mountPath"] for mount in pod.container["volumeMounts"])
        environment = {name: re.sub(f"^({mounts})/", f"{tmp_path}/", text) for name, text in pod.environment.items()}
        environment |= {"COUCHBASE_HOST": "couchbase://127.0.0.1:1", "COUCHBASE_TLS_CA": ""}
        environment |= {"SERVICE_PORT": "0", "METRICS_PORT": "0"}
        context = ssl.create_default_context(cadata=authority.cert_pem.bytes().decode())
        service = ServiceProcess(environment).start()
        try:
            connection = http.client.HTTPConnection(validation["hostname"])
            plain = socket.create_connection(("127.0.0.1", service.port), timeout=REQUEST_SECONDS)
            connection.sock = context.wrap_socket(plain, server_hostname=validation["hostname"])
            connection.request("GET", "/openapi.json")
            assert connection.getresponse().status == 200
            connection.close()
            probe = pod.container["livenessProbe"]["httpGet"]["path"]
            assert service.get(probe, port=service.metrics_port).status == 200
        finally:
            service.stop()

    def test_base_says_how(self, base: list[Manifest], gateway: list[Manifest]) -> None:
        """Without the overlay: an optional Secret, and the settings in a comment that are right if it is taken away."""
        [volume] = [each for each in Pod.of(base).spec["volumes"] if each["name"] == "tls"]
        assert volume["secret"]["optional"] is True
        text = (ROOT / "k8s/base/configmap.yaml").read_text()
        said = dict(re.findall(r"^  # (SERVICE_TLS_\w+): (\S+)$", text, re.MULTILINE))
        assert one(base, "ConfigMap")["data"] | said == one(gateway, "ConfigMap")["data"] and said
        assert f"kubectl create secret tls {volume['secret']['secretName']} -n demopy " in text

    def test_what_asks_the_metrics_port_is_not_concerned(self, gateway: list[Manifest]) -> None:
        """Probes and Prometheus go there, in plain text; so no probe's scheme changes with TLS."""
        container = Pod.of(gateway).container
        for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
            assert container[probe]["httpGet"]["port"] == "metrics" and "scheme" not in container[probe]["httpGet"]
        [endpoint] = load(ROOT / "k8s/monitoring/podmonitor.yaml")["spec"]["podMetricsEndpoints"]
        assert endpoint["port"] == "metrics" and "scheme" not in endpoint


class TestOverlay:
    def test_only_that_differs(self, base: list[Manifest], gateway: list[Manifest]) -> None:
        """Settings, the Secret that must be there, the Service's type, and who is let in; the rest is the base's."""
        there = {identity(each): each for each in gateway}
        assert one(gateway, "Service")["spec"] == one(base, "Service")["spec"] | {"type": "ClusterIP"}
        for manifest in base:
            same = there[identity(manifest)] == manifest
            assert same == (manifest["kind"] not in {"ConfigMap", "Deployment", "Service", "NetworkPolicy"})

    def test_only_the_gateway_is_let_in(self, base: list[Manifest], gateway: list[Manifest]) -> None:
        """To the port that the Service sends to; metrics and the way out are as before."""
        before, after = one(base, "NetworkPolicy")["spec"], one(gateway, "NetworkPolicy")["spec"]
        api = after["ingress"][0]
        assert api.pop("from") == [
            {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "envoy-gateway-system"}}}
        ]
        assert after == before and [each["port"] for each in api["ports"]] == [Pod.of(gateway).port("http")]

    def test_with_the_autoscaler(self, gateway: list[Manifest], tmp_path: Path) -> None:
        """As the kustomization says: its base is changed for the gateway's, and both are there."""
        shutil.copytree(ROOT / "k8s", tmp_path / "k8s")
        file = tmp_path / "k8s/autoscaling/kustomization.yaml"
        file.write_text(file.read_text().replace("- ../base\n", "- ../gateway\n"))
        both = render(tmp_path / "k8s/autoscaling")
        assert {identity(each) for each in both} - {identity(each) for each in gateway} == {
            ("HorizontalPodAutoscaler", "demopy", "demopy")
        }
        assert "replicas" not in one(both, "Deployment")["spec"]


class TestRateLimit:
    """What only Envoy Gateway knows is by itself."""

    @pytest.fixture
    def policy(self) -> Manifest:
        [policy] = named(render(ROOT / "k8s/gateway/envoy"), "BackendTrafficPolicy").values()
        return policy

    def test_it_is_for_the_public_route(self, policy: Manifest, gateway: list[Manifest]) -> None:
        [target] = policy["targetRefs"]
        assert "timeouts" in named(gateway, "HTTPRoute")[target["name"]]["rules"][0]
        assert "BackendTrafficPolicy" not in {each["kind"] for each in gateway}

    def test_each_client_has_its_own(self, policy: Manifest) -> None:
        """100 requests/s for each address of either family."""
        rules = policy["rateLimit"]["local"]["rules"]
        assert [rule["limit"] for rule in rules] == 2 * [{"requests": 100, "unit": "Second"}]
        selected = [selector["sourceCIDR"] for rule in rules for selector in rule["clientSelectors"]]
        assert selected == [{"type": "Distinct", "value": value} for value in ("0.0.0.0/0", "::/0")]

    def test_the_gateway_gives_idle_connections_up_first(self, policy: Manifest, gateway: list[Manifest]) -> None:
        idle = seconds(policy["timeout"]["http"]["connectionIdleTimeout"])
        assert idle < int(setting(gateway, "IDLE_SECONDS"))
