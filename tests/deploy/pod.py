"""What a pod's manifest comes to on this machine: environment, files and timings of its one container."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.deploy.kustomize import Manifest, one
from tests.emulator.process import EmulatorProcess


@dataclass(frozen=True)
class Pod:
    """A pod's spec with the ConfigMap that it takes its environment from."""

    spec: dict[str, Any]
    settings: dict[str, str]

    @classmethod
    def of(cls, objects: list[Manifest]) -> "Pod":
        """Return the Deployment's pod among these objects."""
        return cls(one(objects, "Deployment")["spec"]["template"]["spec"], one(objects, "ConfigMap")["data"])

    @property
    def container(self) -> dict[str, Any]:
        """The only container."""
        [container] = self.spec["containers"]
        found: dict[str, Any] = container
        return found

    @property
    def environment(self) -> dict[str, str]:
        """What the kubelet puts into the container's environment: the ConfigMap's members, then `env`."""
        own = {each["name"]: each["value"] for each in self.container.get("env", ())}
        return self.settings | own

    def port(self, name: str) -> int:
        """Return a container port by its name."""
        [number] = [port["containerPort"] for port in self.container["ports"] if port["name"] == name]
        found: int = number
        return found

    def environment_here(self, secrets: Path, database: EmulatorProcess, user: str, password: str) -> dict[str, str]:
        """Mount the secret into the folder `secrets`; return the environment with what is different on this machine.

        That is the database's host, the place of the mounted files and, so that tests may run side by side, the port
        numbers: free ones. All else is the manifest's.
        """
        mount = self.container["volumeMounts"][0]["mountPath"]
        (secrets / "password").write_text(password)
        (secrets / "ca.crt").write_bytes(Path(database.ca_file).read_bytes())
        here = {name: value.replace(mount, str(secrets)) for name, value in self.environment.items()}
        assert here.pop("COUCHBASE_USER") == user
        assert {here.pop(name) for name in ("SERVICE_PORT", "METRICS_PORT")} == {
            str(self.port("http")),
            str(self.port("metrics")),
        }
        ports = {"SERVICE_PORT": "0", "METRICS_PORT": "0"}
        return here | ports | {"COUCHBASE_HOST": database.tls_connection_string, "COUCHBASE_USER": user}

    @property
    def pause_seconds(self) -> int:
        """How long a pod that is to end still serves before it gets SIGTERM."""
        seconds: int = self.container["lifecycle"]["preStop"]["sleep"]["seconds"]
        return seconds

    @property
    def grace_seconds(self) -> int:
        """How long after the decision to end a pod it is killed."""
        seconds: int = self.spec["terminationGracePeriodSeconds"]
        return seconds


def service_roles(objects: list[Manifest]) -> str:
    """Return the roles of the Couchbase user that the operator is told to make, as the server writes them."""

    def names(kind: str, references: dict[str, Any]) -> list[str]:
        known = {each["metadata"]["name"]: each["spec"]["name"] for each in objects if each["kind"] == kind}
        return [known[each["name"]] for each in references["resources"]]

    return ",".join(
        f"{role['name']}[{bucket}:{scope}:{collection}]"
        for role in one(objects, "CouchbaseGroup")["spec"]["roles"]
        for bucket in names("CouchbaseBucket", role["buckets"])
        for scope in names("CouchbaseScope", role["scopes"])
        for collection in names("CouchbaseCollection", role["collections"])
    )
