"""The emulator's table of statements: what is one of them, what is not, and what is said of the latter."""

import pytest

import micro_svc_demo
from tests import sample_data
from tests.emulator.query_errors import QueryError
from tests.emulator.statements import STATEMENTS, find_statement

LOOKUP = micro_svc_demo.PROFILES_BY_NICKNAME
CREATE = "CREATE INDEX x ON user_data(city)"


@pytest.mark.parametrize(
    ("text", "action", "given"),
    [
        (LOOKUP, "look_up", {"field": "nickname"}),
        (micro_svc_demo.PROFILES_BY_USERNAME, "look_up", {"field": "user_id"}),
        *((text, "create", {"index": name, "member": name[3:]}) for name, text in sample_data.INDEXES.items()),
        *((text, text.partition(" ")[0].lower(), None) for text in micro_svc_demo.MISSING_INDEX.split("\n")),
        (CREATE + ' WITH {"defer_build": true}', "create", {"index": "x", "member": "city"}),
        ("BUILD INDEX ON user_data(x)", "build", {"index": "x"}),
        ("DROP INDEX `a-b` ON user_data", "drop", {"index": "a-b"}),
        ('SELECT RAW name FROM system:indexes WHERE name = "it\'s"', "index_names", {"text": "it's"}),
    ],
)
def test_what_the_project_sends_is_known(text: str, action: str, given: dict[str, str] | None) -> None:
    """The texts themselves, from where they are sent, are what the table means; names in them are found."""
    found = find_statement(text)
    assert (found.statement.action, found.prepare) == (action, False)
    assert given is None or found.given == given


@pytest.mark.parametrize(
    "text",
    [
        LOOKUP.replace("`", ""),
        LOOKUP.replace(" ", "\n  ").replace("(", " ( "),
        LOOKUP.replace("SELECT RAW", "select Raw").replace("ORDER BY META", "order by meta"),
        LOOKUP.replace(" p ", " `p` ") + " ;",
    ],
)
def test_white_space_quotes_and_letter_case_may_vary(text: str) -> None:
    """The same lookup, written in another way."""
    assert find_statement(text) == find_statement(LOOKUP)


def test_only_the_lookups_are_prepared() -> None:
    """PREPARE before a lookup is one that is to be prepared; before anything else it is not known."""
    assert find_statement("prepare " + LOOKUP) == find_statement(LOOKUP)._replace(prepare=True)
    with pytest.raises(QueryError, match="not known"):
        find_statement(f"PREPARE {CREATE}")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "SELECT 1",
        "EXPLAIN " + LOOKUP,
        LOOKUP.replace("nickname", "email"),
        LOOKUP.replace("nickname", "NICKNAME"),
        LOOKUP.replace("$value", "`$value`"),
        LOOKUP.replace("$value", "'a'"),
        LOOKUP.replace("SELECT", "`SELECT`"),
        LOOKUP.replace("user_data", "user_images"),
        LOOKUP + " LIMIT 1",
        LOOKUP.removesuffix(" OFFSET $offset"),
        LOOKUP + " -- comment",
        "CREATE PRIMARY INDEX ON user_data",
        "CREATE INDEX x ON user_data(city, state)",
        "DELETE FROM user_data",
        "SELECT RAW name FROM system:indexes WHERE name = by_nickname",
    ],
)
def test_anything_else_is_refused_with_the_list_of_what_is_known(text: str) -> None:
    """Code 1020 and one line, on which every statement of the table is."""
    with pytest.raises(QueryError) as refused:
        find_statement(text)
    assert (refused.value.code, refused.value.http_status) == (1020, 400)
    assert all(statement.text in refused.value.msg for statement in STATEMENTS)


@pytest.mark.parametrize("text", [f"{CREATE}; {CREATE}", f"{LOOKUP};{CREATE};", ";;"])
def test_a_request_has_one_statement(text: str) -> None:
    """Two are a syntax error; a semicolon in a text is not between two."""
    with pytest.raises(QueryError) as refused:
        find_statement(text)
    assert refused.value.code == 3000
    assert find_statement("SELECT RAW name FROM system:indexes WHERE name = 'a;b'").given == {"text": "a;b"}
