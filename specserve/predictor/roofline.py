"""The theory of a forward pass: moving bytes or computing, whichever takes longer."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from specserve.telemetry.peaks import peak_of

Floats = NDArray[np.float64]

BYTES_OF = {"fp32": 4.0, "bf16": 2.0, "fp16": 2.0, "fp8": 1.0, "int8": 1.0, "int4": 0.5}
BANDWIDTH_SHARE = 0.8  # of the data sheet, that a good kernel reaches
FLOPS_SHARE = 0.6
PRIOR_WEIGHT = 0.1  # a measurement 10 % off counts as much as a prior wrong by a factor of e


@dataclass(frozen=True, slots=True)
class Roofline:
    """Seconds of a pass over n tokens with c tokens of context read:

        T(n, c) = overhead + (memory^p + compute^p)^(1/p)
        memory  = weights + kv * c          bytes of weights and KV cache over bandwidth
        compute = flops * n                 FLOPs over peak

    The roofline of Williams et al. 2009 (doi 10.1145/1498765.1498785) with a smooth knee: p = 1
    adds the two, p -> infinity takes the larger.

    Attributes:
        overhead, weights: seconds.
        kv: seconds per token of context.
        flops: seconds per token of the step.
        knee: p.
    """

    overhead: float
    weights: float
    kv: float
    flops: float
    knee: float

    def __call__(
        self,
        num_tokens: Floats,
        context_tokens: Floats | float,
        compute_scale: float = 1.0,
        memory_scale: float = 1.0,
    ) -> Floats:
        """Predict seconds; the scales divide the compute and the memory term."""
        memory = (self.weights + self.kv * np.asarray(context_tokens)) / memory_scale
        compute = self.flops * np.asarray(num_tokens, dtype=np.float64) / compute_scale
        knee: Floats = (memory**self.knee + compute**self.knee) ** (1.0 / self.knee)
        return self.overhead + knee

    @classmethod
    def fit(
        cls,
        num_tokens: Sequence[int],
        context_tokens: Sequence[int],
        seconds: Sequence[float],
        prior: "Prior | None" = None,
    ) -> "Roofline":
        """Fit by least squares on log time: Levenberg-Marquardt over the logs of the parameters.

        Args:
            num_tokens, context_tokens, seconds: one entry per measurement, at least 5.
            prior: decides what the measurements leave open, as where compute begins to bind.

        Raises:
            ValueError: too few measurements, or a time that is not above 0.
        """
        n, c = np.asarray(num_tokens, float), np.asarray(context_tokens, float)
        t = np.asarray(seconds, float)
        if len(t) < 5 or not (t > 0).all():
            raise ValueError(f"{len(t)} measurements, least {min(t, default=0)}: need 5 above 0 s")
        low = t.min()
        start = [0.1 * low, 0.9 * low, 1e-3 * low / max(1.0, c.max()), t.max() / n.max(), 4.0]
        if prior:
            start[1], start[3] = prior
        theta = np.log(np.maximum(start, 1e-12))

        def residuals(x: Floats) -> Floats:
            error: Floats = np.log(cls(*np.exp(_bounded(x)))(n, c)) - np.log(t)
            surprise = PRIOR_WEIGHT * (x[[1, 3]] - np.log(prior)) if prior else []
            return np.append(error, surprise)

        return cls(*(float(v) for v in np.exp(_bounded(_least_squares(residuals, theta)))))


class Prior(NamedTuple):
    """What a data sheet says of a roofline's `weights` and `flops`, in seconds."""

    weights: float
    flops: float

    @classmethod
    def of(cls, fingerprint: Mapping[str, str]) -> "Prior | None":
        """Look up the profiled device and count the target's weights; None if either is unknown.

        A token takes two FLOPs for each parameter. fp8 doubles the matrix rate; integer weights are
        widened before they are multiplied.
        """
        peak = peak_of(fingerprint.get("device", ""))
        weight_bytes = BYTES_OF.get(fingerprint.get("target_weights", ""))
        if peak is None or weight_bytes is None:
            return None
        num_devices = int(fingerprint.get("num_devices", 1))
        num_parameters = int(fingerprint["target_parameters"]) / num_devices
        rate = peak.flops * (2.0 if fingerprint["target_weights"] == "fp8" else 1.0)
        return cls(
            num_parameters * weight_bytes / (BANDWIDTH_SHARE * peak.bytes_s),
            2.0 * num_parameters / (FLOPS_SHARE * rate),
        )


def _bounded(theta: Floats) -> Floats:
    """Keep every parameter representable and the knee in [1, 16]."""
    theta = np.clip(theta, -40.0, 10.0)
    theta[-1] = np.clip(theta[-1], 0.0, np.log(16.0))
    return theta


def _least_squares(residuals, theta: Floats, steps: int = 200) -> Floats:  # type: ignore[no-untyped-def]
    """Minimise the sum of squares with damped Gauss-Newton steps and a numeric Jacobian."""
    damping, error = 1e-2, residuals(theta)
    for _ in range(steps):
        jacobian = np.stack(
            [(residuals(theta + 1e-5 * e) - error) / 1e-5 for e in np.eye(len(theta))], axis=1
        )
        normal = jacobian.T @ jacobian
        step = np.linalg.solve(
            normal + damping * (np.diag(np.diag(normal)) + 1e-9 * np.eye(len(theta))),
            -jacobian.T @ error,
        )
        trial = residuals(theta + np.clip(step, -1.0, 1.0))
        if trial @ trial < error @ error:
            theta, error, damping = theta + np.clip(step, -1.0, 1.0), trial, damping * 0.5
        else:
            damping = min(damping * 4.0, 1e6)
    return theta
