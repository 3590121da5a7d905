"""The real SDK, connected to an emulator process, for tests."""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

from couchbase.auth import PasswordAuthenticator
from couchbase.cluster import Cluster
from couchbase.options import ClusterOptions, ClusterTimeoutOptions

from tests.emulator.process import EmulatorProcess


@contextmanager
def connect(
    emulator: EmulatorProcess,
    *,
    connection_string: str | None = None,
    password: str | None = None,
    ca_file: str | None = None,
    timeout_seconds: float = 20.0,
) -> Iterator[Cluster]:
    """Connect as the emulator's user, and close the connection at the end of the block.

    Args:
        emulator: What to connect to.
        connection_string: Where else, such as its TLS ports.
        password: Another password than the right one.
        ca_file: The certificate authority to trust.
        timeout_seconds: For bootstrapping and for each operation.

    Raises:
        couchbase.exceptions.CouchbaseException: It cannot connect.
    """
    timeout = timedelta(seconds=timeout_seconds)
    trust: dict[str, Any] = {} if ca_file is None else {"cert_path": ca_file}
    options = ClusterOptions(
        PasswordAuthenticator(emulator.user, emulator.password if password is None else password, **trust),
        timeout_options=ClusterTimeoutOptions(
            bootstrap_timeout=timeout, kv_timeout=timeout, query_timeout=timeout, management_timeout=timeout
        ),
    )
    cluster = Cluster(connection_string or emulator.connection_string, options)
    try:
        yield cluster
    finally:
        cluster.close()
