"""The checkpoint: a Hugging Face folder as the builders see it, checked before any long work.

Reads JSON and the safetensors header only; torch and transformers stay out.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TOKENIZER_FILE = "tokenizer.json"
INDEX_FILE = "model.safetensors.index.json"
DECODER_SUFFIXES = ("ForCausalLM", "LMHeadModel")


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A decoder-only model with its tokenizer.

    Attributes:
        path: the folder.
        config: its config.json.
    """

    path: Path
    config: dict[str, Any]

    @property
    def vocab_size(self) -> int:
        return self._count("vocab_size")

    @property
    def max_seq_len(self) -> int:
        return self._count("max_position_embeddings")

    @property
    def num_layers(self) -> int:
        return self._count("num_hidden_layers")

    @property
    def num_heads(self) -> int:
        return self._count("num_attention_heads")

    @property
    def num_kv_heads(self) -> int:
        if self.config.get("num_key_value_heads") is None:
            return self.num_heads
        return self._count("num_key_value_heads")

    @property
    def hidden_size(self) -> int:
        return self._count("hidden_size")

    @property
    def ffn_size(self) -> int:
        return self._count("intermediate_size")

    @property
    def head_dim(self) -> int:
        if self.config.get("head_dim") is None:
            return self.hidden_size // self.num_heads
        return self._count("head_dim")

    @property
    def weight_files(self) -> list[Path]:
        """Return the shards that the index names, which leaves out a second copy of the weights."""
        index = self.path / INDEX_FILE
        if not index.is_file():
            return sorted(self.path.glob("*.safetensors"))
        names = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
        return sorted(self.path / name for name in set(names))

    @property
    def tokenizer_sha256(self) -> str:
        return sha256(self.path / TOKENIZER_FILE)

    @property
    def weights_sha256(self) -> str:
        return sha256(*self.weight_files)

    @property
    def num_parameters(self) -> int:
        """Count the stored weights; a tied one is stored once."""
        return sum(_count_parameters(file) for file in self.weight_files)

    def _count(self, key: str) -> int:
        value = self.config.get(key)
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{self.path}/config.json: {key} is {value!r}, must be at least 1")
        return value


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Check that a folder is something the builders can use.

    Raises:
        ValueError: if it is not there, no decoder-only model, or without safetensors or tokenizer.
    """
    folder = Path(path)
    config_file = folder / "config.json"
    if not config_file.is_file():
        raise ValueError(f"{folder} has no config.json: give a Hugging Face checkpoint folder")
    checkpoint = Checkpoint(folder, json.loads(config_file.read_text(encoding="utf-8")))
    names = checkpoint.config.get("architectures") or []
    encoder_decoder = bool(checkpoint.config.get("is_encoder_decoder"))
    if encoder_decoder or not any(name.endswith(DECODER_SUFFIXES) for name in names):
        raise ValueError(
            f"{folder} is {names or 'of unknown architecture'}, not a decoder-only language model: "
            f"give a checkpoint whose architecture ends in {' or '.join(DECODER_SUFFIXES)}"
        )
    if not (folder / TOKENIZER_FILE).is_file():
        raise ValueError(
            f"{folder} has no {TOKENIZER_FILE}: save the fast tokenizer of the model there"
        )
    if not checkpoint.weight_files:
        raise ValueError(f"{folder} has no *.safetensors: save it with save_pretrained()")
    if missing := [file.name for file in checkpoint.weight_files if not file.is_file()]:
        raise ValueError(
            f"{folder} has no {missing[0]}, one of {len(missing)} missing files that {INDEX_FILE} "
            "names: download it again"
        )
    return checkpoint


def sha256(*files: Path) -> str:
    """Digest the bytes of some files, one after the other, as hex."""
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            while chunk := stream.read(1 << 20):
                digest.update(chunk)
    return digest.hexdigest()


def _count_parameters(file: Path) -> int:
    with file.open("rb") as stream:
        header_bytes = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(header_bytes))
    return sum(math.prod(t["shape"]) for name, t in header.items() if name != "__metadata__")
