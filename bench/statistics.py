"""From outcomes to numbers, and how sure they are.

Definitions: TTFT from planned arrival to first response; TPOT = (end - first) / (n - 1); ITL the
gap between responses; goodput the requests per second that met every objective they carried.
Percentiles interpolate linearly.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from bench.cells import Distribution, RequestResult, Summary
from bench.outcome import FAILED, REJECTED, Outcome, result_of

NUM_RESAMPLES = 2000


class Interval(NamedTuple):
    """A confidence interval."""

    low: float
    high: float


def summarise(outcomes: Sequence[Outcome], window_s: float) -> Summary:
    """Sum up a window.

    Rates are per second from the window's start to its end or to the last response, whichever is
    later. TPOT is that of requests with a second token.
    """
    done = [outcome for outcome in outcomes if outcome.is_finished]
    end_s = max([window_s, *(outcome.response_s[-1] for outcome in done)])
    num_tokens = sum(outcome.num_output_tokens for outcome in done)
    num_attained = sum(outcome.attained for outcome in outcomes)
    endings = [outcome.ending for outcome in outcomes]
    return Summary(
        ttft_s=distribution([outcome.ttft_s for outcome in done]),
        tpot_s=distribution([o.tpot_s for o in done if o.num_output_tokens > 1]),
        itl_s=distribution([gap for outcome in done for gap in outcome.itl_s]),
        e2e_s=distribution([outcome.e2e_s for outcome in done]),
        attainment=num_attained / len(outcomes),
        goodput_rps=num_attained / end_s,
        token_rate=num_tokens / end_s,
        num_finished=len(done),
        num_rejected=endings.count(REJECTED),
        num_failed=endings.count(FAILED),
        max_lateness_s=max(o.sent_s - o.request.arrival_s for o in outcomes),
    )


def results(outcomes: Sequence[Outcome]) -> list[RequestResult]:
    """Return the entries of a result line."""
    return [result_of(o, _p99(o.itl_s) if o.is_finished else None) for o in outcomes]


def distribution(values: ArrayLike) -> Distribution | None:
    """Return mean and percentiles, or None of nothing."""
    array = np.asarray(values, dtype=np.float64)
    if not array.size:
        return None
    p50, p90, p99 = np.percentile(array, (50, 90, 99))
    return Distribution(float(array.mean()), float(p50), float(p90), float(p99))


def bootstrap_interval(
    values: Sequence[float],
    statistic: Callable[..., NDArray[np.float64]] = np.mean,
    confidence: float = 0.95,
    seed: int = 0,
) -> Interval:
    """Return the bias-corrected bootstrap interval of a statistic over requests.

    Fit for means, percentiles and shares of one cell; requests of a cell share a queue, so the true
    uncertainty is larger: repeat the cell and take `t_interval` over its repeats.

    Args:
        statistic: takes `axis`, as numpy's do.

    Returns:
        Both ends at the value where all values are equal, or there is one.
    """
    from scipy.stats import bootstrap

    array = np.asarray(values, dtype=np.float64)
    if np.ptp(array) == 0.0:
        return Interval(float(array[0]), float(array[0]))
    interval = bootstrap(
        (array,),
        statistic,
        n_resamples=NUM_RESAMPLES,
        confidence_level=confidence,
        vectorized=True,
        method="BCa",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return Interval(float(interval.low), float(interval.high))


def t_interval(values: Sequence[float], confidence: float = 0.95) -> Interval:
    """Return Student's interval of the mean over repeats; infinite for a single one."""
    from scipy.stats import sem, t

    mean = float(np.mean(values))
    if len(values) < 2:
        return Interval(float("-inf"), float("inf"))
    half = float(sem(values) * t.ppf(0.5 + confidence / 2.0, len(values) - 1))
    return Interval(mean - half, mean + half)


def _p99(values: Sequence[float]) -> float | None:
    return float(np.percentile(values, 99)) if values else None
