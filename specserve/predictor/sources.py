"""Acceptance by draft source: a token that the draft model is sure of is not one that stood before.

What stood in the prompt is not what the model has said, either: who repeats himself goes on so.
Each source has a model of its own. All learn from what a step has brought to light, which is more
than what was verified: the token after the last verified one is known too, and so is what prompt
lookup would have proposed.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from specserve.batch import Draft, Row, StepRecord
from specserve.optimum import MANY
from specserve.predictor.acceptance import (
    AcceptanceModel,
    Outcome,
    judge_curves,
    judged,
    judged_one,
    logit,
    logit_of,
    scout_curves,
)

Floats = NDArray[np.float64]
LOOKUP_PRIOR = (-1.1, 1.5, 0.0, 0.0, 0.0, 2.0, 0.0)


class Acceptances:
    """The acceptance models of the draft model's greedy and sampled drafts and of prompt lookup's.

    Copies from the prompt and from the output have one each: of the former the demo target says .6
    of the tokens, of the latter .96 (128 greedy answers of 96 tokens to prompts of 96).
    """

    def __init__(self) -> None:
        self.greedy = AcceptanceModel()
        self.sampled = AcceptanceModel()
        self.prompt = AcceptanceModel(LOOKUP_PRIOR)
        self.output = AcceptanceModel(LOOKUP_PRIOR)

    @property
    def all(self) -> tuple[AcceptanceModel, ...]:
        """Return every model there is."""
        return self.greedy, self.sampled, self.prompt, self.output

    def of_model(self, row: Row) -> AcceptanceModel:
        """Return what judges the draft model's proposals for a row."""
        return self.greedy if row.sampling.is_greedy else self.sampled

    def of(self, row: Row) -> AcceptanceModel:
        """Return what judges a row's draft, which is its `lookup` if it has one."""
        return self.of_model(row) if row.lookup is None else self.of_lookup(row.lookup)

    def of_lookup(self, lookup: Draft) -> AcceptanceModel:
        """Return what judges a copy of earlier tokens."""
        return self.output if lookup.repeats_output else self.prompt

    def curves(self, rows: Sequence[Row]) -> tuple[Floats, Floats]:
        """Return judge and scout curves of the draft model's proposals, a column for each row."""
        sources = [self.of_model(row) for row in rows]
        history = _histories(rows, sources)
        judges, scouts = _weights(sources)
        return judge_curves(judges, history), scout_curves(scouts, history)

    def survivals(
        self, rows: Sequence[Row], confidences: Sequence[Sequence[float]], judge: Floats
    ) -> Floats:
        """Return [num_rows, longest draft], 0 beyond a row's draft; there must be one.

        Args:
            judge: the rows' curves of the draft model's proposals.
        """
        curves = judge
        if any(row.lookup for row in rows):
            sources = [self.of(row) for row in rows]
            curves = judge_curves(_weights(sources)[0], _histories(rows, sources))
        width = max(map(len, confidences))
        if width * len(rows) <= MANY:
            columns = zip(curves.T.tolist(), confidences, strict=True)
            return np.array([_survival(curve, values, width) for curve, values in columns])
        padded = np.array([[*values, *[-1.0] * (width - len(values))] for values in confidences])
        acceptance = judged(curves[:, :, None], logit(padded), np.arange(width))
        survival: Floats = np.cumprod(np.where(padded >= 0.0, acceptance, 0.0), axis=1)
        return survival

    def observe(self, record: StepRecord, lookups: Sequence[Draft | None]) -> None:
        """Learn from a finished step.

        Args:
            lookups: what prompt lookup had for each row, proposed or not.
        """
        outcomes: dict[AcceptanceModel, list[Outcome]] = {source: [] for source in self.all}
        for row, draft, chosen, lookup, verified in zip(
            record.batch.rows, record.drafts, record.chosen, lookups, record.outputs, strict=True
        ):
            output = verified.output_token_ids
            if output and lookup is not None:
                outcomes[self.of_lookup(lookup)].append(_outcome(row.key, lookup, output))
            # what a sampled token would have come to shows in its own verification only
            known = output if row.sampling.is_greedy else output[: len(chosen)]
            if known and draft.token_ids and row.lookup is None:
                outcomes[self.of_model(row)].append(_outcome(row.key, draft, known))
        for source, of_source in outcomes.items():
            if of_source:
                source.observe(of_source)

    def forget(self, keys: Sequence[int]) -> None:
        """Drop finished requests."""
        for source in self.all:
            source.forget(keys)


def _survival(curve: Sequence[float], confidences: Sequence[float], width: int) -> list[float]:
    """Return those of one row, without an array operation: see `MANY`."""
    survivals, survival = [0.0] * width, 1.0
    for position, confidence in enumerate(confidences):
        survival *= judged_one(curve, logit_of(confidence), position)
        survivals[position] = survival
    return survivals


def _weights(sources: Sequence[AcceptanceModel]) -> tuple[Floats, Floats]:
    """Return the judge's and the scout's weights of each row's source."""
    first = sources[0]
    if all(source is first for source in sources):
        return first.judge.weights[None], first.scout.weights[None]
    judges = np.array([source.judge.weights for source in sources])
    return judges, np.array([source.scout.weights for source in sources])


def _histories(rows: Sequence[Row], sources: Sequence[AcceptanceModel]) -> Floats:
    return np.array([s.history_of(row.key) for row, s in zip(rows, sources, strict=True)])


def _outcome(key: int, draft: Draft, output_token_ids: Sequence[int]) -> Outcome:
    """Compare a draft with what came out, as far as that reaches."""
    agreed = 0
    for proposed, token_id in zip(draft.token_ids, output_token_ids, strict=False):
        if proposed != token_id:
            break
        agreed += 1
    return Outcome(key, draft.confidences[: len(output_token_ids)], agreed)
