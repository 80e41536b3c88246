"""Objectives: who is behind, how much prompt fits beside them, who waits, who is told early."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from test_predictor import make_profile

from specserve.admission import Rejected
from specserve.block_manager import BlockManager
from specserve.config import SchedulerConfig, SLOConfig
from specserve.pacing import MIN_CHUNK, Pacer, owed_tokens, slack_s
from specserve.policies.fixed import FixedPolicy
from specserve.predictor.profile import VerifySample
from specserve.predictor.step_time import StepTimeModel
from specserve.request import SLO, FinishReason, Request
from specserve.scheduler import Scheduler


def decoding(
    tpot_s: float | None, num_output_tokens: int = 5, first_token_s: float = 0.0
) -> Request:
    request = Request([1] * 10, 100, slo=SLO(tpot_s=tpot_s))
    request.token_ids += [2] * num_output_tokens
    request.num_computed_tokens = request.num_tokens - 1
    request.first_token_s = request.last_token_s = first_token_s
    return request


def make_scheduler(**slo: object) -> Scheduler:
    config = SchedulerConfig(max_num_seqs=4, prefill_chunk_tokens=64, max_seq_len=4096)
    scheduler = Scheduler(config, BlockManager(512, 32), FixedPolicy(0), SLOConfig(**slo))
    scheduler.pacer = Pacer(StepTimeModel(make_profile()))
    return scheduler


@pytest.mark.parametrize(("now", "owed"), [(0.0, -4.0), (0.4, 0.0), (0.5, 1.0)])
def test_tpot_counts_the_gaps_after_the_first_token(now: float, owed: float) -> None:
    """Five tokens are out, so four gaps of 0.1 s are paid for."""
    request = decoding(0.1)
    assert owed_tokens(request, now) == pytest.approx(owed)
    assert slack_s(request, now) == pytest.approx(-owed * 0.1)


def test_best_effort_owes_nothing_and_has_all_the_time() -> None:
    request = decoding(None)
    assert owed_tokens(request, 1e6) == float("-inf")
    assert slack_s(request, 1e6) == float("inf")


def test_before_the_first_token_slack_is_time_to_the_ttft() -> None:
    request = Request([1], 5, slo=SLO(ttft_s=2.0))
    request.arrival_s = 1.0
    assert slack_s(request, 2.5) == pytest.approx(0.5)


def test_met_slo_reads_both_objectives() -> None:
    request = decoding(0.1)
    request.arrival_s, request.first_token_s, request.last_token_s = 0.0, 0.5, 0.9
    assert request.met_slo is True
    request.slo = SLO(ttft_s=0.4, tpot_s=0.1)
    assert request.met_slo is False
    request.slo = SLO(ttft_s=0.6, tpot_s=0.09)
    assert request.met_slo is False
    request.slo = SLO()
    assert request.met_slo is None


def test_a_prompt_chunk_leaves_decoding_rows_on_schedule() -> None:
    model = StepTimeModel(make_profile())
    pacer = Pacer(model)
    rows = [decoding(0.05), decoding(None)]
    now = 0.2  # five tokens are out, the sixth is due at 0.25
    chunk = pacer.prefill_tokens(rows, 256, now)
    context = sum(row.num_computed_tokens for row in rows)
    assert MIN_CHUNK < chunk < 256
    assert now + model.verify_s(2 + chunk, context) <= 0.25
    assert now + model.verify_s(2 + chunk + 1, context) > 0.25


def test_a_row_near_its_end_allows_no_more_time_than_for_its_last_tokens() -> None:
    """Of late it got three tokens a step; with one to go, three tokens' time would be late."""
    pacer = Pacer(StepTimeModel(make_profile()))
    chunks = []
    for num_left in (1, 2, 3, 30):
        row = decoding(0.05)
        row.num_accepted_tokens, row.num_decode_steps = 4, 2
        row.max_tokens = row.num_output_tokens + num_left
        chunks.append(pacer.prefill_tokens([row], 256, 0.2))
    assert chunks[0] < chunks[1] < chunks[2] == chunks[3]


def test_looser_objectives_take_larger_chunks_and_none_takes_all() -> None:
    pacer = Pacer(StepTimeModel(make_profile()))
    chunks = [pacer.prefill_tokens([decoding(t)], 256, 4 * t) for t in (0.03, 0.06, 0.12)]
    assert chunks == sorted(chunks)
    assert chunks[0] < chunks[-1]
    assert pacer.prefill_tokens([decoding(None)], 256, 1e3) == 256


@pytest.mark.parametrize(("num_rows", "chunk"), [(0, 256), (4, 252), (40, 216)])
def test_a_chunk_ends_below_a_stair_of_the_step(num_rows: int, chunk: int) -> None:
    """257 tokens take half as long again as 256: beside rows that decode a chunk is smaller."""
    sizes = (1, 8, 64, 128, 256, 257, 320)
    samples = [
        VerifySample(n, n, c, (0.02 + 0.001 * n) * (1.5 if n > 256 else 1.0) + 1e-7 * c)
        for n in sizes
        for c in (100, 1000)
    ]
    pacer = Pacer(StepTimeModel(replace(make_profile(), verify=tuple(samples))))
    rows = [decoding(None) for _ in range(num_rows)]
    assert pacer.prefill_tokens(rows, 256, now=0.0) == chunk


def test_a_late_row_does_not_starve_prompts() -> None:
    pacer = Pacer(StepTimeModel(make_profile()))
    assert pacer.prefill_tokens([decoding(0.001)], 256, now=100.0) == MIN_CHUNK


def test_requests_wait_in_order_of_their_deadlines() -> None:
    scheduler = make_scheduler(best_effort_ttft_s=10.0)
    requests = {
        name: Request([1], 5, slo=SLO(ttft_s=ttft_s))
        for name, ttft_s in (("slow", 60.0), ("best effort", None), ("fast", 1.0))
    }
    for request in requests.values():
        scheduler.submit(request)
    order = [requests[name] for name in ("fast", "best effort", "slow")]
    assert list(scheduler.waiting) == order


def test_best_effort_is_preempted_before_a_promise() -> None:
    config = SchedulerConfig(max_num_seqs=2, max_seq_len=64)
    scheduler = Scheduler(config, BlockManager(3, 4), FixedPolicy(0))
    old, promised = Request([1] * 4, 8), Request([1] * 4, 8, slo=SLO(tpot_s=0.1))
    for request in (old, promised):
        scheduler.submit(request)
    scheduler.schedule(0.0)
    for request in (old, promised):
        request.num_computed_tokens, request.first_token_s = 4, 0.0
        request.token_ids.append(2)
    rows = scheduler.schedule(0.0).rows
    assert [row.key for row in rows] == [promised.key]
    assert old.num_preemptions == 1


def test_who_would_be_late_is_told_early_if_its_class_wants_so() -> None:
    scheduler = make_scheduler(reject_late_classes=("interactive",))
    for _ in range(8):
        scheduler.submit(Request([1] * 512, 100))
    late = Request([1] * 64, 10, slo=SLO(ttft_s=0.2), priority_class="interactive")
    late.slo = SLO(ttft_s=0.05)
    scheduler.running = [decoding(None) for _ in range(4)]
    with pytest.raises(Rejected, match=r"predicted in \d+ ms, later than slo_ttft_ms 50:"):
        scheduler.submit(late)
    late.priority_class = "batch"
    scheduler.submit(late)
    assert late in scheduler.waiting


def test_early_refusal_names_the_objective_as_given_however_late_the_clock() -> None:
    scheduler, now = make_scheduler(reject_late_classes=("interactive",)), 75_000.3
    scheduler.submit(Request([1] * 512, 100), now)
    slo = SLO(ttft_s=1e-6)
    late = Request([1] * 64, 10, slo=slo, priority_class="interactive", arrival_s=now)
    with pytest.raises(Rejected, match=r"later than slo_ttft_ms 0\.001:"):
        scheduler.submit(late, now)


def test_the_wait_grows_with_the_queue_and_with_full_rows() -> None:
    pacer = Pacer(StepTimeModel(make_profile()))
    request, running = Request([1] * 64, 10), [decoding(None) for _ in range(4)]
    empty = pacer.predicted_ttft_s(request, [], [], 64, 4)
    queued = pacer.predicted_ttft_s(request, [Request([1] * 512, 10)], [], 64, 4)
    full = pacer.predicted_ttft_s(request, [], running, 64, 0)
    assert empty < queued
    assert full > 95 * pacer.step_time.verify_s(4, 0) * 0.9
    assert np.isfinite(full)


def test_a_rejected_request_is_answered_not_lost() -> None:
    from specserve.loop import Loop

    scheduler = make_scheduler()
    answered: list[tuple[Request, Exception]] = []

    class Core:
        def __init__(self) -> None:
            self.scheduler = scheduler

        def clock(self) -> float:
            return 0.0

    loop = Loop(Core(), lambda _: None, lambda rs, e: answered.extend((r, e) for r in rs))
    scheduler.submit(Request([1], 10))
    request = Request([1] * 512, 10, slo=SLO(ttft_s=1e-4), priority_class="interactive")
    loop._admit(request)
    assert [r for r, _ in answered] == [request]
    assert request.finish_reason is FinishReason.REJECTED
    assert request not in scheduler.requests
