"""Owed tokens count for more: what objectives do to verification."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import pytest
from conftest import new_policy
from hypothesis import given
from hypothesis import strategies as st

from specserve.batch import Batch, Row
from specserve.policies.owed import MAX_OWED, deficits, worths


def make_row(key: int, owed: float = -np.inf, tpot_s: float | None = None) -> Row:
    return Row(
        key=key, num_computed_tokens=50, token_ids=[1], samples=True, block_table=[0],
        max_draft_tokens=8, catch_up_token_ids=[1], owed_tokens=owed, tpot_s=tpot_s,
    )  # fmt: skip


def lengths_of(rows: list[Row], confidences: list[list[float]]) -> list[int]:
    policy = new_policy("specserve")
    policy.plan(rows)
    return policy.select(Batch(rows), confidences)


def test_a_plain_step_pays_one_token() -> None:
    rows = [make_row(1, owed=-0.5, tpot_s=0.1), make_row(2)]
    assert deficits(rows, 0.1).tolist() == [-0.5, -np.inf]
    assert deficits(rows, 0.3)[0] == pytest.approx(1.5)


def test_a_row_behind_counts_for_more_and_never_without_bound() -> None:
    """With an objective of a microsecond every step owes thousands: such a row starves nobody."""
    worth = worths(np.array([-np.inf, -2.0, 0.0, 0.5, 5000.0]))
    assert worth.tolist() == [1.0, 1.0, 1.0, 1.5, 1.0 + MAX_OWED]


@given(
    st.lists(st.lists(st.floats(0.01, 1.0), min_size=4, max_size=4), min_size=2, max_size=5),
    st.lists(st.floats(-3.0, 4.0), min_size=5, max_size=5),
)
def test_verified_tokens_are_worth_the_most_over_time(
    confidences: list[list[float]], owed: list[float]
) -> None:
    """Against brute force over all prefix-closed choices, rows behind and ahead among them."""
    policy = new_policy("specserve")
    rows = [make_row(i, owed=owed[i], tpot_s=0.05) for i in range(len(confidences))]
    policy.plan(rows)
    step = policy._step
    lengths = policy.select(Batch(rows), confidences)
    if step.is_exploring:
        return  # which verifies a first token of every row besides
    survival = policy.acceptances.survivals(rows, confidences, step.judge)

    def rate(choice: Sequence[int]) -> float:
        gains = [w * s[:n].sum() for w, s, n in zip(step.weight, survival, choice, strict=True)]
        seconds = step.draft_s + step.verify_s[sum(choice)]
        return float((step.weight.sum() + sum(gains)) / seconds)

    best = max(rate(choice) for choice in itertools.product(range(5), repeat=len(rows)))
    assert rate(lengths) == pytest.approx(best)


@pytest.mark.parametrize("num_rows", [2, 40])
def test_of_two_equal_rows_the_one_further_behind_never_gets_less(num_rows: int) -> None:
    """The paper's released code compares the whole step with one constant instead (D1)."""
    others = [make_row(10 + i) for i in range(num_rows - 2)]
    for behind in (0.0, 0.5, 2.0, 8.0):
        rows = [make_row(1, owed=-3.0, tpot_s=0.05), make_row(2, owed=behind, tpot_s=0.05)]
        lengths = lengths_of([*rows, *others], [[0.8] * 8] * num_rows)
        assert lengths[1] >= lengths[0]


def test_a_row_behind_gets_more_than_yield_alone_would_give() -> None:
    rows = [make_row(i) for i in range(40)]
    alone = lengths_of(rows, [[0.5] * 8] * 40)[0]
    rows[0] = make_row(0, owed=3.0, tpot_s=0.05)
    assert lengths_of(rows, [[0.5] * 8] * 40)[0] > alone


def test_reasons_name_owed_rows() -> None:
    policy = new_policy("specserve")
    rows = [make_row(1, owed=2.0, tpot_s=0.05), make_row(2)]
    policy.plan(rows)
    policy.select(Batch(rows), [[0.8] * 4] * 2)
    assert list(policy.decision.reasons).count("owed") == 1
