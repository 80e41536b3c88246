"""TensorRT-LLM builds: the exact commands, what is refused before they start, and a whole build
with real processes in TensorRT-LLM's place."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shlex
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from trtllm_toolchain import EXAMPLES, SITE, Toolchain
from trtllm_toolchain.convert import convert_parser, quantize_parser
from trtllm_toolchain.trtllm_build import build_parser
from typer.testing import CliRunner

from build_engines import corpus
from build_engines.__main__ import app, main
from build_engines.checkpoint import Checkpoint, open_checkpoint
from build_engines.tensorrt_llm import build, built, self_check
from build_engines.tensorrt_llm.models import PAIRS_FILE, Model, known_models, open_models
from build_engines.tensorrt_llm.options import Options
from build_engines.tensorrt_llm.plan import EnginePlan, script
from specserve import manifest as manifests

GOLDEN = Path(__file__).parent / "golden" / "tensorrt_llm"
CALIBRATION = ["--calibration", "/data/cnn_dailymail"]
CASES = {
    "llama-3.1-8b": ["--pair", "llama-3.1-8b"],
    "llama-3.3-70b-fp8-tp4-pp2": [
        *("--pair", "llama-3.3-70b", "--quantization", "fp8", "--tp-size", "4", "--pp-size", "2"),
        *("--draft-tp-size", "2", "--workers", "4", *CALIBRATION),
    ],
    "qwen2.5-32b-int4-awq": [
        *("--pair", "qwen2.5-32b", "--quantization", "int4_awq", "--dtype", "float16"),
        *("--draft-quantization", "none", "--tp-size", "2", *CALIBRATION),
    ],
    "qwen3-32b-fp8": [
        *("--pair", "qwen3-32b", "--quantization", "fp8", "--tp-size", "4", *CALIBRATION),
        *("--examples", "/src/TensorRT-LLM/examples", "--python", "/opt/venv/bin/python"),
    ],
    "vicuna-7b-int8": [
        *("--pair", "vicuna-7b", "--quantization", "int8_wo", "--max-draft-len", "5"),
        *("--max-batch-size", "8", "--max-seq-len", "1024", "--max-num-tokens", "2048"),
        *("--tokens-per-block", "64", "--timing-cache", "/cache/h100.cache"),
    ],
    "qwen2.5-7b-smoothquant": [
        *("--pair", "qwen2.5-7b", "--quantization", "int8_sq", "--draft-quantization", "int4_wo"),
        *CALIBRATION,
    ],
}
SHAPE = {
    "architectures": ["MistralForCausalLM"],
    "torch_dtype": "bfloat16",
    "vocab_size": 512,
    "max_position_embeddings": 1024,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_size": 512,
    "intermediate_size": 1024,
}


def make_checkpoint(folder: Path, *, text: str = "a text", **changes: Any) -> Path:
    """Write a checkpoint without a model: one weight of 6 numbers, and a real tokenizer."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({**SHAPE, **changes}))
    corpus.train_tokenizer([text]).save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text("{}")
    (folder / "generation_config.json").write_text('{"eos_token_id": 1}')
    write_weight(folder / "model.safetensors")
    return folder


def write_weight(file: Path) -> None:
    header = {"w": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}}
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + bytes(24))


def make_model(name: str = "m", **changes: Any) -> Model:
    """Describe a model that is not on disk."""
    return Model(name, Checkpoint(Path(name), {**SHAPE, "num_tokens": 500, **changes}))


def make_plans(
    draft: dict[str, Any] | None = None, target: dict[str, Any] | None = None, **options: Any
) -> list[EnginePlan]:
    models = {"draft": make_model("d", **(draft or {})), "target": make_model(**(target or {}))}
    given = {"calibration": Path("cnn_dailymail"), **options}
    return build.plan_pair(models, Options(**given), Path("out"))


def dry_run(*arguments: str) -> str:
    command = ["tensorrt_llm", "--output", "build/pair", "--dry-run", *arguments]
    result = CliRunner().invoke(app, command)
    if result.exception:
        raise result.exception
    return result.output


# The commands


@pytest.mark.parametrize("case", CASES)
def test_dry_run_prints_the_golden_commands(case: str) -> None:
    """A change of these files is a change of what runs on hardware: look at it."""
    golden = (GOLDEN / f"{case}.sh").read_text()
    assert dry_run(*CASES[case]) == golden


@pytest.mark.parametrize("case", CASES)
def test_golden_commands_pass_the_strict_parsers(case: str) -> None:
    parsers = {
        "trtllm-build": build_parser(),
        "convert_checkpoint.py": convert_parser(),
        "quantize.py": quantize_parser(),
    }
    lines = [shlex.split(line) for line in (GOLDEN / f"{case}.sh").read_text().splitlines()]
    parsed = [
        parsers[Path(line[i]).name].parse_args(line[i + 1 :])
        for line in lines
        for i in range(2)
        if Path(line[i]).name in parsers
    ]
    assert len(parsed) == 4


def test_no_golden_file_is_left_over() -> None:
    assert {file.stem for file in GOLDEN.iterdir()} == set(CASES)


def test_the_target_alone_verifies_and_both_reuse_blocks() -> None:
    lines = [shlex.split(line) for line in dry_run("--pair", "llama-3.1-8b").splitlines()]
    draft, target = (
        dict(zip(line[1::2], line[2::2], strict=True))
        for line in lines
        if line[0] == "trtllm-build"
    )
    verification = {"--speculative_decoding_mode": "draft_tokens_external", "--max_draft_len": "8"}
    assert target == {**target, **verification}
    assert not draft.keys() & verification.keys()
    different = {"--checkpoint_dir", "--output_dir"}
    assert {k: v for k, v in draft.items() if k not in different} == {
        k: v for k, v in target.items() if k not in {*different, *verification}
    }
    assert draft["--use_paged_context_fmha"] == "enable"
    assert draft["--kv_cache_type"] == "paged"


def test_own_checkpoints_are_planned_from_their_config(tmp_path: Path) -> None:
    target = make_checkpoint(tmp_path / "target")
    draft = make_checkpoint(tmp_path / "draft", torch_dtype="float32")
    output = dry_run("--target", str(target), "--draft", str(draft))
    assert f"llama/convert_checkpoint.py --model_dir {target} " in output
    assert "--dtype float16" in output.splitlines()[1]
    assert "hf download" not in output


def test_a_checkpoint_on_disk_overrides_what_is_known_of_it(tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "lmsys" / "vicuna-7b-v1.3", max_position_embeddings=700)
    models = known_models("vicuna-7b", tmp_path, on_disk=False)
    assert models["target"].checkpoint.max_seq_len == 700
    assert models["draft"].checkpoint.max_seq_len == 2048
    with pytest.raises(ValueError, match="vicuna-68m is not there: hf download double7/vicuna-68m"):
        known_models("vicuna-7b", tmp_path, on_disk=True)


def test_default_lengths_hold_a_step_of_all_sequences() -> None:
    draft, target = make_plans(max_batch_size=512, max_draft_len=16)
    assert draft.max_seq_len == target.max_seq_len == 1024
    assert target.compiled.max_num_tokens == 512 * (16 + 32)
    (small, _) = make_plans(max_batch_size=2)
    assert small.compiled.max_num_tokens == 2 * 1024


def test_every_known_pair_can_be_built() -> None:
    pairs = tomllib.loads(PAIRS_FILE.read_text())["pairs"]
    assert {"llama-3.1-8b", "llama-3.3-70b", "qwen2.5-32b", "vicuna-7b"} <= set(pairs)
    for pair in pairs:
        models = known_models(pair, Path("none"), on_disk=False)
        draft, target = build.plan_pair(models, Options(), Path("out"))
        assert size(draft) < size(target) / 5, pair


def size(it: EnginePlan) -> int:
    """Count the weights of the layers, about."""
    shape = it.model.checkpoint
    return shape.num_layers * shape.hidden_size * (shape.hidden_size + 3 * shape.ffn_size)


# What is refused before the build


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "fp16"}, "--dtype is fp16, must be one of auto, bfloat16, float16"),
        ({"quantization": "int3"}, "--quantization is int3, must be one of none, fp8, int8_wo"),
        ({"draft_quantization": "awq"}, "--draft-quantization is awq, must be one of none, fp8"),
        ({"kv_cache": "int8"}, "--kv-cache is int8: .* no KV block is reused; choose auto"),
        ({"kv_cache": "fp4"}, "--kv-cache is fp4, must be one of auto, fp8"),
        ({"kv_cache": "fp8"}, "KV cache is fp8 and its quantization none: .* choose --kv-cache"),
        ({"tokens_per_block": 48}, "--tokens-per-block is 48, must be one of 32, 64, 128"),
        ({"tp_size": 0}, "--tp-size is 0, must be 1 or more"),
        ({"max_draft_len": 0}, "--max-draft-len is 0, must be 1 or more"),
        ({"max_seq_len": -1}, "--max-seq-len is -1, must be 0 or more"),
        ({"tp_size": 3}, "target tp_size is 3, must divide the 4 attention .* one of 1, 2$"),
        (
            {"tp_size": 4},
            "target tp_size is 4, must divide the 2 KV heads of m: choose one of 1, 2",
        ),
        ({"draft_tp_size": 4}, "draft tp_size is 4, must divide the 2 KV heads of d"),
        ({"pp_size": 3}, "target pp_size is 3, must divide the 4 layers of m: .* one of 1, 2, 4"),
        (
            {"max_seq_len": 1025},
            "--max-seq-len is 1025, .* has 1024 positions: choose 1024 or less",
        ),
        ({"max_seq_len": 41, "max_draft_len": 40}, "--max-draft-len is 40, and .* leaves 9 beside"),
        ({"max_num_tokens": 2559}, "max_num_tokens is 2559, must be 2560 or more: 64 sequences"),
        ({"max_num_tokens": 65537}, "--max-num-tokens is 65537, .* choose 65536 or less"),
        ({"quantization": "fp8", "calibration": None}, "fp8 is calibrated: give --calibration DIR"),
    ],
)
def test_options_that_cannot_do_are_refused(options: dict[str, Any], message: str) -> None:
    assert make_plans()
    with pytest.raises(ValueError, match=message):
        make_plans(**options)


@pytest.mark.parametrize(
    ("target", "options", "message"),
    [
        (
            {"architectures": ["GemmaForCausalLM"]},
            {},
            "GemmaForCausalLM.*must be one of LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausal",
        ),
        (
            {"architectures": ["GPT2LMHeadModel"], "max_position_embeddings": None},
            {},
            "GPT2LMHeadModel.*must be one of LlamaForCausalLM",
        ),
        ({"architectures": None}, {}, "m is None, must be one of LlamaForCausalLM"),
        (
            {"architectures": ["Qwen3ForCausalLM"]},
            {"quantization": "int8_wo"},
            "target quantization is int8_wo, must be one of none, fp8 for Qwen3ForCausalLM",
        ),
        (
            {"architectures": ["Qwen3ForCausalLM"]},
            {"pp_size": 2},
            "target pp_size is 2, must be 1 for Qwen3ForCausalLM: raise --tp-size",
        ),
        ({"quantization_config": {"quant_method": "awq"}}, {}, "m is quantized already, by awq"),
        (
            {"intermediate_size": 1026},
            {"tp_size": 2, "quantization": "int4_awq"},
            "513 on each of 2",
        ),
        ({"intermediate_size": 1025}, {"tp_size": 2}, "must divide the 1025 rows of intermediate"),
        (
            {"sliding_window": 512},
            {"max_seq_len": 513},
            "attends to the last 512 tokens: .* choose 512 or less",
        ),
        ({"num_tokens": 513}, {}, "tokenizer of 513 tokens and a vocab_size of 512: resize"),
        ({"num_tokens": 499}, {}, "draft d has a tokenizer of 500 tokens, the target's has 499"),
    ],
)
def test_models_that_cannot_do_are_refused(
    target: dict[str, Any], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        make_plans(target=target, **options)


def test_a_window_that_is_not_used_is_no_limit() -> None:
    unused = {"sliding_window": 512, "use_sliding_window": False}
    assert make_plans(target=unused)[0].max_seq_len == 1024
    assert make_plans(target={"sliding_window": 512})[0].max_seq_len == 512


def test_rows_may_be_padded_differently_but_tokens_must_be_equal(tmp_path: Path) -> None:
    """Qwen2.5-32B has 152064 rows, 0.5B 151936, and both the same 151665 tokens."""
    target = make_checkpoint(tmp_path / "target", vocab_size=640)
    draft = make_checkpoint(tmp_path / "draft")
    models = open_models(target, draft)
    planned = build.plan_pair(models, Options(), tmp_path)
    assert [it.compiled.vocab_rows for it in planned] == [512, 640]
    assert planned[0].model.num_tokens == planned[1].model.num_tokens < 512

    text = (draft / "tokenizer.json").read_text()
    (draft / "tokenizer.json").write_text(text.replace("</s>", "<end>"))
    with pytest.raises(ValueError, match="token 1 is '<end>' for the draft and '</s>' for the tar"):
        build.plan_pair(open_models(target, draft), Options(), tmp_path)


def test_pair_or_two_checkpoints_must_be_named() -> None:
    for arguments in ([], ["--target", "a"], ["--pair", "vicuna-7b", "--draft", "a"]):
        with pytest.raises(ValueError, match="give --pair, or --target and --draft"):
            dry_run(*arguments)
    with pytest.raises(ValueError, match=r"--pair is gpt-5, must be one of llama-3\.1-8b"):
        dry_run("--pair", "gpt-5")


def test_a_refusal_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--pair", "vicuna-7b", "--output", "build/pair", "--tp-size", "5"]
    monkeypatch.setattr("sys.argv", ["build_engines", "tensorrt_llm", "--dry-run", *arguments])
    with pytest.raises(SystemExit, match="1"):
        main()
    assert re.fullmatch(r"error: target tp_size is 5, must divide .*\n", capsys.readouterr().err)


def test_a_second_copy_of_the_weights_is_not_counted_and_a_missing_shard_is(tmp_path: Path) -> None:
    """Mistral's folders hold consolidated.safetensors beside the shards."""
    folder = make_checkpoint(tmp_path / "a")
    write_weight(folder / "consolidated.safetensors")
    index = {"weight_map": {"w": "model.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert open_checkpoint(folder).num_parameters == 6
    index["weight_map"]["v"] = "model-2.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"has no model-2\.safetensors, one of 1 missing files"):
        open_checkpoint(folder)


# A whole build


@pytest.fixture
def toolchain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Toolchain:
    return Toolchain(tmp_path / "toolchain", monkeypatch)


@pytest.fixture
def checkpoints(tmp_path: Path) -> dict[str, Model]:
    target = make_checkpoint(tmp_path / "target", vocab_size=640)
    draft = make_checkpoint(tmp_path / "draft", num_hidden_layers=2)
    tokenizer = json.loads((draft / "tokenizer.json").read_text())
    (draft / "tokenizer.json").write_text(json.dumps(tokenizer, indent=4))  # layout only
    (tmp_path / "cnn_dailymail").mkdir()
    return open_models(target, draft)


def plan_build(models: dict[str, Model], output: Path, **options: Any) -> list[EnginePlan]:
    calibration = models["target"].checkpoint.path.parent / "cnn_dailymail"
    given = Options(examples=EXAMPLES, calibration=calibration, **options)
    return build.plan_pair(models, given, output)


def names(toolchain: Toolchain) -> list[str]:
    return [call[0] for call in toolchain.calls]


def test_a_build_runs_what_the_dry_run_prints_and_ends_with_a_pair(
    toolchain: Toolchain, checkpoints: dict[str, Model], tmp_path: Path
) -> None:
    output = tmp_path / "pair"
    plans = plan_build(checkpoints, output, tp_size=2, max_draft_len=3, workers=2)
    build.build(plans)

    printed = [shlex.split(line) for line in script(plans).splitlines() if line[0] != "#"]
    convert, compiled = "llama/convert_checkpoint.py", "trtllm-build"
    assert names(toolchain)[:4] == [convert, compiled, convert, compiled]
    for call, line in zip(toolchain.calls, printed[:4], strict=False):
        assert call[1:] == line[1 if call[0] == compiled else 2 :]
    assert toolchain.calls[4] == ["Executor", str(output / "draft"), "DECODER_ONLY"]
    assert names(toolchain).count("mpirun") == 1
    assert names(toolchain).count("Executor") == names(toolchain).count("shutdown") == 3
    assert [call[1] for call in toolchain.calls if call[0] == "enqueue_request"] == [
        *("32 + 0", "32 + 0", "32 + 1")
    ]

    draft, target = (manifests.load(output / role) for role in ("draft", "target"))
    manifests.check_pair(draft=draft, target=target)
    assert target.compiled is not None
    assert (target.compiled.max_draft_len, target.compiled.world_size) == (3, 2)
    assert (target.vocab_size, target.compiled.vocab_rows) == (draft.vocab_size, 640)
    assert (target.max_seq_len, target.precision, target.num_parameters) == (1024, "bf16", 6)
    assert target.files[:3] == ("rank0.engine", "rank1.engine", "config.json")
    assert target.builder["tensorrt-llm"] == "1.2.1"
    assert target.source.sha256 == checkpoints["target"].checkpoint.weights_sha256
    assert (output / "target" / "generation_config.json").is_file()
    assert (output / "timing.cache").is_file()
    assert not (output / "converted").exists()

    toolchain_before = len(toolchain.calls)
    with pytest.raises(
        ValueError, match="draft is not empty: choose another output, or add --over"
    ):
        build.build(plans)
    assert len(toolchain.calls) == toolchain_before


def test_what_the_builder_turned_off_is_found_before_the_target_is_built(
    toolchain: Toolchain,
    checkpoints: dict[str, Model],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("STAND_IN_OLD_GPU", "1")
    message = r"draft/config\.json: build_config\.plugin_config\.use_paged_context_fmha is False"
    with pytest.raises(ValueError, match=message):
        build.build(plan_build(checkpoints, tmp_path / "pair", quantization="fp8"))
    assert names(toolchain) == ["quantize.py", "trtllm-build"]
    assert not (tmp_path / "pair" / "draft" / "manifest.json").exists()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("version", "1.2.0"),
        ("pretrained_config.mapping.tp_size", 2),
        ("pretrained_config.mapping.pp_size", 2),
        ("build_config.kv_cache_type", "CONTINUOUS"),
        ("build_config.max_batch_size", 32),
        ("build_config.max_input_len", 1000),
        ("build_config.max_seq_len", 1024),  # without the draft that the builder adds
        ("build_config.max_num_tokens", 4096),
        ("build_config.max_draft_len", 0),
        ("build_config.plugin_config.use_paged_context_fmha", False),
        ("build_config.plugin_config.tokens_per_block", 64),
        ("build_config.plugin_config", None),
    ],
)
def test_an_engine_that_is_not_what_was_asked_for_is_refused(
    tmp_path: Path, key: str, value: Any
) -> None:
    _, target = make_plans()
    target = dataclasses.replace(target, output=tmp_path)
    sizes = {"max_batch_size": 64, "max_input_len": 1024, "max_seq_len": 1032}
    plugins = {"use_paged_context_fmha": True, "tokens_per_block": 32}
    limits = {"max_num_tokens": 8192, "max_draft_len": 8, "kv_cache_type": "PAGED"}
    config: dict[str, Any] = {
        "version": "1.2.1",
        "pretrained_config": {"mapping": {"tp_size": 1, "pp_size": 1}},
        "build_config": {**sizes, **limits, "plugin_config": plugins},
    }
    with pytest.raises(ValueError, match=r"has no config\.json: trtllm-build wrote no engine"):
        built.check_built(target)
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"has no rank0\.engine"):
        built.check_built(target)
    (tmp_path / "rank0.engine").touch()
    built.check_built(target)
    *path, last = key.split(".")
    section = config
    for part in path:
        section = section[part]
    section[last] = value
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=rf"{re.escape(key)}\S* is {value!r}, must be "):
        built.check_built(target)


def test_a_command_that_fails_ends_the_build_with_its_line(
    toolchain: Toolchain,
    checkpoints: dict[str, Model],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And the older engine it was to replace has lost its manifest, so that nobody serves half."""
    older = tmp_path / "pair" / "draft"
    older.mkdir(parents=True)
    for name in ("manifest.json", "rank0.engine", "mine.txt"):
        (older / name).touch()
    monkeypatch.setenv("STAND_IN_FAILS", "convert")
    with pytest.raises(ValueError, match=r"python3 ended with status 3: python3 .*convert_check"):
        build.build(plan_build(checkpoints, tmp_path / "pair"), overwrite=True)
    assert [file.name for file in older.iterdir()] == ["mine.txt"]


@pytest.fixture
def bindings(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Import the stand-in as `tensorrt_llm`, in this process and for this test."""
    monkeypatch.syspath_prepend(SITE)
    others = {name: sys.modules.pop(name) for name in list(sys.modules) if is_bindings(name)}
    yield
    for name in list(filter(is_bindings, sys.modules)):
        del sys.modules[name]
    sys.modules.update(others)


def is_bindings(module: str) -> bool:
    return module.partition(".")[0] == "tensorrt_llm"


@pytest.mark.usefixtures("bindings")
@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("", ""),
        ("refused", "the executor refuses: refused"),
        ("silent", "no answer after 120 s"),
        ("out of range", r"answer is \[1000000000\], must be 1 to 1 ids in \[0, 512\)"),
        ("rejects", r"is the target's own, and verifying it gave \["),
    ],
)
def test_an_engine_that_does_not_do_its_work_fails_the_self_check(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str, message: str
) -> None:
    monkeypatch.setenv("STAND_IN_LOG", str(tmp_path / "log"))
    monkeypatch.setenv("STAND_IN_FAULT", fault)
    engine_dir = str(make_engine(tmp_path))
    if not fault:
        self_check.check_forward(engine_dir)
        return
    with pytest.raises(ValueError, match=message):
        self_check.check_forward(engine_dir)


def test_the_self_check_ends_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["self_check", str(tmp_path)])
    with pytest.raises(SystemExit, match="1"):
        self_check.main()
    assert re.fullmatch(
        rf"error: {tmp_path}: .* has no manifest\.json.*\n", capsys.readouterr().err
    )


def make_engine(folder: Path) -> Path:
    """Write a target's engine folder as a build leaves it."""
    models = dict.fromkeys(
        ("draft", "target"), Model("m", open_checkpoint(make_checkpoint(folder / "m")))
    )
    _, target = build.plan_pair(models, Options(), folder)
    target.output.mkdir()
    (target.output / "rank0.engine").touch()
    plugins = {"use_paged_context_fmha": True}
    config = {"build_config": {"max_draft_len": 8, "plugin_config": plugins}}
    (target.output / "config.json").write_text(json.dumps(config))
    built.finish(target, folder / "m", {"tensorrt-llm": "1.2.1"})
    return target.output


# An installation that cannot do


def refuse(plans: list[EnginePlan], toolchain: Toolchain, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        build.build(plans)
    assert len(str(caught.value).splitlines()) == 1
    assert toolchain.calls == []
    assert not plans[0].output.exists()


def test_another_version_is_refused_before_anything_runs(
    toolchain: Toolchain,
    checkpoints: dict[str, Model],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plans = plan_build(checkpoints, tmp_path / "pair")
    monkeypatch.setenv("STAND_IN_VERSION", "1.1.0")
    refuse(plans, toolchain, r"^trtllm-build is 1\.1\.0, must be 1\.2\.1, the last one with comp")
    toolchain.set_version("1.3.0rc15")
    refuse(plans, toolchain, r"^tensorrt-llm of .*/python3 is 1\.3\.0rc15, must be 1\.2\.1")
    toolchain.remove_package()
    refuse(plans, toolchain, r"python3 has no tensorrt-llm: build in nvcr\.io/nvidia/tritonserver")


def test_what_is_not_installed_is_named_before_anything_runs(
    toolchain: Toolchain,
    checkpoints: dict[str, Model],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    output = tmp_path / "pair"
    plans = plan_build(checkpoints, output)
    options = dataclasses.replace(plans[0].options, examples=tmp_path)
    elsewhere = build.plan_pair(checkpoints, options, output)
    refuse(elsewhere, toolchain, r"llama/convert_checkpoint\.py is not there: give --examples")
    away = dataclasses.replace(options, calibration=tmp_path / "nothing")
    refuse(
        build.plan_pair(checkpoints, away, output),
        toolchain,
        "--calibration is .*nothing, which is no folder",
    )
    monkeypatch.setenv("PATH", os.environ["PATH"].partition(os.pathsep)[0])
    for program, ranks in (("mpirun", 2), ("trtllm-build", 1), ("python3", 1)):
        toolchain.remove_program(program)
        refuse(
            plan_build(checkpoints, output, tp_size=ranks),
            toolchain,
            f"^{program} is not on PATH: build in nvcr",
        )
