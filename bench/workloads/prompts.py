"""What prompts say, at any length: this Python's own tests, questions from a file, random tokens.

The demo pair was trained on the standard library without its tests, so those are held out.
"""

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from tokenizers import Tokenizer

from bench.prompts import held_out_texts

NUM_FILES = 24


class PromptSource(Protocol):
    """Says something of a given length."""

    def __call__(self, num_tokens: int, rng: random.Random) -> list[int]:
        """Return that many token ids."""


class TextPrompts:
    """Windows of texts laid end to end, and round again.

    Args:
        token_ids: of each text, none empty.
        whole: begin at the start of a text, not anywhere.
    """

    def __init__(self, token_ids: Sequence[Sequence[int]], *, whole: bool) -> None:
        self._ids = [token_id for text in token_ids for token_id in text]
        starts, start = [], 0
        for text in token_ids:
            starts.append(start)
            start += len(text)
        self._starts: Sequence[int] = starts if whole else range(len(self._ids))

    def __call__(self, num_tokens: int, rng: random.Random) -> list[int]:
        """Cut a window. See `PromptSource`."""
        start = rng.choice(self._starts)
        window = self._ids[start : start + num_tokens]
        while len(window) < num_tokens:
            window += self._ids[: num_tokens - len(window)]
        return window


class RandomPrompts:
    """Token ids drawn evenly: nothing that a model could know."""

    def __init__(self, vocab_size: int) -> None:
        self._vocab_size = vocab_size

    def __call__(self, num_tokens: int, rng: random.Random) -> list[int]:
        """Draw. See `PromptSource`."""
        return rng.choices(range(self._vocab_size), k=num_tokens)


def lengths_only(num_tokens: int, rng: random.Random) -> list[int]:
    """Say nothing at that length, for engines that do not read. See `PromptSource`."""
    return [0] * num_tokens


def standard_library(tokenizer: Tokenizer) -> TextPrompts:
    """Return windows of test files of the running Python.

    Raises:
        ValueError: if it comes without them.
    """
    texts = [ids for _, ids in zip(range(NUM_FILES), held_out_texts(tokenizer), strict=False)]
    if not texts:
        raise ValueError(
            "this Python comes without its tests: install its test package (Debian: "
            "libpython3-testsuite), or take --prompts random"
        )
    return TextPrompts(texts, whole=False)


def spec_bench(path: Path, tokenizer: Tokenizer) -> TextPrompts:
    """Return the questions of a Spec-Bench file, their turns one after another.

    A prompt begins with a question and is cut, or goes on with the next, to its length.

    Raises:
        ValueError: no such file, or a malformed line, naming file and line.
    """
    if not path.is_file():
        raise ValueError(f"prompts {path} is not a file: name another with spec_bench:PATH")
    texts = []
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            try:
                turns = json.loads(line)["turns"]
                texts.append(tokenizer.encode("\n\n".join(turns) + "\n\n").ids)
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(
                    f'{path}:{number}: expected an object with "turns", a list of texts: {error!r}'
                ) from error
    if not texts:
        raise ValueError(f"prompts {path} is empty")
    return TextPrompts(texts, whole=True)
