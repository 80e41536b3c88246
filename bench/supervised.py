"""A `specserve serve` in a process of its own, OpenAI endpoint included, and what it started."""

import contextlib
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.served import free_ports, read_metrics
from specserve.launch.marked_processes import MarkedProcesses, command_line
from specserve.launch.triton_process import model_of

SERVER_ID = "SPECSERVE_SERVER_ID"
READY = "Ctrl-C stops it."
POLL_S = 0.1
STOP_S = 60.0


@dataclass(frozen=True, slots=True)
class Supervised:
    """A running launcher.

    Attributes:
        openai_port: 0 if there is no endpoint.
        output: the file that it prints to.
    """

    launcher: subprocess.Popen[bytes]
    http_port: int
    grpc_port: int
    metrics_port: int
    openai_port: int
    output: Path

    def shown(self) -> str:
        """Return what it has printed so far."""
        return self.output.read_text(encoding="utf-8")

    def wait_for(self, words: str, count: int = 1, timeout_s: float = 120.0) -> None:
        """Wait until it has printed some words so often.

        Raises:
            TimeoutError: if it does not, or ends before; with what it has printed.
        """
        deadline = time.monotonic() + timeout_s
        while self.shown().count(words) < count:
            if self.launcher.poll() is not None or time.monotonic() > deadline:
                raise TimeoutError(f"not {count} times {words!r} in time:\n{self.shown()}")
            time.sleep(POLL_S)

    def server_id(self) -> str:
        """Read the mark of the running server from its environment.

        Raises:
            ProcessLookupError: if none runs, as between two starts.
        """
        for pid in self._children():
            for entry in _environment(pid):
                if entry.startswith(f"{SERVER_ID}="):
                    return entry.partition("=")[2]
        raise ProcessLookupError("no server runs")

    def pids(self) -> dict[str, int]:
        """Find the processes: `tritonserver`, each model's by its name, and `openai`."""
        found = {}
        for pid in MarkedProcesses(SERVER_ID, self.server_id()).pids():
            command = command_line(pid)
            model = model_of(command)
            if model is not None:
                found[model] = pid
            elif command and Path(command[0]).name == "tritonserver":
                found.setdefault("tritonserver", pid)  # a fork of it is called so for a moment
        for pid in self._children():
            if "openai" in command_line(pid):
                found["openai"] = pid
        return found

    def metrics(self) -> dict[str, float]:
        """Read the `specserve_` metrics, by name and labels as they are printed."""
        return read_metrics(self.metrics_port)

    def stop(self) -> int:
        """Ask it to drain and end; return its exit status.

        Raises:
            subprocess.TimeoutExpired: if it does not end.
        """
        self.launcher.send_signal(signal.SIGTERM)
        return self.launcher.wait(STOP_S)

    def _children(self) -> list[int]:
        pids = []
        for task in Path(f"/proc/{self.launcher.pid}/task").glob("*/children"):
            with contextlib.suppress(OSError):  # a thread that has ended
                pids += map(int, task.read_text().split())
        return pids


@contextlib.contextmanager
def supervised(
    overrides: Sequence[str] = (), *, arguments: Sequence[str] = (), with_openai: bool = True
) -> Iterator[Supervised]:
    """Start one with `section.key=value` overrides; wait until it is ready, stop it on the way out.

    Args:
        arguments: of `specserve serve`, those apart that are made here.
    """
    http_port, grpc_port, metrics_port, openai_port = free_ports(4)
    openai_port = openai_port if with_openai else 0
    ports = {"http": http_port, "grpc": grpc_port, "metrics": metrics_port, "openai": openai_port}
    command = [sys.executable, "-c", "from specserve.cli import app; app()", "serve", *arguments]
    command += [f"--{name}-port={port}" for name, port in ports.items()]
    command += [f"--set={override}" for override in overrides]
    with tempfile.TemporaryDirectory(prefix="specserve-") as folder:
        output = Path(folder) / "output"
        with output.open("wb") as file:
            launcher = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT
            )
        server = Supervised(launcher, http_port, grpc_port, metrics_port, openai_port, output)
        try:
            server.wait_for(READY)
            yield server
        finally:
            try:
                server.stop()
            except subprocess.TimeoutExpired:
                launcher.kill()  # the server follows
                launcher.wait()


def _environment(pid: int) -> list[str]:
    try:
        return Path(f"/proc/{pid}/environ").read_text(errors="replace").split("\0")
    except OSError:
        return []
