"""The table a grid ends with: policies down, loads across, one table for each trace and scale."""

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from rich.table import Table

from bench.cells import Cell


def tables(cells: Iterable[Cell]) -> Iterator[Table]:
    """Yield the tables; means over the repeats of a cell."""
    groups: dict[tuple[str, float], list[Cell]] = {}
    for cell in cells:
        groups.setdefault((cell.key.trace, cell.key.slo_scale), []).append(cell)
    for (trace, scale), group in groups.items():
        yield _table(f"{trace}, SLO scale {scale:g}: mean latency, P90 TPOT, attainment", group)


def _table(title: str, cells: Sequence[Cell]) -> Table:
    loads = sorted({cell.key.load for cell in cells})
    table = Table(title=title)
    table.add_column("policy")
    for load in loads:
        table.add_column(f"load {load:g}", justify="right")
    for policy in dict.fromkeys(sorted(cell.key.policy for cell in cells)):
        of_policy = [cell for cell in cells if cell.key.policy == policy]
        table.add_row(policy, *(_entry(of_policy, load) for load in loads))
    return table


def _entry(cells: Sequence[Cell], load: float) -> str:
    here = [cell.summary for cell in cells if cell.key.load == load]
    if not here:
        return ""
    e2e = [summary.e2e_s.mean for summary in here if summary.e2e_s]
    tpot = [summary.tpot_s.p90 for summary in here if summary.tpot_s]
    attainment = float(np.mean([summary.attainment for summary in here]))
    return f"{_mean(e2e, 1.0, 2)} s {_mean(tpot, 1e3, 0)} ms {attainment:4.0%}"


def _mean(values: Sequence[float], factor: float, digits: int) -> str:
    return f"{factor * float(np.mean(values)):.{digits}f}" if values else "-"
