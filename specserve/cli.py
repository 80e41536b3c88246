"""The `specserve` command. Parses and prints; the work is elsewhere."""

import sys
import tempfile
from pathlib import Path
from typing import Annotated, NoReturn

import typer
from rich.console import Console

from specserve.assemble import assemble
from specserve.config import Config, dump_config, load_config
from specserve.request import Request
from specserve.sampling_params import SamplingParams
from specserve.text import TextStream, load_tokenizer

REPOSITORY = Path(__file__).resolve().parent.parent / "model_repository"

app = typer.Typer(add_completion=False, no_args_is_help=True, help=__doc__)

ConfigFile = Annotated[
    Path | None, typer.Option("--config", help="TOML file; SPECSERVE_CONFIG names the default.")
]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", help="Override, such as policy.name=fixed.")
]


@app.callback()
def main() -> None:
    """Speculative decoding that adapts to load and keeps each request's latency objective."""


@app.command()
def serve(
    config: ConfigFile = None,
    overrides: Overrides = None,
    http_port: int = 8000,
    grpc_port: int = 8001,
    metrics_port: int = 8002,
    address: Annotated[str, typer.Option(help="0.0.0.0 opens the server to others.")] = "127.0.0.1",
    model_repository: Path = REPOSITORY,
) -> None:
    """Start Triton with the model repository and wait; Ctrl-C drains and stops everything."""
    from specserve.launch.serve import ServeOptions
    from specserve.launch.serve import serve as launch

    settings = _load(config, overrides)
    with tempfile.NamedTemporaryFile("w", prefix="specserve-", suffix=".toml") as file:
        file.write(dump_config(settings))
        file.flush()
        options = ServeOptions(
            model_repository=model_repository,
            engine_dir=Path(settings.engine.dir),
            config_path=Path(file.name),
            http_port=http_port,
            grpc_port=grpc_port,
            metrics_port=metrics_port,
            address=address,
        )
        status = launch(options)
    raise typer.Exit(status)


@app.command()
def generate(
    prompt: str,
    max_tokens: int = 64,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    stop: Annotated[list[str] | None, typer.Option(help="End before this text.")] = None,
    config: ConfigFile = None,
    overrides: Overrides = None,
) -> None:
    """Continue a prompt in this process, without a server, and say how speculation went."""
    settings = _load(config, overrides)
    try:
        tokenizer = load_tokenizer(Path(settings.engine.dir) / "target")
        sampling = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
        request = Request(tokenizer.encode(prompt).ids, max_tokens, sampling)
        core = assemble(settings)
        core.scheduler.submit(request)
    except ValueError as error:
        _fail(error)
    text = TextStream(tokenizer, stop or ())
    while core.scheduler.has_work and not text.is_stopped:
        for output in core.step():
            print(text.push(output.token_ids), end="", flush=True)
    print(text.finish())
    print(
        f"{text.num_tokens} tokens in {core.stats.num_steps} steps; "
        f"{request.num_accepted_tokens} of {request.num_verified_tokens} draft tokens accepted",
        file=sys.stderr,
    )


@app.command()
def profile(
    output: Annotated[Path | None, typer.Option(help="Else where servers look for it.")] = None,
    config: ConfigFile = None,
    overrides: Overrides = None,
) -> None:
    """Measure how long the configured engines take, for the policies that weigh time."""
    from specserve.predictor.report import measure_and_describe

    try:
        table, path = measure_and_describe(_load(config, overrides), output)
    except ValueError as error:
        _fail(error)
    Console().print(table)
    print(f"stored: {path}")


def _load(config: Path | None, overrides: list[str] | None) -> Config:
    try:
        return load_config(config, overrides or ())
    except ValueError as error:
        _fail(error)


def _fail(error: ValueError) -> NoReturn:
    typer.echo(f"error: {error}", err=True)
    raise typer.Exit(2)
