"""Certificates for the emulator's TLS ports, made by trustme, among them the wrong ones that tests of failures want."""

import datetime
import ssl
from pathlib import Path

import trustme

CERTIFICATES = ("good", "expired", "wrong-host")


def make_certificate(kind: str, host: str, directory: Path) -> tuple[ssl.SSLContext, Path]:
    """Make a certificate authority and a server certificate by it.

    Args:
        kind: One of ``CERTIFICATES``: for `host`, for `host` but expired, or for another host.
        host: The host name or address that clients connect to.
        directory: Where the authority's certificate is put, for clients to trust.

    Returns:
        What the server's sockets need, and the path of the authority's certificate (PEM).
    """
    authority = trustme.CA()
    names = ["elsewhere.invalid"] if kind == "wrong-host" else sorted({host, "127.0.0.1", "::1", "localhost"})
    expired = datetime.datetime.now(datetime.UTC) - datetime.timedelta(days=1)
    certificate = authority.issue_cert(*names, not_after=expired) if kind == "expired" else authority.issue_cert(*names)
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    certificate.configure_cert(context)
    ca_file = directory / "ca.pem"
    authority.cert_pem.write_to_path(str(ca_file))
    return context, ca_file
