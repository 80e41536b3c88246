"""The processes of the other models of this server, found by their command lines."""

import contextlib
import os
import signal
from pathlib import Path

from specserve.launch.marked_processes import command_line


def find(model: str) -> int | None:
    """Return the id of the process that runs `model`, or None; one that has ended is not found."""
    pids = (int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit())
    return next((pid for pid in pids if runs(pid, model)), None)


def runs(pid: int, model: str) -> bool:
    """Say whether `pid` lives, is a process of this server, and runs `model`.

    A stub is called with <repository>/<model>/<version>/model.py, by the server that started us.
    """
    arguments = command_line(pid)
    if len(arguments) < 2 or Path(arguments[1]).parts[-3::2] != (model, "model.py"):
        return False
    return _parent(pid) == os.getppid()


def kill(model: str) -> None:
    """End the process that runs `model`, if there is one; it may be stopped or hang."""
    pid = find(model)
    if pid is not None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def _parent(pid: int) -> int | None:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    return int(stat.rpartition(")")[2].split()[1])  # the name before it may hold anything
