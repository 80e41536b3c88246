"""Torch engine folders: checkpoints as they are, shipped, linked, or inflated for a GPU."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from build_engines import gpu_pair, pair
from build_engines import torch as builder
from build_engines.checkpoint import open_checkpoint
from build_engines.inflate import Shape
from specserve import manifest as manifests
from specserve.config import CHECKPOINTS, load_config
from specserve.engines import describe

pytestmark = pytest.mark.torch
pytest.importorskip("torch")
pytest.importorskip("transformers")


@pytest.mark.parametrize("role", ["target", "draft"])
def test_the_shipped_manifest_is_of_the_shipped_checkpoint(role: str) -> None:
    shipped = manifests.load(CHECKPOINTS / role)
    built = builder.describe(open_checkpoint(CHECKPOINTS / role), "", shipped.source.name)
    assert dataclasses.replace(built, builder=shipped.builder) == shipped


def test_the_engine_alone_names_the_demo_pair() -> None:
    config = load_config(None, ["engine.name=torch"])
    assert Path(config.engine.dir) == CHECKPOINTS
    assert describe(config).vocab_size == 4096


def build_pair(output: Path, engine: str = "torch") -> None:
    target, draft = CHECKPOINTS / "target", CHECKPOINTS / "draft"
    pair.build(target, draft, output, precision="bf16", engine=engine)


def test_a_pair_takes_no_disk_space_of_its_own(tmp_path: Path) -> None:
    build_pair(tmp_path)
    for role in pair.ROLES:
        weights = tmp_path / role / "model.safetensors"
        assert weights.samefile(CHECKPOINTS / role / "model.safetensors")
    with pytest.raises(ValueError, match="target is not empty: choose another output"):
        build_pair(tmp_path)


def test_an_unknown_engine_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="engine is 'tvm', must be one of openvino, torch"):
        build_pair(tmp_path, engine="tvm")


def test_the_gpu_pair_says_what_the_demo_pair_says(tmp_path: Path) -> None:
    """In a small size: four times as wide, in bf16, on the torch engine."""
    from specserve.engines.paged_model import FlatBatch, Span
    from specserve.engines.torch.model import TorchModel

    shapes = {"target": Shape(384, 9, 12, 4, 1100), "draft": Shape(1024, 3, 8, 4, 800)}
    assert gpu_pair.build(tmp_path, shapes)
    assert not gpu_pair.build(tmp_path, shapes)
    batch = FlatBatch.pack([Span(list(range(5, 45)), 0, [1, 0])])
    for role in shapes:
        large, small = (
            TorchModel(folder / role, num_blocks=2).forward(batch, np.arange(40))
            for folder in (tmp_path, CHECKPOINTS)
        )
        np.testing.assert_allclose(large, small, atol=1e-3)
