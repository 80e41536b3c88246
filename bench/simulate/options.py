"""What a user of `specserve simulate` can ask: declared once, for the command line and the code.

Imported whenever `specserve` starts, so nothing heavy is imported here.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from typer import Option

from bench.bench_options import ASSETS, DATA_ENV

Words = list[str] | None
RECORDING = ASSETS / "acceptance_demo.npz"


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulateOptions:
    """The options as they were given."""

    profile: Annotated[
        str,
        Option(help="Shipped, as h100-llama-70b (a wrong name lists all), or a file of one."),
    ]
    rate: Annotated[str, Option(help="Requests per second to search in, LOW:HIGH.")]

    # What is promised.
    slo_ttft_ms: Annotated[
        float, Option(min=0.0, help="Of every request; 0 is none, and lets a queue grow unseen.")
    ] = 2000.0
    slo_tpot_ms: Annotated[float, Option(min=0.0, help="Of every request; 0 is none.")] = 0.0
    attainment: Annotated[float, Option(min=0.0, max=1.0, help="Share that must meet it.")] = 0.9

    # What arrives.
    policy: Annotated[Words, Option(help="Repeatable; fixed_K too. Default: none, specserve.")] = (
        None
    )
    trace: Annotated[str, Option(help="As for `specserve bench`.")] = "poisson"
    requests: Annotated[int, Option(min=10, help="At least; a window has 10 TTFTs too.")] = 200
    prompt_tokens: Annotated[float | None, Option(min=1.0, help="Mean; else the trace's.")] = None
    output_tokens: Annotated[float | None, Option(min=1.0, help="Mean; else the trace's.")] = None
    data: Annotated[Path | None, Option(help="Traces.", envvar=DATA_ENV)] = None
    seed: Annotated[int, Option(help="Of place in the trace, and of what is accepted.")] = 0

    # What takes it.
    acceptance: Annotated[
        str,
        Option(
            help="Mean probability that a draft token is accepted, or a recording.",
            show_default="recorded with the demo pair",
        ),
    ] = str(RECORDING)
    correlation: Annotated[float, Option(help="Of a request's tokens, if it is a mean.")] = 0.3
    confidence_noise: Annotated[float, Option(help="In logits, if it is a mean.")] = 1.0
    overhead_ms: Annotated[
        float, Option(min=0.0, help="Of a step outside the engines; `bench.overhead` measures it.")
    ] = 3.0
    override: Annotated[Words, Option("--set", help="Such as scheduler.max_num_seqs=128.")] = None

    output: Annotated[Path, Option(help="PNG, or SVG by its ending.")] = Path("capacity.png")
