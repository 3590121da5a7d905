"""TLS to Couchbase: what is trusted, what is refused and in which words, and how old it may be."""

import socket
import ssl
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest
import trustme
from couchbase.exceptions import CouchbaseException

import micro_svc_demo
from tests.chaos.conftest import TOKEN
from tests.chaos.scenes import Scene
from tests.emulator.process import EmulatorProcess
from tests.service import ServiceProcess, settings_for

EXIT_SECONDS = 15.0
ID, LOOKUP = "/api/v1/id/1", "/api/v1/nickname/nobody"


class Ended(NamedTuple):
    """How a service ended that could not start: its exit code, its lines about it, and after how many seconds."""

    code: int
    errors: list[dict[str, str]]
    seconds: float


@pytest.fixture(scope="module")
def databases() -> Iterator[dict[str, EmulatorProcess]]:
    """An emulator for each kind of certificate."""
    kinds = ("good", "expired", "wrong-host")
    with ThreadPoolExecutor(len(kinds)) as pool:
        made = [EmulatorProcess(tls=True, tls_cert=kind, profiles=5, pictures=1, token=TOKEN) for kind in kinds]
        running = dict(zip(kinds, pool.map(EmulatorProcess.__enter__, made), strict=True))
    yield running
    for database in made:
        database.stop()


def over_tls(database: EmulatorProcess) -> dict[str, str]:
    """Return the settings for its TLS ports."""
    return settings_for(database) | {"COUCHBASE_HOST": database.tls_connection_string}


def warnings_of_tls(service: ServiceProcess) -> list[str]:
    """Return what a service has warned of that has to do with certificates; a busy machine may make it warn of more."""
    messages = [line["message"] for line in service.lines if line["level"] != "info"]
    return [message for message in messages if "TLS" in message or "verified" in message or "certificate" in message]


def test_a_given_authority(databases: dict[str, EmulatorProcess]) -> None:
    """Documents, pictures and lookups come over TLS, with nothing to warn of."""
    settings = over_tls(databases["good"]) | {"COUCHBASE_TLS_CA": databases["good"].ca_file}
    with ServiceProcess(settings) as service:
        statuses = [service.get(path, TOKEN).status for path in (ID, "/api/v1/picture/raw/1", LOOKUP)]
    assert statuses == [200, 200, 404]
    assert warnings_of_tls(service) == []


def test_a_host_without_a_scheme_means_tls(databases: dict[str, EmulatorProcess]) -> None:
    """It is what COUCHBASE_TLS says by default."""
    host = databases["good"].tls_connection_string.partition("://")[2]
    settings = over_tls(databases["good"]) | {"COUCHBASE_HOST": host, "COUCHBASE_TLS_CA": databases["good"].ca_file}
    with ServiceProcess(settings) as service:
        assert service.get(ID, TOKEN).status == 200
        [line] = [line for line in service.lines if line["message"] == "listening"]
    assert line["cluster"] == f"couchbases://{host}"


@pytest.mark.parametrize("kind", ["good", "expired", "wrong-host"])
def test_verification_switched_off(databases: dict[str, EmulatorProcess], kind: str) -> None:
    """Every certificate will do, at the price of one warning a start."""
    settings = over_tls(databases[kind]) | {"COUCHBASE_TLS_VERIFY": "false"}
    with ServiceProcess(settings) as service:
        assert service.get(ID, TOKEN).status == 200
        assert service.get(LOOKUP, TOKEN).status == 404
    [warning] = warnings_of_tls(service)
    assert "not verified" in warning and "COUCHBASE_TLS_VERIFY" in warning


REFUSALS = {
    "wrong CA": ("good", "other"),
    "expired": ("expired", "own"),
    "wrong host name": ("wrong-host", "own"),
    "unknown CA, none given": ("good", None),
    "expired, unknown CA": ("expired", None),
}
WORDS = {
    "wrong CA": ("issuer", "COUCHBASE_TLS_CA"),
    "expired": ("expired",),
    "wrong host name": ("COUCHBASE_HOST",),
    "unknown CA, none given": ("COUCHBASE_TLS_CA",),
    "expired, unknown CA": (),
}


def run_to_its_end(settings: dict[str, str]) -> Ended:
    """Start the service and wait for it to give up."""
    started = time.monotonic()
    service = ServiceProcess(settings).start()
    try:
        service.wait_for("cannot serve", 2 * EXIT_SECONDS)
        service.process.wait(10)
        seconds = time.monotonic() - started
    finally:
        code = service.stop()
    return Ended(code, [line for line in service.lines if line["level"] == "error"], seconds)


def refuse(kind: str, trusted: str | None) -> Ended:
    """Start the service in front of a certificate that it must refuse."""
    with (
        tempfile.TemporaryDirectory() as directory,
        EmulatorProcess(tls=True, tls_cert=kind, profiles=1, pictures=0, token=TOKEN) as database,
    ):
        other = Path(directory) / "other.pem"
        trustme.CA().cert_pem.write_to_path(str(other))
        given = {"other": str(other), "own": database.ca_file, None: ""}[trusted]
        return run_to_its_end(over_tls(database) | {"COUCHBASE_TLS_CA": given})


SCENES = {name: Scene(refuse, *arguments) for name, arguments in REFUSALS.items()}


@pytest.mark.parametrize("name", SCENES)
def test_refusals(name: str) -> None:
    """Exit code 1, in time, and one line that says which certificate is refused, why, and what to look at."""
    code, errors, seconds = SCENES[name].outcome()
    assert code == 1
    assert seconds < EXIT_SECONDS
    [line] = errors
    assert "certificate" in line["advice"]
    assert "127.0.0.1" in line["advice"]
    for word in WORDS[name]:
        assert word in line["advice"]


def test_refusals_differ() -> None:
    """A wrong authority, an expired certificate and a wrong host name are told apart."""
    reasons = [SCENES[name].outcome().errors[0]["advice"] for name in ("wrong CA", "expired", "wrong host name")]
    assert len(set(reasons)) == 3
    assert ["expired" in reason for reason in reasons] == [False, True, False]


def test_a_file_that_is_no_certificate(databases: dict[str, EmulatorProcess], tmp_path: Path) -> None:
    """It ends in one line, too."""
    wrong = tmp_path / "ca.pem"
    wrong.write_text("no certificate\n")
    code, errors, _ = run_to_its_end(over_tls(databases["good"]) | {"COUCHBASE_TLS_CA": str(wrong)})
    assert code == 1
    [line] = errors
    assert "COUCHBASE_TLS_CA" in line["advice"]


# ---- the version ----


class OldListener:
    """A listener that offers TLS 1.1 and older only, and notes what becomes of each handshake."""

    def __init__(self, directory: Path) -> None:
        """Listen on a port of its own."""
        authority = trustme.CA()
        self.ca_file = directory / "old-ca.pem"
        authority.cert_pem.write_to_path(str(self.ca_file))
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        authority.issue_cert("127.0.0.1", "localhost").configure_cert(self._context)
        make_old(self._context)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self.outcomes: list[str] = []
        self.first = threading.Event()
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        while True:
            try:
                plain, _ = self._listener.accept()
            except OSError:
                return
            plain.settimeout(5)
            try:
                with self._context.wrap_socket(plain, server_side=True) as stream:
                    self.outcomes.append(stream.version() or "")
            except ssl.SSLError as error:
                self.outcomes.append(error.reason or "")
            except OSError as error:
                self.outcomes.append(type(error).__name__)
            self.first.set()

    def close(self) -> None:
        """Listen no more."""
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join(10)


def make_old(context: ssl.SSLContext) -> None:
    """Have a context speak TLS 1.1 at most; its ciphers and hashes need OpenSSL's security level 0."""
    context.minimum_version, context.maximum_version = ssl.TLSVersion.TLSv1, ssl.TLSVersion.TLSv1_1
    context.set_ciphers("ALL:@SECLEVEL=0")


def connect_to(old: OldListener, verify: str) -> bool:
    """Try as the service's look at certificates does and with the SDK; tell whether both are refused."""
    settings = micro_svc_demo.read_settings(
        [],
        {
            "COUCHBASE_HOST": f"couchbases://127.0.0.1:{old.port}",
            "COUCHBASE_USER": "u",
            "COUCHBASE_PASSWORD": "p",
            "COUCHBASE_TLS_CA": str(old.ca_file),
            "COUCHBASE_TLS_VERIFY": verify,
        },
    )
    context = ssl.create_default_context(cafile=settings.couchbase_tls_ca)
    assert context.minimum_version >= ssl.TLSVersion.TLSv1_2
    with socket.create_connection(("127.0.0.1", old.port), 5) as plain, pytest.raises(ssl.SSLError):
        context.wrap_socket(plain, server_hostname="127.0.0.1")
    with pytest.raises(CouchbaseException):
        micro_svc_demo.open_cluster(settings)
    return True


@pytest.mark.filterwarnings("ignore:ssl.TLSVersion.TLSv1:DeprecationWarning")
def test_tls_1_1_is_refused(tmp_path: Path) -> None:
    """Neither the service's own connections nor the SDK's fall back to it, where another who would gets through."""
    old = OldListener(tmp_path)
    try:
        willing = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        willing.load_verify_locations(old.ca_file)
        make_old(willing)
        with (
            socket.create_connection(("127.0.0.1", old.port), 5) as plain,
            willing.wrap_socket(plain, server_hostname="127.0.0.1") as stream,
        ):
            assert stream.version() == "TLSv1.1"
        assert old.first.wait(10)
        assert old.outcomes == ["TLSv1.1"]
        with ThreadPoolExecutor(2) as pool:  # the SDK tries for ten seconds each time
            assert list(pool.map(connect_to, [old] * 2, ["true", "false"])) == [True, True]
    finally:
        old.close()
    assert len(old.outcomes) > 4, "the SDK has not even tried"
    assert set(old.outcomes[1:]) == {"UNSUPPORTED_PROTOCOL"}
