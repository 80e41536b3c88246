"""Owed tokens first, then yield: how objectives change which draft tokens are verified."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from specserve.batch import Row

Floats = NDArray[np.float64]

MIN_SURVIVAL = 0.05  # a token less likely than this helps no promise
TOLERANCE = 0.02  # tokens of debt that a better token rate may cost


def deficits(rows: Sequence[Row], step_s: float) -> Floats:
    """Return the tokens each row will miss at the end of a step of `step_s` with one token.

    owed at the end = owed now + T / tpot; a plain step pays one of it. At most 0 is on schedule.
    """
    return np.array(
        [-np.inf if r.tpot_s is None else r.owed_tokens + step_s / r.tpot_s - 1.0 for r in rows]
    )


def owed_first(survival: Floats, order: NDArray[np.int64], deficit: Floats) -> NDArray[np.int64]:
    """Move the tokens that late rows need to the front, the latest row's first.

    Args:
        survival: [num_rows, longest draft].
        order: [n], flat indices into `survival`, by falling survival; prefix-closed.
        deficit: [num_rows].

    Returns:
        The same indices; still prefix-closed at every length.
    """
    width = survival.shape[1]
    needed: list[int] = []
    for i in np.argsort(-deficit, kind="stable"):
        if deficit[i] <= 0.0:
            break
        paid = np.cumsum(survival[i])
        count = int(np.searchsorted(paid, deficit[i])) + 1
        count = min(count, int((survival[i] >= MIN_SURVIVAL).sum()))
        needed += range(i * width, i * width + count)
    rest = order[~np.isin(order, needed)]
    return np.concatenate((np.array(needed, dtype=np.int64), rest))


def least_debt(
    rows: Sequence[Row], survival: Floats, order: NDArray[np.int64], step_s: Floats
) -> NDArray[np.bool_]:
    """Say which totals leave the rows with as little debt as any total can.

    A longer step owes every row more, so verifying more is not always paying more. Steps of
    different lengths are compared at one time, the end of a plain one, each by its rate; else a
    row that is hopelessly late would be best off with the shortest step, and never catch up.

    Args:
        order: [n], as verified.
        step_s: [n + 1], seconds of the whole step by total.

    Returns:
        [n + 1].
    """
    debt = np.zeros(len(order) + 1)
    horizon_s = float(step_s[0])
    row_of = order // survival.shape[1]
    gains = survival.ravel()[order]
    for i, row in enumerate(rows):
        if row.tpot_s is not None:
            paid = 1.0 + np.concatenate(([0.0], np.cumsum(np.where(row_of == i, gains, 0.0))))
            owed = row.owed_tokens + horizon_s / row.tpot_s
            debt += np.maximum(0.0, owed - paid * (horizon_s / step_s))
    allowed: NDArray[np.bool_] = debt <= debt.min() + TOLERANCE
    return allowed
