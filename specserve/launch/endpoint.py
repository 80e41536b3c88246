"""The OpenAI endpoint's process beside the server: started, started again if it dies, stopped.

It lives as long as the launcher, also while Triton is away: its clients are then told to try again.
"""

import contextlib
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from specserve.config import OpenAIConfig
from specserve.launch.calls import client_host
from specserve.launch.triton_process import stop_with_parent

POLL_S = 0.05
READY_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 5.0
MIN_WAIT_S, MAX_WAIT_S = 1.0, 30.0


@dataclass(frozen=True, slots=True)
class EndpointOptions:
    """Where the endpoint listens, and what a client must know to call it."""

    port: int
    model: str
    has_tls: bool = False
    has_keys: bool = False

    @classmethod
    def of(cls, config: OpenAIConfig, port: int) -> "EndpointOptions":
        """Read them from the configuration that the endpoint itself will read."""
        has_tls, has_keys = bool(config.tls_cert_file), bool(config.api_key_file)
        return cls(port, config.model_name, has_tls, has_keys)


class Endpoint:
    """The endpoint's process, in a session of its own; a context manager.

    Args:
        arguments: of `specserve openai`, its port and address apart.
        log_path: gets what it prints.
        say: called with a line for the person at the terminal.
    """

    def __init__(
        self,
        options: EndpointOptions,
        address: str,
        arguments: Sequence[str],
        log_path: Path,
        say: Callable[[str], None],
    ) -> None:
        self._options = options
        self._address = address
        self._arguments = arguments
        self._log_path = log_path
        self._say = say
        self._has_answered = False
        self._failure: str | None = None
        self._is_stopping = threading.Event()
        # The process ends with the thread that started it, which stays as long as we do.
        self._thread = threading.Thread(target=self._supervise, name="openai", daemon=True)

    def wait_until_ready(self, give_up: Callable[[], bool] = lambda: False) -> str | None:
        """Wait until it answers and return None, or return why it will not."""
        deadline = time.monotonic() + READY_TIMEOUT_S
        while not give_up() and self._failure is None and time.monotonic() < deadline:
            if self._answers():
                self._has_answered = True
                return None
            time.sleep(POLL_S)
        return self._failure or f"the OpenAI endpoint did not start; its log: {self._log_path}"

    def __enter__(self) -> "Endpoint":
        self._thread.start()
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._is_stopping.set()
        self._thread.join()

    def _supervise(self) -> None:
        wait_s = MIN_WAIT_S
        while not self._is_stopping.is_set():
            started_s = time.monotonic()
            status = self._run()
            if self._is_stopping.is_set():
                return
            if not self._has_answered:  # nor will it when started again
                self._failure = self._last_words()
                return
            if time.monotonic() - started_s > MAX_WAIT_S:
                wait_s = MIN_WAIT_S
            self._say(f"the OpenAI endpoint ended with status {status}; again in {wait_s:g} s")
            self._is_stopping.wait(wait_s)
            wait_s = min(2 * wait_s, MAX_WAIT_S)

    def _run(self) -> int:
        """Run it once, until it ends or is to stop; return its exit status."""
        with self._log_path.open("ab") as log:
            process = subprocess.Popen(
                self._command(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=stop_with_parent,
            )
        while process.poll() is None and not self._is_stopping.wait(POLL_S):
            pass
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(STOP_TIMEOUT_S)
            process.kill()
        return process.wait()

    def _command(self) -> list[str]:
        where = ["--port", str(self._options.port), "--address", self._address]
        run = "from specserve.cli import app; app()"
        return [sys.executable, "-c", run, "openai", *where, *self._arguments]

    def _answers(self) -> bool:
        where = (client_host(self._address), self._options.port)
        try:
            socket.create_connection(where, timeout=1.0).close()
        except OSError:
            return False
        return True

    def _last_words(self) -> str:
        lines = self._log_path.read_text(encoding="utf-8", errors="replace").splitlines()
        return next((line for line in reversed(lines) if line), "the OpenAI endpoint did not start")
