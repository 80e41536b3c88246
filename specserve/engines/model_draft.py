"""The whole draft loop of a step beside the model: greedy proposals, stopped row by row."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from specserve.batch import Batch, Draft
from specserve.engines.paged_model import FlatBatch, PagedModel, Span


class ModelDraftEngine:
    """A draft model behind the `DraftEngine` protocol.

    The first forward feeds each row all tokens the draft has not seen, so a row may skip drafting
    for as long as it likes; later forwards feed one token per row still drafting.
    """

    def __init__(self, model: PagedModel) -> None:
        self.model = model

    def draft(self, batch: Batch) -> list[Draft]:
        """Propose the most likely continuation of each row. See `DraftEngine`."""
        drafts = [Draft() for _ in batch.rows]
        active = np.array([i for i, r in enumerate(batch.rows) if r.max_draft_tokens], dtype=int)
        if not len(active):
            return drafts
        stopper = batch.stop_rule.start() if batch.stop_rule else None
        if stopper:
            active = active[stopper.begins()[active]]
        caps = np.array([row.max_draft_tokens for row in batch.rows])
        spans = [self._first_span(batch, i) for i in active]
        num_drafted = 0
        while len(active):
            token_ids, confidences = self._forward(spans)
            proposed = token_ids.tolist()
            for i, token_id, c in zip(active, proposed, confidences.tolist(), strict=True):
                drafts[i].token_ids.append(token_id)
                drafts[i].confidences.append(c)
            num_drafted += 1
            on = caps[active] > num_drafted
            if stopper:
                on &= stopper.goes_on(active, confidences)
            spans = [
                Span([token_id], span.start + len(span.token_ids), span.block_table)
                for span, token_id, goes_on in zip(spans, proposed, on, strict=True)
                if goes_on
            ]
            active = active[on]
        return drafts

    def release(self, keys: Sequence[int]) -> None:
        """Nothing is kept between steps but KV, and the scheduler owns its blocks."""

    def _first_span(self, batch: Batch, i: int) -> Span:
        row = batch.rows[i]
        return Span(row.catch_up_token_ids, row.num_draft_computed_tokens, row.block_table)

    def _forward(self, spans: list[Span]) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """Return the most likely next token of each span and its probability."""
        flat = FlatBatch.pack(spans)
        logits = self.model.forward(flat, flat.begins[1:].astype(np.int64) - 1)
        token_ids = logits.argmax(axis=1)
        best = logits[np.arange(len(logits)), token_ids]
        confidences = 1.0 / np.exp(logits - best[:, None]).sum(axis=1)
        return token_ids, confidences.astype(np.float64)
