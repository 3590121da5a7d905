"""Scenes: what takes long because it waits, those of a module played side by side, each with its own emulator."""

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, Generic, TypeVar

AT_ONCE = 3  # on the two processors of a small machine: each scene costs a second of starting, then mostly waits

Outcome = TypeVar("Outcome")


class Scene(Generic[Outcome]):
    """One scene; it is known as soon as its module is imported, and played from the module's first test on.

    Only then: of the processes that share the tests each has imported all modules, but has the tests of some.

    Args:
        play: does it; a function of the tests' own module.
        *arguments: of `play`.
    """

    _all: list["Scene[Any]"] = []  # noqa: RUF012 - the register of all scenes, shared on purpose
    _pool: ThreadPoolExecutor | None = None
    _begun: set[str] = set()  # noqa: RUF012 - the names of the modules whose scenes are played, shared on purpose

    def __init__(self, play: Callable[..., Outcome], *arguments: Any) -> None:
        """Register it."""
        self._play = play
        self._arguments = arguments
        self._future: Future[Outcome]
        self._stale = False
        Scene._all.append(self)

    def outcome(self, seconds: float = 110.0) -> Outcome:
        """Return what has come of it, or raise what it raised; TimeoutError if it is not done in time.

        One that has failed is played again for the next who asks, when less goes on beside it.
        """
        Scene.begin(self._play.__module__)
        if self._stale:
            self._stale = False
            self._start()
        future = self._future
        try:
            return future.result(seconds)
        except BaseException:
            if future is self._future:
                self._start()
            raise

    def _start(self) -> None:
        """Play it as soon as there is room, for whoever asks from now on."""
        assert Scene._pool is not None
        self._future = Scene._pool.submit(self._play, *self._arguments)

    @staticmethod
    def begin(module: str) -> None:
        """Start to play all scenes of a module, if that has not been done."""
        if module in Scene._begun:
            return
        Scene._begun.add(module)
        Scene._pool = Scene._pool or ThreadPoolExecutor(AT_ONCE)
        for scene in Scene._all:
            if scene._play.__module__ == module:
                scene._start()

    @staticmethod
    @contextmanager
    def anew() -> Iterator[None]:
        """Play each scene again that is asked for in this block: what came of it the last time did not please."""
        for scene in Scene._all:
            scene._stale = True
        try:
            yield
        finally:
            for scene in Scene._all:
                scene._stale = False

    @staticmethod
    def end() -> None:
        """Wait for those under way, and play no more."""
        if Scene._pool is not None:
            Scene._pool.shutdown(cancel_futures=True)
