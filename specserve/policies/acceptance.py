"""Calibrated acceptance: from the draft model's confidence to the probability of being accepted."""

import math
from collections.abc import Iterable

CONFIDENCE_EPS = 1e-4


def logit(confidence: float) -> float:
    """Return log(c / (1 - c)) with c kept away from 0 and 1."""
    c = min(max(confidence, CONFIDENCE_EPS), 1.0 - CONFIDENCE_EPS)
    return math.log(c / (1.0 - c))


class AcceptanceModel:
    """Online logistic regression: acceptance = sigmoid(bias + slope * logit(confidence)).

    Each outcome is one stochastic Newton step with the running inverse Hessian and exponential
    forgetting (recursive least squares on the logistic likelihood; Bishop 2006, section 4.3.3).
    """

    FORGETTING = 0.9995
    MIN_CURVATURE = 0.05

    def __init__(self, bias: float = 1.0, slope: float = 0.8) -> None:
        self.bias = bias
        self.slope = slope
        self._p00, self._p01, self._p11 = 1.0, 0.0, 1.0

    def __call__(self, confidence: float) -> float:
        """Return the acceptance of a draft token, given that those before it were accepted."""
        return _sigmoid(self.bias + self.slope * logit(confidence))

    def survivals(self, confidences: Iterable[float]) -> list[float]:
        """Return the running product of acceptances along a draft; it never rises."""
        survival, result = 1.0, []
        for confidence in confidences:
            survival *= self(confidence)
            result.append(survival)
        return result

    def observe(self, confidence: float, accepted: bool) -> None:
        """Learn one outcome of a draft token whose predecessors were all accepted."""
        x = logit(confidence)
        prediction = _sigmoid(self.bias + self.slope * x)
        curvature = max(prediction * (1.0 - prediction), self.MIN_CURVATURE)
        g0 = self._p00 + self._p01 * x
        g1 = self._p01 + self._p11 * x
        scale = 1.0 / (1.0 / curvature + g0 + g1 * x)
        error = (accepted - prediction) / curvature
        self.bias += g0 * scale * error
        self.slope += g1 * scale * error
        self._p00 = min((self._p00 - g0 * g0 * scale) / self.FORGETTING, 10.0)
        self._p01 = (self._p01 - g0 * g1 * scale) / self.FORGETTING
        self._p11 = min((self._p11 - g1 * g1 * scale) / self.FORGETTING, 10.0)


def _sigmoid(x: float) -> float:
    return 1.0 / (1.0 + math.exp(-max(min(x, 30.0), -30.0)))
