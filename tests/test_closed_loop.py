"""Closed loops that take turns on one pair of engines: each with its own time, blocks and texts."""

from __future__ import annotations

from functools import partial

import pytest
from conftest import MAX_SEQ_LEN, FakeClock, make_request
from paged_lm import PagedLM, plain_decode

from bench.closed_loop import ClosedLoop, Stopwatch
from specserve.assemble import assemble
from specserve.block_manager import BlockManager
from specserve.config import Config, SchedulerConfig
from specserve.engines import EngineInfo
from specserve.engines.model_draft import ModelDraftEngine
from specserve.engines.model_target import ModelTargetEngine
from specserve.policies.fixed import FixedPolicy
from specserve.request import Request
from specserve.sampling_params import SamplingParams

PASS_S = 0.01
ROWS = 2


def test_stopwatch_stands_still_between_turns() -> None:
    clock = FakeClock()
    stopwatch = Stopwatch(clock)
    for _ in range(2):
        clock.advance(100.0)
        with stopwatch.running():
            clock.advance(1.0)
            assert stopwatch() % 1.0 == 0.0
    assert stopwatch() == 2.0


@pytest.mark.parametrize("turn_steps", [1, 3])
def test_loops_that_take_turns_do_not_disturb_each_other(turn_steps: int) -> None:
    clock, blocks = FakeClock(), BlockManager(64, 4)
    target, draft = PagedLM(64, 4), PagedLM(64, 4, noise=1.5)
    target.spend = partial(clock.advance, PASS_S)
    engines = ModelDraftEngine(draft), ModelTargetEngine(target)
    requests: list[list[Request]] = []
    loops = []
    for i, policy in enumerate((FixedPolicy(0), FixedPolicy(3))):
        stopwatch = Stopwatch(clock)
        core = assemble(
            Config(scheduler=SchedulerConfig(max_num_seqs=ROWS, prefill_chunk_tokens=3)),
            info=EngineInfo(target.vocab_size, MAX_SEQ_LEN, 64, 4),
            draft_engine=engines[0], target_engine=engines[1], policy=policy, blocks=blocks,
            clock=stopwatch,
        )  # fmt: skip
        requests.append([make_request([1 + k, 2, 3, 4, 5], 12, key=100 * i + k) for k in range(6)])
        loops.append(ClosedLoop(core, stopwatch, ROWS))
        loops[i].submit(requests[i])
    running = list(loops)
    while running:
        running = [loop for loop in running if loop.advance(turn_steps)]

    plain, speculating = loops
    assert plain.clock() + speculating.clock() == pytest.approx(clock.now)
    assert plain.rate == pytest.approx(ROWS / PASS_S)
    assert plain.rate_with_prompts < plain.rate, "steps inside a prompt give no tokens"
    assert speculating.rate > plain.rate
    for of_loop in requests:
        done = [request for request in of_loop if request.is_finished]
        assert len(done) > len(of_loop) - ROWS
        for request in done:
            expected = plain_decode(target, request.token_ids[:5], 12, SamplingParams())
            assert request.token_ids[5:] == expected
