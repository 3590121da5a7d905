"""SQL++ expressions: trees in, Python functions of a row and the parameters out.

A tree is compiled once, when its statement is planned. What comes out never raises for what a document may hold: a type
that does not fit makes NULL or MISSING, as SQL++ has it.
"""

import math
import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from sqlglot import exp

from tests.emulator.documents import Document
from tests.emulator.sqlpp_dialect import constant, render
from tests.emulator.sqlpp_errors import NOT_AGGREGATE, SYNTAX, QueryError
from tests.emulator.sqlpp_values import (
    MISSING,
    dump_json,
    equal,
    identity,
    is_number,
    less,
    number,
    parse_json,
    sort_key,
    truth,
    type_name,
    unknown,
)

Parameters = dict[str, Any]
"""The values of a request's parameters: named ones by name, positional ones by ``"1"``, ``"2"`` and so on."""

UNPARSED = object()


class Row:
    """One row of a keyspace: a document as it was when it was fetched, and not parsed before somebody looks into it."""

    __slots__ = ("_content", "_value", "aggregates", "document", "is_object", "key")

    def __init__(self, key: str, document: Document | None, value: Any = UNPARSED, *, is_object: bool = False) -> None:
        """Make a row of a document, or of a value where there is no document.

        Args:
            key: The document id.
            document: The document, None for the rows of system keyspaces.
            value: The document's value, if it is known.
            is_object: Whether the document is known to be a JSON object without parsing it.
        """
        self.key = key
        self.document = document
        self._content = b"" if document is None else document.value
        self.is_object = is_object
        self._value = value
        self.aggregates: Sequence[Any] = ()

    @property
    def value(self) -> Any:
        """What the document holds."""
        if self._value is UNPARSED:
            self._value = parse_json(self._content)
        return self._value

    def json(self) -> bytes:
        """Return the document as JSON: its own bytes where they are known to be an object."""
        if self.document is not None and (self.is_object or isinstance(self.value, dict)):
            return self._content
        return dump_json(self.value)

    def meta(self) -> dict[str, Any]:
        """Return what META() says of the document."""
        if self.document is None:
            return {"id": self.key}
        return {
            "id": self.key,
            "cas": self.document.cas,
            "expiration": self.document.expiry,
            "flags": self.document.flags,
            "type": "json" if self.is_object or type_name(self.value) != "binary" else "base64",
        }


Evaluator = Callable[[Row, Parameters], Any]


@dataclass(frozen=True)
class Aggregate:
    """One aggregate of a projection: how to get a row's value, and what to make of all of them."""

    evaluate: Evaluator
    combine: Callable[[list[Any]], Any]


@dataclass
class Names:
    """What the names in an expression mean.

    Attributes:
        alias: What the FROM term is called, or None where there is none.
        results: Aliases of the projection, which ORDER BY may use.
        aggregates: The aggregates found so far, or None where there must not be any.
        grouped: Whether only aggregates may look at the row.
        parameters: The parameters found so far.
    """

    alias: str | None
    results: dict[str, Evaluator] = field(default_factory=dict)
    aggregates: list[Aggregate] | None = None
    grouped: bool = False
    parameters: set[str] = field(default_factory=set)


def compile_expression(node: exp.Expr, names: Names) -> Evaluator:
    """Return the function that evaluates a tree.

    Raises:
        QueryError: 3000 for a function that there is none of, or a name where nothing has names; 4210.
    """
    compiler = COMPILERS.get(type(node))
    if compiler is None:
        raise QueryError(SYNTAX, f"syntax error - {render(node)} is not an expression")
    return compiler(node, names)


# Names and paths


def _identifier(node: exp.Identifier, names: Names) -> Evaluator:
    name = node.name
    if name in names.results:
        return names.results[name]
    if names.alias is None:
        raise QueryError(SYNTAX, f"Ambiguous reference to field '{name}'")
    if names.grouped:
        raise QueryError(NOT_AGGREGATE, f"Expression {render(node)} must depend only on group keys or aggregates.")
    if name == names.alias:
        return lambda row, _: row.value

    def read(row: Row, _: Parameters) -> Any:
        value = row.value
        return value.get(name, MISSING) if type(value) is dict else MISSING

    return read


def _dot(node: exp.Dot, names: Names) -> Evaluator:
    name = node.expression.name
    if _is_meta(node.this):
        _check_meta(node.this, names)
        if name == "id":
            return lambda row, _: row.key
    inner = compile_expression(node.this, names)

    def read(row: Row, parameters: Parameters) -> Any:
        value = inner(row, parameters)
        if type(value) is dict:
            return value.get(name, MISSING)
        return MISSING

    return read


def _bracket(node: exp.Bracket, names: Names) -> Evaluator:
    inner = compile_expression(node.this, names)
    index = compile_expression(node.expressions[0], names)

    def read(row: Row, parameters: Parameters) -> Any:
        value, at = inner(row, parameters), index(row, parameters)
        if at is MISSING or value is MISSING:
            return MISSING
        if type(value) is list and is_number(at):
            if at == int(at) and -len(value) <= at < len(value):
                return value[int(at)]
            return MISSING
        if type(value) is dict and type(at) is str:
            return value.get(at, MISSING)
        return None

    return read


def _parameter(node: exp.Parameter, names: Names) -> Evaluator:
    name = node.this if isinstance(node.this, str) else node.this.name
    names.parameters.add(name)
    return lambda _, parameters: parameters[name]


# Constants and constructors


def _constant(node: exp.Expr, _: Names) -> Evaluator:
    value = constant(node)
    return lambda _row, _parameters: value


def _missing(node: exp.Var, _: Names) -> Evaluator:
    return lambda _row, _parameters: MISSING


def _array(node: exp.Array, names: Names) -> Evaluator:
    items = [compile_expression(item, names) for item in node.expressions]

    def build(row: Row, parameters: Parameters) -> Any:
        values = (item(row, parameters) for item in items)
        return [None if value is MISSING else value for value in values]

    return build


def _object(node: exp.Struct, names: Names) -> Evaluator:
    members = [(item.this.name, compile_expression(item.expression, names)) for item in node.expressions]

    def build(row: Row, parameters: Parameters) -> Any:
        values = ((name, member(row, parameters)) for name, member in members)
        return {name: value for name, value in values if value is not MISSING}

    return build


# Operators


def _binary(function: Callable[[Any, Any], Any]) -> Callable[[exp.Binary, Names], Evaluator]:
    """Return a compiler of a binary operator that evaluates both sides."""

    def compile_binary(node: exp.Binary, names: Names) -> Evaluator:
        left, right = compile_expression(node.this, names), compile_expression(node.expression, names)
        return lambda row, parameters: function(left(row, parameters), right(row, parameters))

    return compile_binary


def negate(value: Any) -> Any:
    """Return NOT of a value."""
    known = truth(value)
    return not known if known is True or known is False else known


def _and(node: exp.And, names: Names) -> Evaluator:
    terms = [compile_expression(term, names) for term in _flatten(node, exp.And)]

    def evaluate(row: Row, parameters: Parameters) -> Any:
        result: Any = True
        for term in terms:
            value = truth(term(row, parameters))
            if value is False:
                return False
            if value is MISSING or (value is None and result is True):
                result = value
        return result

    return evaluate


def _or(node: exp.Or, names: Names) -> Evaluator:
    terms = [compile_expression(term, names) for term in _flatten(node, exp.Or)]

    def evaluate(row: Row, parameters: Parameters) -> Any:
        result: Any = False
        for term in terms:
            value = truth(term(row, parameters))
            if value is True:
                return True
            if value is None or (value is MISSING and result is False):
                result = value
        return result

    return evaluate


def _flatten(node: exp.Expr, kind: type[exp.Expr]) -> list[exp.Expr]:
    """Return the terms of a chain of one associative operator, from left to right."""
    if not isinstance(node, kind):
        return [node]
    return _flatten(node.this, kind) + _flatten(node.expression, kind)


def conjuncts(node: exp.Expr | None) -> list[exp.Expr]:
    """Return the terms that must all be true for a condition to be."""
    return [] if node is None else _flatten(node, exp.And)


def disjuncts(node: exp.Expr) -> list[exp.Expr]:
    """Return the terms of which one must be true for a condition to be."""
    return _flatten(node, exp.Or)


def _not(node: exp.Not, names: Names) -> Evaluator:
    inner = compile_expression(node.this, names)
    return lambda row, parameters: negate(inner(row, parameters))


def _negative(node: exp.Neg, names: Names) -> Evaluator:
    inner = compile_expression(node.this, names)

    def evaluate(row: Row, parameters: Parameters) -> Any:
        value = inner(row, parameters)
        if is_number(value):
            return number(-value)
        return MISSING if value is MISSING else None

    return evaluate


STATES: dict[str, Callable[[Any], Any]] = {
    "NULL": lambda value: MISSING if value is MISSING else value is None,
    "MISSING": lambda value: value is MISSING,
    "VALUED": lambda value: value is not MISSING and value is not None,
    "KNOWN": lambda value: value is not MISSING and value is not None,
    "UNKNOWN": lambda value: value is MISSING or value is None,
}


def _is(node: exp.Is, names: Names) -> Evaluator:
    inner, test = compile_expression(node.this, names), STATES[node.expression.name]
    return lambda row, parameters: test(inner(row, parameters))


def contains(value: Any, array: Any) -> Any:
    """Return what ``value IN array`` is."""
    if value is MISSING or array is MISSING:
        return MISSING
    if type(array) is not list:
        return None
    outcomes = [equal(value, item) for item in array]
    if True in outcomes:
        return True
    return None if any(outcome is not False for outcome in outcomes) else False


def _in(node: exp.In, names: Names) -> Evaluator:
    left, right = compile_expression(node.this, names), compile_expression(node.args["field"], names)
    return lambda row, parameters: contains(left(row, parameters), right(row, parameters))


def _between(node: exp.Between, names: Names) -> Evaluator:
    inner, low, high = (compile_expression(node.args[part], names) for part in ("this", "low", "high"))

    def evaluate(row: Row, parameters: Parameters) -> Any:
        value = inner(row, parameters)
        below, above = less(value, low(row, parameters)), less(high(row, parameters), value)
        if below is True or above is True:
            return False
        if below is MISSING or above is MISSING:
            return MISSING
        return None if below is None or above is None else True

    return evaluate


def like(text: Any, pattern: Any) -> Any:
    """Return what ``text LIKE pattern`` is; it takes time in proportion to the product of the lengths, at worst."""
    known = unknown(text, pattern)
    if known is not True:
        return known
    if not isinstance(text, str) or not isinstance(pattern, str):
        return None
    parts = _pattern_parts(pattern)
    at, part = 0, 0
    retry_at, retry_part = 0, -1
    while at < len(text):
        if part < len(parts) and parts[part] == "%":
            retry_at, retry_part = at, part
            part += 1
        elif part < len(parts) and parts[part] in ("_", "\\" + text[at]):
            at, part = at + 1, part + 1
        elif retry_part >= 0:
            retry_at += 1
            at, part = retry_at, retry_part + 1
        else:
            return False
    return all(rest == "%" for rest in parts[part:])


def _pattern_parts(pattern: str) -> list[str]:
    """Split a pattern into ``%``, ``_`` and literal characters, which have a backslash before them."""
    parts = []
    characters = iter(pattern)
    for character in characters:
        if character == "\\":
            parts.append("\\" + next(characters, "\\"))
        else:
            parts.append(character if character in "%_" else "\\" + character)
    return parts


def _arithmetic(function: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    def calculate(left: Any, right: Any) -> Any:
        if left is MISSING or right is MISSING:
            return MISSING
        if not is_number(left) or not is_number(right):
            return None
        try:
            return number(function(left, right))
        except (ArithmeticError, ValueError):
            return None

    return calculate


def _concatenate(left: Any, right: Any) -> Any:
    if left is MISSING or right is MISSING:
        return MISSING
    return left + right if type(left) is str and type(right) is str else None


def _case(node: exp.Case, names: Names) -> Evaluator:
    subject = compile_expression(node.this, names) if node.this is not None else None
    branches = [
        (compile_expression(branch.this, names), compile_expression(branch.args["true"], names))
        for branch in node.args["ifs"]
    ]
    default = node.args.get("default")
    otherwise: Evaluator = compile_expression(default, names) if default is not None else lambda _row, _parameters: None

    def evaluate(row: Row, parameters: Parameters) -> Any:
        value = subject(row, parameters) if subject is not None else None
        for condition, result in branches:
            outcome = condition(row, parameters)
            if (truth(outcome) if subject is None else equal(value, outcome)) is True:
                return result(row, parameters)
        return otherwise(row, parameters)

    return evaluate


# Functions


def _text(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function whose first argument is a string: MISSING stays MISSING, another type makes NULL."""

    def call(first: Any, *others: Any) -> Any:
        if first is MISSING or any(other is MISSING for other in others):
            return MISSING
        return function(first, *others) if type(first) is str else None

    return call


def _substring(text: str, start: Any, length: Any = None) -> Any:
    if type(start) is not int or (length is not None and type(length) is not int):
        return None
    begin = start if start >= 0 else len(text) + start
    if begin < 0 or begin > len(text) or (length is not None and length < 0):
        return None
    return text[begin:] if length is None else text[begin : begin + length]


def _array_contains(array: Any, value: Any) -> Any:
    if array is MISSING or value is MISSING:
        return MISSING
    if type(array) is not list:
        return None
    return any(equal(item, value) is True for item in array)


def _array_length(array: Any) -> Any:
    return MISSING if array is MISSING else len(array) if type(array) is list else None


def _to_string(value: Any) -> Any:
    if value is MISSING or value is None or type(value) is str:
        return value
    return dump_json(value).decode() if type(value) in (bool, int, float) else None


def _first(unwanted: Callable[[Any], bool]) -> Callable[..., Any]:
    return lambda *values: next((value for value in values if not unwanted(value)), None)


def _is_nothing(value: Any) -> bool:
    return value is None or value is MISSING


FUNCTIONS: dict[str, tuple[int, int, Callable[..., Any]]] = {
    "LOWER": (1, 1, _text(str.lower)),
    "UPPER": (1, 1, _text(str.upper)),
    "LENGTH": (1, 1, _text(len)),
    "TRIM": (1, 1, _text(str.strip)),
    "CONTAINS": (2, 2, _text(lambda text, part: part in text if type(part) is str else None)),
    "SUBSTR": (2, 3, _text(_substring)),
    "TYPE": (1, 1, type_name),
    "TOSTRING": (1, 1, _to_string),
    "TO_STRING": (1, 1, _to_string),
    "ARRAY_LENGTH": (1, 1, _array_length),
    "ARRAY_CONTAINS": (2, 2, _array_contains),
    "IFMISSING": (2, 100, _first(lambda value: value is MISSING)),
    "IFNULL": (2, 100, _first(lambda value: value is None)),
    "IFMISSINGORNULL": (2, 100, _first(_is_nothing)),
    "COALESCE": (2, 100, _first(_is_nothing)),
}
"""Name: fewest and most arguments, and the function."""


def _numbers(values: Iterable[Any]) -> list[Any]:
    return [value for value in values if is_number(value)]


def _known(values: Iterable[Any]) -> list[Any]:
    return [value for value in values if not _is_nothing(value)]


def _sum(values: list[Any]) -> Any:
    numbers = _numbers(values)
    return number(sum(numbers)) if numbers else None


def _average(values: list[Any]) -> Any:
    numbers = _numbers(values)
    return number(sum(numbers) / len(numbers)) if numbers else None


def _array_aggregate(values: list[Any]) -> Any:
    return [value for value in values if value is not MISSING] or None


AGGREGATES: dict[str, Callable[[list[Any]], Any]] = {
    "COUNT": lambda values: len(_known(values)),
    "SUM": _sum,
    "AVG": _average,
    "MIN": lambda values: min(_known(values), key=sort_key, default=None),
    "MAX": lambda values: max(_known(values), key=sort_key, default=None),
    "ARRAY_AGG": _array_aggregate,
}


def _call(node: exp.Anonymous, names: Names) -> Evaluator:
    name = node.name
    if name == "META":
        _check_meta(node, names)
        return lambda row, _: row.meta()
    if name in AGGREGATES:
        return _aggregate(node, names)
    where = f"({node.meta.get('position', 'near line 1, column 1')})"
    if name not in FUNCTIONS:
        raise QueryError(SYNTAX, f"syntax error - Invalid function {name} {where}")
    fewest, most, function = FUNCTIONS[name]
    if any(isinstance(argument, exp.Star | exp.Distinct) for argument in node.expressions):
        raise QueryError(SYNTAX, f"syntax error - {name} is not an aggregate {where}")
    if not fewest <= len(node.expressions) <= most:
        count = str(fewest) if fewest == most else f"between {fewest} and {most}"
        raise QueryError(SYNTAX, f"Number of arguments to function {name} must be {count}. {where}")
    arguments = [compile_expression(argument, names) for argument in node.expressions]
    if len(arguments) == 1:
        only = arguments[0]
        return lambda row, parameters: function(only(row, parameters))
    return lambda row, parameters: function(*[argument(row, parameters) for argument in arguments])


def _aggregate(node: exp.Anonymous, names: Names) -> Evaluator:
    name = node.name
    if names.aggregates is None or not names.grouped:
        raise QueryError(SYNTAX, f"Aggregate {name} not available here")
    arguments = node.expressions
    distinct = bool(arguments) and isinstance(arguments[0], exp.Distinct)
    if distinct:
        arguments = arguments[0].expressions
    if len(arguments) != 1 or (isinstance(arguments[0], exp.Star) and name != "COUNT"):
        raise QueryError(SYNTAX, f"Number of arguments to function {name} must be 1.")
    evaluate: Evaluator
    if isinstance(arguments[0], exp.Star):
        evaluate = lambda _row, _parameters: 1  # noqa: E731 - the others are lambdas too
    else:
        inside = Names(names.alias, parameters=names.parameters)
        evaluate = compile_expression(arguments[0], inside)
    combine = AGGREGATES[name]
    if distinct:
        combine = _of_distinct(combine)
    position = len(names.aggregates)
    names.aggregates.append(Aggregate(evaluate, combine))
    return lambda row, _: row.aggregates[position]


def _of_distinct(combine: Callable[[list[Any]], Any]) -> Callable[[list[Any]], Any]:
    return lambda values: combine(list({identity(value): value for value in values}.values()))


def has_aggregate(node: exp.Expr | None) -> bool:
    """Say whether a tree calls an aggregate."""
    return node is not None and any(call.name in AGGREGATES for call in node.find_all(exp.Anonymous))


def _is_meta(node: exp.Expr) -> bool:
    return isinstance(node, exp.Anonymous) and node.name == "META"


def _check_meta(node: exp.Anonymous, names: Names) -> None:
    arguments = node.expressions
    named = len(arguments) == 1 and isinstance(arguments[0], exp.Identifier) and arguments[0].name == names.alias
    if names.alias is None or (arguments and not named):
        raise QueryError(SYNTAX, f"syntax error - {render(node)} must name a keyspace of FROM")
    if names.grouped:
        raise QueryError(NOT_AGGREGATE, f"Expression {render(node)} must depend only on group keys or aggregates.")


def is_document_id(node: exp.Expr) -> bool:
    """Say whether a tree is ``META().id``."""
    return isinstance(node, exp.Dot) and _is_meta(node.this) and node.expression.name == "id"


def canonical(node: exp.Expr, alias: str | None) -> str:
    """Return a text that two trees share when they say the same, one by the keyspace's `alias` and one without it."""

    def strip(part: exp.Expr) -> exp.Expr:
        if isinstance(part, exp.Dot) and isinstance(part.this, exp.Identifier) and part.this.name == alias:
            return cast(exp.Expr, part.expression)
        return exp.Anonymous(this="META") if _is_meta(part) else part

    return render(node.copy().transform(strip))


def depends_on_row(node: exp.Expr) -> bool:
    """Say whether the value of a tree may differ from row to row."""
    return any(node.find_all(exp.Identifier)) or any(map(_is_meta, node.find_all(exp.Anonymous)))


COMPILERS: dict[type[exp.Expr], Callable[[Any, Names], Evaluator]] = {
    exp.Identifier: _identifier,
    exp.Dot: _dot,
    exp.Bracket: _bracket,
    exp.Parameter: _parameter,
    exp.Literal: _constant,
    exp.Boolean: _constant,
    exp.Null: _constant,
    exp.Var: _missing,
    exp.Array: _array,
    exp.Struct: _object,
    exp.And: _and,
    exp.Or: _or,
    exp.Not: _not,
    exp.Neg: _negative,
    exp.EQ: _binary(equal),
    exp.NEQ: _binary(lambda left, right: negate(equal(left, right))),
    exp.LT: _binary(less),
    exp.LTE: _binary(lambda left, right: negate(less(right, left))),
    exp.GT: _binary(lambda left, right: less(right, left)),
    exp.GTE: _binary(lambda left, right: negate(less(left, right))),
    exp.Is: _is,
    exp.In: _in,
    exp.Between: _between,
    exp.Like: _binary(like),
    exp.Case: _case,
    exp.Add: _binary(_arithmetic(operator.add)),
    exp.Sub: _binary(_arithmetic(operator.sub)),
    exp.Mul: _binary(_arithmetic(operator.mul)),
    exp.Div: _binary(_arithmetic(operator.truediv)),
    exp.Mod: _binary(_arithmetic(math.fmod)),
    exp.DPipe: _binary(_concatenate),
    exp.Anonymous: _call,
}
