"""Processes found by a variable in their environment: exactly those that one server started.

A process group would miss what moves to a session of its own, a walk over children what outlives
its parent. The environment is inherited by both.
"""

import contextlib
import os
import signal
import time
from pathlib import Path


class MarkedProcesses:
    """The live processes that were started with `name=value` in their environment."""

    def __init__(self, name: str, value: str) -> None:
        self._entry = f"{name}={value}".encode()

    def pids(self) -> list[int]:
        """List them now; a zombie has no environment left and is not listed."""
        entries = [int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit()]
        return [pid for pid in entries if self.holds(pid)]

    def holds(self, pid: int) -> bool:
        """Say whether `pid` lives and is ours; false for a number that was given to another."""
        return self._entry in _read(pid, "environ").split(b"\0")

    def kill(self, timeout_s: float = 5.0) -> list[int]:
        """Kill all of them, also those that appear meanwhile.

        Returns:
            The process ids that were left after `timeout_s`, normally none.
        """
        deadline = time.monotonic() + timeout_s
        while (pids := self.pids()) and time.monotonic() < deadline:
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.02)
        return pids


def command_line(pid: int) -> list[str]:
    """Return the arguments of a process, none if it is gone."""
    return [part.decode(errors="replace") for part in _read(pid, "cmdline").split(b"\0")[:-1]]


def _read(pid: int, name: str) -> bytes:
    try:
        return Path(f"/proc/{pid}/{name}").read_bytes()
    except OSError:  # it is gone, or it belongs to another user
        return b""
