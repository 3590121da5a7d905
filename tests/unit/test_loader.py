"""The data loader and its pools: what is fetched together, what waits for what, and what happens when nothing comes."""

import _thread
import asyncio
import contextlib
import functools
import socket
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Iterator
from concurrent.futures import Future
from typing import Any, NamedTuple
from unittest.mock import DEFAULT, Mock

import pytest
from couchbase import exceptions as cb

import micro_svc_demo as service
from tests.load.clients import request

SECONDS = 20.0  # far above all that is waited for
Reply = tuple[int, bytes]  # status and body


class Call(NamedTuple):
    """What a thread has asked the SDK for; it waits until the test answers."""

    name: str
    target: str  # the collection or the statement
    keys: list[str]
    options: dict[str, Any]
    thread: int
    outcome: Future[dict[str, Exception | None]]

    def answer(self, **errors: Exception | None) -> None:
        """Have all documents or rows found, but for the ids named; None: nothing is said of that one."""
        self.outcome.set_result({f"user_data:{number[1:]}": error for number, error in errors.items()})


class Part:
    """A collection or a scope, as the SDK has them; the test plays Couchbase."""

    def __init__(self, bench: "Bench", target: str = "") -> None:
        self.bench, self.target = bench, target

    def ask(self, name: str, target: str, keys: list[str], options: Any) -> Any:
        call = Call(name, target, keys, dict(options), threading.get_ident(), Future())
        self.bench.tell(self.bench.asked, call)
        said = call.outcome.result(SECONDS)
        found = {
            key: Mock(value=b'{"id":"%b"}' % key.encode(), cas=1, is_replica=True) for key in keys if key not in said
        }
        return Mock(all_ok=not said, results=found, exceptions={key: error for key, error in said.items() if error})

    def get(self, key: str, name: str = "get", **options: Any) -> Any:
        answer = self.ask(name, self.target, [key], options)
        for error in answer.exceptions.values():
            raise error
        return answer.results[key]

    def get_any_replica(self, key: str, **options: Any) -> Any:
        return self.get(key, "get_any_replica", **options)

    def get_multi(self, keys: list[str], **options: Any) -> Any:
        if not keys[0].startswith("probe:"):
            return self.ask("get_multi", self.target, keys, options)
        silent = {key for key in keys if service.vbucket(key) in self.bench.silent}
        answers = dict.fromkeys(keys, cb.DocumentNotFoundException())
        return Mock(
            all_ok=False, results={}, exceptions=answers | dict.fromkeys(silent, cb.UnAmbiguousTimeoutException())
        )

    def query(self, statement: str, options: Any) -> list[bytes]:
        self.ask("query", statement, [], options)
        return [b"7"]


class Bench:
    """The service without sockets: the test hands over what clients send."""

    loop: asyncio.AbstractEventLoop

    def __init__(self, settings: service.Settings) -> None:
        log, metrics = service.Log("error"), service.Metrics()
        self.store = service.ProfileStore(settings, log, metrics)
        self.store.tokens.adopt("t", 0.0)
        self.loader, self.health, self.database = self.store.loader, self.store.health, self.store.database
        self.loader.stall_seconds = SECONDS  # a busy machine is no stalled Couchbase
        self.database._collections = {name: Part(self, name) for name in (service.USERS, service.IMAGES)}
        self.database._scope = Part(self)
        self.server = service.ProfileServer(settings, self.store, log, metrics)
        self.silent: set[int] = set()  # vBuckets of which no probe is answered
        self.closing = threading.Event()
        self.asked: asyncio.Queue[Call] = asyncio.Queue()
        self.ended: asyncio.Queue[int] = asyncio.Queue()  # threads

    def tell(self, queue: asyncio.Queue[Any], what: Any) -> None:
        """Put something into a queue, from another thread."""
        with contextlib.suppress(RuntimeError):  # the test has ended
            self.loop.call_soon_threadsafe(queue.put_nowait, what)

    def ask(self, path: str) -> asyncio.Future[Reply]:
        """Have a new client ask for something in this turn of the loop."""
        reply: asyncio.Future[Reply] = self.loop.create_future()
        connection, transport = service.Connection(self.server), Mock()
        transport.get_extra_info.return_value = ("192.0.2.1", 1)
        transport.write.side_effect = lambda raw: reply.set_result((int(raw[9:12]), raw.partition(b"\r\n\r\n")[2]))
        connection.connection_made(transport)
        connection.data_received(request(path, "t"))
        return reply

    def profiles(self, *numbers: int) -> list[asyncio.Future[Reply]]:
        return [self.ask(f"/api/v1/id/{number}") for number in numbers]

    def query(self) -> asyncio.Future[Reply]:
        return self.ask("/api/v1/nickname/a")

    async def calls(self, count: int) -> list[Call]:
        """Return the next calls of threads, in the order of their keys."""
        return sorted([await within(self.asked.get()) for _ in range(count)], key=lambda call: call.keys)

    async def busy(self) -> tuple[list[asyncio.Future[Reply]], list[Call]]:
        """Have a batch of one document under way on each thread."""
        clients, calls = [], []
        for number in range(service.Loader.threads):
            clients += self.profiles(100 + number)
            calls += await self.calls(1)
        return clients, calls


def probe_that_waits_to_confirm(bench: Bench, probe: Callable[..., Any], asked: set[int], seconds: float) -> Any:
    """Probe; what takes longer than the quick look does is not known before the test ends."""
    if seconds > bench.database.probe_seconds:
        bench.closing.wait(SECONDS)
    return probe(asked, seconds)


async def within(awaited: Awaitable[Any]) -> Any:
    return await asyncio.wait_for(awaited, SECONDS)


async def replies(clients: Iterable[asyncio.Future[Reply]]) -> list[Reply]:
    return await within(asyncio.gather(*clients))


async def statuses(*clients: asyncio.Future[Reply]) -> list[int]:
    return [status for status, _ in await replies(clients)]


def time_left(call: Call) -> float:
    return call.options["timeout"].total_seconds() if "timeout" in call.options else SECONDS


def found(*numbers: int) -> list[Reply]:
    return [(200, b'[{"id":"user_data:%d"}]' % number) for number in numbers]


def keys(*numbers: int) -> list[str]:
    return [f"user_data:{number}" for number in numbers]


@pytest.fixture
def bench(settings: service.Settings, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bench]:
    made, start = Bench(settings), _thread.start_new_thread

    def start_new_thread(work: Callable[..., None], arguments: tuple[Any, ...]) -> None:
        def run() -> None:
            work(*arguments)
            made.tell(made.ended, threading.get_ident())

        start(run, ())

    monkeypatch.setattr(_thread, "start_new_thread", start_new_thread)
    yield made
    made.closing.set()
    made.server.server_close()
    made.server.log.close()


def in_the_loop(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """Run a test in an event loop that ends its turns as the service's does; nothing may fail there unseen."""

    @functools.wraps(test)
    def run(bench: Bench, **fixtures: Any) -> None:
        failures: list[dict[str, Any]] = []
        end_of_turn = service.EndOfTurn(bench.server)
        with asyncio.Runner(loop_factory=lambda: asyncio.SelectorEventLoop(end_of_turn)) as runner:
            bench.loop = runner.get_loop()
            bench.loop.set_exception_handler(lambda _loop, context: failures.append(context))
            runner.run(test(bench, **fixtures))
        assert failures == [] and bench.asked.empty()

    return run


# ---- batches ----


@in_the_loop
async def test_what_is_asked_for_in_one_turn_is_one_batch(bench: Bench) -> None:
    """Each key once, however many ask for it."""
    clients = bench.profiles(1, 2, 1)
    [call] = await bench.calls(1)
    assert (call.target, call.keys) == (service.USERS, keys(1, 2))
    assert time_left(call) == SECONDS
    call.answer()
    assert await replies(clients) == found(1, 2, 1)


@in_the_loop
async def test_each_collection_has_its_own_batch(bench: Bench) -> None:
    clients = [*bench.profiles(1), bench.ask("/api/v1/picture/record/1")]
    calls = await bench.calls(2)
    assert [(call.target, call.keys) for call in calls] == [
        (service.USERS, keys(1)),
        (service.IMAGES, ["user_images:1"]),
    ]
    for call in calls:
        call.answer()
    assert await replies(clients) == [*found(1), (200, b'[{"id":"user_images:1"}]')]


@in_the_loop
async def test_a_failure_belongs_to_its_key(bench: Bench) -> None:
    clients = bench.profiles(1, 2, 3, 4)
    [call] = await bench.calls(1)
    call.answer(_2=cb.DocumentNotFoundException(), _4=None)
    assert await statuses(*clients) == [200, 404, 200, 500]
    assert not bench.health.degraded
    clients = bench.profiles(1, 2)
    [call] = await bench.calls(1)
    call.answer(_2=cb.TemporaryFailException())
    assert await statuses(*clients) == [200, 503]
    assert bench.health.degraded


@in_the_loop
async def test_a_mistake_of_ours_is_answered_too(bench: Bench) -> None:
    clients = [*bench.profiles(1, 2), bench.query()]
    for call in await bench.calls(2):
        call.outcome.set_exception(RuntimeError("a mistake"))
    assert await statuses(*clients) == [500, 500, 500]


@in_the_loop
async def test_a_mistake_with_one_job_ends_no_other(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is told, and the loop goes on."""
    told: asyncio.Queue[str] = asyncio.Queue()
    monkeypatch.setattr(bench.server.log, "event", lambda _level, message, **_details: told.put_nowait(message))
    monkeypatch.setattr(bench.store, "judge", Mock(wraps=bench.store.judge, side_effect=[KeyError(), DEFAULT]))
    bench.profiles(1)
    [first] = await bench.calls(1)
    first.answer()
    assert await within(told.get()) == "event loop failure"
    clients = bench.profiles(2)
    [second] = await bench.calls(1)
    second.answer()
    assert await replies(clients) == found(2)


@in_the_loop
async def test_a_client_that_leaves_hurts_nobody(bench: Bench) -> None:
    """Its document is thrown away, and counted; whoever asked for the same gets it."""
    [gone] = bench.profiles(1)
    [connection] = bench.server.connections
    [stays] = bench.profiles(1)
    [call] = await bench.calls(1)
    connection.connection_lost(None)
    call.answer()
    assert await replies([stays]) == found(1)
    assert not gone.done()
    counted = 'http_requests_total{route="/api/v1/id/{id}",method="GET",status="200"} 2\n'
    assert counted in bench.server.metrics.render().decode()


@in_the_loop
async def test_a_batch_has_a_bound(bench: Bench) -> None:
    size = service.Loader.batch_size
    clients = bench.profiles(*range(1000, 1002 + size))
    calls = await bench.calls(2)
    assert [call.keys for call in calls] == [keys(*range(1000, 1000 + size)), keys(1000 + size, 1001 + size)]
    for call in calls:
        call.answer()
    assert await replies(clients) == found(*range(1000, 1002 + size))


def pictures(bench: Bench, *numbers: int) -> list[asyncio.Future[Reply]]:
    return [bench.ask(f"/api/v1/picture/record/{number}") for number in numbers]


@in_the_loop
async def test_large_documents_are_bounded_by_their_bytes(bench: Bench) -> None:
    """As large as the last ones were: at first a picture is taken for one of 6 MiB. The other collection goes on."""
    bench.loader.most_bytes = 24 << 20
    clients = pictures(bench, 1, 2, 2, 3, 4, 5)  # each answer counts, not each key
    [large] = await bench.calls(1)
    assert large.keys == [f"user_images:{number}" for number in (1, 2, 3)]
    profile = bench.profiles(7)
    [call] = await bench.calls(1)
    call.answer()
    assert await replies(profile) == found(7)
    large.answer()
    [rest] = await bench.calls(1)
    assert rest.keys == ["user_images:4", "user_images:5"]
    rest.answer()
    assert await statuses(*clients) == [200] * 6
    assert bench.loader.fetching_bytes == 0 and bench.loader.sizes[service.IMAGES] < 4 << 20


@in_the_loop
async def test_answers_that_are_not_sent_yet_count(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """But not for long those of a client that takes nothing: it must not stop others."""
    sent = time.monotonic() + 30.0  # the deadline of an answer that has just been begun
    transport = Mock(get_write_buffer_size=Mock(return_value=30 << 20))
    slow = Mock(spec=service.Connection, transport=transport, deadline=sent, write_seconds=30.0)
    bench.loader.writing.add(slow)
    clients = pictures(bench, 1, 2)
    profile = bench.profiles(7)
    [call] = await bench.calls(1)
    assert call.keys == keys(7)
    call.answer()
    assert await replies(profile) == found(7)
    monkeypatch.setattr(bench.database, "timeout_seconds", 0.05)  # whoever has waited for as long is refused meanwhile
    assert await statuses(*clients) == [503, 503]
    monkeypatch.setattr(bench.database, "timeout_seconds", SECONDS)
    clients = pictures(bench, 3, 4)
    slow.deadline -= service.Loader.sending_seconds
    [call] = await bench.calls(1)
    assert call.target == service.IMAGES
    call.answer()
    assert await statuses(*clients) == [200, 200]


@in_the_loop
async def test_what_comes_while_all_are_busy_is_the_next_batch(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of several turns, up to the bound; those who have waited have less time left for Couchbase."""
    monkeypatch.setattr(service.Loader, "slack_seconds", 0.0)
    monkeypatch.setattr(bench.loader, "batch_size", 3)
    clients, calls = await bench.busy()
    clients += bench.profiles(1, 2)
    await asyncio.sleep(0)
    clients += bench.profiles(3, 1, 4)
    for expected in (keys(1, 2, 3), keys(4)):
        calls.pop(0).answer()
        calls += await bench.calls(1)
        assert calls[-1].keys == expected and 0 < time_left(calls[-1]) < bench.database.timeout_seconds
    for call in calls:
        call.answer()
    assert await replies(clients) == found(100, 101, 102, 1, 2, 3, 1, 4)


@in_the_loop
async def test_who_has_waited_for_as_long_as_a_caller_would_is_refused(bench: Bench) -> None:
    clients, calls = await bench.busy()
    late = bench.profiles(1, 2, 1)
    bench.database.timeout_seconds = 0.0
    calls[0].answer()
    assert await statuses(*late) == [503, 503, 503]
    for call in calls[1:]:
        call.answer()
    assert await replies(clients) == found(100, 101, 102)


@in_the_loop
async def test_late_ones_take_no_time_from_others(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    clients, calls = await bench.busy()
    with monkeypatch.context() as patch:
        earlier = time.monotonic() - 10.0
        patch.setattr(time, "monotonic", lambda: earlier)
        [late] = bench.profiles(1)
    clients += bench.profiles(2)
    calls[0].answer()
    assert await statuses(late) == [503]
    calls += await bench.calls(1)
    assert calls[-1].keys == keys(2)
    assert time_left(calls[-1]) > 0.5 * bench.database.timeout_seconds
    for call in calls[1:]:
        call.answer()
    assert await replies(clients) == found(100, 101, 102, 2)


@in_the_loop
async def test_others_that_keep_the_loop_busy_put_no_batch_off(bench: Bench) -> None:
    """A client that never stops sending, say: what waits is fetched all the same."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.send(b"never read")
        bench.loop.add_reader(ours, lambda: None)
        clients = bench.profiles(1)
        [call] = await asyncio.wait_for(bench.calls(1), 2)
        bench.loop.remove_reader(ours)
    call.answer()
    assert await replies(clients) == found(1)


@in_the_loop
async def test_the_thread_that_went_idle_last_is_used_first(bench: Bench) -> None:
    clients, calls = await bench.busy()
    for client, call in zip(clients, calls, strict=True):
        call.answer()
        await replies([client])
    again, calls_again = await bench.busy()
    assert [call.thread for call in calls_again] == [call.thread for call in reversed(calls)]
    for call in calls_again:
        call.answer()
    await replies(again)


# ---- degraded: documents one by one ----


@in_the_loop
async def test_degraded_no_document_waits_for_another(bench: Bench) -> None:
    """As many at a time as there may be threads; the next follows as soon as one is back."""
    bench.health.degrade(SECONDS)
    most = service.Loader.single_threads
    clients = bench.profiles(*range(100, 101 + most))
    calls = await bench.calls(most)
    assert [call.keys for call in calls] == [keys(number) for number in range(100, 100 + most)]
    calls[1].answer()
    assert await replies([clients[1]]) == found(101)
    assert sum(client.done() for client in clients) == 1
    calls[1:2] = await bench.calls(1)
    for call in calls:
        call.answer()
    assert await replies(clients) == found(*range(100, 101 + most))


@in_the_loop
async def test_degraded_when_no_batch_comes_back(bench: Bench) -> None:
    """Those who wait already are fetched one by one at once."""
    bench.loader.stall_seconds = 0.0
    clients, stuck = await bench.busy()
    waiting = bench.profiles(1, 2, 1)
    calls = await bench.calls(2)
    assert [call.keys for call in calls] == [keys(1), keys(2)]
    for call in calls:
        call.answer()
    assert await replies(waiting) == found(1, 2, 1)
    for call in stuck:
        call.answer()
    await replies(clients)


@in_the_loop
async def test_degraded_nobody_waits_longer_than_the_time_out_to_know_what_is_slow(bench: Bench) -> None:
    """A look at the vBuckets may take longer than a request may: 503 for those who wait, and nothing is asked for."""
    bench.database.probe = lambda _asked, _seconds: bench.closing.wait(SECONDS)  # type: ignore[assignment, return-value]
    bench.health.degrade(SECONDS)
    clients = [*bench.profiles(1, 2, 1), bench.ask("/api/v1/picture/record/1")]
    bench.database.timeout_seconds = 0.0  # now all of them have waited for longer
    assert await statuses(*clients) == [503] * 4
    assert bench.asked.empty() and bench.health.slow is None


@in_the_loop
async def test_a_batch_that_is_answered_in_part_opens_no_breaker(bench: Bench) -> None:
    """Of several nodes one is down: documents of the others are not refused."""
    clients = bench.profiles(*range(1, 13))
    [call] = await bench.calls(1)
    call.answer(**{f"_{number}": cb.UnAmbiguousTimeoutException() for number in range(1, 11)})
    assert await statuses(*clients) == [504] * 10 + [200] * 2
    assert bench.health.degraded and bench.health.breaker.state == service.Breaker.CLOSED


@in_the_loop
async def test_documents_of_a_lost_vbucket_come_from_replicas(bench: Bench) -> None:
    bench.silent = {service.vbucket("user_data:1")}
    bench.health.degrade(SECONDS)
    while not bench.health.down:
        await asyncio.sleep(0)
    for outcome, status in ((None, 200), (cb.DocumentUnretrievableException(), 503)):
        clients = bench.profiles(1, 2)
        replica, active = await bench.calls(2)
        assert (replica.name, active.name) == ("get_any_replica", "get")
        active.answer()
        replica.answer(**({"_1": outcome} if outcome else {}))
        assert await statuses(*clients) == [status, 200]


@in_the_loop
async def test_what_is_slow_takes_half_of_the_threads_at_most(bench: Bench) -> None:
    """It is asked for as before, and documents of other vBuckets do not notice."""
    half = service.Loader.single_threads // 2
    slow_ids = range(1, 2 + half + service.Loader.single_threads)  # more than are looked at in one turn
    bench.silent = {service.vbucket(f"user_data:{number}") for number in slow_ids}
    other_ids = [n for n in range(1000, 1200) if service.vbucket(f"user_data:{n}") not in bench.silent][: half + 1]
    bench.database.probe = functools.partial(probe_that_waits_to_confirm, bench, bench.database.probe)
    bench.health.degrade(SECONDS)
    slow = bench.profiles(*slow_ids)
    calls = await bench.calls(half)
    others = bench.profiles(*other_ids)
    for call in await bench.calls(half):
        call.answer()
    [last] = await bench.calls(1)
    last.answer()
    assert await replies(others) == found(*other_ids)
    assert not any(client.done() for client in slow) and not bench.health.down
    for _ in slow_ids[half:]:
        calls.pop(0).answer()
        calls += await bench.calls(1)
    for call in calls:
        call.answer()
    assert await replies(slow) == found(*slow_ids)


@in_the_loop
async def test_a_thread_for_single_documents_ends_when_idle(bench: Bench) -> None:
    """And another is started when it is needed."""
    bench.health.degrade(SECONDS)
    for number in (1, 2):
        clients = bench.profiles(number)
        [call] = await bench.calls(1)
        call.answer()
        assert await replies(clients) == found(number)
        bench.loader.singles.shrink()
        assert await within(bench.ended.get()) == call.thread


@in_the_loop
async def test_what_is_slow_is_refused_in_time_wherever_it_waits(bench: Bench) -> None:
    """A turn looks at 64 of those who wait, the next one at others."""
    running, numbers = service.Loader.single_threads // 2, range(1, 200)
    bench.silent = {service.vbucket(f"user_data:{number}") for number in numbers}
    bench.database.probe = functools.partial(probe_that_waits_to_confirm, bench, bench.database.probe)
    bench.health.degrade(SECONDS)
    slow = bench.profiles(*numbers)
    calls = await bench.calls(running)
    waiting = bench.loader.waiting[service.USERS, False]
    late = [*waiting][10:20]
    for key in late:
        waiting[key][0].started -= SECONDS
    for _ in range(5):
        await asyncio.sleep(0)
    assert [client.result()[0] for client in slow if client.done()] == [503] * len(late)
    bench.database.timeout_seconds = 0.0  # now all of them have waited for longer
    for call in calls:
        call.answer()
    assert set(await statuses(*slow)) == {200, 503}


@in_the_loop
async def test_who_may_ask_replicas_does_not_join_those_who_wait_for_the_node(bench: Bench) -> None:
    half = service.Loader.single_threads // 2
    bench.silent = {service.vbucket(f"user_data:{number}") for number in range(1, half + 2)}
    bench.database.probe = functools.partial(probe_that_waits_to_confirm, bench, bench.database.probe)
    bench.health.degrade(SECONDS)
    clients = bench.profiles(*range(1, half + 2))
    calls = await bench.calls(half)  # so the last one waits
    bench.health.down = set(bench.silent)
    clients += bench.profiles(half + 1)
    calls += await bench.calls(1)
    assert (calls[-1].name, calls[-1].keys) == ("get_any_replica", keys(half + 1))
    for call in calls:
        call.answer()
    [last] = await bench.calls(1)
    assert last.name == "get"
    last.answer()
    assert await replies(clients) == found(*range(1, half + 2), half + 1)


# ---- queries ----


@in_the_loop
async def test_a_query_that_has_waited_for_too_long_is_refused(bench: Bench) -> None:
    """The one that its thread is busy with is answered."""
    first = bench.query()
    [call] = await bench.calls(1)
    bench.loader.query_wait_seconds = 0.0
    assert await statuses(bench.query()) == [503]
    call.answer()
    assert await replies([first]) == [(200, b"[7]")]


@in_the_loop
async def test_when_too_many_queries_wait_the_next_is_refused_at_once(bench: Bench) -> None:
    bench.loader.most_queries, bench.loader.query_wait_seconds = 2, SECONDS
    clients = [bench.query()]
    [call] = await bench.calls(1)
    clients += [bench.query() for _ in range(3)]
    assert clients[3].done() and clients[3].result()[0] == 503
    call.answer()
    for _ in range(2):
        [call] = await bench.calls(1)
        call.answer()
    assert await statuses(*clients) == [200, 200, 200, 503]


@in_the_loop
async def test_a_query_that_never_comes_back_is_answered(bench: Bench) -> None:
    """504 at its time-out; another thread takes the place of the one that it holds, and queries go unprepared."""
    client = bench.query()
    [stuck] = await bench.calls(1)
    bench.database.query_timeout_seconds = bench.loader.grace_seconds = 0.0
    assert await statuses(client) == [504]
    bench.database.query_timeout_seconds = SECONDS
    client = bench.query()
    [call] = await bench.calls(1)
    assert (stuck.options["adhoc"], call.options["adhoc"]) == (False, True)
    call.answer()
    assert await statuses(client) == [200]
    stuck.answer()
    assert await within(bench.ended.get()) == stuck.thread
    client = bench.query()
    [again] = await bench.calls(1)
    assert again.thread == call.thread
    again.answer()
    assert await statuses(client) == [200]


@in_the_loop
async def test_without_threads_all_is_refused_and_the_loop_goes_on(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(_thread, "start_new_thread", Mock(side_effect=RuntimeError("can't start new thread")))
        assert await statuses(*bench.profiles(1, 2, 1), bench.query()) == [503, 503, 503, 503]
        bench.health.degrade(SECONDS)
        assert await statuses(*bench.profiles(1), bench.query()) == [503, 503]
        assert not bench.loader.running
    clients = [*bench.profiles(1), bench.query()]
    for call in await bench.calls(2):
        call.answer()
    assert await statuses(*clients) == [200, 200]
