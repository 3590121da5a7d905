"""The statements that the query service knows: those that this project sends, and no other.

White space, back-quotes around names and the letter case of key words may vary, nothing else. In the table a word in
capitals is a key word, and what is in angle brackets stands for a name or a text of the caller's (`HOLES`).
"""

import functools
import re
from typing import NamedTuple

from tests.emulator.query_errors import NOT_SUPPORTED, SYNTAX, QueryError
from tests.emulator.users import Privilege
from tests.sample_data import AUTH, IMAGES, USERS


class Statement(NamedTuple):
    """One statement of the table.

    Attributes:
        action: What the engine does for it: the name of a method of ``QueryEngine``.
        collection: What it is about; None: ``system:indexes``.
        privilege: What its user needs there; None: nothing.
        text: The statement itself.
    """

    action: str
    collection: str | None
    privilege: Privilege | None
    text: str


STATEMENTS = (
    Statement(  # the service's two lookups, prepared or not; its peers in tests/load send the same
        "look_up",
        USERS,
        Privilege.SELECT,
        "SELECT RAW p FROM user_data AS p WHERE p.<field> = $value ORDER BY META(p).id LIMIT $limit OFFSET $offset",
    ),
    # tests/functional/test_sample_data.py
    Statement("record_ids", USERS, Privilege.SELECT, "SELECT RAW record_id FROM user_data WHERE <field> = $value"),
    # tests/deploy/test_service.py, by a user who may not
    Statement("by_key", AUTH, Privilege.SELECT, "SELECT RAW t.token FROM service_auth AS t USE KEYS <text>"),
    Statement("by_key", IMAGES, Privilege.SELECT, "SELECT RAW i FROM user_images AS i USE KEYS <text>"),
    # sample data, and what the service advises where an index is missing
    *(
        Statement("create", USERS, Privilege.INDEX, f"CREATE INDEX <index>{condition} ON user_data(<member>){options}")
        for condition in (" IF NOT EXISTS", "")
        for options in ("", ' WITH {"defer_build": true}')
    ),
    Statement("build", USERS, Privilege.INDEX, "BUILD INDEX ON user_data(<index>)"),
    Statement("drop", USERS, Privilege.INDEX, "DROP INDEX <index> ON user_data"),
    Statement("index_names", None, None, "SELECT RAW name FROM system:indexes WHERE name = <text>"),
    Statement("index_names", None, None, "SELECT RAW name FROM system:indexes WHERE keyspace_id = <text>"),
    Statement(  # get_all_indexes and watch_indexes of a collection: query_index_get_all.hxx of couchbase-cxx-client
        "index_rows",
        None,
        None,
        "SELECT idx.* FROM system:indexes AS idx WHERE ((bucket_id = $bucket_name AND scope_id = $scope_name) "
        'AND keyspace_id = $collection_name) AND using = "gsi" ORDER BY is_primary DESC, name ASC',
    ),
)
PREPARABLE = ("look_up",)
"""The actions whose statements may have ``PREPARE`` before them."""
FIELDS = ("nickname", "user_id")
"""The members that profiles are looked up by."""

NAME, QUOTED, TEXT, PARAMETER, HOLE, MARK = "name", "quoted", "text", "parameter", "hole", "mark"
HOLES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "field": ((NAME, QUOTED), FIELDS),
    "index": ((NAME, QUOTED), ()),
    "member": ((NAME, QUOTED), ()),
    "text": ((TEXT,), ()),
}
"""What may stand in each kind of angle brackets: the kinds of token, and the values if not any will do."""

TOKEN = re.compile(
    r"\s*(?:`(?P<quoted>[^`]+)`|(?P<text>\"[^\"\\]*\"|'[^'\\]*')|(?P<parameter>\$\w+)|<(?P<hole>\w+)>|(?P<name>\w+)|"
    r"(?P<mark>\S))"
)


class Token(NamedTuple):
    """A part of a statement: one of the kinds above, and its text without quotes."""

    kind: str
    text: str

    def is_keyword(self, word: str) -> bool:
        """Say whether it is that key word (in capitals)."""
        return self.kind == NAME and self.text.upper() == word

    def fits(self, wanted: "Token") -> bool:
        """Say whether it may stand where the table has `wanted`."""
        if wanted.kind == HOLE:
            kinds, values = HOLES[wanted.text]
            return self.kind in kinds and (not values or self.text in values)
        if wanted.kind == NAME and wanted.text.isupper():
            return self.is_keyword(wanted.text)
        return self.text == wanted.text and self.kind in ((NAME, QUOTED) if wanted.kind == NAME else (wanted.kind,))


class Found(NamedTuple):
    """What a text is: the statement, what stands in its angle brackets, and whether it is to be prepared."""

    statement: Statement
    given: dict[str, str]
    prepare: bool


def tokens(text: str) -> tuple[Token, ...]:
    """Take a text apart."""
    found = ((str(match.lastgroup), match) for match in TOKEN.finditer(text))
    return tuple(Token(kind, match[kind][1:-1] if kind == TEXT else match[kind]) for kind, match in found)


_TABLE = tuple((statement, tokens(statement.text)) for statement in STATEMENTS)
_KNOWN = "; ".join(statement.text for statement in STATEMENTS)


@functools.lru_cache(maxsize=256)
def find_statement(text: str) -> Found:
    """Find a text in the table; raises QueryError 3000 for two statements, 1020 for one that is not there."""
    given = tokens(text)
    if given and given[-1] == (MARK, ";"):
        given = given[:-1]
    if Token(MARK, ";") in given:  # the real engine's grammar has one statement a request
        raise QueryError(SYNTAX, "syntax error - a request has one statement - at: ;")
    prepare = bool(given) and given[0].is_keyword("PREPARE")
    given = given[1:] if prepare else given
    for statement, wanted in _TABLE:
        pairs = list(zip(given, wanted, strict=False))
        if len(given) == len(wanted) and all(token.fits(part) for token, part in pairs):
            if prepare and statement.action not in PREPARABLE:
                break
            return Found(statement, {part.text: token.text for token, part in pairs if part.kind == HOLE}, prepare)
    raise QueryError(
        NOT_SUPPORTED, f"not known to the emulator: {text}; it knows these (the first prepared too): {_KNOWN}"
    )
