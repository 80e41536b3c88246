"""What does the draft propose along the target's own text, and how much of it is right?

Method: the target continues held-out prompts greedily; from every position of its text the draft
proposes the next k tokens. Recorded: the draft's confidences, and how many proposals match. The
file feeds the simulated engine.

Example: python -m bench.record_acceptance --output tests/assets/acceptance_demo.npz
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from rich.progress import track

from bench.prompts import held_out_prompts
from bench.record import emit
from specserve import engines
from specserve.batch import Batch, Row
from specserve.block_manager import BlockManager
from specserve.config import load_config
from specserve.text import load_tokenizer

PROMPT_TOKENS = 96
GROUP = 16


def main() -> None:
    """Record, save, and print the acceptance by position."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--texts", type=int, default=64)
    parser.add_argument("--positions", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=8)
    options = parser.parse_args()
    tokenizer = load_tokenizer(Path(load_config().engine.dir) / "target")
    prompts = held_out_prompts(tokenizer, options.texts, PROMPT_TOKENS)
    confidences, num_accepted = record(prompts, options.positions, options.tokens)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(options.output, confidences=confidences, num_accepted=num_accepted)
    by_position = [float((num_accepted > j).mean().round(3)) for j in range(options.tokens)]
    emit({"bench": "record_acceptance", "accepted_at_least": by_position})


def record(
    prompts: Sequence[list[int]], num_positions: int, k: int
) -> tuple[np.ndarray, np.ndarray]:
    """Let the demo pair, in f32, continue each prompt and draft along.

    An inflated pair has its text, and the draft of the demo pair.

    Returns:
        confidences [texts, positions, k], and how many of the k tokens match, [texts, positions].
        At position 0 the target has given one token.
    """
    config = load_config(None, ["engine.precision=f32"])
    info = engines.describe(config)
    target, draft = engines.make_target_engine(config), engines.make_draft_engine(config)
    confidences = np.zeros((len(prompts), num_positions, k), dtype=np.float32)
    num_accepted = np.zeros((len(prompts), num_positions), dtype=np.int8)
    for first in track(range(0, len(prompts), GROUP), "recording", transient=True):
        blocks = BlockManager(info.num_blocks, info.block_size)
        group = prompts[first : first + GROUP]
        rows = [Row(i + 1, 0, list(p), True, [], len(p)) for i, p in enumerate(group)]
        for row in rows:
            blocks.extend(row.block_table, row.num_prompt_tokens + num_positions + 2 * k + 1)
        texts = _continue(target, rows, group, num_positions + k)
        _draft_along(draft, rows, texts, confidences[first:], num_accepted[first:])
    return confidences, num_accepted


def _continue(
    target: engines.TargetEngine, rows: list[Row], prompts: Sequence[list[int]], num_tokens: int
) -> list[list[int]]:
    """Let the target write `num_tokens` tokens more; return prompts and continuations."""
    texts = [list(prompt) for prompt in prompts]
    for _ in range(num_tokens):
        for row, text, verified in zip(
            rows, texts, target.verify(Batch(rows), [[]] * len(rows)), strict=True
        ):
            row.num_computed_tokens += len(row.token_ids)
            row.token_ids = verified.output_token_ids
            text += verified.output_token_ids
    return texts


def _draft_along(
    draft: engines.DraftEngine,
    rows: list[Row],
    texts: list[list[int]],
    confidences: np.ndarray,
    num_accepted: np.ndarray,
) -> None:
    """Draft from every position of the texts and compare, writing into the arrays in place."""
    _, num_positions, k = confidences.shape
    for position in range(num_positions):
        ends = [row.num_prompt_tokens + position + 1 for row in rows]  # the target gives the first
        for row, text, end in zip(rows, texts, ends, strict=True):
            row.max_draft_tokens = k
            row.num_draft_computed_tokens = 0 if position == 0 else end - 1
            row.catch_up_token_ids = text[row.num_draft_computed_tokens : end]
        for i, proposal in enumerate(draft.draft(Batch(rows))):
            truth = texts[i][ends[i] : ends[i] + k]
            matches = [a == b for a, b in zip(proposal.token_ids, truth, strict=False)]
            confidences[i, position] = proposal.confidences
            num_accepted[i, position] = [*matches, False].index(False)


if __name__ == "__main__":
    main()
