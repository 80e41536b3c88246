"""Prompts for benchmarks: Python's own test files, which the demo pair was not trained on."""

import random
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Tokenizer


def held_out_prompts(
    tokenizer: Tokenizer, num_prompts: int, num_tokens: int, seed: int = 1, *, per_file: int = 1
) -> list[list[int]]:
    """Cut windows of `num_tokens` token ids, `per_file` from each of some shuffled test files.

    Raises:
        ValueError: if this Python comes without its tests, or with too few.
    """
    rng = random.Random(seed)
    files = _shuffled_files(rng)
    prompts: list[list[int]] = []
    for token_ids in _tokenized(files, tokenizer):
        if len(prompts) >= num_prompts:
            break
        for _ in range(per_file if len(token_ids) > num_tokens + 500 else 0):
            start = rng.randrange(len(token_ids) - num_tokens)
            prompts.append(token_ids[start : start + num_tokens])
    if len(prompts) < num_prompts:
        raise ValueError(
            f"{len(prompts)} of {num_prompts} prompts found in {len(files)} test files of this "
            "Python: install its test package (Debian: libpython3-testsuite)"
        )
    return prompts[:num_prompts]


def held_out_texts(tokenizer: Tokenizer, seed: int = 1) -> Iterator[list[int]]:
    """Yield the token ids of whole test files, in random order; none if there are no tests."""
    texts = _tokenized(_shuffled_files(random.Random(seed)), tokenizer)
    return (token_ids for token_ids in texts if token_ids)


def _shuffled_files(rng: random.Random) -> list[Path]:
    files = sorted(Path(sysconfig.get_paths()["stdlib"], "test").glob("test_*.py"))
    rng.shuffle(files)
    return files


def _tokenized(files: list[Path], tokenizer: Tokenizer) -> Iterator[list[int]]:
    for file in files:
        try:
            text = file.read_text(encoding="utf-8")
        except UnicodeDecodeError:  # a few are in other encodings on purpose
            continue
        token_ids: list[int] = tokenizer.encode(text).ids
        yield token_ids
