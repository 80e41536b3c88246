"""How many tokens does one core simulate per second?

Method: a window of a trace, at its own lengths, on a datasheet estimate of a 7 B pair on an H100,
by the scheduler, policies and step that serve. Time is CPU time of this process; tokens are those
of prompts and outputs together, as in total throughput, and of outputs alone.

Example: python -m bench.simulator_speed --output bench/results/simulator_speed.jsonl
"""

import argparse
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from bench.arms import PLAIN, arm_overrides
from bench.bench_options import ASSETS
from bench.in_process import simulated
from bench.record import ROOT, emit
from bench.report.results import OURS
from bench.workloads.catalogue import default_traces, find_trace
from bench.workloads.plan import Lengths, Planner
from bench.workloads.prompts import lengths_only

MAX_TOKENS = 8192
AIM = 200_000


def main() -> None:
    """Simulate, print a table, then one JSON line."""
    options = _parse()
    spec = options.trace or default_traces(options.data)[-1]
    lengths = Lengths(1.0, 1.0, MAX_TOKENS)
    planner = Planner(find_trace(spec, options.data), lengths, lengths_only, "lengths only")
    plan = planner.window(options.rate_rps, options.seconds, seed=1)
    num_output = sum(r.num_output_tokens for r in plan.requests)
    num_all = num_output + sum(len(r.prompt_token_ids) for r in plan.requests)
    overrides = [
        f"scheduler.max_num_seqs={options.max_num_seqs}", f"scheduler.max_seq_len={MAX_TOKENS}",
        "scheduler.kv_cache_tokens=524288",
    ]  # fmt: skip
    device = simulated(overrides, options.profile, ASSETS / "acceptance_demo.npz")
    speeds: dict[str, dict[str, float]] = {}
    table = Table(title=f"Simulated tokens per second of one core; aim: {AIM:,}")
    for column in ("policy", "steps", "rows/step", "prompts and outputs", "outputs"):
        table.add_column(column, justify="left" if column == "policy" else "right")
    for arm in options.policy:
        started = time.process_time()
        run = device.run(arm_overrides(arm), None, plan)
        seconds = time.process_time() - started
        speeds[arm] = {"all": round(num_all / seconds), "output": round(num_output / seconds)}
        rows = sum(step.num_rows for step in run.steps) / len(run.steps)
        numbers = [len(run.steps), round(rows, 1), *speeds[arm].values()]
        table.add_row(arm, *(f"{number:,}" for number in numbers))
    Console(width=100).print(table)
    emit(
        {
            "bench": "simulator_speed",
            "trace": spec,
            "requests": len(plan.requests),
            "output_tokens": num_output,
            "tokens_per_s": speeds,
            "config": vars(options),
        },
        options.output,
    )


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--policy", nargs="+", default=[PLAIN, "fixed_4", OURS])
    parser.add_argument("--trace", default="", help="Azure 2023 conversations, else poisson")
    parser.add_argument("--data", type=Path, help="folder of traces")
    parser.add_argument("--rate-rps", type=float, default=12.0)
    parser.add_argument("--seconds", type=float, default=40.0)
    parser.add_argument("--max-num-seqs", type=int, default=64)
    profile = ROOT / "specserve" / "profiles" / "h100-llama-7b.json"
    parser.add_argument("--profile", type=Path, default=profile)
    parser.add_argument("--output", type=Path, help="append the JSON line to this file")
    return parser.parse_args()


if __name__ == "__main__":
    main()
