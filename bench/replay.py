"""How does a running server do on a window of a trace, as four load generators see it?

Method: a part of a trace, fitted to the engine, is sent open loop to a server that is already
there: by our own client over gRPC or HTTP `generate_stream`, by perf_analyzer over gRPC, or by
AIPerf to the OpenAI endpoint. All send the same token ids at the same times, and the same
definitions are applied to the response times that each reports.

Example: python -m bench.replay --client perf_analyzer --address 127.0.0.1:8001 --rate-rps 2
"""

import argparse
import asyncio
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.table import Table

from bench import aiperf, perf_analyzer
from bench.bench_options import DATA_ENV
from bench.cells import Summary
from bench.grpc_client import GrpcClient
from bench.http_client import HttpClient
from bench.load_generator import replay
from bench.outcome import Outcome
from bench.record import emit
from bench.statistics import summarise
from bench.workloads.catalogue import find_prompts, find_trace
from bench.workloads.objectives import SYNTAX, parse_classes
from bench.workloads.plan import Lengths, Plan, PlannedRequest, Planner
from specserve import manifest
from specserve.config import EngineConfig
from specserve.text import load_tokenizer

Requests = Sequence[PlannedRequest]


def main() -> None:
    """Replay, print a table, then one JSON line."""
    options = _parse()
    try:
        plan = _plan(options)
        outcomes = CLIENTS[options.client](options, plan.requests)
    except (ValueError, RuntimeError) as error:
        raise SystemExit(f"error: {error}") from error
    summary = summarise(outcomes, plan.info.window_s)
    _print(options.client, summary)
    errors = sorted({outcome.error for outcome in outcomes if outcome.error})
    emit(
        {
            "bench": "replay",
            "client": options.client,
            "workload": asdict(plan.info),
            "summary": asdict(summary),
            "errors": errors[:8],
        },
        options.output,
    )


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--client", choices=list(CLIENTS), default="grpc")
    parser.add_argument("--address", required=True, help="host:port of the protocol")
    parser.add_argument("--model", default="specserve")
    parser.add_argument("--engines", type=Path, default=EngineConfig().dir, help="for lengths")
    parser.add_argument("--trace", default="poisson")
    parser.add_argument("--data", type=Path, default=os.environ.get(DATA_ENV))
    parser.add_argument("--rate-rps", type=float, default=1.0)
    parser.add_argument("--window-s", type=float, default=20.0)
    parser.add_argument("--length-scale", type=float, default=0.5)
    parser.add_argument("--prompt-scale", type=float, default=0.0625)
    parser.add_argument("--prompts", default="stdlib")
    parser.add_argument("--class", dest="classes", action="append", default=[], help=SYNTAX)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="append the JSON line to this file")
    return parser.parse_args()


def _plan(options: argparse.Namespace) -> Plan:
    folder = Path(options.engines) / "target"
    max_tokens = manifest.load(folder).max_seq_len
    planner = Planner(
        find_trace(options.trace, options.data and Path(options.data)),
        Lengths(options.length_scale, options.prompt_scale, max_tokens),
        find_prompts(options.prompts, options.data, load_tokenizer(folder)),
        options.prompts,
        parse_classes(options.classes),
    )
    return planner.window(options.rate_rps, options.window_s, seed=options.seed)


def _grpc(options: argparse.Namespace, requests: Requests) -> list[Outcome]:
    async def run() -> list[Outcome]:
        async with GrpcClient.connect(options.address, options.model) as client:
            return await replay(client, requests)

    return asyncio.run(run())


def _http(options: argparse.Namespace, requests: Requests) -> list[Outcome]:
    async def run() -> list[Outcome]:
        async with HttpClient.connect(options.address, options.model) as client:
            return await replay(client, requests)

    return asyncio.run(run())


def _perf_analyzer(options: argparse.Namespace, requests: Requests) -> list[Outcome]:
    return perf_analyzer.replay(options.address, options.model, requests)


def _aiperf(options: argparse.Namespace, requests: Requests) -> list[Outcome]:
    folder = Path(options.engines) / "target"
    return aiperf.replay(f"http://{options.address}", options.model, requests, folder)


CLIENTS: dict[str, Callable[[argparse.Namespace, Requests], list[Outcome]]] = {
    "grpc": _grpc,
    "http": _http,
    "perf_analyzer": _perf_analyzer,
    "aiperf": _aiperf,
}


def _print(client: str, summary: Summary) -> None:
    table = Table(title=f"{client}: {summary.num_finished} finished, {summary.num_rejected} "
                        f"rejected, {summary.num_failed} failed")  # fmt: skip
    for column in ("ms", "mean", "P50", "P90", "P99"):
        table.add_column(column, justify="right")
    for name in ("ttft", "tpot", "itl", "e2e"):
        values = getattr(summary, f"{name}_s")
        if values is not None:
            numbers = (values.mean, values.p50, values.p90, values.p99)
            table.add_row(name.upper(), *(f"{1e3 * number:.1f}" for number in numbers))
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
