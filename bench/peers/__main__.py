"""Is SpecServe faster than what else serves a pair on this machine, at the same job?

Method: the same greedy prompts, output lengths, threads, arithmetic precision and weights for all;
a closed loop of `concurrency` requests, timed from the first request to the last token, prompt
processing included; six requests a row, since rows stand empty when there are none left to begin.
Answers are as long as the prompts; with longer ones less of the time is prompts, which all servers
compute with the same products (`--max-tokens 256 --requests 3 --min-requests 4`).
SpecServe runs behind a real Triton server and its client's gRPC streams, with a response for every
step and, as `specserve_whole`, with one for the whole answer; OpenVINO GenAI (on the same IR) and
Hugging Face transformers (on the checkpoints behind it) run in this process, without a transport.
Everything is loaded before anything is timed; rounds interleave all arms in random order, the first
ones only warm up, and the median over the rest counts.

Needs: pip install -c constraints.txt -e '.[serve,build,peers]'
Example: python -m build_engines bench-target --output build/bench_target
         python -m bench.peers --concurrency 1 4 8 16
"""

import argparse
import contextlib
import os
import random
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from bench.extras import PEERS, require
from bench.peers import Load, Peer
from bench.precision import native_precision
from bench.prompts import held_out_prompts
from bench.record import ROOT, emit, made_of
from bench.served import serving
from specserve.text import load_tokenizer

PROMPT_TOKENS = 96
OURS = ("specserve", "specserve_whole")  # one server, two ways to ask
NAMES = (*OURS, "openvino_genai", "transformers")
Rates = dict[tuple[str, str], list[float]]  # (peer, arm) -> tokens/s of each counted round


def main() -> None:
    """Load, measure, print a table, then one JSON line."""
    options = parse()
    require("serve,build,peers", PEERS)
    with (
        tempfile.TemporaryDirectory(prefix="specserve-peers-") as scratch,
        loaded(options, Path(scratch)) as peers,
    ):
        compare(peers, options)


def compare(peers: dict[str, Peer], options: argparse.Namespace) -> None:
    """Measure what is loaded at every concurrency and print the result."""
    rates = {c: _measure(peers, c, options) for c in options.concurrency}
    _print(rates)
    medians = _medians(rates)
    emit(
        {
            "bench": "peers",
            "pair": made_of(options.engines),
            "against_best_genai": _against(medians, "openvino_genai"),
            "whole_against_best_genai": _against(medians, "openvino_genai", "specserve_whole"),
            "rounds": {
                f"{name}/{arm}/{c}": [round(rate, 2) for rate in values]
                for c, row in rates.items()
                for (name, arm), values in row.items()
            },
            "config": vars(options),
            "tokens_per_s": medians,
        },
        options.output,
    )


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 4, 8, 16])
    parser.add_argument("--peers", nargs="+", default=list(NAMES), choices=NAMES)
    parser.add_argument("--rounds", type=int, default=3, help="counted")
    parser.add_argument("--warmup-rounds", type=int, default=1, help="before them, not counted")
    parser.add_argument("--requests", type=int, default=6, help="per row and round, at least")
    parser.add_argument("--min-requests", type=int, default=12, help="of all rows, a round")
    parser.add_argument("--max-tokens", type=int, default=96)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--engines", type=Path, default=ROOT / "build" / "bench_target")
    parser.add_argument(
        "--checkpoints", type=Path,
        help="what the engines were made from (target/ and draft/), for transformers; by default "
        "that of build/bench_target, made again",
    )  # fmt: skip
    parser.add_argument("--precision", choices=["bf16", "f32"], default=native_precision())
    parser.add_argument("--output", type=Path, help="append the JSON line to this file")
    return parser.parse_args(arguments)


@contextlib.contextmanager
def loaded(options: argparse.Namespace, scratch: Path) -> Iterator[dict[str, Peer]]:
    """Load every peer; SpecServe's server stops on the way out."""
    peers: dict[str, Peer] = {}
    with contextlib.ExitStack() as stack:
        if "openvino_genai" in options.peers:
            from bench.peers.genai import OpenVINOGenAI

            peers["openvino_genai"] = OpenVINOGenAI(
                options.engines, scratch / "genai", options.precision, options.threads
            )
        if "transformers" in options.peers:
            from bench.peers.assisted import Transformers

            target, draft = _checkpoints(options.checkpoints, scratch)
            peers["transformers"] = Transformers(target, draft, options.precision, options.threads)
        if set(OURS) & set(options.peers):
            from bench.peers.served import SpecServeServer

            overrides = [
                f"engine.dir={options.engines}",
                f"engine.precision={options.precision}",
                f"engine.num_threads={options.threads}",
            ]
            server = stack.enter_context(serving(overrides))
            for name in OURS:
                peers[name] = SpecServeServer(server, streams=name == "specserve")
        yield {name: peers[name] for name in NAMES if name in options.peers}


def _checkpoints(folder: Path | None, scratch: Path) -> tuple[Path, Path]:
    """Return target and draft checkpoint; without a folder, inflate the demo target again."""
    if folder is not None:
        return folder / "target", folder / "draft"
    from build_engines import inflate
    from build_engines.bench_target import DEMO_PAIR, SHAPE

    inflate.build(DEMO_PAIR / "target", scratch / "inflated", SHAPE)
    return scratch / "inflated", DEMO_PAIR / "draft"


def _measure(peers: dict[str, Peer], concurrency: int, options: argparse.Namespace) -> Rates:
    """Run every arm that serves so many at a time, interleaved."""
    tokenizer = load_tokenizer(options.engines / "target")
    num_prompts = concurrency * max(options.requests, -(-options.min_requests // concurrency))
    prompts = held_out_prompts(tokenizer, num_prompts, PROMPT_TOKENS)
    load = Load(prompts, concurrency, options.max_tokens)
    arms = [
        (name, arm)
        for name, peer in peers.items()
        if concurrency <= peer.max_concurrency
        for arm in peer.arms
    ]
    rates: Rates = {arm: [] for arm in arms}
    num_rounds = options.warmup_rounds + options.rounds
    with Progress(transient=True) as progress:
        task = progress.add_task(f"concurrency {concurrency}", total=num_rounds * len(arms))
        for round_ in range(num_rounds):
            for name, arm in random.Random(round_).sample(arms, len(arms)):
                rate = _tokens_per_s(peers[name], arm, load)
                if round_ >= options.warmup_rounds:
                    rates[name, arm].append(rate)
                progress.advance(task)
    return rates


def _tokens_per_s(peer: Peer, arm: str, load: Load) -> float:
    run = peer.run(arm, load)
    expected = len(load.prompts) * load.max_tokens
    if run.num_tokens != expected:
        raise RuntimeError(f"{arm} gave {run.num_tokens} tokens instead of {expected}")
    return run.num_tokens / run.seconds


def _medians(columns: dict[int, Rates]) -> dict[str, dict[str, Any]]:
    """Return peer -> concurrency -> arm -> tokens/s; of SpecServe, which has one arm, the rate."""
    medians: dict[str, dict[str, Any]] = {}
    for concurrency, rates in columns.items():
        for (name, arm), values in rates.items():
            rate = round(statistics.median(values), 2)
            row = medians.setdefault(name, {})
            if name in OURS:
                row[str(concurrency)] = rate
            else:
                row.setdefault(str(concurrency), {})[arm] = rate
    return medians


def _against(
    medians: dict[str, dict[str, Any]], peer: str, name: str = "specserve"
) -> dict[str, float]:
    """Return SpecServe's rate over the peer's best arm, at each concurrency that both served."""
    ours, theirs = medians.get(name, {}), medians.get(peer, {})
    return {c: round(ours[c] / max(theirs[c].values()), 3) for c in ours if c in theirs}


def _print(columns: dict[int, Rates]) -> None:
    table = Table(title="Output tokens per second, prompt processing included")
    for name in ("server", "arm"):
        table.add_column(name)
    for concurrency in columns:
        table.add_column(str(concurrency), justify="right")
    for name, arm in dict.fromkeys(key for rates in columns.values() for key in rates):
        table.add_row(name, arm, *(_entry(rates.get((name, arm))) for rates in columns.values()))
    Console(width=100).print(table)


def _entry(values: list[float] | None) -> str:
    return f"{statistics.median(values):.0f}" if values else "-"


if __name__ == "__main__":
    main()
