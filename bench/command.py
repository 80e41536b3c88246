"""`specserve bench`: options in, a grid run, tables out."""

import inspect
from typing import TYPE_CHECKING, Any

import typer

from bench.bench_options import BenchOptions

if TYPE_CHECKING:
    from bench.cells import Cell


def bench(**values: Any) -> None:
    """Replay traces against every policy; append one line of results for each cell."""
    try:
        run(BenchOptions(**values))
    except (ValueError, RuntimeError) as error:  # of an option; of a server that does not start
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from error


# typer reads a command's options from its signature.
bench.__signature__ = inspect.signature(BenchOptions)  # type: ignore[attr-defined]
bench.__annotations__ = BenchOptions.__annotations__


def run(options: BenchOptions) -> None:
    """Run the cells that the output lacks, with a progress bar, then print all as tables.

    Raises:
        ValueError: an option or a file that cannot be, naming it.
    """
    from rich.console import Console
    from rich.progress import Progress

    from bench.cells import read_cells
    from bench.grid_setup import axes_of, make_grid
    from bench.grid_table import tables

    console = Console(width=120, highlight=False)
    axes = axes_of(options)
    grid = make_grid(options, axes)
    cells = list(axes.cells(options.mode))
    missing = grid.missing(cells)
    if len(missing) < len(cells):
        console.print(f"{options.output} has {len(cells) - len(missing)} of {len(cells)} cells")
    with Progress(console=console) as progress:
        task = progress.add_task("", total=len(cells), completed=len(cells) - len(missing))
        for trace in axes.traces:
            progress.update(task, description=f"{trace}, plain decoding")
            console.print(grid.describe(trace), soft_wrap=True)
        for key in missing:
            progress.update(task, description=f"{key.trace} {key.policy} at load {key.load:g}")
            console.print(_describe(grid.run(key)), soft_wrap=True)
            progress.advance(task)
    for table in tables(cell for cell in read_cells(options.output) if cell.key in cells):
        console.print(table)
    console.print(f"results: {options.output}")


def _describe(cell: "Cell") -> str:
    key, summary = cell.key, cell.summary
    e2e = f"mean {summary.e2e_s.mean:.2f} s, " if summary.e2e_s else ""
    return (
        f"{key.trace} load {key.load:g} SLO {key.slo_scale:g} #{key.repeat} {key.policy}: "
        f"{summary.num_finished} of {cell.workload.num_requests} requests, {e2e}"
        f"attainment {summary.attainment:.0%}, {summary.token_rate:.0f} tokens/s, "
        f"generator late by {1e3 * summary.max_lateness_s:.1f} ms at most"
    )
