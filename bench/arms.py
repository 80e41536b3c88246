"""The policies a grid compares, by the names its results use, as configuration overrides."""

import re
from collections.abc import Iterable, Sequence

from specserve.policies import POLICIES
from specserve.request import SLO

PLAIN = "none"
DEFAULT_ARMS = (
    PLAIN,
    "fixed_2",
    "fixed_4",
    "threshold",
    "smartspec",
    "adaspec_released",
    "adaspec_repaired",
    "adaptive_verification",
    "specserve",
)
_HAS_ONE_SLO = ("adaspec_released", "adaspec_repaired")


def arm_overrides(arm: str, slos: Iterable[SLO] = ()) -> list[str]:
    """Return the overrides that make a policy.

    Args:
        arm: a name in `POLICIES`, or `fixed_K`.
        slos: of the classes that will be served; policies that know one objective for all requests
            get the tightest TPOT.

    Raises:
        ValueError: unknown name.
    """
    fixed = re.fullmatch(r"fixed_(\d+)", arm)
    if fixed:
        k = int(fixed[1])
        return ["policy.name=fixed", f"policy.num_draft_tokens={k}"]
    if arm not in POLICIES:
        known = ", ".join(["fixed_K", *POLICIES])
        raise ValueError(f"policy is '{arm}': known are {known}")
    overrides = [f"policy.name={arm}"]
    if arm in _HAS_ONE_SLO:
        tightest = min((slo.tpot_s for slo in slos if slo.tpot_s), default=float("inf"))
        overrides.append(f"policy.slo_tpot_s={tightest}")
    return overrides


def check_arms(arms: Sequence[str]) -> None:
    """Refuse unknown names before anything runs.

    Raises:
        ValueError: naming the known ones.
    """
    for arm in arms:
        arm_overrides(arm)
