"""The HTTP side of the faults: a port of its own, for tests and for people with curl."""

import json
from typing import Any

from aiohttp import web

from tests.emulator.faults import CATALOGUE, FaultError, Faults
from tests.emulator.nodes import Node
from tests.emulator.wire import Opcode


def describe(faults: Faults) -> dict[str, Any]:
    """Return what can be asked of the faults' port, every fault with its parameters, and which are on."""
    return {
        "requests": [
            "PUT /faults/NAME with the parameters as JSON: switch it on, or do it",
            "DELETE /faults/NAME, DELETE /faults: switch one off, or all",
            "POST /nodes/N/stop, POST /nodes/N/start",
            'PUT /token with {"token": "..."} or {"token": null}',
            'PUT /password with {"user": "...", "password": "..."}',
            "GET /stats: requests by operation, and open connections",
        ],
        "faults": {
            name: {"does": does, "parameters": {key: parameter.describe() for key, parameter in parameters.items()}}
            for name, (does, parameters) in CATALOGUE.items()
        },
        "active": faults.active(),
    }


def stats(nodes: list[Node], faults: Faults) -> dict[str, Any]:
    """Return how many key-value requests of each operation arrived, in all and by node, and what is connected."""
    by_node = [
        {_operation_name(opcode): count for opcode, count in enumerate(node.key_value.counts) if count}
        for node in nodes
    ]
    connections = [node.connections() for node in nodes]
    return {
        "operations": {name: sum(counts.get(name, 0) for counts in by_node) for name in sorted(set().union(*by_node))},
        "requests": {service: count for service, count in faults.requests.items() if service != "kv"},
        "connections": sum(sum(counts.values()) for counts in connections),
        "nodes": [
            {"operations": operations, "connections": connected}
            for operations, connected in zip(by_node, connections, strict=True)
        ],
    }


def _operation_name(opcode: int) -> str:
    try:
        return Opcode(opcode).name.lower()
    except ValueError:
        return f"0x{opcode:02x}"


def application(faults: Faults, nodes: list[Node]) -> web.Application:
    """Return the application of the faults' port."""

    async def root(_: web.Request) -> web.Response:
        return web.json_response(describe(faults), dumps=lambda value: json.dumps(value, indent=2) + "\n")

    async def switch_on(request: web.Request) -> web.Response:
        await faults.switch_on(request.match_info["name"], **await _parameters(request))
        return web.json_response({"active": faults.active()})

    async def switch_off(request: web.Request) -> web.Response:
        faults.switch_off(request.match_info.get("name"))
        return web.json_response({"active": faults.active()})

    async def change_node(request: web.Request) -> web.Response:
        number, state = request.match_info["node"], request.match_info["state"]
        await faults.switch_on("node", node=int(number) if len(number) < 10 else -1, state=state)
        return web.json_response({"node": int(number), "state": state})

    async def set_token(request: web.Request) -> web.Response:
        await faults.switch_on("token", **await _parameters(request))
        return web.json_response({})

    async def set_password(request: web.Request) -> web.Response:
        await faults.switch_on("password", **await _parameters(request))
        return web.json_response({})

    async def show_stats(_: web.Request) -> web.Response:
        return web.json_response(stats(nodes, faults))

    app = web.Application(middlewares=[_errors], client_max_size=65_536)
    app.add_routes(
        [
            web.get("/", root),
            web.get("/stats", show_stats),
            web.put("/faults/{name}", switch_on),
            web.delete("/faults/{name}", switch_off),
            web.delete("/faults", switch_off),
            web.post(r"/nodes/{node:\d+}/{state:stop|start}", change_node),
            web.put("/token", set_token),
            web.put("/password", set_password),
        ]
    )
    return app


@web.middleware
async def _errors(request: web.Request, handler: Any) -> web.StreamResponse:
    """Answer what is wrong with a request by 400 and one clear line."""
    try:
        response: web.StreamResponse = await handler(request)
    except FaultError as error:
        return web.json_response({"error": str(error)}, status=400)
    return response


async def _parameters(request: web.Request) -> dict[str, Any]:
    """Return the JSON object in the body, {} where there is no body; raises FaultError for anything else."""
    try:
        parameters = json.loads(await request.read() or b"{}")
    except (ValueError, RecursionError):
        raise FaultError("the body must be JSON") from None
    if not isinstance(parameters, dict):
        raise FaultError("the body must be a JSON object")
    return parameters
