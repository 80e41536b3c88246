"""A draft engine that may fail without harm: requests go on without speculation."""

import logging
from collections.abc import Callable, Sequence
from typing import Protocol

from specserve.batch import Batch, Draft
from specserve.engines import DraftEngine, EngineLost

logger = logging.getLogger(__name__)

MAX_RETRY_S = 60.0
STREAK_S = 60.0  # a failure so long after the last one is a new one, not the same again


class Keeper(Protocol):
    """What keeps an engine in another process running.

    Attributes:
        is_up: the engine may be called.
        num_reloads: how often it was replaced, and lost what it kept.
    """

    @property
    def is_up(self) -> bool: ...

    @property
    def num_reloads(self) -> int: ...

    def give_up(self, reason: str) -> None:
        """Replace the engine; returns at once."""


class GuardedDraftEngine:
    """Turn failures of the inner engine into empty drafts, and try it again after a while.

    Nothing is lost by that: a draft only proposes, and a row that skipped drafting catches up. The
    time until the next try doubles with every failure that comes soon after another.

    Args:
        vocab_size: a drafted id outside is a failure; it would make the target fail.
        keeper: told of failures; None is for an engine of this process.
    """

    def __init__(
        self,
        inner: DraftEngine,
        vocab_size: int,
        retry_s: float,
        clock: Callable[[], float],
        keeper: Keeper | None = None,
    ) -> None:
        self.inner = inner
        self.num_failures = 0
        self._vocab_size = vocab_size
        self._retry_s = self._wait_s = retry_s
        self._clock = clock
        self._keeper = keeper
        self._num_reloads = 0
        self._lost_kv = False
        self._failed_s = float("-inf")

    @property
    def is_available(self) -> bool:
        """Whether the next step may draft."""
        is_up = self._keeper is None or self._keeper.is_up
        return is_up and (self._clock() >= self._failed_s + self._wait_s)

    @property
    def num_reloads(self) -> int:
        """How often the engine was replaced after a failure."""
        return 0 if self._keeper is None else self._keeper.num_reloads

    def draft(self, batch: Batch) -> list[Draft]:
        """Propose, or propose nothing. See `DraftEngine`."""
        if batch.num_drafting_rows and self.is_available:
            try:
                drafts = self.inner.draft(batch)
                self._check(batch, drafts)
                return drafts
            except Exception as error:
                self._fail(error)
        return [Draft() for _ in batch.rows]

    def release(self, keys: Sequence[int]) -> None:
        """Drop what is kept for these requests. See `DraftEngine`."""
        try:
            self.inner.release(keys)
        except Exception as error:
            self._fail(error)

    def take_lost_kv(self) -> bool:
        """Say, once, whether what the engine has computed so far may be gone or wrong."""
        lost = self._lost_kv or self.num_reloads != self._num_reloads
        self._lost_kv, self._num_reloads = False, self.num_reloads
        return lost

    def _check(self, batch: Batch, drafts: Sequence[Draft]) -> None:
        """Refuse what an engine cannot have meant, NaN above all."""
        for row, draft in zip(batch.rows, drafts, strict=True):
            if len(draft.token_ids) > row.max_draft_tokens:
                raise ValueError(f"{len(draft.token_ids)} of {row.max_draft_tokens} tokens drafted")
            for token_id, confidence in zip(draft.token_ids, draft.confidences, strict=True):
                if not 0.0 <= confidence <= 1.001:  # rounding; a NaN is not
                    raise ValueError(f"a drafted token has the confidence {confidence}")
                if not 0 <= token_id < self._vocab_size:
                    raise ValueError(f"a drafted token is not in [0, {self._vocab_size})")

    def _fail(self, error: Exception) -> None:
        now = self._clock()
        is_new = now - self._failed_s > self._wait_s + STREAK_S
        self._wait_s = self._retry_s if is_new else min(2.0 * self._wait_s, MAX_RETRY_S)
        self._failed_s, self._lost_kv = now, True
        self.num_failures += 1
        logger.exception("draft engine failed; no speculation for %g s", self._wait_s)
        if self._keeper is not None and not isinstance(error, EngineLost):  # which it knows
            self._keeper.give_up(f"failed: {error}")
