"""The errors of the query service: their codes and their HTTP statuses.

Codes are those of Couchbase's documentation, "SQL++ Error Codes"; 2120, 3000, 13014 and their statuses are those of the
real engine 7.6.6.
"""

from http import HTTPStatus

NOT_SUPPORTED = 1020
BAD_VALUE = 1040
MISSING_VALUE = 1050
AUTHENTICATION = 2120
SYNTAX = 3000
NO_INDEX = 4000
UNKNOWN_PREPARED = 4040
INDEX_EXISTS = 4300
KEYSPACE_NOT_FOUND = 12003
INDEX_NOT_FOUND = 12016
SCOPE_NOT_FOUND = 12021
NO_ROLE = 13014

HTTP_STATUSES = {
    NOT_SUPPORTED: HTTPStatus.BAD_REQUEST,
    BAD_VALUE: HTTPStatus.BAD_REQUEST,
    MISSING_VALUE: HTTPStatus.BAD_REQUEST,
    AUTHENTICATION: HTTPStatus.UNAUTHORIZED,
    SYNTAX: HTTPStatus.BAD_REQUEST,
    NO_INDEX: HTTPStatus.NOT_FOUND,
    UNKNOWN_PREPARED: HTTPStatus.NOT_FOUND,
    INDEX_EXISTS: HTTPStatus.CONFLICT,
    KEYSPACE_NOT_FOUND: HTTPStatus.FAILED_DEPENDENCY,
    NO_ROLE: HTTPStatus.UNAUTHORIZED,
}
"""The statuses that are not 500."""


class QueryError(Exception):
    """An error that the query service answers with: its code and its text."""

    def __init__(self, code: int, msg: str) -> None:
        """Make an error of that code and text."""
        super().__init__(code, msg)
        self.code = code
        self.msg = msg

    @property
    def http_status(self) -> int:
        """The HTTP status of the reply."""
        return HTTP_STATUSES.get(self.code, HTTPStatus.INTERNAL_SERVER_ERROR)
