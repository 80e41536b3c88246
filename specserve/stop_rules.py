"""When a row stops drafting. Made by a policy, evaluated beside the draft engine, token by token.

A rule is plain numbers, so it travels to another process as one array. It sees confidences, never
token ids.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray

from specserve.optimum import Best, best_total
from specserve.predictor import acceptance

INF = float("inf")
Floats = NDArray[np.float64]
Rows = NDArray[np.int64]
Mask = NDArray[np.bool_]


class Stopper(Protocol):
    """One step's evaluation of a rule."""

    def begins(self) -> Mask:
        """Say which rows draft their first token: [num_rows]."""

    def goes_on(self, rows: Rows, confidences: Floats) -> Mask:
        """Take the newest token's confidence of the rows still drafting; say which draft another.

        Args:
            rows: [n], indices of the rows.
            confidences: [n].
        """


class StopRule(Protocol):
    """A rule for the rows of one batch."""

    kind: ClassVar[int]

    def start(self) -> Stopper:
        """Begin a step."""

    def part_of(self, indices: Sequence[int]) -> "StopRule":
        """Return the rule for some of the rows."""

    def encode(self) -> list[Floats]:
        """Return the rule's numbers as a few arrays."""


@dataclass(frozen=True, slots=True)
class SurvivalRule:
    """Stop below a calibrated survival.

    After each token the row's survival is multiplied by sigmoid(bias + slope * logit(c)).

    Attributes:
        bias_slope: [2].
        min_survival: [num_rows], 0 never stops.
    """

    kind: ClassVar[int] = 1
    bias_slope: Floats
    min_survival: Floats

    def start(self) -> "_SurvivalStopper":
        """Begin a step."""
        return _SurvivalStopper(self)

    def part_of(self, indices: Sequence[int]) -> "SurvivalRule":
        """Return the rule for some of the rows."""
        return SurvivalRule(self.bias_slope, self.min_survival[list(indices)])

    def encode(self) -> list[Floats]:
        """Return the rule's numbers."""
        return [self.bias_slope, self.min_survival]


class _SurvivalStopper:
    def __init__(self, rule: SurvivalRule) -> None:
        self._rule = rule
        self._survival = np.ones(len(rule.min_survival))

    def begins(self) -> Mask:
        return np.ones(len(self._survival), dtype=bool)

    def goes_on(self, rows: Rows, confidences: Floats) -> Mask:
        bias, slope = self._rule.bias_slope
        self._survival[rows] *= acceptance.sigmoid(bias + slope * acceptance.logit(confidences))
        on: Mask = self._survival[rows] >= self._rule.min_survival[rows]
        return on


@dataclass(frozen=True, slots=True)
class ValueRule:
    """Draft on while it raises the best predicted token rate of the step.

    After each forward the step's optimum is taken over the tokens drafted so far, and again with
    one and with two more tokens for each row still drafting, as the scout expects them. A row goes
    on while its next token is worth its verification; the batch, while a forward is worth its time.

    Attributes:
        judge: [JUDGE_COEFFICIENTS * num_rows] and scout: [SCOUT_COEFFICIENTS * num_rows], the rows'
            curves of the acceptance models.
        weight: [num_rows], worth of a token; infinite for a fixed length that ignores the rule.
        verify_s: [m + 1], seconds to verify with 0, ..., m draft tokens.
        forward_s: [rows that may draft + 1], seconds of a forward by the rows in it.
        gains: [n], worth of the draft tokens that are there without a forward, largest first.
        base: [3]: worth of the step's tokens without drafts; seconds of a call before its first
            forward; 1 to draft a first token whatever it promises.
    """

    kind: ClassVar[int] = 2
    judge: Floats
    scout: Floats
    weight: Floats
    verify_s: Floats
    forward_s: Floats
    gains: Floats
    base: Floats

    def start(self) -> "ValueStopper":
        """Begin a step."""
        return ValueStopper(self)

    def part_of(self, indices: Sequence[int]) -> "ValueRule":
        """Return the rule for some of the rows."""
        rows, num_rows = list(indices), len(self.weight)
        return ValueRule(
            self.judge.reshape(-1, num_rows)[:, rows].ravel(),
            self.scout.reshape(-1, num_rows)[:, rows].ravel(),
            self.weight[rows], self.verify_s, self.forward_s[: len(rows) + 1], self.gains,
            self.base,
        )  # fmt: skip

    def encode(self) -> list[Floats]:
        """Return the rule's numbers."""
        return [
            self.judge, self.scout, self.weight, self.verify_s, self.forward_s, self.gains,
            self.base,
        ]  # fmt: skip


class ValueStopper:
    """One step's evaluation of a `ValueRule`.

    NOTE: plain Python, row by row. Beside an engine that has just emptied the caches an array
    operation costs microseconds, and a few rows do not make up for some forty of them.
    """

    ROW_SHARE = 0.5  # a row leaves when its next token is worth less than this share of its cost
    WINDOW = 4  # tokens over which the cost of one more is averaged: T is a staircase

    def __init__(self, rule: ValueRule) -> None:
        num_rows = len(rule.weight)
        self._judge: list[list[float]] = rule.judge.reshape(-1, num_rows).T.tolist()
        self._scout: list[list[float]] = rule.scout.reshape(-1, num_rows).T.tolist()
        self._base_yield, self._spent_s, self._is_forced = rule.base.tolist()
        self._fixed: Mask = rule.weight == INF
        self._worth: list[float] = [1.0 if w == INF else w for w in rule.weight.tolist()]
        self._verify_s: list[float] = rule.verify_s.tolist()
        self._forward_s: list[float] = rule.forward_s.tolist()
        self._z = [0.0] * num_rows
        self._gains: list[float] = rule.gains.tolist()  # of the tokens so far, largest first
        self._position = 0

    def begins(self) -> Mask:
        """Say which rows draft their first token. See `Stopper`."""
        if self._is_forced:
            return np.ones(len(self._worth), dtype=bool)
        return self.begins_with(1.0)

    def begins_with(self, margin: float) -> Mask:
        """Ask for `margin` times the rate of not drafting; the policy's gate."""
        return self._fixed | self._worth_another(range(len(self._worth)), margin)

    def goes_on(self, rows: Rows, confidences: Floats) -> Mask:
        """Take the newest confidences; say which rows draft another token. See `Stopper`."""
        indices: list[int] = rows.tolist()
        for i, confidence in zip(indices, confidences.tolist(), strict=True):
            z = self._z[i] = acceptance.logit_of(confidence)
            self._worth[i] *= acceptance.judged_one(self._judge[i], z, self._position)
        self._gains = self._with([self._worth[i] for i in indices])
        self._spent_s += self._forward_s[len(indices)]
        self._position += 1
        on: Mask = self._fixed[rows] | self._worth_another(indices)
        return on

    def _worth_another(self, rows: Sequence[int], margin: float = 1.0) -> Mask:
        """Compare the best rate now with the best after one and after two more forwards."""
        spent = self._spent_s
        best = best_total(self._gains, self._base_yield, self._verify_s, spent)
        bar = self._bar(best)
        on, one, two = np.zeros(len(rows), dtype=bool), [], []
        for index, i in enumerate(rows):
            ahead = acceptance.scouted_one(self._scout[i], self._z[i], self._position)
            gain = self._worth[i] * ahead
            if gain >= bar:
                on[index] = True
                one.append(gain)
                two.append(gain * ahead)
        forward = self._forward_s[len(one)]
        for gains, spent_s in ((one, spent + forward), (one + two, spent + 2.0 * forward)):
            rate = best_total(self._with(gains), self._base_yield, self._verify_s, spent_s).rate
            if rate > margin * best.rate:
                return on
        return np.zeros(len(rows), dtype=bool)

    def _bar(self, best: Best) -> float:
        """Return what a row's next token must be worth."""
        end = min(best.num_tokens + self.WINDOW, len(self._verify_s) - 1)
        start = max(0, end - self.WINDOW)
        token_s = (self._verify_s[end] - self._verify_s[start]) / max(1, end - start)
        bar = self.ROW_SHARE * best.rate * token_s
        if best.num_tokens:  # on a plateau a surer token replaces the least sure one at no cost
            bar = min(bar, self._gains[best.num_tokens - 1])
        return bar

    def _with(self, more: list[float]) -> list[float]:
        """Return the gains with some more, as many as can be verified."""
        return sorted(self._gains + more, reverse=True)[: len(self._verify_s) - 1]


RULES: dict[int, type[SurvivalRule] | type[ValueRule]] = {
    rule.kind: rule for rule in (SurvivalRule, ValueRule)
}
BASELINE_RULES = "specserve.policies.baseline_rules"  # more of them, imported when one arrives


def encode_rule(rule: StopRule) -> NDArray[np.float32]:
    """Pack a rule: kind, number of arrays, their lengths, their values."""
    arrays = rule.encode()
    header = [rule.kind, len(arrays), *(len(array) for array in arrays)]
    packed: NDArray[np.float32] = np.concatenate([np.array(header), *arrays]).astype(np.float32)
    return packed


def decode_rule(packed: NDArray[np.float32]) -> StopRule:
    """Unpack what `encode_rule` packed."""
    kind, count = int(packed[0]), int(packed[1])
    lengths = packed[2 : 2 + count].astype(int)
    ends = 2 + count + np.cumsum(lengths)
    values = packed.astype(np.float64)
    arrays = [values[end - length : end] for length, end in zip(lengths, ends, strict=True)]
    rules = RULES if kind in RULES else import_module(BASELINE_RULES).RULES
    rule: StopRule = rules[kind](*arrays)
    return rule
