"""Curves over load: latency, attainment, and what throughput costs."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bench.report import style
from bench.report.results import (
    ATTAINMENT,
    LATENCY,
    TOKEN_RATE,
    TPOT,
    TPOT_P99,
    TTFT,
    Metric,
    Place,
    Results,
)

LOG_FROM = 20.0  # largest over smallest value, from which an axis is logarithmic


def latency(results: Results, trace: str) -> Figure:
    """Draw mean latency, TTFT and TPOT against the arrival rate, a line for each policy."""
    figure, panels = style.grid(1, 3)
    scale = results.middle_scale(trace)
    for axes, metric in zip(panels, (LATENCY, TTFT, TPOT), strict=True):
        _curves(axes, results, trace, scale, metric)
        _log_if_wide(axes)
    style.legend_below(figure, panels[0])
    return figure


def attainment(results: Results, trace: str) -> Figure:
    """Draw attainment against the arrival rate, a panel for each SLO scale."""
    scales = results.slo_scales(trace)
    figure, panels = style.grid(1, len(scales))
    for axes, scale in zip(panels, scales, strict=True):
        _curves(axes, results, trace, scale, ATTAINMENT)
        axes.set_title(f"SLO scale {scale:g}")
        axes.set_ylim(-3, 103)
    style.legend_below(figure, panels[0])
    return figure


def pareto(results: Results) -> Figure:
    """Draw p99 TPOT against throughput, a panel for each trace; a line joins a policy's loads."""
    figure, panels = style.grid(1, len(results.traces), height=3.4)
    for axes, trace in zip(panels, results.traces, strict=True):
        scale = results.middle_scale(trace)
        for policy in results.policies:
            _path(axes, results, trace, scale, policy)
        axes.set_xlabel(f"{TOKEN_RATE.label} (right is better)")
        axes.set_ylabel(f"{TPOT_P99.label} (low is better)")
        axes.set_title(trace)
        _log_if_wide(axes)
    style.legend_below(figure, panels[0])
    return figure


def _curves(axes: Axes, results: Results, trace: str, slo_scale: float, metric: Metric) -> None:
    """Draw a metric against requests per second, with the intervals there are."""
    for policy in results.policies:
        x, y, intervals = [], [], []
        for load in results.loads(trace, slo_scale):
            place = Place(trace, slo_scale, load)
            estimate = results.estimate(metric, place, policy)
            if estimate is not None:
                x.append(rate_rps(results, place, policy))
                y.append(estimate.value)
                intervals.append(estimate.interval or (estimate.value, estimate.value))
        look = style.line(policy)
        axes.plot(x, y, **look)
        low, high = np.array(intervals).reshape(-1, 2).T
        axes.vlines(x, low, high, color=look["color"], linewidth=0.8, alpha=0.6)
    axes.set_xlabel("requests per second")
    axes.set_ylabel(metric.label)


def _path(axes: Axes, results: Results, trace: str, slo_scale: float, policy: str) -> None:
    points = []
    for load in results.loads(trace, slo_scale):
        place = Place(trace, slo_scale, load)
        x, y = (results.value(metric, place, policy) for metric in (TOKEN_RATE, TPOT_P99))
        if x is not None and y is not None:
            points.append((x, y))
    axes.plot(*np.array(points).reshape(-1, 2).T, **style.line(policy))


def rate_rps(results: Results, place: Place, policy: str) -> float:
    """Return the mean arrival rate of a place's repeats."""
    return float(np.mean([cell.workload.rate_rps for cell in results.cells(place, policy)]))


def _log_if_wide(axes: Axes) -> None:
    values: Sequence[float] = [
        v for one in axes.lines for v in np.asarray(one.get_ydata()) if v > 0
    ]
    if values and max(values) > LOG_FROM * min(values):
        axes.set_yscale("log")
        style.plain_log(axes.yaxis)
    else:
        axes.set_ylim(bottom=0)
