"""The baseline policies do what their sources do, faults included: worked examples, by hand."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from conftest import drive, make_core, make_request, new_policy
from numpy.typing import NDArray

from specserve.batch import Batch, Draft, Row, StepRecord, Verified
from specserve.config import PolicyConfig
from specserve.policies import Policy, make_policy, needs_profile
from specserve.policies.adaptive_verification import (
    AcceptanceEstimator,
    AdaptiveVerificationPolicy,
    largest_survivals,
)
from specserve.policies.adaspec import (
    AdaSpecReleased,
    AdaSpecRepaired,
    eliminate_as_released,
    keep_largest,
    smaller_graph,
)
from specserve.policies.baseline_costs import StepCosts
from specserve.policies.baseline_rules import (
    RULES,
    BestLengthRule,
    BestLengthStopper,
    GoodputRule,
    GoodputStopper,
    Lengths,
    ThresholdRule,
)
from specserve.policies.smartspec import SmartSpecPolicy, expected_tokens
from specserve.policies.threshold import ThresholdPolicy
from specserve.predictor.acceptance import logit, sigmoid
from specserve.predictor.prompts import Prompts
from specserve.predictor.step_time import StepTimeModel
from specserve.stop_rules import decode_rule, encode_rule

Floats = NDArray[np.float64]

BASELINES = [
    pytest.param(PolicyConfig(name="threshold"), id="threshold"),
    pytest.param(
        PolicyConfig(name="threshold", confidence_threshold=0.6, threshold_of_mean=True),
        id="threshold of the mean",
    ),
    pytest.param(PolicyConfig(name="smartspec"), id="smartspec"),
    pytest.param(PolicyConfig(name="smartspec", as_in_adaspec=True), id="smartspec in adaspec"),
    pytest.param(PolicyConfig(name="adaspec_released"), id="adaspec released"),
    pytest.param(PolicyConfig(name="adaspec_released", slo_check=True), id="released, slo"),
    pytest.param(PolicyConfig(name="adaspec_repaired"), id="adaspec repaired"),
    pytest.param(PolicyConfig(name="adaptive_verification"), id="adaptive verification"),
]


class Table(StepTimeModel):
    """A predictor that is looked up: any verification time, a constant draft forward."""

    def __init__(
        self, verify: Callable[[int], float], forward_s: float = 0.2, call_s: float = 0.0
    ) -> None:
        self.verify = verify
        self.per_forward_s = forward_s
        self.call_s = call_s
        self.asked: list[tuple[int, int, int, int]] = []

    def verify_curve(
        self, num_tokens: int, num_more: int, context_tokens: int, num_prompt_tokens: int = 0
    ) -> Floats:
        self.asked.append((num_tokens, num_more, context_tokens, num_prompt_tokens))
        return np.array([self.verify(n) for n in range(num_tokens, num_tokens + num_more + 1)])

    def forward_curve(self, num_rows: int, context_tokens: int = 0) -> Floats:
        return np.array([0.0] + [self.per_forward_s] * num_rows)

    def draft_s(
        self,
        rows_of_forwards: Sequence[int],
        num_catch_up_tokens: int = 0,
        context_tokens: int = 0,
    ) -> float:
        forwards = self.per_forward_s * len(rows_of_forwards)
        return forwards + self.call_s if rows_of_forwards else 0.0


def staircase(*seconds: float, start: int = 4) -> Callable[[int], float]:
    """Return the time of the smallest graph of start, 2 start, 4 start, ... that fits."""
    return lambda n: seconds[max(0, math.ceil(math.log2(n / start)))]


D5 = staircase(10.0, 11.0, 18.0, 30.0)


def make_row(max_draft_tokens: int = 8, **values: Any) -> Row:
    values = {"key": 1, "num_computed_tokens": 3, "token_ids": [1], "samples": True} | values
    return Row(**values, block_table=[0, 1, 2], max_draft_tokens=max_draft_tokens)


def make_rows(num_rows: int, max_draft_tokens: int = 8) -> list[Row]:
    return [make_row(max_draft_tokens, key=key) for key in range(num_rows)]


def take_step(
    policy: Policy, rows: list[Row], sure: Sequence[Sequence[float]], accepted: int = 0
) -> tuple[list[list[float]], list[int]]:
    """Take a step; return confidences of what was drafted, and the lengths chosen.

    The loop is the draft engine's, and the rule travels as it does between processes.

    Args:
        sure: confidence of each row's first, second, ... token.
        accepted: tokens of each row's draft, at most.
    """
    plan = policy.plan(rows)
    for row, cap in zip(rows, plan.max_draft_tokens, strict=True):
        row.max_draft_tokens = cap if row.has_fixed_draft else min(row.max_draft_tokens, cap)
    batch = Batch(rows, plan.stop_rule)
    drafts: list[list[float]] = [[] for _ in rows]
    active = np.array([i for i, row in enumerate(rows) if row.max_draft_tokens], dtype=int)
    stopper = decode_rule(encode_rule(plan.stop_rule)).start() if plan.stop_rule else None
    if stopper:
        active = active[stopper.begins()[active]]
    while len(active):
        newest = np.array([sure[i][len(drafts[i])] for i in active])
        for i, confidence in zip(active, newest.tolist(), strict=True):
            drafts[i].append(confidence)
        on = np.array([len(drafts[i]) < rows[i].max_draft_tokens for i in active])
        if stopper:
            on &= stopper.goes_on(active, newest)
        active = active[on]
    lengths = policy.select(batch, drafts)
    policy.observe(make_record(batch, drafts, lengths, accepted))
    return drafts, lengths


def make_record(
    batch: Batch, drafts: list[list[float]], lengths: list[int], accepted: int
) -> StepRecord:
    outputs = [
        Verified([7] * (min(accepted, n) + 1) if row.samples else [])
        for row, n in zip(batch.rows, lengths, strict=True)
    ]
    return StepRecord(
        batch,
        [Draft([7] * len(values), values) for values in drafts],
        [[7] * n for n in lengths],
        outputs,
        0.001,
        0.002,
    )


def num_drafted(drafts: Sequence[Sequence[float]]) -> list[int]:
    return [len(values) for values in drafts]


# -- every baseline ----------------------------------------------------------------------------


@pytest.mark.parametrize("config", BASELINES)
def test_output_is_that_of_plain_decoding(config: PolicyConfig) -> None:
    """Prompts in chunks beside decoding rows, uneven ends, a fixed draft length among them."""

    def requests() -> list[Any]:
        lengths = [(3, 20), (30, 5), (1, 2), (17, 31), (2, 12)]
        return [
            make_request([1 + i % 5] * prompt, output, num_draft_tokens=3 if i == 4 else None)
            for i, (prompt, output) in enumerate(lengths)
        ]

    limits = {"prefill_chunk_tokens": 8, "num_blocks": 128}
    expected = drive(make_core("none", **limits), requests(), arrivals=[0, 0, 3, 5, 5])
    mine = requests()
    assert drive(make_core(config, **limits), mine, arrivals=[0, 0, 3, 5, 5]) == expected
    assert mine[4].num_drafted_tokens == mine[4].num_verified_tokens > 0


@pytest.mark.parametrize("config", BASELINES)
def test_a_fixed_length_is_left_alone(config: PolicyConfig) -> None:
    rows = [*make_rows(2), make_row(5, key=9, has_fixed_draft=True)]
    drafts, lengths = take_step(new_policy(config), rows, [[0.01] * 8] * 3, accepted=5)
    assert (len(drafts[2]), lengths[2]) == (5, 5)


@pytest.mark.parametrize("config", BASELINES)
def test_only_fixed_lengths_are_left_alone_too(config: PolicyConfig) -> None:
    rows = [make_row(n, key=n, has_fixed_draft=True) for n in (1, 4)]
    drafts, lengths = take_step(new_policy(config), rows, [[0.01] * 8] * 2)
    assert num_drafted(drafts) == lengths == [1, 4]


@pytest.mark.parametrize("config", BASELINES)
def test_caps_of_rows_hold(config: PolicyConfig) -> None:
    """Near its end a row may draft less than the others, or nothing (D17)."""
    rows = [make_row(n, key=n) for n in (0, 1, 3, 8)]
    drafts, lengths = take_step(new_policy(config), rows, [[0.99] * 8] * 4, accepted=8)
    assert all(n <= most for n, most in zip(num_drafted(drafts), (0, 1, 3, 8), strict=True))
    assert all(n <= len(values) for n, values in zip(lengths, drafts, strict=True))


@pytest.mark.parametrize("config", BASELINES)
def test_empty_drafts_are_no_trouble(config: PolicyConfig) -> None:
    """The draft engine failed, nobody may draft, or there is nobody."""
    policy = new_policy(config)
    rows = make_rows(3)
    plan = policy.plan(rows)
    assert policy.select(Batch(rows, plan.stop_rule), [[], [], []]) == [0, 0, 0]
    assert policy.plan(make_rows(2, 0)).max_draft_tokens == [0, 0]
    assert policy.select(Batch(make_rows(2, 0)), [[], []]) == [0, 0]
    policy.observe(make_record(Batch(rows), [[], [], []], [0, 0, 0], 0))
    assert policy.plan([]).max_draft_tokens == []
    policy.release([1, 2, 77])


@pytest.mark.parametrize("config", BASELINES)
def test_prompt_rows_do_not_draft(config: PolicyConfig) -> None:
    rows = [
        make_row(0, key=1, token_ids=[1] * 9, samples=False),
        make_row(0, key=2, token_ids=[1] * 4),
        *(make_row(8, key=key) for key in (3, 4)),
    ]
    policy = new_policy(config)
    for _ in range(3):
        drafts, lengths = take_step(policy, rows, [[0.9] * 8] * 4, accepted=2)
        assert num_drafted(drafts)[:2] == lengths[:2] == [0, 0]


def test_a_step_is_priced_with_its_prompt_tokens_and_fixed_drafts() -> None:
    table = Table(D5, call_s=0.5)
    rows = [
        make_row(0, token_ids=[1] * 5, samples=False, num_computed_tokens=7),
        make_row(0, token_ids=[1] * 3, num_computed_tokens=0),
        make_row(2, num_computed_tokens=20),
        make_row(9, num_computed_tokens=30),
        make_row(4, num_computed_tokens=40, has_fixed_draft=True),
    ]
    costs = StepCosts.of(table, rows, 8)
    # 5 + 3 + 1 + 1 + 1 base tokens and 4 fixed; 2 + 8 to decide on; 5 + 2 need no logits
    assert table.asked == [(15, 10, 97, Prompts(7, 5 * 7 + 5 * 5 // 2 + 2))]
    assert costs.base_yield == 4.0
    assert costs.caps.tolist() == [0, 0, 2, 8, 0]
    assert costs.step_s(0) == D5(15)
    assert costs.step_s(3) == pytest.approx(0.5 + 3 * 0.2 + D5(15 + 2 + 3))


@pytest.mark.parametrize("config", BASELINES)
def test_a_policy_says_whether_it_needs_a_profile(config: PolicyConfig) -> None:
    assert needs_profile(config.name) == (config.name != "threshold")
    if needs_profile(config.name):
        with pytest.raises(ValueError, match=f"'{config.name}' needs a profile"):
            make_policy(config)


@pytest.mark.parametrize("kind", RULES)
def test_rules_arrive_as_they_left(kind: int) -> None:
    numbers = [np.arange(float(n)) for n in (3, 6, 4, 2, 4)]
    rule = ThresholdRule(*numbers[:2]) if kind == ThresholdRule.kind else RULES[kind](*numbers)
    arrived = decode_rule(encode_rule(rule))
    assert type(arrived) is RULES[kind]
    for mine, theirs in zip(arrived.encode(), rule.encode(), strict=True):
        np.testing.assert_array_equal(mine, theirs)
    part = rule.part_of([2, 0])
    assert part.encode()[0].tolist() == [2.0, 0.0]
    assert [a.tolist() for a in part.encode()[1:]] == [a.tolist() for a in rule.encode()[1:]]


# -- threshold ---------------------------------------------------------------------------------


def test_threshold_drafts_while_the_newest_confidence_reaches_it() -> None:
    """The token that falls below is part of the draft; a row that starts low still drafts one."""
    sure = [[0.1] * 8, [0.41, 0.9, 0.39, 0.9, 0.9], [0.9] * 8]
    drafts, lengths = take_step(ThresholdPolicy(0.4, 6), make_rows(3), sure)
    assert num_drafted(drafts) == lengths == [1, 3, 6]


def test_threshold_of_the_mean_stops_all_rows_at_once() -> None:
    """Means .65, .61, .55 of the newest confidences."""
    sure = [[0.9, 0.82, 0.2, 1.0], [0.4, 0.4, 0.9, 1.0]]
    policy = ThresholdPolicy(0.6, 8, of_mean=True)
    assert num_drafted(take_step(policy, make_rows(2), sure)[0]) == [3, 3]
    assert num_drafted(take_step(policy, make_rows(2), [[0.1] * 8] * 2)[0]) == [1, 1]


def test_a_fixed_length_does_not_move_the_mean() -> None:
    rows = [make_row(8), make_row(4, has_fixed_draft=True)]
    policy = ThresholdPolicy(0.6, 8, of_mean=True)
    drafts, _ = take_step(policy, rows, [[0.7, 0.7, 0.1], [0.0] * 4])
    assert num_drafted(drafts) == [3, 4]


@pytest.mark.parametrize("threshold", [-0.1, 1.1])
def test_a_threshold_that_is_no_probability_is_refused(threshold: float) -> None:
    with pytest.raises(ValueError, match=r"must be in \[0, 1\]"):
        ThresholdPolicy(threshold, 8)


# -- smartspec ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("acceptance", "k", "expected"),
    [(0.7, 0, 2.0), (0.7, 2, 4.38), (0.0, 5, 2.0), (1.0, 3, 8.0)],
)
def test_expected_tokens_of_a_common_length(acceptance: float, k: int, expected: float) -> None:
    """B (1 - a^(k+1)) / (1 - a), B (k + 1) at a = 1; a row that does not sample adds none."""
    tokens = expected_tokens(acceptance, np.array([k, k, 0]), np.array([1, 1, 0]))
    assert tokens == pytest.approx(expected)


def test_smartspec_takes_the_best_length_of_the_table() -> None:
    """a = .7: E = 2, 3.4, 4.38, 5.066 over T = 10, 13, 15, 23; 1.1 x .2, .262, .292, .220."""
    verify = {2: 10.0, 4: 12.0, 6: 13.0, 8: 20.0}
    policy = SmartSpecPolicy(Table(lambda n: verify.get(n, 99.0), forward_s=1.0), 3)
    assert policy.plan(make_rows(2)).max_draft_tokens == [2, 2]


@pytest.mark.parametrize(("gain", "length"), [(1.09, 0), (1.11, 1)])
def test_speculation_has_to_win_by_a_tenth(gain: float, length: int) -> None:
    seconds = 1.7 / (gain * 0.1)
    policy = SmartSpecPolicy(Table(lambda n: 10.0 if n == 1 else seconds - 0.2), 1)
    assert policy.plan(make_rows(1)).max_draft_tokens == [length]


def observe_rates(policy: Policy, rates: Sequence[tuple[int, int]]) -> None:
    for num_verified, num_accepted in rates:
        batch = Batch(make_rows(1))
        drafts = [[0.5] * num_verified]
        policy.observe(make_record(batch, drafts, [num_verified], num_accepted))


def test_smartspec_follows_the_acceptance_rate_by_a_moving_average() -> None:
    policy = SmartSpecPolicy(Table(D5), 8)
    observe_rates(policy, [(4, 1), (0, 0)])
    assert policy.acceptance == pytest.approx(0.85 * 0.7 + 0.15 * 0.25)


def test_smartspec_as_in_adaspec_takes_the_mean_and_resets_it() -> None:
    """A mean of .25 counts as .65 (D21)."""
    policy = SmartSpecPolicy(Table(D5), 8, as_in_adaspec=True)
    observe_rates(policy, [(4, 3)])
    assert policy.acceptance == 0.75
    observe_rates(policy, [(8, 0)])
    assert policy.acceptance == 0.65
    observe_rates(policy, [(8, 5)])
    assert policy.acceptance == 0.4


def test_fixed_lengths_do_not_teach_smartspec() -> None:
    policy = SmartSpecPolicy(Table(D5), 8)
    batch = Batch([make_row(4, has_fixed_draft=True)])
    policy.observe(make_record(batch, [[0.5] * 4], [4], 0))
    assert policy.acceptance == policy.START


# -- adaspec: rates and gate -------------------------------------------------------------------


def rule_of(
    kind: type[GoodputRule] | type[BestLengthRule],
    verify: Callable[[int], float],
    num_rows: int = 3,
    prior: float = 0.8,
    slo_s: float = math.inf,
) -> GoodputRule | BestLengthRule:
    costs = StepCosts.of(Table(verify), make_rows(num_rows), 8)
    return kind(
        costs.caps.astype(np.float64),
        costs.verify_s,
        costs.forward_s,
        np.array([prior, 1.0]),
        np.array([float(num_rows), 0.0, slo_s, math.inf]),
    )


def test_rates_of_the_staircase() -> None:
    """D5's table: B = 3, c = prior = .8, draft forward 0.2."""
    rule = rule_of(BestLengthRule, D5)
    stopper = rule.start()
    assert isinstance(stopper, BestLengthStopper)
    lengths = [*stopper.worths(stopper.drafted()), *stopper.worths(stopper.ahead(np.arange(3), 5))]
    rates = [worth.rate for worth in lengths]
    assert rates == pytest.approx([0.300, 0.482, 0.398, 0.476, 0.536, 0.357], abs=5e-4)


def test_released_climbs_to_the_first_drop_and_repaired_to_the_best_length() -> None:
    """D5: the released code stops at 1, the best is 4. The first step teaches the prior of .8."""
    released, repaired = AdaSpecReleased(Table(D5), 8), AdaSpecRepaired(Table(D5), 8)
    for policy in (released, repaired):
        take_step(policy, make_rows(3), [[0.8] * 8] * 3)
    assert num_drafted(take_step(released, make_rows(3), [[0.8] * 8] * 3)[0]) == [1, 1, 1]
    assert num_drafted(take_step(repaired, make_rows(3), [[0.8] * 8] * 3)[0]) == [4, 4, 4]


@pytest.mark.parametrize(("verify_s", "opens"), [(15.7, True), (15.8, False), (15.9, False)])
def test_released_gate(verify_s: float, opens: bool) -> None:
    """(3 + 3 x .6) / (.2 + T(6)) has to exceed 3 / 10: T(6) < 15.8."""
    policy = AdaSpecReleased(Table(lambda n: 10.0 if n <= 3 else verify_s), 8)
    plan = policy.plan(make_rows(3))
    assert plan.max_draft_tokens == ([8, 8, 8] if opens else [0, 0, 0])


def test_a_closed_gate_of_the_released_code_never_reopens() -> None:
    """D9, kept."""
    policy = AdaSpecReleased(Table(lambda n: float(n)), 8)
    for _ in range(300):
        assert num_drafted(take_step(policy, make_rows(2), [[1.0] * 8] * 2)[0]) == [0, 0]


def test_one_gated_step_in_a_hundred_explores_when_repaired() -> None:
    """What it learns reopens the gate: at confidence 1 a draft pays."""
    policy = AdaSpecRepaired(Table(lambda n: 10.0 + 0.8 * n, forward_s=9.0), 8)
    drafted = [
        num_drafted(take_step(policy, make_rows(2), [[1.0] * 8] * 2)[0])[0] for _ in range(120)
    ]
    assert drafted[:99] == [0] * 99
    assert all(drafted[99:])


def test_a_gated_step_leaves_fixed_lengths_to_the_draft_engine() -> None:
    policy = AdaSpecReleased(Table(lambda n: float(n) ** 2), 8)
    plan = policy.plan([make_row(8), make_row(3, has_fixed_draft=True)])
    assert plan.max_draft_tokens == [0, 3]


# -- adaspec: the drafter ----------------------------------------------------------------------


def prior_after(policy: AdaSpecReleased) -> float:
    rule = policy.plan(make_rows(3)).stop_rule
    assert isinstance(rule, GoodputRule)
    return rule.start().prior


def test_only_forwards_that_did_not_lower_the_rate_teach_the_released_prior() -> None:
    """First token .1: 3.3 / 11.2 < 3 / 10. Then .9, .8, ...: 5.7 / 11.2 is recorded."""
    policy = AdaSpecReleased(Table(D5), 8)
    assert prior_after(policy) == 0.6
    take_step(policy, make_rows(3), [[0.1] * 8] * 3)
    assert prior_after(policy) == 0.6
    take_step(policy, make_rows(3), [[0.9] * 8] * 3)
    assert prior_after(policy) == pytest.approx(0.9)
    take_step(policy, make_rows(3), [[0.5] * 8] * 3)
    assert prior_after(policy) == pytest.approx(0.7)


def test_the_token_that_lowers_the_rate_stays_in_the_released_draft() -> None:
    """D6, kept: a flat T promises a second token, which turns out at .0 and costs a forward."""
    policy = AdaSpecReleased(Table(lambda n: 10.0), 8)
    drafts, _ = take_step(policy, make_rows(1), [[0.9, 0.0, 0.9]])
    assert num_drafted(drafts) == [2]


def test_a_token_that_made_the_step_worse_is_dropped_when_repaired() -> None:
    """After .9, the second token turns out at .01, not worth its verification."""
    policy = AdaSpecRepaired(Table(lambda n: 10.0 + n), 8)
    drafts, lengths = take_step(policy, make_rows(1), [[0.9] + [0.01] * 7])
    assert num_drafted(drafts) == [2]
    assert lengths == [1]


def test_after_a_stop_by_prediction_the_released_code_prices_a_forward_too_many() -> None:
    """D4, kept in the released policy only."""
    goodput, best = rule_of(GoodputRule, D5).start(), rule_of(BestLengthRule, D5).start()
    assert isinstance(goodput, GoodputStopper)
    assert isinstance(best, BestLengthStopper)
    for stopper in (goodput, best):
        stopper.goes_on(np.arange(3), np.full(3, 0.8))
        assert stopper.spent_s == pytest.approx(0.2)
    assert goodput.priced_draft_s == pytest.approx(0.4)
    assert best.drafted().draft_s.tolist() == pytest.approx([0.2, 0.2])


def test_a_rule_stops_all_rows_but_those_of_fixed_length() -> None:
    for kind in (GoodputRule, BestLengthRule):
        costs = StepCosts.of(Table(D5), [make_row(), make_row(4, has_fixed_draft=True)], 8)
        rule = kind(
            costs.caps.astype(np.float64),
            costs.verify_s,
            costs.forward_s,
            np.zeros(2),
            np.array([2.0, 0.0, math.inf, math.inf]),
        )
        stopper = rule.start()
        assert stopper.begins().all()
        on = stopper.goes_on(np.array([0, 1]), np.array([0.001, 0.001]))
        assert on.tolist() == [False, True]
        assert stopper.goes_on(np.array([1]), np.array([0.001])).tolist() == [True]


# -- adaspec: the verifier ---------------------------------------------------------------------

PRODUCTS = [[0.9, 0.5, 0.10], [0.6, 0.3, 0.12]]
CONFIDENCES = [[0.9, 0.5 / 0.9, 0.2], [0.6, 0.5, 0.4]]


def test_elimination_of_the_worked_example() -> None:
    """D2: the released code keeps .90 expected tokens, the largest products 1.50."""
    assert eliminate_as_released(PRODUCTS, 4) == [0, 2]
    assert keep_largest(PRODUCTS, 2) == [1, 1]


@pytest.mark.parametrize(
    ("policy_class", "rule_class", "expected"),
    [(AdaSpecReleased, GoodputRule, [0, 2]), (AdaSpecRepaired, BestLengthRule, [1, 1])],
)
def test_a_graph_of_four_is_filled(
    policy_class: type[AdaSpecReleased | AdaSpecRepaired],
    rule_class: type[GoodputRule | BestLengthRule],
    expected: list[int],
) -> None:
    """Two rows of three tokens make 8 target tokens; 4 take half the time."""

    def verify(n: int) -> float:
        return 10.0 if n <= 4 else 20.0

    rule = rule_of(rule_class, verify, num_rows=2)
    batch = Batch(make_rows(2), rule)
    assert policy_class(Table(verify), 8).select(batch, CONFIDENCES) == expected


def test_elimination_ends_when_nothing_is_left() -> None:
    """D20: the released loop would not."""
    assert eliminate_as_released([[0.9], []], 5) == [0, 0]
    assert eliminate_as_released([[], []], 2) == [0, 0]
    assert keep_largest([[], []], 2) == [0, 0]


def test_elimination_that_lowers_the_rate_is_undone() -> None:
    """A flat T: 8 tokens cost what 4 cost."""
    rule = rule_of(GoodputRule, lambda n: 10.0, num_rows=2)
    policy = AdaSpecReleased(Table(lambda n: 10.0), 8)
    assert policy.select(Batch(make_rows(2), rule), CONFIDENCES) == [3, 3]


def test_the_repaired_verifier_tries_every_graph_size() -> None:
    """From 16 target tokens down, only 4 are cheap; the released code tries 8 and stays at 16."""

    def verify(n: int) -> float:
        return 10.0 if n <= 4 else 100.0

    confidences = [[0.9] * 7, [0.8] * 7]
    repaired = rule_of(BestLengthRule, verify, num_rows=2)
    policy = AdaSpecRepaired(Table(verify), 8)
    assert policy.select(Batch(make_rows(2), repaired), confidences) == [2, 0]
    released = rule_of(GoodputRule, verify, num_rows=2)
    kept = AdaSpecReleased(Table(verify), 8).select(Batch(make_rows(2), released), confidences)
    assert sum(kept) == 14


def test_prompt_tokens_fill_graphs_too() -> None:
    """5 prompt tokens, 1 base token and 4 drafted make 10: two go, to make 8."""
    rule = rule_of(GoodputRule, lambda n: 10.0 if n <= 2 else 30.0, num_rows=1)
    rows = [make_row(8), make_row(0, token_ids=[1] * 5, samples=False)]
    part = GoodputRule(np.array([8.0, 0.0]), *rule.encode()[1:])
    policy = AdaSpecReleased(Table(lambda n: 10.0), 8)
    part.verify_s[:] = [10.0, 10.0, 10.0] + [30.0] * (len(part.verify_s) - 3)
    assert policy.select(Batch(rows, part), [[0.9] * 4, []]) == [2, 0]


@pytest.mark.parametrize(
    ("num_tokens", "smaller"),
    [(0, 0), (1, 0), (2, 1), (3, 2), (8, 4), (9, 8), (32, 16), (33, 32), (64, 32), (65, 64)],
)
def test_captured_sizes(num_tokens: int, smaller: int) -> None:
    assert smaller_graph(num_tokens) == smaller


# -- adaspec: the SLO --------------------------------------------------------------------------


def test_the_released_slo_check_forbids_long_steps() -> None:
    """Off unless asked for (D1): a step of 11.2 s is refused at 11 s; plain steps are exempt."""
    for slo_s, length in ((math.inf, 8), (11.3, 8), (11.0, 0), (1.0, 0)):
        policy = AdaSpecReleased(Table(D5), 8, slo_s)
        assert policy.plan(make_rows(3)).max_draft_tokens == [length] * 3
    config = PolicyConfig(name="adaspec_released", slo_tpot_s=1.0)
    table = Table(D5)
    assert make_policy(config, table).plan(make_rows(1)).stop_rule is not None


def test_the_repaired_slo_is_kept_by_every_row() -> None:
    """Worst rows: 10 / 1, 12 / 1.8, 16 / 3 s a token. Rates fall, so a tighter SLO drafts more."""
    lengths = Lengths(
        np.array([0, 1, 2]), np.array([2.0, 2.2, 2.4]), np.array([1.0, 1.8, 3.0]), np.zeros(3)
    )

    def best(slo_s: float) -> int:
        rule = rule_of(BestLengthRule, lambda n: {3: 10.0, 4: 12.0}.get(n, 16.0), slo_s=slo_s)
        stopper = rule.start()
        assert isinstance(stopper, BestLengthStopper)
        worths = stopper.worths(lengths)
        return worths.index(max(worths))

    assert [best(slo_s) for slo_s in (math.inf, 10.0, 7.0, 6.0)] == [0, 0, 1, 2]
    assert best(0.1) == 2, "no length keeps it: the smallest worst row wins"


def test_a_row_that_may_not_draft_counts_for_the_repaired_slo() -> None:
    """Its token takes the whole step: drafting beside it breaks an SLO of 10.5 s at 11.2 s."""
    for slo_s, beside in ((10.5, [0, 0, 0]), (11.5, [8, 8, 0])):
        policy = AdaSpecRepaired(Table(D5), 8, slo_s)
        assert policy.plan(make_rows(3)).max_draft_tokens == [8, 8, 8]
        assert policy.plan([*make_rows(2), make_row(0, key=9)]).max_draft_tokens == beside


def test_an_slo_that_is_not_above_zero_is_refused() -> None:
    with pytest.raises(ValueError, match="must be above 0"):
        new_policy(PolicyConfig(name="adaspec_repaired", slo_tpot_s=0.0))


# -- adaptive verification ---------------------------------------------------------------------


def fitted(verify: Callable[[int], float], num_draft_tokens: int) -> AdaptiveVerificationPolicy:
    """Return a policy past its warm-up whose estimates are the confidences themselves."""
    policy = AdaptiveVerificationPolicy(Table(verify, forward_s=0.5), num_draft_tokens)
    for _ in range(300):
        assert policy.estimator.is_warming_up
        policy.observe(make_record(Batch([]), [], [], 0))
    assert not policy.estimator.is_warming_up
    policy.estimator.slope = 1.0
    policy.estimator.bias[:] = 0.0
    return policy


def test_the_total_is_chosen_for_rate_and_filled_by_survival() -> None:
    """Draft 1 s, T(2..6) = 10, 10, 10, 20, 30. A new request counts as certain: 4 / 11 is best.

    Survivals .9, .72 and .5, .45: the first row's two go first. From then on they are known:
    2 / 11, 2.9 / 11, 3.62 / 11, 4.12 / 21, 4.57 / 31.
    """
    seconds = {2: 10.0, 3: 10.0, 4: 10.0, 5: 20.0, 6: 30.0}
    policy = fitted(seconds.__getitem__, 2)
    for _ in range(2):
        drafts, lengths = take_step(policy, make_rows(2), [[0.9, 0.8], [0.5, 0.9]])
        assert num_drafted(drafts) == [2, 2]
        assert lengths == [2, 0]
    assert take_step(policy, make_rows(2), [[0.5, 0.9], [0.6, 0.5]])[1] == [1, 1]


def test_the_total_is_chosen_on_the_previous_confidences() -> None:
    """T(n) = 8 + n: sure tokens are worth it, tokens at .1 are not."""
    policy = fitted(lambda n: 8.0 + n, 2)
    low, high = [[0.1, 0.1]] * 2, [[0.99, 0.99]] * 2
    assert [take_step(policy, make_rows(2), sure)[1] for sure in (low, high, high, low, low)] == [
        [2, 2],
        [0, 0],
        [2, 2],
        [2, 2],
        [0, 0],
    ]


def test_a_request_that_is_gone_is_forgotten() -> None:
    policy = fitted(lambda n: 8.0 + n, 2)
    take_step(policy, make_rows(2), [[0.1, 0.1]] * 2)
    policy.release([0, 1])
    assert take_step(policy, make_rows(2), [[0.1, 0.1]] * 2)[1] == [2, 2]


def test_everything_is_verified_until_the_estimator_is_fitted() -> None:
    policy = AdaptiveVerificationPolicy(Table(lambda n: float(n) ** 3), 4)
    assert take_step(policy, make_rows(2), [[0.01] * 4] * 2)[1] == [4, 4]


def test_largest_survivals_are_prefixes() -> None:
    survivals = np.array([[0.9, 0.81, 0.08], [0.5, 0.5, 0.9], [0.95, 0.9, 0.9]])
    is_draft = np.arange(3) < np.array([3, 2, 1])[:, None]
    expected = [[0, 0, 0], [0, 0, 1], [1, 0, 1], [2, 0, 1], [2, 1, 1], [2, 2, 1], [3, 2, 1]]
    assert [largest_survivals(survivals, is_draft, m) for m in range(7)] == expected


def test_the_estimator_takes_the_newton_step_of_logistic_regression() -> None:
    """Against the dense system of one slope and a bias for each position."""
    estimator = AcceptanceEstimator(2)
    estimator.DAMPING = 0.0  # type: ignore[misc]
    graded = [([0.9, 0.6], 1), ([0.3, 0.8], 2), ([0.7], 0), ([0.95, 0.5], 1)]
    hessian, gradient = AcceptanceEstimator.RIDGE * np.eye(3), np.zeros(3)
    estimator.observe(
        np.array([[0.9, 0.6], [0.3, 0.8], [0.7, 0.2], [0.95, 0.5]]),
        np.array([2, 2, 2, 2]),
        np.array([1, 2, 0, 1]),
    )
    for confidences, accepted in graded:
        for position, confidence in enumerate(confidences):
            x = np.zeros(3)
            x[0], x[1 + position] = logit(np.array([confidence]))[0], 1.0
            p = float(sigmoid(np.array([estimator.START_BIAS]))[0])
            hessian += p * (1.0 - p) * np.outer(x, x)
            gradient += ((position < accepted) - p) * x
    for _ in range(estimator.REFIT_EVERY):
        estimator.end_step()
    step = np.linalg.solve(hessian, gradient)
    assert step[0] > 0.0
    assert estimator.slope == pytest.approx(step[0])
    assert (estimator.bias - estimator.START_BIAS).tolist() == pytest.approx(step[1:].tolist())


def test_the_estimator_learns_to_distrust_confidence() -> None:
    """A drafter that is half as sure in logits as it says; 4000 rows, fixed seed."""
    rng = np.random.default_rng(0)
    estimator = AcceptanceEstimator(3)
    for _ in range(1000):
        confidences = rng.uniform(0.2, 0.99, (4, 3))
        acceptance = sigmoid(0.5 * logit(confidences) - np.array([0.0, 0.5, 1.0]))
        accepted = np.cumprod(rng.random((4, 3)) < acceptance, axis=1).sum(axis=1)
        estimator.observe(confidences, np.full(4, 3), accepted)
        estimator.end_step()
    assert estimator.slope == pytest.approx(0.5, abs=0.15)
    assert estimator.bias.tolist() == pytest.approx([0.0, -0.5, -1.0], abs=0.3)
