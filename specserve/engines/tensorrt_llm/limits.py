"""What a compiled pair allows, against what the configuration asks for. Imports no engine."""

from pathlib import Path

from specserve.config import Config
from specserve.engines import EngineInfo
from specserve.engines.tensorrt_llm.supports import make_supports
from specserve.manifest import Compiled, Manifest, load

MODES = ("leader", "orchestrator")
DRAFT_STOPS = ("auto", "step", "plan")


def describe(config: Config, draft: Manifest, target: Manifest) -> EngineInfo:
    """Check a pair against the configuration. See `specserve.engines.describe`.

    Raises:
        ValueError: naming the value, the limit and the fix.
    """
    drafts, verifies = compiled(draft, config), compiled(target, config)
    _check(config, drafts, verifies)
    return EngineInfo(
        vocab_size=target.vocab_size,
        max_seq_len=max_seq_len(config, draft, target),
        num_blocks=config.scheduler.kv_cache_tokens // verifies.tokens_per_block,
        block_size=verifies.tokens_per_block,
        supports=make_supports(config.tensorrt_llm.prompt_ignore_length),
        verifies_sampled=False,
        takes_chunks=config.tensorrt_llm.sends_chunks,
        max_draft_tokens=verifies.max_draft_len,
    )


def load_role(config: Config, role: str) -> tuple[Path, Manifest, Compiled]:
    """Return the folder of `draft` or `target`, its manifest, and what it was compiled for."""
    folder = Path(config.engine.dir) / role
    manifest = load(folder)
    return folder, manifest, compiled(manifest, config)


def compiled(manifest: Manifest, config: Config) -> Compiled:
    """Return what an engine was compiled for.

    Raises:
        ValueError: if it was built for another engine.
    """
    if manifest.compiled is None:
        raise ValueError(
            f"engine.dir is {config.engine.dir}, built for {manifest.engine}: build a pair with "
            "python -m build_engines tensorrt_llm"
        )
    return manifest.compiled


def max_seq_len(config: Config, draft: Manifest, target: Manifest) -> int:
    """Return how many tokens a request may come to, so that no call exceeds an engine.

    The last call's input is all tokens but one, draft included; its output is counted before it is
    known how much of the draft is accepted, and would be cut beyond the engine's own length.
    """
    policy, verifies = config.policy, compiled(target, config)
    longest = max(policy.max_draft_tokens, min(policy.max_lookup_tokens, verifies.max_draft_len))
    limit = min(draft.max_seq_len, target.max_seq_len) - longest
    for manifest in (draft, target):
        engine = compiled(manifest, config)
        limit = min(limit, engine.max_input_len + 1)
        if not config.tensorrt_llm.chunked_context:
            limit = min(limit, engine.max_num_tokens + 1)
    return limit


def stops_by_step(config: Config, draft: Compiled) -> bool:
    """Say whether a draft's tokens can be looked at while it is made.

    Python is called back on the rank that computes, and knows the stop rule in this process only.
    """
    is_local = draft.world_size == 1 and config.tensorrt_llm.mode == "leader"
    return is_local and config.tensorrt_llm.draft_stop != "plan"


def _check(config: Config, draft: Compiled, target: Compiled) -> None:
    limits, options = config.scheduler, config.tensorrt_llm
    longest = config.policy.max_draft_tokens
    if longest > target.max_draft_len:
        raise ValueError(
            f"policy.max_draft_tokens is {longest}: the target was built for drafts of "
            f"{target.max_draft_len}; lower it, or build with --max-draft-len {longest}"
        )
    smallest = min(draft.max_batch_size, target.max_batch_size)
    if limits.max_num_seqs > smallest:
        raise ValueError(
            f"scheduler.max_num_seqs is {limits.max_num_seqs}: the engines were built for "
            f"{smallest} sequences at once; lower it, or build with a larger max_batch_size"
        )
    _check_choice("mode", options.mode, MODES)
    _check_choice("draft_stop", options.draft_stop, DRAFT_STOPS)
    if options.draft_stop == "step" and not stops_by_step(config, draft):
        raise ValueError(
            "tensorrt_llm.draft_stop is 'step': it needs a draft on one GPU in mode leader; "
            "set it to 'auto' or 'plan'"
        )
    for role, engine in (("draft", draft), ("target", target)):
        devices = getattr(options, f"{role}_devices")
        if len(devices) not in (0, engine.world_size):
            raise ValueError(
                f"tensorrt_llm.{role}_devices names {len(devices)} GPUs: the {role} was built for "
                f"{engine.world_size}; name as many, or none for the first ones"
            )


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"tensorrt_llm.{name} is '{value}': known are {', '.join(choices)}")
