"""Owed tokens first: what objectives do to verification."""

from __future__ import annotations

import numpy as np
import pytest
from conftest import new_policy
from hypothesis import given
from hypothesis import strategies as st

from specserve.batch import Batch, Row
from specserve.policies.owed import deficits, least_debt, owed_first


def make_row(key: int, owed: float = -np.inf, tpot_s: float | None = None) -> Row:
    return Row(
        key=key, num_computed_tokens=50, token_ids=[1], samples=True, block_table=[0],
        max_draft_tokens=8, catch_up_token_ids=[1], owed_tokens=owed, tpot_s=tpot_s,
    )  # fmt: skip


def lengths_of(rows: list[Row], confidences: list[list[float]]) -> list[int]:
    policy = new_policy("specserve")
    policy.plan(rows)
    return policy.select(Batch(rows), confidences)


def by_survival(survival: np.ndarray) -> np.ndarray:
    positions = np.tile(np.arange(survival.shape[1]), len(survival))
    return np.lexsort((positions, -survival.ravel()))[: np.count_nonzero(survival)]


def test_a_plain_step_pays_one_token() -> None:
    rows = [make_row(1, owed=-0.5, tpot_s=0.1), make_row(2)]
    assert deficits(rows, 0.1).tolist() == [-0.5, -np.inf]
    assert deficits(rows, 0.3)[0] == pytest.approx(1.5)


@given(
    st.lists(st.lists(st.floats(0.01, 1.0), min_size=4, max_size=4), min_size=2, max_size=5),
    st.lists(st.floats(-3.0, 4.0), min_size=5, max_size=5),
)
def test_every_length_of_the_new_order_is_a_prefix_of_each_row(
    acceptances: list[list[float]], owed: list[float]
) -> None:
    survival = np.cumprod(np.array(acceptances), axis=1)
    order = owed_first(survival, by_survival(survival), np.array(owed[: len(survival)]))
    assert sorted(order) == sorted(by_survival(survival))
    seen = [0] * len(survival)
    for index in order:
        row, position = divmod(int(index), 4)
        assert position == seen[row]
        seen[row] += 1


def test_the_latest_row_comes_first() -> None:
    survival = np.array([[0.9, 0.8], [0.6, 0.4], [0.7, 0.5]])
    order = owed_first(survival, by_survival(survival), np.array([-1.0, 0.5, 1.1]))
    assert [divmod(int(i), 2) for i in order[:3]] == [(2, 0), (2, 1), (1, 0)]


def test_a_total_whose_step_owes_more_than_it_pays_is_not_taken() -> None:
    rows = [make_row(1, owed=0.0, tpot_s=0.010)]
    survival = np.array([[0.5, 0.4]])
    cheap = least_debt(rows, survival, np.array([0, 1]), np.array([0.010, 0.011, 0.012]))
    dear = least_debt(rows, survival, np.array([0, 1]), np.array([0.010, 0.030, 0.050]))
    assert cheap.tolist() == [True, True, True]
    assert dear.tolist() == [True, False, False]


def test_a_row_that_is_hopelessly_late_gets_the_best_rate() -> None:
    """Not the shortest step: with an objective of a microsecond every step owes thousands."""
    rows = [make_row(1, owed=5000.0, tpot_s=1e-6)]
    survival = np.array([[0.9, 0.8]])
    allowed = least_debt(rows, survival, np.array([0, 1]), np.array([0.010, 0.011, 0.012]))
    assert allowed.tolist() == [False, False, True]


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
