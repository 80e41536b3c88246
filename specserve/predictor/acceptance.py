"""How likely a draft token is accepted: calibrated on outcomes, per request, never raw confidence.

Two online logistic models. The *judge* sees a drafted token's confidence; the *scout* predicts a
token that has not been drafted yet. Both see how the request has fared so far.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
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


def judge_features(z: Floats, position: int, history: Floats) -> Floats:
    """Lay out what the judge sees of a drafted token.

    Args:
        z: [n], logit of its confidence.
        position: in the draft, from 0.
        history: [n], the request's acceptance above or below that of all requests.

    Returns:
        [n, NUM_JUDGE].
    """
    one = np.ones_like(z)
    columns = [
        one, z, np.maximum(z, 0.0), 0.1 * z * z, 0.25 * position * one, history, history * z
    ]  # fmt: skip
    return np.stack(columns, axis=1)


def scout_features(z: Floats, position: int, history: Floats) -> Floats:
    """Lay out what the scout sees of the token after one of logit `z`; position 0 has none before.

    Returns:
        [n, NUM_SCOUT].
    """
    one = np.ones_like(z)
    z = z if position else np.zeros_like(z)
    columns = [one, float(position == 0) * one, 0.25 * z, 0.1 * z * z, history]
    return np.stack(columns, axis=1)


JUDGE_PRIOR = (1.2, 0.8, 0.0, 0.0, 0.0, 2.0, 0.0)
SCOUT_PRIOR = (0.8, 0.0, 0.3, 0.0, 3.0)
NUM_JUDGE = len(JUDGE_PRIOR)
NUM_SCOUT = len(SCOUT_PRIOR)


class OnlineLogistic:
    """Logistic regression by recursive least squares with forgetting.

    Each outcome is one Newton step with the running inverse Hessian (Bishop 2006, section 4.3.3).
    """

    FORGETTING = 0.9995
    MIN_CURVATURE = 0.05
    MAX_VARIANCE = 10.0

    def __init__(self, prior: Sequence[float]) -> None:
        self.weights = np.array(prior, dtype=np.float64)
        self._inverse = np.eye(len(prior))

    def observe(self, x: Floats, outcome: bool) -> float:
        """Learn one outcome; return what was predicted."""
        predicted = 1.0 / (1.0 + np.exp(-np.clip(x @ self.weights, -30.0, 30.0)))
        curvature = max(predicted * (1.0 - predicted), self.MIN_CURVATURE)
        p_x = self._inverse @ x
        gain = p_x / (1.0 / curvature + x @ p_x)
        self._inverse = (self._inverse - np.outer(gain, p_x)) / self.FORGETTING
        if self._inverse.trace() > self.MAX_VARIANCE * len(x):  # nothing new for a long while
            self._inverse *= self.MAX_VARIANCE * len(x) / self._inverse.trace()
        self.weights = self.weights + gain * (outcome - predicted) / curvature
        return float(predicted)


@dataclass(slots=True)
class _RequestHistory:
    """Exponentially forgotten outcomes of one request, begun with the mean of all requests."""

    num_accepted: float
    num_seen: float

    def observe(self, accepted: bool) -> None:
        self.num_accepted = self.num_accepted * AcceptanceModel.REQUEST_MEMORY + accepted
        self.num_seen = self.num_seen * AcceptanceModel.REQUEST_MEMORY + 1.0


class AcceptanceModel:
    """Judge, scout, and the requests' histories."""

    REQUEST_MEMORY = 0.93
    PRIOR_TOKENS = 4.0  # a new request counts as this many tokens of the common mean
    COMMON_RATE = 0.002
    NUM_BINS = 10

    def __init__(self) -> None:
        self.judge = OnlineLogistic(JUDGE_PRIOR)
        self.scout = OnlineLogistic(SCOUT_PRIOR)
        self.mean = 0.65
        self._requests: dict[int, _RequestHistory] = {}
        self._bins = np.zeros((self.NUM_BINS, 3))  # predictions, outcomes, count

    def history(self, keys: Sequence[int]) -> Floats:
        """Return each request's acceptance less the common mean; 0 for a new one."""
        return np.array(
            [r.num_accepted / r.num_seen - self.mean if (r := self._requests.get(k)) else 0.0
             for k in keys]
        )  # fmt: skip

    def observe(self, key: int, confidences: Sequence[float], num_accepted: int) -> None:
        """Learn a row's outcome.

        Args:
            confidences: of the *verified* draft tokens.
            num_accepted: of these; the one after them, if any, was rejected.
        """
        if not confidences:
            return
        request = self._requests.get(key)
        if request is None:
            seen = self.PRIOR_TOKENS
            request = self._requests[key] = _RequestHistory(seen * self.mean, seen)
        z = logit(np.asarray(confidences[: num_accepted + 1], dtype=np.float64))
        history = np.array([request.num_accepted / request.num_seen - self.mean])
        for position in range(len(z)):
            accepted = position < num_accepted
            now, before = z[position : position + 1], z[max(0, position - 1) : max(1, position)]
            predicted = self.judge.observe(judge_features(now, position, history)[0], accepted)
            self.scout.observe(scout_features(before, position, history)[0], accepted)
            self._count(predicted, accepted)
            request.observe(accepted)
            self.mean += self.COMMON_RATE * (accepted - self.mean)

    def forget(self, keys: Sequence[int]) -> None:
        """Drop finished requests."""
        for key in keys:
            self._requests.pop(key, None)

    def calibration_error(self) -> float:
        """Return the expected calibration error of the judge (Naeini et al. 2015), ten bins."""
        used = self._bins[self._bins[:, 2] > 0]
        total = used[:, 2].sum()
        return float(np.abs(used[:, 0] - used[:, 1]).sum() / total) if total else 0.0

    def _count(self, predicted: float, accepted: bool) -> None:
        self._bins *= 0.9999
        self._bins[min(int(predicted * self.NUM_BINS), self.NUM_BINS - 1)] += (
            predicted, accepted, 1.0,
        )  # fmt: skip
