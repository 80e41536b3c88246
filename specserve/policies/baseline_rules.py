"""Stop rules of the baseline policies, evaluated beside the draft engine like any other.

`ThresholdRule` asks the newest token. `GoodputRule` (as AdaSpec's code has it) and `BestLengthRule`
(repaired) choose one draft length for the whole batch from the predicted token rate. No rule stops
a row whose draft length is fixed.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from specserve.stop_rules import Floats, Mask, Rows, Stopper

DEFAULT_PRIOR = 0.6  # AdaSpec's `default_confidence`, before anything was recorded

L = TypeVar("L", bound="LengthRule")


# -- threshold ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ThresholdRule:
    """Draft on while the newest confidence reaches a threshold.

    Attributes:
        threshold: [num_rows], -inf never stops.
        of_mean: [1], 1 asks the mean over the rows still drafting, and stops them all at once.
    """

    kind: ClassVar[int] = 10
    threshold: Floats
    of_mean: Floats

    def start(self) -> "_ThresholdStopper":
        """Begin a step."""
        return _ThresholdStopper(self)

    def part_of(self, indices: Sequence[int]) -> "ThresholdRule":
        """Return the rule for some of the rows."""
        return ThresholdRule(self.threshold[list(indices)], self.of_mean)

    def encode(self) -> list[Floats]:
        """Return the rule's numbers."""
        return [self.threshold, self.of_mean]


class _ThresholdStopper:
    def __init__(self, rule: ThresholdRule) -> None:
        self._rule = rule

    def begins(self) -> Mask:
        return np.ones(len(self._rule.threshold), dtype=bool)

    def goes_on(self, rows: Rows, confidences: Floats) -> Mask:
        threshold = self._rule.threshold[rows]
        asked = np.isfinite(threshold)
        if self._rule.of_mean[0] and asked.any():
            confidences = np.full(len(rows), confidences[asked].mean())
        on: Mask = confidences >= threshold
        return on


# -- one length for the batch ------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class LengthRule:
    """The numbers that a common draft length is chosen by.

    Attributes:
        caps: [num_rows], the longest draft of each row; 0 for a fixed length.
        verify_s: [sum of caps + 1], seconds to verify with 0, 1, ... draft tokens.
        forward_s: [rows with a cap + 1], seconds of a draft forward by the rows in it.
        prior: [2], sum and number of the confidences recorded so far.
        base: [4]: tokens of the step without drafts; seconds of a draft call before its first
            forward; the SLO in seconds, inf for none; expected tokens of the row that decodes
            without a draft, inf if there is none.
    """

    kind: ClassVar[int] = 0
    caps: Floats
    verify_s: Floats
    forward_s: Floats
    prior: Floats
    base: Floats

    def start(self) -> Stopper:
        """Begin a step."""
        raise NotImplementedError

    def part_of(self: L, indices: Sequence[int]) -> L:
        """Return the rule for some of the rows."""
        return replace(self, caps=self.caps[list(indices)])

    def encode(self) -> list[Floats]:
        """Return the rule's numbers."""
        return [self.caps, self.verify_s, self.forward_s, self.prior, self.base]


@dataclass(frozen=True, slots=True)
class GoodputRule(LengthRule):
    """Climb the rate one token at a time, and stop at the first drop: AdaSpec's adaptive drafter.

    The SLO, if any, bounds the time of the whole step.
    """

    kind: ClassVar[int] = 11

    def start(self) -> "GoodputStopper":
        """Begin a step."""
        return GoodputStopper(self)


@dataclass(frozen=True, slots=True)
class BestLengthRule(LengthRule):
    """Draft on while some longer draft promises a better step than the best that is at hand.

    The SLO, if any, bounds each row's step time over expected tokens.
    """

    kind: ClassVar[int] = 12

    def start(self) -> "BestLengthStopper":
        """Begin a step."""
        return BestLengthStopper(self)


RULES: dict[int, type[ThresholdRule] | type[LengthRule]] = {
    rule.kind: rule for rule in (ThresholdRule, GoodputRule, BestLengthRule)
}


# -- the stoppers of one length ----------------------------------------------------------------


class _BatchStopper:
    """Stops all rows at once, at the word of a subclass.

    Attributes:
        position: draft forwards so far.
        num_tokens: draft tokens of all rows.
        token_yield: expected tokens of the step.
        spent_s: seconds of drafting.
        survival: [num_rows], running product of the confidences.
    """

    def __init__(self, rule: LengthRule) -> None:
        self.rule = rule
        self.base_yield, self.call_s, self.slo_s, self._plain_yield = rule.base.tolist()
        self.total, self.count = rule.prior.tolist()
        self.position = self.num_tokens = 0
        self.token_yield = self.base_yield
        self.spent_s = 0.0
        self.survival = np.ones(len(rule.caps))

    @property
    def prior(self) -> float:
        """What a confidence is expected to be before the token is drafted."""
        return self.total / self.count if self.count else DEFAULT_PRIOR

    @property
    def first_s(self) -> float:
        """What the next forward costs beyond its rows."""
        return 0.0 if self.position else self.call_s

    def begins(self) -> Mask:
        """Let all rows begin: the policy's gate has decided. See `Stopper`."""
        return np.ones(len(self.rule.caps), dtype=bool)

    def goes_on(self, rows: Rows, confidences: Floats) -> Mask:
        """Take the newest confidences; say which rows draft another token. See `Stopper`."""
        is_fixed: Mask = self.rule.caps[rows] == 0
        if is_fixed.all():
            return is_fixed
        asked, confidences = rows[~is_fixed], confidences[~is_fixed]
        self.add(asked, confidences)
        return is_fixed | self._another(asked, confidences)

    def add(self, rows: Rows, confidences: Floats) -> None:
        """Take one more token of these rows."""
        self.spent_s += self.first_s + float(self.rule.forward_s[len(rows)])
        self.survival[rows] *= confidences
        self.token_yield += float(self.survival[rows].sum())
        self.num_tokens += len(rows)
        self.position += 1

    def _another(self, rows: Rows, confidences: Floats) -> bool:
        raise NotImplementedError


class GoodputStopper(_BatchStopper):
    """One step of a `GoodputRule`.

    Attributes:
        goodput: predicted rate of the draft so far.
        priced_draft_s: drafting time of the last prediction. After a stop by prediction it holds a
            forward that never ran, and the elimination is priced with it (D4).
    """

    def __init__(self, rule: LengthRule) -> None:
        super().__init__(rule)
        self.goodput = self._rate(0, self.base_yield, 0.0)

    def opens(self) -> bool:
        """Say whether one token per row promises more than none: the gate of the step."""
        return self._rate_ahead(np.flatnonzero(self.rule.caps)) > self.goodput

    def _another(self, rows: Rows, confidences: Floats) -> bool:
        before = self.goodput
        self.goodput = self._rate(self.num_tokens, self.token_yield, self.spent_s)
        if self.goodput < before:
            return False  # and the token that made it worse stays in the draft (D6)
        self.total += float(confidences.sum())
        self.count += len(confidences)
        return self._rate_ahead(rows) >= self.goodput

    def _rate_ahead(self, rows: Rows) -> float:
        """Predict one more token for the rows that may have it; -inf if none may."""
        rows = rows[self.rule.caps[rows] > self.position]
        if not len(rows):
            return -np.inf
        return self._rate(
            self.num_tokens + len(rows),
            self.token_yield + float(self.survival[rows].sum()) * self.prior,
            self.spent_s + self.first_s + float(self.rule.forward_s[len(rows)]),
        )

    def _rate(self, num_tokens: int, token_yield: float, draft_s: float) -> float:
        """Predict a token rate; -1 with a draft that breaks the SLO."""
        self.priced_draft_s = draft_s
        seconds = draft_s + float(self.rule.verify_s[num_tokens])
        return -1.0 if num_tokens and seconds > self.slo_s else token_yield / seconds


class Lengths(NamedTuple):
    """Steps with draft lengths one after the other: an entry for each.

    Attributes:
        num_tokens: draft tokens of all rows.
        token_yield: expected tokens of the step.
        least_yield: expected tokens of the row that gets fewest.
        draft_s: seconds of drafting.
    """

    num_tokens: NDArray[np.int64]
    token_yield: Floats
    least_yield: Floats
    draft_s: Floats


class Worth(NamedTuple):
    """How good a step is, in order: every row keeps the SLO; the rate, or less the worst row."""

    keeps_slo: bool
    rate: float


class BestLengthStopper(_BatchStopper):
    """One step of a `BestLengthRule`."""

    def __init__(self, rule: LengthRule) -> None:
        super().__init__(rule)
        self._row_yield = np.ones(len(rule.caps))
        self._history = [(0, self.base_yield, float(self.least(self._row_yield)))]

    def opens(self) -> bool:
        """Say whether some draft promises more than none: the gate of the step."""
        return self._is_better_ahead(np.flatnonzero(self.rule.caps))

    def _another(self, rows: Rows, confidences: Floats) -> bool:
        self._row_yield[rows] += self.survival[rows]
        least = float(self.least(self._row_yield))
        self._history.append((self.num_tokens, self.token_yield, least))
        return self._is_better_ahead(rows)

    def _is_better_ahead(self, rows: Rows) -> bool:
        ahead = self.ahead(rows, int(self.rule.caps.max(initial=0.0)) - self.position)
        return len(ahead.num_tokens) > 0 and max(self.worths(ahead)) > max(
            self.worths(self.drafted())
        )

    def drafted(self) -> Lengths:
        """Return the draft cut to 0, 1, ... tokens a row, at the price of all of it."""
        tokens, yields, least = zip(*self._history, strict=True)
        spent = np.full(len(tokens), self.spent_s)
        return Lengths(np.array(tokens), np.array(yields), np.array(least), spent)

    def ahead(self, rows: Rows, num_more: int) -> Lengths:
        """Return the draft with 1, 2, ... more tokens of these rows, each as likely as the prior.

        Lengths that none of the rows can reach are left out.
        """
        steps = np.arange(num_more)[:, None]
        goes_on = np.zeros(len(self.survival), dtype=bool)
        goes_on[rows] = True
        drafts = goes_on & (self.rule.caps > self.position + steps)
        drafts = drafts[drafts.any(axis=1)]
        gains = self.survival * self.prior ** (steps[: len(drafts)] + 1.0) * drafts
        counts = drafts.sum(axis=1)
        return Lengths(
            self.num_tokens + np.cumsum(counts),
            self.token_yield + np.cumsum(gains.sum(axis=1)),
            self.least(self._row_yield + np.cumsum(gains, axis=0)),
            self.spent_s + self.first_s + np.cumsum(self.rule.forward_s[counts]),
        )

    def least(self, row_yields: Floats) -> Floats:
        """Return the least of the rows that the SLO is asked of: [..., num_rows] to [...]."""
        rows = self.rule.caps > 0
        least: Floats = row_yields[..., rows].min(axis=-1, initial=self._plain_yield)
        return least

    def worths(self, lengths: Lengths) -> list[Worth]:
        """Judge each length: T / E_i <= slo in every row; if in none, the worst row counts."""
        seconds = lengths.draft_s + self.rule.verify_s[lengths.num_tokens]
        worst = seconds / lengths.least_yield
        keeps = worst <= self.slo_s
        value = np.where(keeps, lengths.token_yield / seconds, -worst)
        return [Worth(k, v) for k, v in zip(keeps.tolist(), value.tolist(), strict=True)]
