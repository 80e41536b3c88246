"""Be the part of `tensorrt_llm.bindings.executor` that the self-check uses, by its own signatures.

Its model says, after any tokens, a function of their sum.
"""

from __future__ import annotations

import enum
import json
import os
from dataclasses import KW_ONLY, dataclass, field
from datetime import timedelta
from pathlib import Path

from trtllm_toolchain.record import record


class ModelType(enum.Enum):
    DECODER_ONLY = 0


@dataclass
class KvCacheConfig:
    enable_block_reuse: bool = True
    max_tokens: int | None = None
    max_attention_window: list[int] | None = None
    sink_token_length: int | None = None
    free_gpu_memory_fraction: float | None = None


@dataclass
class ExecutorConfig:
    max_beam_width: int = 1
    kv_cache_config: KvCacheConfig = field(default_factory=KvCacheConfig)
    enable_chunked_context: bool = False


@dataclass
class SamplingConfig:
    beam_width: int = 1
    _: KW_ONLY
    top_k: int | None = None


@dataclass
class OutputConfig:
    return_log_probs: bool = False
    exclude_input_from_output: bool = False


@dataclass
class ExternalDraftTokensConfig:
    tokens: list[int]

    def __post_init__(self) -> None:
        if not self.tokens:
            raise RuntimeError("tokens must not be empty")


@dataclass
class Request:
    input_token_ids: list[int]
    max_tokens: int
    _: KW_ONLY
    streaming: bool = False
    sampling_config: SamplingConfig = field(default_factory=SamplingConfig)
    output_config: OutputConfig = field(default_factory=OutputConfig)
    end_id: int | None = None
    external_draft_tokens_config: ExternalDraftTokensConfig | None = None


@dataclass
class Result:
    output_token_ids: list[list[int]]
    is_final: bool = True


@dataclass
class Response:
    request_id: int
    result: Result
    error_msg: str = ""

    def has_error(self) -> bool:
        return bool(self.error_msg)


class Executor:
    def __init__(
        self, model_path: str, model_type: ModelType, executor_config: ExecutorConfig
    ) -> None:
        config = json.loads((Path(model_path) / "config.json").read_text())["build_config"]
        self._max_draft_len = config["max_draft_len"]
        self._responses: list[Response] = []
        self._fault = os.environ.get("STAND_IN_FAULT", "")
        if executor_config.kv_cache_config.enable_block_reuse:
            assert config["plugin_config"]["use_paged_context_fmha"]
        record("Executor", [model_path, model_type.name])

    def __enter__(self) -> Executor:
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()

    def shutdown(self) -> None:
        record("shutdown", [])

    def can_enqueue_requests(self) -> bool:
        return os.environ.get("STAND_IN_RANK", "0") == "0"

    def enqueue_request(self, request: Request) -> int:
        assert self.can_enqueue_requests()
        draft = request.external_draft_tokens_config
        tokens = draft.tokens if draft else []
        number = len(self._responses)
        record("enqueue_request", [f"{len(request.input_token_ids)} + {len(tokens)}"])
        error = self._fault if self._fault == "refused" else ""
        if len(tokens) > self._max_draft_len:
            error = f"draft of {len(tokens)} tokens exceeds max_draft_len {self._max_draft_len}"
        output = self._run(request, tokens)
        self._responses.append(Response(number, Result([output]), error))
        return number

    def await_responses(self, timeout: timedelta | None = None) -> list[Response]:
        assert timeout is not None, "would wait for ever"
        if self._fault == "silent":
            return []
        responses, self._responses = self._responses, []
        return responses

    def _run(self, request: Request, draft: list[int]) -> list[int]:
        ids = list(request.input_token_ids)
        if self._fault == "rejects" and draft:
            return [draft[0] + 1]
        if self._fault == "out of range":
            return [10**9]
        output: list[int] = []
        while len(output) < request.max_tokens:
            output.append(sum(ids + output) % 97)
            if output != draft[: len(output)]:
                break
        return output if request.output_config.exclude_input_from_output else ids + output
