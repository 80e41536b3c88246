"""Prompts for benchmarks: Python's own test files, which the demo pair was not trained on.

A mixed workload adds English prose, the descriptions of installed packages, and random tokens.
"""

import random
import sysconfig
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

from tokenizers import Tokenizer

from specserve.sampling_params import SamplingParams

PROSE = ("fastapi", "jinja2", "rich", "typer", "uvicorn")  # packages that describe themselves
SAMPLED = 0.8  # temperature of every other request of a mixed workload


class Asked(NamedTuple):
    """What a request of a workload brings."""

    prompt_token_ids: list[int]
    sampling: SamplingParams


def mixed_workload(
    tokenizer: Tokenizer, num_requests: int, num_tokens: int, *, per_file: int = 1
) -> list[Asked]:
    """Take code, prose and random tokens in turn; of each, every other request is sampled."""
    rng = random.Random(1)
    prose = [token_id for name in PROSE for token_id in tokenizer.encode(_description(name)).ids]
    code = held_out_prompts(tokenizer, -(-num_requests // 3), num_tokens, per_file=per_file)
    asked = []
    for i in range(num_requests):
        if i % 3 == 0:
            prompt = code[i // 3]
        elif i % 3 == 1:
            start = rng.randrange(len(prose) - num_tokens)
            prompt = prose[start : start + num_tokens]
        else:
            prompt = rng.choices(range(tokenizer.get_vocab_size()), k=num_tokens)
        asked.append(Asked(prompt, SamplingParams(temperature=SAMPLED * (i % 2), seed=i)))
    return asked


def _description(package: str) -> str:
    return str(metadata.metadata(package).json["description"])


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
