"""Inflate: make a Llama checkpoint wider and deeper without changing what it computes.

A benchmark needs a target that costs what a real one costs; a demo pair needs to be small enough to
ship. The inflated model is both: the logits, and so the acceptance, of the small model, and the
weights and FLOPs of the large one.

How the function is kept: the first `hidden_size` entries of the residual stream are those of the
old model, all others stay zero, because nothing writes to them (columns of the embedding, rows of
o_proj and down_proj). RMSNorm then sees a mean square that is old / new times smaller: epsilon
shrinks by the same factor and the norm weight by its root. Added heads, FFN units and layers hold
random weights and end in zeros of o_proj and down_proj, so they cost their time and add nothing.
"""

from __future__ import annotations

import dataclasses
import math
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from build_engines.checkpoint import TOKENIZER_FILE, Checkpoint, open_checkpoint

if TYPE_CHECKING:
    from torch import Generator, Tensor
    from transformers import LlamaForCausalLM

TOLERANCE = 1e-3
CHECK_TOKENS = 64
ZERO_OUTSIDE = ("o_proj.weight", "down_proj.weight", "embed_tokens.weight", "lm_head.weight")


@dataclass(frozen=True, slots=True)
class Shape:
    """What the inflated model looks like; head_dim stays."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    ffn: int

    def __str__(self) -> str:
        return f"{self.hidden}x{self.layers}x{self.heads}x{self.kv_heads}x{self.ffn}"


def build(
    checkpoint_dir: str | Path,
    output_dir: str | Path,
    shape: Shape,
    *,
    tolerance: float = TOLERANCE,
) -> float:
    """Write the inflated checkpoint, in the type of the old one, and compare the two.

    Returns:
        The largest difference of a logit between the two as stored, both computed in f32.

    Raises:
        ValueError: on a shape that cannot hold the model, an output in use, or a difference above
            `tolerance`; the last happens in bf16 when new / old hidden size is not a power of four,
            because the scaled norm weights are rounded.
    """
    checkpoint, output = open_checkpoint(checkpoint_dir), Path(output_dir)
    check_shape(checkpoint, shape)
    if output.is_dir() and any(output.iterdir()):
        raise ValueError(f"{output} is not empty: choose another output")
    import torch
    from transformers import LlamaForCausalLM

    small = LlamaForCausalLM.from_pretrained(checkpoint.path, local_files_only=True)
    stored = small.dtype
    big = inflate(small.float(), shape)
    for weight in big.parameters():  # not big.to(stored), which would round the rotary table too
        weight.data = weight.data.to(stored).float()
    ids = torch.randint(small.config.vocab_size, (1, CHECK_TOKENS), generator=_generator())
    difference = max_difference(small, big, ids)
    if difference > tolerance:
        raise ValueError(
            f"logits differ by {difference:.2g}, more than {tolerance:.2g}: choose a hidden size "
            f"that is {checkpoint.hidden_size} times a power of four, or raise the tolerance"
        )
    big.to(stored).save_pretrained(output)
    for name in (TOKENIZER_FILE, "tokenizer_config.json"):
        shutil.copyfile(checkpoint.path / name, output / name)
    return difference


def check_shape(checkpoint: Checkpoint, shape: Shape) -> None:
    """Refuse a shape that has no room for the old model.

    Raises:
        ValueError: if a size shrinks, heads per KV head change, or it is no Llama without biases.
    """
    if checkpoint.config.get("model_type") != "llama":
        raise ValueError(f"model_type is {checkpoint.config.get('model_type')!r}, must be 'llama'")
    for name in ("attention_bias", "mlp_bias"):
        if checkpoint.config.get(name):
            raise ValueError(f"{name} is true, must be false: a bias would write to every entry")
    old = Shape(
        checkpoint.hidden_size,
        checkpoint.num_layers,
        checkpoint.num_heads,
        checkpoint.num_kv_heads,
        int(checkpoint.config["intermediate_size"]),
    )
    for name, smallest in dataclasses.asdict(old).items():
        if getattr(shape, name) < smallest:
            raise ValueError(f"{name} is {getattr(shape, name)}, must be {smallest} or more")
    if shape.heads * old.kv_heads != old.heads * shape.kv_heads:
        raise ValueError(
            f"heads / kv_heads is {shape.heads} / {shape.kv_heads}, must stay at "
            f"{old.heads} / {old.kv_heads}: heads would read another head's keys"
        )


def inflate(small: LlamaForCausalLM, shape: Shape) -> LlamaForCausalLM:
    """Make a model of `shape` with the logits of `small`, in f32."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    old = small.config
    ratio = old.hidden_size / shape.hidden
    config = LlamaConfig(
        **{
            **old.to_dict(),
            "hidden_size": shape.hidden,
            "num_hidden_layers": shape.layers,
            "num_attention_heads": shape.heads,
            "num_key_value_heads": shape.kv_heads,
            "intermediate_size": shape.ffn,
            "rms_norm_eps": old.rms_norm_eps * ratio,
        }
    )
    big = LlamaForCausalLM(config).float().eval()
    generator = _generator()
    weights, old_weights = big.state_dict(), small.state_dict()
    with torch.no_grad():
        for name, weight in weights.items():
            _fill(name, weight, generator)
            if name not in old_weights:
                continue
            part = old_weights[name]
            if part.dim() == 1:
                weight[: len(part)] = part * math.sqrt(ratio)
            else:
                weight[: part.shape[0], : part.shape[1]] = part
    return big


def max_difference(small: LlamaForCausalLM, big: LlamaForCausalLM, ids: Tensor) -> float:
    """Compare logits on some token ids [1, n]."""
    import torch

    with torch.no_grad():
        return float((small(ids).logits - big(ids).logits).abs().max())


def _fill(name: str, weight: Tensor, generator: Generator) -> None:
    if name.endswith("norm.weight"):
        weight.fill_(1.0)
    elif name.endswith(ZERO_OUTSIDE):
        # Zeros of random sign: equal bytes in two layers would be stored, and read, only once.
        weight.normal_(generator=generator).mul_(0.0)
    else:
        weight.normal_(std=0.02, generator=generator)


def _generator() -> Generator:
    import torch

    return torch.Generator().manual_seed(0)
