"""A draft engine that may fail without harm: requests go on without speculation."""

import logging
from collections.abc import Callable, Sequence

from specserve.batch import Batch, Draft
from specserve.engines import DraftEngine

logger = logging.getLogger(__name__)


class GuardedDraftEngine:
    """Turn failures of the inner engine into empty drafts, and try it again after a while.

    Nothing is lost by that: a draft only proposes, and a row that skipped drafting catches up.
    """

    def __init__(self, inner: DraftEngine, retry_s: float, clock: Callable[[], float]) -> None:
        self.inner = inner
        self.num_failures = 0
        self._retry_s = retry_s
        self._clock = clock
        self._closed_until = float("-inf")

    @property
    def is_available(self) -> bool:
        """Whether the next step may draft."""
        return self._clock() >= self._closed_until

    def draft(self, batch: Batch) -> list[Draft]:
        """Propose, or propose nothing. See `DraftEngine`."""
        if batch.num_drafting_rows and self.is_available:
            try:
                return self.inner.draft(batch)
            except Exception:
                self._close()
        return [Draft() for _ in batch.rows]

    def release(self, keys: Sequence[int]) -> None:
        """Drop what is kept for these requests. See `DraftEngine`."""
        try:
            self.inner.release(keys)
        except Exception:
            self._close()

    def _close(self) -> None:
        self.num_failures += 1
        self._closed_until = self._clock() + self._retry_s
        logger.exception("draft engine failed; no speculation for %g s", self._retry_s)
