"""Draft model or prompt lookup: what a row's proposal is worth, before anything is drafted."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from specserve.optimum import best_total
from specserve.predictor.acceptance import Floats, logit, scouted


@dataclass(frozen=True, slots=True)
class Proposals:
    """What both sources would propose for the rows of a step, as far as can be told beforehand.

    Attributes:
        lookup: [num_rows, n], survivals of the rows' lookups, 0 beyond one.
        model: [num_rows, k], of the draft model's tokens as the scout sees them.
        weight: [num_rows], what a token of a row counts for.
    """

    lookup: Floats
    model: Floats
    weight: Floats

    def lookup_is_better(
        self, base_yield: float, verify_s: Floats, forward_s: float
    ) -> NDArray[np.bool_]:
        """Say where the lookup promises more than the draft model.

        Each is worth its tokens beyond a price, which is what the step's own optimum asks of a
        token: the worth of the first one that it leaves out, if every row could have its better
        source. A forward of the draft model costs its time at the rate of that optimum.

        Args:
            base_yield: worth of the tokens that come without drafts.
            verify_s: [more than all tokens], seconds to verify with 0, 1, ... draft tokens.
            forward_s: a row's share of a draft forward.
        """
        lookup, model = self.lookup * self.weight[:, None], self.model * self.weight[:, None]
        pooled = _larger(lookup, model)
        gains = np.sort(pooled[pooled > 0.0])[::-1]
        best = best_total(gains.tolist(), base_yield, verify_s[: len(gains) + 1].tolist(), 0.0)
        price = float(gains[best.num_tokens]) if best.num_tokens < len(gains) else 0.0
        of_lookup = np.maximum(lookup - price, 0.0).sum(axis=1)
        of_model = np.maximum(model - price - best.rate * forward_s, 0.0).sum(axis=1)
        better: NDArray[np.bool_] = of_lookup > of_model
        return better


def scouted_survivals(scout: Floats, caps: NDArray[np.int64]) -> Floats:
    """Return [num_rows, longest], what the scout expects of drafts of the model, 0 beyond a cap.

    Args:
        scout: [SCOUT_COEFFICIENTS, num_rows], curves.
        caps: [num_rows], longest drafts.
    """
    z, survival = np.zeros(len(caps)), np.ones(len(caps))
    survivals = np.zeros((len(caps), int(caps.max(initial=0))))
    for position in range(survivals.shape[1]):
        ahead = scouted(scout, z, position)
        survival = survival * ahead
        survivals[:, position] = np.where(position < caps, survival, 0.0)
        z = logit(ahead)
    return survivals


def _larger(one: Floats, other: Floats) -> Floats:
    """Return the elementwise maximum of two tables with the same rows, 0 where one ends."""
    larger = np.zeros((len(one), max(one.shape[1], other.shape[1])))
    for table in (one, other):
        part = larger[:, : table.shape[1]]
        np.maximum(part, table, out=part)
    return larger
