"""The whole draft loop of a step beside the model: greedy proposals, stopped row by row."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from specserve.batch import Batch, Draft, StopRule
from specserve.engines.paged_model import FlatBatch, PagedModel, Span
from specserve.policies.acceptance import CONFIDENCE_EPS


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
        caps = np.array([row.max_draft_tokens for row in batch.rows])
        survival = _Survival(batch.stop_rule, len(batch.rows))
        spans = [self._first_span(batch, i) for i in active]
        num_drafted = 0
        while len(active):
            token_ids, confidences = self._forward(spans)
            for i, token_id, confidence in zip(
                active, token_ids.tolist(), confidences.tolist(), strict=True
            ):
                drafts[i].token_ids.append(token_id)
                drafts[i].confidences.append(confidence)
            num_drafted += 1
            goes_on = survival.update(active, confidences) & (caps[active] > num_drafted)
            spans = [
                Span([token_id], span.start + len(span.token_ids), span.block_table)
                for span, token_id, on in zip(spans, token_ids.tolist(), goes_on, strict=True)
                if on
            ]
            active = active[goes_on]
        return drafts

    def release(self, keys: Sequence[int]) -> None:
        """Nothing is kept between steps but KV, and the scheduler owns its blocks."""

    def _first_span(self, batch: Batch, i: int) -> Span:
        row = batch.rows[i]
        return Span(row.catch_up_token_ids, row.num_draft_computed_tokens, row.block_table)

    def _forward(self, spans: list[Span]) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Return the most likely next token of each span and its probability."""
        flat = FlatBatch.pack(spans)
        logits = self.model.forward(flat, flat.begins[1:].astype(np.int64) - 1)
        token_ids = logits.argmax(axis=1)
        best = logits[np.arange(len(logits)), token_ids]
        confidences = 1.0 / np.exp(logits - best[:, None]).sum(axis=1)
        return token_ids, confidences.astype(np.float32)


class _Survival:
    """Running survival of each row under a `StopRule`; without one, every row goes on."""

    def __init__(self, rule: StopRule | None, num_rows: int) -> None:
        self._slope = rule.slope if rule else 0.0
        self._bias = np.array(rule.bias if rule else np.zeros(num_rows))
        self._min = np.array(rule.min_survival if rule else np.zeros(num_rows))
        self._survival = np.ones(num_rows)

    def update(
        self, active: NDArray[np.int64], confidences: NDArray[np.float32]
    ) -> NDArray[np.bool_]:
        """Multiply in the newest token of the active rows; return which of them go on."""
        c = np.clip(confidences.astype(np.float64), CONFIDENCE_EPS, 1.0 - CONFIDENCE_EPS)
        z = self._bias[active] + self._slope * np.log(c / (1.0 - c))
        self._survival[active] /= 1.0 + np.exp(-np.clip(z, -30.0, 30.0))
        on: NDArray[np.bool_] = self._survival[active] >= self._min[active]
        return on
