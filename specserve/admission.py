"""Who may come in, and in which order: limits, deadlines, and promises that cannot be kept.

Reads the queues it is given; changes nothing.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence

from specserve.block_manager import BlockManager
from specserve.config import SchedulerConfig, SLOConfig
from specserve.margin import Margin
from specserve.pacing import Pacer
from specserve.request import Request
from specserve.telemetry.state import NoTelemetry, Telemetry
from specserve.waiting import WaitingQueue

DEFAULT_RETRY_S = 1.0  # where nothing predicts better


class Rejected(Exception):
    """A request refused before any work, which may be tried again; the text is for clients."""


class TimedOut(Rejected):
    """A request that had not ended when its time was over."""


class Admission:
    """Checks a request against memory, length and its own objective.

    Attributes:
        pacer: predicts waits; None rejects nobody for being late.
        telemetry: says how much of the KV cache may be filled.
        margin: how far its predictions of first tokens fall short.
        supports: what the engine cannot keep, see `EngineInfo`.
        num_rejected: refusals so far by reason, `full` or `late`.
    """

    def __init__(self, config: SchedulerConfig, blocks: BlockManager, slo: SLOConfig) -> None:
        self.pacer: Pacer | None = None
        self.telemetry: Telemetry = NoTelemetry()
        self.margin = Margin()
        self.supports: Callable[[Request], str | None] = lambda request: None
        self.num_rejected: Counter[str] = Counter()
        self._config = config
        self._blocks = blocks
        self._slo = slo

    def check(self, request: Request) -> None:
        """Refuse a request that could never run.

        Raises:
            ValueError: naming the value, the limit and the fix.
        """
        total = request.num_prompt_tokens + request.max_tokens
        if request.num_prompt_tokens == 0:
            raise ValueError("text_input is empty: the prompt needs at least one token")
        if request.max_tokens < 1:
            raise ValueError(f"max_tokens is {request.max_tokens}: must be at least 1")
        if total > self._config.max_seq_len:
            raise ValueError(
                f"prompt ({request.num_prompt_tokens} tokens) + max_tokens ({request.max_tokens}) "
                f"= {total} exceeds the limit of {self._config.max_seq_len}: shorten one of them"
            )
        if self._blocks.blocks_for(total) > self._blocks.num_blocks:
            limit = self._blocks.num_blocks * self._blocks.block_size
            raise ValueError(
                f"prompt + max_tokens = {total} tokens can never fit the KV cache of {limit} "
                "tokens: shorten one of them, or raise scheduler.kv_cache_tokens"
            )
        reason = self.supports(request)
        if reason is not None:
            raise ValueError(reason)

    def num_spare_blocks(self, num_running: int) -> int:
        """Return the KV blocks that a new request may take beside running ones.

        One stays free for each running row, so that admission does not cause preemption, and as
        many as device memory is too short for.
        """
        usable = int(self._blocks.num_blocks * self.telemetry.read().kv_headroom)
        return usable - self._blocks.num_used_blocks - num_running

    def deadline_s(self, request: Request) -> float:
        """Return when the first token is due; who has been preempted comes before everybody."""
        if request.num_preemptions:
            return float("-inf")
        ttft_s = request.slo.ttft_s
        return request.arrival_s + (self._slo.best_effort_ttft_s if ttft_s is None else ttft_s)

    def reject(
        self, request: Request, waiting: WaitingQueue, running: Sequence[Request], now: float
    ) -> None:
        """Refuse a request for which there is no place, or that would be told early of being late.

        Raises:
            Rejected: with the reason, and when to try again.
        """
        if self._is_full(request, waiting):
            self.num_rejected["full"] += 1
            retry_s = DEFAULT_RETRY_S
            if self.pacer is not None:
                retry_s = self._predicted_ttft_s(self.pacer, request, waiting, running, now)
            raise Rejected(
                f"the queue is full: {len(waiting)} requests with {waiting.num_tokens} prompt "
                f"tokens wait, the limits are {self._config.max_waiting_requests} and "
                f"{self._config.max_waiting_tokens}: try again in {retry_s * 1e3:.0f} ms"
            )
        # Who finds the server idle is let in whatever is predicted: the predictor learns from it.
        is_idle = not (len(waiting) or running)
        if self.pacer is not None and self._is_told_early(request) and not is_idle:
            self._reject_late(self.pacer, request, waiting, running, now)

    def learn(self, request: Request) -> None:
        """Compare what was predicted with the first token that has come.

        Requests that nobody had to hurry for say nothing about those that wait.
        """
        predicted_s, ttft_s = request.predicted_ttft_s, request.slo.ttft_s
        if predicted_s is None or ttft_s is None or request.first_token_s is None:
            return
        actual_s = request.first_token_s - request.arrival_s
        if max(actual_s, predicted_s * self.margin.factor) > ttft_s / 4.0:
            self.margin.learn(predicted_s, actual_s)

    def _is_told_early(self, request: Request) -> bool:
        is_told = request.priority_class in self._slo.reject_late_classes
        return is_told and request.slo.ttft_s is not None

    def _reject_late(
        self,
        pacer: Pacer,
        request: Request,
        waiting: WaitingQueue,
        running: Sequence[Request],
        now: float,
    ) -> None:
        assert request.slo.ttft_s is not None, "who has no objective cannot be late"
        deadline_s = self.deadline_s(request)
        ahead = [other for other in waiting if self.deadline_s(other) <= deadline_s]
        request.predicted_ttft_s = self._predicted_ttft_s(pacer, request, ahead, running, now)
        within_s = request.predicted_ttft_s * self.margin.factor
        if now + within_s > deadline_s:
            self.num_rejected["late"] += 1
            late_s = now + within_s - deadline_s
            raise Rejected(
                f"the first token is predicted in {within_s * 1e3:.0f} ms, later than slo_ttft_ms "
                f"{request.slo.ttft_s * 1e3:g}: try again in {late_s * 1e3:.0f} ms"
            )

    def _is_full(self, request: Request, waiting: WaitingQueue) -> bool:
        """Say whether the queue is full, and the request's class has its share of it already."""
        if not len(waiting):
            return False  # a prompt longer than the limit can wait alone
        num_requests, num_tokens, share = waiting.usage_of(request)
        prompt, config = request.num_prompt_tokens, self._config
        return any(
            total + added > limit and of_class + added > max(1.0, share * limit)
            for total, of_class, added, limit in (
                (len(waiting), num_requests, 1, config.max_waiting_requests),
                (waiting.num_tokens, num_tokens, prompt, config.max_waiting_tokens),
            )
        )

    def _predicted_ttft_s(
        self,
        pacer: Pacer,
        request: Request,
        ahead: Iterable[Request],
        running: Sequence[Request],
        now: float,
    ) -> float:
        """Predict, with prompts taken in at the pace that the rows that decode now allow."""
        decoding = [r for r in running if r.num_uncomputed_tokens == 1]
        return pacer.predicted_ttft_s(
            request,
            ahead=ahead,
            running=running,
            chunk=pacer.prefill_tokens(decoding, self._config.prefill_chunk_tokens, now),
            num_free_rows=self._config.max_num_seqs - len(running),
        )
