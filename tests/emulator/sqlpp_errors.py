"""The errors of the query service: their codes, their wording and their HTTP statuses.

Codes and wording follow the public documentation of SQL++ error codes and the replies of real servers, closely enough
for the SDKs, which go by the code and in places by the text, to raise what they raise with a real cluster.
"""

from http import HTTPStatus

READ_ONLY = 1000
NOT_SUPPORTED = 1020
UNKNOWN_VALUE = 1030
BAD_VALUE = 1040
MISSING_VALUE = 1050
MULTIPLE_VALUES = 1060
UNKNOWN_PARAMETER = 1065
WRONG_TYPE = 1070
TIMEOUT = 1080
MEDIA_TYPE = 1120
SYNTAX = 3000
NO_INDEX = 4000
DUPLICATE_ALIAS = 4020
UNKNOWN_PREPARED = 4040
PREPARED_NAME = 4060
NOT_AGGREGATE = 4210
INDEX_EXISTS = 4300
INTERNAL = 5000
EVALUATION = 5010
INVALID_VALUE = 5030
NAMESPACE_NOT_FOUND = 12002
KEYSPACE_NOT_FOUND = 12003
PRIMARY_INDEX_NOT_FOUND = 12004
INDEX_NOT_FOUND = 12016
SCOPE_NOT_FOUND = 12021
UNAUTHORIZED = 13014

HTTP_STATUSES = {
    READ_ONLY: HTTPStatus.FORBIDDEN,
    NOT_SUPPORTED: HTTPStatus.BAD_REQUEST,
    UNKNOWN_VALUE: HTTPStatus.BAD_REQUEST,
    BAD_VALUE: HTTPStatus.BAD_REQUEST,
    MISSING_VALUE: HTTPStatus.BAD_REQUEST,
    MULTIPLE_VALUES: HTTPStatus.BAD_REQUEST,
    UNKNOWN_PARAMETER: HTTPStatus.BAD_REQUEST,
    WRONG_TYPE: HTTPStatus.BAD_REQUEST,
    TIMEOUT: HTTPStatus.OK,
    MEDIA_TYPE: HTTPStatus.NOT_ACCEPTABLE,
    SYNTAX: HTTPStatus.BAD_REQUEST,
    NO_INDEX: HTTPStatus.NOT_FOUND,
    UNKNOWN_PREPARED: HTTPStatus.NOT_FOUND,
    INDEX_EXISTS: HTTPStatus.CONFLICT,
    EVALUATION: HTTPStatus.OK,
    INVALID_VALUE: HTTPStatus.OK,
    NAMESPACE_NOT_FOUND: HTTPStatus.FAILED_DEPENDENCY,
    KEYSPACE_NOT_FOUND: HTTPStatus.FAILED_DEPENDENCY,
    UNAUTHORIZED: HTTPStatus.UNAUTHORIZED,
}
"""The statuses that are not 500. Errors of evaluation come after the head of the reply was sent, hence their 200."""


class QueryError(Exception):
    """An error that the query service answers with.

    Attributes:
        code: The SQL++ error code.
        msg: The text of it.
    """

    def __init__(self, code: int, msg: str) -> None:
        """Make an error of that code and text."""
        super().__init__(code, msg)
        self.code = code
        self.msg = msg

    @property
    def http_status(self) -> int:
        """The HTTP status of a reply whose first error this is."""
        return HTTP_STATUSES.get(self.code, HTTPStatus.INTERNAL_SERVER_ERROR)

    @property
    def request_status(self) -> str:
        """The member ``status`` of the reply: of a statement that never ran, that failed, or that took too long."""
        if self.code == TIMEOUT:
            return "timeout"
        return "errors" if self.http_status == HTTPStatus.OK else "fatal"


def not_supported(feature: str) -> QueryError:
    """Return the error for what the server can do and the emulator can't."""
    return QueryError(NOT_SUPPORTED, f"{feature} not yet implemented by the emulator")
