"""Which policy gives the most tokens per second, at which load?

Method: one pair of engines in this process, a closed loop of `concurrency` requests of equal
length, greedy, held-out prompts, measured while the loop is full. Counted are the steps in which
every row decodes; the rate with prompt processing stands beside it. Every policy runs on the same
step loop, prompts and clock, and they take turns of a few steps in random order, so that a slow
moment of the machine hits all alike: the speed of a shared one drifts by a fifth within a minute.
With `--turn-steps 0` one runs to its end before the next, which needs a KV cache for one of them.
Policies keep what they learn from round to round and from load to load, as on a server; the first
rounds of a load only warm up (adaptive_verification takes 300 steps for that, at the first load).
`--engine simulated` replays a recorded acceptance process in virtual time instead, a process for
each policy, as many at once as there are cores. Benchmark pairs are the demo pair inflated to the
cost of larger models: real acceptance at real cost, and the text of neither. `specserve` is as it
serves, with prompt lookup; `specserve_model` has the draft model only, as all baselines but the
fixed `lookup` lengths, and as everybody where acceptance is replayed: there are no texts.
`--workload mixed` has code, prose and random tokens side by side, half of the requests sampled:
there drafts of one row pay and those of its neighbour do not. It needs real engines too.

Example: python -m bench.policies --concurrency 1 2 4 8 16
         python -m bench.policies --engine simulated
         python -m bench.policies --engine torch --device cuda --compile \
             --engines build/gpu_pair --concurrency 1 4 16 64 256 --requests 2 --turn-steps 0
"""

import argparse
import os
import random
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from bench.closed_loop import ClosedLoop, Stopwatch
from bench.gpu import describe_gpu
from bench.policy_arms import ARMS, OURS, OURS_WITH_MODEL, WITHOUT_TEXTS
from bench.precision import native_precision
from bench.prompts import Asked, held_out_prompts, mixed_workload
from bench.record import ROOT, emit, made_of
from specserve import engines
from specserve.assemble import assemble, profiled
from specserve.block_manager import BlockManager
from specserve.config import Config, SchedulerConfig, TelemetryConfig, load_config
from specserve.engines import DraftEngine, EngineInfo, TargetEngine
from specserve.engines.simulated import RecordedAcceptance, SimulatedPair, VirtualClock
from specserve.pacing import Pacer
from specserve.policies import Policy, make_policy, needs_profile
from specserve.policies.specserve import SpecServePolicy
from specserve.predictor.profile import Profile
from specserve.predictor.step_time import StepTimeModel
from specserve.predictor.store import load_or_measure
from specserve.request import Request
from specserve.sampling_params import SamplingParams
from specserve.telemetry import make_telemetry
from specserve.telemetry.state import NoTelemetry, Telemetry
from specserve.text import load_tokenizer

ASSETS = ROOT / "tests" / "assets"
KEYS = 10_000  # more than there are requests in a round, rounds, and requests at once
Paced = tuple[Policy, Pacer | None]
Grid = dict[int, dict[str, "Cell"]]  # concurrency -> arm
PROMPT_TOKENS = 96
FILES_WITH_TESTS = 300  # that every Python with its tests has, long enough for a window
TOTALS = (
    "num_steps", "num_drafted_tokens", "num_verified_tokens", "num_accepted_tokens",
    "step_s", "draft_s", "verify_s",
)  # fmt: skip


@dataclass(slots=True)
class Cell:
    """One policy at one load: totals over the counted rounds.

    Attributes:
        step_time_error: median and 95th percentile of |predicted - measured| / measured of late,
            for verifications, where the policy predicts them.
    """

    rates: list[float] = field(default_factory=list)
    all_rates: list[float] = field(default_factory=list)
    stats: dict[str, float] = field(default_factory=dict)
    step_time_error: tuple[float, float] | None = None

    def add(self, loop: ClosedLoop) -> None:
        """Count a loop that has come to its end."""
        self.rates.append(loop.rate)
        self.all_rates.append(loop.rate_with_prompts)
        for name in TOTALS:
            self.stats[name] = self.stats.get(name, 0.0) + getattr(loop.core.stats, name)
        if isinstance(loop.core.policy, SpecServePolicy):
            self.step_time_error = loop.core.policy.step_time.verify_error()

    @property
    def tokens_per_s(self) -> float:
        """The median over the rounds."""
        return float(np.median(self.rates))


@dataclass(frozen=True, slots=True)
class Bench:
    """Where the policies run: real engines, or simulated ones."""

    config: Config
    info: EngineInfo
    profile: Profile
    engines_for: Callable[[int], tuple[DraftEngine, TargetEngine, Callable[[], float]]]
    workload: list[Asked]
    arms: Mapping[str, Sequence[str]]
    telemetry: Telemetry = field(default_factory=NoTelemetry)

    def policy(self, arm: str) -> Paced:
        """Make an arm's policy with a predictor of its own."""
        config = load_config(None, self.arms[arm]).policy
        needed = needs_profile(config.name)
        step_time = StepTimeModel(self.profile, self.telemetry) if needed else None
        pacer = Pacer(step_time) if step_time and config.name == OURS else None
        return make_policy(config, step_time), pacer

    def source(self, arm: str) -> str:
        """Say who proposes for an arm's requests."""
        return load_config(None, self.arms[arm]).policy.draft_source

    def loop(
        self,
        made: Paced,
        blocks: BlockManager | None,
        concurrency: int,
        requests: Sequence[Request],
        seed: int,
    ) -> ClosedLoop:
        """Make a loop of an arm's policy; `blocks` is what loops that take turns share."""
        draft, target, clock = self.engines_for(seed)
        stopwatch = Stopwatch(clock)
        scheduler = replace(self.config.scheduler, max_num_seqs=concurrency)
        core = assemble(
            replace(self.config, scheduler=scheduler, telemetry=TelemetryConfig(source="none")),
            info=self.info, draft_engine=draft, target_engine=target, policy=made[0],
            blocks=blocks, clock=stopwatch,
        )  # fmt: skip
        core.use(*made)
        loop = ClosedLoop(core, stopwatch, concurrency)
        loop.submit(requests)
        return loop


def main() -> None:
    """Run the grid, print a table, then one JSON line."""
    options = _parse()
    started = time.perf_counter()
    if options.engine == "simulated":
        cells, gpu = _simulated_grid(options), None
    else:
        bench = _real(options)
        cells, gpu = _grid(bench, options), describe_gpu(bench.telemetry)
    _print(cells)
    emit(
        {
            "bench": "policies",
            "engine": options.engine,
            "workload": options.workload,
            "pair": None if options.engine == "simulated" else made_of(options.engines),
            "gpu": gpu,
            "tokens_per_s": {
                arm: {str(c): round(cells[c][arm].tokens_per_s, 2) for c in cells}
                for arm in options.arms
            },
            "tokens_per_s_with_prompts": {
                arm: {str(c): round(float(np.median(cells[c][arm].all_rates)), 2) for c in cells}
                for arm in options.arms
            },
            "against_best_other": {str(c): round(_against_best(cells[c]), 4) for c in cells},
            "against_adaspec_released": round(_geometric_mean(cells), 4),
            "steps": {
                arm: {str(c): _per_step(cells[c][arm]) for c in cells} for arm in options.arms
            },
            "step_time_error": {
                str(c): cells[c][OURS].step_time_error for c in cells if OURS in cells[c]
            },
            "wall_s": round(time.perf_counter() - started, 1),
            "config": vars(options),
        },
        options.output,
    )


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--engine", choices=["openvino", "torch", "simulated"], default="openvino")
    parser.add_argument("--workload", choices=["code", "mixed"], default="code")
    parser.add_argument("--device", default="cpu", help="of the torch engine")
    parser.add_argument("--compile", action="store_true", help="torch on a GPU")
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument("--arms", nargs="+", help="all by default")
    parser.add_argument("--rounds", type=int, default=3, help="counted")
    parser.add_argument("--warmup-rounds", type=int, default=1, help="before them, not counted")
    parser.add_argument("--requests", type=int, default=1, help="per row and round, at least")
    parser.add_argument("--min-requests", type=int, default=12, help="of all rows, a round")
    parser.add_argument("--turn-steps", type=int, default=8, help="0 for runs to the end")
    parser.add_argument("--max-tokens", type=int, default=96)
    parser.add_argument("--engines", default=str(ROOT / "build" / "bench_target"))
    parser.add_argument("--precision", default=native_precision())
    parser.add_argument("--profile", type=Path, default=ASSETS / "profile_cpu_0.4b.json")
    parser.add_argument("--recording", type=Path, default=ASSETS / "acceptance_demo.npz")
    parser.add_argument("--output", type=Path, help="append the JSON line to this file")
    options = parser.parse_args()
    if options.engine == "simulated" and options.workload == "mixed":
        parser.error("--workload mixed needs real engines: a recording knows greedy code only")
    arms = WITHOUT_TEXTS if options.engine == "simulated" else ARMS
    options.arms = options.arms or list(arms)
    unknown = set(options.arms) - arms.keys()
    if unknown:
        parser.error(f"--arms: unknown {', '.join(sorted(unknown))}; known are {', '.join(arms)}")
    options.overrides = [f"engine.dir={options.engines}", f"engine.precision={options.precision}"]
    if options.engine == "torch":
        options.overrides += [
            "engine.name=torch", f"engine.device={options.device}",
            f"engine.compile={str(options.compile).lower()}",
        ]  # fmt: skip
    if options.engine == "simulated":
        options.turn_steps = 0  # a virtual clock does not drift
    num_loops = len(options.arms) if options.turn_steps else 1
    options.overrides += _room_for(max(options.concurrency), num_loops)
    return options


def _num_requests(concurrency: int, options: argparse.Namespace) -> int:
    """Return the requests of a round: as many for every row."""
    return concurrency * max(options.requests, -(-options.min_requests // concurrency))


def _room_for(concurrency: int, num_loops: int) -> list[str]:
    """Raise the limits of a step and the KV cache above their defaults for many requests."""
    limits, overrides = SchedulerConfig(), []
    for name, needed in (
        ("max_num_seqs", concurrency),
        ("max_num_batched_tokens", 8 * concurrency),
        ("prefill_chunk_tokens", 4 * concurrency),
        ("kv_cache_tokens", 256 * concurrency * num_loops),
    ):
        if needed > getattr(limits, name):
            overrides.append(f"scheduler.{name}={needed}")
    return overrides


def _real(options: argparse.Namespace) -> Bench:
    config = load_config(None, options.overrides)
    info = engines.describe(config)
    draft, target = engines.make_draft_engine(config), engines.make_target_engine(config)
    telemetry = make_telemetry(config)
    profile = load_or_measure(
        config, lambda marks: profiled(config, info, draft, target, marks), telemetry.reading
    )
    tokenizer = load_tokenizer(Path(config.engine.dir) / "target")
    wanted = max(64, *(_num_requests(c, options) for c in options.concurrency))
    per_file = -(-wanted // FILES_WITH_TESTS)
    if options.workload == "mixed":
        workload = mixed_workload(tokenizer, wanted, PROMPT_TOKENS, per_file=per_file)
    else:
        prompts = held_out_prompts(tokenizer, wanted, PROMPT_TOKENS, per_file=per_file)
        workload = [Asked(prompt, SamplingParams()) for prompt in prompts]
    pair = (draft, target, time.perf_counter)
    return Bench(config, info, profile, lambda _: pair, workload, ARMS, telemetry)


def _simulated(options: argparse.Namespace) -> Bench:
    profile = Profile.load(options.profile)
    info = EngineInfo(vocab_size=4096, max_seq_len=4096, num_blocks=4096, block_size=32)

    def engines_for(seed: int) -> tuple[DraftEngine, TargetEngine, Callable[[], float]]:
        clock = VirtualClock()
        process = RecordedAcceptance.load(options.recording, seed)
        pair = SimulatedPair(StepTimeModel(profile), clock, process)
        return pair, pair, clock

    workload = [Asked([1] * PROMPT_TOKENS, SamplingParams())] * 512
    config = load_config(None, options.overrides)
    return Bench(config, info, profile, engines_for, workload, WITHOUT_TEXTS)


def _simulated_grid(options: argparse.Namespace) -> Grid:
    """Measure every policy in a process of its own: what shares no clock cannot disturb it."""
    arms = options.arms[::-1]  # the last one takes longest
    with ProcessPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        jobs = [argparse.Namespace(**{**vars(options), "arms": [arm]}) for arm in arms]
        columns = dict(zip(arms, pool.map(_simulated_arm, jobs), strict=True))
    return {c: {arm: columns[arm][c][arm] for arm in options.arms} for c in options.concurrency}


def _simulated_arm(options: argparse.Namespace) -> Grid:
    return _grid(_simulated(options), options)


def _grid(bench: Bench, options: argparse.Namespace) -> Grid:
    policies = {arm: bench.policy(arm) for arm in options.arms}
    return {c: _column(bench, policies, c, options) for c in options.concurrency}


def _column(
    bench: Bench, policies: Mapping[str, Paced], concurrency: int, options: argparse.Namespace
) -> dict[str, Cell]:
    """Measure all policies at one load."""
    cells = {arm: Cell() for arm in options.arms}
    rounds = options.warmup_rounds + options.rounds
    with Progress(transient=True, disable=options.engine == "simulated") as progress:
        task = progress.add_task(f"concurrency {concurrency}", total=rounds * len(cells))
        for round_ in range(rounds):
            for arm, loop in _round(bench, policies, concurrency, options, round_):
                if round_ >= options.warmup_rounds:
                    cells[arm].add(loop)
                progress.advance(task)
    return cells


def _round(
    bench: Bench,
    policies: Mapping[str, Paced],
    concurrency: int,
    options: argparse.Namespace,
    seed: int,
) -> Iterator[tuple[str, ClosedLoop]]:
    """Yield every arm with its loop, as they come to their ends."""
    rng = random.Random(seed)
    asked = rng.sample(bench.workload, _num_requests(concurrency, options))
    takes_turns = options.turn_steps > 0
    blocks = BlockManager(bench.info.num_blocks, bench.info.block_size) if takes_turns else None
    waiting = rng.sample(options.arms, len(options.arms))
    running: dict[str, ClosedLoop] = {}
    while waiting or running:
        while waiting and (takes_turns or not running):
            arm = waiting.pop()
            source = bench.source(arm)
            number = options.arms.index(arm) if takes_turns else 0  # simulated texts go by keys
            first_key = KEYS * (KEYS * (KEYS * number + concurrency) + seed)
            requests = [
                Request(prompt, options.max_tokens, sampling, key=key, draft_source=source)
                for key, (prompt, sampling) in enumerate(asked, first_key + 1)
            ]
            running[arm] = bench.loop(policies[arm], blocks, concurrency, requests, seed)
        for arm in rng.sample(list(running), len(running)):
            if not running[arm].advance(options.turn_steps or sys.maxsize):
                yield arm, running.pop(arm)


def _per_step(cell: Cell) -> dict[str, float]:
    steps = cell.stats["num_steps"]
    return {
        "step_ms": round(1e3 * cell.stats["step_s"] / steps, 2),
        "draft_ms": round(1e3 * cell.stats["draft_s"] / steps, 2),
        "verify_ms": round(1e3 * cell.stats["verify_s"] / steps, 2),
        "drafted": round(cell.stats["num_drafted_tokens"] / steps, 2),
        "verified": round(cell.stats["num_verified_tokens"] / steps, 2),
        "accepted": round(cell.stats["num_accepted_tokens"] / steps, 2),
    }


def _against_best(cells: dict[str, Cell]) -> float:
    ours = (OURS, OURS_WITH_MODEL)
    others = [cell.tokens_per_s for arm, cell in cells.items() if arm not in ours]
    return cells[OURS].tokens_per_s / max(others) if OURS in cells else 0.0


def _geometric_mean(columns: Grid) -> float:
    ratios = [
        cells[OURS].tokens_per_s / cells["adaspec_released"].tokens_per_s
        for cells in columns.values()
        if {OURS, "adaspec_released"} <= cells.keys()
    ]
    return float(np.exp(np.mean(np.log(ratios)))) if ratios else 0.0


def _print(columns: Grid) -> None:
    table = Table(title="Output tokens per second, against plain decoding")
    table.add_column("policy")
    for concurrency in columns:
        table.add_column(f"{concurrency}", justify="right")
    for arm in next(iter(columns.values())):
        table.add_row(arm, *(_entry(cells, arm) for cells in columns.values()))
    Console(width=120).print(table)


def _entry(cells: dict[str, Cell], arm: str) -> str:
    rate = cells[arm].tokens_per_s
    return (
        f"{rate:.0f} x{rate / cells['plain'].tokens_per_s:.2f}"
        if "plain" in cells
        else f"{rate:.0f}"
    )


if __name__ == "__main__":
    main()
