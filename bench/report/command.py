"""`specserve report`: result files in, a page and pictures out."""

from pathlib import Path
from typing import Annotated

import typer

from bench.extras import REPORT, require


def report(
    results: Annotated[
        list[Path], typer.Argument(help="Files that `specserve bench` wrote, or folders of them.")
    ],
    output: Annotated[Path, typer.Option(help="Folder for index.html and PNGs.")] = Path("report"),
) -> None:
    """Turn results into one HTML page that needs nothing else, and PNGs."""
    try:
        require("report", REPORT)
        from bench.report import page
        from bench.report.results import read

        path = page.write(read(results), output)
    except ValueError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from error
    typer.echo(f"report: {path}")
