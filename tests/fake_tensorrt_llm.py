"""A strict stand-in for `tensorrt_llm.bindings.executor` of 1.2.1, which runs real small models.

Classes are generated from the documented signatures below: an unknown keyword, a positional
argument too many or a value of another type is a TypeError, as it is in the real module. The
executor does what upstream's sources say, its faults included: it restarts a generator with every
request, draws anew after a rejected draft token, knows no min-p and no log-probabilities in an
engine that verifies drafts, counts the prompt in presence and frequency, leaves the end token out.
"""

from __future__ import annotations

import datetime
import enum
import inspect
import itertools
import math
import re
import sys
import types
import typing
from collections import Counter, deque
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from paged_lm import PagedLM

SIGNATURES = """
SamplingConfig(beam_width: int = 1, *, top_k: int | None = None, top_p: float | None = None,
  top_p_min: float | None = None, top_p_reset_ids: int | None = None,
  top_p_decay: float | None = None, seed: int | None = None, temperature: float | None = None,
  min_tokens: int | None = None, beam_search_diversity_rate: float | None = None,
  repetition_penalty: float | None = None, presence_penalty: float | None = None,
  frequency_penalty: float | None = None, length_penalty: float | None = None,
  early_stopping: int | None = None, no_repeat_ngram_size: int | None = None,
  num_return_sequences: int | None = None, min_p: float | None = None,
  beam_width_array: list[int] | None = None)
OutputConfig(return_log_probs: bool = False, return_context_logits: bool = False,
  return_generation_logits: bool = False, exclude_input_from_output: bool = False,
  return_encoder_output: bool = False, return_perf_metrics: bool = False,
  additional_model_outputs: list[Any] | None = None)
ExternalDraftTokensConfig(tokens: list[int], logits: Tensor | None = None,
  acceptance_threshold: float | None = None, fast_logits: bool | None = None)
TokenRangeRetentionConfig(token_start: int, token_end: int | None, priority: int,
  duration_ms: timedelta | None = None)
KvCacheRetentionConfig(token_range_retention_configs: list[TokenRangeRetentionConfig],
  decode_retention_priority: int = 35, decode_duration_ms: timedelta | None = None,
  transfer_mode: KvCacheTransferMode = KvCacheTransferMode.DRAM, directory: str | None = None)
Request(input_token_ids: list[int], max_tokens: int, *, streaming: bool = False,
  sampling_config: SamplingConfig = None, output_config: OutputConfig = None,
  end_id: int | None = None, pad_id: int | None = None, position_ids: list[int] | None = None,
  bad_words: list[list[int]] | None = None, stop_words: list[list[int]] | None = None,
  embedding_bias: Tensor | None = None,
  external_draft_tokens_config: ExternalDraftTokensConfig | None = None,
  prompt_tuning_config: None = None, multimodal_input: None = None,
  multimodal_embedding: None = None, mrope_config: None = None, lora_config: None = None,
  lookahead_config: None = None, kv_cache_retention_config: KvCacheRetentionConfig | None = None,
  logits_post_processor_name: str | None = None, logits_post_processor: None = None,
  encoder_input_token_ids: list[int] | None = None, client_id: int | None = None,
  return_all_generated_tokens: bool = False, priority: float = 0.5, type: None = None,
  context_phase_params: None = None, encoder_input_features: None = None,
  encoder_output_length: int | None = None, cross_attention_mask: None = None,
  num_return_sequences: int = 1, eagle_config: None = None, skip_cross_attn_blocks: None = None,
  guided_decoding_params: None = None, language_adapter_uid: int | None = None,
  allotted_time_ms: timedelta | None = None)
KvCacheConfig(enable_block_reuse: bool = True, max_tokens: int | None = None,
  max_attention_window: list[int] | None = None, sink_token_length: int | None = None,
  free_gpu_memory_fraction: float | None = None, host_cache_size: int | None = None,
  onboard_blocks: bool = True, cross_kv_cache_fraction: float | None = None,
  secondary_offload_min_priority: int | None = None, event_buffer_max_size: int = 0, *,
  enable_partial_reuse: bool = True, copy_on_partial_reuse: bool = True, use_uvm: bool = False,
  runtime_defaults: None = None)
SchedulerConfig(
  capacity_scheduler_policy: CapacitySchedulerPolicy = CapacitySchedulerPolicy.GUARANTEED_NO_EVICT,
  context_chunking_policy: ContextChunkingPolicy | None = None, dynamic_batch_config: None = None)
LogitsPostProcessorConfig(processor_map: dict[str, Any] | None = None,
  processor_batched: Callable | None = None, replicate: bool = True)
OrchestratorConfig(is_orchestrator: bool = True, worker_executable_path: str = "",
  orch_leader_comm: None = None, spawn_processes: bool = True)
ParallelConfig(communication_type: CommunicationType = CommunicationType.MPI,
  communication_mode: CommunicationMode = CommunicationMode.LEADER,
  device_ids: list[int] | None = None, participant_ids: list[int] | None = None,
  orchestrator_config: OrchestratorConfig | None = None, num_nodes: int | None = None)
ExecutorConfig(max_beam_width: int = 1, scheduler_config: SchedulerConfig = None,
  kv_cache_config: KvCacheConfig = None, enable_chunked_context: bool = False,
  normalize_log_probs: bool = True, iter_stats_max_iterations: int = 1000,
  request_stats_max_iterations: int = 0, batching_type: BatchingType = BatchingType.INFLIGHT,
  max_batch_size: int | None = None, max_num_tokens: int | None = None,
  parallel_config: ParallelConfig | None = None, peft_cache_config: None = None,
  logits_post_processor_config: LogitsPostProcessorConfig | None = None,
  decoding_config: None = None, use_gpu_direct_storage: bool = False,
  gpu_weights_percent: float = 1.0, max_queue_size: int | None = None,
  extended_runtime_perf_knob_config: None = None, debug_config: None = None,
  recv_poll_period_ms: int = 0, max_seq_idle_microseconds: int = 180000000,
  spec_dec_config: None = None, guided_decoding_config: None = None,
  additional_model_outputs: list[Any] | None = None, cache_transceiver_config: None = None,
  gather_generation_logits: bool = False, mm_embedding_offloading: bool = False,
  enable_trt_overlap: bool = False)
"""
ENUMS = {
    "ModelType": "DECODER_ONLY ENCODER_ONLY ENCODER_DECODER",
    "BatchingType": "STATIC INFLIGHT",
    "CapacitySchedulerPolicy": "MAX_UTILIZATION GUARANTEED_NO_EVICT STATIC_BATCH",
    "ContextChunkingPolicy": "EQUAL_PROGRESS FIRST_COME_FIRST_SERVED",
    "CommunicationType": "MPI",
    "CommunicationMode": "LEADER ORCHESTRATOR",
    "KvCacheTransferMode": "DRAM GDS POSIX_DEBUG_FALLBACK",
    "FinishReason": "NOT_FINISHED END_ID STOP_WORDS LENGTH TIMED_OUT CANCELLED",
}
POST_PROCESSOR = "batched"  # what upstream calls it is nobody's business
TOP_K_MAX = 1024


def make_module(engines: dict[str, Engine], *, prompt_ignore_length: bool = False) -> Any:
    """Return the module; an engine is found by the last part of its folder's name."""
    module = types.ModuleType("tensorrt_llm.bindings.executor")
    names: dict[str, Any] = {
        "Any": Any,
        "Callable": Callable,
        "Tensor": torch.Tensor,
        "timedelta": datetime.timedelta,
    }
    for name, values in ENUMS.items():
        names[name] = enum.Enum(name, values)
    text = SIGNATURES.strip()
    if prompt_ignore_length:
        text = text.replace("min_p: float", "prompt_ignore_length: int | None = None, min_p: float")
    for signature in re.split(r"\n(?! )", text):
        name, _, arguments = signature.removesuffix(")").partition("(")
        names[name] = _strict_class(name, arguments, names)
    names["Request"].BATCHED_POST_PROCESSOR_NAME = POST_PROCESSOR
    module.__dict__.update(names)

    class Executor(FakeExecutor):
        def __init__(self, model_path: Any, model_type: Any, executor_config: Any) -> None:
            _check("model_path", model_path, str | Path)
            _check("model_type", model_type, module.ModelType)
            _check("executor_config", executor_config, module.ExecutorConfig)
            engine = engines[Path(model_path).name]
            super().__init__(engine, module, executor_config)

    module.Executor = Executor  # type: ignore[attr-defined]
    return module


def _strict_class(name: str, arguments: str, names: dict[str, Any]) -> type:
    scope: dict[str, Any] = {}
    exec(f"def __init__(self, {arguments}) -> None: pass", dict(names), scope)
    signature = inspect.signature(scope["__init__"])
    hints = typing.get_type_hints(scope["__init__"])

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        arguments = signature.bind(self, *args, **kwargs).arguments
        for key, value in list(arguments.items())[1:]:
            _check(f"{name}.{key}", value, hints[key])
            setattr(self, key, value)
        if name == "ExternalDraftTokensConfig" and not self.tokens:
            raise RuntimeError("Assertion failed: draft tokens must not be empty")

    defaults = {
        key: hints[key]()
        if parameter.default is None and hints[key] in names.values()
        else parameter.default
        for key, parameter in signature.parameters.items()
        if parameter.default is not parameter.empty
    }  # of another class: that one's defaults
    return type(name, (), {**defaults, "__init__": init})


def _check(name: str, value: Any, hint: Any) -> None:
    if not _matches(value, hint):
        raise TypeError(f"incompatible argument {name}: {value!r} is no {hint}")


def _matches(value: Any, hint: Any) -> bool:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_matches(value, kind) for kind in arguments)
    if origin in (list, dict):
        return isinstance(value, origin) and all(_matches(item, arguments[0]) for item in value)
    if hint is Any:
        return True
    if hint is Callable:
        return callable(value)
    if hint is float:
        return type(value) in (int, float)
    if hint in (int, bool, str):
        return type(value) is hint
    return isinstance(value, hint)


class Engine:
    """A compiled engine: a model, its limits, what was asked of it, and what goes wrong with it.

    Attributes:
        requests: everything that was enqueued, in order.
        refuses: says why a request gets an error; empty if it does not.
        is_silent: no answers come.
        is_dead: waiting for answers fails.
        late: client ids whose first pass comes one later than that of the others.
        num_passes: forward passes so far.
        spend: called once a pass, to move a clock.
    """

    def __init__(
        self, model: PagedLM, *, max_draft_len: int = 0, max_input_len: int = 512, pad: int = 0
    ) -> None:
        self.model = model
        self.max_draft_len = max_draft_len
        self.max_input_len = max_input_len
        self.num_rows = model.vocab_size + pad
        self.requests: list[Any] = []
        self.executors: list[FakeExecutor] = []
        self.refuses: Callable[[Any], str] = lambda request: ""
        self.is_silent = self.is_dead = False
        self.late: set[int] = set()
        self.num_passes = 0
        self.spend: Callable[[], None] = lambda: None


class _Running:
    """A request inside the executor."""

    def __init__(self, request_id: int, request: Any) -> None:
        self.request_id = request_id
        self.request = request
        self.token_ids = list(request.input_token_ids)
        self.log_probs: list[float] = []
        self.random = np.random.default_rng(request.sampling_config.seed or 0)
        self.reason = "NOT_FINISHED"
        self.num_cached = 0

    @property
    def output(self) -> list[int]:
        return self.token_ids[len(self.request.input_token_ids) :]


class FakeExecutor:
    """In-flight batching, one iteration at a time, while somebody waits for responses."""

    def __init__(self, engine: Engine, module: Any, config: Any) -> None:
        self.engine = engine
        self.config = config
        self.is_shut_down = False
        self.cancelled: list[int] = []
        self.timeouts: list[datetime.timedelta] = []
        self._module = module
        self._ids = itertools.count(1)
        self._queue: deque[_Running] = deque()
        self._cached: set[tuple[int, ...]] = set()
        self._stats: deque[Any] = deque(maxlen=config.iter_stats_max_iterations)
        engine.executors.append(self)

    # -- the interface -------------------------------------------------------------------------

    def can_enqueue_requests(self) -> bool:
        return not self.is_shut_down

    def enqueue_request(self, request: Any) -> int:
        return self.enqueue_requests([request])[0]

    def enqueue_requests(self, requests: Any) -> list[int]:
        _check("requests", requests, list[self._module.Request])
        assert not self.is_shut_down, "enqueued after shutdown"
        running = [_Running(next(self._ids), request) for request in requests]
        self.engine.requests += requests
        self._queue.extend(running)
        return [r.request_id for r in running]

    def await_responses(self, timeout: Any = None) -> list[Any]:
        _check("timeout", timeout, datetime.timedelta)  # never without one
        self.timeouts.append(timeout)
        if self.engine.is_dead:
            raise RuntimeError("MPI rank 1 is gone")
        if self.engine.is_silent:
            return []
        wave, self._queue = list(self._queue), deque()
        responses = [self._error(r, e) for r in wave if (e := self._why_not(r.request))]
        wave = [r for r in wave if not self._why_not(r.request)]
        size = self.config.max_batch_size or 1024
        for begin in range(0, len(wave), size):
            self._run(wave[begin : begin + size])
        return responses + [self._response(r) for r in wave]

    def cancel_request(self, id: Any = None) -> None:
        _check("id", id, int)
        self.cancelled.append(id)
        self._queue = deque(r for r in self._queue if r.request_id != id)

    def get_latest_iteration_stats(self) -> list[Any]:
        stats, self._stats = list(self._stats), deque(maxlen=self._stats.maxlen)
        return stats

    def shutdown(self) -> None:
        assert not self.is_shut_down, "shut down twice"
        self.is_shut_down = True

    # -- running -------------------------------------------------------------------------------

    def _why_not(self, request: Any) -> str:
        draft = request.external_draft_tokens_config
        num_draft = len(draft.tokens) if draft else 0
        if num_draft > self.engine.max_draft_len:
            return f"Draft tokens length {num_draft} exceeds {self.engine.max_draft_len}"
        if len(request.input_token_ids) + num_draft > self.engine.max_input_len:
            return f"Prompt length exceeds maximum input length {self.engine.max_input_len}"
        return self.engine.refuses(request)

    def _run(self, batch: list[_Running]) -> None:
        """Run a batch to its end; requests in `late` start an iteration after the others."""
        delayed = [r for r in batch if r.request.client_id in self.engine.late]
        active, started = [r for r in batch if r not in delayed], set()
        while active or delayed:
            if started or not active:
                active, delayed = active + delayed, []
            self._iterate(active, started)
            active = [r for r in active if r.reason == "NOT_FINISHED"]

    def _iterate(self, active: list[_Running], started: set[int]) -> None:
        self.engine.num_passes += 1
        self.engine.spend()
        computed = sum(self._num_context_tokens(r) for r in active if r.request_id not in started)
        num_gen = sum(r.request_id in started for r in active)
        started.update(r.request_id for r in active)
        stats = SimpleNamespace(num_ctx_tokens=computed, num_gen_requests=num_gen)
        self._stats.append(SimpleNamespace(inflight_batching_stats=stats, iter_latency_ms=1.0))
        logits = [self._logits(r) for r in active]
        self._post_process(active, logits)
        for running, tensor in zip(active, logits, strict=True):
            self._decode(running, tensor.numpy().reshape(-1))
        for running in active:
            for end in range(running.num_cached + 1, len(running.token_ids) + 1):
                self._cached.add(tuple(running.token_ids[:end]))
            running.num_cached = len(running.token_ids)

    def _num_context_tokens(self, running: _Running) -> int:
        """Return what of a request is not cached, by token: partial reuse is on."""
        token_ids, draft = running.token_ids, running.request.external_draft_tokens_config
        cached = 0
        while cached < len(token_ids) - 1 and tuple(token_ids[: cached + 1]) in self._cached:
            cached += 1
        running.num_cached = cached
        return len(token_ids) - cached + (len(draft.tokens) if draft else 0)

    def _logits(self, running: _Running) -> torch.Tensor:
        logits = np.full(self.engine.num_rows, -np.inf, dtype=np.float32)
        logits[: self.engine.model.vocab_size] = self.engine.model.logits(running.token_ids)
        return torch.from_numpy(logits).reshape(1, 1, -1)

    def _post_process(self, active: list[_Running], logits: list[torch.Tensor]) -> None:
        named = [
            (r, tensor)
            for r, tensor in zip(active, logits, strict=True)
            if r.request.logits_post_processor_name == POST_PROCESSOR
        ]
        if named:
            self.config.logits_post_processor_config.processor_batched(
                [r.request_id for r, _ in named],
                [tensor for _, tensor in named],
                [[list(r.token_ids)] for r, _ in named],
                0,
                [r.request.client_id for r, _ in named],
            )

    # -- decoding: one pass of one request -----------------------------------------------------

    def _decode(self, running: _Running, logits: np.ndarray[Any, Any]) -> None:
        draft = running.request.external_draft_tokens_config
        if draft is None:
            self._append(running, *self._draw(running, logits))
        else:
            self._verify(running, draft.tokens, logits)
        if running.reason == "NOT_FINISHED" and (
            draft is not None or len(running.output) >= running.request.max_tokens
        ):
            running.reason = "LENGTH"  # a request with a draft ends after its verification

    def _verify(
        self, running: _Running, draft: Sequence[int], logits: np.ndarray[Any, Any]
    ) -> None:
        for token_id in draft:
            drawn, value = self._draw(running, logits)
            if drawn != token_id:
                self._append(running, *self._draw(running, logits))  # anew, as upstream does
                return
            self._append(running, drawn, value)
            if running.reason != "NOT_FINISHED":
                return
            logits = self._logits(running).numpy().reshape(-1)
        self._append(running, *self._draw(running, logits))

    def _append(self, running: _Running, token_id: int, log_prob: float) -> None:
        if token_id == running.request.end_id:
            running.reason = "END_ID"  # and the token is not part of the output
            return
        running.token_ids.append(token_id)
        running.log_probs.append(log_prob)

    def _draw(self, running: _Running, logits: np.ndarray[Any, Any]) -> tuple[int, float]:
        """Draw a token; return it with its log-probability in the whole vocabulary."""
        config = running.request.sampling_config
        adjusted = self._adjust(running, logits.astype(np.float64))
        probs = np.exp(adjusted - adjusted.max())
        probs /= probs.sum()
        order = np.argsort(-probs, kind="stable")
        top_k = config.top_k or 0
        if not top_k and not config.top_p:
            top_k = 1
        kept = order[: min(top_k, TOP_K_MAX) or None]
        mass = np.cumsum(probs[kept])
        # The sum is cut at top-p, and the token at the border keeps only its part below.
        point = running.random.random() * (config.top_p or 1.0) * mass[-1]
        token_id = int(kept[min(int(np.searchsorted(mass, point)), len(kept) - 1)])
        total = mass[-1] if self.config.normalize_log_probs else 1.0
        return token_id, math.log(probs[token_id] / total)

    def _adjust(self, running: _Running, logits: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        request, config = running.request, running.request.sampling_config
        if request.embedding_bias is not None:
            assert request.embedding_bias.dtype == torch.float32
            assert request.embedding_bias.shape == (self.engine.num_rows,)
            logits = logits + request.embedding_bias.numpy()
        logits = logits / (config.temperature or 1.0)
        for token_id in set(running.token_ids):
            penalty = config.repetition_penalty or 1.0
            logits[token_id] *= penalty if logits[token_id] < 0 else 1 / penalty
        ignored = getattr(config, "prompt_ignore_length", None) or 0
        for token_id, count in Counter(running.token_ids[ignored:]).items():
            logits[token_id] -= config.presence_penalty or 0.0
            logits[token_id] -= (config.frequency_penalty or 0.0) * count
        if len(running.output) < (config.min_tokens or 0):
            logits[request.end_id] = -np.inf
        for *head, last in request.bad_words or ():
            if not head or running.token_ids[-len(head) :] == head:
                logits[last] = -np.inf
        return logits

    # -- responses -----------------------------------------------------------------------------

    def _response(self, running: _Running) -> Any:
        request = running.request
        output = running.output
        if not request.output_config.exclude_input_from_output:
            output = running.token_ids
        wants = request.output_config.return_log_probs and not self.engine.max_draft_len
        result = SimpleNamespace(
            is_final=True,
            output_token_ids=[output],
            log_probs=[running.log_probs] if wants else None,
            finish_reasons=[self._module.FinishReason[running.reason]],
        )
        return self._answer(running, result=result)

    def _error(self, running: _Running, message: str) -> Any:
        return self._answer(running, error_msg=message)

    def _answer(self, running: _Running, **values: Any) -> Any:
        return SimpleNamespace(
            request_id=running.request_id,
            client_id=running.request.client_id,
            has_error=lambda: "error_msg" in values,
            **values,
        )


def install(monkeypatch: Any, module: Any) -> None:
    """Install the module under its own name, until the test ends."""
    for name in ("tensorrt_llm", "tensorrt_llm.bindings"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, "tensorrt_llm.bindings.executor", module)
