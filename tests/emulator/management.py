"""The management service over HTTP: what SDKs ask of the cluster, its buckets, scopes and collections.

Paths, statuses and messages are those of the server's REST API, as far as SDKs look at them.
"""

import json
import re
from typing import Any

from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

from tests.emulator.documents import AlreadyExistsError, Bucket, Cluster
from tests.emulator.faults import Faults
from tests.emulator.layout import Layout
from tests.emulator.users import Path, Privilege, Users

QUOTA_BYTES = 256 * 1024 * 1024
"""What a bucket says it may take; nothing keeps to it."""
NAME = re.compile(r"[A-Za-z0-9-][A-Za-z0-9_%-]{0,250}")
"""Names of scopes and collections: 1 to 251 characters, not starting with ``_`` or ``%``."""
USER = "user"
"""Where in a request the middleware leaves who signed in, for the handlers."""
NOT_FOUND = "Requested resource not found.\r\n"


def guard(users: Users, faults: Faults, node: int) -> Middleware:
    """Return the middleware that does the faults of management, asks for a user and password (RFC 7617), and for roles.

    To look at a bucket takes any role for it or for a part of it; to change anything takes an administrator.
    """

    @web.middleware
    async def check(request: web.Request, handler: Handler) -> web.StreamResponse:
        await faults.before("management", request.path, node)
        user = users.verify_basic(request.headers.get("Authorization"))
        if user is None:
            return web.Response(status=401, headers={"WWW-Authenticate": 'Basic realm="Couchbase Server Admin / REST"'})
        bucket = request.match_info.get("bucket")
        allowed = users.sees(user, () if bucket is None else (bucket,))
        if not (allowed if request.method == "GET" else users.may(user, Privilege.MANAGE, ())):
            return web.json_response({"message": "Forbidden. User needs the following permissions"}, status=403)
        request[USER] = user
        return await handler(request)

    return check


class Management:
    """One node's management service."""

    def __init__(self, cluster: Cluster, layout: Layout, users: Users) -> None:
        """Manage `cluster`, of whose nodes `layout` tells; `users` says who may see what."""
        self._users = users
        self._cluster = cluster
        self._layout = layout

    def routes(self) -> list[web.RouteDef]:
        """Return the routes, to be put into an application."""
        bucket = "/pools/default/buckets/{bucket}"
        return [
            web.get("/", self.root),
            web.get(bucket, self.bucket),
            web.get(bucket + "/scopes", self.scopes),
            web.post(bucket + "/scopes", self.create_scope),
            web.post(bucket + "/scopes/{scope}/collections", self.create_collection),
            web.delete(bucket + "/scopes/{scope}/collections/{collection}", self.drop_collection),
        ]

    async def root(self, request: web.Request) -> web.Response:
        """Answer a ping."""
        return web.Response(text="")

    async def bucket(self, request: web.Request) -> web.Response:
        """Describe one bucket."""
        return web.json_response(self._bucket_info(self._named_bucket(request)))

    # ---- scopes and collections ----

    async def scopes(self, request: web.Request) -> web.Response:
        """Give the collections manifest, as far as the user sees it."""
        user = request[USER]

        def visible(path: Path) -> bool:
            return self._users.sees(user, path)

        return web.json_response(self._named_bucket(request).manifest(visible))

    async def create_scope(self, request: web.Request) -> web.Response:
        """Make the scope that the form's ``name`` says."""
        bucket = self._named_bucket(request)
        name = await _form_name(request)
        try:
            bucket.create_scope(name)
        except AlreadyExistsError:
            raise _bad_request(f'Scope with name "{name}" already exists') from None
        return _uid(bucket)

    async def create_collection(self, request: web.Request) -> web.Response:
        """Make the collection that the form's ``name`` says."""
        bucket, scope = self._named_bucket(request), request.match_info["scope"]
        name = await _form_name(request)
        try:
            bucket.create_collection(scope, name)
        except KeyError:
            raise _not_found(f'Scope with name "{scope}" is not found') from None
        except AlreadyExistsError:
            raise _bad_request(f'Collection with name "{name}" in scope "{scope}" already exists') from None
        return _uid(bucket)

    async def drop_collection(self, request: web.Request) -> web.Response:
        """Remove a collection and its documents."""
        bucket = self._named_bucket(request)
        scope, name = request.match_info["scope"], request.match_info["collection"]
        if scope not in bucket.scopes:
            raise _not_found(f'Scope with name "{scope}" is not found')
        try:
            bucket.drop_collection(scope, name)
        except KeyError:
            raise _not_found(f'Collection with name "{name}" in scope "{scope}" is not found') from None
        return _uid(bucket)

    # ---- helpers ----

    def _named_bucket(self, request: web.Request) -> Bucket:
        bucket = self._cluster.buckets.get(request.match_info["bucket"])
        if bucket is None:
            raise web.HTTPNotFound(text=NOT_FOUND)
        return bucket

    def _bucket_info(self, bucket: Bucket) -> dict[str, Any]:
        """Return what the SDK reads of a bucket; SDK 4.6.3 ends its whole process where one of these is missing."""
        return {
            "name": bucket.name,
            "uuid": bucket.uuid,
            "bucketType": "membase",
            "evictionPolicy": "valueOnly",
            "conflictResolutionType": "seqno",
            "replicaNumber": self._layout.replicas,
            "quota": {"ram": QUOTA_BYTES, "rawRAM": QUOTA_BYTES},
            "controllers": {},
            "nodes": [],
        }


async def _form_name(request: web.Request) -> str:
    """Return the form's ``name``, or raise the 400 that the server would answer."""
    name = (await request.post()).get("name")
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise _bad_request("Value must be 1 to 251 characters of A-Z, a-z, 0-9, _, - and %, and not start with _ or %")
    return name


def _bad_request(message: str) -> web.HTTPBadRequest:
    return web.HTTPBadRequest(text=json.dumps({"errors": {"_": message}}), content_type="application/json")


def _not_found(message: str) -> web.HTTPNotFound:
    return web.HTTPNotFound(text=json.dumps({"errors": {"_": message}}), content_type="application/json")


def _uid(bucket: Bucket) -> web.Response:
    return web.json_response({"uid": f"{bucket.manifest_uid:x}"})
