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
import json
import math
import os
import shutil
import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from build_engines.checkpoint import TOKENIZER_FILE, Checkpoint, open_checkpoint

if TYPE_CHECKING:
    from torch import Generator, Tensor, device, dtype, nn
    from transformers import LlamaConfig, LlamaForCausalLM

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

    The model is made while it runs, a layer at a time, so it may be larger than the memory. It runs
    on a GPU where there is one, and then its random weights are others than a CPU would draw.

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

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    small = LlamaForCausalLM.from_pretrained(checkpoint.path, local_files_only=True).to(device)
    stored = small.dtype
    ids = torch.randint(small.config.vocab_size, (1, CHECK_TOKENS), generator=_generator())
    ids = ids.to(device)
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{output.name}-", dir=output.parent) as scratch:
        folder = Path(scratch) / "checkpoint"
        folder.mkdir()
        with torch.no_grad():
            logits = inflate(small.float(), shape, folder, stored, ids)
            difference = float((small(ids).logits - logits).abs().max())
        if difference > tolerance:
            raise ValueError(
                f"logits differ by {difference:.2g}, more than {tolerance:.2g}: choose a hidden "
                f"size that is {checkpoint.hidden_size} times a power of four, or raise the "
                "tolerance"
            )
        for name in (TOKENIZER_FILE, "tokenizer_config.json"):
            shutil.copyfile(checkpoint.path / name, folder / name)
        os.replace(folder, output)
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
    if shape.hidden % shape.heads:
        raise ValueError(f"hidden is {shape.hidden}, must be a multiple of the {shape.heads} heads")


def inflate(
    small: LlamaForCausalLM, shape: Shape, folder: Path, stored: dtype, ids: Tensor
) -> Tensor:
    """Write a model of `shape` with the logits of `small`, and run it.

    Args:
        small: in f32.
        folder: gets config and weights, one file for each part of the model.
        stored: type of the weights there.
        ids: [1, n].

    Returns:
        Logits [1, n, vocab_size] of the model as stored, in f32.
    """
    import torch
    from transformers import LlamaForCausalLM
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    config = _inflated_config(small.config, shape)
    with torch.device("meta"):
        big = LlamaForCausalLM(config).eval()
    big.model.rotary_emb = LlamaRotaryEmbedding(config).to(small.device)
    writer = _Writer(small, folder, stored, small.config.hidden_size / shape.hidden)
    for name, part in big.named_modules():
        if part in (big.model.embed_tokens, *big.model.layers, big.model.norm, big.lm_head):
            is_tied = part is big.lm_head and config.tie_word_embeddings
            part.register_forward_pre_hook(partial(writer.make, name, not is_tied))
            part.register_forward_hook(_free)
    logits: Tensor = big(ids).logits
    writer.finish()
    config.architectures, config.dtype = ["LlamaForCausalLM"], stored
    config.save_pretrained(folder)
    small.generation_config.save_pretrained(folder)
    return logits


class _Writer:
    """Makes the weights of each part of a model just before it runs, and stores them."""

    def __init__(self, small: LlamaForCausalLM, folder: Path, stored: dtype, ratio: float) -> None:
        self._old = small.state_dict()
        self._folder = folder
        self._stored = stored
        self._ratio = ratio
        self._device = small.device
        self._generator = _generator(small.device)
        self._file_of: dict[str, str] = {}
        self._num_bytes = 0

    def make(self, name: str, is_stored: bool, part: nn.Module, _: Any) -> None:
        """Fill a part that has no memory yet."""
        from safetensors.torch import save_file

        weights = {
            key: self._inflated(f"{name}.{key}", weight.shape).to(self._stored)
            for key, weight in part.state_dict().items()
        }
        if is_stored:
            file = f"model-{name}.safetensors"
            save_file(
                {f"{name}.{key}": weight.cpu() for key, weight in weights.items()},
                self._folder / file,
                metadata={"format": "pt"},
            )
            self._file_of |= {f"{name}.{key}": file for key in weights}
            self._num_bytes += sum(weight.nbytes for weight in weights.values())
        part.load_state_dict({k: w.float() for k, w in weights.items()}, assign=True)

    def finish(self) -> None:
        """Write the index of the files."""
        index = {"metadata": {"total_size": self._num_bytes}, "weight_map": self._file_of}
        path = self._folder / "model.safetensors.index.json"
        path.write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")

    def _inflated(self, name: str, shape: Any) -> Tensor:
        import torch

        weight = torch.empty(shape, device=self._device)
        _fill(name, weight, self._generator)
        part = self._old.get(name)
        if part is None:
            return weight
        if part.dim() == 1:
            weight[: len(part)] = part * math.sqrt(self._ratio)
        else:
            weight[: part.shape[0], : part.shape[1]] = part
        return weight


def _free(part: nn.Module, *_: Any) -> None:
    part.to("meta")


def _inflated_config(old: LlamaConfig, shape: Shape) -> LlamaConfig:
    from transformers import LlamaConfig

    return LlamaConfig(
        **{
            **old.to_dict(),
            "hidden_size": shape.hidden,
            "num_hidden_layers": shape.layers,
            "num_attention_heads": shape.heads,
            "num_key_value_heads": shape.kv_heads,
            "intermediate_size": shape.ffn,
            "rms_norm_eps": old.rms_norm_eps * old.hidden_size / shape.hidden,
        }
    )


def _fill(name: str, weight: Tensor, generator: Generator) -> None:
    if name.endswith("norm.weight"):
        weight.fill_(1.0)
    elif name.endswith(ZERO_OUTSIDE):
        # Zeros of random sign: equal bytes in two layers would be stored, and read, only once.
        weight.normal_(generator=generator).mul_(0.0)
    else:
        weight.normal_(std=0.02, generator=generator)


def _generator(device: device | str = "cpu") -> Generator:
    import torch

    return torch.Generator(device).manual_seed(0)
