"""The pair: target and draft, built from two checkpoints that must share their vocabulary."""

from __future__ import annotations

from pathlib import Path

from build_engines import openvino
from build_engines.checkpoint import open_checkpoint
from specserve import manifest as manifests

ROLES = ("target", "draft")


def build(
    target_dir: str | Path,
    draft_dir: str | Path,
    output_dir: str | Path,
    *,
    precision: str,
    overwrite: bool = False,
) -> None:
    """Write `target/` and `draft/` below the output folder, then check them.

    Raises:
        ValueError: before any export if the two cannot speculate together or cannot be built; after
            it if an engine's logits are not what they must be.
    """
    output = Path(output_dir)
    checkpoints = {"target": open_checkpoint(target_dir), "draft": open_checkpoint(draft_dir)}
    plans = {role: openvino.describe(c, precision, role) for role, c in checkpoints.items()}
    manifests.check_pair(draft=plans["draft"], target=plans["target"])
    for role, checkpoint in checkpoints.items():
        openvino.check_request(checkpoint, output / role, precision=precision, overwrite=overwrite)
    for role, checkpoint in checkpoints.items():
        print(f"{role}: {checkpoint.path} -> {output / role}", flush=True)
        openvino.build(checkpoint.path, output / role, precision=precision, overwrite=overwrite)
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
        openvino.check_forward(folder)
