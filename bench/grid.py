"""The grid: trace x policy x load x SLO scale x repeat, cell by cell into a file.

Owns the order, the calibration that loads and objectives rest on, and resumption: cells that the
file has are not run again. Does not know how a window is replayed.

Policies take turns within a cell of the other axes, in random order, so that a slow moment of the
machine hits all alike; every cell begins with a fresh policy, so none depends on those before.
"""

import json
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from bench.arms import PLAIN, arm_overrides
from bench.calibration import Calibration, capacity, check_finished, p90
from bench.cells import Cell, CellKey, append_line, read_cells, read_lines
from bench.outcome import Run
from bench.record import context, portable
from bench.statistics import results, summarise
from bench.workloads.objectives import RequestClass
from bench.workloads.plan import Plan, Planner

FLOOD_SEED, LOW_SEED, WARM_UP_SEED = 7_000_000, 8_000_000, 9_000_000  # repeats have 0, 1, ...


class Runner(Protocol):
    """Replays windows."""

    def run(self, overrides: Sequence[str], warm_up: Plan | None, plan: Plan) -> Run:
        """Replay a warm-up, then a plan, on a server core with these overrides of its own."""


@dataclass(frozen=True, slots=True)
class Axes:
    """What a grid varies."""

    traces: Sequence[str]
    policies: Sequence[str]
    loads: Sequence[float]
    slo_scales: Sequence[float]
    num_repeats: int

    def cells(self, mode: str) -> Iterator[CellKey]:
        """Yield the cells in the order they run."""
        for repeat in range(self.num_repeats):
            for trace in self.traces:
                for load in self.loads:
                    for scale in self.slo_scales:
                        rng = random.Random(f"{repeat} {trace} {load} {scale}")
                        for policy in rng.sample(self.policies, len(self.policies)):
                            yield CellKey(trace, policy, load, scale, repeat, mode)


@dataclass(frozen=True, slots=True)
class Timing:
    """How long things are.

    Attributes:
        window_s: of a cell; `warm_up_s` of what goes before it and is not counted.
        low_load: where relative objectives are measured, as a share of capacity.
        num_flood: requests that measure the capacity.
        num_low: requests at low load.
    """

    window_s: float
    warm_up_s: float
    low_load: float
    num_flood: int
    num_low: int


class Grid:
    """Runs what is missing in a file.

    Args:
        planners: by trace.
        classes: of the requests; the planners get them once relative objectives are known.
        settings: what a line depends on besides its cell; a file holds lines of one kind only.
        with_requests: keep every request in the lines, not only their summary.
    """

    def __init__(
        self,
        runner: Runner,
        mode: str,
        planners: Mapping[str, Planner],
        classes: Sequence[RequestClass],
        timing: Timing,
        output: Path,
        settings: Mapping[str, Any],
        *,
        with_requests: bool = True,
    ) -> None:
        self._runner = runner
        self._mode = mode
        self._planners = planners
        self._classes = classes
        self._timing = timing
        self._output = output
        self._settings = dict(settings)
        self._with_requests = with_requests
        self._calibrations: dict[str, Calibration] = {}

    def missing(self, wanted: Sequence[CellKey]) -> list[CellKey]:
        """Return the cells that the file does not have, in order.

        Raises:
            ValueError: the file has a malformed line, or lines of other settings.
        """
        done: set[CellKey] = set()
        if self._output.is_file():
            self._calibrations = dict(self._read_calibrations())
            done = {cell.key for cell in read_cells(self._output)}
        return [key for key in wanted if key not in done]

    def describe(self, trace: str) -> str:
        """Say what is sent of a trace, and what its loads and objectives are relative to."""
        return f"{self._planners[trace].describe()}\n{self.calibration(trace).describe()}"

    def calibration(self, trace: str) -> Calibration:
        """Return the file's calibration of a trace, or measure and append it."""
        if trace not in self._calibrations:
            self._calibrations[trace] = self._calibrate(trace)
            self._append(
                json.dumps({**self._calibrations[trace].to_tree(), **context()}, default=str)
            )
        return self._calibrations[trace]

    def run(self, key: CellKey) -> Cell:
        """Run a cell and append its line."""
        calibration = self.calibration(key.trace)
        planner = replace(self._planners[key.trace], classes=self._classes, plain=calibration.plain)
        rate_rps = key.load * calibration.capacity_rps
        slos = [one.slo(calibration.plain, key.slo_scale) for one in self._classes]

        def window(seconds: float, seed: int) -> Plan:
            return planner.window(rate_rps, seconds, seed=seed, slo_scale=key.slo_scale)

        plan = window(self._timing.window_s, key.repeat)
        warm_up_s = self._timing.warm_up_s
        warm_up = window(warm_up_s, WARM_UP_SEED + key.repeat) if warm_up_s else None
        run = self._runner.run(arm_overrides(key.policy, slos), warm_up, plan)
        cell = Cell(
            key,
            plan.info,
            results(run.outcomes) if self._with_requests else [],
            run.steps if self._with_requests else [],
            summarise(run.outcomes, plan.info.window_s),
            context(),
        )
        self._append(cell.to_line())
        return cell

    def _calibrate(self, trace: str) -> Calibration:
        planner, timing = self._planners[trace], self._timing
        plain = arm_overrides(PLAIN)
        flood = self._runner.run(plain, None, planner.flood(timing.num_flood, seed=FLOOD_SEED))
        check_finished(flood.outcomes)
        capacity_rps, token_rate = capacity(flood.outcomes)
        rate_rps = timing.low_load * capacity_rps
        window = planner.window(rate_rps, timing.num_low / rate_rps, seed=LOW_SEED)
        low = self._runner.run(plain, None, window).outcomes
        check_finished(low)
        return Calibration(
            trace=trace,
            capacity_rps=capacity_rps,
            token_rate=token_rate,
            low_load=timing.low_load,
            ttft_p90_s=p90([outcome.ttft_s for outcome in low]),
            tpot_p90_s=p90([o.tpot_s for o in low if o.num_output_tokens > 1]),
            settings=self._settings,
        )

    def _read_calibrations(self) -> Iterator[tuple[str, Calibration]]:
        for number, tree in read_lines(self._output):
            if "calibration" not in tree:
                continue
            try:
                calibration = Calibration.from_tree(tree)
            except (KeyError, TypeError) as error:
                raise ValueError(f"{self._output}:{number}: not a calibration: {error}") from error
            self._check_settings(calibration.settings)
            yield calibration.trace, calibration

    def _check_settings(self, others: Mapping[str, Any]) -> None:
        mine = json.loads(portable(json.dumps(self._settings, default=str)))  # as it would be read
        names = [name for name in {**mine, **others} if mine.get(name) != others.get(name)]
        if names:
            name = names[0]
            raise ValueError(
                f"{self._output} was measured with {name} = {others.get(name)}, this grid has "
                f"{mine.get(name)}: take another --output, or the same settings"
            )

    def _append(self, line: str) -> None:
        append_line(self._output, portable(line))
