"""One executor of the bindings, asked for one wave of requests at a time."""

import atexit
import logging
import math
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from specserve.engines import EngineLost

logger = logging.getLogger(__name__)

SHUTDOWN_S = 10.0
MARGIN = 0.9  # of the caller's patience: who waits inside can still say what it waited for


@dataclass(frozen=True, slots=True)
class Answer:
    """What became of one request.

    Attributes:
        log_probs: of the tokens, if they were asked for.
        has_ended: the end token came, which `token_ids` may or may not hold.
        error: why there are no tokens; empty if there are.
    """

    token_ids: list[int]
    log_probs: list[float]
    has_ended: bool = False
    error: str = ""


class Executor:
    """Enqueues a wave, waits for all of it, and never longer than allowed. For one thread.

    Args:
        api: the module of the bindings.
        role: `draft` or `target`, for messages.
        timeout_s: of whoever calls, for a whole wave.
        clock: seconds.
    """

    def __init__(
        self,
        api: Any,
        engine_dir: Path,
        executor_config: Any,
        *,
        role: str,
        timeout_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._api = api
        self._role = role
        self._timeout_s = MARGIN * timeout_s
        self._clock = clock
        self._waiting: dict[int, int] = {}  # id in the executor -> place in the wave
        self._is_closed = False
        self._executor = api.Executor(engine_dir, api.ModelType.DECODER_ONLY, executor_config)
        atexit.register(self.close)  # its threads call Python, which must still be there

    def run(self, requests: Sequence[Any]) -> list[Answer]:
        """Run requests as one wave; return an answer to each, in their order.

        Raises:
            EngineLost: if the executor is gone or gives no answer in time.
            Exception: what the bindings raised when they refused the wave.
        """
        if not requests:
            return []
        self._enqueue(requests)
        answers: list[Answer] = [Answer([], []) for _ in requests]
        deadline = self._clock() + self._timeout_s
        while self._waiting:
            left_s = deadline - self._clock()
            if left_s <= 0.0:
                self._abandon()
            for response in self._await(left_s):
                place = self._waiting.get(response.request_id)
                if place is None:
                    continue  # of a wave that was abandoned
                answers[place], is_final = self._read(response, answers[place])
                if is_final:
                    del self._waiting[response.request_id]
        return answers

    def num_computed_tokens(self) -> int | None:
        """Return how many tokens were computed since the last call, by the executor's own count.

        The context tokens of its iterations, cached ones excluded and drafts included, and one for
        each request that generated. None if it keeps no such statistics.
        """
        stats = [s.inflight_batching_stats for s in self._executor.get_latest_iteration_stats()]
        if not stats or None in stats:
            return None
        return sum(int(s.num_ctx_tokens) + int(s.num_gen_requests) for s in stats)

    def close(self) -> None:
        """Cancel what runs and end the executor's threads and processes."""
        if self._is_closed:
            return
        self._is_closed = True
        atexit.unregister(self.close)
        self._cancel()
        thread = threading.Thread(target=self._executor.shutdown, daemon=True)
        thread.start()
        thread.join(SHUTDOWN_S)
        if thread.is_alive():
            logger.warning("the %s executor has not shut down in %g s", self._role, SHUTDOWN_S)

    def _enqueue(self, requests: Sequence[Any]) -> None:
        if self._is_closed or not self._executor.can_enqueue_requests():
            raise EngineLost(
                f"the {self._role} engine takes no requests: it has shut down, or this process is "
                "not the leader of its ranks"
            )
        ids = self._executor.enqueue_requests(list(requests))
        self._waiting = {request_id: place for place, request_id in enumerate(ids)}

    def _await(self, left_s: float) -> Sequence[Any]:
        timeout = timedelta(milliseconds=math.ceil(1e3 * left_s))
        try:
            responses: Sequence[Any] = self._executor.await_responses(timeout)
        except Exception as error:
            self._waiting = {}
            raise EngineLost(f"the {self._role} engine has stopped: try again") from error
        return responses

    def _read(self, response: Any, so_far: Answer) -> tuple[Answer, bool]:
        """Return the answer after a response, and whether it is complete."""
        if response.has_error():
            return Answer([], [], error=response.error_msg), True
        result, reasons = response.result, self._api.FinishReason
        reason = result.finish_reasons[0] if result.finish_reasons else reasons.NOT_FINISHED
        if reason in (reasons.CANCELLED, reasons.TIMED_OUT):
            return Answer([], [], error=f"ended by the executor: {reason.name}"), True
        token_ids = so_far.token_ids + list(result.output_token_ids[0])
        log_probs = list(result.log_probs[0]) if result.log_probs else []
        has_ended = reason == reasons.END_ID
        return Answer(token_ids, so_far.log_probs + log_probs, has_ended), result.is_final

    def _abandon(self) -> None:
        missing = len(self._waiting)
        self._cancel()
        raise EngineLost(
            f"the {self._role} engine has left {missing} requests unanswered for "
            f"{self._timeout_s:g} s: try again"
        )

    def _cancel(self) -> None:
        for request_id in self._waiting:
            self._executor.cancel_request(request_id)
        self._waiting = {}
