"""Be `mpirun -n N --allow-run-as-root COMMAND`: start the ranks, fail if one does."""

from __future__ import annotations

import os
import subprocess
import sys

from trtllm_toolchain.record import record

record("mpirun", sys.argv[1:])
flag, number, as_root, *command = sys.argv[1:]
assert (flag, as_root) == ("-n", "--allow-run-as-root"), sys.argv
ranks = [
    subprocess.Popen(command, env={**os.environ, "STAND_IN_RANK": str(rank)})
    for rank in range(int(number))
]
sys.exit(max(rank.wait() for rank in ranks))
