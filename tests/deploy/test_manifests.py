"""The manifests by themselves: valid for the newest Kubernetes versions, restricted, and of one piece."""

import copy
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

from tests.deploy.conftest import KUSTOMIZATIONS
from tests.deploy.kustomize import Manifest, UnknownFieldError, identity, load, one, render
from tests.deploy.pod_security import violations
from tests.deploy.resources import SPECS, mebibytes, millicores, schema_of
from tests.service import ROOT

MINORS = list(dict.fromkeys(kubernetes_validate.utils.all_versions()))[-3:]
"""The last three minor versions that there are schemas for: those that Kubernetes supports at a time."""
KUBECTL_SECONDS = 60
README = (ROOT / "README.md").read_text(encoding="utf-8")
TEMPLATES = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "k8s").rglob("*.template"))
FOLDERS = sorted(path.parent for path in (ROOT / "k8s").rglob("kustomization.yaml"))
CUSTOM = sorted(
    path.relative_to(ROOT).as_posix()
    for folder in ("couchbase", "gateway")
    for path in (ROOT / "k8s" / folder).rglob("[!k]*.yaml")
)
APPLIED = (".yaml", ".yml", ".json")
"""What `kubectl apply -f FOLDER` reads."""


def pods(objects: list[Manifest]) -> list[Manifest]:
    """Return the specs of the pods that these objects make."""
    return [each["spec"]["template"]["spec"] for each in objects if each["kind"] in ("Deployment", "Job")]


def deployment(objects: list[Manifest]) -> Manifest:
    return one(objects, "Deployment")["spec"]


class TestValidity:
    def test_minors_are_three_in_a_row(self) -> None:
        numbers = [int(version.split(".")[1]) for version in MINORS]
        assert numbers == list(range(numbers[0], numbers[0] + 3))

    @pytest.mark.parametrize("minor", MINORS)
    def test_every_object_is_valid(self, rendered: list[Manifest], minor: str) -> None:
        """Strictly, by the schemas of Kubernetes; custom resources by those that are in resources.py."""
        for manifest in rendered:
            if (manifest["apiVersion"], manifest["kind"]) in SPECS:
                jsonschema.validate(manifest, schema_of(manifest))
            else:
                kubernetes_validate.validate(manifest, minor, strict=True)

    @pytest.mark.parametrize("minor", MINORS)
    @pytest.mark.parametrize("path", TEMPLATES)
    def test_every_template_is_valid(self, path: str, minor: str) -> None:
        kubernetes_validate.validate(load(ROOT / path), minor, strict=True)

    @pytest.mark.parametrize("minor", MINORS)
    def test_unknown_fields_are_refused(self, base: list[Manifest], minor: str) -> None:
        """The checks above can fail: at the top, and deep within a pod."""
        for path in (["spec"], ["spec", "template", "spec", "containers", 0, "readinessProbe", "httpGet"]):
            broken = copy.deepcopy(one(base, "Deployment"))
            place: Any = broken
            for step in path:
                place = place[step]
            place["unheard"] = 1
            with pytest.raises(kubernetes_validate.ValidationError):
                kubernetes_validate.validate(broken, minor, strict=True)

    @pytest.mark.parametrize("path", CUSTOM)
    def test_unknown_fields_of_custom_resources_are_refused(self, path: str) -> None:
        manifest = load(ROOT / path)
        jsonschema.validate(manifest, schema_of(manifest))
        manifest["spec"]["unheard"] = 1
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(manifest, schema_of(manifest))

    def test_every_file_is_one_object_and_used_once(self) -> None:
        """A kustomization names every file beside it that is applied."""
        assert {path.parent for path in (ROOT / "k8s").rglob("*.y*ml")} == set(FOLDERS)
        for folder in FOLDERS:
            files = {path.name for path in folder.glob("*.y*ml")} - {"kustomization.yaml"}
            named = [name for name in load(folder / "kustomization.yaml")["resources"] if not (folder / name).is_dir()]
            assert sorted(named) == sorted(files), folder

    def test_files_by_themselves_do_no_harm(self) -> None:
        """`kubectl apply -f FOLDER`, `-R` too, applies what `-k` does: no Secret, no placeholder, the same image."""
        for path in (ROOT / "k8s").rglob("*"):
            if path.suffix in APPLIED:
                assert "PUT-THE-" not in path.read_text(), path
        for folder in FOLDERS:
            names = [name for name in load(folder / "kustomization.yaml")["resources"] if (folder / name).is_file()]
            alone = [load(folder / name) for name in names]
            assert "Secret" not in {manifest["kind"] for manifest in alone}
            if folder != ROOT / "k8s/monitoring":  # which has a generator
                rendered = {identity(manifest): manifest for manifest in render(folder)}
                for manifest in alone:
                    applied = rendered[identity(manifest)]
                    applied["metadata"].pop("labels", None)
                    manifest["metadata"].pop("labels", None)
                    assert manifest == applied
            for pod in pods(alone):
                assert all(re.search(r":[\w.-]+$|@sha256:", container["image"]) for container in pod["containers"])

    @pytest.mark.parametrize("path", TEMPLATES)
    def test_templates_hold_placeholders_only(self, path: str) -> None:
        template = load(ROOT / path)
        secrets = {name: text for name, text in template["stringData"].items() if name != "username"}
        assert secrets and all(text.startswith("PUT-THE-") for text in secrets.values())

    def test_namespaces_are_said(self, rendered: list[Manifest]) -> None:
        namespaces = {manifest["metadata"].get("namespace") for manifest in rendered}
        assert namespaces in ({"demopy"}, {"couchbase"}, {None})

    def test_namespaces_are_by_themselves(self, rendered: list[Manifest]) -> None:
        """`kubectl delete -k` of anything else leaves them, and with them secrets, operator and volume claims."""
        kinds = {manifest["kind"] for manifest in rendered}
        assert "Namespace" not in kinds or kinds == {"Namespace"}

    def test_every_namespace_is_there(self) -> None:
        there = {manifest["metadata"]["name"] for manifest in render(ROOT / "k8s/namespaces")}
        used = {each["metadata"].get("namespace") for path in KUSTOMIZATIONS for each in render(ROOT / path)}
        assert used - {None} == there


class TestRendering:
    @pytest.mark.parametrize("path", KUSTOMIZATIONS)
    def test_kustomize_makes_the_same_of_it(self, path: str) -> None:
        kubectl = shutil.which("kubectl")
        if kubectl is None:
            pytest.skip("needs kubectl (kubernetes.io/docs/tasks/tools)")
        command = [kubectl, "kustomize", str(ROOT / path)]
        done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=KUBECTL_SECONDS)
        theirs = list(yaml.safe_load_all(done.stdout))
        assert sorted(theirs, key=identity) == sorted(render(ROOT / path), key=identity)

    @pytest.mark.parametrize(
        "line",
        [
            "namePrefix: x-",
            "patches: [{target: {kind: Namespace, name: n}, patch: '[{op: test, path: /kind, value: 1}]'}]",
        ],
    )
    def test_unknown_features_are_refused(self, line: str, tmp_path: Path) -> None:
        (tmp_path / "kustomization.yaml").write_text(f"resources: [namespace.yaml]\n{line}\n")
        (tmp_path / "namespace.yaml").write_text("{apiVersion: v1, kind: Namespace, metadata: {name: n}}")
        with pytest.raises(UnknownFieldError):
            render(tmp_path)

    def test_repeated_keys_are_refused(self, tmp_path: Path) -> None:
        (tmp_path / "a.yaml").write_text("a: 1\na: 2\n")
        with pytest.raises(yaml.YAMLError):
            load(tmp_path / "a.yaml")


BREAKS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "hostNetwork": lambda pod: pod.update(hostNetwork=True),
    "volume of type hostPath": lambda pod: pod["volumes"].append({"name": "x", "hostPath": {"path": "/"}}),
    "sysctl kernel.msgmax": lambda pod: pod["securityContext"].update(sysctls=[{"name": "kernel.msgmax"}]),
    "no seccompProfile": lambda pod: pod["securityContext"].pop("seccompProfile"),
    "seccompProfile": lambda pod: pod["securityContext"].update(seccompProfile={"type": "Unconfined"}),
    "runAsUser is 0": lambda pod: pod["securityContext"].update(runAsUser=0),
    "runAsNonRoot is not true": lambda pod: pod["securityContext"].pop("runAsNonRoot"),
    "seLinuxOptions": lambda pod: pod["securityContext"].update(seLinuxOptions={"type": "spc_t"}),
    "appArmorProfile": lambda pod: pod["securityContext"].update(appArmorProfile={"type": "Unconfined"}),
    "privileged": lambda pod: pod["containers"][0]["securityContext"].update(privileged=True),
    "allowPrivilegeEscalation is not false": lambda pod: pod["containers"][0].pop("securityContext"),
    "procMount": lambda pod: pod["containers"][0]["securityContext"].update(procMount="Unmasked"),
    "capabilities are not dropped": lambda pod: pod["containers"][0]["securityContext"].pop("capabilities"),
    "capabilities are added": lambda pod: pod["containers"][0]["securityContext"]["capabilities"].update(add=["CHOWN"]),
    "hostPort": lambda pod: pod["containers"][0].update(ports=[{"containerPort": 1, "hostPort": 1}]),
    "a probe's or lifecycle handler's host": lambda pod: pod["containers"][0].update(
        livenessProbe={"httpGet": {"host": "elsewhere"}}
    ),
}


class TestPodSecurity:
    def test_pods_are_restricted(self, rendered: list[Manifest]) -> None:
        for pod in pods(rendered):
            assert violations(pod) == []

    @pytest.mark.parametrize("what", BREAKS)
    def test_what_is_forbidden_is_found(self, base: list[Manifest], what: str) -> None:
        [pod] = copy.deepcopy(pods(base))
        BREAKS[what](pod)
        assert any(line.endswith(what) for line in violations(pod))

    def test_namespace_enforces_it(self) -> None:
        [labels] = [
            manifest["metadata"]["labels"]
            for manifest in render(ROOT / "k8s/namespaces")
            if manifest["metadata"]["name"] == "demopy"
        ]
        assert labels["pod-security.kubernetes.io/enforce"] == "restricted"

    def test_more_than_the_level_asks_for(self, rendered: list[Manifest]) -> None:
        """A read-only root file system, no token of the Kubernetes API, and limits for all."""
        for pod in pods(rendered):
            assert pod["automountServiceAccountToken"] is False and pod["enableServiceLinks"] is False
            for container in pod["containers"]:
                assert container["securityContext"]["readOnlyRootFilesystem"] is True
                for what in ("requests", "limits"):
                    assert container["resources"][what].keys() == {"cpu", "memory"}
                sizes = container["resources"]
                assert mebibytes(sizes["requests"]["memory"]) <= mebibytes(sizes["limits"]["memory"])


class TestOnePiece:
    def test_labels_and_selectors_match(self, base: list[Manifest]) -> None:
        labels = deployment(base)["template"]["metadata"]["labels"]
        spread = deployment(base)["template"]["spec"]["topologySpreadConstraints"]
        selectors = [
            deployment(base)["selector"]["matchLabels"],
            one(base, "Service")["spec"]["selector"],
            one(base, "PodDisruptionBudget")["spec"]["selector"]["matchLabels"],
            one(base, "NetworkPolicy")["spec"]["podSelector"]["matchLabels"],
            *(constraint["labelSelector"]["matchLabels"] for constraint in spread),
        ]
        assert all(selector and selector.items() <= labels.items() for selector in selectors)

    def test_jobs_pods_are_nobody_elses(self, base: list[Manifest]) -> None:
        """The Service sends nothing to the sample data's pods, and their own NetworkPolicy is for them."""
        objects = render(ROOT / "k8s/sample-data")
        labels = one(objects, "Job")["spec"]["template"]["metadata"]["labels"]
        assert one(objects, "NetworkPolicy")["spec"]["podSelector"]["matchLabels"].items() <= labels.items()
        assert not one(base, "Service")["spec"]["selector"].items() <= labels.items()

    def test_what_pods_refer_to_is_there(self, base: list[Manifest]) -> None:
        """Accounts, settings and secrets by their names, and the secrets' members by theirs."""
        for objects in (base, render(ROOT / "k8s/sample-data")):
            [pod] = pods(objects)
            assert pod["serviceAccountName"] == one(objects, "ServiceAccount")["metadata"]["name"]
            [container] = pod["containers"]
            assert container["envFrom"] == [{"configMapRef": {"name": one(base, "ConfigMap")["metadata"]["name"]}}]
            assert [mount["name"] for mount in container["volumeMounts"]] == [each["name"] for each in pod["volumes"]]
        secrets = {each["metadata"]["name"]: each["stringData"] for each in map(load, map(ROOT.joinpath, TEMPLATES))}
        assert pods(base)[0]["volumes"][0]["secret"]["secretName"] in secrets
        [job] = pods(render(ROOT / "k8s/sample-data"))
        for source in job["volumes"][0]["projected"]["sources"]:
            assert {item["key"] for item in source["secret"]["items"]} <= secrets[source["secret"]["name"]].keys()
        for variable in job["containers"][0]["env"]:
            reference = variable["valueFrom"]["secretKeyRef"]
            assert reference["key"] in secrets[reference["name"]]

    def test_rolling_update_and_spread(self, base: list[Manifest]) -> None:
        spec = deployment(base)
        assert spec["replicas"] == 4
        assert spec["strategy"] == {"type": "RollingUpdate", "rollingUpdate": {"maxUnavailable": "25%", "maxSurge": 1}}
        keys = [each["topologyKey"] for each in spec["template"]["spec"]["topologySpreadConstraints"]]
        assert keys == ["topology.kubernetes.io/zone", "kubernetes.io/hostname"]

    def test_quantities_are_as_the_api_writes_them(self, rendered: list[Manifest]) -> None:
        """One that it writes another way (1000m as 1) is a difference at every apply."""
        for pod in pods(rendered):
            for sizes in pod["containers"][0]["resources"].values():
                assert sizes["cpu"].isdigit() or millicores(sizes["cpu"]) % 1000
                assert sizes["memory"].endswith("Gi") or mebibytes(sizes["memory"]) % 1024

    def test_all_of_it_fits_on_two_processors(self, base: list[Manifest]) -> None:
        """Four pods, the one more of an update, and the Job, beside a processor's worth of the cluster's own."""
        [pod], [job] = pods(base), pods(render(ROOT / "k8s/sample-data"))
        surge = deployment(base)["strategy"]["rollingUpdate"]["maxSurge"]
        count = deployment(base)["replicas"] + surge
        cpu, memory = (
            count * size(pod["containers"][0]["resources"]["requests"][what])
            + size(job["containers"][0]["resources"]["requests"][what])
            for what, size in (("cpu", millicores), ("memory", mebibytes))
        )
        assert cpu <= 1000 and memory <= 1024

    def test_job_needs_nothing_of_the_services_but_its_settings(self) -> None:
        """So it can run first: README applies the ConfigMap for it."""
        objects = render(ROOT / "k8s/sample-data")
        [job] = pods(objects)
        assert job["serviceAccountName"] == one(objects, "ServiceAccount")["metadata"]["name"]
        applied = re.findall(r"^kubectl apply .*", README.partition("\n## Kubernetes\n")[2], re.MULTILINE)
        names = ("namespaces/demopy.yaml", "base/configmap.yaml", "sample-data/", "k8s/")
        order = [next(i for i, line in enumerate(applied) if line.endswith(name)) for name in names[:3]]
        order.append(applied.index("kubectl apply -k k8s/"))
        assert order == sorted(order)

    def test_service_offers_the_api_only(self, base: list[Manifest]) -> None:
        service = one(base, "Service")
        [container] = pods(base)[0]["containers"]
        ports = {port["name"]: port["containerPort"] for port in container["ports"]}
        assert service["metadata"]["name"] == "demopy-service" and service["spec"]["type"] == "LoadBalancer"
        assert [(each["port"], ports[each["targetPort"]]) for each in service["spec"]["ports"]] == [(8080, 8080)]

    def test_network_policy(self, base: list[Manifest]) -> None:
        """In: the API from anywhere, metrics from monitoring. Out: DNS, and Couchbase's TLS ports."""
        policies = [one(base, "NetworkPolicy"), one(render(ROOT / "k8s/sample-data"), "NetworkPolicy")]
        for policy in policies:
            assert set(policy["spec"]["policyTypes"]) == {"Ingress", "Egress"}
        assert policies[0]["spec"]["egress"] == policies[1]["spec"]["egress"]
        assert "ingress" not in policies[1]["spec"]
        public, metrics = policies[0]["spec"]["ingress"]
        assert "from" not in public and [port["port"] for port in public["ports"]] == [8080]
        assert metrics["from"] and [port["port"] for port in metrics["ports"]] == [9090]
        dns, couchbase = policies[0]["spec"]["egress"]
        assert dns["to"] and {(port["protocol"], port["port"]) for port in dns["ports"]} == {("UDP", 53), ("TCP", 53)}
        assert {port["port"] for port in couchbase["ports"]} == {11207, 18091, 18093}

    def test_autoscaler_has_the_replicas_to_itself(self) -> None:
        """`replicas` is gone from the Deployment, and nothing else has changed."""
        plain, scaled = render(ROOT / "k8s"), render(ROOT / "k8s/autoscaling")
        autoscaler = one(scaled, "HorizontalPodAutoscaler")["spec"]
        assert autoscaler["scaleTargetRef"] == {"apiVersion": "apps/v1", "kind": "Deployment", "name": "demopy"}
        assert autoscaler["minReplicas"] == deployment(plain).pop("replicas")
        assert [each for each in scaled if each["kind"] != "HorizontalPodAutoscaler"] == plain
        kinds = [metric["type"] for metric in autoscaler["metrics"]]
        assert kinds == ["Pods", "Resource"], "the API server puts CPU last"


class TestCouchbase:
    """The in-cluster database: its parts refer to one another, and it is what the service's settings name."""

    @pytest.fixture
    def objects(self) -> list[Manifest]:
        return render(ROOT / "k8s/couchbase")

    def names(self, objects: list[Manifest], kind: str) -> dict[str, str]:
        """Return Couchbase's names of a kind's resources by Kubernetes' names."""
        found = [each for each in objects if each["kind"] == kind]
        return {each["metadata"]["name"]: each["spec"].get("name", each["metadata"]["name"]) for each in found}

    def test_schema_is_the_services(self, objects: list[Manifest]) -> None:
        from tests import sample_data  # noqa: PLC0415 - it imports half of a second's worth of names for the others

        bucket, scope = one(objects, "CouchbaseBucket")["spec"], one(objects, "CouchbaseScope")["spec"]
        scopes, collections = self.names(objects, "CouchbaseScope"), self.names(objects, "CouchbaseCollection")
        assert bucket["name"] == sample_data.BUCKET
        assert [scopes[each["name"]] for each in bucket["scopes"]["resources"]] == [sample_data.SCOPE]
        named = [collections[each["name"]] for each in scope["collections"]["resources"]]
        assert tuple(named) == sample_data.COLLECTIONS and len(collections) == len(named)

    def test_settings_name_it(self, objects: list[Manifest], base: list[Manifest]) -> None:
        settings = one(base, "ConfigMap")["data"]
        cluster = one(objects, "CouchbaseCluster")["metadata"]
        assert settings["COUCHBASE_HOST"] == f"{cluster['name']}-srv.{cluster['namespace']}.svc"
        assert settings["COUCHBASE_BUCKET"] == one(objects, "CouchbaseBucket")["spec"]["name"]
        assert settings["COUCHBASE_SCOPE"] == one(objects, "CouchbaseScope")["spec"]["name"]
        assert settings["COUCHBASE_USER"] == one(objects, "CouchbaseUser")["metadata"]["name"]

    def test_certificate_is_for_its_names(self, objects: list[Manifest], base: list[Manifest]) -> None:
        tls = one(objects, "CouchbaseCluster")["spec"]["networking"]["tls"]
        certificates = {each["spec"]["secretName"]: each["spec"] for each in objects if each["kind"] == "Certificate"}
        issuers = {each["metadata"]["name"]: each["spec"] for each in objects if each["kind"] == "Issuer"}
        server = certificates[tls["secretSource"]["serverSecretName"]]
        [authority] = tls["rootCAs"]
        assert certificates[authority]["isCA"] is True
        assert issuers[server["issuerRef"]["name"]] == {"ca": {"secretName": authority}}
        assert issuers[certificates[authority]["issuerRef"]["name"]] == {"selfSigned": {}}
        host = one(base, "ConfigMap")["data"]["COUCHBASE_HOST"]
        assert host in server["dnsNames"] and f"*.{host.replace('-srv.', '.')}" in server["dnsNames"]

    def test_user_has_the_group_and_secrets_are_there(self, objects: list[Manifest]) -> None:
        binding = one(objects, "CouchbaseRoleBinding")["spec"]
        assert binding["roleRef"]["name"] == one(objects, "CouchbaseGroup")["metadata"]["name"]
        assert [each["name"] for each in binding["subjects"]] == [one(objects, "CouchbaseUser")["metadata"]["name"]]
        folder = ROOT / "k8s/couchbase"
        user, admin = (load(folder / f"secret-{name}.yaml.template") for name in ("user", "admin"))
        assert one(objects, "CouchbaseUser")["spec"]["authSecret"] == user["metadata"]["name"]
        assert one(objects, "CouchbaseCluster")["spec"]["security"]["adminSecret"] == admin["metadata"]["name"]

    def test_memory_fits(self, objects: list[Manifest]) -> None:
        """The bucket into the data service's quota, and the quotas into the pod, with a fifth to spare."""
        spec = one(objects, "CouchbaseCluster")["spec"]
        quotas = spec["cluster"]
        data, index = (mebibytes(quotas[f"{each}ServiceMemoryQuota"]) for each in ("data", "index"))
        [servers] = spec["servers"]
        assert mebibytes(one(objects, "CouchbaseBucket")["spec"]["memoryQuota"]) <= data
        assert data + index <= 0.8 * mebibytes(servers["resources"]["limits"]["memory"])
        assert servers["size"] > one(objects, "CouchbaseBucket")["spec"]["replicas"]


class TestReadme:
    """Its commands, line by line; test_apply.py types some of them."""

    COMMANDS = re.findall(r"^(?:kubectl|helm) .*", README, re.MULTILINE)

    def test_commands_name_what_is_there(self) -> None:
        """Every path after `-f` or `-k` exists, and so does every Deployment, Service or Job that is named."""
        paths = re.findall(r"kubectl (?:apply|delete|diff|kustomize) (?:-[fk] )?(k8s/[\w./-]*)", README)
        assert len(paths) > 10 and all((ROOT / path).exists() for path in paths)
        assert all((ROOT / path).exists() for path in re.findall(r"`(k8s/[\w./-]*)`", README))
        names = {each["metadata"]["name"] for path in KUSTOMIZATIONS for each in render(ROOT / path)}
        named = re.findall(
            r"(?:deployment|service|job|hpa|certificate|gateway|couchbasecluster)[ /](demopy[a-z-]*)", README
        )
        assert set(named) <= names

    def test_folders_are_applied_as_kustomizations(self) -> None:
        for command in self.COMMANDS:
            for path in re.findall(r"-f (k8s/\S+)", command):
                assert (ROOT / path).is_file(), command

    def test_secrets_can_be_made_again(self) -> None:
        """`create` alone fails where there is one; and they are those that the templates describe."""
        made = [command for command in self.COMMANDS if re.search(" create (secret|configmap) ", command)]
        assert len(made) > 4 and all(
            command.endswith(" --dry-run=client -o yaml | kubectl apply -f -") for command in made
        )
        named = {pair for command in made for pair in re.findall(r"generic (\S+) -n (\S+)", command)}
        metadata = [load(ROOT / path)["metadata"] for path in TEMPLATES]
        assert named == {(each["name"], each["namespace"]) for each in metadata}

    def test_what_must_be_there_is_waited_for(self) -> None:
        """Webhooks before what they check, the certificate before its file is written, and never for ever."""
        assert all(command.endswith(" --wait") for command in self.COMMANDS if command.startswith("helm install"))
        certificates = {
            each["spec"]["secretName"]: each["metadata"]["name"]
            for folder in ("k8s/couchbase", "k8s/gateway")
            for each in render(ROOT / folder)
            if each["kind"] == "Certificate"
        }
        readings = [i for i, command in enumerate(self.COMMANDS) if re.search(r"> \S*ca\.crt$", command)]
        assert len(readings) == 2
        for reading in readings:
            secret = re.search(r"get secret (\S+)", self.COMMANDS[reading])[1]
            assert f" certificate/{certificates[secret]} " in self.COMMANDS[reading - 1]
        waits = [command for command in self.COMMANDS if re.match(r"kubectl (wait|rollout status)", command)]
        assert len(waits) > 3 and all("--timeout=" in command for command in waits)

    def test_what_it_all_needs_is_what_is_requested(self, base: list[Manifest]) -> None:
        """The figures at the section's top."""
        [pod], [job] = (
            [each["containers"][0]["resources"]["requests"] for each in pods(objects)]
            for objects in (base, render(ROOT / "k8s/sample-data"))
        )
        count = deployment(base)["replicas"]
        cpu, memory = count * millicores(pod["cpu"]), count * mebibytes(pod["memory"])
        assert f"request {cpu}m of CPU and {memory}Mi of memory" in README
        assert f"the Job of the sample data {job['cpu']} and {job['memory']}" in README
        [servers] = one(render(ROOT / "k8s/couchbase"), "CouchbaseCluster")["spec"]["servers"]
        assert servers["size"] == 3 and servers["resources"]["requests"] == {"cpu": "1", "memory": "2Gi"}
