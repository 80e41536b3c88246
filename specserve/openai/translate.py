"""A request body as tensors: one set for each choice that the client gets.

Owns names and types of the tensors and the defaults of OpenAI's API where they differ from the
server's. Limits are checked by the server, which says them in its own words (see `errors`).
"""

import random
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from specserve.openai.errors import bad_request
from specserve.openai.schema import ChatRequest, CompletionRequest, Generation

Tensors = dict[str, NDArray[Any]]
Prompt = str | list[int]

DEFAULT_MAX_TOKENS = 16
DEFAULT_TEMPERATURE = 1.0
NO_END = -1
DTYPES: Mapping[str, Any] = {
    "text_input": np.object_,
    "input_ids": np.int32,
    "max_tokens": np.int32,
    "temperature": np.float32,
    "top_p": np.float32,
    "top_k": np.int32,
    "min_p": np.float32,
    "repetition_penalty": np.float32,
    "presence_penalty": np.float32,
    "frequency_penalty": np.float32,
    "min_tokens": np.int32,
    "end_id": np.int32,
    "seed": np.uint64,
    "stop_words": np.object_,
    "logit_bias_token_ids": np.int32,
    "logit_bias_values": np.float32,
    "stream": np.bool_,
    "exclude_input_in_output": np.bool_,
    "slo_ttft_ms": np.float32,
    "slo_tpot_ms": np.float32,
    "priority_class": np.object_,
    "max_draft_tokens": np.int32,
    "draft_source": np.object_,
    "return_log_probs": np.bool_,
    "return_token_ids": np.bool_,
    "return_finish_reason": np.bool_,
    "return_num_input_tokens": np.bool_,
    "return_num_output_tokens": np.bool_,
    "return_perf_metrics": np.bool_,
    "stop": np.bool_,
}
_SLO_HEADERS = {
    "x-slo-ttft-ms": "slo_ttft_ms",
    "x-slo-tpot-ms": "slo_tpot_ms",
    "x-slo-class": "slo_class",
}


def prompts_of(body: CompletionRequest) -> list[Prompt]:
    """Return the prompts of a completion, of which a body may hold one or several."""
    prompt = body.prompt
    if isinstance(prompt, str):
        return [prompt]
    if isinstance(prompt[0], int):
        return [[token_id for token_id in prompt if isinstance(token_id, int)]]
    return [one for one in prompt if not isinstance(one, int)]


def with_slo_headers(body: Generation, headers: Mapping[str, str]) -> Mapping[str, Any]:
    """Return the body's objectives and class, completed by the headers that gateways send.

    Raises:
        ApiError: if a header is no number, or says something else than the body.
    """
    slo: dict[str, Any] = {name: getattr(body, name) for name in _SLO_HEADERS.values()}
    for header, name in _SLO_HEADERS.items():
        text = headers.get(header)
        if text is None:
            continue
        value = text if name == "slo_class" else _number(header, text)
        if slo[name] not in (None, value):
            raise bad_request(f"{header} is {text} and {name} {slo[name]}: give one of them", name)
        slo[name] = value
    return slo


def common_tensors(body: Generation, max_tokens: int, slo: Mapping[str, Any]) -> Tensors:
    """Return what all choices of a request share."""
    bias = body.logit_bias or {}
    stop = [body.stop] if isinstance(body.stop, str) else body.stop
    temperature = DEFAULT_TEMPERATURE if body.temperature is None else body.temperature
    values: dict[str, Any] = {
        "max_tokens": max_tokens,
        "temperature": temperature,
        "top_p": body.top_p,
        "top_k": None if body.top_k is None else max(body.top_k, 0),  # -1 is off, as in vLLM
        "min_p": body.min_p,
        "repetition_penalty": body.repetition_penalty,
        "presence_penalty": body.presence_penalty,
        "frequency_penalty": body.frequency_penalty,
        "min_tokens": body.min_tokens,
        "end_id": NO_END if body.ignore_eos else None,
        "stop_words": stop or None,
        "logit_bias_token_ids": [int(token_id) for token_id in bias] or None,
        "logit_bias_values": list(bias.values()) or None,
        "stream": bool(body.stream),
        "exclude_input_in_output": True,
        "slo_ttft_ms": slo["slo_ttft_ms"],
        "slo_tpot_ms": slo["slo_tpot_ms"],
        "priority_class": slo["slo_class"],
        "max_draft_tokens": body.max_draft_tokens,
        "draft_source": body.draft_source,
        "return_finish_reason": True,
        "return_num_input_tokens": True,
        "return_num_output_tokens": True,
        "return_perf_metrics": bool(body.speculation),
        **dict.fromkeys(("return_log_probs", "return_token_ids"), _wants_log_probs(body)),
    }
    return {name: tensor(name, value) for name, value in values.items() if value is not None}


def choices_of(
    prompts: Sequence[Prompt], num_choices: int, seed: int | None, common: Tensors
) -> list[Tensors]:
    """Return the tensors of every choice: all of the first prompt, then all of the next."""
    return [
        common | _prompt_tensor(prompt) | _seed_tensor(seed, index)
        for prompt in prompts
        for index in range(num_choices)
    ]


def tensor(name: str, value: Any) -> NDArray[Any]:
    """Make the tensor of a value or a list of them, shape [1, n]."""
    values = value if isinstance(value, list) else [value]
    values = [one.encode() if isinstance(one, str) else one for one in values]
    return np.array([values], dtype=DTYPES[name])


def derived_seed(seed: int, index: int) -> int:
    """Return the seed of a choice: the request's own for the first, others far from it."""
    if index == 0:
        return seed % 2**64  # OpenAI's are signed
    return random.Random(f"{seed}/{index}").getrandbits(64)


def _wants_log_probs(body: Generation) -> bool:
    if isinstance(body, ChatRequest):
        return bool(body.logprobs)
    return isinstance(body, CompletionRequest) and body.logprobs is not None


def _prompt_tensor(prompt: Prompt) -> Tensors:
    name = "text_input" if isinstance(prompt, str) else "input_ids"
    return {name: tensor(name, prompt)}


def _seed_tensor(seed: int | None, index: int) -> Tensors:
    return {} if seed is None else {"seed": tensor("seed", derived_seed(seed, index))}


def _number(header: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise bad_request(f"{header} is {text!r}: give milliseconds as a number", header) from None
