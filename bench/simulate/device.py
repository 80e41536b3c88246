"""A profile as a pair of engines: its step times, an acceptance process, a virtual clock."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bench.in_process import Device, InProcess, simulated_info
from bench.simulate.options import SimulateOptions
from specserve.batch import Batch, Verified
from specserve.config import Config
from specserve.engines import TargetEngine
from specserve.engines.parametric_acceptance import ParametricAcceptance
from specserve.engines.simulated import (
    AcceptanceProcess,
    RecordedAcceptance,
    SimulatedPair,
    VirtualClock,
)
from specserve.predictor.profile import Profile
from specserve.predictor.step_time import StepTimeModel

MakeAcceptance = Callable[[int], AcceptanceProcess]  # of a seed


@dataclass(frozen=True, slots=True)
class TargetWithOverhead:
    """A target engine at the end of a transport: every call takes longer.

    Policies see it, and learn it, as part of the call, as they do with BLS.
    """

    inner: TargetEngine
    clock: VirtualClock
    overhead_s: float

    def verify(self, batch: Batch, chosen: Sequence[Sequence[int]]) -> list[Verified]:
        """See `TargetEngine`."""
        self.clock.advance(self.overhead_s)
        return self.inner.verify(batch, chosen)

    def release(self, keys: Sequence[int]) -> None:
        """See `TargetEngine`."""
        self.inner.release(keys)


def make_acceptance(options: SimulateOptions, max_draft_tokens: int) -> tuple[MakeAcceptance, str]:
    """Return what makes the acceptance process of a seed, and what to call it.

    Raises:
        ValueError: a mean out of range, a file that is not a recording, or one whose drafts are
            shorter than the policy's may be.
    """
    try:
        mean = float(options.acceptance)
    except ValueError:
        return _recorded(Path(options.acceptance), max_draft_tokens)

    def make(seed: int) -> AcceptanceProcess:
        return ParametricAcceptance(
            mean,
            options.correlation,
            options.confidence_noise,
            max_draft_tokens=max_draft_tokens,
            seed=seed,
        )

    make(options.seed)  # refuses what cannot be before anything runs
    return make, (
        f"{mean:g} of the draft tokens accepted, correlation {options.correlation:g}, confidence "
        f"noise {options.confidence_noise:g}"
    )


def make_runner(
    config: Config,
    overrides: Sequence[str],
    profile: Profile,
    acceptance: MakeAcceptance,
    overhead_s: float,
) -> InProcess:
    """Return what replays windows on the profile; `overrides` are those behind `config`."""
    truth = StepTimeModel(profile)

    def device_for(seed: int) -> Device:
        clock = VirtualClock()
        pair = SimulatedPair(truth, clock, acceptance(seed))
        target = TargetWithOverhead(pair, clock, overhead_s)
        return Device(pair, target, clock, truth.host_s)

    return InProcess(overrides, simulated_info(config), profile, device_for)


def _recorded(path: Path, max_draft_tokens: int) -> tuple[MakeAcceptance, str]:
    try:
        with np.load(path) as arrays:
            confidences, num_accepted = arrays["confidences"], arrays["num_accepted"]
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"acceptance '{path}' is neither a number nor a recording (`python -m "
            f"bench.record_acceptance` makes one): {error}"
        ) from error
    if confidences.shape[2] < max_draft_tokens:
        raise ValueError(
            f"policy.max_draft_tokens is {max_draft_tokens}: {path.name} has drafts of "
            f"{confidences.shape[2]}, set that or less, or give a mean acceptance"
        )
    first = float((num_accepted >= 1).mean())
    name = f"acceptance as recorded in {path.name}, {first:.0%} of first draft tokens"
    return lambda seed: RecordedAcceptance(confidences, num_accepted, seed), name
