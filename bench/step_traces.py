"""What a server says of its steps in the answers to requests, put together again, step by step.

A step is in the trace of every request that got something from it. Server and client are on one
machine and read the same monotonic clock.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from bench.cells import StepSample

SAME_STEP_S = 1e-4  # rounding moves the end of a step by less, and no step is as short


def steps_of(tensors: Mapping[str, Any], start_s: float) -> list[StepSample]:
    """Read the steps of one answer, counting only this request's tokens.

    Args:
        tensors: of its last response; `step_trace` is in it if the request asked for it.
        start_s: of the window, which is 0 for the samples.
    """
    if "step_trace" not in tensors:
        return []
    arrival_s = int(tensors["arrival_time_ns"]) / 1e9 - start_s
    return [
        StepSample(
            t_s=arrival_s + step["at_s"],
            num_rows=step["num_rows"],
            drafted=step["num_drafted_tokens"],
            verified=step["num_verified_tokens"],
            accepted=step["num_accepted_tokens"],
            predicted_s=step["predicted_s"],
            measured_s=step["measured_s"],
        )
        for step in json.loads(tensors["step_trace"])
    ]


def merged(samples: Iterable[StepSample]) -> list[StepSample]:
    """Return every step once, in order, with the tokens of all its requests."""
    steps: list[StepSample] = []
    for sample in sorted(samples, key=lambda sample: sample.t_s):
        if steps and sample.t_s - steps[-1].t_s < SAME_STEP_S:
            last = steps[-1]
            steps[-1] = replace(
                last,
                drafted=last.drafted + sample.drafted,
                verified=last.verified + sample.verified,
                accepted=last.accepted + sample.accepted,
            )
        else:
            steps.append(sample)
    return steps
