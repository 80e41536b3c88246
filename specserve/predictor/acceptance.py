"""How likely a draft token is accepted: calibrated on outcomes, per request, never raw confidence.

Two online logistic models. The *judge* sees a drafted token's confidence; the *scout* predicts a
token that has not been drafted yet. Both see how the request has fared so far.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Positions = int | NDArray[np.int64] | Floats
EPS = 1e-4


def logit(confidence: Floats) -> Floats:
    """Return log(c / (1 - c)) with c kept away from 0 and 1."""
    c = np.clip(confidence, EPS, 1.0 - EPS)
    value: Floats = np.log(c / (1.0 - c))
    return value


def sigmoid(x: Floats) -> Floats:
    """Return 1 / (1 + exp(-x)), safe for any x."""
    value: Floats = 1.0 / (1.0 + np.exp(-np.clip(x, -30.0, 30.0)))
    return value


def judge_features(z: Floats, position: Positions, history: Floats) -> Floats:
    """Lay out what the judge sees of a drafted token.

    Args:
        z: [n], logit of its confidence.
        position: [n] or one for all, in the draft, from 0.
        history: [n], the request's acceptance above or below that of all requests.

    Returns:
        [n, NUM_JUDGE].
    """
    x = np.empty((len(z), NUM_JUDGE))
    x[:, 0] = 1.0
    x[:, 1] = z
    x[:, 2] = np.maximum(z, 0.0)
    x[:, 3] = 0.1 * z * z
    x[:, 4] = 0.25 * np.asarray(position)
    x[:, 5] = history
    x[:, 6] = history * z
    return x


def scout_features(z: Floats, position: Positions, history: Floats) -> Floats:
    """Lay out what the scout sees of the token after one of logit `z`.

    Args:
        z: [n], 0 at position 0, where none comes before.
        position: [n] or one for all.
        history: [n], as for the judge.

    Returns:
        [n, NUM_SCOUT].
    """
    x = np.empty((len(z), NUM_SCOUT))
    x[:, 0] = 1.0
    x[:, 1] = np.asarray(position) == 0
    x[:, 2] = 0.25 * z
    x[:, 3] = 0.1 * z * z
    x[:, 4] = history
    return x


JUDGE_PRIOR = (1.2, 0.8, 0.0, 0.0, 0.0, 2.0, 0.0)
SCOUT_PRIOR = (0.8, 0.0, 0.3, 0.0, 3.0)
NUM_JUDGE = len(JUDGE_PRIOR)
NUM_SCOUT = len(SCOUT_PRIOR)


class OnlineLogistic:
    """Logistic regression that learns from batches of outcomes and slowly forgets.

    Each batch is one Newton step on the exponentially weighted likelihood, with the running
    Hessian as curvature (Bishop 2006, section 4.3.3).
    """

    MEMORY = 300.0  # outcomes
    MIN_CURVATURE = 0.05
    MAX_STEP = 1.0  # logits by which one batch may move a prediction: a surprise is no proof

    def __init__(self, prior: Sequence[float]) -> None:
        self.weights = np.array(prior, dtype=np.float64)
        self._hessian = np.eye(len(prior))
        self._floor = 0.1 * np.eye(len(prior))  # keeps directions alive that nothing informs

    def predict(self, x: Floats) -> Floats:
        """Return probabilities [n] for features [n, d]."""
        return sigmoid(x @ self.weights)

    def observe(self, x: Floats, outcomes: Floats) -> Floats:
        """Learn outcomes [n] of features [n, d]; return what was predicted for them."""
        predicted = self.predict(x)
        curvature = np.maximum(predicted * (1.0 - predicted), self.MIN_CURVATURE)
        self._hessian *= np.exp(-len(x) / self.MEMORY)
        self._hessian += x.T @ (x * curvature[:, None])
        gradient = x.T @ (outcomes - predicted)
        step = np.linalg.solve(self._hessian + self._floor, gradient)
        longest = float(np.abs(x @ step).max(initial=0.0))
        self.weights = self.weights + step * min(1.0, self.MAX_STEP / max(longest, 1e-9))
        return predicted


class Outcome(NamedTuple):
    """What verification said of one row's draft.

    Attributes:
        confidences: of the *verified* draft tokens, at least one.
        num_accepted: of these; the one after them, if any, was rejected.
    """

    key: int
    confidences: Sequence[float]
    num_accepted: int


class AcceptanceModel:
    """Judge, scout, and how each request has fared."""

    REQUEST_MEMORY = 0.93
    PRIOR_TOKENS = 4.0  # a new request counts as this many tokens of the common mean
    COMMON_MEMORY = 500.0
    NUM_BINS = 10
    BATCH = 8

    def __init__(self) -> None:
        self.judge = OnlineLogistic(JUDGE_PRIOR)
        self.scout = OnlineLogistic(SCOUT_PRIOR)
        self.mean = 0.65
        self._requests: dict[int, tuple[float, float]] = {}  # accepted, seen; forgotten slowly
        self._pending: list[tuple[float, float, int, float, float]] = []
        self._bins = np.zeros((self.NUM_BINS, 3))  # predictions, outcomes, count

    def history(self, keys: Sequence[int]) -> Floats:
        """Return each request's acceptance less the common mean; 0 for a new one."""
        found = [self._requests.get(key) for key in keys]
        return np.array([pair[0] / pair[1] - self.mean if pair else 0.0 for pair in found])

    def observe(self, outcomes: Sequence[Outcome]) -> None:
        """Learn what a step's verification said; the weights move every `BATCH` outcomes."""
        for outcome in outcomes:
            self._take(outcome)
        if len(self._pending) >= self.BATCH:
            pending, self._pending = np.array(self._pending), []
            self._learn(*pending.T)

    def _take(self, outcome: Outcome) -> None:
        """Keep one row's tokens for learning, as the models saw them, and update its history."""
        key, confidences, num_accepted = outcome
        prior = (self.PRIOR_TOKENS * self.mean, self.PRIOR_TOKENS)
        accepted, seen = self._requests.get(key, prior)
        history, before = accepted / seen - self.mean, 0.0
        num_seen = min(len(confidences), num_accepted + 1)
        for position, confidence in enumerate(confidences[:num_seen]):
            c = min(max(confidence, EPS), 1.0 - EPS)
            z = math.log(c / (1.0 - c))
            self._pending.append((z, before, position, history, float(position < num_accepted)))
            before = z
        kept = self.REQUEST_MEMORY**num_seen
        self._requests[key] = (accepted * kept + num_accepted, seen * kept + num_seen)

    def _learn(
        self, z: Floats, before: Floats, position: Floats, history: Floats, accepted: Floats
    ) -> None:
        predicted = self.judge.observe(judge_features(z, position, history), accepted)
        self.scout.observe(scout_features(before, position, history), accepted)
        self._count(predicted, accepted)
        rate = 1.0 - math.exp(-len(z) / self.COMMON_MEMORY)
        self.mean += rate * (float(accepted.mean()) - self.mean)

    def forget(self, keys: Sequence[int]) -> None:
        """Drop finished requests."""
        for key in keys:
            self._requests.pop(key, None)

    def calibration_error(self) -> float:
        """Return the expected calibration error of the judge (Naeini et al. 2015), ten bins."""
        used = self._bins[self._bins[:, 2] > 0]
        total = used[:, 2].sum()
        return float(np.abs(used[:, 0] - used[:, 1]).sum() / total) if total else 0.0

    def _count(self, predicted: Floats, accepted: Floats) -> None:
        bins = np.minimum((predicted * self.NUM_BINS).astype(int), self.NUM_BINS - 1)
        self._bins *= 0.9999 ** len(bins)
        for column, values in enumerate((predicted, accepted, np.ones(len(bins)))):
            self._bins[:, column] += np.bincount(bins, values, minlength=self.NUM_BINS)
