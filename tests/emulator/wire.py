"""The key-value protocol's packets: opcodes, statuses and their layout.

A packet is a 24-byte header and a body of extras, key and value, in that order. Numbers are big-endian. The source is
kv_engine's docs/BinaryProtocol.md.
"""

import struct
import zlib
from enum import IntEnum
from typing import NamedTuple

HEADER = struct.Struct(">BBHBBHLLQ")
"""Magic, opcode, key bytes, extras bytes, datatype, vBucket (in a reply: status), body bytes, opaque, CAS."""
HEADER_BYTES = HEADER.size
REQUEST_MAGIC = 0x80
REPLY_MAGIC = 0x81
MAX_PACKET_BYTES = 30 * 1024 * 1024
"""The server's ``max_packet_size``: past this it closes the connection instead of answering E2BIG."""
VBUCKETS = 1024


class Opcode(IntEnum):
    """The commands that are served; any other is answered with ``Status.UNKNOWN_COMMAND``."""

    GET = 0x00
    SET = 0x01
    ADD = 0x02
    DELETE = 0x04
    NOOP = 0x0A
    HELLO = 0x1F
    SASL_LIST_MECHS = 0x20
    SASL_AUTH = 0x21
    SASL_STEP = 0x22
    GET_REPLICA = 0x83
    SELECT_BUCKET = 0x89
    EXISTS = 0xA0
    GET_CLUSTER_CONFIG = 0xB5
    GET_COLLECTION_ID = 0xBB
    LOOKUP_IN = 0xD0
    GET_ERROR_MAP = 0xFE


DOCUMENT_OPCODES = frozenset(
    {Opcode.GET, Opcode.SET, Opcode.ADD, Opcode.DELETE, Opcode.GET_REPLICA, Opcode.EXISTS, Opcode.LOOKUP_IN}
)
"""The commands that name a document, and so a collection and a vBucket."""

OPERATIONS: dict[str, int] = {opcode.name.lower(): opcode for opcode in Opcode}
"""What the faults and the statistics call each command."""


class Status(IntEnum):
    """What a reply says of its request; the sub-document ones also stand for single paths."""

    SUCCESS = 0x00
    NOT_FOUND = 0x01
    EXISTS = 0x02
    TOO_BIG = 0x03
    INVALID = 0x04
    NO_BUCKET = 0x08
    NOT_MY_VBUCKET = 0x07
    AUTH_ERROR = 0x20
    AUTH_CONTINUE = 0x21
    NO_ACCESS = 0x24
    UNKNOWN_COMMAND = 0x81
    OUT_OF_MEMORY = 0x82
    NOT_SUPPORTED = 0x83
    INTERNAL_ERROR = 0x84
    TEMPORARY_FAILURE = 0x86
    UNKNOWN_COLLECTION = 0x88
    UNKNOWN_SCOPE = 0x8C
    PATH_NOT_FOUND = 0xC0
    PATH_MISMATCH = 0xC1
    NOT_JSON = 0xC6
    MULTI_PATH_FAILURE = 0xCC


JSON_DATATYPE = 0x01
"""The one datatype that is taken: SDKs set it for JSON whether they were granted it or not."""


class Feature(IntEnum):
    """The HELLO features that are granted. Any other is refused: compression and tracing would change every packet."""

    NO_DELAY = 0x03
    EXTENDED_ERRORS = 0x07
    SELECT_BUCKET = 0x08
    JSON = 0x0B
    COLLECTIONS = 0x12


class MalformedPacketError(Exception):
    """The bytes are not a packet of this protocol; the connection cannot go on."""


class Request(NamedTuple):
    """One request, its body taken apart."""

    opcode: int
    vbucket: int
    datatype: int
    opaque: int
    cas: int
    extras: bytes
    key: bytes
    value: bytes


def reply(request: Request, status: int, value: bytes = b"", *, extras: bytes = b"", cas: int = 0) -> bytes:
    """Return the packet that answers `request`."""
    length = len(extras) + len(value)
    header = HEADER.pack(REPLY_MAGIC, request.opcode, 0, len(extras), 0, status, length, request.opaque, cas)
    return header + extras + value


def split_collection(key: bytes) -> tuple[int, bytes]:
    """Split a key on the wire into its collection's id and the key itself.

    The id is an unsigned LEB128 of at most 32 bits, ahead of the key (kv_engine's docs/Collections.md).

    Raises:
        ValueError: There is no whole id, or it is longer than five bytes.
    """
    collection_id = 0
    for index, byte in enumerate(key[:5]):
        collection_id |= (byte & 0x7F) << (7 * index)
        if byte < 0x80:
            return collection_id, key[index + 1 :]
    raise ValueError("no collection id")


def vbucket_of(key: bytes) -> int:
    """Return the vBucket that a key (without its collection's id) belongs to: the CRC32's bits 16 to 30."""
    return ((zlib.crc32(key) >> 16) & 0x7FFF) % VBUCKETS
