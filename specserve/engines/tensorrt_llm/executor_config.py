"""The executor's configuration, from ours."""

from collections.abc import Callable
from typing import Any

from specserve.config import Config
from specserve.manifest import Compiled

NUM_STATS = 1000  # iterations kept until somebody asks for them


def make_executor_config(
    api: Any,
    config: Config,
    role: str,
    compiled: Compiled,
    post_processor: Callable[..., None] | None = None,
) -> Any:
    """Make an `ExecutorConfig` for `draft` or `target`.

    The two share a GPU, where a fraction of what is free would depend on who comes first: both get
    a number of tokens. Log-probabilities are not normalised, else those of top-k = 1 are all 0.

    Args:
        post_processor: of the logits of each pass.
    """
    processor = None
    if post_processor is not None:
        processor = api.LogitsPostProcessorConfig(processor_batched=post_processor)
    return api.ExecutorConfig(
        max_beam_width=1,
        scheduler_config=api.SchedulerConfig(
            capacity_scheduler_policy=api.CapacitySchedulerPolicy.GUARANTEED_NO_EVICT
        ),
        kv_cache_config=api.KvCacheConfig(
            enable_block_reuse=True,
            max_tokens=_kv_cache_tokens(config, compiled),
            enable_partial_reuse=True,
        ),
        enable_chunked_context=config.tensorrt_llm.chunked_context,
        normalize_log_probs=False,
        iter_stats_max_iterations=NUM_STATS if role == "target" else 0,
        batching_type=api.BatchingType.INFLIGHT,
        max_batch_size=compiled.max_batch_size,
        max_num_tokens=compiled.max_num_tokens,
        parallel_config=_parallel_config(api, config, role, compiled),
        logits_post_processor_config=processor,
    )


def _kv_cache_tokens(config: Config, compiled: Compiled) -> int:
    """Return what the scheduler counts on, and a block for each row: its answer is reserved too."""
    limits, block_size = config.scheduler, compiled.tokens_per_block
    return (limits.kv_cache_tokens // block_size + limits.max_num_seqs) * block_size


def _parallel_config(api: Any, config: Config, role: str, compiled: Compiled) -> Any:
    """Return the ranks' configuration; None for a single one on the first GPU."""
    options = config.tensorrt_llm
    devices = options.draft_devices if role == "draft" else options.target_devices
    if options.mode == "orchestrator":
        return api.ParallelConfig(
            communication_type=api.CommunicationType.MPI,
            communication_mode=api.CommunicationMode.ORCHESTRATOR,
            device_ids=list(devices) or None,
            orchestrator_config=api.OrchestratorConfig(
                is_orchestrator=True, worker_executable_path=options.worker
            ),
        )
    if compiled.world_size == 1 and not devices:
        return None
    return api.ParallelConfig(
        communication_type=api.CommunicationType.MPI,
        communication_mode=api.CommunicationMode.LEADER,
        device_ids=list(devices) or None,
    )
