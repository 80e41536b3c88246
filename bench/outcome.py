"""What became of a planned request: when it was sent, when responses came, how it ended."""

import itertools
from dataclasses import dataclass, field

from bench.cells import RequestResult, StepSample
from bench.workloads.plan import PlannedRequest

FINISHED, REJECTED, FAILED = "finished", "rejected", "failed"


@dataclass(slots=True)
class Outcome:
    """Times of one request, in seconds since the start of its window.

    Attributes:
        response_s: of every response that carried text.
        num_output_tokens: as the server counted them.
        ending: FINISHED, REJECTED (refused early, with a reason) or FAILED.
        error: what the client was told, if it did not finish.
        steps: that the request was in, where the server was asked; with its own tokens only.
    """

    request: PlannedRequest
    sent_s: float = 0.0
    response_s: list[float] = field(default_factory=list)
    num_output_tokens: int = 0
    ending: str = FAILED
    error: str = ""
    steps: list[StepSample] = field(default_factory=list)

    @property
    def is_finished(self) -> bool:
        """Whether all of it was answered."""
        return self.ending == FINISHED

    @property
    def ttft_s(self) -> float:
        """Time from planned arrival to first response."""
        return self.response_s[0] - self.request.arrival_s

    @property
    def e2e_s(self) -> float:
        """Time from planned arrival to last response."""
        return self.response_s[-1] - self.request.arrival_s

    @property
    def tpot_s(self) -> float:
        """Time per output token after the first, (end - first) / (n - 1); 0 for one token."""
        gaps = self.num_output_tokens - 1
        return (self.response_s[-1] - self.response_s[0]) / gaps if gaps > 0 else 0.0

    @property
    def itl_s(self) -> list[float]:
        """Gaps between responses."""
        return [late - early for early, late in itertools.pairwise(self.response_s)]

    @property
    def attained(self) -> bool:
        """Whether it finished and met every objective it carried."""
        slo = self.request.slo
        return (
            self.is_finished
            and (slo.ttft_s is None or self.ttft_s <= slo.ttft_s)
            and (slo.tpot_s is None or self.tpot_s <= slo.tpot_s)
        )


@dataclass(frozen=True, slots=True)
class Run:
    """A window, replayed; steps where the one who replayed it could see them."""

    outcomes: list[Outcome]
    steps: list[StepSample] = field(default_factory=list)


def result_of(outcome: Outcome, itl_p99_s: float | None) -> RequestResult:
    """Make a result line's entry."""
    done = outcome.is_finished
    return RequestResult(
        arrival_s=outcome.request.arrival_s,
        lateness_s=outcome.sent_s - outcome.request.arrival_s,
        priority_class=outcome.request.priority_class,
        num_prompt_tokens=len(outcome.request.prompt_token_ids),
        num_output_tokens=outcome.num_output_tokens,
        ttft_s=outcome.ttft_s if done else None,
        tpot_s=outcome.tpot_s if done else None,
        e2e_s=outcome.e2e_s if done else None,
        itl_p99_s=itl_p99_s,
        outcome=outcome.ending,
        attained=outcome.attained,
    )
