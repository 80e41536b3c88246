"""Numbers with their intervals: who is best where, and every cell."""

from dataclasses import dataclass
from typing import NamedTuple

from bench.report import style
from bench.report.figures import rate_rps
from bench.report.results import (
    ATTAINMENT,
    GOODPUT,
    LATENCY,
    OURS,
    TOKEN_RATE,
    TPOT,
    TPOT_P99,
    TTFT,
    Estimate,
    Metric,
    Place,
    Results,
)

ALL_METRICS = (LATENCY, TTFT, TPOT, TPOT_P99, ATTAINMENT, GOODPUT, TOKEN_RATE)


@dataclass(frozen=True, slots=True)
class Entry:
    """A table cell: text, and whether it is the best of its column."""

    text: str
    is_best: bool = False


@dataclass(frozen=True, slots=True)
class Table:
    """A caption, column heads, and rows that begin with a name."""

    caption: str
    head: list[str]
    rows: list[tuple[str, list[Entry]]]


class Duel(NamedTuple):
    """Our policy against the best other one at a place; a gain above 0 is ours.

    Attributes:
        is_clear: the interval of the gain does not hold 0; None if there is no interval.
    """

    place: Place
    other: str
    theirs: str
    ours: str
    gain: str
    is_won: bool
    is_clear: bool | None


@dataclass(frozen=True, slots=True)
class Verdict:
    """Our policy in one metric, over all places where it was run."""

    metric: Metric
    duels: list[Duel]

    def num_won(self, *, clearly: bool = False) -> int:
        """Count the places where no other policy is better."""
        return sum(duel.is_won and bool(duel.is_clear or not clearly) for duel in self.duels)

    @property
    def has_intervals(self) -> bool:
        """Whether chance can be told from more than that."""
        return any(duel.is_clear is not None for duel in self.duels)

    @property
    def lost(self) -> list[Duel]:
        """Where another policy is better."""
        return [duel for duel in self.duels if not duel.is_won]


def by_load(results: Results, metric: Metric, trace: str, slo_scale: float) -> Table:
    """Tabulate a metric, policies down and loads across."""
    places = [Place(trace, slo_scale, load) for load in results.loads(trace, slo_scale)]
    rows = []
    for policy in results.policies:
        entries = [_entry(results, metric, place, policy) for place in places]
        rows.append((style.label(policy), entries))
    return Table(
        f"{trace}, SLO scale {slo_scale:g}: {metric.label}",
        ["policy", *(f"load {place.load:g}" for place in places)],
        rows,
    )


def every_cell(results: Results) -> Table:
    """Tabulate all metrics of all places and policies."""
    rows = []
    for place in results.places:
        for policy in results.policies:
            cells = results.cells(place, policy)
            if cells:
                counts = [
                    f"{rate_rps(results, place, policy):.2f}",
                    f"{sum(cell.workload.num_requests for cell in cells)}",
                    f"{sum(cell.summary.num_rejected for cell in cells)}",
                    f"{sum(cell.summary.num_failed for cell in cells)}",
                ]
                entries = [Entry(text) for text in [style.label(policy), *counts]]
                entries += [_entry(results, metric, place, policy) for metric in ALL_METRICS]
                rows.append((f"{place.trace}, {place.slo_scale:g}, {place.load:g}", entries))
    head = ["trace, SLO scale, load", "policy", "requests/s", "requests", "rejected", "failed"]
    return Table("Every cell", [*head, *(metric.label for metric in ALL_METRICS)], rows)


def verdict(results: Results, metric: Metric) -> Verdict:
    """Compare our policy with the best other one, place by place."""
    duels = (_duel(results, metric, place) for place in results.places)
    return Verdict(metric, [duel for duel in duels if duel is not None])


def _duel(results: Results, metric: Metric, place: Place) -> Duel | None:
    others = results.best(metric, place, but=OURS)
    gain = results.gain(metric, place, OURS, others[0]) if others else None
    if gain is None:
        return None
    ours, theirs = (results.value(metric, place, policy) for policy in (OURS, others[0]))
    assert ours is not None, "a gain without a value of ours"
    assert theirs is not None, f"{others[0]} is best without a value"
    return Duel(
        place=place,
        other=style.label(others[0]),
        theirs=number(theirs),
        ours=number(ours),
        gain=interval_text(gain),
        is_won=gain.value >= 0.0,
        is_clear=gain.interval and not gain.interval.low <= 0.0 <= gain.interval.high,
    )


def number(value: float) -> str:
    """Print three significant digits, and all digits before the point."""
    return f"{value:.0f}" if abs(value) >= 99.95 else f"{value:#.3g}"


def interval_text(estimate: Estimate) -> str:
    """Print a value and its interval."""
    if estimate.interval is None:
        return number(estimate.value)
    low, high = estimate.interval
    return f"{number(estimate.value)} [{number(low)}, {number(high)}]"


def _entry(results: Results, metric: Metric, place: Place, policy: str) -> Entry:
    estimate = results.estimate(metric, place, policy)
    if estimate is None:
        return Entry("-")
    return Entry(interval_text(estimate), policy in results.best(metric, place))
