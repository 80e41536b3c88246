"""What the predictor says about requests: who is behind, how much prompt fits, how long a wait is.

Reads requests and the step-time model; changes neither.
"""

from collections.abc import Iterable, Sequence

import numpy as np

from specserve.predictor.step_time import StepTimeModel
from specserve.request import Request

# Share of a TPOT objective that rows are scheduled to meet. A row kept exactly on its schedule ends
# late half of the time; in overload that is all of them at once (`specserve bench` on a Poisson
# trace at 1 and 1.6 times plain capacity: 24 and 16 % attained at 1, 66 and 64 % at .85).
AIM = 0.85
DRAFTED = 2.0  # draft tokens verified for each that is accepted, about
MIN_CHUNK = 16  # prompt tokens that a step takes however late the other rows are


def owed_tokens(request: Request, now: float, aim: float = 1.0) -> float:
    """Return the tokens missing now to be on schedule; below 0 is ahead of it.

    Args:
        aim: share of the objective that the schedule is made for.

    owed(t) = (t - first_token) / tpot - (num_output_tokens - 1): TPOT counts the gaps after the
    first token, so with that one token out and no time gone nothing is owed.
    """
    tpot_s, first_token_s = request.slo.tpot_s, request.first_token_s
    if tpot_s is None or first_token_s is None:
        return float("-inf")
    return (now - first_token_s) / (aim * tpot_s) - (request.num_output_tokens - 1)


def slack_s(request: Request, now: float, aim: float = 1.0) -> float:
    """Return the time until the next token is late; before the first one, until the TTFT is."""
    slo = request.slo
    if request.first_token_s is None:
        return float("inf") if slo.ttft_s is None else request.arrival_s + slo.ttft_s - now
    if slo.tpot_s is None:
        return float("inf")
    return -owed_tokens(request, now, aim) * aim * slo.tpot_s


def tokens_per_step(request: Request) -> float:
    """Return what the request has got per step of late, at least 1."""
    return 1.0 + request.num_accepted_tokens / max(1, request.num_decode_steps)


def expected_tokens(request: Request) -> float:
    """Return what the next step should give the request: as of late, but not beyond its end."""
    return min(tokens_per_step(request), request.max_tokens - request.num_output_tokens)


class Pacer:
    """Answers the scheduler's questions about time with the policy's own predictor."""

    def __init__(self, step_time: StepTimeModel) -> None:
        self.step_time = step_time

    def prefill_tokens(self, decoding: Sequence[Request], limit: int, now: float) -> int:
        """Return the prompt chunk, up to `limit`, that keeps decoding rows on schedule.

        A row already late does not forbid prompts; it forbids steps slower than its own pace. Of
        the chunks that fit, the one with the most tokens per second: beside rows that decode, a
        full one would often end just above a step of the staircase.
        """
        context = sum(request.num_computed_tokens for request in decoding)
        fits = self._fitting(decoding, limit, context, now)
        if not decoding or fits <= MIN_CHUNK:
            return fits
        beside = sum(DRAFTED * tokens_per_step(r) - DRAFTED + 1.0 for r in decoding)
        curve = self.step_time.verify_curve(max(1, round(beside)), fits, context)
        sizes = np.arange(-(-fits // 2), fits + 1)
        return int(sizes[np.argmax(sizes / curve[sizes])])

    def joining_tokens(
        self, decoding: Sequence[Request], num_tokens: int, limit: int, now: float
    ) -> int:
        """Return the prompt chunk, up to `limit`, to add to a step that is about to be verified.

        The one with which the step has the most tokens per second, none perhaps, of those that keep
        decoding rows on schedule.

        Args:
            num_tokens: of the step without it.
        """
        if limit < 1:
            return 0
        context = sum(request.num_computed_tokens for request in decoding)
        curve = self.step_time.verify_curve(num_tokens, limit, context)
        curve = curve[curve <= min(self._allowed_s(decoding, now), default=np.inf)]
        if not len(curve):
            return 0
        return int(np.argmax((num_tokens + np.arange(len(curve))) / curve))

    def _fitting(self, decoding: Sequence[Request], limit: int, context: int, now: float) -> int:
        """Return the largest chunk that no objective forbids."""
        allowed = self._allowed_s(decoding, now)
        if not allowed or limit <= MIN_CHUNK:
            return limit
        curve = self.step_time.verify_curve(len(decoding), limit, context)
        fits = int((curve <= min(allowed)).sum()) - 1  # the curve begins with no chunk at all
        return max(MIN_CHUNK, fits)

    def _allowed_s(self, requests: Sequence[Request], now: float) -> list[float]:
        """Return how long the step may take for each request with an objective for its tokens."""
        return [
            max(0.0, slack_s(request, now, AIM)) + expected_tokens(request) * request.slo.tpot_s
            for request in requests
            if request.slo.tpot_s is not None
        ]

    def predicted_ttft_s(
        self,
        request: Request,
        ahead: Iterable[Request],
        running: Sequence[Request],
        chunk: int,
        num_free_rows: int,
    ) -> float:
        """Predict the time from now to the request's first token.

        Prompts are taken in order, a chunk a step beside the rows that decode; without a free row,
        a running request has to end first.

        Args:
            ahead: waiting requests that come first.
            chunk: prompt tokens of a step.
            num_free_rows: rows that could be taken now.
        """
        ahead = list(ahead)
        prompts = [*ahead, *running, request]
        num_prompt_tokens = sum(r.num_uncomputed_tokens for r in prompts)
        chunk = max(1, min(chunk, num_prompt_tokens))
        num_steps = -(-num_prompt_tokens // chunk)
        context = sum(r.num_computed_tokens for r in running)
        step_s = self.step_time.verify_s(len(running) + chunk, context)
        return num_steps * step_s + self._row_wait_s(running, len(ahead) + 1 - num_free_rows)

    def _row_wait_s(self, running: Sequence[Request], num_rows: int) -> float:
        """Predict when `num_rows` of the running requests will have ended."""
        if num_rows <= 0 or not running:
            return 0.0
        context = sum(request.num_computed_tokens for request in running)
        step_s = self.step_time.verify_s(len(running), context)
        ends = sorted(
            step_s * (r.max_tokens - r.num_output_tokens) / tokens_per_step(r) for r in running
        )
        rounds, index = divmod(num_rows - 1, len(ends))
        return rounds * ends[-1] + ends[index]
