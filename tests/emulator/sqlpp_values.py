"""SQL++ values: JSON, MISSING, how they compare and in which order they sort.

A value is what ``json.loads`` makes of JSON, or ``MISSING``, or ``Binary`` for a document that is not JSON. The truth
values are True, False, None (NULL) and MISSING. Python's ``True == 1`` has no place in SQL++, so every comparison goes
by type first.
"""

import json
import math
from collections.abc import Hashable
from typing import Any, Final

from tests.emulator.sqlpp_errors import INTERNAL, QueryError

MAX_INTEGER = 2**63
"""Integers at or beyond this become floating-point numbers, as the server's do."""
EXACT_FLOATS = 2**53
"""Below this, a floating-point number without a fraction is an integer and is written as one."""


class Missing:
    """The type of ``MISSING``: there is no such member."""

    __slots__ = ()

    def __repr__(self) -> str:
        """Read as the literal does."""
        return "MISSING"


MISSING: Final = Missing()


class Binary(str):
    """A document that is not JSON; the text is what stands for it in results."""

    __slots__ = ()


RANKS: dict[type, int] = {Missing: 0, type(None): 1, bool: 2, int: 4, float: 4, str: 5, list: 6, dict: 7, Binary: 8}
"""The collation of types: MISSING, NULL, FALSE, TRUE (3), numbers, strings, arrays, objects, binary."""
NAMES = ("missing", "null", "boolean", "boolean", "number", "string", "array", "object", "binary")


def rank(value: Any) -> int:
    """Return where the value's type stands in the collation."""
    return 3 if value is True else RANKS[type(value)]


def type_name(value: Any) -> str:
    """Return what the function TYPE says of the value."""
    return NAMES[rank(value)]


def truth(value: Any) -> Any:
    """Return True, False, None or MISSING: empty and zero count as false, whatever their type."""
    return value if value is None or value is MISSING else bool(value)


def sort_key(value: Any) -> tuple[Any, ...]:
    """Return a key that orders values by SQL++'s collation; objects by size, then by name, then by value."""
    if type(value) is str:
        return (5, value)
    if isinstance(value, list):
        return (6, [sort_key(item) for item in value])
    if isinstance(value, dict):
        return (7, len(value), [(name, sort_key(value[name])) for name in sorted(value)])
    if isinstance(value, bool) or value is None or value is MISSING:
        return (rank(value),)
    return (rank(value), value)


def identity(value: Any) -> Hashable:
    """Return something hashable that two values share when SQL++ holds them equal; a plain string is its own."""
    if type(value) is str:
        return value
    return _frozen(sort_key(value))


def _frozen(value: Any) -> Hashable:
    return tuple(_frozen(item) for item in value) if isinstance(value, tuple | list) else value


def unknown(left: Any, right: Any) -> Any:
    """Return MISSING or None where one of the two makes the result unknown, or True where neither does."""
    if left is MISSING or right is MISSING:
        return MISSING
    return None if left is None or right is None else True


def equal(left: Any, right: Any) -> Any:
    """Compare for equality: True, False, None or MISSING. Values of different types are not equal."""
    if type(left) is str and type(right) is str:
        return left == right
    known = unknown(left, right)
    return sort_key(left) == sort_key(right) if known is True else known


def less(left: Any, right: Any) -> Any:
    """Say whether `left` sorts before `right`: True, False, None or MISSING."""
    known = unknown(left, right)
    return sort_key(left) < sort_key(right) if known is True else known


def number(value: float) -> Any:
    """Return a computed number as SQL++ has it: whole ones as integers, huge integers as floats, no number as NULL."""
    try:
        if isinstance(value, float):
            if not math.isfinite(value):
                return None
            return int(value) if value.is_integer() and abs(value) < EXACT_FLOATS else value
        return value if -MAX_INTEGER <= value < MAX_INTEGER else float(value)
    except OverflowError:
        return None


def is_number(value: Any) -> bool:
    """Say whether the value is a number, which TRUE and FALSE are not."""
    return type(value) is int or type(value) is float


def is_encodable(text: str) -> bool:
    """Say whether the text can be a document id: half a surrogate pair, which JSON can write, cannot be UTF-8."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


def _not_json(text: str) -> Any:
    raise ValueError(f"{text} is not JSON")


def _parse_float(text: str) -> Any:
    value = number(float(text))
    if value is None:
        raise ValueError(f"{text} is out of range")
    return value


_decoder = json.JSONDecoder(parse_constant=_not_json, parse_float=_parse_float)
_encode = json.JSONEncoder(separators=(",", ":"), allow_nan=False).encode


def strict_json(text: str) -> Any:
    """Return the value of a JSON text, without NaN or numbers out of range; raises ValueError or RecursionError."""
    return _decoder.decode(text)


def parse_json(document: bytes) -> Any:
    """Return the value of a document; one that is not JSON (or too deep to read) is a ``Binary``."""
    try:
        return strict_json(document.decode())
    except (ValueError, RecursionError):
        return Binary(f"<binary ({len(document)} b)>")


def dump_json(value: Any) -> bytes:
    """Return the value as JSON; members that are MISSING are left out, and MISSING elsewhere is null.

    Raises:
        QueryError: 5000, if the value is too deep to be written.
    """
    try:
        return _encode(value).encode()
    except TypeError:
        return _encode(_without_missing(value)).encode()
    except (ValueError, RecursionError) as error:
        raise QueryError(INTERNAL, f"Invalid JSON in results: {error}") from error


def _without_missing(value: Any) -> Any:
    if value is MISSING:
        return None
    if isinstance(value, dict):
        return {name: _without_missing(item) for name, item in value.items() if item is not MISSING}
    return [_without_missing(item) for item in value] if isinstance(value, list) else value
