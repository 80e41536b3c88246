"""The report: its numbers are those of the result lines, and every policy can be told apart."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean

import pytest
from typer.testing import CliRunner

from bench.cells import Cell, append_line, read_cells
from bench.extras import require
from bench.report import style, tables
from bench.report.results import (
    ATTAINMENT,
    LATENCY,
    MIN_REPEATS,
    OURS,
    TPOT_P99,
    Place,
    Results,
    read,
)
from bench.statistics import t_interval
from specserve.cli import app
from specserve.policies import POLICIES

PNG = b"\x89PNG"


@pytest.fixture(scope="module")
def cells(simulated_cells: Path) -> list[Cell]:
    return list(read_cells(simulated_cells))


@pytest.fixture(scope="module")
def page(simulated_report: Path) -> str:
    return (simulated_report / "index.html").read_text(encoding="utf-8")


def _place(cell: Cell) -> Place:
    return Place(cell.key.trace, cell.key.slo_scale, cell.key.load)


def _as(cell: Cell, policy: str, repeat: int = 0) -> Cell:
    return replace(cell, key=replace(cell.key, policy=policy, repeat=repeat))


def _faster(cell: Cell, seconds: float) -> Cell:
    """Return the same cell with every request answered that much earlier."""
    assert cell.summary.e2e_s is not None
    requests = [replace(r, e2e_s=r.e2e_s - seconds) for r in cell.requests if r.e2e_s is not None]
    e2e_s = replace(cell.summary.e2e_s, mean=cell.summary.e2e_s.mean - seconds)
    return replace(cell, requests=requests, summary=replace(cell.summary, e2e_s=e2e_s))


# -- the page ----------------------------------------------------------------------------------


def test_page_needs_no_other_file_and_nothing_from_a_network(page: str) -> None:
    sources = re.findall(r'(?:src|href)\s*=\s*"([^"]*)"', page)
    assert len(sources) >= 5
    assert all(source.startswith("data:image/svg+xml;base64,") for source in sources)
    assert "<script" not in page
    assert "url(" not in page


def test_every_figure_is_a_png_too(page: str, simulated_report: Path) -> None:
    names = re.findall(r'<figure id="([^"]+)"', page)
    kinds = {"latency", "attainment", "pareto", "lengths", "predicted"}
    assert {name.split("_")[1] for name in names} == kinds
    assert {path.stem for path in simulated_report.glob("*.png")} == set(names)
    assert all(path.read_bytes().startswith(PNG) for path in simulated_report.glob("*.png"))


def test_table_has_the_mean_over_requests_of_the_result_lines(
    page: str, simulated_cells: Path
) -> None:
    lines = [json.loads(line) for line in simulated_cells.read_text(encoding="utf-8").splitlines()]
    means = [
        mean(request["e2e_s"] for request in line["requests"]) for line in lines if "cell" in line
    ]
    assert len(means) == 12
    values = [float(text) for text in re.findall(r"<td[^>]*>([\d.]+) \[", page)]
    for value in means:
        assert any(shown == pytest.approx(value, rel=0.005) for shown in values), value


def test_page_names_machine_commit_and_command(page: str, cells: list[Cell]) -> None:
    text = html.unescape(page)
    assert cells[0].context["commit"] in text
    assert cells[0].context["command"] in text
    assert cells[0].context["machine"]["cpu"] in text


def test_policy_name_cannot_smuggle_markup(cells: list[Cell], tmp_path: Path) -> None:
    path = tmp_path / "cells.jsonl"
    append_line(path, _as(cells[0], "<b>&").to_line())
    result = CliRunner().invoke(app, ["report", str(path), "--output", str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    page = (tmp_path / "out" / "index.html").read_text(encoding="utf-8")
    assert "&lt;b&gt;&amp;" in page
    assert "<b>" not in page


def test_lines_without_requests_make_a_report_without_step_figures(
    cells: list[Cell], tmp_path: Path
) -> None:
    for cell in cells:
        append_line(tmp_path / "cells.jsonl", replace(cell, requests=[], steps=[]).to_line())
    out = tmp_path / "out"
    result = CliRunner().invoke(app, ["report", str(tmp_path), "--output", str(out)])
    assert result.exit_code == 0, result.output
    assert {path.stem.split("_")[1] for path in out.glob("*.png")} == {
        "latency",
        "attainment",
        "pareto",
    }
    text = (out / "index.html").read_text(encoding="utf-8")
    assert not re.search(r"<td[^>]*>[\d.]+ \[", text), "an interval of nothing"


# -- the numbers -------------------------------------------------------------------------------


def test_gain_compares_each_request_with_itself(cells: list[Cell]) -> None:
    plain = [cell for cell in cells if cell.key.policy == "none"]
    results = Results([*plain, *(_as(_faster(cell, 0.25), OURS) for cell in plain)])
    for place in results.places:
        gain = results.gain(LATENCY, place, OURS, "none")
        assert gain is not None
        assert gain.value == pytest.approx(0.25)
        assert gain.interval == pytest.approx((0.25, 0.25))
    verdict = tables.verdict(results, LATENCY)
    assert (verdict.num_won(), verdict.num_won(clearly=True)) == (4, 4)
    slower = Results([*plain, *(_as(_faster(cell, -0.25), OURS) for cell in plain)])
    lost = tables.verdict(slower, LATENCY).lost
    assert [duel.gain for duel in lost] == ["-0.250 [-0.250, -0.250]"] * 4
    assert all(duel.is_clear and duel.other == "plain decoding" for duel in lost)


def test_equal_policies_are_no_clear_win(cells: list[Cell]) -> None:
    plain = [cell for cell in cells if cell.key.policy == "none"]
    results = Results([*plain, *(_as(cell, OURS) for cell in plain)])
    verdict = tables.verdict(results, ATTAINMENT)
    assert (verdict.num_won(), verdict.num_won(clearly=True), verdict.lost) == (4, 0, [])


def test_gain_is_over_the_repeats_that_both_have(cells: list[Cell]) -> None:
    """A grid that was stopped has more repeats of one policy than of another."""
    plain, *_ = (cell for cell in cells if cell.key.policy == "none")
    both = [_as(plain, "none", 0), _as(_faster(plain, 0.25), OURS, 0)]
    results = Results([*both, _as(_faster(plain, -8.0), OURS, 1)])
    gain = results.gain(LATENCY, _place(plain), OURS, "none")
    assert gain is not None
    assert (gain.value, gain.interval) == (pytest.approx(0.25), pytest.approx((0.25, 0.25)))
    alone = Results([both[0], _as(plain, OURS, 1)])
    assert alone.gain(LATENCY, _place(plain), OURS, "none") is None
    assert tables.verdict(alone, LATENCY).duels == []


def test_gain_in_attainment_is_above_0_if_more_is_met(cells: list[Cell]) -> None:
    results = Results(cells)
    for place in results.places:
        gain = results.gain(ATTAINMENT, place, OURS, "none")
        ours, plain = (results.value(ATTAINMENT, place, policy) for policy in (OURS, "none"))
        assert gain is not None
        assert ours is not None
        assert plain is not None
        assert gain.value == pytest.approx(ours - plain)


def test_interval_is_over_repeats_when_there_are_enough(cells: list[Cell]) -> None:
    def interval(shifts: Sequence[float]) -> tuple[float, float]:
        repeats = [_as(_faster(cells[0], s), OURS, i) for i, s in enumerate(shifts)]
        estimate = Results(repeats).estimate(LATENCY, _place(cells[0]), OURS)
        assert estimate is not None
        assert estimate.interval is not None
        return estimate.interval

    assert cells[0].summary.e2e_s is not None
    middle = cells[0].summary.e2e_s.mean
    shifts = [0.1 * i for i in range(MIN_REPEATS)]
    assert interval(shifts) == pytest.approx(t_interval([middle - shift for shift in shifts]))
    low, high = interval(shifts[:1])
    assert low < middle < high


def test_best_is_low_for_latency_and_high_for_attainment(cells: list[Cell]) -> None:
    results = Results(cells)
    for place in results.places:
        for metric, pick in ((LATENCY, min), (TPOT_P99, min), (ATTAINMENT, max)):
            values = {p: results.value(metric, place, p) for p in results.policies}
            (best, *_) = results.best(metric, place)
            assert values[best] == pick(v for v in values.values() if v is not None)


def test_policy_that_was_not_run_everywhere_leaves_gaps(cells: list[Cell]) -> None:
    gone = cells[0]
    results = Results(cell for cell in cells if cell is not gone)
    place, policy = _place(gone), gone.key.policy
    assert results.estimate(LATENCY, place, policy) is None
    table = tables.by_load(results, LATENCY, place.trace, place.slo_scale)
    row = dict(table.rows)[style.label(policy)]
    column = results.loads(place.trace, place.slo_scale).index(place.load)
    assert row[column].text == "-"


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0.00"), (0.01234, "0.0123"), (12.0, "12.0"), (99.96, "100"), (1234.5, "1234")],
)
def test_numbers_have_three_digits(value: float, text: str) -> None:
    assert tables.number(value) == text


# -- looks -------------------------------------------------------------------------------------


def test_no_two_policies_look_alike_in_black_and_white() -> None:
    policies = [name for name in POLICIES if name != "fixed"]
    policies += [f"fixed_{k}" for k in range(1, 9)]
    looks = [style.line(policy) for policy in policies]
    markers = [look["marker"] for look in looks]
    assert len(set(markers)) == len(policies)
    dashes = [str(look["linestyle"]) for look in looks if look["color"] != style.GREY]
    assert len(set(dashes)) == len(dashes)


# -- what it refuses ---------------------------------------------------------------------------


def test_same_cell_twice_is_refused(cells: list[Cell], tmp_path: Path) -> None:
    for name in ("one", "two"):
        append_line(tmp_path / f"{name}.jsonl", cells[0].to_line())
    with pytest.raises(ValueError, match=r"two\.jsonl .*twice"):
        read([tmp_path])


def test_folder_without_result_lines_is_refused(tmp_path: Path) -> None:
    (tmp_path / "other.jsonl").write_text('{"bench": "overhead"}\n', encoding="utf-8")
    result = CliRunner().invoke(app, ["report", str(tmp_path)])
    assert result.exit_code == 2
    assert "no result line" in result.output
    result = CliRunner().invoke(app, ["report", str(tmp_path / "nothing")])
    assert result.exit_code == 2
    assert "neither a file nor a folder" in result.output


def test_missing_package_is_named_with_its_extra() -> None:
    with pytest.raises(ValueError, match=r"no_such_module not installed.*'\.\[report\]'"):
        require("report", ("json", "no_such_module"))
