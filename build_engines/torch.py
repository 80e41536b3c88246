"""The torch engine folder: a Hugging Face checkpoint as it is, and its manifest.

Nothing is converted, so the engine holds the checkpoint's own precision; `engine.precision` says
what it computes in. A checkpoint can be its own engine folder: then only the manifest is new.
"""

from __future__ import annotations

import os
import shutil
from importlib.metadata import version
from pathlib import Path

import numpy as np

from build_engines.checkpoint import TOKENIZER_FILE, Checkpoint, open_checkpoint
from specserve import manifest as manifests
from specserve.manifest import Manifest, Source

PRECISIONS = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
BUILDER_PACKAGES = ("torch", "transformers")
OPTIONAL_FILES = (
    "tokenizer_config.json",
    "generation_config.json",
    "model.safetensors.index.json",
)


def build(
    checkpoint_dir: str | Path,
    output_dir: str | Path,
    *,
    precision: str = "",
    overwrite: bool = False,
    source_name: str | None = None,
) -> Manifest:
    """Link a checkpoint's files into an engine folder; copy them to another file system.

    Args:
        checkpoint_dir: Hugging Face folder with safetensors and tokenizer.json.
        output_dir: new or empty, unless `overwrite`; or the checkpoint itself.
        precision: not used; see above.
        source_name: what the manifest calls the checkpoint; its folder's name by default.

    Raises:
        ValueError: on a checkpoint or an output folder that cannot do.
    """
    output = Path(output_dir)
    checkpoint = open_checkpoint(checkpoint_dir)
    check_request(checkpoint, output, precision=precision, overwrite=overwrite)
    manifest = describe(checkpoint, precision, source_name or checkpoint.path.resolve().name)
    output.mkdir(parents=True, exist_ok=True)
    if output.resolve() != checkpoint.path.resolve():
        for name in manifest.files:
            _link(checkpoint.path / name, output / name)
    manifests.save(manifest, output)
    return manifest


def check_request(checkpoint: Checkpoint, output: Path, *, precision: str, overwrite: bool) -> None:
    """Refuse an output folder in use.

    Raises:
        ValueError: naming it.
    """
    if output.is_file():
        raise ValueError(f"{output} is a file: choose another output")
    if output.resolve() == checkpoint.path.resolve():
        return
    if output.is_dir() and any(output.iterdir()) and not overwrite:
        raise ValueError(f"{output} is not empty: choose another output, or add --overwrite")


def describe(checkpoint: Checkpoint, precision: str, source_name: str) -> Manifest:
    """Say what an engine folder made from a checkpoint holds."""
    dtype = checkpoint.config.get("dtype") or checkpoint.config.get("torch_dtype") or "float32"
    if dtype not in PRECISIONS:
        raise ValueError(
            f"{checkpoint.path} stores {dtype}: must be one of {', '.join(PRECISIONS)}"
        )
    return Manifest(
        engine="torch",
        precision=PRECISIONS[dtype],
        vocab_size=checkpoint.vocab_size,
        tokenizer_sha256=checkpoint.tokenizer_sha256,
        max_seq_len=checkpoint.max_seq_len,
        num_parameters=checkpoint.num_parameters,
        num_layers=checkpoint.num_layers,
        num_kv_heads=checkpoint.num_kv_heads,
        head_dim=checkpoint.head_dim,
        hidden_size=checkpoint.hidden_size,
        source=Source(source_name, checkpoint.weights_sha256),
        builder={name: version(name) for name in BUILDER_PACKAGES},
        files=_files(checkpoint),
    )


def check_forward(engine_dir: str | Path) -> None:
    """Run one forward pass and look at the logits.

    Raises:
        ValueError: if one of them is not finite, or the model is of a kind that is not served.
    """
    import torch

    from specserve.engines.paged_model import FlatBatch, Span
    from specserve.engines.torch.model import TorchModel

    manifest = manifests.load(engine_dir)
    dtype = next(name for name, short in PRECISIONS.items() if short == manifest.precision)
    model = TorchModel(Path(engine_dir), num_blocks=1, dtype=getattr(torch, dtype))
    logits = model.forward(FlatBatch.pack([Span(list(range(8)), 0, [0])]), np.arange(8))
    if logits.shape != (8, manifest.vocab_size) or not np.isfinite(logits).all():
        raise ValueError(
            f"{engine_dir}: logits of shape {logits.shape}, finite: {np.isfinite(logits).all()}; "
            f"must be (8, {manifest.vocab_size}) and finite: check the checkpoint"
        )


def _files(checkpoint: Checkpoint) -> tuple[str, ...]:
    optional = [name for name in OPTIONAL_FILES if (checkpoint.path / name).is_file()]
    weights = [file.name for file in checkpoint.weight_files]
    return ("config.json", TOKENIZER_FILE, *optional, *weights)


def _link(source: Path, target: Path) -> None:
    target.unlink(missing_ok=True)
    try:
        os.link(source.resolve(), target)
    except OSError:
        shutil.copyfile(source, target)
