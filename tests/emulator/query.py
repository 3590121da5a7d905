"""The query service over HTTP: ``POST /query/service`` and ``GET /admin/ping``."""

import json
import uuid
from http import HTTPStatus
from typing import Any

from aiohttp import web

from tests.emulator.engine import QueryEngine, Result
from tests.emulator.faults import Faults
from tests.emulator.query_errors import AUTHENTICATION, BAD_VALUE, QueryError
from tests.emulator.users import Path, Privilege, Users

SERVICE = "query"


def routes(engine: QueryEngine, users: Users, faults: Faults, node: int) -> list[web.RouteDef]:
    """Return the routes of one node's query service.

    Args:
        engine: Runs the statements; all nodes share it.
        users: Who may.
        faults: What goes wrong on request.
        node: The number of the node, which faults may be limited to.
    """

    async def query(request: web.Request) -> web.Response:
        await faults.before(SERVICE, "query", node)
        members: dict[str, Any] = {}
        try:
            user = users.verify_basic(request.headers.get("Authorization"))
            if user is None:
                raise QueryError(AUTHENTICATION, "Error authorizing against cluster")
            members = await read_request(request)
            fault = faults.take_query_error()
            if fault is not None:
                body = reply(members, errors=[fault.error()]) if fault.body is None else fault.body.encode()
                return response(body, fault.http_status)

            def may(privilege: Privilege, path: Path) -> bool:
                return users.may(user, privilege, path)

            return response(reply(members, engine.run(members, may)))
        except QueryError as error:
            return response(reply(members, errors=[{"code": error.code, "msg": error.msg}]), error.http_status)

    async def ping(_request: web.Request) -> web.Response:
        await faults.before(SERVICE, "ping", node)
        return web.json_response({"status": "OK"})

    return [web.post("/query/service", query), web.get("/admin/ping", ping)]


async def read_request(request: web.Request) -> dict[str, Any]:
    """Return the members of a request; raises QueryError 1040 for a body that is no JSON object."""
    try:
        members = json.loads(await request.read())
    except (ValueError, RecursionError) as error:
        raise QueryError(BAD_VALUE, f"Error processing JSON - cause: {error}") from error
    if not isinstance(members, dict):
        raise QueryError(BAD_VALUE, "Error processing JSON - cause: not an object")
    return members


def reply(members: dict[str, Any], result: Result | None = None, errors: list[dict[str, Any]] | None = None) -> bytes:
    """Return the body of a reply to a request of these members, with rows or errors, in the server's order."""
    parts = [f'"requestID":"{uuid.uuid4()}"'.encode()]
    if isinstance(members.get("client_context_id"), str):
        parts.append(b'"clientContextID":' + json.dumps(members["client_context_id"]).encode())
    if result is None:
        parts += [b'"errors":' + json.dumps(errors).encode(), b'"status":"fatal"']
    else:
        parts += [] if result.prepared is None else [b'"prepared":' + json.dumps(result.prepared).encode()]
        parts += [b'"results":[' + b",\n".join(result.rows) + b"]", b'"status":"success"']
    return b"{\n" + b",\n".join(parts) + b"\n}\n"


def response(body: bytes, status: int = HTTPStatus.OK) -> web.Response:
    """Return the reply with that body, which calls itself JSON whatever it is."""
    headers = {"WWW-Authenticate": 'Basic realm="couchbase"'} if status == HTTPStatus.UNAUTHORIZED else None
    return web.Response(body=body, status=status, content_type="application/json", headers=headers)
