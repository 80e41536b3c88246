"""Faults of a running server, one after the other: processes killed and stopped, by chance."""

import asyncio
import contextlib
import os
import random
import signal
import time
from collections import Counter
from dataclasses import dataclass, field

from bench.supervised import READY, Supervised

BACK_S = 120.0
POLL_S = 0.2
# The launcher must start everything anew after these; each comes once.
SERVER_FAULTS = (
    ("openai", signal.SIGKILL),
    ("specserve", signal.SIGKILL),
    ("tritonserver", signal.SIGABRT),
)
# The server repairs these by itself.
MODEL_FAULTS = tuple(
    (model, number) for model in ("draft", "target") for number in (signal.SIGKILL, signal.SIGSTOP)
)


@dataclass(slots=True)
class FaultInjector:
    """Breaks a server and waits until it has repaired itself.

    Attributes:
        done: how often each fault happened, named like `draft SIGKILL`.
        longest_s: how long the longest repair of each took, from fault to another process.
        failures: what was not repaired in time.
    """

    server: Supervised
    seed: int
    done: Counter[str] = field(default_factory=Counter)
    longest_s: dict[str, float] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)

    async def run(self, seconds: float, mean_pause_s: float) -> None:
        """Break the whole server in the first quarter of the time, then only models in it."""
        loop, rng = asyncio.get_running_loop(), random.Random(self.seed)
        start_s = loop.time()
        for number, fault in enumerate(SERVER_FAULTS, start=1):
            await asyncio.sleep(start_s + 0.06 * number * seconds - loop.time())
            await self._inject(*fault)
        while True:
            await asyncio.sleep(mean_pause_s * rng.uniform(0.5, 1.5))
            if loop.time() - start_s + mean_pause_s > seconds:
                return
            await self._inject(*rng.choice(MODEL_FAULTS))

    async def _inject(self, name: str, number: signal.Signals) -> None:
        fault = f"{name} {number.name}"
        pid = await self._wait_for(name)
        if pid is None:
            self.failures.append(f"{fault}: {name} had no process for {BACK_S:g} s before it")
            return
        starts = self.server.shown().count(READY)
        self.done[fault] += 1
        with contextlib.suppress(ProcessLookupError):  # it went by itself: the wait tells
            os.kill(pid, number)
        broken_s = time.monotonic()
        needs_start = name in ("specserve", "tritonserver")
        while time.monotonic() - broken_s < BACK_S:
            await asyncio.sleep(POLL_S)
            is_other = await self._pid(name) not in (None, pid)
            if is_other and (not needs_start or self.server.shown().count(READY) > starts):
                time_s = time.monotonic() - broken_s
                self.longest_s[fault] = max(time_s, self.longest_s.get(fault, 0.0))
                return
        self.failures.append(f"{fault}: not back after {BACK_S:g} s")

    async def _wait_for(self, name: str) -> int | None:
        """Return the process of a name, which the server may be starting just now."""
        deadline_s = time.monotonic() + BACK_S
        while (pid := await self._pid(name)) is None and time.monotonic() < deadline_s:
            await asyncio.sleep(POLL_S)
        return pid

    async def _pid(self, name: str) -> int | None:
        try:
            return (await asyncio.to_thread(self.server.pids)).get(name)
        except (OSError, IndexError):  # it changes while it is read
            return None
