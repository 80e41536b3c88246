"""The endpoint's parts without a server: errors, tensors, templates, pieces, tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models

from python_backend.tensors import INPUTS
from specserve.launch.calls import openai_call
from specserve.openai.chat_template import ChatTemplate, load_chat_template
from specserve.openai.errors import ApiError, from_server
from specserve.openai.guard import read_keys
from specserve.openai.schema import ChatRequest, CompletionRequest, Message
from specserve.openai.translate import (
    DTYPES,
    choices_of,
    common_tensors,
    derived_seed,
    prompts_of,
    tensor,
    with_slo_headers,
)
from specserve.openai.vocabulary import Vocabulary

NUMPY_NAMES = {
    "STRING": "object", "INT32": "int32", "UINT64": "uint64", "FP32": "float32", "BOOL": "bool",
}  # fmt: skip


def completion(**values: Any) -> CompletionRequest:
    return CompletionRequest.model_validate({"model": "m", "prompt": "x", **values})


def tensors(body: CompletionRequest | ChatRequest, **headers: str) -> dict[str, Any]:
    """Return the tensors that all choices share, as plain values."""
    slo = with_slo_headers(body, {name.replace("_", "-"): v for name, v in headers.items()})
    common = common_tensors(body, 5, slo)
    assert all(array.shape[0] == 1 and array.ndim == 2 for array in common.values())
    return {name: array[0].tolist() for name, array in common.items()}


# -- tensors -----------------------------------------------------------------------------------


def test_tensors_have_the_types_of_the_servers_table() -> None:
    table = {spec.name: NUMPY_NAMES[spec.dtype] for spec in INPUTS if spec.dtype in NUMPY_NAMES}
    table["input_ids"] = "int32"
    assert {name: np.dtype(dtype).name for name, dtype in DTYPES.items()}.items() <= table.items()


def test_what_is_not_asked_for_is_not_sent() -> None:
    sent = tensors(completion())
    assert sent["temperature"] == [1.0], "OpenAI samples unless told otherwise"
    assert not {"top_p", "seed", "stop_words", "logit_bias_values", "end_id"} & set(sent)
    assert sent["return_perf_metrics"] == sent["return_log_probs"] == [False]


def test_parameters_become_their_tensors() -> None:
    body = completion(
        temperature=0.5, stop="\n", logit_bias={"7": -100, "9": 2.5}, ignore_eos=True, top_k=-1,
        logprobs=0, stream=True, slo_class="interactive", max_draft_tokens=3, speculation=True,
    )  # fmt: skip
    sent = tensors(body, x_slo_ttft_ms="250", x_slo_class="interactive")
    expected = {
        "temperature": [0.5],
        "stop_words": [b"\n"],
        "logit_bias_token_ids": [7, 9],
        "logit_bias_values": [-100.0, 2.5],
        "end_id": [-1],
        "top_k": [0],
        "return_log_probs": [True],
        "return_token_ids": [True],
        "stream": [True],
        "priority_class": [b"interactive"],
        "slo_ttft_ms": [250.0],
        "max_draft_tokens": [3],
        "return_perf_metrics": [True],
    }
    assert {name: sent[name] for name in expected} == expected


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("x", ["x"]),
        (["x", ""], ["x", ""]),
        ([1, 2], [[1, 2]]),
        ([[1], [2, 3]], [[1], [2, 3]]),
    ],
)
def test_prompts_of_every_form(prompt: Any, expected: list[Any]) -> None:
    assert prompts_of(completion(prompt=prompt)) == expected


def test_choices_are_all_of_one_prompt_then_all_of_the_next() -> None:
    choices = choices_of(["a", [7]], 2, 5, {"max_tokens": tensor("max_tokens", 1)})
    prompts = [one.get("text_input", one.get("input_ids")) for one in choices]
    assert [array.item() for array in prompts] == [b"a", b"a", 7, 7]
    seeds = [one["seed"].item() for one in choices]
    assert seeds == [5, derived_seed(5, 1)] * 2
    assert all(set(one) >= {"max_tokens", "seed"} for one in choices)


def test_derived_seeds_fit_and_stay_apart() -> None:
    seeds = [derived_seed(seed, index) for seed in (-1, 0, 1, 2**70 + 5) for index in range(8)]
    assert all(0 <= seed < 2**64 for seed in seeds)
    assert len(set(seeds)) == len(seeds)
    assert derived_seed(-1, 0) == 2**64 - 1


# -- errors ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "status", "param", "retry_after_s"),
    [
        ("INVALID_ARG: top_p is 7: must be in (0, 1]", 400, "top_p", None),
        ("INVALID_ARG: stop_words has 65 entries", 400, "stop", None),
        ("INVALID_ARG: something", 400, None, None),
        ("REJECTED: late: try again in 1 ms", 429, None, 1),
        ("REJECTED: late: try again in 2500 ms", 429, None, 3),
        ("REJECTED: late", 429, None, 1),
        ("UNAVAILABLE: loading: try again in 2000 ms", 503, None, 2),
        ("UNAVAILABLE: a step failed: try again", 503, None, 1),
        ("CANCELLED: cancelled by a stop request", 503, None, 1),
        ("INTERNAL: internal error", 500, None, None),
        ("Request for unknown model: '/tmp/x' is not found", 503, None, 1),
    ],
)
def test_error_of_the_server_has_its_status(
    text: str, status: int, param: str | None, retry_after_s: int | None
) -> None:
    error = from_server(text)
    assert (error.status, error.param, error.retry_after_s) == (status, param, retry_after_s)
    assert "/tmp" not in error.message
    assert "stop_words" not in error.message
    assert ("Retry-After" in error.headers) == (retry_after_s is not None)


# -- chat templates ----------------------------------------------------------------------------

TURNS = [Message(role="user", content="<b> & é"), Message(role="assistant", content="yes")]


def test_plain_template_is_a_transcript(tmp_path: Path) -> None:
    template = load_chat_template(tmp_path)
    assert template.render(TURNS) == "user: <b> & é\nassistant: yes\nassistant:"


def test_tokenizers_own_template_gets_its_special_tokens(tmp_path: Path) -> None:
    config = {
        "bos_token": {"content": "<s>"},
        "eos_token": "</s>",
        "chat_template": "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}"
        "{{ eos_token }}{% endfor %}{% if add_generation_prompt %}[bot]{% endif %}",
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    expected = "<s>[user]<b> & é</s>[assistant]yes</s>[bot]"
    assert load_chat_template(tmp_path).render(TURNS) == expected
    config["chat_template"] = [
        {"name": "tool_use", "template": "no"},
        {"name": "default", "template": config["chat_template"]},
    ]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    assert load_chat_template(tmp_path).render(TURNS) == expected
    (tmp_path / "chat_template.jinja").write_text("beside", encoding="utf-8")
    assert load_chat_template(tmp_path).render(TURNS) == "beside"
    (tmp_path / "given").write_text("{{ messages | tojson }}", encoding="utf-8")
    given = load_chat_template(tmp_path, str(tmp_path / "given"))
    assert json.loads(given.render(TURNS))[0] == {"role": "user", "content": "<b> & é"}


@pytest.mark.parametrize(
    "source",
    [
        "{{ raise_exception('no system role') }}",
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ missing.value }}",
        "{{ 1 // 0 }}",
    ],
)
def test_template_that_fails_or_tries_more_is_the_requests_error(source: str) -> None:
    with pytest.raises(ApiError, match="chat template") as refusal:
        ChatTemplate(source).render(TURNS)
    assert refusal.value.status == 400


def test_broken_template_is_found_at_start(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not valid Jinja"):
        ChatTemplate("{% for %}")
    with pytest.raises(ValueError, match="cannot read the chat template"):
        load_chat_template(tmp_path, str(tmp_path / "missing"))


# -- tokens ------------------------------------------------------------------------------------


def test_token_that_begins_a_word_keeps_its_space() -> None:
    """Sentencepiece marks it; decoding such a token alone would drop the space."""
    tokenizer = Tokenizer(models.WordLevel({"\u2581the": 0, "re": 1, "?": 2}, "?"))
    tokenizer.decoder = decoders.Metaspace()
    vocabulary = Vocabulary(tokenizer)
    assert [vocabulary.text(one) for one in (0, 1)] == [" the", "re"]
    assert vocabulary.bytes(0) == list(b" the")


# -- keys and calls ----------------------------------------------------------------------------


def test_key_file_without_a_key_does_not_open_the_endpoint(tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("\n  \n", encoding="utf-8")
    with pytest.raises(ValueError, match="holds no key"):
        read_keys(str(tmp_path / "keys"))
    with pytest.raises(ValueError, match="api_key_file"):
        read_keys(str(tmp_path / "missing"))
    assert read_keys("") == []


def test_printed_call_says_what_the_endpoint_asks_for() -> None:
    plain = openai_call("0.0.0.0", 18003, "m", has_tls=False, has_keys=False)
    assert "http://127.0.0.1:18003/v1/completions" in plain
    assert "Authorization" not in plain
    closed = openai_call("127.0.0.1", 18003, "m", has_tls=True, has_keys=True)
    assert "https://127.0.0.1:18003/v1/completions" in closed
    assert "Authorization: Bearer $OPENAI_API_KEY" in closed
