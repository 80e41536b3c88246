"""Who else is on the device: tells this server's processes from others by their ancestry."""

import os
from collections.abc import Iterable, Sequence
from pathlib import Path


def others_utilization(holders: Iterable[int], shares: Sequence[tuple[int, float]]) -> float:
    """Return the share of the device's time that processes of others take, in [0, 1].

    Args:
        holders: ids of all processes with a context on the device.
        shares: (process id, share of the time its kernels ran); several of one process are
            averaged, as they are of different moments.

    Returns:
        0 if none of the holders is one of ours: then the driver counts in another namespace than
        we do, as it does in some containers, and an id says nothing.
    """
    if not any(map(is_ours, holders)):
        return 0.0
    by_process: dict[int, list[float]] = {}
    for pid, share in shares:
        by_process.setdefault(pid, []).append(share)
    taken = sum(sum(s) / len(s) for pid, s in by_process.items() if not is_ours(pid))
    return min(1.0, taken)


def is_ours(pid: int) -> bool:
    """Whether a process belongs to this server: it or an ancestor is in our session.

    Triton's model processes share the session of the server that started them; workers that an
    engine starts through MPI may have one of their own.
    """
    session = os.getsid(0)
    while pid > 0:
        try:
            if os.getsid(pid) == session:
                return True
            pid = _parent(pid)
        except (OSError, ValueError):
            return False
    return False


def _parent(pid: int) -> int:
    stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    return int(stat.rpartition(")")[2].split()[1])
