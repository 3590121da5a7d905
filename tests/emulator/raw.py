"""A key-value client for tests that sends whatever bytes it is told to, right or wrong."""

import socket
import struct
from typing import Self

from scramp import ScramClient  # type: ignore[import-untyped]

from tests.emulator.wire import vbucket_of

TIMEOUT_SECONDS = 5.0


class RawClient:
    """A client without manners: it sends whatever bytes a test wants."""

    def __init__(self, port: int) -> None:
        """Connect to a node's key-value port."""
        self._socket = socket.create_connection(("127.0.0.1", port), timeout=TIMEOUT_SECONDS)

    def __enter__(self) -> Self:
        """Use it."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close it."""
        self._socket.close()

    def send(self, data: bytes) -> None:
        """Send bytes as they are."""
        self._socket.sendall(data)

    def ask(
        self, opcode: int, key: bytes = b"", extras: bytes = b"", value: bytes = b"", at: bytes | None = None
    ) -> tuple[int, bytes]:
        """Send one request, to the vBucket of the key `at`; return the reply's status and body."""
        self.send(packet(opcode, key, extras, value, at))
        return self.reply()

    def reply(self) -> tuple[int, bytes]:
        """Receive one reply: its status and body."""
        header = self._receive(24)
        status, length = struct.unpack(">HL", header[6:12])
        return status, self._receive(length)

    def closed(self) -> bool:
        """Say whether the server closes the connection without another word."""
        try:
            return self._socket.recv(1) == b""
        except ConnectionResetError:
            return True

    def open_bucket(self, user: str, password: str) -> None:
        """Say hello, sign in and select the bucket, as SDKs do."""
        client = ScramClient(["SCRAM-SHA-512"], user, password)
        assert self.ask(0x1F, value=struct.pack(">H", 0x12))[0] == 0
        status, first = self.ask(0x21, b"SCRAM-SHA512", value=client.get_client_first().encode())
        assert status == 0x21
        client.set_server_first(first.decode())
        status, final = self.ask(0x22, b"SCRAM-SHA512", value=client.get_client_final().encode())
        assert status == 0
        client.set_server_final(final.decode())
        assert self.ask(0x89, b"sample_app")[0] == 0

    def _receive(self, length: int) -> bytes:
        data = b""
        while len(data) < length:
            chunk = self._socket.recv(length - len(data))
            assert chunk, "the connection was closed"
            data += chunk
        return data


def packet(opcode: int, key: bytes = b"", extras: bytes = b"", value: bytes = b"", at: bytes | None = None) -> bytes:
    """Put a request together."""
    vbucket = 0 if at is None else vbucket_of(at)
    length = len(key) + len(extras) + len(value)
    header = struct.pack(">BBHBBHLLQ", 0x80, opcode, len(key), len(extras), 0, vbucket, length, 7, 0)
    return header + extras + key + value
