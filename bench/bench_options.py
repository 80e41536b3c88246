"""What a user of `specserve bench` can choose: declared once, for the command line and the code.

Imported whenever `specserve` starts, so nothing heavy is imported here.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from typer import Option

from bench.workloads.objectives import SYNTAX

ASSETS = Path(__file__).resolve().parent.parent / "tests" / "assets"
DATA_ENV = "SPECSERVE_DATA"

Words = list[str] | None
Numbers = list[float] | None


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchOptions:
    """The options as they were given; None is a default that depends on others."""

    output: Annotated[Path, Option(help="JSON lines; cells that it has are not run again.")]
    mode: Literal["server", "engines", "simulated"] = "server"

    # The axes of the grid.
    trace: Annotated[Words, Option(help="Repeatable. Default: Azure 2023, else poisson.")] = None
    policy: Annotated[Words, Option(help="Repeatable; fixed_K too. Default: all.")] = None
    load: Annotated[Numbers, Option(help="Repeatable; share of plain decoding's capacity.")] = None
    slo_scale: Annotated[Numbers, Option(help="Repeatable; factor on relative SLOs.")] = None
    repeats: Annotated[int, Option(min=1, help="Each at another place of the trace.")] = 1

    # What is sent in a cell.
    window_s: Annotated[float, Option(min=1.0, help="Of a cell.")] = 20.0
    warm_up_s: Annotated[float, Option(min=0.0, help="Before it, not counted.")] = 6.0
    length_scale: Annotated[float, Option(help="Output tokens, times the trace's.")] = 0.5
    prompt_scale: Annotated[float, Option(help="Prompt tokens, times the trace's.")] = 0.0625
    prompts: Annotated[str, Option(help="stdlib, random or spec_bench[:PATH].")] = "stdlib"
    slo_class: Annotated[Words, Option("--class", help=f"Repeatable. {SYNTAX}.")] = None
    data: Annotated[Path | None, Option(help="Traces and prompts.", envvar=DATA_ENV)] = None

    # How plain decoding is measured.
    low_load: Annotated[float, Option(help="Where relative SLOs are measured.")] = 0.2
    low_requests: Annotated[int, Option(min=2, help="How many measure them.")] = 24
    flood_requests: Annotated[
        int | None, Option(min=6, help="How many measure the capacity; else 3 per row of a batch.")
    ] = None

    # What it is sent to.
    client: Annotated[Literal["grpc", "http"], Option(help="To a server.")] = "grpc"
    profile: Annotated[Path, Option(help="When simulated.")] = ASSETS / "profile_cpu_0.4b.json"
    recording: Annotated[Path, Option(help="When simulated.")] = ASSETS / "acceptance_demo.npz"
    override: Annotated[Words, Option("--set", help="Such as engine.precision=bf16.")] = None

    summary_only: Annotated[bool, Option(help="Leave requests and steps out.")] = False
