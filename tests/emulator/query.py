"""The query service over HTTP: ``POST /query/service`` and ``GET /admin/ping``."""

import asyncio
import json
import time
import uuid
from http import HTTPStatus
from typing import Any

from aiohttp import web

from tests.emulator.faults import Faults
from tests.emulator.sqlpp import QueryEngine, QueryError, QueryResult
from tests.emulator.sqlpp_errors import BAD_VALUE, MEDIA_TYPE, MULTIPLE_VALUES, UNAUTHORIZED, WRONG_TYPE
from tests.emulator.sqlpp_values import strict_json
from tests.emulator.users import Privilege, Users

SERVICE = "query"
UNAUTHORIZED_MESSAGE = "User does not have credentials to run queries."
ROLES = {
    Privilege.SELECT: "query_select",
    Privilege.INDEX: "query_manage_index",
    Privilege.WRITE: "query_update",
}
"""The role that would do, for the message."""
FLAGS = {"true": True, "false": False}
FORM_FLAGS = ("readonly", "metrics", "signature", "pretty", "auto_execute", "preserve_expiry", "tximplicit")


def routes(engine: QueryEngine, users: Users, faults: Faults, node: int) -> list[web.RouteDef]:
    """Return the routes of one node's query service.

    Args:
        engine: Runs the statements; all nodes share it.
        users: Who may.
        faults: What goes wrong on request.
        node: The number of the node, which faults may be limited to.
    """

    async def query(request: web.Request) -> web.Response:
        started = time.perf_counter()
        await faults.before(SERVICE, "query", node)
        reply = Reply(started)
        try:
            user = users.verify_basic(request.headers.get("Authorization"))
            if user is None:
                raise QueryError(UNAUTHORIZED, UNAUTHORIZED_MESSAGE)
            members = await read_request(request)
            reply.read_members(members)
            fault = faults.take_query_error()
            if fault is not None and fault.body is not None:
                return web.Response(text=fault.body, status=fault.http_status, content_type="application/json")
            if fault is not None:
                return reply.failed(QueryError(fault.code, fault.msg), fault.http_status, retry=bool(fault.retry))
            if not users.unrestricted(user):
                check_roles(users, user, engine, members)
            return reply.succeeded(await run(engine, members))
        except QueryError as error:
            return reply.failed(error, error.http_status)

    async def ping(_request: web.Request) -> web.Response:
        await faults.before(SERVICE, "ping", node)
        return web.json_response({"status": "OK"})

    return [web.post("/query/service", query), web.get("/admin/ping", ping)]


def check_roles(users: Users, user: str, engine: QueryEngine, members: dict[str, Any]) -> None:
    """Raise QueryError 13014 where the user has no role for what the statement does; others for a bad request."""
    needed = engine.needs(members)
    if needed is not None and not users.may(user, *needed):
        privilege, path = needed
        role = ROLES[privilege]
        raise QueryError(
            UNAUTHORIZED,
            f"User does not have credentials to run {privilege.name} queries on {':'.join(path)}. "
            f"Add role {role} on {':'.join(path)} to allow the statement to run.",
        )


async def run(engine: QueryEngine, members: dict[str, Any]) -> QueryResult:
    """Run a request, letting the event loop turn whenever the engine pauses; raises QueryError."""
    steps = engine.steps(members)
    while True:
        try:
            next(steps)
        except StopIteration as done:
            result: QueryResult = done.value
            return result
        await asyncio.sleep(0)


async def read_request(request: web.Request) -> dict[str, Any]:
    """Return the members of a request, from a JSON body or from a form.

    Raises:
        QueryError: 1120 for another media type, 1040 for a body that can't be read, 1060 and 1070 for a bad form.
    """
    body = await request.read()
    if request.content_type == "application/json":
        members = _parse("JSON", body)
        if not isinstance(members, dict):
            raise QueryError(BAD_VALUE, "Error processing JSON - cause: not an object")
        return members
    if request.content_type != "application/x-www-form-urlencoded":
        raise QueryError(MEDIA_TYPE, f"Unsupported media type: {request.content_type}")
    form = await request.post()
    for name in form:
        if len(form.getall(name)) > 1:
            raise QueryError(MULTIPLE_VALUES, f"Multiple values for {name}.")
    return {name: _form_value(name, value) for name, value in form.items()}


def _form_value(name: str, value: Any) -> Any:
    """Return a form's field as the JSON body would have it: parameters are JSON, flags are true or false."""
    if name.startswith("$") or name == "args":
        return _parse(name, value)
    if name in FORM_FLAGS:
        if value not in FLAGS:
            raise QueryError(WRONG_TYPE, f"{name} has to be of type boolean")
        return FLAGS[value]
    return value


def _parse(feature: str, text: str | bytes) -> Any:
    try:
        return strict_json(text if isinstance(text, str) else text.decode())
    except (ValueError, RecursionError) as error:
        raise QueryError(BAD_VALUE, f"Error processing {feature} - cause: {error}") from error


class Reply:
    """The reply to one request, in the server's form and order of members."""

    def __init__(self, started: float) -> None:
        """Begin one; `started` is when the request came, by ``time.perf_counter``."""
        self._started = started
        self._head = [f'"requestID":"{uuid.uuid4()}"'.encode()]
        self._signature = True
        self._metrics = True

    def read_members(self, members: dict[str, Any]) -> None:
        """Take from the request what the reply's form depends on."""
        context_id = members.get("client_context_id")
        if isinstance(context_id, str):
            self._head.append(b'"clientContextID":' + json.dumps(context_id).encode())
        self._signature = members.get("signature") is not False
        self._metrics = members.get("metrics") is not False

    def succeeded(self, result: QueryResult) -> web.Response:
        """Reply with rows."""
        parts = self._head
        if result.prepared is not None:
            parts.append(b'"prepared":' + json.dumps(result.prepared).encode())
        if self._signature:
            parts.append(b'"signature":' + json.dumps(result.signature).encode())
        parts.append(b'"results":[' + b",\n".join(result.rows) + b"]")
        counts = f'"resultCount":{len(result.rows)},"resultSize":{sum(map(len, result.rows))}'
        if result.sort_count:
            counts += f',"sortCount":{result.sort_count}'
        return self._finish("success", 200, counts)

    def failed(self, error: QueryError, http_status: int, *, retry: bool = False) -> web.Response:
        """Reply with an error, and whether the request may be tried again."""
        if error.request_status != "fatal":
            self._head.append(b'"results":[]')
        described: dict[str, Any] = {"code": error.code, "msg": error.msg} | ({"retry": True} if retry else {})
        self._head.append(b'"errors":' + json.dumps([described]).encode())
        return self._finish(error.request_status, http_status, '"resultCount":0,"resultSize":0,"errorCount":1')

    def _finish(self, status: str, http_status: int, counts: str) -> web.Response:
        parts = self._head
        parts.append(f'"status":"{status}"'.encode())
        if self._metrics:
            elapsed = f"{(time.perf_counter() - self._started) * 1000:.6f}ms"
            times = f'"elapsedTime":"{elapsed}","executionTime":"{elapsed}"'
            parts.append(f'"metrics":{{{times},{counts},"serviceLoad":1}}'.encode())
        body = b"{\n" + b",\n".join(parts) + b"\n}\n"
        headers = {"WWW-Authenticate": 'Basic realm="couchbase"'} if http_status == HTTPStatus.UNAUTHORIZED else None
        return web.Response(body=body, status=http_status, content_type="application/json", headers=headers)
