"""SmartSpec: one draft length for the batch, from one acceptance rate and the step's cost table.

Liu et al. 2024, "Optimizing Speculative Decoding for Serving Large Language Models Using Goodput"
(arXiv 2406.14066, later TurboSpec); code LiuXiaoxuanPKU/vllm, branch dsd, vllm/spec_decode/dsd.py.
"""

from collections.abc import Sequence

import numpy as np

from specserve.batch import Batch, DraftPlan, Row, StepRecord
from specserve.config import PolicyConfig
from specserve.policies import Unexplained, needed
from specserve.policies.baseline_costs import Floats, Ints, StepCosts, adaptive_caps, plan_caps
from specserve.predictor.step_time import StepTimeModel

NEEDS_PROFILE = True


def make(config: PolicyConfig, step_time: StepTimeModel | None = None) -> "SmartSpecPolicy":
    """Make the policy on a predictor."""
    return SmartSpecPolicy(
        needed(step_time, "smartspec"),
        config.max_draft_tokens,
        as_in_adaspec=config.as_in_adaspec,
    )


class SmartSpecPolicy(Unexplained):
    """k = argmax of E(k) / T(k), the value at k = 0 raised by a tenth; decided before drafting.

    Acceptance is accepted over *verified* tokens, as in the source: tokens after the first rejected
    one count against it, so it falls as drafts grow longer. While k = 0 nothing is learnt.

    Args:
        as_in_adaspec: the arm of AdaSpec's repository (cerebellumking/AdaSpec@f3f2f48), which
            takes the mean since the start instead of a moving average, and 0.65 when that is
            below 0.3.
    """

    START = 0.7
    RATE = 0.15  # weight of the newest step in the moving average
    PLAIN_BONUS = 1.1  # "at least 1.1x of non spec decode": overhead that the table misses
    ADASPEC_FLOOR = 0.3
    ADASPEC_RESET = 0.65

    def __init__(
        self, step_time: StepTimeModel, max_draft_tokens: int, *, as_in_adaspec: bool = False
    ) -> None:
        self.step_time = step_time
        self.max_draft_tokens = max_draft_tokens
        self.as_in_adaspec = as_in_adaspec
        self.acceptance = self.START
        self._num_accepted = 0
        self._num_verified = 0

    def plan(self, rows: Sequence[Row]) -> DraftPlan:
        """Choose k for all rows; a row near its end drafts what it may."""
        caps = adaptive_caps(rows, self.max_draft_tokens)
        if caps.any():
            costs = StepCosts.of(self.step_time, rows, self.max_draft_tokens)
            caps = np.minimum(caps, self._best_length(costs))
        return DraftPlan(plan_caps(rows, caps))

    def _best_length(self, costs: StepCosts) -> int:
        rates = [
            expected_tokens(self.acceptance, np.minimum(costs.caps, k), costs.samples)
            / costs.step_s(k)
            for k in range(int(costs.caps.max()) + 1)
        ]
        rates[0] *= self.PLAIN_BONUS
        return int(np.argmax(rates))

    def select(self, batch: Batch, confidences: Sequence[Sequence[float]]) -> list[int]:
        """Verify everything."""
        return [len(values) for values in confidences]

    def observe(self, record: StepRecord) -> None:
        """Follow the acceptance rate of the drafts that the policy asked for."""
        asked = [
            (len(choice), verified.num_accepted_tokens)
            for row, choice, verified in zip(
                record.batch.rows, record.chosen, record.outputs, strict=True
            )
            if choice and not row.has_fixed_draft
        ]
        if asked:
            self._learn(sum(n for n, _ in asked), sum(accepted for _, accepted in asked))

    def _learn(self, num_verified: int, num_accepted: int) -> None:
        self._num_verified += num_verified
        self._num_accepted += num_accepted
        if self.as_in_adaspec:
            mean = self._num_accepted / self._num_verified
            self.acceptance = mean if mean >= self.ADASPEC_FLOOR else self.ADASPEC_RESET
        else:
            self.acceptance += self.RATE * (num_accepted / num_verified - self.acceptance)

    def release(self, keys: Sequence[int]) -> None:
        """Nothing is kept for a request."""


def expected_tokens(acceptance: float, lengths: Ints, samples: Ints) -> float:
    """Return the sum over sampling rows of (1 - a^(k+1)) / (1 - a), or k + 1 if a = 1.

    With one length and B sampling rows this is the paper's E(k) = B (1 - a^(k+1)) / (1 - a).

    Args:
        lengths: [num_rows], k.
        samples: [num_rows], 0 or 1.
    """
    if acceptance >= 1.0:
        tokens: Floats = lengths + 1.0
    else:
        tokens = (1.0 - acceptance ** (lengths + 1.0)) / (1.0 - acceptance)
    return float((tokens * samples).sum())
