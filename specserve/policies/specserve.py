"""The controller: expected tokens per second, subject to what each request is owed."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from specserve.batch import Batch, DraftPlan, Row, StepRecord
from specserve.config import PolicyConfig
from specserve.optimum import best_total
from specserve.policies import needed
from specserve.policies.owed import deficits, least_debt, owed_first
from specserve.predictor.acceptance import AcceptanceModel, Outcome, judge_features, logit
from specserve.predictor.step_time import StepTimeModel
from specserve.stop_rules import ValueRule

NEEDS_PROFILE = True
Floats = NDArray[np.float64]


def make(config: PolicyConfig, step_time: StepTimeModel | None = None) -> "SpecServePolicy":
    """Make the controller on a predictor."""
    return SpecServePolicy(config, needed(step_time, "specserve"))


@dataclass(slots=True)
class _Step:
    """What one step's plan and selection share.

    Attributes:
        verify_s: [m + 1], predicted seconds to verify with 0, ..., m draft tokens.
        draft_s: predicted seconds of the draft call, once its lengths are known.
        deficit: [num_rows], tokens missing at the end of a plain step, if anybody has objectives.
        is_exploring: every row drafts, and has its first token verified, to learn.
    """

    num_tokens: int
    num_prompt_tokens: int
    context_tokens: int
    verify_s: Floats
    draft_s: float = 0.0
    deficit: Floats | None = None
    is_exploring: bool = False


class SpecServePolicy:
    """Draft and verify what raises the predicted token rate; owed tokens first.

    * Survival: the judge's acceptance, multiplied along the row; calibrated online.
    * Drafting: a `ValueRule`, evaluated beside the draft engine after every forward.
    * Verification: the exact optimum over all totals, on the true staircase.
    * Off: when no draft is expected to pay. A share of the steps explores all the same, and the
      answer has to be clear in either direction before the mode changes.

    Attributes:
        reasons: rows by what decided their length: owed, yield, cap, off, explore, fixed.
    """

    EXPLORE_EVERY = 48  # steps while off
    MAX_LATE = 3.0  # owed tokens beyond which a row is not more urgent
    ON_MARGIN = 1.02  # promised over plain rate that turns speculation on
    OFF_MARGIN = 1.0

    def __init__(self, config: PolicyConfig, step_time: StepTimeModel) -> None:
        self.config = config
        self.step_time = step_time
        self.acceptance = AcceptanceModel()
        self.reasons: Counter[str] = Counter()
        self._is_on = True
        self._num_steps_off = self.EXPLORE_EVERY - 1  # begin by looking
        self._step: _Step | None = None

    # -- plan ----------------------------------------------------------------------------------

    def plan(self, rows: Sequence[Row]) -> DraftPlan:
        """Say which rows may draft, and hand the rule that stops them to the draft engine."""
        caps = np.array([min(r.max_draft_tokens, self.config.max_draft_tokens) for r in rows])
        step = self._step = self._look(rows, int(caps.sum()))
        rule = self._rule(rows, step, caps)
        begins = self._gate(rule, caps)
        self._num_steps_off = 0 if begins.any() else self._num_steps_off + 1
        if not begins.any() and self._num_steps_off % self.EXPLORE_EVERY == 0:
            step.is_exploring = True
            begins = caps > 0
        return DraftPlan(np.where(begins, caps, 0).tolist(), rule)

    def _look(self, rows: Sequence[Row], num_draft_tokens: int) -> _Step:
        num_tokens = sum(len(row.token_ids) for row in rows)
        prompt = sum(len(row.token_ids) - row.samples for row in rows)
        context = sum(row.num_computed_tokens for row in rows)
        curve = self.step_time.verify_curve(num_tokens, num_draft_tokens, context, prompt)
        return _Step(num_tokens, prompt, context, curve)

    def _rule(self, rows: Sequence[Row], step: _Step, caps: NDArray[np.int64]) -> ValueRule:
        drafting = [row for row, cap in zip(rows, caps, strict=True) if cap]
        context = sum(row.num_computed_tokens for row in drafting)
        forward_s = self.step_time.forward_curve(len(drafting), context)
        first_s = self.step_time.draft_s([len(drafting)], 0, context) if drafting else 0.0
        return ValueRule(
            judge=self.acceptance.judge.weights,
            scout=self.acceptance.scout.weights,
            history=self.acceptance.history([row.key for row in rows]),
            weight=self._weights(rows, float(step.verify_s[0])),
            verify_s=step.verify_s,
            forward_s=np.pad(forward_s, (0, len(rows) - len(drafting)), mode="edge"),
            base=np.array([sum(row.samples for row in rows), first_s - forward_s[-1], 1.0]),
        )

    def _weights(self, rows: Sequence[Row], plain_s: float) -> Floats:
        """Return what a token of each row is worth: more to rows that would end the step late."""
        late = np.clip(deficits(rows, plain_s), 0.0, self.MAX_LATE)
        fixed = np.array([row.has_fixed_draft for row in rows])
        weights: Floats = np.where(fixed, np.inf, 1.0 + late)
        return weights

    def _gate(self, rule: ValueRule, caps: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Say which rows draft at all, with hysteresis over the whole batch."""
        may = np.flatnonzero(caps)
        begins = np.zeros(len(caps), dtype=bool)
        if len(may):
            part = rule.part_of(may.tolist())
            margin = self.OFF_MARGIN if self._is_on else self.ON_MARGIN
            begins[may] = part.start().begins_with(margin)
            self._is_on = bool(begins.any())
        return begins

    # -- select --------------------------------------------------------------------------------

    def select(self, batch: Batch, confidences: Sequence[Sequence[float]]) -> list[int]:
        """Verify the tokens that pay, the most likely ones first."""
        lengths = [len(values) for values in confidences]
        step = self._step
        if step is None or not any(lengths):
            self.reasons["off"] += len(lengths)
            return lengths
        survival = self._survivals(batch, confidences, lengths)
        step.draft_s = self.step_time.draft_s(*_draft_call(batch.rows, lengths))
        chosen = self._choose(batch, step, survival, step.draft_s)
        for i, row in enumerate(batch.rows):
            if row.has_fixed_draft:
                chosen[i] = lengths[i]
            elif step.is_exploring:
                chosen[i] = max(chosen[i], min(lengths[i], 1))
            is_owed = step.deficit is not None and step.deficit[i] > 0.0
            self.reasons[_reason(row, step, is_owed, chosen[i], lengths[i])] += 1
        return chosen

    def _survivals(
        self, batch: Batch, confidences: Sequence[Sequence[float]], lengths: list[int]
    ) -> Floats:
        """Return [num_rows, longest draft], 0 beyond a row's draft."""
        count = np.array(lengths)
        position = np.arange(max(lengths))
        drafted = position < count[:, None]
        history = self.acceptance.history([row.key for row in batch.rows])
        z = logit(np.array([c for row in confidences for c in row]))
        where = np.broadcast_to(position, drafted.shape)[drafted]
        features = judge_features(z, where, np.repeat(history, count))
        accepted = np.zeros(drafted.shape)
        accepted[drafted] = self.acceptance.judge.predict(features)
        survival: Floats = np.cumprod(accepted, axis=1)
        return survival

    def _choose(self, batch: Batch, step: _Step, survival: Floats, draft_s: float) -> list[int]:
        """Take the best number of tokens in order of survival; ties keep the order of positions."""
        flat = survival.ravel()
        positions = np.tile(np.arange(survival.shape[1]), len(survival))
        order = np.lexsort((positions, -flat))[: np.count_nonzero(flat)]
        base_yield = float(sum(row.samples for row in batch.rows))
        if any(row.tpot_s is not None for row in batch.rows):
            order, num_tokens = self._keep_promises(batch, step, survival, order, base_yield)
        else:
            gains = flat[order].tolist()
            num_tokens = best_total(gains, base_yield, step.verify_s.tolist(), draft_s).num_tokens
        rows = order[:num_tokens] // survival.shape[1]
        lengths: list[int] = np.bincount(rows, minlength=len(survival)).tolist()
        return lengths

    def _keep_promises(
        self,
        batch: Batch,
        step: _Step,
        survival: Floats,
        order: NDArray[np.int64],
        base_yield: float,
    ) -> tuple[NDArray[np.int64], int]:
        """Order owed tokens first; of the totals that owe least, take the best token rate."""
        step_s = step.draft_s + step.verify_s[: len(order) + 1]
        step.deficit = deficits(batch.rows, float(step_s[0]))
        order = owed_first(survival, order, step.deficit)
        gains = survival.ravel()[order]
        rates = (base_yield + np.concatenate(([0.0], np.cumsum(gains)))) / step_s
        allowed = least_debt(batch.rows, survival, order, step_s)
        return order, int(np.where(allowed, rates, -1.0).argmax())

    # -- observe -------------------------------------------------------------------------------

    def observe(self, record: StepRecord) -> None:
        """Learn step time and acceptance."""
        self.acceptance.observe(
            [
                Outcome(row.key, draft.confidences[: len(choice)], verified.num_accepted_tokens)
                for row, draft, choice, verified in zip(
                    record.batch.rows, record.drafts, record.chosen, record.outputs, strict=True
                )
                if choice
            ]
        )
        self._observe_time(record)

    def _observe_time(self, record: StepRecord) -> None:
        step = self._step
        if step is None or step.num_tokens != record.batch.num_base_tokens:
            return  # a step without a plan: nobody could draft
        num_chosen = sum(map(len, record.chosen))
        self.step_time.observe_verify(
            step.num_tokens + num_chosen, float(step.verify_s[num_chosen]), record.verify_time_s
        )
        if step.draft_s and any(draft.token_ids for draft in record.drafts):
            num_rows = sum(bool(draft.token_ids) for draft in record.drafts)
            self.step_time.observe_draft(num_rows, step.draft_s, record.draft_time_s)
        self._step = None

    def release(self, keys: Sequence[int]) -> None:
        """Forget finished requests."""
        self.acceptance.forget(keys)


def _draft_call(rows: Sequence[Row], lengths: Sequence[int]) -> tuple[list[int], int, int]:
    """Describe a draft call: rows of each forward, catch-up tokens, context."""
    forwards = [sum(n > j for n in lengths) for j in range(max(lengths, default=0))]
    drafting = [row for row, n in zip(rows, lengths, strict=True) if n]
    catch_up = sum(len(row.catch_up_token_ids) for row in drafting)
    return forwards, catch_up, sum(row.num_draft_computed_tokens for row in drafting)


def _reason(row: Row, step: _Step, is_owed: bool, num_chosen: int, num_drafted: int) -> str:
    """Name what decided a row's length."""
    if row.has_fixed_draft:
        return "fixed"
    if is_owed and num_chosen:
        return "owed"
    if step.is_exploring:
        return "explore"
    if num_chosen == 0:
        return "off"
    return "cap" if num_chosen == num_drafted == row.max_draft_tokens else "yield"
