"""Capacity from a profile: the search, the acceptance process, the profiles, the command."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from bench.simulate.capacity import PRECISION, find_capacity
from bench.simulate.options import SimulateOptions
from bench.simulate.question import Question, parse_rates
from specserve import profiles
from specserve.cli import app
from specserve.engines.parametric_acceptance import ParametricAcceptance
from specserve.predictor.step_time import StepTimeModel
from specserve.profiles import estimate

PNG = b"\x89PNG"
ESTIMATES = [name for name in profiles.shipped() if profiles.is_estimate(profiles.find(name))]


# -- the search --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Probe:
    rate_rps: float
    attainment: float


@pytest.mark.parametrize("truth", [1.001, 1.7, 3.0, 17.3, 49.9])
def test_search_finds_where_the_objective_is_lost(truth: float) -> None:
    capacity = find_capacity(lambda rate: Probe(rate, float(rate <= truth)), 1.0, 50.0, 0.9)
    assert capacity.best is not None
    assert not capacity.is_at_least
    assert truth / (1.0 + PRECISION) <= capacity.best.rate_rps <= truth
    rates = [probe.rate_rps for probe in capacity.probes]
    assert rates == sorted(rates)
    assert rates[0] == pytest.approx(1.0)
    assert rates[-1] == pytest.approx(50.0)


def test_search_says_so_where_every_rate_or_none_is_met() -> None:
    always = find_capacity(lambda rate: Probe(rate, 0.95), 1.0, 50.0, 0.9)
    assert always.is_at_least
    assert always.best is not None
    assert always.best.rate_rps == pytest.approx(50.0)
    never = find_capacity(lambda rate: Probe(rate, 0.85), 1.0, 50.0, 0.9)
    assert (never.best, never.is_at_least) == (None, False)


def test_rate_met_above_one_that_is_not_does_not_count() -> None:
    """Overload can look good for a moment: 8 to 12 fails, all else is met."""
    capacity = find_capacity(lambda r: Probe(r, 0.0 if 8.0 < r < 12.0 else 1.0), 1.0, 50.0, 0.9)
    assert capacity.best is not None
    assert 8.0 / (1.0 + PRECISION) <= capacity.best.rate_rps <= 8.0


@pytest.mark.parametrize("text", ["", "5", "5:", "50:1", "0:5", "1:nan", "1:inf", "a:b", "1:2:3"])
def test_rate_that_is_no_range_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="expected LOW:HIGH"):
        parse_rates(text)


# -- acceptance from three numbers -------------------------------------------------------------


def _drawn(process: ParametricAcceptance, num_texts: int = 400) -> tuple[np.ndarray, np.ndarray]:
    """Return, for 64 positions of each text, the first token's confidence and whether it holds."""
    drawn = [[process.at(key, i) for i in range(64)] for key in range(1, num_texts + 1)]
    confidences = np.array([[at[0][0] for at in text] for text in drawn])
    accepted = np.array([[at[1] > 0 for at in text] for text in drawn])
    return confidences, accepted


@pytest.mark.parametrize("mean", [0.2, 0.5, 0.8])
@pytest.mark.parametrize("correlation", [0.0, 0.6])
def test_mean_acceptance_is_what_was_asked_for(mean: float, correlation: float) -> None:
    _, accepted = _drawn(ParametricAcceptance(mean, correlation))
    error = accepted.mean(axis=1).std() / len(accepted) ** 0.5  # of 400 independent texts
    assert abs(accepted.mean() - mean) < 4.0 * error  # false alarm: 1 in 16,000; the seed is fixed


def test_correlation_makes_requests_differ() -> None:
    spreads = [
        _drawn(ParametricAcceptance(0.7, correlation))[1].mean(axis=1).std()
        for correlation in (0.0, 0.3, 0.9)
    ]
    assert spreads[0] < spreads[1] < spreads[2]
    assert spreads[0] == pytest.approx((0.7 * 0.3 / 64) ** 0.5, rel=0.15)  # binomial


def test_confidence_without_noise_is_the_acceptance_and_noise_hides_it() -> None:
    confidences, accepted = _drawn(ParametricAcceptance(0.7, confidence_noise=0.0))
    for low in np.arange(0.0, 1.0, 0.2):
        inside = (confidences >= low) & (confidences < low + 0.2)
        assert abs(accepted[inside].mean() - confidences[inside].mean()) < 0.03
    noisy = [
        np.corrcoef(*(x.ravel() for x in _drawn(ParametricAcceptance(0.7, confidence_noise=n))))
        for n in (0.0, 2.0, 8.0)
    ]
    assert noisy[0][0, 1] > noisy[1][0, 1] > noisy[2][0, 1] > 0.0


def test_what_is_accepted_does_not_depend_on_who_asks_when() -> None:
    forwards, backwards = ParametricAcceptance(0.7), ParametricAcceptance(0.7)
    places = [(key, position) for key in (1, 2) for position in range(0, 600, 7)]
    asked = {place: backwards.at(*place) for place in reversed(places)}
    assert {place: forwards.at(*place) for place in places} == asked
    for position in range(100):  # a draft begun one token later sees the same text
        confidences, num_accepted = forwards.at(1, position)
        later_confidences, later = forwards.at(1, position + 1)
        assert confidences[1:] == later_confidences[:-1]
        assert later >= num_accepted - 1


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"mean": 0.0}, "mean acceptance is 0.0"),
        ({"mean": 1.0}, "mean acceptance is 1.0"),
        ({"mean": 0.5, "correlation": 1.5}, "correlation is 1.5"),
        ({"mean": 0.5, "confidence_noise": -1.0}, "confidence noise is -1.0"),
    ],
)
def test_parameter_out_of_range_is_refused(values: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ParametricAcceptance(**values)


# -- profiles ----------------------------------------------------------------------------------


def test_profiles_are_shipped_for_the_demo_and_for_every_device_and_pair() -> None:
    pairs = {f"{device}-{pair}" for device in estimate.DEVICES for pair in estimate.PAIRS}
    assert set(ESTIMATES) == pairs
    measured = {"cpu-demo", "h100-torch-7b", "h200-torch-7b"}
    assert set(profiles.shipped()) == pairs | measured
    assert {profiles.find(name).source for name in measured} == {"measured"}


def test_an_estimate_is_near_what_a_gpu_has_measured() -> None:
    """Of 7 B weights on an H100, whichever shape they have."""
    estimated, measured = (
        StepTimeModel(profiles.find(name)) for name in ("h100-llama-7b", "h100-torch-7b")
    )
    for num_tokens in (1, 8, 32, 64, 128, 256, 512):
        ratio = estimated.verify_s(num_tokens, 100 * num_tokens) / measured.verify_s(
            num_tokens, 100 * num_tokens
        )
        assert 0.8 < ratio < 1.05


@pytest.mark.parametrize("name", ESTIMATES)
def test_estimate_is_what_the_script_writes_and_the_model_repeats(name: str) -> None:
    profile = profiles.find(name)
    device, _, pair = name.partition("-")
    written = estimate.estimate(estimate.DEVICES[device], *estimate.PAIRS[pair])
    assert replace(profile, verify=(), draft=()) == replace(written, verify=(), draft=())
    for kind in ("verify", "draft"):  # numpy's last digit depends on the CPU
        for one, other in zip(getattr(profile, kind), getattr(written, kind), strict=True):
            assert replace(one, seconds=0.0) == replace(other, seconds=0.0)
            assert one.seconds == pytest.approx(other.seconds, rel=1e-12)
    model = StepTimeModel(profile)
    for sample in profile.verify:
        predicted_s = model.verify_s(sample.num_tokens, sample.context_tokens)
        assert predicted_s == pytest.approx(sample.seconds, rel=0.06)


def test_estimate_of_one_token_is_the_time_to_read_the_weights() -> None:
    """13.48 GB at 75 % of 3.35 TB/s are 5.37 ms; 32 layers and the pass add 0.49 ms."""
    target, _ = estimate.PAIRS["llama-7b"]
    seconds = estimate.PassTime(estimate.DEVICES["h100"], target)(1, 0)
    assert seconds == pytest.approx(5.37e-3 + 0.49e-3, rel=0.01)


def test_estimate_of_many_tokens_is_the_time_to_compute_them() -> None:
    """2 x 6.74e9 x 8192 FLOPs at 60 % of 989 TFLOPS are 186 ms."""
    target, _ = estimate.PAIRS["llama-7b"]
    seconds = estimate.PassTime(estimate.DEVICES["h100"], target)(8192, 0)
    assert seconds == pytest.approx(0.186, rel=0.01)


@pytest.mark.parametrize("name", ESTIMATES)
def test_weights_and_kv_of_an_estimate_fit_into_its_memory(name: str) -> None:
    device_name, _, pair = name.partition("-")
    device, (target, draft) = estimate.DEVICES[device_name], estimate.PAIRS[pair]
    marks = profiles.find(name).fingerprint
    num_gpus = int(marks["device"].partition(" ")[0])
    kv = int(marks["scheduler.kv_cache_tokens"]) * (target.kv_bytes + draft.kv_bytes)
    used = target.weights_bytes + draft.weights_bytes + kv
    assert 0.85 < used / (num_gpus * device.memory_bytes) <= 0.9


def test_unknown_profile_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"'h100' is not a file, nor one of .*h100-llama-70b"):
        profiles.find("h100")


# -- the question and the command --------------------------------------------------------------


def _options(**values: object) -> SimulateOptions:
    defaults = {
        "profile": "h100-llama-70b", "rate": "1:50", "slo_tpot_ms": 40.0, "requests": 20,
        "prompt_tokens": 128.0, "output_tokens": 32.0, "policy": ["none"], "slo_ttft_ms": 0.0,
    }  # fmt: skip
    return SimulateOptions(**{**defaults, **values})  # type: ignore[arg-type]


def test_plain_decoding_alone_takes_the_profiles_step_and_the_overhead() -> None:
    """At a rate so low that requests never meet, TPOT is one step of one token."""
    question = Question(_options(rate="0.01:0.02", overhead_ms=5.0))
    probe = question.answer("none").probes[0]
    assert probe.mean_rows < 1.05
    step_s = StepTimeModel(question.profile).verify_s(1, 150)
    assert probe.summary.tpot_s is not None
    assert probe.summary.tpot_s.p50 == pytest.approx(step_s + 0.005, rel=0.02)


@pytest.mark.slow
def test_tighter_objective_is_met_at_lower_rates_only() -> None:
    best = {}
    for tpot_ms in (25.0, 60.0):
        capacity = Question(_options(slo_tpot_ms=tpot_ms, rate="1:400")).answer("none")
        assert capacity.best is not None
        assert capacity.best.attainment >= 0.9
        best[tpot_ms] = capacity.best.rate_rps
    assert best[25.0] < best[60.0]


def test_more_acceptance_is_more_capacity_for_speculation() -> None:
    options = {"policy": ["fixed_4"], "slo_tpot_ms": 25.0, "rate": "1:100"}
    low, high = (
        Question(_options(acceptance=mean, **options)).answer("fixed_4").best
        for mean in ("0.4", "0.9")
    )
    assert high is not None
    assert low is None or low.rate_rps < high.rate_rps


def test_window_is_long_enough_for_a_growing_queue_to_be_late() -> None:
    probes = Question(_options(requests=10, slo_ttft_ms=200.0, rate="1:50")).answer("none").probes
    sent = {p.rate_rps: p.summary.num_finished + p.summary.num_rejected for p in probes}
    assert sent[1.0] == 10
    assert sent[probes[-1].rate_rps] == round(10 * 0.2 * probes[-1].rate_rps)


def test_limits_come_from_the_profile_and_yield_to_set() -> None:
    assert Question(_options()).max_num_seqs == 256
    assert Question(_options(override=["scheduler.max_num_seqs=7"])).max_num_seqs == 7


@pytest.mark.slow
def test_command_labels_an_estimate_and_draws(tmp_path: Path) -> None:
    picture = tmp_path / "new" / "capacity.png"
    result = CliRunner().invoke(
        app,
        "simulate --profile h100-llama-70b --rate 1:100 --slo-tpot-ms 30 --requests 20 "
        f"--slo-ttft-ms 200 --prompt-tokens 128 --output-tokens 32 --output {picture}".split(),
    )
    assert result.exit_code == 0, result.output
    assert "estimate from a datasheet roofline, not measured" in result.output
    assert "TTFT of 200 ms and TPOT of 30 ms for 90% of the requests" in result.output
    rows = [line for line in result.output.splitlines() if line.startswith("│")]
    assert [row.split("│")[1].strip() for row in rows] == ["plain decoding", "specserve"]
    assert picture.read_bytes().startswith(PNG)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--profile nothing --rate 1:5 --slo-tpot-ms 40", "profile 'nothing' is not a file"),
        ("--profile cpu-demo --rate 5:1 --slo-tpot-ms 40", "rate is '5:1'"),
        ("--profile cpu-demo --rate 1:5 --slo-ttft-ms 0", "give one of them"),
        ("--profile cpu-demo --rate 1:5 --policy fast", "policy is 'fast'"),
        ("--profile cpu-demo --rate 1:5 --acceptance 1.2", "mean acceptance is 1.2"),
        ("--profile cpu-demo --rate 1:5 --acceptance x.npz", "neither a number nor a recording"),
        ("--profile cpu-demo --rate 1:5 --output a.txt", "must end in .png or .svg"),
        ("--profile cpu-demo --rate 1:5 --set policy.max_draft_tokens=9", "drafts of 8"),
    ],
)
def test_bad_option_is_refused_with_value_and_choices(arguments: str, message: str) -> None:
    result = CliRunner().invoke(app, ["simulate", *arguments.split()])
    assert result.exit_code == 2
    assert message in result.output


def test_answer_is_the_same_every_time() -> None:
    first, second = (Question(_options()).answer("none") for _ in range(2))
    assert [p.attainment for p in first.probes] == [p.attainment for p in second.probes]
    assert not math.isnan(first.probes[0].mean_rows)
