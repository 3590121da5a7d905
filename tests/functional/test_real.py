"""`python -m tests.real`, a runner in place of the engine: its steps, and all of it with the emulator as the server."""

import re
import subprocess
import sys
from collections.abc import Sequence

import pytest

from tests import real
from tests.deploy.kustomize import load
from tests.emulator.process import EmulatorProcess
from tests.service import ROOT

PLAN = real.Plan.of_manifests()
PORTS = {"mgmt": 10_001, "kv": 10_002, "n1ql": 10_003}
SECONDS = 120


class Engine:
    """A runner: notes the command lines, and answers as an engine with a server in its container would."""

    def __init__(self, edition: str = "enterprise", emulator: EmulatorProcess | None = None) -> None:
        self.commands: list[list[str]] = []
        self.failures: dict[str, list[str]] = {}
        self._edition = edition
        self._emulator = emulator
        self._ports = PORTS
        if emulator:
            self._ports = dict(
                zip(PORTS, (emulator.management_port, emulator.kv_port, emulator.query_port), strict=True)
            )

    def __call__(self, command: Sequence[str]) -> str:
        self.commands.append(list(command))
        line = " ".join(command)
        for part, reasons in self.failures.items():
            if part in line and reasons:
                raise real.RealError(reasons.pop(0))
        if command[1] == "port":
            [name] = [name for name, port in real.PORTS.items() if command[3] == f"{port}/tcp"]
            return f"127.0.0.1:{self._ports[name]}\n"
        if "curl" in command and self._emulator and "/users/local/" in command[-1]:
            password = next(word for word in command if word.startswith("password="))
            self._emulator.set_password(command[-1].rpartition("/")[2], password.partition("=")[2])
        if "cluster-init" in command and self._emulator:
            self._emulator.set_password(real.ADMINISTRATOR, command[command.index("--cluster-password") + 1])
        body = f'{{"isEnterprise":{str(self._edition == "enterprise").lower()}}}' if line.endswith("/pools") else ""
        return f"{body}\n200" if "curl" in command else ""

    def lines(self, part: str) -> list[str]:
        """Return the command lines that have a part."""
        return [line for line in map(" ".join, self.commands) if part in line]


@pytest.fixture(autouse=True)
def no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(real, "POLL_SECONDS", 0.0)


def server(engine: Engine) -> real.Server:
    return real.Server(engine, "docker", "box", "admin-password", "service-password")


class TestEngine:
    def test_first_that_answers(self) -> None:
        engine = Engine()
        assert real.find_engine(engine) == "docker"
        engine.failures = {"docker": ["no daemon"]}
        assert real.find_engine(engine) == "podman"

    def test_none_is_one_line_and_exit_code_2(self, tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
        """By the command line, on a PATH without either."""
        monkeypatch.setenv("PATH", str(tmp_path))
        command = [sys.executable, "-m", "tests.real"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=SECONDS, check=False)
        assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
        assert done.stderr.startswith("real: needs Docker or Podman")

    def test_one_whose_daemon_is_away_is_none(self, capsys: pytest.CaptureFixture[str]) -> None:
        engine = Engine()
        engine.failures = {"docker version": ["cannot connect"], "podman version": ["not found"]}
        assert real.main([], engine) == 2
        assert capsys.readouterr().err == (
            "real: needs Docker or Podman, and neither answers (cannot connect; not found)\n"
        )

    @pytest.mark.parametrize("flags", [["--image"], ["--nonsense"]])
    def test_bad_command_line_is_one_line(self, flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit) as ended:
            real.main(flags)
        assert (ended.value.code, capsys.readouterr().err.count("\n")) == (2, 1)

    def test_what_fails_is_told_in_one_line(self) -> None:
        command = [sys.executable, "-c", "import sys; sys.exit('this\\nis why')"]
        with pytest.raises(real.RealError, match=r"^\S+ -c failed: this is why$"):
            real.run_command(command)


class TestSteps:
    def test_plan_is_that_of_the_manifests(self) -> None:
        """The roles are those of group.yaml's comment on couchbase-cli; the default image is cluster.yaml's."""
        said = re.sub(r"\n# ", "", (ROOT / "k8s/couchbase/group.yaml").read_text().partition("--roles ")[2])
        assert said.startswith(f"{PLAN.roles}\n")
        assert (PLAN.bucket, PLAN.user, PLAN.group) == ("sample_app", "demopy", "demopy")
        assert PLAN.bucket_memory <= PLAN.data_memory, "the bucket would not fit"
        release = load(ROOT / "k8s/couchbase/cluster.yaml")["spec"]["image"].rpartition(":")[2]
        assert f"couchbase:enterprise-{release}" == real.IMAGE

    @pytest.mark.parametrize(
        ("image", "whole"),
        [("image:tag", "docker.io/library/image:tag"), ("couchbase/server:tag", "couchbase/server:tag")],
    )
    def test_ports_are_free_ones_of_this_machine_alone(self, image: str, whole: str) -> None:
        engine = Engine()
        real.start(server(engine), image)
        [command] = engine.commands
        assert command[-1] == whole
        assert [word for word in command if ":" in word][:-1] == [f"127.0.0.1::{port}" for port in real.PORTS.values()]
        assert real.published(server(engine)) == PORTS

    @pytest.mark.parametrize("edition", ["enterprise", "community"])
    def test_server_is_waited_for(self, edition: str) -> None:
        engine = Engine(edition)
        engine.failures = {"/pools": ["connection refused"] * 3}
        assert real.is_enterprise(server(engine)) == (edition == "enterprise")
        assert len(engine.lines("/pools")) == 4

    def test_waiting_ends(self) -> None:
        engine = Engine()
        engine.failures = {"/pools": ["connection refused"] * 3}
        with pytest.raises(real.RealError, match=r"x was not there within 0 s: connection refused"):
            real.wait_for("x", lambda: server(engine).http("GET", "mgmt", "/pools"), 0.0)

    def test_answers_but_200_are_failures(self) -> None:
        with pytest.raises(real.RealError, match='PUT /x was answered 400: "because"'):
            real.Server(lambda _: '"because"\n400', "docker").http("PUT", "mgmt", "/x")

    def test_cluster(self) -> None:
        """Three services, the memory of the manifests, the ports told from which it is reached; the bucket last."""
        engine = Engine()
        real.initialise(server(engine), PLAN, PORTS)
        [made] = engine.lines("cluster-init")
        assert "--services data,query,index" in made and "--cluster-ramsize 512 --cluster-index-ramsize 256" in made
        [told] = [command for command in engine.commands if command[-1].endswith("/setupAlternateAddresses/external")]
        assert {"hostname=127.0.0.1", "mgmt=10001", "kv=10002", "n1ql=10003"} <= set(told)
        [bucket] = engine.lines("bucket-create")
        assert "--bucket sample_app " in bucket and bucket.endswith("--bucket-ramsize 512 --wait")
        assert engine.lines("/admin/ping") == [" ".join(engine.commands[-1])]

    def test_user_has_the_group_and_the_group_the_roles(self) -> None:
        engine = Engine()
        real.make_user(server(engine), PLAN, enterprise=True)
        group, user = engine.commands
        assert group[-1].endswith("/settings/rbac/groups/demopy") and f"roles={PLAN.roles}" in group
        assert user[-1].endswith("/settings/rbac/users/local/demopy")
        assert {"password=service-password", "roles=", "groups=demopy"} <= set(user)

    def test_community_edition_has_but_one_role(self) -> None:
        engine = Engine("community")
        real.make_user(server(engine), PLAN, enterprise=False)
        [user] = engine.commands
        assert "roles=bucket_full_access[sample_app]" in user and not any(word.startswith("groups") for word in user)

    @pytest.mark.parametrize("enterprise", [True, False])
    def test_rights_are_tested_where_there_are_any(
        self, enterprise: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """It says so where there are none, and passes pytest's exit code and flags on."""
        started: list[Sequence[str]] = []
        monkeypatch.setattr(
            real, "python", lambda module, _: started.append(module) or (3 if "pytest" in module else 0)
        )
        engine = Engine("enterprise" if enterprise else "community")
        assert real.main(["--image", "i", "--", "-x"], engine) == 3
        [_, tests] = started
        assert tests[:2] == ["pytest", "tests/functional"] and tests[-1] == "-x"
        assert (f"--ignore={real.RIGHTS}" in tests) == ("left out" in capsys.readouterr().err) == (not enterprise)
        assert (ROOT / real.RIGHTS).is_file()


@pytest.mark.parametrize("part", ["docker run", "cluster-init", "bucket-create"])
def test_container_is_taken_down_whatever_fails(part: str, capsys: pytest.CaptureFixture[str]) -> None:
    """If that fails in its turn, the first failure is still the one that is told."""
    engine = Engine()
    engine.failures = {part: ["it broke"], "docker rm": ["there is no such container"]}
    assert real.main([], engine) == 1
    assert capsys.readouterr().err.endswith("real: it broke\n")
    [name] = [command[command.index("--name") + 1] for command in engine.commands if command[1] == "run"]
    assert engine.commands[-1] == ["docker", "rm", "--force", "--volumes", name]


def test_keep_leaves_it(capsys: pytest.CaptureFixture[str]) -> None:
    engine = Engine()
    engine.failures = {"cluster-init": ["it broke"]}
    assert real.main(["--keep"], engine) == 1
    assert engine.lines(" rm ") == []
    assert "docker rm --force --volumes demopy-real-" in capsys.readouterr().err


def test_all_of_it_over_the_emulator(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The emulator plays the server: it starts empty, and its second user can do what group.yaml says and no more.

    Of the functional tests some are enough here; the run also tells what it left out, and why.
    """
    for name in ("PYTEST_ADDOPTS", "PYTEST_XDIST_WORKER", "COUCHBASE_TEST_HOST"):
        monkeypatch.delenv(name, raising=False)
    with EmulatorProcess(empty=True, second_user=PLAN.user, roles=PLAN.roles) as emulator:
        engine = Engine(emulator=emulator)
        chosen = "test_rights or test_profile_by_id or test_username or test_picture or test_etag or test_help"
        code = real.main(["--keep", "--", "-n0", "-p", "no:cacheprovider", "-k", chosen], engine)
    printed = capfd.readouterr()
    assert code == 0, printed.out
    assert f"COUCHBASE_TEST_SERVICE_USER='{PLAN.user}'" in printed.out
    passed, skipped = (re.search(rf"(\d+) {outcome}", printed.out) for outcome in ("passed", "skipped"))
    assert passed is not None and int(passed[1]) >= 15
    assert skipped is not None and "does not ask the cluster that COUCHBASE_TEST_HOST names" in printed.out
