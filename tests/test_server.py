"""The shipped model repository on a real tritonserver, asked by real clients.

The demo pair in f32, where greedy output does not depend on what else is in the batch. What is
right comes from plain decoding with the same engine in this process, and for sampling from the
exactly enumerated distribution.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import grpc
import numpy as np
import pytest
from scipy import stats
from server_client import (
    MODELS,
    STREAMS,
    Reference,
    cut_at,
    events,
    generate,
    generate_stream,
    grpc_leaving,
    grpc_many,
    grpc_one,
    grpc_one_stream,
    grpc_raw,
    grpc_status,
    http_many,
    http_post,
    request_output,
    text_of,
    wait_until,
    wait_until_idle,
)

from bench.prompts import held_out_prompts
from bench.served import Served, serving
from specserve.launch.installation import find_installation

pytestmark = [
    pytest.mark.triton,
    pytest.mark.openvino,
    pytest.mark.skipif(find_installation() is None, reason="nvidia-pytriton is not installed"),
]

NUM_PROMPTS = 52
PROMPT_TOKENS = 40
MAX_TOKENS = 20
FALSE_ALARM = 1e-4
SAMPLED = {"temperature": 1.0, "top_p": 0.95}
EVERY_MODEL = pytest.mark.parametrize("model", MODELS)
REASONS = {"prompt", "owed", "yield", "cap", "off", "explore", "fixed"}
CODE = "import os\nimport sys\n\ndef main(argv):\n    "


class Greedy(NamedTuple):
    """Prompts and what plain greedy decoding makes of them."""

    prompts: list[str]
    texts: list[str]

    def requests(self, count: int = NUM_PROMPTS, **tensors: Any) -> list[dict[str, Any]]:
        """Return the requests of the first `count` prompts."""
        values = {"max_tokens": MAX_TOKENS, "stream": True, **tensors}
        return [{"text_input": prompt, **values} for prompt in self.prompts[:count]]


@pytest.fixture(scope="module")
def server(demo_engines: Path) -> Iterator[Served]:
    """Rows for 16 streams and a few more, so that one test can fill them all."""
    overrides = ["scheduler.max_num_seqs=20"]
    with serving([f"engine.dir={demo_engines}", "engine.precision=f32", *overrides]) as served:
        yield served


@pytest.fixture(scope="module")
def small_server(demo_engines: Path) -> Iterator[Served]:
    """Eight KV blocks, which four rows of two blocks fill as they start and outgrow later."""
    overrides = ["scheduler.kv_cache_tokens=256", "scheduler.max_num_seqs=4"]
    with serving([f"engine.dir={demo_engines}", "engine.precision=f32", *overrides]) as served:
        yield served


@pytest.fixture(scope="module")
def reference(demo_engines: Path) -> Reference:
    return Reference(demo_engines)


@pytest.fixture(scope="module")
def greedy(reference: Reference) -> Greedy:
    windows = held_out_prompts(reference.tokenizer, NUM_PROMPTS, PROMPT_TOKENS)
    prompts = [reference.tokenizer.decode(window) for window in windows]
    return Greedy(prompts, reference.texts(prompts, MAX_TOKENS))


@pytest.fixture(scope="module")
def long_text(reference: Reference) -> str:
    """What greedy decoding makes of `CODE` in 48 tokens."""
    return reference.texts([CODE], 48)[0]


# -- lossless: greedy --------------------------------------------------------------------------


@pytest.mark.parametrize("concurrency", [1, STREAMS])
def test_greedy_text_is_plain_decodings(server: Served, greedy: Greedy, concurrency: int) -> None:
    """Every other request fixes its draft length: a policy may find no draft worth its time."""
    before = server.metrics()
    requests = greedy.requests()
    for request in requests[::2]:
        request["num_draft_tokens"] = 4
    answers = grpc_many(server, "ensemble", requests, concurrency)
    assert [answer.text for answer in answers] == greedy.texts
    rise = speculation_since(server, before, at_least=NUM_PROMPTS * MAX_TOKENS // 4)
    assert NUM_PROMPTS < rise["accepted"] < rise["verified"]


@EVERY_MODEL
def test_16_grpc_streams_at_once(server: Served, greedy: Greedy, model: str) -> None:
    answers = grpc_many(server, model, greedy.requests(STREAMS))
    assert [answer.text for answer in answers] == greedy.texts[:STREAMS]
    assert all(len(answer.texts) > 1 for answer in answers), "not streamed"


@EVERY_MODEL
def test_16_http_streams_at_once(server: Served, greedy: Greedy, model: str) -> None:
    assert http_many(server, model, greedy.requests(STREAMS)) == greedy.texts[:STREAMS]


@EVERY_MODEL
def test_16_requests_share_one_grpc_stream(server: Served, greedy: Greedy, model: str) -> None:
    answers = grpc_one_stream(server, model, greedy.requests(STREAMS))
    assert [answer.text for answer in answers] == greedy.texts[:STREAMS]


@EVERY_MODEL
def test_generate_gives_the_concatenated_stream(server: Served, model: str, long_text: str) -> None:
    body = {"text_input": CODE, "max_tokens": 48}
    stream = generate_stream(server, model, **body, stream=True)
    assert len(stream) > 1
    assert text_of(stream) == long_text
    status, answer = generate(server, model, **body)
    assert (status, answer["text_output"]) == (200, long_text)
    assert generate(server, model, **body, stream=False)[1]["text_output"] == long_text


@EVERY_MODEL
def test_without_stream_tensor_there_is_one_response(
    server: Served, model: str, long_text: str
) -> None:
    answer = grpc_one(server, model, text_input=CODE, max_tokens=48)
    assert answer.texts == [long_text]
    assert answer.finals == [True]
    assert text_of(generate_stream(server, model, text_input=CODE, max_tokens=48)) == long_text


@EVERY_MODEL
def test_final_flag_comes_once_and_last(server: Served, model: str) -> None:
    answer = grpc_one(server, model, text_input=CODE, max_tokens=12, stream=True)
    assert answer.finals == [False] * (len(answer.finals) - 1) + [True]


def test_input_ids_stand_for_text(server: Served, reference: Reference, long_text: str) -> None:
    answer = grpc_one(server, "specserve", input_ids=reference.encode(CODE), max_tokens=48)
    assert answer.text == long_text


# -- lossless: sampling ------------------------------------------------------------------------


def sampled_text(server: Served, **tensors: Any) -> str:
    """Return one sampled text of `ensemble`."""
    values = {"text_input": CODE, "max_tokens": 32, **SAMPLED, **tensors}
    return grpc_one(server, "ensemble", **values).text


@pytest.mark.parametrize(
    "tensors",
    [
        {"seed": 7},
        {"random_seed": 7},
        {"seed": 7, "random_seed": 7},
        {"seed": 7, "stream": True},
        {"seed": 7, "max_draft_tokens": 0},
        {"seed": 7, "draft_source": "none"},
        {"seed": 7, "num_draft_tokens": 5},
    ],
    ids=str,
)
def test_seed_reproduces_the_text(
    server: Served, reference: Reference, tensors: dict[str, Any]
) -> None:
    expected = reference.texts([CODE], 32, seed=7, **SAMPLED)[0]
    assert [sampled_text(server, **tensors) for _ in range(2)] == [expected] * 2


def test_seed_reproduces_the_text_beside_16_others(
    server: Served, reference: Reference, greedy: Greedy
) -> None:
    others = greedy.requests(STREAMS, temperature=1.0)
    mine = {"text_input": CODE, "max_tokens": 32, "seed": 7, **SAMPLED}
    requests = [*others[:8], mine, *others[8:], mine]
    answers = grpc_many(server, "ensemble", requests, concurrency=len(requests))
    expected = reference.texts([CODE], 32, seed=7, **SAMPLED)[0]
    assert [answers[8].text, answers[-1].text] == [expected] * 2


def test_different_seeds_differ(server: Served) -> None:
    texts = {sampled_text(server, seed=seed) for seed in (0, 1, 2**32, 2**64 - 1)}
    assert len(texts) == 4


def test_without_a_seed_two_calls_differ(server: Served) -> None:
    assert sampled_text(server) != sampled_text(server)


def test_top_k_1_is_greedy(server: Served, greedy: Greedy) -> None:
    requests = greedy.requests(4, temperature=1.0, top_k=1)
    assert [a.text for a in grpc_many(server, "ensemble", requests)] == greedy.texts[:4]


def test_sampled_texts_have_the_targets_distribution(server: Served, reference: Reference) -> None:
    """Chi-square over texts of three tokens, the later two drafted.

    The seeds are fixed, so the result is the same in every run; had they been drawn anew, one
    right server in 10,000 would fail. A temperature of .8 for .7 would be seen in 93 of 100 runs, a
    recovered token drawn without leaving out the rejected one in all.
    """
    prompt, sampling = "def test_", {"top_k": 4, "temperature": 0.7}
    exact = reference.text_probs(prompt, 3, **sampling)
    tensors = {"text_input": prompt, "max_tokens": 3, "end_id": -1, "num_draft_tokens": 1}
    requests = [{**tensors, **sampling, "seed": seed} for seed in range(1500)]
    before = server.metrics()
    counts = Counter(a.text for a in grpc_many(server, "specserve", requests, concurrency=48))
    assert set(counts) <= set(exact), "a text outside the target's support"
    large = [text for text, p in exact.items() if p * len(requests) >= 5]
    observed = [counts[text] for text in large]
    expected = [exact[text] * len(requests) for text in large]
    observed.append(len(requests) - sum(observed))
    expected.append(len(requests) - sum(expected))
    assert len(large) > 15
    assert stats.chisquare(observed, expected).pvalue > FALSE_ALARM
    rise = speculation_since(server, before, at_least=len(requests) // 10)
    assert 0 < rise["accepted"] < rise["verified"]


def speculation_since(
    server: Served, before: Mapping[str, float], at_least: int
) -> dict[str, float]:
    """Return how far the counters rose, once so many draft tokens were verified."""

    def rise(name: str) -> float:
        full = f"specserve_{name}_tokens_total"
        return server.metrics()[full] - before[full]

    wait_until(lambda: rise("verified") >= at_least, f"{at_least} draft tokens verified")
    return {name: rise(name) for name in ("accepted", "verified")}


# -- text: stop words, characters, ends --------------------------------------------------------


@EVERY_MODEL
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("at", [5, 17, 30])
def test_stop_word_across_token_borders_ends_the_text(
    server: Served, long_text: str, model: str, stream: bool, at: int
) -> None:
    words = [long_text[at : at + 9]]
    tensors = {"text_input": CODE, "max_tokens": 48, "stop_words": words, "stream": stream}
    assert grpc_one(server, model, **tensors).text == cut_at(long_text, words)


@pytest.mark.parametrize("stream", [False, True])
def test_first_of_several_stop_words_ends_the_text(
    server: Served, long_text: str, stream: bool
) -> None:
    words = ["never there", long_text[40:49], long_text[20:29], long_text[60:64]]
    tensors = {"text_input": CODE, "max_tokens": 48, "stop_words": words, "stream": stream}
    answer = grpc_one(server, "ensemble", **tensors)
    assert answer.text == cut_at(long_text, words)
    assert generate(server, "ensemble", **{**tensors, "stream": False})[1]["text_output"] == (
        answer.text
    )


@pytest.mark.parametrize("stream", [False, True])
def test_half_a_stop_word_at_the_end_is_text(server: Served, long_text: str, stream: bool) -> None:
    words = [f"{long_text[-4:]}\u2603", ""]
    tensors = {"text_input": CODE, "max_tokens": 48, "stop_words": words, "stream": stream}
    assert grpc_one(server, "ensemble", **tensors).text == long_text


def test_stop_word_frees_the_request(server: Served, long_text: str) -> None:
    words, max_tokens = [long_text[5:14]], 4000
    before = server.metrics()["specserve_output_tokens_total"]
    grpc_one(server, "ensemble", text_input=CODE, max_tokens=max_tokens, stop_words=words)
    wait_until_idle(server)
    spent = server.metrics()["specserve_output_tokens_total"] - before
    assert spent < max_tokens / 4, "it ran on behind its stop word"


# Weights that make the four bytes of one emoji, a token each, come in their order; a frequency
# penalty puts each behind the others once it is out. The two-byte characters only share bytes.
EMOJI = {
    "embedding_bias_words": ["\U0001f600", "\u00df", "\u00d8", "\u00c0"],
    "embedding_bias_weights": [1000.0, -25.0, -50.0, -75.0],
    "frequency_penalty": 100.0,
}


@EVERY_MODEL
@pytest.mark.parametrize("draft", [{}, {"num_draft_tokens": 3}], ids=["adaptive", "fixed"])
def test_streamed_text_never_breaks_a_character(
    server: Served, model: str, draft: dict[str, int]
) -> None:
    tensors = {"text_input": "x = '", "max_tokens": 38, **EMOJI, **draft}  # ends in half a tenth
    answer = grpc_one(server, model, **tensors, stream=True)
    assert "".join(answer.texts) == "\U0001f600" * 9
    assert all(text == "\U0001f600" * len(text) for text in answer.texts)
    assert grpc_one(server, model, **tensors).texts == ["\U0001f600" * 9]


def test_stop_word_of_several_bytes_ends_the_text(server: Served) -> None:
    tensors = {"text_input": "x = '", "max_tokens": 38, **EMOJI, "stop_words": ["\U0001f600" * 3]}
    answer = grpc_one(server, "ensemble", **tensors, stream=True, return_num_output_tokens=True)
    assert answer.text == ""
    assert answer.last("num_output_tokens") == 12


@EVERY_MODEL
def test_prompt_of_any_characters_comes_back_whole(server: Served, model: str) -> None:
    prompt = "s = '\u00e9\u4e2d\u6587\u2603\U0001f600\x00\r\n' # "
    tensors = {"text_input": prompt, "max_tokens": 4}
    output = grpc_one(server, model, **tensors).text
    assert grpc_one(server, model, **tensors, exclude_input_in_output=False).text == prompt + output


def test_end_id_ends_the_output_but_not_before_min_tokens(
    server: Served, reference: Reference
) -> None:
    output = request_output(reference.run([CODE], 48)[0])
    end_id = output[9]
    first = output.index(end_id)
    tensors = {"text_input": CODE, "max_tokens": 48, "end_id": end_id}
    tensors["return_num_output_tokens"] = True
    answer = grpc_one(server, "ensemble", **tensors)
    assert answer.last("num_output_tokens") == first + 1
    assert answer.text.startswith(reference.tokenizer.decode(output[:first]))
    for name in ("min_tokens", "min_length"):
        later = grpc_one(server, "ensemble", **tensors, **{name: 20})
        assert later.last("num_output_tokens") >= 20
        assert later.text == reference.texts([CODE], 48, end_id=end_id, min_tokens=20)[0]


def test_bad_words_never_appear(server: Served, greedy: Greedy) -> None:
    for prompt, text in zip(greedy.prompts[:8], greedy.texts, strict=False):
        words = re.findall(r"\w+", text)[:2]
        tensors = {"text_input": prompt, "max_tokens": MAX_TOKENS, "bad_words": words}
        found = re.findall(r"\w+", grpc_one(server, "ensemble", **tensors).text)
        assert words[0] not in found[:1], f"{words} in {found}"


def test_logit_bias_bans_and_forces(server: Served) -> None:
    tensors = {"text_input": CODE, "max_tokens": 3, "embedding_bias_words": ["("]}
    forced = grpc_one(server, "ensemble", **tensors, embedding_bias_weights=[1000.0]).text
    banned = grpc_one(server, "ensemble", **tensors, embedding_bias_weights=[-math.inf]).text
    assert forced == "((("
    assert "(" not in banned


# The smallest and largest values that single precision holds, on a text whose greedy form is known.
EXTREME = {
    "temperature 1e-20": {"temperature": 1e-20},
    "temperature 1e-38": {"temperature": 1e-38},
    "temperature 1e-45": {"temperature": 1e-45},
    "top_p 1e-45": {"temperature": 1.0, "top_p": 1e-45},
    "min_p 1": {"temperature": 1.0, "min_p": 1.0},
    "top_k 1": {"temperature": 100.0, "top_k": 1},
    "seed": {"temperature": 1e-3, "seed": 2**64 - 1},
    "max_draft_tokens": {"max_draft_tokens": 2**31 - 1},
    "min_tokens": {"min_tokens": 2**31 - 1},
    "embedding_bias_weights": {
        "temperature": 1.0,
        "embedding_bias_words": ["\u00df"],
        "embedding_bias_weights": [-1e6],
        "top_k": 1,
    },
}


@pytest.mark.parametrize("tensors", EXTREME.values(), ids=EXTREME)
def test_extreme_values_within_the_limits_are_served(
    server: Served, long_text: str, tensors: dict[str, Any]
) -> None:
    answer = grpc_one(server, "ensemble", text_input=CODE, max_tokens=48, **tensors)
    assert answer.text == long_text


@pytest.mark.parametrize(
    "tensors",
    [
        {"embedding_bias_words": ["("], "embedding_bias_weights": [3e38]},
        {"embedding_bias_words": ["(", "("], "embedding_bias_weights": [3e38, 3e38]},
    ],
    ids=["once", "twice"],
)
def test_huge_bias_forces_its_word_or_is_refused(server: Served, tensors: dict[str, Any]) -> None:
    sampling = {"temperature": 0.5, "seed": 3, "max_tokens": 3}
    answer = grpc_one(server, "ensemble", text_input=CODE, **sampling, **tensors)
    assert answer.text == "(((" or "embedding_bias_weights" in (answer.error or "")


# -- what else a client may ask for ------------------------------------------------------------


@EVERY_MODEL
@pytest.mark.parametrize("stream", [False, True])
def test_log_probs_are_the_models_own(
    server: Served, reference: Reference, model: str, stream: bool
) -> None:
    sampling = {"temperature": 0.8, "top_k": 5, "seed": 3}
    tensors = {"text_input": CODE, "max_tokens": 20, "return_log_probs": True, "stream": stream}
    answer = grpc_one(server, model, **tensors, **sampling)
    assert all(r["output_log_probs"].ndim == 3 for r in answer.responses)
    assert all(r["cum_log_probs"].shape == (1, 1) for r in answer.responses)
    values = answer.all("output_log_probs")
    assert len(values) == 20
    assert max(values) <= 0.0
    assert answer.last("cum_log_probs") == pytest.approx(sum(values), rel=1e-5)
    assert values == pytest.approx(plain_log_probs(reference, CODE, 20, sampling), abs=2e-3)


def plain_log_probs(
    reference: Reference, prompt: str, max_tokens: int, sampling: Mapping[str, Any]
) -> list[float]:
    """Return log P of each token that plain decoding gives, under the unchanged logits."""
    request = reference.run([prompt], max_tokens, **sampling)[0]
    begin, values = request.num_prompt_tokens, []
    for end in range(begin, len(request.token_ids)):
        probs = dict(reference.next_probs(request.token_ids[:end], 4096, 1.0))
        values.append(math.log(probs[request.token_ids[end]]))
    return values


def test_log_probs_end_with_the_stop_word(server: Served, long_text: str) -> None:
    tensors = {"text_input": CODE, "max_tokens": 48, "stop_words": [long_text[30:39]]}
    tensors |= {"return_log_probs": True, "return_num_output_tokens": True}
    answer = grpc_one(server, "ensemble", **tensors)
    values = answer.all("output_log_probs")
    assert len(values) == answer.last("num_output_tokens") < 48
    assert answer.last("cum_log_probs") == pytest.approx(sum(values), rel=1e-5)


@EVERY_MODEL
def test_token_counts(server: Served, reference: Reference, model: str) -> None:
    asked = {"return_num_input_tokens": True, "return_num_output_tokens": True}
    answer = grpc_one(server, model, text_input=CODE, max_tokens=11, stream=True, **asked)
    assert answer.last("num_input_tokens") == len(reference.encode(CODE))
    assert answer.last("num_output_tokens") == 11
    assert all("num_output_tokens" not in response for response in answer.responses[:-1])


@EVERY_MODEL
def test_perf_metrics(server: Served, model: str) -> None:
    tensors = {"text_input": CODE, "max_tokens": 40, "return_perf_metrics": True}
    answer = grpc_one(server, model, **tensors, num_draft_tokens=3)
    names = ("arrival", "first_scheduled", "first_token", "last_token")
    times = [answer.last(f"{name}_time_ns") for name in names]
    assert times == sorted(times)
    assert times[0] > 0
    assert times[-1] - times[0] < 60e9
    accepted, total = (answer.last(f"total_{n}") for n in ("accepted_draft_tokens", "draft_tokens"))
    assert 0 < accepted <= total
    assert answer.last("acceptance_rate") == pytest.approx(accepted / total)
    steps = json.loads(answer.last("step_trace"))
    assert sum(step["num_verified_tokens"] for step in steps) == total
    assert sum(step["num_accepted_tokens"] for step in steps) == accepted
    assert {step["reason"] for step in steps} <= REASONS


def test_metrics_tell_outcomes_attainment_and_why(server: Served) -> None:
    time.sleep(0.5)  # they follow the last step within a fifth of a second
    before = server.metrics()
    generate(server, "ensemble", text_input=CODE, max_tokens=30, slo_tpot_ms=1e6)
    generate(server, "ensemble", text_input=CODE, max_tokens=30, slo_tpot_ms=1e-3)
    time.sleep(0.5)
    after = server.metrics()

    def more(name: str) -> float:
        return after[name] - before.get(name, 0.0)

    assert more('specserve_requests_total{class="default",outcome="finished"}') == 2
    assert more('specserve_slo_attained_total{class="default"}') == 1
    assert more('specserve_slo_missed_total{class="default"}') == 1
    assert more('specserve_decisions_total{reason="owed"}') > 0
    at_first = 'specserve_verified_by_position_total{position="0",source="model"}'
    assert more(at_first) > 0
    assert 0 < after["specserve_acceptance_calibration_error"] < 1
    assert after['specserve_step_prediction_error_ratio{call="verify",quantile="0.5"}'] > 0
    assert after['specserve_slo_slack_seconds{class="default"}'] == 0


def test_nothing_comes_that_was_not_asked_for(server: Served) -> None:
    answer = grpc_one(server, "ensemble", text_input=CODE, max_tokens=4)
    assert [set(response) for response in answer.responses] == [{"text_output"}]


@EVERY_MODEL
def test_prompt_comes_first_if_not_excluded(server: Served, model: str, long_text: str) -> None:
    body = {"text_input": CODE, "max_tokens": 48, "exclude_input_in_output": False}
    assert generate(server, model, **body)[1]["text_output"] == CODE + long_text


@pytest.mark.parametrize("length", [1, 2, 3, 6])
def test_fixed_draft_length_bounds_every_step(server: Served, long_text: str, length: int) -> None:
    tensors = {"text_input": CODE, "max_tokens": 48, "num_draft_tokens": length, "stream": True}
    tensors |= {"return_log_probs": True, "return_perf_metrics": True}
    answer = grpc_one(server, "ensemble", **tensors)
    assert answer.text == long_text
    steps = [response["output_log_probs"].size for response in answer.responses]
    assert steps[0] == 1, "a prompt's first token does not wait for a draft"
    assert 1 < max(steps) <= length + 1
    # Every later step drafts `length`, or what is left before the end.
    left = [48 - sum(steps[: i + 1]) for i in range(len(steps) - 1)]
    assert answer.last("total_draft_tokens") == sum(min(length, n - 1) for n in left)


@pytest.mark.parametrize("length", [9, 2**31 - 1])
def test_fixed_draft_longer_than_the_policys_harms_nobody(
    server: Served, long_text: str, length: int
) -> None:
    before = server.metrics()["specserve_draft_failures_total"]
    tensors = {"text_input": CODE, "max_tokens": 48, "num_draft_tokens": length}
    answer = grpc_one(server, "ensemble", **tensors, return_perf_metrics=True)
    wait_until_idle(server)
    failures = server.metrics()["specserve_draft_failures_total"] - before
    if failures:  # let speculation come back for the tests that follow
        wait_until(lambda: server.metrics()["specserve_draft_available"] == 1, "drafts again")
    assert failures == 0
    assert answer.text == long_text
    assert answer.last("total_draft_tokens") > 0


@pytest.mark.parametrize(
    "tensors",
    [{"max_draft_tokens": 0}, {"draft_source": "none"}, {"num_draft_tokens": 0}],
    ids=str,
)
@EVERY_MODEL
def test_request_without_speculation_drafts_nothing(
    server: Served, long_text: str, model: str, tensors: dict[str, Any]
) -> None:
    values = {"text_input": CODE, "max_tokens": 48, "return_perf_metrics": True, **tensors}
    answer = grpc_one(server, model, **values)
    assert answer.text == long_text
    assert answer.last("total_draft_tokens") == 0
    assert answer.last("acceptance_rate") == 0.0


def test_draft_source_model_drafts(server: Served, long_text: str) -> None:
    tensors = {"text_input": CODE, "max_tokens": 48, "draft_source": "model", "num_draft_tokens": 2}
    answer = grpc_one(server, "ensemble", **tensors, return_perf_metrics=True)
    assert answer.text == long_text
    assert answer.last("total_accepted_draft_tokens") > 0


def test_objectives_and_ignored_tensors_leave_the_text_alone(
    server: Served, long_text: str
) -> None:
    tensors = {"text_input": CODE, "max_tokens": 48, "slo_ttft_ms": 500.0, "slo_tpot_ms": 50.0}
    tensors |= {"priority_class": "interactive", "pad_id": 0, "length_penalty": 1.0}
    tensors |= {"beam_width": 1, "num_return_sequences": 1, "use_draft_logits": False}
    tensors |= {"return_context_logits": False, "return_generation_logits": False}
    assert grpc_one(server, "ensemble", **tensors).text == long_text


# -- refusals ----------------------------------------------------------------------------------

# Tensors over {"text_input": "x", "max_tokens": 5}; what the message must say: name, value, limit.
NUMBER_REFUSED = [
    ({name: value}, (name, str(value), *words))
    for name, values, words in [
        ("temperature", (-1.0, 101.0, math.nan, math.inf, -math.inf), ("[0.0, 100.0]", "greedy")),
        ("top_k", (-1, -(2**31)), ("[0, ", "0 keeps all")),
        ("top_p", (-0.5, 0.0, 1.5, math.nan, math.inf), ("(0.0, 1.0]", "1 keeps all")),
        ("min_p", (-0.5, 1.5, math.nan, math.inf), ("[0.0, 1.0]", "0 keeps all")),
        ("repetition_penalty", (-1.0, 0.0, 1e9, math.nan), ("[0.01, 100.0]", "1 is off")),
        ("presence_penalty", (-101.0, 101.0, math.nan, math.inf), ("[-100.0, 100.0]", "0 is off")),
        ("frequency_penalty", (-101.0, 101.0, math.nan, math.inf), ("[-100.0, 100.0]", "is off")),
        ("min_tokens", (-1,), ("at least 0",)),
        ("min_length", (-1,), ("at least 0",)),
        ("end_id", (4096, 2**31 - 1), ("[0, 4096)",)),
        ("num_draft_tokens", (-1,), ("at least 0",)),
        ("max_draft_tokens", (-1,), ("at least 0",)),
        ("slo_ttft_ms", (0.0, -5.0, math.nan, math.inf), ("above 0", "milliseconds")),
        ("slo_tpot_ms", (0.0, -5.0, math.nan, math.inf), ("above 0", "milliseconds")),
        ("max_tokens", (0, -1), ("at least 1",)),
        ("max_tokens", (4096, 2**31 - 1), ("exceeds the limit of 4096", "shorten")),
    ]
    for value in values
]
OTHERS_REFUSED = [
    ({"text_input": ""}, ("text_input", "empty", "at least one token")),
    ({"text_input": "x = 1\n" * 3000}, ("prompt", "exceeds the limit of 4096", "shorten")),
    ({"text_input": "x" * 2_000_000}, ("text_input", "2000000 bytes", "limit is 262144")),
    ({"draft_source": "magic"}, ("draft_source", "magic", "ngram, none")),
    ({"seed": 1, "random_seed": 2}, ("seed", "random_seed", "give one of them")),
    ({"min_tokens": 1, "min_length": 2}, ("min_tokens", "min_length", "give one of them")),
    ({"stop_words": ["x"] * 65}, ("stop_words", "65", "limit is 64")),
    ({"stop_words": ["x" * 1025]}, ("stop_words", "1025 bytes", "limit is 1024")),
    ({"bad_words": ["x"] * 65}, ("bad_words", "65", "limit is 64")),
    ({"bad_words": ["x" * 1025]}, ("bad_words", "1025 bytes", "limit is 1024")),
    ({"embedding_bias_words": ["x"]}, ("embedding_bias_words", "1", "weight", "each word")),
    ({"embedding_bias_weights": [1.0]}, ("embedding_bias_weights", "1", "each word")),
    (
        {"embedding_bias_words": ["x"], "embedding_bias_weights": [math.nan]},
        ("embedding_bias_weights", "nan", "1e+06", "-inf for never"),
    ),
    (
        {"embedding_bias_words": ["x"], "embedding_bias_weights": [math.inf]},
        ("embedding_bias_weights", "inf", "1e+06", "-inf for never"),
    ),
    (
        {"embedding_bias_words": ["\u4e2d" * 300] * 4, "embedding_bias_weights": [1.0] * 4},
        ("embedding_bias_words", "3600", "limit is 1024"),
    ),
    ({"beam_width": 2}, ("beam_width", "2", "beam search is not supported", "only 1")),
    ({"beam_width": 0}, ("beam_width", "0", "only 1")),
    ({"num_return_sequences": 3}, ("num_return_sequences", "3", "only 1")),
    ({"return_context_logits": True}, ("return_context_logits", "not supported", "leave it out")),
    ({"return_generation_logits": True}, ("return_generation_logits", "not supported")),
    ({"decoder_text_input": "x"}, ("decoder_text_input", "not supported", "leave it out")),
    ({"guided_decoding_guide_type": "json"}, ("guided_decoding_guide_type", "not supported")),
    ({"guided_decoding_guide": "{}"}, ("guided_decoding_guide", "not supported", "leave it out")),
    ({"lora_task_id": 7}, ("lora_task_id", "LoRA", "not supported", "leave it out")),
    ({"prompt_vocab_size": 7}, ("prompt_vocab_size", "not supported", "leave it out")),
    ({"prompt_table_extra_id": 7}, ("prompt_table_extra_id", "not supported", "leave it out")),
    ({"image_url_input": "http://x"}, ("image_url_input", "multimodal", "not supported")),
]
REFUSED = NUMBER_REFUSED + OTHERS_REFUSED

# Values that JSON cannot carry.
GRPC_REFUSED = {
    "prompt that is not UTF-8": (
        {"text_input": np.array([[b"ok \xff"]], object)},
        ("text_input", "not UTF-8", "0xff", "position 3"),
    ),
    "half a character": (
        {"text_input": np.array([["\u00e9".encode()[:1]]], object)},
        ("text_input", "not UTF-8", "0xc3", "position 0"),
    ),
    **{
        f"{name} that is not UTF-8": (
            {name: np.array([[b"\x80"]], object)},
            (name, "not UTF-8", "0x80"),
        )
        for name in ("stop_words", "bad_words", "embedding_bias_words", "priority_class")
    },
    **{
        f"priority_class {name!r}": (
            {"priority_class": np.array([[name.encode()]], object)},
            ("priority_class", "64", "A-Z"),
        )
        for name in ("two\nlines", "a\u2028b", 'quo"te', "x" * 65)
    },
    "lora_weights": ({"lora_weights": np.ones((1, 2, 1), np.float16)}, ("lora_weights", "LoRA")),
    "lora_config": ({"lora_config": np.ones((1, 2, 3), np.int32)}, ("lora_config", "LoRA")),
    "prompt_embedding_table": (
        {"prompt_embedding_table": np.ones((1, 2, 1), np.float16)},
        ("prompt_embedding_table", "prompt tuning"),
    ),
    "image_input": (
        {"image_input": np.ones((1, 1, 3, 1, 1), np.float16)},
        ("image_input", "multimodal"),
    ),
    "image_sizes_input": (
        {"image_sizes_input": np.ones((1, 1, 2), np.int64)},
        ("image_sizes_input", "multimodal"),
    ),
    "image_bytes_input": (
        {"image_bytes_input": np.ones((1, 1, 1, 1, 1), np.uint8)},
        ("image_bytes_input", "multimodal"),
    ),
    "video_bytes_input": (
        {"video_bytes_input": np.ones((1, 1, 1, 1, 1), np.uint8)},
        ("video_bytes_input", "multimodal"),
    ),
}

# What Triton itself refuses, before any model sees it.
TRITON_REFUSED = {
    "unknown tensor": ({"bogus": np.ones((1, 1), np.int32)}, ("bogus",)),
    "wrong type": ({"max_tokens": np.ones((1, 1), np.float32)}, ("max_tokens", "FP32", "INT32")),
    "text as number": ({"text_input": np.ones((1, 1), np.int32)}, ("text_input", "INT32")),
    "two values": ({"max_tokens": np.ones((1, 2), np.int32)}, ("max_tokens", "[1,2]", "[1,1]")),
    "no batch dimension": ({"max_tokens": np.ones(1, np.int32)}, ("max_tokens", "[1]")),
    "too many dimensions": ({"top_k": np.ones((1, 1, 1), np.int32)}, ("top_k", "[1,1,1]")),
    "batch of 2": (
        {
            "text_input": np.array([[b"x"], [b"y"]], object),
            "max_tokens": np.ones((2, 1), np.int32),
        },
        ("unexpected shape", "[1,1]", "[2,1]"),
    ),
    "no prompt": ({"text_input": None}, ("text_input",)),
    "no max_tokens": ({"max_tokens": None}, ("max_tokens",)),
}

TYPOS = {
    "temprature": ("temperature", 0.5),
    "max_token": ("max_tokens", 5),
    "topk": ("top_k", 1),
    "top-k": ("top_k", 1),
    "topP": ("top_p", 0.5),
    "Temperature": ("temperature", 0.5),
    "stop_word": ("stop_words", "x"),
    "seeed": ("seed", 1),
    "steam": ("stream", True),
    "return_log_prob": ("return_log_probs", True),
    "exclude_input_from_output": ("exclude_input_in_output", True),
    "num_draft_token": ("num_draft_tokens", 1),
    "slo_ttft": ("slo_ttft_ms", 1.0),
}

INTERNAL = re.compile(
    r"Traceback|\.py\b|line \d+|(?<![\w/])/(?:\w+/)|specserve-[0-9a-f]{6}|/dev/shm|0x[0-9a-f]{6}"
    r"|python_backend|object at|Errno"
)


def case_id(value: Any) -> str | None:
    """Name a case by its tensors, shortened."""
    return re.sub(r"[^\w.-]+", " ", str(value))[:48].strip() if isinstance(value, dict) else ""


def check_message(message: str, words: tuple[str, ...]) -> None:
    """Assert that an error says what it should and nothing internal."""
    missing = [word for word in words if word not in message]
    assert not missing, f"{missing} not in: {message}"
    assert not INTERNAL.search(message), f"internal: {message}"


def base(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Complete a case's tensors to a request; None takes one away."""
    values = {"text_input": "x", "max_tokens": 5, **tensors}
    return {name: value for name, value in values.items() if value is not None}


@EVERY_MODEL
@pytest.mark.parametrize(("tensors", "words"), REFUSED, ids=case_id)
def test_bad_value_is_refused_with_name_value_and_limit(
    server: Served, model: str, tensors: dict[str, Any], words: tuple[str, ...]
) -> None:
    status, answer = generate(server, model, **base(tensors))
    check_message(answer["error"], words)
    assert status == 400
    raw = grpc_raw(server, model, base(tensors))
    assert (raw.error, raw.finals) == (answer["error"], [True])


@EVERY_MODEL
@pytest.mark.parametrize(("tensors", "words"), GRPC_REFUSED.values(), ids=GRPC_REFUSED)
def test_value_beyond_json_is_refused_by_name(
    server: Served, model: str, tensors: dict[str, Any], words: tuple[str, ...]
) -> None:
    raw = grpc_raw(server, model, base(tensors))
    check_message(raw.error or "", words)
    assert raw.finals == [True]


@EVERY_MODEL
@pytest.mark.parametrize(("tensors", "words"), TRITON_REFUSED.values(), ids=TRITON_REFUSED)
def test_wrong_tensor_is_refused_by_name(
    server: Served, model: str, tensors: dict[str, Any], words: tuple[str, ...]
) -> None:
    raw = grpc_raw(server, model, base(tensors))
    assert raw.error
    check_message(raw.error, words)


@EVERY_MODEL
@pytest.mark.parametrize("typo", TYPOS)
def test_misspelt_http_key_names_the_right_one(server: Served, model: str, typo: str) -> None:
    name, value = TYPOS[typo]
    status, answer = generate(server, model, **base({typo: value}))
    assert status == 400, f"'{typo}' was ignored"
    check_message(answer["error"], (f"'{typo}'", f"'{name}'"))


@EVERY_MODEL
def test_error_of_an_http_stream_is_an_event(server: Served, model: str) -> None:
    with http_post(server, model, "generate_stream", base({"max_tokens": 0})) as response:
        assert response.status == 400
        (event,) = events(response)
    check_message(event["error"], ("max_tokens", "at least 1"))


def test_bad_requests_leave_those_beside_them_alone(
    server: Served, reference: Reference, greedy: Greedy
) -> None:
    bad = [base(tensors) for tensors, _ in [*REFUSED, *GRPC_REFUSED.values()]]
    good = greedy.requests(STREAMS, max_tokens=96)
    mixed = [*good[:8], *bad[:60], *good[8:], *bad[60:]]
    answers = grpc_many(server, "ensemble", mixed, concurrency=len(mixed))
    texts = [answer.text for answer in [*answers[:8], *answers[68:76]]]
    assert texts == reference.texts(greedy.prompts[:STREAMS], 96)
    assert all(answer.error for answer in [*answers[8:68], *answers[76:]])


# -- cancellation ------------------------------------------------------------------------------


@EVERY_MODEL
def test_100_disconnects_leave_nothing_and_harm_nobody(
    server: Served, reference: Reference, model: str
) -> None:
    prompt, max_tokens = "class Stack:\n    def ", 3500
    before = server.metrics()["specserve_output_tokens_total"]
    with ThreadPoolExecutor(STREAMS + 1) as pool:
        side = pool.submit(grpc_one, server, model, text_input=prompt, max_tokens=400)
        for _ in pool.map(lambda i: leave_early(server, model, i % 4, max_tokens), range(100)):
            pass
        wait_until_idle(server)
        assert side.result().text == reference.texts([prompt], 400)[0]
    spent = server.metrics()["specserve_output_tokens_total"] - before
    assert spent < 100 * max_tokens / 4, "requests ran on without their clients"


def leave_early(server: Served, model: str, num_events: int, max_tokens: int) -> None:
    """Open a long stream, read a few events, and close the connection."""
    body = {"text_input": CODE, "max_tokens": max_tokens, "end_id": -1, "stream": True}
    with http_post(server, model, "generate_stream", body) as response:
        stream = events(response)
        for _ in range(num_events):
            assert "text_output" in next(stream)


@EVERY_MODEL
def test_grpc_client_who_waits_in_silence_may_leave(server: Served, model: str) -> None:
    """Nothing is sent to it, so an ensemble learns that it has gone by asking."""
    num_calls, max_tokens = 8, 3500
    requests = [{"text_input": CODE, "max_tokens": max_tokens, "end_id": -1}] * num_calls
    before = server.metrics()["specserve_output_tokens_total"]
    with grpc_leaving(server, model, requests):
        wait_until(lambda: requests_of(server) == (num_calls, 0), "all calls run")
    wait_until_idle(server)
    spent = server.metrics()["specserve_output_tokens_total"] - before
    assert spent < num_calls * max_tokens / 4, "calls ran on without their client"


@EVERY_MODEL
def test_client_who_leaves_the_queue_is_noticed_there(server: Served, model: str) -> None:
    num_rows, body = server.config.scheduler.max_num_seqs, {"text_input": CODE, "end_id": -1}
    running = {**body, "max_tokens": 3500, "stream": True}
    with contextlib.ExitStack() as rows, ThreadPoolExecutor(num_rows) as pool:
        post = partial(http_post, server, "specserve", "generate_stream", running)
        list(pool.map(lambda _: rows.enter_context(post()), range(num_rows)))
        waiting = {**body, "max_tokens": 5}
        with grpc_leaving(server, model, [waiting] * 3):
            wait_until(lambda: requests_of(server) == (num_rows, 3), "three requests wait")
        wait_until(lambda: requests_of(server) == (num_rows, 0), "they wait no more")
    wait_until_idle(server)


def requests_of(server: Served) -> tuple[float, float]:
    """Return how many requests run and how many wait."""
    metrics = server.metrics()
    return metrics["specserve_requests_running"], metrics["specserve_requests_waiting"]


@EVERY_MODEL
def test_stop_ends_the_request_of_that_id(server: Served, model: str) -> None:
    body = {"text_input": CODE, "max_tokens": 3500, "end_id": -1, "stream": True, "id": "long"}
    with http_post(server, model, "generate_stream", body) as response:
        stream = events(response)
        assert "text_output" in next(stream)
        other = {"text_input": "x", "max_tokens": 1, "stop": True, "id": "another"}
        assert generate(server, model, **other)[0] == 200
        assert "text_output" in next(stream)
        status, answer = generate(server, model, **{**other, "id": "long"})
        assert (status, answer["text_output"]) == (200, "")
        *texts, last = stream
    assert len(texts) < 3500
    assert "cancelled by a stop request" in last["error"]
    wait_until_idle(server)


def test_stop_with_a_cancel_key_ends_that_request_alone(server: Served) -> None:
    body = {"text_input": CODE, "max_tokens": 3500, "end_id": -1, "stream": True}
    with (
        http_post(server, "specserve", "generate_stream", body) as one,
        http_post(server, "specserve", "generate_stream", {**body, "max_tokens": 200}) as other,
    ):
        key = next(events(one))["cancel_key"]
        assert generate(server, "specserve", **base({"stop": True, "cancel_key": key}))[0] == 200
        assert "cancelled by a stop request" in list(events(one))[-1]["error"]
        first, *rest = events(other)
        assert "error" not in rest[-1]
        assert "cancel_key" in first
        assert not any("cancel_key" in event for event in rest), "once is enough"


@EVERY_MODEL
def test_stop_needs_no_prompt(server: Served, model: str) -> None:
    status, answer = generate(server, model, text_input="", max_tokens=1, stop=True, id="nobody")
    assert (status, answer.get("error")) == (200, None)


def test_stop_without_an_id_is_refused(server: Served) -> None:
    status, answer = generate(server, "specserve", **base({"stop": True}))
    assert status == 400
    check_message(answer["error"], ("stop", "id"))


# -- little memory, and the end ----------------------------------------------------------------


def test_requests_that_do_not_fit_at_once_get_their_texts(
    small_server: Served, reference: Reference, greedy: Greedy
) -> None:
    max_tokens, half = 80, STREAMS // 2
    prompts = greedy.prompts[:STREAMS]
    texts = reference.texts(prompts[:half], max_tokens)
    texts += reference.texts(prompts[half:], max_tokens, seed=5, **SAMPLED)
    before = small_server.metrics()["specserve_preemptions_total"]
    requests = greedy.requests(STREAMS, max_tokens=max_tokens)
    for request in requests[half:]:
        request.update(SAMPLED, seed=5)
    answers = grpc_many(small_server, "ensemble", requests)
    assert [answer.text for answer in answers] == texts
    wait_until_idle(small_server)
    assert small_server.metrics()["specserve_preemptions_total"] > before


def test_waiting_request_can_be_abandoned(small_server: Served) -> None:
    with ThreadPoolExecutor(STREAMS) as pool:
        long = [pool.submit(leave_early, small_server, "specserve", 1, 200) for _ in range(4)]
        rest = [pool.submit(leave_early, small_server, "specserve", 0, 200) for _ in range(12)]
        assert not any(future.exception() for future in [*long, *rest])
    wait_until_idle(small_server)


@EVERY_MODEL
def test_request_that_can_never_fit_is_refused(small_server: Served, model: str) -> None:
    status, answer = generate(small_server, model, text_input="x", max_tokens=256)
    assert status == 400
    check_message(answer["error"], ("257 tokens", "never fit", "256", "shorten"))
    fits = generate(small_server, model, text_input="x", max_tokens=255, end_id=-1)
    assert fits[0] == 200


@pytest.mark.parametrize(
    ("model", "tensors"),
    [
        ("ensemble", {"text_input": np.array([[b"\xff"]], object)}),
        ("tensorrt_llm_bls", {"beam_width": 2}),
        ("specserve", {"max_tokens": 0}),
    ],
)
def test_grpc_status_of_a_bad_request_is_invalid_argument(
    demo_engines: Path, model: str, tensors: dict[str, Any]
) -> None:
    """Of the models' own refusals: for what Triton refuses itself, 2.51 gives the text only.

    A server for each: to ask for the status makes 2.51 cancel the stream, which may end it with a
    segmentation fault.
    """
    with serving([f"engine.dir={demo_engines}", "policy.name=none"]) as served:
        code = grpc_status(served, model, base(tensors))
    assert code is grpc.StatusCode.INVALID_ARGUMENT


@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_sigterm_lets_streams_finish_and_leaves_nothing(
    demo_engines: Path, reference: Reference, greedy: Greedy, protocol: str
) -> None:
    max_tokens, half = 600, 3
    expected = reference.texts(greedy.prompts[: 2 * half], max_tokens)
    requests = greedy.requests(2 * half, max_tokens=max_tokens)
    with (
        serving([f"engine.dir={demo_engines}", "engine.precision=f32"]) as served,
        ThreadPoolExecutor() as pool,
    ):
        futures = [
            pool.submit(read_streams, served, protocol, model, part)
            for model, part in (("ensemble", requests[:half]), ("specserve", requests[half:]))
        ]
        running = "specserve_requests_running"
        wait_until(lambda: served.metrics()[running] == 2 * half, "all streams run")
        served.stop()
        assert futures[0].result() + futures[1].result() == expected
        assert served.process.pids() == []
        assert served.process.shared_memory() == []


def read_streams(
    server: Served, protocol: str, model: str, requests: list[dict[str, Any]]
) -> list[str]:
    """Return the text of each request over either protocol."""
    if protocol == "http":
        return http_many(server, model, requests)
    return [answer.text for answer in grpc_many(server, model, requests)]


def test_everything_was_speculative_and_nothing_is_left(server: Served) -> None:
    wait_until_idle(server)
    metrics = server.metrics()
    assert metrics["specserve_draft_failures_total"] == 0
    assert metrics["specserve_draft_available"] == 1
    assert 0 < metrics["specserve_accepted_tokens_total"] < metrics["specserve_output_tokens_total"]
    assert metrics["specserve_verified_tokens_total"] <= metrics["specserve_drafted_tokens_total"]
    assert server.process.dead_models() == []
