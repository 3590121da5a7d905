"""Plans of SELECT statements: which index gives the documents, what is kept of them, and what becomes of a row."""

import itertools
import json
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from sqlglot import exp

from tests.emulator.documents import Collection
from tests.emulator.sqlpp_dialect import Result, Select
from tests.emulator.sqlpp_errors import DUPLICATE_ALIAS, EVALUATION, INVALID_VALUE, SYNTAX, QueryError
from tests.emulator.sqlpp_expressions import (
    Evaluator,
    Names,
    Parameters,
    Row,
    canonical,
    compile_expression,
    conjuncts,
    depends_on_row,
    disjuncts,
    has_aggregate,
)
from tests.emulator.sqlpp_indexes import DOCUMENT_ID, Index, IndexCatalog, Path
from tests.emulator.sqlpp_request import Request, check_time
from tests.emulator.sqlpp_values import MISSING, dump_json, identity, is_encodable, is_number, sort_key, truth

ROWS_BETWEEN_PAUSES = 256
"""After so many rows a long query lets others run, and looks at the clock."""


@dataclass(frozen=True, slots=True)
class QueryResult:
    """What a request got.

    Attributes:
        rows: Each one JSON.
        signature: The types of the results, as far as the server says them.
        prepared: The name that the statement was prepared under, where that was asked for along with its rows.
        sort_count: How many rows were sorted.
    """

    rows: list[bytes]
    signature: Any = None
    prepared: str | None = None
    sort_count: int = 0


# How documents are got


@dataclass(frozen=True)
class Access:
    """How a plan gets at its documents' ids.

    Attributes:
        index: The index that is looked into, None for USE KEYS and for no documents at all.
        values: Gives the values of the leading key to look up; None to take all that is in the index.
        covered: The term of WHERE that the lookup makes true by itself.
        cost: The lower, the better.
    """

    index: Index | None = None
    values: Callable[[Parameters], Iterable[Any]] | None = None
    covered: exp.Expr | None = None
    cost: int = 0


NOWHERE = Row("", None, None)
"""The row that constants are evaluated on."""
EQUALITY, MEMBERSHIP, SPAN, EVERYTHING = range(4)


def choose_access(indexes: Iterable[Index], where: exp.Expr | None, alias: str) -> Access | None:
    """Return the cheapest way by any of the indexes, or None if none of them helps.

    A primary index always does. A secondary one does when a term of WHERE constrains its leading key, and WHERE has all
    the terms of the index's own condition.
    """
    terms = conjuncts(where)
    texts = {canonical(term, alias) for term in terms}
    best: Access | None = None
    for index in indexes:
        if not index.condition <= texts:
            continue
        candidates = [Access(index, cost=EVERYTHING)] if index.is_primary else []
        candidates += filter(None, (_access(index, term, alias) for term in terms))
        for candidate in candidates:
            if best is None or candidate.cost < best.cost:
                best = candidate
    return best


def _access(index: Index, term: exp.Expr, alias: str) -> Access | None:
    """Return how `index` helps with one term of WHERE, or None."""

    def is_key(node: exp.Expr) -> bool:
        return canonical(node, alias) == index.leading_key

    if isinstance(term, exp.EQ):
        for key, value in ((term.this, term.expression), (term.expression, term.this)):
            if is_key(key) and not depends_on_row(value):
                return Access(index, _only(compile_expression(value, Names(None))), term, EQUALITY)
    if isinstance(term, exp.In) and is_key(term.this) and not depends_on_row(term.args["field"]):
        members = compile_expression(term.args["field"], Names(None))

        def values(parameters: Parameters) -> Iterable[Any]:
            found = members(NOWHERE, parameters)
            return found if type(found) is list else ()

        return Access(index, values, term, MEMBERSHIP)
    return Access(index, cost=SPAN) if _is_span(term, is_key) else None


def _only(evaluate: Evaluator) -> Callable[[Parameters], Iterable[Any]]:
    return lambda parameters: (evaluate(NOWHERE, parameters),)


def _is_span(term: exp.Expr, is_key: Callable[[exp.Expr], bool]) -> bool:
    """Say whether a term is true only of documents that have the key."""
    if isinstance(term, exp.Or):
        return all(_is_span(part, is_key) for part in disjuncts(term))
    if isinstance(term, exp.And):
        return any(_is_span(part, is_key) for part in conjuncts(term))
    if isinstance(term, exp.EQ | exp.LT | exp.LTE | exp.GT | exp.GTE):
        sides = (term.this, term.expression)
        return any(is_key(key) and not depends_on_row(other) for key, other in (sides, sides[::-1]))
    if isinstance(term, exp.Between | exp.Like | exp.In):
        others = (part for name, part in term.args.items() if name != "this" and part is not None)
        return is_key(term.this) and not any(map(depends_on_row, others))
    states = ("NULL", "VALUED", "KNOWN")
    if isinstance(term, exp.Not):
        term, states = term.this, ("MISSING", "NULL", "UNKNOWN")
    return isinstance(term, exp.Is) and term.expression.name in states and is_key(term.this)


# What becomes of a row


@dataclass(frozen=True)
class Member:
    """One member of a result: a name and a value, or with no name all members of an object."""

    name: str | None
    evaluate: Evaluator


class Projection:
    """Makes results of rows."""

    def __init__(self, select: Select, alias: str | None, names: Names) -> None:
        """Compile the terms of a projection; raises QueryError."""
        self._raw: Evaluator | None = None
        self._members: list[Member] = []
        self._whole: bytes | None = None
        self.aliases: dict[str, Evaluator] = {}
        if select.raw:
            expression = select.results[0].expression
            assert expression is not None
            self._raw = compile_expression(expression, names)
            self.signature: Any = "json"
        else:
            self._add_members(select.results, alias, names)
            names_and_types = zip(select.results, self._members, strict=True)
            self.signature = {
                "*" if result.star else member.name: "*" if result.star else "json"
                for result, member in names_and_types
            }
        self.encode = self._choose_encoder(select, alias, names)

    def _add_members(self, results: Sequence[Result], alias: str | None, names: Names) -> None:
        unnamed = itertools.count(1)
        taken = set()
        for result in results:
            node = result.expression
            if node is None:
                if alias is None:
                    raise QueryError(SYNTAX, "syntax error - * needs a FROM clause")
                node = exp.Identifier(this=alias, quoted=True)
            name = None
            if result.expression is None or not result.star:
                name = result.alias or _implicit_alias(node) or f"${next(unnamed)}"
                if name in taken:
                    raise QueryError(DUPLICATE_ALIAS, f"Duplicate result alias {name}.")
                taken.add(name)
            evaluate = compile_expression(node, names)
            self._members.append(Member(name, evaluate))
            if result.alias:
                self.aliases[result.alias] = evaluate

    def _choose_encoder(self, select: Select, alias: str | None, names: Names) -> Callable[[Row, Parameters], bytes]:
        """Return what makes JSON of a row; a whole document's own bytes are it wherever they can be."""
        only = select.results[0]
        node = only.expression
        is_whole = node is None or (isinstance(node, exp.Identifier) and node.name == alias)
        if alias is None or len(select.results) > 1 or names.grouped or not is_whole:
            return lambda row, parameters: dump_json(self.value(row, parameters))
        if select.raw:
            return lambda row, _: row.json()
        if only.star and only.expression is not None:
            return lambda row, _: row.json() if row.is_object or type(row.value) is dict else b"{}"
        name = json.dumps(self._members[0].name).encode()
        return lambda row, _: b"{%b:%b}" % (name, row.json())

    def value(self, row: Row, parameters: Parameters) -> Any:
        """Return the result as a value."""
        if self._raw is not None:
            return self._raw(row, parameters)
        result: dict[str, Any] = {}
        for member in self._members:
            value = member.evaluate(row, parameters)
            if member.name is not None:
                if value is not MISSING:
                    result[member.name] = value
            elif type(value) is dict:
                result |= value
        return result


def _implicit_alias(node: exp.Expr) -> str | None:
    """Return what a result without an alias is called: the last name of a path, and nothing for anything else."""
    if isinstance(node, exp.Identifier):
        return str(node.name)
    return str(node.expression.name) if isinstance(node, exp.Dot) else None


class SelectPlan:
    """A SELECT statement that is ready to run, any number of times."""

    def __init__(
        self,
        select: Select,
        alias: str | None,
        source: "Source",
        access: Access,
        version: int,
    ) -> None:
        """Compile every expression of the statement; raises QueryError."""
        self.source = source
        self.access = access
        self.version = version
        names = Names(alias)
        constants = Names(None, parameters=names.parameters)
        terms = [term for term in conjuncts(select.where) if term is not access.covered]
        self._filters = [compile_expression(term, names) for term in terms]
        if select.where is not None:
            compile_expression(select.where, names)  # for the parameters, among them those of the covered term
        self._keys = None
        if select.use_keys is not None:
            self._keys = compile_expression(select.use_keys, constants)
        grouped = any(has_aggregate(result.expression) for result in select.results)
        result_names = Names(alias, parameters=names.parameters, grouped=grouped)
        result_names.aggregates = [] if grouped else None
        self.projection = Projection(select, alias, result_names)
        self._aggregates = result_names.aggregates
        self._distinct = select.distinct
        result_names.results = self.projection.aliases
        self._sort = [(compile_expression(term.expression, result_names), term.descending) for term in select.order_by]
        if access.index is not None and select.order_by:
            first = select.order_by[0]
            if canonical(first.expression, alias) == DOCUMENT_ID and not first.descending:
                self._sort = []  # Every index gives its documents in this order; ids differ, so no other term matters.
        self._limit = None if select.limit is None else compile_expression(select.limit, constants)
        self._offset = None if select.offset is None else compile_expression(select.offset, constants)
        self.parameters = frozenset(names.parameters)

    def run(self, request: Request) -> Generator[None, None, QueryResult]:
        """Run the plan, pausing now and then.

        Raises:
            QueryError: 5010 if a parameter is missing, 5030 for a bad LIMIT or OFFSET, 1080 if time is up.
        """
        parameters = request.parameters
        for name in self.parameters:
            if name not in parameters:
                kind = "positional" if name.isdigit() else "named"
                raise QueryError(EVALUATION, f"Error evaluating filter - cause: No value for {kind} parameter ${name}.")
        offset = _count("OFFSET", self._offset, parameters) or 0
        limit = _count("LIMIT", self._limit, parameters)
        stop = None if limit is None else offset + limit
        rows: list[Row] = []
        sort_count = 0
        takes_all = bool(self._sort) or self._distinct or self._aggregates is not None
        if stop != 0 or self._aggregates is not None:
            for row in self._matching(request):
                if row is None:
                    yield
                    continue
                rows.append(row)
                if not takes_all and stop is not None and len(rows) >= stop:
                    break
        if self._aggregates is not None:
            rows = [self._aggregate(rows, parameters)]
        if self._sort:
            sort_count = len(rows)
            for evaluate, descending in reversed(self._sort):
                rows.sort(key=lambda row: sort_key(evaluate(row, parameters)), reverse=descending)
        if self._distinct:
            rows = self._without_duplicates(rows, parameters)
        results = []
        for count, row in enumerate(rows[offset:stop], 1):
            results.append(self.projection.encode(row, parameters))
            if count % ROWS_BETWEEN_PAUSES == 0:
                check_time(request)
                yield
        return QueryResult(results, self.projection.signature, None, sort_count)

    def _matching(self, request: Request) -> Iterator[Row | None]:
        """Yield the rows that meet WHERE, and None for a pause."""
        parameters = request.parameters
        filters = self._filters
        check_time(request)
        for count, row in enumerate(self.source.rows(self._ids(parameters), self.access), 1):
            if count % ROWS_BETWEEN_PAUSES == 0:
                check_time(request)
                yield None
            for condition in filters:
                outcome = condition(row, parameters)
                if outcome is not True and truth(outcome) is not True:
                    break
            else:
                yield row

    def _ids(self, parameters: Parameters) -> Sequence[str]:
        if self._keys is not None:
            keys = self._keys(NOWHERE, parameters)
            keys = keys if type(keys) is list else [keys]
            return [key for key in keys if type(key) is str and is_encodable(key)]
        index, values = self.access.index, self.access.values
        if index is None:
            return ()
        if values is None:
            return index.ids()
        known = (value for value in values(parameters) if value is not None and value is not MISSING)
        found = [index.find(value) for value in {identity(value): value for value in known}.values()]
        # A copy, since the list of the index may change during a pause.
        return list(found[0]) if len(found) == 1 else sorted(itertools.chain.from_iterable(found))

    def _aggregate(self, rows: list[Row], parameters: Parameters) -> Row:
        result = Row("", None, None)
        result.aggregates = [
            aggregate.combine([aggregate.evaluate(row, parameters) for row in rows])
            for aggregate in self._aggregates or ()
        ]
        return result

    def _without_duplicates(self, rows: list[Row], parameters: Parameters) -> list[Row]:
        first: dict[Any, Row] = {}
        for row in rows:
            first.setdefault(identity(self.projection.value(row, parameters)), row)
        return list(first.values())

    def describe(self) -> dict[str, Any]:
        """Return the plan as EXPLAIN shows it."""
        index = self.access.index
        scan: dict[str, Any] = {"#operator": "DummyScan"}
        if self._keys is not None:
            scan = {"#operator": "KeyScan"}
        elif index is not None:
            operator = "PrimaryScan3" if index.is_primary and self.access.values is None else "IndexScan3"
            scan = {"#operator": operator, "index": index.name, "index_id": index.id, "using": "gsi"}
        operators = [scan, {"#operator": "Fetch"}, {"#operator": "Filter"}, {"#operator": "InitialProject"}]
        if self._sort:
            operators.append({"#operator": "Order"})
        return {"#operator": "Sequence", "~children": operators}


def _count(clause: str, evaluate: Evaluator | None, parameters: Parameters) -> int | None:
    """Return what LIMIT or OFFSET comes to; raises QueryError 5030 for what is no number."""
    if evaluate is None:
        return None
    value = evaluate(NOWHERE, parameters)
    if not is_number(value) or value != int(value):
        shown = "missing" if value is MISSING else dump_json(value).decode()
        raise QueryError(INVALID_VALUE, f"Invalid {clause} value {shown}")
    return max(0, int(value))


@dataclass(frozen=True)
class Source:
    """Where rows come from: a collection, the catalog of indexes, or nowhere (which makes one empty row)."""

    path: Path | None = None
    collection: Collection | None = None
    catalog: IndexCatalog | None = None

    def rows(self, ids: Sequence[str], access: Access) -> Iterator[Row]:
        """Yield the rows of the documents of these ids, leaving out those that are gone."""
        if self.collection is not None:
            index = access.index if access.index is not None and access.index.objects_only else None
            get = self.collection.get
            for key in ids:
                document = get(key)
                if document is not None:
                    # The index is asked again, for a document may have become something else during a pause.
                    yield Row(key, document, is_object=index is not None and key in index)
        elif self.catalog is not None:
            yield from self.catalog.rows()
        else:
            yield Row("", None, None)
