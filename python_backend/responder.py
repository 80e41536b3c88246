"""The thread that answers clients while the next step runs: text, cancellation, metrics."""

import logging
import queue
import threading
import time
from collections.abc import Callable

import triton_python_backend_utils as pb_utils

from python_backend.reply import Reply
from python_backend.turns import Turns
from specserve.admission import Rejected
from specserve.engines import EngineLost
from specserve.loop import Loop
from specserve.request import FinishReason, Request
from specserve.scheduler import StepOutput
from specserve.stats import Outcomes

logger = logging.getLogger(__name__)

MAX_ID = 64
POLL_S = 0.05  # between looks at what is due
ASK_S = 0.4  # how often, at most, each client is asked whether it has gone
# Of the time, spent on asking: it wakes two processes. Beside an engine that has all cores, asking
# each of 16 clients every 10 ms took a tenth of the throughput, every 50 ms one percent.
ASK_SHARE = 0.02


class Responder:
    """Owns the replies of all unfinished requests; everything but `add` runs in its own thread.

    Args:
        outcomes: counts how requests end.
        tick: called about every `POLL_S` seconds, for metrics.
    """

    def __init__(self, outcomes: Outcomes, tick: Callable[[], None]) -> None:
        self._outcomes = outcomes
        self._replies: dict[int, Reply] = {}
        self._queue: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._tick = tick
        self._turns: Turns[Reply] = Turns(ASK_S, ASK_SHARE)
        self._next_look_s = 0.0
        self._thread = threading.Thread(target=self._run, name="specserve-responder", daemon=True)

    def start(self, loop: Loop) -> None:
        """Start answering for `loop`."""
        self._loop = loop
        self._thread.start()

    def stop(self) -> None:
        """Answer what is queued, fail what is unfinished, end the thread."""
        self._queue.put(None)
        self._thread.join()
        self.turn_away()

    def turn_away(self) -> None:
        """Fail what is unfinished because the server ends; in this object's thread, or without."""
        for reply in list(self._replies.values()):
            reply.fail("the server is shutting down: try again", pb_utils.TritonError.UNAVAILABLE)
            self._end(reply, FinishReason.CANCELLED)

    def add(self, reply: Reply) -> None:
        """Register a reply; from any thread, before its request is submitted."""
        self._replies[reply.request.key] = reply

    def remove(self, reply: Reply) -> None:
        """Forget a reply whose request was refused."""
        self._replies.pop(reply.request.key, None)

    def put(self, outputs: list[StepOutput]) -> None:
        """Queue a step's outputs; from any thread."""
        self._queue.put(lambda: self._push(outputs))

    def put_failure(self, requests: list[Request], error: Exception) -> None:
        """Queue the failure of requests; from any thread."""
        self._queue.put(lambda: self._fail(requests, error))

    def cancel(self, is_meant: Callable[[Reply], bool]) -> None:
        """Queue the cancellation of the requests that are meant; from any thread."""
        self._queue.put(lambda: self._cancel(is_meant))

    def _run(self) -> None:
        while True:
            try:
                action = self._queue.get(timeout=POLL_S)
            except queue.Empty:
                action = self._nothing
            if action is None:
                return
            try:
                action()
                self._poll()
            except Exception:
                logger.exception("answering a client failed")

    def _nothing(self) -> None:
        pass

    def _push(self, outputs: list[StepOutput]) -> None:
        # Who has ended first: what that client asks next may still join the step that runs.
        for output in sorted(outputs, key=lambda output: output.finish_reason is None):
            reply = self._replies.get(output.request.key)
            if reply is None:  # cancelled, or ended at a stop word while this step ran
                continue
            try:
                reason = self._answer(reply, output)
            except Exception:
                logger.exception("answering request %d failed", output.request.key)
                reply.fail("internal error", pb_utils.TritonError.INTERNAL)
                reason = FinishReason.ERROR
            if reason is not None:
                self._end(reply, reason)

    def _answer(self, reply: Reply, output: StepOutput) -> FinishReason | None:
        if output.finish_reason is FinishReason.ERROR:
            reply.fail("a step failed on this request", pb_utils.TritonError.INTERNAL)
            return FinishReason.ERROR
        return reply.push(output)

    def _poll(self) -> None:
        now = time.monotonic()
        if now < self._next_look_s:
            return
        self._next_look_s = now + POLL_S
        if self._turns.is_due():
            self._turns.take(list(self._replies.values()), self._ask)
        self._probe()
        self._tick()

    def _ask(self, reply: Reply) -> None:
        """Ask a client whether it has gone."""
        if reply.request.key in self._replies and reply.cancel():
            self._end(reply, FinishReason.CANCELLED)

    def _probe(self) -> None:
        """Probe one client at most: each costs some .4 ms of CPU time in three processes."""
        reply = min(list(self._replies.values()), key=Reply.probe_due_s, default=None)
        if reply is not None and reply.probe_due_s() <= time.monotonic():
            reply.probe()

    def _cancel(self, is_meant: Callable[[Reply], bool]) -> None:
        for reply in list(self._replies.values()):
            if is_meant(reply):
                reply.fail("cancelled by a stop request", pb_utils.TritonError.CANCELLED)
                self._end(reply, FinishReason.CANCELLED)

    def _fail(self, requests: list[Request], error: Exception) -> None:
        is_for_clients = isinstance(error, Rejected | EngineLost)
        message = str(error) if is_for_clients else "a step failed: try again"
        for request in requests:
            reply = self._replies.get(request.key)
            if reply is not None:
                reply.fail(message, pb_utils.TritonError.UNAVAILABLE)
                self._end(reply, request.finish_reason or FinishReason.ERROR)

    def _end(self, reply: Reply, reason: FinishReason) -> None:
        request = reply.request
        del self._replies[request.key]
        if reason in (FinishReason.STOP_WORD, FinishReason.CANCELLED, FinishReason.ERROR):
            self._loop.abort(request.key, reason)
        self._outcomes.add(request, reason)
        logger.info(
            "request %d %a %s: %d prompt, %d output, %d/%d drafts accepted",
            request.key,
            request.request_id[:MAX_ID],  # a client's words: they must not forge a line
            reason.value,
            request.num_prompt_tokens,
            reply.num_output_tokens,
            request.num_accepted_tokens,
            request.num_verified_tokens,
            extra={"request_id": request.request_id[:MAX_ID]},
        )
