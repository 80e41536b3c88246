"""Speculation changes when tokens come, never which: the promise everything else rests on.

Two kinds of proof. Token for token: whatever the policy, the workload and the memory, each request
gets exactly what plain decoding of the target gives. By distribution: outputs of many seeds against
the exactly enumerated distribution, so that a fault shared by both ways of decoding shows too.

Every chi-square check asks for p > 1e-4 over fixed seeds: the result never changes from run to run,
and had the seeds been drawn anew, one check in 10,000 would fail by chance.
"""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import FakeClock, all_policies, drive, drive_fast, make_core, make_request
from hypothesis import given, settings
from hypothesis import strategies as st
from paged_lm import FlakyLM, PagedLM, plain_decode

from bench import lossless
from bench.chi_square import (
    chi_square,
    independent_uniforms,
    likeliest_as_often_as_claimed,
    transform,
)
from bench.lossless_cases import Case, sampled_cases
from bench.reference import reference_logits, reference_probs
from bench.textbook import SampledDraftEngine, TextbookSampler, TokenReader, VerifyAll
from specserve.config import PolicyConfig
from specserve.engines.model_target import ModelTargetEngine
from specserve.policies import POLICIES
from specserve.request import SLO, Request
from specserve.sampling_params import SamplingParams

BLOCK_SIZE = 4
VOCAB_SIZE = 17
FALSE_ALARM = 1e-4


def name_of(policy: PolicyConfig | str) -> str:
    return policy if isinstance(policy, str) else policy.name


# Every parameter by itself, and all of them together; tokens 0 to 16.
SAMPLING = [
    pytest.param({"temperature": 0.5}, id="temperature"),
    pytest.param({"temperature": 1.0, "top_k": 3}, id="top-k"),
    pytest.param({"temperature": 1.0, "top_p": 0.6}, id="top-p"),
    pytest.param({"temperature": 1.0, "min_p": 0.3}, id="min-p"),
    pytest.param({"repetition_penalty": 1.7}, id="repetition, greedy"),
    pytest.param({"temperature": 0.7, "repetition_penalty": 1.7}, id="repetition"),
    pytest.param({"temperature": 0.7, "presence_penalty": 2.0}, id="presence"),
    pytest.param({"temperature": 0.7, "frequency_penalty": 1.0}, id="frequency"),
    pytest.param({"frequency_penalty": 3.0}, id="frequency, greedy"),
    pytest.param({"temperature": 0.7, "logit_bias": ((3, 2.0), (5, -9.0))}, id="logit bias"),
    pytest.param({"logit_bias": ((3, 4.0),)}, id="logit bias, greedy"),
    pytest.param({"temperature": 0.7, "bad_words": ((3,), (5, 6), (7, 8, 9))}, id="bad words"),
    pytest.param({"bad_words": ((3,), *((a, 5) for a in range(9)))}, id="bad words, greedy"),
    pytest.param({"temperature": 0.7, "end_id": 2, "min_tokens": 9}, id="min tokens"),
    pytest.param({"logit_bias": ((2, 4.0),), "end_id": 2, "min_tokens": 9}, id="min, greedy"),
    pytest.param(
        {
            "temperature": 0.8, "top_k": 12, "top_p": 0.9, "min_p": 0.02, "end_id": 2,
            "repetition_penalty": 1.2, "presence_penalty": 0.3, "frequency_penalty": 0.2,
            "logit_bias": ((4, 1.0),), "bad_words": ((5, 6), (7,)), "min_tokens": 5,
        },
        id="all together",
    ),
]  # fmt: skip


# -- token for token: random workloads ---------------------------------------------------------


@dataclass(frozen=True)
class Workload:
    """Requests, when they come and go, and a server too small for them."""

    requests: list[Request]
    arrivals: list[int]
    aborts: dict[int, list[Request]]
    limits: dict[str, int]
    draft_noise: float
    draft_failure_rate: float


@st.composite
def workloads(draw: Any) -> Workload:
    """Draw a workload; a seeded generator fills it in, which shrinks worse and draws far faster."""
    rng = random.Random(draw(st.integers(0, 2**32)))
    num_requests = draw(st.integers(1, 6))
    requests = [_random_request(rng) for _ in range(num_requests)]
    longest = max(request.num_prompt_tokens + request.max_tokens for request in requests)
    max_num_seqs = rng.randint(1, 6)
    limits = {
        "num_blocks": -(-longest // BLOCK_SIZE) + rng.choice([0, 0, 1, 3, 40]),
        "max_num_seqs": max_num_seqs,
        "max_num_batched_tokens": max_num_seqs + rng.choice([0, 1, 3, 20, 200]),
        "prefill_chunk_tokens": rng.choice([1, 2, 5, 16, 64]),
    }
    return Workload(
        requests,
        arrivals=[rng.choice([0, 0, rng.randint(0, 20)]) for _ in requests],
        aborts={rng.randint(1, 15): [rng.choice(requests)]} if rng.random() < 0.3 else {},
        limits=limits,
        draft_noise=rng.choice([0.0, 0.5, 1.5, 1.5, 8.0]),
        draft_failure_rate=rng.choice([0.0, 0.0, 0.3]),
    )


def _random_request(rng: random.Random) -> Request:
    values: dict[str, Any] = {}
    if rng.random() < 0.4:
        values |= {"temperature": rng.choice([0.3, 1.0]), "seed": rng.randrange(2**64)}
    if rng.random() < 0.3:
        values |= {"repetition_penalty": 1.3, "frequency_penalty": 0.5}
    if rng.random() < 0.3:
        values |= {"end_id": rng.randrange(VOCAB_SIZE), "min_tokens": rng.randint(0, 6)}
    if rng.random() < 0.3:
        values["max_draft_tokens"] = rng.choice([0, 1, 3])
    if rng.random() < 0.2:
        values["num_draft_tokens"] = rng.choice([0, 1, 2, 5])
    values["draft_source"] = rng.choice(["model", "ngram", "auto", "auto"])
    values["slo"] = rng.choice([SLO(), SLO(), SLO(0.05, 0.02), SLO(None, 0.005)])
    prompt = [rng.randrange(VOCAB_SIZE) for _ in range(rng.choice([1, 2, 5, 17, 30]))]
    prompt *= rng.choice([1, 1, 2])  # a prompt that repeats itself, for prompt lookup
    return make_request(prompt, rng.choice([1, 2, 5, 14]), **values)


@pytest.mark.parametrize("policy", all_policies())
@settings(max_examples=50)
@given(workload=workloads())
def test_every_request_gets_exactly_what_plain_decoding_gives(
    policy: PolicyConfig, workload: Workload
) -> None:
    num_blocks = workload.limits["num_blocks"]
    target = PagedLM(num_blocks, BLOCK_SIZE, vocab_size=VOCAB_SIZE)
    draft = FlakyLM(
        num_blocks,
        BLOCK_SIZE,
        vocab_size=VOCAB_SIZE,
        noise=workload.draft_noise,
        failure_rate=workload.draft_failure_rate,
    )
    core = make_core(policy, target=target, draft=draft, block_size=BLOCK_SIZE, **workload.limits)
    outputs = drive(core, workload.requests, arrivals=workload.arrivals, aborts=workload.aborts)
    aborted = {request.key for requests in workload.aborts.values() for request in requests}
    for request, output in zip(workload.requests, outputs, strict=True):
        prompt = request.prompt_token_ids
        expected = plain_decode(target, prompt, request.max_tokens, request.sampling)
        if request.key in aborted:  # it may have finished before
            expected = expected[: len(output)]
        assert output == expected


@pytest.mark.parametrize("values", SAMPLING)
@pytest.mark.parametrize(
    "policy", ["specserve", "adaptive", PolicyConfig(name="fixed", num_draft_tokens=4)], ids=name_of
)
def test_every_sampling_parameter_gives_the_tokens_of_plain_decoding(
    policy: PolicyConfig | str, values: dict[str, Any]
) -> None:
    core = make_core(policy)
    target = PagedLM()
    requests = [make_request([i, 2, 3], 24, seed=i, **values) for i in range(12)]
    expected = [plain_decode(target, r.prompt_token_ids, 24, r.sampling) for r in requests]
    assert drive(core, requests) == expected
    assert core.stats.num_accepted_tokens > 0, "nothing was speculated: the test proves nothing"


def test_preemption_really_happens_in_a_tiny_cache_and_changes_nothing() -> None:
    target = PagedLM(10, 4)
    draft = PagedLM(10, 4, noise=1.5)
    core = make_core("adaptive", target=target, draft=draft, num_blocks=10, max_num_seqs=4)
    requests = [make_request([i, 5, 9], 30, temperature=0.8 * (i % 2), seed=i) for i in range(5)]
    outputs = drive(core, requests)
    assert core.scheduler.num_preemptions > 0
    for request, output in zip(requests, outputs, strict=True):
        assert output == plain_decode(target, request.prompt_token_ids, 30, request.sampling)


@pytest.mark.parametrize(
    ("draft", "low", "high"),
    [
        pytest.param({"noise": 0.0}, 1.0, 1.0, id="always agrees"),
        pytest.param({"noise": 1.5}, 0.2, 0.95, id="agrees sometimes"),
        pytest.param({"scale": -1.0}, 0.0, 0.05, id="never agrees"),
    ],
)
def test_acceptance_is_the_draft_models_merit_and_output_is_not(
    draft: dict[str, float], low: float, high: float
) -> None:
    policy = PolicyConfig(name="fixed", num_draft_tokens=3)
    core = make_core(policy, draft=PagedLM(**draft))
    requests = [make_request([i, 2, 3], 30) for i in range(8)]
    outputs = drive(core, requests)
    assert low <= core.stats.num_accepted_tokens / core.stats.num_verified_tokens <= high
    assert outputs == drive(make_core("none"), [make_request([i, 2, 3], 30) for i in range(8)])


def test_a_draft_that_always_agrees_still_does_after_a_pause() -> None:
    """Guards against holes in the draft's KV: tokens it missed while it did not draft (D10)."""
    clock = FakeClock()
    draft = FlakyLM(failure_rate=0.0)
    policy = PolicyConfig(name="fixed", num_draft_tokens=3)
    core = make_core(policy, draft=draft, clock=clock, draft_retry_s=10.0)
    core.scheduler.submit(make_request([1, 2, 3], 60))
    for step in range(14):
        draft.failure_rate = 1.0 if step == 3 else 0.0  # one failure, then silence until step 9
        clock.now = 20.0 if step >= 9 else 0.0
        core.step()
    assert core.stats.num_verified_tokens == core.stats.num_accepted_tokens == (2 + 5) * 3
    assert core.stats.num_output_tokens == 14 + (2 + 5) * 3


# -- by distribution ---------------------------------------------------------------------------


def enumerate_outputs(
    model: PagedLM, prompt: Sequence[int], length: int, params: SamplingParams
) -> dict[tuple[int, ...], float]:
    """Return the exact probability of every output of this length."""
    outputs: dict[tuple[int, ...], float] = {(): 1.0}
    for _ in range(length):
        longer = {}
        for output, prob in outputs.items():
            context = [*prompt, *output]
            logits = reference_logits(model.logits(context), params, context, len(prompt))
            for token_id, p in enumerate(reference_probs(logits, params)):
                longer[(*output, token_id)] = prob * p
        outputs = longer
    return outputs


@pytest.mark.parametrize(
    "values",
    [
        {"temperature": 0.5},
        {"temperature": 0.7},
        {"temperature": 1.0},
        {"temperature": 1.0, "top_p": 0.7},
        {"temperature": 1.0, "top_k": 2},
        {"temperature": 1.0, "min_p": 0.4},
        {"temperature": 0.7, "repetition_penalty": 1.5, "presence_penalty": 0.7},
        {"temperature": 0.7, "frequency_penalty": 1.5, "top_p": 0.9},
        {"temperature": 1.0, "logit_bias": ((1, 2.0),), "bad_words": ((1, 1), (3,))},
    ],
    ids=str,
)
@pytest.mark.parametrize(
    "policy",
    [PolicyConfig(name="fixed", num_draft_tokens=2), "adaptive", "specserve"],
    ids=name_of,
)
def test_outputs_are_distributed_as_the_target(
    policy: PolicyConfig | str, values: dict[str, Any]
) -> None:
    target, prompt, num_requests = PagedLM(200, vocab_size=5, seed=7), [1, 4, 2], 2000
    draft = PagedLM(200, vocab_size=5, seed=7, noise=1.0)
    core = make_core(policy, target=target, draft=draft, num_blocks=200, max_num_seqs=16)
    requests = [make_request(prompt, 3, seed=i, **values) for i in range(num_requests)]
    counts = Counter(map(tuple, drive_fast(core, requests)))
    probs = enumerate_outputs(target, prompt, 3, requests[0].sampling)
    assert core.stats.num_accepted_tokens > 0
    assert chi_square(counts, probs) > FALSE_ALARM


@pytest.mark.parametrize("seed_of", [lambda i: 0, lambda i: i % 50], ids=["one seed", "50 seeds"])
def test_the_check_sees_that_requests_share_their_randomness(
    seed_of: Callable[[int], int],
) -> None:
    """Guards the check itself, against a generator that is seeded alike for all requests."""
    target, prompt = PagedLM(200, vocab_size=5, seed=7), [1, 4, 2]
    core = make_core("none", target=target, num_blocks=200)
    requests = [make_request(prompt, 2, seed=seed_of(i), temperature=1.0) for i in range(1000)]
    counts = Counter(map(tuple, drive_fast(core, requests)))
    assert chi_square(counts, enumerate_outputs(target, prompt, 2, requests[0].sampling)) < 1e-9


# -- the check bites: a selection that reads the token it judges (D14) -------------------------

TWO_TOKENS = np.array([0.7, 0.3])


class TwoTokenLM(PagedLM):
    """The target of the example: {0: .7, 1: .3} after any context."""

    def __init__(self) -> None:
        super().__init__(vocab_size=2)

    def _logits(self, hashes: Any) -> Any:
        return np.tile(np.log(TWO_TOKENS).astype(np.float32), (len(hashes), 1))


def outputs_of(policy: VerifyAll, *, by_the_book: bool) -> Counter[tuple[int, ...]]:
    draft = SampledDraftEngine(TwoTokenLM())
    target = TwoTokenLM()
    sampler = TextbookSampler(target, draft) if by_the_book else None
    core = make_core(
        policy_object=policy, draft_engine=draft, target_engine=ModelTargetEngine(target, sampler)
    )
    requests = [make_request([1], 3, temperature=1.0, seed=i) for i in range(3000)]
    return Counter(map(tuple, drive_fast(core, requests)))


def three_tokens() -> dict[tuple[int, ...], float]:
    return {
        output: float(np.prod(TWO_TOKENS[list(output)]))
        for output in itertools.product(range(2), repeat=3)
    }


def test_textbook_verification_passes_the_check_while_selection_reads_no_token() -> None:
    assert chi_square(outputs_of(VerifyAll(), by_the_book=True), three_tokens()) > FALSE_ALARM


def test_selection_that_reads_sampled_tokens_fails_the_check() -> None:
    counts = outputs_of(TokenReader(), by_the_book=True)
    assert chi_square(counts, three_tokens()) < 1e-50
    # The output's second token is the first with a draft. Kept or not, P(0) = .7 + .3 * .7.
    second = sum(n for output, n in counts.items() if output[1] == 0) / sum(counts.values())
    assert second == pytest.approx(0.91, abs=0.02)


def test_our_verification_passes_the_check_even_under_that_selection() -> None:
    """A draft token is kept iff the target draws it itself, so no selection can bias it."""
    counts = outputs_of(TokenReader(), by_the_book=False)
    assert chi_square(counts, three_tokens()) > FALSE_ALARM


# -- the same on the demo pair: what `bench.lossless` measures at full size --------------------


@pytest.fixture(scope="module")
def check(demo_engines: Path) -> lossless.Check:
    options = lossless.parse(["--quick", "--threads", "1"])
    return lossless.Check(options)


@pytest.mark.openvino
@pytest.mark.slow
def test_the_papers_rule_is_rejected_on_the_demo_pair(check: lossless.Check) -> None:
    assert check.token_reader().p_value < FALSE_ALARM


@pytest.mark.openvino
@pytest.mark.slow
def test_a_sampled_case_passes_on_the_demo_pair(check: lossless.Check) -> None:
    row = check.judge(Case("", "specserve", "auto", [{"temperature": 0.7, "top_p": 0.9}]))
    _, verified, accepted = row.served.draft_tokens
    assert 0 < accepted < verified
    assert row.p_value > FALSE_ALARM


def test_the_cases_cover_every_policy_source_and_parameter() -> None:
    cases = list(sampled_cases([[1, 2, 3, 4, 5, 6, 7, 8, 1, 2]]))
    assert len({case.name for case in cases}) == len(cases) >= 30
    assert {case.arm for case in cases} >= {*POLICIES, "fixed_4"} - {"fixed"}
    assert {case.source for case in cases} == {"model", "ngram", "auto"}
    asked = {name for case in cases for params in case.params for name in params}
    assert asked == {f.name for f in fields(SamplingParams)} - {"seed", "return_log_probs"}


def test_places_of_drawn_tokens_are_uniform_and_of_favoured_ones_are_not() -> None:
    random = np.random.default_rng(0)
    probs = random.dirichlet(np.ones(9), 4000)
    fair = [int(random.choice(9, p=row)) for row in probs]
    favoured = [
        int(row.argmax()) if random.random() < 0.1 else t
        for row, t in zip(probs, fair, strict=True)
    ]
    for token_ids, low, high in ((fair, FALSE_ALARM, 1.0), (favoured, 0.0, FALSE_ALARM)):
        pairs = zip(probs, token_ids, strict=True)
        places = np.array([transform(row, t, random.random()) for row, t in pairs])
        assert low <= independent_uniforms([places]) <= high
        hits = probs.argmax(axis=1) == np.array(token_ids)
        assert low <= likeliest_as_often_as_claimed(hits, probs.max(axis=1)) <= high


def test_values_that_repeat_are_not_independent() -> None:
    values = np.random.default_rng(0).random(2000)
    assert independent_uniforms([values]) > FALSE_ALARM
    assert independent_uniforms([np.repeat(values, 2)]) < 1e-50


def test_an_impossible_token_fails_the_check() -> None:
    place = transform(np.array([0.5, 0.5, 0.0]), 2, 0.5)
    assert independent_uniforms([np.append(np.random.default_rng(0).random(999), place)]) == 0.0
