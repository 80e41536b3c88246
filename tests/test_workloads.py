"""Workloads: traces read exactly, arrivals with the mean and variance they claim, fitted plans."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

from bench.workloads import Arrival, Trace
from bench.workloads.catalogue import default_traces, find_prompts, find_trace
from bench.workloads.objectives import parse_classes
from bench.workloads.plan import Lengths, Planner, cut
from bench.workloads.prompts import RandomPrompts, TextPrompts, lengths_only
from bench.workloads.synthetic import gamma, make_trace, onoff, poisson
from bench.workloads.traces import FORMATS, load_trace
from specserve.request import SLO
from specserve.text import load_tokenizer

TRACES = Path(__file__).parent / "assets" / "traces"
COUNT = 200_000


@pytest.fixture(scope="module")
def tokenizer(demo_engines: Path) -> Tokenizer:
    return load_tokenizer(demo_engines / "target")


def trace_of(*gaps_s: float, prompt: int = 100, output: int = 20) -> Trace:
    arrivals = np.concatenate(([0.0], np.cumsum(gaps_s)))
    return Trace("some", [Arrival(float(a), prompt, output) for a in arrivals])


# -- traces ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("file", "arrivals_s", "prompts", "outputs"),
    [
        ("azure_2023.csv", [0.0, 4.314579, 4.541877, 4.710427], [374, 396, 879, 91],
         [44, 109, 55, 16]),
        ("azure_2024.csv", [0.0, 0.007405, 0.99007], [2162, 2399, 76], [5, 6, 15]),
        ("mooncake.jsonl", [0.0, 3.053, 3.053], [6955, 6472, 10], [52, 26, 1]),
        ("burstgpt.csv", [0.0, 40.0, 113.5], [472, 1087, 417], [18, 230, 276]),
    ],
)  # fmt: skip
def test_trace_is_read_as_published(
    file: str, arrivals_s: list[float], prompts: list[int], outputs: list[int]
) -> None:
    trace = load_trace(TRACES / file, file.partition(".")[0], "some")
    assert [a.arrival_s for a in trace.arrivals] == pytest.approx(arrivals_s, abs=2e-6)
    assert [a.num_prompt_tokens for a in trace.arrivals] == prompts
    assert [a.num_output_tokens for a in trace.arrivals] == outputs


@pytest.mark.parametrize("file", ["azure_2023.csv", "burstgpt.csv"])
def test_rows_without_output_are_left_out_and_counted(file: str) -> None:
    trace = load_trace(TRACES / file, file.partition(".")[0], "some")
    assert trace.note == "1 rows without output tokens left out"


@pytest.mark.parametrize(
    ("file", "bad", "message"),
    [
        ("azure_2023.csv", "2023-11-16 18:15:53,many,5", r"ContextTokens is 'many'"),
        ("azure_2023.csv", "2023-11-16 18:15:53,-4,5", r"ContextTokens is '-4'"),
        ("azure_2023.csv", "2023-11-16 18:15:53,4", r"GeneratedTokens is None"),
        ("azure_2023.csv", "yesterday,4,5", r"yesterday"),
        ("azure_2024.csv", ",4,5", r"''"),
        ("mooncake.jsonl", '{"timestamp": 1, "input_length": 2}', r"'output_length' is missing"),
        ("mooncake.jsonl", '{"timestamp": 1, "input_length"', r"not JSON"),
        ("mooncake.jsonl", "[1, 2, 3]", r"not a JSON object"),
        ("mooncake.jsonl", '{"timestamp": 1, "input_length": 2, "output_length": 1.5}', r"1\.5"),
        ("burstgpt.csv", "nan,GPT-4,1,1,2,API log", r"Timestamp is 'nan'"),
    ],
)
def test_malformed_row_is_an_error_with_file_and_line(
    tmp_path: Path, file: str, bad: str, message: str
) -> None:
    lines = (TRACES / file).read_text().splitlines()
    path = tmp_path / file
    path.write_text("\n".join([*lines, bad, lines[-1]]) + "\n")
    with pytest.raises(ValueError, match=message) as raised:
        load_trace(path, file.partition(".")[0], "some")
    assert str(raised.value).startswith(f"{path}:{len(lines) + 1}: ")


def test_missing_column_is_named(tmp_path: Path) -> None:
    path = tmp_path / "other.csv"
    path.write_text("TIMESTAMP,ContextTokens\n2023-11-16 18:15:53,4\n")
    with pytest.raises(ValueError, match=r"other\.csv:2: column 'GeneratedTokens' is missing"):
        load_trace(path, "azure_2023", "some")


def test_trace_names_lead_to_files_formats_and_formulas(tmp_path: Path) -> None:
    (tmp_path / "traces").mkdir()
    (tmp_path / "traces" / "azure_2023_conv.csv").write_bytes(
        (TRACES / "azure_2023.csv").read_bytes()
    )
    assert find_trace("azure_2023_conv", tmp_path).name == "azure_2023_conv"
    path = TRACES / "mooncake.jsonl"
    assert find_trace(f"mooncake:{path}", None).name == "mooncake:mooncake"
    assert find_trace("gamma:2", None).name == "gamma:2"
    assert default_traces(tmp_path) == ["poisson"]  # the other Azure trace is not there
    with pytest.raises(ValueError, match="SPECSERVE_DATA"):
        find_trace("azure_2023_code", None)
    with pytest.raises(ValueError, match=r"azure_2023_code\.csv is not a file"):
        find_trace("azure_2023_code", tmp_path)
    with pytest.raises(ValueError, match="known are azure_2023_code"):
        find_trace("azure", None)
    assert set(FORMATS) == {"azure_2023", "azure_2024", "mooncake", "burstgpt"}


# -- synthetic arrivals ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("process", "numbers", "squared_cv"),
    [
        (poisson, (), 1.0),
        (gamma, (0.5,), 0.25),
        (gamma, (2.0,), 4.0),
        # rate 2 while on: 1 + 2 * 2 / (10 * 0.2^2) = 11; and for 1 s on, 3 s off, rate 4: 5.5
        (onoff, (10.0, 10.0), 11.0),
        (onoff, (1.0, 3.0), 5.5),
    ],
)
def test_gaps_have_the_mean_and_variance_they_claim(process, numbers, squared_cv) -> None:
    # With 200,000 gaps the mean's standard error is 0.0022 times their CV: five of them.
    gaps = process(np.random.default_rng(7), COUNT, *numbers)
    cv = squared_cv**0.5
    assert gaps.min() >= 0.0
    assert gaps.mean() == pytest.approx(1.0, abs=5 * cv / COUNT**0.5)
    assert gaps.var() == pytest.approx(squared_cv, rel=0.08)


def test_poisson_counts_have_variance_equal_to_their_mean() -> None:
    gaps = poisson(np.random.default_rng(3), COUNT)
    counts = np.bincount((np.cumsum(gaps) / 10.0).astype(int))[:-1]
    assert counts.var() / counts.mean() == pytest.approx(1.0, abs=0.05)


def test_onoff_counts_are_overdispersed_as_the_formula_says() -> None:
    # A renewal process: over long intervals variance / mean of counts tends to the squared CV.
    gaps = onoff(np.random.default_rng(3), COUNT, 1.0, 3.0)
    counts = np.bincount((np.cumsum(gaps) / 200.0).astype(int))[:-1]
    assert counts.var() / counts.mean() == pytest.approx(5.5, rel=0.2)


def test_synthetic_lengths_have_their_means() -> None:
    trace = make_trace("poisson")
    prompts = np.array([a.num_prompt_tokens for a in trace.arrivals])
    outputs = np.array([a.num_output_tokens for a in trace.arrivals])
    assert prompts.mean() == pytest.approx(1024, rel=0.05)
    assert prompts.std() / prompts.mean() == pytest.approx(1.0, rel=0.1)
    assert outputs.mean() == pytest.approx(224, rel=0.05)
    assert min(prompts.min(), outputs.min()) >= 1


@pytest.mark.parametrize("spec", ["gamma", "gamma:0", "gamma:x", "poisson:1", "onoff:5", "pareto"])
def test_synthetic_trace_that_makes_no_sense_is_refused(spec: str) -> None:
    with pytest.raises(ValueError, match=f"'{spec}'"):
        make_trace(spec)


# -- plans -------------------------------------------------------------------------------------


def test_replayed_arrivals_equal_the_traces() -> None:
    trace = load_trace(TRACES / "azure_2023.csv", "azure_2023", "some")
    span_s = trace.arrivals[3].arrival_s
    arrivals, rate_scale = cut(trace, 3, span_s, 0.0)
    assert rate_scale == pytest.approx(1.0)
    assert arrivals == pytest.approx(trace.arrivals[:3])


def test_cut_keeps_the_rhythm_and_fills_the_window() -> None:
    trace = trace_of(1.0, 3.0, 4.0, 2.0, 6.0)
    arrivals, rate_scale = cut(trace, 3, 4.0, 0.0)
    assert rate_scale == 2.0
    assert [a.arrival_s for a in arrivals] == [0.0, 0.5, 2.0]  # the next one would come at 4.0


def test_cut_says_when_a_trace_is_too_short() -> None:
    with pytest.raises(ValueError, match=r"has 3 requests, 4 are needed.*shorter window"):
        cut(trace_of(1.0, 1.0), 3, 1.0, 0.5)
    with pytest.raises(ValueError, match="arrive at once"):
        cut(trace_of(0.0, 0.0), 2, 1.0, 0.0)


def test_place_of_a_cut_does_not_depend_on_the_rate() -> None:
    trace = trace_of(*[1.0] * 999)
    trace = Trace("some", [Arrival(a.arrival_s, i, 1) for i, a in enumerate(trace.arrivals)])
    starts = {cut(trace, count, 10.0, 0.37)[0][0].num_prompt_tokens for count in (5, 50, 500)}
    assert starts == {370}


@pytest.mark.parametrize(
    ("prompt", "output", "expected"),
    [
        (1000, 200, (62, 100)),
        (4, 1, (1, 1)),
        (100_000, 200, (412, 100)),
        (100_000, 100_000, (256, 256)),
        (160, 100_000, (10, 502)),
    ],
)
def test_lengths_are_scaled_and_fit(prompt: int, output: int, expected: tuple[int, int]) -> None:
    lengths = Lengths(output_scale=0.5, prompt_scale=0.0625, max_tokens=512)
    assert lengths(Arrival(0.0, prompt, output)) == expected


def make_planner(**changes) -> Planner:
    return Planner(
        **{
            "trace": make_trace("poisson"),
            "lengths": Lengths(0.5, 0.0625, 4096),
            "prompts": lengths_only,
            "prompts_name": "lengths",
            **changes,
        }
    )


def test_plan_has_the_rate_asked_for_and_says_how_it_was_scaled() -> None:
    plan = make_planner().window(3.0, 20.0, seed=0)
    assert plan.info.num_requests == len(plan.requests) == 60
    assert plan.info.rate_rps == 3.0
    assert plan.info.rate_scale == pytest.approx(3.0, rel=0.5)
    assert (plan.info.length_scale, plan.info.prompt_scale) == (0.5, 0.0625)
    arrivals_s = [request.arrival_s for request in plan.requests]
    assert arrivals_s == sorted(arrivals_s)
    assert arrivals_s[0] == 0.0
    assert arrivals_s[-1] < 20.0


def test_plan_is_the_same_for_every_policy_and_another_for_each_repeat() -> None:
    planner = make_planner(prompts=RandomPrompts(4096))
    assert planner.window(3.0, 20.0, seed=1) == planner.window(3.0, 20.0, seed=1)
    assert planner.window(3.0, 20.0, seed=1) != planner.window(3.0, 20.0, seed=2)


def test_plan_says_what_was_left_out_and_cut() -> None:
    trace = load_trace(TRACES / "azure_2023.csv", "azure_2023", "some")
    text = make_planner(trace=trace, lengths=Lengths(0.5, 1.0, 500)).describe()
    assert "4 requests (1 rows without output tokens left out)" in text
    assert "; 1 requests are cut to the engine's 500 tokens" in text  # 879 + 28


def test_flood_arrives_at_once() -> None:
    plan = make_planner().flood(40, seed=0)
    assert {request.arrival_s for request in plan.requests} == {0.0}
    assert len({request.num_output_tokens for request in plan.requests}) > 10


def test_classes_are_drawn_by_their_shares() -> None:
    classes = parse_classes(["interactive:3:500ms:1x", "batch:1:-:-"])
    plan = make_planner(classes=classes, plain=SLO(0.1, 0.02)).window(
        100.0, 40.0, seed=0, slo_scale=0.5
    )
    share = np.mean([request.priority_class == "interactive" for request in plan.requests])
    assert share == pytest.approx(0.75, abs=0.04)  # 4000 draws: six standard errors
    assert plan.info.slo == {
        "interactive": {"ttft_ms": 500.0, "tpot_ms": pytest.approx(10.0)},
        "batch": {"ttft_ms": None, "tpot_ms": None},
    }


@pytest.mark.parametrize(
    ("spec", "ttft_s", "tpot_s"),
    [
        ("a:1:-:-", None, None),
        ("a:1:250ms:30ms", 0.25, 0.03),  # absolute: not scaled
        ("a:1:5x:1.5x", 0.4, 0.024),
    ],
)
def test_objectives_are_absolute_or_relative(
    spec: str, ttft_s: float | None, tpot_s: float | None
) -> None:
    (one,) = parse_classes([spec])
    slo = one.slo(SLO(0.1, 0.02), slo_scale=0.8)
    assert (slo.ttft_s, slo.tpot_s) == (
        ttft_s and pytest.approx(ttft_s),
        tpot_s and pytest.approx(tpot_s),
    )


@pytest.mark.parametrize("spec", ["a", "a:1:-", "a:0:-:-", "a:1:5:-", "a:1:-:-2ms", "a:x:-:-"])
def test_malformed_class_is_refused(spec: str) -> None:
    with pytest.raises(ValueError, match=f"class is '{spec}': expected NAME:SHARE:TTFT:TPOT"):
        parse_classes([spec])


def test_class_named_twice_is_refused() -> None:
    with pytest.raises(ValueError, match="each name once"):
        parse_classes(["a:1:-:-", "a:2:-:-"])


# -- prompts -----------------------------------------------------------------------------------


def test_text_prompts_are_windows_that_go_round() -> None:
    prompts = TextPrompts([[1, 2, 3], [4, 5]], whole=False)
    rng = random.Random(0)
    seen = {tuple(prompts(7, rng)) for _ in range(200)}
    assert seen == {tuple((start + i) % 5 + 1 for i in range(7)) for start in range(5)}


def test_whole_texts_are_begun_at_their_start() -> None:
    prompts = TextPrompts([[1, 2, 3], [4, 5]], whole=True)
    rng = random.Random(0)
    assert {tuple(prompts(4, rng)) for _ in range(50)} == {(1, 2, 3, 4), (4, 5, 1, 2)}


def test_spec_bench_prompts_begin_with_a_question(tokenizer: Tokenizer) -> None:
    prompts = find_prompts(f"spec_bench:{TRACES / 'spec_bench.jsonl'}", None, tokenizer)
    texts = {tokenizer.decode(prompts(12, random.Random(seed))) for seed in range(20)}
    assert {text[:5] for text in texts} == {"Write", "What "}


@pytest.mark.parametrize("line", ['{"question_id": 3}', "turns", '{"turns": 5}', '{"turns": [1]}'])
def test_malformed_question_is_an_error_with_its_line(
    tokenizer: Tokenizer, tmp_path: Path, line: str
) -> None:
    path = tmp_path / "questions.jsonl"
    path.write_text(f'{{"turns": ["Why?"]}}\n{line}\n')
    with pytest.raises(ValueError, match=r"questions\.jsonl:2: expected an object with"):
        find_prompts(f"spec_bench:{path}", None, tokenizer)


def test_standard_library_prompts_have_any_length(tokenizer: Tokenizer) -> None:
    prompts = find_prompts("stdlib", None, tokenizer)
    rng = random.Random(0)
    assert [len(prompts(n, rng)) for n in (1, 100, 5000)] == [1, 100, 5000]
    assert prompts(64, random.Random(1)) != prompts(64, random.Random(2))


def test_random_prompts_stay_in_the_vocabulary(tokenizer: Tokenizer) -> None:
    prompts = find_prompts("random", None, tokenizer)
    token_ids = prompts(5000, random.Random(0))
    assert len(token_ids) == 5000
    assert 0 <= min(token_ids) < max(token_ids) < tokenizer.get_vocab_size()


def test_unknown_prompts_are_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match="known are stdlib, random, spec_bench"):
        find_prompts("lorem", None, tokenizer)
