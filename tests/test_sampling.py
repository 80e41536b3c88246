"""Every filter against a plain implementation of its definition, and agreement with a draft."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
from conftest import ACCEPTANCE_TABLE
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import log_softmax, softmax
from scipy.stats import chisquare, kstest

from bench.reference import reference_logits, reference_probs
from specserve import sampling
from specserve.sampling import Noise
from specserve.sampling_params import MAX_SEED, SamplingParams

VOCAB_SIZE = 23
FALSE_ALARM = 1e-6
END_ID = 4


def random_logits(num_rows: int, seed: int = 0, spread: float = 3.0) -> sampling.Floats:
    """Return logits without ties."""
    values = np.random.default_rng(seed).normal(0.0, spread, (num_rows, VOCAB_SIZE))
    return values.astype(np.float32)


def probs_of(logits: sampling.Floats, *params: SamplingParams) -> sampling.Floats:
    """Return the distributions of rows, each with its own parameters."""
    return sampling.target_probs(logits, params)


def adjusted(
    params: SamplingParams,
    token_ids: list[int],
    num_prompt_tokens: int,
    draft: list[int],
    logits: sampling.Floats | None = None,
) -> sampling.Floats:
    """Adjust given or random logits of a draft's positions."""
    rows = random_logits(len(draft) + 1) if logits is None else logits
    return sampling.adjust_logits(rows, params, token_ids, num_prompt_tokens, draft)


# -- filters -----------------------------------------------------------------------------------

FILTERS = [
    {"temperature": 0.3},
    {"temperature": 1.0},
    {"temperature": 5.0},
    {"temperature": 1.0, "top_k": 1},
    {"temperature": 1.0, "top_k": 5},
    {"temperature": 1.0, "top_k": VOCAB_SIZE},
    {"temperature": 1.0, "top_k": 1000},
    {"temperature": 1.0, "top_p": 0.01},
    {"temperature": 0.7, "top_p": 0.8},
    {"temperature": 1.0, "top_p": 1.0},
    {"temperature": 1.0, "min_p": 0.1},
    {"temperature": 2.0, "min_p": 1.0},
    {"temperature": 1.5, "min_p": 0.02, "top_k": 9, "top_p": 0.9},
    {"temperature": 1.5, "top_k": 4, "top_p": 0.9},
]


@pytest.mark.parametrize("values", FILTERS, ids=str)
def test_each_filter_does_what_its_definition_says(values: dict[str, float]) -> None:
    params, logits = SamplingParams(**values), random_logits(20)
    probs = probs_of(logits, *[params] * 20)
    expected = [reference_probs(row.tolist(), params) for row in logits]
    np.testing.assert_allclose(probs, expected, atol=2e-6)


def test_rows_of_a_batch_do_not_see_each_others_parameters() -> None:
    """A row's distribution must not depend, in any bit, on what else is in the step."""
    params = [SamplingParams(**values) for values in FILTERS]
    logits = random_logits(len(params))
    together = probs_of(logits, *params)
    for i, own in enumerate(params):
        assert (probs_of(logits[i : i + 1], own)[0] == together[i]).all()


def test_top_k_counts_after_min_p_and_top_p_after_both() -> None:
    logits = np.log(np.array([[0.4, 0.3, 0.2, 0.1]], dtype=np.float32))
    params = SamplingParams(temperature=1.0, min_p=0.3, top_k=2, top_p=0.57)
    # min-p leaves .4 .3 .2, top-k .4 .3, which is .571 .429: the first alone reaches .57
    np.testing.assert_allclose(probs_of(logits, params), [[1.0, 0.0, 0.0, 0.0]])


def test_ties_at_a_border_are_kept() -> None:
    logits = np.zeros((2, 4), dtype=np.float32)
    top_k = SamplingParams(temperature=1.0, top_k=2)
    top_p = SamplingParams(temperature=1.0, top_p=0.5)
    np.testing.assert_allclose(probs_of(logits, top_k, top_p), np.full((2, 4), 0.25))


finite = st.floats(-60.0, 60.0, width=32)


@given(
    row=st.lists(finite, min_size=1, max_size=30),
    temperature=st.floats(0.01, 100.0),
    top_k=st.integers(0, 40),
    top_p=st.floats(1e-6, 1.0),
    min_p=st.floats(0.0, 1.0),
)
def test_rows_sum_to_one_and_the_most_likely_token_survives(
    row: list[float], temperature: float, top_k: int, top_p: float, min_p: float
) -> None:
    logits = np.array([row], dtype=np.float32)
    params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    probs = probs_of(logits, params)[0]
    assert probs.sum() == pytest.approx(1.0, abs=1e-5)
    assert (probs >= 0).all()
    assert probs[logits[0].argmax()] == probs.max() > 0
    assert (probs > 0).sum() <= len(row)


@pytest.mark.parametrize("temperature", [1e-3, 1e-30, 1e-38, 1e-45, 5e-324])
def test_a_tiny_temperature_is_nearly_greedy(temperature: float) -> None:
    """Guards against overflow: logits / temperature must not end as infinity - infinity."""
    logits = random_logits(5)
    probs = probs_of(logits, *[SamplingParams(temperature=temperature)] * 5)
    assert probs[np.arange(5), logits.argmax(axis=1)].tolist() == pytest.approx([1.0] * 5)


def test_impossible_tokens_stay_impossible() -> None:
    logits = random_logits(3)
    logits[:, :20] = -np.inf
    probs = probs_of(logits, *[SamplingParams(temperature=1.0, top_k=22, top_p=0.99)] * 3)
    assert (probs[:, :20] == 0).all()
    np.testing.assert_allclose(probs.sum(axis=1), 1.0, rtol=1e-6)


# -- what comes before the temperature ---------------------------------------------------------

ADJUSTMENTS = [
    {"repetition_penalty": 1.5},
    {"repetition_penalty": 0.6},
    {"presence_penalty": 1.1},
    {"frequency_penalty": 0.8},
    {"presence_penalty": -0.5, "frequency_penalty": -0.7, "repetition_penalty": 1.2},
    {"logit_bias": ((3, 2.5), (3, 1.0), (6, -math.inf))},
    {"end_id": END_ID, "min_tokens": 5},
    {"bad_words": ((1,), (2, 5), (7, 2, 5), (2, 2))},
    {
        "repetition_penalty": 1.3, "presence_penalty": 0.4, "frequency_penalty": 0.2,
        "logit_bias": ((2, -1.0),), "end_id": END_ID, "min_tokens": 6, "bad_words": ((7, 2),),
    },
]  # fmt: skip


@pytest.mark.parametrize("values", ADJUSTMENTS, ids=str)
@pytest.mark.parametrize("draft", [[], [2], [7, 2, 5, 2, 2]], ids=str)
def test_each_position_is_adjusted_given_the_draft_before_it(
    values: dict[str, Any], draft: list[int]
) -> None:
    params, known, num_prompt = SamplingParams(**values), [7, 2, 9, 2, 7], 3
    logits = random_logits(len(draft) + 1)
    rows = adjusted(params, known, num_prompt, draft, logits)
    for i, row in enumerate(rows):
        context = [*known, *draft[:i]]
        expected = reference_logits(logits[i].tolist(), params, context, num_prompt)
        np.testing.assert_allclose(row, expected, rtol=1e-5, atol=1e-6)


def test_the_models_own_logits_are_not_changed() -> None:
    logits = random_logits(2)
    before = logits.copy()
    params = SamplingParams(repetition_penalty=2.0, logit_bias=((1, 1.0),), bad_words=((2,),))
    adjusted(params, [1, 2], 1, [3], logits)
    assert (logits == before).all()


def test_presence_and_frequency_count_output_tokens_only() -> None:
    logits = random_logits(1)
    params = SamplingParams(presence_penalty=1.0, frequency_penalty=1.0)
    assert (adjusted(params, [3, 3, 3], 3, [], logits) == logits).all()


def test_repetition_penalty_makes_seen_tokens_less_likely_whatever_their_sign() -> None:
    logits = np.array([[2.0, -2.0, 2.0, -2.0]], dtype=np.float32)
    rows = sampling.adjust_logits(logits, SamplingParams(repetition_penalty=2.0), [0, 1], 1, [])
    assert rows.tolist() == [[1.0, -4.0, 2.0, -2.0]]


def test_bad_word_is_masked_only_where_its_beginning_stands() -> None:
    params = SamplingParams(bad_words=((5, 6, 7),))
    rows = adjusted(params, [1, 5], 1, [6, 9, 5, 6])
    masked = [bool(np.isneginf(row[7])) for row in rows]
    assert masked == [False, True, False, False, True]
    assert np.isneginf(rows).sum() == 2


def test_bad_word_may_begin_in_the_prompt() -> None:
    rows = adjusted(SamplingParams(bad_words=((5, 6, 7),)), [5, 6], 2, [])
    assert np.isneginf(rows[0, 7])


def test_bad_word_longer_than_the_text_masks_nothing() -> None:
    params = SamplingParams(bad_words=((1, 2, 3, 4),))
    assert not np.isneginf(adjusted(params, [3], 1, [])).any()


@pytest.mark.parametrize("num_output", range(6))
def test_end_token_is_possible_from_min_tokens_on(num_output: int) -> None:
    params = SamplingParams(end_id=END_ID, min_tokens=3)
    rows = adjusted(params, [END_ID, 1] + [2] * num_output, 2, [9, 9])
    masked = [bool(np.isneginf(row[END_ID])) for row in rows]
    # Row i samples output token number num_output + i, counted from 0.
    assert masked == [num_output + i < 3 for i in range(3)]


# -- drawing -----------------------------------------------------------------------------------


def test_noise_is_a_function_of_seed_and_position_alone() -> None:
    together = Noise(17).rows(42, 0, 100)
    noise, start = Noise(17), 0
    for length in itertools.cycle([1, 3, 25, 7]):
        stop = min(start + length, 100)
        noise.rows(5, start, stop)  # another request's, in between
        assert (noise.rows(42, start, stop) == together[start:stop]).all()
        start = stop
        if start == 100:
            break
    assert (noise.rows(42, 10, 20) == together[10:20]).all(), "an earlier position may come again"


@pytest.mark.parametrize("seed", [0, 1, 2**32, 2**63, MAX_SEED])
def test_every_seed_has_noise_of_its_own(seed: int) -> None:
    values = Noise(200).rows(seed, 0, 100)
    assert (values > 0).all()
    assert kstest(values.ravel(), "expon").pvalue > FALSE_ALARM
    assert not (values == Noise(200).rows((seed + 1) % MAX_SEED, 0, 100)).any()


def test_noise_of_neighbouring_seeds_and_positions_is_independent() -> None:
    noise = Noise(1)
    first = np.array([noise.rows(seed, 0, 2)[:, 0] for seed in range(2000)])
    assert abs(np.corrcoef(first[:-1, 0], first[1:, 0])[0, 1]) < 0.12  # 5 standard errors
    assert abs(np.corrcoef(first[:, 0], first[:, 1])[0, 1]) < 0.12


@given(
    weights=st.lists(st.sampled_from([0.0, 1e-30, 1e-8, 0.1, 1.0]), min_size=1, max_size=20).filter(
        any
    ),
    seed=st.integers(0, MAX_SEED),
)
def test_an_impossible_token_is_never_drawn(weights: list[float], seed: int) -> None:
    probs = np.array([weights], dtype=np.float32)
    token_id = sampling.sample(probs, Noise(len(weights)).rows(seed, 0, 1))[0]
    assert probs[0, token_id] > 0


def test_tokens_are_drawn_as_often_as_they_are_likely() -> None:
    probs = np.array([0.1, 0.0, 0.6, 0.3 - 1e-3, 1e-3], dtype=np.float32)
    drawn = sampling.sample(np.tile(probs, (20000, 1)), Noise(5).rows(0, 0, 20000))
    counts = np.bincount(drawn, minlength=5)
    assert counts[1] == 0
    assert chisquare(counts[probs > 0], 20000 * probs[probs > 0]).pvalue > FALSE_ALARM


@given(seed=st.integers(0, MAX_SEED), spread=st.floats(0.1, 8.0))
def test_the_lead_is_what_the_runner_up_lacks(seed: int, spread: float) -> None:
    probs = softmax(random_logits(4, spread=spread), axis=1)
    noise = Noise(probs.shape[1]).rows(seed, 0, 4)
    token_ids = sampling.sample(probs, noise)
    for row, times, winner, value in zip(
        probs, noise, token_ids, sampling.lead(probs, noise, token_ids), strict=True
    ):
        fastest, second = sorted(times / row)[:2]
        assert fastest == times[winner] / row[winner]
        assert value == pytest.approx(1.0 - fastest / second, abs=1e-6)


@pytest.mark.parametrize("distance", [0.0, 0.3, 1.0, 3.0])
def test_two_that_draw_with_the_same_noise_mostly_draw_the_same(distance: float) -> None:
    """At least (1 - d) / (1 + d) of the time, d the total variation distance (arXiv 2408.07978)."""
    n = 4000
    target = np.tile(random_logits(1, spread=2.0), (n, 1))
    draft = target + distance * random_logits(1, spread=1.0)
    probs = [softmax(logits, axis=1).astype(np.float32) for logits in (target, draft)]
    noise = Noise(target.shape[1]).rows(3, 0, n)
    same = (sampling.sample(probs[0], noise) == sampling.sample(probs[1], noise)).mean()
    d = 0.5 * np.abs(probs[0][0] - probs[1][0]).sum()
    assert same >= (1 - d) / (1 + d) - 5 * 0.5 / math.sqrt(n)
    assert distance > 0 or same == 1.0


# -- agreement and log-probabilities -----------------------------------------------------------


@pytest.mark.parametrize(("draft", "target", "expected"), ACCEPTANCE_TABLE)
def test_agreement(draft: list[int], target: list[int], expected: list[int]) -> None:
    assert sampling.agree(target, draft) == expected


def test_a_dropped_draft_token_is_not_emitted_as_accepted() -> None:
    """Guards D16: the target is asked about two of three draft tokens; all three would match."""
    assert sampling.agree([1, 2, 3], [1, 2]) == [1, 2, 3]
    assert sampling.agree([1, 2], [1]) == [1, 2]


def test_log_probs_are_the_models_own() -> None:
    logits = random_logits(6, spread=20.0)
    token_ids = [0, 5, 22, 7, 7, 1]
    expected = log_softmax(logits.astype(np.float64), axis=1)[np.arange(6), token_ids]
    np.testing.assert_allclose(sampling.log_probs(logits, token_ids), expected, rtol=1e-6)
    assert sampling.log_probs(logits[:0], []) == []


# -- parameters --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1), ("temperature", math.nan), ("temperature", math.inf),
        ("top_k", -1), ("top_p", 0.0), ("top_p", 1.01), ("top_p", math.nan),
        ("min_p", -0.1), ("min_p", 1.1), ("repetition_penalty", 0.0),
        ("repetition_penalty", math.inf), ("presence_penalty", math.nan),
        ("presence_penalty", 101.0), ("frequency_penalty", -math.inf), ("min_tokens", -1),
        ("seed", -1), ("seed", MAX_SEED + 1),
    ],
)  # fmt: skip
def test_parameter_without_meaning_is_refused_with_value_limit_and_fix(
    name: str, value: float
) -> None:
    with pytest.raises(ValueError, match=rf"{name} is .*: must be in .*\(.+\)"):
        SamplingParams(**{name: value})


@pytest.mark.parametrize("bias", [math.nan, math.inf])
def test_bias_without_meaning_is_refused(bias: float) -> None:
    with pytest.raises(ValueError, match="token 7"):
        SamplingParams(logit_bias=((7, bias),))


def test_default_is_plain_greedy() -> None:
    params = SamplingParams()
    assert params.is_greedy
    assert not params.changes_logits


def test_top_k_of_one_is_greedy_at_any_temperature() -> None:
    assert SamplingParams(temperature=2.0, top_k=1).is_greedy
