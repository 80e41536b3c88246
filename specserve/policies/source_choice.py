"""Draft model or prompt lookup: what a row's proposal is worth, before anything is drafted."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from specserve.predictor.acceptance import Floats, logit, scouted


@dataclass(frozen=True, slots=True)
class Prices:
    """What time is worth in a step, in expected tokens.

    Attributes:
        token: of verifying one more token.
        forward: of one row's share in a draft forward.
    """

    token: float
    forward: float


def lookup_worth(survival: Floats, prices: Prices) -> Floats:
    """Return the expected tokens of each row's lookup beyond what verifying them costs.

    Args:
        survival: [num_rows, longest], 0 beyond a lookup.
    """
    worth: Floats = np.maximum(survival - prices.token, 0.0).sum(axis=1)
    return worth


def model_worth(scout: Floats, caps: NDArray[np.int64], prices: Prices) -> Floats:
    """Return the same of what the draft model would propose, forwards paid, as the scout sees it.

    Args:
        scout: [SCOUT_COEFFICIENTS, num_rows], curves.
        caps: [num_rows], longest drafts.
    """
    z, survival, worth = np.zeros(len(caps)), np.ones(len(caps)), np.zeros(len(caps))
    for position in range(int(caps.max(initial=0))):
        ahead = scouted(scout, z, position)
        survival = survival * ahead
        gain = survival - prices.token - prices.forward
        worth += np.where(position < caps, np.maximum(gain, 0.0), 0.0)
        if not (gain > 0.0).any():
            break
        z = logit(ahead)
    return worth
