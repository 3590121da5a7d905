"""The query engine: what each statement of the table (``statements.py``) does with the emulator's documents."""

import json
import uuid
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from tests.emulator.documents import AlreadyExistsError, Cluster, Collection
from tests.emulator.indexes import Index, members_of
from tests.emulator.query_errors import (
    INDEX_EXISTS,
    INDEX_NOT_FOUND,
    KEYSPACE_NOT_FOUND,
    MISSING_VALUE,
    NO_INDEX,
    NO_ROLE,
    NOT_SUPPORTED,
    SCOPE_NOT_FOUND,
    UNKNOWN_PREPARED,
    QueryError,
)
from tests.emulator.statements import NAME, QUOTED, Found, Statement, find_statement, tokens
from tests.emulator.users import Path, Privilege

RELEASES = ("7.2", "7.6")
"""The releases it can play: before 7.6 there were no sequential scans."""
DEFERRED = "defer_build"
ROLES = {Privilege.SELECT: "query_select", Privilege.INDEX: "query_manage_index"}
"""The role that would do, for the message."""

May = Callable[[Privilege, Path], bool]
"""Says whether the user may do something with a collection."""


class Result(NamedTuple):
    """Rows, each as JSON, and the name of the statement where it was prepared."""

    rows: list[bytes]
    prepared: str | None = None


class Query(NamedTuple):
    """One statement that is to run: with its request's members, on a collection, for a user."""

    found: Found
    request: Mapping[str, Any]
    path: Path
    collection: Collection
    may: May

    def parameter(self, name: str, kind: type) -> Any:
        """Return a named parameter; raises QueryError 1020 where it is not of this type."""
        value = self.request.get(f"${name}")
        if type(value) is not kind:
            raise QueryError(NOT_SUPPORTED, f"not known to the emulator: ${name} other than of type {kind.__name__}")
        return value


class QueryEngine:
    """Runs statements on a cluster's documents; the methods without an underscore but `run` are its actions."""

    def __init__(self, cluster: Cluster, release: str = RELEASES[-1]) -> None:
        """Start with nothing prepared, as one of ``RELEASES``."""
        self._cluster = cluster
        self._scans = release != "7.2"
        self._prepared: dict[tuple[str, str], str] = {}

    def run(self, request: Mapping[str, Any], may: May) -> Result:
        """Run the statement of a request (the members of its JSON body) for a user; raises QueryError."""
        context = str(request.get("query_context", ""))
        text, name = request.get("statement"), request.get("prepared")
        execute = text is None and name is not None
        if execute:
            text = self._prepared.get((str(name), context))
            if text is None:
                where = f"context: {context or 'unset'}"
                raise QueryError(UNKNOWN_PREPARED, f"No such prepared statement: {name}, {where}")
        if not isinstance(text, str):
            raise QueryError(MISSING_VALUE, "No statement or prepared value")
        found = find_statement(text)
        if found.statement.collection is None:
            return Result(list(getattr(self, found.statement.action)(found, request, may)))
        path, collection = self._keyspace(found.statement, context)
        privilege = found.statement.privilege
        if privilege is not None and not may(privilege, path):
            target = ":".join(path)
            raise QueryError(
                NO_ROLE,
                f"User does not have credentials to run {privilege.name} queries on {target}. "
                f"Add role {ROLES[privilege]} on {target} to allow the statement to run.",
            )
        if found.prepare and not execute and request.get("auto_execute") is not True:
            raise QueryError(NOT_SUPPORTED, "not known to the emulator: PREPARE without auto_execute")
        rows = list(getattr(self, found.statement.action)(Query(found, request, path, collection, may)))
        if not found.prepare or execute:
            return Result(rows)
        prepared = str(uuid.uuid5(uuid.NAMESPACE_OID, f"{context}\0{text}"))
        self._prepared[prepared, context] = text
        return Result(rows, prepared)

    def forget_prepared(self) -> None:
        """Forget all prepared statements; who wants to execute one gets error 4040 until he prepares it again."""
        self._prepared.clear()

    # ---- documents ----

    def look_up(self, query: Query) -> list[bytes]:
        """Return the documents as they are stored, a page of them."""
        limit, offset = query.parameter("limit", int), query.parameter("offset", int)
        documents = query.collection.documents
        return [documents[key].value for key in self._keys(query)[offset : offset + limit]]

    def record_ids(self, query: Query) -> Iterator[bytes]:
        """Yield the documents' member of that name; null where there is none."""
        for key in self._keys(query):
            yield json.dumps(members_of(query.collection.documents[key].value).get("record_id")).encode()

    def by_key(self, query: Query) -> Iterator[bytes]:
        """Yield the document of that key, or its token."""
        document = query.collection.documents.get(query.found.given["text"].encode())
        if document is not None:
            whole = "t.token" not in query.found.statement.text
            yield document.value if whole else json.dumps(members_of(document.value).get("token")).encode()

    def _keys(self, query: Query) -> list[bytes]:
        """Return the keys of the documents that have the text, in order.

        Raises:
            QueryError: Without a usable index: 4000 before release 7.6, from then on 13014 for a user who may not scan.
        """
        field, value = query.found.given["field"], query.parameter("value", str)
        for index in query.collection.indexes.values():
            if index.field == field and index.online:
                return index.find(value)
        if not self._scans:
            keyspace = "default:" + ".".join(f"`{part}`" for part in query.path)
            raise QueryError(
                NO_INDEX,
                f"No index available on keyspace {keyspace} that matches your query. Use CREATE PRIMARY INDEX ON "
                f"{keyspace} to create a primary index, or check that your expected index is online.",
            )
        if not query.may(Privilege.SCAN, query.path):  # real engine 7.6.6
            raise QueryError(
                NO_ROLE,
                "User does not have credentials to use sequential scans. Add role query_use_sequential_scans on "
                f"{':'.join(query.path)} to allow the statement to run.",
            )
        documents = query.collection.documents.items()
        return sorted(key for key, document in documents if members_of(document.value).get(field) == value)

    # ---- indexes ----

    def create(self, query: Query) -> list[bytes]:
        """Make an index; raises QueryError 4300 where there is one of that name, unless that is no harm."""
        given, text = query.found.given, query.found.statement.text
        try:
            query.collection.add_index(Index(given["index"], given["member"]), online=DEFERRED not in text)
        except AlreadyExistsError as error:
            if "IF NOT EXISTS" not in text:
                raise QueryError(INDEX_EXISTS, f"The index {error} already exists.") from None
        return []

    def build(self, query: Query) -> list[bytes]:
        """Bring a deferred index online; raises QueryError 12016 where there is none of that name."""
        query.collection.build_index(_index(query))
        return []

    def drop(self, query: Query) -> list[bytes]:
        """Drop an index; raises QueryError 12016 where there is none of that name."""
        del query.collection.indexes[_index(query).name]
        return []

    # ---- system:indexes ----

    def index_names(self, found: Found, _request: Mapping[str, Any], may: May) -> Iterator[bytes]:
        """Yield the names of the indexes that have a name, or are of a collection."""
        member = "name" if "WHERE name" in found.statement.text else "keyspace_id"
        return (json.dumps(row["name"]).encode() for row in self._listed(may) if row[member] == found.given["text"])

    def index_rows(self, _found: Found, request: Mapping[str, Any], may: May) -> Iterator[bytes]:
        """Yield the whole rows of a collection's indexes, by name."""
        names = {"bucket_id": "$bucket_name", "scope_id": "$scope_name", "keyspace_id": "$collection_name"}
        for row in sorted(self._listed(may), key=lambda row: str(row["name"])):
            if all(row[member] == request.get(name) for member, name in names.items()):
                yield json.dumps(row).encode()

    def _listed(self, may: May) -> Iterator[dict[str, Any]]:
        """Yield what ``system:indexes`` holds of the collections that the user may query.

        The members are those of the documentation ("Getting System Information"). The SDK ends its whole process on a
        row without ``using``.
        """
        for bucket in self._cluster.buckets.values():
            for scope in bucket.scopes.values():
                for collection in scope.collections.values():
                    if may(Privilege.SELECT, (bucket.name, scope.name, collection.name)):
                        for index in collection.indexes.values():
                            yield {
                                "bucket_id": bucket.name,
                                "datastore_id": "http://127.0.0.1:8091",
                                "id": index.id,
                                "index_key": [f"`{index.field}`"],
                                "keyspace_id": collection.name,
                                "name": index.name,
                                "namespace_id": "default",
                                "scope_id": scope.name,
                                "state": "online" if index.online else "deferred",
                                "using": "gsi",
                            }

    # ---- names ----

    def _keyspace(self, statement: Statement, context: str) -> tuple[Path, Collection]:
        """Return the collection that a statement means in a query context such as ``default:bucket.scope``.

        Raises:
            QueryError: 12003 where there is no such bucket or collection, 12021 for the scope.
        """
        names = [token.text for token in tokens(context.removeprefix("default:")) if token.kind in (NAME, QUOTED)]
        path = (*names, str(statement.collection))
        full = "default:" + ".".join(path)
        bucket, scope, collection = path if len(path) == 3 else ("", "", "")
        try:
            return path, self._cluster.keyspace(bucket, scope, collection)
        except KeyError:
            pass
        found = self._cluster.buckets.get(bucket)
        if found is not None and scope not in found.scopes:
            raise QueryError(SCOPE_NOT_FOUND, f"Scope not found in CB datastore: default:{bucket}.{scope}")
        raise QueryError(KEYSPACE_NOT_FOUND, f"Keyspace not found in CB datastore: {full}")


def _index(query: Query) -> Index:
    """Return the index that a statement names, or raise QueryError 12016."""
    name = query.found.given["index"]
    index = query.collection.indexes.get(name)
    if index is None:
        raise QueryError(INDEX_NOT_FOUND, f"Index Not Found - cause: GSI index {name} not found.")
    return index
