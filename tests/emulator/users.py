"""Users, their passwords (for key-value's SASL and HTTP's Basic sign-in) and their roles: what each of them may do."""

import base64
import binascii
import hmac
import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum, auto
from typing import Self

from scramp import ScramException, ScramMechanism  # type: ignore[import-untyped]

MECHANISM = "SCRAM-SHA512"
"""The one that SDKs begin with; the server has SHA256 and SHA1 too."""
_SCRAM = ScramMechanism("SCRAM-SHA-512")  # as RFC 7677 spells it

AuthInfo = tuple[bytes, bytes, bytes, int]
"""Salt, stored key, server key and iteration count, as scramp makes them of a password."""


Path = tuple[str, ...]
"""The names of a bucket, or of a bucket and a scope, or of a bucket, a scope and a collection."""


class Privilege(Enum):
    """What a user may be allowed to do with the documents of a collection, or with its schema."""

    READ = auto()
    WRITE = auto()
    SELECT = auto()
    SCAN = auto()
    INDEX = auto()
    MANAGE = auto()


GRANTS = {
    "admin": frozenset(Privilege),
    "data_reader": frozenset({Privilege.READ}),
    "data_writer": frozenset({Privilege.WRITE}),
    "query_select": frozenset({Privilege.SELECT}),
    "query_use_sequential_scans": frozenset({Privilege.SCAN}),
    "query_manage_index": frozenset({Privilege.INDEX}),
}
"""The roles there are, by the server's names. On the server some of them allow more: here no one relies on that."""


@dataclass(frozen=True)
class Role:
    """A role, and the bucket, scope or collection that it is for; an empty path: all of them."""

    name: str
    path: Path = ()

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read it as the server writes it: ``admin``, ``data_reader[bucket:scope:collection]``, ``data_writer[*]``.

        Raises:
            ValueError: There is no such role, or it is written in another way.
        """
        match = re.fullmatch(r"([a-z_]+)(?:\[([^\[\]:]+(?::[^\[\]:]+){0,2})\])?", text)
        if match is None or match[1] not in GRANTS or (match[1] == "admin") != (match[2] is None):
            known = ", ".join(name if name == "admin" else f"{name}[bucket:scope:collection]" for name in GRANTS)
            raise ValueError(f"must be one of {known}, not {text!r}")
        return cls(match[1], () if match[2] in (None, "*") else tuple(match[2].split(":")))

    def grants(self, privilege: Privilege, path: Path) -> bool:
        """Say whether this role allows it for what `path` names."""
        return privilege in GRANTS[self.name] and path[: len(self.path)] == self.path

    def touches(self, path: Path) -> bool:
        """Say whether this role is for what `path` names, or for some of it, or for all of it and more."""
        return all(own == other for own, other in zip(self.path, path, strict=False))


ADMIN = (Role("admin"),)


class Users:
    """The users that may sign in, and what they may do."""

    def __init__(self, passwords: Mapping[str, str], roles: Mapping[str, tuple[Role, ...]] | None = None) -> None:
        """Start with these users and their passwords; a user whose roles are not said is an administrator."""
        self._passwords = dict(passwords)
        self._roles = dict(roles or {})
        self._derived: dict[str, AuthInfo] = {}

    def unrestricted(self, user: str) -> bool:
        """Say whether the user may do everything."""
        return self._roles.get(user, ADMIN) == ADMIN

    def may(self, user: str, privilege: Privilege, path: Path) -> bool:
        """Say whether one of the user's roles allows it for what `path` names."""
        return any(role.grants(privilege, path) for role in self._roles.get(user, ADMIN))

    def sees(self, user: str, path: Path) -> bool:
        """Say whether the user has any role for what `path` names; what one doesn't see does not exist for one."""
        return any(role.touches(path) for role in self._roles.get(user, ADMIN))

    def set_password(self, user: str, password: str) -> None:
        """Add a user, or change the password of one; connections that are signed in stay so, as with the server."""
        self._passwords[user] = password
        self._derived.pop(user, None)

    def verify(self, user: str, password: str) -> bool:
        """Compare the password in constant time; an unknown user is compared with a password that nobody has."""
        expected = self._passwords.get(user)
        same = hmac.compare_digest((expected if expected is not None else "\0").encode(), password.encode())
        return same and expected is not None

    def verify_basic(self, header: str | None) -> str | None:
        """Return the user whom an ``Authorization`` header (RFC 7617, Basic) signs in, or None."""
        scheme, _, encoded = (header or "").partition(" ")
        if scheme.lower() != "basic":
            return None
        try:
            user, separator, password = base64.b64decode(encoded.strip(), validate=True).decode().partition(":")
        except (binascii.Error, UnicodeDecodeError):
            return None
        return user if separator and self.verify(user, password) else None

    def auth_info(self, user: str) -> AuthInfo:
        """Return what SCRAM stores of a user's password, derived when first asked for; raises ScramException."""
        password = self._passwords.get(user)
        if password is None:
            raise ScramException("unknown user")
        if user not in self._derived:
            self._derived[user] = _SCRAM.make_auth_info(password)
        return self._derived[user]


class ScramExchange:
    """The server's side of one SCRAM sign-in (RFC 5802), which scramp does; this remembers whom it is about.

    It must be scramp 1.4.12 or older: the Couchbase SDK's nonces have spaces in them (``0x50 0x14 0xfffffffe``), which
    the RFC does not allow and scramp refuses from 1.4.13 on. The real server takes them.
    """

    def __init__(self, users: Users) -> None:
        """Begin with no message exchanged."""
        self.user = ""

        def auth_info(user: str) -> AuthInfo:
            self.user = user
            return users.auth_info(user)

        self._server = _SCRAM.make_server(auth_info)

    def first(self, message: str) -> str:
        """Answer the client's first message; raises ScramException for an unknown user or a malformed message."""
        self._server.set_client_first(message)
        return str(self._server.get_server_first())

    def final(self, message: str) -> str:
        """Answer the client's final message; raises ScramException where its proof is wrong."""
        self._server.set_client_final(message)
        return str(self._server.get_server_final())
