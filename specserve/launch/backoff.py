"""How long to wait before a server that failed is started again, and when to leave it at that."""

import time
from collections.abc import Callable

FIRST_S = 1.0
LONGEST_S = 60.0
STABLE_S = 60.0  # a server that lived so long failed for a new reason, not for the same one again


class Backoff:
    """Waits that double with every failure in a row: 1, 2, 4 ... 60 s.

    Attributes:
        num_restarts: granted so far, all failures together.
        has_started: the server has been ready at least once.
    """

    def __init__(self, max_in_a_row: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.num_restarts = 0
        self.has_started = False
        self._max_in_a_row = max_in_a_row
        self._clock = clock
        self._in_a_row = 0
        self._started_s = clock()

    def next_wait_s(self) -> float | None:
        """Return the wait that this failure costs, or None if there were too many in a row."""
        if self._clock() - self._started_s > STABLE_S:
            self._in_a_row = 0
        if self._in_a_row == self._max_in_a_row:
            return None
        wait_s = min(FIRST_S * 2.0**self._in_a_row, LONGEST_S)
        self._in_a_row += 1
        self.num_restarts += 1
        return wait_s

    def started(self) -> None:
        """Note that the server has become ready."""
        self.has_started = True
        self._started_s = self._clock()
