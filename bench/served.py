"""A real server for the time of a benchmark or test: free ports, its own log, gone afterwards."""

import contextlib
import socket
import tempfile
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from specserve.config import CONFIG_ENV, Config, dump_config, load_config
from specserve.launch.in_flight import InFlight
from specserve.launch.installation import find_installation
from specserve.launch.triton_options import TritonOptions
from specserve.launch.triton_process import TritonProcess
from specserve.launch.warm_up import warm_up

REPOSITORY = Path(__file__).resolve().parent.parent / "model_repository"


@dataclass(frozen=True, slots=True)
class Served:
    """Where a running server listens, and the process behind it."""

    http_port: int
    grpc_port: int
    metrics_port: int
    process: TritonProcess
    config: Config

    def stop(self) -> None:
        """Let requests in flight finish, then leave nothing."""
        in_flight = InFlight(self.process.options.address, self.metrics_port)
        self.process.stop(is_busy=in_flight.is_busy)

    def metrics(self) -> dict[str, float]:
        """Read the `specserve_` metrics, by name and labels as they are printed."""
        return read_metrics(self.metrics_port)


@contextlib.contextmanager
def serving(
    overrides: Sequence[str] = (), *, repository: Path = REPOSITORY, ready_timeout_s: float = 180.0
) -> Iterator[Served]:
    """Start a server with these `section.key=value` overrides; stop it on the way out."""
    installation = find_installation()
    if installation is None:
        raise RuntimeError("nvidia-pytriton is not installed: run `make serve` once")
    config = load_config(None, overrides)
    with tempfile.TemporaryDirectory(prefix="specserve-") as folder:
        path = Path(folder) / "specserve.toml"
        path.write_text(dump_config(config), encoding="utf-8")
        http_port, grpc_port, metrics_port = free_ports(3)
        options = TritonOptions(
            model_repository=repository,
            http_port=http_port,
            grpc_port=grpc_port,
            metrics_port=metrics_port,
            exit_timeout_s=5.0,
            env={CONFIG_ENV: str(path)},
        )
        with TritonProcess(options, Path(folder), installation) as process:
            process.wait_until_ready(ready_timeout_s)
            warm_up(options.address, http_port)
            served = Served(http_port, grpc_port, metrics_port, process, config)
            yield served
            served.stop()


def read_metrics(port: int) -> dict[str, float]:
    """Read the `specserve_` metrics of a server on this machine.

    Raises:
        OSError: if it does not answer.
    """
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    text = opener.open(f"http://127.0.0.1:{port}/metrics", timeout=10).read().decode()
    lines = [line.rsplit(" ", 1) for line in text.splitlines() if line.startswith("specserve_")]
    return {name: float(value) for name, value in lines}


def free_ports(count: int) -> list[int]:
    """Return ports of this machine that were free a moment ago."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
