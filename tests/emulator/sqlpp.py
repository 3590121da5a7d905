"""The query engine: plans SQL++ statements and runs them on the emulator's documents.

A request goes through four stages: its members are checked (``sqlpp_request``), its text becomes a statement
(``sqlpp_dialect``), the statement becomes a plan (``sqlpp_plan``: which index, which functions of a row), and the plan
runs. Statements and plans are kept by their text, so that a lookup that ran before costs no more than running it.
"""

import base64
import json
import logging
import uuid
from collections import OrderedDict
from collections.abc import Generator, Mapping
from typing import Any

from tests.emulator.documents import Cluster, Collection
from tests.emulator.sqlpp_dialect import (
    Change,
    CreateIndex,
    DropIndex,
    Execute,
    Explain,
    KeyspaceName,
    Prepare,
    Runnable,
    Select,
    parse_statement,
)
from tests.emulator.sqlpp_errors import (
    INTERNAL,
    KEYSPACE_NOT_FOUND,
    NAMESPACE_NOT_FOUND,
    NO_INDEX,
    PREPARED_NAME,
    READ_ONLY,
    SCOPE_NOT_FOUND,
    SYNTAX,
    UNKNOWN_PREPARED,
    QueryError,
    not_supported,
)
from tests.emulator.sqlpp_indexes import IndexCatalog, Path
from tests.emulator.sqlpp_plan import Access, QueryResult, SelectPlan, Source, choose_access
from tests.emulator.sqlpp_request import NAMESPACE, Request, check_request, parse_context
from tests.emulator.sqlpp_values import dump_json
from tests.emulator.users import Privilege

__all__ = ["QueryEngine", "QueryError", "QueryResult"]

log = logging.getLogger(__name__)

CACHED_PLANS = 512
MAX_PREPARED = 4096
READ_ONLY_MESSAGE = "The server or request is read-only and cannot accept this write statement."


class QueryEngine:
    """Runs requests on a cluster's documents; `indexes` are the indexes that there are."""

    def __init__(self, cluster: Cluster) -> None:
        """Start without indexes, and with nothing prepared."""
        self.indexes = IndexCatalog(cluster)
        self._cluster = cluster
        self._plans: OrderedDict[tuple[str, str], SelectPlan] = OrderedDict()
        self._prepared: OrderedDict[tuple[str, str], str] = OrderedDict()

    def execute(self, request: Mapping[str, Any]) -> QueryResult:
        """Run a request to its end, without pauses.

        Args:
            request: The members of a request's JSON body.

        Raises:
            QueryError: Whatever goes wrong, the unexpected too (5000).
        """
        steps = self.steps(request)
        while True:
            try:
                next(steps)
            except StopIteration as done:
                result: QueryResult = done.value
                return result

    def steps(self, request: Mapping[str, Any]) -> Generator[None, None, QueryResult]:
        """Run a request, yielding now and then so that others may run; raises QueryError as ``execute`` does."""
        try:
            return (yield from self._run(check_request(request)))
        except QueryError:
            raise
        except Exception as error:
            log.exception("a query failed unexpectedly")
            raise QueryError(INTERNAL, f"Unexpected {type(error).__name__}: {error}") from error

    def needs(self, request: Mapping[str, Any]) -> tuple[Privilege, tuple[str, ...]] | None:
        """Return what a request takes a role for, and for which keyspace; None: any user may.

        Raises:
            QueryError: Whatever is wrong with the request, as for ``execute``.
        """
        checked = check_request(request)
        text = checked.text
        if text is None:
            text = self._find_prepared(checked.prepared or "", checked.context)
        statement = parse_statement(text)
        if isinstance(statement, Execute):
            statement = parse_statement(self._find_prepared(statement.name, checked.context))
        if isinstance(statement, (Prepare, Explain)):
            statement = statement.statement
        if isinstance(statement, Explain):
            statement = statement.statement
        if isinstance(statement, Select):
            keyspace = statement.keyspace
            if keyspace is None or keyspace.namespace == "system":
                return None
            return Privilege.SELECT, self._resolve(keyspace, checked.context)[0]
        if isinstance(statement, Change):
            return Privilege.WRITE, ()
        assert not isinstance(statement, (Execute, Prepare))  # which cannot be prepared
        return Privilege.INDEX, self._resolve(statement.keyspace, checked.context)[0]

    def _run(self, request: Request) -> Generator[None, None, QueryResult]:
        text = request.text
        if text is None:
            text = self._find_prepared(request.prepared or "", request.context)
        plan = self._cached_plan(text, request.context)
        if plan is not None:
            return (yield from plan.run(request))
        statement = parse_statement(text)
        if isinstance(statement, Execute):
            text = self._find_prepared(statement.name, request.context)
            statement = parse_statement(text)
        if isinstance(statement, Prepare):
            return (yield from self._prepare(statement, request))
        assert not isinstance(statement, Execute)  # which cannot be prepared
        return (yield from self._run_statement(text, statement, request))

    def _run_statement(self, text: str, statement: Runnable, request: Request) -> Generator[None, None, QueryResult]:
        if isinstance(statement, Select):
            return (yield from self._plan(text, statement, request.context).run(request))
        if isinstance(statement, Explain):
            plan = self._plan(statement.text, statement.statement, request.context)
            return QueryResult([dump_json({"plan": plan.describe(), "text": statement.text})], "json")
        if request.readonly:
            raise QueryError(READ_ONLY, READ_ONLY_MESSAGE)
        if isinstance(statement, Change):
            raise not_supported(statement.verb)
        path, collection = self._resolve(statement.keyspace, request.context)
        if isinstance(statement, CreateIndex):
            self.indexes.create(path, collection, statement)
        elif isinstance(statement, DropIndex):
            self.indexes.drop(path, collection, statement.name, if_exists=statement.if_exists)
        else:
            names = statement.names
            if isinstance(names, Select):
                found = yield from self._make_plan(names, request.context).run(request)
                names = tuple(str(json.loads(row)) for row in found.rows)
            self.indexes.build(path, collection, names)
        return QueryResult([])

    # Prepared statements

    def _prepare(self, prepare: Prepare, request: Request) -> Generator[None, None, QueryResult]:
        statement, text = prepare.statement, prepare.text
        signature = None
        if isinstance(statement, Select):
            plan = self._plan(text, statement, request.context)
            signature = plan.projection.signature
        elif request.readonly and not isinstance(statement, Explain):
            raise QueryError(READ_ONLY, READ_ONLY_MESSAGE)
        name = prepare.name or str(uuid.uuid5(uuid.NAMESPACE_OID, f"{request.context}\0{text}"))
        key = (name, request.context)
        if self._prepared.get(key, text) != text and not prepare.force:
            raise QueryError(PREPARED_NAME, f"Unable to add name: duplicate name: {name}")
        _remember(self._prepared, key, text, MAX_PREPARED)
        if request.auto_execute:
            result = yield from self._run_statement(text, statement, request)
            return QueryResult(result.rows, result.signature, name, result.sort_count)
        row = {
            "encoded_plan": base64.b64encode(text.encode("utf-8", "surrogatepass")).decode(),
            "indexApiVersion": 4,
            "name": name,
            "namespace": NAMESPACE,
            "queryContext": request.context,
            "signature": signature,
            "text": text,
        }
        return QueryResult([dump_json(row)], "json")

    def forget_prepared(self) -> None:
        """Forget all prepared statements; who wants to execute one gets error 4040 until he prepares it again."""
        self._prepared.clear()

    def _find_prepared(self, name: str, context: str) -> str:
        text = self._prepared.get((name, context))
        if text is None:
            where = f", context: {context or 'unset'}"
            raise QueryError(UNKNOWN_PREPARED, f"No such prepared statement: {name}{where}")
        self._prepared.move_to_end((name, context))
        return text

    # Plans

    def _cached_plan(self, text: str, context: str) -> SelectPlan | None:
        """Return the plan of a text that ran before, if indexes and keyspaces are still as they were then."""
        plan = self._plans.get((text, context))
        if plan is None or plan.version != self.indexes.version:
            return None
        source = plan.source
        if source.path is not None:
            try:
                if self._cluster.keyspace(*source.path) is not source.collection:
                    return None
            except KeyError:
                return None
        self._plans.move_to_end((text, context))
        return plan

    def _plan(self, text: str, statement: Select, context: str) -> SelectPlan:
        plan = self._cached_plan(text, context)
        if plan is None:
            plan = self._make_plan(statement, context)
            _remember(self._plans, (text, context), plan, CACHED_PLANS)
        return plan

    def _make_plan(self, select: Select, context: str) -> SelectPlan:
        """Decide how to run a SELECT.

        Raises:
            QueryError: 12003 and 12021 where there is no such keyspace, 4000 if no index helps.
        """
        version = self.indexes.version
        keyspace = select.keyspace
        if keyspace is None:
            return SelectPlan(select, None, Source(), Access(), version)
        alias = select.alias or keyspace.parts[-1]
        if keyspace.namespace == "system":
            if keyspace.parts != ("indexes",):
                name = f"system:{'.'.join(keyspace.parts)}"
                raise QueryError(KEYSPACE_NOT_FOUND, f"Keyspace not found in CB datastore: {name}")
            return SelectPlan(select, alias, Source(catalog=self.indexes), Access(), version)
        path, collection = self._resolve(keyspace, context)
        access: Access | None = Access()
        if select.use_keys is None:
            access = choose_access(self.indexes.of(path, collection).online(), select.where, alias)
        if access is None:
            name = f"{NAMESPACE}:" + ".".join(f"`{part}`" for part in path)
            raise QueryError(
                NO_INDEX,
                f"No index available on keyspace {name} that matches your query. Use CREATE PRIMARY INDEX ON {name} to "
                "create a primary index, or check that your expected index is online.",
            )
        return SelectPlan(select, alias, Source(path, collection), access, version)

    def _resolve(self, keyspace: KeyspaceName, context: str) -> tuple[Path, Collection]:
        """Return the collection that a name means; raises QueryError 12002, 12003 or 12021 where there is none."""
        parts = keyspace.parts
        if keyspace.namespace not in (None, NAMESPACE):
            raise QueryError(NAMESPACE_NOT_FOUND, f"Namespace not found in CB datastore: {keyspace.namespace}")
        within = parse_context(context) if context and keyspace.namespace is None else None
        if len(parts) == 1:
            parts = (*within, *parts) if within else (*parts, "_default", "_default")
        if len(parts) != 3:
            raise QueryError(SYNTAX, f"Invalid path specified: {'.'.join(parts)} has the wrong number of parts")
        bucket, scope, collection = parts
        path = (bucket, scope, collection)
        try:
            return path, self._cluster.keyspace(*path)
        except KeyError:
            pass
        full = f"{NAMESPACE}:{'.'.join(path)}"
        found = self._cluster.buckets.get(bucket)
        if found is not None and scope not in found.scopes:
            raise QueryError(SCOPE_NOT_FOUND, f"Scope not found in CB datastore: {NAMESPACE}:{bucket}.{scope}")
        cause = "" if found is not None else f" - cause: No bucket named {bucket}"
        raise QueryError(KEYSPACE_NOT_FOUND, f"Keyspace not found in CB datastore: {full}{cause}")


def _remember(cache: OrderedDict[Any, Any], key: Any, value: Any, most: int) -> None:
    """Put something into a cache as its newest, and drop the oldest when it is full."""
    cache[key] = value
    cache.move_to_end(key)
    if len(cache) > most:
        cache.popitem(last=False)
