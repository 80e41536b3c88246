"""`specserve top`: a frame as a table in the terminal, again and again."""

import contextlib
import time
from collections.abc import Callable, Iterable, Mapping, Sequence

from rich.columns import Columns
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from specserve.view.frame import Attainment, Frame, between
from specserve.view.read import read

NOTHING = "\u2013"
BAR_WIDTH = 12
PANEL_WIDTH = 38
WELL = 0.95  # share of objectives met that is shown in green


def watch(url: str, interval_s: float, console: Console, *, once: bool = False) -> None:
    """Show a server until interrupted; a server that goes away is waited for.

    Raises:
        OSError: if it does not answer to begin with.
    """
    before = read(url)
    with contextlib.ExitStack() as stack, contextlib.suppress(KeyboardInterrupt):
        live = None if once else stack.enter_context(Live(console=console, screen=True))
        while True:
            time.sleep(interval_s)
            try:
                after = read(url)
            except OSError:
                if live is None:
                    raise
                live.update(Text(f"no answer from {url}; still asking, Ctrl-C ends", "bold red"))
                continue
            view = render(between(before, after))
            before = after
            if live is None:
                console.print(view)
                return
            live.update(view)


def render(frame: Frame) -> RenderableType:
    """Lay a frame out."""
    panels = [
        ("Tokens", _pairs(_tokens(frame))),
        ("Requests", _pairs(_requests(frame))),
        ("Step", _pairs(_step(frame))),
        ("Acceptance by position", _bars(frame.acceptance_by_position, _percent, 1.0)),
        ("Decisions per second", _bars(frame.decisions_per_s, _number)),
        ("Objectives met, by class", _attainment(frame.attainment)),
    ]
    columns = Columns(
        Panel(body, title=title, title_align="left", width=PANEL_WIDTH) for title, body in panels
    )
    return Group(_headline(frame), columns)


def _headline(frame: Frame) -> Text:
    states = {None: ("", ""), True: ("speculating", "green"), False: ("no speculation", "bold red")}
    line = Text(" SpecServe  ", "bold")
    line.append(f"{_number(frame.tokens_per_s, 0)} tokens/s  ")
    line.append(*states[frame.draft_available])
    return line


def _tokens(frame: Frame) -> Iterable[tuple[str, str]]:
    yield "output per second", _number(frame.tokens_per_s)
    yield "gained per row and step", _number(frame.acceptance_length, 2)
    yield "drafted per row and step", _number(frame.draft_length, 2)
    yield "verified and accepted", _percent(frame.acceptance_rate)
    yield "calibration error", _number(frame.calibration_error, 3)


def _requests(frame: Frame) -> Iterable[tuple[str, str]]:
    yield "running", _number(frame.requests_running, 0)
    yield "waiting", _number(frame.requests_waiting, 0)
    yield "KV cache used", _percent(frame.kv_used)
    yield "preemptions", _number(frame.preemptions, 0)
    yield "draft failures", _number(frame.draft_failures, 0)
    for outcome, rate in sorted(frame.requests_per_s.items()):
        yield f"{outcome or 'ended'} per second", _number(rate)


def _step(frame: Frame) -> Iterable[tuple[str, str]]:
    yield "per second", _number(frame.steps_per_s)
    yield "whole", _milliseconds(frame.step_ms)
    yield "engine calls", _milliseconds(frame.measured_ms)
    yield "as predicted", _milliseconds(frame.predicted_ms)
    for name, error in sorted(frame.prediction_error.items()):
        call, _, quantile = name.partition(" ")
        yield f"error of {call}, p{100 * float(quantile):g}", _percent(error)
    yield "draft engine", _milliseconds(frame.draft_ms)
    yield "target engine", _milliseconds(frame.verify_ms)
    yield "outside the engines", _percent(frame.outside_share)


def _pairs(rows: Iterable[tuple[str, str]]) -> Table:
    return _table([(name, Text(value, "bold", justify="right")) for name, value in rows])


def _bars(
    series: Mapping[str, float], show: Callable[[float], str], whole: float | None = None
) -> Table | Text:
    limit = whole or max(series.values(), default=0.0)
    rows = [
        (name or "all", Text(f"{_bar(value, limit)} {show(value):>6}", justify="right"))
        for name, value in sorted(series.items(), key=_in_order)
    ]
    return _table(rows) if rows else Text(NOTHING, "dim")


def _attainment(classes: Mapping[str, Attainment]) -> Table | Text:
    table = Table(box=None, expand=True, padding=(0, 1, 0, 0), header_style="dim")
    for heading in ("class", "now", "ever", "slack"):
        table.add_column(heading, justify="left" if heading == "class" else "right")
    for name, one in sorted(classes.items()):
        style = "" if one.attained is None else "green" if one.attained >= WELL else "bold red"
        slack = None if one.slack_s is None else 1000.0 * one.slack_s
        now, ever = Text(_percent(one.attained), style), _percent(one.total_attained)
        table.add_row(Text(name or "none"), now, ever, _milliseconds(slack))
    return table if classes else Text(NOTHING, "dim")


def _table(rows: Sequence[tuple[str, Text]]) -> Table:
    table = Table.grid(expand=True, padding=(0, 1))
    table.add_column(style="dim")
    table.add_column(justify="right")
    for name, value in rows:
        table.add_row(Text(name), value)
    return table


def _in_order(item: tuple[str, float]) -> tuple[bool, float, str]:
    name = item[0]
    return (not name.isdigit(), float(name) if name.isdigit() else 0.0, name)


def _bar(value: float, limit: float) -> str:
    return "█" * (round(BAR_WIDTH * min(1.0, value / limit)) if limit else 0)


def _number(value: float | None, digits: int = 1) -> str:
    return NOTHING if value is None else f"{value:.{digits}f}"


def _percent(value: float | None) -> str:
    return NOTHING if value is None else f"{100 * value:.0f} %"


def _milliseconds(value: float | None) -> str:
    return NOTHING if value is None else f"{value:.1f} ms"
