"""What a step yields and costs, as the baseline policies see it: T(draft forwards, target tokens).

Their papers' offline tables, looked up in the one predictor that all policies share. The baselines
do not correct it online: neither AdaSpec, SmartSpec nor vLLM's adaptive verification do.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from specserve.batch import Row
from specserve.predictor.prompts import Prompts
from specserve.predictor.step_time import StepTimeModel

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class StepCosts:
    """A step without the drafts that the policy decides on, and what those would add to it.

    Prompt tokens are base tokens like any other. A draft of fixed length counts as base tokens too:
    it is verified whatever the policy does.

    Attributes:
        caps: [num_rows], the longest draft of each row; 0 where the length is fixed.
        samples: [num_rows], 1 for a row that yields a token without a draft.
        verify_s: [sum of caps and of proposed lookups + 1], seconds to verify with 0, 1, ... draft
            tokens.
        forward_s: [rows with a cap + 1], seconds of a draft forward by the rows in it.
        call_s: seconds of a draft call before its first forward.
    """

    caps: Ints
    samples: Ints
    verify_s: Floats
    forward_s: Floats
    call_s: float

    @classmethod
    def of(
        cls, step_time: StepTimeModel, rows: Sequence[Row], max_draft_tokens: int
    ) -> "StepCosts":
        """Look a step up; there must be a row."""
        caps = adaptive_caps(rows, max_draft_tokens)
        drafting = [row for row, cap in zip(rows, caps, strict=True) if cap]
        context = sum(row.num_computed_tokens for row in drafting)
        forward_s = step_time.forward_curve(len(drafting), context)
        first_s = step_time.draft_s([len(drafting)], 0, context) if drafting else 0.0
        fixed = sum(row.max_draft_tokens for row in rows if row.has_fixed_draft)
        lookups = [row.lookup for row in rows if row.lookup and not row.max_draft_tokens]
        return cls(
            caps=caps,
            samples=np.array([row.samples for row in rows], dtype=np.int64),
            verify_s=step_time.verify_curve(
                sum(len(row.token_ids) for row in rows) + fixed,
                int(caps.sum()) + sum(len(lookup.token_ids) for lookup in lookups),
                sum(row.num_computed_tokens for row in rows),
                Prompts.of(rows),
            ),
            forward_s=forward_s,
            call_s=first_s - float(forward_s[-1]),
        )

    @property
    def base_yield(self) -> float:
        """Tokens of the step without drafts."""
        return float(self.samples.sum())

    def draft_s(self, k: int) -> float:
        """Predict k draft forwards; rows leave at their caps."""
        rows_of_forwards = [int((self.caps > position).sum()) for position in range(k)]
        return float(self.forward_s[rows_of_forwards].sum()) + self.call_s if k else 0.0

    def step_s(self, k: int) -> float:
        """Predict a step in which every row drafts k tokens, or as many as it may."""
        return self.draft_s(k) + float(self.verify_s[np.minimum(self.caps, k).sum()])


def adaptive_caps(rows: Sequence[Row], max_draft_tokens: int) -> Ints:
    """Return the longest draft of each row, 0 where the request fixed its length: [num_rows]."""
    caps = [0 if r.has_fixed_draft else min(r.max_draft_tokens, max_draft_tokens) for r in rows]
    return np.array(caps, dtype=np.int64)


def plan_caps(rows: Sequence[Row], caps: Ints) -> list[int]:
    """Return the caps of a plan: the given ones, and fixed lengths as they are."""
    return [
        row.max_draft_tokens if row.has_fixed_draft else int(cap)
        for row, cap in zip(rows, caps, strict=True)
    ]
