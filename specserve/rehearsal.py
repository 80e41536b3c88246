"""A few requests through a core of its own on the engines that will serve: what the host takes."""

import numpy as np

from specserve.core import SpecServe
from specserve.request import Request

NUM_REQUESTS = 4
NUM_PROMPT_TOKENS, NUM_OUTPUT_TOKENS = 8, 24


def host_s(core: SpecServe, vocab_size: int) -> float:
    """Serve some requests to their ends; return the median time of a step beside the engines.

    In seconds, of the core's clock.
    """
    random = np.random.default_rng(0)
    for _ in range(NUM_REQUESTS):
        prompt: list[int] = random.integers(0, vocab_size, NUM_PROMPT_TOKENS).tolist()
        core.scheduler.submit(Request(prompt, NUM_OUTPUT_TOKENS), core.clock())
    times = []
    while core.scheduler.has_work:
        started, engines_s = core.clock(), _engines_s(core)
        core.step()
        times.append(core.clock() - started - (_engines_s(core) - engines_s))
    core.release_ended()
    return float(np.median(times))


def _engines_s(core: SpecServe) -> float:
    return core.stats.draft_s + core.stats.verify_s
