"""The exact optimum of expected tokens per second over how many draft tokens to verify."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

# Up to here plain Python: beside an engine that has just emptied the caches, an array operation
# costs some microseconds, more than the whole loop.
MANY = 64


class Best(NamedTuple):
    """The best number of draft tokens, and the token rate it promises."""

    num_tokens: int
    rate: float


def best_total(
    gains: Sequence[float], base_yield: float, verify_s: Sequence[float], spent_s: float
) -> Best:
    """Try every total: rate(m) = (base_yield + sum of the m largest gains) / (spent + T(m)).

    Survivals fall along a row, so the m largest of all rows together are a prefix of each row, and
    no other choice of m tokens yields more. Scanning all m needs nothing of T: on a staircase the
    best m may lie beyond any number of worse ones.

    Args:
        gains: [n], survivals (times weights) in falling order.
        base_yield: tokens of the step without drafts.
        verify_s: [> n], seconds to verify with 0, 1, ... draft tokens.
        spent_s: seconds gone on drafting.
    """
    if len(gains) > MANY:
        return _best_of_many(gains, base_yield, verify_s, spent_s)
    tokens = base_yield
    best, best_rate = 0, tokens / (spent_s + verify_s[0])
    for m, gain in enumerate(gains, 1):
        tokens += gain
        rate = tokens / (spent_s + verify_s[m])
        if rate > best_rate:
            best, best_rate = m, rate
    return Best(best, best_rate)


def choose(
    survival: Floats, weight: Floats, base_yield: float, verify_s: Floats, spent_s: float
) -> list[int]:
    """Return how many tokens of each row are worth verifying; ties keep the order of positions.

    Args:
        survival: [num_rows, longest draft], falling along a row, 0 beyond a row's draft.
        weight: [num_rows], what a token of a row counts for.
        base_yield, verify_s, spent_s: see `best_total`.
    """
    if survival.size > MANY:
        return _choose_of_many(survival, weight, base_yield, verify_s, spent_s)
    rows = survival.tolist()
    tokens = [
        (-w * s, position, i)
        for i, (values, w) in enumerate(zip(rows, weight.tolist(), strict=True))
        for position, s in enumerate(values)
        if s > 0.0
    ]
    tokens.sort()
    gains = [-token[0] for token in tokens]
    best = best_total(gains, base_yield, verify_s[: len(gains) + 1].tolist(), spent_s)
    lengths = [0] * len(rows)
    for _, _, i in tokens[: best.num_tokens]:
        lengths[i] += 1
    return lengths


def _choose_of_many(
    survival: Floats, weight: Floats, base_yield: float, verify_s: Floats, spent_s: float
) -> list[int]:
    worth = (survival * weight[:, None]).ravel()
    positions = np.tile(np.arange(survival.shape[1]), len(survival))
    order = np.lexsort((positions, -worth))[: np.count_nonzero(worth)]
    best = best_total(worth[order].tolist(), base_yield, verify_s.tolist(), spent_s)
    chosen = order[: best.num_tokens]
    lengths: list[int] = np.bincount(chosen // survival.shape[1], minlength=len(survival)).tolist()
    return lengths


def _best_of_many(
    gains: Sequence[float], base_yield: float, verify_s: Sequence[float], spent_s: float
) -> Best:
    tokens = np.cumsum(np.concatenate(([base_yield], gains)))
    rates = tokens / (spent_s + np.asarray(verify_s[: len(gains) + 1]))
    best = int(rates.argmax())
    return Best(best, float(rates[best]))
