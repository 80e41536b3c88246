"""Acceptance from three numbers, for pairs that nobody has recorded."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from specserve.predictor.acceptance import sigmoid

SPREAD = 2.0  # standard deviation of a token's logit over all requests and positions
CHUNK = 256  # positions drawn at a time
Floats = NDArray[np.float64]


class ParametricAcceptance:
    """Each position of each request has a probability that a draft token there is accepted.

    Its logit is normal: a part belongs to the request and a part to the position. The confidence is
    that probability as seen through noise on the logit. See `AcceptanceProcess`.

    Args:
        mean: probability that a draft token is accepted, given those before it; in (0, 1).
        correlation: share of the logit's variance that a request's tokens have in common; in
            [0, 1].
        confidence_noise: standard deviation of the noise, in logits; 0 is a draft that knows.
        max_draft_tokens: how far ahead it is asked.
        seed: of everything that is drawn.

    Raises:
        ValueError: a parameter out of its range.
    """

    def __init__(
        self,
        mean: float,
        correlation: float = 0.3,
        confidence_noise: float = 1.0,
        *,
        max_draft_tokens: int = 8,
        seed: int = 0,
    ) -> None:
        if not 0.0 < mean < 1.0:
            raise ValueError(f"mean acceptance is {mean}: must be above 0 and below 1")
        if not 0.0 <= correlation <= 1.0:
            raise ValueError(f"correlation is {correlation}: must be from 0 to 1")
        if confidence_noise < 0.0:
            raise ValueError(f"confidence noise is {confidence_noise}: must be at least 0")
        self._center = center_of(mean)
        self._shared = SPREAD * correlation**0.5
        self._own = SPREAD * (1.0 - correlation) ** 0.5
        self._noise = confidence_noise
        self._k = max_draft_tokens
        self._seed = seed
        self._texts: dict[int, _Text] = {}

    def at(self, key: int, position: int) -> tuple[Sequence[float], int]:
        """Return what would be proposed there. See `AcceptanceProcess`."""
        text = self._texts.get(key)
        if text is None:
            rng = np.random.default_rng((self._seed, key))
            request_logit = self._center + self._shared * rng.standard_normal()
            text = self._texts[key] = _Text(rng, request_logit, [], [])
        while len(text.is_accepted) < position + self._k:
            self._write_more(text)
        ahead = text.is_accepted[position : position + self._k]
        num_accepted = ahead.index(False) if False in ahead else self._k
        return text.confidences[position : position + self._k], num_accepted

    def _write_more(self, text: "_Text") -> None:
        logits = text.request_logit + self._own * text.rng.standard_normal(CHUNK)
        accepted = text.rng.random(CHUNK) < sigmoid(logits)
        seen = sigmoid(logits + self._noise * text.rng.standard_normal(CHUNK))
        text.is_accepted.extend(accepted.tolist())
        text.confidences.extend(seen.tolist())


@dataclass(slots=True)
class _Text:
    """One request's output, as far as somebody asked: by position, accepted there or not."""

    rng: np.random.Generator
    request_logit: float
    is_accepted: list[bool]
    confidences: list[float]


def center_of(mean: float) -> float:
    """Return the m for which sigmoid(m + SPREAD x), x standard normal, has this mean."""
    x, weight = np.polynomial.hermite_e.hermegauss(64)  # type: ignore[no-untyped-call]
    weight = weight / weight.sum()
    low, high = -30.0, 30.0
    while high - low > 1e-9:
        middle = (low + high) / 2.0
        if float(weight @ sigmoid(middle + SPREAD * x)) < mean:
            low = middle
        else:
            high = middle
    return (low + high) / 2.0
