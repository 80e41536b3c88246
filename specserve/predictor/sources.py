"""Acceptance by draft source: a token that the draft model is sure of is not one that stood before.

Each source has a model of its own. All learn from what a step has brought to light, which is more
than what was verified: the token after the last verified one is known too, and so is what prompt
lookup would have proposed.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from specserve.batch import Draft, Row, StepRecord
from specserve.predictor.acceptance import AcceptanceModel, Outcome, judge_features, logit

Floats = NDArray[np.float64]
LOOKUP_PRIOR = (-0.5, 0.8, 0.0, 0.0, 0.0, 2.0, 0.0)


class Acceptances:
    """The acceptance models of the draft model's greedy and sampled drafts and of prompt lookup."""

    def __init__(self) -> None:
        self.greedy = AcceptanceModel()
        self.sampled = AcceptanceModel()
        self.ngram = AcceptanceModel(LOOKUP_PRIOR)

    @property
    def all(self) -> tuple[AcceptanceModel, ...]:
        """Return every model there is."""
        return self.greedy, self.sampled, self.ngram

    def of_model(self, row: Row) -> AcceptanceModel:
        """Return what judges the draft model's proposals for a row."""
        return self.greedy if row.sampling.is_greedy else self.sampled

    def of(self, row: Row) -> AcceptanceModel:
        """Return what judges a row's draft, which is its `lookup` if it has one."""
        return self.of_model(row) if row.lookup is None else self.ngram

    def survivals(
        self, rows: Sequence[Row], confidences: Sequence[Sequence[float]], lengths: Sequence[int]
    ) -> Floats:
        """Return [num_rows, longest draft], 0 beyond a row's draft; there must be one.

        Args:
            lengths: of the drafts.
        """
        count = np.array(lengths)
        position = np.arange(max(lengths))
        drafted = position < count[:, None]
        where = np.broadcast_to(position, drafted.shape)[drafted]
        z = logit(np.array([c for row in confidences for c in row]))
        sources = [self.of(row) for row in rows]
        accepted = np.zeros(drafted.shape)
        for source in set(sources):
            mine = np.array([other is source for other in sources])
            token = np.repeat(mine, count)
            history = np.repeat(source.history([row.key for row in rows]), count)
            features = judge_features(z[token], where[token], history[token])
            accepted[drafted & mine[:, None]] = source.judge.predict(features)
        survival: Floats = np.cumprod(accepted, axis=1)
        return survival

    def observe(self, record: StepRecord, lookups: Sequence[Draft | None]) -> None:
        """Learn from a finished step.

        Args:
            lookups: what prompt lookup had for each row, proposed or not.
        """
        outcomes: dict[AcceptanceModel, list[Outcome]] = {source: [] for source in self.all}
        for row, draft, lookup, verified in zip(
            record.batch.rows, record.drafts, lookups, record.outputs, strict=True
        ):
            output = verified.output_token_ids
            if output and draft.token_ids and row.lookup is None:
                outcomes[self.of_model(row)].append(_outcome(row.key, draft, output))
            if output and lookup is not None:
                outcomes[self.ngram].append(_outcome(row.key, lookup, output))
        for source, of_source in outcomes.items():
            source.observe(of_source)

    def forget(self, keys: Sequence[int]) -> None:
        """Drop finished requests."""
        for source in self.all:
            source.forget(keys)


def _outcome(key: int, draft: Draft, output_token_ids: Sequence[int]) -> Outcome:
    """Compare a draft with what came out, as far as that reaches."""
    agreed = 0
    for proposed, token_id in zip(draft.token_ids, output_token_ids, strict=False):
        if proposed != token_id:
            break
        agreed += 1
    return Outcome(key, draft.confidences[: len(output_token_ids)], agreed)
