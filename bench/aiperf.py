"""NVIDIA's AIPerf as the one who sends: the same requests at the same times, to OpenAI's API.

It replays a fixed schedule of ready-made bodies, and its raw export has the time of every chunk.
"""

import json
import os
import subprocess
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.load_generator import ending_of
from bench.outcome import FINISHED, Outcome
from bench.tool_cache import aiperf
from bench.workloads.plan import PlannedRequest


def replay(
    url: str, model: str, requests: Sequence[PlannedRequest], tokenizer_dir: Path
) -> list[Outcome]:
    """Send requests at their arrival times, to the millisecond, and wait for all answers.

    Args:
        url: of the endpoint, without `/v1`.
        tokenizer_dir: AIPerf insists on loading one; tokens are counted by the server.

    Raises:
        RuntimeError: AIPerf cannot be had, or failed; the text is its own.
    """
    tool = aiperf()
    with tempfile.TemporaryDirectory(prefix="aiperf-") as folder:
        bodies = Path(folder) / "bodies.jsonl"
        bodies.write_text("".join(f"{json.dumps(e)}\n" for e in schedule(model, requests)))
        command = [
            str(tool.path), "profile", "-m", model, "-u", url, "--endpoint-type", "completions",
            "--streaming", "--input-file", str(bodies), "--custom-dataset-type", "mooncake_trace",
            "--fixed-schedule", "--tokenizer", str(tokenizer_dir.resolve()),
            "--use-server-token-count", "--export-level", "raw", "--artifact-dir", folder,
            "--ui-type", "none", "--no-gpu-telemetry", "--no-server-metrics",
        ]  # fmt: skip
        done = subprocess.run(
            command, env=os.environ | tool.env, capture_output=True, text=True, check=False
        )
        export = Path(folder) / "profile_export_raw.jsonl"
        if done.returncode or not export.is_file():
            raise RuntimeError(f"aiperf failed: {(done.stderr or done.stdout)[-1000:]}")
        lines = export.read_text(encoding="utf-8").splitlines()
        return outcomes_of([json.loads(line) for line in lines], requests)


def schedule(model: str, requests: Iterable[PlannedRequest]) -> Iterator[dict[str, Any]]:
    """Yield when to send what; `user` says which of the requests it is."""
    for index, request in enumerate(requests):
        body: dict[str, Any] = {
            "model": model,
            "prompt": request.prompt_token_ids,
            "max_tokens": request.num_output_tokens,
            "ignore_eos": True,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
            "user": str(index),
        }
        if request.priority_class:
            body["slo_class"] = request.priority_class
        if request.slo.ttft_s is not None:
            body["slo_ttft_ms"] = request.slo.ttft_s * 1e3
        if request.slo.tpot_s is not None:
            body["slo_tpot_ms"] = request.slo.tpot_s * 1e3
        yield {"timestamp": request.arrival_s * 1e3, "payload": body}


def outcomes_of(
    records: Iterable[Mapping[str, Any]], requests: Sequence[PlannedRequest]
) -> list[Outcome]:
    """Read a raw export; the most punctual request is taken to have been sent on time.

    Raises:
        RuntimeError: a request is missing.
    """
    by_index = {int(record["payload"]["user"]): record for record in records}
    if len(by_index) != len(requests):
        raise RuntimeError(f"aiperf sent {len(by_index)} of {len(requests)} requests")
    start_ns = min(
        by_index[i]["start_perf_ns"] - round(request.arrival_s * 1e9)
        for i, request in enumerate(requests)
    )
    return [_outcome(request, by_index[i], start_ns) for i, request in enumerate(requests)]


def _outcome(request: PlannedRequest, record: Mapping[str, Any], start_ns: int) -> Outcome:
    outcome = Outcome(request, (record["start_perf_ns"] - start_ns) / 1e9)
    for moment_ns, event in _events(record):
        outcome.error = outcome.error or str(event.get("error", ""))
        if any(choice["text"] for choice in event.get("choices", ())):
            outcome.response_s.append((moment_ns - start_ns) / 1e9)
        if event.get("usage"):
            outcome.num_output_tokens = event["usage"]["completion_tokens"]
    error = outcome.error or str(record.get("error") or "")
    if not error and outcome.response_s and outcome.num_output_tokens:
        outcome.ending = FINISHED
    else:
        outcome.error = error or "the answer ended early"
        outcome.ending = ending_of(outcome.error)
    return outcome


def _events(record: Mapping[str, Any]) -> Iterator[tuple[int, Mapping[str, Any]]]:
    for response in record["responses"]:
        for packet in response.get("packets", ()):
            if packet["name"] == "data" and packet["value"] != "[DONE]":
                yield response["perf_ns"], json.loads(packet["value"])
