"""The seam between engine logic and a framework: one forward pass over a flat ragged batch."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray


class Span(NamedTuple):
    """New tokens of one sequence: they stand at [start, start + len(token_ids))."""

    token_ids: Sequence[int]
    start: int
    block_table: Sequence[int]


@dataclass(frozen=True, slots=True)
class FlatBatch:
    """Spans laid end to end, as paged attention wants them.

    Attributes:
        token_ids: [num_tokens].
        positions: [num_tokens].
        starts: [num_spans], tokens whose KV is already there.
        begins: [num_spans + 1], span i is token_ids[begins[i]:begins[i + 1]].
        block_ids: [sum of table lengths].
        block_begins: [num_spans + 1].
        max_context_len: the longest context after this pass.
    """

    token_ids: NDArray[np.int64]
    positions: NDArray[np.int64]
    starts: NDArray[np.int32]
    begins: NDArray[np.int32]
    block_ids: NDArray[np.int32]
    block_begins: NDArray[np.int32]
    max_context_len: int

    @classmethod
    def pack(cls, spans: Sequence[Span]) -> "FlatBatch":
        """Lay the spans end to end."""
        lengths = [len(span.token_ids) for span in spans]
        starts = np.array([span.start for span in spans], dtype=np.int32)
        begins = _begins(lengths)
        token_ids = np.array([t for span in spans for t in span.token_ids], dtype=np.int64)
        shift = np.repeat(starts - begins[:-1], lengths)
        return cls(
            token_ids=token_ids,
            positions=np.arange(len(token_ids), dtype=np.int64) + shift,
            starts=starts,
            begins=begins,
            block_ids=np.array([b for span in spans for b in span.block_table], dtype=np.int32),
            block_begins=_begins([len(span.block_table) for span in spans]),
            max_context_len=int((starts + lengths).max()),
        )

    def padded(self, count: int, block_id: int) -> "FlatBatch":
        """Add a sequence of so many tokens, in a block that nobody else has and that holds them."""
        zeros = np.zeros(count, dtype=np.int64)
        return FlatBatch(
            token_ids=np.concatenate((self.token_ids, zeros)),
            positions=np.concatenate((self.positions, np.arange(count))),
            starts=np.append(self.starts, np.int32(0)),
            begins=np.append(self.begins, np.int32(len(self.token_ids) + count)),
            block_ids=np.append(self.block_ids, np.int32(block_id)),
            block_begins=np.append(self.block_begins, np.int32(len(self.block_ids) + 1)),
            max_context_len=max(self.max_context_len, count),
        )


class PagedModel(Protocol):
    """A decoder-only model with a paged KV cache of its own."""

    vocab_size: int

    def forward(self, batch: FlatBatch, logit_rows: NDArray[np.int64]) -> NDArray[np.float32]:
        """Run one pass, writing KV through the block tables.

        Args:
            logit_rows: [r], which tokens of the batch to compute logits for.

        Returns:
            [r, vocab_size], valid until the next call.
        """


def _begins(lengths: Sequence[int]) -> NDArray[np.int32]:
    begins = np.zeros(len(lengths) + 1, dtype=np.int32)
    np.cumsum(lengths, out=begins[1:])
    return begins
