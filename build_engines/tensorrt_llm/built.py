"""The engine folder after `trtllm-build`: is it what was asked for, and its manifest.

The builder turns features off with no more than a warning (paged context FMHA with an fp8 KV cache
before Ada, say), and without them serving would be wrong or slow; so its config.json is read back.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from build_engines.checkpoint import TOKENIZER_FILE, sha256
from build_engines.tensorrt_llm.plan import EnginePlan
from build_engines.tensorrt_llm.toolchain import VERSION
from specserve import manifest as manifests
from specserve.manifest import Manifest, Source

CONFIG_FILE = "config.json"
OPTIONAL_FILES = ("tokenizer_config.json", "generation_config.json")


def check_built(plan: EnginePlan) -> None:
    """Compare an engine's config.json with its plan, and look for its files.

    Raises:
        ValueError: naming the first value that is another, or a file that is missing.
    """
    path = plan.output / CONFIG_FILE
    if not path.is_file():
        raise ValueError(f"{plan.output} has no {CONFIG_FILE}: trtllm-build wrote no engine")
    config = json.loads(path.read_text(encoding="utf-8"))
    for key, expected in _expected(plan).items():
        found = _lookup(config, key)
        if found != expected:
            raise ValueError(
                f"{path}: {key} is {found!r}, must be {expected!r}: read trtllm-build's warnings"
            )
    for name in engine_files(plan):
        if not (plan.output / name).is_file():
            raise ValueError(f"{plan.output} has no {name}: one belongs to each rank")


def finish(plan: EnginePlan, tokenizer_dir: Path, versions: Mapping[str, str]) -> Manifest:
    """Put the tokenizer beside the engine, and the manifest last.

    Args:
        tokenizer_dir: the target's checkpoint, for both: tokens were found equal, files may not be.
        versions: of what built the engine.
    """
    shutil.copyfile(tokenizer_dir / TOKENIZER_FILE, plan.output / TOKENIZER_FILE)
    checkpoint = plan.model.checkpoint
    optional = [name for name in OPTIONAL_FILES if (checkpoint.path / name).is_file()]
    for name in optional:
        shutil.copyfile(checkpoint.path / name, plan.output / name)
    manifest = Manifest(
        engine="tensorrt_llm",
        precision=plan.precision,
        vocab_size=plan.model.num_tokens,
        tokenizer_sha256=sha256(plan.output / TOKENIZER_FILE),
        max_seq_len=plan.max_seq_len,
        num_parameters=checkpoint.num_parameters,
        num_layers=checkpoint.num_layers,
        num_kv_heads=checkpoint.num_kv_heads,
        head_dim=checkpoint.head_dim,
        hidden_size=checkpoint.hidden_size,
        source=Source(plan.model.name, checkpoint.weights_sha256),
        builder=versions,
        files=(*engine_files(plan), CONFIG_FILE, TOKENIZER_FILE, *optional),
        compiled=plan.compiled,
    )
    manifests.save(manifest, plan.output)
    return manifest


def engine_files(plan: EnginePlan) -> list[str]:
    """Name the serialized engines, one for each rank."""
    return [f"rank{rank}.engine" for rank in range(plan.compiled.world_size)]


def _expected(plan: EnginePlan) -> dict[str, Any]:
    it = plan.compiled
    return {
        "version": VERSION,
        "pretrained_config.mapping.tp_size": it.tp_size,
        "pretrained_config.mapping.pp_size": it.pp_size,
        "build_config.kv_cache_type": "PAGED",
        "build_config.max_batch_size": it.max_batch_size,
        "build_config.max_input_len": it.max_input_len,
        "build_config.max_seq_len": plan.max_seq_len + it.max_draft_len,  # the builder adds it
        "build_config.max_num_tokens": it.max_num_tokens,
        "build_config.max_draft_len": it.max_draft_len,
        "build_config.plugin_config.use_paged_context_fmha": True,
        "build_config.plugin_config.tokens_per_block": it.tokens_per_block,
    }


def _lookup(config: Any, key: str) -> Any:
    for part in key.split("."):
        config = config.get(part) if isinstance(config, dict) else None
    return config
