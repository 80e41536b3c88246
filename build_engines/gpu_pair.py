"""The benchmark pair for GPUs: the demo pair inflated to what a 7 B target and a 0.2 B draft cost.

Acceptance is the demo pair's. The hidden sizes are the demo models' times a power of four, so that
nothing is rounded in bf16; 6144 is wider than most 7 B models, and there are fewer layers instead.
What else differs from real models of the size: the vocabulary is small, and a third of the weights
are zeros, which draw less power.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from build_engines import inflate, torch
from build_engines.bench_target import DEMO_PAIR
from build_engines.checkpoint import open_checkpoint
from specserve import manifest as manifests

SHAPES = {
    "target": inflate.Shape(hidden=6144, layers=23, heads=96, kv_heads=32, ffn=11008),
    "draft": inflate.Shape(hidden=1024, layers=12, heads=16, kv_heads=8, ffn=4096),
}


def build(output_dir: str | Path, shapes: dict[str, inflate.Shape] | None = None) -> bool:
    """Write `target/` and `draft/` as torch engines, 14.5 GB by default.

    Returns:
        False if both were there already, made from the demo pair as it is now.
    """
    output, shapes = Path(output_dir), shapes or SHAPES
    stale = [role for role, shape in shapes.items() if not _is_up_to_date(output / role, shape)]
    for role in stale:
        shutil.rmtree(output / role, ignore_errors=True)
        difference = inflate.build(DEMO_PAIR / role, output / role, shapes[role])
        torch.build(output / role, output / role, source_name=_source_name(role, shapes[role]))
        print(f"{role}: {shapes[role]}, max |dlogit| {difference:.2g}", flush=True)
    manifests.check_pair(
        draft=manifests.load(output / "draft"), target=manifests.load(output / "target")
    )
    return bool(stale)


def _source_name(role: str, shape: inflate.Shape) -> str:
    """Name an inflated checkpoint after what it is made of, so that a change shows."""
    digest = open_checkpoint(DEMO_PAIR / role).weights_sha256
    return f"demo {role} {digest[:12]} inflated to {shape}"


def _is_up_to_date(engine_dir: Path, shape: inflate.Shape) -> bool:
    try:
        return manifests.load(engine_dir).source.name == _source_name(engine_dir.name, shape)
    except ValueError:
        return False
