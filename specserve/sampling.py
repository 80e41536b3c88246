"""From logits to the target's own tokens: penalties, filters, sampling, and agreement with a draft.

Plain numpy on the rows that need it. Losslessness rests on two facts:

* What comes out is what the target draws itself: output position i of a request always uses the
  i-th noise of its seed, however the tokens are grouped into steps, and a draft token is accepted
  iff it is the token that this noise draws from the target's distribution. So no draft and no
  selection can change the output: the very same text comes out with and without speculation.
  For a draft that is a point mass this is rejection sampling (Leviathan et al. 2023, arXiv
  2211.17192). A sampled draft is drawn with the target's own noise, so that both mostly draw the
  same: it is accepted with at least (1 - d) / (1 + d), d the total variation distance of the two
  distributions, where rejection sampling has 1 - d (Daliri et al. 2024, arXiv 2408.07978).
* Every draft position is conditioned on the draft tokens before it, in penalties, bad words and
  `min_tokens` too.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from specserve.sampling_params import SamplingParams

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]


class Noise:
    """The random numbers of all requests: those of a position are a function of seed and position.

    One exponential number per token. Whoever needs them makes them again: they cost less than the
    cumulative distribution that a single uniform would need.
    """

    def __init__(self, vocab_size: int) -> None:
        self._vocab_size = vocab_size
        self._philox = np.random.Philox(key=0)
        self._generator = np.random.Generator(self._philox)
        self._state: Any = self._philox.state

    def rows(self, seed: int, start: int, stop: int) -> NDArray[np.float64]:
        """Return [stop - start, vocab_size] of output positions [start, stop), above 0."""
        noise = np.empty((stop - start, self._vocab_size))
        for row, position in zip(noise, range(start, stop), strict=True):
            self._state["state"]["key"][0] = seed
            self._state["state"]["counter"][:] = (0, position, 0, 0)
            self._philox.state = self._state
            self._generator.standard_exponential(out=row)
        noise += np.finfo(np.float64).tiny
        return noise


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


def target_probs(logits: Floats, params: Sequence[SamplingParams]) -> Floats:
    """Turn adjusted logits into the distributions that tokens are drawn from.

    Filters apply in the order min-p, top-k, top-p, each to what the one before left, renormalised;
    ties at a border are kept. A filter that is off costs nothing.

    Args:
        logits: [n, vocab_size].
        params: [n], none of them greedy.

    Returns:
        [n, vocab_size], rows sum to 1.

    Source: min-p, Nguyen et al. 2024, arXiv 2407.01082; top-p, Holtzman et al. 2020, arXiv
    1904.09751.
    """
    temperature, min_p, top_p = np.array(
        [(p.temperature, p.min_p, p.top_p) for p in params], dtype=np.float32
    ).T
    top_k = np.array([p.top_k for p in params], dtype=np.int64)
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


def sample(probs: Floats, noise: NDArray[np.float64]) -> Ints:
    """Draw one token per row, the winner of an exponential race: argmin noise / probs.

    Args:
        probs: [n, vocab_size].
        noise: [n, vocab_size], exponential, above 0.

    Returns:
        [n]; never a token of probability 0.

    Source: the race is the Gumbel-max trick (Maddison et al. 2014, arXiv 1411.0030) in other words.
    """
    token_ids: Ints = (probs / noise).argmax(axis=1)
    return token_ids


def lead(probs: Floats, noise: NDArray[np.float64], token_ids: Ints) -> NDArray[np.float64]:
    """Return by how much each winner leads the race, in [0, 1): 1 - runner-up / winner.

    A sampled draft's confidence: the smaller the lead, the less it takes for the target to draw
    another token. It reads the noise, which is no harm where the target draws for itself.
    """
    speed = probs / noise
    rows = np.arange(len(speed))
    best = speed[rows, token_ids]
    speed[rows, token_ids] = 0.0
    value: NDArray[np.float64] = 1.0 - speed.max(axis=1) / best
    return value


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
