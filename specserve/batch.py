"""The values that flow through a step: schedule -> draft -> select -> verify -> commit.

Plain data. Engines in other processes receive the same rows that engines in this one do.
"""

from collections.abc import Sequence
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
        max_draft_tokens: this step's cap for the draft model, 0 for no draft of its.
        draft_source: who may propose: `model`, `ngram`, `auto` for what promises more, `none`.
        is_draft_sampled: the draft model draws its tokens as the target does, with the same random
            numbers; else it proposes its most likely ones.
        lookup: before the plan, what prompt lookup could propose; after it, what it does propose,
            in place of the draft model.
        num_draft_computed_tokens: position of the first token the draft engine has not seen.
        catch_up_token_ids: tokens from there to the end of the known ones; empty without a draft.
        owed_tokens: missing from the request's schedule when the step began; below 0 is ahead.
        tpot_s: the time per token of that schedule, a little less than the objective; None for best
            effort.
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
    draft_source: str = "model"
    is_draft_sampled: bool = False
    lookup: "Draft | None" = None
    has_fixed_draft: bool = False
    owed_tokens: float = float("-inf")
    tpot_s: float | None = None


@dataclass(frozen=True, slots=True)
class DraftPlan:
    """What a policy allows the rows of a step to draft.

    Attributes:
        max_draft_tokens: one cap for each row, whoever proposes.
        stop_rule: of the draft model; None drafts up to the cap.
        is_sampled: rows that are sampled have sampled drafts; a policy that takes confidences for
            probabilities does not want them.
        uses_lookup: whether a row that may choose proposes its `lookup`; None is no row.
    """

    max_draft_tokens: list[int]
    stop_rule: StopRule | None = None
    uses_lookup: list[bool] | None = None
    is_sampled: bool = False


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
        """Rows that the draft model may propose for."""
        return sum(row.max_draft_tokens > 0 for row in self.rows)


@dataclass(frozen=True, slots=True)
class Draft:
    """A row's proposal.

    Attributes:
        token_ids: [k], k may be 0.
        confidences: [k], what its source thinks of each token; raw, never used as acceptance.
        repeats_output: copied by prompt lookup from what the model has said, not from the prompt.
    """

    token_ids: list[int] = field(default_factory=list)
    confidences: list[float] = field(default_factory=list)
    repeats_output: bool = False

    def first(self, count: int) -> "Draft":
        """Return the draft cut to a length."""
        return Draft(self.token_ids[:count], self.confidences[:count], self.repeats_output)


@dataclass(frozen=True, slots=True)
class Verified:
    """What the target made of a row.

    Attributes:
        output_token_ids: accepted draft tokens, then one recovered or bonus token; empty for a
            row that did not sample.
        log_probs: of the output tokens, if the request wants them.
        failed: the target cannot verify this row; the request ends.
    """

    output_token_ids: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    failed: bool = False

    @property
    def num_accepted_tokens(self) -> int:
        """Draft tokens kept, without the extra one."""
        return max(0, len(self.output_token_ids) - 1)


@dataclass(frozen=True, slots=True)
class Decision:
    """What a policy says of its last step, for those who watch.

    Attributes:
        reasons: what decided the length of each row's draft; empty if the policy does not say.
        predicted_s: of the draft and the verification, as decided; None without a predictor.
    """

    reasons: Sequence[str] = ()
    predicted_s: float | None = None

    def joined_by(self, num_rows: int) -> "Decision":
        """Return what to say of a step that so many prompts have joined since."""
        if not num_rows:
            return self
        return Decision([*self.reasons, *["prompt"] * num_rows] if self.reasons else (), None)


@dataclass(frozen=True, slots=True)
class StepRecord:
    """A finished step, for `Policy.observe`.

    Attributes:
        num_joined: rows at the end that joined after the others were planned; they draft nothing.
        num_target_tokens: what the target computed, where it counts by itself; None is base and
            chosen tokens.
    """

    batch: Batch
    drafts: list[Draft]
    chosen: list[list[int]]
    outputs: list[Verified]
    draft_time_s: float
    verify_time_s: float
    num_target_tokens: int | None = None
    num_joined: int = 0
