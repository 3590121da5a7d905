"""The grammar of SQL++, as a sqlglot dialect: text in, statements out.

sqlglot brings the tokenizer, the tree and the ladder of binary operators. What SQL++ has of its own (``SELECT RAW``,
keyspaces, ``USE KEYS``, ``$parameters``, ``IS MISSING``, its reserved words) is here, and so is every clause: sqlglot
accepts the union of many databases' SQL, and the server does not.

Nothing here knows of documents or indexes: what a name means is for the planner.
"""

import functools
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, NoReturn

from sqlglot import Dialect, Parser, Token, Tokenizer, TokenType, exp
from sqlglot.errors import SqlglotError

from tests.emulator.sqlpp_errors import SYNTAX, QueryError, not_supported
from tests.emulator.sqlpp_values import is_number, number, strict_json

MAX_STATEMENT_CHARACTERS = 1_000_000
MAX_NESTING = 50
"""Deeper brackets than this are refused, well before Python's stack ends."""
MAX_OPERATORS = 200
"""Operators of one kind in a row make a tree as deep as they are many."""
CACHED_STATEMENTS = 512
NEAR_CHARACTERS = 20

RESERVED = TokenType.COMMAND
"""The token type of every reserved word that sqlglot's ladder of operators has no type for."""

_RESERVED = """
ADVISE ALL ALTER ANALYZE AND ANY ARRAY AS ASC AT BEGIN BETWEEN BINARY BOOLEAN BREAK BUCKET BUILD BY CALL CASE
CAST CLUSTER COLLATE COLLECTION COMMIT COMMITTED CONNECT CONTINUE CORRELATED COVER CREATE CURRENT DATABASE
DATASET DATASTORE DECLARE DECREMENT DELETE DERIVED DESC DESCRIBE DISTINCT DO DROP EACH ELEMENT ELSE END EVERY
EXCEPT EXCLUDE EXECUTE EXISTS EXPLAIN FALSE FETCH FILTER FIRST FLATTEN FLUSH FOLLOWING FOR FORCE FROM FTS
FUNCTION GOLANG GRANT GROUP GROUPS GSI HASH HAVING IF IGNORE ILIKE IN INCLUDE INCREMENT INDEX INFER INLINE INNER
INSERT INTERSECT INTO IS ISOLATION JAVASCRIPT JOIN KEY KEYS KEYSPACE KNOWN LANGUAGE LAST LEFT LET LETTING LEVEL
LIKE LIMIT LSM MAP MAPPING MATCHED MATERIALIZED MERGE MINUS MISSING NAMESPACE NEST NL NO NOT NTH_VALUE NULL
NULLS NUMBER OBJECT OFFSET ON OPTION OPTIONS OR ORDER OTHERS OUTER OVER PARSE PARTITION PASSWORD PATH POOL
PRECEDING PREPARE PRIMARY PRIVATE PRIVILEGE PROBE PROCEDURE PUBLIC RANGE RAW REALM REDUCE RENAME REPLACE RESPECT
RETURN RETURNING REVOKE RIGHT ROLE ROLLBACK ROW ROWS SATISFIES SAVEPOINT SCHEMA SCOPE SELECT SELF SEMI SET SHOW
SOME START STATISTICS STRING SYSTEM THEN TIES TO TRAN TRANSACTION TRIGGER TRUE TRUNCATE UNBOUNDED UNDER UNION
UNIQUE UNKNOWN UNNEST UNSET UPDATE UPSERT USE USER USERS USING VALIDATE VALUE VALUED VALUES VIA VIEW WHEN WHERE
WHILE WINDOW WITH WITHIN WORK XOR
"""
RESERVED_WORDS = frozenset(_RESERVED.split())

OPERATOR_WORDS = {
    "AND": TokenType.AND,
    "OR": TokenType.OR,
    "NOT": TokenType.NOT,
    "NULL": TokenType.NULL,
    "TRUE": TokenType.TRUE,
    "FALSE": TokenType.FALSE,
}

_CLAUSES = """
JOIN INNER LEFT RIGHT OUTER NEST UNNEST LET LETTING GROUP HAVING WINDOW UNION INTERSECT EXCEPT WITH OVER FILTER
WITHIN ILIKE ARRAY ANY EVERY SOME EXISTS FIRST COLLATE XOR RETURNING PARTITION NULLS
"""
UNSUPPORTED_CLAUSES = frozenset(_CLAUSES.split())
"""Words that begin what the server understands and the emulator does not."""

_STATEMENTS = """
ADVISE ALTER ANALYZE BEGIN COMMIT FLUSH GRANT INFER REVOKE ROLLBACK SAVEPOINT SET SHOW START TRUNCATE WITH
"""
UNSUPPORTED_STATEMENTS = frozenset(_STATEMENTS.split())
CHANGES = frozenset({"DELETE", "INSERT", "MERGE", "UPDATE", "UPSERT"})

NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_$]*")
PARAMETER = re.compile(r"\$(?:[A-Za-z_][A-Za-z0-9_]*|[1-9][0-9]{0,5})")
NUMBER = re.compile(r"(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?")
ESCAPES = {"b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t", "/": "/", "\\": "\\", '"': '"', "'": "'", "`": "`"}
ESCAPE = re.compile(r"\\(u[0-9A-Fa-f]{4}|.)", re.DOTALL)

EQUALITY: dict[TokenType, type[exp.Binary]] = {
    TokenType.EQ: exp.EQ,
    TokenType.NEQ: exp.NEQ,
    TokenType.LT: exp.LT,
    TokenType.LTE: exp.LTE,
    TokenType.GT: exp.GT,
    TokenType.GTE: exp.GTE,
}


@dataclass(frozen=True)
class KeyspaceName:
    """A keyspace as it is written.

    Attributes:
        namespace: What stands before the colon (``default``, ``system``), or None.
        parts: One name (a bucket, or a collection where there is a query context), or bucket, scope and collection.
    """

    namespace: str | None
    parts: tuple[str, ...]


@dataclass(frozen=True)
class Result:
    """One term of a projection: `expression` is None for ``*``; `star` says that its members are wanted, not itself."""

    expression: exp.Expr | None
    alias: str | None = None
    star: bool = False


@dataclass(frozen=True)
class SortTerm:
    """One term of ORDER BY."""

    expression: exp.Expr
    descending: bool


@dataclass(frozen=True)
class Select:
    """A SELECT statement."""

    results: tuple[Result, ...]
    raw: bool = False
    distinct: bool = False
    keyspace: KeyspaceName | None = None
    alias: str | None = None
    use_keys: exp.Expr | None = None
    where: exp.Expr | None = None
    order_by: tuple[SortTerm, ...] = ()
    limit: exp.Expr | None = None
    offset: exp.Expr | None = None


@dataclass(frozen=True)
class CreateIndex:
    """CREATE INDEX, or CREATE PRIMARY INDEX, which has no keys."""

    name: str | None
    keyspace: KeyspaceName
    primary: bool
    keys: tuple[exp.Expr, ...] = ()
    where: exp.Expr | None = None
    options: dict[str, Any] = field(default_factory=dict)
    if_not_exists: bool = False


@dataclass(frozen=True)
class DropIndex:
    """DROP INDEX, or DROP PRIMARY INDEX, which has no name."""

    name: str | None
    keyspace: KeyspaceName
    if_exists: bool = False


@dataclass(frozen=True)
class BuildIndex:
    """BUILD INDEX: by name, or by what a query selects."""

    keyspace: KeyspaceName
    names: tuple[str, ...] | Select


@dataclass(frozen=True)
class Prepare:
    """PREPARE: `text` is the statement to prepare, as it was written."""

    name: str | None
    force: bool
    text: str
    statement: "Runnable"


@dataclass(frozen=True)
class Execute:
    """EXECUTE a prepared statement by name."""

    name: str


@dataclass(frozen=True)
class Explain:
    """EXPLAIN a statement."""

    text: str
    statement: Select


@dataclass(frozen=True)
class Change:
    """A statement that changes documents. It is recognized only to be refused, by the right error."""

    verb: str


Runnable = Select | CreateIndex | DropIndex | BuildIndex | Explain | Change
"""What can be prepared."""
Statement = Runnable | Prepare | Execute


class SqlPlusPlus(Dialect):
    """SQL++ as the query service of Couchbase Server understands it."""

    class Tokenizer(Tokenizer):
        """Both quotes make strings, backticks make names, and there are no keywords but SQL++'s own."""

        IDENTIFIERS = ["`"]  # noqa: RUF012 - sqlglot's own attributes
        QUOTES = ["'", '"']  # noqa: RUF012
        STRING_ESCAPES = ["'", '"', "\\"]  # noqa: RUF012
        COMMENTS = ["--", ("/*", "*/")]  # noqa: RUF012
        NESTED_COMMENTS = False
        COMMANDS: ClassVar[set[TokenType]] = set()
        KEYWORDS = {  # noqa: RUF012
            **dict.fromkeys(RESERVED_WORDS, RESERVED),
            **OPERATOR_WORDS,
            "==": TokenType.EQ,
            "<>": TokenType.NEQ,
            "!=": TokenType.NEQ,
            "<=": TokenType.LTE,
            ">=": TokenType.GTE,
            "||": TokenType.DPIPE,
        }

    class Parser(Parser):
        """A recursive descent: methods called ``_parse_`` replace sqlglot's, ``_read_`` are its own."""

        CONJUNCTION = {TokenType.AND: exp.And}  # noqa: RUF012
        DISJUNCTION = {TokenType.OR: exp.Or}  # noqa: RUF012
        TERM = {TokenType.PLUS: exp.Add, TokenType.DASH: exp.Sub}  # noqa: RUF012
        FACTOR = {TokenType.STAR: exp.Mul, TokenType.SLASH: exp.Div, TokenType.MOD: exp.Mod}  # noqa: RUF012

        def reset(self) -> None:
            """Forget the statement before."""
            super().reset()
            self._question_marks = 0

        # Errors and tokens

        def raise_error(self, message: str, token: Token | None = None) -> NoReturn:
            """Raise the server's syntax error at `token`, or at the current one."""
            token = token or self._curr
            if not token:
                self._fail(len(self.sql.rstrip(" \t\r\n;")), "end of input")
            reserved = token.token_type == RESERVED or token.text.upper() in OPERATOR_WORDS
            self._fail(token.start, token.text + (" (reserved word)" if reserved else ""))

        def _fail(self, start: int, found: str) -> NoReturn:
            before = self.sql[:start]
            near = before if len(before) <= NEAR_CHARACTERS else f"...{before[-NEAR_CHARACTERS:]}"
            line = before.count("\n") + 1
            column = start - (before.rfind("\n") + 1) + 1
            raise QueryError(SYNTAX, f"syntax error - line {line}, column {column}, near '{near}', at: {found}")

        def _is_word(self, *words: str) -> bool:
            token = self._curr
            return token.token_type in WORD_TYPES and token.text.upper() in words

        def _take_word(self, *words: str) -> bool:
            """Step over the current token if it is one of `words`, unquoted."""
            found = self._is_word(*words)
            if found:
                self._advance()
            return found

        def _need_word(self, *words: str) -> None:
            for word in words:
                if not self._take_word(word):
                    self.raise_error(f"Expected {word}")

        def _need(self, token_type: TokenType) -> None:
            if not self._match(token_type):
                self.raise_error(f"Expected {token_type.value}")

        def _take_name(self) -> exp.Identifier | None:
            token = self._curr
            if token.token_type == TokenType.IDENTIFIER and token.text:
                self._advance()
                return exp.Identifier(this=token.text, quoted=True)
            if token.token_type == TokenType.VAR and NAME.fullmatch(token.text):
                self._advance()
                return exp.Identifier(this=token.text, quoted=False)
            return None

        def _need_name(self) -> str:
            return self._need_identifier().name

        def _need_identifier(self) -> exp.Identifier:
            return self._take_name() or self.raise_error("Expected a name")

        def _need_end(self) -> None:
            if self._curr:
                if self._is_word(*UNSUPPORTED_CLAUSES):
                    raise not_supported(self._curr.text.upper())
                self.raise_error("Unexpected token")

        # Statements

        def _parse_statement(self) -> Any:
            """Parse one statement, to the end of the text."""
            self._check_tokens()
            statement = self._read_any()
            self._need_end()
            return statement

        def _check_tokens(self) -> None:
            depth = 0
            run: dict[TokenType, int] = {}
            for token in self._tokens:
                if token.token_type in OPENING:
                    depth += 1
                elif token.token_type in CLOSING:
                    depth -= 1
                elif token.token_type not in FLAT:
                    run[token.token_type] = run.get(token.token_type, 0) + 1
                    if run[token.token_type] > MAX_OPERATORS:
                        raise QueryError(SYNTAX, f"syntax error - too many of '{token.text}' in a row")
                if depth > MAX_NESTING:
                    raise QueryError(SYNTAX, "syntax error - nesting too deep")

        def _read_any(self) -> Statement:
            start = self._curr
            word = start.text.upper() if start.token_type in WORD_TYPES else ""
            parse = STATEMENTS.get(word)
            if parse is not None:
                self._advance()
                return parse(self)
            if word in CHANGES:
                self._advance(len(self._tokens) - self._index)
                return Change(word)
            if word in UNSUPPORTED_STATEMENTS:
                raise not_supported(word)
            self.raise_error("Expected a statement")

        def _read_query(self) -> Select:
            """Parse what follows SELECT."""
            distinct = self._take_word("DISTINCT")
            if not distinct:
                self._take_word("ALL")
            raw = self._take_word("RAW", "ELEMENT", "VALUE")
            results = [self._read_result(raw=raw)]
            while not raw and self._match(TokenType.COMMA):
                results.append(self._read_result(raw=False))
            keyspace = alias = use_keys = where = limit = offset = None
            order_by: tuple[SortTerm, ...] = ()
            if self._take_word("FROM"):
                keyspace = self._read_keyspace()
                alias = self._read_alias()
                use_keys = self._read_use()
            if self._take_word("WHERE"):
                where = self._read_expression()
            if self._take_word("ORDER"):
                self._need_word("BY")
                order_by = tuple(self._parse_csv(self._read_sort_term))
            if self._take_word("LIMIT"):
                limit = self._read_expression()
            if self._take_word("OFFSET"):
                offset = self._read_expression()
            return Select(tuple(results), raw, distinct, keyspace, alias, use_keys, where, order_by, limit, offset)

        def _read_result(self, *, raw: bool) -> Result:
            if not raw and self._match(TokenType.STAR):
                return Result(None, star=True)
            expression = self._read_expression()
            if not raw and self._match_pair(TokenType.DOT, TokenType.STAR):
                return Result(expression, star=True)
            return Result(expression, self._read_alias())

        def _read_alias(self) -> str | None:
            if self._take_word("AS"):
                return self._need_name()
            name = self._take_name()
            return name.name if name else None

        def _read_use(self) -> exp.Expr | None:
            if not self._take_word("USE"):
                return None
            if self._is_word("INDEX", "HASH", "NL"):
                raise not_supported(f"USE {self._curr.text.upper()}")
            self._take_word("PRIMARY")
            self._need_word("KEYS")
            return self._read_expression()

        def _read_sort_term(self) -> SortTerm:
            expression = self._read_expression()
            if self._take_word("DESC"):
                return SortTerm(expression, True)
            self._take_word("ASC")
            return SortTerm(expression, False)

        def _read_keyspace(self) -> KeyspaceName:
            if self._curr.token_type == TokenType.L_PAREN:
                raise not_supported("A subquery in FROM")
            namespace = None
            if self._next.token_type == TokenType.COLON:
                namespace = "system" if self._take_word("SYSTEM") else self._need_name()
                self._need(TokenType.COLON)
            parts = [self._need_name()]
            while self._match(TokenType.DOT):
                parts.append(self._need_name())
            return KeyspaceName(namespace, tuple(parts))

        def _read_create(self) -> CreateIndex:
            primary = self._take_word("PRIMARY")
            if not self._is_word("INDEX"):
                if self._is_word("SCOPE", "COLLECTION", "FUNCTION", "VECTOR", "BUCKET"):
                    raise not_supported(f"CREATE {self._curr.text.upper()}")
                self.raise_error("Expected INDEX")
            self._advance()
            unless = self._read_exists(negated=True)
            name = self._take_name()
            if not primary and name is None:
                self.raise_error("Expected a name")
            unless = unless or self._read_exists(negated=True)
            self._need_word("ON")
            keyspace = self._read_keyspace()
            keys: tuple[exp.Expr, ...] = ()
            where = None
            if not primary:
                self._need(TokenType.L_PAREN)
                keys = tuple(self._parse_csv(self._read_index_key))
                self._need(TokenType.R_PAREN)
                if self._take_word("WHERE"):
                    where = self._read_expression()
            self._read_using()
            options = {}
            if self._take_word("WITH"):
                options = constant(self._read_expression())
                if not isinstance(options, dict):
                    raise QueryError(SYNTAX, "syntax error - WITH must be an object of constants")
            return CreateIndex(name.name if name else None, keyspace, primary, keys, where, options, unless)

        def _read_index_key(self) -> exp.Expr:
            if self._is_word("INCLUDE"):
                raise not_supported("INCLUDE MISSING")
            expression = self._read_expression()
            if self._is_word("INCLUDE"):
                raise not_supported("INCLUDE MISSING")
            if not self._take_word("DESC"):
                self._take_word("ASC")
            return expression

        def _read_exists(self, *, negated: bool = False) -> bool:
            if not self._is_word("IF"):
                return False
            self._advance()
            if negated:
                self._need_word("NOT")
            self._need_word("EXISTS")
            return True

        def _read_using(self) -> None:
            if self._take_word("USING"):
                if self._is_word("FTS"):
                    raise not_supported("USING FTS")
                self._need_word("GSI")

        def _read_drop(self) -> DropIndex:
            primary = self._take_word("PRIMARY")
            if not self._is_word("INDEX"):
                if self._is_word("SCOPE", "COLLECTION", "FUNCTION", "BUCKET"):
                    raise not_supported(f"DROP {self._curr.text.upper()}")
                self.raise_error("Expected INDEX")
            self._advance()
            if_exists = self._read_exists()
            name = None
            keyspace = None if primary else self._read_keyspace()
            if_exists = if_exists or self._read_exists()
            if keyspace is not None and (keyspace.namespace or len(keyspace.parts) > 1):
                # DROP INDEX keyspace.name
                *path, name = keyspace.parts
                if not path:
                    self.raise_error("Expected an index")
                keyspace = KeyspaceName(keyspace.namespace, tuple(path))
            else:
                name = keyspace.parts[0] if keyspace else None
                self._need_word("ON")
                keyspace = self._read_keyspace()
            self._read_using()
            return DropIndex(name, keyspace, if_exists)

        def _read_build(self) -> BuildIndex:
            self._need_word("INDEX", "ON")
            keyspace = self._read_keyspace()
            self._need(TokenType.L_PAREN)
            names: tuple[str, ...] | Select
            if self._match(TokenType.L_PAREN):
                self._need_word("SELECT")
                names = self._read_query()
                self._need(TokenType.R_PAREN)
            else:
                names = tuple(self._parse_csv(self._read_index_name))
            self._need(TokenType.R_PAREN)
            self._read_using()
            return BuildIndex(keyspace, names)

        def _read_index_name(self) -> str:
            if self._curr.token_type == TokenType.STRING:
                return str(self._read_operand().name)
            return self._need_name()

        def _read_prepare(self) -> Prepare:
            force = self._take_word("FORCE")
            name = None
            if self._curr.token_type == TokenType.STRING or self._curr.token_type in NAME_TYPES:
                name = self._read_index_name()
                if not self._take_word("FROM", "AS"):
                    self.raise_error("Expected FROM")
            start = self._curr.start if self._curr else len(self.sql)
            statement = self._read_any()
            if isinstance(statement, Prepare | Execute):
                self._fail(start, self.sql[start:].split(None, 1)[0])
            return Prepare(name, force, self.sql[start:], statement)

        def _read_execute(self) -> Execute:
            name = self._read_index_name()
            if self._is_word("USING"):
                raise not_supported("EXECUTE ... USING")
            return Execute(name)

        def _read_explain(self) -> Explain:
            start = self._curr.start if self._curr else len(self.sql)
            statement = self._read_any()
            if not isinstance(statement, Select):
                raise not_supported("EXPLAIN of anything but SELECT")
            return Explain(self.sql[start:], statement)

        def _read_expression(self) -> exp.Expr:
            expression = self._parse_disjunction()
            assert expression is not None  # since _read_operand raises where there is nothing
            return expression

        # Expressions, from the loosest operator to the tightest; AND, OR and + - * / % are sqlglot's

        def _parse_equality(self, parse_is: bool = True) -> exp.Expr:
            if self._match(TokenType.NOT):
                return exp.Not(this=self._parse_equality())
            this = self._parse_range()
            while self._curr.token_type in EQUALITY:
                kind = EQUALITY[self._curr.token_type]
                self._advance()
                this = kind(this=this, expression=self._parse_range())
            return this

        def _parse_range(self, this: exp.Expr | None = None, parse_is: bool = False) -> exp.Expr:
            this = self._parse_bitwise()
            while True:
                if self._take_word("IS"):
                    negated = self._match(TokenType.NOT)
                    this = exp.Is(this=this, expression=exp.Var(this=self._read_state()))
                else:
                    index = self._index
                    negated = self._match(TokenType.NOT)
                    if self._take_word("IN"):
                        this = exp.In(this=this, field=self._parse_bitwise())
                    elif self._take_word("LIKE"):
                        this = exp.Like(this=this, expression=self._parse_bitwise())
                    elif self._take_word("BETWEEN"):
                        low = self._parse_bitwise()
                        self._need(TokenType.AND)
                        this = exp.Between(this=this, low=low, high=self._parse_bitwise())
                    else:
                        self._retreat(index)
                        return this
                if negated:
                    this = exp.Not(this=this)

        def _read_state(self) -> str:
            if self._match(TokenType.NULL):
                return "NULL"
            if not self._is_word("MISSING", "VALUED", "KNOWN", "UNKNOWN"):
                self.raise_error("Expected NULL, MISSING, VALUED, KNOWN or UNKNOWN")
            self._advance()
            return str(self._prev.text.upper())

        def _parse_bitwise(self) -> exp.Expr:
            this = self._read_sum()
            while self._match(TokenType.DPIPE):
                this = exp.DPipe(this=this, expression=self._read_sum())
            return this

        def _read_sum(self) -> exp.Expr:
            this = self._parse_term()
            assert this is not None
            return this

        def _parse_factor_operand(self) -> exp.Expr:
            return self._parse_unary()

        def _parse_at_time_zone(self, this: exp.Expr | None) -> exp.Expr | None:
            return this

        def _parse_unary(self) -> exp.Expr:
            if self._match(TokenType.DASH):
                return exp.Neg(this=self._parse_unary())
            this = self._read_operand()
            while True:
                if self._curr.token_type == TokenType.DOT and self._next.token_type != TokenType.STAR:
                    self._advance()
                    this = exp.Dot(this=this, expression=self._need_identifier())
                elif self._match(TokenType.L_BRACKET):
                    this = exp.Bracket(this=this, expressions=[self._read_expression()])
                    if self._curr.token_type == TokenType.COLON:
                        raise not_supported("An array slice")
                    self._need(TokenType.R_BRACKET)
                else:
                    return this

        def _read_operand(self) -> exp.Expr:
            token = self._curr
            parse = OPERANDS.get(token.token_type)
            if parse is not None:
                self._advance()
                return parse(self, token)
            if token.token_type == TokenType.VAR and PARAMETER.fullmatch(token.text):
                self._advance()
                return exp.Parameter(this=token.text[1:])
            if self._take_word("MISSING"):
                return exp.Var(this="MISSING")
            if self._take_word("CASE"):
                return self._read_case()
            name = self._take_name()
            if name is None:
                if self._is_word(*UNSUPPORTED_CLAUSES):
                    raise not_supported(token.text.upper())
                self.raise_error("Expected an expression")
            if not name.quoted and self._match(TokenType.L_PAREN):
                return self._read_arguments(name.name, token)
            return name

        def _read_string_literal(self, token: Token) -> exp.Expr:
            raw = self.sql[token.start : token.end + 1]
            quote, body = raw[0], raw[1:-1]

            def unescape(match: re.Match[str]) -> str:
                letter = match[1]
                if letter[0] == "u" and len(letter) > 1:
                    return chr(int(letter[1:], 16))
                if letter not in ESCAPES:
                    self._fail(token.start + 1 + match.start(), f"invalid escape sequence {match[0]}")
                return ESCAPES[letter]

            text = "\\".join(part.replace(quote * 2, quote) for part in body.split("\\"))
            text = ESCAPE.sub(unescape, text)
            # A pair of escaped surrogates is one character; JSON, where the escapes are from, reads them so.
            return exp.Literal.string(text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "surrogatepass"))

        def _read_number(self, token: Token) -> exp.Expr:
            if not NUMBER.fullmatch(token.text):
                self.raise_error("Bad number", token)
            try:
                strict_json(token.text)
            except ValueError:
                self.raise_error("Number out of range", token)
            return exp.Literal.number(token.text)

        def _read_question_mark(self, token: Token) -> exp.Expr:
            self._question_marks += 1
            return exp.Parameter(this=str(self._question_marks))

        def _read_parentheses(self, token: Token) -> exp.Expr:
            if self._is_word("SELECT"):
                raise not_supported("A subquery in an expression")
            this = self._read_expression()
            self._need(TokenType.R_PAREN)
            return this

        def _read_array(self, token: Token) -> exp.Expr:
            return exp.Array(expressions=self._read_list(TokenType.R_BRACKET, self._read_expression))

        def _read_object(self, token: Token) -> exp.Expr:
            return exp.Struct(expressions=self._read_list(TokenType.R_BRACE, self._read_member))

        def _read_member(self) -> exp.Expr:
            if self._curr.token_type != TokenType.STRING:
                self.raise_error("Expected a string")
            name = self._read_operand()
            self._need(TokenType.COLON)
            return exp.PropertyEQ(this=name, expression=self._read_expression())

        def _read_list(self, end: TokenType, parse: Any) -> list[exp.Expr]:
            items = [] if self._curr.token_type == end else self._parse_csv(parse)
            self._need(end)
            return items

        def _read_arguments(self, name: str, token: Token) -> exp.Expr:
            call = exp.Anonymous(this=name.upper())
            call.meta["position"] = self._position(token)
            if self._match(TokenType.STAR):
                call.set("expressions", [exp.Star()])
                self._need(TokenType.R_PAREN)
            elif self._take_word("DISTINCT"):
                arguments = self._read_list(TokenType.R_PAREN, self._read_expression)
                call.set("expressions", [exp.Distinct(expressions=arguments)])
            else:
                call.set("expressions", self._read_list(TokenType.R_PAREN, self._read_expression))
            if self._is_word("OVER", "FILTER"):
                raise not_supported(self._curr.text.upper())
            return call

        def _position(self, token: Token) -> str:
            before = self.sql[: token.start]
            return f"near line {before.count(chr(10)) + 1}, column {len(before) - before.rfind(chr(10))}"

        def _read_case(self) -> exp.Expr:
            subject = None if self._is_word("WHEN") else self._read_expression()
            branches = []
            while self._take_word("WHEN"):
                condition = self._read_expression()
                self._need_word("THEN")
                branches.append(exp.If(this=condition, true=self._read_expression()))
            if not branches:
                self.raise_error("Expected WHEN")
            default = self._read_expression() if self._take_word("ELSE") else None
            self._need_word("END")
            return exp.Case(this=subject, ifs=branches, default=default)


WORD_TYPES = frozenset({RESERVED, TokenType.VAR, *OPERATOR_WORDS.values()})
NAME_TYPES = frozenset({TokenType.VAR, TokenType.IDENTIFIER})
OPENING = frozenset({TokenType.L_PAREN, TokenType.L_BRACKET, TokenType.L_BRACE})
CLOSING = frozenset({TokenType.R_PAREN, TokenType.R_BRACKET, TokenType.R_BRACE})
FLAT = frozenset(
    {*NAME_TYPES, TokenType.COMMA, TokenType.STRING, TokenType.NUMBER, TokenType.COLON, TokenType.SEMICOLON}
    | {TokenType.PLACEHOLDER, TokenType.TRUE, TokenType.FALSE, TokenType.NULL}
)
"""Tokens of which any number makes a tree no deeper: items of lists."""

OPERANDS: dict[TokenType, Callable[[SqlPlusPlus.Parser, Token], exp.Expr]] = {
    TokenType.STRING: SqlPlusPlus.Parser._read_string_literal,
    TokenType.NUMBER: SqlPlusPlus.Parser._read_number,
    TokenType.PLACEHOLDER: SqlPlusPlus.Parser._read_question_mark,
    TokenType.L_PAREN: SqlPlusPlus.Parser._read_parentheses,
    TokenType.L_BRACKET: SqlPlusPlus.Parser._read_array,
    TokenType.L_BRACE: SqlPlusPlus.Parser._read_object,
    TokenType.TRUE: lambda _parser, _token: exp.Boolean(this=True),
    TokenType.FALSE: lambda _parser, _token: exp.Boolean(this=False),
    TokenType.NULL: lambda _parser, _token: exp.Null(),
}

STATEMENTS: dict[str, Callable[[SqlPlusPlus.Parser], Statement]] = {
    "SELECT": SqlPlusPlus.Parser._read_query,
    "CREATE": SqlPlusPlus.Parser._read_create,
    "DROP": SqlPlusPlus.Parser._read_drop,
    "BUILD": SqlPlusPlus.Parser._read_build,
    "PREPARE": SqlPlusPlus.Parser._read_prepare,
    "EXECUTE": SqlPlusPlus.Parser._read_execute,
    "EXPLAIN": SqlPlusPlus.Parser._read_explain,
}


def constant(node: exp.Expr) -> Any:
    """Return the value of a tree of literals; anything else in it raises QueryError 3000."""
    if isinstance(node, exp.Literal):
        return node.name if node.is_string else strict_json(node.name)
    if isinstance(node, exp.Boolean):
        return node.this
    if isinstance(node, exp.Null):
        return None
    if isinstance(node, exp.Neg):
        value = constant(node.this)
        if is_number(value):
            return number(-value)
    if isinstance(node, exp.Array):
        return [constant(item) for item in node.expressions]
    if isinstance(node, exp.Struct):
        return {member.this.name: constant(member.expression) for member in node.expressions}
    raise QueryError(SYNTAX, "syntax error - expected a constant")


_dialect = SqlPlusPlus()


@functools.lru_cache(maxsize=CACHED_STATEMENTS)
def parse_statement(text: str) -> Statement:
    """Return the statement that `text` is; the trees in it are shared and must not be changed.

    Raises:
        QueryError: 3000 with the position, where the server would not understand it either; 1020 for what it would.
    """
    if len(text) > MAX_STATEMENT_CHARACTERS:
        raise QueryError(SYNTAX, "syntax error - statement too long")
    try:
        statements: list[Any] = [statement for statement in _dialect.parse(text) if statement is not None]
    except SqlglotError as error:
        cause = str(error.__cause__ or error).splitlines()[0]
        raise QueryError(SYNTAX, f"syntax error - {cause}") from error
    except RecursionError as error:
        raise QueryError(SYNTAX, "syntax error - nesting too deep") from error
    if not statements:
        raise QueryError(SYNTAX, "syntax error - line 1, column 1, near '', at: end of input")
    if len(statements) > 1:
        raise QueryError(SYNTAX, "syntax error - more than one statement")
    statement: Statement = statements[0]
    return statement


def render(node: exp.Expr) -> str:
    """Return an expression as text, every name in backticks, as system:indexes and EXPLAIN show it."""
    return str(node.sql(dialect=_dialect, identify=True))
