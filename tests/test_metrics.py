"""The page on metrics says what there is, and log lines in JSON are what collectors read."""

from __future__ import annotations

import ast
import json
import logging
import re
import sys
import time
import urllib.request

import pytest
from endpoint import Endpoint
from server_client import generate
from shipped_metrics import METRICS_SOURCE

from bench.record import ROOT
from specserve.json_log import JsonFormatter

TRACE, SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
KINDS = {"COUNTERS": "counter", "GAUGES": "gauge", "HISTOGRAMS": "histogram"}
ROW = re.compile(r"^\| `(specserve_\w+)` \| (\w+) \| ([\w, ]*?) ?\| (.*) \|$", re.MULTILINE)
SAMPLE = re.compile(r"^(specserve_\w+?)(?:_bucket|_sum|_count)?(?:\{(.*)\})? \S+$", re.MULTILINE)


def documented() -> dict[str, tuple[str, str, str]]:
    """Read the page: name to kind, labels and meaning."""
    rows = ROW.findall((ROOT / "python_backend" / "METRICS.md").read_text(encoding="utf-8"))
    return {name: (kind, labels, text.replace("\\|", "|")) for name, kind, labels, text in rows}


def test_page_has_every_metric_with_its_kind_and_help() -> None:
    """The source is read: importing it needs Triton."""
    tables = {
        node.targets[0].id: ast.literal_eval(node.value)
        for node in ast.parse(METRICS_SOURCE.read_text(encoding="utf-8")).body
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", None) in KINDS
    }
    assert tables.keys() == KINDS.keys()
    published = {n: (KINDS[kind], text) for kind, t in tables.items() for n, text in t.items()}
    assert {n: (kind, text) for n, (kind, _, text) in documented().items()} == published


@pytest.mark.triton
@pytest.mark.openvino
def test_labels_are_those_of_the_page_and_steps_are_in_the_histograms(endpoint: Endpoint) -> None:
    tensors = {"text_input": "import os", "max_tokens": 40, "slo_tpot_ms": 1e6}
    assert generate(endpoint.server, "ensemble", **tensors)[0] == 200
    time.sleep(0.5)  # they follow the last step within a fifth of a second
    url = f"http://127.0.0.1:{endpoint.server.metrics_port}/metrics"
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    text = opener.open(url, timeout=10).read().decode()
    page, found = documented(), SAMPLE.findall(text)
    assert len(found) > 40
    for name, labels in found:
        told = set(filter(None, page[name][1].split(", ")))
        assert set(re.findall(r"(\w+)=", labels)) - {"le"} == told, name
    metrics = endpoint.server.metrics()
    for name in ("step_time_seconds", "predicted_step_time_seconds"):
        assert f"# TYPE specserve_{name} histogram" in text
        assert metrics[f"specserve_{name}_sum"] > 0.0
    assert metrics["specserve_step_time_seconds_count"] == metrics["specserve_steps_total"]
    gained = [v for n, v in metrics.items() if n.startswith("specserve_acceptance_length_total")]
    assert sum(gained) > 0


def line(message: str, *args: object, **extra: object) -> dict[str, object]:
    """Format one record."""
    record = logging.LogRecord("x.y", logging.INFO, "f", 1, message, args, None)
    record.__dict__ |= extra
    found: dict[str, object] = json.loads(JsonFormatter("specserve.x").format(record))
    return found


@pytest.mark.parametrize(
    ("request_id", "trace"),
    [
        (f"00-{TRACE}-{SPAN}-01", {"trace_id": TRACE, "span_id": SPAN}),
        (f"cmpl-{TRACE}-0", {"trace_id": TRACE}),
        ("mine", {}),
        ("0" * 32, {}),
        (TRACE + "ab", {}),
    ],
)
def test_request_id_gives_trace_and_span(request_id: str, trace: dict[str, str]) -> None:
    found = line("request %s", "a\nb", request_id=request_id)
    assert {k: v for k, v in found.items() if k in ("trace_id", "span_id")} == trace
    assert found["attributes"] == {"logger": "x.y", "request_id": request_id}
    assert found["body"] == "request a\nb"
    assert found["severity_text"] == "INFO"
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", str(found["timestamp"]))


def test_exception_stays_in_its_line() -> None:
    try:
        raise ValueError("two\nlines")
    except ValueError:
        record = logging.LogRecord("x", logging.ERROR, "f", 1, "failed", (), sys.exc_info())
    text = JsonFormatter("x").format(record)
    assert "\n" not in text
    assert "two\nlines" in json.loads(text)["attributes"]["exception"]
