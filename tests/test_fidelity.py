"""A simulated machine that is as slow at every moment as a real one was."""

from dataclasses import replace
from pathlib import Path

import pytest

from bench.cells import WorkloadInfo
from bench.fidelity import Slowness
from bench.in_process import on_profile
from bench.outcome import Run
from bench.workloads.plan import Plan, PlannedRequest
from specserve.engines.simulated import RecordedAcceptance, VirtualClock
from specserve.predictor.profile import Profile

ASSETS = Path(__file__).parent / "assets"
OVERRIDES = ["policy.draft_source=model", "policy.name=fixed"]
APART_S = 100.0


def lone_requests(count: int) -> Plan:
    """Plan equal requests, each long after the one before it."""
    requests = [PlannedRequest(APART_S * i, [1] * 32, 40) for i in range(count)]
    info = WorkloadInfo(count, APART_S * count, 1 / APART_S, 1.0, 1.0, 1.0, "equal", 0, {})
    return Plan(requests, info)


def test_calls_take_longer_while_the_machine_is_slow_and_waiting_does_not() -> None:
    profile = Profile.load(ASSETS / "profile_cpu_0.4b.json")
    plan = lone_requests(3)

    def latencies(slowness: float) -> list[float]:
        def process(seed: int) -> RecordedAcceptance:
            return RecordedAcceptance.load(ASSETS / "acceptance_demo.npz", seed)

        def at(elapsed_s: float, seconds: float) -> float:
            return slowness if elapsed_s > 0.5 * APART_S else 1.0

        run = on_profile(OVERRIDES, profile, process, at).run([], None, plan)
        return [o.response_s[-1] - o.request.arrival_s for o in run.outcomes]

    usual, slow = latencies(1.0), latencies(3.0)
    assert slow == pytest.approx([usual[0], 3.0 * usual[1], 3.0 * usual[2]])


def test_every_step_takes_what_the_host_takes_besides() -> None:
    profile = Profile.load(ASSETS / "profile_cpu_0.4b.json")

    def process(seed: int) -> RecordedAcceptance:
        return RecordedAcceptance.load(ASSETS / "acceptance_demo.npz", seed)

    def run(host_s: float) -> Run:
        return on_profile(OVERRIDES, replace(profile, host_s=host_s), process).run(
            [], None, lone_requests(1)
        )

    engines, both = run(0.0), run(0.002)
    assert len(engines.steps) == len(both.steps)
    more_s = both.outcomes[0].response_s[-1] - engines.outcomes[0].response_s[-1]
    assert more_s == pytest.approx(0.002 * len(both.steps))


def test_slowness_is_that_of_some_seconds_around_a_moment() -> None:
    clock = VirtualClock()
    clock.advance(1000.0)
    slowness = Slowness(long_s=10.0, clock=clock)
    for at_s, measured_s in ((1.0, 2.0), (4.0, 4.0), (20.0, 1.5)):
        clock.now_s = 1000.0 + at_s
        slowness.add(measured_s, 1.0)
    assert slowness.at(0.0, 1.0) == slowness.at(2.0, 1.0) == pytest.approx(3.0)
    assert slowness.at(22.0, 1.0) == pytest.approx(1.5)
    whole = pytest.approx(2.5)
    assert slowness.at(12.0, 1.0) == slowness.mean == whole, "nobody knows: the whole run's"
    assert slowness.at(2.0, 10.0) == whole, "no long ones yet: that of all"
    slowness.add(measured_s=40.0, predicted_s=10.0)
    assert slowness.at(2.0, 20.0) == pytest.approx(4.0), "neighbours take memory or arithmetic"
    assert slowness.at(2.0, 1.0) == pytest.approx(3.0)
