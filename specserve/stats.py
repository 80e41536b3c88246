"""Running totals of a server core, for metrics and benchmarks."""

from dataclasses import dataclass

from specserve.batch import StepRecord


@dataclass(slots=True)
class Stats:
    """Totals since the start; times in seconds.

    Attributes:
        step_s: wall time of whole steps, from schedule to commit.
        draft_s, verify_s: wall time of the engine calls, transport included.
    """

    num_steps: int = 0
    num_base_tokens: int = 0
    num_drafted_tokens: int = 0
    num_verified_tokens: int = 0
    num_accepted_tokens: int = 0
    num_output_tokens: int = 0
    step_s: float = 0.0
    draft_s: float = 0.0
    verify_s: float = 0.0

    def add(self, record: StepRecord, step_s: float) -> None:
        """Count one step."""
        self.num_steps += 1
        self.step_s += step_s
        self.draft_s += record.draft_time_s
        self.verify_s += record.verify_time_s
        self.num_base_tokens += record.batch.num_base_tokens
        for draft, choice, verified in zip(
            record.drafts, record.chosen, record.outputs, strict=True
        ):
            self.num_drafted_tokens += len(draft.token_ids)
            self.num_verified_tokens += len(choice)
            self.num_accepted_tokens += verified.num_accepted_tokens
            self.num_output_tokens += len(verified.output_token_ids)
