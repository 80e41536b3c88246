"""Asking many in turn, within a share of the time. Knows nothing of what is asked."""

import time
from collections.abc import Callable, Iterable
from typing import Generic, TypeVar

T = TypeVar("T")


class Turns(Generic[T]):
    """Asks each of some members at most every `every_s` seconds, fewer at a time if it takes long.

    Args:
        every_s: seconds between turns, at least.
        share: of the time, that asking takes at most, but for a single member that takes longer.
        clock: in seconds.
    """

    def __init__(
        self, every_s: float, share: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._every_s, self._share, self._clock = every_s, share, clock
        self._waiting: list[T] = []
        self._next_s = 0.0

    def is_due(self) -> bool:
        """Say whether it is time for a turn."""
        return self._clock() >= self._next_s

    def take(self, members: Iterable[T], ask: Callable[[T], None]) -> None:
        """Ask those who have waited longest; who has come since all were asked begins the next."""
        started, spent_s = self._clock(), 0.0
        self._waiting = self._waiting or list(members)
        while self._waiting and spent_s < self._share * self._every_s:
            ask(self._waiting.pop())
            spent_s = self._clock() - started
        self._next_s = started + max(self._every_s, spent_s / self._share)
