"""From options to a grid that can run: what replays, which traces, which lengths fit."""

from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench.arms import DEFAULT_ARMS, check_arms
from bench.bench_options import BenchOptions
from bench.grid import Axes, Grid, Runner, Timing
from bench.record import made_of
from bench.workloads.catalogue import default_traces, find_prompts, find_trace
from bench.workloads.objectives import DEFAULT_CLASSES, parse_classes
from bench.workloads.plan import Lengths, Planner
from bench.workloads.prompts import PromptSource, lengths_only
from specserve import engines
from specserve.config import Config, load_config
from specserve.text import load_tokenizer

DEFAULT_LOADS = (0.3, 0.6, 0.9)
DEFAULT_SLO_SCALES = (0.8, 1.0, 1.2)

# Options that may differ between the lines of one file.
FREE = (
    "output", "trace", "policy", "load", "slo_scale", "repeats", "data", "summary_only",
)  # fmt: skip


def axes_of(options: BenchOptions) -> Axes:
    """Return what the grid varies.

    Raises:
        ValueError: an unknown policy, or a load or scale not above 0.
    """
    check_arms(options.policy or ())
    for name in ("load", "slo_scale"):
        for value in getattr(options, name) or ():
            if value <= 0.0:
                raise ValueError(f"{name} is {value:g}: must be above 0")
    return Axes(
        traces=options.trace or default_traces(options.data),
        policies=options.policy or DEFAULT_ARMS,
        loads=options.load or DEFAULT_LOADS,
        slo_scales=options.slo_scale or DEFAULT_SLO_SCALES,
        num_repeats=options.repeats,
    )


def make_grid(options: BenchOptions, axes: Axes) -> Grid:
    """Put a grid together.

    Raises:
        ValueError: an option that cannot be, naming the value and the choices.
    """
    config = load_config(None, options.override or ())
    planners = planners_of(options, config, axes.traces)  # may refuse: before engines are loaded
    return Grid(
        runner=_runner(options),
        mode=options.mode,
        planners=planners,
        classes=parse_classes(options.slo_class or DEFAULT_CLASSES),
        timing=Timing(
            window_s=options.window_s,
            warm_up_s=options.warm_up_s,
            low_load=options.low_load,
            num_low=options.low_requests,
            num_flood=options.flood_requests or 3 * config.scheduler.max_num_seqs,
        ),
        output=options.output,
        settings=_settings(options, config),
        with_requests=not options.summary_only,
    )


def _runner(options: BenchOptions) -> Runner:
    overrides = options.override or []
    if options.mode == "server":
        from bench.through_server import ThroughServer

        return ThroughServer(overrides, options.client)
    from bench.in_process import on_engines, simulated

    if options.mode == "engines":
        return on_engines(overrides)
    return simulated(overrides, options.profile, options.recording)


def planners_of(options: BenchOptions, config: Config, traces: Iterable[str]) -> dict[str, Planner]:
    """Read the traces, and fit them to the engine."""
    prompts, name = _prompts(options, config)
    lengths = Lengths(options.length_scale, options.prompt_scale, _max_tokens(options, config))
    return {
        spec: Planner(find_trace(spec, options.data), lengths, prompts, name) for spec in traces
    }


def _prompts(options: BenchOptions, config: Config) -> tuple[PromptSource, str]:
    if options.mode == "simulated":
        return lengths_only, f"as recorded in {options.recording.name}"
    tokenizer = load_tokenizer(Path(config.engine.dir) / "target")
    return find_prompts(options.prompts, options.data, tokenizer), options.prompts


def _max_tokens(options: BenchOptions, config: Config) -> int:
    """Return how many tokens a request may have."""
    limits = [config.scheduler.kv_cache_tokens]
    if config.scheduler.max_seq_len:
        limits.append(config.scheduler.max_seq_len)
    if options.mode != "simulated":
        limits.append(engines.describe(config).max_seq_len)
    return min(limits)


def _settings(options: BenchOptions, config: Config) -> Mapping[str, Any]:
    settings = {name: value for name, value in asdict(options).items() if name not in FREE}
    if options.mode != "simulated":
        settings["pair"] = made_of(config.engine.dir)
    return settings
