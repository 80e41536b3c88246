"""Drafts that stop at any token: the stop rule, in the batched post-processor of the logits.

Sound because it needs nothing but what the bindings say of it: after every pass of the draft, and
before its token is drawn, Python sees the logits of all requests in the pass and may change them.
So here the token is read off, and its probability, and the rule is asked; where the draft ends with
this token, the end is made the only choice in its place, and the request is over without another
pass. `streaming` and `cancel_request`, or a stop after the next pass, would pay for one pass more
in every draft, and a request for each token for all of them to be scheduled anew.

What it costs is one synchronization a pass, and the bindings' lists of all tokens of all requests,
which is why `draft` plans lengths where contexts are long.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from specserve.batch import Draft
from specserve.stop_rules import Stopper


@dataclass(slots=True)
class Watched:
    """One draft while it is made.

    Attributes:
        index: of its row, as the stop rule counts.
        num_input_tokens: of its request.
        draft: what was read off so far.
    """

    index: int
    num_input_tokens: int
    draft: Draft = field(default_factory=Draft)

    def note(self, position: int, token_id: int, confidence: float) -> None:
        """Take down the token of a position; a pass seen twice counts once."""
        self.draft.token_ids[position:] = [token_id]
        self.draft.confidences[position:] = [confidence]


class StepStop:
    """The post-processor, for one wave of drafts at a time.

    The rule judges the batch as a whole, so rows must draft in step. The executor promises nothing
    of the kind: a row that falls behind, because its context took several passes, say, ends with
    its next token, and the others go on without it.

    Args:
        vocab_size: tokens that may be drafted; logits beyond are padding.

    Attributes:
        stop_id: the token that ends a request.
    """

    def __init__(self, vocab_size: int, stop_id: int) -> None:
        self._vocab_size = vocab_size
        self.stop_id = stop_id
        self._rows: dict[int, Watched] = {}
        self.begin({}, None)

    def begin(self, rows: dict[int, Watched], stopper: Stopper | None) -> None:
        """Watch a wave: rows by client id; no stopper lets each draft up to its length."""
        self._rows = rows
        self._stopper = stopper
        self._active = {row.index for row in rows.values()}
        self._position = 0
        self._error: Exception | None = None

    def end(self) -> None:
        """Stop watching.

        Raises:
            Exception: what failed in the executor's thread, where nothing may be raised.
        """
        self._rows = {}
        if self._error is not None:
            raise self._error

    def __call__(
        self,
        request_ids: Sequence[int],
        logits: Sequence[Tensor],
        token_ids: Sequence[Sequence[Sequence[int]]],
        stream: int,
        client_ids: Sequence[int | None],
    ) -> None:
        """See one pass; called by the executor, in its thread.

        Args:
            logits: of each request, [..., padded vocabulary], to be changed in place.
            token_ids: of each request and beam, its tokens so far.
            stream: the CUDA stream that the logits are used on next.
        """
        try:
            known = [i for i, client_id in enumerate(client_ids) if client_id in self._rows]
            if known:
                rows = [self._rows[client_ids[i]] for i in known]  # type: ignore[index]
                lengths = [len(token_ids[i][0]) for i in known]
                with _on(stream, logits[known[0]]):
                    self._watch(rows, lengths, [logits[i] for i in known])
        except Exception as error:
            self._error = error

    def _watch(self, rows: list[Watched], lengths: list[int], logits: list[Tensor]) -> None:
        flat = torch.stack([tensor.reshape(-1)[: self._vocab_size] for tensor in logits]).float()
        best, proposed = flat.max(dim=1)
        confidences = torch.exp(best - torch.logsumexp(flat, dim=1))
        values = confidences.cpu().numpy().astype(np.float64)  # waits for the pass
        for row, length, token_id, value in zip(
            rows, lengths, proposed.tolist(), values.tolist(), strict=True
        ):
            row.note(length - row.num_input_tokens, token_id, value)
        self._advance(rows, lengths, values)
        for row, tensor in zip(rows, logits, strict=True):
            if row.index not in self._active:
                tensor.fill_(float("-inf"))
                tensor[..., self.stop_id] = 0.0

    def _advance(
        self, rows: list[Watched], lengths: list[int], confidences: NDArray[np.float64]
    ) -> None:
        """Ask the rule about the rows in step; all others end."""
        in_step = [
            i
            for i, (row, length) in enumerate(zip(rows, lengths, strict=True))
            if row.index in self._active and length - row.num_input_tokens == self._position
        ]
        if not in_step:
            return
        indices = np.array([rows[i].index for i in in_step])
        goes_on = np.ones(len(indices), dtype=bool)
        if self._stopper is not None:
            goes_on = self._stopper.goes_on(indices, confidences[in_step])
        self._active = set(indices[goes_on].tolist())
        self._position += 1


def _on(stream: int, logits: Tensor) -> AbstractContextManager[Any]:
    if not logits.is_cuda:
        return nullcontext()
    external = torch.cuda.ExternalStream(stream)  # type: ignore[no-untyped-call]
    return torch.cuda.stream(external)
