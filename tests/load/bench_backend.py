"""The one database behind all services: the emulator in a process of its own, or a real cluster."""

import base64
import contextlib
import itertools
import json
import random
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

from couchbase.exceptions import CouchbaseException

import micro_svc_demo
from tests.emulator.process import EmulatorFailedError, EmulatorProcess
from tests.load.bench_plan import DOCUMENTS, PICTURE_BYTES, PICTURES
from tests.load.bench_processes import RunError
from tests.service import settings_for

EMULATOR_START_SECONDS = 300.0
MAX_TARGETS = 20_000
"""How many requests wrk keeps ready: of more documents than that, it asks for as many, drawn at random."""
SEED = 11
AT_ONCE = 100  # documents in one operation


@dataclass(frozen=True)
class Backend:
    """A database, provisioned.

    Attributes:
        settings: the COUCHBASE_* variables of our service.
        peer_settings: the same for the others, which know fewer of them.
        token: what the services want to be shown.
        documents: how many profiles there are.
        emulator: the emulator, if it is one.
        targets: the files of targets by the names that scenarios use.
        nicknames, usernames: some that exist.
    """

    settings: dict[str, str]
    peer_settings: dict[str, str]
    token: str
    documents: int
    emulator: EmulatorProcess | None
    targets: dict[str, Path]
    nicknames: list[str]
    usernames: list[str]

    @property
    def pid(self) -> int | None:
        """The emulator's process id."""
        return self.emulator.pid if self.emulator else None

    def delay(self, ms: int) -> None:
        """Make the emulator answer key-value requests later, from now on; 0 is at once."""
        if self.emulator is not None:
            self.emulator.clear("latency")
            if ms:
                self.emulator.fault("latency", ms=ms)


@contextlib.contextmanager
def emulated(documents: int = DOCUMENTS, pictures: bool = True) -> Iterator[Backend]:
    """Run an emulator with so many profiles.

    Raises:
        RunError: it does not start.
    """
    try:
        with (
            EmulatorProcess(
                start_seconds=EMULATOR_START_SECONDS, profiles=documents, pictures=int(pictures)
            ) as emulator,
            _provisioned(settings_for(emulator), documents, emulator) as backend,
        ):
            yield backend
    except EmulatorFailedError as error:
        raise RunError(f"the emulator failed: {error}") from None


def cluster(environ: dict[str, str]) -> contextlib.AbstractContextManager[Backend]:
    """Use the cluster that the service's own settings name; the pictures put into it are removed again.

    Raises:
        SettingsError: the settings name none.
        RunError: it can't be used, or does not have the sample data.
    """
    chosen = {name: value for name, value in environ.items() if name.startswith("COUCHBASE_")}
    return _provisioned(chosen, DOCUMENTS, None)


@contextlib.contextmanager
def _provisioned(chosen: dict[str, str], documents: int, emulator: EmulatorProcess | None) -> Iterator[Backend]:
    """Look at the sample data, put the pictures there, and write the files of targets."""
    settings = micro_svc_demo.read_settings([], chosen)
    keys = {f"bench-{number}": f"user_images:bench-{number}" for number in range(PICTURES)}
    try:
        connection = micro_svc_demo.open_cluster(settings)
        scope = connection.bucket(settings.couchbase_bucket).scope(settings.couchbase_scope)
    except CouchbaseException as error:
        raise RunError(f"the cluster can't be used: {micro_svc_demo.describe(error)}") from None
    with contextlib.closing(connection), tempfile.TemporaryDirectory(prefix="load-") as folder:
        images = scope.collection("user_images")
        try:
            token, profiles = _token(scope), _profiles(scope.collection("user_data"))
            draw = random.Random(SEED)
            records = ((key, _picture(number, draw)) for number, key in enumerate(keys.values()))
            while batch := dict(itertools.islice(records, AT_ONCE)):
                images.upsert_multi(batch)
            ids = range(1, documents + 1)
            some = ids if documents <= MAX_TARGETS else draw.sample(ids, MAX_TARGETS)
            paths = {
                "ids": (f"/api/v1/id/{number}" for number in some),
                "missing": (f"/api/v1/id/{documents + number}" for number in range(1, DOCUMENTS + 1)),
                "nicknames": (f"/api/v1/nickname/{quote(each['nickname'], safe='')}" for each in profiles),
                "pictures": (f"/api/v1/picture/raw/{name}" for name in keys),
            }
            targets = {name: Path(folder) / name for name in paths}
            for name, lines in paths.items():
                targets[name].write_text("\n".join(lines) + "\n", encoding="ascii")
            names = ([each[field] for each in profiles[:3]] for field in ("nickname", "user_id"))
            yield Backend(chosen, _for_peers(settings), token, documents, emulator, targets, *names)
        finally:
            with contextlib.suppress(CouchbaseException):
                images.remove_multi(list(keys.values()))


def _token(scope: Any) -> str:
    """Return the services' token.

    Raises:
        RunError: there is none.
    """
    try:
        return str(json.loads(scope.collection("service_auth").get("service_auth:1").value)["token"])
    except (CouchbaseException, ValueError, KeyError) as error:
        raise RunError(f"the token can't be read: {micro_svc_demo.describe(error)}") from None


def _profiles(users: Any) -> list[dict[str, Any]]:
    profiles = []
    for first in range(1, DOCUMENTS + 1, AT_ONCE):
        keys = [f"user_data:{number}" for number in range(first, min(first + AT_ONCE, DOCUMENTS + 1))]
        result = users.get_multi(keys, return_exceptions=True)
        for failure in result.exceptions.values():
            why = f"({micro_svc_demo.describe(failure)}): provision it with python -m tests.sample_data"
            raise RunError(f"it does not have the profiles 1 to {DOCUMENTS} {why}")
        profiles += [json.loads(document.value) for document in result.results.values()]
    return profiles


def _picture(number: int, draw: random.Random) -> bytes:
    """Return a picture's record. Nobody looks into the picture; incompressible bytes stand for it."""
    image = base64.b64encode(draw.randbytes(PICTURE_BYTES)).decode()
    return json.dumps({"record_id": number, "type": "png", "image": image}).encode()


def _for_peers(settings: micro_svc_demo.Settings) -> dict[str, str]:
    """Put what else the connection needs into its string, which every SDK reads."""
    options = {
        "trust_certificate": settings.couchbase_tls_ca,
        "tls_verify": "" if settings.couchbase_tls_verify else "none",
        "network": "" if settings.couchbase_network == "auto" else settings.couchbase_network,
    }
    text = settings.connection_string
    if given := urlencode({name: value for name, value in options.items() if value}):
        text += ("&" if "?" in text else "?") + given
    return {
        "COUCHBASE_HOST": text,
        "COUCHBASE_USER": settings.couchbase_user,
        "COUCHBASE_PASSWORD": settings.couchbase_password,
        "COUCHBASE_BUCKET": settings.couchbase_bucket,
        "COUCHBASE_SCOPE": settings.couchbase_scope,
    }
