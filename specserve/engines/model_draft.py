"""The whole draft loop of a step beside the model: proposals, stopped row by row."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from specserve import sampling
from specserve.batch import Batch, Draft, Row
from specserve.engines.paged_model import FlatBatch, PagedModel, Span


class ModelDraftEngine:
    """A draft model behind the `DraftEngine` protocol.

    The first forward feeds each row all tokens the draft has not seen, so a row may skip drafting
    for as long as it likes; later forwards feed one token per row still drafting.
    """

    def __init__(self, model: PagedModel) -> None:
        self.model = model
        self._noise = sampling.Noise(model.vocab_size)

    def draft(self, batch: Batch) -> list[Draft]:
        """Propose a continuation of each row. See `DraftEngine`."""
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
            token_ids, confidences = self._forward(spans, [batch.rows[i] for i in active])
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

    def _forward(
        self, spans: list[Span], rows: list[Row]
    ) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """Return the next token of each span and the confidence in it.

        The most likely token and its probability; or, in sampled drafts, the token that the
        target's noise draws and its `sampling.lead`.
        """
        flat = FlatBatch.pack(spans)
        logits = self.model.forward(flat, flat.begins[1:].astype(np.int64) - 1)
        token_ids = logits.argmax(axis=1)
        best = logits[np.arange(len(logits)), token_ids]
        confidences = 1.0 / np.exp(logits - best[:, None], dtype=np.float64).sum(axis=1)
        sampled = [i for i, row in enumerate(rows) if row.is_draft_sampled]
        if sampled:
            ends = [spans[i].start + len(spans[i].token_ids) for i in sampled]
            drawn = self._draw(logits[sampled], [rows[i] for i in sampled], ends)
            token_ids[sampled], confidences[sampled] = drawn
        return token_ids, confidences

    def _draw(
        self, logits: sampling.Floats, rows: list[Row], ends: list[int]
    ) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """Draw each row's token after `ends` known ones with the noise that the target will use."""
        probs = sampling.target_probs(logits, [row.sampling for row in rows])
        noise = np.concatenate(
            [
                self._noise.rows(row.sampling.seed, position, position + 1)
                for row, end in zip(rows, ends, strict=True)
                for position in (end - row.num_prompt_tokens,)
            ]
        )
        token_ids = sampling.sample(probs, noise)
        return token_ids, sampling.lead(probs, noise, token_ids)
