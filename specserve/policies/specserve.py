"""The controller: expected tokens per second, those worth more that a request is owed."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from specserve.batch import Batch, Decision, Draft, DraftPlan, Row, StepRecord
from specserve.config import PolicyConfig
from specserve.optimum import choose
from specserve.policies import needed
from specserve.policies.owed import deficits, worths
from specserve.policies.source_choice import Proposals, scouted_survivals
from specserve.predictor.prompts import Prompts
from specserve.predictor.sources import Acceptances
from specserve.predictor.step_time import StepTimeModel
from specserve.stop_rules import ValueRule

NEEDS_PROFILE = True
Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


def make(config: PolicyConfig, step_time: StepTimeModel | None = None) -> "SpecServePolicy":
    """Make the controller on a predictor."""
    return SpecServePolicy(config, needed(step_time, "specserve"))


@dataclass(slots=True)
class _Step:
    """What one step's plan and selection share.

    Attributes:
        verify_s: [m + 1], predicted seconds to verify with 0, ..., m draft tokens.
        priced_s: [m + 1], of these, without what the step's prompt tokens take whoever drafts.
        context: cached tokens of all rows.
        deficit: [num_rows], tokens missing at the end of a plain step.
        weight: [num_rows], what a token is worth: more to rows that would end the step late.
        base_yield: worth of the tokens that come without drafts.
        judge, scout: the rows' curves of the draft model's acceptance.
        lookups: what prompt lookup has for each row, proposed or not.
        draft_s: predicted seconds of the draft call, once its lengths are known.
        is_exploring: every row drafts, to learn.
        must_verify: and has its first token verified.
    """

    num_tokens: int
    verify_s: Floats
    priced_s: Floats
    context: int
    deficit: Floats
    weight: Floats
    base_yield: float
    judge: Floats
    scout: Floats
    lookups: list[Draft | None] = field(default_factory=list)
    draft_s: float = 0.0
    is_exploring: bool = False
    must_verify: bool = False


class SpecServePolicy:
    """Draft and verify what raises the predicted token rate; owed tokens count for more.

    * Survival: the judge's acceptance, multiplied along the row; calibrated online, by source.
    * Source: prompt lookup, which is free, where it promises more than the draft model.
    * Drafting: a `ValueRule`, evaluated beside the draft engine after every forward.
    * Verification: the exact optimum over all totals, on the true staircase.
    * Prompts: the time of a step's prompt tokens is spent whoever drafts, so no rate counts it.
      Counted, it made every step with a prompt look so slow that any draft seemed to pay.
    * Off: when no draft is expected to pay, which has to be clear in either direction before the
      mode changes. A share of the steps drafts all the same: what the target says next judges a
      greedy row's first token unverified. A few verify besides, for their time, and sampled rows'
      always: whether a sampled token is accepted shows nowhere else.

    The reasons it gives: owed, yield, cap, off, explore, fixed, prompt; see `_reason`.

    Attributes:
        decision: of the last step.
    """

    EXPLORE_EVERY = 48  # steps while off, and sooner at first
    VERIFY_EVERY = 8  # explorations: once in so many, more tokens are verified than pay
    ON_MARGIN = 1.02  # promised over plain rate that turns speculation on
    OFF_MARGIN = 1.0

    def __init__(self, config: PolicyConfig, step_time: StepTimeModel) -> None:
        self.config = config
        self.step_time = step_time
        self.acceptances = Acceptances()
        self.decision = Decision()
        self._is_on = True
        self._num_steps_off = self.EXPLORE_EVERY - 1  # begin by looking
        self._step: _Step | None = None

    # -- plan ----------------------------------------------------------------------------------

    def plan(self, rows: Sequence[Row]) -> DraftPlan:
        """Say who proposes for each row, how much at most, and what stops the draft model."""
        longest = self.config.max_draft_tokens
        caps = np.array([min(row.max_draft_tokens, longest) for row in rows])
        found = np.array([len(row.lookup.token_ids) if row.lookup else 0 for row in rows])
        step = self._step = self._look(rows, int(np.maximum(caps, found).sum()))
        uses_lookup, gains = self._choose_sources(rows, step, caps)
        model_caps = np.where(uses_lookup, 0, caps)
        rule = self._rule(rows, step, model_caps, gains)
        begins = self._gate(rule, model_caps)
        is_off = not (begins.any() or uses_lookup.any())
        self._num_steps_off = self._num_steps_off + 1 if is_off else 0
        if is_off and _explores(self._num_steps_off, self.EXPLORE_EVERY):
            step.is_exploring = True
            step.must_verify = self._num_steps_off % (self.EXPLORE_EVERY * self.VERIFY_EVERY) == 0
            begins = caps > 0
        allowed = np.where(uses_lookup, found, np.where(begins, caps, 0))
        return DraftPlan(allowed.tolist(), rule, uses_lookup.tolist(), is_sampled=True)

    def _look(self, rows: Sequence[Row], num_draft_tokens: int) -> _Step:
        num_tokens = sum([len(row.token_ids) for row in rows])
        samples = [row.samples for row in rows]
        prompts = Prompts.of(rows)
        context = sum([row.num_computed_tokens for row in rows])
        change = self.step_time.change_curve(num_tokens, num_draft_tokens, prompts)
        curve = self.step_time.verify_curve(num_tokens, num_draft_tokens, context, prompts)
        verify = curve + change
        priced = verify + self.step_time.host_s
        if prompts.num_tokens:
            plain_s = self.step_time.verify_s(max(1, sum(samples)), context)
            priced = priced - max(0.0, float(curve[0]) - plain_s)
        deficit = deficits(rows, float(verify[0]))
        weight = worths(deficit)
        base_yield = float(weight @ samples)
        judge, scout = self.acceptances.curves(rows)
        return _Step(
            num_tokens, verify, priced, context, deficit, weight, base_yield, judge, scout,
            [row.lookup for row in rows],
        )  # fmt: skip

    def _choose_sources(
        self, rows: Sequence[Row], step: _Step, caps: Ints
    ) -> tuple[NDArray[np.bool_], Floats]:
        """Say which rows propose their lookup, and what those tokens are worth, falling."""
        if step.lookups.count(None) == len(rows):
            return np.zeros(len(rows), dtype=bool), np.empty(0)
        has_lookup = np.array([lookup is not None for lookup in step.lookups])
        confidences = [row.lookup.confidences if row.lookup else [] for row in rows]
        survival = self.acceptances.survivals(rows, confidences, step.judge)
        proposals = Proposals(survival, scouted_survivals(step.scout, caps), step.weight)
        forward_s = self._forward_s(int(np.count_nonzero(caps)))
        better = proposals.lookup_is_better(step.base_yield, step.priced_s, forward_s)
        is_bound = np.array([row.draft_source == "ngram" for row in rows])
        fixed = np.array([row.has_fixed_draft for row in rows])
        uses = has_lookup & (is_bound | (better & ~fixed))
        gains = (survival * step.weight[:, None])[uses].ravel()
        return uses, np.sort(gains[gains > 0.0])[::-1]

    def _forward_s(self, num_drafting: int) -> float:
        """Return a row's share of a draft forward of so many."""
        return float(self.step_time.forward_curve(num_drafting)[-1]) / max(1, num_drafting)

    def _rule(self, rows: Sequence[Row], step: _Step, caps: Ints, gains: Floats) -> ValueRule:
        drafting = [row for row, cap in zip(rows, caps.tolist(), strict=True) if cap]
        context = sum([row.num_computed_tokens for row in drafting])
        catch_up = sum([len(row.catch_up_token_ids) for row in drafting])
        forward_s = self.step_time.forward_curve(len(drafting), context)
        first_s = self.step_time.draft_s([len(drafting)] if drafting else [], catch_up, context)
        weight = step.weight
        if any(row.has_fixed_draft for row in rows):
            weight = np.where([row.has_fixed_draft for row in rows], np.inf, weight)
        return ValueRule(
            judge=step.judge.ravel(),
            scout=step.scout.ravel(),
            weight=weight,
            verify_s=step.priced_s,
            forward_s=forward_s,
            gains=gains,
            base=np.array([step.base_yield, first_s - forward_s[-1], 1.0]),
        )

    def _gate(self, rule: ValueRule, caps: Ints) -> NDArray[np.bool_]:
        """Say which rows the draft model begins with, with hysteresis over the whole batch."""
        may = np.flatnonzero(caps)
        begins = np.zeros(len(caps), dtype=bool)
        if len(may):
            part = rule if len(may) == len(caps) else rule.part_of(may.tolist())
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
            reasons = ["off" if row.samples else "prompt" for row in batch.rows]
            self.decision = Decision(reasons, float(step.verify_s[0]) if step else None)
            return lengths
        survival = self.acceptances.survivals(batch.rows, confidences, step.judge)
        step.draft_s = self.step_time.draft_s(*_draft_call(batch.rows, lengths))
        chosen = choose(survival, step.weight, step.base_yield, step.priced_s, step.draft_s)
        for i, row in enumerate(batch.rows):
            if row.has_fixed_draft:
                chosen[i] = lengths[i]
            elif step.must_verify or (step.is_exploring and not row.sampling.is_greedy):
                chosen[i] = max(chosen[i], min(lengths[i], 1))
        reasons = [_reason(row, step, i, chosen[i], lengths[i]) for i, row in enumerate(batch.rows)]
        predicted_s = step.draft_s + float(step.verify_s[sum(chosen)])
        self.decision = Decision(reasons, predicted_s)
        return chosen

    # -- observe -------------------------------------------------------------------------------

    def observe(self, record: StepRecord) -> None:
        """Learn step time and acceptance."""
        step, self._step = self._step, None
        rows = record.batch.rows
        planned = rows[: len(rows) - record.num_joined]
        if step is None or step.num_tokens != sum([len(row.token_ids) for row in planned]):
            return  # a step without a plan: nobody could draft
        lookups = [*step.lookups, *[None] * record.num_joined]
        self.acceptances.observe(record, lookups)
        self._learn_times(record, step)

    def _learn_times(self, record: StepRecord, step: _Step) -> None:
        num_chosen = sum(map(len, record.chosen))
        num_tokens, predicted_s = step.num_tokens + num_chosen, float(step.verify_s[num_chosen])
        if record.num_target_tokens is not None:
            num_tokens = record.num_target_tokens
            predicted_s = self._predict_counted(record, num_tokens)
        if record.num_joined:  # predicted without them
            self.step_time.has_verified(record.batch.num_base_tokens + num_chosen)
        elif num_tokens:
            self.step_time.observe_verify(num_tokens, predicted_s, record.verify_time_s)
        forwards = _draft_call(record.batch.rows, [len(d.token_ids) for d in record.drafts])[0]
        if forwards:
            self.step_time.observe_draft(forwards, step.draft_s, record.draft_time_s)

    def _predict_counted(self, record: StepRecord, num_tokens: int) -> float:
        """Predict a verification of as many tokens as the target says that it has computed."""
        rows = record.batch.rows
        wanted = sum(row.samples for row in rows) + sum(map(len, record.chosen))
        context = sum(row.num_computed_tokens for row in rows)
        prompts = Prompts.of(rows)._replace(num_tokens=max(0, num_tokens - wanted))
        return self.step_time.verify_s(max(1, num_tokens), context, prompts)

    @property
    def calibration_error(self) -> float | None:
        """Return the worst of the sources' expected calibration errors."""
        return max(source.calibration_error() for source in self.acceptances.all)

    def release(self, keys: Sequence[int]) -> None:
        """Forget finished requests."""
        self.acceptances.forget(keys)


def _explores(num_steps_off: int, most: int) -> bool:
    """Look again after 2, 4, 8, ... steps: a text soon moves on. Later every `most` steps."""
    is_power = num_steps_off & (num_steps_off - 1) == 0
    return num_steps_off % most == 0 or (is_power and 1 < num_steps_off < most)


def _drafted(rows: Sequence[Row], lengths: Sequence[int]) -> list[tuple[Row, int]]:
    """Return the rows that the draft model proposed for, and the lengths of its drafts."""
    return [(row, n) for row, n in zip(rows, lengths, strict=True) if n and row.lookup is None]


def _draft_call(rows: Sequence[Row], lengths: Sequence[int]) -> tuple[list[int], int, int]:
    """Describe a draft call: rows of each forward, catch-up tokens, context."""
    drafted = _drafted(rows, lengths)
    forwards = [
        sum(n > j for _, n in drafted) for j in range(max((n for _, n in drafted), default=0))
    ]
    catch_up = sum(len(row.catch_up_token_ids) for row, _ in drafted)
    return forwards, catch_up, sum(row.num_draft_computed_tokens for row, _ in drafted)


def _reason(row: Row, step: _Step, index: int, num_chosen: int, num_drafted: int) -> str:
    """Name what decided a row's length."""
    if not row.samples:
        return "prompt"
    if row.has_fixed_draft:
        return "fixed"
    if num_chosen and step.deficit[index] > 0.0:
        return "owed"
    if step.is_exploring:
        return "explore"
    if num_chosen == 0:
        return "off"
    return "cap" if num_chosen == num_drafted == row.max_draft_tokens else "yield"
