"""Settings: one table, three sources, and one clear line for each mistake."""

import subprocess
import sys

import pytest

import micro_svc_demo as service
from tests.service import ROOT

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
