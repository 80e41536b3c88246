"""Published request traces: where they lie and how their rows are read.

A row without output tokens is a request that failed where it was recorded; it is left out and
counted. Anything else that is not as it should be is an error that names file and line.
"""

import csv
import itertools
import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from bench.workloads import Arrival, Trace

MAX_ROWS = 500_000  # the 2024 Azure files have tens of millions

Records = Iterator[tuple[int, Mapping[str, Any]]]  # line number, and the row's values by name


@dataclass(frozen=True, slots=True)
class Format:
    """How a trace is written: the names of its three columns, and what reads them.

    Attributes:
        seconds: makes seconds of an arrival column's value.
    """

    records: Callable[[Path], Records]
    arrival: str
    prompt: str
    output: str
    seconds: Callable[[Any], float]


def load_trace(path: Path, format_name: str, name: str) -> Trace:
    """Read a trace; at most its first `MAX_ROWS` rows.

    Raises:
        ValueError: unknown format, no such file, or a malformed row, naming file and line.
    """
    if format_name not in FORMATS:
        raise ValueError(f"trace format is '{format_name}': known are {', '.join(FORMATS)}")
    if not path.is_file():
        raise ValueError(f"trace {path} is not a file: name another with --trace or --data")
    kind = FORMATS[format_name]
    rows = [_arrival(kind, path, *row) for row in itertools.islice(kind.records(path), MAX_ROWS)]
    kept = sorted((row for row in rows if row.num_output_tokens), key=lambda row: row.arrival_s)
    if not kept:
        raise ValueError(f"trace {path} has no request with output tokens")
    notes = []
    if len(kept) < len(rows):
        notes.append(f"{len(rows) - len(kept)} rows without output tokens left out")
    if len(rows) == MAX_ROWS:
        notes.append(f"first {MAX_ROWS} rows")
    first_s = kept[0].arrival_s
    arrivals = [
        Arrival(row.arrival_s - first_s, row.num_prompt_tokens, row.num_output_tokens)
        for row in kept
    ]
    return Trace(name, arrivals, "; ".join(notes))


def _arrival(kind: Format, path: Path, line: int, record: Mapping[str, Any]) -> Arrival:
    try:
        seconds = kind.seconds(record[kind.arrival])
        if not math.isfinite(seconds):
            raise ValueError(f"{kind.arrival} is {record[kind.arrival]!r}")
        return Arrival(seconds, _count(record, kind.prompt), _count(record, kind.output))
    except KeyError as error:
        raise ValueError(f"{path}:{line}: column {error} is missing") from error
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}:{line}: {error}") from error


def _count(record: Mapping[str, Any], column: str) -> int:
    text = str(record[column])
    if not text.isascii() or not text.isdigit():
        raise ValueError(f"{column} is {record[column]!r}: must be a number of tokens")
    return int(text)


def _csv(path: Path) -> Records:
    with path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file)
        for record in reader:
            yield reader.line_num, record


def _jsonl(path: Path) -> Records:
    with path.open(encoding="utf-8") as file:
        for line, text in enumerate(file, 1):
            try:
                record = json.loads(text)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}:{line}: not JSON: {error}") from error
            if not isinstance(record, dict):
                raise ValueError(f"{path}:{line}: not a JSON object: {text.strip()[:40]}")
            yield line, record


def _timestamp(text: str) -> float:
    """Read `2023-11-16 18:17:03.9799600` (UTC, 7 digits, the last one cut off) or, as in 2024,
    the same with 6 digits and a zone.
    """
    moment = datetime.fromisoformat(text)
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()


def _milliseconds(value: float) -> float:
    return float(value) / 1e3


# Azure: github.com/Azure/AzurePublicDataset; Mooncake: github.com/kvcache-ai/Mooncake;
# BurstGPT: github.com/HPMLL/BurstGPT.
_AZURE = Format(_csv, "TIMESTAMP", "ContextTokens", "GeneratedTokens", _timestamp)
FORMATS = {
    "azure_2023": _AZURE,
    "azure_2024": _AZURE,
    "mooncake": Format(_jsonl, "timestamp", "input_length", "output_length", _milliseconds),
    "burstgpt": Format(_csv, "Timestamp", "Request tokens", "Response tokens", float),
}
