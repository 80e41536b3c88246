"""One tritonserver: started, watched, drained, and removed without a trace.

Knows processes, ports and shared memory; knows no model by name and prints nothing.
"""

import contextlib
import ctypes
import http.client
import os
import secrets
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType

from specserve.launch.backend_dir import make_backend_dir
from specserve.launch.calls import client_host
from specserve.launch.environment import server_environment
from specserve.launch.installation import TritonInstallation
from specserve.launch.marked_processes import MarkedProcesses, command_line
from specserve.launch.server_log import ServerLog
from specserve.launch.triton_options import TritonOptions

POLL_S = 0.05
SETTLE_S = 3.0  # Triton looks once a second whether it may exit, and then tears down
SHARED_MEMORY = Path("/dev/shm")
_SERVER_ID = "SPECSERVE_SERVER_ID"
_INTERNAL_KEY = "SPECSERVE_INTERNAL_KEY"  # see python_backend/internal.py
_END_FILE = "SPECSERVE_END_FILE"  # once it exists, the orchestrator turns requests away
TURN_AWAY_S = 2.0
CONNECTIONS_S = 2.0  # idle ones, torn ones, and clients slow to read their last answer
_STUB = "triton_python_backend_stub"
_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None)


class TritonStartError(RuntimeError):
    """The server did not become ready; the text says why."""


class TritonProcess:
    """A server in a session of its own, so that a Ctrl-C in the terminal does not reach it.

    Use it as a context manager: entering starts the server, leaving stops it.

    NOTE: the server is told to stop when the thread that started it ends, so that it does not
    outlive a launcher that was killed. Start it in a thread that stays.
    """

    def __init__(
        self, options: TritonOptions, run_dir: Path, installation: TritonInstallation
    ) -> None:
        self.options = options
        self.run_dir = run_dir
        self.server_id = f"specserve-{secrets.token_hex(6)}-"
        self.log = ServerLog(run_dir / "tritonserver.log")
        self._end_file = run_dir / "end"
        self._installation = installation
        self._processes = MarkedProcesses(_SERVER_ID, self.server_id)
        self._process: subprocess.Popen[bytes] | None = None
        self._models: set[str] = set()  # those with a process, known once ready
        self._started_s = 0.0
        self._is_ready = False

    def start(self) -> None:
        """Start the server and return at once.

        Raises:
            OSError: if a file of the installation is missing or cannot be run.
        """
        assert self._process is None, "a TritonProcess starts once"
        backend_dir = make_backend_dir(self._installation, self.run_dir)
        extra = {
            **self.options.env,
            _SERVER_ID: self.server_id,
            _INTERNAL_KEY: secrets.token_urlsafe(),
            _END_FILE: str(self._end_file),
        }
        self._started_s = time.monotonic()
        with self.log.path.open("ab") as log:  # so that it can be cut while the server writes
            self._process = subprocess.Popen(
                self.options.command(self._installation, backend_dir, self.server_id),
                env=server_environment(self._installation, os.environ, extra),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=stop_with_parent,
            )

    def wait_until_ready(
        self, timeout_s: float, give_up: Callable[[], bool] = lambda: False
    ) -> float:
        """Wait until every model is loaded and requests are answered.

        Args:
            timeout_s: counted from now.
            give_up: asked often; True ends the waiting.

        Returns:
            Seconds from start to ready.

        Raises:
            TritonStartError: if the server ends, a model fails to load, or time runs out.
        """
        deadline = time.monotonic() + timeout_s
        while not self._answers_ready():
            if give_up():
                raise TritonStartError("stopped before it was ready")
            if self.poll() is not None or self.log.load_failures():
                raise TritonStartError(self.log.cause())
            if time.monotonic() > deadline:
                raise TritonStartError(f"not ready after {timeout_s:g} s\n{self.log.cause()}")
            time.sleep(POLL_S)
        self._is_ready = True
        self.close_shared_memory()
        self._models = self._running_models()
        return time.monotonic() - self._started_s

    def poll(self) -> int | None:
        """Return the server's exit status, negative for a signal, or None while it runs."""
        assert self._process is not None, "not started"
        return self._process.poll()

    def dead_models(self) -> list[str]:
        """Name the models that had a process when the server was ready and have none now.

        The server itself goes on, still calls itself ready, and starts no new one.
        """
        return sorted(self._models - self._running_models())

    def stop(
        self,
        hurry: Callable[[], bool] = lambda: False,
        is_busy: Callable[[], bool] | None = None,
    ) -> None:
        """Let requests in flight finish, then end every process and remove what they left.

        Does nothing more when called again. The log stays.

        Args:
            hurry: asked often; True ends the waiting for requests.
            is_busy: whether requests are in flight; models may call each other until it is False,
                and connections that are still open then are not waited for much longer. None does
                not know: any open connection may hold one.
        """
        deadline_s = time.monotonic() + self.options.exit_timeout_s
        if self._process is not None:
            if self._process.poll() is None:
                with self._models_callable():
                    self._process.send_signal(signal.SIGTERM)
                    if is_busy is not None:
                        self._wait_while(is_busy, hurry, deadline_s)
                        self._end_file.touch()  # nobody loses an answer without a word
                        self._wait_while(is_busy, hurry, time.monotonic() + TURN_AWAY_S)
                        deadline_s = min(deadline_s, time.monotonic() + CONNECTIONS_S)
                self._drain(self._process, hurry, deadline_s)
            self._processes.kill()
            self._process.wait()
        shutil.rmtree(self.run_dir / "backends", ignore_errors=True)
        self._end_file.unlink(missing_ok=True)
        for region in self.shared_memory():
            region.unlink(missing_ok=True)

    def pids(self) -> list[int]:
        """List the live processes of this server, its models included."""
        return self._processes.pids()

    def shared_memory(self) -> list[Path]:
        """List this server's shared memory regions."""
        return list(SHARED_MEMORY.glob(f"{self.server_id}*"))

    def close_shared_memory(self) -> None:
        """Keep other users from reading the regions, through which prompts pass.

        NOTE: the Python backend makes them readable for all, whatever the umask says.
        """
        for region in self.shared_memory():
            with contextlib.suppress(FileNotFoundError):
                region.chmod(0o600)

    def __enter__(self) -> "TritonProcess":
        try:
            self.start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()

    def _answers_ready(self) -> bool:
        # NOTE: http.client goes straight to the server; urllib would ask a configured proxy.
        host = client_host(self.options.address)
        connection = http.client.HTTPConnection(host, self.options.http_port, timeout=2.0)
        try:
            connection.request("GET", "/v2/health/ready")
            return connection.getresponse().status == http.HTTPStatus.OK
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()

    def model_pids(self) -> dict[str, int]:
        """Find each model's process: a stub called with <model>/<version>/model.py."""
        models = {pid: model_of(command_line(pid)) for pid in self._processes.pids()}
        return {model: pid for pid, model in models.items() if model is not None}

    def _running_models(self) -> set[str]:
        return set(self.model_pids())

    @contextlib.contextmanager
    def _models_callable(self) -> Iterator[None]:
        """Hold an HTTP connection, for which a stopping server waits before it stops anything else.

        Without it the server refuses calls between models at once, and with them the steps that
        gRPC streams in flight still need.
        """
        host = client_host(self.options.address)
        connection = http.client.HTTPConnection(host, self.options.http_port, timeout=2.0)
        try:
            if self._is_ready:
                with contextlib.suppress(OSError, http.client.HTTPException):
                    connection.request("GET", "/v2/health/live")
                    connection.getresponse().read()
            yield
        finally:
            connection.close()

    def _wait_while(
        self, is_busy: Callable[[], bool], hurry: Callable[[], bool], deadline_s: float
    ) -> None:
        while is_busy() and self.poll() is None and not hurry() and time.monotonic() < deadline_s:
            time.sleep(POLL_S)

    def _drain(
        self, process: "subprocess.Popen[bytes]", hurry: Callable[[], bool], deadline_s: float
    ) -> None:
        """Wait for the server to end; return early when waiting cannot help."""
        busy_s = time.monotonic()
        end_s = max(busy_s, deadline_s if self._is_ready else busy_s) + SETTLE_S
        while process.poll() is None and time.monotonic() < end_s and not hurry():
            # For a model whose process died the server waits until its timeout. The other models
            # end when the requests are done, and then there is nothing left to wait for.
            if len(self.dead_models()) < len(self._models):
                busy_s = time.monotonic()
            elif self._models and time.monotonic() - busy_s > SETTLE_S:
                return
            time.sleep(POLL_S)


def model_of(command: Sequence[str]) -> str | None:
    """Return the model that a command line runs, or None.

    NOTE: of a process that starts or ends at this moment there may be a part of it only.
    """
    if len(command) < 2 or Path(command[0]).name != _STUB:
        return None
    folders = Path(command[1]).parents
    return folders[1].name if len(folders) > 1 else None


def stop_with_parent() -> None:
    """Ask, in a child before it runs, for a SIGTERM when the thread that started it ends."""
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
