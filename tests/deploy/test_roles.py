"""The emulator's roles: what a user without them is refused, as the server refuses it."""

import base64
import http.client
import json
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from micro_svc_demo import PROFILES_BY_NICKNAME
from tests.emulator.process import EmulatorProcess
from tests.emulator.raw import RawClient
from tests.emulator.users import Privilege, Role, Users
from tests.service import ROOT

BUCKET = "sample_app"
ROLES = f"data_reader[{BUCKET}:profiles:user_data],data_writer[{BUCKET}:profiles:user_images]"
SUCCESS, NO_ACCESS, UNKNOWN_COLLECTION, UNKNOWN_SCOPE = 0x00, 0x24, 0x88, 0x8C
GET, SET, SELECT_BUCKET, GET_COLLECTION_ID = 0x00, 0x01, 0x89, 0xBB
REQUEST_SECONDS = 60


@pytest.fixture(scope="module")
def emulator() -> Iterator[EmulatorProcess]:
    with EmulatorProcess(profiles=3, token="t", second_user="limited", roles=ROLES) as running:
        yield running


@pytest.fixture
def client(emulator: EmulatorProcess) -> Iterator[RawClient]:
    with RawClient(emulator.kv_port) as raw:
        raw.open_bucket(emulator.second_user, emulator.second_password)
        yield raw


def http_answer(
    emulator: EmulatorProcess, port: int, method: str, path: str, body: Any = None, *, admin: bool = False
) -> tuple[int, Any]:
    """Ask one of the HTTP services as the limited user; return the status and the decoded answer."""
    user = (emulator.user, emulator.password) if admin else (emulator.second_user, emulator.second_password)
    basic = base64.b64encode(":".join(user).encode()).decode()
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=REQUEST_SECONDS)
    try:
        headers = {"Authorization": f"Basic {basic}", "Content-Type": "application/json"}
        connection.request(method, path, None if body is None else json.dumps(body), headers)
        response = connection.getresponse()
        return response.status, json.loads(response.read() or b"null")
    finally:
        connection.close()


class TestRole:
    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ("admin", Role("admin")),
            ("data_reader[b:s:c]", Role("data_reader", ("b", "s", "c"))),
            ("data_reader[b:s]", Role("data_reader", ("b", "s"))),
            ("query_select[b]", Role("query_select", ("b",))),
            ("data_writer[*]", Role("data_writer")),
        ],
    )
    def test_is_read_as_the_server_writes_it(self, text: str, expected: Role) -> None:
        assert Role.parse(text) == expected

    @pytest.mark.parametrize("text", ["", "root", "admin[b]", "data_reader", "data_reader[]", "data_reader[a:b:c:d]"])
    def test_anything_else_is_refused(self, text: str) -> None:
        with pytest.raises(ValueError, match="must be one of"):
            Role.parse(text)

    def test_is_for_what_is_within_it(self) -> None:
        users = Users({"u": "p"}, {"u": (Role.parse("data_reader[b:s]"),)})
        assert users.may("u", Privilege.READ, ("b", "s", "any"))
        assert not users.may("u", Privilege.READ, ("b", "other", "any"))
        assert not users.may("u", Privilege.READ, ("b",)), "a part is not the whole"
        assert not users.may("u", Privilege.WRITE, ("b", "s", "any"))
        assert users.sees("u", ("b",)) and users.sees("u", ("b", "s")) and not users.sees("u", ("other",))

    def test_user_without_a_word_is_an_administrator(self) -> None:
        assert Users({"u": "p"}).unrestricted("u")
        assert not Users({"u": "p"}, {"u": ()}).sees("u", ("b",)), "one without roles may do nothing"

    @pytest.mark.parametrize(
        "flags",
        [
            ["--second-user", "x"],
            ["--roles", "admin"],
            ["--second-user", "x", "--roles", "root"],
            ["--second-user", "demo", "--roles", "admin"],
        ],
    )
    def test_bad_command_line_is_one_line(self, flags: list[str]) -> None:
        command = [sys.executable, "-m", "tests.emulator", *flags]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
        assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)


class TestKeyValue:
    def collection(self, client: RawClient, name: str) -> bytes:
        status, body = client.ask(GET_COLLECTION_ID, value=f"profiles.{name}".encode())
        assert status == SUCCESS
        return bytes([body[-1]])

    def test_reader_reads_and_does_not_write(self, client: RawClient) -> None:
        prefix = self.collection(client, "user_data")
        key = b"user_data:1"
        assert client.ask(GET, prefix + key, at=key)[0] == SUCCESS
        assert client.ask(SET, prefix + key, bytes(8), b"{}", at=key)[0] == NO_ACCESS

    def test_writer_writes_and_does_not_read(self, client: RawClient) -> None:
        prefix = self.collection(client, "user_images")
        key = b"user_images:1"
        assert client.ask(SET, prefix + key, bytes(8), b"{}", at=key)[0] == SUCCESS
        assert client.ask(GET, prefix + key, at=key)[0] == NO_ACCESS

    def test_what_one_has_no_role_for_does_not_exist(self, client: RawClient, emulator: EmulatorProcess) -> None:
        """Neither by name nor, for one who knows the id, by it; a bucket is refused instead."""
        assert client.ask(GET_COLLECTION_ID, value=b"profiles.service_auth")[0] == UNKNOWN_COLLECTION
        assert client.ask(GET_COLLECTION_ID, value=b"_default._default")[0] == UNKNOWN_SCOPE
        with RawClient(emulator.kv_port) as admin:
            admin.open_bucket(emulator.user, emulator.password)
            known = self.collection(admin, "service_auth")
        key = b"service_auth:1"
        assert client.ask(GET, known + key, at=key)[0] == UNKNOWN_COLLECTION
        assert client.ask(SELECT_BUCKET, b"nowhere")[0] == NO_ACCESS


class TestManagement:
    def test_manifest_has_what_the_user_sees(self, emulator: EmulatorProcess) -> None:
        path = f"/pools/default/buckets/{BUCKET}/scopes"
        _, manifest = http_answer(emulator, emulator.management_port, "GET", path)
        seen = {scope["name"]: {each["name"] for each in scope["collections"]} for scope in manifest["scopes"]}
        assert seen == {"profiles": {"user_data", "user_images"}}
        _, whole = http_answer(emulator, emulator.management_port, "GET", path, admin=True)
        assert len(whole["scopes"]) == 2

    def test_changes_and_other_buckets_are_forbidden(self, emulator: EmulatorProcess) -> None:
        port, path = emulator.management_port, f"/pools/default/buckets/{BUCKET}"
        assert http_answer(emulator, port, "GET", path)[0] == 200
        assert http_answer(emulator, port, "GET", "/pools/default/buckets/nowhere")[0] == 403
        assert http_answer(emulator, port, "DELETE", f"{path}/scopes/profiles")[0] == 403


class TestQuery:
    @pytest.mark.parametrize(
        "statement",
        [
            PROFILES_BY_NICKNAME,
            f"PREPARE {PROFILES_BY_NICKNAME}",
            "CREATE INDEX mine ON user_data(name)",
            "DROP INDEX by_nickname ON user_data",
        ],
    )
    def test_reading_documents_is_not_querying_them(self, emulator: EmulatorProcess, statement: str) -> None:
        body = {"statement": statement, "query_context": f"default:{BUCKET}.profiles"}
        status, answer = http_answer(emulator, emulator.query_port, "POST", "/query/service", body)
        assert (status, answer["errors"][0]["code"]) == (401, 13014)

    @pytest.mark.parametrize("admin", [False, True])
    def test_indexes_of_what_one_may_not_query_are_not_listed(self, emulator: EmulatorProcess, admin: bool) -> None:
        body = {"statement": "SELECT RAW name FROM system:indexes WHERE keyspace_id = 'user_data'"}
        status, answer = http_answer(emulator, emulator.query_port, "POST", "/query/service", body, admin=admin)
        assert (status, answer["results"]) == (200, ["by_nickname", "by_user_id"] if admin else [])
