"""Which node is where and answers for what: the cluster configuration that clients fetch.

The same JSON goes out over key-value (GET_CLUSTER_CONFIG, and with each not-my-vbucket) and over HTTP (the "terse"
bucket configuration). Host names are ``$HOST``, which clients replace by the address they connected to.
"""

import json
from dataclasses import dataclass, field
from typing import Any

from tests.emulator.documents import Bucket
from tests.emulator.wire import VBUCKETS

SERVICE_NAMES = {"kv": "kv", "query": "n1ql", "management": "mgmt"}
"""What the emulator calls each service, and what the configuration calls it; the TLS variants end in ``SSL``."""
BUCKET_CAPABILITIES = ["collections", "cbhello", "nodesExt", "cccp", "touch", "couchapi"]
CLUSTER_CAPABILITIES = {"n1ql": ["enhancedPreparedStatements"]}


@dataclass
class NodePorts:
    """The ports of one node by service (``kv``, ``query``, ``management``); `tls` is empty without TLS."""

    plain: dict[str, int] = field(default_factory=dict)
    tls: dict[str, int] = field(default_factory=dict)


class Layout:
    """The nodes, their ports, and which vBuckets each holds: active ones in even ranges, replicas on the next node."""

    def __init__(self, nodes: list[NodePorts], replicas: int) -> None:
        """Lay the vBuckets out over `nodes`; `replicas` (0 or 1) needs two nodes to have any effect."""
        self.nodes = nodes
        self.replicas = min(replicas, len(nodes) - 1)
        self.owners = [vbucket * len(nodes) // VBUCKETS for vbucket in range(VBUCKETS)]
        self.revision = 1

    def replica_owner(self, vbucket: int) -> int:
        """Return the node that has the replica of a vBucket, or -1."""
        return (self.owners[vbucket] + 1) % len(self.nodes) if self.replicas else -1

    def cluster_config(self, this_node: int) -> dict[str, Any]:
        """Return the configuration without a bucket, as `this_node` tells it."""
        return {
            "rev": self.revision,
            "revEpoch": 1,
            "nodesExt": [self._node(index, this_node) for index in range(len(self.nodes))],
            "clusterCapabilitiesVer": [1, 0],
            "clusterCapabilities": CLUSTER_CAPABILITIES,
        }

    def bucket_config(self, bucket: Bucket, this_node: int) -> dict[str, Any]:
        """Return the configuration with a bucket's vBucket map, as `this_node` tells it."""
        vbuckets = [
            [owner, self.replica_owner(vbucket)] if self.replicas else [owner]
            for vbucket, owner in enumerate(self.owners)
        ]
        return self.cluster_config(this_node) | {
            "name": bucket.name,
            "uuid": bucket.uuid,
            "nodeLocator": "vbucket",
            "uri": f"/pools/default/buckets/{bucket.name}?bucket_uuid={bucket.uuid}",
            "streamingUri": f"/pools/default/bucketsStreaming/{bucket.name}?bucket_uuid={bucket.uuid}",
            "collectionsManifestUid": f"{bucket.manifest_uid:x}",
            "bucketCapabilitiesVer": "",
            "bucketCapabilities": BUCKET_CAPABILITIES,
            "nodes": [
                {"hostname": f"$HOST:{node.plain['management']}", "ports": {"direct": node.plain["kv"]}}
                for node in self.nodes
            ],
            "vBucketServerMap": {
                "hashAlgorithm": "CRC",
                "numReplicas": self.replicas,
                "serverList": [f"$HOST:{node.plain['kv']}" for node in self.nodes],
                "vBucketMap": vbuckets,
            },
        }

    def encoded(self, bucket: Bucket | None, this_node: int) -> bytes:
        """Return either configuration as the bytes that go out."""
        config = self.cluster_config(this_node) if bucket is None else self.bucket_config(bucket, this_node)
        return json.dumps(config, separators=(",", ":")).encode()

    def _node(self, index: int, this_node: int) -> dict[str, Any]:
        ports = self.nodes[index]
        services = {SERVICE_NAMES[service]: port for service, port in ports.plain.items()}
        services |= {SERVICE_NAMES[service] + "SSL": port for service, port in ports.tls.items()}
        return {"services": services} | ({"thisNode": True} if index == this_node else {})
