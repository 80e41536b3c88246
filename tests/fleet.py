"""Several `specserve serve` behind the balancer that docker/ ships, and clients that keep count."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import yaml
from server_client import raw_request, wait_until
from tritonclient.grpc import service_pb2_grpc

ROOT = Path(__file__).resolve().parent.parent
ENVOY_CONFIG = ROOT / "docker" / "helm" / "specserve" / "files" / "envoy.yaml"
SPECSERVE = str(Path(sys.executable).parent / "specserve")
LOOPBACK = "127.0.0.1"
DNS_FIELDS = ("dns_lookup_family", "dns_refresh_rate", "respect_dns_ttl")
START_S = 120.0
CALL_S = 60.0


@dataclass(slots=True)
class Replica:
    """One `specserve serve`, a process group of its own."""

    http_port: int
    grpc_port: int
    metrics_port: int
    launcher: subprocess.Popen[bytes]

    @property
    def is_ready(self) -> bool:
        """Whether it has answered its own warm-up request."""
        return self.metric("specserve_output_tokens_total") > 0

    def metric(self, name: str) -> float:
        """Return one value of its metrics, 0 if it does not answer."""
        try:
            text = get(self.metrics_port, "/metrics")[1]
        except OSError:
            return 0.0
        found = [line for line in text.splitlines() if line.startswith(f"{name} ")]
        return float(found[0].split()[1]) if found else 0.0

    def drain(self) -> None:
        """Ask it to stop when its requests are done, as an orchestrator of containers does."""
        self.launcher.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """End the server at once, as a crash would; the launcher sees to what is left."""
        task = Path(f"/proc/{self.launcher.pid}/task/{self.launcher.pid}/children")
        os.kill(int(task.read_text().split()[0]), signal.SIGKILL)

    def stop(self) -> None:
        """End it, whatever it is doing."""
        for _ in range(2):  # the second one cuts the drain short
            self.launcher.send_signal(signal.SIGTERM)
            time.sleep(0.2)
        try:
            self.launcher.wait(20)
        except subprocess.TimeoutExpired:
            self.launcher.kill()
            self.launcher.wait()


@contextlib.contextmanager
def replicas(count: int, folder: Path, overrides: Sequence[str]) -> Iterator[list[Replica]]:
    """Start servers and wait until each has answered a request."""
    with contextlib.ExitStack() as stack:
        started = []
        for i, ports in enumerate(zip(*[iter(free_ports(3 * count))] * 3, strict=True)):
            names = ("--http-port", "--grpc-port", "--metrics-port")
            options = [str(word) for pair in zip(names, ports, strict=True) for word in pair]
            options += [f"--set={override}" for override in overrides]
            log = stack.enter_context((folder / f"replica{i}.log").open("wb"))
            launcher = subprocess.Popen(
                [SPECSERVE, "serve", "--show-log", "--openai-port", "0", *options],
                stdout=log,
                stderr=subprocess.STDOUT,
            )
            started.append(Replica(*ports, launcher))
            stack.callback(started[-1].stop)
        wait_until(lambda: all(one.is_ready for one in started), "replicas start", START_S)
        yield started


@dataclass(frozen=True, slots=True)
class Balancer:
    """A running Envoy."""

    port: int
    admin_port: int

    def num_healthy(self) -> int:
        """Return how many replicas both clusters send requests to."""
        try:
            return min(self._stats("membership_healthy"), default=0)
        except OSError:
            return 0

    def num_retries(self) -> int:
        """Return how many requests were sent to a second replica."""
        return sum(self._stats("upstream_rq_retry"))

    def _stats(self, name: str) -> list[int]:
        text = get(self.admin_port, f"/stats?filter=^cluster.*{name}$")[1]
        return [int(line.split()[1]) for line in text.splitlines()]


@contextlib.contextmanager
def balancer(envoy: str, servers: Sequence[Replica], folder: Path) -> Iterator[Balancer]:
    """Run the shipped configuration; of it only addresses and ports are changed."""
    front = Balancer(*free_ports(2))
    path = folder / "envoy.json"
    path.write_text(json.dumps(local_config(servers, front)), encoding="utf-8")
    command = [envoy, "-c", str(path), "--log-level", "warning", "--concurrency", "1"]
    with (folder / "envoy.log").open("wb") as log:
        process = subprocess.Popen(
            [*command, "--disable-hot-restart"], stdout=log, stderr=subprocess.STDOUT
        )
    try:
        wait_until(
            lambda: process.poll() is not None or front.num_healthy() == len(servers),
            "all replicas are healthy",
            30,
        )
        assert process.poll() is None, (folder / "envoy.log").read_text()
        yield front
    finally:
        process.terminate()
        process.wait(20)


def local_config(servers: Sequence[Replica], front: Balancer) -> dict[str, Any]:
    """Put ports of this machine in the place of the addresses of containers."""
    config: dict[str, Any] = yaml.safe_load(ENVOY_CONFIG.read_text(encoding="utf-8"))
    config["admin"]["address"]["socket_address"]["port_value"] = front.admin_port
    (listener,) = config["static_resources"]["listeners"]
    listener["address"]["socket_address"] = {"address": LOOPBACK, "port_value": front.port}
    for cluster in config["static_resources"]["clusters"]:
        cluster["type"] = "STATIC"
        for name in DNS_FIELDS:
            del cluster[name]
        (locality,) = cluster["load_assignment"]["endpoints"]
        (template,) = locality["lb_endpoints"]
        locality["lb_endpoints"] = [endpoint_of(template, server) for server in servers]
    return config


def endpoint_of(template: dict[str, Any], server: Replica) -> dict[str, Any]:
    """Map the ports inside a container to those of a replica."""
    ports = {8000: server.http_port, 8001: server.grpc_port}
    endpoint = template["endpoint"]
    port = endpoint["address"]["socket_address"]["port_value"]
    found = {"address": {"socket_address": {"address": LOOPBACK, "port_value": ports[port]}}}
    if "health_check_config" in endpoint:
        port = endpoint["health_check_config"]["port_value"]
        found["health_check_config"] = {"port_value": ports[port]}
    return {"endpoint": found}


# -- clients -----------------------------------------------------------------------------------


@dataclass(slots=True)
class Call:
    """One streamed request: what came of it, and how it ended."""

    prompt: str
    pieces: list[str] = field(default_factory=list)
    error: str | None = None

    @property
    def text(self) -> str:
        """What was streamed."""
        return "".join(self.pieces)


def call_grpc(port: int, prompt: str, max_tokens: int, *, stays_open: bool) -> Call:
    """Stream over gRPC.

    Args:
        stays_open: close the request's side only after the last answer, as tritonclient does.
    """
    call = Call(prompt)
    is_answered = threading.Event()

    def requests() -> Iterator[Any]:
        tensors = {"text_input": prompt, "max_tokens": max_tokens, "stream": True}
        yield raw_request("ensemble", tensors)
        if stays_open:
            is_answered.wait(CALL_S)

    try:
        with grpc.insecure_channel(f"{LOOPBACK}:{port}") as channel:
            stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
            for message in stub.ModelStreamInfer(requests(), timeout=CALL_S):
                call.error = message.error_message or call.error
                for output, data in zip(
                    message.infer_response.outputs,
                    message.infer_response.raw_output_contents,
                    strict=True,
                ):
                    if output.name == "text_output":
                        call.pieces.append(data[4:].decode())
                if message.infer_response.parameters["triton_final_response"].bool_param:
                    is_answered.set()
    except grpc.RpcError as error:
        call.error = str(error.code())
    finally:
        is_answered.set()
    return call


def call_http(port: int, prompt: str, max_tokens: int) -> Call:
    """Stream over HTTP."""
    call = Call(prompt)
    body = {"text_input": prompt, "max_tokens": max_tokens, "stream": True}
    stream = b""
    connection = http.client.HTTPConnection(LOOPBACK, port, timeout=CALL_S)
    try:
        connection.request("POST", "/v2/models/ensemble/generate_stream", json.dumps(body))
        response = connection.getresponse()
        if response.status != http.HTTPStatus.OK:
            call.error = f"{response.status} {response.read()!r}"
        while data := response.read1():  # unlike reading by lines, it raises if the stream was cut
            stream += data
    except (OSError, http.client.HTTPException) as error:
        call.error = repr(error)
    finally:
        connection.close()
    for line in stream.splitlines():
        if line.startswith(b"data: "):
            event = json.loads(line.removeprefix(b"data: "))
            call.error = event.get("error", call.error)
            call.pieces.append(event.get("text_output", ""))
    return call


class Load:
    """Clients that call again and again, each with prompts in turn, until told to stop."""

    def __init__(self, port: int, prompts: Sequence[str], max_tokens: int, num_clients: int):
        self._prompts = prompts
        self._done: queue.SimpleQueue[Call] = queue.SimpleQueue()
        self._is_over = threading.Event()
        ways = [
            lambda prompt: call_grpc(port, prompt, max_tokens, stays_open=False),
            lambda prompt: call_grpc(port, prompt, max_tokens, stays_open=True),
            lambda prompt: call_http(port, prompt, max_tokens),
        ]
        self._threads = [
            threading.Thread(target=self._run, args=(i, ways[i % len(ways)]), daemon=True)
            for i in range(num_clients)
        ]

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        for thread in self._threads:
            thread.join()

    def num_done(self) -> int:
        """Return how many calls have ended."""
        return self._done.qsize()

    def calls(self) -> list[Call]:
        """Return every call that has ended."""
        return [self._done.get() for _ in range(self._done.qsize())]

    def _run(self, index: int, way: Any) -> None:
        while not self._is_over.is_set():
            self._done.put(way(self._prompts[index % len(self._prompts)]))
            index += 1


# -- small things ------------------------------------------------------------------------------


def get(port: int, path: str, method: str = "GET", body: str | None = None) -> tuple[int, str]:
    """Ask over HTTP; return status and text.

    Raises:
        OSError: nobody answers.
    """
    connection = http.client.HTTPConnection(LOOPBACK, port, timeout=5.0)
    try:
        connection.request(method, path, body)
        response = connection.getresponse()
        return response.status, response.read().decode(errors="replace")
    except http.client.HTTPException as error:
        raise OSError(str(error)) from error
    finally:
        connection.close()


def free_ports(count: int) -> list[int]:
    """Find ports of this machine that were free a moment ago."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind((LOOPBACK, 0))
        return [one.getsockname()[1] for one in sockets]
