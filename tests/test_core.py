"""The step: five verbs in their order, honest totals, and a draft engine that may fail."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from conftest import MAX_SEQ_LEN, FakeClock, drive, make_core, make_request
from paged_lm import FlakyLM, PagedLM, plain_decode

from specserve.assemble import assemble
from specserve.batch import Batch, Draft, DraftPlan, Row, StepRecord, Verified
from specserve.config import CHECKPOINTS, Config, PolicyConfig, SchedulerConfig, load_config
from specserve.core import SpecServe
from specserve.engines import EngineInfo, describe
from specserve.engines.guarded import GuardedDraftEngine
from specserve.engines.model_draft import ModelDraftEngine
from specserve.engines.model_target import ModelTargetEngine
from specserve.policies import Unexplained
from specserve.policies.fixed import FixedPolicy

FIXED = PolicyConfig(name="fixed", num_draft_tokens=3)
INFO = EngineInfo(vocab_size=17, max_seq_len=64, num_blocks=16, block_size=4)


class Scripted(Unexplained):
    """Draft engine, target engine and policy in one, writing down what it is asked."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.released: list[int] = []
        self.records: list[StepRecord] = []

    def plan(self, rows: Sequence[Row]) -> DraftPlan:
        """Three tokens for everybody."""
        self.calls.append("plan")
        return DraftPlan([3] * len(rows))

    def draft(self, batch: Batch) -> list[Draft]:
        """Propose token 7 three times where allowed."""
        self.calls.append("draft")
        return [Draft([7] * r.max_draft_tokens, [0.5] * r.max_draft_tokens) for r in batch.rows]

    def select(self, batch: Batch, confidences: Sequence[Sequence[float]]) -> list[int]:
        """Keep all but the last."""
        self.calls.append("select")
        return [max(0, len(row) - 1) for row in confidences]

    def verify(self, batch: Batch, chosen: Sequence[Sequence[int]]) -> list[Verified]:
        """Accept everything chosen."""
        self.calls.append("verify")
        return [
            Verified([*c, 8] if r.samples else []) for r, c in zip(batch.rows, chosen, strict=True)
        ]

    def observe(self, record: StepRecord) -> None:
        """Keep the record."""
        self.calls.append("observe")
        self.records.append(record)

    def release(self, keys: Sequence[int]) -> None:
        """Note the keys; both engines and the policy are told."""
        self.calls.append("release")
        self.released.extend(keys)


def make_scripted(clock: Any = None) -> tuple[Any, Scripted]:
    scripted = Scripted()
    core = make_core(
        policy_object=scripted, draft_engine=scripted, target_engine=scripted, clock=clock
    )
    return core, scripted


def test_a_step_is_schedule_draft_select_verify_commit() -> None:
    core, scripted = make_scripted()
    core.scheduler.submit(make_request([1, 2], 20))
    core.step()
    scripted.calls.clear()
    (result,) = core.step()
    assert scripted.calls == ["plan", "draft", "select", "verify", "observe"]
    assert result.token_ids == [7, 7, 8]
    assert scripted.records[-1].chosen == [[7, 7]]
    assert scripted.records[-1].drafts == [Draft([7] * 3, [0.5] * 3)]


def test_totals_count_what_happened() -> None:
    core, _ = make_scripted(FakeClock(0.5))
    core.scheduler.submit(make_request([1, 2], 20))
    core.step()
    core.step()
    stats = core.stats
    assert stats.num_steps == 2
    assert stats.num_base_tokens == 2 + 1
    assert (stats.num_drafted_tokens, stats.num_verified_tokens) == (3, 2)
    assert (stats.num_accepted_tokens, stats.num_output_tokens) == (2, 1 + 3)
    assert 0 < stats.draft_s + stats.verify_s < stats.step_s


def test_engines_hear_of_finished_and_preempted_requests_before_the_next_pass() -> None:
    core, scripted = make_scripted()
    request = make_request([1, 2], 1)
    core.scheduler.submit(request)
    core.step()
    core.scheduler.submit(make_request([1], 5))
    scripted.calls.clear()
    core.step()
    assert scripted.released.count(request.key) == 3  # the engines and the policy
    assert scripted.calls.index("release") < scripted.calls.index("verify")


def test_request_times_are_on_the_cores_clock() -> None:
    clock = FakeClock()
    core, _ = make_scripted(clock)
    request = make_request([1], 8)
    core.scheduler.submit(request)
    clock.now = 5.0
    core.step()
    clock.now = 7.0
    core.step()
    assert (request.first_scheduled_s, request.first_token_s, request.last_token_s) == (5, 5, 7)


def test_the_policy_may_change_between_steps() -> None:
    core = make_core("none")
    request = make_request([1, 2], 30)
    core.scheduler.submit(request)
    for policy in (FixedPolicy(0), FixedPolicy(3), FixedPolicy(0)):
        core.use(policy, None)
        core.step()
        core.step()
    assert request.num_drafted_tokens == 2 * 3
    while core.scheduler.has_work:
        core.step()
    assert request.token_ids[2:] == plain_decode(PagedLM(), [1, 2], 30, request.sampling)


# -- the draft side may fail -------------------------------------------------------------------


def test_requests_go_on_without_speculation_while_the_draft_engine_fails(
    caplog: pytest.LogCaptureFixture,
) -> None:
    target, draft = PagedLM(), FlakyLM(failure_rate=1.0)
    core = make_core(FIXED, target=target, draft=draft, clock=FakeClock(), draft_retry_s=5.0)
    requests = [make_request([i, 2], 20) for i in range(3)]
    with caplog.at_level(logging.CRITICAL):
        outputs = drive(core, requests)
    assert core.stats.num_drafted_tokens == 0
    assert draft.num_failures == 1, "it was asked again before its time"
    assert outputs == [plain_decode(target, r.prompt_token_ids, 20, r.sampling) for r in requests]


def test_speculation_comes_back_once_the_retry_time_has_passed() -> None:
    clock, draft = FakeClock(), FlakyLM(failure_rate=1.0)
    core = make_core(FIXED, draft=draft, clock=clock, draft_retry_s=5.0)
    core.scheduler.submit(make_request([1, 2], 100))
    core.step()  # the prompt
    core.step()  # the failure
    draft.failure_rate = 0.0
    clock.now = 4.99
    core.step()
    assert core.stats.num_drafted_tokens == 0
    assert not core.draft_engine.is_available
    clock.now = 5.0
    core.step()
    assert core.stats.num_drafted_tokens == 3
    assert core.stats.num_accepted_tokens == 3  # the draft is the target: it caught up rightly


def test_each_failure_doubles_the_wait() -> None:
    clock, draft = FakeClock(), FlakyLM(failure_rate=1.0)
    core = make_core(FIXED, draft=draft, clock=clock, draft_retry_s=5.0)
    core.scheduler.submit(make_request([1, 2], 100))
    for now in (0.0, 1.0, 3.0, 6.0, 8.0, 15.9, 16.0):
        clock.now = now
        core.step()
    assert core.draft_engine.num_failures == draft.num_failures == 3  # at 1, 6 and 16


def test_a_failure_long_after_the_last_one_waits_as_the_first_did() -> None:
    clock, draft = FakeClock(), FlakyLM(failure_rate=1.0)
    core = make_core(FIXED, draft=draft, clock=clock, draft_retry_s=5.0)
    core.scheduler.submit(make_request([1, 2], 100))
    for now in (0.0, 1.0, 6.0, 100.0, 105.0):
        clock.now = now
        core.step()
    assert draft.num_failures == 4  # at 1, 6, 100 and 105


class FailsToRelease(Scripted):
    """Drafts well, and fails when told that a request is over."""

    def release(self, keys: Sequence[int]) -> None:
        """Raise."""
        raise RuntimeError("cannot release")


def test_a_draft_engine_that_fails_to_release_harms_no_request() -> None:
    core = make_core(FIXED, draft_engine=FailsToRelease())
    first, second = make_request([1], 1), make_request([1], 4)
    for request in (first, second):
        core.scheduler.submit(request)
        core.step()
    while core.scheduler.has_work:
        core.step()
    assert second.num_output_tokens == 4


def test_a_guard_asks_for_nothing_where_nothing_may_be_drafted() -> None:
    guard = GuardedDraftEngine(FailsToRelease(), 64, 5.0, FakeClock())
    row = Row(key=1, num_computed_tokens=0, token_ids=[1], samples=True, block_table=[0])
    assert guard.draft(Batch([row])) == [Draft()]
    assert guard.inner.calls == []


# -- engines beside a model --------------------------------------------------------------------


def test_a_draft_ends_at_its_cap_and_rows_without_one_get_none() -> None:
    engine = ModelDraftEngine(PagedLM())
    batch = Batch([make_draft_row(i, cap) for i, cap in enumerate([3, 0, 1])])
    assert [len(draft.token_ids) for draft in engine.draft(batch)] == [3, 0, 1]
    assert engine.model.num_calls == 3, "one forward for each draft position"


def test_a_draft_is_the_models_greedy_continuation_with_its_probability() -> None:
    model = PagedLM()
    (draft,) = ModelDraftEngine(model).draft(Batch([make_draft_row(0, 4)]))
    context = [1, 2, 3]
    for token_id, confidence in zip(draft.token_ids, draft.confidences, strict=True):
        logits = model.logits(context).astype(float)
        weights = [math.exp(x - max(logits)) for x in logits]
        assert token_id == logits.argmax()
        assert confidence == pytest.approx(1 / sum(weights), rel=1e-5)
        context.append(token_id)


def make_draft_row(i: int, cap: int) -> Row:
    return Row(
        key=i,
        num_computed_tokens=2,
        token_ids=[3],
        samples=True,
        block_table=[2 * i, 2 * i + 1],
        max_draft_tokens=cap,
        catch_up_token_ids=[1, 2, 3] if cap else [],
    )


def test_a_dropped_draft_token_that_matches_costs_a_step_and_nothing_else() -> None:
    """Guards D16: an unverified token must not be emitted as accepted, even if it is right."""
    target = PagedLM()
    expected = plain_decode(target, [1, 2, 3], 4, make_request().sampling)
    row = Row(key=1, num_computed_tokens=0, token_ids=[1, 2, 3], samples=True, block_table=[0, 1])
    (verified,) = ModelTargetEngine(target).verify(Batch([row]), [expected[:1]])
    assert verified.output_token_ids == expected[:2]
    assert verified.num_accepted_tokens == 1


def test_a_draft_inside_a_prompt_is_an_error() -> None:
    row = Row(key=1, num_computed_tokens=0, token_ids=[1], samples=False, block_table=[0])
    with pytest.raises(AssertionError, match="request 1 drafts inside its prompt"):
        ModelTargetEngine(PagedLM()).verify(Batch([row]), [[5]])


def test_log_probs_come_with_every_token_if_asked_for() -> None:
    core = make_core(FIXED)
    asked = make_request([1, 2], 12, return_log_probs=True, temperature=0.9)
    silent = make_request([1, 3], 12)
    for request in (asked, silent):
        core.scheduler.submit(request)
    values = []
    while core.scheduler.has_work:
        for output in core.step():
            if output.request is asked:
                values += output.log_probs
            else:
                assert output.log_probs == []
    model = PagedLM()
    for i, value in enumerate(values):
        logits = model.logits(asked.token_ids[: 2 + i]).astype(float)
        total = sum(math.exp(x - max(logits)) for x in logits)
        token_id = asked.token_ids[2 + i]
        assert math.exp(value) == pytest.approx(
            math.exp(logits[token_id] - max(logits)) / total, rel=1e-4
        )
    assert len(values) == 12


def test_the_target_forgets_released_requests() -> None:
    core = make_core(FIXED)
    drive(core, [make_request([i], 5, temperature=1.0) for i in range(4)])
    core.scheduler.submit(make_request([1], 1))
    core.step()
    assert core.target_engine._histories == {}


# -- assembly ----------------------------------------------------------------------------------


def assemble_scripted(config: Config) -> SpecServe:
    engine = Scripted()
    return assemble(
        config,
        info=INFO,
        draft_engine=engine,
        target_engine=engine,
        policy=FixedPolicy(0),
    )


def test_a_longer_sequence_limit_than_the_engines_is_refused() -> None:
    config = Config(scheduler=SchedulerConfig(max_seq_len=65))
    with pytest.raises(ValueError, match=r"max_seq_len is 65: the engines were built for 64"):
        assemble_scripted(config)


def test_a_pair_built_for_another_engine_is_refused() -> None:
    config = load_config(None, [f"engine.dir={CHECKPOINTS}"])
    with pytest.raises(ValueError, match="built for torch: build a pair for openvino with"):
        describe(config)


def test_the_engines_own_limit_is_the_default() -> None:
    core = assemble_scripted(Config())
    assert core.scheduler.config.max_seq_len == 64
    assert core.scheduler.blocks.num_blocks == 16
    assert make_core().scheduler.config.max_seq_len == MAX_SEQ_LEN


def test_an_unknown_engine_is_refused_naming_the_known_ones() -> None:
    config = Config()
    config = replace(config, engine=replace(config.engine, name="warp"))
    with pytest.raises(ValueError, match=r"engine.name is 'warp': known are .*openvino"):
        assemble(config)
