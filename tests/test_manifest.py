"""The manifest is strict, and a pair that cannot speculate is refused with value, limit and fix."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from specserve import manifest as manifests
from specserve.manifest import Compiled, Manifest, Source

DEMO_PAIR = Path(__file__).parents[1] / "build_engines" / "demo_pair" / "openvino"


def make_manifest(**changes: Any) -> Manifest:
    values: dict[str, Any] = {
        "engine": "openvino",
        "precision": "bf16",
        "vocab_size": 100,
        "tokenizer_sha256": "a" * 64,
        "max_seq_len": 256,
        "num_parameters": 1000,
        "num_layers": 2,
        "num_kv_heads": 1,
        "head_dim": 8,
        "hidden_size": 16,
        "source": Source("tiny", "b" * 64),
        "builder": {"openvino": "2026.4.1"},
        "files": ("model.xml", "tokenizer.json"),
    }
    return Manifest(**{**values, **changes})


def make_compiled(**changes: Any) -> Compiled:
    values: dict[str, Any] = {
        "quantization": "none",
        "kv_cache": "bf16",
        "vocab_rows": 128,
        "max_batch_size": 4,
        "max_input_len": 256,
        "max_num_tokens": 512,
        "max_draft_len": 8,
        "tokens_per_block": 32,
        "tp_size": 2,
        "pp_size": 2,
    }
    return Compiled(**{**values, **changes})


def make_compiled_manifest(**changes: Any) -> Manifest:
    return make_manifest(engine="tensorrt_llm", compiled=make_compiled(**changes))


@pytest.fixture
def engine_dir(tmp_path: Path) -> Path:
    for name in ("model.xml", "tokenizer.json"):
        (tmp_path / name).touch()
    manifests.save(make_manifest(), tmp_path)
    return tmp_path


def rewrite(engine_dir: Path, **changes: Any) -> None:
    """Change keys of the manifest on disk; None removes one."""
    path = engine_dir / manifests.MANIFEST_FILE
    values = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in values.items() if value is not None}))


def test_saved_manifest_loads_equal(engine_dir: Path) -> None:
    assert manifests.load(engine_dir) == make_manifest()


def test_missing_manifest_says_how_to_build_one(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="python -m build_engines"):
        manifests.load(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_sise": 100}, "'vocab_sise', nearest is 'vocab_size'"),
        ({"vocab_size": None}, "has no 'vocab_size'"),
        ({"source": {"name": "tiny", "sha265": "b" * 64}}, "'sha265', nearest is 'sha256'"),
        ({"source": {"name": "tiny"}}, "source has no 'sha256'"),
        ({"source": "tiny"}, "source is 'tiny', must be a JSON object"),
        ({"format_version": 2, "new": 1}, "format_version is 2, this SpecServe reads 1"),
        ({"engine": "openvion"}, "nearest is 'openvino'"),
        ({"precision": "bfloat16"}, "nearest is 'bf16'|nearest is 'fp16'"),
        ({"num_layers": 0}, "num_layers is 0, must be a whole number of at least 1"),
        ({"num_layers": True}, "num_layers is True"),
        ({"max_seq_len": "256"}, "max_seq_len is '256'"),
        ({"tokenizer_sha256": "A" * 64}, "64 lower-case hex digits"),
        ({"builder": {"openvino": 2026}}, "builder.openvino is 2026"),
        ({"files": "model.xml"}, "must be a list"),
        ({"files": ["../model.xml"]}, "bare names"),
        ({"files": ["model.xml", "model.bin"]}, "names model.bin, not in the folder"),
    ],
)
def test_bad_manifest_is_refused_by_name(
    engine_dir: Path, changes: dict[str, Any], message: str
) -> None:
    rewrite(engine_dir, **changes)
    with pytest.raises(ValueError, match=message):
        manifests.load(engine_dir)


def test_text_that_is_no_json_is_refused_with_the_file(engine_dir: Path) -> None:
    (engine_dir / manifests.MANIFEST_FILE).write_text("{")
    with pytest.raises(ValueError, match=manifests.MANIFEST_FILE):
        manifests.load(engine_dir)


def test_manifest_is_written_after_the_files_it_names(tmp_path: Path) -> None:
    (tmp_path / "model.xml").touch()
    with pytest.raises(ValueError, match=r"has no tokenizer\.json"):
        manifests.save(make_manifest(), tmp_path)


def test_manifest_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        make_manifest().vocab_size = 1  # type: ignore[misc]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": 99}, "draft vocab_size is 99, the target's is 100: choose"),
        ({"tokenizer_sha256": "c" * 64}, r"is cccccccccccc\.\.\., the target's is aaaaaaaaaaaa"),
        ({"engine": "torch"}, "draft engine is 'torch', the target's is 'openvino': build"),
        ({"max_seq_len": 255}, "draft max_seq_len is 255, the target's is 256: .* choose"),
    ],
)
def test_pair_that_cannot_speculate_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        manifests.check_pair(draft=make_manifest(**changes), target=make_manifest())


def test_pair_may_differ_in_size_precision_and_a_longer_draft() -> None:
    draft = make_manifest(max_seq_len=512, precision="int8", num_layers=1, num_parameters=10)
    manifests.check_pair(draft=draft, target=make_manifest())


def test_compiled_section_is_saved_where_there_is_one(engine_dir: Path) -> None:
    assert "compiled" not in json.loads((engine_dir / manifests.MANIFEST_FILE).read_text())
    manifests.save(make_compiled_manifest(), engine_dir)
    loaded = manifests.load(engine_dir)
    assert loaded == make_compiled_manifest()
    assert loaded.compiled is not None
    assert loaded.compiled.world_size == 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"quantization": "int3"}, r"compiled\.quantization is 'int3', .* nearest is 'int"),
        ({"kv_cache": "fp32"}, r"compiled\.kv_cache is 'fp32'"),
        ({"max_draft_len": -1}, r"compiled\.max_draft_len is -1, .* at least 0"),
        ({"tp_size": 0}, r"compiled\.tp_size is 0, .* at least 1"),
        ({"max_num_tokens": 159}, r"max_num_tokens is 159, must be 160 or more"),
        ({"vocab_rows": 99}, r"vocab_rows is 99, must be at least the 100 tokens"),
    ],
)
def test_bad_compiled_section_is_refused_by_name(changes: dict[str, Any], message: str) -> None:
    assert make_compiled_manifest(max_num_tokens=160, vocab_rows=100)
    with pytest.raises(ValueError, match=message):
        make_compiled_manifest(**changes)


def test_compiled_section_belongs_to_tensorrt_llm(engine_dir: Path) -> None:
    with pytest.raises(ValueError, match="compiled is None, and the engine tensorrt_llm"):
        make_manifest(engine="tensorrt_llm")
    with pytest.raises(ValueError, match="and the engine openvino: tensorrt_llm engines have"):
        make_manifest(compiled=make_compiled())
    rewrite(engine_dir, compiled={"max_draft_ln": 3})
    with pytest.raises(ValueError, match="'max_draft_ln', nearest is 'max_draft_len'"):
        manifests.load(engine_dir)


@pytest.mark.parametrize(
    ("draft", "target", "message"),
    [
        ({"max_batch_size": 3}, {}, "draft max_batch_size is 3, the target's is 4"),
        ({"max_input_len": 255}, {}, "draft max_input_len is 255, the target's is 256"),
        ({"tokens_per_block": 64}, {}, "draft tokens_per_block is 64, the target's is 32"),
        ({"max_draft_len": 8}, {}, "draft max_draft_len is 8, must be 0"),
        ({}, {"max_draft_len": 0}, "target max_draft_len is 0, must be 1 or more"),
    ],
)
def test_compiled_pair_that_cannot_speculate_is_refused(
    draft: dict[str, Any], target: dict[str, Any], message: str
) -> None:
    one_gpu = {"max_draft_len": 0, "tp_size": 1, "pp_size": 1, "quantization": "int4_awq"}
    fits = make_compiled_manifest(**one_gpu, vocab_rows=100)
    manifests.check_pair(draft=fits, target=make_compiled_manifest())
    with pytest.raises(ValueError, match=message):
        manifests.check_pair(
            draft=make_compiled_manifest(**{**one_gpu, **draft}),
            target=make_compiled_manifest(**target),
        )


def test_shipped_demo_pair_is_a_pair() -> None:
    draft, target = manifests.load(DEMO_PAIR / "draft"), manifests.load(DEMO_PAIR / "target")
    manifests.check_pair(draft=draft, target=target)
    assert draft.num_parameters < target.num_parameters
