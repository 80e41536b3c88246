"""Engines behind two Triton models, reached through one callable. Imports nothing of Triton.

Inside the Python backend the callable is BLS; anywhere else it can be a client.
"""

from collections.abc import Callable, Sequence
from typing import Any

from numpy.typing import NDArray

from specserve.batch import Batch, Draft, Verified
from specserve.engines import wire

Arrays = dict[str, NDArray[Any]]
Infer = Callable[[str, Arrays], Arrays]


class TritonDraftEngine:
    """The `draft` model: one call per step carries the whole draft loop.

    Attributes:
        engine_s: seconds spent in the model's own engine so far, transport excluded.
    """

    def __init__(self, infer: Infer, model: str = "draft") -> None:
        self._infer = infer
        self._model = model
        self._known: set[int] = set()
        self._released: list[int] = []
        self.engine_s = 0.0

    def draft(self, batch: Batch) -> list[Draft]:
        """Propose for the rows that may draft. See `DraftEngine`."""
        drafts = [Draft() for _ in batch.rows]
        indices = [i for i, row in enumerate(batch.rows) if row.max_draft_tokens]
        if indices:
            rows = [batch.rows[i] for i in indices]
            rule = batch.stop_rule and batch.stop_rule.part_of(indices)
            request = wire.encode_draft_request(rows, rule, self._released)
            response = self._infer(self._model, request)
            self._known.update(row.key for row in rows)
            self._released = []
            self.engine_s += float(response["engine_s"].item())
            for i, draft in zip(indices, wire.decode_drafts(response), strict=True):
                drafts[i] = draft
        return drafts

    def release(self, keys: Sequence[int]) -> None:
        """Tell the model with the next call, of those it has seen."""
        self._released += self._known.intersection(keys)
        self._known.difference_update(keys)


class TritonTargetEngine:
    """The `target` model: one call per step.

    Attributes:
        engine_s: as in `TritonDraftEngine`.
        num_computed_tokens: of the last call, where the model's engine counts them.
    """

    def __init__(self, infer: Infer, model: str = "target") -> None:
        self._infer = infer
        self._model = model
        self._known: set[int] = set()
        self._released: list[int] = []
        self.engine_s = 0.0
        self.num_computed_tokens: int | None = None

    def verify(self, batch: Batch, chosen: Sequence[Sequence[int]]) -> list[Verified]:
        """Verify all rows. See `TargetEngine`."""
        new_keys = {row.key for row in batch.rows} - self._known
        request = wire.encode_verify_request(batch, chosen, new_keys, self._released)
        response = self._infer(self._model, request)
        self._known |= new_keys
        self._released = []
        self.engine_s += float(response["engine_s"].item())
        self.num_computed_tokens = wire.decode_count(response)
        return wire.decode_verified(response)

    def release(self, keys: Sequence[int]) -> None:
        """Tell the model with the next call."""
        self._known.difference_update(keys)
        self._released.extend(keys)
