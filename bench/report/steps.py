"""What happened step by step: draft lengths over time, and how well step times were predicted."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from bench.cells import Cell, StepSample
from bench.report import style
from bench.report.results import OURS, Place, Results

SMOOTH = 15  # steps of a moving average
MAX_PANELS = 6
MAX_POINTS = 2000

# What is drawn of every step, per row: name, colour, dash, width.
LENGTHS = (
    ("drafted", style.GREY, ":", 1.3),
    ("verified", style.ORANGE, "--", 1.3),
    ("accepted", style.BLUE, "-", 1.8),
)


class Error(NamedTuple):
    """Absolute error of predicted step times, as a share of the measured ones."""

    median: float
    p95: float
    num_steps: int


def busiest(results: Results, trace: str) -> Place:
    """Return the place of a trace with the highest load, at the SLO scale nearest to 1."""
    scale = results.middle_scale(trace)
    return Place(trace, scale, results.loads(trace, scale)[-1])


def lengths_over_time(results: Results, trace: str) -> Figure | None:
    """Draw tokens drafted, verified and accepted per row over a window, a panel for each policy.

    Returns:
        None if no step of a policy that drafts was seen.
    """
    place = busiest(results, trace)
    cells = {policy: results.cells(place, policy)[:1] for policy in results.policies[::-1]}
    drafting = {p: c[0] for p, c in cells.items() if c and any(s.drafted for s in c[0].steps)}
    shown = dict(list(drafting.items())[:MAX_PANELS])
    if not shown:
        return None
    num_columns = min(2, len(shown))
    figure, panels = style.grid(-(-len(shown) // num_columns), num_columns, height=2.2)
    for axes, (policy, cell) in zip(panels, shown.items(), strict=False):
        _lengths(axes, cell)
        axes.set_title(style.label(policy))
    highest = max(axes.get_ylim()[1] for axes in panels[: len(shown)])
    for axes in panels:
        axes.set_ylim(0, highest)  # the same for all, to compare
    for axes in panels[len(shown) :]:
        axes.set_visible(False)
    style.legend_below(figure, panels[0])
    return figure


def predicted_against_measured(results: Results) -> Figure | None:
    """Draw our predictions of step times against what the steps took, a panel for each trace.

    Returns:
        None if no step was seen.
    """
    traces = [trace for trace in results.traces if _samples(results, trace)]
    if not traces:
        return None
    figure, panels = style.grid(1, max(2, len(traces)), height=3.6)
    for axes, trace in zip(panels, traces, strict=False):
        scatter(axes, _samples(results, trace))
        axes.set_title(trace)
    for axes in panels[len(traces) :]:
        axes.set_visible(False)
    return figure


def prediction_error(results: Results, trace: str) -> Error | None:
    """Return how far our predictions were off, over all steps of a trace that were seen."""
    return error_of(_samples(results, trace))


def error_of(steps: Sequence[StepSample]) -> Error | None:
    """Return how far the predictions of some steps were off, or None if there are none."""
    samples = [step for step in steps if _is_predicted(step)]
    if not samples:
        return None
    predicted, measured = _milliseconds(samples)
    error = np.abs(predicted - measured) / measured
    return Error(float(np.median(error)), float(np.percentile(error, 95)), len(samples))


def _is_predicted(step: StepSample) -> bool:
    return bool(step.predicted_s) and step.measured_s > 0.0


def _samples(results: Results, trace: str) -> list[StepSample]:
    return [
        step
        for place in results.places
        if place.trace == trace
        for cell in results.cells(place, OURS)
        for step in cell.steps
        if _is_predicted(step)
    ]


def _lengths(axes: Axes, cell: Cell) -> None:
    """Draw one window; rows of the batch stand grey behind, on an axis of their own."""
    time_s = np.array([step.t_s for step in cell.steps])
    rows = np.array([step.num_rows for step in cell.steps], dtype=float)
    behind = axes.twinx()
    behind.fill_between(time_s, rows, color="#dddddd", linewidth=0, step="mid")
    behind.set_ylim(0, 2.0 * rows.max())
    behind.set_ylabel("rows (grey)", color=style.GREY)
    behind.grid(visible=False)
    behind.spines["right"].set_visible(True)
    axes.set_zorder(behind.get_zorder() + 1)
    axes.patch.set_visible(False)
    for name, color, dash, width in LENGTHS:
        tokens = np.array([getattr(step, name) for step in cell.steps]) / rows
        axes.plot(time_s, _smooth(tokens), color=color, linestyle=dash, linewidth=width, label=name)
    axes.set_xlabel("time, s")
    axes.set_ylabel("tokens per row")


def scatter(axes: Axes, samples: Sequence[StepSample]) -> None:
    """Draw the predicted against the measured time of steps that were predicted.

    The axes end where one step in a hundred is longer; the legend counts those left out.
    """
    predicted, measured = _milliseconds(samples[:: -(-len(samples) // MAX_POINTS)])
    axes.scatter(
        measured, predicted, s=7, color=style.BLUE, alpha=0.5, linewidths=0, rasterized=True
    )
    longest = np.maximum(measured, predicted)
    top = 1.05 * float(np.percentile(longest, 99))
    num_beyond = int((longest > top).sum())
    ends = np.array([0.0, top])
    axes.plot(ends, ends, color=style.BLACK, linewidth=1.0, label="predicted = measured")
    for factor, name in ((1.1, "10 % off"), (0.9, None)):
        axes.plot(ends, factor * ends, color=style.BLACK, linewidth=0.8, linestyle=":", label=name)
    if num_beyond:
        axes.plot([], [], linestyle="", label=f"{num_beyond} of {len(longest)} steps longer")
    axes.set_xlim(0.0, top)
    axes.set_ylim(0.0, top)
    axes.set_xlabel("measured step time, ms")
    axes.set_ylabel("predicted, ms")
    axes.legend(loc="upper left")


def _milliseconds(samples: Sequence[StepSample]) -> NDArray[np.float64]:
    """Return [2, n]: predicted and measured."""
    return 1e3 * np.array([(step.predicted_s, step.measured_s) for step in samples]).T


def _smooth(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the moving average, over what there is at both ends."""
    width = min(SMOOTH, len(values))
    ones = np.ones(width)
    total: NDArray[np.float64] = np.convolve(values, ones, "same")
    return total / np.convolve(np.ones(len(values)), ones, "same")
