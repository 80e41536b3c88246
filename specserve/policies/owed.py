"""What a token is worth to each row: more to one that would end the step behind its schedule."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from specserve.batch import Row

Floats = NDArray[np.float64]

NEVER = float("-inf")
MAX_OWED = 2.0  # tokens beyond which a row is no more urgent; it may be late beyond hope


def deficits(rows: Sequence[Row], step_s: float) -> Floats:
    """Return the tokens each row will miss at the end of a step of `step_s` with one token.

    owed at the end = owed now + T / tpot; a plain step pays one of it. At most 0 is on schedule.
    """
    return np.array(
        [NEVER if r.tpot_s is None else r.owed_tokens + step_s / r.tpot_s - 1.0 for r in rows]
    )


def worths(deficit: Floats) -> Floats:
    """Return what a token of each row counts for, 1 to 1 + MAX_OWED.

    Worth over time is maximised, so that a row behind comes before others, but not for whatever it
    costs them. Paying debts first and looking at the rate only then was worse for all: on the
    simulated Azure conversations at 0.6 and 0.9 of plain decoding's capacity mean latency was 24
    and 30 % higher, attainment 2 and 7 points lower.
    """
    worth: Floats = 1.0 + np.minimum(np.maximum(deficit, 0.0), MAX_OWED)
    return worth
