"""What the soak makes of what it saw, and faults that something repairs, or does not."""

from __future__ import annotations

import asyncio
import signal
import subprocess
from collections.abc import Iterator

import pytest

from bench import fault_injection
from bench.crowd import Tally
from bench.fault_injection import FaultInjector
from bench.holdings import Holdings
from bench.soak import LIMITS, Sample, find_problems, growth_of, without_kept
from bench.supervised import READY

WELL = Tally()
WELL.outcomes["finished"] = 3


# -- the verdict -------------------------------------------------------------------------------


def test_growth_is_late_median_less_early_median() -> None:
    start, settled, outlier = Holdings(10, 5, 5), Holdings(20, 6, 7), Holdings(900, 90, 90)
    life = [start] * 4 + [settled, settled, outlier, settled] + [settled] * 4
    assert growth_of([*life, *[Holdings(23, 6, 8)] * 4]) == Holdings(3, 0, 1)
    assert growth_of([*life, *[settled] * 3, outlier]) == Holdings(0, 0, 0)


def test_what_tritonserver_keeps_of_broken_models_is_no_growth() -> None:
    held = [Holdings(9.0 + 0.7 * n, 237 + 35 * n, 80 + n) for n in range(3)]
    assert {without_kept(Sample(float(n), one, n)) for n, one in enumerate(held)} == {held[0]}


def test_a_good_soak_has_no_problems() -> None:
    assert find_problems(WELL, [], {"exit_status": 0.0}, {"specserve": LIMITS, "draft": None}) == []


def test_every_problem_is_named() -> None:
    bad = Tally()
    bad.outcomes.update(wrong=2, hung=1)
    grown = Holdings(LIMITS.memory_mib + 1, LIMITS.num_threads, LIMITS.num_descriptors)
    problems = find_problems(bad, ["draft: not back"], {"processes": 1.0}, {"specserve": grown})
    assert problems == [
        "2 wrong",
        "1 hung",
        "draft: not back",
        "processes is 1 at the end",
        f"memory_mib of specserve grew by {LIMITS.memory_mib + 1:g}: "
        f"the limit is {LIMITS.memory_mib:g}",
        "no request finished",
    ]


# -- faults ------------------------------------------------------------------------------------


class Watched:
    """A server of one process, started again when it dies, or left dead."""

    def __init__(self, *, repairs: bool) -> None:
        self.repairs = repairs
        self.children = [self._start()]
        self.text = READY

    def pids(self) -> dict[str, int]:
        """Look at the process; start another if it died, as a supervisor would."""
        if self.children[-1].poll() is not None and self.repairs:
            self.children.append(self._start())
            self.text += READY
        return {"specserve": self.children[-1].pid}

    def shown(self) -> str:
        """Return what the server has printed."""
        return self.text

    @staticmethod
    def _start() -> subprocess.Popen[bytes]:
        return subprocess.Popen(["sleep", "60"])

    def stop(self) -> None:
        """End all processes."""
        for child in self.children:
            child.kill()
            child.wait()


@pytest.fixture(params=[True, False], ids=["repairs", "stays dead"])
def server(request: pytest.FixtureRequest) -> Iterator[Watched]:
    watched = Watched(repairs=request.param)
    yield watched
    watched.stop()


def test_a_fault_is_repaired_or_reported(server: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fault_injection, "BACK_S", 0.5)
    monkeypatch.setattr(fault_injection, "POLL_S", 0.01)
    injector = FaultInjector(server, seed=0)  # type: ignore[arg-type]
    asyncio.run(injector._inject("specserve", signal.SIGKILL))
    assert injector.done == {"specserve SIGKILL": 1}
    assert server.children[0].wait() == -signal.SIGKILL
    if server.repairs:
        assert injector.failures == []
        assert 0.0 < injector.longest_s["specserve SIGKILL"] < 0.5
    else:
        assert injector.failures == ["specserve SIGKILL: not back after 0.5 s"]


def test_a_process_that_is_not_there_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fault_injection, "BACK_S", 0.05)
    watched = Watched(repairs=True)
    try:
        injector = FaultInjector(watched, seed=0)  # type: ignore[arg-type]
        asyncio.run(injector._inject("draft", signal.SIGKILL))
    finally:
        watched.stop()
    assert injector.failures == ["draft SIGKILL: draft had no process for 0.05 s before it"]
    assert not injector.done
