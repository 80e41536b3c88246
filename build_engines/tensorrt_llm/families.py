"""Model families: what upstream converts an architecture with, and what it supports there.

Source: the support matrices in `examples/models/core/{llama,qwen}/README.md`, TensorRT-LLM 1.2.
"""

from __future__ import annotations

from dataclasses import dataclass

from build_engines.checkpoint import Checkpoint
from build_engines.tensorrt_llm.quantizations import QUANTIZATIONS


@dataclass(frozen=True, slots=True)
class Family:
    """What one `convert_checkpoint.py` takes.

    Attributes:
        folder: of its script below `examples/models/core`.
        quantizations: keys of QUANTIZATIONS.
        has_pipeline: pipeline parallelism works.
    """

    folder: str
    quantizations: tuple[str, ...] = tuple(QUANTIZATIONS)
    has_pipeline: bool = True


FAMILIES = {
    "LlamaForCausalLM": Family("llama"),
    "MistralForCausalLM": Family("llama"),
    "Qwen2ForCausalLM": Family("qwen"),  # Qwen2 and Qwen2.5
    "Qwen3ForCausalLM": Family("qwen", ("none", "fp8"), has_pipeline=False),
}


def family_of(checkpoint: Checkpoint) -> Family:
    """Find the family by the architecture in config.json.

    Raises:
        ValueError: naming an architecture that is not known here, and those that are.
    """
    for architecture in checkpoint.config.get("architectures") or []:
        if architecture in FAMILIES:
            return FAMILIES[architecture]
    raise ValueError(
        f"{checkpoint.path} is {checkpoint.config.get('architectures')}, must be one of "
        f"{', '.join(FAMILIES)}: choose a model of these families"
    )
