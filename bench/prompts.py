"""Prompts for benchmarks: Python's own test files, which the demo pair was not trained on."""

import random
import sysconfig
from pathlib import Path

from tokenizers import Tokenizer


def held_out_prompts(
    tokenizer: Tokenizer, num_prompts: int, num_tokens: int, seed: int = 1
) -> list[list[int]]:
    """Cut one window of `num_tokens` token ids from each of `num_prompts` shuffled test files.

    Raises:
        ValueError: if this Python comes without its tests, or with too few.
    """
    files = sorted(Path(sysconfig.get_paths()["stdlib"], "test").glob("test_*.py"))
    rng = random.Random(seed)
    rng.shuffle(files)
    prompts: list[list[int]] = []
    for file in files:
        if len(prompts) == num_prompts:
            break
        try:
            text = file.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        token_ids = tokenizer.encode(text).ids
        if len(token_ids) > num_tokens + 500:
            start = rng.randrange(len(token_ids) - num_tokens)
            prompts.append(token_ids[start : start + num_tokens])
    if len(prompts) < num_prompts:
        raise ValueError(
            f"{len(prompts)} of {num_prompts} prompts found in {len(files)} test files of this "
            "Python: install its test package (Debian: libpython3-testsuite)"
        )
    return prompts
