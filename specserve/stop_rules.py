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

from specserve.optimum import best_total
from specserve.predictor import acceptance

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
        judge: [num_rows * NUM_JUDGE] and scout: [num_rows * NUM_SCOUT], each row's weights of the
            acceptance models.
        history: [num_rows], the requests' acceptance against the mean.
        weight: [num_rows], worth of a token; infinite for a fixed length that ignores the rule.
        verify_s: [m + 1], seconds to verify with 0, ..., m draft tokens.
        forward_s: [num_rows + 1], seconds of a draft forward by the rows in it.
        gains: [n], worth of the draft tokens that are there without a forward, largest first.
        base: [3]: worth of the step's tokens without drafts; seconds of a call before its first
            forward; 1 to draft a first token whatever it promises.
    """

    kind: ClassVar[int] = 2
    judge: Floats
    scout: Floats
    history: Floats
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
        rows = list(indices)
        return ValueRule(
            self.judge.reshape(-1, acceptance.NUM_JUDGE)[rows].ravel(),
            self.scout.reshape(-1, acceptance.NUM_SCOUT)[rows].ravel(),
            self.history[rows], self.weight[rows],
            self.verify_s, self.forward_s[: len(rows) + 1], self.gains, self.base,
        )  # fmt: skip

    def encode(self) -> list[Floats]:
        """Return the rule's numbers."""
        return [
            self.judge, self.scout, self.history, self.weight,
            self.verify_s, self.forward_s, self.gains, self.base,
        ]  # fmt: skip


class ValueStopper:
    """One step's evaluation of a `ValueRule`."""

    ROW_SHARE = 0.5  # a row leaves when its next token is worth less than this share of its cost
    WINDOW = 4  # tokens over which the cost of one more is averaged: T is a staircase

    def __init__(self, rule: ValueRule) -> None:
        self._judge = rule.judge.reshape(-1, acceptance.NUM_JUDGE)
        self._scout = rule.scout.reshape(-1, acceptance.NUM_SCOUT)
        self._history = rule.history
        self._base_yield, self._spent_s, self._is_forced = rule.base.tolist()
        self._fixed = np.isinf(rule.weight)
        self._weight = np.where(self._fixed, 1.0, rule.weight)
        self._verify_s: list[float] = rule.verify_s.tolist()
        self._forward_s: list[float] = rule.forward_s.tolist()
        num_rows = len(rule.history)
        self._survival = np.ones(num_rows)
        self._z = np.zeros(num_rows)
        self._gains: list[float] = rule.gains.tolist()  # of the tokens so far, largest first
        self._position = 0

    def begins(self) -> Mask:
        """Say which rows draft their first token. See `Stopper`."""
        if self._is_forced:
            return np.ones(len(self._survival), dtype=bool)
        return self.begins_with(1.0)

    def begins_with(self, margin: float) -> Mask:
        """Ask for `margin` times the rate of not drafting; the policy's gate."""
        return self._worth_another(np.arange(len(self._survival)), margin)

    def goes_on(self, rows: Rows, confidences: Floats) -> Mask:
        """Take the newest confidences; say which rows draft another token. See `Stopper`."""
        z = acceptance.logit(confidences)
        features = acceptance.judge_features(z, self._position, self._history[rows])
        self._survival[rows] *= acceptance.sigmoid((features * self._judge[rows]).sum(axis=1))
        self._z[rows] = z
        self._gains = self._with(self._gains, self._survival[rows] * self._weight[rows])
        self._spent_s += self._forward_s[len(rows)]
        self._position += 1
        return self._worth_another(rows)

    def _worth_another(self, rows: Rows, margin: float = 1.0) -> Mask:
        """Compare the best rate now with the best after one and after two more forwards."""
        spent = self._spent_s
        best = best_total(self._gains, self._base_yield, self._verify_s, spent)
        features = acceptance.scout_features(self._z[rows], self._position, self._history[rows])
        ahead = acceptance.sigmoid((features * self._scout[rows]).sum(axis=1))
        next_gain = self._survival[rows] * self._weight[rows] * ahead
        bar = self.ROW_SHARE * best.rate * self._cost_of_token(best.num_tokens)
        if best.num_tokens:  # on a plateau a surer token replaces the least sure one at no cost
            bar = min(bar, self._gains[best.num_tokens - 1])
        keep: Mask = next_gain >= bar
        fixed: Mask = self._fixed[rows]
        num_kept = int(np.count_nonzero(keep))
        if num_kept == 0:
            return fixed
        forward = self._forward_s[num_kept]
        one = self._with(self._gains, next_gain[keep])
        needed = margin * best.rate
        if best_total(one, self._base_yield, self._verify_s, spent + forward).rate > needed:
            return keep | fixed
        two = self._with(one, next_gain[keep] * ahead[keep])
        if best_total(two, self._base_yield, self._verify_s, spent + 2.0 * forward).rate > needed:
            return keep | fixed
        return fixed

    def _with(self, gains: list[float], more: Floats) -> list[float]:
        merged = sorted([*gains, *more.tolist()], reverse=True)
        return merged[: len(self._verify_s) - 1]

    def _cost_of_token(self, num_tokens: int) -> float:
        end = min(num_tokens + self.WINDOW, len(self._verify_s) - 1)
        start = max(0, end - self.WINDOW)
        return (self._verify_s[end] - self._verify_s[start]) / max(1, end - start)


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
