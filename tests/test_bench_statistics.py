"""Numbers of a window, against their definitions, numpy and scipy."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from bench.calibration import capacity, check_finished
from bench.outcome import FAILED, FINISHED, REJECTED, Outcome
from bench.statistics import bootstrap_interval, distribution, results, summarise, t_interval
from bench.workloads.plan import PlannedRequest
from specserve.request import SLO


def make_outcome(
    arrival_s: float = 0.0,
    response_s: tuple[float, ...] = (),
    num_output_tokens: int = 1,
    *,
    slo: SLO | None = None,
    ending: str = FINISHED,
    sent_s: float | None = None,
) -> Outcome:
    request = PlannedRequest(arrival_s, [1, 2, 3], num_output_tokens, "some", slo or SLO())
    sent_s = arrival_s if sent_s is None else sent_s
    return Outcome(request, sent_s, list(response_s), num_output_tokens, ending)


def test_latencies_follow_their_definitions() -> None:
    outcome = make_outcome(2.0, (2.5, 2.7, 3.5), 11, sent_s=2.1)
    assert outcome.ttft_s == pytest.approx(0.5)  # from the planned arrival, not from the sending
    assert outcome.e2e_s == pytest.approx(1.5)
    assert outcome.tpot_s == pytest.approx(1.0 / 10)  # 11 tokens have 10 gaps
    assert outcome.itl_s == pytest.approx([0.2, 0.8])


def test_one_token_has_a_tpot_of_0_and_counts_in_no_distribution() -> None:
    outcome = make_outcome(0.0, (0.4,), 1, slo=SLO(None, 0.01))
    assert outcome.tpot_s == 0.0
    assert outcome.attained
    assert summarise([outcome], 1.0).tpot_s is None


@pytest.mark.parametrize(
    ("slo", "attained"),
    [
        (SLO(), True),
        (SLO(0.5, None), True),
        (SLO(0.49, None), False),
        (SLO(None, 0.1), True),
        (SLO(None, 0.099), False),
        (SLO(0.5, 0.099), False),
        (SLO(0.6, 0.2), True),
    ],
)
def test_a_request_attains_when_it_meets_all_it_carries(slo: SLO, attained: bool) -> None:
    assert make_outcome(0.0, (0.5, 0.75, 1.5), 11, slo=slo).attained is attained


@pytest.mark.parametrize("ending", [REJECTED, FAILED])
def test_what_did_not_finish_attains_nothing(ending: str) -> None:
    assert not make_outcome(0.0, (0.1,), 1, ending=ending).attained


def test_summary_counts_every_request() -> None:
    slo = SLO(1.0, None)
    outcomes = [
        make_outcome(0.0, (0.5, 1.0), 20, slo=slo),
        make_outcome(1.0, (2.5, 4.0), 30, slo=slo, sent_s=1.25),  # late
        make_outcome(2.0, (), 0, slo=slo, ending=REJECTED),
        make_outcome(3.0, (3.2,), 0, slo=slo, ending=FAILED),
    ]
    summary = summarise(outcomes, window_s=3.5)
    assert (summary.num_finished, summary.num_rejected, summary.num_failed) == (2, 1, 1)
    assert summary.attainment == 0.25
    assert summary.goodput_rps == pytest.approx(1 / 4.0)  # until the last response
    assert summary.token_rate == pytest.approx(50 / 4.0)
    assert summary.max_lateness_s == pytest.approx(0.25)
    assert summarise(outcomes, window_s=10.0).goodput_rps == pytest.approx(1 / 10.0)


def test_summary_of_failures_only_has_no_latencies() -> None:
    summary = summarise([make_outcome(ending=FAILED)], 2.0)
    assert summary.ttft_s is summary.e2e_s is summary.itl_s is None
    assert (summary.attainment, summary.goodput_rps) == (0.0, 0.0)


def test_distribution_is_numpys() -> None:
    values = np.random.default_rng(0).lognormal(size=1001)
    one = distribution(values)
    assert one is not None
    assert one.mean == pytest.approx(values.mean())
    assert [one.p50, one.p90, one.p99] == pytest.approx(np.quantile(values, [0.5, 0.9, 0.99]))


def test_result_has_the_percentile_of_its_own_gaps_and_none_if_it_failed() -> None:
    gaps = np.random.default_rng(1).exponential(size=50)
    times = tuple(np.concatenate(([1.0], 1.0 + np.cumsum(gaps))).tolist())
    done, failed = results([make_outcome(0.5, times, 60), make_outcome(ending=FAILED)])
    assert done.itl_p99_s == pytest.approx(stats.scoreatpercentile(gaps, 99))
    assert (done.ttft_s, done.outcome, done.priority_class) == (0.5, FINISHED, "some")
    assert failed.ttft_s is failed.tpot_s is failed.e2e_s is failed.itl_p99_s is None


def test_t_interval_is_scipys() -> None:
    values = [3.1, 2.9, 3.6, 3.3]
    expected = stats.ttest_1samp(values, 0.0).confidence_interval(0.95)
    assert t_interval(values) == pytest.approx((expected.low, expected.high))
    assert t_interval([3.1]) == (float("-inf"), float("inf"))


def test_bootstrap_covers_the_mean_about_as_often_as_it_says() -> None:
    # 100 intervals of 90 %: below 80 or above 98 has odds of less than 1 in 300.
    rng = np.random.default_rng(5)
    inside = 0
    for _ in range(100):
        low, high = bootstrap_interval(rng.exponential(size=60), confidence=0.9)
        inside += low <= 1.0 <= high
    assert 80 <= inside <= 98


def test_bootstrap_of_a_mean_agrees_with_the_normal_interval() -> None:
    values = np.random.default_rng(2).normal(5.0, 1.0, 400)
    expected = stats.norm.interval(0.95, values.mean(), stats.sem(values))
    assert bootstrap_interval(values) == pytest.approx(expected, abs=0.02)


def test_bootstrap_of_equal_values_is_a_point() -> None:
    assert bootstrap_interval([1.0, 1.0, 1.0]) == (1.0, 1.0)
    assert bootstrap_interval([0.4]) == (0.4, 0.4)


# -- capacity ----------------------------------------------------------------------------------


def batch_of(rows: int, count: int, step_s: float, num_tokens: int) -> list[Outcome]:
    """Return what a batch does that takes a request in whenever one leaves."""
    seconds = step_s * num_tokens
    outcomes = []
    for i in range(count):
        start_s = (i // rows) * seconds + (i % rows) * seconds / rows  # they leave one by one
        times = tuple(start_s + step_s * (j + 1) for j in range(num_tokens))
        outcomes.append(make_outcome(0.0, times, num_tokens))
    return outcomes


def test_capacity_is_that_of_a_full_batch() -> None:
    rps, token_rate = capacity(batch_of(rows=8, count=48, step_s=0.02, num_tokens=40))
    assert token_rate == pytest.approx(8 / 0.02, rel=0.03)
    assert rps == pytest.approx(8 / 0.02 / 40, rel=0.03)


def test_flood_that_leaves_at_once_measures_nothing() -> None:
    with pytest.raises(ValueError, match="6 requests left all at once"):
        capacity([make_outcome(0.0, (1.0,), 1)] * 6)


def test_calibration_does_not_rest_on_failures() -> None:
    bad = make_outcome(ending=FAILED)
    bad.error = "no such model"
    with pytest.raises(ValueError, match="no such model"):
        check_finished([make_outcome(0.0, (1.0,), 1), bad])
