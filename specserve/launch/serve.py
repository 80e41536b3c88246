"""`specserve serve`: check, start, say how to call it, wait, stop.

Owns the conversation with the person at the terminal. The policy is in the file named by
`config_path`, which the models read; nothing of it is known here.
"""

import contextlib
import secrets
import shutil
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO

from specserve.launch.backoff import Backoff
from specserve.launch.calls import client_host, example_calls, openai_call
from specserve.launch.endpoint import Endpoint, EndpointOptions
from specserve.launch.in_flight import InFlight
from specserve.launch.installation import TritonInstallation, find_installation
from specserve.launch.log_tail import LogTail
from specserve.launch.prerequisites import find_problems
from specserve.launch.stop_signal import StopSignal
from specserve.launch.triton_options import TritonOptions
from specserve.launch.triton_process import TritonProcess, TritonStartError
from specserve.launch.warm_up import MODEL, warm_up
from specserve.launch.watch import Watch

CONFIG_VARIABLE = "SPECSERVE_CONFIG"
WATCH_S = 0.5


@dataclass(frozen=True, slots=True)
class ServeOptions:
    """What the command line says.

    Attributes:
        config_path: the resolved configuration, handed to the models in SPECSERVE_CONFIG.
        engine_dir: only checked here; the models find it in the configuration.
        openai: the OpenAI endpoint beside the server; None starts none.
        drain_timeout_s: how long requests in flight may hold up the end; with a repository of other
            models, open HTTP connections as well.
        shows_log: move the server's log to standard error, as containers want it.
        reloaded_models: the server loads these again by itself if their process dies.
        reload_timeout_s: how long that may take before everything is started anew.
        max_restarts: failures in a row after which the server is not started again.
        admin_key: opens the APIs that change the server to who sends it; "" is for everybody.
    """

    model_repository: Path
    engine_dir: Path
    config_path: Path | None = None
    http_port: int = 8000
    grpc_port: int = 8001
    metrics_port: int = 8002
    address: str = "127.0.0.1"
    openai: EndpointOptions | None = None
    ready_timeout_s: float = 120.0
    drain_timeout_s: float = 30.0
    log_verbose: int = 0
    shows_log: bool = False
    reloaded_models: tuple[str, ...] = ("draft", "target")
    reload_timeout_s: float = 300.0
    max_restarts: int = 8
    admin_key: str = field(default_factory=secrets.token_urlsafe, repr=False)


def serve(options: ServeOptions) -> int:
    """Serve until SIGINT or SIGTERM and return the exit status: 0 if asked to stop, 1 otherwise.

    Leaves no process and no shared memory. The log stays if something went wrong.
    """
    ports = {
        "http": options.http_port,
        "grpc": options.grpc_port,
        "metrics": options.metrics_port,
        **({"openai": options.openai.port} if options.openai else {}),
    }
    problems = find_problems(options.address, ports, options.model_repository, options.engine_dir)
    installation = find_installation()
    if problems or installation is None:
        _say_error("cannot serve:", *(f"- {problem}" for problem in problems))
        return 1
    run_dir = Path(tempfile.mkdtemp(prefix="specserve-"))
    status = 1
    try:
        with _endpoint(options, run_dir) as endpoint:
            status = _run(options, run_dir, installation, endpoint)
    finally:
        if status == 0:
            shutil.rmtree(run_dir, ignore_errors=True)
    return status


def _endpoint(
    options: ServeOptions, run_dir: Path
) -> contextlib.AbstractContextManager[Endpoint | None]:
    if options.openai is None:
        return contextlib.nullcontext()
    triton = {
        "triton": client_host(options.address),
        "grpc-port": options.grpc_port,
        "metrics-port": options.metrics_port,
        "drain-timeout-s": options.drain_timeout_s,
        **({} if options.config_path is None else {"config": options.config_path.resolve()}),
    }
    arguments = [f"--{name}={value}" for name, value in triton.items()]
    return Endpoint(options.openai, options.address, arguments, run_dir / "openai.log", _say_error)


def _run(
    options: ServeOptions,
    run_dir: Path,
    installation: TritonInstallation,
    endpoint: Endpoint | None,
) -> int:
    backoff = Backoff(options.max_restarts)
    with StopSignal() as stop:
        while not stop.requested:
            start_dir = run_dir / str(backoff.num_restarts)
            start_dir.mkdir()
            triton = TritonProcess(_triton_options(options), start_dir, installation)
            with _tail(options, triton):
                failure = _serve_once(options, triton, stop, backoff, endpoint)
            if failure is None:
                break
            _say_error(failure, f"The log is kept: {triton.log.path}")
            wait_s = backoff.next_wait_s() if backoff.has_started else None
            if wait_s is None:
                return 1
            _say_error(f"Restart {backoff.num_restarts} of the server in {wait_s:g} s ...")
            stop.wait(wait_s)
    _say("Stopped.")
    return 0


def _tail(options: ServeOptions, triton: TritonProcess) -> contextlib.AbstractContextManager[None]:
    if options.shows_log:
        return LogTail(triton.log.path, sys.stderr)
    return contextlib.nullcontext()


def _serve_once(
    options: ServeOptions,
    triton: TritonProcess,
    stop: StopSignal,
    backoff: Backoff,
    endpoint: Endpoint | None,
) -> str | None:
    """Start a server and serve until asked to stop; return None then, else what failed."""
    is_failed = True
    try:
        failure = _start_and_watch(options, triton, stop, backoff, endpoint)
        is_failed = failure is not None
        if not is_failed:
            _say(_farewell(options))
        return failure
    finally:
        in_flight = InFlight(options.address, options.metrics_port)
        triton.stop(
            hurry=lambda: stop.insistent or is_failed,  # what is in flight cannot end any more
            is_busy=in_flight.is_busy if _is_ours(options) else None,
        )


def _start_and_watch(
    options: ServeOptions,
    triton: TritonProcess,
    stop: StopSignal,
    backoff: Backoff,
    endpoint: Endpoint | None,
) -> str | None:
    triton.start()
    _say(f"Starting Triton; log: {triton.log.path}")
    try:
        time_s = triton.wait_until_ready(options.ready_timeout_s, lambda: stop.requested)
    except TritonStartError as error:
        return None if stop.requested else f"Triton did not start: {error}"
    _say(f"Triton is up after {time_s:.1f} s; the engines are measured once, if they are new ...")
    is_ours = _is_ours(options)
    try:
        if is_ours:
            warm_up(options.address, options.http_port)
    except RuntimeError as error:
        return None if stop.requested else f"{error}; {triton.log.cause()}"
    failure = endpoint.wait_until_ready(lambda: stop.requested) if endpoint else None
    if failure:
        return None if stop.requested else failure
    backoff.started()
    _say(_welcome(options))
    watch = Watch(
        triton,
        probed_model=MODEL if is_ours else None,
        reloaded=options.reloaded_models,
        reload_timeout_s=options.reload_timeout_s,
        say=_say_error,
    )
    return _watch(watch, triton, stop)


def _watch(watch: Watch, triton: TritonProcess, stop: StopSignal) -> str | None:
    """Wait for a request to stop and return None, or return what failed before that."""
    while not stop.wait(WATCH_S):
        failure = watch.failure()
        if failure is not None:
            return f"{failure}; {triton.log.cause()}"
    return None


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
        admin_key=options.admin_key,
        env={} if config is None else {CONFIG_VARIABLE: str(config.resolve())},
    )


def _welcome(options: ServeOptions) -> str:
    calls = example_calls(options.address, options.http_port, options.grpc_port)
    if (openai := options.openai) is not None:
        has = {"has_tls": openai.has_tls, "has_keys": openai.has_keys}
        calls += "\n" + openai_call(options.address, openai.port, openai.model, **has)
    return f"Ready. Try it from another terminal:\n\n{calls}\nCtrl-C stops it."


def _is_ours(options: ServeOptions) -> bool:
    return (options.model_repository / MODEL).is_dir()


def _farewell(options: ServeOptions) -> str:
    return (
        f"Stopping: up to {options.drain_timeout_s:g} s for requests in flight "
        "(Ctrl-C again: at once) ..."
    )


def _say(*lines: str, file: TextIO | None = None) -> None:
    with contextlib.suppress(OSError):  # a reader that left must not keep us from stopping
        print(*lines, sep="\n", file=file, flush=True)


def _say_error(*lines: str) -> None:
    _say(*lines, file=sys.stderr)
