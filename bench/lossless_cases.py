"""What `bench.lossless` tries: policies, draft sources and sampling parameters, in combination."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from specserve.policies import POLICIES

Params = dict[str, Any]

FIXED = ("fixed_1", "fixed_4", "fixed_8")
SPECULATING = (*(name for name in POLICIES if name not in ("none", "fixed")), *FIXED)
TEMPERATURES = (0.7, 1.0)
QUICK = ("specserve, auto, T 1", "fixed_4, model, repetition")  # of the cases below


@dataclass(frozen=True, slots=True)
class Case:
    """One way to serve, and what requests ask of the distribution.

    Attributes:
        arm: see `bench.arms`.
        source: who drafts, see `specserve.batch.Row`.
        params: of `SamplingParams`, taken in turn by the requests.
    """

    name: str
    arm: str
    source: str
    params: Sequence[Params]


def sampled_cases(prompts: Sequence[Sequence[int]]) -> Iterator[Case]:
    """Yield the cases; biased and forbidden tokens are the prompts' commonest ones."""
    parameters = _parameters(prompts)
    for temperature in TEMPERATURES:
        yield _plain("none", "model", temperature)
        for arm in SPECULATING:
            yield _plain(arm, "model", temperature)
        yield _plain("specserve", "auto", temperature)
    for arm in SPECULATING:
        yield _plain(arm, "ngram", 0.7)
    for arm, source in (("specserve", "auto"), ("fixed_4", "model")):
        for name, params in parameters.items():
            yield Case(f"{arm}, {source}, {name}", arm, source, [params])
    everything = [*parameters.values(), *({"temperature": t} for t in (*TEMPERATURES, 1.5))]
    yield Case("specserve, auto, side by side", "specserve", "auto", everything)


def greedy_cases(prompts: Sequence[Sequence[int]]) -> Iterator[Case]:
    """Yield the cases in which every text must be that of plain decoding."""
    bias = _parameters(prompts)["logit bias"]["logit_bias"]
    params = [{}, {}, {"repetition_penalty": 1.2}, {"frequency_penalty": 0.5, "logit_bias": bias}]
    for arm in SPECULATING:
        for source in ("model", "ngram", *(["auto"] if arm == "specserve" else [])):
            yield Case(f"{arm}, {source}, greedy", arm, source, params)


def _plain(arm: str, source: str, temperature: float) -> Case:
    return Case(f"{arm}, {source}, T {temperature:g}", arm, source, [{"temperature": temperature}])


def _parameters(prompts: Sequence[Sequence[int]]) -> dict[str, Params]:
    tokens = Counter(token_id for prompt in prompts for token_id in prompt)
    first, second, third, *_ = (token_id for token_id, _ in tokens.most_common())
    (pair, _), *_ = Counter(p for prompt in prompts for p in pairwise(prompt)).most_common(1)
    bias = ((first, -1.0), (second, 1.5))
    return {
        "top-p": {"temperature": 1.0, "top_p": 0.8},
        "top-k": {"temperature": 1.0, "top_k": 20},
        "min-p": {"temperature": 1.0, "min_p": 0.05},
        "repetition": {"temperature": 0.7, "repetition_penalty": 1.2},
        "presence and frequency": {
            "temperature": 0.7, "presence_penalty": 0.5, "frequency_penalty": 0.3,
        },
        "logit bias": {"temperature": 0.7, "logit_bias": bias},
        "bad words": {"temperature": 0.7, "bad_words": ((third,), pair)},
        "all together": {
            "temperature": 0.9, "top_p": 0.95, "top_k": 200, "min_p": 0.005, "logit_bias": bias,
            "repetition_penalty": 1.1, "presence_penalty": 0.2, "frequency_penalty": 0.1,
            "bad_words": ((third,), pair), "end_id": second, "min_tokens": 1000,
        },
    }  # fmt: skip
