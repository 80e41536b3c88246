"""Engines run a model and own its KV; they decide nothing.

Tokens cross this line, tensors do not: ids, lengths and one confidence per draft token. Modules
here share names with packages (`openvino`, `triton`): absolute imports only, imported when chosen.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

from specserve import manifest
from specserve.batch import Batch, Draft, Verified
from specserve.config import Config
from specserve.engines.captured_sizes import captured_sizes
from specserve.request import Request


class EngineLost(RuntimeError):
    """An engine is gone, with all it kept, or gives no answer; the text is for clients."""


LOST = "engine lost: "  # begins the text of an EngineLost where only a text crosses to the caller


class DraftEngine(Protocol):
    """Proposes tokens."""

    def draft(self, batch: Batch) -> list[Draft]:
        """Propose up to `max_draft_tokens` for each row, stopping by the batch's rule.

        Feeds the tokens the draft has not seen first. Returns one draft per row, empty for rows
        that may not draft. Writes KV through the rows' block tables.
        """

    def release(self, keys: Sequence[int]) -> None:
        """Drop what is kept for these requests; unknown keys are ignored."""


class TargetEngine(Protocol):
    """Says what the served model says.

    One that owns its KV cache may compute other tokens than it is given, and then has an attribute
    `num_computed_tokens`: how many the last verification computed, None if it cannot tell.
    """

    def verify(self, batch: Batch, chosen: Sequence[Sequence[int]]) -> list[Verified]:
        """Run base and chosen tokens in one pass; keep the draft prefix the target agrees with.

        Args:
            chosen: draft tokens of each row, possibly none; must be empty where `samples` is False.

        Returns:
            One result per row: num_accepted_tokens + 1 tokens where `samples`, else none. The
            output is distributed as the target's own.
        """

    def release(self, keys: Sequence[int]) -> None:
        """Drop what is kept for these requests; unknown keys are ignored."""


def supports_all(request: Request) -> str | None:
    """Support every request."""
    return None


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """What the orchestrator must know of a pair.

    Attributes:
        captured_sizes: numbers of tokens to which passes are padded, rising; empty for none.
        supports: names what of a request the engine cannot keep, and why; None if it can.
        verifies_sampled: verifying drafts leaves the distribution of sampled requests as it is;
            else only greedy ones are speculated on.
        takes_chunks: a prompt's chunk is computed when it comes; else with the last one.
        max_draft_tokens: what the target can verify of a row at once; None is any number.
    """

    vocab_size: int
    max_seq_len: int
    num_blocks: int
    block_size: int
    captured_sizes: tuple[int, ...] = ()
    supports: Callable[[Request], str | None] = supports_all
    verifies_sampled: bool = True
    takes_chunks: bool = True
    max_draft_tokens: int | None = None


# Name -> module with `make_draft(config)` and `make_target(config)`.
ENGINES = {
    "openvino": "specserve.engines.openvino",
    "tensorrt_llm": "specserve.engines.tensorrt_llm",
    "torch": "specserve.engines.torch",
}


def describe(config: Config) -> EngineInfo:
    """Read the pair's manifests, check that draft and target fit each other, and size the KV cache.

    Loads no framework, so a process that only schedules can call it.

    Raises:
        ValueError: unknown engine, or a pair that does not fit.
    """
    _module_name(config)
    folder = Path(config.engine.dir)
    draft, target = manifest.load(folder / "draft"), manifest.load(folder / "target")
    manifest.check_pair(draft, target)
    if config.engine.name == "tensorrt_llm":
        compiled = import_module("specserve.engines.tensorrt_llm.limits")
        info: EngineInfo = compiled.describe(config, draft, target)
        return info
    if target.engine != config.engine.name:
        raise ValueError(
            f"engine.dir is {folder}, built for {target.engine}: build a pair for "
            f"{config.engine.name} with python -m build_engines pair --engine {config.engine.name},"
            f" set engine.name={target.engine}, or leave engine.dir out for the demo pair"
        )
    block_size = config.engine.block_size
    limits = config.scheduler
    is_captured = config.engine.device == "cuda"
    return EngineInfo(
        vocab_size=target.vocab_size,
        max_seq_len=target.max_seq_len,
        num_blocks=limits.kv_cache_tokens // block_size,
        block_size=block_size,
        captured_sizes=captured_sizes(limits.max_num_batched_tokens) if is_captured else (),
    )


def make_draft_engine(config: Config) -> DraftEngine:
    """Load the draft model on the configured engine."""
    make: Callable[[Config], DraftEngine] = _module(config).make_draft
    return make(config)


def make_target_engine(config: Config) -> TargetEngine:
    """Load the target model on the configured engine."""
    make: Callable[[Config], TargetEngine] = _module(config).make_target
    return make(config)


def _module(config: Config) -> Any:
    return import_module(_module_name(config))


def _module_name(config: Config) -> str:
    name = config.engine.name
    if name not in ENGINES:
        raise ValueError(f"engine.name is '{name}': known are {', '.join(ENGINES)}")
    return ENGINES[name]
