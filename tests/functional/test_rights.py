"""What the service's user may not do: the roles of `k8s/couchbase` are for reading alone, and for lookups in one place.

That they are enough is what all other tests say, as the service signs in with them.
"""

from collections.abc import Iterator
from typing import Any

import pytest
from couchbase import exceptions as cb

import micro_svc_demo
from tests.service import settings_for


@pytest.fixture(scope="module")
def scope(database) -> Iterator[Any]:
    """The scope, as that user sees it."""
    if database.second_user == database.user:
        pytest.skip("needs COUCHBASE_TEST_SERVICE_USER: one with the roles of k8s/couchbase/group.yaml")
    settings = micro_svc_demo.read_settings([], settings_for(database))
    cluster = micro_svc_demo.open_cluster(settings)
    yield cluster.bucket(settings.couchbase_bucket).scope(settings.couchbase_scope)
    cluster.close()


@pytest.mark.parametrize("collection", ["user_data", "user_images", "service_auth"])
def test_writes_are_refused(scope: Any, collection: str) -> None:
    """By key-value (0x24), in each of the three collections, whether the document is there or not."""
    for operation in ("upsert", "insert"):
        with pytest.raises(cb.CouchbaseException) as refused:
            getattr(scope.collection(collection), operation)(f"{collection}:new", b'{"token":"mine"}')
        assert "auth" in str(refused.value).lower() or "access" in str(refused.value).lower()
    with pytest.raises(cb.CouchbaseException):
        scope.collection(collection).remove(f"{collection}:1")
    assert scope.collection(collection).exists(f"{collection}:1").exists


@pytest.mark.parametrize(
    "statement",
    [
        "SELECT RAW t.token FROM service_auth AS t USE KEYS 'service_auth:1'",
        "SELECT RAW i FROM user_images AS i USE KEYS 'user_images:1'",
        "CREATE INDEX mine ON user_data(name)",
        "DROP INDEX by_nickname ON user_data",
    ],
)
def test_other_statements_are_refused(scope: Any, statement: str) -> None:
    """By the query service (13014): looking into other collections, and changing indexes."""
    with pytest.raises(cb.CouchbaseException) as refused:
        list(scope.query(statement))
    assert "13014" in str(refused.value)
