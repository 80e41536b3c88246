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
    c = np.minimum(np.maximum(confidence, EPS), 1.0 - EPS)
    value: Floats = np.log(c / (1.0 - c))
    return value


def logit_of(confidence: float) -> float:
    """Return `logit` of one confidence."""
    c = min(max(confidence, EPS), 1.0 - EPS)
    return math.log(c / (1.0 - c))


def sigmoid(x: Floats) -> Floats:
    """Return 1 / (1 + exp(-x)), safe for any x."""
    value: Floats = 0.5 + 0.5 * np.tanh(0.5 * x)
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
JUDGE_COEFFICIENTS = 5
SCOUT_COEFFICIENTS = 4
JUDGE_SCALE = np.array([[1.0], [1.0], [1.0], [0.1], [0.25]])  # of the features
SCOUT_SCALE = np.array([[1.0], [1.0], [0.25], [0.1]])


def judge_curves(weights: Floats, history: Floats) -> Floats:
    """Regroup weights @ `judge_features` by what changes from token to token, once for a step.

    Args:
        weights: [n, NUM_JUDGE], or [1, NUM_JUDGE] for all rows.
        history: [n].

    Returns:
        [JUDGE_COEFFICIENTS, n], for `judged`.
    """
    w = weights.T
    curves: Floats = JUDGE_SCALE * w[:JUDGE_COEFFICIENTS] + np.zeros(len(history))
    curves[:2] += w[JUDGE_COEFFICIENTS:] * history
    return curves


def judged(curves: Floats, z: Floats, position: Positions) -> Floats:
    """Return the acceptance of drafted tokens of logit `z`; all in the shape of `z`."""
    bias, slope, bend, square, tilt = curves
    return sigmoid(bias + tilt * position + z * (slope + square * z) + bend * np.maximum(z, 0.0))


def judged_one(curve: Sequence[float], z: float, position: int) -> float:
    """Return `judged` of one token, by its row's column of the curves."""
    bias, slope, bend, square, tilt = curve
    x = bias + tilt * position + z * (slope + square * z) + bend * max(z, 0.0)
    return 0.5 + 0.5 * math.tanh(0.5 * x)


def scout_curves(weights: Floats, history: Floats) -> Floats:
    """Regroup weights @ `scout_features`: [n, NUM_SCOUT] to [SCOUT_COEFFICIENTS, n]."""
    w = weights.T
    curves: Floats = SCOUT_SCALE * w[:SCOUT_COEFFICIENTS] + np.zeros(len(history))
    curves[0] += w[SCOUT_COEFFICIENTS] * history
    return curves


def scouted(curves: Floats, z: Floats, position: int) -> Floats:
    """Return the acceptance of the tokens to come after those of logit `z`."""
    bias, first, slope, square = curves
    return sigmoid(bias + first if position == 0 else bias + z * (slope + square * z))


def scouted_one(curve: Sequence[float], z: float, position: int) -> float:
    """Return `scouted` of one token, by its row's column of the curves."""
    bias, first, slope, square = curve
    x = bias + first if position == 0 else bias + z * (slope + square * z)
    return 0.5 + 0.5 * math.tanh(0.5 * x)


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
        step = np.array(solve((self._hessian + self._floor).tolist(), gradient.tolist()))
        longest = float(np.abs(x @ step).max(initial=0.0))
        self.weights = self.weights + step * min(1.0, self.MAX_STEP / max(longest, 1e-9))
        return predicted


def solve(matrix: list[list[float]], values: list[float]) -> list[float]:
    """Solve a small symmetric positive definite system by Cholesky's decomposition.

    NOTE: plain Python. LAPACK wakes threads for it, which beside an engine costs a millisecond.
    """
    n = len(values)
    lower = [[0.0] * n for _ in range(n)]
    y = [0.0] * n
    for i, row in enumerate(lower):
        for j in range(i + 1):
            other = lower[j]
            rest = matrix[i][j] - sum(row[k] * other[k] for k in range(j))
            row[j] = math.sqrt(rest) if i == j else rest / other[j]
        y[i] = (values[i] - sum(row[k] * y[k] for k in range(i))) / row[i]
    for i in reversed(range(n)):
        y[i] = (y[i] - sum(lower[k][i] * y[k] for k in range(i + 1, n))) / lower[i][i]
    return y


class Outcome(NamedTuple):
    """What became known of one row's draft.

    Attributes:
        confidences: of the draft tokens that can be compared, at least one.
        num_accepted: of these; the one after them, if any, was not what the target said.
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
    MIN_BATCH, MAX_BATCH = 8, 64

    def __init__(self, judge_prior: Sequence[float] = JUDGE_PRIOR) -> None:
        self.judge = OnlineLogistic(judge_prior)
        self.scout = OnlineLogistic(SCOUT_PRIOR)
        self.mean = 0.65
        self._requests: dict[int, tuple[float, float]] = {}  # accepted, seen; forgotten slowly
        self._pending: list[tuple[float, float, int, float, bool]] = []  # as `_learn` takes them
        self._batch = self.MIN_BATCH
        self._bins = np.zeros((self.NUM_BINS, 3))  # predictions, outcomes, count

    def history_of(self, key: int) -> float:
        """Return a request's acceptance less the common mean; 0 for a new one."""
        accepted, seen = self._requests.get(key, (self.mean, 1.0))
        return accepted / seen - self.mean

    def observe(self, outcomes: Sequence[Outcome]) -> None:
        """Learn what a step has shown; the weights move with every batch of tokens.

        Batches grow with what is known already: the first ones teach, later ones keep up.
        """
        for outcome in outcomes:
            self._note(outcome)
            self._remember(outcome)
        if len(self._pending) >= self._batch:
            pending, self._pending = self._pending, []
            self._batch = min(self.MAX_BATCH, self._batch + len(pending) // 16)
            self._learn(*np.array(pending, dtype=np.float64).T)

    def _note(self, outcome: Outcome) -> None:
        """Lay out the tokens up to the first that failed, as the models saw them."""
        history, before = self.history_of(outcome.key), 0.0
        for position, confidence in enumerate(outcome.confidences[: outcome.num_accepted + 1]):
            z = logit_of(confidence)
            self._pending.append((z, before, position, history, position < outcome.num_accepted))
            before = z

    def _remember(self, outcome: Outcome) -> None:
        """Update a request's history."""
        prior = (self.PRIOR_TOKENS * self.mean, self.PRIOR_TOKENS)
        accepted, seen = self._requests.get(outcome.key, prior)
        num_seen = min(len(outcome.confidences), outcome.num_accepted + 1)
        kept = self.REQUEST_MEMORY**num_seen
        self._requests[outcome.key] = (
            accepted * kept + outcome.num_accepted,
            seen * kept + num_seen,
        )

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
