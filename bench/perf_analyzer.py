"""NVIDIA's perf_analyzer as the one who sends: the same requests at the same times, over gRPC.

It runs the planned intervals, and its export has the time of every response, so that the same
definitions apply to what it saw.
"""

import itertools
import json
import logging
import os
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.load_generator import tensors_of
from bench.outcome import FINISHED, Outcome
from bench.tool_cache import perf_analyzer
from bench.workloads.plan import PlannedRequest

logger = logging.getLogger(__name__)

MAX_RUNS = 4


def replay(address: str, model: str, requests: Sequence[PlannedRequest]) -> list[Outcome]:
    """Send requests at their arrival times and wait for all answers.

    NOTE: of one run in fifty, version 2.50's export is empty, and it says that all went well. The
    requests are sent again then.

    Args:
        address: host and gRPC port.
        requests: in order of arrival.

    Raises:
        RuntimeError: perf_analyzer cannot be had, or failed; the text is its own. Or none of
            MAX_RUNS runs had an export.
    """
    tool = perf_analyzer()
    with tempfile.TemporaryDirectory(prefix="perf_analyzer-") as folder:
        data, intervals, export = (Path(folder) / n for n in ("data.json", "times", "export.json"))
        data.write_text(json.dumps({"data": [_input(request) for request in requests]}))
        intervals.write_text("".join(f"{gap}\n" for gap in _intervals_us(requests)))
        command = [
            str(tool.path), "-m", model, "-i", "grpc", "-u", address, "--async", "--streaming",
            "--input-data", str(data), "--request-intervals", str(intervals),
            "--request-count", str(len(requests)), "--profile-export-file", str(export),
        ]  # fmt: skip
        for _ in range(MAX_RUNS):
            _run(command, os.environ | tool.env)
            text = export.read_text()
            if text:
                return outcomes_of(json.loads(text), requests)
            logger.warning("perf_analyzer's export is empty: this run does not count")
    raise RuntimeError(f"perf_analyzer's export was empty in {MAX_RUNS} runs: try again")


def outcomes_of(export: Mapping[str, Any], requests: Sequence[PlannedRequest]) -> list[Outcome]:
    """Read an export.

    It lists requests in order of their ends; in order of their sending they are the planned ones.
    The most punctual one is taken to have been sent on time.
    """
    records = sorted(export["experiments"][0]["requests"], key=lambda record: record["timestamp"])
    if len(records) != len(requests):
        raise RuntimeError(f"perf_analyzer sent {len(records)} of {len(requests)} requests")
    start_ns = min(
        record["timestamp"] - round(request.arrival_s * 1e9)
        for request, record in zip(requests, records, strict=True)
    )
    return [
        _outcome(request, record, start_ns)
        for request, record in zip(requests, records, strict=True)
    ]


def _run(command: Sequence[str], env: Mapping[str, str]) -> None:
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"perf_analyzer failed: {(done.stderr or done.stdout)[-1000:]}")


def _outcome(request: PlannedRequest, record: Mapping[str, Any], start_ns: int) -> Outcome:
    outcome = Outcome(request, (record["timestamp"] - start_ns) / 1e9)
    outcome.response_s = [(moment - start_ns) / 1e9 for moment in record["response_timestamps"]]
    # NOTE: it asks for every output, and shows rubbish for those that a response does not have.
    last = record["response_outputs"][-1] if record["response_outputs"] else {}
    outcome.num_output_tokens = int(last.get("num_output_tokens", 0))
    if outcome.num_output_tokens == request.num_output_tokens:
        outcome.ending = FINISHED
    else:
        outcome.error = "the answer ended early"
    return outcome


def _input(request: PlannedRequest) -> dict[str, Any]:
    tensors = {
        name: value if isinstance(value, list) else [value]
        for name, value in tensors_of(request).items()
    }
    return {
        name: {"content": values, "shape": [1, len(values)]} for name, values in tensors.items()
    }


def _intervals_us(requests: Sequence[PlannedRequest]) -> list[int]:
    """Return the time before each request; it waits for the first one too."""
    times_us = [round(request.arrival_s * 1e6) for request in requests]
    return [late - early for early, late in itertools.pairwise([0, *times_us])]
