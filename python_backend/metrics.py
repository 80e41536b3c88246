"""Running totals on Triton's own /metrics. Each help text says its convention."""

import time

import triton_python_backend_utils as pb_utils

from specserve.core import SpecServe
from specserve.engines.triton import TritonDraftEngine, TritonTargetEngine

PUBLISH_S = 0.2

COUNTERS = {
    "specserve_steps_total": "Steps run",
    "specserve_base_tokens_total": "Prompt and decode tokens given to the target, drafts excluded",
    "specserve_drafted_tokens_total": "Tokens the draft engine proposed",
    "specserve_verified_tokens_total": "Draft tokens the target looked at",
    "specserve_accepted_tokens_total": "Draft tokens kept, without the one extra token of a step",
    "specserve_output_tokens_total": "Tokens generated: accepted + one per row and step",
    "specserve_preemptions_total": "Requests put back to waiting because KV blocks ran out",
    "specserve_draft_failures_total": "Failed calls of the draft engine; its requests went on",
    "specserve_step_seconds_total": "Wall time of steps, from schedule to commit",
    "specserve_draft_call_seconds_total": "Wall time of draft calls, transport included",
    "specserve_verify_call_seconds_total": "Wall time of verify calls, transport included",
    "specserve_draft_engine_seconds_total": "Time inside the draft engine",
    "specserve_verify_engine_seconds_total": "Time inside the target engine",
}
GAUGES = {
    "specserve_requests_running": "Requests that hold KV blocks",
    "specserve_requests_waiting": "Requests in the queue",
    "specserve_kv_blocks_used": "KV blocks held by requests",
    "specserve_kv_blocks_total": "KV blocks",
    "specserve_draft_available": "1 if the next step may draft, 0 after a failure",
}


class Metrics:
    """Publishes a core's totals, at most every `PUBLISH_S` seconds."""

    def __init__(self, core: SpecServe, draft: TritonDraftEngine, target: TritonTargetEngine):
        self._core, self._draft, self._target = core, draft, target
        self._next = 0.0
        self._last: dict[str, float] = {}
        self._families = [
            pb_utils.MetricFamily(name=name, description=text, kind=kind)
            for kind, table in (
                (pb_utils.MetricFamily.COUNTER, COUNTERS),
                (pb_utils.MetricFamily.GAUGE, GAUGES),
            )
            for name, text in table.items()
        ]
        names = [*COUNTERS, *GAUGES]
        self._metrics = {
            name: family.Metric(labels={})
            for name, family in zip(names, self._families, strict=True)
        }

    def publish(self) -> None:
        """Send what has changed."""
        now = time.monotonic()
        if now < self._next:
            return
        self._next = now + PUBLISH_S
        for name, value in self._values().items():
            last = self._last.get(name, 0.0)
            if value == last:
                continue
            if name in COUNTERS:
                self._metrics[name].increment(value - last)
            else:
                self._metrics[name].set(value)
            self._last[name] = value

    def _values(self) -> dict[str, float]:
        stats, scheduler = self._core.stats, self._core.scheduler
        return {
            "specserve_steps_total": stats.num_steps,
            "specserve_base_tokens_total": stats.num_base_tokens,
            "specserve_drafted_tokens_total": stats.num_drafted_tokens,
            "specserve_verified_tokens_total": stats.num_verified_tokens,
            "specserve_accepted_tokens_total": stats.num_accepted_tokens,
            "specserve_output_tokens_total": stats.num_output_tokens,
            "specserve_preemptions_total": scheduler.num_preemptions,
            "specserve_draft_failures_total": self._core.draft_engine.num_failures,
            "specserve_step_seconds_total": stats.step_s,
            "specserve_draft_call_seconds_total": stats.draft_s,
            "specserve_verify_call_seconds_total": stats.verify_s,
            "specserve_draft_engine_seconds_total": self._draft.engine_s,
            "specserve_verify_engine_seconds_total": self._target.engine_s,
            "specserve_requests_running": len(scheduler.running),
            "specserve_requests_waiting": len(scheduler.waiting),
            "specserve_kv_blocks_used": scheduler.blocks.num_used_blocks,
            "specserve_kv_blocks_total": scheduler.blocks.num_blocks,
            "specserve_draft_available": float(self._core.draft_engine.is_available),
        }
