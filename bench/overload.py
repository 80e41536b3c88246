"""Does goodput hold when three times the sustainable load arrives?

Method: open loop, requests arrive in a Poisson process whatever becomes of those before. Every
request is of class `interactive`, which is told early when its first token would be late, and
carries a TTFT and a TPOT objective. Goodput counts, per second, the requests that met both as their
client saw it. Loads around the capacity find the peak, and the least load that reaches 97 % of it,
the sustainable one; then three times that. Each load begins with a warm-up that does not count.

On a real server a closed loop estimates the capacity, and memory is the resident set of all its
processes after each load; `--engine simulated` runs scheduler, policy and admission in virtual time
on a profile instead.

Example: python -m bench.overload --seconds 30 --output bench/results/overload.jsonl
         python -m bench.overload --engine simulated
"""

import argparse
import asyncio
import random
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tritonclient.grpc.aio as triton
from rich.console import Console
from rich.table import Table

from bench.grpc_client import Answer, stream
from bench.precision import native_precision
from bench.prompts import held_out_prompts
from bench.record import ROOT, emit, made_of
from bench.served import Served, serving
from specserve.admission import Rejected
from specserve.assemble import assemble
from specserve.config import load_config
from specserve.core import SpecServe
from specserve.engines import EngineInfo
from specserve.engines.simulated import RecordedAcceptance, SimulatedPair, VirtualClock
from specserve.pacing import Pacer
from specserve.policies import make_policy
from specserve.predictor.profile import Profile
from specserve.predictor.step_time import StepTimeModel
from specserve.request import SLO, Request
from specserve.text import load_tokenizer

ASSETS = ROOT / "tests" / "assets"
CLASS = "interactive"
PROMPT_TOKENS = 96
WARM_UP_SHARE = 0.25
NUM_CLIENTS = 16  # of the closed loop
PEAK_LOADS = (0.4, 0.6, 0.8, 1.0)  # of the closed loop's rate
SIMULATED_LOADS = (2.0, 4.0, 6.0, 8.0, 10.0)  # requests per second
OVERLOAD = 3.0
NEARLY = 0.97


@dataclass(slots=True)
class Load:
    """What became of the requests of one load."""

    offered_rps: float
    seconds: float
    outcomes: Counter[str] = field(default_factory=Counter)
    ttft_s: list[float] = field(default_factory=list)
    tpot_s: list[float] = field(default_factory=list)
    memory_mib: float = 0.0

    def judge(self, ttft_s: float, tpot_s: float, slo: SLO) -> None:
        """Count a request that was served."""
        assert slo.ttft_s is not None
        assert slo.tpot_s is not None
        self.ttft_s.append(ttft_s)
        self.tpot_s.append(tpot_s)
        in_time, at_pace = ttft_s <= slo.ttft_s, tpot_s <= slo.tpot_s
        self.outcomes["good" if in_time and at_pace else "slow" if in_time else "late"] += 1

    @property
    def goodput_rps(self) -> float:
        """Requests per second that met both objectives."""
        return self.outcomes["good"] / self.seconds

    def row(self) -> dict[str, Any]:
        """Return the result, times in milliseconds."""
        return {
            "offered_rps": round(self.offered_rps, 2),
            "goodput_rps": round(self.goodput_rps, 2),
            "outcomes": dict(self.outcomes),
            "ttft_p50_ms": round(1e3 * _percentile(self.ttft_s, 50), 1),
            "ttft_p99_ms": round(1e3 * _percentile(self.ttft_s, 99), 1),
            "tpot_p50_ms": round(1e3 * _percentile(self.tpot_s, 50), 1),
            "tpot_p99_ms": round(1e3 * _percentile(self.tpot_s, 99), 1),
            "memory_mib": round(self.memory_mib),
        }


# -- a real server -----------------------------------------------------------------------------


class Clients:
    """Sends one kind of request and judges the answers."""

    def __init__(self, client: triton.InferenceServerClient, options: argparse.Namespace) -> None:
        tokenizer = load_tokenizer(Path(options.engines) / "target")
        self._prompts = held_out_prompts(tokenizer, 64, PROMPT_TOKENS)
        self._client = client
        self._options = options
        self._slo = SLO(options.ttft_ms / 1e3, options.tpot_ms / 1e3)
        self._random = random.Random(options.seed)

    async def open_loop(self, offered_rps: float, seconds: float) -> Load:
        """Send requests at a rate for so long; wait for the last answer."""
        load, tasks = Load(offered_rps, seconds), []
        started_s = time.perf_counter()
        for arrival_s in arrivals(offered_rps, (1.0 + WARM_UP_SHARE) * seconds, self._random):
            await asyncio.sleep(max(0.0, started_s + arrival_s - time.perf_counter()))
            counts = arrival_s >= WARM_UP_SHARE * seconds
            tasks.append(asyncio.create_task(self._judge(load if counts else Load(0.0, 1.0))))
        await asyncio.gather(*tasks)
        return load

    async def closed_loop(self, num_clients: int, seconds: float) -> float:
        """Return the rate at which so many clients, each with one request at a time, are served."""
        count, until_s = 0, time.perf_counter() + seconds

        async def one() -> None:
            nonlocal count
            while time.perf_counter() < until_s:
                await self._send({})
                count += 1

        await asyncio.gather(*(one() for _ in range(num_clients)))
        return count / seconds

    async def _send(self, objectives: dict[str, Any]) -> Answer:
        tensors = {
            "input_ids": self._random.choice(self._prompts),
            "max_tokens": self._options.max_tokens,
            "end_id": -1,
            "stream": True,
            **objectives,
        }
        return await stream(self._client, "specserve", tensors)

    async def _judge(self, load: Load) -> None:
        options = self._options
        objectives = {"slo_ttft_ms": options.ttft_ms, "slo_tpot_ms": options.tpot_ms}
        answer = await self._send({**objectives, "priority_class": CLASS})
        if answer.error is not None:
            load.outcomes["rejected" if "try again in" in answer.error else "failed"] += 1
            return
        first_s, last_s = answer.response_s[0], answer.response_s[-1]
        tpot_s = (last_s - first_s) / (options.max_tokens - 1)
        load.judge(first_s - answer.sent_s, tpot_s, self._slo)


async def _measure(server: Served, options: argparse.Namespace) -> list[Load]:
    async with triton.InferenceServerClient(f"127.0.0.1:{server.grpc_port}") as client:
        clients = Clients(client, options)
        await clients.closed_loop(NUM_CLIENTS, options.seconds / 4)
        capacity_rps = await clients.closed_loop(NUM_CLIENTS, options.seconds / 2)
        loads = [
            await _one_load(server, clients, share * capacity_rps, options) for share in PEAK_LOADS
        ]
        overload_rps = OVERLOAD * sustainable_rps(loads)
        return [*loads, await _one_load(server, clients, overload_rps, options)]


async def _one_load(
    server: Served, clients: Clients, rate_rps: float, options: argparse.Namespace
) -> Load:
    load = await clients.open_loop(rate_rps, options.seconds)
    load.memory_mib = _resident_mib(server.process.pids())
    return load


def _resident_mib(pids: Sequence[int]) -> float:
    pages = (int(Path(f"/proc/{pid}/statm").read_text().split()[1]) for pid in pids)
    return sum(pages) * 4096 / 2**20


# -- virtual time ------------------------------------------------------------------------------


def simulate(options: argparse.Namespace) -> list[Load]:
    """Run all loads on a simulated pair."""
    loads = [_simulated_load(rate_rps, options) for rate_rps in SIMULATED_LOADS]
    return [*loads, _simulated_load(OVERLOAD * sustainable_rps(loads), options)]


def _simulated_load(offered_rps: float, options: argparse.Namespace) -> Load:
    clock = VirtualClock()
    core = _simulated_core(clock, options)
    load, served = Load(offered_rps, options.seconds), []
    due = arrivals(
        offered_rps, (1.0 + WARM_UP_SHARE) * options.seconds, random.Random(options.seed)
    )
    slo = SLO(options.ttft_ms / 1e3, options.tpot_ms / 1e3)
    arrival_s = next(due, None)
    while arrival_s is not None or core.scheduler.has_work:
        while arrival_s is not None and arrival_s <= clock():
            request = Request([1] * PROMPT_TOKENS, options.max_tokens, slo=slo)
            request.priority_class, request.arrival_s = CLASS, arrival_s
            try:
                core.scheduler.submit(request, clock())
                served.append(request)
            except Rejected:
                load.outcomes["rejected"] += arrival_s >= WARM_UP_SHARE * options.seconds
            arrival_s = next(due, None)
        if core.scheduler.has_work:
            core.step()
        elif arrival_s is not None:
            clock.now_s = arrival_s
    for request in served:
        assert request.first_token_s is not None
        assert request.last_token_s is not None
        if request.arrival_s >= WARM_UP_SHARE * options.seconds:
            tpot_s = (request.last_token_s - request.first_token_s) / (options.max_tokens - 1)
            load.judge(request.first_token_s - request.arrival_s, tpot_s, slo)
    return load


def _simulated_core(clock: VirtualClock, options: argparse.Namespace) -> SpecServe:
    """Put a core together whose predictor and whose truth are two models of one profile."""
    profile = Profile.load(ASSETS / "profile_cpu_0.4b.json")
    process = RecordedAcceptance.load(ASSETS / "acceptance_demo.npz", options.seed)
    pair = SimulatedPair(StepTimeModel(profile), clock, process)
    config, step_time = load_config(None, options.set), StepTimeModel(profile)
    policy = make_policy(config.policy, step_time)
    core = assemble(
        config,
        info=EngineInfo(vocab_size=4096, max_seq_len=4096, num_blocks=1024, block_size=32),
        draft_engine=pair,
        target_engine=pair,
        policy=policy,
        clock=clock,
    )
    core.use(policy, Pacer(step_time))
    return core


# -- both --------------------------------------------------------------------------------------


def arrivals(rate_rps: float, seconds: float, rng: random.Random) -> Iterator[float]:
    """Yield the times of a Poisson process."""
    at_s = rng.expovariate(rate_rps)
    while at_s < seconds:
        yield at_s
        at_s += rng.expovariate(rate_rps)


def peak_rps(loads: Sequence[Load]) -> float:
    """Return the most goodput of any load."""
    return max(load.goodput_rps for load in loads)


def sustainable_rps(loads: Sequence[Load]) -> float:
    """Return the smallest load with nearly the most goodput; more only adds refusals."""
    return min(x.offered_rps for x in loads if x.goodput_rps >= NEARLY * peak_rps(loads))


def main() -> None:
    """Measure, print a table, then one JSON line."""
    options = parse()
    if options.engine == "simulated":
        loads = simulate(options)
    else:
        overrides = [f"engine.dir={options.engines}", f"engine.precision={options.precision}"]
        with serving([*overrides, *options.set]) as server:
            loads = asyncio.run(_measure(server, options))
    most_rps = peak_rps(loads[:-1])
    _print(loads)
    emit(
        {
            "bench": "overload",
            "engine": options.engine,
            "pair": None if options.engine == "simulated" else made_of(options.engines),
            "held_share": round(loads[-1].goodput_rps / most_rps, 3),
            "peak_goodput_rps": round(most_rps, 2),
            "loads": [load.row() for load in loads],
            "config": vars(options),
        },
        options.output,
    )


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--engine", choices=["openvino", "simulated"], default="openvino")
    parser.add_argument("--engines", default=str(ROOT / "build" / "bench_target"))
    parser.add_argument("--precision", default=native_precision())
    parser.add_argument("--ttft-ms", type=float, default=2000.0)
    parser.add_argument("--tpot-ms", type=float, default=120.0)
    parser.add_argument("--max-tokens", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=30.0, help="of each load, as it counts")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--set", action="append", default=[], help="section.key=value")
    parser.add_argument("--output", type=Path, help="append the JSON line to this file")
    return parser.parse_args(arguments)


def _percentile(values: Sequence[float], percent: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * percent / 100))] if ordered else 0.0


def _print(loads: Sequence[Load]) -> None:
    table = Table(title="Goodput under load")
    outcomes = ("good", "late", "slow", "rejected", "failed")
    for column in ("offered/s", "goodput/s", *outcomes, "TTFT p50/p99", "TPOT p50/p99", "MiB"):
        table.add_column(column, justify="right")
    for load in loads:
        row = load.row()
        table.add_row(
            f"{row['offered_rps']:.1f}",
            f"{row['goodput_rps']:.1f}",
            *(str(load.outcomes[name]) for name in outcomes),
            f"{row['ttft_p50_ms']:.0f} / {row['ttft_p99_ms']:.0f}",
            f"{row['tpot_p50_ms']:.0f} / {row['tpot_p99_ms']:.0f}",
            str(row["memory_mib"]),
        )
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
