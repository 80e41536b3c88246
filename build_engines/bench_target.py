"""The benchmark pair: the demo target inflated to the cost of a 0.4 G model, and the demo draft."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from build_engines import inflate, openvino
from build_engines.checkpoint import open_checkpoint
from specserve import manifest as manifests

DEMO_PAIR = Path(__file__).parent / "demo_pair"
SHAPE = inflate.Shape(hidden=1536, layers=16, heads=24, kv_heads=8, ffn=4096)
PRECISION = "bf16"


def build(output_dir: str | Path) -> bool:
    """Write `target/` and `draft/` as OpenVINO engines.

    Returns:
        False if both were there already, made from the demo pair as it is now.
    """
    output = Path(output_dir)
    name = source_name()
    if is_up_to_date(output, name):
        return False
    output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".scratch-", dir=output) as scratch:
        draft, inflated = Path(scratch) / "draft", Path(scratch) / "inflated"
        shutil.copytree(DEMO_PAIR / "openvino" / "draft", draft)
        openvino.move(draft, output / "draft")
        difference = inflate.build(DEMO_PAIR / "target", inflated, SHAPE)
        print(
            f"inflated to {SHAPE}: max |dlogit| {difference:.2g}, at most {inflate.TOLERANCE:.2g}"
        )
        openvino.build(
            inflated, output / "target", precision=PRECISION, overwrite=True, source_name=name
        )
    return True


def source_name() -> str:
    """Name the inflated checkpoint after what it is made of, so that a change shows."""
    digest = open_checkpoint(DEMO_PAIR / "target").weights_sha256
    return f"demo target {digest[:12]} inflated to {SHAPE}"


def is_up_to_date(output: Path, name: str) -> bool:
    """Tell whether a pair folder holds this target and the shipped draft."""
    try:
        target, draft = manifests.load(output / "target"), manifests.load(output / "draft")
    except ValueError:
        return False
    shipped = manifests.load(DEMO_PAIR / "openvino" / "draft")
    return draft == shipped and target.source.name == name and target.precision == PRECISION
