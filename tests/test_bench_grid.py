"""The grid: lines that are read as they were written, resumption, interleaving, the simulator."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from bench.arms import DEFAULT_ARMS, arm_overrides
from bench.cells import MAX_STEPS, Cell, CellKey, append_line, read_cells, read_lines
from bench.grid import Axes
from specserve.cli import app
from specserve.config import load_config
from specserve.policies import POLICIES
from specserve.request import SLO

SMALL = shlex.split(
    "bench --mode simulated --trace poisson --window-s 4 --warm-up-s 1 --low-requests 6 "
    "--flood-requests 24 --set scheduler.max_num_seqs=8 --slo-scale 1 --load 0.5"
)


def run(output: Path, *arguments: str) -> str:
    result = CliRunner().invoke(app, [*SMALL, "--output", str(output), *arguments])
    assert result.exit_code == 0, result.output
    return result.output


def refused(output: Path, *arguments: str) -> str:
    result = CliRunner().invoke(app, [*SMALL, "--output", str(output), *arguments])
    assert result.exit_code == 2, result.output
    return result.output


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the file of a small grid: two policies, two classes, with requests and steps."""
    path = tmp_path_factory.mktemp("grid") / "results.jsonl"
    classes = ("--class", "interactive:1:5x:1x", "--class", "batch:1:-:-")
    run(path, "--policy", "none", "--policy", "specserve", *classes)
    return path


def without_time(line: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in line.items() if name != "time_utc"}


# -- lines -------------------------------------------------------------------------------------


def test_line_is_read_as_it_was_written(results: Path) -> None:
    lines = [line for line in results.read_text().splitlines() if '"cell"' in line]
    cells = list(read_cells(results))
    assert len(cells) == 2
    assert [cell.to_line() for cell in cells] == lines


def test_line_has_what_a_report_needs(results: Path) -> None:
    tree = json.loads(results.read_text().splitlines()[-1])
    assert {"cell", "workload", "requests", "steps", "summary", "machine", "commit"} < set(tree)
    assert {r["class"] for r in tree["requests"]} == {"interactive", "batch"}
    assert tree["workload"]["slo"]["batch"] == {"ttft_ms": None, "tpot_ms": None}
    assert tree["summary"]["num_finished"] + tree["summary"]["num_rejected"] == len(
        tree["requests"]
    )
    assert tree["steps"][0]["num_rows"] >= 1


def test_steps_are_thinned_evenly(results: Path) -> None:
    cell = next(read_cells(results))
    many = Cell(cell.key, cell.workload, [], cell.steps[:1] * 1234, cell.summary, {})
    assert len(json.loads(many.to_line())["steps"]) == 412 <= MAX_STEPS


def test_half_written_last_line_is_passed_over_and_replaced(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    path.write_text('{"a": 1}\n{"a": 2')
    assert [tree["a"] for _, tree in read_lines(path)] == [1]
    append_line(path, '{"a": 3}')
    assert path.read_text() == '{"a": 1}\n{"a": 3}\n'


def test_malformed_line_in_the_middle_is_an_error_with_its_number(
    results: Path, tmp_path: Path
) -> None:
    path = tmp_path / "lines.jsonl"
    path.write_text('{"a": 1}\n{"a"\n{"a": 3}\n')
    with pytest.raises(ValueError, match=r"lines\.jsonl:2: not JSON"):
        list(read_lines(path))
    tree = json.loads(results.read_text().splitlines()[-1])
    del tree["workload"]
    path.write_text(json.dumps(tree) + "\n")
    with pytest.raises(ValueError, match=r"lines\.jsonl:1: not a result line: 'workload'"):
        list(read_cells(path))


# -- resumption --------------------------------------------------------------------------------


def test_cells_in_the_file_are_not_run_again(results: Path, tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    options = ("--policy", "none", "--policy", "specserve", "--summary-only")
    run(path, *options)
    before = path.read_bytes()
    run(path, *options)
    assert path.read_bytes() == before
    run(path, *options, "--policy", "fixed_2")
    assert path.read_bytes().startswith(before)
    assert [cell.key.policy for cell in read_cells(path)][2:] == ["fixed_2"]


def test_grid_that_was_stopped_in_a_line_ends_as_if_it_had_not_been(tmp_path: Path) -> None:
    whole, stopped = tmp_path / "whole.jsonl", tmp_path / "stopped.jsonl"
    options = ("--policy", "none", "--policy", "specserve", "--policy", "threshold")
    run(whole, *options)
    text = whole.read_text()
    stopped.write_text(text[: len(text) * 2 // 3])
    run(stopped, *options)
    expected, resumed = (
        [without_time(json.loads(line)) for line in path.read_text().splitlines()]
        for path in (whole, stopped)
    )
    assert resumed == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--window-s", "5"), "measured with window_s = 4.0, this grid has 5.0"),
        (("--set", "policy.max_draft_tokens=4"), "measured with override ="),
        (("--length-scale", "1"), "take another --output"),
    ],
)
def test_file_of_other_settings_is_refused(
    tmp_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    path = tmp_path / "results.jsonl"
    run(path, "--policy", "none")
    before = path.read_bytes()
    assert message in " ".join(refused(path, "--policy", "fixed_1", *arguments).split())
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--policy", "magic"), "policy is 'magic': known are fixed_K, specserve"),
        (("--load", "0"), "load is 0: must be above 0"),
        (("--trace", "azure_2023_code"), "give --data, or set SPECSERVE_DATA"),
        (("--class", "a:b"), "class is 'a:b'"),
    ],
)
def test_option_that_cannot_be_is_refused_before_anything_runs(
    tmp_path: Path, arguments: tuple[str, ...], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SPECSERVE_DATA", raising=False)
    path = tmp_path / "results.jsonl"
    assert message in refused(path, *arguments)
    assert not path.exists()


# -- order and arms ----------------------------------------------------------------------------


def test_policies_take_turns_within_every_cell_of_the_other_axes() -> None:
    axes = Axes(["a", "b"], DEFAULT_ARMS, [0.3, 0.6], [1.0], 2)
    keys = list(axes.cells("simulated"))
    assert len(set(keys)) == len(keys) == 2 * len(DEFAULT_ARMS) * 2 * 2
    size = len(DEFAULT_ARMS)
    turns = [keys[i : i + size] for i in range(0, len(keys), size)]
    assert all({key.policy for key in turn} == set(DEFAULT_ARMS) for turn in turns)
    assert all(len({(k.trace, k.load, k.repeat) for k in turn}) == 1 for turn in turns)
    assert len({tuple(key.policy for key in turn) for turn in turns}) > 1  # in another order
    assert keys == list(axes.cells("simulated"))


@pytest.mark.parametrize("arm", [*DEFAULT_ARMS, *POLICIES, "fixed_7"])
def test_arm_is_a_configuration(arm: str) -> None:
    slos = [SLO(None, 0.05), SLO(0.5, 0.03), SLO()]
    config = load_config(None, arm_overrides(arm, slos)).policy
    name, _, k = arm.partition("_") if arm.startswith("fixed_") else (arm, "", "")
    assert config.name == name
    if k:
        assert config.num_draft_tokens == int(k)
    if arm.startswith("adaspec"):
        assert config.slo_tpot_s == 0.03


# -- the simulator -----------------------------------------------------------------------------


def test_simulated_window_is_what_was_planned(results: Path) -> None:
    by_policy = {cell.key.policy: cell for cell in read_cells(results)}
    plain, ours = by_policy["none"], by_policy["specserve"]
    assert [r.arrival_s for r in plain.requests] == [r.arrival_s for r in ours.requests]
    assert [r.num_prompt_tokens for r in plain.requests] == [
        r.num_prompt_tokens for r in ours.requests
    ]
    assert all(r.num_output_tokens > 0 for r in plain.requests if r.outcome == "finished")
    assert not any(step.drafted for step in plain.steps)
    assert any(step.accepted for step in ours.steps)
    for step in ours.steps:
        assert step.accepted <= step.verified <= step.drafted


def test_simulated_load_is_a_share_of_what_plain_decoding_can_do(results: Path) -> None:
    calibration = json.loads(results.read_text().splitlines()[0])["calibration"]
    for cell in read_cells(results):
        wanted = 0.5 * calibration["capacity_rps"] * cell.workload.window_s
        assert cell.workload.num_requests == round(wanted)
        slo = cell.workload.slo["interactive"]
        assert slo["tpot_ms"] == pytest.approx(1e3 * calibration["tpot_p90_s"], rel=1e-5)
        assert slo["ttft_ms"] == pytest.approx(5e3 * calibration["ttft_p90_s"], rel=1e-5)


def test_prediction_in_the_simulator_is_close_to_what_it_takes(results: Path) -> None:
    ours = next(cell for cell in read_cells(results) if cell.key.policy == "specserve")
    errors = [
        abs(step.predicted_s / step.measured_s - 1.0)
        for step in ours.steps
        if step.predicted_s is not None
    ]
    assert len(errors) > 20
    assert sorted(errors)[len(errors) // 2] < 0.05


def test_table_has_every_policy(results: Path, tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    output = run(path, "--policy", "none", "--policy", "fixed_2", "--summary-only")
    rows = [line.split("│")[1:3] for line in output.splitlines() if line.startswith("│")]
    assert [name.strip() for name, _ in rows] == ["fixed_2", "none"]
    assert all(re.fullmatch(r" [\d.]+ s \d+ ms +\d+% ", entry) for _, entry in rows)
    assert not any(cell.requests or cell.steps for cell in read_cells(path))


def test_key_of_a_cell_is_a_value() -> None:
    assert CellKey("t", "p", 0.5, 1.0, 0, "m") in {CellKey("t", "p", 0.5, 1.0, 0, "m")}
