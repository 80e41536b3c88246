"""`specserve.sampling` on a device: the same filters, the same race, on logits that stay there.

Shapes and meanings are documented there. Nothing here waits for the device: conditions on values
are masks, and what the host knows is decided on the host. The noise of a seed has other numbers
than there, so it gives another text, with the same promises.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from specserve.engines.sampler import Segment
from specserve.engines.torch.transfer import send
from specserve.sampling_params import SamplingParams

GOLDEN = 0x9E3779B97F4A7C15 - 2**64  # PyTorch's 64-bit integers are signed, and wrap
MIX = (0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64)


class Draw:
    """How tokens of some rows are drawn: their filters and the noise of their seeds.

    Args:
        params: [n], none of them greedy.
        positions: [n], of the output.
    """

    def __init__(
        self,
        params: Sequence[SamplingParams],
        positions: NDArray[np.int64],
        vocab_size: int,
        device: torch.device,
    ) -> None:
        filters = np.array([(p.temperature, p.min_p, p.top_k, p.top_p) for p in params])
        _, min_p, top_k, top_p = filters.T
        self._uses_min_p = bool((min_p > 0).any())
        self._uses_top_k = bool(((top_k > 0) & (top_k < vocab_size)).any())
        self._uses_top_p = bool((top_p < 1).any())
        self._filters = send(np.ascontiguousarray(filters.T), device)
        seeds = np.array([p.seed for p in params], dtype=np.uint64).view(np.int64)
        self._seeds, self._positions = send(np.stack([seeds, positions]), device)

    def race(self, logits: Tensor, num_later: int = 0) -> Tensor:
        """Return the speed [n, vocab_size] of every token in the race that the fastest one wins.

        Args:
            logits: [n, vocab_size], adjusted.
            num_later: output positions by which this draw is later than the first one.
        """
        noise = exponential(self._seeds, self._positions + num_later, logits.shape[1])
        return self._probs(logits) / noise

    def _probs(self, logits: Tensor) -> Tensor:
        """See `specserve.sampling.target_probs`."""
        temperature, min_p, top_k, top_p = self._filters.float()
        shifted = logits - logits.amax(dim=1, keepdim=True)
        probs = torch.exp(shifted / temperature.clamp(min=1e-30)[:, None])
        if self._uses_min_p:
            probs = _drop_below(probs, min_p)
        if self._uses_top_k:
            last = (self._filters[2].long() - 1).clamp(0, logits.shape[1] - 1)
            border = probs.sort(descending=True).values.gather(1, last[:, None])[:, 0]
            probs = _drop_below(probs, torch.where(top_k > 0, border, 0.0))
        probs = probs / probs.sum(dim=1, keepdim=True)
        if self._uses_top_p:
            kept = _drop_below(probs, _nucleus_border(probs, top_p))
            kept = kept / kept.sum(dim=1, keepdim=True)
            probs = torch.where((top_p < 1)[:, None], kept, probs)
        return probs


def exponential(seeds: Tensor, positions: Tensor, vocab_size: int) -> Tensor:
    """Return exponential noise [n, vocab_size], a function of seed, output position and token.

    SplitMix64 (Steele et al. 2014, doi 10.1145/2660193.2660195), which any device computes alike.

    Args:
        seeds, positions: int64 [n].
    """
    token = torch.arange(1, vocab_size + 1, device=seeds.device)
    streams = _mix(seeds + GOLDEN * (positions + 1))
    bits = _mix(streams[:, None] + GOLDEN * token)
    uniform = (_shifted(bits, 11).double() + 0.5) * 2.0**-53
    return -torch.log(uniform)


def winner(speed: Tensor) -> Tensor:
    """Return the fastest token of each race [n, vocab_size]."""
    return speed.argmax(dim=1)


def winner_and_lead(speed: Tensor) -> tuple[Tensor, Tensor]:
    """Return the fastest token of each race and its lead. See `specserve.sampling.lead`."""
    fastest, token_ids = speed.topk(2, dim=1)
    return token_ids[:, 0], 1.0 - fastest[:, 1] / fastest[:, 0]


def adjust_logits(logits: Tensor, segments: Sequence[Segment]) -> Tensor:
    """Apply everything that comes before the temperature, in the segments that ask for it."""
    edits = np.concatenate([_edits(segment) for segment in segments], axis=1)
    row, token_id, *values = send(edits, logits.device)
    row, token_id = row.long(), token_id.long()
    bias, is_forbidden, repetition, presence, frequency = (v.float() for v in values)
    x = logits[row, token_id] + bias
    x = torch.where(is_forbidden > 0, -torch.inf, x)
    x = torch.where(x > 0, x / repetition, x * repetition)
    return logits.index_put((row, token_id), x - presence - frequency)


def log_probs(logits: Tensor, token_ids: Tensor) -> Tensor:
    """Return log P(token) of each row under the unchanged logits."""
    return logits.double().log_softmax(dim=1).gather(1, token_ids[:, None])[:, 0]


def _shifted(bits: Tensor, count: int) -> Tensor:
    """Shift right, filling in zeros."""
    return (bits >> count) & ((1 << (64 - count)) - 1)


def _mix(z: Tensor) -> Tensor:
    z = (z ^ _shifted(z, 30)) * MIX[0]
    z = (z ^ _shifted(z, 27)) * MIX[1]
    return z ^ _shifted(z, 31)


def _drop_below(probs: Tensor, border: Tensor) -> Tensor:
    return torch.where(probs < border[:, None], 0.0, probs)


def _nucleus_border(probs: Tensor, top_p: Tensor) -> Tensor:
    """Return, per row, the smallest probability that top-p keeps."""
    ordered = probs.sort(descending=True).values
    mass_before = ordered.double().cumsum(dim=1) - ordered
    last = ((mass_before < top_p.double()[:, None]).sum(dim=1) - 1).clamp(min=0)
    return ordered.gather(1, last[:, None])[:, 0]


class _Edits(NamedTuple):
    """How a segment changes the logits [rows, ids] that it touches."""

    row: NDArray[np.float64]
    token_id: NDArray[np.float64]
    bias: NDArray[np.float64]
    is_forbidden: NDArray[np.float64]
    repetition: NDArray[np.float64]
    presence: NDArray[np.float64]
    frequency: NDArray[np.float64]


def _edits(segment: Segment) -> NDArray[np.float64]:
    """Return a segment's `_Edits` as an array [7, n]; every pair of row and token stands once."""
    params, ids = segment.row.sampling, _touched(segment)
    array = np.zeros((7, segment.length, len(ids)))
    edits = _Edits(*array)
    edits.row[:] = np.arange(segment.begin, segment.end)[:, None]
    edits.token_id[:] = ids
    edits.repetition[:] = 1.0

    def column(token_ids: Any) -> Any:
        return np.searchsorted(ids, token_ids)

    for token_id, bias in params.logit_bias:
        edits.bias[:, column(token_id)] += bias
    if params.end_id is not None:
        num_without_end = max(0, params.min_tokens - segment.first_position)
        edits.is_forbidden[:num_without_end, column(params.end_id)] = 1
    for position in range(segment.length if params.bad_words else 0):
        context = [*segment.history, *segment.draft[:position]]
        for *head, last in params.bad_words:
            if context[len(context) - len(head) :] == head:
                edits.is_forbidden[position, column(last)] = 1
    if params.has_penalties:
        _penalise(edits, segment, column)
    return array.reshape(7, -1)


def _penalise(edits: _Edits, segment: Segment, column: Any) -> None:
    params, num_prompt_tokens = segment.row.sampling, segment.row.num_prompt_tokens
    counts = np.zeros_like(edits.row)
    output = column(segment.history[num_prompt_tokens:])
    counts[:] = np.bincount(output, minlength=counts.shape[1])
    for position, token_id in enumerate(segment.draft):
        counts[position + 1 :, column(token_id)] += 1
    is_seen = counts > 0
    is_seen[:, column(segment.history[:num_prompt_tokens])] = True
    edits.repetition[is_seen] = params.repetition_penalty
    edits.presence[:] = params.presence_penalty * (counts > 0)
    edits.frequency[:] = params.frequency_penalty * counts


def _touched(segment: Segment) -> NDArray[np.int64]:
    """Return the token ids whose logits a segment's parameters may change, rising."""
    params = segment.row.sampling
    ids = [token_id for token_id, _ in params.logit_bias] + [word[-1] for word in params.bad_words]
    if params.end_id is not None:
        ids.append(params.end_id)
    if params.has_penalties:
        ids += [*segment.history, *segment.draft]
    return np.unique(np.array(ids, dtype=np.int64))
