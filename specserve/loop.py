"""The thread that steps: takes requests and cancellations in, hands outputs out."""

import logging
import threading
from collections.abc import Callable
from functools import partial

from specserve.admission import Rejected, TimedOut
from specserve.core import SpecServe
from specserve.engines import EngineLost
from specserve.request import FinishReason, Request
from specserve.scheduler import StepOutput

logger = logging.getLogger(__name__)

Sink = Callable[[list[StepOutput]], None]
ErrorSink = Callable[[list[Request], Exception], None]


class Loop:
    """One step loop for all requests.

    `submit` and `abort` may be called from any thread. An abort takes effect before the next step;
    who comes while others draft may join the step that runs.

    Args:
        core: what steps; touched by this loop's thread only, once started.
        sink: called in the loop's thread with each step's outputs; must not block.
        on_error: called with the requests that a failed step has ended, or that were rejected.
        prepare: called in the loop's thread before the first step, to measure the engines, say;
            if it fails, serving goes on with what the core has.
    """

    def __init__(
        self,
        core: SpecServe,
        sink: Sink,
        on_error: ErrorSink,
        prepare: Callable[[], None] | None = None,
    ) -> None:
        self.core = core
        self.is_healthy = True
        self._sink = sink
        self._on_error = on_error
        self._prepare = prepare
        self._wake = threading.Condition()
        self._arrivals: list[Request] = []
        self._aborts: list[tuple[int, FinishReason]] = []
        core.take_arrivals = self._take_arrivals
        self._is_stopping = False
        self._thread = threading.Thread(target=self._run, name="specserve-loop", daemon=True)

    def start(self) -> None:
        """Start stepping."""
        self._thread.start()

    def stop(self) -> None:
        """Finish the current step and end the thread; what is unfinished stays so."""
        with self._wake:
            self._is_stopping = True
            self._wake.notify()
        self._thread.join()

    def submit(self, request: Request) -> None:
        """Queue a request.

        Raises:
            ValueError: if it could never run, naming the value, the limit and the fix.
        """
        self.core.scheduler.check(request)
        request.arrival_s = self.core.clock()
        self._post(lambda: self._arrivals.append(request))

    def abort(self, key: int, reason: FinishReason = FinishReason.CANCELLED) -> None:
        """End a request before the next step and free its memory; unknown keys are ignored."""
        self._post(lambda: self._aborts.append((key, reason)))

    def _post(self, put: Callable[[], None]) -> None:
        with self._wake:
            put()
            self._wake.notify()

    def _take_arrivals(self) -> None:
        with self._wake:
            arrivals, self._arrivals = self._arrivals, []
        for request in arrivals:
            self._guarded(partial(self._admit, request))

    def _admit(self, request: Request) -> None:
        try:
            self.core.scheduler.submit(request, self.core.clock())
        except Rejected as rejection:
            request.finish_reason = FinishReason.REJECTED
            self._on_error([request], rejection)

    def _run(self) -> None:
        if self._prepare is not None:
            try:
                self._prepare()
            except Exception:
                logger.exception("preparing failed; serving without it")
        while True:
            with self._wake:
                self._wake.wait_for(
                    lambda: (
                        self._is_stopping
                        or self._arrivals
                        or self._aborts
                        or self.core.scheduler.has_work
                    )
                )
                aborts, self._aborts = self._aborts, []
            if self._is_stopping:
                return
            self._take_arrivals()  # first: they may be aborted already
            for key, reason in aborts:
                self._guarded(partial(self.core.scheduler.abort, key, reason))
            if self.core.scheduler.has_work:
                self._guarded(self._expire)
            if self.core.scheduler.has_work:
                self._step()

    def _expire(self) -> None:
        scheduler = self.core.scheduler
        for request in scheduler.expired(self.core.clock()):
            scheduler.abort(request.key, FinishReason.TIMEOUT)
            error = TimedOut(
                f"the request has not ended within its timeout of {request.timeout_s:g} s, it has "
                f"{request.num_output_tokens} tokens: allow more time, or try again later"
            )
            self._on_error([request], error)

    def _guarded(self, action: Callable[[], object]) -> None:
        """Run what a client asked for, or what answers one: it must not end the loop."""
        try:
            action()
        except Exception:
            logger.exception("the step loop goes on after an error beside the step")

    def _step(self) -> None:
        try:
            outputs = self.core.step()
            self.is_healthy = True
        except Exception as error:
            is_known = isinstance(error, EngineLost)  # it was said already where, and why
            logger.error(
                "step failed, %s; every request that runs ends", error, exc_info=not is_known
            )
            self.is_healthy = False
            self._fail_running(error)
        else:
            self._guarded(lambda: self._sink(outputs))

    def _fail_running(self, error: Exception) -> None:
        """End who was in the step; who waits has the next one. If nobody was, end everybody."""
        scheduler = self.core.scheduler
        requests = list(scheduler.running) or scheduler.requests
        for request in requests:
            scheduler.abort(request.key, FinishReason.ERROR)
        self._on_error(requests, error)
