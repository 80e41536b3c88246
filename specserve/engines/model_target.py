"""Verification beside the model: one pass, the target's own token at every position, agreement."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from specserve import sampling
from specserve.batch import Batch, Row, Verified
from specserve.engines.paged_model import FlatBatch, PagedModel, Span
from specserve.sampling import Uniforms


@dataclass(slots=True)
class _History:
    """What one request's parameters look back at."""

    uniforms: Uniforms
    token_ids: list[int] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class _Segment:
    """The logits rows [begin, end) of one sampling row, and its draft."""

    row: Row
    draft: Sequence[int]
    begin: int
    end: int


class ModelTargetEngine:
    """A target model behind the `TargetEngine` protocol.

    Keeps token history and uniforms of the requests that are not plain greedy.
    """

    def __init__(self, model: PagedModel) -> None:
        self.model = model
        self._histories: dict[int, _History] = {}

    def verify(self, batch: Batch, chosen: Sequence[Sequence[int]]) -> list[Verified]:
        """Run base and chosen tokens in one pass. See `TargetEngine`."""
        flat = FlatBatch.pack(
            [
                Span([*row.token_ids, *draft], row.num_computed_tokens, row.block_table)
                for row, draft in zip(batch.rows, chosen, strict=True)
            ]
        )
        logit_rows, segments = _lay_out(batch, chosen, flat)
        for row in batch.rows:
            self._look_back(row)
        logits = self.model.forward(flat, logit_rows)
        token_ids = self._target_tokens(logits, segments)
        outputs = [Verified() for _ in batch.rows]
        for i, segment in segments.items():
            output = sampling.agree(token_ids[segment.begin : segment.end], segment.draft)
            values: list[float] = []
            if segment.row.sampling.return_log_probs:
                rows = logits[segment.begin : segment.begin + len(output)]
                values = sampling.log_probs(rows, output)
            outputs[i] = Verified(output, values)
            self._remember(segment.row, output)
        return outputs

    def release(self, keys: Sequence[int]) -> None:
        """Drop histories."""
        for key in keys:
            self._histories.pop(key, None)

    def _look_back(self, row: Row) -> None:
        """Bring a row's history up to the end of its base tokens."""
        if row.sampling.is_greedy and not row.sampling.changes_logits:
            return
        history = self._histories.get(row.key)
        if history is None:
            history = self._histories[row.key] = _History(Uniforms(row.sampling.seed))
        assert len(history.token_ids) >= row.num_computed_tokens, (
            f"request {row.key}: {len(history.token_ids)} tokens remembered, "
            f"{row.num_computed_tokens} said to be computed"
        )
        history.token_ids[row.num_computed_tokens :] = row.token_ids

    def _remember(self, row: Row, output: list[int]) -> None:
        if row.key in self._histories:
            self._histories[row.key].token_ids.extend(output[:-1])

    def _target_tokens(self, logits: sampling.Floats, segments: dict[int, _Segment]) -> list[int]:
        """Return the target's own token at every logits row."""
        token_ids = logits.argmax(axis=1)
        drawn: list[_Segment] = []
        adjusted: list[sampling.Floats] = []
        for segment in segments.values():
            params = segment.row.sampling
            rows = logits[segment.begin : segment.end]
            if params.changes_logits:
                history = self._histories[segment.row.key].token_ids
                rows = sampling.adjust_logits(
                    rows, params, history, segment.row.num_prompt_tokens, segment.draft
                )
                token_ids[segment.begin : segment.end] = rows.argmax(axis=1)
            if not params.is_greedy:
                drawn.append(segment)
                adjusted.append(rows)
        if drawn:
            positions = np.concatenate([np.arange(s.begin, s.end) for s in drawn])
            token_ids[positions] = self._draw(np.concatenate(adjusted), drawn)
        result: list[int] = token_ids.tolist()
        return result

    def _draw(self, logits: sampling.Floats, segments: list[_Segment]) -> NDArray[np.int64]:
        """Draw one token for each position of the segments, each with its own uniform."""
        lengths = [segment.end - segment.begin for segment in segments]
        params = [segment.row.sampling for segment in segments]

        def column(values: list[float]) -> sampling.Floats:
            return np.repeat(np.array(values, dtype=np.float32), lengths)

        probs = sampling.target_probs(
            logits,
            temperature=column([p.temperature for p in params]),
            min_p=column([p.min_p for p in params]),
            top_k=np.repeat(np.array([p.top_k for p in params], dtype=np.int64), lengths),
            top_p=column([p.top_p for p in params]),
        )
        uniforms = np.concatenate([self._uniforms(segment) for segment in segments])
        return sampling.sample(probs, uniforms)

    def _uniforms(self, segment: _Segment) -> NDArray[np.float64]:
        row = segment.row
        first = row.num_computed_tokens + len(row.token_ids) - row.num_prompt_tokens
        return self._histories[row.key].uniforms[first : first + segment.end - segment.begin]


def _lay_out(
    batch: Batch, chosen: Sequence[Sequence[int]], flat: FlatBatch
) -> tuple[NDArray[np.int64], dict[int, _Segment]]:
    """Say which tokens need logits: of each sampling row, its last base token and its draft."""
    logit_rows: list[NDArray[np.int64]] = []
    segments: dict[int, _Segment] = {}
    begin = 0
    for i, (row, draft) in enumerate(zip(batch.rows, chosen, strict=True)):
        assert row.samples or not draft, f"request {row.key} drafts inside its prompt"
        if row.samples:
            length = len(draft) + 1
            segments[i] = _Segment(row, draft, begin, begin + length)
            logit_rows.append(np.arange(flat.begins[i + 1] - length, flat.begins[i + 1]))
            begin += length
    rows = np.concatenate(logit_rows) if logit_rows else np.empty(0, dtype=np.int64)
    return rows.astype(np.int64), segments
