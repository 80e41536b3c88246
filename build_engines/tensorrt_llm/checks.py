"""What is checked before the long build starts: what would fail, or be of no use, hours later.

Each error names the value, the limit and the fix.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from build_engines.tensorrt_llm.families import family_of
from build_engines.tensorrt_llm.models import Model
from build_engines.tensorrt_llm.plan import EnginePlan
from build_engines.tensorrt_llm.quantizations import AWQ_GROUP


def check_plans(plans: Sequence[EnginePlan]) -> None:
    """Check each engine, and that the two fit each other.

    Args:
        plans: the draft's and the target's.

    Raises:
        ValueError: on the first thing that does not fit.
    """
    draft, target = plans
    for plan in plans:
        check_support(plan)
        check_ranks(plan)
        check_lengths(plan)
    check_vocabularies(draft.model, target.model)


def check_support(plan: EnginePlan) -> None:
    """Check what upstream can do with this architecture."""
    checkpoint, quantization = plan.model.checkpoint, plan.compiled.quantization
    family = family_of(checkpoint)
    if quantization not in family.quantizations:
        raise ValueError(
            f"{plan.role} quantization is {quantization}, must be one of "
            f"{', '.join(family.quantizations)} for {checkpoint.config['architectures'][0]}"
        )
    if plan.compiled.pp_size > 1 and not family.has_pipeline:
        raise ValueError(
            f"{plan.role} pp_size is {plan.compiled.pp_size}, must be 1 for "
            f"{checkpoint.config['architectures'][0]}: raise --tp-size instead"
        )
    if method := (checkpoint.config.get("quantization_config") or {}).get("quant_method"):
        raise ValueError(
            f"{plan.role} {plan.model.name} is quantized already, by {method}: "
            "give the checkpoint that it was made from"
        )
    if plan.compiled.kv_cache == "fp8" and quantization != "fp8":
        raise ValueError(
            f"{plan.role} KV cache is fp8 and its quantization {quantization}: TensorRT-LLM turns "
            "paged context FMHA off with that, and without it no KV block is reused; "
            "choose --kv-cache auto, or fp8 for the weights too"
        )
    if plan.quantization.is_calibrated and plan.options.calibration is None:
        raise ValueError(
            f"{plan.role} quantization {quantization} is calibrated: give --calibration DIR, a "
            "copy of the data set cnn_dailymail in a folder of that name"
        )


def check_ranks(plan: EnginePlan) -> None:
    """Check that the model can be divided among the ranks."""
    checkpoint, tp, pp = plan.model.checkpoint, plan.compiled.tp_size, plan.compiled.pp_size
    parts = {
        "attention heads": checkpoint.num_heads,
        "KV heads": checkpoint.num_kv_heads,
        "rows of intermediate_size": checkpoint.ffn_size,
    }
    for what, count in parts.items():
        if count % tp:
            raise ValueError(
                f"{plan.role} tp_size is {tp}, must divide the {count} {what} of "
                f"{plan.model.name}: choose one of {_divisors(*parts.values())}"
            )
    if checkpoint.num_layers % pp:
        raise ValueError(
            f"{plan.role} pp_size is {pp}, must divide the {checkpoint.num_layers} layers of "
            f"{plan.model.name}: choose one of {_divisors(checkpoint.num_layers)}"
        )
    if plan.compiled.quantization == "int4_awq":
        _check_groups(plan)


def check_lengths(plan: EnginePlan) -> None:
    """Check the lengths and budgets, which both engines share, against this model."""
    most, window = plan.model.checkpoint.max_seq_len, plan.model.attention_window
    if plan.max_seq_len > most:
        raise ValueError(
            f"--max-seq-len is {plan.max_seq_len}, and the {plan.role} {plan.model.name} has "
            f"{most} positions: choose {most} or less"
        )
    if window and plan.max_seq_len > window:
        raise ValueError(
            f"--max-seq-len is {plan.max_seq_len}, and the {plan.role} {plan.model.name} attends "
            f"to the last {window} tokens: blocks are reused up to there, choose {window} or less"
        )
    it = plan.compiled
    if it.max_num_tokens > it.max_batch_size * plan.max_seq_len:
        raise ValueError(
            f"--max-num-tokens is {it.max_num_tokens}, more than {it.max_batch_size} sequences of "
            f"{plan.max_seq_len} tokens have: choose {it.max_batch_size * plan.max_seq_len} or less"
        )


def check_vocabularies(draft: Model, target: Model) -> None:
    """Check that a token id means the same text for both.

    Rows of the embedding may differ: models of one tokenizer are padded to different numbers of
    rows (Qwen2.5-32B 152064, 0.5B 151936, both of 151665 tokens). No logits pass between the two,
    and an id above the tokenizer's has no text, so its tokens are what must be equal.
    """
    for role, model in (("draft", draft), ("target", target)):
        rows = model.checkpoint.vocab_size
        if model.num_tokens > rows:
            raise ValueError(
                f"{role} {model.name} has a tokenizer of {model.num_tokens} tokens and a "
                f"vocab_size of {rows}: resize its embedding, or remove the tokens that were added"
            )
    if draft.tokens is not None and target.tokens is not None:
        _check_tokens(draft.tokens, target.tokens, draft)
    elif draft.num_tokens != target.num_tokens:
        raise ValueError(
            f"draft {draft.name} has a tokenizer of {draft.num_tokens} tokens, the target's has "
            f"{target.num_tokens}: choose a draft with the target's tokenizer"
        )


def check_folders(plans: Sequence[EnginePlan], *, overwrite: bool) -> None:
    """Check what is read from and written to."""
    for plan in plans:
        if plan.output.is_file():
            raise ValueError(f"{plan.output} is a file: choose another output")
        if plan.output.is_dir() and any(plan.output.iterdir()) and not overwrite:
            raise ValueError(
                f"{plan.output} is not empty: choose another output, or add --overwrite"
            )
        _check_calibration(plan.options.calibration)


def _check_calibration(folder: Path | None) -> None:
    if folder is not None and not folder.is_dir():
        raise ValueError(f"--calibration is {folder}, which is no folder: give the data set's")


def _check_groups(plan: EnginePlan) -> None:
    """AWQ scales groups of inputs; a rank's share of each matrix must hold whole groups."""
    checkpoint, tp = plan.model.checkpoint, plan.compiled.tp_size
    inputs = {
        "hidden_size": checkpoint.hidden_size,
        "attention width": checkpoint.num_heads * checkpoint.head_dim // tp,
        "intermediate_size": checkpoint.ffn_size // tp,
    }
    for what, count in inputs.items():
        if count % AWQ_GROUP:
            raise ValueError(
                f"{plan.role} {what} of {plan.model.name} is {count} on each of {tp} ranks, must "
                f"be a multiple of {AWQ_GROUP} for int4_awq: choose another tp size or quantization"
            )


def _check_tokens(draft: dict[str, int], target: dict[str, int], model: Model) -> None:
    if draft == target:
        return
    number = min(number for _, number in draft.items() ^ target.items())
    ours, theirs = ({i: t for t, i in tokens.items()}.get(number) for tokens in (draft, target))
    raise ValueError(
        f"token {number} is {ours!r} for the draft and {theirs!r} for the target: choose a draft "
        "with the target's tokenizer, or, if you know the difference not to matter, copy the "
        f"target's tokenizer.json to {model.checkpoint.path}"
    )


def _divisors(*counts: int) -> str:
    return ", ".join(str(n) for n in (1, 2, 3, 4, 6, 8) if all(count % n == 0 for count in counts))
