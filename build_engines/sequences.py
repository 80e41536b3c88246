"""Sequences: what the target itself writes, for the draft to learn from.

A draft is judged on the target's own text, so it is distilled on such text more than on the corpus.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from build_engines.stateful_model import StatefulModel

PROMPT_TOKENS, OUTPUT_TOKENS = 64, 192
ROWS_PER_BATCH = 64
TEMPERATURE = 0.8


def generate(
    target: StatefulModel, text: NDArray[np.int64], num_sequences: int, seed: int = 0
) -> NDArray[np.int64]:
    """Let the target continue random places of a text, every other row greedily.

    Args:
        text: token ids [n], n at least PROMPT_TOKENS.
        num_sequences: rounded up to whole batches.

    Returns:
        Prompts and outputs, [num_sequences, PROMPT_TOKENS + OUTPUT_TOKENS].
    """
    rng = np.random.default_rng(seed)
    batches = []
    for _ in range(-(-num_sequences // ROWS_PER_BATCH)):
        starts = rng.integers(0, len(text) - PROMPT_TOKENS + 1, ROWS_PER_BATCH)
        batches.append(_continue(target, text[starts[:, None] + np.arange(PROMPT_TOKENS)], rng))
        print(f"sequences {len(batches) * ROWS_PER_BATCH} of {num_sequences}", flush=True)
    return np.concatenate(batches)


def _continue(
    target: StatefulModel, prompts: NDArray[np.int64], rng: np.random.Generator
) -> NDArray[np.int64]:
    target.reset()
    pieces = [prompts]
    for _ in range(OUTPUT_TOKENS):
        logits = target.forward(pieces[-1])[:, -1]
        logits[1::2] = logits[1::2] / TEMPERATURE + rng.gumbel(size=logits[1::2].shape)
        pieces.append(logits.argmax(-1)[:, None])
    return np.concatenate(pieces, axis=1)
