"""One result line of `specserve bench`: what a cell of the grid was, and what came of it.

Owns the line's shape, reading and appending; a file of them is the grid's memory, from which it
resumes. Knows no engine, no trace and no statistics. Times are in seconds unless `_ms` says so.
"""

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

MAX_STEPS = 500  # kept in a line; the rest is thinned out evenly


@dataclass(frozen=True, slots=True)
class CellKey:
    """Where in the grid.

    Attributes:
        load: arrivals, as a share of what plain decoding can take on this engine.
        slo_scale: factor on the objectives that are relative to plain decoding.
        mode: `server`, `engines` or `simulated`.
    """

    trace: str
    policy: str
    load: float
    slo_scale: float
    repeat: int
    mode: str


@dataclass(frozen=True, slots=True)
class WorkloadInfo:
    """What was sent.

    Attributes:
        rate_rps: mean arrivals per second over the window.
        length_scale, prompt_scale: output and prompt tokens, as a share of the trace's.
        rate_scale: how many times faster than in the trace requests arrived.
        prompts: where their texts come from.
        slo: objectives of each class, `ttft_ms` and `tpot_ms`; None is best effort.
    """

    num_requests: int
    window_s: float
    rate_rps: float
    length_scale: float
    prompt_scale: float
    rate_scale: float
    prompts: str
    seed: int
    slo: dict[str, dict[str, float | None]]


@dataclass(frozen=True, slots=True)
class RequestResult:
    """One request as its client saw it; latencies count from the planned arrival.

    Attributes:
        lateness_s: how long after its planned arrival it was sent.
        priority_class: `class` in the line.
        ttft_s, tpot_s, e2e_s, itl_p99_s: None if it was not finished; TPOT is 0 for one token.
        outcome: `finished`, `rejected` or `failed`.
        attained: finished, and met every objective it carried.
    """

    arrival_s: float
    lateness_s: float
    priority_class: str
    num_prompt_tokens: int
    num_output_tokens: int
    ttft_s: float | None
    tpot_s: float | None
    e2e_s: float | None
    itl_p99_s: float | None
    outcome: str
    attained: bool


@dataclass(frozen=True, slots=True)
class StepSample:
    """One step of the server core: draft tokens of all rows, predicted and measured engine time."""

    t_s: float
    num_rows: int
    drafted: int
    verified: int
    accepted: int
    predicted_s: float | None
    measured_s: float


@dataclass(frozen=True, slots=True)
class Distribution:
    """Mean and percentiles."""

    mean: float
    p50: float
    p90: float
    p99: float


@dataclass(frozen=True, slots=True)
class Summary:
    """A cell in numbers; a distribution of nothing is None.

    Attributes:
        attainment: fraction of all requests that finished and met what they carried.
        goodput_rps: those, per second.
        token_rate: output tokens per second.
        max_lateness_s: the worst of the load generator itself.
    """

    ttft_s: Distribution | None
    tpot_s: Distribution | None
    itl_s: Distribution | None
    e2e_s: Distribution | None
    attainment: float
    goodput_rps: float
    token_rate: float
    num_finished: int
    num_rejected: int
    num_failed: int
    max_lateness_s: float


@dataclass(frozen=True, slots=True)
class Cell:
    """A line. `context` is `bench.record.context()`: machine, commit, command, time."""

    key: CellKey
    workload: WorkloadInfo
    requests: list[RequestResult]
    steps: list[StepSample]
    summary: Summary
    context: dict[str, Any]

    def to_line(self) -> str:
        """Write the line, without its end; seconds to the microsecond."""
        tree = {
            "cell": asdict(self.key),
            "workload": asdict(self.workload),
            "requests": [_renamed(asdict(r), "priority_class", "class") for r in self.requests],
            "steps": [asdict(step) for step in thinned(self.steps)],
            "summary": asdict(self.summary),
        }
        return json.dumps({**_rounded(tree), **self.context}, default=str)

    @classmethod
    def from_tree(cls, tree: Mapping[str, Any]) -> "Cell":
        """Read what `to_line` wrote.

        Raises:
            KeyError, TypeError: something is missing or unknown.
        """
        parts = ("cell", "workload", "requests", "steps", "summary")
        summary = dict(tree["summary"])
        for name in ("ttft_s", "tpot_s", "itl_s", "e2e_s"):
            summary[name] = None if summary[name] is None else Distribution(**summary[name])
        return cls(
            CellKey(**tree["cell"]),
            WorkloadInfo(**tree["workload"]),
            [RequestResult(**_renamed(r, "class", "priority_class")) for r in tree["requests"]],
            [StepSample(**step) for step in tree["steps"]],
            Summary(**summary),
            {name: value for name, value in tree.items() if name not in parts},
        )


def read_cells(path: Path) -> Iterator[Cell]:
    """Read the cells of a file; lines of another kind are passed over.

    Raises:
        ValueError: a line is not what it should be, naming file and line.
    """
    for number, tree in read_lines(path):
        if "cell" in tree:
            try:
                yield Cell.from_tree(tree)
            except (KeyError, TypeError) as error:
                raise ValueError(f"{path}:{number}: not a result line: {error}") from error


def read_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield line numbers and JSON objects; a last line that was cut off is passed over.

    Raises:
        ValueError: a line before the last is not JSON, naming file and line.
    """
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith("\n"):
                return  # whoever wrote it was stopped in the middle
            try:
                yield number, json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}:{number}: not JSON: {error}") from error


def append_line(path: Path, line: str) -> None:
    """Append a line, in the place of a last one that was cut off, and see it to the disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab+") as file:
        file.seek(0)
        whole = file.read().rfind(b"\n") + 1
        file.truncate(whole)
        file.write(line.encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def thinned(steps: list[StepSample]) -> list[StepSample]:
    """Return at most `MAX_STEPS` steps, evenly spaced."""
    stride = -(-len(steps) // MAX_STEPS) or 1
    return steps[::stride]


def _renamed(tree: Mapping[str, Any], old: str, new: str) -> dict[str, Any]:
    return {new if name == old else name: value for name, value in tree.items()}


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return round(value, 6)
    if isinstance(value, dict):
        return {name: _rounded(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_rounded(item) for item in value]
    return value
