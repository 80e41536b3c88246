"""What went wrong, as OpenAI's clients expect to be told: status, type, code, parameter."""

import difflib
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from specserve.openai.answers import ErrorAnswer
from specserve.openai.schema import ChatRequest, CompletionRequest

RETRY_S = 1

_TYPES = {401: "authentication_error", 429: "rate_limit_error"}
_HINT = re.compile(r"try again in (\d+) ms")
_CODED = re.compile(r"(INVALID_ARG|REJECTED|UNAVAILABLE|CANCELLED|INTERNAL): ")
# What clients call the tensors that the server's errors name.
_PARAMS = {
    "text_input": "prompt",
    "input_ids": "prompt",
    "stop_words": "stop",
    "priority_class": "slo_class",
    "embedding_bias_weights and logit_bias_values": "logit_bias",
    "logit_bias_token_ids": "logit_bias",
    "logit_bias_values": "logit_bias",
}
_TENSOR = re.compile(rf"\b(?:{'|'.join(_PARAMS)})\b")
_UNION_BRANCH = re.compile(r"str$|int$|\w+\[.*\]$|function-")  # pydantic puts it into the path
_UNSUPPORTED = frozenset(
    ["audio", "functions", "function_call", "modalities", "prediction", "web_search_options"]
)
_REFUSALS = {
    "best_of": "is not supported: leave it out, or ask for several choices with n",
    "logprobs": "is not supported: 0 gives the log probabilities of the chosen tokens",
    "top_logprobs": "is not supported: logprobs alone gives those of the chosen tokens",
    "response_format": "is not supported, only text: leave it out",
    "store": "is not supported: leave it out",
    "suffix": "is not supported: leave it out",
    "tool_choice": "is not supported: leave it out",
    "tools": "are not supported: leave them out",
}
_KNOWN = sorted({*CompletionRequest.model_fields, *ChatRequest.model_fields})


class ApiError(Exception):
    """An answer other than success.

    Attributes:
        message: for the client: the value, the limit and the fix; nothing internal.
        retry_after_s: when to come back; None is never, as it stands.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        retry_after_s: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code
        self.param = param
        self.retry_after_s = retry_after_s

    @property
    def body(self) -> ErrorAnswer:
        """The JSON to send."""
        kind = _TYPES.get(
            self.status, "invalid_request_error" if self.status < 500 else "server_error"
        )
        return {
            "error": {
                "message": self.message,
                "type": kind,
                "param": self.param,
                "code": self.code,
            }
        }

    @property
    def headers(self) -> dict[str, str]:
        """What the answer's headers add."""
        headers = {} if self.retry_after_s is None else {"Retry-After": str(self.retry_after_s)}
        return headers | ({"WWW-Authenticate": "Bearer"} if self.status == 401 else {})


def bad_request(message: str, param: str | None = None) -> ApiError:
    """Blame the request."""
    return ApiError(400, message, param=param)


def unavailable(
    message: str = "the model server does not answer: try again", retry_after_s: int = RETRY_S
) -> ApiError:
    """Say that it may work later."""
    return ApiError(503, message, code="unavailable", retry_after_s=retry_after_s)


def from_server(text: str) -> ApiError:
    """Read an error of the model server: `CODE: text` from the model, a bare text from Triton.

    A bare text is internal and stays so. Both may say when to try again: a server that rejects a
    request, which is healthy and asked too much (429), and one that is not available (503).
    """
    match = _CODED.match(text)
    if match is None:
        return unavailable()
    code, message = match[1], in_client_words(text[match.end() :])
    if code == "INVALID_ARG":
        return bad_request(message, _param_of(message))
    if code == "INTERNAL":
        return ApiError(500, message, code="internal_error")
    hint = _HINT.search(message)
    retry_after_s = RETRY_S if hint is None else max(RETRY_S, math.ceil(int(hint[1]) / 1000))
    if code == "REJECTED":
        return ApiError(429, message, code="rate_limit_exceeded", retry_after_s=retry_after_s)
    return unavailable(message, retry_after_s)


def in_client_words(message: str) -> str:
    """Replace the names of tensors by those of parameters."""
    return _TENSOR.sub(lambda match: _PARAMS[match[0]], message)


def from_validation(errors: Sequence[Mapping[str, Any]]) -> ApiError:
    """Tell of one problem that pydantic found, of an unknown name before others."""
    first = min(errors, key=lambda error: error["type"] != "extra_forbidden")
    where = [str(part) for part in first["loc"][1:] if not _UNION_BRANCH.match(str(part))]
    if first["type"] == "json_invalid":
        return bad_request("the body is not JSON: send an object, Content-Type: application/json")
    if not where:
        return bad_request("the body must be a JSON object, Content-Type: application/json")
    if first["type"] == "extra_forbidden":
        return bad_request(_unknown(where), where[0])
    name = where[0]
    if first["type"] == "missing":
        return bad_request(f"{'.'.join(where)} is missing: it is required", name)
    if name in _REFUSALS and first["type"] in ("literal_error", "too_long"):
        return bad_request(f"{name} {_shown(first['input'])} {_REFUSALS[name]}", name)
    told = [error["msg"] for error in errors if error["loc"][1:2] == first["loc"][1:2]]
    what = " or ".join(dict.fromkeys(map(_plain, told)))
    return bad_request(f"{'.'.join(where)} is {_shown(first['input'])}: {what}", name)


def _unknown(where: Sequence[str]) -> str:
    name = where[-1]
    if name in _UNSUPPORTED:
        return f"{name} is not supported: leave it out"
    near = difflib.get_close_matches(name, _KNOWN, n=1) if len(where) == 1 else []
    fix = f"did you mean '{near[0]}'?" if near else "leave it out"
    return f"unknown parameter '{_shorten('.'.join(where))}': {fix}"


def _param_of(message: str) -> str | None:
    word = message.partition(" ")[0]
    return word if word in _KNOWN else None


def _shown(value: Any) -> str:
    return _shorten(repr(value))


def _shorten(text: str, limit: int = 80) -> str:
    return text if len(text) <= limit else f"{text[:limit]}..."


def _plain(text: str) -> str:
    text = text.removeprefix("Value error, ")
    return text[:1].lower() + text[1:]
