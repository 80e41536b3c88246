"""The pair: target and draft, built from two checkpoints that must share their vocabulary."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

from build_engines.checkpoint import open_checkpoint
from specserve import manifest as manifests

ROLES = ("target", "draft")
BUILDERS = {"openvino": "build_engines.openvino", "torch": "build_engines.torch"}


def build(
    target_dir: str | Path,
    draft_dir: str | Path,
    output_dir: str | Path,
    *,
    precision: str,
    overwrite: bool = False,
    engine: str = "openvino",
) -> None:
    """Write `target/` and `draft/` below the output folder, then check them.

    Args:
        precision: of the stored weights; torch keeps the checkpoint's own.
        engine: an entry of BUILDERS.

    Raises:
        ValueError: before any export if the two cannot speculate together or cannot be built; after
            it if an engine's logits are not what they must be.
    """
    output, builder = Path(output_dir), _builder(engine)
    checkpoints = {"target": open_checkpoint(target_dir), "draft": open_checkpoint(draft_dir)}
    plans = {role: builder.describe(c, precision, role) for role, c in checkpoints.items()}
    manifests.check_pair(draft=plans["draft"], target=plans["target"])
    for role, checkpoint in checkpoints.items():
        builder.check_request(checkpoint, output / role, precision=precision, overwrite=overwrite)
    for role, checkpoint in checkpoints.items():
        print(f"{role}: {checkpoint.path} -> {output / role}", flush=True)
        builder.build(checkpoint.path, output / role, precision=precision, overwrite=overwrite)
    check(output)


def check(pair_dir: str | Path) -> None:
    """Read both manifests and run both engines once.

    Raises:
        ValueError: if one is not valid, the two do not fit, or logits are wrong.
    """
    folders = {role: Path(pair_dir) / role for role in ROLES}
    draft, target = manifests.load(folders["draft"]), manifests.load(folders["target"])
    manifests.check_pair(draft=draft, target=target)
    for folder in folders.values():
        _builder(target.engine).check_forward(folder)


def _builder(engine: str) -> Any:
    if engine not in BUILDERS:
        raise ValueError(f"engine is {engine!r}, must be one of {', '.join(BUILDERS)}")
    return import_module(BUILDERS[engine])
