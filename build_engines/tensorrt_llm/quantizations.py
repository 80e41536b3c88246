"""Quantizations: which upstream script makes them, with which flags.

The flags are those of TensorRT-LLM 1.2.1: `examples/models/core/*/convert_checkpoint.py` and
`examples/quantization/quantize.py`, with the values of its examples. fp8 needs compute capability
8.9 or newer; for 10.x the builder refuses the integer ones.
"""

from __future__ import annotations

from dataclasses import dataclass

AWQ_GROUP = 128


@dataclass(frozen=True, slots=True)
class Quantization:
    """One way to store weights.

    Attributes:
        flags: of the script that makes the TensorRT-LLM checkpoint.
        precision: of the stored weights, as a manifest spells it; empty is the model's dtype.
        by_modelopt: `quantize.py` makes it, not the model family's `convert_checkpoint.py`.
        is_calibrated: needs a data set.
        is_listed: upstream lists it for `draft_tokens_external`
            (examples/draft_target_model/README.md: FP16, BF16, FP8).
    """

    flags: tuple[str, ...] = ()
    precision: str = ""
    by_modelopt: bool = False
    is_calibrated: bool = False
    is_listed: bool = False


QUANTIZATIONS = {
    "none": Quantization(is_listed=True),
    "fp8": Quantization(
        ("--qformat", "fp8", "--calib_size", "512"), "fp8", True, True, is_listed=True
    ),
    "int8_wo": Quantization(("--use_weight_only", "--weight_only_precision", "int8"), "int8"),
    "int4_wo": Quantization(("--use_weight_only", "--weight_only_precision", "int4"), "int4"),
    "int8_sq": Quantization(
        ("--smoothquant", "0.5", "--per_token", "--per_channel"), "int8", is_calibrated=True
    ),
    "int4_awq": Quantization(
        ("--qformat", "int4_awq", "--awq_block_size", str(AWQ_GROUP), "--calib_size", "32"),
        "int4",
        True,
        True,
    ),
}
