"""Facts about policies whose direction is known; D1 to D22 are defects of the paper's own code."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from conftest import (
    all_policies,
    drive,
    drive_fast,
    make_core,
    make_request,
    make_scheduler,
    new_policy,
    step_time,
)
from paged_lm import PagedLM

from specserve.batch import Batch, Draft, Row, StepRecord, Verified
from specserve.config import PolicyConfig
from specserve.policies import POLICIES, Policy, make_policy, needs_profile
from specserve.policies.adaptive import AdaptivePolicy
from specserve.policies.fixed import FixedPolicy
from specserve.predictor.acceptance import OnlineLogistic, logit

LEARNING = ["adaptive", "specserve"]


def make_row(max_draft_tokens: int = 8, **values: Any) -> Row:
    values = {"key": 1, "num_computed_tokens": 3, "token_ids": [1], "samples": True} | values
    return Row(**values, block_table=[0, 1, 2], max_draft_tokens=max_draft_tokens)


def play(
    policy: Policy, confidences: Sequence[Sequence[float]], num_accepted: int = 0, times: int = 1
) -> list[int]:
    """Run steps as the core does, with a draft model of these confidences in each row.

    Args:
        num_accepted: how many tokens of each row the target would agree with.

    Returns:
        How many tokens of each row were verified in the last step.
    """
    lengths: list[int] = []
    for _ in range(times):
        rows = [make_row(8, key=key, num_computed_tokens=50) for key in range(len(confidences))]
        plan = policy.plan(rows)
        drafted = [c[:n] for c, n in zip(confidences, plan.max_draft_tokens, strict=True)]
        if plan.stop_rule is not None:
            drafted = cut(plan.stop_rule.start(), drafted)
        batch = Batch(rows, plan.stop_rule)
        lengths = policy.select(batch, drafted)
        policy.observe(record_of(batch, drafted, lengths, num_accepted))
    return lengths


def cut(stopper: Any, confidences: Sequence[Sequence[float]]) -> list[list[float]]:
    """Draft under a stop rule, one token of every row still drafting at a time."""
    drafted: list[list[float]] = [[] for _ in confidences]
    begins = stopper.begins()
    active = np.array([i for i, c in enumerate(confidences) if c and begins[i]], dtype=np.int64)
    while len(active):
        newest = [confidences[i][len(drafted[i])] for i in active]
        for i, confidence in zip(active, newest, strict=True):
            drafted[i].append(confidence)
        room = np.array([len(drafted[i]) < len(confidences[i]) for i in active])
        active = active[room & stopper.goes_on(active, np.array(newest))]
    return drafted


def record_of(
    batch: Batch, drafted: Sequence[Sequence[float]], lengths: Sequence[int], num_accepted: int
) -> StepRecord:
    accepted = [min(num_accepted, length) for length in lengths]
    num_forwards = max(map(len, drafted), default=0)
    return StepRecord(
        batch,
        [Draft([7] * len(c), list(c)) for c in drafted],
        [[7] * length for length in lengths],
        [Verified([7] * n + [8]) for n in accepted],
        draft_time_s=0.0003 + 0.0004 * num_forwards,
        verify_time_s=0.010,
    )


# -- every policy ------------------------------------------------------------------------------


def test_an_unknown_policy_is_refused_naming_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"'fastest': known are .*none, fixed, adaptive"):
        make_policy(PolicyConfig(name="fastest"))


@pytest.mark.parametrize("name", [name for name in POLICIES if needs_profile(name)])
def test_a_policy_that_weighs_time_is_refused_without_a_profile(name: str) -> None:
    with pytest.raises(ValueError, match=f"policy '{name}' needs a profile: run"):
        make_policy(PolicyConfig(name=name))


@pytest.mark.parametrize("config", all_policies())
def test_select_sees_no_token_ids(config: PolicyConfig) -> None:
    """A rule that reads the token it judges bends the distribution (D14)."""
    policy = new_policy(config)
    assert list(inspect.signature(policy.select).parameters) == ["batch", "confidences"]
    assert list(inspect.signature(policy.plan).parameters) == ["rows"]


@pytest.mark.parametrize("config", all_policies())
def test_selected_tokens_are_a_prefix_of_each_draft(config: PolicyConfig) -> None:
    policy = new_policy(config)
    confidences = [[], [0.1], [0.9, 0.01, 0.99], [0.99] * 8, [0.0, 1.0]]
    for _ in range(60):  # long enough to pass through every mode a policy may have
        lengths = play(policy, confidences, num_accepted=1)
        assert all(0 <= n <= len(c) for n, c in zip(lengths, confidences, strict=True))


@pytest.mark.parametrize("config", all_policies())
def test_a_step_of_empty_drafts_is_no_trouble(config: PolicyConfig) -> None:
    """Guards against a selection that does not end when nothing is left to remove (D20)."""
    policy = new_policy(config)
    assert play(policy, [[], [], []]) == [0, 0, 0]
    assert policy.select(Batch([make_row(0)]), [[]]) == [0]
    assert play(policy, [[0.9] * 8])[0] >= 0


@pytest.mark.parametrize("config", all_policies())
def test_no_policy_plans_beyond_the_hard_cap(config: PolicyConfig) -> None:
    capped = PolicyConfig(
        name=config.name, num_draft_tokens=config.num_draft_tokens, max_draft_tokens=3
    )
    plan = new_policy(capped).plan([make_row(), make_row()])
    assert len(plan.max_draft_tokens) == 2
    assert max(plan.max_draft_tokens) <= 3


@pytest.mark.parametrize("config", all_policies())
def test_a_fixed_length_that_was_asked_for_is_drafted_and_verified_in_full(
    config: PolicyConfig,
) -> None:
    core = make_core(config, draft=PagedLM(noise=4.0))
    requests = [make_request([i, 2], 30, num_draft_tokens=3) for i in range(4)]
    for request in requests:
        core.scheduler.submit(request)
    core.step()
    for _ in range(6):
        core.step()
        for request in requests:
            if request.max_tokens - request.num_output_tokens > 4:
                assert request.num_drafted_tokens == request.num_verified_tokens
                assert request.num_drafted_tokens % 3 == 0
    assert core.stats.num_verified_tokens >= 6 * 4 * 3 - 12


@pytest.mark.parametrize("config", all_policies())
def test_a_client_that_asks_for_a_huge_draft_harms_nobody(config: PolicyConfig) -> None:
    core = make_core(config, num_blocks=200)
    greedy = make_request([1, 2], 200, num_draft_tokens=150)
    requests = [greedy, *(make_request([i, 3], 20) for i in range(3))]
    drive(core, requests)
    assert all(request.num_output_tokens == request.max_tokens for request in requests)


# -- fixed -------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", range(9))
def test_fixed_gives_every_row_k_and_verifies_all_of_it(k: int) -> None:
    policy = FixedPolicy(k)
    assert policy.plan([make_row(), make_row(2)]).max_draft_tokens == [k, k]
    assert play(policy, [[0.01] * 8, [0.99] * 8, [0.5]]) == [k, k, min(k, 1)]


def test_none_never_drafts() -> None:
    core = make_core("none")
    drive(core, [make_request([1, 2], 10)])
    assert core.stats.num_drafted_tokens == 0


@pytest.mark.parametrize(
    ("cls", "arguments", "message"),
    [
        (FixedPolicy, (-1,), "num_draft_tokens is -1"),
        (AdaptivePolicy, (-1, 0.5), "max_draft_tokens is -1"),
        (AdaptivePolicy, (4, 1.5), r"min_survival is 1.5: must be in \[0, 1\]"),
        (AdaptivePolicy, (4, float("nan")), "min_survival is nan"),
    ],
)
def test_policy_parameters_without_meaning_are_refused(
    cls: type, arguments: tuple[float, ...], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        cls(*arguments)


# -- policies that learn -----------------------------------------------------------------------


def test_adaptive_does_not_verify_the_token_at_which_a_row_stopped() -> None:
    """It was drafted to be judged, and failed (D6)."""
    assert play(new_policy("adaptive"), [[0.99, 0.99, 0.01, 0.99]]) == [2]
    assert play(new_policy("adaptive"), [[0.01, 0.99]]) == [0]


@pytest.mark.parametrize("confidence", [0.3, 0.5, 0.7])
def test_the_survival_rule_ends_a_draft_where_select_would_cut_it(confidence: float) -> None:
    """Drafting further than that costs forwards for nothing."""
    policy = new_policy("adaptive")
    rows = [make_row()]
    (drafted,) = cut(policy.plan(rows).stop_rule.start(), [[confidence] * 8])
    (kept,) = policy.select(Batch(rows), [drafted])
    assert kept == len(drafted) - 1 < 8


@pytest.mark.parametrize("name", LEARNING)
def test_a_fixed_length_is_verified_in_full_however_dear_and_unlikely_it_is(name: str) -> None:
    policy = make_policy(PolicyConfig(name=name), step_time(num_free_tokens=1, token_s=0.01))
    rows = [make_row(6, key=0, has_fixed_draft=True), make_row(6, key=1)]
    plan = policy.plan(rows)
    drafted = [[0.1] * 6, [0.1] * 6]
    if plan.stop_rule is not None:
        drafted = cut(plan.stop_rule.start(), drafted)
    assert len(drafted[0]) == 6
    assert policy.select(Batch(rows, plan.stop_rule), drafted) == [6, 0]


@pytest.mark.parametrize("name", LEARNING)
def test_rows_with_different_confidence_get_different_lengths(name: str) -> None:
    """One sure row must not make the others draft (D7)."""
    policy = make_policy(PolicyConfig(name=name), step_time(num_free_tokens=1, token_s=0.0005))
    sure, *unsure = play(policy, [[0.999] * 8] + [[0.05] * 8] * 3)
    assert sure == 8
    assert max(unsure) <= 2


@pytest.mark.parametrize("name", LEARNING)
def test_drafts_shorten_as_acceptance_falls_to_nothing(name: str) -> None:
    policy = new_policy(name)
    (before,) = play(policy, [[0.9] * 8])
    play(policy, [[0.9] * 8], num_accepted=0, times=200)
    later = [play(policy, [[0.9] * 8], num_accepted=0)[0] for _ in range(40)]
    assert before >= 2
    assert sum(later) <= 4, "it may look now and then whether acceptance is back"


@pytest.mark.parametrize("name", LEARNING)
def test_drafts_lengthen_as_everything_is_accepted(name: str) -> None:
    policy = new_policy(name)
    rows = [[0.3] * 8] * 2
    before = play(policy, rows, num_accepted=8)
    after = play(policy, rows, num_accepted=8, times=200)
    assert sum(after) > sum(before)


@pytest.mark.parametrize("name", LEARNING)
def test_a_drafter_always_sure_and_half_right_leads_to_short_drafts(name: str) -> None:
    """Raw confidence is no acceptance (D8)."""
    half, right = new_policy(name), new_policy(name)
    for i in range(400):
        play(half, [[0.999] * 8], num_accepted=(0, 1, 0, 2, 0, 1, 0, 3)[i % 8])
        play(right, [[0.999] * 8], num_accepted=8)
    (short,), (long,) = play(half, [[0.999] * 8]), play(right, [[0.999] * 8])
    assert long == 8
    assert short <= 5


@pytest.mark.parametrize("name", LEARNING)
def test_one_rejection_does_not_end_speculation(name: str) -> None:
    """Guards the first steps of the calibration, when a single outcome weighs most."""
    policy = new_policy(name)
    play(policy, [[0.999] * 8], num_accepted=0)
    assert play(policy, [[0.999] * 8])[0] >= 1


@pytest.mark.parametrize("name", LEARNING)
def test_speculation_comes_back_after_acceptance_recovers(name: str) -> None:
    """A closed gate must reopen (D9): nothing verified, nothing learned, for ever."""
    policy = new_policy(name)
    play(policy, [[0.9] * 8] * 2, num_accepted=0, times=300)
    back = [sum(play(policy, [[0.9] * 8] * 2, num_accepted=8)) for _ in range(1000)]
    assert min(back[-20:]) >= 2


@pytest.mark.parametrize("name", LEARNING)
def test_a_better_draft_model_is_asked_for_more(name: str) -> None:
    def tokens_per_verification(noise: float) -> float:
        core = make_core(name, target=PagedLM(scale=2.0), draft=PagedLM(scale=2.0, noise=noise))
        drive(core, [make_request([i, 2], 60) for i in range(8)])
        return core.stats.num_verified_tokens / core.stats.num_base_tokens

    good, useless = map(tokens_per_verification, (0.0, 40.0))
    assert good > 1.2 * useless


@pytest.mark.parametrize("num_rows", [1, 8, 30, 40])
def test_dearer_verification_never_lengthens_drafts(num_rows: int) -> None:
    """The more rows in the step, the fewer tokens each has before they cost 1 ms apiece."""
    rows = [[0.8] * 8] * num_rows
    alone = play(new_policy("specserve"), [[0.8] * 8], num_accepted=4)
    together = play(new_policy("specserve"), rows, num_accepted=4)
    assert max(together) <= alone[0]


def test_the_controller_forgets_finished_requests() -> None:
    policy = new_policy("specserve")
    play(policy, [[0.9] * 8] * 3, num_accepted=2, times=3)
    assert policy.acceptances.greedy._requests
    policy.release([0, 1, 2, 99])
    assert policy.acceptances.greedy._requests == {}


def test_predictors_of_two_tests_share_nothing() -> None:
    first = step_time()
    for _ in range(50):
        first.observe_verify(8, first.verify_s(8, 100), 1.0)
    assert first.verify_s(8, 100) > 2 * step_time().verify_s(8, 100)


# -- calibration -------------------------------------------------------------------------------


def features(*confidences: float) -> np.ndarray:
    """Lay out what the adaptive policy's calibration sees."""
    return np.stack([np.ones(len(confidences)), logit(np.array(confidences))], axis=1)


def calibration() -> OnlineLogistic:
    return AdaptivePolicy(8, 0.35).acceptance


def test_logit_is_finite() -> None:
    assert np.abs(logit(np.array([0.0, 1.0, 1e-12, 0.5]))).max() < 10


def test_more_confidence_is_more_acceptance() -> None:
    values = calibration().predict(features(*np.linspace(0.0, 1.0, 21)))
    assert (np.diff(values) >= 0).all()


def test_calibration_learns_a_logistic_truth() -> None:
    """Acceptance .9 at confidence .9 and .2 at .3, in a fixed pattern: no chance involved."""
    model = calibration()
    for i in range(2000):
        model.observe(features(0.9, 0.3), np.array([i % 10 != 0, i % 5 == 0], dtype=float))
    assert model.predict(features(0.9, 0.3)) == pytest.approx([0.9, 0.2], abs=0.05)


def test_calibration_learns_that_a_sure_drafter_is_half_right() -> None:
    model = calibration()
    for i in range(400):
        model.observe(features(0.999), np.array([float(i % 2)]))
    assert model.predict(features(0.999))[0] == pytest.approx(0.5, abs=0.1)


def test_calibration_stays_finite_under_extreme_confidence() -> None:
    model = calibration()
    for i in range(3000):
        model.observe(features(float(i % 2)), np.array([float(i % 3 == 0)]))
    assert np.isfinite(model.weights).all()
    assert np.abs(model.weights).max() < 50


def test_calibration_forgets_what_is_no_longer_true() -> None:
    model = calibration()
    for outcome in (0.0, 1.0):
        for _ in range(5000):
            model.observe(features(0.9), np.array([outcome]))
    assert model.predict(features(0.9))[0] > 0.8


def test_only_tokens_that_the_target_really_judged_are_learned_from() -> None:
    """Behind the first rejected token nothing is known; an unverified token is no rejection."""
    seen: list[tuple[float, float]] = []

    class Recorder(OnlineLogistic):
        def observe(self, x: np.ndarray, outcomes: np.ndarray) -> np.ndarray:
            seen.extend(zip(x[:, 1].tolist(), outcomes.tolist(), strict=True))
            return outcomes

    policy = AdaptivePolicy(8, 0.35)
    policy.acceptance = Recorder((1.0, 0.8))
    draft = Draft([1, 2, 3, 4], [0.9, 0.8, 0.7, 0.6])
    record = StepRecord(
        Batch([make_row(), make_row()]),
        [draft, draft],
        [[1, 2, 3], [1, 2]],
        [Verified([1, 9]), Verified([1, 2, 9])],
        0.0,
        0.0,
    )
    policy.observe(record)
    z = logit(np.array([0.9, 0.8])).tolist()
    assert seen == [(z[0], 1.0), (z[1], 0.0), (z[0], 1.0), (z[1], 1.0)]


@pytest.mark.parametrize("name", LEARNING)
def test_a_policy_plans_nothing_where_the_request_forbids_it(name: str) -> None:
    scheduler = make_scheduler(name)
    scheduler.submit(make_request([1], 20, max_draft_tokens=0))
    batch = scheduler.schedule(0.0)
    assert batch.rows[0].max_draft_tokens == 0
    assert batch.stop_rule is None


def test_adaptive_verification_takes_lookups_once_it_has_warmed_up() -> None:
    """It failed 300 steps into a run: a lookup was not among what a step may verify."""
    core = make_core("adaptive_verification", num_blocks=256, max_num_seqs=8)
    sources = ("model", "ngram")
    requests = [
        make_request([1 + i % 9, 2, 3, 2, 3], 60, draft_source=sources[i % 2]) for i in range(96)
    ]
    outputs = drive_fast(core, requests)
    assert {len(output) for output in outputs} == {60}
    assert core.stats.num_steps > 300
