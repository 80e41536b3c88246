"""The OpenVINO engine folder: a stateful IR, its tokenizer and its manifest.

optimum-intel writes the IR; this file says which weights go in and what stands beside them. Serving
turns the IR into a paged one (`specserve/engines/openvino.py`).
"""

from __future__ import annotations

import os
import shutil
import tempfile
import warnings
from importlib.metadata import version
from pathlib import Path

import numpy as np

from build_engines.checkpoint import TOKENIZER_FILE, Checkpoint, open_checkpoint
from build_engines.stateful_model import IR_FILE, StatefulModel
from specserve import manifest as manifests
from specserve.manifest import MANIFEST_FILE, Manifest, Source

TOKENIZER_CONFIG_FILE = "tokenizer_config.json"
ENGINE_FILES = (IR_FILE, "openvino_model.bin", TOKENIZER_FILE, TOKENIZER_CONFIG_FILE)
EXTRA_FILES = ("config.json", "generation_config.json")
PRECISIONS = ("bf16", "fp16", "int8")
BUILDER_PACKAGES = ("openvino", "optimum", "optimum-intel", "transformers", "torch", "nncf")
TASK = "text-generation-with-past"


def build(
    checkpoint_dir: str | Path,
    output_dir: str | Path,
    *,
    precision: str = "bf16",
    overwrite: bool = False,
    source_name: str | None = None,
) -> Manifest:
    """Export a checkpoint to an engine folder.

    The files appear in `output_dir` only when all of them are written, the manifest last.

    Args:
        checkpoint_dir: Hugging Face folder with safetensors and tokenizer.json.
        output_dir: new or empty, unless `overwrite`; then files of the same names are replaced.
        precision: of the stored weights; one of PRECISIONS.
        source_name: what the manifest calls the checkpoint; its folder's name by default.

    Raises:
        ValueError: on a checkpoint, a precision or an output folder that cannot do.
    """
    output = Path(output_dir)
    checkpoint = open_checkpoint(checkpoint_dir)
    check_request(checkpoint, output, precision=precision, overwrite=overwrite)
    manifest = describe(checkpoint, precision, source_name or checkpoint.path.resolve().name)
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{output.name}-", dir=output.parent) as scratch:
        folder = Path(scratch)
        write_ir(checkpoint, folder, precision)
        for name in (TOKENIZER_FILE, TOKENIZER_CONFIG_FILE):
            shutil.copyfile(checkpoint.path / name, folder / name)
        manifests.save(manifest, folder)
        move(folder, output)
    return manifest


def check_request(checkpoint: Checkpoint, output: Path, *, precision: str, overwrite: bool) -> None:
    """Find out in milliseconds what would fail in minutes.

    Raises:
        ValueError: on an unknown precision, no tokenizer_config.json or an output folder in use.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision is {precision!r}, must be one of {', '.join(PRECISIONS)}")
    if not (checkpoint.path / TOKENIZER_CONFIG_FILE).is_file():
        raise ValueError(
            f"{checkpoint.path} has no {TOKENIZER_CONFIG_FILE}: save the tokenizer there"
        )
    if output.is_file():
        raise ValueError(f"{output} is a file: choose another output")
    if output.is_dir() and any(output.iterdir()) and not overwrite:
        raise ValueError(f"{output} is not empty: choose another output, or add --overwrite")


def write_ir(checkpoint: Checkpoint, folder: Path, precision: str) -> None:
    """Trace the model into `folder`.

    bf16 and fp16 store the checkpoint rounded to that type; int8 stores 8-bit weights with a scale
    per row, made from the type the checkpoint has. `main_export` is not used: it turns large models
    into int8 unasked, and its fp16 rounds the rotary table and epsilon too.
    """
    import torch
    from optimum.exporters.openvino import export_from_model
    from transformers import AutoModelForCausalLM

    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "int8": "auto"}[precision]
    model = AutoModelForCausalLM.from_pretrained(
        checkpoint.path, dtype=dtype, local_files_only=True
    ).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", torch.jit.TracerWarning)
        export_from_model(
            model,
            folder,
            task=TASK,
            stateful=True,
            patch_16bit_model=model.dtype != torch.float32,
        )
    if precision == "int8":
        _compress_to_int8(folder)


def describe(checkpoint: Checkpoint, precision: str, source_name: str) -> Manifest:
    """Say what an engine folder made from a checkpoint holds."""
    return Manifest(
        engine="openvino",
        precision=precision,
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
        files=ENGINE_FILES,
    )


def check_forward(engine_dir: str | Path) -> None:
    """Run one forward pass and look at the logits.

    Raises:
        ValueError: if their shape is not [1, n, vocab_size] or one of them is not finite.
    """
    expected = manifests.load(engine_dir).vocab_size
    logits = StatefulModel(engine_dir).forward(np.arange(8)[None, :] % expected)
    if logits.shape != (1, 8, expected) or not np.isfinite(logits).all():
        raise ValueError(
            f"{engine_dir}: logits of shape {logits.shape}, finite: {np.isfinite(logits).all()}; "
            f"must be (1, 8, {expected}) and finite: build it again"
        )


def move(folder: Path, output: Path) -> None:
    """Move an engine's files to where they replace an older engine's, file by file.

    A process that has the older ones open keeps them; nothing else in `output` is touched.
    """
    output.mkdir(exist_ok=True)
    (output / MANIFEST_FILE).unlink(missing_ok=True)
    extras = [name for name in EXTRA_FILES if (folder / name).is_file()]
    for name in (*ENGINE_FILES, *extras, MANIFEST_FILE):
        os.replace(folder / name, output / name)


def _compress_to_int8(folder: Path) -> None:
    import nncf
    import openvino

    path = folder / IR_FILE
    model = nncf.compress_weights(
        openvino.Core().read_model(path), mode=nncf.CompressWeightsMode.INT8_ASYM
    )
    openvino.save_model(model, folder / "int8.xml", compress_to_fp16=False)
    del model  # it maps the file that is replaced
    for suffix in (".xml", ".bin"):
        os.replace(folder / f"int8{suffix}", path.with_suffix(suffix))
