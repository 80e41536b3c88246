"""What benchmark results rest on: honest records, held-out prompts, and the arithmetic of a row."""

from __future__ import annotations

import json
import sys
import sysconfig
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from bench import overhead, record
from bench.prompts import held_out_prompts
from specserve.text import load_tokenizer

METRICS = {
    "specserve_steps_total": 200.0,
    "specserve_step_seconds_total": 4.0,
    "specserve_draft_engine_seconds_total": 0.6,
    "specserve_verify_engine_seconds_total": 3.0,
    "specserve_draft_call_seconds_total": 0.7,
    "specserve_verify_call_seconds_total": 3.1,
    "specserve_output_tokens_total": 500.0,
}


@pytest.fixture(scope="module")
def tokenizer(demo_engines: Path) -> Tokenizer:
    return load_tokenizer(demo_engines / "target")


def test_overhead_is_the_share_of_a_step_outside_the_engines() -> None:
    row = overhead._row(METRICS)
    assert row["overhead_share"] == pytest.approx(0.1)
    assert row["transport_share"] == pytest.approx(0.05)
    assert row["tokens_per_s"] == pytest.approx(125.0)
    assert row["tokens_per_step"] == pytest.approx(2.5)
    times_ms = [row[name] for name in ("step_ms", "draft_ms", "verify_ms")]
    assert times_ms == pytest.approx([20.0, 3.0, 15.0])


def test_overhead_is_never_less_than_transport() -> None:
    row = overhead._row(METRICS)
    assert 0.0 <= row["transport_share"] <= row["overhead_share"] <= 1.0


def test_record_names_machine_commit_and_time() -> None:
    context = record.context()
    assert set(context) == {"machine", "commit", "command", "time_utc"}
    assert all(context["machine"].values()), context["machine"]
    assert len(context["commit"].removesuffix("-dirty")) == 12


@pytest.mark.parametrize(
    "arguments",
    [
        "-m bench.overhead",
        "-m bench.overhead --streams 1 4",
        "-m bench.overhead --engines build/bench_target --output r/x.pyx",
    ],
)
def test_record_repeats_the_command(monkeypatch: pytest.MonkeyPatch, arguments: str) -> None:
    monkeypatch.setattr(sys, "orig_argv", ["/some/bin/python3", *arguments.split()])
    assert record.context()["command"] == f"python {arguments}"


def test_result_is_one_json_line_printed_last_and_appended(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "new" / "results.jsonl"
    for number in (1, 2):
        record.emit({"bench": "some", "value": number}, path)
    printed = capsys.readouterr().out.splitlines()
    assert path.read_text(encoding="utf-8").splitlines() == printed
    results = [json.loads(line) for line in printed]
    assert [result["value"] for result in results] == [1, 2]
    assert all({"machine", "commit", "command"} <= set(result) for result in results)


def test_prompts_are_windows_of_this_pythons_tests(tokenizer: Tokenizer) -> None:
    prompts = held_out_prompts(tokenizer, 6, 32)
    assert [len(prompt) for prompt in prompts] == [32] * 6
    folder = Path(sysconfig.get_paths()["stdlib"], "test")
    texts = [path.read_bytes() for path in folder.glob("test_*.py")]
    for prompt in prompts:
        words = tokenizer.decode(prompt).strip("\ufffd").encode()
        assert any(words in text.replace(b"\r\n", b"\n") for text in texts)


def test_prompts_come_from_different_files_and_repeat_with_the_seed(tokenizer: Tokenizer) -> None:
    prompts = held_out_prompts(tokenizer, 8, 24, seed=3)
    assert len({tuple(prompt) for prompt in prompts}) == 8
    assert held_out_prompts(tokenizer, 8, 24, seed=3) == prompts
    assert held_out_prompts(tokenizer, 8, 24, seed=4) != prompts
    assert held_out_prompts(tokenizer, 4, 24, seed=3) == prompts[:4]


def test_python_without_its_tests_is_refused(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "test").mkdir()
    for name in ("test_long.py", "test_longer.py", "long.py"):
        (tmp_path / "test" / name).write_text("pass\n" * 2000, encoding="utf-8")
    (tmp_path / "test" / "test_short.py").write_text("pass\n", encoding="utf-8")
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    assert len(held_out_prompts(tokenizer, 2, 24)) == 2
    with pytest.raises(ValueError, match=r"2 of 3 prompts .* in 3 test files.*test package"):
        held_out_prompts(tokenizer, 3, 24)
