"""Secondary and primary indexes, kept current by the collections' mutation listeners."""

import bisect
import secrets
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from sortedcontainers import SortedSet  # type: ignore[import-untyped]
from sqlglot import exp

from tests.emulator.documents import Cluster, Collection
from tests.emulator.sqlpp_dialect import CreateIndex, render
from tests.emulator.sqlpp_errors import INDEX_EXISTS, INDEX_NOT_FOUND, PRIMARY_INDEX_NOT_FOUND, QueryError
from tests.emulator.sqlpp_expressions import Names, Row, canonical, compile_expression, conjuncts, is_document_id
from tests.emulator.sqlpp_values import MISSING, identity, parse_json

PRIMARY_NAME = "#primary"
DOCUMENT_ID = "META().`id`"
"""The canonical text of what a primary index has as its key."""
MAX_INDEXES = 200
"""A limit on the indexes of one collection, as the server has one on all together."""

Path = tuple[str, str, str]
"""Names of a bucket, a scope and a collection."""


class Index:
    """What all indexes have: a name, a state, and for each value of the leading key the ids of the documents, in order.

    Attributes:
        leading_key: The canonical text of the leading key's expression.
        condition: The canonical texts of the terms of a partial index's WHERE.
        objects_only: Whether every document in it is a JSON object.
    """

    is_primary = False
    objects_only = False

    def __init__(self, name: str, leading_key: str, *, deferred: bool) -> None:
        """Make an empty index."""
        self.name = name
        self.leading_key = leading_key
        self.condition: frozenset[str] = frozenset()
        self.condition_text: str | None = None
        self.key_texts: list[str] = []
        self.state = "deferred" if deferred else "online"
        self.id = secrets.token_hex(8)

    def find(self, value: Any) -> Sequence[str]:
        """Return the ids of the documents whose leading key equals `value`, in order."""
        raise NotImplementedError

    def ids(self) -> Sequence[str]:
        """Return the ids of all documents in the index, in order."""
        raise NotImplementedError

    def update(self, key: str, row: Row | None) -> None:
        """Take note of a document's new content, or of its absence (None)."""
        raise NotImplementedError

    def __contains__(self, key: str) -> bool:
        """Say whether the document of that id is in the index."""
        raise NotImplementedError


class PrimaryIndex(Index):
    """An index of all documents by id."""

    is_primary = True

    def __init__(self, name: str, *, deferred: bool) -> None:
        """Make an empty index."""
        super().__init__(name, DOCUMENT_ID, deferred=deferred)
        self._ids: SortedSet = SortedSet()

    def find(self, value: Any) -> Sequence[str]:
        """Return the id itself, if there is a document of that id."""
        return [value] if type(value) is str and value in self._ids else []

    def ids(self) -> Sequence[str]:
        """Return all ids, in order."""
        return list(self._ids)

    def update(self, key: str, row: Row | None) -> None:
        """Add or forget an id."""
        if row is None:
            self._ids.discard(key)
        else:
            self._ids.add(key)

    def __contains__(self, key: str) -> bool:
        """Say whether there is a document of that id."""
        return key in self._ids


class SecondaryIndex(Index):
    """An index of the documents that have the leading key (and meet the condition, if there is one)."""

    def __init__(self, definition: CreateIndex, alias: str, *, deferred: bool) -> None:
        """Make an empty index; raises QueryError when its expressions make no sense."""
        leading = definition.keys[0]
        assert definition.name is not None
        super().__init__(definition.name, canonical(leading, alias), deferred=deferred)
        self.key_texts = [render(key) for key in definition.keys]
        self.objects_only = isinstance(leading, exp.Identifier | exp.Dot) and not is_document_id(leading)
        evaluators = [compile_expression(key, Names(alias)) for key in definition.keys]
        self._evaluate = evaluators[0]
        self._meets = None
        if definition.where is not None:
            self.condition = frozenset(canonical(term, alias) for term in conjuncts(definition.where))
            self.condition_text = render(definition.where)
            self._meets = compile_expression(definition.where, Names(alias))
        self._values: dict[str, Hashable] = {}
        self._ids: dict[Hashable, list[str]] = {}

    def find(self, value: Any) -> Sequence[str]:
        """Return the ids of the documents whose leading key equals `value`, in order."""
        return self._ids.get(identity(value), ())

    def ids(self) -> Sequence[str]:
        """Return the ids of all documents in the index, in order."""
        return sorted(self._values)

    def update(self, key: str, row: Row | None) -> None:
        """Move a document from the value it had to the one that it has."""
        new: Hashable = MISSING if row is None else self._entry(row)
        old = self._values.get(key, MISSING)
        if old is not MISSING:
            if old == new:
                return
            ids = self._ids[old]
            del ids[bisect.bisect_left(ids, key)]
            if not ids:
                del self._ids[old]
            del self._values[key]
        if new is not MISSING:
            self._values[key] = new
            ids = self._ids.setdefault(new, [])
            if ids and ids[-1] > key:
                bisect.insort(ids, key)
            else:
                ids.append(key)

    def __contains__(self, key: str) -> bool:
        """Say whether the document of that id is in the index."""
        return key in self._values

    def _entry(self, row: Row) -> Hashable:
        """Return the identity of the row's leading key, or MISSING where it is not to be in the index."""
        try:
            if self._meets is not None and self._meets(row, {}) is not True:
                return MISSING
            value = self._evaluate(row, {})
            return MISSING if value is MISSING else identity(value)
        except RecursionError:  # a document too deep to compare is not indexed
            return MISSING


class CollectionIndexes:
    """The indexes of one collection, and the listener that keeps them current."""

    def __init__(self, collection: Collection) -> None:
        """Start listening to `collection`, without indexes."""
        self.collection = collection
        self.by_name: dict[str, Index] = {}
        self._secondary: list[Index] = []
        self._primary: list[Index] = []
        collection.listeners.append(self._changed)

    def add(self, index: Index) -> None:
        """Add an index; a deferred one stays empty."""
        self.by_name[index.name] = index
        if index.state == "online":
            self._start(index)

    def build(self, index: Index) -> None:
        """Fill a deferred index, and bring it online."""
        if index.state == "deferred":
            index.state = "online"
            self._start(index)

    def remove(self, name: str) -> None:
        """Forget an index; raises KeyError."""
        index = self.by_name.pop(name)
        for kept_current in (self._primary, self._secondary):
            if index in kept_current:
                kept_current.remove(index)

    def online(self) -> Iterator[Index]:
        """Yield the indexes that queries may use, secondary ones first."""
        yield from self._secondary
        yield from self._primary

    def _start(self, index: Index) -> None:
        (self._primary if index.is_primary else self._secondary).append(index)
        for key, document in self.collection.items():
            index.update(key, Row(key, document))

    def _changed(self, key: str, old: bytes | None, new: bytes | None) -> None:
        if new is None:
            for index in self.by_name.values():
                if index.state == "online":
                    index.update(key, None)
            return
        if self._secondary and new != old:
            row = Row(key, None, parse_json(new))
            for index in self._secondary:
                index.update(key, row)
        if old is None:
            for index in self._primary:
                index.update(key, Row(key, None, None))


def _cause(name: str) -> str:
    return f" - cause: GSI index {name} not found."


@dataclass(frozen=True)
class Listed:
    """An index and the keyspace that it is of."""

    path: Path
    index: Index


class IndexCatalog:
    """All indexes of a cluster. `version` grows with each change, so that plans made before can be told."""

    def __init__(self, cluster: Cluster) -> None:
        """Start without indexes."""
        self._cluster = cluster
        self._keyspaces: dict[Path, CollectionIndexes] = {}
        self.version = 0

    def of(self, path: Path, collection: Collection) -> CollectionIndexes:
        """Return the indexes of a keyspace; one that was dropped and made again has none of those it had."""
        found = self._keyspaces.get(path)
        if found is None or found.collection is not collection:
            found = self._keyspaces[path] = CollectionIndexes(collection)
        return found

    def create(self, path: Path, collection: Collection, definition: CreateIndex) -> None:
        """Make an index as CREATE INDEX says.

        Raises:
            QueryError: 4300 if there is one of that name; 5000 where there are too many.
        """
        indexes = self.of(path, collection)
        name = definition.name or PRIMARY_NAME
        if name in indexes.by_name:
            if definition.if_not_exists:
                return
            raise QueryError(INDEX_EXISTS, f"The index {name} already exists.")
        if len(indexes.by_name) >= MAX_INDEXES:
            raise QueryError(5000, f"GSI CreateIndex() - cause: Fails to create index. More than {MAX_INDEXES} indexes")
        deferred = definition.options.get("defer_build") is True
        index = (
            PrimaryIndex(name, deferred=deferred)
            if definition.primary
            else SecondaryIndex(definition, path[2], deferred=deferred)
        )
        indexes.add(index)
        self.version += 1

    def drop(self, path: Path, collection: Collection, name: str | None, *, if_exists: bool) -> None:
        """Drop an index, the primary one where `name` is None.

        Raises:
            QueryError: 12016 or, of the primary index, 12004, if there is none.
        """
        indexes = self.of(path, collection)
        wanted: Callable[[Index], bool] = lambda index: index.is_primary if name is None else index.name == name  # noqa: E731
        index = next(filter(wanted, indexes.by_name.values()), None)
        if index is not None:
            indexes.remove(index.name)
            self.version += 1
        elif not if_exists:
            if name is None:
                raise QueryError(PRIMARY_INDEX_NOT_FOUND, f"Primary Index not found{_cause(PRIMARY_NAME)}")
            raise QueryError(INDEX_NOT_FOUND, f"Index Not Found{_cause(name)}")

    def build(self, path: Path, collection: Collection, names: Sequence[str]) -> None:
        """Bring deferred indexes online; raises QueryError 12016 before any is touched."""
        indexes = self.of(path, collection)
        for name in names:
            if name not in indexes.by_name:
                raise QueryError(INDEX_NOT_FOUND, f"Index Not Found{_cause(name)}")
        for name in names:
            indexes.build(indexes.by_name[name])
        self.version += 1

    def __iter__(self) -> Iterator[Listed]:
        """Yield the indexes of the keyspaces that are still there."""
        for path, indexes in self._keyspaces.items():
            try:
                current = self._cluster.keyspace(*path)
            except KeyError:
                continue
            if current is indexes.collection:
                for index in indexes.by_name.values():
                    yield Listed(path, index)

    def rows(self) -> Iterator[Row]:
        """Yield what ``system:indexes`` holds."""
        for listed in self:
            bucket, scope, collection = listed.path
            index = listed.index
            value: dict[str, Any] = {
                "datastore_id": "http://127.0.0.1:8091",
                "id": index.id,
                "index_key": index.key_texts,
                "keyspace_id": collection,
                "name": index.name,
                "namespace_id": "default",
                "state": index.state,
                "using": "gsi",
            }
            if (scope, collection) == ("_default", "_default"):
                value["keyspace_id"] = bucket
            else:
                value |= {"bucket_id": bucket, "scope_id": scope}
            if index.is_primary:
                value["is_primary"] = True
            if index.condition_text is not None:
                value["condition"] = index.condition_text
            yield Row(index.id, None, value)
