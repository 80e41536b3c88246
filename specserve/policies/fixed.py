"""Draft length k for every row, all of it verified; k = 0 is plain decoding."""

from collections.abc import Sequence

from specserve.batch import Batch, DraftPlan, Row, StepRecord
from specserve.config import PolicyConfig
from specserve.policies import Unexplained
from specserve.predictor.step_time import StepTimeModel


def make(config: PolicyConfig, step_time: StepTimeModel | None = None) -> "FixedPolicy":
    """`none` is `fixed` with k = 0."""
    k = 0 if config.name == "none" else config.num_draft_tokens
    return FixedPolicy(min(k, config.max_draft_tokens))


class FixedPolicy(Unexplained):
    """The same draft length always, as the stock BLS loop has it."""

    def __init__(self, num_draft_tokens: int) -> None:
        if num_draft_tokens < 0:
            raise ValueError(f"policy.num_draft_tokens is {num_draft_tokens}: must be at least 0")
        self.num_draft_tokens = num_draft_tokens

    def plan(self, rows: Sequence[Row]) -> DraftPlan:
        """Give every row k."""
        return DraftPlan([self.num_draft_tokens] * len(rows))

    def select(self, batch: Batch, confidences: Sequence[Sequence[float]]) -> list[int]:
        """Verify everything."""
        return [len(row) for row in confidences]

    def observe(self, record: StepRecord) -> None:
        """Learn nothing."""

    def release(self, keys: Sequence[int]) -> None:
        """Nothing is kept for a request."""
