"""Put a server core together from a configuration."""

import time
from collections.abc import Callable
from dataclasses import replace

from specserve import engines
from specserve.block_manager import BlockManager
from specserve.config import Config
from specserve.core import SpecServe
from specserve.engines import DraftEngine, EngineInfo, TargetEngine
from specserve.engines.guarded import GuardedDraftEngine
from specserve.policies import make_policy
from specserve.predictor.step_time import StepTimeModel
from specserve.scheduler import Scheduler


def assemble(
    config: Config,
    *,
    info: EngineInfo | None = None,
    draft_engine: DraftEngine | None = None,
    target_engine: TargetEngine | None = None,
    step_time: StepTimeModel | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> SpecServe:
    """Make scheduler, policy and step; load in this process the engines that are not given.

    Raises:
        ValueError: a configuration that cannot work, naming the value, the limit and the fix.
    """
    info = info or engines.describe(config)
    limit = config.scheduler.max_seq_len or info.max_seq_len
    if limit > info.max_seq_len:
        raise ValueError(
            f"scheduler.max_seq_len is {limit}: the engines were built for {info.max_seq_len}"
        )
    policy = make_policy(config.policy, step_time)
    scheduler = Scheduler(
        replace(config.scheduler, max_seq_len=limit),
        BlockManager(info.num_blocks, info.block_size),
        policy,
    )
    draft = GuardedDraftEngine(
        draft_engine or engines.make_draft_engine(config), config.server.draft_retry_s, clock
    )
    target = target_engine or engines.make_target_engine(config)
    return SpecServe(scheduler, policy, draft, target, clock)
