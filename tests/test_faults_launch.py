"""`specserve serve` when what it started fails: it says so, starts it again, and leaves nothing."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from bench.served import free_ports
from specserve.launch.backoff import LONGEST_S, STABLE_S, Backoff
from specserve.launch.in_flight import InFlight
from specserve.launch.installation import find_installation
from specserve.launch.marked_processes import MarkedProcesses, command_line

WAIT_S = 90.0
SERVER_ID = "SPECSERVE_SERVER_ID"


class Clock:
    """Seconds that pass when told."""

    now = 0.0

    def __call__(self) -> float:
        """Look at it."""
        return self.now


def test_waits_double_up_to_a_minute_and_end() -> None:
    backoff = Backoff(9, Clock())
    waits = [backoff.next_wait_s() for _ in range(10)]
    assert waits == [1, 2, 4, 8, 16, 32, LONGEST_S, LONGEST_S, LONGEST_S, None]
    assert backoff.num_restarts == 9


def test_failure_after_a_quiet_while_is_the_first_again() -> None:
    clock = Clock()
    backoff = Backoff(2, clock)
    assert [backoff.next_wait_s() for _ in range(3)] == [1, 2, None]
    backoff.started()
    clock.now += STABLE_S / 2
    assert backoff.next_wait_s() is None, "it failed soon again"
    backoff.started()
    clock.now += STABLE_S + 1
    assert backoff.next_wait_s() == 1
    assert backoff.num_restarts == 3


class Launched:
    """A `specserve serve` with what it has printed so far."""

    def __init__(self, process: subprocess.Popen[bytes], http_port: int, metrics_port: int) -> None:
        self.process = process
        self.http_port = http_port
        self.metrics_port = metrics_port
        self.shown = ""

    def read_until(self, words: str, count: int = 1) -> None:
        """Read what it prints until `words` have come so often."""
        assert self.process.stdout is not None
        deadline = time.monotonic() + WAIT_S
        while self.shown.count(words) < count:
            left_s = max(0.0, deadline - time.monotonic())
            readable, _, _ = select.select([self.process.stdout], [], [], left_s)
            assert readable, f"no {words!r} in time: {self.shown}"
            text = os.read(self.process.stdout.fileno(), 65536).decode()
            assert text, f"ended: {self.shown}"
            self.shown += text

    def pids(self) -> dict[str, int]:
        """Find the processes of the server, by model; the server itself is `tritonserver`."""
        found = {}
        for pid in MarkedProcesses(SERVER_ID, self.server_id()).pids():
            command = command_line(pid)
            is_stub = "stub" in Path(command[0]).name
            found[Path(command[1]).parts[-3] if is_stub else "tritonserver"] = pid
        return found

    def server_id(self) -> str:
        """Read the mark of the running server from its environment."""
        task = f"/proc/{self.process.pid}/task/{self.process.pid}/children"
        for child in Path(task).read_text().split():
            environment = Path(f"/proc/{child}/environ").read_text().split("\0")
            for entry in environment:
                if entry.startswith(f"{SERVER_ID}="):
                    return entry.partition("=")[2]
        raise AssertionError("no server runs")

    def wait_until_running(self) -> None:
        """Wait until a request is in flight."""
        deadline = time.monotonic() + WAIT_S
        while InFlight("127.0.0.1", self.metrics_port).num_requests() == 0:
            assert time.monotonic() < deadline, "no request in flight"

    def generate(self, max_tokens: int = 3) -> tuple[int, str]:
        """Generate; return status and body."""
        connection = http.client.HTTPConnection("127.0.0.1", self.http_port, timeout=WAIT_S)
        body = {"text_input": "import os", "max_tokens": max_tokens, "end_id": -1}
        with contextlib.closing(connection):
            connection.request("POST", "/v2/models/ensemble/generate", json.dumps(body))
            response = connection.getresponse()
            return response.status, response.read().decode()


@pytest.fixture
def launched(demo_engines: Path) -> Iterator[Launched]:
    if find_installation() is None:
        pytest.skip("nvidia-pytriton is not installed")
    http_port, grpc_port, metrics_port = free_ports(3)
    command = [
        *(str(Path(sys.executable).parent / "specserve"), "serve", "--drain-timeout", "1.5"),
        *("--openai-port", "0"),
        *("--http-port", str(http_port), "--grpc-port", str(grpc_port)),
        *("--metrics-port", str(metrics_port), "--set", f"engine.dir={demo_engines}"),
    ]
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as process:
        try:
            yield Launched(process, http_port, metrics_port)
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()  # the server follows


@pytest.mark.triton
@pytest.mark.openvino
def test_failures_are_repaired_and_a_drain_has_an_end(
    launched: Launched,
) -> None:
    launched.read_until("Ctrl-C stops it.")
    marks = [launched.server_id()]
    os.kill(launched.pids()["specserve"], signal.SIGKILL)
    launched.read_until("Ctrl-C stops it.", 2)
    assert "the process of model 'specserve' died" in launched.shown
    assert "Restart 1 of the server in 1 s" in launched.shown
    assert launched.generate()[0] == 200

    marks.append(launched.server_id())
    os.kill(launched.pids()["tritonserver"], signal.SIGABRT)
    launched.read_until("Ctrl-C stops it.", 3)
    assert "tritonserver was ended by SIGABRT" in launched.shown
    assert "Restart 2 of the server in 2 s" in launched.shown
    assert launched.generate()[0] == 200

    marks.append(launched.server_id())
    with ThreadPoolExecutor() as pool:
        endless = pool.submit(launched.generate, 4000)  # more than the drain allows
        launched.wait_until_running()
        launched.process.send_signal(signal.SIGTERM)
        assert "the server is shutting down: try again" in endless.result()[1]
    launched.read_until("Stopped.")
    assert launched.process.wait(10) == 0
    for mark in marks:
        assert MarkedProcesses(SERVER_ID, mark).pids() == []
        assert list(Path("/dev/shm").glob(f"{mark}*")) == []
    for log in re.findall(r"log: (\S+)", launched.shown):
        assert not Path(log).exists()
