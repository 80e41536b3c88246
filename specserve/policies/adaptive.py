"""A simple adaptive policy: a row drafts while its whole draft is likely enough to be accepted."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from specserve.batch import Batch, DraftPlan, Row, StepRecord
from specserve.config import PolicyConfig
from specserve.policies import Unexplained
from specserve.predictor.acceptance import OnlineLogistic, logit
from specserve.predictor.step_time import StepTimeModel
from specserve.stop_rules import SurvivalRule


def make(config: PolicyConfig, step_time: StepTimeModel | None = None) -> "AdaptivePolicy":
    """Read cap and threshold from the configuration."""
    return AdaptivePolicy(config.max_draft_tokens, config.min_survival)


class AdaptivePolicy(Unexplained):
    """Stop a row below a survival threshold; calibrate the survival from verification outcomes.

    Rows are judged one by one, so one sure row does not make the others draft. The threshold is a
    constant: it knows neither load nor step time.
    """

    EXPLORE_EVERY = 32  # steps without a verified token, after which one per row is tried

    def __init__(self, max_draft_tokens: int, min_survival: float) -> None:
        if max_draft_tokens < 0:
            raise ValueError(f"policy.max_draft_tokens is {max_draft_tokens}: must be at least 0")
        if not 0.0 <= min_survival <= 1.0:
            raise ValueError(f"policy.min_survival is {min_survival}: must be in [0, 1]")
        self.max_draft_tokens = max_draft_tokens
        self.min_survival = min_survival
        self.acceptance = OnlineLogistic((1.0, 0.8))
        self._num_idle_steps = 0

    def plan(self, rows: Sequence[Row]) -> DraftPlan:
        """Cap all rows alike; the calibrated stop rule tells them apart."""
        rule = SurvivalRule(
            self.acceptance.weights,
            np.array([0.0 if row.has_fixed_draft else self.min_survival for row in rows]),
        )
        return DraftPlan([self.max_draft_tokens] * len(rows), rule)

    def select(self, batch: Batch, confidences: Sequence[Sequence[float]]) -> list[int]:
        """Drop the token at which a row stopped: it was drafted to be judged, and failed."""
        lengths = [
            len(values) if row.has_fixed_draft else self._num_likely(values)
            for row, values in zip(batch.rows, confidences, strict=True)
        ]
        self._num_idle_steps = 0 if any(lengths) else self._num_idle_steps + 1
        if self._num_idle_steps >= self.EXPLORE_EVERY:
            self._num_idle_steps = 0
            return [min(1, len(values)) for values in confidences]
        return lengths

    def _num_likely(self, confidences: Sequence[float]) -> int:
        survival = np.cumprod(self.acceptance.predict(_features(confidences)))
        return int((survival >= self.min_survival).sum())

    def observe(self, record: StepRecord) -> None:
        """Learn from every verified token up to and including the first rejected one."""
        seen: list[float] = []
        outcomes: list[float] = []
        for draft, choice, verified in zip(
            record.drafts, record.chosen, record.outputs, strict=True
        ):
            accepted = verified.num_accepted_tokens
            seen += draft.confidences[: min(len(choice), accepted + 1)]
            outcomes += [1.0] * accepted + [0.0] * (accepted < len(choice))
        if seen:
            self.acceptance.observe(_features(seen), np.array(outcomes))

    def release(self, keys: Sequence[int]) -> None:
        """Nothing is kept for a request."""


def _features(confidences: Sequence[float]) -> NDArray[np.float64]:
    z = logit(np.asarray(confidences, dtype=np.float64))
    return np.stack([np.ones_like(z), z], axis=1)
