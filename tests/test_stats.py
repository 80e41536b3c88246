"""Counts agree with each other and with the requests; traces tell every step."""

from __future__ import annotations

import dataclasses

import pytest
from conftest import FakeClock, drive, make_core, make_request

from specserve.request import SLO, FinishReason
from specserve.stats import Outcomes, least_slack_s


@pytest.mark.parametrize("source", ["model", "auto"])
def test_counts_by_position_length_and_reason_add_up(source: str) -> None:
    core = make_core("specserve")
    requests = [make_request([i, 2, i, 2], 40, draft_source=source) for i in range(3)]
    drive(core, requests)
    stats = core.stats
    assert stats.num_accepted_tokens > 0
    assert sum(stats.verified_at.values()) == stats.num_verified_tokens
    assert sum(stats.accepted_at.values()) == stats.num_accepted_tokens
    assert sum(k * n for k, n in stats.draft_lengths.items()) == stats.num_drafted_tokens
    sources = {name for name, _ in stats.verified_at}
    assert sources <= ({"model", "ngram"} if source == "auto" else {source})
    for name, position in stats.accepted_at:
        if position:
            assert stats.accepted_at[name, position] <= stats.accepted_at[name, position - 1]
    assert sum(stats.reasons.values()) == sum(stats.draft_lengths.values())
    assert stats.predicted_s > 0
    assert 0 < stats.measured_s <= stats.draft_s + stats.verify_s  # but steps without a plan


def test_a_policy_without_predictor_predicts_nothing() -> None:
    core = make_core("fixed")
    drive(core, [make_request()])
    assert (core.stats.predicted_s, core.stats.measured_s, core.stats.reasons) == (0.0, 0.0, {})


def test_a_trace_tells_every_step_of_its_request_alone() -> None:
    core = make_core("specserve")
    traced = make_request([1, 2, 3], 30, trace=[], slo=SLO(None, 0.01))
    drive(core, [traced, make_request([4, 5], 30)])
    steps = traced.trace
    assert steps is not None
    assert sum(1 + step.num_accepted_tokens for step in steps) == 30
    assert sum(step.num_drafted_tokens for step in steps) == traced.num_drafted_tokens
    assert [step.at_s for step in steps] == sorted(step.at_s for step in steps)
    assert {step.num_rows for step in steps} <= {1, 2}
    assert all(step.reason for step in steps)
    assert all(step.owed_tokens is not None for step in steps)
    assert {bool(step.draft_source) for step in steps if step.num_drafted_tokens} == {True}


# -- outcomes ----------------------------------------------------------------------------------


def ended(slo: SLO, first_token_s: float | None = 0.1, name: str = "") -> object:
    request = make_request([1], 5, slo=slo, priority_class=name)
    if first_token_s is not None:
        request.token_ids += [1] * 5
        request.first_token_s, request.last_token_s = first_token_s, first_token_s + 0.4
    return request


@pytest.mark.parametrize(
    ("slo", "reason", "attained", "missed"),
    [
        pytest.param(SLO(), FinishReason.LENGTH, 0, 0, id="no objective: in neither"),
        pytest.param(SLO(0.1, 0.1), FinishReason.LENGTH, 1, 0, id="just met"),
        pytest.param(SLO(0.09, None), FinishReason.END_ID, 0, 1, id="first token late"),
        pytest.param(SLO(None, 0.09), FinishReason.STOP_WORD, 0, 1, id="others late"),
        pytest.param(SLO(1.0, 1.0), FinishReason.ERROR, 0, 1, id="failed is missed"),
        pytest.param(SLO(1.0, 1.0), FinishReason.REJECTED, 0, 1, id="rejected is missed"),
        pytest.param(SLO(1.0, 1.0), FinishReason.CANCELLED, 0, 0, id="cancelled: who knows"),
    ],
)
def test_attainment(slo: SLO, reason: FinishReason, attained: int, missed: int) -> None:
    outcomes = Outcomes()
    outcomes.add(ended(slo, name="gold"), reason)
    assert (outcomes.attained["gold"], outcomes.missed["gold"]) == (attained, missed)
    assert sum(outcomes.requests.values()) == 1


def test_clients_cannot_make_labels_without_end() -> None:
    outcomes = Outcomes()
    for i in range(1000):
        outcomes.add(ended(SLO(), name=f"class {i}"), FinishReason.LENGTH)
    names = {name for _, name in outcomes.requests}
    assert len(names) == Outcomes.MAX_CLASSES + 1
    assert outcomes.requests["finished", "other"] == 1000 - Outcomes.MAX_CLASSES


def test_slack_is_the_least_of_each_class() -> None:
    requests = [
        make_request(slo=SLO(0.5, None), priority_class="a"),
        make_request(slo=SLO(0.2, None), priority_class="a"),
        make_request(slo=SLO(3.0, None)),
        make_request(),
    ]
    slack_s = least_slack_s(requests, Outcomes(), now=0.3)
    assert slack_s == pytest.approx({"a": -0.1, "default": 2.7})


def test_the_clock_of_a_trace_is_the_cores() -> None:
    core = make_core("none", clock=FakeClock(tick_s=1.0))
    request = make_request([1], 2, trace=[], arrival_s=-5.0)
    drive(core, [request])
    assert request.trace is not None
    assert request.trace[0].at_s > 5.0
    assert dataclasses.asdict(request.trace[0])["predicted_s"] is None
