"""The schema, and generated profiles and pictures, for the emulator or any real cluster.

The generators are pure: what a record holds depends on the seed and its id alone. ``python -m tests.sample_data`` puts
scope, collections, indexes, token and records into the cluster that the service's own `COUCHBASE_*` settings name.
"""

from __future__ import annotations

import argparse
import base64
import colorsys
import io
import itertools
import json
import os
import random
import re
import secrets
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date, timedelta
from functools import lru_cache
from types import ModuleType, TracebackType
from typing import TYPE_CHECKING, Any, Final, NoReturn, Self

from faker import Faker
from faker.providers.person.en_US import Provider as PersonProvider
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

if TYPE_CHECKING:
    from micro_svc_demo import Settings

# ── The schema ────────────────────────────────────────────────────────────────────────────────────────────────────────

BUCKET: Final = "sample_app"
SCOPE: Final = "profiles"
USERS, IMAGES, AUTH = COLLECTIONS = ("user_data", "user_images", "service_auth")
TOKEN_KEY: Final = "service_auth:1"
INDEXES: Final = {
    "by_nickname": f"CREATE INDEX by_nickname IF NOT EXISTS ON `{USERS}`(nickname)",
    "by_user_id": f"CREATE INDEX by_user_id IF NOT EXISTS ON `{USERS}`(user_id)",
}
"""The statement that creates each index, for the scope's own query context."""

DEFAULT_SEED: Final = 1

# ── Profiles ──────────────────────────────────────────────────────────────────────────────────────────────────────────

LONGEST_NICKNAME: Final = "longest-" + "n" * (8192 - len("/api/v1/nickname/longest-"))
"""As long as the service can be asked for: its request target has room for 8 KiB."""

AWKWARD: Final[dict[int, dict[str, str]]] = {
    11: {"nickname": "O'Brien", "user_id": "o'brien", "name": "Maeve O'Brien"},
    12: {"nickname": 'the "quoted" one', "user_id": 'quote"quote', "name": 'Ada "Ace" Miller'},
    13: {"nickname": "back\\slash\\", "user_id": "domain\\user", "name": "Back\\slash"},
    14: {"nickname": "two words", "user_id": "first last"},
    15: {"nickname": " space at both ends ", "user_id": " "},
    16: {"nickname": "a/b//c/", "user_id": "team/user"},
    17: {"nickname": "100%", "user_id": "%"},
    18: {"nickname": "who?me=1", "user_id": "who?"},
    19: {"nickname": "#1", "user_id": "user#1"},
    20: {"nickname": "c++ + more", "user_id": "first+tag"},
    21: {"nickname": "salt&pepper=good;yes,no", "user_id": "a&b"},
    22: {"nickname": "😀🎉👩‍👩‍👧‍👦", "user_id": "🦊", "name": "Fox 🦊 Emoji"},
    23: {"nickname": "שלום עולם", "user_id": "مستخدم", "name": "שרה לוי"},
    24: {"nickname": "Zoe\u0301", "user_id": "zoe\u0301", "name": "Zoe\u0301 Decomposed"},
    25: {"nickname": "Zo\u00e9", "user_id": "zo\u00e9", "name": "Zo\u00e9 Composed"},
    26: {"nickname": "Z\u0351\u036b\u0343a\u0363\u0348\u032bl\u0348\u033bg\u033a\u0349o\u035f"},
    27: {"nickname": 'x" OR 1=1 --', "user_id": 'x" OR 1=1 --', "name": 'x" OR 1=1 --'},
    28: {"nickname": "x' OR '1'='1", "user_id": "x'; DROP COLLECTION `user_data`; --"},
    29: {"nickname": "`user_data`", "user_id": "`"},
    30: {"nickname": "$value", "user_id": "$1"},
    31: {"nickname": "<script>alert(1)</script>", "user_id": "<b>", "name": "<img src=x onerror=alert(1)>"},
    32: {"nickname": "null", "user_id": "true"},
    33: {"nickname": "0", "user_id": "1e3"},
    34: {"nickname": "山田太郎", "user_id": "ユーザー", "name": "山田 太郎"},
    35: {"nickname": LONGEST_NICKNAME, "user_id": "ü" * 1000},
    36: {"nickname": "%2F%00%zz", "user_id": "%41"},
    37: {"nickname": "_%", "user_id": "*"},
    38: {"nickname": "line\u2028separator\ufeff", "user_id": "no\u00a0break"},
    39: {"nickname": "İstanbul Straße", "user_id": "ß"},
}
"""Values that something between a browser and a database likes to get wrong: by record id, what replaces the usual."""

SHARED_NICKNAMES: Final = (
    *("ace", "bear", "boss", "chief", "doc", "duke", "flash", "genius"),
    *("kiddo", "lucky", "maverick", "pixel", "rocky", "scout", "sunny", "tiger"),
)
"""What many profiles share: one in twenty (ids 1, 21, 41, …) has the next of these, in an order that the seed gives."""
SHARED_EVERY: Final = 20

_MOODS = (
    *("amber", "bold", "brave", "bright", "calm", "clever", "cosmic", "crimson", "curious", "dapper", "daring"),
    *("eager", "electric", "fancy", "gentle", "golden", "happy", "hidden", "humble", "icy", "jolly", "keen"),
    *("lively", "lunar", "mellow", "mighty", "misty", "nimble", "noble", "polar", "quick", "quiet", "rapid"),
    *("royal", "rustic", "silent", "silver", "sleepy", "solar", "swift", "velvet", "vivid", "wild", "witty"),
)
_ANIMALS = (
    *("badger", "bison", "cobra", "condor", "coyote", "crane", "dingo", "dolphin", "eagle", "falcon", "ferret"),
    *("finch", "fox", "gecko", "heron", "ibex", "jaguar", "koala", "lemur", "leopard", "lynx", "mantis"),
    *("marten", "moose", "narwhal", "newt", "ocelot", "orca", "osprey", "otter", "owl", "panda", "puffin"),
    *("puma", "quokka", "raven", "robin", "salmon", "seal", "sparrow", "stoat", "toucan", "walrus", "wombat"),
)
_OLDEST, _YOUNGEST = date(1940, 1, 1).toordinal(), date(2007, 12, 31).toordinal()  # not "today": it must not change


@dataclass(frozen=True, slots=True)
class _Pools:
    """What profiles are put together from.

    Faker needs 0.2 ms for one profile; a choice from what it has drawn beforehand takes less than 1 µs and keeps how
    often each name occurs.
    """

    first_names: tuple[str, ...]
    last_names: tuple[str, ...]
    streets: tuple[str, ...]
    places: tuple[tuple[str, str, str], ...]  # city, state and ZIP code that belong together
    shared_nicknames: tuple[str, ...]


@lru_cache(maxsize=4)
def _pools(seed: int) -> _Pools:
    faker = Faker("en_US")
    faker.seed_instance(seed)
    states = [faker.state_abbr(include_territories=False, include_freely_associated_states=False) for _ in range(800)]
    return _Pools(
        # drawn at once, as every draw sums up all weights
        first_names=tuple(faker.random_elements(PersonProvider.first_names, 1500, use_weighting=True)),
        last_names=tuple(faker.random_elements(PersonProvider.last_names, 1500, use_weighting=True)),
        streets=tuple(faker.street_name() for _ in range(1200)),
        places=tuple((faker.city(), state, faker.zipcode_in_state(state)) for state in states),
        shared_nicknames=tuple(random.Random(seed).sample(SHARED_NICKNAMES, len(SHARED_NICKNAMES))),
    )


def _names(record_id: int, seed: int) -> tuple[random.Random, str, str]:
    """Return the record's own source of randomness and, drawn from it first, its first and last name."""
    pools = _pools(seed)
    # a text as the seed goes through SHA-512, so that neighbours have nothing in common
    source = random.Random(f"{seed}:{record_id}")
    return source, source.choice(pools.first_names), source.choice(pools.last_names)


def _nickname(source: random.Random, record_id: int, shared: tuple[str, ...]) -> str:
    if record_id % SHARED_EVERY == 1:
        return shared[record_id // SHARED_EVERY % len(shared)]
    separator = source.choice(("", "_", ".", "-"))
    return f"{source.choice(_MOODS)}{separator}{source.choice(_ANIMALS)}{source.randrange(10, 10_000)}"


def profile(record_id: int, seed: int = DEFAULT_SEED) -> dict[str, Any]:
    """Return the profile with this id, from 1; `picture` is the id of its image record."""
    pools = _pools(seed)
    source, first_name, last_name = _names(record_id, seed)
    city, state, zip_code = source.choice(pools.places)
    unit = f" Apt. {source.randrange(1, 400)}" if source.random() < 0.3 else ""
    letters = re.sub("[^a-z]", "", last_name.lower())
    made = {
        "record_id": record_id,
        "name": f"{first_name} {last_name}",
        "nickname": _nickname(source, record_id, pools.shared_nicknames),
        "picture": record_id,
        "user_id": f"{first_name[0].lower()}{letters}{record_id}",  # unique by its digits
        "email": f"{first_name.lower()}.{letters}{record_id}@example.{source.choice(('com', 'net', 'org'))}",
        "email_verified": source.random() < 0.85,
        "first_name": first_name,
        "last_name": last_name,
        "address": f"{source.randrange(1, 9999)} {source.choice(pools.streets)}{unit}",
        "city": city,
        "state": state,
        "zip_code": zip_code,
        # 555-01xx is nobody's: the numbers that the North American plan keeps for fiction
        "phone": f"+1-{source.randrange(2, 10)}{source.randrange(0, 9)}{source.randrange(2, 10)}"
        f"-555-01{source.randrange(100):02d}",
        "date_of_birth": date.fromordinal(source.randrange(_OLDEST, _YOUNGEST + 1)).isoformat(),
    }
    return made | AWKWARD.get(record_id, {})


def profiles(count: int, seed: int = DEFAULT_SEED) -> Iterator[dict[str, Any]]:
    """Yield the profiles 1 to `count`; each is the same whatever the count."""
    return (profile(record_id, seed) for record_id in range(1, count + 1))


# ── Pictures ──────────────────────────────────────────────────────────────────────────────────────────────────────────

PICTURE_PIXELS: Final = 128
_OVERSAMPLING = 2  # drawn larger and averaged down: Pillow's shapes have no smooth edges of their own
_DRAWN = PICTURE_PIXELS * _OVERSAMPLING
_SHAPE_TONES = (52, 104)  # of 0, the ground, to 255, the letters
_MIDDLE_TONE = 128
_HUES, _SHIFTS, _SATURATIONS = 72, (-0.14, -0.07, 0.0, 0.07, 0.14), (0.45, 0.57, 0.7)


@lru_cache(maxsize=26 * 26)
def _letters(initials: str) -> Image.Image:
    """Return the mask of the initials in the middle of a picture."""
    mask = Image.new("L", (_DRAWN, _DRAWN), 0)
    font = ImageFont.load_default(size=_DRAWN * 0.42)
    centre = (_DRAWN / 2, _DRAWN / 2)
    ImageDraw.Draw(mask).text(centre, initials, fill=255, font=font, anchor="mm", stroke_width=2, stroke_fill=255)
    return mask.reduce(_OVERSAMPLING)


@lru_cache(maxsize=_HUES * len(_SHIFTS) * len(_SATURATIONS))
def _palette(hue: int, shift: float, saturation: float) -> bytes:
    """Return 256 RGB colours: from a dark one over a lighter neighbour to white, so that edges between tones blend."""
    dark = colorsys.hls_to_rgb(hue / _HUES, 0.36, saturation)
    light = colorsys.hls_to_rgb((hue / _HUES + shift) % 1.0, 0.58, saturation)
    colours = bytearray()
    for tone in range(256):
        if tone < _MIDDLE_TONE:
            start, end, part = dark, light, tone / _MIDDLE_TONE
        else:
            start, end, part = light, (1.0, 1.0, 1.0), (tone - _MIDDLE_TONE) / (255 - _MIDDLE_TONE)
        colours += bytes(round(255 * (low + (high - low) * part)) for low, high in zip(start, end, strict=True))
    return bytes(colours)


def avatar(record_id: int, seed: int = DEFAULT_SEED) -> Image.Image:
    """Draw the picture of a record: its profile's initials on two shapes, no two records' alike."""
    _, first_name, last_name = _names(record_id, seed)
    source = random.Random(f"{seed}:{record_id}:picture")
    tones = Image.new("L", (_DRAWN, _DRAWN), 0)
    draw = ImageDraw.Draw(tones)
    for tone in _SHAPE_TONES:
        x, y, radius = source.uniform(0, _DRAWN), source.uniform(0, _DRAWN), source.uniform(0.22, 0.5) * _DRAWN
        sides = source.choice((0, 3, 4))
        if sides:
            draw.regular_polygon((x, y, radius * 1.15), sides, rotation=source.uniform(0, 360), fill=tone)
        else:
            draw.circle((x, y), radius, fill=tone)
    tones = tones.reduce(_OVERSAMPLING)
    tones.paste(255, mask=_letters(first_name[0] + last_name[0]))
    tones.putpalette(_palette(source.randrange(_HUES), source.choice(_SHIFTS), source.choice(_SATURATIONS)))
    return tones


def picture(record_id: int, seed: int = DEFAULT_SEED) -> dict[str, Any]:
    """Return the image record with this id: odd ids have a PNG, even ones a JPEG."""
    drawn, file = avatar(record_id, seed), io.BytesIO()
    if record_id % 2:
        kind = "png"
        drawn.save(file, "PNG", compress_level=1)  # a tenth larger than by default, in half the time
    else:
        kind = "jpeg"
        drawn.convert("RGB").save(file, "JPEG", quality=85)
    return {"record_id": record_id, "type": kind, "image": base64.b64encode(file.getvalue()).decode("ascii")}


def encode(document: dict[str, Any]) -> bytes:
    """Return a document as it is stored: JSON without needless spaces, in UTF-8."""
    return json.dumps(document, ensure_ascii=False, separators=(",", ":")).encode()


# ── Putting it into a cluster ─────────────────────────────────────────────────────────────────────────────────────────
# The service and the SDK are imported where they are used: the emulator wants the generators, and neither of the two.

MAX_PROFILES: Final = 5_000_000
MAX_BATCH: Final = 10_000
SCHEMA_SECONDS: Final = 60.0  # until a new scope, collection or index is known to every node
OPERATION_SECONDS: Final = 10.0
WRITE_TRIES: Final = 8  # with the service's back-off from 0.1 s: about 10 s in all
REPORT_SECONDS: Final = 5.0
PASSING_CODES: Final = {1080, 1191, 1192, 1193, 1194, 12003, 12021}
"""Of the query service: too slow or too busy, and a keyspace or scope that it does not know yet."""
PASSING_TEXT: Final = re.compile("retr(?:y|ied)|in progress|transient", re.IGNORECASE)
"""How its other refusals tell that they are not for good, such as that of an index service that is starting."""
MAX_SHOWN: Final = 300  # characters of an SDK's error


class ProvisionError(Exception):
    """The cluster could not be filled; the message is one line for the operator."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What to put into the cluster.

    Attributes:
        profiles: How many profiles, and pictures.
        seed: What they are generated from.
        token: The service's token; None keeps the one that is there, or makes a random one.
        batch: How many documents are written at once.
    """

    profiles: int
    seed: int
    token: str | None
    batch: int


class OneLineParser(argparse.ArgumentParser):
    """A parser that says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        """Print the message and end with exit code 2."""
        self.exit(2, f"{self.prog}: {message}\n")


def whole_number(low: int, high: int) -> Callable[[str], int]:
    """Return a converter for command-line numbers from `low` to `high`."""

    def convert(text: str) -> int:
        if not re.fullmatch(r"[0-9]{1,10}", text) or not low <= int(text) <= high:
            raise argparse.ArgumentTypeError(f"must be a number from {low} to {high}, not {text[:60]!r}")
        return int(text)

    return convert


def token_text(text: str) -> str:
    """Check a token: what fits into a header field, as the service wants it."""
    if not re.fullmatch(r"[!-~]{1,4096}", text):
        raise argparse.ArgumentTypeError("must be 1 to 4096 visible ASCII characters")
    return text


def read_plan(argv: Sequence[str], environ: Mapping[str, str]) -> tuple[Plan, Settings]:
    """Read the command line; what is about the cluster is left to the service's own `read_settings`.

    Raises:
        micro_svc_demo.SettingsError: A setting of the cluster is missing or not allowed.
        SystemExit: After `--help`, and for a bad value of another flag.
    """
    import micro_svc_demo as service  # noqa: PLC0415 - see above

    parser = OneLineParser(
        prog="sample_data",
        description="Create the schema and generated profiles in the cluster that the COUCHBASE_* settings name.",
        epilog="COUCHBASE_PASSWORD or COUCHBASE_PASSWORD_FILE is the password. The bucket must exist. What is there"
        " already is written again; the token is kept unless one is given. It prints a token that it has made up, and"
        " nothing else.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--profiles", type=whole_number(0, MAX_PROFILES), default=1000, metavar="N", help="how many (default 1000)"
    )
    parser.add_argument(
        "--seed", type=whole_number(0, 2**31), default=DEFAULT_SEED, metavar="N", help="another seed, other profiles"
    )
    parser.add_argument(
        "--token",
        type=token_text,
        default=environ.get("SAMPLE_TOKEN") or None,  # a default that is a text is checked like a flag
        metavar="T",
        help="SAMPLE_TOKEN: the service's token (default: the one that is there, or a random one)",
    )
    parser.add_argument(
        "--batch",
        type=whole_number(1, MAX_BATCH),
        default=500,
        metavar="N",
        help="documents written at once (default 500)",
    )
    cluster = parser.add_argument_group("the cluster, as for the service")
    rows = [row for row in service.ROWS if row["env"].startswith("COUCHBASE_")]
    for row in rows:
        if row["flag"]:
            summary = f"{row['env']}: {row['meaning']} ({row['allowed']})".replace("%", "%%")
            cluster.add_argument(row["flag"], metavar="X", help=summary)
    given = vars(parser.parse_args(argv))
    flags = [f"{row['flag']}={text}" for row in rows if row["flag"] and (text := given[_name(row["flag"])]) is not None]
    settings = service.read_settings(flags, {row["env"]: environ.get(row["env"], "") for row in rows})
    return Plan(given["profiles"], given["seed"], given["token"], given["batch"]), settings


def _name(flag: str) -> str:
    return flag.removeprefix("--").replace("-", "_")


class Provisioner:
    """A connection to one cluster, and the steps that fill it; each raises ProvisionError with what to do about it."""

    def __init__(self, settings: Settings) -> None:
        from couchbase import exceptions  # noqa: PLC0415

        import micro_svc_demo as service  # noqa: PLC0415 - see above

        self._service: ModuleType = service
        self._errors: ModuleType = exceptions
        self._settings = settings
        self._cluster: Any = None
        self._bucket: Any = None
        self._scope: Any = None

    def __enter__(self) -> Self:
        """Connect, and open the bucket.

        Raises:
            ProvisionError: Wrong credentials, nobody there, no such bucket.
            micro_svc_demo.SettingsError: The SDK does not take the host.
        """
        settings, errors = self._settings, self._errors
        try:
            self._cluster = self._service.open_cluster(settings)
        except errors.AuthenticationException as error:
            raise ProvisionError(
                f"Couchbase refuses user {settings.couchbase_user!r}: check {settings.credentials}"
            ) from error
        except (errors.InvalidArgumentException, ValueError) as error:
            raise self._service.SettingsError(
                f"COUCHBASE_HOST: the SDK does not take it: {self._shown(error)}"
            ) from error
        except errors.CouchbaseException as error:
            raise ProvisionError(
                f"nobody answers as Couchbase at {settings.connection_string}: check COUCHBASE_HOST and COUCHBASE_TLS, "
                "and that its ports can be reached from here"
            ) from error
        try:
            self._open_bucket()
        except BaseException:
            self._cluster.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Disconnect."""
        self._cluster.close()

    def _open_bucket(self) -> None:
        name, user = self._settings.couchbase_bucket, self._settings.couchbase_user
        try:
            self._cluster.buckets().get_bucket(name)  # opening one that does not exist takes 10 s to fail
        except self._errors.BucketDoesNotExistException as error:
            raise ProvisionError(
                f"bucket {name!r} does not exist: create it, in the web console or by `couchbase-cli bucket-create "
                f"-c HOST -u ADMIN -p PASSWORD --bucket {name} --bucket-type couchbase --bucket-ramsize 512`"
            ) from error
        except self._errors.CouchbaseException:  # not everybody may ask; opening it is what counts
            pass
        with self._explained(f"open bucket {name!r}", f"that it exists, and that {user!r} may use it"):
            self._bucket = self._cluster.bucket(name)
            self._scope = self._bucket.scope(self._settings.couchbase_scope)

    def create_collections(self) -> None:
        """Create the scope and collections that are missing, and wait until all can be used."""
        scope, manager = self._settings.couchbase_scope, self._bucket.collections()
        errors = self._errors
        with self._explained(f"create the collections in scope {scope!r}", "the role Bucket Admin or Scope Admin"):
            existing = {item.name: {inner.name for inner in item.collections} for item in manager.get_all_scopes()}
            if scope not in existing:
                _unless(errors.ScopeAlreadyExistsException, lambda: manager.create_scope(scope))
            for name in COLLECTIONS:
                if name not in existing.get(scope, ()):
                    _unless(errors.CollectionAlreadyExistsException, lambda: manager.create_collection(scope, name))  # noqa: B023 - called at once
        for name in COLLECTIONS:
            collection = self._scope.collection(name)
            with self._explained(f"use collection {name!r}", "the roles Data Reader and Data Writer"):
                self._patiently(lambda: collection.exists("-", timeout=timedelta(seconds=2)))  # noqa: B023 - called at once

    def create_indexes(self) -> None:
        """Create the indexes that are missing, one after the other, and wait until each is online."""
        manager = self._scope.collection(USERS).query_indexes()
        limit = timedelta(seconds=SCHEMA_SECONDS)
        for name, statement in INDEXES.items():
            with self._explained(
                f"create index {name!r}", "the query and index services, and the role Query Manage Index"
            ):
                self._patiently(lambda: self._scope.query(statement, timeout=limit).execute())  # noqa: B023 - called at once
                manager.watch_indexes([name], timeout=limit)

    def put_token(self, token: str | None) -> str | None:
        """Store the token; with None keep the one that is there, or make one up. Return it if it is made up."""
        collection, made = self._scope.collection(AUTH), None
        with self._explained(f"store the token in {TOKEN_KEY!r}", "the roles Data Reader and Data Writer"):
            token = token or self._kept_token(collection) or (made := secrets.token_urlsafe(32))
            collection.upsert(TOKEN_KEY, encode({"token": token}))
        return made

    def _kept_token(self, collection: Any) -> str | None:
        """Return the token that is there already, if the service can use it."""
        try:
            token = json.loads(collection.get(TOKEN_KEY).value)["token"]
            return token_text(token)
        except (self._errors.DocumentNotFoundException, ValueError, TypeError, KeyError, argparse.ArgumentTypeError):
            return None

    def put_records(self, plan: Plan) -> None:
        """Write profiles and pictures, a batch at a time: memory does not grow with their number."""
        starts = range(1, plan.profiles + 1, plan.batch)
        batches = (range(start, min(start + plan.batch, plan.profiles + 1)) for start in starts)
        for ids in _reported(batches, plan.profiles):
            self._write(USERS, {f"{USERS}:{number}": encode(profile(number, plan.seed)) for number in ids})
            self._write(IMAGES, {f"{IMAGES}:{number}": encode(picture(number, plan.seed)) for number in ids})

    def _write(self, name: str, documents: dict[str, bytes]) -> None:
        """Write documents, those that failed again and again after longer and longer pauses."""
        collection, left = self._scope.collection(name), documents
        limit = timedelta(seconds=OPERATION_SECONDS)
        failures: Mapping[str, Exception] = {}
        with self._explained(f"write to {name!r}", "the role Data Writer"):
            for delay in itertools.islice(self._service.backoff(0.1), WRITE_TRIES):
                failures = collection.upsert_multi(left, timeout=limit, return_exceptions=True).exceptions
                if not failures:
                    return
                left = {key: left[key] for key in failures}
                if any(map(self._is_hopeless, failures.values())):
                    break
                time.sleep(delay)
            key, failure = next(iter(failures.items()))
            if self._is_hopeless(failure):
                raise failure
        raise ProvisionError(
            f"{len(left)} of {len(documents)} documents could not be written in {WRITE_TRIES} tries, such as {key!r}: "
            + self._shown(failure)
        )

    def _is_hopeless(self, error: Exception) -> bool:
        """Tell whether trying again cannot cure it."""
        errors, context = self._errors, self._service.error_context(error)
        code, text = context.get("first_error_code"), str(context.get("first_error_message"))
        refused = code and code not in PASSING_CODES and not PASSING_TEXT.search(text)
        hopeless = (
            errors.AuthenticationException,
            errors.InvalidArgumentException,
            errors.ParsingFailedException,
            errors.ServiceUnavailableException,
            errors.FeatureUnavailableException,
        )
        return bool(refused) or isinstance(error, hopeless)

    def _patiently(self, action: Callable[[], object]) -> None:
        """Do it again until it works: nodes get to know what is new one after the other."""
        deadline = time.monotonic() + SCHEMA_SECONDS
        for delay in self._service.backoff():
            try:
                action()
            except self._errors.CouchbaseException as error:
                if self._is_hopeless(error) or time.monotonic() + delay > deadline:
                    raise
                time.sleep(delay)
            else:
                return

    @contextmanager
    def _explained(self, what: str, needs: str) -> Iterator[None]:
        """Turn the SDK's errors within the block into one line that says what failed and what it needs."""
        try:
            yield
        except self._errors.AuthenticationException as error:
            user = self._settings.couchbase_user
            raise ProvisionError(f"user {user!r} may not {what}: it needs {needs}") from error
        except self._errors.CouchbaseException as error:
            raise ProvisionError(f"cannot {what}: {self._shown(error)} (it needs {needs})") from error

    def _shown(self, error: Exception) -> str:
        return " ".join(self._service.describe(error).split())[:MAX_SHOWN]


def _unless(harmless: type[Exception], action: Callable[[], object]) -> None:
    """Do it; somebody else having done it in the same moment is as good."""
    try:
        action()
    except harmless:
        return


def _reported(batches: Iterator[range], total: int) -> Iterator[range]:
    """Pass the batches on and say on stderr how far they are: with a bar on a terminal, else by a line now and then."""
    terminal = sys.stderr.isatty()
    done, said = 0, time.monotonic()
    with tqdm(total=total, unit=" profiles", disable=not terminal) as bar:
        for batch in batches:
            yield batch
            done += len(batch)
            bar.update(len(batch))
            if not terminal and done < total and time.monotonic() - said >= REPORT_SECONDS:  # the end has its own
                said = time.monotonic()
                print(f"sample_data: {done:,} of {total:,} profiles", file=sys.stderr, flush=True)


def provision(plan: Plan, settings: Settings) -> str | None:
    """Create the schema and everything that the plan says; return the service's token if it had to be made up.

    Raises:
        ProvisionError: It cannot be done; what had been done stays, and doing it again completes it.
        micro_svc_demo.SettingsError: The SDK does not take the host.
    """
    with Provisioner(settings) as target:
        target.create_collections()
        target.create_indexes()
        target.put_records(plan)
        return target.put_token(plan.token)  # last: the service is ready once there is a token


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code: 0, 1 if it cannot be done, 2 for bad input, 130 after Ctrl-C."""
    import micro_svc_demo as service  # noqa: PLC0415 - see above

    try:
        plan, settings = read_plan(sys.argv[1:] if argv is None else argv, os.environ)
        token = provision(plan, settings)
    except service.SettingsError as error:
        print(f"sample_data: {error}", file=sys.stderr)
        return 2
    except ProvisionError as error:
        print(f"sample_data: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("sample_data: interrupted; run again, it completes what is missing", file=sys.stderr)
        return 130
    where = f"{settings.couchbase_bucket}.{settings.couchbase_scope}"
    follows = "; the service's token:" if token and sys.stdout.isatty() else ""
    print(f"sample_data: {plan.profiles:,} profiles and pictures are in {where}{follows}", file=sys.stderr, flush=True)
    if token:
        print(token)
    return 0


if __name__ == "__main__":
    sys.exit(main())
