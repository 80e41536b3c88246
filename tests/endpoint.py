"""The OpenAI endpoint for the time of a test: its own process, in front of a real server."""

from __future__ import annotations

import contextlib
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from bench.served import Served, serving
from specserve.launch.installation import find_installation

START_S = 60.0
MODEL = "specserve"


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A running endpoint and the server behind it."""

    url: str
    process: subprocess.Popen[bytes]
    server: Served

    @property
    def port(self) -> int:
        """Where it listens."""
        return int(self.url.rsplit(":", 1)[1])

    def post(
        self, path: str, *, headers: dict[str, str] | None = None, **body: object
    ) -> httpx.Response:
        """POST JSON to /v1/`path`; the model is ours unless given."""
        with client(self.url) as http:
            return http.post(f"/v1/{path}", json={"model": MODEL, **body}, headers=headers)


def client(url: str, **options: object) -> httpx.Client:
    """Make an HTTP client that ignores the environment's proxies and never gives up early."""
    return httpx.Client(base_url=url, timeout=120.0, trust_env=False, **options)


@contextlib.contextmanager
def running(
    grpc_port: int, metrics_port: int, overrides: Sequence[str] = ()
) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """Start `specserve openai`; yield its address and process."""
    port = free_port()
    ports = {"port": port, "grpc-port": grpc_port, "metrics-port": metrics_port}
    arguments = [f"--{name}={value}" for name, value in ports.items()]
    arguments += [f"--set={override}" for override in overrides]
    command = [sys.executable, "-c", "from specserve.cli import app; app()", "openai", *arguments]
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            wait_for_port(port, process)
            scheme = "https" if any("tls_cert_file" in one for one in overrides) else "http"
            yield f"{scheme}://127.0.0.1:{port}", process
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(timeout=30)
            finally:
                process.kill()
                process.wait()


def wait_for_port(port: int, process: subprocess.Popen[bytes]) -> None:
    """Wait until something listens."""
    deadline = time.monotonic() + START_S
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1.0).close()
            return
        except OSError:
            assert process.poll() is None, f"the endpoint ended with status {process.poll()}"
            assert time.monotonic() < deadline, "the endpoint does not listen"
            time.sleep(0.05)


def free_port() -> int:
    """Return a port that was free a moment ago."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


@pytest.fixture(scope="session")
def endpoint(demo_engines: Path) -> Iterator[Endpoint]:
    """Return an endpoint in front of the demo pair, one for all tests."""
    if find_installation() is None:
        pytest.skip("nvidia-pytriton is not installed")
    overrides = [f"engine.dir={demo_engines}", "engine.precision=f32"]
    with (
        serving(overrides) as server,
        running(server.grpc_port, server.metrics_port, overrides) as (url, process),
    ):
        yield Endpoint(url, process, server)
