"""Rejection sampling as the papers print it, and the rule that breaks it, for checks to tell apart.

Nothing here serves. Sampled drafts are drawn independently of the target; a draft token is accepted
with min(1, target / draft). That is lossless as long as nobody looks at the drawn tokens before it
is decided which of them are verified (defect D14 of the released AdaSpec code).
"""

import itertools
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from specserve import sampling
from specserve.batch import Batch, DraftPlan, Row, StepRecord, Verified
from specserve.engines.model_draft import ModelDraftEngine
from specserve.engines.paged_model import FlatBatch, PagedModel
from specserve.engines.sampler import Segment
from specserve.policies import Unexplained


class SampledDraftEngine(ModelDraftEngine):
    """Draws each draft token by itself; the confidence is the drawn token's own probability.

    Attributes:
        proposals: (request, output position) -> the distribution drawn from, [vocab_size].
    """

    def __init__(self, model: PagedModel, seed: int = 1) -> None:
        super().__init__(model)
        self.proposals: dict[tuple[int, int], sampling.Floats] = {}
        self._random = np.random.default_rng(seed)

    def _draw(
        self, logits: sampling.Floats, rows: list[Row], ends: list[int]
    ) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """Draw with randomness of its own, where the one that serves takes the target's."""
        probs = sampling.target_probs(logits, [row.sampling for row in rows])
        for row, end, proposal in zip(rows, ends, probs, strict=True):
            self.proposals[row.key, end - row.num_prompt_tokens] = proposal
        token_ids = sampling.sample(probs, self._random.standard_exponential(probs.shape))
        return token_ids, probs[np.arange(len(rows)), token_ids].astype(np.float64)


class TextbookSampler:
    """Accepts with min(1, target / draft), else draws from max(0, target - draft). See `Sampler`.

    For requests without penalties. Source: Leviathan et al. 2023, algorithm 1 (arXiv 2211.17192).
    """

    def __init__(self, model: PagedModel, draft: SampledDraftEngine, seed: int = 2) -> None:
        self._model = model
        self._draft = draft
        self._random = np.random.default_rng(seed)

    def sample(
        self, flat: FlatBatch, logit_rows: NDArray[np.int64], segments: Sequence[Segment]
    ) -> list[Verified]:
        """Run one pass. See `Sampler`."""
        logits = self._model.forward(flat, logit_rows)
        verified = []
        for segment in segments:
            rows = logits[segment.begin : segment.end]
            target = sampling.target_probs(rows, [segment.row.sampling] * segment.length)
            verified.append(Verified(self._say(segment, target)))
        return verified

    def _say(self, segment: Segment, target: sampling.Floats) -> list[int]:
        """Return the accepted tokens and one more: of `target`'s last row, if all of them are."""
        said: list[int] = []
        for i, token_id in enumerate(segment.draft):
            proposal = self._draft.proposals[segment.row.key, segment.first_position + i]
            if self._random.random() * proposal[token_id] >= target[i, token_id]:
                return [*said, self._draw(np.maximum(target[i] - proposal, 0.0))]
            said.append(token_id)
        return [*said, self._draw(target[-1])]

    def _draw(self, weights: sampling.Floats) -> int:
        return int((weights / self._random.standard_exponential(len(weights))).argmax())


class VerifyAll(Unexplained):
    """Two sampled draft tokens for every row, all of them verified."""

    def plan(self, rows: Sequence[Row]) -> DraftPlan:
        """Two tokens for everybody."""
        return DraftPlan([2] * len(rows), is_sampled=True)

    def select(self, batch: Batch, confidences: Sequence[Sequence[float]]) -> list[int]:
        """Keep every token."""
        return [len(row) for row in confidences]

    def observe(self, record: StepRecord) -> None:
        """Learn nothing."""

    def release(self, keys: Sequence[int]) -> None:
        """Nothing is kept."""


class TokenReader(VerifyAll):
    """The paper's rule: verify up to the first token whose own probability is not above a half."""

    def select(self, batch: Batch, confidences: Sequence[Sequence[float]]) -> list[int]:
        """Cut at the first unsure token."""
        return [sum(1 for _ in itertools.takewhile(lambda c: c > 0.5, row)) for row in confidences]
