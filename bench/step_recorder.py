"""Looks over a policy's shoulder: what every step drafted, verified and took."""

from collections.abc import Callable, Sequence

from bench.cells import StepSample
from specserve.batch import Batch, Decision, DraftPlan, Row, StepRecord
from specserve.policies import Policy


class StepRecorder:
    """A policy that passes everything on to another and keeps a sample of each step."""

    def __init__(self, policy: Policy, clock: Callable[[], float]) -> None:
        self.steps: list[StepSample] = []
        self._policy = policy
        self._clock = clock
        self._start_s = clock()

    def restart(self) -> float:
        """Forget the samples and return the time, which is 0 for those to come."""
        self.steps = []
        self._start_s = self._clock()
        return self._start_s

    def plan(self, rows: Sequence[Row]) -> DraftPlan:
        """See `Policy`."""
        return self._policy.plan(rows)

    def select(self, batch: Batch, confidences: Sequence[Sequence[float]]) -> list[int]:
        """See `Policy`."""
        return self._policy.select(batch, confidences)

    def observe(self, record: StepRecord) -> None:
        """Keep a sample, then let the policy learn."""
        self.steps.append(
            StepSample(
                t_s=self._clock() - self._start_s,
                num_rows=len(record.batch.rows),
                drafted=sum(len(draft.token_ids) for draft in record.drafts),
                verified=sum(map(len, record.chosen)),
                accepted=sum(verified.num_accepted_tokens for verified in record.outputs),
                predicted_s=self._policy.decision.predicted_s,
                measured_s=record.draft_time_s + record.verify_time_s,
            )
        )
        self._policy.observe(record)

    def release(self, keys: Sequence[int]) -> None:
        """See `Policy`."""
        self._policy.release(keys)

    @property
    def decision(self) -> Decision:
        """See `Policy`."""
        return self._policy.decision

    @property
    def calibration_error(self) -> float | None:
        """See `Policy`."""
        return self._policy.calibration_error
