"""The baselines' stop rules on the device, as `stoppers` has those of our own.

What they decide is decided in `specserve.policies.baseline_rules`, where names and faults are
explained; `tests/test_torch_stoppers.py` holds the two against each other.
"""

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from specserve.engines.torch.transfer import lay_out, send
from specserve.policies.baseline_rules import DEFAULT_PRIOR, LengthRule, ThresholdRule

INF = float("inf")


class ThresholdStopper:
    """`ThresholdRule`: draft on while the newest confidence reaches a threshold."""

    def __init__(self, max_rows: int, max_draft_tokens: int, device: torch.device) -> None:
        self._numbers = torch.zeros(max_rows + 1, dtype=torch.float64, device=device)

    def load(self, rule: ThresholdRule) -> None:
        """Begin a step. See `Stopper`."""
        numbers = send(np.concatenate([rule.of_mean, rule.threshold]), self._numbers.device)
        self._numbers[: len(numbers)].copy_(numbers, non_blocking=True)

    def goes_on(self, active: Tensor, confidences: Tensor) -> Tensor:
        """Compare each confidence, or the mean of all. See `Stopper`."""
        of_mean, threshold = self._numbers[0], self._numbers[1 : len(active) + 1]
        asked = active & torch.isfinite(threshold)
        mean = _sum(confidences, asked) / asked.sum().clamp(min=1)
        on: Tensor = torch.where((of_mean > 0) & asked, mean, confidences) >= threshold
        return on


class _BatchStopper:
    """Stops all rows at once, at the word of a subclass.

    The numbers of a step that have no row, each of shape [1], and of each row, [max_rows].
    """

    def __init__(self, max_rows: int, max_draft_tokens: int, device: torch.device) -> None:
        self._sizes = [
            1, 1, 1, 1, 1, 1, 1, 1, 1, 1,
            max_rows, max_rows, max_rows, max_rows + 1, max_rows * max_draft_tokens + 1,
        ]  # fmt: skip
        self._numbers = torch.zeros(sum(self._sizes), dtype=torch.float64, device=device)
        (
            self.token_yield, self._call_s, self.slo_s, self.plain_yield, self.total, self.count,
            self.position, self.num_tokens, self.spent_s, self.rate,
            self.caps, self.survival, self.row_yield, self._forward_s, self._verify_s,
        ) = self._numbers.split(self._sizes)  # fmt: skip

    def load(self, rule: LengthRule) -> None:
        """Begin a step: all numbers in one copy. See `Stopper`."""
        ones = np.ones(len(rule.caps))
        first_rate = rule.base[:1] / rule.verify_s[0]
        parts = [
            *rule.base, *rule.prior, 0.0, 0.0, 0.0, first_rate,
            rule.caps, ones, ones, rule.forward_s, rule.verify_s,
        ]  # fmt: skip
        numbers = np.zeros(len(self._numbers))
        lay_out(numbers, parts, self._sizes)
        self._numbers.copy_(send(numbers, self._numbers.device), non_blocking=True)

    def goes_on(self, active: Tensor, confidences: Tensor) -> Tensor:
        """Take one more token of the rows that are asked. See `Stopper`."""
        caps, survival = self.caps[: len(active)], self.survival[: len(active)]
        is_fixed = caps == 0
        asked = active & ~is_fixed
        num_asked = asked.sum().view(1)
        first_s = torch.where(self.position > 0, 0.0, self._call_s)
        self.spent_s += first_s + self.forward_s(num_asked)
        survival *= torch.where(asked, confidences, 1.0)
        self.token_yield += _sum(survival, asked)
        self.num_tokens += num_asked
        self.position += 1
        on: Tensor = is_fixed | self._another(asked, confidences)
        return on

    def prior(self) -> Tensor:
        """Return what a confidence is expected to be before the token is drafted: [1]."""
        mean = self.total / self.count.clamp(min=1.0)
        prior: Tensor = torch.where(self.count > 0, mean, DEFAULT_PRIOR)
        return prior

    def forward_s(self, num_rows: Tensor) -> Tensor:
        """Return the seconds of draft forwards: int64 [n] to [n]."""
        seconds: Tensor = self._forward_s.gather(0, num_rows)
        return seconds

    def verify_s(self, num_tokens: Tensor) -> Tensor:
        """Return the seconds to verify so many draft tokens: [n] to [n]."""
        last = len(self._verify_s) - 1
        seconds: Tensor = self._verify_s.gather(0, num_tokens.long().clamp(max=last))
        return seconds

    def _another(self, asked: Tensor, confidences: Tensor) -> Tensor:
        raise NotImplementedError


class GoodputStopper(_BatchStopper):
    """`GoodputRule`: climb the rate one token at a time, and stop at the first drop."""

    def _another(self, asked: Tensor, confidences: Tensor) -> Tensor:
        rate = self._rate_of(self.num_tokens, self.token_yield, self.spent_s)
        is_no_worse = rate >= self.rate
        self.rate.copy_(rate)
        self.total += _sum(confidences, asked)
        self.count += asked.sum()
        rows = asked & (self.caps[: len(asked)] > self.position)
        num_rows = rows.sum().view(1)
        ahead = self._rate_of(
            self.num_tokens + num_rows,
            self.token_yield + _sum(self.survival[: len(asked)], rows) * self.prior(),
            self.spent_s + self.forward_s(num_rows),
        )
        another: Tensor = is_no_worse & (num_rows > 0) & (ahead >= rate)
        return another

    def _rate_of(self, num_tokens: Tensor, token_yield: Tensor, draft_s: Tensor) -> Tensor:
        seconds = draft_s + self.verify_s(num_tokens)
        breaks_slo = (num_tokens > 0) & (seconds > self.slo_s)
        return torch.where(breaks_slo, -1.0, token_yield / seconds)


class _Lengths(NamedTuple):
    """Steps with one draft length after the other, [lengths] each. See `baseline_rules.Lengths`."""

    is_one: Tensor
    num_tokens: Tensor
    token_yield: Tensor
    least_yield: Tensor
    draft_s: Tensor


class BestLengthStopper(_BatchStopper):
    """`BestLengthRule`: draft on while some longer draft promises a better step."""

    def __init__(self, max_rows: int, max_draft_tokens: int, device: torch.device) -> None:
        super().__init__(max_rows, max_draft_tokens, device)
        self._more = torch.arange(max_draft_tokens, device=device)[:, None]
        self._lengths = torch.arange(max_draft_tokens + 1, device=device)
        shape = (3, max_draft_tokens + 1)  # tokens, yield and least yield of each length so far
        self._history = torch.zeros(shape, dtype=torch.float64, device=device)

    def load(self, rule: LengthRule) -> None:
        """Begin a step, with what it is without a draft. See `Stopper`."""
        super().load(rule)
        none = torch.cat([self.num_tokens, self.token_yield, self._least(self.row_yield)])
        self._history[:, 0] = none

    def _another(self, asked: Tensor, confidences: Tensor) -> Tensor:
        row_yield = self.row_yield[: len(asked)]
        row_yield += torch.where(asked, self.survival[: len(asked)], 0.0)
        now = torch.cat([self.num_tokens, self.token_yield, self._least(self.row_yield)])
        position = self.position.long().clamp(max=len(self._lengths) - 1)
        self._history.index_copy_(1, position, now[:, None])
        keeps, value = self._best(self._drafted())
        keeps_ahead, value_ahead = self._best(self._ahead(asked))
        return (keeps_ahead > keeps) | ((keeps_ahead == keeps) & (value_ahead > value))

    def _drafted(self) -> _Lengths:
        """Return the draft cut to 0, 1, ... tokens a row, at the price of all of it."""
        spent_s = self.spent_s.expand(len(self._lengths))
        num_tokens, token_yield, least_yield = self._history
        is_one = self._lengths <= self.position
        return _Lengths(is_one, num_tokens, token_yield, least_yield, spent_s)

    def _ahead(self, rows: Tensor) -> _Lengths:
        """Return the draft with 1, 2, ... more tokens of these rows, as likely as the prior."""
        n = len(rows)
        drafts = rows & (self.caps[:n] > self.position + self._more)
        gains = self.survival[:n] * self.prior() ** (self._more + 1.0) * drafts
        counts = drafts.sum(dim=1)
        return _Lengths(
            counts > 0,
            self.num_tokens + counts.cumsum(0),
            self.token_yield + gains.sum(dim=1).cumsum(0),
            self._least(self.row_yield[:n] + gains.cumsum(0)),
            self.spent_s + self.forward_s(counts).cumsum(0),
        )

    def _least(self, row_yields: Tensor) -> Tensor:
        """Return the least of the rows that the SLO is asked of: [..., n] to [..., 1] or [...]."""
        rows = self.caps[: row_yields.shape[-1]] > 0
        return torch.where(rows, row_yields, INF).amin(dim=-1).minimum(self.plain_yield)

    def _best(self, lengths: _Lengths) -> tuple[Tensor, Tensor]:
        """Return whether the best length keeps the SLO, and its `Worth`: [] each."""
        seconds = lengths.draft_s + self.verify_s(lengths.num_tokens)
        worst = seconds / lengths.least_yield
        keeps = lengths.is_one & (worst <= self.slo_s)
        rate = torch.where(keeps, lengths.token_yield / seconds, -INF).amax()
        least_bad = torch.where(lengths.is_one, -worst, -INF).amax()
        return keeps.any(), torch.where(keeps.any(), rate, least_bad)


def _sum(values: Tensor, rows: Tensor) -> Any:
    """Add up some of them: [n] and bool [n] to []."""
    return torch.where(rows, values, 0.0).sum()
