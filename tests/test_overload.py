"""More work than there is time for: who waits, who is told to come back, and who is served."""

from __future__ import annotations

import queue
import re
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from conftest import FakeClock, make_core, make_request, make_scheduler, step_time
from hypothesis import given
from hypothesis import strategies as st
from paged_lm import PagedLM, plain_decode
from server_client import Reference, generate, grpc_many, grpc_one, grpc_status, wait_until_idle

from bench import overload
from bench.served import Served, serving
from specserve.admission import Rejected, TimedOut
from specserve.block_manager import BlockManager
from specserve.config import SchedulerConfig, SLOConfig
from specserve.launch.installation import find_installation
from specserve.loop import Loop
from specserve.margin import Margin
from specserve.pacing import Pacer
from specserve.policies.fixed import FixedPolicy
from specserve.request import SLO, FinishReason, Request
from specserve.scheduler import Scheduler
from specserve.waiting import WaitingQueue

WAIT_S = 20.0
RETRY = re.compile(r"try again in (\d+) ms")


# -- the queue ---------------------------------------------------------------------------------


def make_queue(**shares: float) -> WaitingQueue:
    return WaitingQueue(lambda request: request.arrival_s, shares)


def turns(waiting: WaitingQueue, count: int) -> list[str]:
    """Serve so many requests and return their classes."""
    names = []
    for _ in range(count):
        request = waiting.next()
        waiting.take(request)
        names.append(request.priority_class)
    return names


def fill(waiting: WaitingQueue, count: int, name: str, **values: Any) -> None:
    """Have so many requests of a class wait."""
    for i in range(count):
        waiting.put(make_request([1] * 4, 6, priority_class=name, arrival_s=float(i), **values))


def test_without_shares_the_order_is_that_of_deadlines() -> None:
    waiting = make_queue()
    for arrival_s in (3.0, 1.0, 2.0, 1.0):
        waiting.put(make_request(arrival_s=arrival_s, priority_class=str(arrival_s)))
    assert turns(waiting, 4) == ["1.0", "1.0", "2.0", "3.0"]


def test_classes_get_turns_by_their_shares() -> None:
    waiting = make_queue(interactive=4.0, batch=1.0)
    fill(waiting, 100, "batch")
    fill(waiting, 100, "interactive")
    assert Counter(turns(waiting, 50)) == {"interactive": 40, "batch": 10}


def test_share_is_of_tokens_not_of_requests() -> None:
    waiting = make_queue(long=1.0, short=1.0)
    for i in range(20):
        waiting.put(make_request([1] * 50, 50, priority_class="long", arrival_s=float(i)))
    fill(waiting, 200, "short")
    counts = Counter(turns(waiting, 110))
    assert counts["short"] == pytest.approx(10 * counts["long"], abs=10)


def test_made_up_classes_share_one_place() -> None:
    """Guards against a client that names a class of its own for every request."""
    waiting = make_queue(interactive=1.0)
    for i in range(50):
        fill(waiting, 1, f"mine {i}")
    fill(waiting, 50, "interactive")
    assert turns(waiting, 40).count("interactive") == 20


def test_class_that_was_away_has_saved_up_nothing() -> None:
    waiting = make_queue(a=1.0, b=1.0)
    fill(waiting, 60, "a")
    assert turns(waiting, 20) == ["a"] * 20
    fill(waiting, 60, "b")
    assert turns(waiting, 20).count("b") <= 11


def test_preempted_requests_come_before_every_class() -> None:
    waiting = make_queue(interactive=100.0)
    fill(waiting, 5, "interactive")
    preempted = make_request(priority_class="batch", num_preemptions=1)
    waiting.put_first(preempted)
    assert waiting.next() is preempted


@pytest.mark.parametrize("share", [0.0, -1.0, float("inf"), float("nan")])
def test_share_must_be_above_0(share: float) -> None:
    with pytest.raises(ValueError, match=r"slo\.shares\.batch"):
        make_queue(batch=share)


@given(
    st.lists(
        st.tuples(st.sampled_from(["put", "take", "remove"]), st.sampled_from(["a", "b", "c"])),
        max_size=60,
    )
)
def test_counts_are_those_of_the_requests_that_wait(actions: list[tuple[str, str]]) -> None:
    waiting = make_queue(a=2.0, b=1.0)
    for action, name in actions:
        if action == "put":
            fill(waiting, 1, name)
        elif len(waiting) and action == "take":
            waiting.take(waiting.next())
        elif len(waiting):
            waiting.remove(list(waiting)[-1])
        assert waiting.num_tokens == sum(r.num_prompt_tokens for r in waiting)
        for request in waiting:
            names = [waiting.class_of(other) for other in waiting]
            assert waiting.usage_of(request)[0] == names.count(waiting.class_of(request))


# -- its bounds --------------------------------------------------------------------------------


def make_bounded(slo: SLOConfig | None = None, **limits: int) -> Scheduler:
    config = SchedulerConfig(**{"max_num_seqs": 2, "max_seq_len": 512, **limits})
    return Scheduler(config, BlockManager(64, 4), FixedPolicy(0), slo)


def submit_until_full(scheduler: Scheduler, **values: Any) -> str:
    """Submit requests until one is rejected; return why."""
    for _ in range(1000):
        try:
            scheduler.submit(make_request([1] * 5, 4, **values))
        except Rejected as rejection:
            return str(rejection)
    raise AssertionError("the queue has no bound")


def test_full_queue_says_its_limits_and_when_to_come_back() -> None:
    scheduler = make_bounded(max_waiting_requests=7)
    message = submit_until_full(scheduler)
    assert len(scheduler.waiting) == 7
    assert "7 requests with 35 prompt tokens wait" in message
    assert "limits are 7 and 131072" in message
    assert RETRY.search(message)
    assert scheduler.admission.num_rejected == {"full": 1}
    scheduler.check_integrity()


def test_prompt_tokens_that_wait_are_bounded() -> None:
    scheduler = make_bounded(max_waiting_tokens=23)
    submit_until_full(scheduler)
    assert scheduler.waiting.num_tokens == 20
    scheduler.submit(make_request([1] * 3, 4))


def test_prompt_longer_than_the_bound_may_wait_alone() -> None:
    scheduler = make_bounded(max_waiting_tokens=3)
    scheduler.submit(make_request([1] * 50, 4))
    assert RETRY.search(submit_until_full(scheduler))


def test_retry_hint_grows_with_what_waits() -> None:
    hints = []
    for limit in (4, 40):
        scheduler = make_bounded(max_waiting_requests=limit, prefill_chunk_tokens=16)
        scheduler.pacer = Pacer(step_time())
        message = submit_until_full(scheduler)
        match = RETRY.search(message)
        assert match, message
        hints.append(int(match[1]))
    assert 0 < hints[0] < hints[1]


def test_flood_of_one_class_leaves_the_others_their_places() -> None:
    scheduler = make_bounded(SLOConfig(shares={"interactive": 3.0}), max_waiting_requests=8)
    submit_until_full(scheduler, priority_class="flood")
    assert len(scheduler.waiting) == 8
    submit_until_full(scheduler, priority_class="interactive")
    counts = Counter(request.priority_class for request in scheduler.waiting)
    assert counts == {"flood": 8, "interactive": 6}  # three quarters of 8
    with pytest.raises(Rejected):
        scheduler.submit(make_request(priority_class="flood"))


# -- goodput -----------------------------------------------------------------------------------


@pytest.mark.slow
def test_goodput_holds_at_three_times_the_sustainable_load() -> None:
    """In virtual time, on a profile of real engines; before early refusals learned it fell to 0."""
    loads = overload.simulate(overload.parse(["--engine", "simulated", "--seconds", "40"]))
    peak_rps = overload.peak_rps(loads[:-1])
    assert loads[-1].offered_rps >= 2.5 * peak_rps
    assert loads[-1].goodput_rps >= 0.9 * peak_rps
    served = loads[-1].outcomes.total() - loads[-1].outcomes["rejected"]
    assert loads[-1].outcomes["good"] > 0.85 * served, "it let in whom it could not serve in time"


def test_idle_server_lets_in_whom_it_predicts_to_be_late() -> None:
    """Guards against a gate that wrong predictions close for ever: nothing would correct them."""
    scheduler = make_bounded()
    scheduler.pacer = Pacer(step_time(num_free_tokens=1, token_s=1.0))
    values = {"priority_class": "interactive", "slo": SLO(ttft_s=0.05)}
    scheduler.submit(make_request([1] * 32, 4, **values))
    with pytest.raises(Rejected, match="predicted"):
        scheduler.submit(make_request([1] * 32, 4, **values))


def test_margin_is_what_nine_in_ten_predictions_stay_within() -> None:
    margin, rng = Margin(), np.random.default_rng(5)
    for ratio in rng.lognormal(0.0, 0.5, 3000):
        margin.learn(1.0, ratio)
    found = []
    for ratio in rng.lognormal(0.0, 0.5, 3000):
        found.append(ratio <= margin.factor)
        margin.learn(1.0, ratio)
    assert np.mean(found) == pytest.approx(0.9, abs=0.02)


def test_margin_stays_within_its_limits() -> None:
    margin = Margin()
    for _ in range(1000):
        margin.learn(1.0, 1e9)
    assert margin.factor == pytest.approx(20.0)
    for _ in range(2000):
        margin.learn(1.0, 1e-9)
    assert margin.factor == pytest.approx(0.5)


# -- timeouts ----------------------------------------------------------------------------------


def test_expired_requests_are_those_whose_time_is_over() -> None:
    scheduler = make_scheduler()
    times = {1.0: 5.0, 2.0: 1.0, 3.0: None}
    requests = [make_request(arrival_s=a, timeout_s=t) for a, t in times.items()]
    for request in requests:
        scheduler.submit(request)
    assert scheduler.expired(2.9) == []
    assert scheduler.expired(3.0) == [requests[1]]
    scheduler.abort(requests[1].key, FinishReason.TIMEOUT)
    assert scheduler.expired(5.9) == []
    assert scheduler.expired(6.0) == [requests[0]]
    scheduler.abort(requests[0].key, FinishReason.TIMEOUT)
    assert scheduler.expired(1e9) == []


def test_request_that_runs_and_one_that_waits_time_out_and_the_third_does_not() -> None:
    clock, target = FakeClock(0.001), PagedLM()
    failures: queue.Queue[tuple[list[Request], Exception]] = queue.Queue()
    done: queue.Queue[Request] = queue.Queue()

    def sink(outputs: list[Any]) -> None:
        for output in outputs:
            if output.finish_reason:
                done.put(output.request)

    core = make_core("none", target=target, clock=clock, max_num_seqs=1)
    loop = Loop(core, sink, lambda requests, error: failures.put((requests, error)))
    runs = make_request([1], 200, timeout_s=0.5)
    waits = make_request([2], 10, timeout_s=0.3)
    stays = make_request([3], 10)
    for request in (runs, waits, stays):
        loop.submit(request)
    loop.start()
    ended = [failures.get(timeout=WAIT_S) for _ in range(2)]
    assert [requests for requests, _ in ended] == [[waits], [runs]]
    assert all(isinstance(error, TimedOut) for _, error in ended)
    assert "timeout of 0.3 s, it has 0 tokens: allow more time" in str(ended[0][1])
    assert done.get(timeout=WAIT_S) is stays
    loop.stop()
    assert (runs.finish_reason, waits.finish_reason) == (FinishReason.TIMEOUT,) * 2
    assert stays.token_ids[1:] == plain_decode(target, [3], 10, stays.sampling)
    assert core.scheduler.blocks.num_used_blocks == 0


# -- a real server -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def crowded(demo_engines: Path) -> Iterator[Served]:
    """Two rows, four places to wait."""
    if find_installation() is None:
        pytest.skip("nvidia-pytriton is not installed")
    overrides = ["scheduler.max_num_seqs=2", "scheduler.max_waiting_requests=4"]
    overrides += ["limits.max_request_s=30"]
    with serving([f"engine.dir={demo_engines}", *overrides]) as served:
        yield served


@pytest.mark.triton
@pytest.mark.openvino
def test_crowd_is_turned_away_and_who_came_in_is_served(
    crowded: Served, demo_engines: Path
) -> None:
    prompt, max_tokens = "class Stack:\n    ", 120
    (text,) = Reference(demo_engines).texts([prompt], max_tokens, end_id=None)
    tensors = {"text_input": prompt, "max_tokens": max_tokens, "end_id": -1, "stream": True}
    answers = grpc_many(crowded, "ensemble", [tensors] * 24, concurrency=24)
    served = [answer for answer in answers if answer.error is None]
    assert 4 <= len(served) < 24
    assert {answer.text for answer in served} == {text}
    for answer in answers:
        if answer.error is not None:
            assert "the queue is full" in answer.error
            assert RETRY.search(answer.error)
    wait_until_idle(crowded)


@pytest.mark.triton
@pytest.mark.openvino
def test_who_is_turned_away_finds_the_server_unavailable(crowded: Served) -> None:
    request = {"text_input": "x", "max_tokens": 300, "end_id": -1}
    with ThreadPoolExecutor(16) as pool:  # ten more than there is room for
        codes = set(pool.map(lambda _: grpc_status(crowded, "specserve", request), range(16)))
    assert codes == {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.OK}


@pytest.mark.triton
@pytest.mark.openvino
@pytest.mark.parametrize("model", ["ensemble", "specserve"])
def test_tritons_timeout_ends_a_request(crowded: Served, model: str) -> None:
    tensors = {"text_input": "import os", "max_tokens": 4000, "end_id": -1}
    status, answer = generate(crowded, model, **tensors, timeout=200_000)
    assert status == 400
    assert "has not ended within its timeout of 0.2 s" in answer["error"]
    found = grpc_one(crowded, model, **tensors, stream=True, timeout_us=200_000)
    assert "has not ended within its timeout of 0.2 s" in (found.error or "")
    assert generate(crowded, model, text_input="x", max_tokens=2, timeout=20_000_000)[0] == 200
    for wrong in ("soon", -1, 0.5):
        status, answer = generate(crowded, model, **tensors, timeout=wrong)
        assert (status, "microseconds" in answer["error"]) == (400, True)
    wait_until_idle(crowded)
