"""The loop's thread: requests and cancellations in, outputs out, failures contained."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Iterator

import pytest
from conftest import make_core, make_request
from paged_lm import FlakyLM, PagedLM, plain_decode

from specserve.core import SpecServe
from specserve.loop import Loop
from specserve.request import FinishReason, Request
from specserve.scheduler import StepOutput

WAIT_S = 20.0  # far beyond what anything takes; a hang ends in queue.Empty


class Client:
    """Collects what the loop hands out; gives it to the test's thread."""

    def __init__(self, core: SpecServe) -> None:
        self.outputs: queue.SimpleQueue[list[StepOutput]] = queue.SimpleQueue()
        self.failures: queue.SimpleQueue[tuple[list[Request], Exception]] = queue.SimpleQueue()
        self.gate = threading.Event()
        self.gate.set()
        self.loop = Loop(core, self._take, lambda *failure: self.failures.put(failure))

    def finish(self, *requests: Request) -> None:
        """Wait until these have finished."""
        while not all(request.is_finished for request in requests):
            self.outputs.get(timeout=WAIT_S)

    def _take(self, outputs: list[StepOutput]) -> None:
        self.outputs.put(outputs)
        assert self.gate.wait(WAIT_S)


@pytest.fixture
def target() -> FlakyLM:
    return FlakyLM(64, 4, failure_rate=0.0)


@pytest.fixture
def client(target: FlakyLM) -> Iterator[Client]:
    client = Client(make_core("adaptive", target=target, clock=time.perf_counter))
    client.loop.start()
    yield client
    client.gate.set()
    client.loop.stop()


def test_requests_from_many_threads_get_their_tokens(client: Client, target: FlakyLM) -> None:
    requests = [make_request([i, 2, 3], 12) for i in range(12)]
    threads = [threading.Thread(target=client.loop.submit, args=(r,)) for r in requests]
    for thread in threads:
        thread.start()
    client.finish(*requests)
    for thread in threads:
        thread.join()
    for request in requests:
        expected = plain_decode(target, request.prompt_token_ids, 12, request.sampling)
        assert request.token_ids[3:] == expected


def test_a_request_that_can_never_run_is_refused_in_the_callers_thread(client: Client) -> None:
    with pytest.raises(ValueError, match="max_tokens is 0"):
        client.loop.submit(make_request([1], 0))


def test_arrival_is_when_it_was_submitted(client: Client) -> None:
    before = time.perf_counter()
    request = make_request([1], 2)
    client.loop.submit(request)
    assert before <= request.arrival_s <= time.perf_counter()
    client.finish(request)
    assert request.arrival_s <= request.first_scheduled_s <= request.first_token_s


def test_abort_from_another_thread_ends_a_request_and_frees_its_memory(client: Client) -> None:
    request, other = make_request([1, 2], 200), make_request([5], 3)
    client.gate.clear()  # the loop stops after its first step
    client.loop.submit(request)
    client.outputs.get(timeout=WAIT_S)
    client.loop.abort(request.key)
    client.loop.submit(other)
    client.gate.set()
    client.finish(other)
    assert request.finish_reason is FinishReason.CANCELLED
    assert request.num_output_tokens < 20
    assert client.loop.core.scheduler.blocks.num_used_blocks == 0


def test_abort_tells_the_reason_and_ignores_unknown_keys(client: Client) -> None:
    client.gate.clear()
    request, other = make_request([1, 2], 200), make_request([5], 3)
    client.loop.submit(request)
    client.outputs.get(timeout=WAIT_S)
    client.loop.abort(987654)
    client.loop.abort(request.key, FinishReason.STOP_WORD)
    client.loop.submit(other)
    client.gate.set()
    client.finish(other)
    assert request.finish_reason is FinishReason.STOP_WORD
    assert client.loop.is_healthy


def test_a_failing_target_ends_the_requests_in_flight_and_the_loop_goes_on(
    client: Client, target: FlakyLM, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.CRITICAL)
    client.gate.clear()
    requests = [make_request([i], 200) for i in range(3)]
    for request in requests:
        client.loop.submit(request)
    client.outputs.get(timeout=WAIT_S)
    target.failure_rate = 1.0
    client.gate.set()
    failed, error = client.failures.get(timeout=WAIT_S)
    assert {request.key for request in failed} <= {request.key for request in requests}
    assert all(request.finish_reason is FinishReason.ERROR for request in failed)
    assert "the model failed" in str(error)
    assert not client.loop.is_healthy

    target.failure_rate = 0.0
    late = make_request([9, 9], 6, temperature=0.5, seed=3)
    client.loop.submit(late)
    client.finish(late)
    assert late.token_ids[2:] == plain_decode(target, [9, 9], 6, late.sampling)
    assert client.loop.is_healthy


class FailsOnceLM(PagedLM):
    """Fails in its first pass."""

    has_failed = False

    def forward(self, batch, logit_rows):  # type: ignore[no-untyped-def]
        if not self.has_failed:
            self.has_failed = True
            raise RuntimeError("the model failed")
        return super().forward(batch, logit_rows)


def test_who_waits_does_not_end_with_a_step_it_was_not_in(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL)
    target = FailsOnceLM(64, 4)
    client = Client(make_core(target=target, clock=time.perf_counter, max_num_seqs=1))
    first, second = requests = [make_request([i, 2], 4) for i in range(2)]
    for request in requests:
        client.loop.submit(request)
    client.loop.start()
    try:
        assert client.failures.get(timeout=WAIT_S)[0] == [first]
        client.finish(second)
        assert second.token_ids[2:] == plain_decode(target, [1, 2], 4, second.sampling)
    finally:
        client.loop.stop()


def test_an_idle_loop_asks_its_clock_nothing_and_wakes_at_once() -> None:
    """Guards against polling: between requests the thread must wait, not look."""
    looks = 0

    def clock() -> float:
        nonlocal looks
        looks += 1
        return time.perf_counter()

    client = Client(make_core("none", target=PagedLM(), clock=clock))
    client.loop.start()
    for _ in range(3):
        request = make_request([1], 1)
        client.loop.submit(request)
        client.finish(request)
    client.loop.stop()
    assert client.loop.core.stats.num_steps == 3
    assert looks < 40


def test_stop_ends_the_thread_with_requests_unfinished(client: Client) -> None:
    request = make_request([1], 200, num_draft_tokens=0)
    client.gate.clear()
    client.loop.submit(request)
    client.outputs.get(timeout=WAIT_S)
    stopper = threading.Thread(target=client.loop.stop)
    stopper.start()
    client.gate.set()
    stopper.join(WAIT_S)
    assert not stopper.is_alive()
    assert not request.is_finished
