"""Options made whole: a profile, the limits that go with it, what arrives, what replays it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from bench.arms import arm_overrides, check_arms
from bench.cells import StepSample, Summary
from bench.in_process import InProcess
from bench.simulate.capacity import Capacity, find_capacity
from bench.simulate.device import make_acceptance, make_runner
from bench.simulate.options import SimulateOptions
from bench.statistics import summarise
from bench.workloads import Trace
from bench.workloads.catalogue import find_trace
from bench.workloads.objectives import Objective, RequestClass
from bench.workloads.plan import Lengths, Planner
from bench.workloads.prompts import lengths_only
from specserve import profiles
from specserve.config import load_config
from specserve.predictor.profile import Profile
from specserve.request import SLO

DEFAULT_POLICIES = ("none", "specserve")
CLASS = "all"  # not one of slo.reject_late_classes: who is late is served late, and counted
MODEL_DRAFTS = "policy.draft_source=model"  # there are no texts to look up
NUM_WARM_UP, WARM_UP_SEED = 32, 9_000_000
WINDOW_TTFTS = 10.0  # a window is this many TTFT objectives long, at least


@dataclass(frozen=True, slots=True)
class RateProbe:
    """One simulated window. See `bench.simulate.capacity.Probe`.

    Attributes:
        mean_rows: of a step.
        full_share: share of the steps whose batch had no row free.
    """

    rate_rps: float
    summary: Summary
    mean_rows: float
    full_share: float

    @property
    def attainment(self) -> float:
        """Share of requests that met their objectives."""
        return self.summary.attainment


class Question:
    """How many requests per second meet an objective, policy by policy.

    Attributes:
        lines: what the answer rests on, for people to read.

    Raises:
        ValueError: an option that cannot be, naming the value and the choices.
    """

    def __init__(self, options: SimulateOptions) -> None:
        self.low_rps, self.high_rps = parse_rates(options.rate)
        self.slo = _slo(options)
        self.policies = options.policy or list(DEFAULT_POLICIES)
        check_arms(self.policies)
        self.profile = profiles.find(options.profile)
        overrides = [MODEL_DRAFTS, *profiles.limits(self.profile), *(options.override or ())]
        config = load_config(None, overrides)
        acceptance, of_acceptance = make_acceptance(options, config.policy.max_draft_tokens)
        overhead_s = options.overhead_ms / 1e3
        self.attainment = options.attainment
        self.max_num_seqs = config.scheduler.max_num_seqs
        self._options = options
        self._runner: InProcess = make_runner(
            config, overrides, self.profile, acceptance, overhead_s
        )
        max_tokens = config.scheduler.max_seq_len or config.scheduler.kv_cache_tokens
        trace = find_trace(options.trace, options.data)
        lengths = _lengths(options, trace, max_tokens)
        self._planner = Planner(trace, lengths, lengths_only, of_acceptance, [_class(self.slo)])
        self.lines = [
            describe(options.profile, self.profile),
            f"at least {options.requests} requests as in {trace.name}; "
            + _describe_lengths(trace, lengths)
            + f"; {options.overhead_ms:g} ms of every step outside the engines",
            of_acceptance,
        ]

    @property
    def title(self) -> str:
        """The profile's name, and whether anybody measured it."""
        is_estimate = profiles.is_estimate(self.profile)
        return self._options.profile + (" (estimate, not measured)" if is_estimate else "")

    @property
    def objective(self) -> str:
        """What is asked, in words."""
        parts = [
            f"{name} of {1e3 * value:g} ms"
            for name, value in (("TTFT", self.slo.ttft_s), ("TPOT", self.slo.tpot_s))
            if value is not None
        ]
        return f"{' and '.join(parts)} for {self.attainment:.0%} of the requests"

    def answer(self, policy: str) -> Capacity[RateProbe]:
        """Search; takes seconds."""
        return find_capacity(
            lambda rate: self._probe(policy, rate),
            self.low_rps,
            self.high_rps,
            self.attainment,
        )

    def _probe(self, policy: str, rate_rps: float) -> RateProbe:
        options = self._options
        # NOTE: a shorter window would end before a queue that grows is as long as a TTFT allows.
        window_s = max(options.requests / rate_rps, WINDOW_TTFTS * (self.slo.ttft_s or 0.0))
        plan = self._planner.window(rate_rps, window_s, seed=options.seed)
        warm_up = self._planner.window(rate_rps, NUM_WARM_UP / rate_rps, seed=WARM_UP_SEED)
        run = self._runner.run(arm_overrides(policy, [self.slo]), warm_up, plan)
        return RateProbe(
            rate_rps,
            summarise(run.outcomes, window_s),
            float(np.mean([step.num_rows for step in run.steps])),
            _full_share(run.steps, self.max_num_seqs),
        )


def parse_rates(text: str) -> tuple[float, float]:
    """Read `LOW:HIGH`.

    Raises:
        ValueError: another form, or not 0 < LOW < HIGH.
    """
    low, _, high = text.partition(":")
    try:
        rates = float(low), float(high)
    except ValueError:
        rates = 0.0, 0.0
    if not 0.0 < rates[0] < rates[1] < float("inf"):
        raise ValueError(f"rate is '{text}': expected LOW:HIGH with 0 < LOW < HIGH, such as 1:50")
    return rates


def describe(name: str, profile: Profile) -> str:
    """Say what a profile is of, and where its numbers come from."""
    marks = profile.fingerprint
    pair = [_model(marks, role) for role in ("target", "draft")]
    what = [marks.get("device", "unknown device"), marks.get("precision", "")]
    return f"{name}: {', '.join(filter(None, what))}, {' with '.join(pair)}; {profile.source}"


def _model(marks: Mapping[str, str], role: str) -> str:
    """Name a model, or say how large it is."""
    num_parameters = float(marks.get(f"{role}_parameters", "nan"))
    return marks.get(role) or f"{role} of {num_parameters / 1e6:.3g} M parameters"


def _slo(options: SimulateOptions) -> SLO:
    """Read the objectives, of which 0 is none."""
    if not options.slo_ttft_ms and not options.slo_tpot_ms:
        raise ValueError("slo_ttft_ms and slo_tpot_ms are 0: give one of them")
    return SLO(options.slo_ttft_ms / 1e3 or None, options.slo_tpot_ms / 1e3 or None)


def _class(slo: SLO) -> RequestClass:
    ttft, tpot = (
        None if value is None else Objective(value, is_relative=False)
        for value in (slo.ttft_s, slo.tpot_s)
    )
    return RequestClass(CLASS, 1.0, ttft, tpot)


def _lengths(options: SimulateOptions, trace: Trace, max_tokens: int) -> Lengths:
    """Scale the trace's lengths to the means asked for."""
    prompt, output = _mean_lengths(trace)
    return Lengths(
        output_scale=(options.output_tokens or output) / output,
        prompt_scale=(options.prompt_tokens or prompt) / prompt,
        max_tokens=max_tokens,
    )


def _mean_lengths(trace: Trace) -> tuple[float, float]:
    prompts = [arrival.num_prompt_tokens for arrival in trace.arrivals]
    outputs = [arrival.num_output_tokens for arrival in trace.arrivals]
    return float(np.mean(prompts)), float(np.mean(outputs))


def _describe_lengths(trace: Trace, lengths: Lengths) -> str:
    """Say how long requests are after scaling and cutting."""
    prompts, outputs = zip(*(lengths(arrival) for arrival in trace.arrivals), strict=True)
    return f"on average {np.mean(prompts):.0f} prompt and {np.mean(outputs):.0f} output tokens"


def _full_share(steps: Sequence[StepSample], max_num_seqs: int) -> float:
    return float(np.mean([step.num_rows >= max_num_seqs for step in steps]))
