"""What a running server holds on to: memory, threads, descriptors and shared memory."""

import os
import re
from pathlib import Path
from typing import NamedTuple

SHARED_MEMORY = Path("/dev/shm")
_ANONYMOUS = re.compile(r"RssAnon:\s+(\d+) kB")


class Holdings(NamedTuple):
    """What one process holds.

    Attributes:
        memory_mib: resident and its own: files that are mapped do not count.
    """

    memory_mib: float
    num_threads: int
    num_descriptors: int


def holdings(pid: int) -> Holdings:
    """Look at one process.

    Raises:
        OSError: if it has gone.
    """
    folder = Path("/proc", str(pid))
    match = _ANONYMOUS.search((folder / "status").read_text())
    if match is None:
        raise ProcessLookupError(f"process {pid} has no memory any more")
    num_threads, num_descriptors = (len(os.listdir(folder / name)) for name in ("task", "fd"))
    return Holdings(int(match[1]) / 1024, num_threads, num_descriptors)


def shared_bytes(server_id: str) -> int:
    """Add up the shared memory regions of a server, see `TritonProcess.server_id`."""
    return sum(region.stat().st_size for region in SHARED_MEMORY.glob(f"{server_id}*"))
