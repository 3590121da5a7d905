"""Raw HTTP clients for tests and measurements: exact bytes out, strictly parsed answers in; what a process costs."""

import os
import socket
import ssl
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Self

import h11

from tests.service import Answer, TlsPort

TIMEOUT_SECONDS = 30.0
RECEIVE_BYTES = 65_536


class Conversation:
    """One connection to a server: raw bytes out, answers in, parsed by h11, which refuses what is not HTTP.

    Args:
        port: where the server listens, on 127.0.0.1; of a `TlsPort` by TLS.
        receive_buffer_bytes: of the socket, None for the system's own; small to make the client a slow reader.
    """

    def __init__(self, port: int, receive_buffer_bytes: int | None = None) -> None:
        """Connect.

        Raises:
            OSError: it cannot be reached.
        """
        self.socket = socket.socket()
        try:
            if receive_buffer_bytes is not None:  # before connecting: it decides the window that is announced
                self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer_bytes)
            self.socket.settimeout(TIMEOUT_SECONDS)
            self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self.socket.connect(("127.0.0.1", int(port)))
            if isinstance(port, TlsPort):
                self.socket = port.tls.wrap_socket(self.socket, server_hostname="127.0.0.1", suppress_ragged_eofs=False)
        except OSError:
            self.socket.close()
            raise
        self._parser: h11.Connection | None = None
        self._rest = b""

    def __enter__(self) -> Self:
        """Return it, connected."""
        return self

    def __exit__(self, *error: object) -> None:
        """Close the socket."""
        self.socket.close()

    def send(self, data: bytes) -> None:
        """Send all of it; a server that has closed already is no error, its answer is still to be read."""
        with suppress(BrokenPipeError, ConnectionResetError):
            self.socket.sendall(data)

    def end(self) -> None:
        """Say that nothing more will be sent, and go on reading."""
        with suppress(OSError):  # the server has closed already
            socket.socket.shutdown(self.socket, socket.SHUT_WR)  # of TLS too, whose own would give up reading

    def answer(self, method: str = "GET") -> Answer | None:
        """Return the next answer (a 100 is one of its own), None where the server has closed instead.

        Args:
            method: of the request that is answered: HEAD has no body.

        Raises:
            h11.RemoteProtocolError: what came is not HTTP, or is cut short.
            OSError: the connection was reset, or nothing came in time.
        """
        parser = self._parser or self._new_parser(method)
        self._parser = None
        status, headers, body = 0, {}, b""
        while True:
            event = parser.next_event()
            if event is h11.NEED_DATA:
                data = self.socket.recv(RECEIVE_BYTES)
                if not data and not status and parser.trailing_data[0] == b"":
                    return None
                parser.receive_data(data)
            elif isinstance(event, h11.InformationalResponse):
                self._parser = parser
                return Answer(event.status_code, {}, b"")
            elif isinstance(event, h11.Response):
                status = event.status_code
                headers = {name.decode(): value.decode("latin-1") for name, value in event.headers}
            elif isinstance(event, h11.Data):
                body += bytes(event.data)
            elif isinstance(event, h11.EndOfMessage):
                self._rest = parser.trailing_data[0]
                return Answer(status, headers, body)
            else:
                raise h11.RemoteProtocolError(f"unexpected {event}")

    def _new_parser(self, method: str) -> h11.Connection:
        """Return a parser for one answer, which knows the question."""
        parser = h11.Connection(h11.CLIENT)
        parser.send(h11.Request(method=method, target="/", headers=[("Host", "a")]))
        parser.send(h11.EndOfMessage())
        if self._rest:
            parser.receive_data(self._rest)
        self._rest = b""
        return parser

    def has_news(self, seconds: float) -> bool:
        """Wait so long for a byte of an answer, or the end; tell whether there is one."""
        self.socket.settimeout(seconds)
        try:
            self._rest += self.socket.recv(RECEIVE_BYTES)
        except TimeoutError:
            return False
        finally:
            self.socket.settimeout(TIMEOUT_SECONDS)
        return True

    def ask(self, request: bytes, method: str = "GET") -> Answer:
        """Send one request and return its answer.

        Raises:
            ConnectionError: the server closed instead of answering.
        """
        self.send(request)
        reply = self.answer(method)
        if reply is None:
            raise ConnectionError("closed without an answer")
        return reply

    def wait_for_end(self) -> None:
        """Read until the server closes.

        Raises:
            AssertionError: it said something more.
            OSError: it reset the connection, or did not close in time.
        """
        more = self._rest or self.socket.recv(RECEIVE_BYTES)
        if more:
            raise AssertionError(f"more than was expected: {more[:200]!r}")


def request(path: str, token: str | None = None, *fields: str, method: str = "GET") -> bytes:
    """Return a request's bytes.

    Args:
        path: its target.
        token: what to be authorised with.
        *fields: further whole field lines, without their ends.
        method: its method.
    """
    lines = [f"{method} {path} HTTP/1.1", "Host: a", *([f"Authorization: Bearer {token}"] if token else []), *fields]
    return ("\r\n".join(lines) + "\r\n\r\n").encode()


@contextmanager
def crowd(port: int, count: int, receive_buffer_bytes: int | None = None) -> Iterator[list[socket.socket]]:
    """Open many connections at once; all are closed at the end of the block.

    Raises:
        OSError: one cannot be opened.
    """
    clients: list[socket.socket] = []
    try:
        for _ in range(count):
            clients.append(Conversation(port, receive_buffer_bytes).socket)
        yield clients
    finally:
        for client in clients:
            client.close()


def stuff(clients: Sequence[socket.socket], data: bytes) -> int:
    """Send as much of `data` to each as its socket takes without waiting; return how many bytes all took."""
    taken = 0
    for client in clients:
        client.setblocking(False)
        with suppress(BlockingIOError, BrokenPipeError, ConnectionResetError, ssl.SSLWantWriteError):
            rest = memoryview(data)
            while rest:  # of TLS it takes a record at a time
                sent = client.send(rest)
                taken, rest = taken + sent, rest[sent:]
    return taken


def resident_bytes(pid: int) -> int:
    """Return how much memory a process holds (Linux)."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def descriptors(pid: int) -> int:
    """Return how many descriptors a process has open (Linux)."""
    return len(os.listdir(f"/proc/{pid}/fd"))


def threads(pid: int) -> int:
    """Return how many threads a process has."""
    return len(os.listdir(f"/proc/{pid}/task"))


def cpu_seconds(pid: int) -> float:
    """Return how much processor time a process has used, its own and the system's for it (Linux)."""
    ticks = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]
    return sum(map(int, ticks)) / os.sysconf("SC_CLK_TCK")
