"""The query engine without sockets: statements in, rows or errors out."""
# ruff: noqa: S608 - statements are put together here from the tests' own texts

import json
import time
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.emulator.documents import Cluster, Collection
from tests.emulator.sqlpp import QueryEngine, QueryError
from tests.emulator.sqlpp_dialect import parse_statement
from tests.emulator.sqlpp_expressions import like
from tests.emulator.sqlpp_request import parse_duration
from tests.emulator.sqlpp_values import MISSING, Binary, equal, identity, sort_key

CONTEXT = "default:`shop`.`main`"
PEOPLE: dict[str, Any] = {
    "p:1": {"name": "Ann", "nick": "a", "age": 30, "tags": ["x", "y"], "home": {"city": "Bern", "zip": 3000}},
    "p:2": {"name": "Bob", "nick": "b", "age": 25, "boss": None, "home": {"city": "Basel"}},
    "p:3": {"name": "Cid", "nick": "a", "age": 41, "boss": "Ann"},
    "p:4": {"name": "Dan", "nick": 'O\'Neil "x" -- `', "age": 25.0, "boss": "Ann"},
    "p:5": {"name": "Eve", "age": "old", "ok": True},
}
VALUES: list[Any] = [None, False, True, -1.5, 0, 2, 10, "", "a", "b", [], [1], [1, 2], [2], {}, {"a": 1}, {"a": 2}]
"""In the order of SQL++'s collation, below which there is only MISSING."""

json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**60), 2**60)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


class Shop:
    """An engine with a small collection `people`, and short ways to ask it."""

    def __init__(self, documents: dict[str, Any], *indexes: str) -> None:
        """Fill in documents, then make indexes by their statements."""
        self.cluster = Cluster()
        bucket = self.cluster.create_bucket("shop")
        bucket.create_scope("main")
        self.people: Collection = bucket.create_collection("main", "people")
        self.put(documents)
        self.engine = QueryEngine(self.cluster)
        for statement in indexes:
            self.ask(statement)

    def put(self, documents: dict[str, Any]) -> None:
        """Store documents, given as values or as bytes."""
        for key, value in documents.items():
            self.people.put(key.encode(), value if isinstance(value, bytes) else json.dumps(value).encode())

    def ask(self, statement: str, **members: Any) -> list[Any]:
        """Return the rows of a statement; members called `p_name` are parameters."""
        members = {f"${name[2:]}" if name.startswith("p_") else name: value for name, value in members.items()}
        result = self.engine.execute({"statement": statement, "query_context": CONTEXT, **members})
        return [json.loads(row) for row in result.rows]

    def code(self, statement: str, **members: Any) -> int:
        """Return the code of the error that a statement ends in."""
        with pytest.raises(QueryError) as caught:
            self.ask(statement, **members)
        return caught.value.code

    def index_used(self, statement: str) -> str | None:
        """Return which index EXPLAIN names."""
        operator = self.ask(f"EXPLAIN {statement}")[0]["plan"]["~children"][0]
        name: str | None = operator.get("index")
        return name


@pytest.fixture
def shop() -> Shop:
    """Make a shop with an index on `nick` and a primary index."""
    return Shop(PEOPLE, "CREATE INDEX by_nick ON people(nick)", "CREATE PRIMARY INDEX ON people")


@pytest.fixture(scope="module")
def readonly_shop() -> Shop:
    """Make a shop that no test changes."""
    return Shop(PEOPLE, "CREATE INDEX by_nick ON people(nick)", "CREATE PRIMARY INDEX ON people")


EXPRESSIONS: list[tuple[str, Any]] = [
    ("1 + 2 * 3", 7),
    ("(1 + 2) * 3", 9),
    ("-2 - -3", 1),
    ("7 / 2", 3.5),
    ("4 / 2", 2),
    ("7 % 3", 1),
    ("1 / 0", None),
    ("1 + 'a'", None),
    ("'a' || 'b'", "ab"),
    ("'a' || 1", None),
    ("1 = 1.0", True),
    ("1 = TRUE", False),
    ("1 == '1'", False),
    ("'a' != 'b'", True),
    ("1 <> 1", False),
    ("NULL = NULL", None),
    ("NULL IS NULL", True),
    ("MISSING IS MISSING", True),
    ("NULL IS MISSING", False),
    ("NULL IS NOT MISSING", True),
    ("MISSING IS VALUED", False),
    ("NULL IS NOT VALUED", True),
    ("NULL IS UNKNOWN", True),
    ("1 IS KNOWN", True),
    ("TYPE(MISSING = 1)", "missing"),
    ("TYPE(MISSING IS NULL)", "missing"),
    ("TYPE(NULL AND MISSING)", "missing"),
    ("TYPE(NULL OR MISSING)", "null"),
    ("TYPE(TRUE OR MISSING)", "boolean"),
    ("FALSE AND MISSING", False),
    ("NULL AND FALSE", False),
    ("NOT NULL", None),
    ("TYPE(NOT MISSING)", "missing"),
    ("NOT 1 = 2", True),
    ("NOT ''", True),
    ("1 AND 'x'", True),
    ("[] OR {}", False),
    ("2 BETWEEN 1 AND 3", True),
    ("4 BETWEEN 1 AND 3", False),
    ("4 BETWEEN NULL AND 3", False),
    ("2 BETWEEN NULL AND 3", None),
    ("2 NOT BETWEEN 1 AND 3", False),
    ("'a' < 'b' AND 'B' < 'a'", True),
    ("1 < 'a'", True),
    ("TRUE < 0", True),
    ("[1, 2] < [1, 3]", True),
    ("{'a': 1, 'b': 2} = {'b': 2, 'a': 1}", True),
    ("1 IN [1, 2]", True),
    ("3 IN [1, 2]", False),
    ("3 IN [1, NULL]", None),
    ("1 IN [1, NULL]", True),
    ("1 NOT IN [1]", False),
    ("1 IN 1", None),
    ("NULL IN [1]", None),
    ("TYPE(MISSING IN [1])", "missing"),
    ("'50%' LIKE '50\\\\%'", True),
    ("'505' LIKE '50\\\\%'", False),
    ("'abc' LIKE 'a%'", True),
    ("'abc' LIKE 'a_c'", True),
    ("'abc' NOT LIKE '%b%'", False),
    ("1 LIKE 'a'", None),
    ("'a\nb' LIKE 'a%b'", True),
    ("LOWER('ÄB')", "äb"),
    ("UPPER(1)", None),
    ("LENGTH('äb')", 2),
    ("SUBSTR('abcd', 1, 2)", "bc"),
    ("SUBSTR('abcd', -2)", "cd"),
    ("CONTAINS('abc', 'bc')", True),
    ("TRIM('  a ')", "a"),
    ("TOSTRING(1.5)", "1.5"),
    ("IFMISSINGORNULL(MISSING, NULL, 3)", 3),
    ("COALESCE(NULL, 'x')", "x"),
    ("ARRAY_LENGTH([1, 2])", 2),
    ("ARRAY_CONTAINS([1, 2], 2)", True),
    ("CASE WHEN 1 = 2 THEN 'a' WHEN TRUE THEN 'b' ELSE 'c' END", "b"),
    ("CASE 3 WHEN 1 THEN 'a' ELSE 'c' END", "c"),
    ("CASE 3 WHEN 1 THEN 'a' END", None),
    ("[1, MISSING, {'a': MISSING, 'b': [2]}]", [1, None, {"b": [2]}]),
    ("[10, 20, 30][1]", 20),
    ("[10, 20, 30][-1]", 30),
    ("TYPE([10][5])", "missing"),
    ("{'a': {'b': [1, {'c': 5}]}}.a.b[1].c", 5),
    ("'it''s'", "it's"),
    ('"say ""hi"""', 'say "hi"'),
    ("\"a''b\"", "a''b"),
    ("'a\\n\\u00e9\\ud83d\\ude00\\'\\\\'", "a\né😀'\\"),
    ("1e3", 1000),
    ("9223372036854775807 + 1", 9.223372036854775807e18),
    ("1 /* not -- here */ + 1 -- the end", 2),
]


@pytest.mark.parametrize(("text", "expected"), EXPRESSIONS)
def test_expression(readonly_shop: Shop, text: str, expected: Any) -> None:
    """Operators, literals and functions give what SQL++ says, in its logic of TRUE, FALSE, NULL and MISSING."""
    rows = readonly_shop.ask(f"SELECT RAW {text}")
    assert rows == [expected]
    assert type(rows[0]) is type(expected)


SELECTS: list[tuple[str, dict[str, Any], list[Any]]] = [
    ("SELECT RAW p.name FROM people AS p WHERE p.nick = $n", {"p_n": "a"}, ["Ann", "Cid"]),
    ("SELECT RAW p.name FROM people p WHERE p.nick = ?", {"args": ["b"]}, ["Bob"]),
    ("SELECT RAW name FROM people WHERE nick = $1 AND age > $2", {"args": ["a", 30]}, ["Cid"]),
    ("SELECT RAW name FROM `people` WHERE `people`.`nick` = 'a' AND people.age = 30", {}, ["Ann"]),
    ("SELECT RAW name FROM shop.main.people WHERE 'b' = nick", {}, ["Bob"]),
    ("SELECT RAW name FROM default:`shop`.`main`.`people` WHERE nick = 'b'", {}, ["Bob"]),
    ("SELECT RAW name FROM people WHERE nick IN ['b', 'a', 'a', NULL]", {}, ["Ann", "Bob", "Cid"]),
    ("SELECT RAW name FROM people WHERE nick IN $1", {"args": [["b", "zz"]]}, ["Bob"]),
    ("SELECT RAW name FROM people WHERE nick = NULL", {}, []),
    ("SELECT RAW name FROM people WHERE nick IS MISSING", {}, ["Eve"]),
    ("SELECT RAW name FROM people WHERE nick IS NOT MISSING", {}, ["Ann", "Bob", "Cid", "Dan"]),
    ("SELECT RAW name FROM people WHERE boss IS NULL", {}, ["Bob"]),
    ("SELECT RAW name FROM people WHERE boss IS NOT NULL", {}, ["Cid", "Dan"]),
    ("SELECT RAW name FROM people WHERE NOT boss = 'Ann'", {}, []),
    ("SELECT RAW name FROM people WHERE age = 25", {}, ["Bob", "Dan"]),
    ("SELECT RAW name FROM people WHERE home.city LIKE 'B%'", {}, ["Ann", "Bob"]),
    ("SELECT RAW name FROM people WHERE tags[0] = 'x'", {}, ["Ann"]),
    ("SELECT RAW name FROM people WHERE tags", {}, ["Ann"]),
    ("SELECT RAW name FROM people WHERE META().id = 'p:2'", {}, ["Bob"]),
    ("SELECT RAW name FROM people p WHERE META(p).id > 'p:3'", {}, ["Dan", "Eve"]),
    ("SELECT RAW name FROM people ORDER BY age DESC, name", {}, ["Eve", "Cid", "Ann", "Bob", "Dan"]),
    ("SELECT RAW name FROM people ORDER BY boss, name DESC", {}, ["Eve", "Ann", "Bob", "Dan", "Cid"]),
    ("SELECT RAW name FROM people ORDER BY META().id DESC LIMIT 2", {}, ["Eve", "Dan"]),
    ("SELECT RAW name FROM people ORDER BY META().id LIMIT $l OFFSET $o", {"p_l": 2, "p_o": 1}, ["Bob", "Cid"]),
    ("SELECT RAW name FROM people LIMIT 0", {}, []),
    ("SELECT RAW name FROM people LIMIT -1", {}, []),
    ("SELECT RAW name FROM people OFFSET 4", {}, ["Eve"]),
    ("SELECT name, home.city FROM people WHERE nick = 'b'", {}, [{"name": "Bob", "city": "Basel"}]),
    ("SELECT home.zip, 1 + 1, age AS years FROM people WHERE nick = 'b'", {}, [{"$1": 2, "years": 25}]),
    ("SELECT p FROM people p WHERE nick = 'b'", {}, [{"p": PEOPLE["p:2"]}]),
    ("SELECT * FROM people WHERE nick = 'b'", {}, [{"people": PEOPLE["p:2"]}]),
    ("SELECT * FROM people AS q WHERE nick = 'b'", {}, [{"q": PEOPLE["p:2"]}]),
    ("SELECT q.* FROM people AS q WHERE nick = 'b'", {}, [PEOPLE["p:2"]]),
    ("SELECT RAW q FROM people AS q WHERE nick = 'b'", {}, [PEOPLE["p:2"]]),
    ("SELECT ELEMENT q FROM people AS q WHERE nick = 'b'", {}, [PEOPLE["p:2"]]),
    ("SELECT VALUE q.name FROM people AS q WHERE nick = 'b'", {}, ["Bob"]),
    ("SELECT q.home.*, 'x' AS y FROM people AS q WHERE nick = 'b'", {}, [{"city": "Basel", "y": "x"}]),
    ("SELECT META().id, * FROM people WHERE nick = 'b'", {}, [{"id": "p:2", "people": PEOPLE["p:2"]}]),
    ("SELECT DISTINCT nick FROM people WHERE nick = 'a'", {}, [{"nick": "a"}]),
    ("SELECT DISTINCT RAW age FROM people WHERE age < 30", {}, [25]),
    ("SELECT COUNT(*) AS n FROM people", {}, [{"n": 5}]),
    ("SELECT COUNT(boss) AS n, COUNT(DISTINCT boss) AS d FROM people", {}, [{"n": 2, "d": 1}]),
    (
        "SELECT SUM(age) s, AVG(age) a, MIN(age) lo, MAX(age) hi FROM people",
        {},
        [{"s": 121, "a": 30.25, "lo": 25, "hi": "old"}],
    ),
    ("SELECT RAW COUNT(*) + 1 FROM people WHERE nick = 'nobody'", {}, [1]),
    ("SELECT RAW SUM(age) FROM people WHERE nick = 'nobody'", {}, [None]),
    ("SELECT RAW ARRAY_AGG(name) FROM people WHERE nick = 'a'", {}, [["Ann", "Cid"]]),
    ("SELECT RAW name FROM people USE KEYS 'p:3'", {}, ["Cid"]),
    ("SELECT RAW name FROM people USE KEYS ['p:3', 'gone', 'p:1']", {}, ["Cid", "Ann"]),
    ("SELECT RAW name FROM people USE KEYS $1 WHERE age > 40", {"args": [["p:3", "p:1"]]}, ["Cid"]),
    ("SELECT 1 AS one", {}, [{"one": 1}]),
    ("select Raw NAME from people where nick = 'b'", {}, [None]),
    ("SELECT RAW name FROM people WHERE nick = 'b';", {}, ["Bob"]),
    ("SELECT name AS n FROM people WHERE nick = 'a' ORDER BY n DESC", {}, [{"n": "Cid"}, {"n": "Ann"}]),
]


@pytest.mark.parametrize(("statement", "members", "expected"), SELECTS)
def test_select(readonly_shop: Shop, statement: str, members: dict[str, Any], expected: list[Any]) -> None:
    """Each clause of SELECT does what SQL++ says."""
    assert readonly_shop.ask(statement, **members) == expected


ERRORS: list[tuple[str, int, str]] = [
    ("", 1050, "No statement"),
    ("   ", 3000, "end of input"),
    ("SLECT 1", 3000, "line 1, column 1, near '', at: SLECT"),
    ("SELECT name FROM", 3000, "line 1, column 17, near 'SELECT name FROM', at: end of input"),
    ("SELECT name\nFROM people p WHRE x", 3000, "line 2, column 15, near '... name\nFROM people p ', at: WHRE"),
    ("SELECT 1 2", 3000, "at: 2"),
    ("SELECT 1; SELECT 2", 3000, "more than one"),
    ("SELECT 1 +", 3000, "at: end of input"),
    ("SELECT 'abc", 3000, "syntax error"),
    ("SELECT `abc", 3000, "syntax error"),
    ("SELECT 'a\\xb'", 3000, "invalid escape"),
    ("SELECT value FROM people", 3000, "reserved word"),
    ("SELECT p.user FROM people p", 3000, "at: user (reserved word)"),
    ("SELECT é", 3000, "at: é"),
    ("SELECT 01", 3000, "at: 01"),
    ("SELECT $ FROM people", 3000, "at: $"),
    ("SELECT (1", 3000, "end of input"),
    ("SELECT [1, 2", 3000, "end of input"),
    ("SELECT 1 IN (1, 2)", 3000, "at: ,"),
    ("SELECT FROBNICATE(1)", 3000, "Invalid function FROBNICATE (near line 1, column 8)"),
    ("SELECT LOWER()", 3000, "Number of arguments"),
    ("SELECT LOWER('a', 'b')", 3000, "Number of arguments"),
    ("SELECT name", 3000, "Ambiguous reference"),
    ("SELECT *", 3000, "FROM"),
    ("SELECT META().id", 3000, "META"),
    ("SELECT RAW COUNT(*) FROM people WHERE COUNT(*) > 1", 3000, "COUNT"),
    ("SELECT name, COUNT(*) FROM people", 4210, "`name`"),
    ("SELECT name, p.name FROM people p", 4020, "name"),
    ("SELECT RAW " + "(" * 500 + "1" + ")" * 500, 3000, "nesting"),
    ("SELECT RAW " + "1+" * 5000 + "1", 3000, "too many"),
    ("SELECT RAW " + "NOT " * 5000 + "1", 3000, "too many"),
    ("SELECT * FROM nope", 12003, "Keyspace not found in CB datastore: default:shop.main.nope"),
    ("SELECT * FROM shop.nope.people", 12021, "Scope not found in CB datastore: default:shop.nope"),
    ("SELECT * FROM nope.main.people", 12003, "default:nope.main.people"),
    ("SELECT * FROM main.people", 3000, "number of parts"),
    ("SELECT * FROM other:people", 12002, "other"),
    ("SELECT * FROM system:nope", 12003, "system:nope"),
    ("SELECT $x", 5010, "No value for named parameter $x"),
    ("SELECT $1", 5010, "No value for positional parameter $1"),
    ("SELECT 1 LIMIT 'a'", 5030, "LIMIT"),
    ("SELECT 1 OFFSET 1.5", 5030, "OFFSET"),
    ("SELECT 1 LIMIT MISSING", 5030, "LIMIT"),
    ("EXECUTE nothing", 4040, "No such prepared statement: nothing"),
    ("CREATE INDEX by_nick ON people(age)", 4300, "The index by_nick already exists."),
    ("CREATE PRIMARY INDEX ON people", 4300, "#primary"),
    ("CREATE INDEX i ON nope(age)", 12003, "nope"),
    ("CREATE INDEX ON people(age)", 3000, "reserved word"),
    ("CREATE INDEX i ON people", 3000, "end of input"),
    ("CREATE INDEX i ON people(age) WITH 1", 3000, "WITH"),
    ("CREATE INDEX i ON people(age) WITH {'a': name}", 3000, "constant"),
    ("DROP INDEX nope ON people", 12016, "GSI index nope not found"),
    ("DROP INDEX shop.main.people.nope", 12016, "nope"),
    ("BUILD INDEX ON people(nope)", 12016, "nope"),
    ("PREPARE EXECUTE x", 3000, "EXECUTE"),
    ("PREPARE", 3000, "end of input"),
    ("SELECT name FROM people GROUP BY name", 1020, "GROUP"),
    ("SELECT name FROM people p JOIN people q ON 1", 1020, "JOIN"),
    ("SELECT name FROM people UNION SELECT 1", 1020, "UNION"),
    ("SELECT name FROM people LET x = 1", 1020, "LET"),
    ("SELECT name FROM people USE INDEX (x)", 1020, "USE INDEX"),
    ("SELECT name FROM people UNNEST tags", 1020, "UNNEST"),
    ("SELECT (SELECT 1)", 1020, "subquery"),
    ("SELECT * FROM (SELECT 1) x", 1020, "subquery"),
    ("SELECT ANY x IN tags SATISFIES x END FROM people", 1020, "ANY"),
    ("SELECT [1, 2][0:1]", 1020, "slice"),
    ("UPSERT INTO people (KEY, VALUE) VALUES ('a', 1)", 1020, "UPSERT"),
    ("DELETE FROM people", 1020, "DELETE"),
    ("ALTER INDEX people.x WITH {}", 1020, "ALTER"),
    ("CREATE COLLECTION x", 1020, "CREATE COLLECTION"),
]


@pytest.mark.parametrize(("statement", "code", "part"), ERRORS)
def test_error(readonly_shop: Shop, statement: str, code: int, part: str) -> None:
    """What is wrong with a statement is told by the server's code, and its text says what and where."""
    with pytest.raises(QueryError) as caught:
        readonly_shop.ask(statement)
    assert (caught.value.code, part in caught.value.msg) == (code, True), caught.value.msg


REQUESTS: list[tuple[dict[str, Any], int]] = [
    ({}, 1050),
    ({"statement": "SELECT 1", "prepared": "x"}, 1060),
    ({"statement": "SELECT 1", "bogus": 1}, 1065),
    ({"statement": "SELECT 1", "$": 1}, 1065),
    ({"statement": 1}, 1070),
    ({"statement": "SELECT 1", "readonly": "yes"}, 1070),
    ({"statement": "SELECT 1", "args": {}}, 1070),
    ({"statement": "SELECT 1", "timeout": 5}, 1070),
    ({"statement": "SELECT 1", "timeout": "soon"}, 1040),
    ({"statement": "SELECT 1 FROM x", "query_context": "a.b.c"}, 1040),
    ({"statement": "SELECT 1", "scan_consistency": "perhaps"}, 1030),
    ({"statement": "SELECT 1", "timeout": "1ns"}, 1080),
    ({"statement": "SELECT 1", "tximplicit": True}, 1020),
    ({"prepared": "nothing"}, 4040),
]


@pytest.mark.parametrize(("request_", "code"), REQUESTS)
def test_bad_request(readonly_shop: Shop, request_: dict[str, Any], code: int) -> None:
    """Members of a request are checked: unknown ones, wrong types, bad values, too little and too much."""
    with pytest.raises(QueryError) as caught:
        readonly_shop.engine.execute(request_)
    assert caught.value.code == code


@pytest.mark.parametrize("context", [CONTEXT, "`shop`.`main`", "shop.main", "default:shop.main", "`default`:shop.main"])
def test_query_context(readonly_shop: Shop, context: str) -> None:
    """All the forms in which a query context may be written mean the same scope."""
    request = {"statement": "SELECT RAW COUNT(*) FROM people", "query_context": context}
    assert readonly_shop.engine.execute(request).rows == [b"5"]


@pytest.mark.parametrize("context", ["", "default:"])
def test_bare_name_without_context_is_a_bucket(readonly_shop: Shop, context: str) -> None:
    """Without a query context a lone name means a bucket's default collection."""
    with pytest.raises(QueryError, match=r"default:people\._default\._default - cause: No bucket named people"):
        readonly_shop.engine.execute({"statement": "SELECT * FROM people", "query_context": context})


def test_readonly_request_refuses_changes(shop: Shop) -> None:
    """A read-only request may not create, drop, build or change, prepared or not; it may read and prepare reading."""
    for statement in (
        "CREATE INDEX x ON people(age)",
        "DROP INDEX by_nick ON people",
        "BUILD INDEX ON people(by_nick)",
        "UPSERT INTO people (KEY, VALUE) VALUES ('a', 1)",
        "PREPARE DELETE FROM people",
        "PREPARE CREATE INDEX x ON people(age)",
    ):
        assert shop.code(statement, readonly=True) == 1000
    assert shop.ask("SELECT RAW 1", readonly=True) == [1]
    assert shop.ask("PREPARE SELECT RAW 1", readonly=True, auto_execute=True) == [1]


# Indexes


def test_no_index_is_an_error() -> None:
    """Without a primary index, only a secondary one whose leading key WHERE constrains makes a query possible."""
    shop = Shop(PEOPLE)
    by_nick = "SELECT RAW name FROM people WHERE nick = 'b'"
    assert shop.code(by_nick) == 4000
    assert shop.ask("SELECT RAW name FROM people USE KEYS 'p:1'") == ["Ann"]
    shop.ask("CREATE INDEX by_nick ON people(nick, age)")
    assert shop.ask(by_nick) == ["Bob"]
    assert shop.code("SELECT RAW name FROM people WHERE age = 25") == 4000
    assert shop.code("SELECT RAW name FROM people") == 4000
    assert shop.code("SELECT RAW name FROM people WHERE nick = 'b' OR age = 25") == 4000
    assert shop.code("SELECT RAW name FROM people WHERE nick = name") == 4000
    assert shop.code("SELECT RAW name FROM people WHERE nick IS MISSING") == 4000
    shop.ask("DROP INDEX by_nick ON people")
    assert shop.code(by_nick) == 4000
    shop.ask("CREATE PRIMARY INDEX ON people")
    assert shop.ask(by_nick) == ["Bob"]


@pytest.mark.parametrize(
    ("where", "names"),
    [
        ("nick = 'a'", ["Ann", "Cid"]),
        ("'a' = nick AND age = 41", ["Cid"]),
        ("nick = 'a' OR nick = 'b'", ["Ann", "Bob", "Cid"]),
        ("nick > 'a'", ["Bob"]),
        ("nick >= 'a' AND nick < 'b'", ["Ann", "Cid"]),
        ("nick BETWEEN 'a' AND 'b'", ["Ann", "Bob", "Cid"]),
        ("nick LIKE 'O%'", ["Dan"]),
        ("nick IS NOT MISSING", ["Ann", "Bob", "Cid", "Dan"]),
        ("nick IS VALUED", ["Ann", "Bob", "Cid", "Dan"]),
        ("p.nick IN ['b']", ["Bob"]),
    ],
)
def test_sargable(where: str, names: list[str]) -> None:
    """Every kind of predicate that the server can look up in an index makes the index usable."""
    shop = Shop(PEOPLE, "CREATE INDEX by_nick ON people(nick)")
    assert shop.ask(f"SELECT RAW name FROM people p WHERE {where} ORDER BY META().id") == names
    assert shop.index_used(f"SELECT 1 FROM people p WHERE {where}") == "by_nick"


def test_best_index_is_chosen(shop: Shop) -> None:
    """Equality goes before a range, a secondary index before the primary one, whatever was created first."""
    shop.ask("CREATE INDEX by_age ON people(age)")
    assert shop.index_used("SELECT 1 FROM people WHERE nick > 'a' AND age = 25") == "by_age"
    assert shop.index_used("SELECT 1 FROM people WHERE nick = 'a' AND age > 25") == "by_nick"
    assert shop.index_used("SELECT 1 FROM people WHERE name = 'Ann'") == "#primary"
    assert shop.index_used("SELECT 1 FROM people USE KEYS 'x'") is None


@pytest.mark.parametrize(
    "statement", ["DROP INDEX i ON people", "DROP INDEX people.i", "DROP INDEX shop.main.people.i"]
)
def test_drop_index_syntaxes(shop: Shop, statement: str) -> None:
    """An index can be named after its keyspace as well as before it."""
    shop.ask("CREATE INDEX i ON people(age)")
    shop.ask(statement)
    assert shop.code(statement) == 12016


def test_if_exists_and_if_not_exists(shop: Shop) -> None:
    """The two make creating and dropping repeatable, where they may stand on either side of the name."""
    for statement in (
        "CREATE INDEX IF NOT EXISTS by_nick ON people(nick)",
        "CREATE INDEX by_nick IF NOT EXISTS ON people(nick)",
        "CREATE PRIMARY INDEX IF NOT EXISTS ON people USING GSI",
        "DROP INDEX IF EXISTS nope ON people",
        "DROP INDEX nope IF EXISTS ON people",
        "DROP PRIMARY INDEX IF EXISTS ON people",
        "DROP PRIMARY INDEX IF EXISTS ON people",
    ):
        assert shop.ask(statement) == []
    assert shop.code("DROP PRIMARY INDEX ON people") == 12004


def test_indexes_follow_mutations(shop: Shop) -> None:
    """Inserts, updates and removals show in the next query, by both kinds of index."""
    by_nick, everybody = "SELECT RAW META().id FROM people WHERE nick = $1", "SELECT RAW META().id FROM people"
    shop.put({"p:0": {"nick": "a"}, "p:2": {"nick": "a"}, "p:3": {"nick": ["a"]}, "p:4": b"not json"})
    assert shop.ask(by_nick, args=["a"]) == ["p:0", "p:1", "p:2"]
    assert shop.ask(by_nick, args=["b"]) == []
    assert shop.ask(by_nick, args=[["a"]]) == ["p:3"]
    assert shop.ask(everybody) == ["p:0", "p:1", "p:2", "p:3", "p:4", "p:5"]
    shop.people.remove(b"p:1")
    assert shop.ask(by_nick, args=["a"]) == ["p:0", "p:2"]
    assert shop.ask(everybody) == ["p:0", "p:2", "p:3", "p:4", "p:5"]


def test_expired_documents_are_gone(shop: Shop) -> None:
    """A document whose time is up is in no result, though nobody removed it yet."""
    shop.people.put(b"p:9", b'{"nick": "a"}', expiry=int(time.time()) - 1)
    assert shop.ask("SELECT RAW META().id FROM people WHERE nick = 'a'") == ["p:1", "p:3"]


def test_partial_index_needs_its_condition() -> None:
    """An index with a WHERE serves only queries that have all of it, and holds only what meets it."""
    shop = Shop(PEOPLE, "CREATE INDEX old ON people(nick) WHERE age >= 30 AND boss IS MISSING")
    assert shop.code("SELECT RAW name FROM people WHERE nick = 'a'") == 4000
    assert shop.code("SELECT RAW name FROM people WHERE nick = 'a' AND age >= 30") == 4000
    assert shop.ask("SELECT RAW name FROM people p WHERE p.boss IS MISSING AND nick = 'a' AND p.age >= 30") == ["Ann"]


def test_function_index() -> None:
    """An index on an expression serves queries that have the same expression, however they name the keyspace."""
    shop = Shop(PEOPLE, "CREATE INDEX lower_name ON people(LOWER(name))")
    assert shop.ask("SELECT RAW nick FROM people AS p WHERE LOWER(p.name) = 'bob'") == ["b"]


def test_deferred_index_is_built_on_request() -> None:
    """A deferred index is listed as such and not used until it is built."""
    shop = Shop(PEOPLE, "CREATE INDEX i ON people(nick) WITH {'defer_build': true}")
    states = "SELECT RAW state FROM system:indexes"
    assert shop.ask(states) == ["deferred"]
    assert shop.code("SELECT 1 FROM people WHERE nick = 'a'") == 4000
    deferred = "SELECT RAW name FROM system:indexes WHERE state = 'deferred'"
    shop.ask(f"BUILD INDEX ON people(({deferred}))")
    assert shop.ask(states) == ["online"]
    assert shop.ask("SELECT RAW name FROM people WHERE nick = 'b'") == ["Bob"]


def test_system_indexes_rows_are_whole(shop: Shop) -> None:
    """Rows of system:indexes have every member that the SDK reads, among them `using`."""
    rows = shop.ask("SELECT i.* FROM system:indexes AS i WHERE `using` = 'gsi' ORDER BY is_primary DESC, name ASC")
    common = {"datastore_id": "http://127.0.0.1:8091", "namespace_id": "default", "using": "gsi", "state": "online"}
    common |= {"bucket_id": "shop", "scope_id": "main", "keyspace_id": "people"}
    assert [{name: value for name, value in row.items() if name != "id"} for row in rows] == [
        {**common, "name": "#primary", "is_primary": True, "index_key": []},
        {**common, "name": "by_nick", "index_key": ["`nick`"]},
    ]


def test_default_collection_is_listed_by_its_bucket(shop: Shop) -> None:
    """An index of a default collection has the bucket as its keyspace, and no bucket or scope of its own."""
    shop.engine.execute({"statement": "CREATE PRIMARY INDEX ON shop"})
    rows = shop.ask("SELECT RAW i FROM system:indexes i WHERE bucket_id IS MISSING")
    assert [(row["keyspace_id"], "scope_id" in row) for row in rows] == [("shop", False)]


def test_dropped_collection_takes_its_indexes_along(shop: Shop) -> None:
    """A collection that is dropped and made again has no indexes, and plans for the old one are not used."""
    query = "SELECT RAW name FROM people WHERE nick = 'b'"
    assert shop.ask(query) == ["Bob"]
    shop.cluster.buckets["shop"].drop_collection("main", "people")
    assert shop.code(query) == 12003
    assert shop.ask("SELECT * FROM system:indexes") == []
    shop.cluster.buckets["shop"].create_collection("main", "people")
    assert shop.code(query) == 4000


def test_lookup_looks_at_no_other_document(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    """A lookup by an indexed field fetches the documents that match and parses none, and a page only what it shows."""
    fetched: list[str] = []
    get = shop.people.get
    monkeypatch.setattr(shop.people, "get", lambda key: fetched.append(key) or get(key))
    monkeypatch.setattr("tests.emulator.sqlpp_expressions.parse_json", _must_not_be_called)
    query = "SELECT RAW p FROM people p WHERE p.nick = $nick ORDER BY META(p).id LIMIT $limit OFFSET $offset"
    assert shop.ask(query, p_nick="a", p_limit=100, p_offset=0) == [PEOPLE["p:1"], PEOPLE["p:3"]]
    assert shop.ask(query, p_nick="a", p_limit=1, p_offset=0) == [PEOPLE["p:1"]]
    assert fetched == ["p:1", "p:3", "p:1"]


def _must_not_be_called(_document: bytes) -> None:
    raise AssertionError("a document was parsed")


def test_whole_documents_keep_their_bytes(shop: Shop) -> None:
    """A document that is the whole result, or all of one member, passes through as the very bytes that were stored."""
    stored = b'{ "nick":"z",\t"b" : 1.50,  "a":"\\u00e9" }'
    shop.put({"p:z": stored})
    for results, expected in (
        ("RAW p", stored),
        ("p.*", stored),
        ("p", b'{"p":' + stored + b"}"),
        ("*", b'{"p":' + stored + b"}"),
    ):
        request = {"statement": f"SELECT {results} FROM people p WHERE nick = 'z'", "query_context": CONTEXT}
        assert shop.engine.execute(request).rows == [expected]


def test_documents_that_are_no_objects(shop: Shop) -> None:
    """Arrays, scalars and bytes that are no JSON are rows as well, without members."""
    shop.put({"q:1": [1], "q:2": b"\xff\xfe", "q:3": b"NaN", "q:4": 5, "q:5": b"[" * 100_000})
    where = "WHERE META().id >= 'q:'"
    values = [[1], "<binary (2 b)>", "<binary (3 b)>", 5, "<binary (100000 b)>"]
    assert shop.ask(f"SELECT RAW p FROM people p {where}") == values
    assert shop.ask(f"SELECT p.* FROM people p {where}") == [{}] * 5
    assert shop.ask(f"SELECT * FROM people p {where}") == [{"p": value} for value in values]
    assert shop.ask(f"SELECT nick FROM people p {where}") == [{}] * 5
    assert shop.ask(f"SELECT RAW META().type FROM people p {where}") == ["json", "base64", "base64", "json", "base64"]


def test_meta(shop: Shop) -> None:
    """META() has the id, the CAS, the expiry and the flags."""
    document = shop.people.put(b"p:m", b'{"nick": "m"}', flags=7, expiry=4_000_000_000)
    meta = {"id": "p:m", "cas": document.cas, "expiration": 4_000_000_000, "flags": 7, "type": "json"}
    assert shop.ask("SELECT RAW META(p) FROM people p WHERE nick = 'm'") == [meta]
    assert shop.ask("SELECT RAW META(p).cas FROM people p WHERE nick = 'm'") == [document.cas]


# Prepared statements


def test_prepare_and_execute(shop: Shop) -> None:
    """A prepared statement runs by its name with parameters, by the member `prepared` as well as by EXECUTE."""
    shop.ask("PREPARE named FROM SELECT RAW name FROM people WHERE nick = $n")
    assert shop.ask("EXECUTE named", p_n="b") == ["Bob"]
    request = {"prepared": "named", "query_context": CONTEXT, "$n": "a"}
    assert shop.engine.execute(request).rows == [b'"Ann"', b'"Cid"']
    assert shop.code("PREPARE named AS SELECT 1") == 4060
    shop.ask("PREPARE FORCE named AS SELECT RAW 1")
    assert shop.ask("EXECUTE named") == [1]


def test_auto_execute_gives_name_and_rows(shop: Shop) -> None:
    """PREPARE with auto_execute answers with the rows and the name, which then works; equal texts get equal names."""
    request = {"statement": "PREPARE SELECT RAW name FROM people WHERE nick = $n", "query_context": CONTEXT, "$n": "b"}
    first = shop.engine.execute({**request, "auto_execute": True})
    assert (first.rows, first.signature) == ([b'"Bob"'], "json")
    again = shop.engine.execute({"prepared": first.prepared, "query_context": CONTEXT, "$n": "a"})
    assert again.rows == [b'"Ann"', b'"Cid"']
    row = json.loads(shop.engine.execute(request).rows[0])
    assert (row["name"], row["text"]) == (first.prepared, "SELECT RAW name FROM people WHERE nick = $n")


def test_prepared_follows_the_indexes(shop: Shop) -> None:
    """A prepared statement is planned anew when indexes change, and fails when none is left."""
    query = "SELECT RAW name FROM people WHERE nick = 'b'"
    shop.ask(f"PREPARE p AS {query}")
    shop.ask("DROP INDEX by_nick ON people")
    assert shop.ask("EXECUTE p") == ["Bob"]
    shop.ask("DROP PRIMARY INDEX ON people")
    assert shop.code("EXECUTE p") == 4000
    assert shop.code(f"PREPARE {query}") == 4000


def test_prepared_belongs_to_its_query_context(shop: Shop) -> None:
    """A name that was prepared in one query context is unknown in another."""
    shop.ask("PREPARE p AS SELECT 1")
    with pytest.raises(QueryError, match="No such prepared statement: p"):
        shop.engine.execute({"prepared": "p"})


# Time and pauses


def test_long_query_pauses_and_stops_in_time() -> None:
    """A query over many documents lets others run between, and ends with 1080 when its time is up."""
    shop = Shop({f"p:{i}": {"n": i} for i in range(1000)}, "CREATE PRIMARY INDEX ON people")
    request = {"statement": "SELECT RAW n FROM people WHERE n % 2 = 1", "query_context": CONTEXT}
    pauses = 0
    steps = shop.engine.steps(request)
    try:
        while True:
            next(steps)
            pauses += 1
    except StopIteration as done:
        assert len(done.value.rows) == 500
    assert pauses >= 3

    steps = shop.engine.steps({**request, "timeout": "20ms"})
    next(steps)
    deadline = time.monotonic() + 0.02
    while time.monotonic() < deadline:
        pass
    with pytest.raises(QueryError, match="Timeout 20ms exceeded") as caught:
        next(steps)
    assert (caught.value.code, caught.value.request_status, caught.value.http_status) == (1080, "timeout", 200)


def test_documents_may_change_during_a_pause() -> None:
    """Mutations between two steps of a query neither break it nor make it repeat or invent documents."""
    shop = Shop({f"p:{i:04}": {"n": "x"} for i in range(1000)}, "CREATE INDEX i ON people(n)")
    steps = shop.engine.steps({"statement": "SELECT RAW META().id FROM people WHERE n = 'x'", "query_context": CONTEXT})
    next(steps)
    for i in range(0, 1000, 2):
        shop.people.remove(f"p:{i:04}".encode())
    with pytest.raises(StopIteration) as done:
        while True:
            next(steps)
    ids = [json.loads(row) for row in done.value.value.rows]
    assert len(set(ids)) == len(ids) == 256 + 372


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("75s", 75), ("500ms", 0.5), ("1m30s", 90), ("1.5h", 5400), ("10us", 1e-5), ("7", 7), ("-1s", -1)],
)
def test_duration(text: str, seconds: float) -> None:
    """Durations are read as Go's are, and plain numbers as seconds."""
    assert parse_duration(text) == pytest.approx(seconds)


def test_documents_may_become_something_else_during_a_pause() -> None:
    """A document that turns into no JSON while a query is under way is written as what it is, not as its bytes."""
    shop = Shop({f"p:{i:04}": {"n": "x"} for i in range(600)}, "CREATE INDEX i ON people(n)")
    steps = shop.engine.steps({"statement": "SELECT RAW p FROM people p WHERE n = 'x'", "query_context": CONTEXT})
    next(steps)
    shop.put({f"p:{i:04}": b"}{" for i in range(600)})
    with pytest.raises(StopIteration) as done:
        while True:
            next(steps)
    rows = [json.loads(row) for row in done.value.value.rows]
    assert rows == [{"n": "x"}] * 256 + ["<binary (2 b)>"] * 344


# Properties


def test_collation() -> None:
    """Values sort by type first, and within a type by value; only MISSING is below NULL."""
    assert sorted(VALUES[::-1], key=sort_key) == VALUES
    assert sort_key(MISSING) < sort_key(None)
    assert sort_key({"z": 9}) < sort_key(Binary("x"))


@given(json_values, json_values)
def test_identity_is_equality(left: Any, right: Any) -> None:
    """What an index takes for the same value is what `=` takes for equal, for all pairs that are neither NULL."""
    if left is not None and right is not None:
        assert (identity(left) == identity(right)) is equal(left, right)
    assert identity(left) == identity(json.loads(json.dumps(left)))


@given(st.text(alphabet="ab%_\\\n", max_size=8), st.text(alphabet="ab%_\\\n", max_size=8))
def test_like_agrees_with_a_slow_definition(text: str, pattern: str) -> None:
    """LIKE matches as a straightforward recursive reading of the pattern does."""

    def matches(at: int, part: int) -> bool:
        if part >= len(pattern):
            return at == len(text)
        letter = pattern[part]
        if letter == "%":
            return any(matches(rest, part + 1) for rest in range(at, len(text) + 1))
        if letter == "\\":
            letter, part = pattern[part + 1 : part + 2] or "\\", part + 1
        elif letter == "_":
            return at < len(text) and matches(at + 1, part + 1)
        return at < len(text) and text[at] == letter and matches(at + 1, part + 1)

    assert like(text, pattern) is matches(0, 0)


def test_like_takes_no_exponential_time() -> None:
    """A pattern made to be slow is not: it comes back at all."""
    assert like("a" * 2000, "%a" * 200 + "%b") is False


ANYTHING = Shop(PEOPLE, "CREATE INDEX by_nick ON people(nick)", "CREATE PRIMARY INDEX ON people")
_WORDS = (
    "SELECT RAW DISTINCT name nick * , ( ) [ ] { } . : ; = < >= != + - / % || ' \" ` ' 1 2.5 1e9 NULL TRUE MISSING "
    "AND OR NOT IN LIKE BETWEEN IS people p FROM WHERE ORDER BY LIMIT OFFSET USE KEYS META().id COUNT(*) LOWER( CASE "
    "WHEN THEN END CREATE PRIMARY INDEX ON EXPLAIN PREPARE EXECUTE system:indexes $x $1 ? AS 'p:1' \\ -- /* */ # @ "
    "\x00 é 😀 \ud800"
)
WORDS = _WORDS.split(" ")


def _attempt(statement: str) -> None:
    """Run a statement with parameters; anything but rows or a QueryError other than 5000 fails."""
    try:
        result = ANYTHING.engine.execute(
            {"statement": statement, "query_context": CONTEXT, "readonly": True, "$x": "a", "args": [1]}
        )
    except QueryError as error:
        assert error.code != 5000, (statement, error.msg)
    else:
        for row in result.rows:
            json.loads(row)


@settings(max_examples=400, deadline=None)
@given(st.text())
@example("\x00")
@example("'\\")
@example('"\\u12"')
@example("SELECT 'x")
@example("SELECT /*")
@example("`")
@example("SELECT 1e999")
@example("SELECT " + "9" * 5000)
@example("SELECT " + "9" * 400 + ".5 % 0")
@example("SELECT RAW '\\ud800'")
@example("SELECT RAW name FROM people USE KEYS '\\ud800'")
@example("SELECT RAW name FROM people WHERE META().id = '\\ud800'")
@example("SELECT '\\ud800' AS `\ud800`")
@example("SELECT RAW [1][1e308]")
@example("PREPARE " * 50 + "SELECT 1")
def test_any_text_gives_rows_or_an_error(statement: str) -> None:
    """Whatever text a client sends, the engine answers with rows or with an error of the client's making."""
    _attempt(statement)


@settings(max_examples=600, deadline=None)
@given(st.lists(st.sampled_from(WORDS), max_size=14))
def test_any_words_give_rows_or_an_error(words: list[str]) -> None:
    """The same for text that is made of SQL++'s own words, which gets further."""
    _attempt("SELECT " + " ".join(words))


@settings(max_examples=200, deadline=None)
@given(st.text(), json_values)
@example("' OR 1 = 1 --", None)
@example('"; DROP INDEX people.by_nick; --', [])
@example("\ud800", {})
def test_parameters_are_data(text: str, other: Any) -> None:
    """A parameter is compared as a value: whatever text it has, it finds exactly the documents that have the same."""
    shop = Shop({"it": {"nick": text, "other": other}, "not": {"nick": text + "'", "other": [other]}})
    shop.ask("CREATE INDEX by_nick ON people(nick)")
    shop.ask("CREATE INDEX by_other ON people(other)")
    found = shop.ask("SELECT META().id, nick FROM people WHERE nick = $x", p_x=text)
    assert found == [{"id": "it", "nick": text}]
    assert shop.ask("SELECT RAW META().id FROM people WHERE nick = ?", args=[text]) == ["it"]
    expected = [] if other is None else ["it"]
    assert shop.ask("SELECT RAW META().id FROM people WHERE other = $x", p_x=other) == expected
    assert shop.ask("SELECT RAW META().id FROM people WHERE other IN $x", p_x=[other]) == expected
    # The same value as a literal: JSON's strings are SQL++'s strings too.
    literal = json.dumps(text)
    assert shop.ask(f"SELECT RAW META().id FROM people WHERE nick = {literal}") == ["it"]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.sampled_from("abcdef"), st.none() | json_values), max_size=30), json_values)
def test_index_agrees_with_a_scan(mutations: list[tuple[str, Any]], wanted: Any) -> None:
    """After any mutations, a lookup by index gives what looking at every document gives, in the same order."""
    indexed, scanned = (
        Shop({}, "CREATE INDEX i ON people(v)"),
        Shop({}, "CREATE PRIMARY INDEX ON people"),
    )
    for key, value in mutations:
        for shop in (indexed, scanned):
            if value is None:
                shop.people.remove(key.encode())
            else:
                shop.put({key: {"v": value}})
    values = [wanted, *(value for _, value in mutations)]
    for value in values:
        query = "SELECT META().id, v FROM people WHERE v = $x"
        assert indexed.ask(query, p_x=value) == scanned.ask(query, p_x=value)
    ranged = "SELECT RAW META().id FROM people WHERE v >= $x"
    assert indexed.ask(ranged, p_x=wanted) == scanned.ask(ranged, p_x=wanted)


def test_the_unexpected_becomes_an_error(
    shop: Shop, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A fault of the engine's own is answered as error 5000 and logged, and does not escape."""

    def broken(_text: str) -> None:
        raise ZeroDivisionError("oops")

    monkeypatch.setattr("tests.emulator.sqlpp.parse_statement", broken)
    with pytest.raises(QueryError, match="ZeroDivisionError: oops") as caught:
        shop.ask("SELECT 1")
    assert (caught.value.code, caught.value.http_status) == (5000, 500)
    assert "a query failed unexpectedly" in caplog.text


def test_caches_are_bounded(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    """Plans and prepared statements are kept up to a number, the ones used last."""
    monkeypatch.setattr("tests.emulator.sqlpp.CACHED_PLANS", 10)
    monkeypatch.setattr("tests.emulator.sqlpp.MAX_PREPARED", 10)
    for i in range(30):
        shop.ask(f"PREPARE n{i} AS SELECT RAW {i}")
    assert len(shop.engine._plans) == len(shop.engine._prepared) == 10
    assert shop.ask("EXECUTE n29") == [29]
    assert shop.code("EXECUTE n1") == 4040
    assert parse_statement.cache_info().maxsize is not None


def test_bad_document_does_not_break_writing(shop: Shop) -> None:
    """A document that an index cannot hold is stored all the same, and is in no lookup."""
    deep: Callable[[int], bytes] = lambda depth: b'{"nick":' + b"[" * depth + b"]" * depth + b"}"  # noqa: E731
    for depth in (100, 400, 900, 5000, 100_000):
        shop.put({f"deep:{depth}": deep(depth)})
    assert shop.ask("SELECT RAW name FROM people WHERE nick = 'b'") == ["Bob"]
    assert len(shop.ask("SELECT RAW META().id FROM people WHERE META().id LIKE 'deep:%'")) == 5
