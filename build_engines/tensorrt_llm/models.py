"""The two models of a pair: checkpoints on disk, or, for a dry run, what is known of them."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from build_engines.checkpoint import TOKENIZER_FILE, Checkpoint, open_checkpoint

PAIRS_FILE = Path(__file__).with_name("pairs.toml")
ROLES = ("draft", "target")  # the order of the build: what fails, fails on the small one


@dataclass(frozen=True)
class Model:
    """What one engine is built from.

    Attributes:
        name: Hugging Face id, or the checkpoint's folder.
        checkpoint: its path need not exist for a dry run of a known model.
    """

    name: str
    checkpoint: Checkpoint

    @property
    def is_on_disk(self) -> bool:
        return (self.checkpoint.path / "config.json").is_file()

    @cached_property
    def tokens(self) -> dict[str, int] | None:
        """Return the tokenizer's vocabulary, added tokens included; None if it is not on disk."""
        file = self.checkpoint.path / TOKENIZER_FILE
        if not file.is_file():
            return None
        vocab: dict[str, int] = Tokenizer.from_file(str(file)).get_vocab()
        return vocab

    @property
    def num_tokens(self) -> int:
        """Count the token ids that have a text."""
        if self.tokens is None:
            count: int = self.checkpoint.config["num_tokens"]
            return count
        return max(self.tokens.values()) + 1

    @property
    def dtype(self) -> str:
        """Return what the checkpoint computes in; TensorRT-LLM takes float32 as float16."""
        config = self.checkpoint.config
        dtype = config.get("torch_dtype") or config.get("dtype")
        return "bfloat16" if dtype == "bfloat16" else "float16"

    @property
    def max_seq_len(self) -> int:
        """Return the longest sequence that every layer sees all of."""
        return min(
            self.checkpoint.max_seq_len, self.attention_window or self.checkpoint.max_seq_len
        )

    @property
    def attention_window(self) -> int | None:
        """Return how many tokens back a layer looks, if that is less than all."""
        config = self.checkpoint.config
        if not config.get("use_sliding_window", True):
            return None
        window: int | None = config.get("sliding_window")
        return window


def open_models(target_dir: Path, draft_dir: Path) -> dict[str, Model]:
    """Open the two checkpoints of one's own pair, by role.

    Raises:
        ValueError: if one cannot do.
    """
    folders = {"draft": draft_dir, "target": target_dir}
    return {role: Model(str(folder), open_checkpoint(folder)) for role, folder in folders.items()}


def known_models(pair: str, checkpoints: Path, *, on_disk: bool) -> dict[str, Model]:
    """Find the two models of a known pair, by role.

    Args:
        pair: a key of `pairs` in pairs.toml.
        checkpoints: folder with a subfolder for each Hugging Face id.
        on_disk: they must be there; else what is missing is taken from pairs.toml.

    Raises:
        ValueError: on a pair that is not known, or a checkpoint that is missing or cannot do.
    """
    known = _known()
    if pair not in known["pairs"]:
        raise ValueError(f"--pair is {pair}, must be one of {', '.join(known['pairs'])}")
    return {
        role: _model(known["pairs"][pair][role], checkpoints, known["models"], on_disk)
        for role in ROLES
    }


def download_command(model: Model) -> list[str]:
    """Return what fetches a known model to where it is looked for."""
    return ["hf", "download", model.name, "--local-dir", str(model.checkpoint.path)]


def _model(name: str, checkpoints: Path, models: dict[str, Any], on_disk: bool) -> Model:
    folder = checkpoints / name
    if folder.is_dir():
        return Model(name, open_checkpoint(folder))
    model = Model(name, Checkpoint(folder, models[name]))
    if on_disk:
        raise ValueError(f"{folder} is not there: {' '.join(download_command(model))}")
    return model


def _known() -> dict[str, Any]:
    return tomllib.loads(PAIRS_FILE.read_text(encoding="utf-8"))
