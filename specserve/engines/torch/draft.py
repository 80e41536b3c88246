"""The draft loop of a step on the device: tokens, stop rule and next inputs without the host."""

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor

from specserve.batch import Batch, Draft, Row
from specserve.engines.paged_model import FlatBatch, Span
from specserve.engines.torch import sampling
from specserve.engines.torch.captured import Captured
from specserve.engines.torch.model import TorchModel
from specserve.engines.torch.stoppers import STOPPERS, Stopper
from specserve.engines.torch.transfer import send
from specserve.stop_rules import StopRule, SurvivalRule, ValueRule


class TorchDraftEngine:
    """A draft model behind the `DraftEngine` protocol; it proposes what `ModelDraftEngine` does.

    The host sends the rows once and reads the drafts once. Between forwards it asks the device only
    whether anybody still drafts. On an H100 that cost less than graphs with conditional nodes, by
    which the device would leave out forwards unasked (tried with a stand-in for torch 2.13's).

    Args:
        max_draft_tokens: the longest draft of a row.
        max_rows: of a step, at most the model's `max_tokens`.
    """

    def __init__(self, model: TorchModel, max_draft_tokens: int = 8, max_rows: int = 64) -> None:
        self.model = model
        self._max_draft_tokens = max_draft_tokens
        device, max_rows = model.device, model.padded(max_rows)
        self._anybody = torch.zeros((), dtype=torch.bool, device=device)  # still drafts
        self._sampled: _Sampled | None = None
        self._position = torch.zeros(1, dtype=torch.int64, device=device)
        self._active = torch.zeros(max_rows, dtype=torch.bool, device=device)
        self._rows = torch.zeros((2, max_rows), dtype=torch.int32, device=device)
        self._caps, self._next_positions = self._rows
        shape = (2 * max_draft_tokens + 1, max_rows)
        self._drafts = torch.zeros(shape, dtype=torch.float64, device=device)  # read in one copy
        self._token_ids, self._confidences = self._drafts[:-1].chunk(2)
        self._lengths = self._drafts[-1]
        self._takes: dict[type, tuple[Stopper, Callable[[int], None]]] = {}
        for kind in (type(None), SurvivalRule, ValueRule):  # a baseline's, when one comes
            self._take_by(kind)

    def draft(self, batch: Batch) -> list[Draft]:
        """Propose a continuation of each row. See `DraftEngine`."""
        drafts = [Draft() for _ in batch.rows]
        indices = _who_drafts(batch)
        if indices:
            rule = batch.stop_rule and batch.stop_rule.part_of(indices)
            proposed = self._draft([batch.rows[i] for i in indices], rule)
            for i, draft in zip(indices, proposed, strict=True):
                drafts[i] = draft
        return drafts

    def release(self, keys: Sequence[int]) -> None:
        """Nothing is kept between steps but KV, and the scheduler owns its blocks."""

    def _draft(self, rows: Sequence[Row], rule: StopRule | None) -> list[Draft]:
        num_rows, num_forwards = len(rows), max(row.max_draft_tokens for row in rows)
        assert num_forwards <= self._max_draft_tokens, f"a draft of {num_forwards} tokens"
        num_padded = self.model.padded(num_rows)
        stopper, take = self._take_by(type(rule))
        self._sampled = _Sampled.of(rows, self.model)
        if self._sampled:  # no graph is captured of filters that differ from step to step
            take = partial(self._take, stopper)
        stopper.load(rule)
        self._begin(rows, num_padded)
        self._first_forward(rows)
        take(num_padded)
        for _ in range(num_forwards - 1):
            if not bool(self._anybody):
                break
            self.model.run(num_padded)
            take(num_padded)
        return self._read(num_rows)

    def _take_by(self, kind: type) -> tuple[Stopper, Callable[[int], None]]:
        """Return the stopper of a kind of rules, and `_take` with it, captured."""
        if kind not in self._takes:
            self._sampled = None
            max_rows, device = len(self._active), self.model.device
            stopper = STOPPERS[kind](max_rows, self._max_draft_tokens, device)
            sizes = [size for size in self.model.sizes if size <= max_rows]
            take = Captured(partial(self._take, stopper), sizes, device)
            self._takes[kind] = stopper, take
        return self._takes[kind]

    def _begin(self, rows: Sequence[Row], num_padded: int) -> None:
        """Send what the loop must know of its rows; padding is a row that may not draft."""
        columns = np.zeros((2, num_padded), dtype=np.int32)
        for i, row in enumerate(rows):
            columns[:, i] = row.max_draft_tokens, _num_known(row)
        self._rows[:, :num_padded].copy_(send(columns, self.model.device), non_blocking=True)
        self._active[:num_padded] = self._caps[:num_padded] > 0
        self._lengths[:num_padded] = 0.0
        self._position.zero_()

    def _first_forward(self, rows: Sequence[Row]) -> None:
        """Feed each row all tokens the draft has not seen; keep what it makes of the last ones."""
        flat = FlatBatch.pack(
            [Span(r.catch_up_token_ids, r.num_draft_computed_tokens, r.block_table) for r in rows]
        )
        self.model.hidden[: len(rows)] = self.model.hidden_of(flat, flat.begins[1:] - 1)

    def _take(self, stopper: Stopper, num_rows: int) -> None:
        """Take each row's token from its logits, and make it the next forward's input or stop."""
        logits = self.model.logits(self.model.hidden[:num_rows])
        best, token_ids = logits.max(dim=1)
        confidences = 1.0 / torch.exp(logits - best[:, None]).sum(dim=1, dtype=torch.float64)
        if self._sampled:
            self._sampled.draw(logits, token_ids, confidences)
        self._token_ids[:, :num_rows].index_copy_(0, self._position, token_ids[None].double())
        self._confidences[:, :num_rows].index_copy_(0, self._position, confidences[None])
        # A capture runs this more often than a draft is long: back to the beginning, not beyond.
        self._position.add_(1).remainder_(self._max_draft_tokens)

        active, lengths = self._active[:num_rows], self._lengths[:num_rows]
        lengths += active
        active &= (lengths < self._caps[:num_rows]) & stopper.goes_on(active, confidences)
        next_positions = self._next_positions[:num_rows]
        self.model.inputs.continue_rows(token_ids, torch.where(active, next_positions, -1))
        next_positions += 1
        self._anybody.copy_(active.any())

    def _read(self, num_rows: int) -> list[Draft]:
        """Copy the drafts to the host."""
        drafts = self._drafts[:, :num_rows].cpu().numpy().T
        token_ids, confidences = np.split(drafts[:, :-1], 2, axis=1)
        return [
            Draft(token_ids[i, :length].astype(int).tolist(), confidences[i, :length].tolist())
            for i, length in enumerate(drafts[:, -1].astype(int).tolist())
        ]


class _Sampled:
    """The rows of a phase whose tokens are drawn, with the noise that the target will use."""

    def __init__(self, rows: Sequence[Row], indices: list[int], model: TorchModel) -> None:
        drawn = [rows[i] for i in indices]
        positions = np.array([_num_known(row) - row.num_prompt_tokens for row in drawn])
        params = [row.sampling for row in drawn]
        self._draw = sampling.Draw(params, positions, model.vocab_size, model.device)
        self._rows = send(np.array(indices), model.device)
        self._num_drawn = 0

    @classmethod
    def of(cls, rows: Sequence[Row], model: TorchModel) -> "_Sampled | None":
        """Make one if there are such rows."""
        indices = [i for i, row in enumerate(rows) if row.is_draft_sampled]
        return cls(rows, indices, model) if indices else None

    def draw(self, logits: Tensor, token_ids: Tensor, confidences: Tensor) -> None:
        """Put the next token of these rows, and its lead, in place of the most likely one."""
        speed = self._draw.race(logits[self._rows], self._num_drawn)
        token_ids[self._rows], confidences[self._rows] = sampling.winner_and_lead(speed)
        self._num_drawn += 1


def _who_drafts(batch: Batch) -> list[int]:
    """Return the rows that draft a first token."""
    may = np.array([row.max_draft_tokens > 0 for row in batch.rows])
    if batch.stop_rule is not None and may.any():
        may &= batch.stop_rule.start().begins()
    indices: list[int] = np.flatnonzero(may).tolist()
    return indices


def _num_known(row: Row) -> int:
    return row.num_draft_computed_tokens + len(row.catch_up_token_ids)
