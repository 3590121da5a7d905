"""The generators of the sample data, its command line, and how it writes to a cluster that fails."""

import base64
import io
import itertools
import json
import re
import time
import tracemalloc
from collections import Counter
from datetime import date
from types import SimpleNamespace
from typing import Any

import pytest
from couchbase.exceptions import AuthenticationException, CouchbaseException, TemporaryFailException
from PIL import Image

import micro_svc_demo as service
from tests import sample_data
from tests.sample_data import AWKWARD, LONGEST_NICKNAME, Plan, Provisioner, ProvisionError, picture, profile, profiles

SEED = 1
FIELDS = {
    "record_id": int,
    "name": str,
    "nickname": str,
    "picture": int,
    "user_id": str,
    "email": str,
    "email_verified": bool,
    "first_name": str,
    "last_name": str,
    "address": str,
    "city": str,
    "state": str,
    "zip_code": str,
    "phone": str,
    "date_of_birth": str,
}
FORMATS = {
    "email": r"[a-z]+\.[a-z]+[0-9]+@example\.(com|net|org)",
    "address": r"[1-9][0-9]{0,3} [A-Za-z ]+( Apt\. [1-9][0-9]{0,2})?",
    "city": r"[A-Z][A-Za-z ]+",
    "state": r"[A-Z]{2}",
    "zip_code": r"[0-9]{5}",
    "phone": r"\+1-[2-9][0-8][2-9]-555-01[0-9]{2}",
    "date_of_birth": r"[0-9]{4}-[0-9]{2}-[0-9]{2}",
}
SETTINGS = {"COUCHBASE_HOST": "db", "COUCHBASE_USER": "demo", "COUCHBASE_PASSWORD": "secret"}


def without_caches() -> None:
    """Forget what the generators keep, as a new process would."""
    for cached in (sample_data._pools, sample_data._letters, sample_data._palette):
        cached.cache_clear()


def test_the_same_seed_makes_the_same_profiles() -> None:
    """Nothing but seed and id goes in: not the caches, not another seed in between."""
    before = [sample_data.encode(made) for made in profiles(60, SEED)]
    without_caches()
    list(profiles(60, SEED + 1))
    assert [sample_data.encode(made) for made in profiles(60, SEED)] == before


def test_the_same_seed_makes_the_same_pictures() -> None:
    """Byte for byte, whatever was drawn before."""
    before = [picture(number, SEED) for number in (1, 2, 3)]
    without_caches()
    picture(9, SEED + 1)
    assert [picture(number, SEED) for number in (3, 2, 1)] == before[::-1]


def test_a_profile_does_not_depend_on_the_count() -> None:
    """Profile 5 of 10 is profile 5 of 1,000, and what is asked for alone."""
    many = list(profiles(1000, SEED))
    assert list(profiles(10, SEED)) == many[:10]
    assert profile(5, SEED) == many[4]


def test_another_seed_makes_other_records() -> None:
    """Almost no profile and no picture is the same; the ids are."""
    for one, other in zip(profiles(10, SEED), profiles(10, SEED + 1), strict=True):
        assert one["record_id"] == other["record_id"]
        assert one["address"] != other["address"]
    assert picture(1, SEED)["image"] != picture(1, SEED + 1)["image"]


def test_every_field_has_its_type_and_format() -> None:
    """As the data's description says, in its order."""
    for number, made in enumerate(profiles(1000, SEED), start=1):
        assert {name: type(value) for name, value in made.items()} == FIELDS
        assert list(made) == list(FIELDS)
        assert made["record_id"] == made["picture"] == number
        for name, pattern in FORMATS.items():
            assert re.fullmatch(pattern, made[name]), (name, made[name])
        assert 1940 <= date.fromisoformat(made["date_of_birth"]).year <= 2007
        if number not in AWKWARD:
            assert made["name"] == f"{made['first_name']} {made['last_name']}"
            assert re.fullmatch(rf"[a-z]+{number}", made["user_id"])


def test_usernames_are_unique_and_nicknames_mostly() -> None:
    """A lookup by username finds one; by some nicknames, several."""
    made = list(profiles(5000, SEED))
    assert len({one["user_id"] for one in made}) == 5000
    nicknames = Counter(one["nickname"] for one in made)
    shared = {nickname for nickname, times in nicknames.items() if times > 1}
    assert set(sample_data.SHARED_NICKNAMES) <= shared
    assert sum(nicknames[nickname] for nickname in shared) < 300
    assert made[0]["nickname"] == made[320]["nickname"] == made[640]["nickname"]


def test_the_awkward_values_are_there() -> None:
    """At their record ids, whatever the seed, and each distinct."""
    for seed in (SEED, SEED + 1):
        for number, values in AWKWARD.items():
            assert values.items() <= profile(number, seed).items()
    for name in ("nickname", "user_id"):
        given = [values[name] for values in AWKWARD.values() if name in values]
        assert len(set(given)) == len(given)
    together = "".join(values["nickname"] for values in AWKWARD.values())
    assert all(character in together for character in "'\"\\ /%?#+&\u0301")
    assert {"x' OR '1'='1", 'x" OR 1=1 --'} <= {values["nickname"] for values in AWKWARD.values()}
    assert any(ord(character) > 0xFFFF for character in together), "an emoji"
    assert any("\u0590" <= character <= "\u05ff" for character in together), "right-to-left text"


def test_the_longest_nickname_just_fits_into_a_request() -> None:
    """The service takes a target with it, and none with one character more."""
    path = f"/api/v1/nickname/{LONGEST_NICKNAME}"
    head = "GET {} HTTP/1.1\r\nHost: x\r\n\r\n"
    assert service.parse_head(head.format(path).encode()).target == path
    with pytest.raises(service.ProblemError) as caught:
        service.parse_head(head.format(path + "n").encode())
    assert caught.value.status == 414


def test_pictures_are_what_they_say_they_are() -> None:
    """Pillow opens each; odd ids are PNG, even ones JPEG, as a `data:` URL or an <img> would need."""
    for number in range(1, 41):
        record = picture(number, SEED)
        assert list(record) == ["record_id", "type", "image"]
        assert record["record_id"] == number
        assert record["type"] == ("png" if number % 2 else "jpeg")
        with Image.open(io.BytesIO(base64.b64decode(record["image"], validate=True))) as opened:
            opened.load()
            assert opened.format == record["type"].upper()
            assert opened.size == (128, 128)
            tones = opened.convert("L").tobytes()
        assert min(tones) < 160 < max(tones) == 255, "white initials on something darker"


def test_no_two_pictures_are_alike() -> None:
    """Told apart by their pixels, not only by how they are compressed."""
    drawn = {sample_data.avatar(number, SEED).convert("RGB").tobytes() for number in range(1, 501)}
    assert len(drawn) == 500


def test_the_schema_is_the_services() -> None:
    """The service asks for the names that are created here, and its advice is the same statements."""
    assert (sample_data.USERS, sample_data.IMAGES, sample_data.AUTH) == (service.USERS, service.IMAGES, service.AUTH)
    assert sample_data.TOKEN_KEY == service.TOKEN_KEY
    settings = service.read_settings([], SETTINGS)
    assert (settings.couchbase_bucket, settings.couchbase_scope) == (sample_data.BUCKET, sample_data.SCOPE)
    assert all(statement in service.MISSING_INDEX for statement in sample_data.INDEXES.values())


# ── The command line ──────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_plan_has_defaults() -> None:
    """What comes out when only the cluster is named."""
    plan, settings = sample_data.read_plan([], SETTINGS)
    assert plan == Plan(profiles=1000, seed=1, token=None, batch=500)
    assert settings.connection_string == "couchbases://db"


def test_flags_win_over_the_environment() -> None:
    """For the token and for the cluster's settings."""
    argv = [
        "--profiles",
        "7",
        "--seed=3",
        "--batch=2",
        "--token=flag",
        "--couchbase-host",
        "other",
        "--couchbase-scope=s",
    ]
    plan, settings = sample_data.read_plan(argv, SETTINGS | {"SAMPLE_TOKEN": "environment"})
    assert plan == Plan(profiles=7, seed=3, token="flag", batch=2)
    assert (settings.couchbase_host, settings.couchbase_scope) == ("other", "s")
    assert sample_data.read_plan([], SETTINGS | {"SAMPLE_TOKEN": "environment"})[0].token == "environment"


@pytest.mark.parametrize(
    ("argv", "environment"),
    [
        (["--profiles", "-1"], {}),
        (["--profiles", "5000001"], {}),
        (["--profiles", "1e3"], {}),
        (["--batch", "0"], {}),
        (["--seed", "x"], {}),
        (["--token", "two words"], {}),
        (["--token", ""], {}),
        ([], {"SAMPLE_TOKEN": "tökén"}),
        (["--port", "1"], {}),
        (["--couchbase-password", "secret"], {}),
        (["surplus"], {}),
        ([], {"COUCHBASE_HOST": ""}),
        (["--couchbase-tls", "perhaps"], {}),
        (["--couchbase-host="], {}),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    argv: list[str],
    environment: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Whichever of the two parsers it is that refuses it."""
    for name, value in (SETTINGS | environment).items():
        monkeypatch.setenv(name, value)
    try:
        code: Any = sample_data.main(argv)
    except SystemExit as ended:
        code = ended.code
    out, error = capsys.readouterr()
    assert code == 2
    assert out == ""
    assert error.startswith("sample_data: ")
    assert error.count("\n") == 1


# ── Writing, with a cluster that fails ────────────────────────────────────────────────────────────────────────────────


class FailingCollection:
    """Stands in for the SDK's collection: fails the keys that `failures` says, one item a call, then none."""

    def __init__(self, failures: list[dict[str, Exception]]) -> None:
        self.stored: dict[str, bytes] = {}
        self.calls: list[set[str]] = []
        self._failures = iter(failures)

    def upsert_multi(self, documents: dict[str, bytes], **_: object) -> SimpleNamespace:
        """Store what does not fail."""
        failing = {key: error for key, error in next(self._failures, {}).items() if key in documents}
        self.calls.append(set(documents))
        self.stored |= {key: value for key, value in documents.items() if key not in failing}
        return SimpleNamespace(exceptions=failing)


@pytest.fixture
def provisioner(monkeypatch: pytest.MonkeyPatch) -> Provisioner:
    """A provisioner that is connected to nothing and doesn't sleep."""
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    return Provisioner(service.read_settings([], SETTINGS))


def connect_to(provisioner: Provisioner, collection: object) -> None:
    """Have it write to this collection."""
    provisioner._scope = SimpleNamespace(collection=lambda name: collection)


def test_only_documents_that_failed_are_written_again(provisioner: Provisioner) -> None:
    """The others are not sent twice, and all arrive."""
    collection = FailingCollection(
        [{"b": TemporaryFailException(), "c": TemporaryFailException()}, {"c": CouchbaseException()}]
    )
    connect_to(provisioner, collection)
    provisioner._write("user_data", {"a": b"1", "b": b"2", "c": b"3"})
    assert collection.calls == [{"a", "b", "c"}, {"b", "c"}, {"c"}]
    assert collection.stored == {"a": b"1", "b": b"2", "c": b"3"}


def test_a_document_that_always_fails_ends_it(provisioner: Provisioner) -> None:
    """After a bounded number of tries, with one line that names it."""
    collection = FailingCollection([{"b": TemporaryFailException()}] * 100)
    connect_to(provisioner, collection)
    with pytest.raises(ProvisionError, match="1 of 2 documents could not be written in 8 tries, such as 'b'") as caught:
        provisioner._write("user_data", {"a": b"1", "b": b"2"})
    assert len(collection.calls) == sample_data.WRITE_TRIES
    assert "\n" not in str(caught.value)


def test_missing_permission_is_not_tried_again(provisioner: Provisioner) -> None:
    """It says which role is missing at once."""
    collection = FailingCollection([{"a": AuthenticationException()}] * 100)
    connect_to(provisioner, collection)
    with pytest.raises(ProvisionError, match="user 'demo' may not write to 'user_data': it needs the role Data Writer"):
        provisioner._write("user_data", {"a": b"1"})
    assert len(collection.calls) == 1


def test_records_are_written_in_batches(provisioner: Provisioner) -> None:
    """Each as large as asked for, the last one smaller; every profile with its picture."""
    collection = FailingCollection([])
    connect_to(provisioner, collection)
    provisioner.put_records(Plan(profiles=7, seed=SEED, token=None, batch=3))
    assert [len(keys) for keys in collection.calls] == [3, 3, 3, 3, 1, 1]
    wanted = [f"{name}:{number}" for name, number in itertools.product(("user_data", "user_images"), range(1, 8))]
    assert sorted(collection.stored) == sorted(wanted)
    assert json.loads(collection.stored["user_data:7"]) == profile(7, SEED)


class ForgetfulCollection:
    """Stands in for the SDK's collection: everything works, nothing is kept."""

    def upsert_multi(self, documents: dict[str, bytes], **_: object) -> SimpleNamespace:
        """Forget the documents."""
        return SimpleNamespace(exceptions={})


def test_memory_does_not_grow_with_the_number_of_profiles(provisioner: Provisioner) -> None:
    """Ten times as many need no more at their peak, once the generators' own caches are full."""
    connect_to(provisioner, ForgetfulCollection())
    peaks = []
    provisioner.put_records(Plan(profiles=800, seed=SEED, token=None, batch=20))
    for count in (80, 800):
        tracemalloc.start()
        try:
            provisioner.put_records(Plan(profiles=count, seed=SEED, token=None, batch=20))
            peaks.append(tracemalloc.get_traced_memory()[1])
        finally:
            tracemalloc.stop()
    assert peaks[1] < peaks[0] * 1.5, peaks


class Terminal(io.StringIO):
    """Stands in for a terminal."""

    def isatty(self) -> bool:
        """Return what a terminal would."""
        return True


def test_progress_is_a_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """It gets to 100%."""
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    assert list(sample_data._reported(iter([range(1, 3), range(3, 4)]), 3)) == [range(1, 3), range(3, 4)]
    assert "100%" in terminal.getvalue()
    assert "sample_data:" not in terminal.getvalue()


def test_progress_is_a_line_now_and_then_without_a_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """No bar in a file or pipe; standard output stays the token's. The end has a line of its own, however late."""
    monkeypatch.setattr(sample_data, "REPORT_SECONDS", 0.0)
    assert list(sample_data._reported(iter([range(1, 3), range(3, 4)]), 3)) == [range(1, 3), range(3, 4)]
    out, error = capsys.readouterr()
    assert out == ""
    assert error == "sample_data: 2 of 3 profiles\n"
