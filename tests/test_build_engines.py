"""Builders: refusals come before the long work, and engines compute what their checkpoints do."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from build_engines import corpus, inflate, measure, openvino, pair
from build_engines.checkpoint import open_checkpoint
from build_engines.stateful_model import StatefulModel
from specserve import manifest as manifests

VOCAB_SIZE = 300


def make_checkpoint(folder: Path, *, seed: int = 0, **changes: Any) -> Path:
    """Save a random 2-layer Llama in bf16, norm weights included, with a byte-level tokenizer."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    shape = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 48,
        "head_dim": 8,
        "max_position_embeddings": 128,
        "tie_word_embeddings": True,
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
    torch.manual_seed(seed)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**shape, **changes}))
    for weight in model.parameters():
        weight.data = weight.data + 0.2 * torch.randn_like(weight)
    model.to(torch.bfloat16).save_pretrained(folder)
    corpus.train_tokenizer(["def f(x):\n    return x\n"]).save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text("{}")
    return folder


def reference_logits(folder: Path, ids: np.ndarray) -> np.ndarray:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(torch.from_numpy(ids)).logits.numpy()


def make_ids(num_rows: int = 2, n: int = 20) -> np.ndarray:
    return np.random.default_rng(0).integers(0, VOCAB_SIZE, (num_rows, n))


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return make_checkpoint(tmp_path / "checkpoint")


@pytest.fixture
def no_export(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail if the long part starts."""
    monkeypatch.setattr(openvino, "write_ir", lambda *_: pytest.fail("the export started"))


@pytest.mark.torch
@pytest.mark.parametrize(("precision", "tolerance"), [("bf16", 1e-3), ("fp16", 1e-3), ("int8", 2)])
@pytest.mark.slow
def test_engine_computes_what_the_checkpoint_does(
    checkpoint: Path, tmp_path: Path, precision: str, tolerance: float
) -> None:
    pytest.importorskip("optimum.exporters.openvino")
    openvino.build(checkpoint, tmp_path / "engine", precision=precision)
    openvino.check_forward(tmp_path / "engine")
    ids = make_ids()
    model = StatefulModel(tmp_path / "engine")
    logits = np.concatenate([model.forward(ids[:, :13]), model.forward(ids[:, 13:])], axis=1)
    np.testing.assert_allclose(logits, reference_logits(checkpoint, ids), atol=tolerance)


@pytest.mark.torch
@pytest.mark.slow
def test_manifest_describes_the_engine_and_a_tied_weight_is_stored_once(
    checkpoint: Path, tmp_path: Path
) -> None:
    pytest.importorskip("optimum.exporters.openvino")
    built = openvino.build(checkpoint, tmp_path / "engine", source_name="tiny")
    manifest = manifests.load(tmp_path / "engine")
    assert manifest == built
    assert (manifest.vocab_size, manifest.max_seq_len, manifest.num_layers) == (VOCAB_SIZE, 128, 2)
    assert (manifest.num_kv_heads, manifest.head_dim, manifest.hidden_size) == (2, 8, 32)
    weights = VOCAB_SIZE * 32 + 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48 + 2 * 32) + 32
    assert manifest.num_parameters == weights
    stored_bytes = (tmp_path / "engine" / "openvino_model.bin").stat().st_size
    assert 2 * weights <= stored_bytes < 2 * weights + VOCAB_SIZE * 32


@pytest.mark.torch
def test_output_in_use_is_refused_and_replaced_only_when_asked(
    checkpoint: Path, tmp_path: Path
) -> None:
    pytest.importorskip("optimum.exporters.openvino")
    output = tmp_path / "engine"
    output.mkdir()
    (output / "keep.txt").touch()
    with pytest.raises(ValueError, match="not empty: choose another output, or add --overwrite"):
        openvino.build(checkpoint, output)
    openvino.build(checkpoint, output, overwrite=True)
    assert (output / "keep.txt").exists()
    assert manifests.load(output).vocab_size == VOCAB_SIZE
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint", "engine"}


@pytest.mark.torch
@pytest.mark.slow
def test_failed_export_leaves_the_old_engine_alone(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("optimum.exporters.openvino")
    before = openvino.build(checkpoint, tmp_path / "engine")

    def fail(*_: object) -> None:
        raise RuntimeError("no space left")

    monkeypatch.setattr(openvino, "write_ir", fail)
    with pytest.raises(RuntimeError, match="no space"):
        openvino.build(checkpoint, tmp_path / "engine", overwrite=True)
    assert manifests.load(tmp_path / "engine") == before


@pytest.mark.torch
@pytest.mark.slow
def test_pair_is_built_checked_and_measurable(tmp_path: Path) -> None:
    pytest.importorskip("optimum.exporters.openvino")
    target = make_checkpoint(tmp_path / "target", seed=1)
    draft = make_checkpoint(tmp_path / "draft", seed=2, num_hidden_layers=1)
    pair.build(target, draft, tmp_path / "pair", precision="bf16")
    models = [StatefulModel(tmp_path / "pair" / role) for role in ("target", "target", "draft")]
    prompts = make_ids(num_rows=3, n=5)
    most = measure.MAX_DRAFT_TOKENS
    itself = measure.accepted_counts(models[0], models[1], prompts, num_tokens=16)
    assert itself.shape == (3, 16)
    assert (itself == most).all()  # the target as its own draft is always right
    assert (measure.accepted_counts(models[0], models[2], prompts, num_tokens=16) < most).any()


@pytest.mark.torch
@pytest.mark.usefixtures("no_export")
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": VOCAB_SIZE + 1}, "draft vocab_size is 301, the target's is 300"),
        ({"max_position_embeddings": 64}, "draft max_seq_len is 64, the target's is 128"),
    ],
)
def test_pair_that_does_not_fit_is_refused_before_the_export(
    tmp_path: Path, changes: dict[str, int], message: str
) -> None:
    target = make_checkpoint(tmp_path / "target")
    draft = make_checkpoint(tmp_path / "draft", **changes)
    with pytest.raises(ValueError, match=message):
        pair.build(target, draft, tmp_path / "pair", precision="bf16")
    assert not (tmp_path / "pair").exists()


@pytest.mark.torch
@pytest.mark.usefixtures("no_export")
def test_pair_with_two_tokenizers_is_refused_before_the_export(tmp_path: Path) -> None:
    target, draft = make_checkpoint(tmp_path / "target"), make_checkpoint(tmp_path / "draft")
    corpus.train_tokenizer(["other text other text"]).save(str(draft / "tokenizer.json"))
    with pytest.raises(ValueError, match="draft tokenizer_sha256 is"):
        pair.build(target, draft, tmp_path / "pair", precision="bf16")


@pytest.mark.torch
@pytest.mark.parametrize(("hidden", "layers"), [(128, 3), (128, 2)])
def test_inflated_model_has_the_same_logits(
    checkpoint: Path, tmp_path: Path, hidden: int, layers: int
) -> None:
    shape = inflate.Shape(hidden, layers, heads=8, kv_heads=4, ffn=96)
    assert inflate.build(checkpoint, tmp_path / "big", shape) < 1e-5
    ids = make_ids()
    big = reference_logits(tmp_path / "big", ids)
    np.testing.assert_allclose(big, reference_logits(checkpoint, ids), atol=1e-5)
    small, large = open_checkpoint(checkpoint), open_checkpoint(tmp_path / "big")
    assert large.num_parameters > 3 * small.num_parameters
    assert large.tokenizer_sha256 == small.tokenizer_sha256


@pytest.mark.torch
def test_inflated_layers_share_no_weight(checkpoint: Path, tmp_path: Path) -> None:
    """Equal weights are stored, and read, once: the model would cost less than its size says."""
    from safetensors.torch import load_file
    from torch import int16

    inflate.build(checkpoint, tmp_path / "big", inflate.Shape(128, 6, 8, 4, 96))
    weights = [
        w for file in (tmp_path / "big").glob("*.safetensors") for w in load_file(file).values()
    ]
    matrices = [w.view(int16).numpy().tobytes() for w in weights if w.ndim == 2]
    assert len(set(matrices)) == len(matrices)


@pytest.mark.torch
@pytest.mark.parametrize(
    ("shape", "message"),
    [
        (inflate.Shape(16, 3, 8, 4, 96), "hidden is 16, must be 32 or more"),
        (inflate.Shape(128, 3, 8, 2, 96), "heads / kv_heads is 8 / 2, must stay at 4 / 2"),
        (inflate.Shape(128, 3, 6, 3, 96), "hidden is 128, must be a multiple of the 6 heads"),
        (inflate.Shape(96, 3, 8, 4, 96), "choose a hidden size that is 32 times a power of four"),
    ],
)
def test_inflate_refuses_what_would_change_the_logits(
    checkpoint: Path, tmp_path: Path, shape: inflate.Shape, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        inflate.build(checkpoint, tmp_path / "big", shape)
    assert not (tmp_path / "big").exists()


@pytest.mark.torch
def test_fit_lowers_the_loss_and_stops_by_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch")
    from build_engines import train

    monkeypatch.setattr(train, "TARGET_ROWS", 4)  # some CPUs emulate bf16
    monkeypatch.setattr(train, "TARGET_TOKENS", 32)
    model = train.make_model(hidden=64, layers=1, kv_heads=1, ffn=32)
    text = np.tile(np.arange(50, dtype=np.int64), 40)
    losses: list[float] = []

    def recorded():
        for loss in train.text_loss(model, text):
            losses.append(loss.item())
            yield loss

    ticks = iter(range(0, 10_000))
    steps = train.fit(
        model, recorded(), 0.5, learning_rate=1e-2, floor=0.05, clock=lambda: next(ticks)
    )
    assert steps == len(losses) == 29  # 30 seconds at one second a look, the first one the start
    assert losses[-1] < 0.9 * losses[0]


def make_folder(folder: Path, **config: Any) -> Path:
    """Write what open_checkpoint looks at, without a model."""
    folder.mkdir()
    values = {"architectures": ["LlamaForCausalLM"], "vocab_size": 10, **config}
    (folder / "config.json").write_text(json.dumps(values))
    for name in ("tokenizer.json", "tokenizer_config.json", "model.safetensors"):
        (folder / name).touch()
    return folder


def test_checkpoint_that_cannot_do_is_refused_with_a_fix(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "a")
    assert open_checkpoint(folder).vocab_size == 10
    with pytest.raises(ValueError, match="max_position_embeddings is None"):
        _ = open_checkpoint(folder).max_seq_len
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"no \*\.safetensors: save it"):
        open_checkpoint(folder)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match=r"no tokenizer\.json: save"):
        open_checkpoint(folder)
    with pytest.raises(ValueError, match=r"no config\.json"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    "config",
    [
        {"architectures": ["T5ForConditionalGeneration"], "is_encoder_decoder": True},
        {"architectures": ["BertForMaskedLM"]},
        {"architectures": None},
        {"is_encoder_decoder": True},
    ],
)
def test_model_that_is_no_decoder_is_refused(tmp_path: Path, config: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="not a decoder-only language model"):
        open_checkpoint(make_folder(tmp_path / "a", **config))


@pytest.mark.usefixtures("no_export")
def test_unknown_precision_is_refused_before_the_export(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="precision is 'fp8', must be one of bf16, fp16, int8"):
        openvino.build(make_folder(tmp_path / "a"), tmp_path / "engine", precision="fp8")


def test_run_lengths_count_up_to_the_first_wrong_token() -> None:
    right = np.array([[1, 1, 0, 1, 1, 1]], dtype=bool)
    assert measure.run_lengths(right, 3).tolist() == [[2, 1, 0, 3]]


def test_documents_stand_between_bos_and_eos() -> None:
    tokenizer = corpus.train_tokenizer(["a text"])
    ids = corpus.encode(tokenizer, ["a text", "\u00e9"])
    assert [i for i in ids if i < 2] == [0, 1, 0, 1]
    assert (ids[0], ids[-1]) == (0, 1)
    assert tokenizer.decode(list(ids)) == "a text\u00e9"


def test_held_out_documents_are_not_trained_on() -> None:
    train, held_out = corpus.split([str(i) for i in range(100)])
    assert len(held_out) == corpus.NUM_HELD_OUT
    assert not set(train) & set(held_out)


def test_demo_pair_engines_come_from_the_demo_checkpoints() -> None:
    demo = Path(openvino.__file__).parent / "demo_pair"
    for role in pair.ROLES:
        checkpoint, manifest = (
            open_checkpoint(demo / role),
            manifests.load(demo / "openvino" / role),
        )
        assert manifest.source.sha256 == checkpoint.weights_sha256
        assert manifest.tokenizer_sha256 == checkpoint.tokenizer_sha256
        assert manifest.num_parameters == checkpoint.num_parameters


@pytest.mark.openvino
def test_copied_demo_pair_passes_its_check_and_a_damaged_one_does_not(tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    demo = Path(openvino.__file__).parent / "demo_pair" / "openvino"
    shutil.copytree(demo, tmp_path / "pair")
    pair.check(tmp_path / "pair")
    (tmp_path / "pair" / "draft" / "openvino_model.bin").unlink()
    with pytest.raises(ValueError, match=r"names openvino_model\.bin, not in the folder"):
        pair.check(tmp_path / "pair")
