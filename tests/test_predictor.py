"""The predictor: theory, staircase, correction, telemetry, and the profile behind them."""

from __future__ import annotations

import itertools
from dataclasses import astuple, replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from specserve.batch import Row
from specserve.config import Config
from specserve.optimum import best_total
from specserve.predictor import measure
from specserve.predictor.acceptance import (
    NUM_JUDGE,
    NUM_SCOUT,
    judge_curves,
    judge_features,
    judged,
    judged_one,
    scout_curves,
    scout_features,
    scouted,
    scouted_one,
    sigmoid,
)
from specserve.predictor.profile import DraftSample, Profile, VerifySample
from specserve.predictor.prompts import NO_PROMPTS, Prompts, PromptTime
from specserve.predictor.roofline import Roofline
from specserve.predictor.step_time import Correction, StepTimeModel, lower_envelope
from specserve.predictor.store import load_or_measure
from specserve.telemetry.state import DeviceState, ScriptedTelemetry

TRUTH = Roofline(overhead=1e-3, weights=20e-3, kv=1e-6, flops=1e-3, knee=4.0)
SIZES = (1, 2, 4, 8, 16, 32, 64, 128)


def make_profile(scale: float = 1.0) -> Profile:
    verify = [
        VerifySample(n, n, c, scale * float(TRUTH(np.array([n]), c)[0]))
        for n in SIZES
        for c in (100, 4000)
    ]
    verify.append(VerifySample(64, 0, 100, scale * (float(TRUTH(np.array([64]), 100)[0]) - 0.016)))
    draft = [
        DraftSample(r, k, r, r * c, 3e-4 + k * (4e-4 + r * 1e-5 + r * c * 1e-8))
        for r in (1, 4, 16)
        for k in (1, 4, 8)
        for c in (50, 500)
    ]
    draft.append(DraftSample(1, 1, 101, 500, 3e-4 + 4e-4 + 1e-5 + 5e-6 + 100 * 2e-5))
    return Profile({"device": "test"}, tuple(verify), tuple(draft))


# -- acceptance --------------------------------------------------------------------------------


@pytest.mark.parametrize("position", [0, 3])
def test_curves_are_the_features_weighed(position: int) -> None:
    """What is learnt and what predicts are two spellings of one formula, and each has a scalar."""
    rng = np.random.default_rng(0)
    history, z = rng.normal(0.0, 0.3, 5), rng.normal(0.0, 2.0, 5) * (position > 0)
    for num_weights, features, curves_of, predict, predict_one in (
        (NUM_JUDGE, judge_features, judge_curves, judged, judged_one),
        (NUM_SCOUT, scout_features, scout_curves, scouted, scouted_one),
    ):
        weights = rng.normal(0.0, 1.0, (5, num_weights))
        expected = sigmoid((features(z, position, history) * weights).sum(axis=1))
        curves = curves_of(weights, history)
        assert predict(curves, z, position) == pytest.approx(expected)
        one_by_one = [predict_one(curves[:, i], float(z[i]), position) for i in range(5)]
        assert one_by_one == pytest.approx(expected)
        assert curves_of(weights[:1], history)[:, 0] == pytest.approx(curves[:, 0])


# -- theory ------------------------------------------------------------------------------------


def test_fit_finds_the_roofline_behind_exact_measurements() -> None:
    points = list(itertools.product(SIZES, (100, 4000)))
    seconds = [float(TRUTH(np.array([n]), c)[0]) for n, c in points]
    fitted = Roofline.fit([n for n, _ in points], [c for _, c in points], seconds)
    for (n, c), truth in zip(points, seconds, strict=True):
        assert float(fitted(np.array([n]), c)[0]) == pytest.approx(truth, rel=0.03)


@pytest.mark.parametrize("seconds", [[1.0] * 4, [1.0] * 5 + [0.0]])
def test_a_fit_without_enough_measurements_is_refused(seconds: list[float]) -> None:
    with pytest.raises(ValueError, match="need 5 above 0 s"):
        Roofline.fit(range(1, len(seconds) + 1), [0] * len(seconds), seconds)


def test_half_the_sm_clock_lengthens_compute_bound_steps_only() -> None:
    full = StepTimeModel(make_profile())
    half = StepTimeModel(make_profile(), ScriptedTelemetry(DeviceState(compute_scale=0.5)))
    assert half.verify_s(128, 100) > 1.8 * full.verify_s(128, 100)
    assert half.verify_s(1, 100) < 1.02 * full.verify_s(1, 100)


def test_half_the_memory_clock_lengthens_memory_bound_steps_only() -> None:
    full = StepTimeModel(make_profile())
    half = StepTimeModel(make_profile(), ScriptedTelemetry(DeviceState(memory_scale=0.5)))
    assert half.verify_s(1, 100) > 1.8 * full.verify_s(1, 100)
    assert half.verify_s(128, 100) < 1.05 * full.verify_s(128, 100)


@pytest.mark.parametrize("name", ["compute_scale", "memory_scale", "kv_headroom"])
def test_a_scale_of_nothing_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} is 0"):
        DeviceState(**{name: 0.0})


# -- staircase and correction ------------------------------------------------------------------


def test_prediction_meets_the_measurements() -> None:
    model = StepTimeModel(make_profile())
    for sample in model_samples():
        num_prompt = sample.num_tokens - sample.num_logit_rows
        prompts = Prompts.chunk(num_prompt, sample.context_tokens)
        predicted = model.verify_s(sample.num_tokens, sample.context_tokens, prompts)
        assert predicted == pytest.approx(sample.seconds, rel=0.06)


def model_samples() -> tuple[VerifySample, ...]:
    return make_profile().verify


def test_context_beyond_the_profile_is_priced_by_theory() -> None:
    """A table that ends at 2048 must not price 8000 alike (D12)."""
    model = StepTimeModel(make_profile())
    truth = float(TRUTH(np.array([1]), 8000.0)[0])
    assert model.verify_s(1, 8000) == pytest.approx(truth, rel=0.1)
    assert model.verify_s(1, 8000) > model.verify_s(1, 2048)


@given(st.integers(1, 60), st.integers(0, 60), st.integers(0, 5000))
@pytest.mark.slow
def test_more_tokens_never_take_less_time(num_tokens: int, num_more: int, context: int) -> None:
    curve = StepTimeModel(make_profile()).verify_curve(num_tokens, num_more, context)
    assert len(curve) == num_more + 1
    assert (np.diff(curve) >= 0).all()


def test_an_outlier_among_the_sizes_does_not_lift_the_larger_ones() -> None:
    """A single slow measurement at one token made everything up to eight look as slow."""
    assert lower_envelope(np.array([9.0, 3.0, 4.0, 8.0, 6.0])).tolist() == [3, 3, 4, 6, 6]


def test_draft_time_counts_forwards_rows_catch_up_and_context() -> None:
    model = StepTimeModel(make_profile())
    assert model.draft_s([]) == 0.0
    truth = 3e-4 + 3 * 4e-4 + (4 + 4 + 2) * (1e-5 + 500 * 1e-8)
    assert model.draft_s([4, 4, 2], 4, 4 * 500) == pytest.approx(truth, rel=0.1)
    assert model.draft_s([1], 101, 500) > model.draft_s([1], 1, 500) + 1e-3


def test_every_draft_forward_of_another_size_pays_for_it() -> None:
    model, changing = (
        StepTimeModel(replace(make_profile(), draft_change_s=s)) for s in (0.0, 0.002)
    )
    assert changing.draft_s([]) == 0.0
    for last, rows, catch_up, num_changes in (
        (4, [4, 4, 4], 4, 0),
        (1, [4, 4, 4], 4, 1),
        (4, [4, 4, 2, 1], 4, 2),
        (4, [4, 4], 7, 2),  # the first forward has what the draft model has not seen yet
    ):
        changing.has_drafted(last)
        more_s = changing.draft_s(rows, catch_up, 500) - model.draft_s(rows, catch_up, 500)
        assert more_s == pytest.approx(0.002 * num_changes)
    changing.observe_draft([4, 2], 0.01, 0.01)
    assert changing.draft_s([2], 2) == pytest.approx(changing.draft_s([3], 2) - 0.002, abs=1e-4)


# -- prompts -----------------------------------------------------------------------------------


def test_prompts_of_a_batch_are_chunks_and_what_comes_before_a_first_token() -> None:
    def row(num_computed: int, num_tokens: int, samples: bool) -> Row:
        return Row(1, num_computed, [1] * num_tokens, samples, [])

    assert Prompts.of([row(90, 1, samples=True)]) == NO_PROMPTS
    rows = [row(90, 1, samples=True), row(10, 6, samples=False), row(0, 5, samples=True)]
    assert Prompts.of(rows) == (6 + 4, 6 * 10 + 6 * 6 // 2 + 4 * 4 // 2)


@pytest.mark.parametrize("truth", [PromptTime(4e-3, -2e-4, 3e-7), PromptTime(0.0, -1e-4, 0.0)])
def test_what_prompts_take_is_found_in_exact_measurements(truth: PromptTime) -> None:
    chunks = [Prompts.chunk(n, start) for n in (15, 64, 128, 250) for start in (32, 256)]
    more = np.array([truth(chunk) for chunk in chunks])
    found = PromptTime.fit(chunks, more, np.full(len(chunks), 0.1))
    for chunk in (*chunks, Prompts.chunk(500, 100)):
        assert found(chunk) == pytest.approx(truth(chunk), abs=1e-6)
    assert found(NO_PROMPTS) == 0.0


def test_prompts_of_a_slow_moment_do_not_move_the_fit() -> None:
    truth = PromptTime(4e-3, -2e-4, 3e-7)
    chunks = [Prompts.chunk(n - i, start) for i in range(5) for n in (16, 64, 128, 256)
              for start in (32, 256)]  # fmt: skip
    full = np.array([1e-3 * chunk.num_tokens for chunk in chunks])
    more = np.array([truth(chunk) for chunk in chunks])
    more[8:16] += full[8:16]  # one round of five took twice as long
    found = PromptTime.fit(chunks, more, full)
    for chunk in chunks:
        assert found(chunk) == pytest.approx(truth(chunk), abs=0.01 * 1e-3 * chunk.num_tokens)


def test_few_prompts_say_less() -> None:
    full = np.array([0.1, 0.2])
    two = PromptTime.fit([Prompts(32, 512), Prompts(128, 8192)], np.array([-0.003, -0.015]), full)
    assert astuple(two) == pytest.approx((0.001, -0.000125, 0.0))
    one = PromptTime.fit([Prompts(32, 512)], np.array([-0.0032]), full[:1])
    assert astuple(one) == pytest.approx((0.0, -1e-4, 0.0))
    assert PromptTime.fit([], np.empty(0), np.empty(0))(Prompts(32, 512)) == 0.0


def test_pairs_that_seem_to_save_time_are_left_out() -> None:
    chunks = [Prompts.chunk(n, start) for n in (16, 128, 256) for start in (0, 1000)]
    falling = np.array([0.01 - 1e-7 * chunk.num_pairs for chunk in chunks])
    assert PromptTime.fit(chunks, falling, np.full(len(chunks), 0.1)).pair == 0.0


def test_a_slowed_engine_is_noticed() -> None:
    model = StepTimeModel(make_profile())
    before = model.verify_s(8, 100)
    for _ in range(40):
        model.observe_verify(8, model.verify_s(8, 100), 2.0 * before)
    assert model.verify_s(8, 100) == pytest.approx(2.0 * before, rel=0.1)
    assert model.verify_s(64, 100) > 1.5 * StepTimeModel(make_profile()).verify_s(64, 100)
    assert model.verify_error()[1] > 0.3


def test_an_outlier_moves_little() -> None:
    correction = Correction()
    correction.observe(8, predicted=0.02, measured=2.0)
    assert float(correction.factor(np.array([8.0]))[0]) < 1.1
    assert correction.factor_of(8) == pytest.approx(float(correction.factor(np.array([8.0]))[0]))


def test_no_time_at_all_says_nothing() -> None:
    correction = Correction()
    correction.observe(8, predicted=0.02, measured=0.0)
    assert correction.factor_of(8) == 1.0


# -- the profile -------------------------------------------------------------------------------


def test_profile_loads_back_equal(tmp_path: Path) -> None:
    profile = replace(make_profile(), change_s=0.003, draft_change_s=0.0004, host_s=0.0007)
    profile.save(tmp_path / "deep" / "profile.json")
    assert Profile.load(tmp_path / "deep" / "profile.json") == profile


@pytest.mark.parametrize("marks", [{"device": "another"}, {}, {"device": "test", "engine": "x"}])
def test_a_profile_of_something_else_is_refused(marks: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="run `specserve profile` again"):
        make_profile().check(marks)


def test_a_version_that_measures_other_points_measures_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, demo_engines: Path
) -> None:
    """It served with what an older one had stored, which knew less."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    measured: list[str] = []

    def measure_now(marks: dict[str, str]) -> Profile:
        measured.append(marks["points"])
        return replace(make_profile(), fingerprint=marks)

    for points in (measure.POINTS, measure.POINTS, measure.POINTS[:-1]):
        monkeypatch.setattr(measure, "POINTS", points)
        load_or_measure(Config(), measure_now)
    assert len(measured) == len(set(measured)) == 2


@pytest.mark.parametrize("text", ["", "{}", '{"format": 2}', '{"format": 1, "verify": []}'])
def test_a_broken_profile_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "profile.json"
    path.write_text(text)
    with pytest.raises(ValueError, match="profile"):
        Profile.load(path)


# -- the optimum -------------------------------------------------------------------------------

ROWS = st.lists(st.lists(st.floats(0.0, 1.0), max_size=3), min_size=1, max_size=3)


@given(ROWS, st.lists(st.floats(0.001, 5.0), min_size=10, max_size=10), st.floats(0.0, 3.0))
def test_selection_is_the_best_of_all_prefix_closed_subsets(
    acceptances: list[list[float]], steps: list[float], spent_s: float
) -> None:
    """On any staircase, not only on smooth curves (D3, D5)."""
    survivals = [np.cumprod(row).tolist() for row in acceptances]
    verify_s = np.cumsum(steps).tolist()
    gains = sorted((s for row in survivals for s in row), reverse=True)
    found = best_total(gains, float(len(survivals)), verify_s, spent_s)
    every = itertools.product(*(range(len(row) + 1) for row in survivals))
    best = max(
        (len(lengths) + sum(sum(row[:n]) for row, n in zip(survivals, lengths, strict=True)))
        / (spent_s + verify_s[sum(lengths)])
        for lengths in every
    )
    assert found.rate == pytest.approx(best, rel=1e-9)


def test_selection_crosses_a_dip_of_the_staircase() -> None:
    """D5: three rows of acceptance .8; common lengths give .482 at 1, a dip, and .536 at 4."""
    graph = {4: 10.0, 8: 11.0, 16: 18.0, 32: 30.0}
    verify_s = [next(t for size, t in graph.items() if 3 + m <= size) for m in range(25)]
    rates = []
    for k in range(6):
        gains = sorted((0.8**j for j in range(1, k + 1) for _ in range(3)), reverse=True)
        rates.append(best_total(gains, 3.0, verify_s, 0.2 * k).rate)
    assert rates[:2] == pytest.approx([0.3, 0.482], abs=1e-3)
    assert rates[4] > 0.536, "verifying all twelve is one of the totals"
    assert max(rates) > 0.58, "five tokens of eight slots, which no common length finds"
