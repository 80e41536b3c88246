"""The exact optimum of expected tokens per second over how many draft tokens to verify."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

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


def _best_of_many(
    gains: Sequence[float], base_yield: float, verify_s: Sequence[float], spent_s: float
) -> Best:
    tokens = np.cumsum(np.concatenate(([base_yield], gains)))
    rates = tokens / (spent_s + np.asarray(verify_s[: len(gains) + 1]))
    best = int(rates.argmax())
    return Best(best, float(rates[best]))
