"""`ValueRule` on a GPU in one launch, in the Triton language.

As a hundred operations of PyTorch the rule took .4 ms after every draft token on an H100, half as
long as the token. Here nothing is sorted: a token's place among all gains is the number of those
above it, which one program counts. Not run on a GPU yet.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from specserve.engines.torch.value_stopper import DeviceValueStopper
from specserve.predictor.acceptance import EPS, JUDGE_COEFFICIENTS, SCOUT_COEFFICIENTS
from specserve.stop_rules import ValueStopper

TILE = 64  # gains that are compared with as many others at once


class FusedValueStopper(DeviceValueStopper):
    """`DeviceValueStopper` in one launch.

    Gains stay in the order they come in: those without a forward, those of each position, padded to
    the rows of the pass, and at the end, for a moment, what one and two more tokens would be worth.
    """

    def __init__(self, max_rows: int, max_draft_tokens: int, device: torch.device) -> None:
        super().__init__(max_rows, 2 * max_draft_tokens, device)  # room for the padding

    def goes_on(self, active: Tensor, confidences: Tensor) -> Tensor:
        """Take the newest confidences, then compare the best rates ahead. See `Stopper`."""
        on = torch.empty_like(active)
        _goes_on[(1,)](
            on.view(torch.uint8), active.view(torch.uint8), confidences,
            self._judge, self._scout, self._scalars, self._weight, self._survival, self._z,
            self._forward_s, self._gains, self._verify_s,
            len(active), len(self._gains) - 3 * len(active), EPS, ValueStopper.ROW_SHARE,
            WINDOW=ValueStopper.WINDOW,
            JUDGE=JUDGE_COEFFICIENTS, SCOUT=SCOUT_COEFFICIENTS,
            ROWS=triton.next_power_of_2(len(active)), TILE=TILE,
        )  # fmt: skip
        return on


@triton.jit
def _goes_on(
    on, active, confidences,  # [rows], bool as bytes, and float64
    judge, scout,  # [rows, JUDGE] and [rows, SCOUT]
    scalars,  # worth without drafts, seconds spent, position, verifiable tokens, gains so far
    weight, survival, z,  # [rows]
    forward_s, gains, verify_s,
    num_rows, last_place, eps, row_share,
    WINDOW: tl.constexpr, JUDGE: tl.constexpr, SCOUT: tl.constexpr,
    ROWS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Decide as `specserve.stop_rules.ValueStopper.goes_on` does."""
    row = tl.arange(0, ROWS)
    is_row = row < num_rows
    is_active = tl.load(active + row, mask=is_row, other=0) != 0
    base = tl.load(scalars)
    num_verifiable = tl.load(scalars + 3).to(tl.int32)

    c = tl.load(confidences + row, mask=is_row, other=0.5)
    c = tl.minimum(tl.maximum(c, eps), 1.0 - eps)
    newest = tl.log(c / (1.0 - c))
    accepted = _judged(judge + row * JUDGE, is_row, newest, tl.load(scalars + 2))
    before = tl.load(survival + row, mask=is_row, other=0.0)
    alive = tl.where(is_active, before * accepted, before)
    logit = tl.where(is_active, newest, tl.load(z + row, mask=is_row, other=0.0))
    worth_of_one = tl.load(weight + row, mask=is_row, other=1.0)
    is_fixed = worth_of_one == float("inf")
    worth = alive * tl.where(is_fixed, 1.0, worth_of_one)
    spent = tl.load(scalars + 1) + tl.load(forward_s + tl.sum(is_active.to(tl.int32), axis=0))
    num_gains = tl.minimum(tl.load(scalars + 4).to(tl.int32), last_place)
    tl.store(gains + num_gains + row, tl.where(is_active, worth, float("-inf")), mask=is_row)
    num_gains += num_rows
    tl.store(survival + row, alive, mask=is_row)
    tl.store(z + row, logit, mask=is_row)
    tl.debug_barrier()
    tl.store(scalars + 1, spent)
    tl.store(scalars + 2, tl.load(scalars + 2) + 1.0)
    tl.store(scalars + 4, num_gains.to(tl.float64))

    best, rate, least = _best(gains, num_gains, base, spent, verify_s, num_verifiable, TILE)
    end = tl.minimum(best + WINDOW, num_verifiable)
    start = tl.maximum(end - WINDOW, 0)
    rise = tl.load(verify_s + end) - tl.load(verify_s + start)
    bar = row_share * rate * rise / tl.maximum(end - start, 1)
    bar = tl.where(best > 0, tl.minimum(bar, least), bar)

    ahead = _scouted(scout + row * SCOUT, is_row, logit)
    keep = is_active & (worth * ahead >= bar)
    one = tl.where(keep, worth * ahead, float("-inf"))
    two = tl.where(keep, worth * ahead * ahead, float("-inf"))
    tl.store(gains + num_gains + row, one, mask=is_row)
    tl.store(gains + num_gains + num_rows + row, two, mask=is_row)
    tl.debug_barrier()
    forward = tl.load(forward_s + tl.sum(keep.to(tl.int32), axis=0))
    end = num_gains + num_rows
    _, rate_of_one, _ = _best(gains, end, base, spent + forward, verify_s, num_verifiable, TILE)
    end += num_rows
    _, rate_of_two, _ = _best(
        gains, end, base, spent + 2.0 * forward, verify_s, num_verifiable, TILE
    )
    keep = tl.where(tl.maximum(rate_of_one, rate_of_two) > rate, keep, False)
    tl.store(on + row, (is_fixed | keep).to(tl.uint8), mask=is_row)


@triton.jit
def _judged(curves, is_row, z, position):
    """See `acceptance.judged`."""
    x = tl.load(curves, mask=is_row, other=0.0)
    x += z * tl.load(curves + 1, mask=is_row, other=0.0)
    x += tl.maximum(z, 0.0) * tl.load(curves + 2, mask=is_row, other=0.0)
    x += z * z * tl.load(curves + 3, mask=is_row, other=0.0)
    x += position * tl.load(curves + 4, mask=is_row, other=0.0)
    return _sigmoid(x)


@triton.jit
def _scouted(curves, is_row, z):
    """See `acceptance.scouted`, after the first token."""
    x = tl.load(curves, mask=is_row, other=0.0)
    x += z * tl.load(curves + 2, mask=is_row, other=0.0)
    x += z * z * tl.load(curves + 3, mask=is_row, other=0.0)
    return _sigmoid(x)


@triton.jit
def _best(gains, num_gains, base, spent, verify_s, num_verifiable, TILE: tl.constexpr):
    """Return the best total, its rate and the least gain in it. See `optimum.best_total`."""
    best = num_gains * 0
    rate = base / (spent + tl.load(verify_s))
    least = rate * 0.0
    for begin in range(0, num_gains, TILE):
        index = begin + tl.arange(0, TILE)
        gain = tl.load(gains + index, mask=index < num_gains, other=float("-inf"))
        place = tl.zeros([TILE], tl.int32)  # in falling order; equal ones as they come
        total = tl.zeros([TILE], tl.float64)
        for other_begin in range(0, num_gains, TILE):
            other_index = other_begin + tl.arange(0, TILE)
            is_other = other_index < num_gains
            other = tl.load(gains + other_index, mask=is_other, other=float("-inf"))
            is_above = other[None, :] > gain[:, None]
            is_above |= (other[None, :] == gain[:, None]) & (other_index[None, :] < index[:, None])
            place += tl.sum(is_above.to(tl.int32), axis=1)
            total += tl.sum(tl.where(is_above, other[None, :], 0.0), axis=1)
        is_there = (gain > float("-inf")) & (place < num_verifiable)
        seconds = spent + tl.load(verify_s + place + 1, mask=is_there, other=1.0)
        rates = tl.where(is_there, (base + total + gain) / seconds, -1.0)
        top = tl.max(rates, axis=0)
        is_top = tl.arange(0, TILE) == tl.argmax(rates, axis=0)
        best = tl.where(top > rate, tl.sum(tl.where(is_top, place + 1, 0), axis=0), best)
        least = tl.where(top > rate, tl.sum(tl.where(is_top, gain, 0.0), axis=0), least)
        rate = tl.maximum(rate, top)
    return best, rate, least


@triton.jit
def _sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-tl.minimum(tl.maximum(x, -30.0), 30.0)))
