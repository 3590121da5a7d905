"""The image: its Dockerfile is well-formed, lets in and installs only what it should, and what it makes runs."""

import asyncio
import errno
import os
import re
import shutil
import socket
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from micro_svc_demo import __version__
from tests.deploy.dockerfile import Build, DockerfileError, Image, context_files, ignore_rules, let_in
from tests.deploy.kustomize import load, one
from tests.deploy.running import CommandProcess, switched_user
from tests.deploy.test_rolling_update import PROFILES, TOKEN, Load
from tests.emulator.process import EmulatorProcess
from tests.service import ROOT, Certificates, ServiceProcess, free_port, settings_for

LOCKS = (".requirements.lock", ".requirements-sample-data.lock")
RUN_SECONDS = 60
BUILD_SECONDS = 900
BUSY = 500
"""How many requests make a load."""


@pytest.fixture(scope="module")
def image(build: Build) -> Image:
    """The service's image, read-only."""
    made = build.stage()
    made.protect()
    return made


@pytest.fixture(scope="module")
def database() -> EmulatorProcess:
    with EmulatorProcess(profiles=20, token="image", tls=True) as emulator:
        yield emulator


def pins(path: str) -> dict[str, str]:
    """Return the versions that a requirements file pins, by the names' lower case."""
    text = (ROOT / path).read_text()
    return {name.lower(): version for name, version in re.findall(r"^([A-Za-z0-9_.-]+)==([^\s;]+)", text, re.MULTILINE)}


class TestDockerfile:
    def test_hadolint_finds_nothing(self) -> None:
        """No rule is switched off: not by a configuration (there is none), not by a comment."""
        assert not list(ROOT.glob(".hadolint*"))
        assert "hadolint" not in (ROOT / "Dockerfile").read_text()
        command = [str(Path(sys.executable).with_name("hadolint")), "--failure-threshold", "style", "Dockerfile"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=RUN_SECONDS, check=False)
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")

    def test_base_is_the_official_slim_image_and_can_be_pinned_by_digest(self, build: Build, tmp_path: Path) -> None:
        base, _ = build.stages["base"]
        assert re.fullmatch(r"python:3\.13-slim", base)
        pinned = f"{base}@sha256:{'0' * 64}"
        assert Build(ROOT, tmp_path, {"PYTHON_IMAGE": pinned}).stages["base"][0] == pinned
        assert all(other in build.stages for name, (other, _) in build.stages.items() if name != "base")

    def test_packages_come_from_wheels_with_hashes(self, build: Build) -> None:
        installs = [value for _, (_, steps) in build.stages.items() for name, value in steps if "install" in value]
        assert len(installs) == len(LOCKS)
        for install in installs:
            assert "--require-hashes" in install and '"--only-binary", ":all:"' in install
            assert not re.search(r"apt|apk|index-url", install)

    def test_what_the_image_says_of_itself(self, image: Image) -> None:
        assert image.ports == [8080, 9090]
        assert image.command == ["python", "-m", "micro_svc_demo"]
        assert re.fullmatch(r"[1-9][0-9]*:[1-9][0-9]*", image.user)
        assert image.env["PYTHONDONTWRITEBYTECODE"] == "1"
        prefix = "org.opencontainers.image."
        names = ("title", "description", "version", "revision", "source")
        assert set(image.labels) == {prefix + name for name in names}
        assert [image.labels[prefix + name] for name in names[2:]] == ["1.2.3", "abc", "elsewhere"]
        assert image.health_options.keys() == {"interval", "timeout", "start-period", "retries"}

    def test_bytecode_is_there(self, image: Image) -> None:
        """Of the service and of every package, so that a read-only file system costs nothing at start."""
        files = image.contents()
        sources = [name for name in files if name.endswith(".py")]
        tag = sys.implementation.cache_tag
        missing = [
            name
            for name in sources
            if str(Path(name).parent / "__pycache__" / f"{Path(name).stem}.{tag}.pyc") not in files
        ]
        assert "app/micro_svc_demo.py" in sources and missing == []

    def test_only_the_services_own_files_and_packages_are_in_it(self, image: Image) -> None:
        own = {name for name in image.contents() if not name.startswith("app/packages/") and "__pycache__" not in name}
        assert own == {"app/micro_svc_demo.py", "app/.requirements.lock"}
        folder = image.outside("/app/packages")
        installed = {path.name.rsplit("-", 1)[0].partition("-")[0] for path in folder.glob("*.dist-info")}
        assert {name.replace("_", "-") for name in installed} == set(pins(".requirements.lock"))

    def test_unknown_instructions_are_refused(self, build: Build, image: Image) -> None:
        """The follower does not pass over what it cannot do."""
        for instruction, value in (("RUN", '["apt-get", "update"]'), ("ADD", "x y"), ("COPY", "README.md ./")):
            with pytest.raises(DockerfileError):
                build._follow(image, instruction, value, {})


class TestContext:
    def test_ignore_rules_let_in_only_what_a_build_copies(self) -> None:
        expected = {*LOCKS, "micro_svc_demo.py", "tests/__init__.py", "tests/sample_data.py"}
        assert set(context_files(ROOT)) == expected

    @pytest.mark.parametrize(
        ("rules", "path", "expected"),
        [
            ("*\n!a.py", "a.py", True),
            ("*\n!a.py", "b/a.py", False),
            ("*\n!b", "b/c/d", True),
            ("**/x.py", "x.py", False),
            ("**/x.py", "a/b/x.py", False),
            ("*.py", "a/b.py", True),
            ("a\n!a/b\n", "a/c", False),
            ("# *\n\n", "anything", True),
            ("a?c", "abc", False),
        ],
    )
    def test_ignore_rules_are_read_as_docker_reads_them(self, rules: str, path: str, expected: bool) -> None:
        assert let_in(path, ignore_rules(rules)) is expected


class TestLocks:
    def test_lock_is_of_the_requirements(self) -> None:
        """Nothing is pinned in two ways, and each pin has hashes."""
        service, sample = (pins(lock) for lock in LOCKS)
        assert pins("requirements.txt").items() <= service.items()
        assert service.items() <= sample.items()
        demo = pins("tests/requirements-demo.txt")
        assert {name: demo[name] for name in ("faker", "pillow", "tqdm")}.items() <= sample.items()

    @pytest.mark.parametrize("lock", LOCKS)
    def test_lock_has_hashes_and_no_place(self, lock: str) -> None:
        text = (ROOT / lock).read_text()
        entries = re.split(r"^(?=[a-z])", text, flags=re.MULTILINE)[1:]
        assert len(entries) == len(pins(lock))
        assert all(re.search(r"--hash=sha256:[0-9a-f]{64}$", entry, re.MULTILINE) for entry in entries)
        assert not re.search(r"https?:|--(?:extra-)?index-url|--find-links|--trusted-host", text)

    def test_both_platforms_wheels_are_allowed(self, tmp_path: Path) -> None:
        """For Python 3.13, as in the image, on amd64 and arm64: pip finds wheels, and by the lock's hashes."""
        for machine in ("x86_64", "aarch64"):
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--require-hashes", "--only-binary", ":all:"]
            target = ["--python-version", "3.13", "--platform", f"manylinux2014_{machine}", "--dest", str(tmp_path)]
            requirements = ["--requirement", str(ROOT / LOCKS[0])]
            subprocess.run([*command, *target, *requirements], check=True, timeout=BUILD_SECONDS, capture_output=True)
        wheels = sorted(path.name for path in tmp_path.glob("couchbase-*"))
        assert [re.search(r"cp313-.*(x86_64|aarch64)", name)[1] for name in wheels] == ["aarch64", "x86_64"]


class TestRunning:
    """What the instructions made, run as an engine runs it: read-only, as the image's user, nothing else inherited."""

    def process(self, image: Image, **environment: str) -> CommandProcess:
        return CommandProcess(
            image.argv(image.command), image.outside("."), image.environment() | environment, image.user
        )

    def test_serves_a_profile_by_tls_and_ends_with_sigterm(
        self, image: Image, database: EmulatorProcess, tmp_path: Path
    ) -> None:
        """The secret and the certificate authority come as files; the health check sees life and death."""
        before = image.contents()
        folder = image.root.parent / "secrets"  # a mount
        folder.mkdir(mode=0o755, exist_ok=True)
        (folder / "password").write_text(database.password + "\n")
        shutil.copyfile(database.ca_file, folder / "ca.crt")
        port = free_port()
        settings = {
            "COUCHBASE_HOST": database.tls_connection_string,
            "COUCHBASE_USER": database.user,
            "COUCHBASE_PASSWORD_FILE": str(folder / "password"),
            "COUCHBASE_TLS_CA": str(folder / "ca.crt"),
            "SERVICE_PORT": str(port),
            "METRICS_PORT": "0",
        }
        with self.process(image, **settings) as service:
            assert service.get("/healthz").status == 200
            assert service.get("/api/v1/id/7", "image").json()[0]["record_id"] == 7
            assert self.health(image, port) == 0
            if os.geteuid() == 0:
                assert Path(f"/proc/{service.process.pid}").stat().st_uid == int(image.user.partition(":")[0])
                status = Path(f"/proc/{service.process.pid}/status").read_text()
                assert re.search(r"^CapEff:\t0+$", status, re.MULTILINE), "it has capabilities"
            assert service.stop() == 0
        assert service.lines[-1]["message"] == "stopped"
        assert self.health(image, port) != 0
        assert image.contents() == before, "it wrote into its own tree"

    def test_published_docker_run_line(self, image: Image, database: EmulatorProcess) -> None:
        """`docker run -e COUCHBASE_HOST -e COUCHBASE_USER -e COUCHBASE_PASSWORD -e COUCHBASE_BUCKET`, and nothing else.

        But for the ports, which are not the machine's own to give here.
        """
        with self.process(image, **settings_for(database), SERVICE_PORT="0", METRICS_PORT="0") as service:
            assert service.get("/api/v1/id/1", "image").status == 200

    @pytest.mark.parametrize("mutual", [False, True])
    def test_health_check_knows_tls(self, image: Image, tmp_path: Path, mutual: bool) -> None:
        """Its own port by TLS, or where that wants a certificate the metrics port; the other is no help."""
        made = Certificates(tmp_path)
        settings = made.settings | ({"SERVICE_TLS_CLIENT_CA": str(made.ca_file)} if mutual else {})
        absent = {"COUCHBASE_HOST": "couchbase://127.0.0.1:1", "COUCHBASE_USER": "u", "COUCHBASE_PASSWORD": "p"}
        service = ServiceProcess(absent | settings).start()
        ports = {"SERVICE_PORT": str(service.port), "METRICS_PORT": str(service.metrics_port)}
        ports["SERVICE_PORT" if mutual else "METRICS_PORT"] = "1"
        try:
            assert self.health(image, 1, **settings, **ports) == 0
        finally:
            service.stop()
        assert self.health(image, 1, **settings, **ports) != 0

    def health(self, image: Image, port: int, **environment: str) -> int:
        """Run the HEALTHCHECK's command; return its exit code."""
        done = subprocess.run(
            image.argv(image.health),
            cwd=image.outside("."),
            env=image.environment() | {"SERVICE_PORT": str(port)} | environment,
            capture_output=True,
            timeout=RUN_SECONDS,
            check=False,
            **switched_user(image.user),
        )
        return done.returncode

    def test_health_check_gives_up_on_silence(self, image: Image) -> None:
        """A listener that accepts and says nothing is not healthy; the command does not wait for ever."""
        with socket.create_server(("127.0.0.1", 0)) as silent:
            assert self.health(image, silent.getsockname()[1]) != 0

    def test_sample_data_target(self, build: Build) -> None:
        """The Job's image, by the manifest's command: it provisions an empty bucket, which the service can then use."""
        made = build.stage("sample-data")
        made.protect()
        job = one([load(ROOT / "k8s/sample-data/job.yaml")], "Job")
        [container] = job["spec"]["template"]["spec"]["containers"]
        command = ["100" if word == "1000" else word for word in container["command"]]
        assert command[: len(made.command)] == made.command
        with EmulatorProcess(empty=True) as emulator:
            done = subprocess.run(
                made.argv(command),
                cwd=made.outside("."),
                env=made.environment() | settings_for(emulator) | {"SAMPLE_TOKEN": "from-the-job"},
                capture_output=True,
                text=True,
                timeout=RUN_SECONDS,
                check=False,
                **switched_user(made.user),
            )
            assert (done.returncode, done.stdout) == (0, ""), done.stderr
            assert "from-the-job" not in done.stderr  # it would stay in the Job's log
            service = self.process(build.stage(), **settings_for(emulator), SERVICE_PORT="0", METRICS_PORT="0")
            with service:
                assert service.get("/api/v1/id/100", "from-the-job").status == 200


def test_real_build() -> None:
    """With DEPLOY_TEST_ENGINE=docker (or podman, buildah): the image is built, and run with no rights, read-only.

    It is the user that the manifests name, and drains: none of the requests of busy clients is lost when it is stopped.
    """
    engine = os.environ.get("DEPLOY_TEST_ENGINE")
    if not engine:
        pytest.skip("needs DEPLOY_TEST_ENGINE=podman, docker or buildah (Debian's packages podman, docker.io, buildah)")
    assert shutil.which(engine), f"there is no {engine}"
    tag = name = "demopy-deploy-test"
    verb = ["bud", "--format", "docker"] if engine == "buildah" else ["build"]
    subprocess.run([engine, *verb, "--tag", tag, "."], cwd=ROOT, check=True, timeout=BUILD_SECONDS)
    if engine == "buildah":
        return
    with EmulatorProcess(profiles=PROFILES, token=TOKEN) as emulator:
        port, metrics_port = free_port(), free_port()
        settings = settings_for(emulator) | {"SERVICE_PORT": str(port), "METRICS_PORT": str(metrics_port)}
        flags = [word for setting, value in settings.items() for word in ("--env", f"{setting}={value}")]
        limits = ["--read-only", "--cap-drop", "ALL", "--security-opt", "no-new-privileges", "--network", "host"]
        command = [engine, "run", "--rm", "--name", name, "--init=false", *limits, *flags, tag]
        with CommandProcess(command, ROOT, dict(os.environ)) as service:
            told = subprocess.run(
                [engine, "exec", name, "python", "-c", WHO],
                capture_output=True,
                text=True,
                timeout=RUN_SECONDS,
                check=True,
            )
            assert told.stdout.split() == ["10001", "10001", "0" * 16, "1", str(errno.EROFS)]
            outcomes, code = asyncio.run(drained(service))
    assert code == 0 and set(outcomes) == {"200"} and outcomes["200"] > BUSY, outcomes


WHO = """
import os, re
status = open("/proc/1/status").read()
print(os.getuid(), os.getgid(), *re.findall(r"^(?:CapEff|NoNewPrivs):\\t(.+)", status, re.MULTILINE))
try:
    open("/app/new", "w")
except OSError as error:
    print(error.errno)
"""
"""Tells what a container's process may do."""


async def drained(service: ServiceProcess) -> tuple[Counter[str], int]:
    """Stop the service while clients are busy; return what came of their requests, and its exit code."""
    load = Load(service.port)
    clients = [asyncio.create_task(load.keep_alive(0.002)) for _ in range(8)]
    async with asyncio.timeout(RUN_SECONDS):
        while load.outcomes["200"] <= BUSY:
            await asyncio.sleep(0.01)  # until there is a load; it has no event to wait for
        code = await asyncio.to_thread(service.stop)
        ended = await asyncio.gather(*clients, return_exceptions=True)
    # each was told to connect anew, and there is nobody any more
    assert all(isinstance(each, ConnectionRefusedError) for each in ended), ended
    return load.outcomes, code


def test_busy_clients_lose_nothing_in_a_drain() -> None:
    """What `test_real_build` asks of a container, of a process."""
    with EmulatorProcess(profiles=PROFILES, token=TOKEN) as emulator, ServiceProcess(settings_for(emulator)) as service:
        outcomes, code = asyncio.run(drained(service))
    assert code == 0 and set(outcomes) == {"200"}, outcomes


def test_version_is_the_services(tmp_path: Path) -> None:
    """The tag in the manifests, and what a plain `docker build` writes on both images, is what this checkout is."""
    for path in ("base/deployment.yaml", "sample-data/job.yaml"):
        [container] = load(ROOT / "k8s" / path)["spec"]["template"]["spec"]["containers"]
        assert container["image"].rpartition(":")[2] == __version__
    plain = Build(ROOT, tmp_path)
    assert plain.globals["VERSION"] == __version__
    assert all(("ARG", "VERSION") in plain.stages[target][1] for target in ("service", "sample-data"))


def test_readmes_containers_start_again() -> None:
    """The service's run until they are stopped, behind an init; the sample data's is over when it is done."""
    text = (ROOT / "README.md").read_text(encoding="utf-8").replace("\\\n", "")
    services, once = (
        re.findall(rf"^docker run .* {name}$", text, re.MULTILINE) for name in ("demopy", "demopy-sample-data")
    )
    assert len(services) == 2 and len(once) == 1
    assert all(" --init --restart unless-stopped " in line and " --rm " not in line for line in services)
    assert all(" --rm --init " in line for line in once)
