"""How a policy looks in every figure: colour, marker and dash, so that two of them may be lost."""

from typing import Any

from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from bench.report.results import BASELINE, OURS

# Okabe and Ito's palette: eight colours that colour-blind readers tell apart.
BLACK, ORANGE, SKY, GREEN = "#000000", "#E69F00", "#56B4E9", "#009E73"
YELLOW, BLUE, RED, PURPLE = "#CCBB00", "#0072B2", "#D55E00", "#CC79A7"
GREY = "#666666"

STYLES: dict[str, tuple[str, str, Any]] = {
    OURS: (BLUE, "o", "-"),
    BASELINE: (BLACK, "x", ":"),
    "threshold": (ORANGE, "v", "--"),
    "smartspec": (GREEN, "^", "-."),
    "adaspec_released": (RED, "s", (0, (5, 1.5))),
    "adaspec_repaired": (PURPLE, "D", (0, (3, 1, 1, 1))),
    "adaptive_verification": (SKY, "P", (0, (7, 2))),
    "adaptive": (YELLOW, "X", (0, (1, 1.5))),
}
FIXED_MARKERS = "H<>dph*8"
LEGEND_COLUMNS = 6
NAMES = {BASELINE: "plain decoding"}

RC: dict[Any, Any] = {
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "font.family": "DejaVu Sans",
    "font.size": 9.0,
    "grid.alpha": 0.35,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "lines.markersize": 5.5,
    "savefig.dpi": 160,
    "svg.hashsalt": "specserve",
}


def label(policy: str) -> str:
    """Return what a policy is called in print."""
    return NAMES.get(policy, policy.replace("_", " "))


def line(policy: str) -> dict[str, Any]:
    """Return a policy's look, as keyword arguments of `Axes.plot`."""
    color, marker, dash = STYLES.get(policy, (GREY, ".", (0, (2, 1))))
    if policy.startswith("fixed_"):
        marker = FIXED_MARKERS[int(policy.removeprefix("fixed_")) % len(FIXED_MARKERS)]
    is_ours = policy == OURS
    return {
        "color": color,
        "marker": marker,
        "linestyle": dash,
        "label": label(policy),
        "linewidth": 2.2 if is_ours else 1.2,
        "markeredgewidth": 1.3,
        "zorder": 3 if is_ours else 2,
    }


def grid(num_rows: int, num_columns: int, height: float = 2.9) -> tuple[Figure, list[Axes]]:
    """Make a figure of equal panels, as wide as a page, and return them row by row."""
    figure = Figure(figsize=(9.6, height * num_rows), layout="constrained")
    axes = figure.subplots(num_rows, num_columns, squeeze=False)
    return figure, [panel for row in axes for panel in row]


def plain_log(axis: Axis) -> None:
    """Label a logarithmic axis 1, 2, 5, 10, ..."""
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_locator(NullLocator())


def legend_below(figure: Figure, axes: Axes) -> None:
    """Put one legend for all panels under them."""
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        num_lines = -(-len(handles) // LEGEND_COLUMNS)
        num_columns = -(-len(handles) // num_lines)
        figure.legend(handles, labels, loc="outside lower center", ncols=num_columns)
