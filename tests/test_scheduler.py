"""Who runs, with how many tokens, in which memory: accounting that holds after every step.

The scheduler runs alone here: drafts and verifications are scripted, so whatever engines and
policies may answer, the counters, the queues and the block tables must stay right.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from conftest import ACCEPTANCE_TABLE, drive, make_core, make_request, make_scheduler
from hypothesis import given, settings
from hypothesis import strategies as st
from paged_lm import PagedLM, plain_decode

from specserve.batch import Batch, Draft, Verified
from specserve.block_manager import BlockManager
from specserve.config import PolicyConfig, SchedulerConfig
from specserve.policies.fixed import FixedPolicy
from specserve.request import SLO, FinishReason, Request
from specserve.scheduler import Scheduler, StepOutput

FIXED = PolicyConfig(name="fixed", num_draft_tokens=4)
Script = Callable[[int, int], tuple[int, int, int]]


def all_accepted(cap: int, position: int) -> tuple[int, int, int]:
    """Draft, choose and accept all that a row may."""
    return cap, cap, cap


def all_rejected(cap: int, position: int) -> tuple[int, int, int]:
    """Draft and choose all that a row may; the target agrees with none of it."""
    return cap, cap, 0


def step(
    scheduler: Scheduler, script: Script = all_accepted, now: float = 0.0
) -> tuple[Batch, list[StepOutput]]:
    """Run one step with (drafted, chosen, accepted) tokens of each row as the script says."""
    batch = scheduler.schedule(now)
    drafts, chosen, outputs = [], [], []
    for row in batch.rows:
        drafted, kept, accepted = script(row.max_draft_tokens, row.num_computed_tokens)
        drafts.append(Draft([7] * drafted, [0.5] * drafted))
        chosen.append([7] * kept)
        outputs.append(Verified([7] * accepted + [8] if row.samples else []))
    return batch, scheduler.commit(batch, drafts, chosen, outputs, now)


def run(scheduler: Scheduler, script: Script = all_accepted) -> list[Request]:
    """Step until nothing is left; return the requests in the order they finished."""
    finished = []
    while scheduler.has_work:
        _, results = step(scheduler, script)
        finished += [result.request for result in results if result.finish_reason]
        scheduler.check_integrity()
    return finished


def decoding(scheduler: Scheduler, num_requests: int, max_tokens: int = 50) -> list[Request]:
    """Submit requests with short prompts and step until all of them decode."""
    requests = [make_request([1, 2, 3], max_tokens) for _ in range(num_requests)]
    for request in requests:
        scheduler.submit(request)
    while any(request.num_output_tokens == 0 for request in requests):
        step(scheduler, all_rejected)
    return requests


# -- random workloads --------------------------------------------------------------------------


def check_batch(scheduler: Scheduler, batch: Batch) -> None:
    """Assert what must be true of any scheduled batch."""
    config = scheduler.config
    drafts = sum(row.max_draft_tokens for row in batch.rows)
    assert 0 < len(batch.rows) <= config.max_num_seqs
    assert batch.num_base_tokens + drafts <= config.max_num_batched_tokens
    chunks = [row for row in batch.rows if len(row.token_ids) > 1]
    assert sum(len(row.token_ids) for row in chunks) <= config.prefill_chunk_tokens
    running = {request.key: request for request in scheduler.running}
    assert len({row.key for row in batch.rows}) == len(batch.rows)
    for row in batch.rows:
        request = running[row.key]
        start, end = row.num_computed_tokens, row.num_computed_tokens + len(row.token_ids)
        assert row.token_ids == request.token_ids[start:end]
        assert start == request.num_computed_tokens
        assert row.samples == (end == request.num_tokens)
        limit = max(0, request.max_tokens - request.num_output_tokens - 1) if row.samples else 0
        assert 0 <= row.max_draft_tokens <= limit
        if row.max_draft_tokens:
            assert row.catch_up_token_ids == request.token_ids[row.num_draft_computed_tokens :]
            assert row.num_draft_computed_tokens + len(row.catch_up_token_ids) == end
        covered = len(row.block_table) * scheduler.blocks.block_size
        assert covered >= end + row.max_draft_tokens


def check_counters(scheduler: Scheduler) -> None:
    """Assert what must be true of any request between steps."""
    scheduler.check_integrity()
    for request in scheduler.requests:
        assert request.num_computed_tokens < request.num_tokens
        assert request.num_draft_computed_tokens < request.num_tokens
        assert request.num_output_tokens < request.max_tokens
        assert len(request.block_table) <= scheduler.blocks.blocks_for(request.num_tokens)
        covered = len(request.block_table) * scheduler.blocks.block_size
        assert request.num_computed_tokens <= covered
        assert request.num_draft_computed_tokens <= covered
        assert (
            request.num_accepted_tokens <= request.num_verified_tokens <= request.num_drafted_tokens
        )


@settings(max_examples=200)
@given(seed=st.integers(0, 2**32), policy=st.sampled_from(["none", "adaptive", "specserve", FIXED]))
def test_accounting_holds_after_every_step_of_random_workloads(seed: int, policy: Any) -> None:
    rng = random.Random(seed)
    max_num_seqs, num_blocks = rng.randint(1, 6), rng.randint(12, 30)
    scheduler = make_scheduler(
        policy,
        num_blocks=num_blocks,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_seqs + rng.choice([0, 2, 10, 100]),
        prefill_chunk_tokens=rng.choice([1, 3, 8, 40]),
    )
    requests = [random_request(rng) for _ in range(rng.randint(1, 8))]
    coming = list(requests)

    def script(cap: int, position: int) -> tuple[int, int, int]:
        drafted = rng.choice([cap, rng.randint(0, cap)])
        chosen = rng.choice([drafted, rng.randint(0, drafted)])
        return drafted, chosen, rng.randint(0, chosen)

    for i in range(2000):
        while coming and rng.random() < 0.5:
            scheduler.submit(coming.pop())
        if rng.random() < 0.05:
            scheduler.abort(rng.choice(requests).key)
        if scheduler.has_work:
            random_step(scheduler, script, now=0.01 * i)
        check_counters(scheduler)
        if not (coming or scheduler.has_work):
            break
    assert all(request.is_finished for request in requests)
    assert scheduler.blocks.num_used_blocks == 0
    assert {request.key for request in requests} <= set(scheduler.take_released())


def random_step(scheduler: Scheduler, script: Script, now: float) -> None:
    batch = scheduler.schedule(now)
    check_batch(scheduler, batch)
    drafts, chosen, outputs = [], [], []
    for row in batch.rows:
        drafted, kept, accepted = script(row.max_draft_tokens, row.num_computed_tokens)
        drafts.append(Draft([7] * drafted, [0.5] * drafted))
        chosen.append([7] * kept)
        outputs.append(Verified([7] * accepted + [8] if row.samples else []))
    scheduler.commit(batch, drafts, chosen, outputs, now)


def random_request(rng: random.Random) -> Request:
    return make_request(
        [1] * rng.choice([1, 2, 9, 30]),
        rng.choice([1, 2, 9, 18]),
        end_id=rng.choice([None, None, None, 8]),
        max_draft_tokens=rng.choice([None, None, 0, 2]),
        num_draft_tokens=rng.choice([None, None, None, 0, 3]),
        slo=rng.choice([SLO(), SLO(), SLO(0.05, 0.02), SLO(5.0, None)]),
    )


# -- what comes in -----------------------------------------------------------------------------


def test_empty_prompt_is_refused() -> None:
    with pytest.raises(ValueError, match="is empty: the prompt needs at least one token"):
        make_scheduler().submit(make_request([], 5))


@pytest.mark.parametrize("max_tokens", [0, -3])
def test_max_tokens_below_one_is_refused(max_tokens: int) -> None:
    with pytest.raises(ValueError, match=f"max_tokens is {max_tokens}: must be at least 1"):
        make_scheduler().submit(make_request([1], max_tokens))


def test_too_long_request_is_refused_with_value_limit_and_fix() -> None:
    scheduler = make_scheduler(max_seq_len=20)
    with pytest.raises(ValueError, match=r"15 tokens.*\(6\) = 21 .*limit of 20: shorten"):
        scheduler.submit(make_request([1] * 15, 6))
    assert not scheduler.has_work
    scheduler.submit(make_request([1] * 15, 5))


def test_request_that_never_fits_the_cache_is_refused_with_value_limit_and_fix() -> None:
    scheduler = make_scheduler(num_blocks=4, block_size=4)
    with pytest.raises(ValueError, match=r"17 tokens.* of 16 tokens.*scheduler\.kv_cache_tokens"):
        scheduler.submit(make_request([1] * 10, 7))
    scheduler.submit(make_request([1] * 10, 6))
    assert len(run(scheduler)) == 1


def test_a_token_budget_below_one_for_each_row_is_refused() -> None:
    with pytest.raises(ValueError, match=r"max_num_batched_tokens is 3.*max_num_seqs \(4\)"):
        make_scheduler(max_num_seqs=4, max_num_batched_tokens=3)


@pytest.mark.parametrize("name", ["max_draft_tokens", "max_lookup_tokens"])
def test_a_negative_cap_of_drafts_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=rf"policy\.{name} is -1: must be at least 0"):
        Scheduler(SchedulerConfig(), BlockManager(8, 4), FixedPolicy(0), **{name: -1})


@pytest.mark.parametrize("name", ["max_num_seqs", "prefill_chunk_tokens"])
def test_a_limit_that_lets_nothing_run_is_refused(name: str) -> None:
    """Guards against a server that accepts requests and then spins on empty batches for ever."""
    with pytest.raises(ValueError, match=name):
        make_scheduler(**{name: 0})


def test_abort_frees_a_waiting_and_a_running_request() -> None:
    scheduler = make_scheduler(max_num_seqs=1)
    running, waiting = make_request([1] * 9, 5), make_request([1], 5)
    for request in (running, waiting):
        scheduler.submit(request)
    step(scheduler)
    for request in (waiting, running):
        assert scheduler.abort(request.key) is request
        assert request.finish_reason is FinishReason.CANCELLED
        scheduler.check_integrity()
    assert not scheduler.has_work
    assert scheduler.blocks.num_used_blocks == 0
    assert sorted(scheduler.take_released()) == sorted([running.key, waiting.key])
    assert scheduler.take_released() == []


def test_abort_of_an_unknown_request_is_ignored() -> None:
    assert make_scheduler().abort(12345) is None


# -- base tokens -------------------------------------------------------------------------------


def test_requests_finish_in_the_order_they_came() -> None:
    scheduler = make_scheduler(max_num_seqs=2)
    requests = [make_request([1, 2], 4) for _ in range(6)]
    for request in requests:
        scheduler.submit(request)
    assert run(scheduler) == requests


def test_a_long_prompt_at_the_head_is_not_overtaken() -> None:
    scheduler = make_scheduler(num_blocks=10, max_num_seqs=4, prefill_chunk_tokens=100)
    decoding(scheduler, 2, max_tokens=10)
    long, short = make_request([1] * 34, 2), make_request([1], 1)
    scheduler.submit(long)
    scheduler.submit(short)
    assert run(scheduler).index(long) < 3


def test_chunks_of_a_prompt_and_decoded_tokens_share_a_step() -> None:
    scheduler = make_scheduler(prefill_chunk_tokens=4)
    first = decoding(scheduler, 1)[0]
    prompt = make_request(range(1, 11), 3)
    scheduler.submit(prompt)
    sizes = []
    for _ in range(3):
        batch, results = step(scheduler)
        rows = {row.key: row for row in batch.rows}
        assert rows[first.key].samples
        sizes.append((rows[prompt.key].num_computed_tokens, len(rows[prompt.key].token_ids)))
        sampled = {result.request.key for result in results}
        assert (prompt.key in sampled) == (sum(sizes[-1]) == 10)
    assert sizes == [(0, 4), (4, 4), (8, 2)]
    assert prompt.num_output_tokens == 1


def test_prompts_share_the_chunk_budget_in_order() -> None:
    scheduler = make_scheduler(prefill_chunk_tokens=10)
    requests = [make_request([1] * 7, 2) for _ in range(3)]
    for request in requests:
        scheduler.submit(request)
    batch, _ = step(scheduler)
    assert [len(row.token_ids) for row in batch.rows] == [7, 3]
    batch, _ = step(scheduler)
    assert [len(row.token_ids) for row in batch.rows] == [1, 4, 6]


def test_rows_are_never_more_than_max_num_seqs() -> None:
    scheduler = make_scheduler(max_num_seqs=3)
    for _ in range(5):
        scheduler.submit(make_request([1], 3))
    batch, _ = step(scheduler)
    assert len(batch.rows) == 3
    assert len(scheduler.waiting) == 2


def test_decoding_rows_get_their_token_before_any_prompt() -> None:
    scheduler = make_scheduler(max_num_seqs=4, max_num_batched_tokens=5)
    old = decoding(scheduler, 3)
    scheduler.submit(make_request([1] * 20, 3))
    batch, _ = step(scheduler)
    assert [row.key for row in batch.rows[:3]] == [request.key for request in old]
    assert [len(row.token_ids) for row in batch.rows] == [1, 1, 1, 2]


# -- drafts ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("draft", "target", "expected"), ACCEPTANCE_TABLE)
def test_counters_move_over_what_was_accepted(
    draft: list[int], target: list[int], expected: list[int]
) -> None:
    scheduler = make_scheduler(FIXED)
    request = decoding(scheduler, 1)[0]
    known, computed = request.num_tokens, request.num_computed_tokens
    batch = scheduler.schedule(0.0)
    results = scheduler.commit(
        batch, [Draft(draft, [0.5] * len(draft))], [draft], [Verified(expected)], 0.0
    )
    accepted = len(expected) - 1
    assert results[0].token_ids == expected
    assert request.num_tokens == known + len(expected)
    assert request.num_computed_tokens == computed + 1 + accepted
    assert request.num_verified_tokens == len(draft)
    assert request.num_accepted_tokens == accepted
    if draft:  # the draft engine never saw its own last token
        assert request.num_draft_computed_tokens == known + min(accepted, len(draft) - 1)
    else:
        assert request.num_draft_computed_tokens == 0
    scheduler.check_integrity()


def test_rejected_draft_frees_its_blocks() -> None:
    scheduler = make_scheduler(PolicyConfig(name="fixed", num_draft_tokens=8), block_size=4)
    request = decoding(scheduler, 1)[0]
    batch = scheduler.schedule(0.0)
    assert len(request.block_table) == 3  # 4 known tokens and 8 of a draft
    scheduler.commit(batch, [Draft([7] * 8, [0.5] * 8)], [[7] * 8], [Verified([8])], 0.0)
    assert len(request.block_table) == 2  # 5 known tokens
    scheduler.check_integrity()


@pytest.mark.parametrize("k", range(9))
@pytest.mark.parametrize("max_tokens", [1, 2, 3, 5, 8])
def test_a_draft_never_runs_past_the_end(k: int, max_tokens: int) -> None:
    scheduler = make_scheduler(PolicyConfig(name="fixed", num_draft_tokens=k))
    request = make_request([1], max_tokens)
    scheduler.submit(request)
    while scheduler.has_work:
        limit = max_tokens - request.num_output_tokens - 1
        batch, _ = step(scheduler)
        assert batch.rows[0].max_draft_tokens == min(k, limit)
    assert request.num_output_tokens == max_tokens
    assert request.finish_reason is FinishReason.LENGTH


def test_a_prompts_first_token_does_not_wait_for_a_draft() -> None:
    scheduler = make_scheduler(FIXED, prefill_chunk_tokens=4)
    scheduler.submit(make_request([1] * 6, 10))
    drafts = [step(scheduler)[0].rows[0].max_draft_tokens for _ in range(3)]
    assert drafts == [0, 0, 4]


def test_drafts_take_only_what_base_tokens_leave() -> None:
    scheduler = make_scheduler(FIXED, max_num_seqs=4, max_num_batched_tokens=9)
    decoding(scheduler, 3)
    batch, _ = step(scheduler)
    assert [row.max_draft_tokens for row in batch.rows] == [4, 2, 0]


def test_drafts_do_not_starve_a_prompt() -> None:
    """Guards the order base before draft: the other order made a worst TTFT nine times as long."""
    scheduler = make_scheduler(
        PolicyConfig(name="fixed", num_draft_tokens=8), max_num_seqs=8, max_num_batched_tokens=16
    )
    decoding(scheduler, 4)
    prompt = make_request([1] * 30, 3)
    scheduler.submit(prompt)
    for _ in range(2):
        batch, _ = step(scheduler)
        assert [len(row.token_ids) for row in batch.rows] == [1, 1, 1, 1, 12]
        assert [row.max_draft_tokens for row in batch.rows] == [0] * 5
    assert prompt.num_computed_tokens == 24


def test_drafts_take_free_blocks_and_preempt_nobody() -> None:
    scheduler = make_scheduler(PolicyConfig(name="fixed", num_draft_tokens=8), num_blocks=5)
    decoding(scheduler, 2, max_tokens=12)
    batch, _ = step(scheduler, all_rejected)
    # Each knows 4 tokens and holds 1 block of 4 slots. The first takes 2 of the 3 free blocks, the
    # second what is left.
    assert [row.max_draft_tokens for row in batch.rows] == [8, 4]
    assert scheduler.num_preemptions == 0


def test_a_row_that_does_not_draft_takes_no_memory_for_one() -> None:
    """Guards the tables of prompts in chunks while another request drafts and memory is short."""
    scheduler = make_scheduler(FIXED, num_blocks=10, prefill_chunk_tokens=4)
    decoding(scheduler, 1, max_tokens=20)
    prompt = make_request([1] * 36, 4)
    scheduler.submit(prompt)
    batch, _ = step(scheduler, all_rejected)
    row = batch.rows[1]
    assert row.key == prompt.key
    assert (row.max_draft_tokens, row.catch_up_token_ids) == (0, [])
    assert len(prompt.block_table) == 1


def test_a_prompt_in_chunks_does_not_widen_the_token_budget() -> None:
    """Guards the budget: a row whose draft length falls below 0 would hand tokens to the next."""
    scheduler = make_scheduler(
        FIXED, num_blocks=12, max_num_seqs=3, max_num_batched_tokens=7, prefill_chunk_tokens=4
    )
    decoding(scheduler, 1, max_tokens=20)
    scheduler.submit(make_request([1] * 44, 4))
    scheduler.submit(make_request([1], 20))
    for _ in range(4):
        batch, _ = step(scheduler, all_rejected)
        assert all(row.max_draft_tokens >= 0 for row in batch.rows)
        drafts = sum(row.max_draft_tokens for row in batch.rows)
        assert batch.num_base_tokens + drafts <= 7


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        pytest.param({}, 4, id="the policy's"),
        pytest.param({"max_draft_tokens": 2}, 2, id="capped"),
        pytest.param({"max_draft_tokens": 99}, 4, id="cap above the policy's"),
        pytest.param({"max_draft_tokens": 0}, 0, id="no speculation"),
        pytest.param({"num_draft_tokens": 6}, 6, id="fixed above the policy's"),
        pytest.param({"num_draft_tokens": 0}, 0, id="fixed at none"),
        pytest.param({"num_draft_tokens": 6, "max_draft_tokens": 3}, 3, id="fixed and capped"),
    ],
)
def test_a_request_has_its_own_draft_length(values: dict[str, int], expected: int) -> None:
    scheduler = make_scheduler(FIXED)
    scheduler.submit(make_request([1, 2], 30, **values))
    step(scheduler)
    batch, _ = step(scheduler)
    assert batch.rows[0].max_draft_tokens == expected


def test_no_request_drafts_more_than_the_hard_cap() -> None:
    """`policy.max_draft_tokens` is a cap for every policy; a client must not lift it."""
    config = PolicyConfig(name="fixed", num_draft_tokens=4, max_draft_tokens=8)
    scheduler = make_scheduler(config)
    scheduler.submit(make_request([1, 2], 200, num_draft_tokens=100))
    step(scheduler)
    batch, _ = step(scheduler)
    assert batch.rows[0].max_draft_tokens == 8


def test_a_row_that_skips_drafting_catches_up_from_where_it_was() -> None:
    scheduler = make_scheduler(FIXED)
    request = decoding(scheduler, 1)[0]
    step(scheduler, lambda cap, position: (cap, cap, 1))
    seen, known = request.num_draft_computed_tokens, request.num_tokens
    for _ in range(3):
        step(scheduler, lambda cap, position: (0, 0, 0))
    batch, _ = step(scheduler)
    assert batch.rows[0].num_draft_computed_tokens == seen < known
    assert len(batch.rows[0].catch_up_token_ids) == known + 3 - seen


# -- memory ------------------------------------------------------------------------------------


def test_the_youngest_is_preempted_and_gives_everything_back() -> None:
    scheduler = make_scheduler(num_blocks=6, block_size=4)
    old, young = decoding(scheduler, 2, max_tokens=20)
    while scheduler.num_preemptions == 0:
        batch, _ = step(scheduler)
    assert [row.key for row in batch.rows] == [old.key]
    assert list(scheduler.waiting) == [young]
    assert young.block_table == []
    assert (young.num_computed_tokens, young.num_draft_computed_tokens) == (0, 0)
    assert young.num_preemptions == 1
    assert young.key in scheduler.take_released()
    tokens = list(young.token_ids)
    assert run(scheduler) == [old, young]
    assert young.token_ids[: len(tokens)] == tokens
    assert young.num_output_tokens == 20


def test_preempted_requests_wait_in_their_order_before_those_behind_them() -> None:
    scheduler = make_scheduler(num_blocks=6, block_size=4, max_num_seqs=3)
    _, young, youngest = decoding(scheduler, 3, max_tokens=20)
    later = make_request([1], 3)
    scheduler.submit(later)
    while scheduler.num_preemptions < 2:
        step(scheduler)
    assert list(scheduler.waiting) == [young, youngest, later]


def test_requests_wait_in_order_of_their_first_tokens_deadlines() -> None:
    scheduler = make_scheduler(max_num_seqs=1)
    best_effort, relaxed, urgent = (make_request([1], 2, slo=SLO(ttft_s=t)) for t in (None, 9, 1))
    for request in (best_effort, relaxed, urgent):
        scheduler.submit(request)
    assert run(scheduler) == [urgent, relaxed, best_effort]


def test_best_effort_is_preempted_before_a_request_with_an_objective() -> None:
    scheduler = make_scheduler(num_blocks=6, block_size=4)
    promised = make_request([1, 2, 3], 20, slo=SLO(tpot_s=0.01))
    best_effort = make_request([1, 2, 3], 20)
    for request in (best_effort, promised):
        scheduler.submit(request)
    assert run(scheduler) == [promised, best_effort]
    assert (best_effort.num_preemptions > 0, promised.num_preemptions) == (True, 0)


def test_preempted_requests_still_get_their_tokens() -> None:
    target = PagedLM(7, 4)
    core = make_core(
        FIXED, target=target, draft=PagedLM(7, 4, noise=1.5), num_blocks=7, max_num_seqs=3
    )
    requests = [make_request([i, 3], 24) for i in range(3)]
    outputs = drive(core, requests)
    assert core.scheduler.num_preemptions > 0
    assert outputs == [plain_decode(target, r.prompt_token_ids, 24, r.sampling) for r in requests]


# -- what comes out ----------------------------------------------------------------------------


def commit(
    scheduler: Scheduler, output: Sequence[int], log_probs: Sequence[float] = ()
) -> StepOutput:
    batch = scheduler.schedule(0.0)
    draft = list(output[:-1])
    verified = Verified(list(output), list(log_probs))
    return scheduler.commit(batch, [Draft(draft, [0.5] * len(draft))], [draft], [verified], 0.0)[0]


def test_the_end_token_ends_the_output_inside_a_draft() -> None:
    scheduler = make_scheduler(FIXED)
    request = make_request([1, 2], 30, end_id=9)
    scheduler.submit(request)
    step(scheduler)
    result = commit(scheduler, [5, 9, 6, 9], [-0.1, -0.2, -0.3, -0.4])
    assert result.token_ids == [5, 9]
    assert result.log_probs == [-0.1, -0.2]
    assert result.finish_reason is FinishReason.END_ID
    assert request.token_ids[-2:] == [5, 9]
    assert not scheduler.has_work


def test_the_end_token_in_the_prompt_ends_nothing() -> None:
    scheduler = make_scheduler()
    scheduler.submit(make_request([9, 1, 9], 3, end_id=9))
    assert run(scheduler)[0].finish_reason is FinishReason.LENGTH


def test_the_end_token_in_last_place_is_the_reason() -> None:
    scheduler = make_scheduler()
    scheduler.submit(make_request([1], 1, end_id=8))  # the script's target token
    assert run(scheduler)[0].finish_reason is FinishReason.END_ID


def test_times_are_of_the_first_and_the_last_token() -> None:
    scheduler = make_scheduler(prefill_chunk_tokens=2)
    request = make_request([1, 2, 3], 3)
    scheduler.submit(request)
    for now in (1.0, 2.0, 3.0, 4.0):
        step(scheduler, now=now)
    times = (request.first_scheduled_s, request.first_token_s, request.last_token_s)
    assert times == (1.0, 2.0, 4.0)


def test_a_preempted_request_was_first_scheduled_when_it_was() -> None:
    scheduler = make_scheduler(num_blocks=6, block_size=4)
    requests = [make_request([1, 2, 3], 20) for _ in range(2)]
    for request in requests:
        scheduler.submit(request)
    for now in itertools.count(1):
        if not scheduler.has_work:
            break
        step(scheduler, now=float(now))
    assert scheduler.num_preemptions > 0
    assert [request.first_scheduled_s for request in requests] == [1.0, 1.0]
    assert [request.first_token_s for request in requests] == [1.0, 1.0]
