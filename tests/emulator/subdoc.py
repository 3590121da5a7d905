"""Sub-document operations: paths into a JSON document, looking them up and changing what they lead to.

Pure functions on decoded JSON; ``kv.py`` takes the packets apart. The source is kv_engine's docs/SubDocument.md.
"""

import json
import re
import struct
from collections.abc import Callable
from typing import Any, NamedTuple

from tests.emulator.documents import Document
from tests.emulator.wire import Status

MAX_PATHS = 16
MAX_PATH_BYTES = 1024
MAX_DEPTH = 32
INT64_MAX = 2**63 - 1

CREATE_PATH = 0x01
XATTR = 0x04

GET_DOCUMENT, SET_DOCUMENT, DELETE_DOCUMENT = 0x00, 0x01, 0x04
GET, EXISTS, COUNT = 0xC5, 0xC6, 0xD2
DELETED = object()
"""What `mutate` returns as the document when it is to be removed."""

_LOOKUP_SPEC = struct.Struct(">BBH")
_MUTATION_SPEC = struct.Struct(">BBHL")

Part = str | int
_PART = re.compile(r"`((?:[^`]|``)+)`|([^`.\[\]]+)|\[(-?\d{1,9})\]")


class SubdocError(Exception):
    """A path, or what was asked of it, is wrong; `status` says how."""

    def __init__(self, status: Status) -> None:
        """Remember the status to answer with."""
        super().__init__(status.name)
        self.status = status


def decode(value: bytes, status: Status = Status.NOT_JSON) -> Any:
    """Decode strict JSON, or raise SubdocError(status)."""

    def refuse(_: str) -> None:
        raise ValueError

    try:
        return json.loads(value, parse_constant=refuse)
    except (ValueError, RecursionError):
        raise SubdocError(status) from None


def encode(value: Any) -> bytes:
    """Encode as compact JSON; text stays UTF-8 unless it holds a lone surrogate."""
    try:
        return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()
    except UnicodeEncodeError:
        return json.dumps(value, separators=(",", ":")).encode()


def parse_path(path: bytes) -> list[Part]:
    """Take a path such as ``a.b[0].`c.d``` apart into member names and array indexes; the empty path is the document.

    Raises:
        SubdocError: PATH_INVALID or, for more than 1,024 bytes or 32 parts, PATH_TOO_BIG.
    """
    if len(path) > MAX_PATH_BYTES:
        raise SubdocError(Status.PATH_TOO_BIG)
    try:
        text = path.decode()
    except UnicodeDecodeError:
        raise SubdocError(Status.PATH_INVALID) from None
    parts: list[Part] = []
    position = 0
    while position < len(text):
        dotted = text[position] == "."
        if dotted and not parts:
            raise SubdocError(Status.PATH_INVALID)
        match = _PART.match(text, position + dotted)
        if match is None or (parts and dotted == (match[3] is not None)):
            raise SubdocError(Status.PATH_INVALID)
        quoted, plain, index = match.groups()
        if index is not None:
            if int(index) < -1:
                raise SubdocError(Status.PATH_INVALID)
            parts.append(int(index))
        else:
            parts.append(plain if quoted is None else quoted.replace("``", "`"))
        position = match.end()
    if len(parts) > MAX_DEPTH:
        raise SubdocError(Status.PATH_TOO_BIG)
    return parts


def step(value: Any, part: Part) -> Any:
    """Go one part further; raises SubdocError PATH_NOT_FOUND, or PATH_MISMATCH where no such part could be."""
    if isinstance(part, int) is not isinstance(value, list) or not isinstance(value, list | dict):
        raise SubdocError(Status.PATH_MISMATCH)
    try:
        return value[part]  # type: ignore[index]  # the check above: an index goes with a list, a name with an object
    except (KeyError, IndexError):
        raise SubdocError(Status.PATH_NOT_FOUND) from None


def find(document: Any, parts: list[Part]) -> Any:
    """Follow a path from the document's root; raises SubdocError as `step` does."""
    for part in parts:
        document = step(document, part)
    return document


def count(value: Any) -> int:
    """Return how many members or elements there are; raises SubdocError PATH_MISMATCH for anything else."""
    if not isinstance(value, list | dict):
        raise SubdocError(Status.PATH_MISMATCH)
    return len(value)


def empty_root(path: bytes) -> Any:
    """Return what a document that is made for this path starts as: an array if the path is one's, else an object."""
    parts = parse_path(path)
    return [] if not parts or isinstance(parts[0], int) else {}


def _container(document: Any, parts: list[Part], create: bool) -> Any:
    """Follow a path, making the objects that are missing on the way when `create` says so."""
    for index, part in enumerate(parts):
        try:
            document = step(document, part)
        except SubdocError as error:
            if not create or error.status is not Status.PATH_NOT_FOUND or isinstance(part, int):
                raise
            follows = parts[index + 1] if index + 1 < len(parts) else ""
            if isinstance(follows, int):
                raise
            document[part] = document = {}
    return document


def _set_member(document: Any, parts: list[Part], value: Any, create: bool, *, only_new: bool) -> None:
    if not parts or isinstance(parts[-1], int):
        raise SubdocError(Status.PATH_INVALID)
    parent = _container(document, parts[:-1], create)
    if not isinstance(parent, dict):
        raise SubdocError(Status.PATH_MISMATCH)
    if only_new and parts[-1] in parent:
        raise SubdocError(Status.PATH_EXISTS)
    parent[parts[-1]] = value


def dict_add(document: Any, parts: list[Part], value: bytes, create: bool) -> None:
    """Add a member that must not be there yet."""
    _set_member(document, parts, decode(value, Status.CANNOT_INSERT), create, only_new=True)


def dict_upsert(document: Any, parts: list[Part], value: bytes, create: bool) -> None:
    """Add or replace a member."""
    _set_member(document, parts, decode(value, Status.CANNOT_INSERT), create, only_new=False)


def _parent_and_last(document: Any, parts: list[Part]) -> tuple[Any, Any]:
    """Return what holds the last part of a path that exists; raises SubdocError where it does not."""
    if not parts:
        raise SubdocError(Status.PATH_INVALID)
    parent = find(document, parts[:-1])
    step(parent, parts[-1])
    return parent, parts[-1]


def delete(document: Any, parts: list[Part], value: bytes, create: bool) -> None:
    """Remove a member or an element that must be there."""
    parent, last = _parent_and_last(document, parts)
    del parent[last]


def replace(document: Any, parts: list[Part], value: bytes, create: bool) -> None:
    """Replace a member or an element that must be there."""
    parent, last = _parent_and_last(document, parts)
    parent[last] = decode(value, Status.CANNOT_INSERT)


def _array(document: Any, parts: list[Part], create: bool) -> list[Any]:
    """Return the array that a path leads to, made if it is missing and `create` says so."""
    try:
        array = find(document, parts)
    except SubdocError as error:
        if not create or error.status is not Status.PATH_NOT_FOUND or not isinstance(parts[-1], str):
            raise
        array = []
        _set_member(document, parts, array, create, only_new=True)
    if not isinstance(array, list):
        raise SubdocError(Status.PATH_MISMATCH)
    return array


def _elements(value: bytes) -> list[Any]:
    """Decode the comma-separated values that the array operations take."""
    elements: list[Any] = decode(b"[" + value + b"]", Status.CANNOT_INSERT)
    if not elements:
        raise SubdocError(Status.CANNOT_INSERT)
    return elements


def array_push_last(document: Any, parts: list[Part], value: bytes, create: bool) -> None:
    """Append to an array."""
    _array(document, parts, create).extend(_elements(value))


def array_push_first(document: Any, parts: list[Part], value: bytes, create: bool) -> None:
    """Put at the front of an array."""
    _array(document, parts, create)[:0] = _elements(value)


def array_insert(document: Any, parts: list[Part], value: bytes, create: bool) -> None:
    """Put ahead of an element, or at the end when the index is the array's length."""
    if not parts or not isinstance(parts[-1], int) or parts[-1] < 0:
        raise SubdocError(Status.PATH_INVALID)
    array = find(document, parts[:-1])
    if not isinstance(array, list):
        raise SubdocError(Status.PATH_MISMATCH)
    if parts[-1] > len(array):
        raise SubdocError(Status.PATH_NOT_FOUND)
    array[parts[-1] : parts[-1]] = _elements(value)


def array_add_unique(document: Any, parts: list[Part], value: bytes, create: bool) -> None:
    """Append a primitive to an array of primitives that does not hold it yet."""
    array = _array(document, parts, create)
    (element,) = elements if len(elements := _elements(value)) == 1 else (None,)
    if isinstance(element, list | dict) or len(elements) != 1:
        raise SubdocError(Status.CANNOT_INSERT)
    if any(isinstance(existing, list | dict) for existing in array):
        raise SubdocError(Status.PATH_MISMATCH)
    if any(existing == element and type(existing) is type(element) for existing in array):
        raise SubdocError(Status.PATH_EXISTS)
    array.append(element)


def counter(document: Any, parts: list[Part], value: bytes, create: bool) -> int:
    """Add a non-zero 64-bit integer to a number, which starts at 0, and return the sum."""
    delta = decode(value, Status.DELTA_INVALID)
    if type(delta) is not int or delta == 0 or abs(delta) > INT64_MAX:
        raise SubdocError(Status.DELTA_INVALID)
    try:
        current = find(document, parts)
    except SubdocError as error:
        if error.status is not Status.PATH_NOT_FOUND:
            raise
        _set_member(document, parts, delta, create, only_new=True)
        return delta
    if type(current) is not int:
        raise SubdocError(Status.PATH_MISMATCH)
    if abs(current + delta) > INT64_MAX:
        raise SubdocError(Status.NUMBER_OUT_OF_RANGE)
    parent, last = _parent_and_last(document, parts)
    parent[last] = current + delta
    return current + delta


MUTATIONS: dict[int, Callable[[Any, list[Part], bytes, bool], int | None]] = {
    0xC7: dict_add,
    0xC8: dict_upsert,
    0xC9: delete,
    0xCA: replace,
    0xCB: array_push_last,
    0xCC: array_push_first,
    0xCD: array_insert,
    0xCE: array_add_unique,
    0xCF: counter,
}
"""What each opcode in a mutation's list does to the decoded document, in place; a counter returns its new value."""


class Spec(NamedTuple):
    """One path of a request and what to do there; `value` is empty for a lookup."""

    opcode: int
    flags: int
    path: bytes
    value: bytes = b""


def _check_number(specs: list[Spec]) -> list[Spec]:
    if not 0 < len(specs) <= MAX_PATHS:
        raise SubdocError(Status.INVALID_COMBINATION)
    return specs


def lookup_specs(body: bytes) -> list[Spec]:
    """Take the body of a LOOKUP_IN apart; raises struct.error where it is cut short, SubdocError for over 16 paths."""
    specs: list[Spec] = []
    position = 0
    while position < len(body) and len(specs) <= MAX_PATHS:
        opcode, flags, path_bytes = _LOOKUP_SPEC.unpack_from(body, position)
        path, position = _take(body, position + _LOOKUP_SPEC.size, path_bytes)
        specs.append(Spec(opcode, flags, path))
    return _check_number(specs)


def mutation_specs(body: bytes) -> list[Spec]:
    """Take the body of a MUTATE_IN apart; raises as `lookup_specs` does."""
    specs: list[Spec] = []
    position = 0
    while position < len(body) and len(specs) <= MAX_PATHS:
        opcode, flags, path_bytes, value_bytes = _MUTATION_SPEC.unpack_from(body, position)
        path, position = _take(body, position + _MUTATION_SPEC.size, path_bytes)
        value, position = _take(body, position, value_bytes)
        specs.append(Spec(opcode, flags, path, value))
    return _check_number(specs)


def _take(body: bytes, position: int, length: int) -> tuple[bytes, int]:
    if position + length > len(body):
        raise struct.error("a path or value is cut short")
    return body[position : position + length], position + length


class Lookup:
    """Looks paths up in one document, decoding it once at most."""

    def __init__(self, document: Document) -> None:
        """Prepare to look into `document`."""
        self._document = document
        self._content: Any = None

    def one(self, opcode: int, flags: int, path: bytes) -> bytes:
        """Return what is at one path as JSON, empty for EXISTS; raises SubdocError."""
        if opcode == GET_DOCUMENT:
            if path:
                raise SubdocError(Status.INVALID)
            return self._document.value
        if opcode not in (GET, EXISTS, COUNT):
            raise SubdocError(Status.INVALID_COMBINATION)
        parts = parse_path(path)
        if not parts and opcode != COUNT:
            raise SubdocError(Status.PATH_INVALID)
        value = find(self._attributes(parts) if flags & XATTR else self._decoded(), parts)
        if opcode == EXISTS:
            return b""
        return encode(count(value) if opcode == COUNT else value)

    def _decoded(self) -> Any:
        if self._content is None:
            self._content = decode(self._document.value)
        return self._content

    def _attributes(self, parts: list[Part]) -> Any:
        """Return the extended attributes: only the virtual ``$document``, which SDKs read the expiry from."""
        if isinstance(parts[0], str) and parts[0].startswith("$") and parts[0] != "$document":
            raise SubdocError(Status.UNKNOWN_VIRTUAL_ATTRIBUTE)
        document = self._document
        return {
            "$document": {
                "CAS": f"0x{document.cas:016x}",
                "exptime": document.expiry,
                "flags": document.flags,
                "datatype": ["json"],
                "deleted": False,
                "value_bytes": len(document.value),
            }
        }


def mutate(content: Any, spec: Spec, *, create: bool) -> tuple[Any, int | None]:
    """Do one change to a decoded document.

    Args:
        content: The document; it is changed in place.
        spec: What to do and where.
        create: Make missing objects on the way even if the path's own flags don't ask for it.

    Returns:
        The document, which may be another object or ``DELETED``, and the new value of a counter.

    Raises:
        SubdocError: It cannot be done; the document may hold half of a change and must not be stored.
    """
    if spec.flags & XATTR:
        raise SubdocError(Status.CANNOT_MODIFY_VIRTUAL_ATTRIBUTE if spec.path[:1] == b"$" else Status.NOT_SUPPORTED)
    if spec.opcode in (SET_DOCUMENT, DELETE_DOCUMENT):
        if spec.path:
            raise SubdocError(Status.INVALID)
        return (decode(spec.value, Status.CANNOT_INSERT) if spec.opcode == SET_DOCUMENT else DELETED), None
    change = MUTATIONS.get(spec.opcode)
    if change is None or content is DELETED:
        raise SubdocError(Status.INVALID_COMBINATION)
    return content, change(content, parse_path(spec.path), spec.value, create or bool(spec.flags & CREATE_PATH))
