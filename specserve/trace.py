"""What one step did for one request, and why; kept for requests whose clients ask for it."""

from dataclasses import dataclass

from specserve.batch import Decision, StepRecord


@dataclass(frozen=True, slots=True)
class StepTrace:
    """One step of one request.

    Attributes:
        at_s: when the step ended, after the request's arrival.
        num_rows: requests in the step.
        draft_source: who proposed; empty if nobody did.
        reason: what decided the draft's length; empty if the policy does not say.
        owed_tokens: missing from the schedule when the step began; None without an objective.
        predicted_s: of the draft and the verification; None without a predictor.
    """

    at_s: float
    num_rows: int
    draft_source: str
    num_drafted_tokens: int
    num_verified_tokens: int
    num_accepted_tokens: int
    reason: str
    owed_tokens: float | None
    predicted_s: float | None
    measured_s: float


def trace_of(record: StepRecord, decision: Decision, index: int, at_s: float) -> StepTrace:
    """Describe what a step did for its row number `index`."""
    row, draft = record.batch.rows[index], record.drafts[index]
    source = "model" if row.lookup is None else "ngram"
    return StepTrace(
        at_s=at_s,
        num_rows=len(record.batch.rows),
        draft_source=source if draft.token_ids else "",
        num_drafted_tokens=len(draft.token_ids),
        num_verified_tokens=len(record.chosen[index]),
        num_accepted_tokens=record.outputs[index].num_accepted_tokens,
        reason=decision.reasons[index] if decision.reasons else "",
        owed_tokens=None if row.tpot_s is None else row.owed_tokens,
        predicted_s=decision.predicted_s,
        measured_s=record.draft_time_s + record.verify_time_s,
    )
