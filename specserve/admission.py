"""Who may come in, and in which order: limits, deadlines, and promises that cannot be kept.

Reads the queues it is given; changes nothing.
"""

from collections.abc import Collection, Sequence

from specserve.block_manager import BlockManager
from specserve.config import SchedulerConfig, SLOConfig
from specserve.pacing import Pacer
from specserve.request import Request


class Rejected(Exception):
    """A request that would miss its objective, refused before any work; the text is for clients."""


class Admission:
    """Checks a request against memory, length and its own objective.

    Attributes:
        pacer: predicts waits; None rejects nobody for being late.
    """

    def __init__(self, config: SchedulerConfig, blocks: BlockManager, slo: SLOConfig) -> None:
        self.pacer: Pacer | None = None
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

    def deadline_s(self, request: Request) -> float:
        """Return when the first token is due; who has been preempted comes before everybody."""
        if request.num_preemptions:
            return float("-inf")
        ttft_s = request.slo.ttft_s
        return request.arrival_s + (self._slo.best_effort_ttft_s if ttft_s is None else ttft_s)

    def reject_late(
        self,
        request: Request,
        waiting: Collection[Request],
        running: Sequence[Request],
        now: float,
    ) -> None:
        """Refuse a request whose class wants to be told early that it would be late.

        Raises:
            Rejected: with the predicted wait.
        """
        ttft_s = request.slo.ttft_s
        is_told = request.priority_class in self._slo.reject_late_classes
        if self.pacer is None or ttft_s is None or not is_told:
            return
        deadline_s = self.deadline_s(request)
        predicted_s = self.pacer.predicted_ttft_s(
            request,
            ahead=[other for other in waiting if self.deadline_s(other) <= deadline_s],
            running=running,
            chunk=self._config.prefill_chunk_tokens,
            num_free_rows=self._config.max_num_seqs - len(running),
        )
        if now - request.arrival_s + predicted_s > ttft_s:
            raise Rejected(
                f"the first token is predicted in {predicted_s * 1e3:.0f} ms, later than "
                f"slo_ttft_ms {ttft_s * 1e3:g}: try again in {(predicted_s - ttft_s) * 1e3:.0f} ms"
            )
