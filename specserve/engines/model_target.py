"""Verification beside the model: one pass, and of each row the tokens that stand."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from specserve.batch import Batch, Row, Verified
from specserve.engines.paged_model import FlatBatch, PagedModel, Span
from specserve.engines.sampler import HostSampler, Sampler, Segment


class ModelTargetEngine:
    """A target model behind the `TargetEngine` protocol.

    Keeps the token history of requests whose parameters look back at it.

    Args:
        sampler: runs this model; None samples in numpy.
    """

    def __init__(self, model: PagedModel, sampler: Sampler | None = None) -> None:
        self.model = model
        self._sampler = sampler or HostSampler(model)
        self._histories: dict[int, list[int]] = {}

    def verify(self, batch: Batch, chosen: Sequence[Sequence[int]]) -> list[Verified]:
        """Run base and chosen tokens in one pass. See `TargetEngine`."""
        flat = FlatBatch.pack(
            [
                Span([*row.token_ids, *draft], row.num_computed_tokens, row.block_table)
                for row, draft in zip(batch.rows, chosen, strict=True)
            ]
        )
        for row in batch.rows:
            self._look_back(row)
        logit_rows, segments = self._lay_out(batch, chosen, flat)
        verified = self._sampler.sample(flat, logit_rows, list(segments.values()))
        outputs = [Verified() for _ in batch.rows]
        for (i, segment), output in zip(segments.items(), verified, strict=True):
            outputs[i] = output
            self._remember(segment.row, output.output_token_ids)
        return outputs

    def release(self, keys: Sequence[int]) -> None:
        """Drop histories."""
        for key in keys:
            self._histories.pop(key, None)

    def _look_back(self, row: Row) -> None:
        """Bring a row's history up to the end of its base tokens."""
        if not row.sampling.changes_logits:
            return
        history = self._histories.setdefault(row.key, [])
        assert len(history) >= row.num_computed_tokens, (
            f"request {row.key}: {len(history)} tokens remembered, "
            f"{row.num_computed_tokens} said to be computed"
        )
        history[row.num_computed_tokens :] = row.token_ids

    def _remember(self, row: Row, output: list[int]) -> None:
        if row.key in self._histories:
            self._histories[row.key].extend(output[:-1])

    def _lay_out(
        self, batch: Batch, chosen: Sequence[Sequence[int]], flat: FlatBatch
    ) -> tuple[NDArray[np.int64], dict[int, Segment]]:
        """Say which tokens need logits: of each sampling row, its last base token and its draft."""
        logit_rows: list[NDArray[np.int64]] = []
        segments: dict[int, Segment] = {}
        begin = 0
        for i, (row, draft) in enumerate(zip(batch.rows, chosen, strict=True)):
            assert row.samples or not draft, f"request {row.key} drafts inside its prompt"
            if row.samples:
                length = len(draft) + 1
                history = self._histories.get(row.key, [])
                segments[i] = Segment(row, draft, begin, begin + length, history)
                logit_rows.append(np.arange(flat.begins[i + 1] - length, flat.begins[i + 1]))
                begin += length
        rows = np.concatenate(logit_rows) if logit_rows else np.empty(0, dtype=np.int64)
        return rows.astype(np.int64), segments
