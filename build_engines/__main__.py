"""The command line of the builders: `python -m build_engines SUBCOMMAND --help`."""

from __future__ import annotations

import json
import os
import platform
import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

os.environ["HF_HUB_OFFLINE"] = "1"  # a build reads local folders and asks nobody
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

from build_engines import bench_target as bench
from build_engines import gpu_pair as gpu
from build_engines import inflate as inflating
from build_engines import measure as measuring
from build_engines import openvino as ir
from build_engines import pair as pairs
from build_engines import torch as checkpoints
from build_engines.tensorrt_llm.command import tensorrt_llm

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, add_completion=False)
app.command("tensorrt_llm")(tensorrt_llm)
Folder = Annotated[Path, typer.Option(file_okay=False)]
Precision = Annotated[str, typer.Option(help=f"one of {', '.join(ir.PRECISIONS)}")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="replace files of the same names")]


@app.command()
def openvino(
    checkpoint: Folder, output: Folder, precision: Precision = "bf16", overwrite: Overwrite = False
) -> None:
    """Export one checkpoint to an OpenVINO engine folder."""
    manifest = ir.build(checkpoint, output, precision=precision, overwrite=overwrite)
    ir.check_forward(output)
    print(f"{output}: {manifest.num_parameters / 1e6:.1f}M parameters in {precision}, runs")


@app.command()
def torch(checkpoint: Folder, output: Folder, overwrite: Overwrite = False) -> None:
    """Make a checkpoint an engine folder for torch, in its own precision; it may be the output."""
    manifest = checkpoints.build(checkpoint, output, overwrite=overwrite)
    checkpoints.check_forward(output)
    print(f"{output}: {manifest.num_parameters / 1e6:.1f}M parameters, runs")


@app.command()
def pair(
    target: Folder,
    draft: Folder,
    output: Folder,
    precision: Precision = "bf16",
    overwrite: Overwrite = False,
    engine: Annotated[str, typer.Option(help=f"one of {', '.join(pairs.BUILDERS)}")] = "openvino",
) -> None:
    """Export a target and a draft that share their vocabulary to a pair folder."""
    pairs.build(target, draft, output, precision=precision, overwrite=overwrite, engine=engine)
    print(f"{output}: target and draft fit each other and run")


@app.command()
def inflate(
    checkpoint: Folder,
    output: Folder,
    hidden: int = bench.SHAPE.hidden,
    layers: int = bench.SHAPE.layers,
    heads: int = bench.SHAPE.heads,
    kv_heads: int = bench.SHAPE.kv_heads,
    ffn: int = bench.SHAPE.ffn,
    tolerance: Annotated[float, typer.Option(help="max |dlogit|")] = inflating.TOLERANCE,
) -> None:
    """Make a Llama checkpoint wider and deeper with the same logits."""
    shape = inflating.Shape(hidden, layers, heads, kv_heads, ffn)
    difference = inflating.build(checkpoint, output, shape, tolerance=tolerance)
    print(f"{output}: {shape}, max |dlogit| {difference:.2g}, tolerance {tolerance:.2g}")


@app.command()
def bench_target(output: Folder = Path("build/bench_target")) -> None:
    """Build the 0.4 G benchmark pair from the demo pair, unless it is there."""
    print(f"{output}: {'built' if bench.build(output) else 'up to date'}")


@app.command()
def gpu_pair(output: Folder = Path("build/gpu_pair")) -> None:
    """Build the 7 B and 0.2 B benchmark pair for torch from the demo pair, unless it is there."""
    print(f"{output}: {'built' if gpu.build(output) else 'up to date'}")


@app.command()
def train(
    output: Folder,
    target_minutes: Annotated[float, typer.Option(min=0.01)] = 50.0,
    draft_minutes: Annotated[float, typer.Option(min=0.01)] = 27.0,
    sequences: Annotated[int, typer.Option(min=1, help="that the target writes")] = 7552,
) -> None:
    """Train a demo pair on Python's standard library."""
    from build_engines import train as training

    training.train(
        output,
        target_minutes=target_minutes,
        draft_minutes=draft_minutes,
        num_sequences=sequences,
    )
    print(f"{output}: trained; next: python -m build_engines pair, then measure")


@app.command()
def measure(pair: Folder) -> None:
    """Measure held-out loss and greedy acceptance of an OpenVINO pair."""
    result = measuring.measure(pair)
    for text, losses in result.loss.items():
        for role, nats in losses.items():
            print(f"{text:24} {role:7} {nats:.3f} nats/token")
    for j, share in enumerate(result.acceptance, 1):
        print(f"at least {j} of {measuring.MAX_DRAFT_TOKENS} draft tokens right   {share:.3f}")
    print(f"mean accepted {result.mean_accepted:.2f}, {result.num_positions} positions")
    context = {"command": command_line(), "python": platform.python_version()}
    print(json.dumps({**result.as_dict(), **context}))


def command_line() -> str:
    """Return what was typed."""
    return shlex.join(["python", "-m", "build_engines", *sys.argv[1:]])


def main() -> None:
    """Run a subcommand; a refusal is one line and exit status 1."""
    print(f"$ {command_line()}", flush=True)
    try:
        app()
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1) from None
    except ImportError as error:
        print(f"error: {error}: install the build extra of pyproject.toml", file=sys.stderr)
        raise SystemExit(1) from None


if __name__ == "__main__":
    main()
