"""What custom resources look like that `kubernetes-validate` knows nothing of: only the fields that are used here.

Field names and types are those of the operator's reference (couchbase.com/v2, Autonomous Operator 2.9), of
cert-manager's (cert-manager.io/v1), of the Gateway API's (gateway.networking.k8s.io/v1, release 1.4) and of Envoy
Gateway's (gateway.envoyproxy.io/v1alpha1, release 1.4). Every other field is refused, so a slip of the pen is found
without a cluster. Within lists, fields that the API gives a default are required: kubectl compares lists of custom
resources as they stand, and would send one that lacks them at every apply.
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
PRIVATE_KEY = {
    "oneOf": [
        exactly({"algorithm": {"const": "RSA"}, "encoding": {"const": "PKCS1"}, "size": {"enum": [2048, 3072, 4096]}}),
        exactly({"algorithm": {"const": "ECDSA"}, "encoding": {"const": "PKCS8"}, "size": {"enum": [256, 384, 521]}}),
    ]
}
HOST_NAME: Schema = {"type": "string", "pattern": r"^[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?$"}
SECTION: Schema = {"type": "string", "pattern": r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$", "maxLength": 63}
PORT: Schema = {"type": "integer", "minimum": 1, "maximum": 65535}
GATEWAY_DURATION: Schema = {"type": "string", "pattern": r"^([0-9]{1,5}(h|m|s|ms)){1,4}$"}
SAME_NAMESPACE = exactly({"namespaces": exactly({"from": {"const": "Same"}})})


def reference(group: str, kind: str, **more: Schema) -> Schema:
    """Return the schema of a reference to one object of a kind."""
    return exactly({"group": {"const": group}, "kind": {"const": kind}, "name": NAME, **more})


LISTENERS = {
    "oneOf": [
        exactly(
            {
                "name": SECTION,
                "protocol": {"const": "HTTPS"},
                "port": PORT,
                "tls": exactly({"mode": {"const": "Terminate"}, "certificateRefs": some(reference("", "Secret"))}),
                "allowedRoutes": SAME_NAMESPACE,
            }
        ),
        exactly(
            {"name": SECTION, "protocol": {"const": "HTTP"}, "port": PORT, "allowedRoutes": SAME_NAMESPACE},
        ),
    ]
}
MATCH = exactly({"path": exactly({"type": {"const": "PathPrefix"}, "value": {"type": "string", "pattern": "^/"}})})
BACKEND = reference("", "Service", port=PORT, weight={"type": "integer", "minimum": 0})
REDIRECT = exactly(
    {
        "type": {"const": "RequestRedirect"},
        "requestRedirect": exactly({"scheme": {"const": "https"}, "statusCode": {"enum": [301, 302]}}),
    }
)
ROUTE_RULE = {
    "oneOf": [
        exactly(
            {
                "matches": some(MATCH),
                "timeouts": exactly({"request": GATEWAY_DURATION}),
                "backendRefs": some(BACKEND),
            }
        ),
        exactly({"matches": some(MATCH), "filters": some(REDIRECT)}),
    ]
}
RATE_RULE = exactly(
    {
        "clientSelectors": some(
            exactly({"sourceCIDR": exactly({"type": {"const": "Distinct"}, "value": {"enum": ["0.0.0.0/0", "::/0"]}})})
        ),
        "limit": exactly({"requests": {"type": "integer", "minimum": 1}, "unit": {"enum": ["Second", "Minute"]}}),
    }
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
    ("gateway.networking.k8s.io/v1", "Gateway"): exactly({"gatewayClassName": NAME, "listeners": some(LISTENERS)}),
    ("gateway.networking.k8s.io/v1", "HTTPRoute"): exactly(
        {
            "parentRefs": some(reference("gateway.networking.k8s.io", "Gateway", sectionName=SECTION)),
            "rules": some(ROUTE_RULE),
        }
    ),
    ("gateway.networking.k8s.io/v1", "BackendTLSPolicy"): exactly(
        {
            "targetRefs": some(reference("", "Service", sectionName=SECTION)),
            "validation": exactly(
                {"hostname": HOST_NAME, "caCertificateRefs": some(reference("", "ConfigMap"))},
            ),
        }
    ),
    ("gateway.envoyproxy.io/v1alpha1", "BackendTrafficPolicy"): exactly(
        {
            "targetRefs": some(reference("gateway.networking.k8s.io", "HTTPRoute")),
            "rateLimit": exactly({"type": {"const": "Local"}, "local": exactly({"rules": some(RATE_RULE)})}),
            "timeout": exactly({"http": exactly({"connectionIdleTimeout": GATEWAY_DURATION})}),
        }
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
