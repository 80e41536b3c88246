"""The `specserve` command. Parses and prints; the work is elsewhere."""

import secrets
import sys
import tempfile
from pathlib import Path
from typing import Annotated, NoReturn

import typer
from rich.console import Console

from bench.command import bench
from bench.report.command import report
from bench.simulate.command import simulate
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
    openai_port: Annotated[int, typer.Option(help="0 starts no OpenAI endpoint.")] = 8003,
    model_repository: Path = REPOSITORY,
    show_log: Annotated[
        bool, typer.Option("--show-log", help="Copy Triton's log to standard error.")
    ] = False,
    drain_timeout: Annotated[float, typer.Option(help="Seconds for requests to end in.")] = 30.0,
    max_restarts: Annotated[int, typer.Option(help="Failures in a row to recover from.")] = 8,
    open_apis: Annotated[
        bool, typer.Option("--open-apis", help="Let all clients load models, map memory, trace.")
    ] = False,
    admin_key: Annotated[
        str, typer.Option(envvar="SPECSERVE_ADMIN_KEY", help="Let who sends this key do that.")
    ] = "",
) -> None:
    """Start Triton with the model repository and wait; Ctrl-C drains and stops everything."""
    from specserve.launch.endpoint import EndpointOptions
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
            shows_log=show_log,
            openai=EndpointOptions.of(settings.openai, openai_port) if openai_port else None,
            drain_timeout_s=drain_timeout,
            max_restarts=max_restarts,
            admin_key="" if open_apis else admin_key or secrets.token_urlsafe(),
        )
        status = launch(options)
    raise typer.Exit(status)


@app.command()
def openai(
    config: ConfigFile = None,
    overrides: Overrides = None,
    port: int = 8003,
    address: Annotated[str, typer.Option(help="0.0.0.0 opens it to others.")] = "127.0.0.1",
    triton: Annotated[str, typer.Option(help="Host of the Triton server.")] = "127.0.0.1",
    grpc_port: int = 8001,
    metrics_port: int = 8002,
    drain_timeout_s: float = 30.0,
) -> None:
    """Serve OpenAI's API, and a live page at /, in front of a running Triton server."""
    from specserve.openai.serve import Listen
    from specserve.openai.serve import serve as launch

    listen = Listen(address, port, triton, grpc_port, metrics_port, drain_timeout_s)
    try:
        launch(_load(config, overrides), listen)
    except ValueError as error:
        _fail(error)


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
        request = Request(
            tokenizer.encode(prompt).ids,
            max_tokens,
            sampling,
            draft_source=settings.policy.draft_source,
        )
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


@app.command()
def top(
    address: str = "127.0.0.1",
    metrics_port: int = 8002,
    interval_s: Annotated[float, typer.Option(help="Between two readings.", min=0.1)] = 1.0,
    once: Annotated[bool, typer.Option(help="Print one view and end.")] = False,
) -> None:
    """Watch a running server: tokens, lengths, step times, objectives, decisions."""
    from specserve.view.terminal import watch

    try:
        watch(f"http://{address}:{metrics_port}/metrics", interval_s, Console(), once=once)
    except OSError as error:
        _fail(ValueError(f"no metrics at {address}:{metrics_port} ({error}): is the server up?"))


app.command()(bench)
app.command()(report)
app.command()(simulate)


def _load(config: Path | None, overrides: list[str] | None) -> Config:
    try:
        return load_config(config, overrides or ())
    except ValueError as error:
        _fail(error)


def _fail(error: ValueError) -> NoReturn:
    typer.echo(f"error: {error}", err=True)
    raise typer.Exit(2)
