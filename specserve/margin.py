"""How far predictions fall short, learned online: a factor that nearly all of them stay within."""

import math


class Margin:
    """A quantile of actual over predicted values, by stochastic approximation.

    Every value beyond the factor raises it, every other one lowers it a little, so that in the long
    run `SHARE` of the values are within. Source: Robbins and Monro 1951.
    """

    SHARE = 0.9
    RATE = 0.1
    LIMITS = (math.log(0.5), math.log(20.0))

    def __init__(self) -> None:
        self._log = 0.0

    @property
    def factor(self) -> float:
        """What to multiply a prediction by."""
        return math.exp(self._log)

    def learn(self, predicted: float, actual: float) -> None:
        """Take a prediction's outcome; both above 0."""
        is_within = actual <= predicted * self.factor
        log = self._log + self.RATE * (self.SHARE - is_within)
        self._log = min(max(log, self.LIMITS[0]), self.LIMITS[1])
