"""`python -m build_engines tensorrt_llm`: parses and prints."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from build_engines.tensorrt_llm import build, models, options
from build_engines.tensorrt_llm.plan import script
from build_engines.tensorrt_llm.quantizations import QUANTIZATIONS

Folder = Annotated[Path, typer.Option(file_okay=False)]
OptionalFolder = Annotated[Path | None, typer.Option(file_okay=False)]
DEFAULTS = options.Options()


def one_of(names: tuple[str, ...]) -> str:
    return f"one of {', '.join(names)}"


def tensorrt_llm(
    output: Folder,
    pair: Annotated[str, typer.Option(help="of pairs.toml, such as llama-3.1-8b")] = "",
    target: OptionalFolder = None,
    draft: OptionalFolder = None,
    checkpoints: Annotated[
        Path, typer.Option(file_okay=False, help="has a folder for each id of --pair")
    ] = Path("checkpoints"),
    dtype: Annotated[str, typer.Option(help=one_of(options.DTYPES))] = DEFAULTS.dtype,
    quantization: Annotated[
        str, typer.Option(help=one_of(tuple(QUANTIZATIONS)))
    ] = DEFAULTS.quantization,
    draft_quantization: Annotated[str, typer.Option(help="empty: the target's")] = "",
    kv_cache: Annotated[str, typer.Option(help=one_of(options.KV_CACHES))] = DEFAULTS.kv_cache,
    calibration: Annotated[
        Path | None, typer.Option(help="a folder cnn_dailymail with that data set")
    ] = None,
    tp_size: int = DEFAULTS.tp_size,
    pp_size: int = DEFAULTS.pp_size,
    draft_tp_size: int = DEFAULTS.draft_tp_size,
    max_batch_size: int = DEFAULTS.max_batch_size,
    max_seq_len: Annotated[int, typer.Option(help="0: 8192, or what the models have")] = 0,
    max_num_tokens: Annotated[int, typer.Option(help="0: 8192, or all there can be")] = 0,
    max_draft_len: int = DEFAULTS.max_draft_len,
    tokens_per_block: int = DEFAULTS.tokens_per_block,
    workers: Annotated[int, typer.Option(help="ranks built at once")] = DEFAULTS.workers,
    timing_cache: Annotated[Path | None, typer.Option(dir_okay=False)] = None,
    examples: Annotated[Path, typer.Option(help="of TensorRT-LLM")] = DEFAULTS.examples,
    python: Annotated[str, typer.Option(help="has tensorrt_llm")] = DEFAULTS.python,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="remove older engines")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="print the commands")] = False,
) -> None:
    """Build draft and target with TensorRT-LLM 1.2.1, on NVIDIA GPUs. Not run on hardware yet."""
    if pair and not target and not draft:
        chosen = models.known_models(pair, checkpoints, on_disk=not dry_run)
    elif target and draft and not pair:
        chosen = models.open_models(target, draft)
    else:
        raise ValueError("give --pair, or --target and --draft")
    plans = build.plan_pair(
        chosen,
        options.Options(
            dtype=dtype,
            quantization=quantization,
            draft_quantization=draft_quantization,
            kv_cache=kv_cache,
            tp_size=tp_size,
            pp_size=pp_size,
            draft_tp_size=draft_tp_size,
            max_batch_size=max_batch_size,
            max_seq_len=max_seq_len,
            max_num_tokens=max_num_tokens,
            max_draft_len=max_draft_len,
            tokens_per_block=tokens_per_block,
            workers=workers,
            timing_cache=timing_cache,
            calibration=calibration,
            examples=examples,
            python=python,
        ),
        output,
    )
    if dry_run:
        print(script(plans), end="")
        return
    build.build(plans, overwrite=overwrite)
    print(f"{output}: target and draft fit each other and run")
