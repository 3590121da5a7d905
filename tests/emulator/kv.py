"""The key-value service: one `Connection` per socket, sharing their node's `KeyValueService`."""

import asyncio
import json
import re
import struct
import traceback
from collections import deque
from collections.abc import Callable
from typing import cast

from scramp import ScramException  # type: ignore[import-untyped]

from tests.emulator.documents import (
    MAX_KEY_BYTES,
    MAX_VALUE_BYTES,
    Bucket,
    Cluster,
    Collection,
    Document,
    next_cas,
)
from tests.emulator.faults import Faults
from tests.emulator.indexes import parse
from tests.emulator.layout import Layout
from tests.emulator.users import MECHANISM, Path, Privilege, ScramExchange, Users
from tests.emulator.wire import (
    HEADER,
    HEADER_BYTES,
    JSON_DATATYPE,
    MAX_PACKET_BYTES,
    REPLY_MAGIC,
    REQUEST_MAGIC,
    VBUCKETS,
    Feature,
    MalformedPacketError,
    Opcode,
    Request,
    Status,
    reply,
    split_collection,
)

SIGN_IN_SECONDS = 30
"""A connection that has not signed in by then is closed."""
MAX_BODY_BYTES_BEFORE_SIGN_IN = 65_536
MAX_CONNECTIONS = 10_000
MAX_BATCH_BYTES = 4 * 1024 * 1024
"""Replies are sent when there are so many bytes of them; and while so many wait to be sent, no more are made."""
MAX_WAITING_REQUESTS = 10_000
"""How many requests of one connection may wait for injected latency before it is read from no more."""
MAX_NAMED_COLLECTION_KEY_BYTES = 246
"""The 250 bytes of a key, less what the id of a collection other than the default may take."""

FLAGS = struct.Struct(">L")
FLAGS_AND_EXPIRY = struct.Struct(">LL")
COLLECTION_ID = struct.Struct(">QL")
METADATA = struct.Struct(">LLLQB")
PATH_RESULT = struct.Struct(">HL")
LOOKUP_SPEC = struct.Struct(">BBH")
LOOKUP_GET = 0xC5
"""The sub-document command that a LOOKUP_IN has for a path's value (kv_engine's docs/BinaryProtocol.md)."""
MEMBER = re.compile(rb"[A-Za-z_]\w*")

READS = frozenset({Opcode.GET, Opcode.GET_REPLICA, Opcode.EXISTS, Opcode.LOOKUP_IN})

ERROR_MAP = {
    "version": 1,
    "revision": 1,
    "errors": {
        f"{status:x}": {"name": status.name, "desc": status.name.replace("_", " ").lower(), "attrs": attributes}
        for status, attributes in (
            (Status.NOT_FOUND, ["item-only"]),
            (Status.EXISTS, ["item-only"]),
            (Status.TOO_BIG, ["item-only", "invalid-input"]),
            (Status.INVALID, ["invalid-input", "internal"]),
            (Status.NOT_MY_VBUCKET, ["fetch-config", "invalid-input"]),
            (Status.NO_BUCKET, ["conn-state-invalidated"]),
            (Status.AUTH_ERROR, ["conn-state-invalidated", "auth"]),
            (Status.NO_ACCESS, ["support", "auth"]),
            (Status.UNKNOWN_COMMAND, ["support"]),
            (Status.OUT_OF_MEMORY, ["temp", "retry-later"]),
            (Status.NOT_SUPPORTED, ["support"]),
            (Status.TEMPORARY_FAILURE, ["temp", "retry-later"]),
            (Status.UNKNOWN_COLLECTION, ["item-only", "fetch-config"]),
            (Status.UNKNOWN_SCOPE, ["item-only", "fetch-config"]),
        )
    },
}
"""What clients may know of a status by its number (kv_engine's docs/ErrorMap.md)."""


class StatusError(Exception):
    """A request cannot be done; it is answered with `status`, and `value` as the body."""

    def __init__(self, status: int, value: bytes = b"") -> None:
        """Remember what to answer."""
        super().__init__(status)
        self.status = status
        self.value = value


class KeyValueService:
    """One node's key-value service: what its connections share, and the connections themselves."""

    def __init__(self, node: int, cluster: Cluster, layout: Layout, users: Users, faults: Faults) -> None:
        """Serve `cluster`'s documents as node number `node` of `layout`."""
        self.node = node
        self.cluster = cluster
        self.layout = layout
        self.users = users
        self.faults = faults
        self.counts = [0] * 256
        """How many requests of each opcode arrived."""
        self.connections: set[Connection] = set()

    def plain(self) -> "Connection":
        """Make the protocol of a connection without TLS."""
        return Connection(self, encrypted=False)

    def encrypted(self) -> "Connection":
        """Make the protocol of a connection with TLS, where PLAIN sign-in is allowed."""
        return Connection(self, encrypted=True)

    def drop_connections(self) -> None:
        """Cut every connection, without a good-bye."""
        for connection in list(self.connections):
            connection.abort()

    def faults_changed(self) -> None:
        """Freeze or thaw the connections as the faults now say."""
        for connection in self.connections:
            connection.follow_faults()


class Connection(asyncio.Protocol):
    """One client's connection: takes packets apart, answers them in their order, a batch of replies at once."""

    def __init__(self, service: KeyValueService, *, encrypted: bool) -> None:
        """Make the protocol of a connection that is yet to be made."""
        self.service = service
        self._faults = service.faults
        self._encrypted = encrypted
        self._transport: asyncio.Transport
        self._partial = bytearray()
        self._needed = HEADER_BYTES
        self._user: str | None = None
        self._restricted = False
        self._scram: ScramExchange | None = None
        self._bucket: Bucket | None = None
        self._collections = False
        self._waiting: deque[tuple[float, Request]] = deque()
        self._timer: asyncio.TimerHandle | None = None
        self._sign_in_timer: asyncio.TimerHandle | None = None
        self._unwritten = False
        self._full = False
        self._max_body_bytes = MAX_BODY_BYTES_BEFORE_SIGN_IN
        self._closing = False

    # ---- the transport's calls ----

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Start serving, unless there are too many connections already."""
        # uvloop's transports have the methods of asyncio.Transport without being of that class.
        self._transport = cast(asyncio.Transport, transport)
        if len(self.service.connections) >= MAX_CONNECTIONS:
            self.abort()
            return
        self.service.connections.add(self)
        self._sign_in_timer = asyncio.get_running_loop().call_later(SIGN_IN_SECONDS, self.abort)
        self.follow_faults()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the connection."""
        self._closing = True
        self.service.connections.discard(self)
        self._waiting.clear()
        for timer in (self._timer, self._sign_in_timer):
            if timer is not None:
                timer.cancel()

    def data_received(self, data: bytes) -> None:
        """Answer every whole packet in what arrived; keep what remains for the next time."""
        if self._partial:
            self._partial += data
            if len(self._partial) < self._needed:
                return
            data = bytes(self._partial)
            self._partial.clear()
        replies: list[bytes] = []
        try:
            self._answer_packets(data, replies)
        except MalformedPacketError:
            self._closing = True
        self._write(replies)
        if self._closing:
            self._transport.close()

    def pause_writing(self) -> None:
        """Read no more from a client that does not read its replies."""
        self._unwritten = True
        self._pace_reading()

    def resume_writing(self) -> None:
        """Go on reading."""
        self._unwritten = False
        self._pace_reading()
        self._schedule()

    # ---- faults ----

    def abort(self) -> None:
        """Cut the connection."""
        self._closing = True
        self._transport.abort()

    def follow_faults(self) -> None:
        """Stop or go on, according to the fault `freeze`."""
        self._pace_reading()
        self._schedule()

    def _frozen(self) -> bool:
        return self._faults.frozen("kv", self.service.node)

    def _pace_reading(self) -> None:
        """Read from the socket, or don't: what is not read fills the client's side, as with a server that hangs."""
        if self._transport.is_closing():
            return
        if self._frozen() or self._unwritten or len(self._waiting) >= MAX_WAITING_REQUESTS:
            self._transport.pause_reading()
        else:
            self._transport.resume_reading()

    def _schedule(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = None
        if self._waiting and not self._unwritten and not self._frozen():
            self._timer = asyncio.get_running_loop().call_at(self._waiting[0][0], self._answer_waiting)

    def _answer_waiting(self) -> None:
        """Answer the requests that have waited long enough, as far as there is room for their replies."""
        now = asyncio.get_running_loop().time()
        replies: list[bytes] = []
        size = 0
        while self._waiting and self._waiting[0][0] <= now and size < MAX_BATCH_BYTES:
            replies.append(self._answer(self._waiting.popleft()[1]))
            size += len(replies[-1])
        self._write(replies)
        self._schedule()
        self._pace_reading()

    def _answer_or_delay(self, request: Request) -> bytes | None:
        """Answer at once, or put the request behind those that wait: each waits its own time, in order."""
        delay = self._faults.delay("kv", request.opcode, self.service.node)
        if not (delay or self._waiting or self._full or self._frozen()):
            return self._answer(request)
        due = asyncio.get_running_loop().time() + delay
        self._waiting.append((max(due, self._waiting[-1][0]) if self._waiting else due, request))
        if len(self._waiting) == 1:
            self._schedule()
        elif len(self._waiting) >= MAX_WAITING_REQUESTS:
            self._pace_reading()
        return None

    # ---- packets ----

    def _write(self, replies: list[bytes]) -> None:
        """Send the replies, and remember whether so much waits to be sent that it must be enough for now."""
        if replies:
            self._transport.write(b"".join(replies) if len(replies) > 1 else replies[0])
            self._full = self._transport.get_write_buffer_size() > MAX_BATCH_BYTES

    def _answer_packets(self, data: bytes, replies: list[bytes]) -> None:
        """Answer the packets in `data` into `replies`; raises MalformedPacketError at one that makes no sense."""
        position, end, size = 0, len(data), 0
        counts, faults = self.service.counts, self._faults
        while end - position >= HEADER_BYTES:
            magic, opcode, key_bytes, extras_bytes, datatype, vbucket, body_bytes, opaque, cas = HEADER.unpack_from(
                data, position
            )
            if magic != REQUEST_MAGIC or body_bytes > self._max_body_bytes or key_bytes + extras_bytes > body_bytes:
                raise MalformedPacketError
            body = position + HEADER_BYTES
            following = body + body_bytes
            if following > end:
                self._needed = following - position
                break
            key = body + extras_bytes
            value = key + key_bytes
            request = Request(
                opcode, vbucket, datatype, opaque, cas, data[body:key], data[key:value], data[value:following]
            )
            position = following
            counts[opcode] += 1
            slowly = faults.any_kv or self._waiting or self._full
            answer = self._answer_or_delay(request) if slowly else self._answer(request)
            if answer is not None:
                replies.append(answer)
                size += len(answer)
                if size > MAX_BATCH_BYTES:
                    self._write(replies)
                    replies.clear()
                    size = 0
            if self._closing:
                return
        else:
            self._needed = HEADER_BYTES
        if position < end:
            self._partial += data[position:]

    def _answer(self, request: Request) -> bytes:
        """Answer one request, whatever comes of it."""
        handler = HANDLERS.get(request.opcode)
        try:
            if handler is None:
                raise StatusError(Status.UNKNOWN_COMMAND)
            if self._faults.any_kv:
                status = self._faults.take_status(request.opcode, self.service.node)
                if status is not None:
                    raise StatusError(status)
            if request.datatype & ~JSON_DATATYPE:
                raise StatusError(Status.INVALID)
            if self._user is None and request.opcode not in BEFORE_SIGN_IN:
                raise StatusError(Status.NO_ACCESS)
            return handler(self, request)
        except StatusError as error:
            return reply(request, error.status, error.value)
        except (struct.error, UnicodeDecodeError):
            return reply(request, Status.INVALID)
        except Exception:
            traceback.print_exc()
            return reply(request, Status.INTERNAL_ERROR)

    # ---- connecting ----

    def _hello(self, request: Request) -> bytes:
        """Grant the features asked for that are among `Feature`."""
        asked = {number for (number,) in struct.iter_unpack(">H", request.value)}
        granted = sorted(asked & set(Feature))
        self._collections = Feature.COLLECTIONS in granted
        return reply(request, Status.SUCCESS, struct.pack(f">{len(granted)}H", *granted))

    def _mechanisms(self) -> list[str]:
        return [MECHANISM, "PLAIN"] if self._encrypted else [MECHANISM]

    def _list_mechanisms(self, request: Request) -> bytes:
        return reply(request, Status.SUCCESS, " ".join(self._mechanisms()).encode())

    def _sign_in(self, request: Request) -> bytes:
        """Start signing in (RFC 5802), or do it in one step (PLAIN, RFC 4616)."""
        self._user = self._bucket = self._scram = None
        mechanism = request.key.decode()
        if mechanism not in self._mechanisms():
            return reply(request, Status.AUTH_ERROR)
        if mechanism == "PLAIN":
            _, user, password = (*request.value.decode().split("\0"), "", "", "")[:3]
            if not self.service.users.verify(user, password):
                return reply(request, Status.AUTH_ERROR)
            return self._signed_in(request, user)
        try:
            exchange = ScramExchange(self.service.users)
            first = exchange.first(request.value.decode())
        except ScramException:
            return reply(request, Status.AUTH_ERROR)
        self._scram = exchange
        return reply(request, Status.AUTH_CONTINUE, first.encode())

    def _continue_sign_in(self, request: Request) -> bytes:
        """Finish signing in by SCRAM."""
        exchange, self._scram = self._scram, None
        if exchange is None:
            return reply(request, Status.AUTH_ERROR)
        try:
            final = exchange.final(request.value.decode())
        except ScramException:
            return reply(request, Status.AUTH_ERROR)
        return self._signed_in(request, exchange.user, final)

    def _signed_in(self, request: Request, user: str, final: str = "") -> bytes:
        self._user = user
        self._restricted = not self.service.users.unrestricted(user)
        self._max_body_bytes = MAX_PACKET_BYTES
        if self._sign_in_timer is not None:
            self._sign_in_timer.cancel()
        return reply(request, Status.SUCCESS, final.encode())

    def _error_map(self, request: Request) -> bytes:
        (version,) = struct.unpack(">H", request.value)
        if version == 0:
            raise StatusError(Status.INVALID)
        return reply(request, Status.SUCCESS, json.dumps(ERROR_MAP).encode())

    def _noop(self, request: Request) -> bytes:
        return reply(request, Status.SUCCESS)

    def _select_bucket(self, request: Request) -> bytes:
        """Work in a bucket; to a user who may use all buckets, one that does not exist is "not found"."""
        name = request.key.decode()
        if not self._sees((name,)):
            raise StatusError(Status.NO_ACCESS)
        bucket = self.service.cluster.buckets.get(name)
        if bucket is None:
            raise StatusError(Status.NOT_FOUND)
        self._bucket = bucket
        return reply(request, Status.SUCCESS)

    def _cluster_config(self, request: Request) -> bytes:
        return reply(request, Status.SUCCESS, self.service.layout.encoded(self._bucket, self.service.node))

    # ---- collections ----

    def _own_bucket(self) -> Bucket:
        if self._bucket is None:
            raise StatusError(Status.NO_BUCKET)
        return self._bucket

    def _collection_id(self, request: Request) -> bytes:
        bucket = self._own_bucket()
        scope_name, separator, name = (request.value or request.key).decode().partition(".")
        if not separator:
            raise StatusError(Status.INVALID)
        scope = bucket.scopes.get(scope_name or "_default")
        if scope is None or not self._sees((bucket.name, scope.name)):
            raise StatusError(Status.UNKNOWN_SCOPE, _manifest_context(bucket))
        collection = scope.collections.get(name or "_default")
        if collection is None or not self._sees((bucket.name, scope.name, collection.name)):
            raise StatusError(Status.UNKNOWN_COLLECTION, _manifest_context(bucket))
        return reply(request, Status.SUCCESS, extras=COLLECTION_ID.pack(bucket.manifest_uid, collection.id))

    def _locate(self, request: Request, *, replica: bool = False) -> tuple[Collection, bytes]:
        """Return the collection and the key that a request means; raises StatusError where this node has none such."""
        bucket = self._bucket
        if bucket is None:
            raise StatusError(Status.NO_BUCKET)
        if self._collections:
            try:
                collection_id, key = split_collection(request.key)
            except ValueError:
                raise StatusError(Status.INVALID) from None
        else:
            collection_id, key = 0, request.key
        if not 0 < len(key) <= (MAX_NAMED_COLLECTION_KEY_BYTES if collection_id else MAX_KEY_BYTES):
            raise StatusError(Status.INVALID)
        layout = self.service.layout
        vbucket = request.vbucket
        if vbucket >= VBUCKETS or self.service.node != (
            layout.replica_owner(vbucket) if replica else layout.owners[vbucket]
        ):
            raise StatusError(Status.NOT_MY_VBUCKET, layout.encoded(bucket, self.service.node))
        collection = bucket.collections_by_id.get(collection_id)
        if collection is None:
            raise StatusError(Status.UNKNOWN_COLLECTION, _manifest_context(bucket))
        if self._restricted:
            self._check_privileges(request.opcode, bucket, collection)
        return collection, key

    def _sees(self, path: Path) -> bool:
        return not self._restricted or self.service.users.sees(self._user or "", path)

    def _check_privileges(self, opcode: int, bucket: Bucket, collection: Collection) -> None:
        """Raise StatusError where the user may not: a collection that one has no role for at all does not exist."""
        path = bucket.path_of(collection)
        if not self._sees(path):
            raise StatusError(Status.UNKNOWN_COLLECTION, _manifest_context(bucket))
        privilege = Privilege.READ if opcode in READS else Privilege.WRITE
        if not self.service.users.may(self._user or "", privilege, path):
            raise StatusError(Status.NO_ACCESS)

    def _existing(self, request: Request, *, replica: bool = False) -> tuple[Collection, bytes, Document]:
        """Return also the document, or raise StatusError NOT_FOUND."""
        collection, key = self._locate(request, replica=replica)
        document = collection.documents.get(key)
        if document is None:
            raise StatusError(Status.NOT_FOUND)
        return collection, key, document

    # ---- documents ----

    def _get(self, request: Request) -> bytes:
        """Answer the command that matters for speed: with the reply put together in one go."""
        _, _, document = self._existing(request)
        value = document.value
        return (
            HEADER.pack(REPLY_MAGIC, Opcode.GET, 0, 4, 0, 0, 4 + len(value), request.opaque, document.cas)
            + FLAGS.pack(document.flags)
            + value
        )

    def _get_replica(self, request: Request) -> bytes:
        _, _, document = self._existing(request, replica=True)
        return reply(request, Status.SUCCESS, document.value, extras=FLAGS.pack(document.flags), cas=document.cas)

    def _store(self, request: Request) -> bytes:
        """Set or add a document, which is to live for ever."""
        collection, key = self._locate(request)
        flags, expiry = FLAGS_AND_EXPIRY.unpack(request.extras)
        if request.cas or expiry:
            raise StatusError(Status.NOT_SUPPORTED)
        if len(request.value) > MAX_VALUE_BYTES:
            raise StatusError(Status.TOO_BIG)
        if request.opcode == Opcode.ADD and key in collection.documents:
            raise StatusError(Status.EXISTS)
        return reply(request, Status.SUCCESS, cas=collection.put(key, request.value, flags).cas)

    def _delete(self, request: Request) -> bytes:
        collection, key, _ = self._existing(request)
        if request.cas:
            raise StatusError(Status.NOT_SUPPORTED)
        collection.remove(key)
        return reply(request, Status.SUCCESS, cas=next_cas())

    def _exists(self, request: Request) -> bytes:
        """Answer with a document's metadata (GET_META)."""
        _, _, document = self._existing(request)
        extras = METADATA.pack(0, document.flags, 0, document.cas & 0xFFFFFFFF, 1)
        return reply(request, Status.SUCCESS, extras=extras, cas=document.cas)

    def _lookup_in(self, request: Request) -> bytes:
        """Answer with one top-level member of a document: no other path, and not several."""
        opcode, flags, length = LOOKUP_SPEC.unpack_from(request.value)
        path = request.value[LOOKUP_SPEC.size :]
        if len(path) < length:
            raise StatusError(Status.INVALID)
        if opcode != LOOKUP_GET or flags or request.extras or not MEMBER.fullmatch(path) or len(path) > length:
            raise StatusError(Status.NOT_SUPPORTED)
        _, _, document = self._existing(request)
        status, value = _member(document.value, path.decode())
        overall = Status.MULTI_PATH_FAILURE if status else Status.SUCCESS
        return reply(request, overall, PATH_RESULT.pack(status, len(value)) + value, cas=document.cas)


def _member(document: bytes, name: str) -> tuple[Status, bytes]:
    """Return a path's status and value."""
    try:
        content = parse(document)
    except (ValueError, RecursionError):
        return Status.NOT_JSON, b""
    if not isinstance(content, dict):
        return Status.PATH_MISMATCH, b""
    return (Status.SUCCESS, json.dumps(content[name]).encode()) if name in content else (Status.PATH_NOT_FOUND, b"")


def _manifest_context(bucket: Bucket) -> bytes:
    """Return what goes with "unknown collection" or "unknown scope": the manifest that was looked at."""
    return json.dumps({"manifest_uid": f"{bucket.manifest_uid:x}"}).encode()


HANDLERS: dict[int, Callable[[Connection, Request], bytes]] = {
    Opcode.GET: Connection._get,
    Opcode.SET: Connection._store,
    Opcode.ADD: Connection._store,
    Opcode.DELETE: Connection._delete,
    Opcode.NOOP: Connection._noop,
    Opcode.HELLO: Connection._hello,
    Opcode.SASL_LIST_MECHS: Connection._list_mechanisms,
    Opcode.SASL_AUTH: Connection._sign_in,
    Opcode.SASL_STEP: Connection._continue_sign_in,
    Opcode.GET_REPLICA: Connection._get_replica,
    Opcode.SELECT_BUCKET: Connection._select_bucket,
    Opcode.EXISTS: Connection._exists,
    Opcode.GET_CLUSTER_CONFIG: Connection._cluster_config,
    Opcode.GET_COLLECTION_ID: Connection._collection_id,
    Opcode.LOOKUP_IN: Connection._lookup_in,
    Opcode.GET_ERROR_MAP: Connection._error_map,
}
BEFORE_SIGN_IN = frozenset(
    {Opcode.HELLO, Opcode.SASL_LIST_MECHS, Opcode.SASL_AUTH, Opcode.SASL_STEP, Opcode.GET_ERROR_MAP, Opcode.NOOP}
)
