"""Load generators on a real server, and the open loop that says when it falls behind."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from conftest import make_request, make_scheduler

from bench import aiperf, perf_analyzer
from bench.answer import Answer
from bench.bench_options import BenchOptions
from bench.grid_setup import planners_of
from bench.grpc_client import GrpcClient
from bench.http_client import HttpClient
from bench.load_generator import ending_of, replay
from bench.outcome import FAILED, FINISHED, REJECTED, Outcome
from bench.served import Served, serving
from bench.step_traces import merged, steps_of
from bench.through_server import ThroughServer
from bench.tool_cache import Tool
from bench.workloads.plan import Plan, PlannedRequest
from specserve.admission import Rejected
from specserve.config import load_config
from specserve.launch.installation import find_installation
from specserve.request import SLO

ASSETS = Path(__file__).parent / "assets"
CLIENTS = {
    "grpc": lambda server: GrpcClient.connect(f"127.0.0.1:{server.grpc_port}", "specserve"),
    "http": lambda server: HttpClient.connect(f"127.0.0.1:{server.http_port}", "specserve"),
}
EVERY_CLIENT = pytest.mark.parametrize("connect", CLIENTS.values(), ids=CLIENTS)
needs_server = pytest.mark.skipif(
    find_installation() is None, reason="nvidia-pytriton is not installed"
)


@pytest.fixture(scope="module")
def server(demo_engines: Path) -> Iterator[Served]:
    if find_installation() is None:
        pytest.skip("nvidia-pytriton is not installed")
    with serving([f"engine.dir={demo_engines}"]) as served:
        yield served


def requests_of(count: int, gap_s: float = 0.02, slo: SLO | None = None) -> list[PlannedRequest]:
    return [
        PlannedRequest(i * gap_s, [10 + i, *range(20, 40)], 5 + i, "interactive", slo or SLO())
        for i in range(count)
    ]


def replayed(
    connect: Callable[[Any], Any], server: Any, requests: list[PlannedRequest]
) -> list[Outcome]:
    async def run() -> list[Outcome]:
        async with connect(server) as client:
            return await replay(client, requests)

    return asyncio.run(run())


# -- the open loop -----------------------------------------------------------------------------


class Scripted:
    """A client whose every answer takes a while, and that holds everybody up, if told to."""

    def __init__(self, answer_s: float = 0.0, blocks_s: float = 0.0) -> None:
        self.answer_s = answer_s
        self.blocks_s = blocks_s

    async def send(self, tensors: Mapping[str, Any]) -> Answer:
        """Answer with one token."""
        answer = Answer(sent_s=time.perf_counter(), tensors={"num_output_tokens": 1})
        time.sleep(self.blocks_s)
        await asyncio.sleep(self.answer_s)
        answer.response_s.append(time.perf_counter())
        return answer


def test_requests_do_not_wait_for_answers() -> None:
    outcomes = asyncio.run(replay(Scripted(answer_s=0.5), requests_of(5, gap_s=0.01)))
    ends = [outcome.response_s[-1] for outcome in outcomes]
    assert all(outcome.sent_s < min(ends) for outcome in outcomes)


def test_no_request_is_sent_before_its_time() -> None:
    outcomes = asyncio.run(replay(Scripted(), requests_of(20, gap_s=0.003)))
    assert all(outcome.sent_s >= outcome.request.arrival_s for outcome in outcomes)


def test_generator_that_falls_behind_says_so_and_counts_it_as_latency() -> None:
    outcomes = asyncio.run(replay(Scripted(blocks_s=0.05), requests_of(3, gap_s=0.01)))
    late_s = [outcome.sent_s - outcome.request.arrival_s for outcome in outcomes]
    assert late_s[1] >= 0.039
    assert late_s[2] >= 0.079
    assert all(o.ttft_s >= late + 0.05 for o, late in zip(outcomes, late_s, strict=True))


# -- our own clients ---------------------------------------------------------------------------


@pytest.mark.triton
@EVERY_CLIENT
def test_answers_have_the_planned_length(connect: Callable[[Any], Any], server: Served) -> None:
    outcomes = replayed(connect, server, requests_of(6))
    assert [outcome.ending for outcome in outcomes] == [FINISHED] * 6, outcomes
    assert [outcome.num_output_tokens for outcome in outcomes] == [5, 6, 7, 8, 9, 10]
    for outcome in outcomes:
        assert outcome.response_s == sorted(outcome.response_s)
        assert outcome.response_s[0] > outcome.sent_s
        assert 1 <= len(outcome.response_s) <= outcome.num_output_tokens


@pytest.mark.triton
def test_both_protocols_carry_the_same_text(server: Served) -> None:
    async def text(connect: Callable[[Any], Any]) -> str:
        async with connect(server) as client:
            tensors = {"input_ids": list(range(30, 60)), "max_tokens": 24, "stream": True}
            answer: Answer = await client.send(tensors)
            assert answer.error is None
            return answer.text

    first, second = (asyncio.run(text(connect)) for connect in CLIENTS.values())
    assert first == second != ""


@pytest.mark.triton
@EVERY_CLIENT
def test_what_the_server_refuses_is_a_failure_with_its_reason(
    connect: Callable[[Any], Any], server: Served
) -> None:
    bad = PlannedRequest(0.01, [99_999], 5)
    outcomes = replayed(connect, server, [*requests_of(1), bad])
    assert [outcome.ending for outcome in outcomes] == [FINISHED, FAILED]
    assert "input_ids has 99999" in outcomes[1].error


@pytest.mark.triton
@EVERY_CLIENT
def test_request_told_early_that_it_would_be_late_is_rejected(
    connect: Callable[[Any], Any], server: Served
) -> None:
    busy = PlannedRequest(0.0, [5, 6, 7], 400)  # an idle server refuses nobody
    late = PlannedRequest(0.05, [5, 6, 7], 5, "interactive", SLO(1e-6, None))
    outcomes = replayed(connect, server, [busy, late])
    assert [outcome.ending for outcome in outcomes] == [FINISHED, REJECTED], outcomes[1].error
    assert not outcomes[1].attained


def test_words_of_a_full_queue_are_known() -> None:
    scheduler = make_scheduler(max_waiting_requests=1)
    scheduler.submit(make_request())
    with pytest.raises(Rejected) as refusal:
        scheduler.submit(make_request())
    assert ending_of(str(refusal.value)) == REJECTED
    assert ending_of("input_ids has 99999: token ids are in [0, 4096)") == FAILED


@EVERY_CLIENT
def test_server_that_is_not_there_is_a_failure(connect: Callable[[Any], Any]) -> None:
    class Nowhere:
        grpc_port = http_port = 9  # discard: nobody listens

    (outcome,) = replayed(connect, Nowhere, requests_of(1))
    assert outcome.ending == FAILED
    assert outcome.error


# -- other people's ----------------------------------------------------------------------------


@pytest.mark.triton
def test_perf_analyzer_sends_the_plan(server: Served) -> None:
    try:
        perf_analyzer.perf_analyzer()
    except RuntimeError as error:
        pytest.skip(str(error))
    requests = requests_of(5, gap_s=0.1, slo=SLO(None, 10.0))
    outcomes = perf_analyzer.replay(f"127.0.0.1:{server.grpc_port}", "specserve", requests)
    assert [outcome.ending for outcome in outcomes] == [FINISHED] * 5
    assert [outcome.num_output_tokens for outcome in outcomes] == [5, 6, 7, 8, 9]
    assert all(outcome.attained for outcome in outcomes)
    late_s = [outcome.sent_s - outcome.request.arrival_s for outcome in outcomes]
    assert min(late_s) == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("num_empty", [0, 2, perf_analyzer.MAX_RUNS])
def test_perf_analyzer_runs_again_when_its_export_is_empty(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    num_empty: int,
) -> None:
    record = {"timestamp": 10**18, "response_timestamps": [10**18 + 10**9],
              "response_outputs": [{"num_output_tokens": 5}]}  # fmt: skip
    program, export = tmp_path / "program", {"experiments": [{"requests": [record]}]}
    program.write_text(f"""#!{sys.executable}
import pathlib, sys
runs = pathlib.Path({str(tmp_path / "runs")!r})
num_runs = len(runs.read_text()) if runs.exists() else 0
runs.write_text("x" * (num_runs + 1))
text = {json.dumps(export)!r} if num_runs >= {num_empty} else ""
pathlib.Path(sys.argv[sys.argv.index("--profile-export-file") + 1]).write_text(text)
""")
    program.chmod(0o755)
    monkeypatch.setattr(perf_analyzer, "perf_analyzer", lambda: Tool(program, {}))
    if num_empty < perf_analyzer.MAX_RUNS:
        (outcome,) = perf_analyzer.replay("nowhere", "specserve", requests_of(1))
        assert (outcome.ending, outcome.ttft_s) == (FINISHED, pytest.approx(1.0))
    else:
        with pytest.raises(RuntimeError, match="empty in 4 runs"):
            perf_analyzer.replay("nowhere", "specserve", requests_of(1))
    assert len((tmp_path / "runs").read_text()) == min(num_empty + 1, perf_analyzer.MAX_RUNS)
    assert len(caplog.records) == num_empty, "it sent again without a word"


def test_perf_analyzer_export_is_read_in_order_of_sending() -> None:
    def record(sent_s: float, *response_s: float, num_tokens: int) -> dict[str, Any]:
        rubbish = {"text_output": "x", "num_output_tokens": -1593487352}
        return {
            "timestamp": 10**18 + round(sent_s * 1e9),
            "response_timestamps": [10**18 + round(s * 1e9) for s in response_s],
            "response_outputs": [*[rubbish] * (len(response_s) - 1),
                                 {"num_output_tokens": num_tokens}],
        }  # fmt: skip

    records = [record(5.25, 5.5, num_tokens=6), record(5.0, 5.4, 6.0, num_tokens=5)]
    requests = requests_of(2, gap_s=0.2)
    first, second = perf_analyzer.outcomes_of({"experiments": [{"requests": records}]}, requests)
    assert (first.sent_s, first.response_s) == (0.0, pytest.approx([0.4, 1.0]))
    assert first.tpot_s == pytest.approx(0.6 / 4)
    assert (second.sent_s, second.ttft_s) == (pytest.approx(0.25), pytest.approx(0.3))
    cut_off = [records[0], record(5.0, 5.4, num_tokens=-7)]
    outcomes = perf_analyzer.outcomes_of({"experiments": [{"requests": cut_off}]}, requests)
    assert [outcome.ending for outcome in outcomes] == [FAILED, FINISHED]
    with pytest.raises(RuntimeError, match="sent 1 of 2 requests"):
        perf_analyzer.outcomes_of({"experiments": [{"requests": records[:1]}]}, requests)


def test_aiperf_export_is_read() -> None:
    """The file is AIPerf 0.13's raw export of two requests to our endpoint, in another order."""
    lines = (ASSETS / "aiperf_raw.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    requests = [PlannedRequest(0.4 * i, [*range(10, 40 + i)], 10 + i) for i in range(2)]
    outcomes = aiperf.outcomes_of(records, requests)
    assert [outcome.ending for outcome in outcomes] == [FINISHED, FINISHED]
    assert [outcome.num_output_tokens for outcome in outcomes] == [10, 11]
    for outcome, record in zip(outcomes, reversed(records), strict=True):
        took = [r["perf_ns"] - record["start_perf_ns"] for r in record["responses"]]
        texts = took[:-2]  # then come the usage and the end
        assert [s - outcome.sent_s for s in outcome.response_s] == pytest.approx(
            [ns / 1e9 for ns in texts]
        )
    with pytest.raises(RuntimeError, match="sent 1 of 2 requests"):
        aiperf.outcomes_of(records[:1], requests)


def test_aiperf_schedule_says_what_the_plan_says() -> None:
    entries = list(aiperf.schedule("m", requests_of(2, gap_s=0.5, slo=SLO(0.3, 0.04))))
    assert [entry["timestamp"] for entry in entries] == [0.0, 500.0]
    body = entries[1]["payload"]
    assert (body["prompt"][0], body["max_tokens"], body["user"]) == (11, 6, "1")
    assert (body["slo_ttft_ms"], body["slo_tpot_ms"]) == (300.0, 40.0)
    assert body["slo_class"] == "interactive"


# -- what the grid runs ------------------------------------------------------------------------


def small_plans(tmp_path: Path, mode: str, rate_rps: float = 4.0) -> tuple[Plan, Plan]:
    options = BenchOptions(output=tmp_path / "out.jsonl", mode=mode, length_scale=0.05)
    planner = planners_of(options, load_config(None), ["poisson"])["poisson"]
    return planner.window(4.0, 1.0, seed=1), planner.window(rate_rps, 6.0 / rate_rps, seed=0)


@needs_server
@pytest.mark.triton
def test_window_through_a_server_of_its_own(tmp_path: Path, demo_engines: Path) -> None:
    warm_up, plan = small_plans(tmp_path, "server", rate_rps=100.0)
    run = ThroughServer([]).run(["policy.name=fixed"], warm_up, plan)
    assert [o.ending for o in run.outcomes] == [FINISHED] * len(plan.requests)
    assert [o.num_output_tokens for o in run.outcomes] == [
        r.num_output_tokens for r in plan.requests
    ]
    assert sum(step.drafted for step in run.steps) > 0
    for outcome in run.outcomes:  # accepted tokens and one more from every step it was in
        assert sum(step.accepted + 1 for step in outcome.steps) == outcome.num_output_tokens
        assert outcome.steps[-1].t_s == pytest.approx(outcome.response_s[-1], abs=1.0)
    parts = [step for outcome in run.outcomes for step in outcome.steps]
    assert len(run.steps) < len(parts), "requests that come at once share steps"
    for name in ("drafted", "verified", "accepted"):
        assert sum(getattr(s, name) for s in run.steps) == sum(getattr(s, name) for s in parts)


def test_step_told_by_several_requests_is_one_step() -> None:
    def tensors(arrival_s: float, *at_s: float) -> dict[str, Any]:
        counts = {"num_drafted_tokens": 4, "num_verified_tokens": 3, "num_accepted_tokens": 2}
        trace = [
            {"at_s": at, "num_rows": 2, "predicted_s": None, "measured_s": 0.01, **counts}
            for at in at_s
        ]
        return {"arrival_time_ns": round(arrival_s * 1e9), "step_trace": json.dumps(trace)}

    first = steps_of(tensors(100.5, 0.02, 0.04), start_s=100.0)
    second = steps_of(tensors(100.53, 0.01 + 1e-9, 0.03), start_s=100.0)
    steps = merged([*first, *second])
    assert [step.t_s for step in steps] == pytest.approx([0.52, 0.54, 0.56])
    assert [step.drafted for step in steps] == [4, 8, 4]
    assert [(step.verified, step.accepted) for step in steps] == [(3, 2), (6, 4), (3, 2)]
    assert steps_of({}, start_s=100.0) == []


@pytest.mark.openvino
@pytest.mark.slow
def test_window_on_engines_in_this_process(tmp_path: Path, demo_engines: Path) -> None:
    from bench.in_process import on_engines

    warm_up, plan = small_plans(tmp_path, "engines")
    run = on_engines([]).run(["policy.name=fixed"], warm_up, plan)
    assert [o.ending for o in run.outcomes] == [FINISHED] * len(plan.requests)
    assert [o.num_output_tokens for o in run.outcomes] == [
        r.num_output_tokens for r in plan.requests
    ]
    assert all(o.response_s[0] > o.request.arrival_s for o in run.outcomes)
    assert sum(step.drafted for step in run.steps) > 0
