"""The values that flow through a step: schedule -> draft -> select -> verify -> commit.

Plain data. Engines in other processes receive the same rows that engines in this one do.
"""

from dataclasses import dataclass, field

from specserve.sampling_params import SamplingParams
from specserve.stop_rules import StopRule


@dataclass(slots=True)
class Row:
    """One request inside a step's batch.

        token_ids:  prompt ......................... output
                    [0, num_computed_tokens)  [base tokens)  [draft tokens)
                     target KV is valid        this step      this step, if chosen

    Attributes:
        key: the request, for state that an engine keeps between steps.
        num_computed_tokens: position of the first base token.
        token_ids: base tokens, one while decoding or a chunk of the prompt; never empty.
        samples: the base tokens close the gap, so the target samples what follows them.
        block_table: covers base and draft tokens.
        num_prompt_tokens: where output starts, for penalties.
        sampling: of the target's distribution.
        max_draft_tokens: this step's cap, 0 for no draft.
        num_draft_computed_tokens: position of the first token the draft engine has not seen.
        catch_up_token_ids: tokens from there to the end of the known ones; empty without a draft.
        owed_tokens: missing from the request's schedule when the step began; below 0 is ahead.
        tpot_s: the objective behind that; None for best effort.
        has_fixed_draft: the request asked for this length; policies leave it as it is.
    """

    key: int
    num_computed_tokens: int
    token_ids: list[int]
    samples: bool
    block_table: list[int]
    num_prompt_tokens: int = 0
    sampling: SamplingParams = field(default_factory=SamplingParams)
    max_draft_tokens: int = 0
    num_draft_computed_tokens: int = 0
    catch_up_token_ids: list[int] = field(default_factory=list)
    has_fixed_draft: bool = False
    owed_tokens: float = float("-inf")
    tpot_s: float | None = None


@dataclass(frozen=True, slots=True)
class DraftPlan:
    """What a policy allows the rows of a step to draft.

    Attributes:
        max_draft_tokens: one cap for each row.
        stop_rule: None drafts up to the cap.
    """

    max_draft_tokens: list[int]
    stop_rule: StopRule | None = None


@dataclass(slots=True)
class Batch:
    """The rows of a step and the rule their drafts stop by."""

    rows: list[Row]
    stop_rule: StopRule | None = None

    def __bool__(self) -> bool:
        return bool(self.rows)

    @property
    def num_base_tokens(self) -> int:
        """Target tokens of the step without speculation."""
        return sum(len(row.token_ids) for row in self.rows)

    @property
    def num_drafting_rows(self) -> int:
        """Rows that may draft."""
        return sum(row.max_draft_tokens > 0 for row in self.rows)


@dataclass(frozen=True, slots=True)
class Draft:
    """A row's proposal: the most likely continuation, token by token (a point mass).

    Attributes:
        token_ids: [k], k may be 0.
        confidences: [k], the draft model's own probability of each token.
    """

    token_ids: list[int] = field(default_factory=list)
    confidences: list[float] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Verified:
    """What the target made of a row.

    Attributes:
        output_token_ids: accepted draft tokens, then one recovered or bonus token; empty for a
            row that did not sample.
        log_probs: of the output tokens, if the request wants them.
    """

    output_token_ids: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)

    @property
    def num_accepted_tokens(self) -> int:
        """Draft tokens kept, without the extra one."""
        return max(0, len(self.output_token_ids) - 1)


@dataclass(frozen=True, slots=True)
class StepRecord:
    """A finished step, for `Policy.observe`."""

    batch: Batch
    drafts: list[Draft]
    chosen: list[list[int]]
    outputs: list[Verified]
    draft_time_s: float
    verify_time_s: float
