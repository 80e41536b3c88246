"""The answer as a table and as a picture."""

from collections.abc import Iterator, Mapping
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from rich.table import Table

from bench.cells import Distribution
from bench.report import style
from bench.simulate.capacity import Capacity
from bench.simulate.question import Question, RateProbe

FULL_OFTEN = 0.05  # share of steps with a full batch from which a hint is due

Answers = Mapping[str, Capacity[RateProbe]]  # by policy


def table(question: Question, answers: Answers) -> Table:
    """Tabulate each policy's highest rate, and how requests fare at it."""
    result = Table(title=f"Requests per second with {question.objective}")
    for head in ("policy", "requests/s", "met", "TTFT p50, p99 ms", "TPOT p50, p99 ms",
                 "tokens/s", "rows"):  # fmt: skip
        result.add_column(head, justify="left" if head == "policy" else "right")
    for policy, capacity in answers.items():
        result.add_row(style.label(policy), *_row(question, capacity))
    return result


def hints(question: Question, answers: Answers) -> Iterator[str]:
    """Yield what else a reader should know."""
    full = max((c.best.full_share for c in answers.values() if c.best), default=0.0)
    if full > FULL_OFTEN:
        yield (
            f"all {question.max_num_seqs} rows were taken in {full:.0%} of the steps: "
            "scheduler.max_num_seqs may be what limits this, not the device"
        )
    for policy, capacity in answers.items():
        if capacity.is_at_least:
            yield f"{style.label(policy)} meets it at every rate: search higher with --rate"
        elif capacity.best is None:
            yield f"{style.label(policy)} meets it at no rate: search lower, or allow more time"


def draw(question: Question, answers: Answers, path: Path) -> None:
    """Draw attainment and the promised latency against the rate; mark the answers."""
    with matplotlib.rc_context(style.RC):
        figure, (left, right) = style.grid(1, 2, height=3.9)
        for policy, capacity in answers.items():
            _curves(question, policy, capacity, left, right)
        left.axhline(100 * question.attainment, color=style.GREY, linewidth=0.8)
        left.set_ylabel("requests that met it, %")
        left.set_ylim(-3, 103)
        name, limit_ms = _limit(question)
        right.axhline(limit_ms, color=style.GREY, linewidth=0.8)
        right.set_ylabel(f"p90 {name}, ms (line: objective)")
        right.set_ylim(0, 3 * limit_ms)
        for axes in (left, right):
            axes.set_xscale("log")
            axes.set_xlabel("requests per second")
            style.plain_log(axes.xaxis)
        style.legend_below(figure, left)
        figure.suptitle(f"{question.title}\n{question.objective}", fontsize=10)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path)


def _row(question: Question, capacity: Capacity[RateProbe]) -> list[str]:
    best = capacity.best
    if best is None:
        return [f"below {question.low_rps:g}", *["-"] * 5]
    summary = best.summary
    return [
        f"at least {best.rate_rps:g}" if capacity.is_at_least else f"{best.rate_rps:.3g}",
        f"{summary.attainment:.0%}",
        _milliseconds(summary.ttft_s),
        _milliseconds(summary.tpot_s),
        f"{summary.token_rate:.0f}",
        f"{best.mean_rows:.1f}",
    ]


def _milliseconds(values: Distribution | None) -> str:
    return f"{1e3 * values.p50:.0f}, {1e3 * values.p99:.0f}" if values else "-"


def _limit(question: Question) -> tuple[str, float]:
    """Return name and value of the objective to draw: TPOT if there is one."""
    if question.slo.tpot_s is not None:
        return "TPOT", 1e3 * question.slo.tpot_s
    assert question.slo.ttft_s is not None, "no objective"
    return "TTFT", 1e3 * question.slo.ttft_s


def _curves(
    question: Question, policy: str, capacity: Capacity[RateProbe], left: Axes, right: Axes
) -> None:
    look = style.line(policy)
    rates = [probe.rate_rps for probe in capacity.probes]
    left.plot(rates, [100 * probe.attainment for probe in capacity.probes], **look)
    of_tpot = question.slo.tpot_s is not None
    values = [p.summary.tpot_s if of_tpot else p.summary.ttft_s for p in capacity.probes]
    right.plot(rates, [1e3 * v.p90 if v else float("nan") for v in values], **look)
    if capacity.best is not None:
        left.axvline(
            capacity.best.rate_rps, color=look["color"], linestyle=look["linestyle"], linewidth=0.8
        )
