"""A client's tensors become a request, or a refusal with the value, the limit and the fix.

No Triton needed: the parser sees arrays only.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import make_scheduler
from tokenizers import Tokenizer

from python_backend.call import DRAFT_SOURCES, Call, CallParser
from python_backend.reader import decode_text
from python_backend.tensors import INPUTS, TensorSpec
from specserve.config import Config, LimitsConfig, ServerConfig
from specserve.request import SLO
from specserve.sampling_params import MAX_SEED, SamplingParams
from specserve.text import load_tokenizer

VOCAB_SIZE = 4096
END_ID = 1
LIMITS = LimitsConfig(max_text_bytes=100, max_words=3, max_word_bytes=10, max_logit_bias=4)
DTYPES = {
    "STRING": object, "INT32": np.int32, "INT64": np.int64, "UINT8": np.uint8,
    "UINT64": np.uint64, "FP16": np.float16, "FP32": np.float32, "BOOL": bool,
}  # fmt: skip
SPECS = {spec.name: spec for spec in INPUTS}


@pytest.fixture(scope="module")
def tokenizer(demo_engines: Path) -> Tokenizer:
    return load_tokenizer(demo_engines / "target")


@pytest.fixture(scope="module")
def parse(tokenizer: Tokenizer) -> Any:
    """Parse a call of keyword tensors; text_input and max_tokens are given unless set to None."""

    def parse(
        parameters: Mapping[str, Any] | None = None, config: Config | None = None, **values: Any
    ) -> Call:
        parser = CallParser(config or Config(limits=LIMITS), tokenizer, VOCAB_SIZE, END_ID)
        given = {"text_input": "def f(x):", "max_tokens": 16, **values}
        tensors = {name: tensor(name, value) for name, value in given.items() if value is not None}
        return parser(tensors, parameters or {}, "client-1")

    return parse


def tensor(name: str, value: Any) -> Any:
    """Make the array that Triton would hand over: one row, strings as bytes."""
    if isinstance(value, np.ndarray):
        return value
    dtype = DTYPES[SPECS[name].dtype if name in SPECS else "INT32"]
    values = value if isinstance(value, list) else [value]
    if dtype is object:
        values = [v.encode() if isinstance(v, str) else v for v in values]
    return np.array([values], dtype=dtype)


# -- what is understood ------------------------------------------------------------------------


def test_prompt_and_length_are_enough(parse: Any, tokenizer: Tokenizer) -> None:
    call = parse()
    assert call.request.prompt_token_ids == tokenizer.encode("def f(x):").ids
    assert call.request.max_tokens == 16
    assert call.request.request_id == "client-1"
    assert call.request.slo == SLO(None, None)
    assert call.request.max_draft_tokens is None
    assert call.request.num_draft_tokens is None
    assert call.stop_words == []
    assert not call.stream
    assert not call.return_log_probs
    assert not call.return_perf_metrics


def test_default_is_greedy_to_the_end_token(parse: Any) -> None:
    params = parse().request.sampling
    assert params.is_greedy
    assert replace(params, seed=0) == SamplingParams(end_id=END_ID)


@pytest.mark.parametrize(
    ("values", "temperature"),
    [
        ({"top_k": 1}, 0.0),
        ({"top_k": 0}, 0.0),
        ({"seed": 3}, 0.0),
        ({"repetition_penalty": 1.2}, 0.0),
        ({"top_k": 40}, 1.0),
        ({"top_p": 0.9}, 1.0),
        ({"min_p": 0.1}, 1.0),
        ({"top_p": 0.9, "temperature": 0.0}, 0.0),
        ({"temperature": 0.7}, 0.7),
    ],
    ids=str,
)
def test_sampling_starts_when_it_is_asked_for(
    parse: Any, values: dict[str, Any], temperature: float
) -> None:
    assert parse(**values).request.sampling.temperature == temperature


def test_every_sampling_parameter_arrives(parse: Any, tokenizer: Tokenizer) -> None:
    call = parse(
        temperature=0.7, top_k=40, top_p=0.9, min_p=0.05, repetition_penalty=1.1,
        presence_penalty=0.2, frequency_penalty=-0.3, min_tokens=4, seed=MAX_SEED, end_id=7,
        return_log_probs=True,
    )  # fmt: skip
    assert call.request.sampling == SamplingParams(
        temperature=0.7, top_k=40, top_p=0.9, min_p=0.05, repetition_penalty=1.1,
        presence_penalty=0.2, frequency_penalty=-0.3, min_tokens=4, seed=MAX_SEED, end_id=7,
        return_log_probs=True,
    )  # fmt: skip
    assert call.return_log_probs


@pytest.mark.parametrize(
    ("name", "attribute"),
    [
        ("min_length", "min_tokens"),
        ("min_tokens", "min_tokens"),
        ("random_seed", "seed"),
        ("seed", "seed"),
    ],
)
def test_both_spellings_are_understood(parse: Any, name: str, attribute: str) -> None:
    assert getattr(parse(**{name: 9}).request.sampling, attribute) == 9


def test_both_spellings_at_once_must_agree(parse: Any) -> None:
    assert parse(seed=5, random_seed=5).request.sampling.seed == 5
    with pytest.raises(ValueError, match="random_seed and seed are two spellings of one thing"):
        parse(seed=5, random_seed=6)


def test_requests_without_a_seed_differ(parse: Any) -> None:
    seeds = {parse(temperature=1.0).request.sampling.seed for _ in range(8)}
    assert len(seeds) == 8


def test_numbers_are_what_the_client_wrote(parse: Any) -> None:
    """FP32 carries .1 as .100000001; the request must say .1, as a log or an error would."""
    assert parse(top_p=0.1).request.sampling.top_p == 0.1
    assert parse(slo_tpot_ms=33.3).request.slo.tpot_s == pytest.approx(0.0333, rel=1e-12)


def test_latency_objectives_are_seconds(parse: Any) -> None:
    assert parse(slo_ttft_ms=250.0, slo_tpot_ms=40.0).request.slo == SLO(0.25, 0.04)


@pytest.mark.parametrize(
    ("values", "maximum", "fixed"),
    [
        ({"max_draft_tokens": 3}, 3, None),
        ({"max_draft_tokens": 0}, 0, None),
        ({"num_draft_tokens": 5}, None, 5),
        ({"draft_source": "none", "max_draft_tokens": 6}, 6, None),
        ({"draft_source": "model"}, None, None),
        ({"draft_source": "auto"}, None, None),
    ],
    ids=str,
)
def test_draft_length_of_a_request(
    parse: Any, values: dict[str, Any], maximum: int | None, fixed: int | None
) -> None:
    request = parse(**values).request
    assert (request.max_draft_tokens, request.num_draft_tokens) == (maximum, fixed)


@pytest.mark.parametrize(("end_id", "expected"), [(-1, None), (0, 0), (4095, 4095)])
def test_end_id_of_a_request(parse: Any, end_id: int, expected: int | None) -> None:
    assert parse(end_id=end_id).request.sampling.end_id == expected


def test_a_server_without_end_token_ends_nothing(tokenizer: Tokenizer) -> None:
    parser = CallParser(Config(), tokenizer, VOCAB_SIZE, None)
    tensors = {"text_input": tensor("text_input", "x"), "max_tokens": tensor("max_tokens", 3)}
    assert parser(tensors, {}, "").request.sampling.end_id is None


def test_token_ids_instead_of_text(parse: Any, tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("a = 1").ids
    call = parse(text_input=None, input_ids=np.array([ids], dtype=np.int32))
    assert call.request.prompt_token_ids == ids
    assert all(type(token_id) is int for token_id in call.request.prompt_token_ids)
    both = parse(text_input="other", input_ids=np.array([ids], dtype=np.int32))
    assert both.request.prompt_token_ids == ids


def test_bad_words_are_forbidden_at_the_start_and_inside_a_line(
    parse: Any, tokenizer: Tokenizer
) -> None:
    words = parse(bad_words=["return", " if"]).request.sampling.bad_words
    variants = ["return", " return", " if"]
    assert set(words) == {
        tuple(tokenizer.encode(v, add_special_tokens=False).ids) for v in variants
    }
    assert parse(bad_words=[""]).request.sampling.bad_words == ()


def test_bias_goes_to_every_token_of_its_word(parse: Any, tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("xq", add_special_tokens=False).ids
    call = parse(embedding_bias_words=["xq"], embedding_bias_weights=[-2.5])
    assert call.request.sampling.logit_bias == tuple((token_id, -2.5) for token_id in ids)


def test_bias_by_token_id_joins_that_by_words(parse: Any, tokenizer: Tokenizer) -> None:
    (x,) = tokenizer.encode("x", add_special_tokens=False).ids
    by_words = {"embedding_bias_words": ["x"], "embedding_bias_weights": [1.5]}
    call = parse(**by_words, logit_bias_token_ids=[7, 4095], logit_bias_values=[-100.0, 2.0])
    assert call.request.sampling.logit_bias == ((x, 1.5), (7, -100.0), (4095, 2.0))


@pytest.mark.parametrize(
    ("token_ids", "values", "words"),
    [
        ([1, 2], [1.0], ("logit_bias_token_ids has 2 entries", "logit_bias_values 1", "each")),
        ([4096], [1.0], ("logit_bias_token_ids has 4096", "[0, 4096)")),
        ([-1], [1.0], ("logit_bias_token_ids has -1", "[0, 4096)")),
        ([1] * 5, [1.0] * 5, ("logit_bias_token_ids are 5 tokens", "limit is 4")),
        ([1], [float("nan")], ("logit_bias_values", "nan", "-inf for never")),
    ],
    ids=str,
)
def test_bias_by_token_id_outside_its_limits_is_refused(
    parse: Any, token_ids: list[int], values: list[float], words: tuple[str, ...]
) -> None:
    with pytest.raises(ValueError, match="logit_bias") as refusal:
        parse(logit_bias_token_ids=token_ids, logit_bias_values=values)
    assert all(word in str(refusal.value) for word in words)


@pytest.mark.parametrize(
    ("values", "prefix"),
    [
        ({}, ""),
        ({"exclude_input_in_output": False}, "def f(x):"),
        ({"exclude_input_in_output": False, "stream": True}, ""),
        ({"exclude_input_in_output": True}, ""),
    ],
    ids=str,
)
def test_the_prompt_is_repeated_only_if_asked_for(
    parse: Any, values: dict[str, bool], prefix: str
) -> None:
    assert parse(**values).prefix == prefix


def test_the_server_may_repeat_prompts_by_default(parse: Any) -> None:
    config = Config(server=ServerConfig(exclude_input_in_output=False))
    assert parse(config=config).prefix == "def f(x):"
    assert parse(config=config, exclude_input_in_output=True).prefix == ""


def test_what_comes_back_is_chosen_by_the_client(parse: Any) -> None:
    call = parse(
        stream=True, return_perf_metrics=True, return_num_input_tokens=True,
        return_num_output_tokens=True, stop_words=["\n\n", "END"],
    )  # fmt: skip
    assert call.stream
    assert call.return_perf_metrics
    assert call.return_num_input_tokens
    assert call.return_num_output_tokens
    assert call.stop_words == ["\n\n", "END"]


# What is served, or refused for some values only; an empty tensor has none.
OPTIONAL = [
    spec
    for spec in INPUTS
    if spec.name not in ("text_input", "max_tokens")
    and (spec.refuse is None or spec.name in ("num_return_sequences", "beam_width"))
]


@pytest.mark.parametrize("spec", OPTIONAL, ids=lambda spec: spec.name)
def test_an_empty_tensor_is_as_good_as_none(parse: Any, spec: TensorSpec) -> None:
    empty = np.empty((1, 0), dtype=DTYPES[spec.dtype])
    sampling = parse(**{spec.name: empty}).request.sampling
    assert replace(sampling, seed=0) == SamplingParams(end_id=END_ID)


def test_inert_tensors_of_other_backends_change_nothing(parse: Any) -> None:
    call = parse(
        pad_id=2, length_penalty=1.0, use_draft_logits=False, beam_width=1,
        num_return_sequences=1, return_context_logits=False, return_generation_logits=False,
    )  # fmt: skip
    assert replace(call.request.sampling, seed=0) == SamplingParams(end_id=END_ID)


# -- what is refused ---------------------------------------------------------------------------

REFUSED = {
    "return_context_logits": (True, "returning logits is not supported: leave it out"),
    "return_generation_logits": (True, "returning logits is not supported: leave it out"),
    "num_return_sequences": (2, "2: more than one sequence is not supported, only 1"),
    "beam_width": (4, "4: beam search is not supported, only 1"),
    "decoder_text_input": ("x", "an encoder-decoder model is not supported"),
    "guided_decoding_guide_type": ("json", "guided decoding is not supported"),
    "guided_decoding_guide": ("{}", "guided decoding is not supported"),
    "prompt_embedding_table": (np.ones((1, 2, 3), np.float16), "prompt tuning is not supported"),
    "prompt_vocab_size": (4, "prompt tuning is not supported"),
    "prompt_table_extra_id": (4, "prompt tuning is not supported"),
    "lora_task_id": (4, "LoRA is not supported"),
    "lora_weights": (np.ones((1, 2, 3), np.float16), "LoRA is not supported"),
    "lora_config": (np.ones((1, 2, 3), np.int32), "LoRA is not supported"),
    "image_input": (np.ones((1, 1, 3, 2, 2), np.float16), "multimodal input is not supported"),
    "image_sizes_input": (np.ones((1, 1, 2), np.int64), "multimodal input is not supported"),
    "image_bytes_input": (np.ones((1, 1, 1, 1, 1), np.uint8), "multimodal input is not supported"),
    "video_bytes_input": (np.ones((1, 1, 1, 1, 1), np.uint8), "multimodal input is not supported"),
    "image_url_input": ("http://x", "multimodal input is not supported"),
}


def test_every_refusal_in_the_table_has_a_case_here() -> None:
    assert {spec.name for spec in INPUTS if spec.refuse} == set(REFUSED)


@pytest.mark.parametrize("name", REFUSED)
def test_what_we_cannot_serve_is_refused_by_name(parse: Any, name: str) -> None:
    value, reason = REFUSED[name]
    with pytest.raises(ValueError, match=rf"^{name} is .*{reason}"):
        parse(**{name: value})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        pytest.param({"text_input": None}, "text_input is missing", id="no prompt"),
        pytest.param({"end_id": -2}, "end_id has -2", id="negative end"),
        pytest.param({"text_input": b"ab\xff"}, "not UTF-8: byte 0xff at position 2", id="bytes"),
        pytest.param({"stop_words": [b"\xe4\xb8"]}, "stop_words is not UTF-8", id="half a char"),
        pytest.param({"text_input": "x" * 101}, "101 bytes: the limit is 100", id="long prompt"),
        pytest.param({"max_tokens": None}, "max_tokens is missing", id="no max_tokens"),
        pytest.param({"max_tokens": [3, 4]}, "max_tokens has 2 values: give one", id="two values"),
        pytest.param({"temperature": -1.0}, r"temperature is -1\.0", id="temperature"),
        pytest.param({"temperature": np.nan}, "temperature is nan", id="nan"),
        pytest.param({"top_p": 1.5}, r"top_p is 1\.5: must be in \(0", id="top_p"),
        pytest.param({"top_k": -1}, "top_k is -1", id="top_k"),
        pytest.param({"min_tokens": -1}, "min_tokens is -1", id="min_tokens"),
        pytest.param({"end_id": 4096}, r"end_id has 4096: token ids are in \[0, 4096\)", id="end"),
        pytest.param({"max_draft_tokens": -1}, "max_draft_tokens is -1", id="max draft"),
        pytest.param({"num_draft_tokens": -2}, "num_draft_tokens is -2", id="fixed draft"),
        pytest.param(
            {"draft_source": "magic"}, "'magic': known are auto, model, ngram, none", id="src"
        ),
        pytest.param({"slo_ttft_ms": 0.0}, "slo_ttft_ms is 0.0: must be above 0", id="slo 0"),
        pytest.param({"slo_tpot_ms": np.nan}, "slo_tpot_ms is nan", id="slo nan"),
        pytest.param({"slo_tpot_ms": np.inf}, "slo_tpot_ms is inf", id="slo infinite"),
        pytest.param({"stop_words": ["a"] * 4}, "4 entries: the limit is 3", id="many words"),
        pytest.param({"bad_words": ["a" * 11]}, "11 bytes: the limit is 10", id="long word"),
        pytest.param(
            {"embedding_bias_words": ["a", "b"], "embedding_bias_weights": [1.0]},
            "2 entries and embedding_bias_weights 1: give one weight for each",
            id="weights",
        ),
        pytest.param(
            {"embedding_bias_words": ["a"], "embedding_bias_weights": [np.nan]},
            r"add nan to token \d+: must be in",
            id="nan weight",
        ),
        pytest.param(
            {"embedding_bias_words": ["qzxjkvw"], "embedding_bias_weights": [1.0]},
            "tokens: the limit is 4, give fewer",
            id="many biased tokens",
        ),
        pytest.param(
            {"input_ids": np.array([[5, 4096]], np.int32)},
            r"input_ids has 4096: token ids are in \[0, 4096\)",
            id="token id",
        ),
        pytest.param({"input_ids": np.array([[-1]], np.int32)}, "input_ids has -1", id="negative"),
    ],
)
def test_mistake_is_refused_with_value_limit_and_fix(
    parse: Any, values: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        parse(**values)


@pytest.mark.parametrize("shape", [(2, 1), (0, 1), ()], ids=str)
def test_more_or_less_than_one_request_in_a_call_is_refused(
    parse: Any, shape: tuple[int, ...]
) -> None:
    with pytest.raises(ValueError, match=r"max_tokens has shape .*: one request per call"):
        parse(max_tokens=np.ones(shape, dtype=np.int32))


@pytest.mark.parametrize(
    ("typo", "meant"),
    [
        ("temprature", "temperature"),
        ("max_token", "max_tokens"),
        ("stopwords", "stop_words"),
        ("maxTokens", "max_tokens"),
        ("top-p", "top_p"),
    ],
)
def test_typo_in_a_request_parameter_names_what_was_meant(
    parse: Any, typo: str, meant: str
) -> None:
    with pytest.raises(ValueError, match=f"'{typo}': did you mean '{meant}'"):
        parse(parameters={typo: 1})


def test_other_request_parameters_pass(parse: Any) -> None:
    parameters = {"triton_enable_empty_final_response": True, "sequence_id": 4, "user": "me"}
    assert parse(parameters=parameters).request.max_tokens == 16


def test_every_draft_source_is_known_to_the_parser(parse: Any) -> None:
    for source in DRAFT_SOURCES:
        assert parse(draft_source=source).request.draft_source == source


def test_an_empty_prompt_is_left_to_the_scheduler_to_refuse(parse: Any) -> None:
    request = parse(text_input="").request
    with pytest.raises(ValueError, match="text_input is empty"):
        make_scheduler().check(request)


def test_limits_hold_for_text_wherever_it_is_decoded() -> None:
    assert decode_text("é".encode() * 50, "QUERY", LIMITS) == "é" * 50
    with pytest.raises(ValueError, match="QUERY has 102 bytes"):
        decode_text("é".encode() * 51, "QUERY", LIMITS)
