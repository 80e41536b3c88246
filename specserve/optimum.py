"""The exact optimum of expected tokens per second over how many draft tokens to verify."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


class Best(NamedTuple):
    """The best number of draft tokens, and the token rate it promises."""

    num_tokens: int
    rate: float


def best_total(gains: Floats, base_yield: float, verify_s: Floats, spent_s: float) -> Best:
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
    yields = base_yield + np.concatenate(([0.0], np.cumsum(gains)))
    rates = yields / (spent_s + verify_s[: len(yields)])
    best = int(rates.argmax())
    return Best(best, float(rates[best]))
