"""The distribution of a next token from the definitions: one position at a time, in float64.

Shares nothing with `specserve.sampling`, which it is there to judge.
"""

from collections import Counter
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from specserve.sampling_params import SamplingParams

Floats = NDArray[np.float64]


def reference_logits(
    logits: ArrayLike, params: SamplingParams, token_ids: Sequence[int], num_prompt: int
) -> Floats:
    """Apply what comes before the temperature to the logits [vocab_size] after `token_ids`."""
    logits = np.array(logits, dtype=np.float64)
    prompt, output = token_ids[:num_prompt], token_ids[num_prompt:]
    for token_id, bias in params.logit_bias:
        logits[token_id] += bias
    if params.end_id is not None and len(output) < params.min_tokens:
        logits[params.end_id] = -np.inf
    for *head, last in params.bad_words:
        if list(token_ids[len(token_ids) - len(head) :]) == head or not head:
            logits[last] = -np.inf
    for token_id in {*prompt, *output} if params.repetition_penalty != 1.0 else ():
        penalty = params.repetition_penalty
        logits[token_id] *= penalty if logits[token_id] < 0 else 1 / penalty
    for token_id, count in Counter(output).items():
        logits[token_id] -= params.presence_penalty + params.frequency_penalty * count
    return logits


def reference_probs(logits: ArrayLike, params: SamplingParams) -> Floats:
    """Return the distribution [vocab_size] after temperature, min-p, top-k and top-p."""
    logits = np.asarray(logits, dtype=np.float64)
    weights: Floats = np.exp((logits - logits.max()) / params.temperature)
    weights[weights < params.min_p] = 0.0  # the most likely token stands at 1
    if params.top_k or params.top_p < 1.0:
        order = np.argsort(-weights, kind="stable")
        weights[order[params.top_k or len(order) :]] = 0.0
        mass_before = np.cumsum(weights[order]) - weights[order]
        weights[order[mass_before >= params.top_p * weights.sum()]] = 0.0
    return weights / weights.sum()
