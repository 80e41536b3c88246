"""The READMEs' tables: made from result files, and those that are committed are up to date."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench.readme import READMES, rewritten
from bench.record import ROOT

PEERS = {
    "bench": "peers",
    "machine": {"cpu": "a CPU", "num_cores": 2},
    "commit": "abc",
    "command": "python -m bench.peers",
    "config": {"precision": "f32", "threads": 2, "max_tokens": 96, "rounds": 3},
    "against_best_genai": {"1": 1.25, "4": 0.9},
    "tokens_per_s": {
        "specserve": {"1": 50.4, "4": 90.0},
        "openvino_genai": {"1": {"plain": 30.0, "fixed_4": 40.3}, "4": {"plain": 100.0}},
        "transformers": {"1": {"default": 12.0}},
    },
}


def section(kind: str, name: str, body: str = "") -> str:
    return f"before\n<!-- results: {kind} {name} -->\n{body}<!-- /results -->\nafter\n"


@pytest.mark.parametrize("path", READMES, ids=["README", "bench"])
def test_readme_is_what_its_result_files_say(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert rewritten(text, ROOT) == text, "run `make readme`"


def test_peers_are_rows_and_concurrencies_columns(tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text(json.dumps(PEERS) + "\n")
    lines = rewritten(section("peers", "p.jsonl", "old\n"), tmp_path).splitlines()
    assert lines[0] == "before"
    assert lines[-1] == "after"
    assert "old" not in lines
    assert "| **specserve**, through Triton gRPC | **50** | **90** |" in lines
    assert "| openvino genai fixed 4 | 40 | - |" in lines
    assert "| transformers default | 12 | - |" in lines
    assert "| specserve / best of OpenVINO GenAI | 1.25x | 0.90x |" in lines
    assert rewritten("\n".join(lines) + "\n", tmp_path).splitlines() == lines
    assert not any("whole" in line for line in lines)  # older results have no such rows


def test_whole_answers_are_rows_of_their_own(tmp_path: Path) -> None:
    tree = {**PEERS, "whole_against_best_genai": {"1": 1.3, "4": 1.0}}
    tree["tokens_per_s"] = {**tree["tokens_per_s"], "specserve_whole": {"1": 52.4, "4": 100.0}}
    (tmp_path / "p.jsonl").write_text(json.dumps(tree) + "\n")
    lines = rewritten(section("peers", "p.jsonl"), tmp_path).splitlines()
    assert "| **specserve**, whole answers | **52** | **100** |" in lines
    assert "| whole answers / best of GenAI | 1.30x | 1.00x |" in lines
    assert sum("whole" in line for line in lines) == 2


def test_policies_are_relative_to_plain_decoding(tmp_path: Path) -> None:
    rates = {"plain": 40.0, "fixed_1": 50.0, "fixed_2": 60.0, "adaspec_released": 44.0}
    tree = {
        **PEERS, "bench": "policies", "engine": "simulated", "command": "python -m bench.policies",
        "tokens_per_s": {arm: {"1": rate} for arm, rate in {**rates, "specserve": 66.0}.items()},
    }  # fmt: skip
    (tmp_path / "p.jsonl").write_text(json.dumps(tree) + "\n")
    lines = rewritten(section("policies", "p.jsonl"), tmp_path).splitlines()
    assert lines[6:-2] == [
        "| plain decoding, tokens/s | 40 |",
        "| best fixed length | 1.50x (k = 2) |",
        "| adaspec released | 1.10x |",
        "| **specserve** | **1.65x** |",
        "| specserve / best of all others | 1.10 |",
        "| specserve / AdaSpec as released | 1.50 |",
    ]


def test_grid_has_every_policy_and_says_what_was_sent(simulated_cells: Path) -> None:
    lines = rewritten(section("grid", simulated_cells.name), simulated_cells.parent).splitlines()
    rows = [line.split("|")[1].strip() for line in lines if line.startswith("| ")]
    assert {"plain decoding", "specserve"} < set(rows)
    assert any("prompt lengths x" in line and "windows of" in line for line in lines)
    assert any("has the best SLO attainment in" in line for line in lines)


def test_section_whose_file_is_not_there_stays(tmp_path: Path) -> None:
    text = section("grid", "none.jsonl", "as it was\n")
    assert rewritten(text, tmp_path) == text


@pytest.mark.parametrize(
    ("text", "message"),
    [("no marks", "no section"), (section("graph", "p.jsonl"), "section 'graph': known are grid")],
)
def test_readme_without_a_known_section_is_refused(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        rewritten(text, tmp_path)
