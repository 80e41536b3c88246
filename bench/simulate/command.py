"""`specserve simulate`: a question in, a table and a picture out."""

import inspect
from typing import Any

import typer

from bench.extras import REPORT, require
from bench.simulate.options import SimulateOptions

PICTURES = (".png", ".svg")


def simulate(**values: Any) -> None:
    """Find the most requests per second that meet an objective on a profile, in virtual time."""
    try:
        run(SimulateOptions(**values))
    except ValueError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from error


# typer reads a command's options from its signature.
simulate.__signature__ = inspect.signature(SimulateOptions)  # type: ignore[attr-defined]
simulate.__annotations__ = SimulateOptions.__annotations__


def run(options: SimulateOptions) -> None:
    """Search for every policy, print the answer, draw it.

    Raises:
        ValueError: an option that cannot be, naming it.
    """
    require("report", REPORT)
    from rich.console import Console
    from rich.progress import track

    from bench.simulate import answer
    from bench.simulate.question import Question

    if options.output.suffix not in PICTURES:
        raise ValueError(f"output is '{options.output}': must end in {' or '.join(PICTURES)}")
    console = Console(width=110, highlight=False)
    question = Question(options)
    for line in question.lines:
        console.print(line, soft_wrap=True)
    progress = track(question.policies, "searching", console=Console(stderr=True), transient=True)
    answers = {policy: question.answer(policy) for policy in progress}
    console.print(answer.table(question, answers))
    for hint in answer.hints(question, answers):
        console.print(hint, soft_wrap=True)
    answer.draw(question, answers, options.output)
    console.print(f"picture: {options.output}")
