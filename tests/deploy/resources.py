"""What custom resources look like that `kubernetes-validate` knows nothing of: only the fields that are used here.

Field names and types are those of the operator's reference (couchbase.com/v2, Autonomous Operator 2.9) and of
cert-manager's (cert-manager.io/v1). Every other field is refused, so a slip of the pen is found without a cluster.
"""

import re
from typing import Any

Schema = dict[str, Any]
TEXT: Schema = {"type": "string", "minLength": 1}
NAME: Schema = {"type": "string", "pattern": r"^[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?$"}
QUANTITY: Schema = {"type": "string", "pattern": r"^[0-9]+(\.[0-9]+)?(m|[KMGT]i?)?$"}
DURATION: Schema = {"type": "string", "pattern": r"^([0-9]+(ms|s|m|h))+$"}
COUCHBASE_NAME: Schema = {"type": "string", "pattern": r"^[A-Za-z0-9-][A-Za-z0-9_%-]{0,250}$"}
TRUE: Schema = {"const": True}


def exactly(required: dict[str, Schema], **optional: Schema) -> Schema:
    """Return the schema of an object with these members and no others."""
    return {
        "type": "object",
        "properties": required | optional,
        "required": sorted(required),
        "additionalProperties": False,
    }


def some(items: Schema) -> Schema:
    """Return the schema of a list that isn't empty and has nothing twice."""
    return {"type": "array", "items": items, "minItems": 1, "uniqueItems": True}


def references(kind: str) -> Schema:
    """Return the schema of a list of resources by kind and name."""
    return exactly({"resources": some(exactly({"kind": {"const": kind}, "name": NAME}))})


SECCOMP = exactly({"type": {"const": "RuntimeDefault"}})
REQUESTS = exactly(
    {"requests": exactly({}, cpu=QUANTITY, memory=QUANTITY, storage=QUANTITY)},
    limits=exactly({}, cpu=QUANTITY, memory=QUANTITY),
)
SERVICES = {"enum": ["data", "index", "query", "search", "eventing", "analytics"]}

CLUSTER = exactly(
    {
        "image": {"type": "string", "pattern": r"^couchbase/server:[0-9]+\.[0-9]+\.[0-9]+$"},
        "security": exactly(
            {"adminSecret": NAME, "rbac": exactly({"managed": TRUE})},
            podSecurityContext=exactly(
                {"runAsNonRoot": TRUE, "runAsUser": {"type": "integer", "minimum": 1}},
                fsGroup={"type": "integer"},
                seccompProfile=SECCOMP,
            ),
            securityContext=exactly(
                {"allowPrivilegeEscalation": {"const": False}, "capabilities": exactly({"drop": {"const": ["ALL"]}})}
            ),
        ),
        "networking": exactly(
            {
                "tls": exactly(
                    {"rootCAs": some(NAME), "secretSource": exactly({"serverSecretName": NAME})},
                    tlsMinimumVersion={"enum": ["TLS1.2", "TLS1.3"]},
                )
            }
        ),
        "buckets": exactly({"managed": TRUE}),
        "servers": some(
            exactly(
                {"name": NAME, "size": {"type": "integer", "minimum": 1}, "services": some(SERVICES)},
                volumeMounts=exactly({"default": NAME}),
                resources=REQUESTS,
            )
        ),
    },
    antiAffinity={"type": "boolean"},
    cluster=exactly(
        {"dataServiceMemoryQuota": QUANTITY, "indexServiceMemoryQuota": QUANTITY}, autoFailoverTimeout=DURATION
    ),
    volumeClaimTemplates=some(exactly({"metadata": exactly({"name": NAME}), "spec": exactly({"resources": REQUESTS})})),
)
ISSUER_REFERENCE = exactly({"group": {"const": "cert-manager.io"}, "kind": {"const": "Issuer"}, "name": NAME})
PRIVATE_KEY = exactly(
    {"algorithm": {"const": "RSA"}, "encoding": {"const": "PKCS1"}, "size": {"enum": [2048, 3072, 4096]}}
)
USAGES = {"enum": ["digital signature", "key encipherment", "server auth", "client auth", "cert sign"]}

SPECS: dict[tuple[str, str], Schema] = {
    ("couchbase.com/v2", "CouchbaseCluster"): CLUSTER,
    ("couchbase.com/v2", "CouchbaseBucket"): exactly(
        {
            "name": COUCHBASE_NAME,
            "memoryQuota": QUANTITY,
            "scopes": exactly({"managed": TRUE, **references("CouchbaseScope")["properties"]}),
        },
        replicas={"type": "integer", "minimum": 0, "maximum": 3},
    ),
    ("couchbase.com/v2", "CouchbaseScope"): exactly(
        {
            "name": COUCHBASE_NAME,
            "collections": exactly({"managed": TRUE, **references("CouchbaseCollection")["properties"]}),
        }
    ),
    ("couchbase.com/v2", "CouchbaseCollection"): exactly({"name": COUCHBASE_NAME}),
    ("couchbase.com/v2", "CouchbaseUser"): exactly(
        {"authDomain": {"const": "local"}, "authSecret": NAME}, fullName=TEXT
    ),
    ("couchbase.com/v2", "CouchbaseGroup"): exactly(
        {
            "roles": some(
                exactly(
                    {
                        "name": {"enum": ["data_reader", "query_select"]},
                        "buckets": references("CouchbaseBucket"),
                        "scopes": references("CouchbaseScope"),
                        "collections": references("CouchbaseCollection"),
                    }
                )
            )
        }
    ),
    ("couchbase.com/v2", "CouchbaseRoleBinding"): exactly(
        {
            "roleRef": exactly({"kind": {"const": "CouchbaseGroup"}, "name": NAME}),
            "subjects": some(exactly({"kind": {"const": "CouchbaseUser"}, "name": NAME})),
        }
    ),
    ("cert-manager.io/v1", "Issuer"): {
        "oneOf": [exactly({"selfSigned": {"const": {}}}), exactly({"ca": exactly({"secretName": NAME})})]
    },
    ("cert-manager.io/v1", "Certificate"): exactly(
        {
            "secretName": NAME,
            "commonName": TEXT,
            "issuerRef": ISSUER_REFERENCE,
            "privateKey": PRIVATE_KEY,
            "duration": DURATION,
            "renewBefore": DURATION,
        },
        isCA=TRUE,
        dnsNames=some({"type": "string", "pattern": r"^(\*\.)?[a-z0-9]([a-z0-9.-]*[a-z0-9])?$"}),
        usages=some(USAGES),
    ),
}


def schema_of(manifest: dict[str, Any]) -> Schema:
    """Return the schema of a custom resource; raises KeyError for a kind that isn't known."""
    metadata = exactly({"name": NAME, "namespace": NAME}, labels={"type": "object"})
    kind = (manifest["apiVersion"], manifest["kind"])
    return exactly({"apiVersion": {}, "kind": {}, "metadata": metadata, "spec": SPECS[kind]})


MEBIBYTES = {"Mi": 1, "Gi": 1024}


def mebibytes(quantity: str) -> int:
    """Return a quantity of memory that is written in Mi or Gi."""
    match = re.fullmatch(r"([0-9]+)(Mi|Gi)", quantity)
    assert match is not None, quantity
    return int(match[1]) * MEBIBYTES[match[2]]


def millicores(quantity: str) -> int:
    """Return a quantity of CPU that is written in cores or thousandths."""
    match = re.fullmatch(r"([0-9]+)(m?)", quantity)
    assert match is not None, quantity
    return int(match[1]) * (1 if match[2] else 1000)
