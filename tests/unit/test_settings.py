"""Settings: one table, three sources, and one clear line for each mistake."""

import ssl
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import trustme
from cryptography.hazmat.primitives import serialization

import micro_svc_demo as service
from tests.service import ROOT, Certificates

REQUIRED = {"COUCHBASE_HOST": "db", "COUCHBASE_USER": "u", "COUCHBASE_PASSWORD": "p"}
ROWS = service.ROWS


def read(*argv: str, **environ: str) -> service.Settings:
    return service.read_settings(argv, REQUIRED | environ)


def test_defaults_are_those_of_the_contract() -> None:
    """With only what is required set, every other setting has the blueprint's default."""
    settings = read()
    assert (settings.couchbase_bucket, settings.couchbase_scope) == ("sample_app", "profiles")
    assert (settings.port, settings.metrics_port) == (8080, 9090)
    assert (settings.threads, settings.max_connections, settings.idle_seconds) == (8, 10_000, 75)
    assert (settings.couchbase_timeout_ms, settings.couchbase_query_timeout_ms) == (2500, 5000)
    assert (settings.token_refresh_seconds, settings.shutdown_seconds) == (30, 20)
    assert (settings.couchbase_tls, settings.couchbase_tls_verify, settings.couchbase_tls_ca) == (True, True, None)
    assert (settings.couchbase_network, settings.log_level, settings.access_log) == ("auto", "info", True)


def test_flag_wins_over_environment_wins_over_default() -> None:
    assert read().threads == 8
    assert read(THREADS="3").threads == 3
    assert read("--threads", "5", THREADS="3").threads == 5


def test_flags_are_the_names_in_lower_case_without_service() -> None:
    assert read("--port", "0").port == 0
    assert read("--access-log", "false").access_log is False
    assert read("--idle-seconds", "86400").idle_seconds == 86400
    assert read("--couchbase-host", "other").couchbase_host == "other"


def test_empty_variable_means_not_set() -> None:
    assert read(THREADS="", COUCHBASE_TLS_CA="").threads == 8


def test_password_is_never_a_flag() -> None:
    with pytest.raises(service.SettingsError, match="--couchbase-password"):
        read("--couchbase-password", "p")


@pytest.mark.parametrize(
    ("environ", "connection_string"),
    [
        ({"COUCHBASE_HOST": "db"}, "couchbases://db"),
        ({"COUCHBASE_HOST": "a.example,b.example:11207"}, "couchbases://a.example,b.example:11207"),
        ({"COUCHBASE_HOST": "db", "COUCHBASE_TLS": "false"}, "couchbase://db"),
        ({"COUCHBASE_HOST": "couchbase://db"}, "couchbase://db"),
        ({"COUCHBASE_HOST": "couchbases://db?network=external"}, "couchbases://db?network=external"),
        ({"COUCHBASE_HOST": "[::1]:11210", "COUCHBASE_TLS": "false"}, "couchbase://[::1]:11210"),
    ],
)
def test_connection_string(environ: dict[str, str], connection_string: str) -> None:
    """A bare host becomes a URL by COUCHBASE_TLS; a whole URL stays as it is."""
    assert read(**environ).connection_string == connection_string


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("COUCHBASE_HOST", "http://db"),
        ("COUCHBASE_HOST", "db host"),
        ("COUCHBASE_HOST", "couchbase://user:secret@db"),
        ("COUCHBASE_USER", "a\nb"),
        ("COUCHBASE_USER", "a\udcff"),  # what Python makes of bytes that are not UTF-8
        ("COUCHBASE_BUCKET", "a/b"),
        ("COUCHBASE_SCOPE", "a`b"),
        ("COUCHBASE_TLS", "maybe"),
        ("COUCHBASE_TLS_CA", "/no/such/file"),
        ("COUCHBASE_TLS_VERIFY", "2"),
        ("COUCHBASE_NETWORK", "internal"),
        ("COUCHBASE_TIMEOUT_MS", "9"),
        ("COUCHBASE_QUERY_TIMEOUT_MS", "five"),
        ("SERVICE_PORT", "65536"),
        ("SERVICE_PORT", "-1"),
        ("SERVICE_TLS_CERT", "/no/such/file"),
        ("SERVICE_TLS_KEY", "."),
        ("SERVICE_TLS_CLIENT_CA", "/no/such/file"),
        ("METRICS_PORT", "none"),
        ("THREADS", "+8"),
        ("THREADS", "٨"),
        ("MAX_CONNECTIONS", "0"),
        ("IDLE_SECONDS", "0"),
        ("IDLE_SECONDS", "86401"),
        ("TOKEN_REFRESH_SECONDS", "0"),
        ("SHUTDOWN_SECONDS", "1.5"),
        ("LOG_LEVEL", "loud"),
        ("ACCESS_LOG", "on"),
    ],
)
def test_bad_value_names_the_setting_and_what_is_allowed(name: str, value: str) -> None:
    with pytest.raises(service.SettingsError) as raised:
        read(**{name: value})
    message = str(raised.value)
    allowed = next(row["allowed"] for row in ROWS if row["env"] == name)
    assert message.startswith(name)
    assert allowed in message
    assert "\n" not in message


@pytest.mark.parametrize("missing", sorted(REQUIRED))
def test_missing_value_is_named(missing: str) -> None:
    environ = {name: value for name, value in REQUIRED.items() if name != missing}
    with pytest.raises(service.SettingsError, match=missing):
        service.read_settings([], environ)


def test_password_file(tmp_path) -> None:
    """The file's one line is the password, without a BOM; both sources at once, no text, and UTF-16 are refused."""
    environ = {"COUCHBASE_HOST": "db", "COUCHBASE_USER": "u"}
    secret = tmp_path / "password"
    secret.write_text("s3cret \n")
    assert service.read_settings([], environ | {"COUCHBASE_PASSWORD_FILE": str(secret)}).couchbase_password == "s3cret "
    with pytest.raises(service.SettingsError, match="both set"):
        read(COUCHBASE_PASSWORD_FILE=str(secret))
    secret.write_bytes("sécret\r\n".encode("utf-8-sig"))
    assert service.read_settings([], environ | {"COUCHBASE_PASSWORD_FILE": str(secret)}).couchbase_password == "sécret"
    no_text = (b"", b"\n", "\n".encode("utf-8-sig"))
    other = [b"\xff\xfe", "sécret".encode("latin-1"), *("secret\n".encode(code) for code in ("utf-16", "utf-16-le"))]
    for contents, reason in ((no_text, "no password in it"), (other, "not UTF-8 .UTF-16, perhaps")):
        for content in contents:
            secret.write_bytes(content)
            with pytest.raises(service.SettingsError, match=reason) as raised:
                service.read_settings([], environ | {"COUCHBASE_PASSWORD_FILE": str(secret)})
            assert "cret" not in str(raised.value)


@pytest.mark.parametrize(
    ("password", "doubted"),
    [
        ("marked", False),
        ("mar ked", False),
        ("mar\"k'ed", False),
        (" marked", True),
        ("marked\r", True),
        ("'marked'", True),
        ('"marked" ', True),
    ],
)
def test_what_looks_like_a_mistake_in_the_password_is_named(password: str, doubted: bool) -> None:
    doubt = " (it begins or ends with a blank or a quote)" if doubted else ""
    assert read(COUCHBASE_PASSWORD=password).credentials == f"COUCHBASE_USER and COUCHBASE_PASSWORD{doubt}"


def test_password_is_not_repeated_in_an_error() -> None:
    with pytest.raises(service.SettingsError) as raised:
        read(COUCHBASE_PASSWORD="marked\0secret")
    assert "marked" not in str(raised.value)


@pytest.fixture
def certificates(tmp_path: Path) -> Certificates:
    """A certificate with its key and authority."""
    return Certificates(tmp_path)


def test_tls_needs_certificate_and_key(certificates: Certificates) -> None:
    """One without the other is a mistake, and so is an authority for clients without both; flags do as well."""
    cert, key = certificates.settings.values()
    assert read("--tls-cert", cert, "--tls-key", key, "--tls-client-ca", str(certificates.ca_file)).tls_key == key
    for name, value in (("CERT", cert), ("KEY", key), ("CLIENT_CA", str(certificates.ca_file))):
        with pytest.raises(service.SettingsError, match="SERVICE_TLS_CERT, SERVICE_TLS_KEY: allowed: both or none"):
            read(**{f"SERVICE_TLS_{name}": value})


def mistaken(kind: str, certificates: Certificates, folder: Path) -> None:
    """Do something to the files that makes them no use."""
    now, day = datetime.now(UTC), timedelta(days=1)
    if kind == "another's key":
        (folder / "other").mkdir()
        certificates.key.write_bytes(Certificates(folder / "other").key.read_bytes())
    elif kind == "expired":
        certificates.renew(not_after=now - day)
    elif kind == "not yet valid":
        certificates.renew(not_before=now + day, not_after=now + 2 * day)
    elif kind == "a passphrase":
        key = serialization.load_pem_private_key(certificates.key.read_bytes(), None)
        sealed = serialization.BestAvailableEncryption(b"x")
        form = serialization.PrivateFormat.PKCS8
        certificates.key.write_bytes(key.private_bytes(serialization.Encoding.PEM, form, sealed))
    else:
        path = {"no certificate": certificates.cert, "no key": certificates.key, "no authority": certificates.ca_file}
        path[kind].write_text("no PEM\n")


@pytest.mark.parametrize(
    ("kind", "where", "why"),
    [
        ("another's key", "SERVICE_TLS_CERT, SERVICE_TLS_KEY: ", "key values mismatch"),
        ("expired", "SERVICE_TLS_CERT, SERVICE_TLS_KEY: ", "certificate has expired"),
        ("not yet valid", "SERVICE_TLS_CERT, SERVICE_TLS_KEY: ", "not yet valid"),
        ("a passphrase", "SERVICE_TLS_CERT, SERVICE_TLS_KEY: ", "without a passphrase"),
        ("no certificate", "SERVICE_TLS_CERT, SERVICE_TLS_KEY: ", "PEM"),
        ("no key", "SERVICE_TLS_CERT, SERVICE_TLS_KEY: ", "PEM"),
        ("no authority", "SERVICE_TLS_CLIENT_CA: ", "PEM"),
    ],
)
def test_a_certificate_that_is_no_use_is_one_line_and_2(
    certificates: Certificates, tmp_path: Path, kind: str, where: str, why: str
) -> None:
    """Nothing is bound, nobody is asked for a passphrase, and the line says which setting and what is allowed."""
    mistaken(kind, certificates, tmp_path)
    ca = {"SERVICE_TLS_CLIENT_CA": str(certificates.ca_file)}
    ended = run("--port", "0", "--metrics-port", "0", **REQUIRED, **certificates.settings, **ca)
    assert (ended.returncode, ended.stdout, ended.stderr.count("\n")) == (2, "", 1)
    assert ended.stderr.startswith(f"micro_svc_demo: {where}") and why in ended.stderr


@pytest.mark.parametrize("key", [trustme.KeyType.RSA, trustme.KeyType.ECDSA])
def test_a_certificate_of_an_intermediate_authority(tmp_path: Path, key: trustme.KeyType) -> None:
    """The chain in the file reaches a client that trusts the root alone; the time is that of the certificate itself."""
    root = trustme.CA(key_type=key)
    until = datetime.now(UTC).replace(microsecond=0) + timedelta(days=5)
    made = root.create_child_ca(key_type=key).issue_cert("localhost", not_after=until, key_type=key)
    files = Certificates(tmp_path)
    files.cert.write_bytes(b"".join(pem.bytes() for pem in made.cert_chain_pems))
    made.private_key_pem.write_to_path(files.key)
    assert len(made.cert_chain_pems) == 2
    context, expires = service.server_context(read(**files.settings))
    assert expires == until.timestamp()
    client = ssl.create_default_context(cadata=root.cert_pem.bytes().decode())
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    asks = client.wrap_bio(to_client, to_server, server_hostname="localhost")
    for side in (asks, context.wrap_bio(to_server, to_client, server_side=True)):
        with pytest.raises(ssl.SSLWantReadError):
            side.do_handshake()
    asks.do_handshake()
    assert asks.getpeercert()


def test_every_setting_is_in_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        service.read_settings(["--help"], {})
    printed = capsys.readouterr().out
    for row in ROWS:
        assert row["env"] in printed
        assert row["flag"] is None or row["flag"] in printed


def run(*arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "micro_svc_demo.py"), *arguments],
        env=environ,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_command_line_says_one_line_and_exits_2() -> None:
    """Missing and bad settings and unknown flags: one line on stderr, nothing on stdout, exit code 2."""
    for arguments, environ in (((), {}), ((), REQUIRED | {"THREADS": "x"}), (("--nonsense",), REQUIRED)):
        ended = run(*arguments, **environ)
        assert ended.returncode == 2
        assert ended.stdout == ""
        assert ended.stderr.count("\n") == 1
        assert "Traceback" not in ended.stderr


@pytest.mark.parametrize(
    "module", ["micro_svc_demo", "tests.demo", "tests.sample_data", "tests.emulator", "tests.load"]
)
def test_help_is_ascii(module: str) -> None:
    """So that it is printed in every locale."""
    command = [sys.executable, "-m", module, "--help"]
    ended = subprocess.run(command, env={"PYTHONIOENCODING": "ascii"}, cwd=ROOT, capture_output=True, check=True)
    assert ended.stdout.startswith(b"usage: ") and not ended.stderr


def test_a_bad_value_is_shown_in_ascii() -> None:
    ended = run("--threads", "\u2026", PYTHONIOENCODING="ascii", **REQUIRED)
    assert ended.returncode == 2
    assert ended.stderr == "micro_svc_demo: THREADS (--threads): '\\u2026' is not allowed; allowed: 1 to 256\n"


def test_version() -> None:
    ended = run("--version")
    assert (ended.returncode, ended.stdout) == (0, f"micro_svc_demo.py {service.__version__}\n")
