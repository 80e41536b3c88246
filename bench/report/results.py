"""Cells of a grid, grouped by what they vary and summed up over repeats."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from bench.cells import Cell, RequestResult, read_cells
from bench.statistics import Interval, bootstrap_interval, t_interval

BASELINE, OURS = "none", "specserve"
MIN_REPEATS = 4  # from which an interval is over repeats


class Estimate(NamedTuple):
    """A value and its 95 % interval, which is None where nothing can be said."""

    value: float
    interval: Interval | None


@dataclass(frozen=True, slots=True)
class Metric:
    """What can be read off a cell.

    Attributes:
        of_cell: the cell's value; None if no request finished.
        of_request: of which that is the mean, if it is one; None if the request has none.
        is_better_low: the direction.
    """

    name: str
    unit: str
    of_cell: Callable[[Cell], float | None]
    of_request: Callable[[RequestResult], float | None] | None = None
    is_better_low: bool = True

    @property
    def label(self) -> str:
        """Name and unit, for an axis or a column."""
        return f"{self.name}, {self.unit}" if self.unit else self.name


LATENCY = Metric(
    "mean latency",
    "s",
    lambda cell: cell.summary.e2e_s.mean if cell.summary.e2e_s else None,
    lambda request: request.e2e_s,
)
TTFT = Metric(
    "mean TTFT",
    "s",
    lambda cell: cell.summary.ttft_s.mean if cell.summary.ttft_s else None,
    lambda request: request.ttft_s,
)
TPOT = Metric(
    "mean TPOT",
    "ms",
    lambda cell: 1e3 * cell.summary.tpot_s.mean if cell.summary.tpot_s else None,
    lambda request: 1e3 * request.tpot_s if request.tpot_s else None,
)
TPOT_P99 = Metric(
    "p99 TPOT", "ms", lambda cell: 1e3 * cell.summary.tpot_s.p99 if cell.summary.tpot_s else None
)
ATTAINMENT = Metric(
    "SLO attainment",
    "%",
    lambda cell: 100.0 * cell.summary.attainment,
    lambda request: 100.0 * request.attained,
    is_better_low=False,
)
TOKEN_RATE = Metric(
    "output tokens/s", "", lambda cell: cell.summary.token_rate, is_better_low=False
)
GOODPUT = Metric(
    "goodput", "requests/s", lambda cell: cell.summary.goodput_rps, is_better_low=False
)


class Place(NamedTuple):
    """A grid cell but for its policy and repeat."""

    trace: str
    slo_scale: float
    load: float


class Results:
    """The cells of one mode, by place and policy; repeats lie together."""

    def __init__(self, cells: Iterable[Cell]) -> None:
        self._repeats: dict[tuple[Place, str], list[Cell]] = {}
        for cell in cells:
            key = cell.key
            place = Place(key.trace, key.slo_scale, key.load)
            self._repeats.setdefault((place, key.policy), []).append(cell)
        for repeats in self._repeats.values():
            repeats.sort(key=lambda cell: cell.key.repeat)
        self._intervals: dict[tuple[str, Place, str], Interval | None] = {}
        found = {policy for _, policy in self._repeats}
        self.policies = sorted(found, key=_order)
        self.places = sorted({place for place, _ in self._repeats})

    @property
    def all_cells(self) -> list[Cell]:
        """Every cell."""
        return [cell for repeats in self._repeats.values() for cell in repeats]

    @property
    def traces(self) -> list[str]:
        """Names of the traces."""
        return sorted({place.trace for place in self.places})

    def slo_scales(self, trace: str) -> list[float]:
        """Return the SLO scales of a trace, tight ones first."""
        return sorted({place.slo_scale for place in self.places if place.trace == trace})

    def middle_scale(self, trace: str) -> float:
        """Return the SLO scale nearest to 1."""
        return min(self.slo_scales(trace), key=lambda scale: abs(scale - 1.0))

    def loads(self, trace: str, slo_scale: float) -> list[float]:
        """Return the loads of a trace at an SLO scale, low ones first."""
        return [p.load for p in self.places if (p.trace, p.slo_scale) == (trace, slo_scale)]

    def cells(self, place: Place, policy: str) -> list[Cell]:
        """Return the repeats of a cell; none if it was not run."""
        return self._repeats.get((place, policy), [])

    def value(self, metric: Metric, place: Place, policy: str) -> float | None:
        """Return the mean of a metric over repeats; None if there is nothing to take it of."""
        values = self._values(metric, place, policy)
        return float(np.mean(values)) if values else None

    def estimate(self, metric: Metric, place: Place, policy: str) -> Estimate | None:
        """Return the mean of a metric and how sure it is; None as in `value`.

        The interval is Student's over repeats from `MIN_REPEATS` of them, else the bootstrap's over
        all requests.
        """
        values = self._values(metric, place, policy)
        if not values:
            return None
        key = (metric.name, place, policy)
        if key not in self._intervals:
            requests = [v for v in self._of_requests(metric, place, policy) if v is not None]
            self._intervals[key] = _interval(values, requests)
        return Estimate(float(np.mean(values)), self._intervals[key])

    def best(self, metric: Metric, place: Place, but: str = "") -> list[str]:
        """Return the policies, except one, that share the best value at a place."""
        values = {policy: self.value(metric, place, policy) for policy in self.policies}
        found = {p: value for p, value in values.items() if value is not None and p != but}
        best = (min if metric.is_better_low else max)(found.values(), default=0.0)
        return [policy for policy, value in found.items() if value == best]

    def gain(self, metric: Metric, place: Place, policy: str, other: str) -> Estimate | None:
        """Return by how much a policy is better than another, above 0 if it is.

        All policies are sent the same requests, so like is compared with like: the interval is
        Student's over repeats from `MIN_REPEATS` of them, else the bootstrap's over requests.

        Returns:
            None if there is no repeat that both have.
        """
        others = {cell.key.repeat: cell for cell in self.cells(place, other)}
        mine = self.cells(place, policy)
        pairs = [(cell, others[cell.key.repeat]) for cell in mine if cell.key.repeat in others]
        sign = -1.0 if metric.is_better_low else 1.0
        values = [(metric.of_cell(a), metric.of_cell(b)) for a, b in pairs]
        gains = [sign * (a - b) for a, b in values if a is not None and b is not None]
        if not gains:
            return None
        requests = [sign * gain for a, b in pairs for gain in _differences(metric, a, b)]
        return Estimate(float(np.mean(gains)), _interval(gains, requests))

    def _values(self, metric: Metric, place: Place, policy: str) -> list[float]:
        values = [metric.of_cell(cell) for cell in self.cells(place, policy)]
        return [value for value in values if value is not None]

    def _of_requests(self, metric: Metric, place: Place, policy: str) -> list[float | None]:
        """Return the values of all requests, those without one too, repeat by repeat."""
        of_request = metric.of_request
        if of_request is None:
            return []
        return [of_request(r) for cell in self.cells(place, policy) for r in cell.requests]


def read(paths: Sequence[Path]) -> dict[str, Results]:
    """Read result files, or every `*.jsonl` of a folder, into results by mode.

    Raises:
        ValueError: no such file, a malformed line, the same cell twice, or no cell at all.
    """
    cells: dict[str, Cell] = {}
    for path in _files(paths):
        for cell in read_cells(path):
            name = str(cell.key)
            if name in cells:
                raise ValueError(f"{path} has a cell twice or another file has it too: {name}")
            cells[name] = cell
    if not cells:
        raise ValueError(f"no result line in {', '.join(map(str, paths))}: run `specserve bench`")
    modes = sorted({cell.key.mode for cell in cells.values()})
    return {mode: Results(c for c in cells.values() if c.key.mode == mode) for mode in modes}


def _files(paths: Sequence[Path]) -> list[Path]:
    files: list[Path] = []
    for path in paths:
        if not path.exists():
            raise ValueError(f"{path} is neither a file nor a folder")
        files += sorted(path.glob("*.jsonl")) if path.is_dir() else [path]
    return files


def _differences(metric: Metric, one: Cell, two: Cell) -> list[float]:
    """Return the differences of requests that have a value in both cells."""
    of_request = metric.of_request
    if of_request is None or len(one.requests) != len(two.requests):
        return []
    pairs = [
        (of_request(a), of_request(b)) for a, b in zip(one.requests, two.requests, strict=True)
    ]
    # Lines have six digits after the point: beyond them is the noise of subtracting.
    return [round(a - b, 9) for a, b in pairs if a is not None and b is not None]


def _interval(values: Sequence[float], requests: Sequence[float]) -> Interval | None:
    if len(values) >= MIN_REPEATS:
        return t_interval(values)
    return bootstrap_interval(requests) if requests else None


def _order(policy: str) -> tuple[bool, bool, str]:
    """Put plain decoding first and ours last."""
    return policy == OURS, policy != BASELINE, policy
