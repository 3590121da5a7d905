"""Faults that a test switches on and off while the emulator runs.

`Faults` holds which are on and answers the services' questions (how long to wait, which status to give). What a fault
does at once (cut connections, stop a node, change a password) is an action that the emulator registers. ``control.py``
is the HTTP side.
"""

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any

from tests.emulator.wire import DOCUMENT_OPCODES, OPERATIONS, Opcode, Status

SERVICES = ("kv", "query", "management")
MAX_LATENCY_MS = 600_000
MAX_COUNT = 1_000_000_000
MAX_TEXT = 4096


TYPES = {str: "a text", int: "an integer", bool: "true or false"}


class FaultError(ValueError):
    """A fault, or a parameter of one, is not what it should be; the message says what is."""


@dataclass(frozen=True)
class Parameter:
    """One parameter of a fault: its type, whether it must be given, what it is otherwise, and its bounds or values."""

    type: type
    help: str
    required: bool = False
    default: Any = None
    values: tuple[Any, ...] = ()
    least: int = 0
    most: int = MAX_COUNT
    nullable: bool = False

    def check(self, name: str, value: Any) -> Any:
        """Return the value if it will do, or raise FaultError."""
        if value is None and self.nullable:
            return None
        if type(value) is not self.type:
            raise FaultError(f"{name} must be {TYPES[self.type]}, not {value!r}")
        if self.values and value not in self.values:
            raise FaultError(f"{name} must be one of {', '.join(map(str, self.values))}, not {value!r}")
        if isinstance(value, int) and not self.least <= value <= self.most:
            raise FaultError(f"{name} must be from {self.least} to {self.most}, not {value}")
        if isinstance(value, str) and len(value) > MAX_TEXT:
            raise FaultError(f"{name} must have at most {MAX_TEXT} characters")
        return value

    def describe(self) -> str:
        """Say it in one line."""
        parts = [TYPES[self.type], self.help]
        parts += [f"one of {', '.join(self.values)}"] if self.values and len(self.values) < len(OPERATIONS) else []
        parts += ["required"] if self.required else [f"default {self.default}"] if self.default is not None else []
        return "; ".join(parts)


OPERATION = Parameter(str, "the key-value operation, such as get; absent: see the fault", values=tuple(OPERATIONS))
NODE = Parameter(int, "the node's number, from 0; absent: all", most=1)
COUNT = Parameter(int, "how many requests fail; absent: until switched off", least=1)
SERVICE = Parameter(str, "the service", default="kv", values=SERVICES)

CATALOGUE: dict[str, tuple[str, dict[str, Parameter]]] = {
    "latency": (
        "each request waits before it is answered (operation absent: all)",
        {
            "ms": Parameter(int, "milliseconds", required=True, most=MAX_LATENCY_MS),
            "service": SERVICE,
            "operation": OPERATION,
            "node": NODE,
        },
    ),
    "temporary_failure": (
        "key-value requests fail with 0x86 (operation absent: all that name a document)",
        {"count": COUNT, "operation": OPERATION, "node": NODE},
    ),
    "status": (
        "key-value requests fail with a status (operation absent: all that name a document)",
        {
            "status": Parameter(int, "the status, such as 134", required=True, least=1, most=0xFFFF),
            "count": COUNT,
            "operation": OPERATION,
            "node": NODE,
        },
    ),
    "query_error": (
        "queries fail with an error",
        {
            "code": Parameter(int, "the error's code, such as 5000", default=5000),
            "msg": Parameter(str, "the error's message", default="injected error"),
            "count": COUNT,
            "http_status": Parameter(int, "the HTTP status", default=500, least=200, most=599),
            "retry": Parameter(bool, "the error's member of that name; absent: it has none"),
            "body": Parameter(str, "what is sent instead of the error, such as a page or JSON that is cut off"),
        },
    ),
    "forget": ("the query service forgets its prepared statements, as one does that starts again", {}),
    "freeze": (
        "connections are accepted and never answered (service absent: all)",
        {"service": Parameter(str, "the service", values=SERVICES), "node": NODE},
    ),
    "drop": (
        "all current connections are cut, at once and once (service absent: all)",
        {"service": Parameter(str, "the service", values=SERVICES), "node": NODE},
    ),
    "node": (
        "a node stops, its ports closed, or starts again on the same ports",
        {
            "node": Parameter(int, "the node's number, from 0", required=True, most=1),
            "state": Parameter(str, "what it is to do", default="stop", values=("stop", "start")),
        },
    ),
    "token": (
        "the field `token` of the document service_auth:1 changes; null deletes the document",
        {"token": Parameter(str, "the token", required=True, nullable=True)},
    ),
    "password": (
        "a user's password changes, for sign-ins from now on",
        {"user": Parameter(str, "the user", required=True), "password": Parameter(str, "the password", required=True)},
    ),
}
"""Every fault: what it does and its parameters."""
LASTING = ("latency", "temporary_failure", "status", "query_error", "freeze")
"""The faults that are on until they are switched off; the others happen once."""
REPLACED_BY = ("service", "operation", "node")
"""A fault that is switched on again with the same of these takes the place of the one before."""


@dataclass(slots=True)
class Rule:
    """One fault that is on."""

    name: str
    parameters: dict[str, Any]
    remaining: int | None

    def applies(self, service: str, operation: str | None, node: int) -> bool:
        """Say whether it is about a request of this service and key-value operation, at this node."""
        wanted = self.parameters
        return (
            wanted.get("service") in (None, service)
            and wanted.get("node") in (None, node)
            and wanted.get("operation") in (None, operation)
        )

    def spent(self) -> bool:
        """Count one request down; True when that was the last."""
        if self.remaining is None:
            return False
        self.remaining -= 1
        return self.remaining <= 0


@dataclass(frozen=True)
class QueryFault:
    """What a query is to fail with; see the parameters of ``query_error``."""

    code: int
    msg: str
    http_status: int
    retry: bool | None
    body: str | None

    def error(self) -> dict[str, Any]:
        """Return the error as it is in the reply."""
        return {"code": self.code, "msg": self.msg} | ({} if self.retry is None else {"retry": self.retry})


def check_parameters(name: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return a fault's parameters with the defaults filled in, or raise FaultError."""
    if name not in CATALOGUE:
        raise FaultError(f"there is no fault {name!r}; there are {', '.join(CATALOGUE)}")
    known = CATALOGUE[name][1]
    for parameter in given:
        if parameter not in known:
            raise FaultError(f"{name} has no parameter {parameter!r}; it has {', '.join(known)}")
    checked = {}
    for parameter, kind in known.items():
        if parameter in given:
            checked[parameter] = kind.check(parameter, given[parameter])
        elif kind.required:
            raise FaultError(f"{name} needs the parameter {parameter!r}: {kind.help}")
        else:
            checked[parameter] = kind.default
    if checked.get("operation") is not None and checked.get("service", "kv") != "kv":
        raise FaultError("operation is for the service kv only")
    return checked


class Faults:
    """Which faults are on, and what they mean for each request."""

    def __init__(self) -> None:
        """Start with none."""
        self._rules: list[Rule] = []
        self._changed = asyncio.Event()
        self.actions: dict[str, Callable[[dict[str, Any]], Awaitable[None]]] = {}
        """What the faults that happen once do, by name; they may raise FaultError."""
        self.watchers: list[Callable[[], None]] = []
        """Called after each change."""
        self.any_kv = False
        """Whether a key-value request needs to ask at all: without faults, it does not."""
        self.requests = dict.fromkeys(SERVICES, 0)
        """How many HTTP requests of each service arrived; key-value counts its own."""

    async def switch_on(self, name: str, **parameters: Any) -> None:
        """Switch a fault on, or do it if it is one that happens once; raises FaultError."""
        checked = check_parameters(name, parameters)
        if name not in LASTING:
            await self.actions[name](checked)
            return
        identity = [checked.get(part) for part in REPLACED_BY]
        self._rules = [
            rule
            for rule in self._rules
            if rule.name != name or [rule.parameters.get(part) for part in REPLACED_BY] != identity
        ]
        self._rules.append(Rule(name, checked, checked.get("count")))
        self._tell()

    def switch_off(self, name: str | None = None) -> None:
        """Switch one fault off, or all; raises FaultError where there is none of that name."""
        if name is not None and name not in CATALOGUE:
            raise FaultError(f"there is no fault {name!r}; there are {', '.join(CATALOGUE)}")
        self._rules = [rule for rule in self._rules if name is not None and rule.name != name]
        self._tell()

    def active(self) -> list[dict[str, Any]]:
        """List the faults that are on."""
        return [
            {"fault": rule.name}
            | {name: value for name, value in rule.parameters.items() if value is not None}
            | ({} if rule.remaining is None else {"remaining": rule.remaining})
            for rule in self._rules
        ]

    def frozen(self, service: str, node: int) -> bool:
        """Say whether a service of a node hangs."""
        return any(rule.name == "freeze" and rule.applies(service, None, node) for rule in self._rules)

    def delay(self, service: str, opcode: int | None, node: int) -> float:
        """Return for how many seconds a request waits; `opcode` is None for HTTP."""
        operation = None if opcode is None else _operation(opcode)
        return sum(
            float(rule.parameters["ms"]) / 1000
            for rule in self._rules
            if rule.name == "latency" and rule.applies(service, operation, node)
        )

    def take_status(self, opcode: int, node: int) -> int | None:
        """Return the status that a key-value request is to fail with, counting it, or None."""
        operation = _operation(opcode)
        for rule in self._rules:
            if rule.name not in ("temporary_failure", "status") or not rule.applies("kv", operation, node):
                continue
            if rule.parameters["operation"] is None and opcode not in DOCUMENT_OPCODES:
                continue
            if rule.spent():
                self._rules.remove(rule)
                self._tell()
            return int(rule.parameters.get("status", Status.TEMPORARY_FAILURE))
        return None

    def take_query_error(self) -> QueryFault | None:
        """Return the error that a query is to fail with, counting it, or None."""
        for rule in self._rules:
            if rule.name == "query_error":
                if rule.spent():
                    self._rules.remove(rule)
                    self._tell()
                return QueryFault(*(rule.parameters[name] for name in ("code", "msg", "http_status", "retry", "body")))
        return None

    async def before(self, service: str, operation: str, node: int) -> None:
        """Wait as the faults say before an HTTP request is answered; while the service is frozen, for ever."""
        self.requests[service] += 1
        while self.frozen(service, node):
            await self._changed.wait()
        delay = self.delay(service, None, node)
        if delay:
            await asyncio.sleep(delay)

    def _tell(self) -> None:
        self.any_kv = any(
            rule.name in ("temporary_failure", "status", "freeze")
            or (rule.name == "latency" and rule.parameters["service"] == "kv")
            for rule in self._rules
        )
        self._changed.set()
        self._changed = asyncio.Event()
        for watcher in self.watchers:
            watcher()


def _operation(opcode: int) -> str:
    """Return what the faults call an opcode."""
    try:
        return Opcode(opcode).name.lower()
    except ValueError:
        return f"0x{opcode:02x}"
