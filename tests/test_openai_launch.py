"""The OpenAI endpoint beside the server: started again, refused with a reason, drained."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from endpoint import MODEL, client, free_port
from server_client import wait_until

from specserve.launch.endpoint import Endpoint, EndpointOptions
from specserve.launch.installation import find_installation
from specserve.launch.marked_processes import command_line


def make(port: int, tmp_path: Path, say: Callable[[str], None], *arguments: str) -> Endpoint:
    """Make an endpoint with no server behind it."""
    nowhere = ["--grpc-port=1", "--metrics-port=1", *arguments]
    return Endpoint(EndpointOptions(port, MODEL), "127.0.0.1", nowhere, tmp_path / "log", say)


def pids_of(port: int) -> list[int]:
    """Return the processes that were started to listen on this port."""
    pids = [int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit()]
    mark = ["openai", "--port", str(port)]
    return [pid for pid in pids if command_line(pid)[3:6] == mark]


def test_endpoint_that_dies_is_started_again_and_leaves_nothing(tmp_path: Path) -> None:
    port, said = free_port(), list[str]()
    with make(port, tmp_path, said.append) as endpoint:
        assert endpoint.wait_until_ready() is None
        (first,) = pids_of(port)
        os.kill(first, signal.SIGKILL)
        wait_until(lambda: pids_of(port) not in ([], [first]), "another process")
        assert endpoint.wait_until_ready() is None
    assert ["status -9" in line for line in said] == [True]
    assert pids_of(port) == []


def test_endpoint_that_cannot_start_says_why(tmp_path: Path) -> None:
    missing = "--set=openai.api_key_file=/missing"
    said = list[str]()
    with make(free_port(), tmp_path, said.append, missing) as endpoint:
        failure = endpoint.wait_until_ready()
    assert failure is not None
    assert "openai.api_key_file" in failure
    assert said == []


@pytest.mark.parametrize("field", ["tls_cert_file", "tls_key_file"])
def test_half_of_tls_is_refused(tmp_path: Path, field: str) -> None:
    with make(free_port(), tmp_path, print, f"--set=openai.{field}=x") as endpoint:
        failure = endpoint.wait_until_ready()
    assert failure is not None
    assert "give both" in failure


@pytest.mark.triton
@pytest.mark.openvino
@pytest.mark.skipif(find_installation() is None, reason="nvidia-pytriton is not installed")
def test_interrupted_serve_lets_an_openai_stream_finish(demo_engines: Path) -> None:
    ports = {name: free_port() for name in ("http", "grpc", "metrics", "openai")}
    command = [sys.executable, "-c", "from specserve.cli import app; app()", "serve"]
    command += [f"--{name}-port={port}" for name, port in ports.items()]
    command += [f"--set=engine.dir={demo_engines}"]
    body = {"model": MODEL, "prompt": "x", "max_tokens": 200, "ignore_eos": True, "stream": True}
    launcher = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert launcher.stdout is not None
    try:
        shown = ""
        while "Ctrl-C stops it." not in shown:
            line = launcher.stdout.readline()
            assert line, shown
            shown += line
        assert f"http://127.0.0.1:{ports['openai']}/v1/completions" in shown
        url = f"http://127.0.0.1:{ports['openai']}"
        with client(url) as http, http.stream("POST", "/v1/completions", json=body) as answer:
            lines = answer.iter_lines()
            assert "text" in next(lines)
            launcher.send_signal(signal.SIGINT)
            *_, last, done = (line for line in lines if line)
        assert done == "data: [DONE]"
        told = json.loads(last.removeprefix("data: "))
        assert told["choices"][0]["finish_reason"] == "length"
        shown += launcher.communicate(timeout=60)[0]
    finally:
        launcher.kill()
        launcher.wait()
    assert launcher.returncode == 0, shown
    assert shown.rstrip().endswith("Stopped.")
    assert pids_of(ports["openai"]) == []
