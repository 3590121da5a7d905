"""An in-memory stand-in for Couchbase Server that the real SDK talks to over real sockets.

`Emulator` runs one in the current event loop; ``python -m tests.emulator`` is its command line, and ``process.py``
starts that from a test.
"""

import gc
import secrets
import shutil
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from aiohttp import web

from tests import sample_data
from tests.emulator import control
from tests.emulator.documents import Cluster, Collection
from tests.emulator.engine import RELEASES, QueryEngine
from tests.emulator.faults import SERVICES, FaultError, Faults
from tests.emulator.kv import KeyValueService
from tests.emulator.layout import Layout, NodePorts
from tests.emulator.management import Management, guard
from tests.emulator.nodes import Listener, Node
from tests.emulator.query import routes as query_routes
from tests.emulator.tls import make_certificate
from tests.emulator.users import Role, Users

__all__ = ["Emulator", "Options"]

DEFAULT_PICTURES = 1000
"""A picture takes ten times the memory of a profile and twenty times the time to make."""


@dataclass
class Options:
    """What an emulator is to be; the command line's flags are the same.

    Attributes:
        host: The address to listen on.
        nodes: One or two.
        replicas: 0, or 1 with two nodes.
        kv_port, query_port, management_port: The first node's ports, 0 for free ones; the second node's are one higher.
        kv_tls_port, query_tls_port, management_tls_port: The same of the TLS ports.
        faults_port: The port that the faults are switched on and off by.
        tls: Whether there are TLS ports too.
        tls_cert: Which certificate: one of ``tls.CERTIFICATES``.
        user, password: Who may sign in; no password: a random one.
        second_user, second_password: Another who may, if one is named; no password: a random one.
        roles: What that one may do; none: nothing.
        bucket: The bucket's name.
        token: The field `token` of the token document; None: a random one.
        profiles: How many sample profiles to fill in.
        pictures: How many pictures; None: one a profile, up to ``DEFAULT_PICTURES``.
        seed: What the sample data is generated from.
        empty: Leave the bucket with nothing but its default collection.
        release: Which release's query service it plays: one of ``RELEASES``.
    """

    host: str = "127.0.0.1"
    nodes: int = 1
    replicas: int = 0
    kv_port: int = 0
    query_port: int = 0
    management_port: int = 0
    kv_tls_port: int = 0
    query_tls_port: int = 0
    management_tls_port: int = 0
    faults_port: int = 0
    tls: bool = False
    tls_cert: str = "good"
    user: str = "demo"
    password: str | None = field(default=None, repr=False)
    second_user: str | None = None
    second_password: str | None = field(default=None, repr=False)
    roles: tuple[Role, ...] = ()
    bucket: str = "sample_app"
    token: str | None = field(default=None, repr=False)
    profiles: int = 0
    pictures: int | None = None
    seed: int = sample_data.DEFAULT_SEED
    empty: bool = False
    release: str = RELEASES[-1]


class Emulator:
    """A cluster of one or two nodes with one bucket, and the port of its faults.

    `faults` switches faults on and off, `cluster` has the documents, `engine` is the query engine.
    """

    def __init__(self, options: Options | None = None) -> None:
        """Prepare an emulator; nothing happens before `start`."""
        self.options = options or Options()
        self.password = self.options.password or secrets.token_urlsafe(18)
        self.token = self.options.token or secrets.token_urlsafe(18)
        self.cluster = Cluster()
        self.second_password = self.options.second_password or secrets.token_urlsafe(18)
        second = self.options.second_user
        passwords = {} if second is None else {second: self.second_password}
        roles = {} if second is None else {second: self.options.roles}
        self.users = Users(passwords | {self.options.user: self.password}, roles)
        self.faults = Faults()
        self.engine = QueryEngine(self.cluster, self.options.release)
        self.nodes: list[Node] = []
        self.ca_file: Path | None = None
        self._faults_listener: Listener | None = None
        self._faults_runner: web.AppRunner | None = None
        self._directory: Path | None = None

    async def start(self) -> None:
        """Fill in the data and listen; raises PortInUseError, having stopped what had started."""
        try:
            self._fill()
            await self._listen()
        except BaseException:
            await self.stop()
            raise

    async def stop(self) -> None:
        """Cut all connections and give back ports and files."""
        for node in self.nodes:
            await node.close()
        if self._faults_runner is not None:
            await self._faults_runner.cleanup()
        if self._faults_listener is not None:
            self._faults_listener.close()
        if self._directory is not None:
            shutil.rmtree(self._directory, ignore_errors=True)

    def description(self) -> dict[str, Any]:
        """Return what clients and tests need to know, as the command line prints it."""
        first = self.nodes[0].ports
        assert self._faults_listener is not None
        described: dict[str, Any] = {
            "connection_string": self._connection_string("couchbase", first.plain["kv"]),
            "user": self.options.user,
            "password": self.password,
            "bucket": self.options.bucket,
            "token": self.token,
            "kv_port": first.plain["kv"],
            "query_port": first.plain["query"],
            "management_port": first.plain["management"],
            "faults_port": self._faults_listener.port,
            "nodes": [{"plain": node.ports.plain, "tls": node.ports.tls} for node in self.nodes],
        }
        if self.options.second_user is not None:
            described["second_user"] = self.options.second_user
            described["second_password"] = self.second_password
        if self.options.tls:
            described["tls_connection_string"] = self._connection_string("couchbases", first.tls["kv"])
            described["ca_file"] = str(self.ca_file)
        return described

    def set_token(self, token: str | None) -> None:
        """Change the token document, or delete it."""
        try:
            collection = self._collection(sample_data.AUTH)
        except KeyError as missing:
            raise FaultError(f"there is no {missing} for the token to be in") from None
        if token is None:
            collection.remove(sample_data.TOKEN_KEY.encode())
        else:
            collection.put(sample_data.TOKEN_KEY.encode(), sample_data.encode({"token": token}))

    # ---- starting ----

    def _connection_string(self, scheme: str, port: int) -> str:
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.options.host, self.options.host)  # noqa: S104
        return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"

    def _fill(self) -> None:
        bucket = self.cluster.create_bucket(self.options.bucket)
        if self.options.empty:
            return
        bucket.create_scope(sample_data.SCOPE)
        for name in sample_data.COLLECTIONS:
            bucket.create_collection(sample_data.SCOPE, name)
        self.set_token(self.token)
        self._fill_profiles()
        context = f"default:`{bucket.name}`.`{sample_data.SCOPE}`"
        for statement in sample_data.INDEXES.values():
            self.engine.run({"statement": statement, "query_context": context}, lambda *_: True)
        # The documents live as long as the process: without this, each full collection would walk all of them.
        gc.collect()
        gc.freeze()

    def _fill_profiles(self) -> None:
        options = self.options
        pictures = min(options.profiles, DEFAULT_PICTURES) if options.pictures is None else options.pictures
        users, images = (self._collection(name) for name in (sample_data.USERS, sample_data.IMAGES))
        for profile in sample_data.profiles(options.profiles, options.seed):
            users.put(f"{users.name}:{profile['record_id']}".encode(), sample_data.encode(profile))
        for record_id in range(1, pictures + 1):
            picture = sample_data.picture(record_id, options.seed)
            images.put(f"{images.name}:{record_id}".encode(), sample_data.encode(picture))

    def _collection(self, name: str) -> Collection:
        """Return one of the service's collections, or raise KeyError with what is missing."""
        return self.cluster.keyspace(self.options.bucket, sample_data.SCOPE, name)

    async def _listen(self) -> None:
        options = self.options
        self._faults_listener = Listener(options.host, options.faults_port)
        context = None
        if options.tls:
            self._directory = Path(tempfile.mkdtemp(prefix="emulator-tls-"))
            context, self.ca_file = make_certificate(options.tls_cert, options.host, self._directory)
        kinds = ("_port", "_tls_port") if options.tls else ("_port",)
        wanted = [{service: getattr(options, service + kind) for service in SERVICES} for kind in kinds]
        ports = [
            NodePorts(*({service: port and port + index for service, port in each.items()} for each in wanted))
            for index in range(options.nodes)
        ]
        layout = Layout(ports, options.replicas)
        for index in range(options.nodes):
            key_value = KeyValueService(index, self.cluster, layout, self.users, self.faults)
            self.faults.watchers.append(key_value.faults_changed)
            applications = self._applications(index, layout)
            self.nodes.append(Node(options.host, ports[index], key_value, applications, context))
        for node in self.nodes:
            await node.start()
        self.faults.actions.update(
            forget=self._forget,
            drop=self._drop,
            node=self._change_node,
            token=self._change_token,
            password=self._change_password,
        )
        self._faults_runner = web.AppRunner(
            control.application(self.faults, self.nodes), access_log=None, shutdown_timeout=0
        )
        await self._faults_runner.setup()
        assert self._faults_runner.server is not None
        await self._faults_listener.start(self._faults_runner.server, None)

    def _applications(self, index: int, layout: Layout) -> dict[str, web.Application]:
        management = web.Application(middlewares=[guard(self.users, self.faults, index)])
        management.add_routes(Management(self.cluster, layout, self.users).routes())
        query = web.Application()
        query.add_routes(query_routes(self.engine, self.users, self.faults, index))
        return {"query": query, "management": management}

    # ---- the faults that happen once ----

    def _node_number(self, number: int) -> Node:
        if number >= len(self.nodes):
            raise FaultError(f"there is no node {number}; there are {len(self.nodes)}, from 0")
        return self.nodes[number]

    async def _forget(self, _parameters: dict[str, Any]) -> None:
        self.engine.forget_prepared()

    async def _drop(self, parameters: dict[str, Any]) -> None:
        number = parameters["node"]
        for node in self.nodes if number is None else [self._node_number(number)]:
            node.drop_connections(parameters["service"])

    async def _change_node(self, parameters: dict[str, Any]) -> None:
        node = self._node_number(parameters["node"])
        if parameters["state"] == "stop":
            node.stop()
        else:
            await node.start()

    async def _change_token(self, parameters: dict[str, Any]) -> None:
        self.set_token(parameters["token"])

    async def _change_password(self, parameters: dict[str, Any]) -> None:
        self.users.set_password(parameters["user"], parameters["password"])
