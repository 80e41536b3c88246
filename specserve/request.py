"""One request from arrival to finish: tokens, counters, memory, objective. Decides nothing."""

import itertools
from dataclasses import dataclass, field
from enum import Enum

from specserve.sampling_params import SamplingParams
from specserve.trace import StepTrace

_KEYS = itertools.count(1)


class FinishReason(Enum):
    """Why a request ended."""

    LENGTH = "length"
    END_ID = "end_id"
    STOP_WORD = "stop_word"
    CANCELLED = "cancelled"
    TIMEOUT = "timeout"
    REJECTED = "rejected"
    ERROR = "error"


@dataclass(frozen=True, slots=True)
class SLO:
    """A request's latency objectives; None is best effort."""

    ttft_s: float | None = None
    tpot_s: float | None = None


@dataclass(slots=True, eq=False)
class Request:
    """A prompt, what is known of its continuation, and what has been computed of it.

    The counters are half-open intervals over `token_ids`, prompt first:

        [0, num_computed_tokens)        the target's KV is valid
        [0, num_draft_computed_tokens)  the draft's KV is valid
        [num_computed_tokens, num_tokens)  the gap that steps close; 1 while decoding

    Attributes:
        key: unique in this process; what engines know the request by.
        request_id: the client's own, possibly empty, possibly not unique.
        max_draft_tokens: cap of this request; None leaves it to the policy, 0 is plain decoding.
        timeout_s: time from arrival to the last token, after which the request fails; None is for
            ever.
        num_draft_tokens: a fixed draft length asked for, overriding the policy's.
        draft_source: see `Row`.
        trace: filled with every step if it is a list; None keeps nothing.
    """

    prompt_token_ids: list[int]
    max_tokens: int
    sampling: SamplingParams = field(default_factory=SamplingParams)
    request_id: str = ""
    slo: SLO = field(default_factory=SLO)
    priority_class: str = ""
    timeout_s: float | None = None
    max_draft_tokens: int | None = None
    num_draft_tokens: int | None = None
    draft_source: str = "model"
    trace: list[StepTrace] | None = None
    key: int = field(default_factory=lambda: next(_KEYS))
    arrival_s: float = 0.0

    token_ids: list[int] = field(init=False)
    num_prompt_tokens: int = field(init=False)
    num_computed_tokens: int = 0
    num_draft_computed_tokens: int = 0
    block_table: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None

    predicted_ttft_s: float | None = None
    first_scheduled_s: float | None = None
    first_token_s: float | None = None
    last_token_s: float | None = None
    num_drafted_tokens: int = 0
    num_verified_tokens: int = 0
    num_accepted_tokens: int = 0
    num_decode_steps: int = 0
    num_preemptions: int = 0

    def __post_init__(self) -> None:
        self.token_ids = list(self.prompt_token_ids)
        self.num_prompt_tokens = len(self.prompt_token_ids)

    @property
    def num_tokens(self) -> int:
        """Prompt and output tokens known."""
        return len(self.token_ids)

    @property
    def num_output_tokens(self) -> int:
        """Tokens generated."""
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def num_uncomputed_tokens(self) -> int:
        """The gap: known tokens whose target KV is missing."""
        return len(self.token_ids) - self.num_computed_tokens

    @property
    def expires_s(self) -> float:
        """When the request must have ended."""
        return float("inf") if self.timeout_s is None else self.arrival_s + self.timeout_s

    @property
    def num_draftable_tokens(self) -> int:
        """The longest draft that cannot run past `max_tokens`: the step adds one token itself."""
        return max(0, self.max_tokens - self.num_output_tokens - 1)

    @property
    def met_slo(self) -> bool | None:
        """Whether a request that has its first token met every objective; None without any."""
        if self.slo.ttft_s is None and self.slo.tpot_s is None:
            return None
        if self.first_token_s is None or self.last_token_s is None:
            return False
        gaps = max(1, self.num_output_tokens - 1)
        ttft_s = self.first_token_s - self.arrival_s
        tpot_s = (self.last_token_s - self.first_token_s) / gaps
        met_ttft = self.slo.ttft_s is None or ttft_s <= self.slo.ttft_s
        return met_ttft and (self.slo.tpot_s is None or tpot_s <= self.slo.tpot_s)

    @property
    def is_finished(self) -> bool:
        """Whether a finish reason is set."""
        return self.finish_reason is not None
