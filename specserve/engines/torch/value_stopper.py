"""`ValueRule` on the device, in PyTorch: the way on a CPU, and what the kernel is held against."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from specserve.engines.torch.transfer import lay_out, send
from specserve.predictor.acceptance import EPS, JUDGE_COEFFICIENTS, SCOUT_COEFFICIENTS
from specserve.stop_rules import ValueRule, ValueStopper

INF = float("inf")


class DeviceValueStopper:
    """`ValueRule`: draft on while it raises the best predicted token rate of the step.

    There is room for the gains of all rows at their caps, and of the two more tokens of each that
    are looked ahead; a gain that is not there is -inf, and verifying it takes infinite time.

    Args:
        max_rows: of the step, whoever proposes for them.
        max_draft_tokens: of a row.
        device: where its numbers live.
    """

    def __init__(self, max_rows: int, max_draft_tokens: int, device: torch.device) -> None:
        self._device = device
        num_gains = max_rows * (max_draft_tokens + 2)
        self._sizes = [
            max_rows * JUDGE_COEFFICIENTS, max_rows * SCOUT_COEFFICIENTS, 5,
            *[max_rows] * 3, max_rows + 1, num_gains, num_gains + 1 + ValueStopper.WINDOW,
        ]  # fmt: skip
        self._numbers = torch.zeros(sum(self._sizes), dtype=torch.float64, device=device)
        (
            self._judge, self._scout, self._scalars, self._weight, self._survival, self._z,
            self._forward_s, self._gains, self._verify_s,
        ) = self._numbers.split(self._sizes)  # fmt: skip
        (
            self._base_yield, self._spent_s, self._position, self._num_verifiable, self._num_gains
        ) = self._scalars.split(1)  # fmt: skip
        self._judge = self._judge.view(max_rows, JUDGE_COEFFICIENTS)
        self._scout = self._scout.view(max_rows, SCOUT_COEFFICIENTS)

    def load(self, rule: ValueRule) -> None:
        """Begin a step: all numbers in one copy. See `Stopper`."""
        num_rows = len(rule.weight)
        judge, scout = (curves.reshape(-1, num_rows).T for curves in (rule.judge, rule.scout))
        parts: list[Any] = [
            judge.ravel(), scout.ravel(),
            [*rule.base[:2], 0.0, len(rule.verify_s) - 1.0, len(rule.gains)],
            rule.weight, np.ones(num_rows), [], rule.forward_s, rule.gains, rule.verify_s,
        ]  # fmt: skip
        numbers = np.zeros(len(self._numbers))
        numbers[-sum(self._sizes[-2:]) :] = -INF
        numbers[-self._sizes[-1] :] = INF
        lay_out(numbers, parts, self._sizes)
        self._numbers.copy_(send(numbers, self._device), non_blocking=True)

    def goes_on(self, active: Tensor, confidences: Tensor) -> Tensor:
        """Take the newest confidences, then compare the best rates ahead. See `Stopper`."""
        n = len(active)
        is_fixed = torch.isinf(self._weight[:n])
        weight = torch.where(is_fixed, 1.0, self._weight[:n])
        survival, z = self._survival[:n], self._z[:n]

        newest = logit(confidences)
        accepted = _judged(self._judge[:n].T, newest, self._position)
        survival *= torch.where(active, accepted, 1.0)
        z.copy_(torch.where(active, newest, z))
        worth = survival * weight
        gains = self._gains.copy_(_merged(self._gains, worth, active))
        self._spent_s += self._forward_s.gather(0, active.sum().view(1))
        self._position += 1

        best, rate = self._best(gains, self._spent_s)
        ahead = _scouted(self._scout[:n].T, z, self._position)
        next_worth = worth * ahead
        keep = active & (next_worth >= self._bar(gains, best, rate))
        forward_s = self._forward_s.gather(0, keep.sum().view(1))
        one = _merged(gains, next_worth, keep)
        two = _merged(one, next_worth * ahead, keep)
        _, rate_of_one = self._best(one, self._spent_s + forward_s)
        _, rate_of_two = self._best(two, self._spent_s + 2.0 * forward_s)
        pays = (rate_of_one > rate) | (rate_of_two > rate)
        on: Tensor = is_fixed | (keep & pays)
        return on

    def _best(self, gains: Tensor, spent_s: Tensor) -> tuple[Tensor, Tensor]:
        """Return the best total [1] and its rate [1]. See `specserve.optimum.best_total`."""
        tokens = torch.cat([self._base_yield, self._base_yield + gains.clamp(min=0.0).cumsum(0)])
        rates = tokens / (spent_s + self._verify_s[: len(tokens)])
        rates[1:] = torch.where(torch.isinf(gains), -INF, rates[1:])
        best = rates.argmax().view(1)
        return best, rates.gather(0, best)

    def _bar(self, gains: Tensor, best: Tensor, rate: Tensor) -> Tensor:
        """Return what a row's next token must be worth."""
        end = torch.minimum(best + ValueStopper.WINDOW, self._num_verifiable.long())
        start = (end - ValueStopper.WINDOW).clamp(min=0)
        rise = self._verify_s.gather(0, end) - self._verify_s.gather(0, start)
        bar = ValueStopper.ROW_SHARE * rate * rise / (end - start).clamp(min=1)
        least = gains.gather(0, (best - 1).clamp(min=0))
        return torch.where(best > 0, torch.minimum(bar, least), bar)


def _merged(gains: Tensor, more: Tensor, which: Tensor) -> Tensor:
    """Add some gains, largest first, and drop the smallest ones: [m], [n] and bool [n] to [m]."""
    merged = torch.cat([gains, torch.where(which, more, -INF)]).sort(descending=True).values
    return merged[: len(gains)]


def logit(confidences: Tensor) -> Tensor:
    """See `acceptance.logit`."""
    c = confidences.clamp(EPS, 1.0 - EPS)
    return torch.log(c / (1.0 - c))


def _judged(curves: Tensor, z: Tensor, position: Tensor) -> Tensor:
    """See `acceptance.judged`."""
    bias, slope, bend, square, tilt = curves
    return sigmoid(bias + tilt * position + z * (slope + square * z) + bend * z.clamp(min=0.0))


def _scouted(curves: Tensor, z: Tensor, position: Tensor) -> Tensor:
    """See `acceptance.scouted`."""
    bias, first, slope, square = curves
    later = bias + z * (slope + square * z)
    return sigmoid(torch.where(position == 0, bias + first, later))


def sigmoid(x: Tensor) -> Tensor:
    """See `acceptance.sigmoid`."""
    return torch.sigmoid(x.clamp(-30.0, 30.0))
