"""Arrivals from a formula: Poisson, Gamma with a coefficient of variation, on/off bursts.

Every trace has a mean of one arrival a second, to be scaled like any other, and log-normal lengths
whose means are near those of the Azure conversation trace.
"""

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from bench.workloads import Arrival, Trace

NUM_ARRIVALS = 20_000
MEAN_PROMPT_TOKENS, PROMPT_CV = 1024, 1.0
MEAN_OUTPUT_TOKENS, OUTPUT_CV = 224, 0.8

Floats = NDArray[np.float64]
Generator = np.random.Generator


def poisson(rng: Generator, count: int) -> Floats:
    """Return gaps between arrivals, in seconds: exponential, mean 1, variance 1."""
    return rng.exponential(1.0, count)


def gamma(rng: Generator, count: int, cv: float) -> Floats:
    """Return Gamma gaps: mean 1, variance cv^2; burstier than Poisson above cv = 1."""
    shape = 1.0 / cv**2
    return rng.gamma(shape, 1.0 / shape, count)


def onoff(rng: Generator, count: int, on_s: float, off_s: float) -> Floats:
    """Return the gaps of a Poisson process that an exponential switch turns on and off.

    Gaps have mean 1 and squared CV 1 + 2 rate / (on_s (1/on_s + 1/off_s)^2), where the rate while
    on is (on_s + off_s) / on_s. Source: Kuczura 1973, the interrupted Poisson process.

    Args:
        on_s, off_s: mean length of both phases, in seconds.
    """
    rate = (on_s + off_s) / on_s
    # A phase ends at rate 1/on_s and an arrival comes at `rate`; whichever is first. So before an
    # arrival there is a geometric number of pauses, and one more exponential for each.
    total_rate = rate + 1.0 / on_s
    num_pauses = rng.geometric(rate / total_rate, count) - 1
    busy = rng.gamma(num_pauses + 1.0, 1.0 / total_rate)
    pauses = np.where(num_pauses > 0, rng.gamma(np.maximum(num_pauses, 1), off_s), 0.0)
    gaps: Floats = busy + pauses
    return gaps


def make_trace(spec: str, seed: int = 0) -> Trace:
    """Make the trace that `poisson`, `gamma:CV` or `onoff:ON_S:OFF_S` describes.

    Raises:
        ValueError: another name, or numbers that are missing, too many or not above 0.
    """
    name, *texts = spec.split(":")
    if name not in PROCESSES:
        raise ValueError(f"synthetic trace is '{name}': known are {', '.join(PROCESSES)}")
    process, usage = PROCESSES[name]
    try:
        numbers = [float(text) for text in texts]
    except ValueError:
        numbers = [math.nan]
    if len(texts) != usage.count(":") or not all(0.0 < number < math.inf for number in numbers):
        raise ValueError(f"synthetic trace is '{spec}': expected {usage}, numbers above 0")
    rng = np.random.default_rng(seed)
    gaps = process(rng, NUM_ARRIVALS - 1, *numbers)
    arrivals = np.concatenate(([0.0], np.cumsum(gaps)))
    prompts = _lengths(rng, MEAN_PROMPT_TOKENS, PROMPT_CV)
    outputs = _lengths(rng, MEAN_OUTPUT_TOKENS, OUTPUT_CV)
    rows = zip(arrivals.tolist(), prompts.tolist(), outputs.tolist(), strict=True)
    return Trace(spec, [Arrival(*row) for row in rows])


def _lengths(rng: Generator, mean: float, cv: float) -> NDArray[np.int64]:
    """Return log-normal numbers of tokens, at least 1."""
    variance = math.log(1.0 + cv**2)
    values = rng.lognormal(math.log(mean) - variance / 2.0, math.sqrt(variance), NUM_ARRIVALS)
    lengths: NDArray[np.int64] = np.maximum(1, np.rint(values)).astype(np.int64)
    return lengths


# Name -> the process and how it is written.
PROCESSES: dict[str, tuple[Callable[..., Floats], str]] = {
    "poisson": (poisson, "poisson"),
    "gamma": (gamma, "gamma:CV"),
    "onoff": (onoff, "onoff:ON_S:OFF_S"),
}
