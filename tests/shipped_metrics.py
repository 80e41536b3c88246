"""Which metrics the server publishes, and which a PromQL expression asks for."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import promql_parser

METRICS_SOURCE = Path(__file__).parent.parent / "python_backend" / "metrics.py"


def published() -> set[str]:
    """Read the names out of the source; importing it needs Triton."""
    return set(re.findall(r'"(specserve_\w+)"', METRICS_SOURCE.read_text(encoding="utf-8")))


def metrics_of(expression: str) -> set[str]:
    """Parse an expression and name the metrics in it.

    Raises:
        ValueError: if it is no PromQL, or takes a counter for a gauge or the other way round.
    """
    found = set(_names(promql_parser.parse(expression), is_rate=False))
    if not found:
        raise ValueError(f"no metric in {expression}")
    return found


def _names(node: Any, is_rate: bool) -> Iterator[str]:
    if isinstance(node, promql_parser.Call):
        is_rate = node.func.name == "rate"
    if isinstance(node, promql_parser.VectorSelector):
        if is_rate and node.name.endswith("_bucket"):
            yield node.name.removesuffix("_bucket")
            return
        if is_rate != node.name.endswith("_total") and node.name != "specserve_kv_blocks_total":
            raise ValueError(f"{node.name}: counters go into rate(), and nothing else does")
        yield node.name
    for part in ("expr", "lhs", "rhs", "vector_selector"):
        if (child := getattr(node, part, None)) is not None:
            yield from _names(child, is_rate)
    for child in getattr(node, "args", None) or ():
        yield from _names(child, is_rate)
