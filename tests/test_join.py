"""Who comes while others draft: joins the step, changes nobody's tokens, keeps every limit."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest
from conftest import all_policies, make_core, make_request, scrub, step_time
from paged_lm import PagedLM, plain_decode
from test_pacing import decoding

from specserve.config import PolicyConfig
from specserve.core import SpecServe
from specserve.loop import Loop
from specserve.pacing import Pacer
from specserve.request import Request

PROMPT = [1, 2, 3]


def joining(core: SpecServe, requests: Sequence[Request]) -> Iterator[Request]:
    """Let one of the requests come into each step from now on; yield those who have."""
    coming = iter(requests)
    come: list[Request] = []

    def arrive() -> None:
        for request in coming:
            core.scheduler.submit(request)
            come.append(request)
            return

    core.take_arrivals = arrive
    while core.scheduler.has_work:
        core.step()
        scrub(core)
        core.scheduler.check_integrity()
        yield from come
        come.clear()


def core_at_work(policy: PolicyConfig | str = "specserve", **limits: int) -> SpecServe:
    core = make_core(policy, **limits)
    core.scheduler.submit(make_request(PROMPT, 40))
    core.step()
    return core


def test_a_request_has_its_first_token_from_the_step_in_which_it_came() -> None:
    core = core_at_work()
    late = make_request([7, 8, 9], 12)
    assert next(joining(core, [late])) is late
    assert late.num_output_tokens == 1
    assert core.stats.num_steps == 2


@pytest.mark.parametrize("policy", all_policies())
@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_nobodys_tokens_change(policy: PolicyConfig, temperature: float) -> None:
    core = core_at_work(policy)
    first = core.scheduler.running[0]
    late = [make_request([i, 8, 9], 14, temperature=temperature, seed=i) for i in range(5)]
    assert list(joining(core, late)) == late
    for request in (first, *late):
        expected = plain_decode(
            PagedLM(64, 4), request.prompt_token_ids, request.max_tokens, request.sampling
        )
        assert request.token_ids[request.num_prompt_tokens :] == expected


def test_a_long_prompt_joins_with_what_fits_in_the_step() -> None:
    core = core_at_work("none", max_num_batched_tokens=8, max_num_seqs=4)
    late = make_request(range(1, 21), 3)
    assert next(joining(core, [late])) is late
    assert late.num_computed_tokens == 7
    assert late.num_output_tokens == 0


def test_a_step_whose_prompts_have_their_share_takes_no_more() -> None:
    core = core_at_work("none", prefill_chunk_tokens=4)
    core.scheduler.submit(make_request(range(1, 21), 3))
    late = make_request([7, 8, 9], 3)
    assert next(joining(core, [late])) is late
    assert late.first_scheduled_s is None


def test_nobody_overtakes_who_waits() -> None:
    core = core_at_work(max_num_seqs=1)
    core.scheduler.submit(make_request([4, 5, 6], 3))
    late = make_request([7, 8, 9], 3)
    assert next(joining(core, [late])) is late
    assert late.first_scheduled_s is None


def test_the_step_is_explained_and_its_time_not_learnt() -> None:
    core = core_at_work()
    learnt = core.policy.step_time.verify_error()  # type: ignore[attr-defined]
    late = make_request([7, 8, 9], 12, trace=[])
    next(joining(core, [late]))
    assert late.trace is not None
    (step,) = late.trace
    assert (step.reason, step.predicted_s, step.num_rows) == ("prompt", None, 2)
    assert core.policy.step_time.verify_error() == learnt  # type: ignore[attr-defined]
    assert core.stats.step_times[-1][0] is None


def test_what_joins_leaves_the_step_below_the_next_stair() -> None:
    """Verification costs 10 ms up to 32 tokens and 100 ms more from the 33rd on."""
    pacer = Pacer(step_time(num_free_tokens=32, token_s=0.1))
    assert pacer.joining_tokens([decoding(None)], 12, 60, now=0.0) == 20


def test_what_joins_makes_nobody_late() -> None:
    pacer = Pacer(step_time(num_free_tokens=1, token_s=0.001))
    late = decoding(0.030)  # which may not be slowed down below its own pace
    curve = pacer.step_time.verify_curve(4, 60, late.num_computed_tokens)
    chunk = pacer.joining_tokens([late], 4, 60, now=100.0)
    assert curve[chunk] <= 0.030 < curve[chunk + 1]
    assert pacer.joining_tokens([decoding(0.001)], 4, 60, now=100.0) == 0


def test_the_loop_takes_requests_in_while_a_draft_runs() -> None:
    draft = PagedLM(64, 4, noise=1.5)
    core = make_core("fixed", draft=draft)
    loop = Loop(core, lambda outputs: None, lambda requests, error: None)
    early, late = make_request(PROMPT, 20), make_request([7, 8, 9], 4)
    core.scheduler.submit(early)
    core.step()
    draft.spend = lambda: loop.submit(late) if late.arrival_s == 0.0 else None
    core.step()
    assert late.num_output_tokens == 1
