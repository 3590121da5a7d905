"""Sockets: a port that is kept while its server goes and comes back, and one node's services on such ports."""

import asyncio
import contextlib
import socket
import ssl
from collections.abc import Callable

from aiohttp import web

from tests.emulator.faults import SERVICES
from tests.emulator.kv import KeyValueService
from tests.emulator.layout import NodePorts

BACKLOG = 1024


class PortInUseError(Exception):
    """Something else listens on a port that was asked for; the message names the port."""


class Listener:
    """A TCP server whose port stays reserved while it does not listen.

    A socket that is bound to the port but never listens is held all the time (Linux lets another listen beside it with
    SO_REUSEADDR), so that a stopped node's clients are refused, and nobody else gets its port.
    """

    def __init__(self, host: str, port: int) -> None:
        """Reserve `port` of `host`, 0 for any free one; raises PortInUseError."""
        self._host = host
        self._reserved = _bound(host, port)
        self.port: int = self._reserved.getsockname()[1]
        self._server: asyncio.Server | None = None

    async def start(self, factory: Callable[[], asyncio.BaseProtocol], context: ssl.SSLContext | None) -> None:
        """Listen, unless it does already; raises PortInUseError."""
        if self._server is None:
            listening = _bound(self._host, self.port)
            try:
                self._server = await asyncio.get_running_loop().create_server(
                    factory, sock=listening, ssl=context, backlog=BACKLOG
                )
            except OSError as error:
                listening.close()
                raise PortInUseError(f"cannot listen on port {self.port} of {self._host}: {error.strerror}") from error

    def stop(self) -> None:
        """Listen no more; connections stay as they are."""
        if self._server is not None:
            self._server.close()
            self._server = None

    def close(self) -> None:
        """Stop, and give the port back."""
        self.stop()
        self._reserved.close()


def _bound(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    bound = socket.socket(family, socket.SOCK_STREAM)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind((host, port))
    except OSError as error:
        bound.close()
        raise PortInUseError(f"cannot listen on port {port} of {host}: {error.strerror}") from error
    return bound


class Node:
    """One node: key-value, query and management, each on a plain port and, with TLS, on another."""

    def __init__(
        self,
        host: str,
        ports: NodePorts,
        key_value: KeyValueService,
        applications: dict[str, web.Application],
        context: ssl.SSLContext | None,
    ) -> None:
        """Reserve the node's ports; raises PortInUseError, with none kept.

        Args:
            host: The address to listen on.
            ports: The plain ports wanted, 0 for free ones; it is told which they are, and those with TLS.
            key_value: The node's key-value service.
            applications: Its HTTP services by name.
            context: The certificate for the TLS ports; None: there are none.
        """
        self.ports = ports
        self.key_value = key_value
        self._context = context
        self._runners = {
            service: web.AppRunner(application, access_log=None, handler_cancellation=True, shutdown_timeout=0)
            for service, application in applications.items()
        }
        self._listeners: dict[tuple[str, bool], Listener] = {}
        try:
            for encrypted, wanted in ((False, ports.plain), (True, ports.tls)):
                for service in SERVICES if context or not encrypted else ():
                    listener = Listener(host, wanted.get(service, 0))
                    self._listeners[service, encrypted] = listener
                    wanted[service] = listener.port
        except PortInUseError:
            self._close_ports()
            raise

    async def start(self) -> None:
        """Listen on all ports; raises PortInUseError."""
        for runner in self._runners.values():
            if runner.server is None:
                await runner.setup()
        for (service, encrypted), listener in self._listeners.items():
            factory: Callable[[], asyncio.BaseProtocol]
            if service == "kv":
                factory = self.key_value.encrypted if encrypted else self.key_value.plain
            else:
                server = self._runners[service].server
                assert server is not None
                factory = server
            await listener.start(factory, self._context if encrypted else None)

    def stop(self) -> None:
        """Listen no more and cut all connections."""
        for listener in self._listeners.values():
            listener.stop()
        self.drop_connections(None)

    def drop_connections(self, service: str | None) -> None:
        """Cut the current connections of a service, or of all."""
        if service in (None, "kv"):
            self.key_value.drop_connections()
        for name, runner in self._runners.items():
            if service in (None, name) and runner.server is not None:
                for connection in runner.server.connections:
                    if connection.transport is not None:
                        connection.transport.abort()

    def connections(self) -> dict[str, int]:
        """Count the open connections by service."""
        counts = {"kv": len(self.key_value.connections)}
        for name, runner in self._runners.items():
            counts[name] = 0 if runner.server is None else len(runner.server.connections)
        return counts

    async def close(self) -> None:
        """Stop for good."""
        self.stop()
        for runner in self._runners.values():
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(runner.cleanup(), 5)
        self._close_ports()

    def _close_ports(self) -> None:
        """Give the ports back."""
        for listener in self._listeners.values():
            listener.close()
