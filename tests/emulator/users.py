"""Users and their passwords: what key-value (SASL) and HTTP (Basic) sign-in are checked against."""

import base64
import binascii
import hmac
from collections.abc import Mapping

from scramp import ScramException, ScramMechanism  # type: ignore[import-untyped]

MECHANISMS = {"SCRAM-SHA512": "SCRAM-SHA-512", "SCRAM-SHA256": "SCRAM-SHA-256", "SCRAM-SHA1": "SCRAM-SHA-1"}
"""Couchbase's names of the mechanisms, and those of RFC 5802 and RFC 7677."""

AuthInfo = tuple[bytes, bytes, bytes, int]
"""Salt, stored key, server key and iteration count, as scramp makes them of a password."""


class Users:
    """The users that may sign in; every user may do everything, as an administrator may."""

    def __init__(self, passwords: Mapping[str, str]) -> None:
        """Start with these users and their passwords."""
        self._passwords = dict(passwords)
        self._derived: dict[tuple[str, str], AuthInfo] = {}

    def __contains__(self, user: str) -> bool:
        """Say whether there is such a user."""
        return user in self._passwords

    def set_password(self, user: str, password: str) -> None:
        """Add a user, or change the password of one; connections that are signed in stay so, as with the server."""
        self._passwords[user] = password
        for mechanism in MECHANISMS:
            self._derived.pop((user, mechanism), None)

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

    def scram_exchange(self, mechanism: str) -> "ScramExchange":
        """Return the server's side of one sign-in; `mechanism` is a key of ``MECHANISMS``."""
        return ScramExchange(self, mechanism)

    def auth_info(self, user: str, mechanism: str) -> AuthInfo | None:
        """Return what SCRAM stores of a user's password, derived when it is first asked for; None: no such user."""
        password = self._passwords.get(user)
        if password is None:
            return None
        key = (user, mechanism)
        if key not in self._derived:
            self._derived[key] = ScramMechanism(MECHANISMS[mechanism]).make_auth_info(password)
        return self._derived[key]


class ScramExchange:
    """The server's side of one SCRAM sign-in (RFC 5802), which scramp does; this remembers whom it is about.

    It must be scramp 1.4.12 or older: the Couchbase SDK's nonces have spaces in them (``0x50 0x14 0xfffffffe``), which
    the RFC does not allow and scramp refuses from 1.4.13 on. The real server takes them.
    """

    def __init__(self, users: Users, mechanism: str) -> None:
        """Begin with no message exchanged."""
        self.user = ""

        def auth_info(user: str) -> AuthInfo:
            self.user = user
            info = users.auth_info(user, mechanism)
            if info is None:
                raise ScramException("unknown user")
            return info

        self._server = ScramMechanism(MECHANISMS[mechanism]).make_server(auth_info)

    def first(self, message: str) -> str:
        """Answer the client's first message; raises ScramException for an unknown user or a malformed message."""
        self._server.set_client_first(message)
        return str(self._server.get_server_first())

    def final(self, message: str) -> str:
        """Answer the client's final message; raises ScramException where its proof is wrong."""
        self._server.set_client_final(message)
        return str(self._server.get_server_final())
