"""`specserve serve`: check, start, say how to call it, wait, stop.

Owns the conversation with the person at the terminal. The policy is in the file named by
`config_path`, which the models read; nothing of it is known here.
"""

import contextlib
import shutil
import signal
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from specserve.launch.calls import example_calls
from specserve.launch.in_flight import InFlight
from specserve.launch.installation import TritonInstallation, find_installation
from specserve.launch.prerequisites import find_problems
from specserve.launch.stop_signal import StopSignal
from specserve.launch.triton_options import TritonOptions
from specserve.launch.triton_process import TritonProcess, TritonStartError
from specserve.launch.warm_up import MODEL, warm_up

CONFIG_VARIABLE = "SPECSERVE_CONFIG"
WATCH_S = 0.5


@dataclass(frozen=True, slots=True)
class ServeOptions:
    """What the command line says.

    Attributes:
        config_path: the resolved configuration, handed to the models in SPECSERVE_CONFIG.
        engine_dir: only checked here; the models find it in the configuration.
        drain_timeout_s: how long requests in flight and idle HTTP connections may hold up the end.
        optional_models: the server goes on without these if their process dies.
    """

    model_repository: Path
    engine_dir: Path
    config_path: Path | None = None
    http_port: int = 8000
    grpc_port: int = 8001
    metrics_port: int = 8002
    address: str = "127.0.0.1"
    ready_timeout_s: float = 120.0
    drain_timeout_s: float = 30.0
    log_verbose: int = 0
    optional_models: tuple[str, ...] = ("draft",)


def serve(options: ServeOptions) -> int:
    """Serve until SIGINT or SIGTERM and return the exit status: 0 if asked to stop, 1 otherwise.

    Leaves no process and no shared memory. The log stays if something went wrong.
    """
    ports = {
        "http": options.http_port,
        "grpc": options.grpc_port,
        "metrics": options.metrics_port,
    }
    problems = find_problems(options.address, ports, options.model_repository, options.engine_dir)
    installation = find_installation()
    if problems or installation is None:
        _say_error("cannot serve:", *(f"- {problem}" for problem in problems))
        return 1
    run_dir = Path(tempfile.mkdtemp(prefix="specserve-"))
    status = 1
    try:
        status = _run(options, run_dir, installation)
    finally:
        if status == 0:
            shutil.rmtree(run_dir, ignore_errors=True)
    return status


def _run(options: ServeOptions, run_dir: Path, installation: TritonInstallation) -> int:
    triton = TritonProcess(_triton_options(options), run_dir, installation)
    with StopSignal() as stop:
        failure: str | None = None
        try:
            failure = _start_and_watch(options, triton, stop)
            if failure:
                _say_error(failure, f"The log is kept: {triton.log.path}")
            else:
                _say(_farewell(options))
        finally:
            triton.stop(
                hurry=lambda: stop.insistent if failure is None else stop.requested,
                is_busy=InFlight(options.address, options.metrics_port).is_busy,
            )
    if failure:
        return 1
    _say("Stopped.")
    return 0


def _start_and_watch(options: ServeOptions, triton: TritonProcess, stop: StopSignal) -> str | None:
    """Serve until asked to stop and return None, or return what failed before that."""
    triton.start()
    _say(f"Starting Triton; log: {triton.log.path}")
    try:
        time_s = triton.wait_until_ready(options.ready_timeout_s, lambda: stop.requested)
    except TritonStartError as error:
        return None if stop.requested else f"Triton did not start: {error}"
    _say(f"Triton is up after {time_s:.1f} s; the engines are measured once, if they are new ...")
    try:
        if (options.model_repository / MODEL).is_dir():
            warm_up(options.address, options.http_port)
    except RuntimeError as error:
        return None if stop.requested else f"{error}; {triton.log.cause()}"
    _say(_welcome(options))
    return _watch(options, triton, stop)


def _watch(options: ServeOptions, triton: TritonProcess, stop: StopSignal) -> str | None:
    """Wait for a request to stop and return None, or return what died before that."""
    reported: set[str] = set()
    while not stop.wait(WATCH_S):
        status = triton.poll()
        if status is not None:
            return f"tritonserver {_ending(status)}; {triton.log.cause()}"
        for model in set(triton.dead_models()) - reported:
            if model not in options.optional_models:
                return f"the process of model {model!r} died; {triton.log.cause()}"
            _say_error(f"the process of model {model!r} died; serving goes on without it")
            reported.add(model)
    return None


def _ending(status: int) -> str:
    if status < 0:
        return f"was ended by {signal.Signals(-status).name}"
    return f"ended by itself with status {status}"


def _triton_options(options: ServeOptions) -> TritonOptions:
    config = options.config_path
    return TritonOptions(
        model_repository=options.model_repository.resolve(),
        http_port=options.http_port,
        grpc_port=options.grpc_port,
        metrics_port=options.metrics_port,
        address=options.address,
        exit_timeout_s=options.drain_timeout_s,
        log_verbose=options.log_verbose,
        env={} if config is None else {CONFIG_VARIABLE: str(config.resolve())},
    )


def _welcome(options: ServeOptions) -> str:
    calls = example_calls(options.address, options.http_port, options.grpc_port)
    return f"Ready. Try it from another terminal:\n\n{calls}\nCtrl-C stops it."


def _farewell(options: ServeOptions) -> str:
    # Triton takes an idle keep-alive connection for one that a request may still come from.
    return (
        f"Stopping: up to {options.drain_timeout_s:g} s for requests in flight and open HTTP "
        "connections (Ctrl-C again: at once) ..."
    )


def _say(*lines: str, file: TextIO | None = None) -> None:
    with contextlib.suppress(OSError):  # a reader that left must not keep us from stopping
        print(*lines, sep="\n", file=file, flush=True)


def _say_error(*lines: str) -> None:
    _say(*lines, file=sys.stderr)
