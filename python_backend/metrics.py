"""What the server does, on Triton's own /metrics. Each help text says its convention."""

import time
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import triton_python_backend_utils as pb_utils

from specserve.core import SpecServe
from specserve.engines.triton import TritonDraftEngine, TritonTargetEngine
from specserve.stats import Outcomes, least_slack_s

PUBLISH_S = 0.2
# Of what only adds up, while there is work: each value that changes is a message to the server's
# process and back, some hundred of them a time, on the cores that an engine may have.
ADD_UP_S = 1.0

COUNTERS = {
    "specserve_requests_total": "Requests ended, by outcome and priority class",
    "specserve_slo_attained_total": "Requests that met all their objectives, of those with any",
    "specserve_slo_missed_total": "Requests that missed an objective; cancelled ones not counted",
    "specserve_steps_total": "Steps run",
    "specserve_base_tokens_total": "Prompt and decode tokens given to the target, drafts excluded",
    "specserve_drafted_tokens_total": "Tokens proposed, by draft model or prompt lookup",
    "specserve_verified_tokens_total": "Draft tokens the target looked at",
    "specserve_accepted_tokens_total": "Draft tokens kept, without the one extra token of a step",
    "specserve_output_tokens_total": "Tokens generated: accepted + one per row and step",
    "specserve_verified_by_position_total": "Verified tokens by place in the draft, from 0",
    "specserve_accepted_by_position_total": "Accepted tokens by place in the draft, from 0",
    "specserve_draft_length_total": "Rows and steps by tokens drafted, of rows that sampled",
    "specserve_acceptance_length_total": "Rows and steps by tokens gained, of rows with verified "
    "drafts: accepted + the one extra token",
    "specserve_decisions_total": "Rows and steps by what decided the draft's length",
    "specserve_preemptions_total": "Requests put back to waiting because KV blocks ran out",
    "specserve_draft_failures_total": "Failed calls of the draft engine; its requests went on",
    "specserve_step_seconds_total": "Wall time of steps, from schedule to commit",
    "specserve_draft_call_seconds_total": "Wall time of draft calls, transport included",
    "specserve_verify_call_seconds_total": "Wall time of verify calls, transport included",
    "specserve_draft_engine_seconds_total": "Time inside the draft engine",
    "specserve_verify_engine_seconds_total": "Time inside the target engine",
    "specserve_predicted_step_seconds_total": "Predicted time of draft and verify calls",
    "specserve_measured_step_seconds_total": "Measured time of the calls that were predicted",
}
GAUGES = {
    "specserve_requests_running": "Requests that hold KV blocks",
    "specserve_requests_waiting": "Requests in the queue",
    "specserve_kv_blocks_used": "KV blocks held by requests",
    "specserve_kv_blocks_total": "KV blocks",
    "specserve_draft_available": "1 if the next step may draft, 0 after a failure",
    "specserve_slo_slack_seconds": "Least time until a token is late, of running and waiting "
    "requests with objectives, by class; below 0 is late",
    "specserve_step_prediction_error_ratio": "|predicted - measured| / measured of late, of "
    "verify and draft calls: median and 95th percentile",
    "specserve_acceptance_calibration_error": "Expected calibration error of the predicted "
    "acceptance, the worst of the draft sources",
    "specserve_telemetry_sm_clock_ratio": "SM clock over its maximum, of the slowest GPU",
    "specserve_telemetry_memory_clock_ratio": "Memory clock over its maximum, of the slowest GPU",
    "specserve_telemetry_power_watts": "Power of the GPUs",
    "specserve_telemetry_throttled": "1 while power or heat keeps a GPU's clocks down",
    "specserve_telemetry_memory_used_bytes": "Used memory of the GPUs, whoever uses it",
    "specserve_telemetry_stale": "1 if GPUs should be read and could not be of late",
}

HISTOGRAMS = {
    "specserve_step_time_seconds": "Draft and verify calls of a step, measured",
    "specserve_predicted_step_time_seconds": "The same as predicted, of steps that were",
}
BUCKETS_S = [0.001 * 2.0**n for n in range(13)]  # 1 ms to 4 s


class Sample(NamedTuple):
    """One labelled value."""

    name: str
    value: float
    labels: tuple[tuple[str, str], ...] = ()


class Metrics:
    """Publishes how a core is every `PUBLISH_S` seconds, and what it has done less often."""

    def __init__(
        self,
        core: SpecServe,
        draft: TritonDraftEngine,
        target: TritonTargetEngine,
        outcomes: Outcomes,
    ) -> None:
        self._core, self._draft, self._target = core, draft, target
        self._outcomes = outcomes
        self._next_s = 0.0
        self._next_totals_s = 0.0
        self._last: dict[Sample, float] = {}
        self._families = {
            name: pb_utils.MetricFamily(name=name, description=text, kind=kind)
            for kind, table in (
                (pb_utils.MetricFamily.COUNTER, COUNTERS),
                (pb_utils.MetricFamily.GAUGE, GAUGES),
                (pb_utils.MetricFamily.HISTOGRAM, HISTOGRAMS),
            )
            for name, text in table.items()
        }
        self._metrics: dict[Sample, Any] = {}
        self._measured, self._predicted = (
            self._families[name].Metric(labels={}, buckets=BUCKETS_S) for name in HISTOGRAMS
        )

    def publish(self) -> None:
        """Send what has changed; all of it, once nothing is left to do."""
        now = time.monotonic()
        if now < self._next_s:
            return
        self._next_s = now + PUBLISH_S
        samples = [*self._state(), *self._requests()]
        self._clear_slack(samples)
        if now >= self._next_totals_s or not self._core.scheduler.has_work:
            self._next_totals_s = now + ADD_UP_S
            samples += [*self._totals(), *self._drafts(), *self._predictions(), *self._telemetry()]
            self._observe_steps()
        for sample in samples:
            self._send(sample._replace(value=0.0), sample.value)

    def _observe_steps(self) -> None:
        step_times = self._core.stats.step_times
        while step_times:  # the step loop only adds, so what is there stays until it is taken
            predicted_s, measured_s = step_times.popleft()
            self._measured.observe(measured_s)
            if predicted_s is not None:
                self._predicted.observe(predicted_s)

    def _send(self, key: Sample, value: float) -> None:
        last = self._last.get(key)
        if value == last:
            return
        metric = self._metrics.get(key)
        if metric is None:
            family = self._families[key.name]
            metric = self._metrics[key] = family.Metric(labels=dict(key.labels))
        if key.name in COUNTERS:
            metric.increment(value - (last or 0.0))
        else:
            metric.set(value)
        self._last[key] = value

    def _clear_slack(self, samples: list[Sample]) -> None:
        """Say nothing presses any more for classes without unfinished requests."""
        present = {sample._replace(value=0.0) for sample in samples}
        for key in self._metrics:
            if key.name == "specserve_slo_slack_seconds" and key not in present:
                self._send(key, 0.0)

    def _state(self) -> Iterable[Sample]:
        scheduler = self._core.scheduler
        values = {
            "specserve_requests_running": len(scheduler.running),
            "specserve_requests_waiting": len(scheduler.waiting),
            "specserve_kv_blocks_used": scheduler.blocks.num_used_blocks,
            "specserve_kv_blocks_total": scheduler.blocks.num_blocks,
            "specserve_draft_available": float(self._core.draft_engine.is_available),
        }
        return (Sample(name, value) for name, value in values.items())

    def _totals(self) -> Iterable[Sample]:
        stats, scheduler = self._core.stats, self._core.scheduler
        values = {
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
        }
        return (Sample(name, value) for name, value in values.items())

    def _requests(self) -> Iterable[Sample]:
        outcomes, core = self._outcomes, self._core
        for (outcome, name), count in outcomes.requests.copy().items():
            labels = (("outcome", outcome), ("class", name))
            yield Sample("specserve_requests_total", count, labels)
        yield from _by("specserve_slo_attained_total", "class", outcomes.attained)
        yield from _by("specserve_slo_missed_total", "class", outcomes.missed)
        slack_s = dict.fromkeys([*outcomes.attained, *outcomes.missed], 0.0)  # nothing presses now
        slack_s |= least_slack_s(core.scheduler.requests, outcomes, core.clock())
        yield from _by("specserve_slo_slack_seconds", "class", slack_s)

    def _drafts(self) -> Iterable[Sample]:
        stats = self._core.stats
        for name, counts in (
            ("specserve_verified_by_position_total", stats.verified_at),
            ("specserve_accepted_by_position_total", stats.accepted_at),
        ):
            for (source, position), count in counts.copy().items():
                yield Sample(name, count, (("source", source), ("position", str(position))))
        yield from _by("specserve_draft_length_total", "length", stats.draft_lengths)
        lengths = stats.acceptance_lengths
        yield from _by("specserve_acceptance_length_total", "length", lengths)
        yield from _by("specserve_decisions_total", "reason", stats.reasons)

    def _predictions(self) -> Iterable[Sample]:
        stats, core = self._core.stats, self._core
        yield Sample("specserve_predicted_step_seconds_total", stats.predicted_s)
        yield Sample("specserve_measured_step_seconds_total", stats.measured_s)
        if core.policy.calibration_error is not None:
            error = core.policy.calibration_error
            yield Sample("specserve_acceptance_calibration_error", error)
        if core.scheduler.pacer is not None:
            step_time = core.scheduler.pacer.step_time
            for call, errors in (
                ("verify", step_time.verify_error()),
                ("draft", step_time.draft_error()),
            ):
                for quantile, error in zip(("0.5", "0.95"), errors, strict=True):
                    labels = (("call", call), ("quantile", quantile))
                    yield Sample("specserve_step_prediction_error_ratio", error, labels)

    def _telemetry(self) -> Iterable[Sample]:
        telemetry = self._core.telemetry
        yield Sample("specserve_telemetry_stale", float(telemetry.is_stale))
        reading = telemetry.reading
        if reading is None:
            return
        values = {
            "specserve_telemetry_sm_clock_ratio": reading.sm_clock_ratio,
            "specserve_telemetry_memory_clock_ratio": reading.memory_clock_ratio,
            "specserve_telemetry_power_watts": reading.power_w,
            "specserve_telemetry_throttled": float(reading.is_throttled),
            "specserve_telemetry_memory_used_bytes": reading.memory_used_bytes,
        }
        yield from (Sample(name, value) for name, value in values.items() if value is not None)


def _by(name: str, label: str, values: Mapping[Any, float]) -> Iterable[Sample]:
    return [Sample(name, value, ((label, str(key)),)) for key, value in dict(values).items()]
