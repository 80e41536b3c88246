"""Stop rules on the device decide, row for row and token for token, what they decide in numpy."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Executor
from functools import partial
from typing import Any

import numpy as np
import pytest
from conftest import step_time

pytestmark = pytest.mark.torch
torch = pytest.importorskip("torch")

from specserve.engines.torch.stoppers import STOPPERS, Stopper  # noqa: E402
from specserve.policies.baseline_rules import (  # noqa: E402
    BestLengthRule,
    GoodputRule,
    LengthRule,
    ThresholdRule,
)
from specserve.predictor.acceptance import (  # noqa: E402
    JUDGE_PRIOR,
    NUM_JUDGE,
    NUM_SCOUT,
    SCOUT_PRIOR,
    judge_curves,
    scout_curves,
)
from specserve.stop_rules import StopRule, SurvivalRule, ValueRule  # noqa: E402

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
MAX_ROWS = 16
MAX_DRAFT_TOKENS = 6
NUM_RULES = 60


def survival_rule(rng: np.random.Generator, num_rows: int) -> SurvivalRule:
    bias_slope = np.array([rng.normal(1.0, 1.0), rng.uniform(0.2, 1.5)])
    return SurvivalRule(bias_slope, rng.choice([0.0, 0.2, 0.5], num_rows))


def threshold_rule(rng: np.random.Generator, num_rows: int) -> ThresholdRule:
    thresholds = rng.choice([-np.inf, 0.3, 0.6], num_rows)
    return ThresholdRule(thresholds, np.array([float(rng.integers(2))]))


def value_rule(rng: np.random.Generator, num_rows: int) -> ValueRule:
    """Make a rule as a server under some load would: other rows decode, or propose by lookup."""
    others = int(rng.integers(MAX_ROWS - num_rows + 1))
    lookups = np.sort(rng.uniform(0.0, 2.0, int(rng.integers(others * MAX_DRAFT_TOKENS + 1))))
    model = step_time(int(rng.choice([4, 16, 64])), float(rng.choice([0.0002, 0.001, 0.004])))
    num_more = (num_rows + others) * MAX_DRAFT_TOKENS
    judge = rng.normal(0.0, 0.4, (num_rows, NUM_JUDGE)) + JUDGE_PRIOR
    scout = rng.normal(0.0, 0.4, (num_rows, NUM_SCOUT)) + SCOUT_PRIOR
    history = rng.normal(0.0, 0.2, num_rows)
    return ValueRule(
        judge=judge_curves(judge, history).ravel(),
        scout=scout_curves(scout, history).ravel(),
        weight=rng.choice([1.0, 1.0, 2.5, np.inf], num_rows),
        verify_s=model.verify_curve(num_rows + others, num_more, 100 * num_rows),
        forward_s=model.forward_curve(num_rows, 100 * num_rows),
        gains=lookups[::-1],
        base=np.array([num_rows + others, rng.uniform(0.0, 0.002), 1.0]),
    )


def length_rule(
    kind: type[LengthRule], slo_s: Sequence[float], rng: np.random.Generator, num_rows: int
) -> LengthRule:
    """Make a rule of one length, with rows of a fixed length, or a row without a draft, beside."""
    model = step_time(int(rng.choice([4, 16, 64])), float(rng.choice([0.0002, 0.001, 0.004])))
    caps = rng.choice([0.0, 2.0, MAX_DRAFT_TOKENS, MAX_DRAFT_TOKENS], num_rows)
    recorded = float(rng.integers(3) * 20)
    plain = rng.choice([1.0, np.inf])
    return kind(
        caps=caps,
        verify_s=model.verify_curve(num_rows, int(caps.sum()), 100 * num_rows),
        forward_s=model.forward_curve(int((caps > 0).sum()), 100 * num_rows),
        prior=np.array([rng.uniform(0.3, 0.9) * recorded, recorded]),
        base=np.array([num_rows, rng.uniform(0.0, 0.002), rng.choice(slo_s), plain]),
    )


# Of a step of the model above: loose, and one that some drafts break and some do not.
STEP_SLO_S = (np.inf, 0.02)
TOKEN_SLO_S = (np.inf, 0.005)
RULES = {
    "survival": (survival_rule, SurvivalRule),
    "value": (value_rule, ValueRule),
    "threshold": (threshold_rule, ThresholdRule),
    "goodput": (partial(length_rule, GoodputRule, STEP_SLO_S), GoodputRule),
    "best length": (partial(length_rule, BestLengthRule, TOKEN_SLO_S), BestLengthRule),
}


@pytest.mark.parametrize("kind", RULES)
def test_rows_go_on_as_in_numpy(kind: str) -> None:
    make, rule = RULES[kind]
    check(make, STOPPERS[rule](MAX_ROWS, MAX_DRAFT_TOKENS, DEVICE))


@pytest.mark.slow
def test_the_kernel_lets_rows_go_on_as_in_numpy(triton_process: Executor) -> None:
    triton_process.submit(check_kernel).result()


def check_kernel() -> None:
    from specserve.engines.torch.value_kernel import FusedValueStopper

    check(value_rule, FusedValueStopper(MAX_ROWS, MAX_DRAFT_TOKENS, DEVICE))


def check(make: Any, stopper: Stopper) -> None:
    """Draft with many rules."""
    rng = np.random.default_rng(0)
    lengths = [number for _ in range(NUM_RULES) for number in run(make, stopper, rng)]
    assert 0.1 < np.mean(np.array(lengths) < MAX_DRAFT_TOKENS) < 0.95, "the rules say nothing"


def run(make: Any, stopper: Stopper, rng: np.random.Generator) -> list[int]:
    """Draft with one random rule on both sides, padded to `MAX_ROWS`; return the lengths."""
    num_rows = int(rng.integers(1, MAX_ROWS + 1))
    rule: StopRule = make(rng, num_rows)
    expected, active = rule.start(), np.arange(num_rows)
    stopper.load(rule)
    lengths = np.zeros(num_rows, dtype=int)
    caps = getattr(rule, "caps", np.full(num_rows, MAX_DRAFT_TOKENS))
    for _ in range(MAX_DRAFT_TOKENS):
        lengths[active] += 1
        confidences = rng.beta(1.5, 0.7, MAX_ROWS)
        is_active = np.isin(np.arange(MAX_ROWS), active)
        on = stopper.goes_on(
            torch.from_numpy(is_active).to(DEVICE), torch.from_numpy(confidences).to(DEVICE)
        )
        active = active[expected.goes_on(active, confidences[active])]
        assert np.flatnonzero(on.cpu().numpy() & is_active).tolist() == active.tolist()
        active = active[(caps[active] == 0) | (lengths[active] < caps[active])]
        if not len(active):
            break
    return lengths.tolist()
