"""vLLM's adaptive verification: always draft, then verify what raises the predicted token rate.

vLLM 0.33.0, vllm/v1/worker/gpu/spec_decode/adaptive_verification.py and acceptance_estimator.py
(pull requests #47808 and #52228). Drafting is never saved, only verification; no SLO is known.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from specserve.batch import Batch, DraftPlan, Row, StepRecord
from specserve.config import PolicyConfig
from specserve.optimum import best_total
from specserve.policies import Unexplained, needed
from specserve.policies.baseline_costs import StepCosts, adaptive_caps, plan_caps
from specserve.predictor.acceptance import logit, sigmoid
from specserve.predictor.step_time import StepTimeModel

NEEDS_PROFILE = True

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Mask = NDArray[np.bool_]


def make(
    config: PolicyConfig, step_time: StepTimeModel | None = None
) -> "AdaptiveVerificationPolicy":
    """Make the policy on a predictor."""
    return AdaptiveVerificationPolicy(
        needed(step_time, "adaptive_verification"), config.max_draft_tokens
    )


class AdaptiveVerificationPolicy(Unexplained):
    """Draft K tokens for every row; choose a total m, then the m largest survivals.

    The total is chosen on each request's *previous* estimates, because there the choice must not
    wait for the device; a new request counts as certain. Its ranking uses the current ones.
    """

    def __init__(self, step_time: StepTimeModel, max_draft_tokens: int) -> None:
        self.step_time = step_time
        self.max_draft_tokens = max_draft_tokens
        self.estimator = AcceptanceEstimator(max_draft_tokens)
        self._positions = np.arange(max_draft_tokens)
        self._certain = np.ones(max_draft_tokens)
        self._previous: dict[int, Floats] = {}  # key -> [K] estimates

    def plan(self, rows: Sequence[Row]) -> DraftPlan:
        """Draft as much as may be, always."""
        return DraftPlan(plan_caps(rows, adaptive_caps(rows, self.max_draft_tokens)))

    def select(self, batch: Batch, confidences: Sequence[Sequence[float]]) -> list[int]:
        """Verify the best m tokens; everything until the estimator has been fitted."""
        lengths = [len(values) for values in confidences]
        rows = [i for i, r in enumerate(batch.rows) if lengths[i] and not r.has_fixed_draft]
        if not rows:
            return lengths
        keys = [batch.rows[i].key for i in rows]
        is_draft = self._positions < np.array([lengths[i] for i in rows])[:, None]
        estimates = self.estimator(self._padded([confidences[i] for i in rows]))
        previous = np.stack([self._previous.get(key, self._certain) for key in keys])
        self._previous.update(zip(keys, np.where(is_draft, estimates, previous), strict=True))
        if self.estimator.is_warming_up:
            return lengths
        num_tokens = self._best_total(batch, np.cumprod(previous, axis=1)[is_draft])
        chosen = largest_survivals(np.cumprod(estimates, axis=1), is_draft, num_tokens)
        for i, length in zip(rows, chosen, strict=True):
            lengths[i] = length
        return lengths

    def _padded(self, confidences: Sequence[Sequence[float]]) -> Floats:
        """Return [len(confidences), K]; what stands beyond a draft means nothing."""
        table = np.full((len(confidences), self.max_draft_tokens), 0.5)
        for row, values in zip(table, confidences, strict=True):
            row[: len(values)] = values
        return table

    def _best_total(self, batch: Batch, survivals: Floats) -> int:
        """Return argmax over m of (N + sum of the m largest survivals) / (draft + verify(m))."""
        costs = StepCosts.of(self.step_time, batch.rows, self.max_draft_tokens)
        draft_s = costs.draft_s(int(costs.caps.max()))
        gains = -np.sort(-survivals)
        return best_total(
            gains.tolist(), costs.base_yield, costs.verify_s.tolist(), draft_s
        ).num_tokens

    def observe(self, record: StepRecord) -> None:
        """Grade what was verified, up to and including the first rejected token."""
        graded = [
            (draft.confidences, len(choice), verified.num_accepted_tokens)
            for row, draft, choice, verified in zip(
                record.batch.rows, record.drafts, record.chosen, record.outputs, strict=True
            )
            if choice and not row.has_fixed_draft
        ]
        if graded:
            confidences, verified, accepted = zip(*graded, strict=True)
            self.estimator.observe(
                self._padded(confidences), np.array(verified), np.array(accepted)
            )
        self.estimator.end_step()

    def release(self, keys: Sequence[int]) -> None:
        """Forget finished requests."""
        for key in keys:
            self._previous.pop(key, None)


def largest_survivals(survivals: Floats, is_draft: Mask, num_tokens: int) -> list[int]:
    """Return how many of each row's tokens are among the largest survivals of all rows.

    Survivals fall along a row, so these are a prefix of each; of equals the first row's go first.

    Args:
        survivals: [num_rows, K].
        is_draft: [num_rows, K], False beyond a row's draft.
        num_tokens: at most the number of draft tokens.
    """
    order = np.argsort(-np.where(is_draft, survivals, -1.0), axis=None, kind="stable")
    rows = order[:num_tokens] // survivals.shape[1]
    lengths: list[int] = np.bincount(rows, minlength=len(survivals)).tolist()
    return lengths


class AcceptanceEstimator:
    """acceptance = sigmoid(slope * logit(confidence) + bias of the position), refit now and then.

    Every 100 steps one Newton step of logistic regression on what was graded since the last one. A
    parameter with n observations takes n / (n + 50) of its step; the slope never turns negative.
    """

    REFIT_EVERY = 100  # steps
    NUM_WARMUP_REFITS = 3
    DAMPING = 50.0  # observations that allow half a step
    RIDGE = 1e-3
    START_BIAS = 1.5

    def __init__(self, num_positions: int) -> None:
        self.slope = 0.0
        self.bias = np.full(num_positions, self.START_BIAS)
        self._num_steps = 0
        self._num_refits = 0
        self._clear()

    def _clear(self) -> None:
        num_positions = len(self.bias)
        self._slope_curvature = 0.0
        self._slope_gradient = 0.0
        self._coupling = np.zeros(num_positions)
        self._curvature = np.zeros(num_positions)
        self._gradient = np.zeros(num_positions)
        self._counts = np.zeros(num_positions)

    @property
    def is_warming_up(self) -> bool:
        """Whether everything is still verified, so that what is learnt is not censored."""
        return self._num_refits < self.NUM_WARMUP_REFITS

    def __call__(self, confidences: Floats) -> Floats:
        """Return the acceptance of each token, given those before it: [num_rows, num_positions]."""
        return sigmoid(self.slope * logit(confidences) + self.bias)

    def observe(self, confidences: Floats, num_verified: Ints, num_accepted: Ints) -> None:
        """Take the outcomes of some rows; a rejected token hides those after it.

        Args:
            confidences: [num_rows, num_positions].
            num_verified, num_accepted: [num_rows].
        """
        positions = np.arange(len(self.bias))
        is_accepted = positions < num_accepted[:, None]
        seen = (positions <= num_accepted[:, None]) & (positions < num_verified[:, None])
        x = logit(confidences)
        predicted = self(confidences)
        weight = predicted * (1.0 - predicted) * seen
        error = (is_accepted - predicted) * seen
        self._slope_curvature += float((weight * x * x).sum())
        self._slope_gradient += float((error * x).sum())
        self._coupling += (weight * x).sum(axis=0)
        self._curvature += weight.sum(axis=0)
        self._gradient += error.sum(axis=0)
        self._counts += seen.sum(axis=0)

    def end_step(self) -> None:
        """Count a step; refit when it is time."""
        self._num_steps += 1
        if self._num_steps % self.REFIT_EVERY == 0:
            self._refit()
            self._num_refits += 1
            self._clear()

    def _refit(self) -> None:
        """Take the Newton step: eliminate the biases, solve for the slope, then for each bias."""
        curvature = self._curvature + self.RIDGE
        share = self._coupling / curvature
        gradient = self._slope_gradient - float(share @ self._gradient)
        step = gradient / (self._slope_curvature + self.RIDGE - float(share @ self._coupling))
        total = float(self._counts.sum())
        step *= total / (total + self.DAMPING)
        if self.slope + step < 0.0:
            step = 0.0
        damping = self._counts / (self._counts + self.DAMPING)
        self.slope += step
        self.bias = self.bias + damping * (self._gradient - self._coupling * step) / curvature
