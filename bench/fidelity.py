"""Do predictions come true: of a step's time, and of a simulated run's TTFT and TPOT?

Method: one window of a trace is replayed by a server core on the real engines, and again, with the
same profile, plan and policy, on the simulated engine. What that accepts was recorded before, along
the target's own continuations of these very prompts. A machine shared with others is faster or
slower by the minute, so the profile is also replayed at the speed that the machine had around that
moment of the run: every call times one number, verification time measured over predicted, of short
passes for short calls and of long ones for long.
Reported: that number; simulated over real TTFT and TPOT, at the machine's speed (aim: within 10 %)
and as the profile was measured; and how far the controller's own predictions were off, over the
real run's steps. `--figure` draws these steps, a panel for each
rate. Everything drafts with the draft model, since a simulated text cannot be looked up.

Example: python -m bench.fidelity --figure bench/results/step_time.png
"""

import argparse
import time
from bisect import bisect
from collections.abc import Callable, Sequence
from operator import itemgetter
from pathlib import Path
from typing import NamedTuple

from matplotlib import rc_context
from rich.console import Console
from rich.table import Table

from bench.arms import PLAIN, arm_overrides
from bench.core_replay import FIRST_KEY, WallClock
from bench.in_process import WARM_UP_KEY, Device, InProcess, on_profile
from bench.outcome import Run
from bench.precision import native_precision
from bench.record import ROOT, emit, made_of
from bench.record_acceptance import record
from bench.report import style
from bench.report.results import OURS
from bench.report.steps import error_of, scatter
from bench.statistics import summarise
from bench.workloads.catalogue import find_trace
from bench.workloads.plan import Lengths, Plan, Planner
from bench.workloads.prompts import standard_library
from specserve import engines
from specserve.assemble import profiled
from specserve.batch import Batch, Verified
from specserve.config import PolicyConfig, load_config
from specserve.engines.simulated import RecordedAcceptance, target_pass_s
from specserve.predictor.measure import Effort
from specserve.predictor.step_time import StepTimeModel
from specserve.predictor.store import fingerprint
from specserve.text import load_tokenizer

LENGTH_SCALE, PROMPT_SCALE = 0.5, 0.0625  # of the trace's, as `specserve bench` has them
MAX_DRAFT_TOKENS = PolicyConfig().max_draft_tokens
AIM = 0.1
LONG = 1.5  # times a verification of one token, which waits for nothing but weights


class Result(NamedTuple):
    """One window under one policy.

    Attributes:
        slowness: verification time over that of the profile, in the whole run.
        ratios: simulated over real latencies, on a machine that was as slow at every moment.
        as_profiled: the same at the profile's speed.
    """

    policy: str
    rate_rps: float
    slowness: float
    ratios: dict[str, float]
    as_profiled: dict[str, float]


class OwnTexts(RecordedAcceptance):
    """Replays to every request what was recorded along its own text."""

    @classmethod
    def of(cls, warm_up: Plan, plan: Plan) -> "OwnTexts":
        """Record the demo pair on both plans' prompts."""
        requests = [*warm_up.requests, *plan.requests]
        num_positions = max(request.num_output_tokens for request in requests)
        prompts = [request.prompt_token_ids for request in requests]
        texts = cls(*record(prompts, num_positions, MAX_DRAFT_TOKENS))
        keys = [WARM_UP_KEY + i for i in range(len(warm_up.requests))]
        keys += [FIRST_KEY + i for i in range(len(plan.requests))]
        # A request with n tokens out is at position n - 1 of the recording.
        texts._places.update({key: (text, -1) for text, key in enumerate(keys)})
        return texts


def main() -> None:
    """Replay, print a table, draw, then print one JSON line."""
    options = _parse()
    overrides = [
        f"engine.dir={options.engines}", f"engine.precision={options.precision}",
        "policy.draft_source=model", f"scheduler.max_num_seqs={options.max_num_seqs}",
    ]  # fmt: skip
    device, planner = _Device(overrides), _planner(overrides)
    started = time.perf_counter()
    runs: dict[float, Run] = {}
    results: list[Result] = []
    for rate_rps in options.rate_rps:
        plan = planner.window(rate_rps, options.window_s, seed=1)
        warm_up = planner.window(rate_rps, options.warm_up_s, seed=2)
        texts = OwnTexts.of(warm_up, plan)
        for arm in options.policy:
            real = device.run(arm_overrides(arm), warm_up, plan)
            ratios = []
            for slowness in (device.slowness.at, None):
                profile, process_for = device.profile, lambda _, texts=texts: texts
                simulated = on_profile(overrides, profile, process_for, slowness)
                again = simulated.run(arm_overrides(arm), warm_up, plan)
                ratios.append(_ratios(again, real, plan))
            results.append(Result(arm, rate_rps, round(device.slowness.mean, 3), *ratios))
            if arm == OURS:
                runs[rate_rps] = real
    errors = {f"{rate:g}": error_of(run.steps) for rate, run in runs.items()}
    _print(results)
    if options.figure:
        _draw(runs, options.figure)
    emit(
        {
            "bench": "fidelity",
            "pair": made_of(options.engines),
            "simulated_over_real": [result._asdict() for result in results],
            "worst": max(abs(ratio - 1.0) for r in results for ratio in r.ratios.values()),
            "step_time_error": {r: error and error._asdict() for r, error in errors.items()},
            "wall_s": round(time.perf_counter() - started, 1),
            "config": vars(options),
        },
        options.output,
    )


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rate-rps", type=float, nargs="+", default=[0.25, 0.75])
    parser.add_argument("--policy", nargs="+", default=[PLAIN, OURS])
    parser.add_argument("--window-s", type=float, default=40.0)
    parser.add_argument("--warm-up-s", type=float, default=10.0, help="before it, not counted")
    parser.add_argument("--max-num-seqs", type=int, default=16)
    parser.add_argument("--engines", default=str(ROOT / "build" / "bench_target"))
    parser.add_argument("--precision", default=native_precision())
    parser.add_argument("--figure", type=Path, help="PNG of predicted against measured step time")
    parser.add_argument("--output", type=Path, help="append the JSON line to this file")
    return parser.parse_args()


class Slowness:
    """How many times as long as predicted the verifications of a run took, and when.

    Short ones wait for memory and long ones for arithmetic; neighbours take either.

    Args:
        long_s: the shortest prediction of a long one.
    """

    WITHIN_S = 5.0

    def __init__(self, long_s: float, clock: Callable[[], float] = time.perf_counter) -> None:
        self._long_s = long_s
        self._clock = clock
        self._started_s = clock()
        self._calls: dict[bool, list[tuple[float, float, float]]] = {False: [], True: []}

    def add(self, measured_s: float, predicted_s: float) -> None:
        """Note one that ends now."""
        call = self._clock() - self._started_s, measured_s, predicted_s
        self._calls[predicted_s >= self._long_s].append(call)

    @property
    def mean(self) -> float:
        """The whole run's."""
        return _ratio([*self._calls[False], *self._calls[True]])

    def at(self, elapsed_s: float, seconds: float) -> float:
        """Return that of such calls in some seconds around a moment; of all, if there are none.

        Args:
            seconds: predicted for the call in question.
        """
        calls = self._calls[seconds >= self._long_s]
        first = bisect(calls, elapsed_s - self.WITHIN_S, key=itemgetter(0))
        last = bisect(calls, elapsed_s + self.WITHIN_S, key=itemgetter(0))
        near = calls[first:last] or calls
        return _ratio(near) if near else self.mean


def _ratio(calls: Sequence[tuple[float, float, float]]) -> float:
    _, measured_s, predicted_s = map(sum, zip(*calls, strict=True))
    return measured_s / predicted_s


class _Device:
    """The engines, measured now, and how much slower than then a run has found them."""

    def __init__(self, overrides: Sequence[str]) -> None:
        config = load_config(None, overrides)
        info = engines.describe(config)
        draft, self._target = engines.make_draft_engine(config), engines.make_target_engine(config)
        self.profile = profiled(config, info, draft, self._target, fingerprint(config), Effort())
        self._step_time = StepTimeModel(self.profile)
        self._long_s = LONG * self._step_time.verify_s(1, 0)
        self.slowness = Slowness(self._long_s)
        self.release = self._target.release
        device = Device(draft, self, WallClock())
        self._in_process = InProcess(overrides, info, self.profile, lambda _: device)

    def run(self, overrides: Sequence[str], warm_up: Plan, plan: Plan) -> Run:
        """Replay a window, and note how slow the engines are."""
        self.slowness = Slowness(self._long_s)
        return self._in_process.run(overrides, warm_up, plan)

    def verify(self, batch: Batch, chosen: Sequence[Sequence[int]]) -> list[Verified]:
        """Verify, and note how long it took and should have taken. See `TargetEngine`."""
        started = time.perf_counter()
        verified = self._target.verify(batch, chosen)
        measured_s = time.perf_counter() - started
        self.slowness.add(measured_s, target_pass_s(self._step_time, batch, chosen))
        return verified


def _planner(overrides: Sequence[str]) -> Planner:
    config = load_config(None, overrides)
    tokenizer = load_tokenizer(Path(config.engine.dir) / "target")
    lengths = Lengths(LENGTH_SCALE, PROMPT_SCALE, engines.describe(config).max_seq_len)
    return Planner(find_trace("poisson", None), lengths, standard_library(tokenizer), "stdlib")


def _ratios(simulated: Run, real: Run, plan: Plan) -> dict[str, float]:
    """Return simulated over real latencies, means and medians."""
    ours, theirs = (summarise(run.outcomes, plan.info.window_s) for run in (simulated, real))
    return {
        f"{name}_{kind}": getattr(getattr(ours, f"{name}_s"), kind)
        / getattr(getattr(theirs, f"{name}_s"), kind)
        for name in ("ttft", "tpot")
        for kind in ("mean", "p50")
    }


def _print(results: Sequence[Result]) -> None:
    table = Table(title=f"Simulated over real; aim: within {AIM:.0%}, at the machine's speed")
    latencies = ("TTFT mean", "TTFT P50", "TPOT mean", "TPOT P50")
    for column in ("policy", "requests/s", "slowness", *latencies, "as profiled: TPOT mean"):
        table.add_column(column, justify="left" if column == "policy" else "right")
    for result in results:
        values = [result.slowness, *result.ratios.values(), result.as_profiled["tpot_mean"]]
        table.add_row(result.policy, f"{result.rate_rps:g}", *(f"{value:.2f}" for value in values))
    Console(width=100).print(table)


def _draw(runs: dict[float, Run], path: Path) -> None:
    with rc_context(style.RC):
        figure, panels = style.grid(1, max(2, len(runs)), height=3.4)
        for axes, (rate_rps, run) in zip(panels, runs.items(), strict=False):
            scatter(axes, [step for step in run.steps if step.predicted_s])
            axes.set_title(f"{rate_rps:g} requests per second")
        for axes in panels[len(runs) :]:
            axes.set_visible(False)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path)


if __name__ == "__main__":
    main()
