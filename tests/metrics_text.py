"""The metrics of a server whose every rate is known, and a small HTTP server that tells them."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

# Per second: counters rise by so much.
COUNTERS = {
    "steps_total": 20,
    "base_tokens_total": 60,
    "drafted_tokens_total": 200,
    "verified_tokens_total": 125,
    "accepted_tokens_total": 100,
    "output_tokens_total": 150,
    "preemptions_total": 0,
    "draft_failures_total": 0,
    "step_seconds_total": 0.8,
    "predicted_step_seconds_total": 0.72,
    "measured_step_seconds_total": 0.74,
    "draft_engine_seconds_total": 0.1,
    "verify_engine_seconds_total": 0.6,
    'requests_total{outcome="finished",class="default"}': 3,
    'requests_total{outcome="finished",class="interactive"}': 1,
    'requests_total{outcome="cancelled",class="interactive"}': 0.5,
    'verified_by_position_total{source="model",position="0"}': 50,
    'verified_by_position_total{source="model",position="1"}': 30,
    'verified_by_position_total{source="ngram",position="1"}': 10,
    'verified_by_position_total{source="model",position="10"}': 5,
    'accepted_by_position_total{source="model",position="0"}': 40,
    'accepted_by_position_total{source="model",position="1"}': 14,
    'accepted_by_position_total{source="ngram",position="1"}': 6,
    'accepted_by_position_total{source="model",position="10"}': 1,
    'decisions_total{reason="rate"}': 15,
    'decisions_total{reason="owed"}': 4,
    'decisions_total{reason="cap"}': 1,
    'slo_attained_total{class="interactive"}': 0.9,
    'slo_missed_total{class="interactive"}': 0.1,
    'slo_attained_total{class="batch"}': 2,
    'slo_missed_total{class="batch"}': 0,
}
GAUGES = {
    "requests_running": 5,
    "requests_waiting": 2,
    "kv_blocks_used": 256,
    "kv_blocks_total": 1024,
    "draft_available": 1,
    'slo_slack_seconds{class="interactive"}': 0.25,
    'step_prediction_error_ratio{call="verify",quantile="0.5"}': 0.03,
    'step_prediction_error_ratio{call="verify",quantile="0.95"}': 0.21,
    "acceptance_calibration_error": 0.04,
}


def metrics_text(seconds: float) -> str:
    """Return what the server says after so many seconds of such work."""
    lines = ["# HELP nv_inference_count Of Triton itself", 'nv_inference_count{model="x"} 5']
    for values, factor in ((COUNTERS, seconds), (GAUGES, 1.0)):
        lines += [f"specserve_{name} {value * factor:.6f}" for name, value in values.items()]
    return "\n".join(lines) + "\n"


@contextlib.contextmanager
def telling(text: Callable[[], str]) -> Iterator[int]:
    """Serve /metrics on a free port of this machine and yield the port."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = text().encode()
            self.send_response(200 if self.path == "/metrics" else 404)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield server.server_address[1]
        finally:
            server.shutdown()
            thread.join()
