"""The emulator's data: buckets, scopes, collections and documents, in memory.

Nothing here knows of sockets. The key-value side and the query engine both read and write through these classes, from
one thread (that of the event loop).
"""

import secrets
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

MAX_KEY_BYTES = 250
MAX_VALUE_BYTES = 20 * 1024 * 1024
JSON_FLAGS = 0x02000000
DEFAULT = "_default"
FIRST_COLLECTION_ID = 8
"""The server keeps the ids below 8 for itself; 0 is ``_default._default``."""
MAX_COLLECTIONS = 1200
"""A bucket's limit in the server too (1,200 collections a cluster)."""

Listener = Callable[[str, bytes | None, bytes | None], None]
"""Called on each mutation with the key, the value before (None: there was none) and the value after (None: removed)."""


class AlreadyExistsError(Exception):
    """A scope or collection of that name is there already; the message is the name."""


class OutOfMemoryError(Exception):
    """The documents would take more than the cluster's quota."""


@dataclass(slots=True)
class Document:
    """One document as the key-value side keeps it.

    Attributes:
        value: The bytes as they were sent, almost always JSON.
        flags: What the client said about the format (``JSON_FLAGS`` for JSON), handed back as it is.
        cas: Changes with each mutation; never 0.
        expiry: Unix seconds after which it is gone; 0 is never.
    """

    value: bytes
    flags: int
    cas: int
    expiry: int = 0


class Memory:
    """How much the documents take, against a quota (bytes), so that a test gone wrong cannot eat the machine."""

    def __init__(self, quota: int) -> None:
        """Start empty, with `quota` bytes to give."""
        self.quota = quota
        self.used = 0

    def change(self, difference: int) -> None:
        """Account for `difference` more bytes; raises OutOfMemoryError where they would not fit."""
        if difference > 0 and self.used + difference > self.quota:
            raise OutOfMemoryError
        self.used += difference


_last_cas = 0


def next_cas() -> int:
    """Return a CAS that is larger than all before it: the clock's nanoseconds, as the server's are."""
    global _last_cas  # noqa: PLW0603 - the one clock that all buckets share
    _last_cas = max(_last_cas + 1, time.time_ns())
    return _last_cas


class Collection:
    """The documents of one collection, by key."""

    def __init__(self, name: str, collection_id: int, memory: Memory) -> None:
        """Make an empty collection that the manifest knows by `collection_id`."""
        self.name = name
        self.id = collection_id
        self.documents: dict[bytes, Document] = {}
        self.listeners: list[Listener] = []
        self._memory = memory
        self._expiring: dict[bytes, int] = {}

    def __len__(self) -> int:
        """Count the documents, among them any that expired less than a second ago."""
        return len(self.documents)

    def find(self, key: bytes) -> Document | None:
        """Return the document of that key (bytes, as on the wire), or None; an expired one is removed on the way."""
        document = self.documents.get(key)
        if document is not None and document.expiry and document.expiry <= time.time():
            self.remove(key)
            return None
        return document

    def get(self, key: str) -> Document | None:
        """Return the document of that key, or None."""
        return self.find(key.encode())

    def items(self) -> Iterator[tuple[str, Document]]:
        """Yield every key and document that has not expired; don't write to the collection meanwhile."""
        now = time.time()
        for key, document in self.documents.items():
            if not document.expiry or document.expiry > now:
                yield key.decode("utf-8", "replace"), document

    def put(self, key: bytes, value: bytes, flags: int = JSON_FLAGS, expiry: int = 0) -> Document:
        """Store `value` under `key`, over whatever is there, and return the document with its new CAS.

        Raises:
            OutOfMemoryError: The cluster's quota would be exceeded; nothing changed.
        """
        document = self.documents.get(key)
        if document is None:
            old = None
            self._memory.change(len(key) + len(value))
            document = self.documents[key] = Document(value, flags, next_cas(), expiry)
        else:
            old = document.value
            self._memory.change(len(value) - len(old))
            document.value, document.flags, document.cas, document.expiry = value, flags, next_cas(), expiry
        self._remember_expiry(key, expiry)
        if self.listeners:
            self._tell(key, old, value)
        return document

    def touch(self, key: bytes, document: Document, expiry: int) -> None:
        """Give the document another expiry (Unix seconds, 0 for never) and a new CAS."""
        document.expiry, document.cas = expiry, next_cas()
        self._remember_expiry(key, expiry)

    def remove(self, key: bytes) -> bool:
        """Remove the document; False when there was none."""
        document = self.documents.pop(key, None)
        if document is None:
            return False
        self._expiring.pop(key, None)
        self._memory.change(-len(key) - len(document.value))
        if self.listeners:
            self._tell(key, document.value, None)
        return True

    def remove_expired(self) -> None:
        """Remove every document whose time is up; called about once a second, so that indexes forget them too."""
        if self._expiring:
            now = time.time()
            for key in [key for key, expiry in self._expiring.items() if expiry <= now]:
                self.remove(key)

    def clear(self) -> None:
        """Remove every document, when the collection is dropped."""
        for key in list(self.documents):
            self.remove(key)

    def _remember_expiry(self, key: bytes, expiry: int) -> None:
        if expiry:
            self._expiring[key] = expiry
        elif self._expiring:
            self._expiring.pop(key, None)

    def _tell(self, key: bytes, old: bytes | None, new: bytes | None) -> None:
        text = key.decode("utf-8", "replace")
        for listener in self.listeners:
            listener(text, old, new)


@dataclass(slots=True)
class Scope:
    """A scope: a name, the id that the manifest has for it, and its collections by name."""

    name: str
    id: int
    collections: dict[str, Collection] = field(default_factory=dict)


class Bucket:
    """A bucket: its scopes, and the manifest that names them."""

    def __init__(self, name: str, memory: Memory) -> None:
        """Make a bucket with nothing but ``_default._default``."""
        self.name = name
        self.uuid = secrets.token_hex(16)
        self.manifest_uid = 0
        self._memory = memory
        self._next_id = FIRST_COLLECTION_ID
        default = Collection(DEFAULT, 0, memory)
        self.scopes: dict[str, Scope] = {DEFAULT: Scope(DEFAULT, 0, {DEFAULT: default})}
        self.collections_by_id: dict[int, Collection] = {0: default}

    def create_scope(self, name: str) -> Scope:
        """Add an empty scope; raises AlreadyExistsError, or ValueError when the bucket is full."""
        if name in self.scopes:
            raise AlreadyExistsError(name)
        if len(self.scopes) >= MAX_COLLECTIONS:
            raise ValueError("Maximum number of scopes has been reached")
        scope = self.scopes[name] = Scope(name, self._take_id())
        self.manifest_uid += 1
        return scope

    def create_collection(self, scope_name: str, name: str) -> Collection:
        """Add an empty collection; raises KeyError(scope), AlreadyExistsError, or ValueError: the bucket is full."""
        scope = self.scopes[scope_name]
        if name in scope.collections:
            raise AlreadyExistsError(name)
        if len(self.collections_by_id) >= MAX_COLLECTIONS:
            raise ValueError("Maximum number of collections has been reached")
        collection = scope.collections[name] = Collection(name, self._take_id(), self._memory)
        self.collections_by_id[collection.id] = collection
        self.manifest_uid += 1
        return collection

    def drop_scope(self, name: str) -> None:
        """Remove a scope and all that is in it; raises KeyError(name)."""
        scope = self.scopes.pop(name)
        for collection in scope.collections.values():
            self._forget(collection)
        self.manifest_uid += 1

    def drop_collection(self, scope_name: str, name: str) -> None:
        """Remove a collection and its documents; raises KeyError(name of what is missing)."""
        self._forget(self.scopes[scope_name].collections.pop(name))
        self.manifest_uid += 1

    def path_of(self, collection: Collection) -> tuple[str, str, str]:
        """Return the names of the bucket, the scope and the collection; raises KeyError where it is not in here."""
        for scope in self.scopes.values():
            if scope.collections.get(collection.name) is collection:
                return self.name, scope.name, collection.name
        raise KeyError(collection.name)

    def manifest(self, visible: Callable[[tuple[str, ...]], bool]) -> dict[str, Any]:
        """Return the collections manifest, as key-value and HTTP both give it: ids and uids are hexadecimal text.

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

    def remove_expired(self) -> None:
        """Remove the expired documents of all collections."""
        for collection in self.collections_by_id.values():
            collection.remove_expired()

    def _take_id(self) -> int:
        self._next_id += 1
        return self._next_id - 1

    def _forget(self, collection: Collection) -> None:
        collection.clear()
        del self.collections_by_id[collection.id]


class Cluster:
    """All the data that the emulator serves; its nodes share it, and a map of vBuckets says which of them answers."""

    def __init__(self, quota_bytes: int = 4 * 1024**3) -> None:
        """Make a cluster without buckets, whose keys and values may take `quota_bytes`."""
        self.memory = Memory(quota_bytes)
        self.buckets: dict[str, Bucket] = {}

    def create_bucket(self, name: str) -> Bucket:
        """Add an empty bucket, or raise AlreadyExistsError."""
        if name in self.buckets:
            raise AlreadyExistsError(name)
        bucket = self.buckets[name] = Bucket(name, self.memory)
        return bucket

    def keyspace(self, bucket: str, scope: str, collection: str) -> Collection:
        """Return the collection of that path, or raise KeyError(name of the part that is missing)."""
        return self.buckets[bucket].scopes[scope].collections[collection]
