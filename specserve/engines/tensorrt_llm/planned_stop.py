"""Draft lengths fixed beforehand, for drafts that nobody can look at while they are made."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from specserve.stop_rules import Stopper

FIRST = 0.8  # before any draft was seen
RATE = 0.05


class PlannedStop:
    """Runs the stop rule ahead, on the confidence that each position has had on average.

    So lengths follow the load, what a request has accepted, and its schedule; what they cannot
    follow is how sure the draft is this time, and `select` cuts for that afterwards.
    """

    def __init__(self) -> None:
        self._means: list[float] = []

    def lengths(
        self, stopper: Stopper | None, active: NDArray[np.int64], caps: NDArray[np.int64]
    ) -> NDArray[np.int64]:
        """Return how many tokens each row drafts, at least one for `active` rows.

        Args:
            active: [n], indices of rows that begin.
            caps: [num_rows], the most that each may draft.
        """
        lengths = np.zeros_like(caps)
        position = 0
        while len(active):
            lengths[active] = position + 1
            on = caps[active] > position + 1
            if stopper is not None:
                on &= stopper.goes_on(active, np.full(len(active), self._mean(position)))
            active, position = active[on], position + 1
        return lengths

    def learn(self, confidences: Sequence[float]) -> None:
        """Take in what a draft has had at each position."""
        for position, value in enumerate(confidences):
            if position == len(self._means):
                self._means.append(self._mean(position))
            self._means[position] += RATE * (value - self._means[position])

    def _mean(self, position: int) -> float:
        if position < len(self._means):
            return self._means[position]
        return self._means[-1] if self._means else FIRST
