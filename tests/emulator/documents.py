"""The emulator's data: buckets, scopes, collections and documents, in memory.

Nothing here knows of sockets. The key-value side and the query engine both read and write through these classes, from
one thread (that of the event loop).
"""

import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from tests.emulator.indexes import Index, members_of

MAX_KEY_BYTES = 250
MAX_VALUE_BYTES = 20 * 1024 * 1024
JSON_FLAGS = 0x02000000
DEFAULT = "_default"
FIRST_COLLECTION_ID = 8
"""The server keeps the ids below 8 for itself; 0 is ``_default._default`` (kv_engine's docs/Collections.md)."""


class AlreadyExistsError(Exception):
    """A scope, collection or index of that name is there already; the message is the name."""


@dataclass(slots=True)
class Document:
    """One document as the key-value side keeps it.

    Attributes:
        value: The bytes as they were sent, almost always JSON.
        flags: What the client said about the format (``JSON_FLAGS`` for JSON), handed back as it is.
        cas: Changes with each mutation; never 0.
    """

    value: bytes
    flags: int
    cas: int


_last_cas = 0


def next_cas() -> int:
    """Return a CAS that is larger than all before it: the clock's nanoseconds, as the server's are."""
    global _last_cas  # noqa: PLW0603 - the one clock that all buckets share
    _last_cas = max(_last_cas + 1, time.time_ns())
    return _last_cas


class Collection:
    """The documents of one collection by key (bytes, as on the wire), and its indexes by name."""

    def __init__(self, name: str, collection_id: int) -> None:
        """Make an empty collection that the manifest knows by `collection_id`."""
        self.name = name
        self.id = collection_id
        self.documents: dict[bytes, Document] = {}
        self.indexes: dict[str, Index] = {}

    def put(self, key: bytes, value: bytes, flags: int = JSON_FLAGS) -> Document:
        """Store `value` under `key`, over whatever is there, and return the document with its new CAS."""
        document = self.documents.get(key)
        if document is None:
            document = self.documents[key] = Document(value, flags, next_cas())
        else:
            document.value, document.flags, document.cas = value, flags, next_cas()
        if self.indexes:
            self._update_indexes(key, members_of(value))
        return document

    def remove(self, key: bytes) -> None:
        """Remove the document, if there is one."""
        self.documents.pop(key, None)
        self._update_indexes(key, {})

    def add_index(self, index: Index, *, online: bool) -> None:
        """Add an index, deferred unless it is to be online; raises AlreadyExistsError."""
        if index.name in self.indexes:
            raise AlreadyExistsError(index.name)
        self.indexes[index.name] = index
        if online:
            self.build_index(index)

    def build_index(self, index: Index) -> None:
        """Fill an index and bring it online."""
        index.online = True
        for key, document in self.documents.items():
            index.update(key, members_of(document.value))

    def _update_indexes(self, key: bytes, members: dict[str, Any]) -> None:
        for index in self.indexes.values():
            if index.online:
                index.update(key, members)


@dataclass(slots=True)
class Scope:
    """A scope: a name, the id that the manifest has for it, and its collections by name."""

    name: str
    id: int
    collections: dict[str, Collection] = field(default_factory=dict)


class Bucket:
    """A bucket: its scopes, and the manifest that names them."""

    def __init__(self, name: str) -> None:
        """Make a bucket with nothing but ``_default._default``."""
        self.name = name
        self.uuid = secrets.token_hex(16)
        self.manifest_uid = 0
        self._next_id = FIRST_COLLECTION_ID
        default = Collection(DEFAULT, 0)
        self.scopes: dict[str, Scope] = {DEFAULT: Scope(DEFAULT, 0, {DEFAULT: default})}
        self.collections_by_id: dict[int, Collection] = {0: default}

    def create_scope(self, name: str) -> Scope:
        """Add an empty scope; raises AlreadyExistsError."""
        if name in self.scopes:
            raise AlreadyExistsError(name)
        scope = self.scopes[name] = Scope(name, self._take_id())
        self.manifest_uid += 1
        return scope

    def create_collection(self, scope_name: str, name: str) -> Collection:
        """Add an empty collection; raises KeyError(scope) or AlreadyExistsError."""
        scope = self.scopes[scope_name]
        if name in scope.collections:
            raise AlreadyExistsError(name)
        collection = scope.collections[name] = Collection(name, self._take_id())
        self.collections_by_id[collection.id] = collection
        self.manifest_uid += 1
        return collection

    def drop_collection(self, scope_name: str, name: str) -> None:
        """Remove a collection and its documents; raises KeyError(name of what is missing)."""
        collection = self.scopes[scope_name].collections.pop(name)
        del self.collections_by_id[collection.id]
        self.manifest_uid += 1

    def path_of(self, collection: Collection) -> tuple[str, str, str]:
        """Return the names of the bucket, the scope and the collection; raises KeyError where it is not in here."""
        for scope in self.scopes.values():
            if scope.collections.get(collection.name) is collection:
                return self.name, scope.name, collection.name
        raise KeyError(collection.name)

    def manifest(self, visible: Callable[[tuple[str, ...]], bool]) -> dict[str, Any]:
        """Return the collections manifest as HTTP gives it: ids and uids are hexadecimal text.

        Args:
            visible: Whether whoever asks may see a scope (its path has two names) or a collection (three).
        """
        return {
            "uid": f"{self.manifest_uid:x}",
            "scopes": [
                {
                    "name": scope.name,
                    "uid": f"{scope.id:x}",
                    "collections": [
                        {"name": collection.name, "uid": f"{collection.id:x}", "maxTTL": 0, "history": False}
                        for collection in scope.collections.values()
                        if visible((self.name, scope.name, collection.name))
                    ],
                }
                for scope in self.scopes.values()
                if visible((self.name, scope.name))
            ],
        }

    def _take_id(self) -> int:
        self._next_id += 1
        return self._next_id - 1


class Cluster:
    """All the data that the emulator serves; its nodes share it, and a map of vBuckets says which of them answers."""

    def __init__(self) -> None:
        """Make a cluster without buckets."""
        self.buckets: dict[str, Bucket] = {}

    def create_bucket(self, name: str) -> Bucket:
        """Add an empty bucket."""
        bucket = self.buckets[name] = Bucket(name)
        return bucket

    def keyspace(self, bucket: str, scope: str, collection: str) -> Collection:
        """Return the collection of that path, or raise KeyError(name of the part that is missing)."""
        return self.buckets[bucket].scopes[scope].collections[collection]
