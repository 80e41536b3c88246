"""The options of a build, checked one by one; what they mean together is in `checks.py`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from build_engines.tensorrt_llm.quantizations import QUANTIZATIONS

DTYPES = ("auto", "bfloat16", "float16")
KV_CACHES = ("auto", "fp8")
TOKENS_PER_BLOCK = (32, 64, 128)
COUNTS = ("tp_size", "pp_size", "draft_tp_size", "max_batch_size", "max_draft_len", "workers")
AUTOMATIC = ("max_seq_len", "max_num_tokens")  # where they are 0


@dataclass(frozen=True, slots=True)
class Options:
    """How to build both engines of a pair.

    Attributes:
        dtype: of what is not quantized, one of DTYPES; auto is the checkpoint's own, float16 for
            float32.
        quantization: of the target, a key of QUANTIZATIONS.
        draft_quantization: empty is the target's.
        kv_cache: one of KV_CACHES; auto is fp8 with fp8 weights, else the dtype.
        tp_size: tensor-parallel ranks of the target.
        pp_size: pipeline-parallel ranks of the target; a draft is too small for stages.
        draft_tp_size: tensor-parallel ranks of the draft.
        max_batch_size: sequences of a step.
        max_seq_len: prompt and output tokens of a sequence; 0 is 8192, or less if a model has less.
        max_num_tokens: tokens of a step that are not cached; 0 is 8192, or all there can be.
        max_draft_len: draft tokens of one verification.
        tokens_per_block: token slots of a KV block, one of TOKENS_PER_BLOCK.
        workers: ranks converted and built at the same time, each on a GPU of its own.
        timing_cache: kernel timings, read if there and written; None puts it into the output.
        calibration: folder of the data set that fp8, int4_awq and int8_sq are calibrated with: a
            copy of `cnn_dailymail` in a folder of that name.
        examples: the `examples` folder of TensorRT-LLM.
        python: the interpreter that has `tensorrt_llm`.
    """

    dtype: str = "auto"
    quantization: str = "none"
    draft_quantization: str = ""
    kv_cache: str = "auto"
    tp_size: int = 1
    pp_size: int = 1
    draft_tp_size: int = 1
    max_batch_size: int = 64
    max_seq_len: int = 0
    max_num_tokens: int = 0
    max_draft_len: int = 8
    tokens_per_block: int = 32
    workers: int = 1
    timing_cache: Path | None = None
    calibration: Path | None = None
    examples: Path = Path("/app/examples")
    python: str = "python3"

    def __post_init__(self) -> None:
        """Check each value.

        Raises:
            ValueError: naming the option, its value and the limit.
        """
        if self.kv_cache == "int8":
            raise ValueError(
                "--kv-cache is int8: TensorRT-LLM turns paged context FMHA off with it, and "
                "without that no KV block is reused; choose auto, or fp8 with fp8 weights"
            )
        quantizations = tuple(QUANTIZATIONS)
        for name, value, choices in (
            ("dtype", self.dtype, DTYPES),
            ("quantization", self.quantization, quantizations),
            ("draft-quantization", self.draft_quantization, ("", *quantizations)),
            ("kv-cache", self.kv_cache, KV_CACHES),
            ("tokens-per-block", self.tokens_per_block, TOKENS_PER_BLOCK),
        ):
            if value not in choices:
                known = ", ".join(str(choice) for choice in choices if choice)
                raise ValueError(f"--{name} is {value}, must be one of {known}")
        for name in (*COUNTS, *AUTOMATIC):
            value, least = getattr(self, name), 1 if name in COUNTS else 0
            if value < least:
                option = name.replace("_", "-")
                raise ValueError(f"--{option} is {value}, must be {least} or more")
