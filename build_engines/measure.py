"""Measure a pair: how well both models know held-out text, and how often the draft is right.

Question: what should a model card say about this pair?
Method: both engines in f32, without speculation. Loss: mean nats per token over evenly spaced
windows, each starting without context. Acceptance: the target continues prompts from the standard
library's tests greedily; a greedy draft of j tokens from some position is accepted as a whole iff
its next j choices, given the target's own text, are all the target's. So one pass of the draft over
that text tells the acceptance at every position and length.
Example: python -m build_engines measure --pair build_engines/demo_pair/openvino
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from build_engines import corpus
from build_engines.checkpoint import TOKENIZER_FILE
from build_engines.stateful_model import StatefulModel
from specserve import manifest as manifests

NUM_WINDOWS, WINDOW_TOKENS = 256, 512
NUM_PROMPTS, PROMPT_TOKENS, OUTPUT_TOKENS = 64, 96, 128
MAX_DRAFT_TOKENS = 8
ROWS_PER_BATCH = 8

Ids = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Result:
    """What `measure` found.

    Attributes:
        loss: text name to role to nats per token.
        acceptance: entry j - 1 is the share of positions where at least j draft tokens are right,
            for j = 1 to MAX_DRAFT_TOKENS.
        mean_accepted: of MAX_DRAFT_TOKENS draft tokens; the sum of `acceptance`.
        num_positions: behind `acceptance`.
    """

    loss: dict[str, dict[str, float]]
    acceptance: list[float]
    mean_accepted: float
    num_positions: int

    def as_dict(self) -> dict[str, object]:
        """Return it as JSON can hold it."""
        return asdict(self)


def measure(pair_dir: str | Path) -> Result:
    """Measure an OpenVINO pair folder on the standard library of the running Python.

    Raises:
        ValueError: if the folder holds no valid pair, or Python no tests.
    """
    folder = Path(pair_dir)
    draft_manifest, target_manifest = (manifests.load(folder / r) for r in ("draft", "target"))
    manifests.check_pair(draft=draft_manifest, target=target_manifest)
    tokenizer = Tokenizer.from_file(str(folder / "target" / TOKENIZER_FILE))
    models = {role: StatefulModel(folder / role) for role in ("target", "draft")}
    held_out = corpus.split(corpus.library_documents())[1]
    texts = {
        "held-out library files": corpus.encode(tokenizer, held_out),
        "library tests": corpus.encode(tokenizer, corpus.test_documents()),
    }
    loss = {
        name: {role: nats_per_token(model, ids) for role, model in models.items()}
        for name, ids in texts.items()
    }
    prompts = corpus.windows(texts["library tests"], NUM_PROMPTS, PROMPT_TOKENS)
    counts = accepted_counts(models["target"], models["draft"], prompts)
    acceptance = [float((counts >= j).mean()) for j in range(1, MAX_DRAFT_TOKENS + 1)]
    return Result(loss, acceptance, float(counts.mean()), counts.size)


def nats_per_token(model: StatefulModel, ids: Ids) -> float:
    """Mean cross-entropy over windows of a text [n]."""
    windows = corpus.windows(ids, NUM_WINDOWS, WINDOW_TOKENS + 1)
    total = 0.0
    for rows in np.array_split(windows, NUM_WINDOWS // ROWS_PER_BATCH):
        model.reset()
        total += _cross_entropy(model.forward(rows[:, :-1]), rows[:, 1:])
    return total / (NUM_WINDOWS * WINDOW_TOKENS)


def accepted_counts(
    target: StatefulModel, draft: StatefulModel, prompts: Ids, num_tokens: int = OUTPUT_TOKENS
) -> Ids:
    """Count the draft tokens accepted at each output position of plain greedy decoding.

    Args:
        prompts: [num_prompts, num_prompt_tokens].

    Returns:
        0 to MAX_DRAFT_TOKENS, [num_prompts, num_tokens]; entry i of a row is for a step whose
        base token is output token i.
    """
    counts = []
    for rows in np.array_split(prompts, max(1, len(prompts) // ROWS_PER_BATCH)):
        text = greedy(target, rows, num_tokens + MAX_DRAFT_TOKENS)
        draft.reset()
        choices = draft.forward(text[:, :-1]).argmax(-1)
        right = (choices == text[:, 1:])[:, rows.shape[1] :]
        counts.append(run_lengths(right, MAX_DRAFT_TOKENS))
    return np.concatenate(counts)


def greedy(model: StatefulModel, prompts: Ids, num_tokens: int) -> Ids:
    """Decode, past EOS too, and return prompts and outputs [num_rows, prompt + num_tokens]."""
    model.reset()
    pieces = [prompts]
    for _ in range(num_tokens):
        pieces.append(model.forward(pieces[-1])[:, -1:].argmax(-1))
    return np.concatenate(pieces, axis=1)


def run_lengths(right: NDArray[np.bool_], longest: int) -> Ids:
    """Count, from each column on, how many are true in a row.

    Args:
        right: [num_rows, n].

    Returns:
        0 to `longest`, [num_rows, n - longest + 1].
    """
    ahead = np.lib.stride_tricks.sliding_window_view(right, longest, axis=1)
    return np.logical_and.accumulate(ahead, axis=-1).sum(-1)


def _cross_entropy(logits: NDArray[np.float32], ids: Ids) -> float:
    highest = logits.max(-1)
    log_sum = np.log(np.exp(logits - highest[..., None]).sum(-1)) + highest
    chosen = np.take_along_axis(logits, ids[..., None], axis=-1)[..., 0]
    return float((log_sum - chosen).sum())
