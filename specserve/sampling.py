"""From logits to the target's own tokens: penalties, filters, sampling, and agreement with a draft.

Plain numpy on the rows that need it. Losslessness rests on two facts:

* Output position i of a request always uses the i-th uniform of its seed, however the tokens are
  grouped into steps. A draft token is accepted iff it is the token that this uniform draws from the
  target's distribution. For a draft that is a point mass this is rejection sampling exactly
  (Leviathan et al. 2023, arXiv 2211.17192): it is accepted with probability target(x), and what
  replaces it is drawn from target without x, renormalised. Beyond the distribution, the very same
  text comes out with and without speculation.
* Every draft position is conditioned on the draft tokens before it, in penalties, bad words and
  `min_tokens` too.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from specserve.sampling_params import SamplingParams

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]


class Uniforms:
    """The random numbers of one request: number i is a function of the seed and i alone."""

    CHUNK = 256

    def __init__(self, seed: int) -> None:
        self._generator = np.random.Generator(np.random.Philox(key=seed))
        self._values = np.empty(0)

    def __getitem__(self, interval: slice) -> NDArray[np.float64]:
        """Return numbers [start, stop) in [0, 1)."""
        while len(self._values) < interval.stop:
            more = self._generator.random(self.CHUNK)
            self._values = np.concatenate([self._values, more])
        return self._values[interval]


def adjust_logits(
    logits: Floats,
    params: SamplingParams,
    token_ids: Sequence[int],
    num_prompt_tokens: int,
    draft_token_ids: Sequence[int],
) -> Floats:
    """Apply everything that comes before the temperature.

    Args:
        logits: [k + 1, vocab_size]; row i is conditioned on draft tokens before i. Not changed.
        token_ids: prompt and output tokens before the draft.
        draft_token_ids: [k].

    Returns:
        [k + 1, vocab_size], a new array.
    """
    logits = logits.copy()
    num_output_tokens = len(token_ids) - num_prompt_tokens
    for token_id, bias in params.logit_bias:
        logits[:, token_id] += np.float32(bias)
    if params.end_id is not None:
        logits[: max(0, params.min_tokens - num_output_tokens), params.end_id] = -np.inf
    if params.bad_words:
        _mask_bad_words(logits, params.bad_words, [*token_ids, *draft_token_ids])
    if params.has_penalties:
        _penalise(logits, params, token_ids, num_prompt_tokens, draft_token_ids)
    return logits


def target_probs(
    logits: Floats, temperature: Floats, min_p: Floats, top_k: Ints, top_p: Floats
) -> Floats:
    """Turn adjusted logits into the distributions that tokens are drawn from.

    Filters apply in the order min-p, top-k, top-p, each to what the one before left, renormalised;
    ties at a border are kept. A filter that is off costs nothing.

    Args:
        logits: [n, vocab_size].
        temperature: [n], above 0.
        min_p: [n], 0 is off. Nguyen et al. 2024, arXiv 2407.01082.
        top_k: [n], 0 is off.
        top_p: [n], 1 is off. Holtzman et al. 2020, arXiv 1904.09751.

    Returns:
        [n, vocab_size], rows sum to 1.
    """
    shifted = logits - logits.max(axis=1, keepdims=True)
    coldest = np.float32(1e-30)  # below it, 0 / temperature would not be 0
    probs: Floats = np.exp(shifted / np.maximum(temperature, coldest)[:, None])
    if np.any(min_p > 0):
        probs[probs < min_p[:, None]] = 0.0  # the most likely token stands at exactly 1
    if np.any((top_k > 0) & (top_k < probs.shape[1])):
        probs[probs < _kth_largest(probs, top_k)[:, None]] = 0.0
    probs /= probs.sum(axis=1, keepdims=True)
    rows = top_p < 1  # a row's numbers must not depend on what others in the batch ask for
    if rows.any():
        kept = probs[rows]
        kept[kept < _nucleus_border(kept, top_p[rows])[:, None]] = 0.0
        probs[rows] = kept / kept.sum(axis=1, keepdims=True)
    return probs


def sample(probs: Floats, uniforms: NDArray[np.float64]) -> Ints:
    """Draw one token per row by inverting its cumulative distribution.

    Args:
        probs: [n, vocab_size].
        uniforms: [n] in [0, 1).

    Returns:
        [n]; never a token of probability 0.
    """
    cdf = np.cumsum(probs, axis=1, dtype=np.float64)
    token_ids: Ints = (cdf <= (uniforms * cdf[:, -1])[:, None]).sum(axis=1)
    return token_ids


def agree(target_token_ids: Sequence[int], draft_token_ids: Sequence[int]) -> list[int]:
    """Keep the longest draft prefix the target drew too, then add one target token.

    Args:
        target_token_ids: [k + 1]; entry i was drawn given draft tokens before i.
        draft_token_ids: [k], k may be 0.

    Returns:
        1 to k + 1 token ids: the accepted ones, then one recovered or bonus token.
    """
    accepted = 0
    for drawn, drafted in zip(target_token_ids, draft_token_ids, strict=False):
        if drawn != drafted:
            break
        accepted += 1
    return list(target_token_ids[: accepted + 1])


def log_probs(logits: Floats, token_ids: Sequence[int]) -> list[float]:
    """Return log P(token) of each row under the unchanged logits.

    Args:
        logits: [n, vocab_size].
        token_ids: [n].
    """
    rows = logits.astype(np.float64)
    rows -= rows.max(axis=1, keepdims=True)
    chosen = rows[np.arange(len(token_ids)), token_ids]
    values: list[float] = (chosen - np.log(np.exp(rows).sum(axis=1))).tolist()
    return values


def _kth_largest(probs: Floats, top_k: Ints) -> Floats:
    """Return, per row, the smallest probability that top-k keeps; 0 where it is off."""
    vocab_size = probs.shape[1]
    border = np.zeros(len(probs), dtype=np.float32)
    for k in np.unique(top_k[(top_k > 0) & (top_k < vocab_size)]):
        rows = top_k == k
        border[rows] = np.partition(probs[rows], vocab_size - k, axis=1)[:, vocab_size - k]
    return border


def _nucleus_border(probs: Floats, top_p: Floats) -> Floats:
    """Return, per row, the smallest probability that top-p keeps."""
    ordered = -np.sort(-probs, axis=1)
    mass_before = np.cumsum(ordered, axis=1, dtype=np.float64) - ordered
    last = np.maximum((mass_before < top_p[:, None]).sum(axis=1) - 1, 0)
    border: Floats = ordered[np.arange(len(probs)), last]
    return border


def _mask_bad_words(
    logits: Floats, bad_words: Sequence[Sequence[int]], token_ids: Sequence[int]
) -> None:
    """Make the last token of a bad word impossible where the tokens before it already stand."""
    num_positions = len(logits)
    for word in bad_words:
        head = list(word[:-1])
        for position in range(num_positions):
            end = len(token_ids) - (num_positions - 1) + position
            if end >= len(head) and list(token_ids[end - len(head) : end]) == head:
                logits[position, word[-1]] = -np.inf


def _penalise(
    logits: Floats,
    params: SamplingParams,
    token_ids: Sequence[int],
    num_prompt_tokens: int,
    draft_token_ids: Sequence[int],
) -> None:
    vocab_size = logits.shape[1]
    output = np.asarray(token_ids[num_prompt_tokens:], dtype=np.int64)
    counts = np.tile(np.bincount(output, minlength=vocab_size), (len(logits), 1))
    for position, token_id in enumerate(draft_token_ids):
        counts[position + 1 :, token_id] += 1
    if params.repetition_penalty != 1.0:
        seen = counts > 0
        seen[:, np.asarray(token_ids[:num_prompt_tokens], dtype=np.int64)] = True
        factor = np.float32(params.repetition_penalty)
        logits[:] = np.where(seen, np.where(logits > 0, logits / factor, logits * factor), logits)
    logits -= np.float32(params.presence_penalty) * (counts > 0)
    logits -= np.float32(params.frequency_penalty) * counts.astype(np.float32)
