"""Windows replayed by a server core in this process, on real engines or simulated ones.

The very scheduler, policies and step that serve.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from bench.core_replay import Clock, WallClock, replay
from bench.outcome import Run
from bench.step_recorder import StepRecorder
from bench.workloads.plan import Plan
from specserve import engines
from specserve.assemble import assemble, profiled
from specserve.config import Config, load_config
from specserve.core import SpecServe
from specserve.engines import DraftEngine, EngineInfo, TargetEngine
from specserve.engines.simulated import (
    AcceptanceProcess,
    RecordedAcceptance,
    SimulatedPair,
    VirtualClock,
)
from specserve.pacing import Pacer
from specserve.policies import make_policy, needs_profile
from specserve.predictor.profile import Profile
from specserve.predictor.step_time import StepTimeModel
from specserve.predictor.store import load_or_measure

WARM_UP_KEY = 1_000_000
SIMULATED_VOCAB_SIZE = 4096


@dataclass(frozen=True, slots=True)
class Device:
    """A pair of engines and the clock they run by.

    Attributes:
        host_s: what a step takes beside them, of which the clock knows nothing.
    """

    draft: DraftEngine
    target: TargetEngine
    clock: Clock
    host_s: float = 0.0


class InProcess:
    """Replays windows on fresh cores. See `bench.grid.Runner`.

    Args:
        overrides: `section.key=value` of every core.
        device_for: makes the device of a window from its seed.
        profile: what policies predict step times from.
    """

    def __init__(
        self,
        overrides: Sequence[str],
        info: EngineInfo,
        profile: Profile,
        device_for: Callable[[int], Device],
    ) -> None:
        self._overrides = overrides
        self._info = info
        self.profile = profile
        self._device_for = device_for

    def run(self, overrides: Sequence[str], warm_up: Plan | None, plan: Plan) -> Run:
        """Make a core, warm it up, replay the plan."""
        config = load_config(None, [*self._overrides, *overrides])
        device = self._device_for(plan.info.seed)
        core, recorder = self._core(config, device)
        source = config.policy.draft_source
        if warm_up is not None:
            replay(
                core, warm_up.requests, device.clock, source,
                first_key=WARM_UP_KEY, host_s=device.host_s,
            )  # fmt: skip
        start_s = recorder.restart()
        outcomes = replay(core, plan.requests, device.clock, source, start_s, host_s=device.host_s)
        return Run(outcomes, recorder.steps)

    def _core(self, config: Config, device: Device) -> tuple[SpecServe, StepRecorder]:
        step_time = StepTimeModel(self.profile)
        recorder = StepRecorder(make_policy(config.policy, step_time), device.clock)
        core = assemble(
            config,
            info=self._info,
            draft_engine=device.draft,
            target_engine=device.target,
            policy=recorder,
            clock=device.clock,
        )
        paces = needs_profile(config.policy.name)  # as `specserve.assemble.prepare` has it
        core.use(recorder, Pacer(step_time) if paces else None)
        return core, recorder


def on_engines(overrides: Sequence[str]) -> InProcess:
    """Load the configured engines, to be shared by all cores; measure them if nobody has."""
    config = load_config(None, overrides)
    info = engines.describe(config)
    draft, target = engines.make_draft_engine(config), engines.make_target_engine(config)
    profile = load_or_measure(config, lambda marks: profiled(config, info, draft, target, marks))
    device = Device(draft, target, WallClock())
    return InProcess(overrides, info, profile, lambda _: device)


def simulated(overrides: Sequence[str], profile_path: Path, recording: Path) -> InProcess:
    """Simulate a pair that takes the profile's times and accepts as recorded."""
    overrides = ["policy.draft_source=model", *overrides]  # there are no texts to look up
    return on_profile(
        overrides, Profile.load(profile_path), partial(RecordedAcceptance.load, recording)
    )


Slowness = Callable[[float, float], float]  # of a moment and the profile's time of a call


class _SlowedClock(VirtualClock):
    """Advances another clock by more than it is told."""

    def __init__(self, clock: VirtualClock, slowness: Slowness) -> None:
        super().__init__()
        self._clock = clock
        self._slowness = slowness

    def advance(self, seconds: float) -> None:
        """Let as many times the seconds pass as the machine is slow now."""
        self._clock.advance(seconds * self._slowness(self._clock(), seconds))


def on_profile(
    overrides: Sequence[str],
    profile: Profile,
    process_for: Callable[[int], AcceptanceProcess],
    slowness: Slowness | None = None,
) -> InProcess:
    """Simulate a pair on a profile; the overrides must leave drafting to the draft model.

    Args:
        process_for: makes what is accepted in a window from its seed.
        slowness: by seconds since the start of a run, how many times the profile's time a call
            takes; None is a machine as fast as when it was profiled.
    """
    config = load_config(None, overrides)
    truth = StepTimeModel(profile)

    def device_for(seed: int) -> Device:
        clock = VirtualClock()
        engine_clock = _SlowedClock(clock, slowness) if slowness else clock
        pair = SimulatedPair(truth, engine_clock, process_for(seed))
        return Device(pair, pair, clock, truth.host_s)

    return InProcess(overrides, simulated_info(config), profile, device_for)


def simulated_info(config: Config) -> EngineInfo:
    """Describe a simulated pair, which takes whatever the scheduler is configured for."""
    block_size = config.engine.block_size
    return EngineInfo(
        vocab_size=SIMULATED_VOCAB_SIZE,
        max_seq_len=config.scheduler.max_seq_len or config.scheduler.kv_cache_tokens,
        num_blocks=config.scheduler.kv_cache_tokens // block_size,
        block_size=block_size,
    )
