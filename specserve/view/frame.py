"""What a server did between two readings of its metrics: rates, means, shares."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from specserve.view.samples import Samples


@dataclass(frozen=True, slots=True)
class Attainment:
    """Objectives of one class of requests.

    Attributes:
        attained: share of the requests that ended in this time and met theirs, None if none ended.
        total_attained: the same since the server started.
        slack_s: least time until a token is late, of those that are not finished; below 0 is late.
    """

    attained: float | None
    total_attained: float | None
    slack_s: float | None


@dataclass(frozen=True, slots=True)
class Frame:
    """One moment of a server; None is what nothing happened for, or what it does not measure.

    Attributes:
        time_s: of the later reading.
        tokens_per_s: output tokens.
        draft_length: tokens drafted for a row in a step.
        acceptance_length: tokens that a row gains in a step, the one extra token included.
        acceptance_rate: accepted share of the verified draft tokens.
        step_ms: mean time of a step.
        measured_ms, predicted_ms: of the engine calls in a step, as it was and as foretold.
        outside_share: share of a step's time outside the engines.
        acceptance_by_position: accepted share of those verified, by position in the draft.
        decisions_per_s: by reason.
        requests_per_s: that ended, by outcome.
        attainment: by class of requests.
        prediction_error: relative, by call and quantile, such as "verify 0.5".
    """

    time_s: float
    tokens_per_s: float | None
    steps_per_s: float | None
    draft_length: float | None
    acceptance_length: float | None
    acceptance_rate: float | None
    step_ms: float | None
    measured_ms: float | None
    predicted_ms: float | None
    draft_ms: float | None
    verify_ms: float | None
    outside_share: float | None
    requests_running: float | None
    requests_waiting: float | None
    kv_used: float | None
    draft_available: bool | None
    preemptions: float | None
    draft_failures: float | None
    calibration_error: float | None
    acceptance_by_position: Mapping[str, float]
    decisions_per_s: Mapping[str, float]
    requests_per_s: Mapping[str, float]
    attainment: Mapping[str, Attainment]
    prediction_error: Mapping[str, float]

    def as_json(self) -> dict[str, Any]:
        """Return plain values."""
        return dataclasses.asdict(self)


def between(before: Samples, after: Samples) -> Frame:
    """Compare two readings, `after` later than `before`."""
    span_s = after.time_s - before.time_s
    assert span_s > 0.0, f"readings in the wrong order: {span_s} s"

    def rise(name: str) -> float | None:
        end = after.total(name)
        return None if end is None else _rise(before.total(name) or 0.0, end)

    def rises(name: str, label: str) -> dict[str, float]:
        start, end = before.series(name, label), after.series(name, label)
        return {key: _rise(start.get(key, 0.0), value) for key, value in end.items()}

    output, accepted = rise("output_tokens_total"), rise("accepted_tokens_total")
    num_rows = None if output is None or accepted is None else output - accepted
    steps = rise("steps_total")
    step_s = rise("step_seconds_total")
    draft_s, verify_s = rise("draft_engine_seconds_total"), rise("verify_engine_seconds_total")
    inside = _ratio(_sum(draft_s, verify_s), step_s)
    used, available = after.total("kv_blocks_used"), after.total("draft_available")
    verified_by_position = rises("verified_by_position_total", "position")
    return Frame(
        time_s=after.time_s,
        tokens_per_s=_ratio(output, span_s),
        steps_per_s=_ratio(steps, span_s),
        draft_length=_ratio(rise("drafted_tokens_total"), num_rows),
        acceptance_length=_ratio(output, num_rows),
        acceptance_rate=_ratio(accepted, rise("verified_tokens_total")),
        step_ms=_milliseconds(step_s, steps),
        measured_ms=_milliseconds(rise("measured_step_seconds_total"), steps),
        predicted_ms=_milliseconds(rise("predicted_step_seconds_total"), steps),
        draft_ms=_milliseconds(draft_s, steps),
        verify_ms=_milliseconds(verify_s, steps),
        outside_share=None if inside is None else max(0.0, 1.0 - inside),
        requests_running=after.total("requests_running"),
        requests_waiting=after.total("requests_waiting"),
        kv_used=_ratio(used, after.total("kv_blocks_total")),
        draft_available=None if available is None else available > 0.0,
        preemptions=after.total("preemptions_total"),
        draft_failures=after.total("draft_failures_total"),
        calibration_error=after.total("acceptance_calibration_error"),
        acceptance_by_position={
            position: accepted / verified_by_position[position]
            for position, accepted in rises("accepted_by_position_total", "position").items()
            if verified_by_position.get(position)
        },
        decisions_per_s={r: n / span_s for r, n in rises("decisions_total", "reason").items()},
        requests_per_s={o: n / span_s for o, n in rises("requests_total", "outcome").items()},
        attainment=_attainment(before, after),
        prediction_error=after.series("step_prediction_error_ratio", "call", "quantile"),
    )


def _attainment(before: Samples, after: Samples) -> dict[str, Attainment]:
    attained, missed, slack = (
        after.series(f"slo_{name}", "class")
        for name in ("attained_total", "missed_total", "slack_seconds")
    )
    old_attained, old_missed = (
        before.series(f"slo_{name}", "class") for name in ("attained_total", "missed_total")
    )

    def of(name: str) -> Attainment:
        yes, no = attained.get(name, 0.0), missed.get(name, 0.0)
        new_yes = _rise(old_attained.get(name, 0.0), yes)
        new_no = _rise(old_missed.get(name, 0.0), no)
        return Attainment(_share(new_yes, new_no), _share(yes, no), slack.get(name))

    return {name: of(name) for name in sorted({*attained, *missed, *slack})}


def _rise(start: float, end: float) -> float:
    return end - start if end >= start else end  # a server that has restarted counts from zero


def _sum(one: float | None, other: float | None) -> float | None:
    return None if one is None or other is None else one + other


def _ratio(value: float | None, whole: float | None) -> float | None:
    return None if value is None or not whole else value / whole


def _milliseconds(seconds: float | None, count: float | None) -> float | None:
    mean_s = _ratio(seconds, count)
    return None if mean_s is None else 1000.0 * mean_s


def _share(yes: float, no: float) -> float | None:
    return _ratio(yes, yes + no)
