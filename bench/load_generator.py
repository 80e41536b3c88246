"""An open loop: every request is sent when its time has come, whether or not others were answered.

It knows when it falls behind and says so: each outcome has the time it was really sent, and
latencies count from the planned arrival, so that a slow generator cannot flatter a server.
"""

import asyncio
import time
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from bench.answer import Answer
from bench.outcome import FAILED, FINISHED, REJECTED, Outcome
from bench.step_traces import steps_of
from bench.workloads.plan import PlannedRequest

LEAD_S = 0.05  # so that the first request is not late for being the first
REFUSALS = ("later than slo_ttft_ms", "the queue is full")  # the words of `Admission`


class Client(Protocol):
    """Speaks to one model of a server."""

    async def send(self, tensors: Mapping[str, Any]) -> Answer:
        """Send a request and read its answer to the end; an error is noted in it, not raised."""


async def replay(
    client: Client, requests: Sequence[PlannedRequest], *, with_steps: bool = False
) -> list[Outcome]:
    """Send requests at their arrival times and wait for all answers.

    Args:
        requests: in order of arrival.
        with_steps: ask what the server's steps did; it must be on this machine.
    """
    extra = {"return_perf_metrics": True} if with_steps else {}
    start_s = time.perf_counter() + LEAD_S
    tasks = []
    async with asyncio.TaskGroup() as group:
        for request in requests:
            delay_s = start_s + request.arrival_s - time.perf_counter()
            await asyncio.sleep(max(0.0, delay_s))
            tasks.append(group.create_task(client.send(tensors_of(request) | extra)))
    return [
        outcome_of(request, task.result(), start_s)
        for request, task in zip(requests, tasks, strict=True)
    ]


def tensors_of(request: PlannedRequest) -> dict[str, Any]:
    """Say what to send: exact prompt, exact length, greedy, objectives in milliseconds."""
    tensors: dict[str, Any] = {
        "input_ids": request.prompt_token_ids,
        "max_tokens": request.num_output_tokens,
        "end_id": -1,  # no token ends it before its length
        "stream": True,
        "return_num_output_tokens": True,
    }
    if request.priority_class:
        tensors["priority_class"] = request.priority_class
    if request.slo.ttft_s is not None:
        tensors["slo_ttft_ms"] = request.slo.ttft_s * 1e3
    if request.slo.tpot_s is not None:
        tensors["slo_tpot_ms"] = request.slo.tpot_s * 1e3
    return tensors


def outcome_of(request: PlannedRequest, answer: Answer, start_s: float) -> Outcome:
    """Judge an answer."""
    outcome = Outcome(request, answer.sent_s - start_s)
    count = answer.tensors.get("num_output_tokens")
    if answer.error is not None:
        outcome.ending = ending_of(answer.error)
        outcome.error = answer.error
    elif count is None or not answer.response_s:
        outcome.error = "the answer ended early"
    else:
        outcome.ending = FINISHED
        outcome.num_output_tokens = int(count)
        outcome.response_s = [moment - start_s for moment in answer.response_s]
        outcome.steps = steps_of(answer.tensors, start_s)
    return outcome


def ending_of(error: str) -> str:
    """Tell a refusal, which is a policy's doing, from a failure."""
    return REJECTED if any(words in error for words in REFUSALS) else FAILED
