"""The manifests and the service belong together: what they set, ask and wait for is what the service has."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from micro_svc_demo import ROWS, read_settings
from tests.deploy.dockerfile import Build
from tests.deploy.kustomize import Manifest, one, render
from tests.deploy.pod import Pod, service_roles
from tests.deploy.running import CommandProcess, own_python
from tests.emulator.process import EmulatorProcess
from tests.load.clients import cpu_seconds
from tests.service import ROOT, ServiceProcess

PROBES = ("startupProbe", "readinessProbe", "livenessProbe")
USER = "demopy"


@pytest.fixture(scope="module")
def pod(base: list[Manifest]) -> Pod:
    return Pod.of(base)


@pytest.fixture(scope="module")
def roles() -> str:
    return service_roles(render(ROOT / "k8s/couchbase"))


@pytest.fixture(scope="module")
def database(roles: str) -> Iterator[EmulatorProcess]:
    """A database where the service's user has the roles of `k8s/couchbase`, and no others."""
    with EmulatorProcess(profiles=50, token="deployed", tls=True, second_user=USER, roles=roles) as emulator:
        yield emulator


@pytest.fixture(scope="module")
def service(
    pod: Pod, build: Build, database: EmulatorProcess, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ServiceProcess]:
    """The service, started by the image's command with exactly the manifest's environment, and ready."""
    assert not {"command", "args"} & pod.container.keys(), "the image's own command is what runs"
    secrets = tmp_path_factory.mktemp("secrets")
    environment = pod.environment_here(secrets, database, USER, database.second_password)
    with CommandProcess(own_python(build.stage().command), ROOT, environment) as running:
        yield running


class TestSettings:
    def test_every_variable_is_a_setting(self, pod: Pod) -> None:
        known = {row["env"] for row in ROWS}
        assert pod.environment.keys() <= known
        assert "COUCHBASE_PASSWORD" not in pod.environment, "a secret is mounted as a file"

    def test_every_value_is_allowed(self, pod: Pod, tmp_path: Path) -> None:
        """The service reads them; but for the files, which a pod has and this machine has not."""
        mount = pod.container["volumeMounts"][0]["mountPath"]
        for name in ("password", "ca.crt"):
            (tmp_path / name).write_text("x")
        environment = {name: value.replace(mount, str(tmp_path)) for name, value in pod.environment.items()}
        settings = read_settings([], environment)
        assert (settings.port, settings.metrics_port) == (pod.port("http"), pod.port("metrics"))
        assert settings.connection_string.startswith("couchbases://")

    def test_files_are_those_of_the_secret(self, pod: Pod) -> None:
        mount, volume = pod.container["volumeMounts"][0], pod.spec["volumes"][0]
        assert mount["readOnly"] is True and mount["name"] == volume["name"]
        paths = {pod.environment[name] for name in ("COUCHBASE_PASSWORD_FILE", "COUCHBASE_TLS_CA")}
        assert paths == {f"{mount['mountPath']}/{name}" for name in ("password", "ca.crt")}

    def test_mounted_files_are_readable_for_the_images_user(self, pod: Pod, build: Build) -> None:
        """By the group, as `fsGroup` makes it theirs; and by nobody else."""
        context = pod.spec["securityContext"]
        assert build.stage().user == f"{context['runAsUser']}:{context['runAsGroup']}"
        assert context["fsGroup"] == context["runAsGroup"]
        assert {volume["secret"]["defaultMode"] for volume in pod.spec["volumes"]} == {0o440}

    def test_ports_are_the_images(self, pod: Pod, build: Build) -> None:
        assert [pod.port("http"), pod.port("metrics")] == build.stage().ports

    def test_job_overrides_what_it_must(self) -> None:
        """The Job takes the service's settings, but another user; and only what its own command line knows."""
        from tests.sample_data import read_plan  # noqa: PLC0415 - the images' library takes time to load

        job = one(render(ROOT / "k8s/sample-data"), "Job")["spec"]["template"]["spec"]
        [container] = job["containers"]
        assert {each["name"] for each in container["env"]} == {"COUCHBASE_USER", "SAMPLE_TOKEN"}
        flags = container["command"][3:]
        plan, _ = read_plan(
            flags, {"COUCHBASE_HOST": "h", "COUCHBASE_USER": "u", "COUCHBASE_PASSWORD": "p", "SAMPLE_TOKEN": "t"}
        )
        assert plan is not None


class TestProbes:
    def test_every_probe_is_answered(self, pod: Pod, service: ServiceProcess) -> None:
        """Each path, on the port that the name stands for, of the real process."""
        ports = {"http": service.port, "metrics": service.metrics_port}
        for name in PROBES:
            get = pod.container[name]["httpGet"]
            assert service.get(get["path"], port=ports[get["port"]]).status == 200, name

    def test_readiness_is_not_liveness(self, pod: Pod, tmp_path: Path) -> None:
        """Without a database the pod is alive and not ready: it is neither killed nor sent requests."""
        environment = pod.environment | {"COUCHBASE_HOST": "couchbase://127.0.0.1:1", "COUCHBASE_TLS_CA": ""}
        (tmp_path / "password").write_text("p")
        environment |= {"SERVICE_PORT": "0", "METRICS_PORT": "0"}
        environment["COUCHBASE_PASSWORD_FILE"] = str(tmp_path / "password")
        lonely = ServiceProcess(environment).start()
        try:
            statuses = {
                name: lonely.get(pod.container[name]["httpGet"]["path"], port=lonely.metrics_port).status
                for name in PROBES
            }
        finally:
            lonely.stop()
        assert statuses == {"startupProbe": 200, "readinessProbe": 503, "livenessProbe": 200}

    def test_metrics_are_on_the_port_that_the_policy_guards(self, service: ServiceProcess) -> None:
        assert service.get("/metrics", port=service.metrics_port).status == 200
        assert service.get("/metrics").status == 404

    def test_autoscalers_metric_exists(self, service: ServiceProcess) -> None:
        autoscaler = one(render(ROOT / "k8s/autoscaling"), "HorizontalPodAutoscaler")
        [name] = [each["pods"]["metric"]["name"] for each in autoscaler["spec"]["metrics"] if each["type"] == "Pods"]
        text = service.get("/metrics", port=service.metrics_port).body.decode()
        assert re.search(rf"^{name}(\{{[^}}]*\}})? ", text, re.MULTILINE)


class TestTimings:
    def test_drain_fits_into_the_grace_period(self, pod: Pod) -> None:
        """The pause and the drain, with a few seconds for ending: so nothing is ever killed in the middle."""
        drain = int(pod.environment["SHUTDOWN_SECONDS"])
        assert pod.pause_seconds + drain + 5 <= pod.grace_seconds

    def test_pause_is_longer_than_readiness_takes_to_notice(self, pod: Pod) -> None:
        """Whoever goes by readiness alone, a load balancer with checks of its own, has noticed before the end."""
        probe = pod.container["readinessProbe"]
        assert probe["periodSeconds"] * probe["failureThreshold"] < pod.pause_seconds

    def test_start_has_time(self, pod: Pod) -> None:
        """The liveness probe begins when the start-up probe has succeeded: the process has half a minute."""
        probe = pod.container["startupProbe"]
        assert probe["periodSeconds"] * probe["failureThreshold"] >= 30

    def test_first_probe_finds_the_port_bound(self, pod: Pod, database: EmulatorProcess, tmp_path: Path) -> None:
        """Nothing is asked before the process can listen: a refused probe is a Warning event at every start."""
        environment = pod.environment_here(tmp_path, database, USER, database.second_password)
        service = ServiceProcess(environment).start()
        seconds = cpu_seconds(service.process.pid)  # of processor time: others run on this machine
        service.stop()
        assert 0 < seconds < pod.container["startupProbe"]["initialDelaySeconds"]


class TestLeastRights:
    """The roles of `k8s/couchbase`, as the emulator enforces them, are enough for the service, and none is too much.

    That they allow nothing else is tests/functional/test_rights.py's to say, of a real server too.
    """

    @pytest.mark.parametrize(
        "path",
        ["/api/v1/id/7", "/api/v1/picture/record/7", "/api/v1/picture/raw/7"],
    )
    def test_documents(self, service: ServiceProcess, path: str) -> None:
        assert service.get(path, "deployed").status == 200

    @pytest.mark.parametrize(("kind", "member"), [("nickname", "nickname"), ("username", "user_id")])
    def test_lookups(self, service: ServiceProcess, kind: str, member: str) -> None:
        [profile] = service.get("/api/v1/id/7", "deployed").json()
        found = service.get(f"/api/v1/{kind}/{profile[member]}", "deployed")
        assert found.status == 200 and profile in found.json()

    def test_token_is_read_again(self, pod: Pod, database: EmulatorProcess, tmp_path: Path) -> None:
        environment = pod.environment_here(tmp_path, database, USER, database.second_password)
        with ServiceProcess(environment | {"TOKEN_REFRESH_SECONDS": "1"}) as refreshing:
            database.set_token("rotated")
            try:
                refreshing.wait_for("token adopted")
                refreshing.wait_for("token adopted")
                assert refreshing.get("/api/v1/id/7", "rotated").status == 200
            finally:
                database.set_token("deployed")
        assert [line for line in refreshing.lines if line["level"] == "error"] == []

    def test_mistakes_are_explained_with_these_roles(self, pod: Pod, database: EmulatorProcess, tmp_path: Path) -> None:
        """A wrong bucket ends it with advice; with a wrong scope it stays unready, and says why."""
        environment = pod.environment_here(tmp_path, database, USER, database.second_password)
        for setting, message, member in (
            ("COUCHBASE_BUCKET", "cannot serve", "advice"),
            ("COUCHBASE_SCOPE", "Couchbase is not there yet", "reasons"),
        ):
            service = ServiceProcess(environment | {setting: "nowhere"}).start()
            try:
                assert "'nowhere'" in str(service.wait_for(message)[member])
            finally:
                assert service.stop() == (setting == "COUCHBASE_BUCKET")

    def test_a_role_less_is_not_enough(self, pod: Pod, roles: str, tmp_path: Path) -> None:
        """Each of them is needed: without it something of the service's fails."""
        parts = roles.split(",")
        for missing in parts:
            fewer = ",".join(role for role in parts if role != missing)
            with EmulatorProcess(profiles=3, token="t", tls=True, second_user=USER, roles=fewer) as emulator:
                environment = pod.environment_here(tmp_path, emulator, USER, emulator.second_password)
                environment |= {"COUCHBASE_TIMEOUT_MS": "300"}
                service = ServiceProcess(environment).start()
                try:
                    assert not self.serves(service), missing
                finally:
                    service.stop()

    def serves(self, service: ServiceProcess) -> bool:
        """Say whether it gets ready and everything can be asked of it."""
        paths = ("/api/v1/id/1", "/api/v1/picture/raw/1", "/api/v1/nickname/x")
        try:
            service.wait_until_ready(seconds=10)
        except (AssertionError, OSError):  # not ready; or it has ended
            return False
        return all(service.get(path, "t").status in (200, 404) for path in paths)
