"""The page and the PNGs: figures drawn, tables filled in, one HTML file that needs nothing else."""

import base64
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import matplotlib
from matplotlib.figure import Figure

from bench.cells import Cell
from bench.report import figures, steps, style, tables
from bench.report.results import ATTAINMENT, LATENCY, MIN_REPEATS, OURS, Results

MODES = {
    "server": "A real Triton server, its clients on the same machine",
    "engines": "Real engines, in one process",
    "simulated": "Simulated: step times of a profile, recorded acceptance, a virtual clock",
}


@dataclass(frozen=True, slots=True)
class Picture:
    """A figure, ready to be shown.

    Attributes:
        name: of its PNG, without the ending.
        caption: what to see in it.
        data: an SVG as a data URI.
    """

    name: str
    caption: str
    data: str


def write(results: Mapping[str, Results], folder: Path) -> Path:
    """Write `index.html` and a PNG of every figure into a folder.

    Args:
        results: by mode.

    Returns:
        The page.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context(style.RC):
        sections = [_section(mode, results[mode], folder) for mode in MODES if mode in results]
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("bench.report", "."),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    path = folder / "index.html"
    page = environment.get_template("page.html.j2").render(
        sections=sections, ours=OURS, min_repeats=MIN_REPEATS
    )
    path.write_text(page, encoding="utf-8")
    return path


def _section(mode: str, results: Results, folder: Path) -> dict[str, Any]:
    """Collect what the template shows of one mode."""
    verdicts = [tables.verdict(results, metric) for metric in (LATENCY, ATTAINMENT)]
    return {
        "mode": mode,
        "title": MODES[mode],
        "pictures": [
            _picture(f"{mode}_{name}", caption, figure, folder)
            for name, caption, figure in _figures(results)
        ],
        "verdicts": [verdict for verdict in verdicts if verdict.duels],
        "tables": [
            tables.by_load(results, metric, trace, scale)
            for metric in (LATENCY, ATTAINMENT)
            for trace in results.traces
            for scale in results.slo_scales(trace)
        ],
        "every_cell": tables.every_cell(results),
        "workloads": [_workload(results, trace) for trace in results.traces],
        "provenance": _provenance(results.all_cells),
    }


def _figures(results: Results) -> Iterator[tuple[str, str, Figure]]:
    """Yield name, caption and figure of all that can be drawn."""
    for trace in results.traces:
        name, scale = _file_name(trace), results.middle_scale(trace)
        yield (
            f"latency_{name}",
            f"Latency against load, trace {trace}, SLO scale {scale:g}. Low is better.",
            figures.latency(results, trace),
        )
    for trace in results.traces:
        yield (
            f"attainment_{_file_name(trace)}",
            f"Share of requests that met every objective, trace {trace}. High is better.",
            figures.attainment(results, trace),
        )
    yield (
        "pareto",
        "What throughput costs: the slowest percent of requests against output tokens per second; "
        "a line joins one policy's loads, from low to high. Right and low is better.",
        figures.pareto(results),
    )
    for trace in results.traces:
        place, figure = steps.busiest(results, trace), steps.lengths_over_time(results, trace)
        if figure is not None:
            yield (
                f"lengths_{_file_name(trace)}",
                f"Tokens per row and step, trace {trace} at load {place.load:g}, SLO scale "
                f"{place.slo_scale:g}: drafted, selected for verification, accepted (moving means "
                f"over {steps.SMOOTH} samples). A longer draft that is not accepted is wasted.",
                figure,
            )
    figure = steps.predicted_against_measured(results)
    if figure is not None:
        yield "predicted", _prediction_caption(results), figure


def _prediction_caption(results: Results) -> str:
    errors = {trace: steps.prediction_error(results, trace) for trace in results.traces}
    texts = [
        f"{trace}: median error {error.median:.1%}, 95th percentile {error.p95:.1%}, "
        f"{error.num_steps} steps"
        for trace, error in errors.items()
        if error is not None
    ]
    return f"Engine time of a step as {OURS} predicted it and as measured. " + "; ".join(texts)


def _picture(name: str, caption: str, figure: Figure, folder: Path) -> Picture:
    """Write the PNG and return the picture for the page."""
    figure.savefig(folder / f"{name}.png")
    svg = io.BytesIO()
    figure.savefig(svg, format="svg", metadata={"Date": None})
    data = base64.b64encode(svg.getvalue()).decode()
    return Picture(name, caption, f"data:image/svg+xml;base64,{data}")


def _workload(results: Results, trace: str) -> dict[str, Any]:
    """Say what was sent on a trace, and what was promised."""
    infos = [cell.workload for cell in results.all_cells if cell.key.trace == trace]
    objectives = {
        (cell.key.slo_scale, name): slo
        for cell in results.all_cells
        if cell.key.trace == trace
        for name, slo in cell.workload.slo.items()
    }
    return {
        "trace": trace,
        "num_windows": len(infos),
        "num_requests": sum(info.num_requests for info in infos),
        "windows_s": _range([info.window_s for info in infos]),
        "rate_scale": _range([info.rate_scale for info in infos]),
        "length_scale": _range([info.length_scale for info in infos]),
        "prompt_scale": _range([info.prompt_scale for info in infos]),
        "prompts": ", ".join(sorted({info.prompts for info in infos})),
        "objectives": [(scale, name, slo) for (scale, name), slo in sorted(objectives.items())],
    }


def _range(values: Sequence[float]) -> str:
    low, high = f"{min(values):.3g}", f"{max(values):.3g}"
    return low if low == high else f"{low} to {high}"


def _provenance(cells: Sequence[Cell]) -> dict[str, list[str]]:
    """Return machines, commits and commands, each once."""
    found: dict[str, dict[str, None]] = {"machine": {}, "commit": {}, "command": {}}
    for cell in cells:
        for name, values in found.items():
            values[_text(cell.context.get(name, "unknown"))] = None
    return {name: list(values) for name, values in found.items()}


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name.replace('_', ' ')} {item}" for name, item in value.items())
    return str(value)


def _file_name(trace: str) -> str:
    return "".join(c if c.isalnum() else "_" for c in trace)
