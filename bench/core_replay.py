"""A window replayed by a server core in this process: submit what has arrived, step, note times.

Requests lie in the core's inbox at their planned arrival, as a server's do while a step runs, so
this generator is never late. The clock may be a virtual one.
"""

import time
from collections import deque
from collections.abc import Sequence
from typing import Protocol

from bench.outcome import FINISHED, REJECTED, Outcome
from bench.workloads.plan import PlannedRequest
from specserve.admission import Rejected
from specserve.core import SpecServe
from specserve.request import FinishReason, Request
from specserve.scheduler import StepOutput

FIRST_KEY = 1
COMPLETE = (FinishReason.LENGTH, FinishReason.END_ID)


class Clock(Protocol):
    """Seconds, and a way to let them pass."""

    def __call__(self) -> float:
        """Return the time."""

    def advance(self, seconds: float) -> None:
        """Let time pass while nothing is to do."""


class WallClock:
    """Time as it goes by."""

    def __call__(self) -> float:
        """Return the time."""
        return time.perf_counter()

    def advance(self, seconds: float) -> None:
        """Sleep."""
        time.sleep(seconds)


def replay(
    core: SpecServe,
    requests: Sequence[PlannedRequest],
    clock: Clock,
    draft_source: str,
    start_s: float | None = None,
    first_key: int = FIRST_KEY,
    host_s: float = 0.0,
) -> list[Outcome]:
    """Submit requests when they arrive, step until all have ended, note when tokens came.

    Args:
        requests: in order of arrival.
        draft_source: of all of them, see `specserve.batch.Row`.
        start_s: the start of the window on the clock; None is now.
        first_key: of the requests; simulated texts go by keys, so every policy gets the same.
        host_s: what a step takes beside the engines, on a clock that does not see it.
    """
    start_s = clock() if start_s is None else start_s
    outcomes = {key: Outcome(r, r.arrival_s) for key, r in enumerate(requests, first_key)}
    waiting = deque(outcomes.items())
    scheduler = core.scheduler
    while waiting or scheduler.has_work:
        # NOTE: times are compared as the clock has them: a difference could round to before its
        # moment for ever.
        now_s = clock()
        while waiting and start_s + waiting[0][1].request.arrival_s <= now_s:
            key, outcome = waiting.popleft()
            _submit(core, _request(key, outcome.request, start_s, draft_source), outcome)
        if scheduler.has_work:
            outputs = core.step()
            if host_s:
                clock.advance(host_s)
            _note(outputs, outcomes, clock() - start_s)
        elif waiting:
            clock.advance(max(0.0, start_s + waiting[0][1].request.arrival_s - clock()))
    core.release_ended()
    return [*outcomes.values()]


def _request(key: int, planned: PlannedRequest, start_s: float, draft_source: str) -> Request:
    return Request(
        planned.prompt_token_ids,
        planned.num_output_tokens,
        slo=planned.slo,
        priority_class=planned.priority_class,
        draft_source=draft_source,
        key=key,
        arrival_s=start_s + planned.arrival_s,
    )


def _submit(core: SpecServe, request: Request, outcome: Outcome) -> None:
    try:
        core.scheduler.submit(request, core.clock())
    except Rejected as rejection:
        outcome.ending, outcome.error = REJECTED, str(rejection)
    except ValueError as refusal:
        outcome.error = str(refusal)


def _note(outputs: Sequence[StepOutput], outcomes: dict[int, Outcome], now_s: float) -> None:
    for output in outputs:
        outcome = outcomes[output.request.key]
        outcome.response_s.append(now_s)
        outcome.num_output_tokens += len(output.token_ids)
        if output.finish_reason in COMPLETE:
            outcome.ending = FINISHED
