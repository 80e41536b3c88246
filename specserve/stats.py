"""What a server core has done so far, and how its requests have fared: counts, seconds, reasons."""

from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from specserve.batch import Decision, Draft, Row, StepRecord
from specserve.pacing import slack_s
from specserve.request import FinishReason, Request

MODEL, NGRAM = "model", "ngram"
MAX_KEPT_STEPS = 4096


@dataclass(slots=True)
class Stats:
    """Totals since the start; times in seconds.

    Attributes:
        step_s: wall time of whole steps, from schedule to commit.
        draft_s, verify_s: wall time of the engine calls, transport included.
        predicted_s: what the policy predicted for engine calls, and `measured_s`, what those took.
        draft_lengths: rows by tokens drafted, of rows that could draft.
        verified_at, accepted_at: tokens by (source, position in the draft, from 0).
        acceptance_lengths: rows by tokens gained, of rows whose draft was verified: accepted and
            the extra one.
        reasons: rows by what decided their draft length.
        step_times: (predicted, measured) engine time of the steps nobody has taken out yet, None
            for what was not predicted; the oldest go first.
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
    predicted_s: float = 0.0
    measured_s: float = 0.0
    draft_lengths: Counter[int] = field(default_factory=Counter)
    acceptance_lengths: Counter[int] = field(default_factory=Counter)
    verified_at: Counter[tuple[str, int]] = field(default_factory=Counter)
    accepted_at: Counter[tuple[str, int]] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)
    step_times: deque[tuple[float | None, float]] = field(
        default_factory=lambda: deque(maxlen=MAX_KEPT_STEPS)
    )

    def add(self, record: StepRecord, decision: Decision, step_s: float) -> None:
        """Count one step."""
        self.num_steps += 1
        self.step_s += step_s
        self.draft_s += record.draft_time_s
        self.verify_s += record.verify_time_s
        engine_s = record.draft_time_s + record.verify_time_s
        self.step_times.append((decision.predicted_s, engine_s))
        if decision.predicted_s is not None:
            self.predicted_s += decision.predicted_s
            self.measured_s += engine_s
        self.reasons.update(decision.reasons)
        self.num_base_tokens += record.batch.num_base_tokens
        for row, draft, choice, verified in zip(
            record.batch.rows, record.drafts, record.chosen, record.outputs, strict=True
        ):
            self.num_output_tokens += len(verified.output_token_ids)
            if row.samples:
                self.draft_lengths[len(draft.token_ids)] += 1
            if draft.token_ids:
                self._add_draft(row, draft, len(choice), verified.num_accepted_tokens)

    def _add_draft(self, row: Row, draft: Draft, num_verified: int, num_accepted: int) -> None:
        self.num_drafted_tokens += len(draft.token_ids)
        self.num_verified_tokens += num_verified
        self.num_accepted_tokens += num_accepted
        if num_verified:
            self.acceptance_lengths[num_accepted + 1] += 1
        source = MODEL if row.lookup is None else NGRAM
        for position in range(num_verified):
            self.verified_at[source, position] += 1
        for position in range(num_accepted):
            self.accepted_at[source, position] += 1


OUTCOMES = {
    FinishReason.LENGTH: "finished",
    FinishReason.END_ID: "finished",
    FinishReason.STOP_WORD: "finished",
    FinishReason.CANCELLED: "cancelled",
    FinishReason.REJECTED: "rejected",
    FinishReason.TIMEOUT: "timed_out",
    FinishReason.ERROR: "failed",
}


class Outcomes:
    """How requests ended, by class. Classes are the clients' words, so only some get a name here.

    Attributes:
        requests: by (outcome, class).
        attained, missed: finished requests that met all their objectives, or not, by class;
            those without any are in neither.
    """

    MAX_CLASSES = 16

    def __init__(self) -> None:
        self.requests: Counter[tuple[str, str]] = Counter()
        self.attained: Counter[str] = Counter()
        self.missed: Counter[str] = Counter()
        self._classes: set[str] = set()

    def add(self, request: Request, reason: FinishReason) -> None:
        """Count a request that has ended."""
        name = self.class_of(request)
        outcome = OUTCOMES[reason]
        self.requests[outcome, name] += 1
        if request.met_slo is not None and outcome != "cancelled":
            met = request.met_slo and outcome == "finished"
            (self.attained if met else self.missed)[name] += 1

    def class_of(self, request: Request) -> str:
        """Return the label of a request's class: `default` for none, `other` beyond the limit."""
        name = request.priority_class or "default"
        if name not in self._classes and len(self._classes) >= self.MAX_CLASSES:
            return "other"
        self._classes.add(name)
        return name


def least_slack_s(requests: Sequence[Request], outcomes: Outcomes, now: float) -> dict[str, float]:
    """Return the least time until a token is late, by class, of requests with objectives."""
    least: dict[str, float] = {}
    for request in requests:
        slack = slack_s(request, now)
        if slack != float("inf"):
            name = outcomes.class_of(request)
            least[name] = min(slack, least.get(name, slack))
    return least
