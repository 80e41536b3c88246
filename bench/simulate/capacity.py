"""The highest request rate at which enough requests meet their objectives."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import numpy as np

NUM_FIRST = 6  # rates over the whole range, for the picture and to find where to look closer
PRECISION = 0.02  # of the answer


class Probe(Protocol):
    """What came of one rate."""

    @property
    def rate_rps(self) -> float: ...
    @property
    def attainment(self) -> float: ...


P = TypeVar("P", bound=Probe)


@dataclass(frozen=True, slots=True)
class Capacity(Generic[P]):
    """An answer.

    Attributes:
        probes: of every rate that was tried, low ones first.
        best: at the highest rate that is met, as are all lower ones that were tried; None if the
            lowest is not.
        is_at_least: the whole range is met.
    """

    probes: list[P]
    best: P | None
    is_at_least: bool


def find_capacity(
    measure: Callable[[float], P], low_rps: float, high_rps: float, attainment: float
) -> Capacity[P]:
    """Try rates over a range, then halve the interval in which the objective is lost.

    Attainment falls with the rate but for chance: the first loss counts.

    Args:
        attainment: the share of requests that must meet their objectives.
    """
    probes = [measure(float(rate)) for rate in np.geomspace(low_rps, high_rps, NUM_FIRST)]
    lost = next((i for i, p in enumerate(probes) if p.attainment < attainment), None)
    if lost is None:
        return Capacity(probes, probes[-1], is_at_least=True)
    if lost == 0:
        return Capacity(probes, None, is_at_least=False)
    best, above = probes[lost - 1], probes[lost]
    while above.rate_rps > best.rate_rps * (1.0 + PRECISION):
        middle = measure((best.rate_rps * above.rate_rps) ** 0.5)
        probes.append(middle)
        if middle.attainment < attainment:
            above = middle
        else:
            best = middle
    return Capacity(sorted(probes, key=lambda p: p.rate_rps), best, is_at_least=False)
