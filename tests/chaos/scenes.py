"""Scenes: what takes long because it waits, those of a module played side by side, each with its own emulator."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
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
        Scene._all.append(self)

    def outcome(self, seconds: float = 110.0) -> Outcome:
        """Return what has come of it, or raise what it raised; TimeoutError if it is not done in time."""
        return self._future.result(seconds)

    @staticmethod
    def begin(module: str) -> None:
        """Start to play all scenes of a module, if that has not been done."""
        if module in Scene._begun:
            return
        Scene._begun.add(module)
        Scene._pool = Scene._pool or ThreadPoolExecutor(AT_ONCE)
        for scene in Scene._all:
            if scene._play.__module__ == module:
                scene._future = Scene._pool.submit(scene._play, *scene._arguments)

    @staticmethod
    def end() -> None:
        """Wait for those under way, and play no more."""
        if Scene._pool is not None:
            Scene._pool.shutdown(cancel_futures=True)
