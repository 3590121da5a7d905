"""What is measured: the services and how each is started, the scenarios, and which of them make up a run."""

from dataclasses import dataclass, replace

OURS, EXPRESS, FASTAPI, PLAIN, THREADING = "ours", "express", "fastapi", "plain", "threading"
TITLES = {
    OURS: "micro_svc_demo",
    EXPRESS: "Express",
    FASTAPI: "FastAPI",
    PLAIN: "HTTPServer",
    THREADING: "ThreadingHTTPServer",
}
"""The services by the names of ``--services``, and what tables call them."""
SDK_CEILING = "plain gets, 8 threads"
SDK_ON_ONE_PROCESSOR = "plain gets, 8 threads on one processor"
"""Loops of the SDK alone that others are compared with."""
IN_PRODUCTION = (OURS, EXPRESS, FASTAPI)
"""Those that one would run for real, and in several processes."""
DOCUMENTS = 1000
PICTURES = 1000  # of 20 kB: a quarter more than the service keeps decoded
PICTURE_BYTES = 20_000


@dataclass(frozen=True)
class Setup:
    """How a service is started: one life of it answers all the scenarios that want the same setup.

    Attributes:
        service: one of `TITLES`.
        access_log: whether it writes a line a request.
        processes: how many: of ours each a service of its own, of the others workers of one.
        document_workers, batch_size: of our service only; None for its own defaults.
        other_affinity: our service wherever the kernel puts its threads, another kept to one processor as ours keeps
            itself.
        tls: whether it speaks HTTPS, with a certificate of the same kind for all.
        other_commit: our service as another commit has it.
    """

    service: str
    access_log: bool
    processes: int = 1
    document_workers: int | None = None
    batch_size: int | None = None
    other_affinity: bool = False
    tls: bool = False
    other_commit: bool = False

    def __str__(self) -> str:
        """Name it for the progress' lines."""
        parts = [TITLES[self.service], "log on" if self.access_log else "log off"]
        parts += [f"{self.processes} processes"] if self.processes > 1 else []
        parts += [f"{self.document_workers} workers × {self.batch_size}"] if self.document_workers else []
        parts += ["TLS"] if self.tls else []
        parts += ["the other commit"] if self.other_commit else []
        parts += ["affinity the other way round"] if self.other_affinity else []
        return ", ".join(parts)


@dataclass(frozen=True)
class Scenario:
    """One kind of load.

    Attributes:
        name: what the results and ``--only`` call it; also the part before the last number, its group.
        connections: how many clients ask at once, each again as soon as it is answered.
        targets: which targets are asked for: ids, missing, nicknames or pictures.
        status: what every answer must have.
        right_token: whether the clients show the token or another.
        new_connections: whether each request has a connection of its own.
        latency_ms: how much later the database answers (emulator only).
    """

    name: str
    connections: int
    targets: str = "ids"
    status: int = 200
    right_token: bool = True
    new_connections: bool = False
    latency_ms: int = 0


def group_of(name: str) -> str:
    """Return a scenario's family, such as by-id."""
    return name.rstrip("0123456789").rstrip("-")


def by_id(connections: int, latency_ms: int = 0) -> Scenario:
    """Return the scenario of random profiles by id."""
    name = f"latency-{latency_ms}ms-{connections}" if latency_ms else f"by-id-{connections}"
    return Scenario(name, connections, latency_ms=latency_ms)


SCENARIOS = [
    *map(by_id, (1, 8, 32, 256, 1000)),
    Scenario("missing", 32, targets="missing", status=404),
    Scenario("wrong-token", 32, status=401, right_token=False),
    Scenario("nickname", 32, targets="nicknames"),
    Scenario("picture", 32, targets="pictures"),
    Scenario("new-connection", 32, new_connections=True),
    *(by_id(connections, latency_ms) for latency_ms in (1, 5) for connections in (32, 256)),
]
"""What one process of every service answers."""
TWO_PROCESSES = [Scenario(f"two-processes-{connections}", connections) for connections in (32, 256)]
OTHER_LOG = [replace(by_id(32), name="other-log-32")]
"""With the access log the other way round: off for our service, on for the others."""
OTHER_AFFINITY = [replace(by_id(32), name="other-affinity-32")]
"""What our service owes to its keeping to one processor, and what the others would gain."""
TLS = [replace(by_id(connections), name=f"tls-by-id-{connections}") for connections in (1, 32, 256)]
TLS += [Scenario("tls-new-connection", 32, new_connections=True)]
"""What encrypting costs, and with a connection a request what a handshake does: wrk resumes no session."""
QUICK = ("by-id-1", "by-id-32", "by-id-1000", "missing", "picture", "two-processes-32", "other-log-32", "sdk")
AGAINST = ("by-id", "missing", "nickname", "picture")
"""What commits are compared by, unless ``--only`` says otherwise."""
NAMES = sorted(
    {
        name
        for scenario in SCENARIOS + TWO_PROCESSES + OTHER_LOG + OTHER_AFFINITY + TLS
        for name in (scenario.name, group_of(scenario.name))
    }
    | {"sdk"}
)
"""What ``--only`` may name; sdk is the SDK alone in a loop."""

GRID = [(workers, size) for workers in (1, 2, 3, 4) for size in (16, 32, 64, 128)]
GRID_SCENARIOS = [by_id(connections, latency_ms) for latency_ms in (0, 1, 5) for connections in (32, 256)]
GROWTH_CONNECTIONS = (10, 32, 100, 320, 1000, 2000, 5000)
GROWTH_DOCUMENTS = (1_000, 10_000, 100_000, 1_000_000)


Lives = list[tuple[Setup, list[Scenario]]]
"""Setups in the order of their turns, each with the scenarios that it answers in one life."""


def wanted(scenario: Scenario, only: tuple[str, ...]) -> bool:
    """Say whether ``--only`` asks for a scenario; nothing named is everything."""
    return not only or bool({scenario.name, group_of(scenario.name)} & set(only))


def services_plan(services: tuple[str, ...], only: tuple[str, ...]) -> Lives:
    """Return the comparison: ours with everything on, the others as they come, no log; then the other way round."""
    lives: Lives = []
    for service in services:
        log = service == OURS
        lives.append((Setup(service, log), SCENARIOS))
        if service in IN_PRODUCTION:
            lives.append((Setup(service, log, processes=2), TWO_PROCESSES))
            lives.append((Setup(service, not log), OTHER_LOG))
            lives.append((Setup(service, log, other_affinity=True), OTHER_AFFINITY))
            lives.append((Setup(service, log, tls=True), TLS))
    chosen = [(setup, [each for each in scenarios if wanted(each, only)]) for setup, scenarios in lives]
    return [(setup, scenarios) for setup, scenarios in chosen if scenarios]


def grid_plan() -> Lives:
    """Return the grid of document workers and batch sizes, with the log off as it is the same for all."""
    return [(Setup(OURS, False, 1, workers, size), GRID_SCENARIOS) for workers, size in GRID]


def growth_plan(services: tuple[str, ...]) -> Lives:
    """Return the lives for more and more connections."""
    chosen = [service for service in IN_PRODUCTION if service in services]
    return [(Setup(service, service == OURS), list(map(by_id, GROWTH_CONNECTIONS))) for service in chosen]


def documents_plan(services: tuple[str, ...]) -> Lives:
    """Return the lives for one size of the database."""
    chosen = [service for service in IN_PRODUCTION if service in services]
    return [(Setup(service, service == OURS), [by_id(32)]) for service in chosen]
