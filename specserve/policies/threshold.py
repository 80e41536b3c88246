"""Draft while the draft model is sure of itself; verify everything.

Per row: Hugging Face transformers' `assistant_confidence_threshold`, 0.4 (`ConfidenceCriteria` of
generation/stopping_criteria.py; dynamic speculation lookahead, arXiv 2405.04304). By the mean of
the batch: AdaSpec's `--dynamic-spec --assistant-confidence-threshold`, 0.6
(cerebellumking/AdaSpec@f3f2f48). Either way the token that falls below is part of the draft.
Transformers also moves its threshold as it learns; here it stays, so that it can be swept.
"""

from collections.abc import Sequence

import numpy as np

from specserve.batch import Batch, DraftPlan, Row, StepRecord
from specserve.config import PolicyConfig
from specserve.policies import Unexplained
from specserve.policies.baseline_costs import adaptive_caps, plan_caps
from specserve.policies.baseline_rules import ThresholdRule
from specserve.predictor.step_time import StepTimeModel


def make(config: PolicyConfig, step_time: StepTimeModel | None = None) -> "ThresholdPolicy":
    """Read threshold, form and cap from the configuration."""
    return ThresholdPolicy(
        config.confidence_threshold, config.max_draft_tokens, of_mean=config.threshold_of_mean
    )


class ThresholdPolicy(Unexplained):
    """A constant threshold on raw confidence: it knows neither load nor step time."""

    def __init__(self, threshold: float, max_draft_tokens: int, *, of_mean: bool = False) -> None:
        if not 0.0 <= threshold <= 1.0:
            raise ValueError(f"policy.confidence_threshold is {threshold}: must be in [0, 1]")
        self.threshold = threshold
        self.max_draft_tokens = max_draft_tokens
        self.of_mean = of_mean

    def plan(self, rows: Sequence[Row]) -> DraftPlan:
        """Cap all rows alike; the rule stops them, one by one or together."""
        rule = ThresholdRule(
            np.array([-np.inf if row.has_fixed_draft else self.threshold for row in rows]),
            np.array([float(self.of_mean)]),
        )
        return DraftPlan(plan_caps(rows, adaptive_caps(rows, self.max_draft_tokens)), rule)

    def select(self, batch: Batch, confidences: Sequence[Sequence[float]]) -> list[int]:
        """Verify everything."""
        return [len(values) for values in confidences]

    def observe(self, record: StepRecord) -> None:
        """Learn nothing."""

    def release(self, keys: Sequence[int]) -> None:
        """Nothing is kept for a request."""
