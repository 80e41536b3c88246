"""Put a server core together from a configuration."""

import time
from collections.abc import Callable
from dataclasses import replace

from specserve import engines
from specserve.block_manager import BlockManager
from specserve.config import Config, PolicyConfig
from specserve.core import SpecServe
from specserve.engines import DraftEngine, EngineInfo, TargetEngine
from specserve.engines.guarded import GuardedDraftEngine, Keeper
from specserve.pacing import Pacer
from specserve.policies import Policy, make_policy, needs_profile
from specserve.policies.fixed import FixedPolicy
from specserve.predictor.measure import QUICK, Effort, measure
from specserve.predictor.profile import Profile
from specserve.predictor.step_time import StepTimeModel
from specserve.predictor.store import load_or_measure
from specserve.rehearsal import host_s
from specserve.scheduler import Scheduler
from specserve.telemetry import make_telemetry


def assemble(
    config: Config,
    *,
    info: EngineInfo | None = None,
    draft_engine: DraftEngine | None = None,
    target_engine: TargetEngine | None = None,
    draft_keeper: Keeper | None = None,
    policy: Policy | None = None,
    blocks: BlockManager | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> SpecServe:
    """Make scheduler and step; load in this process the engines that are not given.

    Args:
        draft_keeper: what replaces the draft engine when it fails; None is for one of this process.
        policy: None makes the configured one, see `prepare`.
        blocks: of a KV cache that other cores use too; None is for one that has it for itself.

    Raises:
        ValueError: a configuration that cannot work, naming the value, the limit and the fix.
    """
    info = info or engines.describe(config)
    draft = draft_engine or engines.make_draft_engine(config)
    target = target_engine or engines.make_target_engine(config)
    limit = config.scheduler.max_seq_len or info.max_seq_len
    if limit > info.max_seq_len:
        raise ValueError(
            f"scheduler.max_seq_len is {limit}: the engines were built for {info.max_seq_len}"
        )
    blocks = blocks or BlockManager(info.num_blocks, info.block_size)
    first = policy or FixedPolicy(0)
    max_lookup_tokens = config.policy.max_lookup_tokens
    if info.max_draft_tokens is not None:
        max_lookup_tokens = min(max_lookup_tokens, info.max_draft_tokens)
    scheduler = Scheduler(
        replace(config.scheduler, max_seq_len=limit),
        blocks,
        first,
        config.slo,
        config.policy.max_draft_tokens,
        max_lookup_tokens,
    )
    scheduler.admission.supports = info.supports
    scheduler.speculates_sampled = info.verifies_sampled
    retry_s = config.server.draft_retry_s
    guarded = GuardedDraftEngine(draft, info.vocab_size, retry_s, clock, draft_keeper)
    core = SpecServe(scheduler, first, guarded, target, clock)
    core.telemetry = scheduler.admission.telemetry = make_telemetry(config)
    if policy is None:
        prepare(core, config, info)
    return core


def prepare(core: SpecServe, config: Config, info: EngineInfo) -> None:
    """Give a core its configured policy, on a profile of its engines if it needs one.

    The engines must answer: this may measure them, which takes seconds.
    """
    if not needs_profile(config.policy.name):
        core.use(make_policy(config.policy), None)
        return

    def measured(marks: dict[str, str]) -> Profile:
        pair = core.draft_engine.inner, core.target_engine
        return replace(profiled(config, info, *pair, marks), clocks=core.telemetry.clocks)

    profile = load_or_measure(config, measured, core.telemetry.reading)
    step_time = StepTimeModel(profile, core.telemetry)
    core.use(make_policy(config.policy, step_time), Pacer(step_time))


def profiled(
    config: Config,
    info: EngineInfo,
    draft: DraftEngine,
    target: TargetEngine,
    marks: dict[str, str],
    effort: Effort = QUICK,
) -> Profile:
    """Measure a pair that serves nobody, and what a core takes beside it.

    Args:
        marks: the profile's fingerprint.
    """
    profile = measure(draft, target, info, marks, effort)
    quiet = replace(config, telemetry=replace(config.telemetry, source="none"))
    policy = make_policy(PolicyConfig(), StepTimeModel(profile))
    core = assemble(quiet, info=info, draft_engine=draft, target_engine=target, policy=policy)
    return replace(profile, host_s=host_s(core, info.vocab_size))
