"""Indexes on one member of a collection's documents, as far as its values are texts: nothing else is looked up."""

import bisect
import json
import secrets
from typing import Any


def _not_json(text: str) -> Any:
    raise ValueError(f"{text} is not JSON")


_decode = json.JSONDecoder(parse_constant=_not_json).decode


def parse(value: bytes) -> Any:
    """Return the content of a document; raises ValueError or RecursionError where it is not JSON."""
    return _decode(value.decode())


def members_of(value: bytes) -> dict[str, Any]:
    """Return the members of a document; none, where it is no JSON object."""
    try:
        content = parse(value)
    except (ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


class Index:
    """For each text that documents have in the member `field`, their keys in order; empty until it is `online`."""

    def __init__(self, name: str, field: str) -> None:
        """Make an index that is deferred: to be filled and kept current by its collection."""
        self.name = name
        self.field = field
        self.online = False
        self.id = secrets.token_hex(8)
        self._texts: dict[bytes, str] = {}
        self._keys: dict[str, list[bytes]] = {}

    def find(self, text: str) -> list[bytes]:
        """Return the keys of the documents that have the text, in order."""
        return self._keys.get(text, [])

    def update(self, key: bytes, members: dict[str, Any]) -> None:
        """Take note of a document's members; none: it is not there."""
        new, old = members.get(self.field), self._texts.get(key)
        if new == old:
            return
        if old is not None:
            keys = self._keys[old]
            del keys[bisect.bisect_left(keys, key)]
            if not keys:
                del self._keys[old]
            del self._texts[key]
        if isinstance(new, str):
            self._texts[key] = new
            keys = self._keys.setdefault(new, [])
            if keys and keys[-1] > key:
                bisect.insort(keys, key)
            else:
                keys.append(key)
