"""A part of a trace, fitted to an engine: who arrives when, with which prompt and which promise.

Every policy of a grid gets the very same plan.
"""

import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from bench.cells import WorkloadInfo
from bench.workloads import Arrival, Trace
from bench.workloads.objectives import RequestClass
from bench.workloads.prompts import PromptSource
from specserve.request import SLO


@dataclass(frozen=True, slots=True)
class PlannedRequest:
    """One request to send; `arrival_s` counts from the start of the window."""

    arrival_s: float
    prompt_token_ids: list[int]
    num_output_tokens: int
    priority_class: str = ""
    slo: SLO = field(default_factory=SLO)


@dataclass(frozen=True, slots=True)
class Plan:
    """Requests in order of arrival, and what a result line says about them."""

    requests: list[PlannedRequest]
    info: WorkloadInfo


@dataclass(frozen=True, slots=True)
class Lengths:
    """How a trace's token counts are made to fit an engine.

    Attributes:
        output_scale, prompt_scale: factors.
        max_tokens: of prompt and output together, what the engine takes; prompts get at most half.
    """

    output_scale: float
    prompt_scale: float
    max_tokens: int

    def __call__(self, arrival: Arrival) -> tuple[int, int]:
        """Return prompt and output tokens, at least 1 of each."""
        prompt = max(1, round(arrival.num_prompt_tokens * self.prompt_scale))
        output = max(1, round(arrival.num_output_tokens * self.output_scale))
        prompt = min(prompt, max(self.max_tokens // 2, self.max_tokens - output))
        return prompt, min(output, self.max_tokens - prompt)


@dataclass(frozen=True, slots=True)
class Planner:
    """Plans windows of one trace.

    Attributes:
        prompts: what they say; `prompts_name` is how a result line calls it.
        classes: drawn by their shares.
        plain: what relative objectives are relative to.
    """

    trace: Trace
    lengths: Lengths
    prompts: PromptSource
    prompts_name: str
    classes: Sequence[RequestClass] = ()
    plain: SLO = field(default_factory=SLO)

    def describe(self) -> str:
        """Say what the trace holds, how it is scaled, and what had to be cut."""
        fitted = [self.lengths(arrival) for arrival in self.trace.arrivals]
        unlimited = replace(self.lengths, max_tokens=sys.maxsize)
        num_cut = sum(
            unlimited(arrival) != fit
            for arrival, fit in zip(self.trace.arrivals, fitted, strict=True)
        )
        prompt, output = (sum(tokens) / len(fitted) for tokens in zip(*fitted, strict=True))
        return (
            f"{self.trace.name}: {len(fitted)} requests"
            + (f" ({self.trace.note})" if self.trace.note else "")
            + f"; prompts x {self.lengths.prompt_scale:g} have {prompt:.0f} tokens in the mean, "
            f"outputs x {self.lengths.output_scale:g} have {output:.0f}; {num_cut} requests are "
            f"cut to the engine's {self.lengths.max_tokens} tokens"
        )

    def window(
        self, rate_rps: float, window_s: float, *, seed: int, slo_scale: float = 1.0
    ) -> Plan:
        """Replay as many successive requests as make `rate_rps`, in the rhythm of the trace.

        The seed decides where in the trace, which class, and which prompt; the rate does not.
        """
        rng = random.Random(f"{self.trace.name} {seed}")
        count = max(1, round(rate_rps * window_s))
        arrivals, rate_scale = cut(self.trace, count, window_s, rng.random())
        return self._plan(arrivals, window_s, rate_scale, seed, slo_scale)

    def flood(self, count: int, *, seed: int) -> Plan:
        """Send requests all at once, to see how fast they leave."""
        rng = random.Random(f"{self.trace.name} {seed}")
        arrivals, _ = cut(self.trace, count, 1.0, rng.random())
        at_once = [Arrival(0.0, a.num_prompt_tokens, a.num_output_tokens) for a in arrivals]
        return self._plan(at_once, 0.0, 0.0, seed, 1.0)

    def _plan(
        self,
        arrivals: Sequence[Arrival],
        window_s: float,
        rate_scale: float,
        seed: int,
        slo_scale: float,
    ) -> Plan:
        slos = {one.name: one.slo(self.plain, slo_scale) for one in self.classes}
        requests = []
        for i, arrival in enumerate(arrivals):
            rng = random.Random(f"{self.trace.name} {seed} {i}")
            num_prompt, num_output = self.lengths(arrival)
            name = rng.choices([*slos], [one.share for one in self.classes])[0] if slos else ""
            requests.append(
                PlannedRequest(
                    arrival.arrival_s,
                    self.prompts(num_prompt, rng),
                    num_output,
                    name,
                    slos.get(name, SLO()),
                )
            )
        info = WorkloadInfo(
            num_requests=len(requests),
            window_s=window_s,
            rate_rps=len(requests) / window_s if window_s else 0.0,
            length_scale=self.lengths.output_scale,
            prompt_scale=self.lengths.prompt_scale,
            rate_scale=rate_scale,
            prompts=self.prompts_name,
            seed=seed,
            slo={name: _in_ms(slo) for name, slo in slos.items()},
        )
        return Plan(requests, info)


def cut(trace: Trace, count: int, window_s: float, place: float) -> tuple[list[Arrival], float]:
    """Take `count` successive requests and stretch the time between them to fill a window.

    Args:
        place: in [0, 1), where in the trace to begin.

    Returns:
        Requests, the first at 0, and how many times faster than in the trace they arrive.

    Raises:
        ValueError: the trace is too short, or all of them arrive at once.
    """
    limit = len(trace.arrivals) - count
    if limit < 1:
        raise ValueError(
            f"trace {trace.name} has {len(trace.arrivals)} requests, {count + 1} are needed: "
            "take a shorter window or a lower load"
        )
    start = min(int(place * len(trace.arrivals)), limit - 1)
    first_s = trace.arrivals[start].arrival_s
    # The window ends where the next request would come: [first, next).
    rate_scale = (trace.arrivals[start + count].arrival_s - first_s) / window_s
    if rate_scale <= 0.0:
        raise ValueError(f"trace {trace.name}: requests {start} to {start + count} arrive at once")
    return [
        Arrival((a.arrival_s - first_s) / rate_scale, a.num_prompt_tokens, a.num_output_tokens)
        for a in trace.arrivals[start : start + count]
    ], rate_scale


def _in_ms(slo: SLO) -> dict[str, float | None]:
    return {
        "ttft_ms": None if slo.ttft_s is None else slo.ttft_s * 1e3,
        "tpot_ms": None if slo.tpot_s is None else slo.tpot_s * 1e3,
    }
