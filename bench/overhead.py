"""How much of a step is spent outside the engines?

Method: a real server with the 0.4 G target (made from the demo pair: `python -m build_engines
bench-target`), N gRPC streams kept open in a closed loop, greedy, held-out prompts. The server
counts the wall time of its steps and the time inside the two engines; the rest of a step is
scheduling, BLS, packing, and whatever of answering clients does not overlap with an engine.

Example: python -m bench.overhead --streams 1 4 16
"""

import argparse
import asyncio
import time
from pathlib import Path
from typing import Any

import tritonclient.grpc.aio as triton
from rich.console import Console
from rich.table import Table

from bench.grpc_client import stream
from bench.precision import native_precision
from bench.prompts import held_out_prompts
from bench.record import ROOT, emit, made_of
from bench.served import Served, serving
from specserve.text import load_tokenizer

PROMPT_TOKENS = 96


def main() -> None:
    """Measure, print a table, then one JSON line."""
    options = _parse()
    overrides = [
        f"engine.dir={options.engines}",
        f"engine.precision={options.precision}",
        f"policy.name={options.policy}",
    ]
    with serving(overrides) as server:
        rows = {n: asyncio.run(_measure(server, n, options)) for n in options.streams}
    _print(rows)
    emit(
        {
            "bench": "overhead",
            "pair": made_of(options.engines),
            "overhead_share": {str(n): round(row["overhead_share"], 4) for n, row in rows.items()},
            "detail": {str(n): row for n, row in rows.items()},
            "config": vars(options),
        },
        options.output,
    )


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--engines", default=str(ROOT / "build" / "bench_target"))
    parser.add_argument("--precision", default=native_precision())
    parser.add_argument("--policy", default="specserve")
    parser.add_argument("--model", default="specserve", help="or ensemble, tensorrt_llm_bls")
    parser.add_argument("--max-tokens", type=int, default=96)
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--output", type=Path, help="append the JSON line to this file")
    return parser.parse_args()


async def _measure(server: Served, num_streams: int, options: argparse.Namespace) -> dict[str, Any]:
    tokenizer = load_tokenizer(Path(options.engines) / "target")
    token_ids = held_out_prompts(tokenizer, 64, PROMPT_TOKENS)
    prompts = [tokenizer.decode(ids) for ids in token_ids]
    async with triton.InferenceServerClient(f"127.0.0.1:{server.grpc_port}") as client:

        async def one_client(index: int, until: float) -> None:
            turn = index
            while time.perf_counter() < until:
                prompt = prompts[turn % len(prompts)]
                tensors = {
                    "text_input": prompt,
                    "max_tokens": options.max_tokens,
                    "stream": True,
                }
                answer = await stream(client, options.model, tensors)
                if answer.error:
                    raise RuntimeError(answer.error)
                turn += num_streams

        async def run(seconds: float) -> None:
            until = time.perf_counter() + seconds
            await asyncio.gather(*(one_client(i, until) for i in range(num_streams)))
            await asyncio.sleep(0.5)  # the metrics follow the last step within a fifth of a second

        await run(options.seconds / 6)  # warm-up
        before = await asyncio.to_thread(server.metrics)
        await run(options.seconds)
        after = await asyncio.to_thread(server.metrics)
    return _row({name: after[name] - before.get(name, 0.0) for name in after})


def _row(delta: dict[str, float]) -> dict[str, Any]:
    steps = delta["specserve_steps_total"]
    step_s = delta["specserve_step_seconds_total"]
    draft_s = delta["specserve_draft_engine_seconds_total"]
    verify_s = delta["specserve_verify_engine_seconds_total"]
    calls_s = (
        delta["specserve_draft_call_seconds_total"] + delta["specserve_verify_call_seconds_total"]
    )
    return {
        "overhead_share": 1.0 - (draft_s + verify_s) / step_s,
        "transport_share": (calls_s - draft_s - verify_s) / step_s,
        "num_steps": int(steps),
        "step_ms": 1e3 * step_s / steps,
        "draft_ms": 1e3 * draft_s / steps,
        "verify_ms": 1e3 * verify_s / steps,
        "tokens_per_s": delta["specserve_output_tokens_total"] / step_s,
        "tokens_per_step": delta["specserve_output_tokens_total"] / steps,
    }


def _print(rows: dict[int, dict[str, Any]]) -> None:
    table = Table(title="Share of a step outside the engines")
    for column in ("streams", "step ms", "draft ms", "verify ms", "outside", "BLS", "tokens/s"):
        table.add_column(column, justify="right")
    for n, row in rows.items():
        table.add_row(
            str(n),
            *(f"{row[key]:.2f}" for key in ("step_ms", "draft_ms", "verify_ms")),
            f"{row['overhead_share']:.1%}",
            f"{row['transport_share']:.1%}",
            f"{row['tokens_per_s']:.0f}",
        )
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
