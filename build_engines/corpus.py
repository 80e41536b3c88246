"""The corpus: Python's own standard library as training text, and what is held out of it."""

from __future__ import annotations

import random
import sysconfig
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

VOCAB_SIZE = 4096
BOS, EOS = "<s>", "</s>"
NUM_HELD_OUT = 20
SMALLEST_DOCUMENT = 200  # characters
EXCLUDED = ("site-packages", "/test/", "lib2to3/tests")


def library_documents() -> list[str]:
    """Read the standard library of this Python, without tests and third-party packages, shuffled.

    The order is seeded, but the library changes from one Python to the next, and the order with it.
    """
    root = _root()
    paths = sorted(str(path) for path in root.rglob("*.py"))
    kept = [path for path in paths if not any(part in path for part in EXCLUDED)]
    documents = [text for text in map(_read, kept) if len(text) > SMALLEST_DOCUMENT]
    random.Random(0).shuffle(documents)
    return documents


def split(documents: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the training documents and the held-out ones."""
    return list(documents[NUM_HELD_OUT:]), list(documents[:NUM_HELD_OUT])


def test_documents() -> list[str]:
    """Read the standard library's own tests, which no training document comes from, shuffled.

    Raises:
        ValueError: if this Python was installed without them.
    """
    paths = sorted((_root() / "test").glob("test_*.py"))
    if not paths:
        raise ValueError(f"{_root() / 'test'} holds no tests: use a Python that ships its tests")
    documents = [text for text in map(_read, paths) if len(text) > SMALLEST_DOCUMENT]
    random.Random(1).shuffle(documents)
    return documents


def train_tokenizer(documents: Iterable[str]) -> Tokenizer:
    """Train a byte-level BPE tokenizer: any text round-trips, id 0 is BOS and id 1 is EOS."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    return tokenizer


def encode(tokenizer: Tokenizer, documents: Iterable[str]) -> NDArray[np.int64]:
    """Concatenate documents as token ids [n], each between BOS and EOS where there are such."""
    before, after = _special_ids(tokenizer, BOS), _special_ids(tokenizer, EOS)
    ids: list[int] = []
    for document in documents:
        ids += [*before, *tokenizer.encode(document, add_special_tokens=False).ids, *after]
    return np.array(ids, dtype=np.int64)


def windows(ids: NDArray[np.int64], num_windows: int, length: int) -> NDArray[np.int64]:
    """Cut evenly spaced windows [num_windows, length] out of a text.

    Raises:
        ValueError: if the text is shorter than one window.
    """
    if len(ids) < length:
        raise ValueError(f"the text has {len(ids)} tokens, must have at least {length}")
    starts = np.linspace(0, len(ids) - length, num_windows).astype(int)
    return ids[starts[:, None] + np.arange(length)]


def _special_ids(tokenizer: Tokenizer, token: str) -> list[int]:
    token_id = tokenizer.token_to_id(token)
    return [] if token_id is None else [token_id]


def _root() -> Path:
    return Path(sysconfig.get_paths()["stdlib"])


def _read(path: str | Path) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError:  # the library holds a few files in other encodings
        return ""
