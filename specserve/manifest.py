"""The manifest: what an engine folder holds, and whether two of them form a pair.

`build_engines` writes `manifest.json` beside every engine it makes; serving reads it before it
loads anything heavy. This file owns the format and imports no engine.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FORMAT_VERSION = 1
MANIFEST_FILE = "manifest.json"
ENGINES = ("openvino", "tensorrt_llm", "torch")
PRECISIONS = ("fp32", "bf16", "fp16", "fp8", "int8", "int4")
QUANTIZATIONS = ("none", "fp8", "int8_wo", "int4_wo", "int8_sq", "int4_awq")
KV_CACHES = ("bf16", "fp16", "fp8")
OPTIONAL = ("compiled",)
COUNTS = (
    "vocab_size",
    "max_seq_len",
    "num_parameters",
    "num_layers",
    "num_kv_heads",
    "head_dim",
    "hidden_size",
)


@dataclass(frozen=True, slots=True)
class Source:
    """The checkpoint an engine was built from.

    Attributes:
        name: what to call it, for people.
        sha256: hex digest of its safetensors; of all shards in the order of their names.
    """

    name: str
    sha256: str

    def __post_init__(self) -> None:
        _check_text("source.name", self.name)
        _check_digest("source.sha256", self.sha256)


@dataclass(frozen=True, slots=True)
class Compiled:
    """What a TensorRT-LLM engine was compiled for, which its executor cannot exceed.

    Attributes:
        quantization: one of QUANTIZATIONS, as TensorRT-LLM spells them.
        kv_cache: one of KV_CACHES.
        vocab_rows: of the embedding in the checkpoint, at least the manifest's `vocab_size`: ids
            from there on have no text, and differ in number between models of one tokenizer.
        max_batch_size: sequences of a step.
        max_input_len: tokens of one call's input: prompt, output so far and draft together.
        max_num_tokens: tokens of a step that are not in the KV cache yet, over all sequences.
        max_draft_len: draft tokens of one verification; 0 on a draft, which verifies none.
        tokens_per_block: token slots of a KV block.
        tp_size: tensor-parallel ranks.
        pp_size: pipeline-parallel ranks.

    Raises:
        ValueError: on a value out of its range, of another type, or that contradicts another.
    """

    quantization: str
    kv_cache: str
    vocab_rows: int
    max_batch_size: int
    max_input_len: int
    max_num_tokens: int
    max_draft_len: int
    tokens_per_block: int
    tp_size: int
    pp_size: int

    def __post_init__(self) -> None:
        _check_choice("compiled.quantization", self.quantization, QUANTIZATIONS)
        _check_choice("compiled.kv_cache", self.kv_cache, KV_CACHES)
        for field in dataclasses.fields(self)[2:]:
            least = 0 if field.name == "max_draft_len" else 1
            _check_count(f"compiled.{field.name}", getattr(self, field.name), least)
        if self.max_num_tokens < self.num_step_tokens:
            raise ValueError(
                f"compiled.max_num_tokens is {self.max_num_tokens}, must be {self.num_step_tokens} "
                f"or more: {self.max_batch_size} sequences of {self.max_draft_len} draft tokens, "
                f"each with a block of {self.tokens_per_block} that may not be cached; raise it, "
                "or lower max_batch_size"
            )

    @property
    def num_step_tokens(self) -> int:
        """Count what a step of full size may have to compute: drafts and last blocks."""
        return self.max_batch_size * (self.max_draft_len + self.tokens_per_block)

    @property
    def world_size(self) -> int:
        """Return the number of ranks, which is that of GPUs and of `rank*.engine` files."""
        return self.tp_size * self.pp_size


@dataclass(frozen=True, slots=True)
class Manifest:
    """One engine folder.

    Attributes:
        engine: one of ENGINES, the name under which serving finds the engine.
        precision: one of PRECISIONS, of the stored weights.
        vocab_size: rows of the logits or, with `compiled`, tokens of the tokenizer; both engines of
            a pair must have the same.
        tokenizer_sha256: hex digest of tokenizer.json.
        max_seq_len: prompt and output tokens that one sequence may hold.
        num_parameters: tied weights count once.
        source: the checkpoint.
        builder: package name to version, of what built the engine.
        files: names inside the folder that the engine cannot do without.
        format_version: of the manifest itself.
        compiled: of `tensorrt_llm` engines, and only of them.

    Raises:
        ValueError: on a value out of its range or of another type.
    """

    engine: str
    precision: str
    vocab_size: int
    tokenizer_sha256: str
    max_seq_len: int
    num_parameters: int
    num_layers: int
    num_kv_heads: int
    head_dim: int
    hidden_size: int
    source: Source
    builder: Mapping[str, str]
    files: tuple[str, ...]
    format_version: int = FORMAT_VERSION
    compiled: Compiled | None = None

    def __post_init__(self) -> None:
        _check_version(self.format_version)
        _check_choice("engine", self.engine, ENGINES)
        _check_choice("precision", self.precision, PRECISIONS)
        _check_digest("tokenizer_sha256", self.tokenizer_sha256)
        for name in COUNTS:
            _check_count(name, getattr(self, name))
        for package, version in self.builder.items():
            _check_text(f"builder.{package}", version)
        for file in self.files:
            _check_text("files", file)
            if Path(file).name != file:
                raise ValueError(f"files names {file!r}, must be bare names inside the folder")
        self._check_compiled()

    def _check_compiled(self) -> None:
        if (self.compiled is not None) != (self.engine == "tensorrt_llm"):
            raise ValueError(
                f"compiled is {self.compiled}, and the engine {self.engine}: "
                "tensorrt_llm engines have that section, others do not"
            )
        if self.compiled and self.compiled.vocab_rows < self.vocab_size:
            raise ValueError(
                f"compiled.vocab_rows is {self.compiled.vocab_rows}, must be at least the "
                f"{self.vocab_size} tokens of vocab_size"
            )


def load(engine_dir: str | Path) -> Manifest:
    """Read and check the manifest of an engine folder.

    Raises:
        ValueError: if the manifest is not there, is not valid, or names a file that is not there.
    """
    folder = Path(engine_dir)
    path = folder / MANIFEST_FILE
    if not path.is_file():
        raise ValueError(f"{folder} has no {MANIFEST_FILE}: build it with python -m build_engines")
    try:
        manifest = _parse(json.loads(path.read_text(encoding="utf-8")))
    except ValueError as error:  # what json and utf-8 raise are ValueErrors too
        raise ValueError(f"{path}: {error}") from error
    if missing := _missing_files(manifest, folder):
        raise ValueError(f"{path} names {missing}, not in the folder: build the engine again")
    return manifest


def save(manifest: Manifest, engine_dir: str | Path) -> None:
    """Write the manifest into its engine folder.

    Raises:
        ValueError: if it names a file that is not there yet; a manifest is written last.
    """
    folder = Path(engine_dir)
    if missing := _missing_files(manifest, folder):
        raise ValueError(f"{folder} has no {missing}: write the manifest after all other files")
    values = dataclasses.asdict(manifest)
    if manifest.compiled is None:
        del values["compiled"]
    text = json.dumps(values, indent=2) + "\n"
    (folder / MANIFEST_FILE).write_text(text, encoding="utf-8")


def check_pair(draft: Manifest, target: Manifest) -> None:
    """Refuse two engines that cannot speculate together.

    Raises:
        ValueError: if engine, vocabulary or tokenizer differ, or if the draft cannot follow as many
            or as long sequences as the target.
    """
    if draft.engine != target.engine:
        raise ValueError(
            f"draft engine is {draft.engine!r}, the target's is {target.engine!r}: "
            f"build the draft for {target.engine} too"
        )
    if draft.vocab_size != target.vocab_size:
        raise ValueError(
            f"draft vocab_size is {draft.vocab_size}, the target's is {target.vocab_size}: "
            "choose a draft with the target's vocabulary"
        )
    if draft.tokenizer_sha256 != target.tokenizer_sha256:
        raise ValueError(
            f"draft tokenizer_sha256 is {draft.tokenizer_sha256[:12]}..., the target's is "
            f"{target.tokenizer_sha256[:12]}...: the same token id would mean different text; "
            "choose a draft trained with the target's tokenizer.json, or, if the two differ in "
            "layout only, copy the target's into the draft checkpoint and build again"
        )
    if draft.max_seq_len < target.max_seq_len:
        raise ValueError(
            f"draft max_seq_len is {draft.max_seq_len}, the target's is {target.max_seq_len}: "
            f"nothing could be drafted past token {draft.max_seq_len}; choose a draft that reaches "
            f"{target.max_seq_len}, or lower max_position_embeddings in the target's config.json "
            f"to {draft.max_seq_len} and build again"
        )
    if draft.compiled and target.compiled:
        _check_compiled_pair(draft.compiled, target.compiled)


def _check_compiled_pair(draft: Compiled, target: Compiled) -> None:
    for name in ("max_batch_size", "max_input_len"):
        theirs, ours = getattr(target, name), getattr(draft, name)
        if ours < theirs:
            raise ValueError(
                f"draft {name} is {ours}, the target's is {theirs}: build both again, in one go"
            )
    if draft.tokens_per_block != target.tokens_per_block:
        raise ValueError(
            f"draft tokens_per_block is {draft.tokens_per_block}, the target's is "
            f"{target.tokens_per_block}: build both again, in one go"
        )
    if draft.max_draft_len:
        raise ValueError(
            f"draft max_draft_len is {draft.max_draft_len}, must be 0: it was built as a target; "
            "build both again, in one go"
        )
    if not target.max_draft_len:
        raise ValueError(
            "target max_draft_len is 0, must be 1 or more: it was built as a draft; "
            "build both again, in one go, with --max-draft-len 8"
        )


def _parse(data: object) -> Manifest:
    values = _object("the manifest", data)
    if "format_version" in values:  # first: another version has other keys
        _check_version(values["format_version"])
    _check_keys("the manifest", values, Manifest)
    source = _object("source", values["source"])
    _check_keys("source", source, Source)
    _object("builder", values["builder"])
    if not isinstance(values["files"], list):
        raise ValueError(f"files is {values['files']!r}, must be a list of names")
    sections: dict[str, Any] = {"source": Source(**source), "files": tuple(values["files"])}
    if "compiled" in values:
        compiled = _object("compiled", values["compiled"])
        _check_keys("compiled", compiled, Compiled)
        sections["compiled"] = Compiled(**compiled)
    return Manifest(**{**values, **sections})


def _missing_files(manifest: Manifest, folder: Path) -> str:
    return ", ".join(file for file in manifest.files if not (folder / file).is_file())


def _object(name: str, data: object) -> dict[str, Any]:
    if not isinstance(data, dict):
        raise ValueError(f"{name} is {data!r}, must be a JSON object")
    return data


def _check_keys(
    name: str, given: Collection[str], kind: type[Manifest | Source | Compiled]
) -> None:
    known = [field.name for field in dataclasses.fields(kind)]
    for key in given:
        if key not in known:
            raise ValueError(
                f"{name} has the unknown key {key!r}, nearest is {_near(key, known)!r}"
            )
    for key in known:
        if key not in given and key not in OPTIONAL:
            raise ValueError(f"{name} has no {key!r}, must have {', '.join(known)}")


def _check_version(version: object) -> None:
    if version != FORMAT_VERSION:
        raise ValueError(
            f"format_version is {version!r}, this SpecServe reads {FORMAT_VERSION}: "
            "build the engine again"
        )


def _check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        near = _near(str(value), choices)
        raise ValueError(f"{name} is {value!r}, must be one of {choices}, nearest is {near!r}")


def _check_text(name: str, value: object) -> None:
    if not isinstance(value, str) or not value:
        raise ValueError(f"{name} is {value!r}, must be a text that is not empty")


def _check_digest(name: str, value: object) -> None:
    if not isinstance(value, str) or len(value) != 64 or set(value) - set("0123456789abcdef"):
        raise ValueError(f"{name} is {value!r}, must be 64 lower-case hex digits")


def _check_count(name: str, value: object, least: int = 1) -> None:
    if type(value) is not int or value < least:  # a bool is an int, but not a count
        raise ValueError(f"{name} is {value!r}, must be a whole number of at least {least}")


def _near(name: str, known: Collection[str]) -> str:
    return difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
