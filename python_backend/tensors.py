"""The tensors of a generation request: names, types, shapes, and which of them we serve.

One table for `specserve`, `ensemble` and `tensorrt_llm_bls`, another for what `specserve` adds for
the steps beside it in an ensemble; a test compares them with every `config.pbtxt`. Names, types and
shapes are tensorrtllm_backend's, in the spellings of 0.19 and 1.x, then ours.

NOTE: the batch dimension is a 1 in the shapes of a `config.pbtxt` (`max_batch_size: 0`), and at
most one dimension of an input is free. A size of 0 beside one of 2^62 has as many bytes as it
should, and server 2.51's stub dies of it before any Python runs.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One tensor, without its batch dimension.

    Attributes:
        refuse: returns why a value cannot be served, to follow the name, or None; absent means it
            is served.
    """

    name: str
    dtype: str
    dims: tuple[int, ...] = (1,)
    refuse: Callable[[Any], str | None] | None = None


def _unsupported(what: str) -> Callable[[Any], str | None]:
    return lambda value: f"is given, but {what} is not supported: leave it out"


def _only(allowed: int, what: str) -> Callable[[Any], str | None]:
    return lambda value: (
        None
        if int(value.flat[0]) == allowed
        else f"is {int(value.flat[0])}: {what} is not supported, only {allowed}"
    )


def _only_false(what: str) -> Callable[[Any], str | None]:
    return lambda value: (
        f"is true, but {what} is not supported: leave it out" if value.any() else None
    )


_IMAGES = _unsupported("multimodal input")
_LORA = _unsupported("LoRA")
_GUIDED = _unsupported("guided decoding")
_PROMPT_TABLE = _unsupported("prompt tuning")

INPUTS: tuple[TensorSpec, ...] = (
    TensorSpec("text_input", "STRING"),
    TensorSpec("max_tokens", "INT32"),
    TensorSpec("bad_words", "STRING", (-1,)),
    TensorSpec("stop_words", "STRING", (-1,)),
    TensorSpec("embedding_bias_words", "STRING", (-1,)),
    TensorSpec("embedding_bias_weights", "FP32", (-1,)),
    TensorSpec("end_id", "INT32"),
    TensorSpec("pad_id", "INT32"),
    TensorSpec("top_k", "INT32"),
    TensorSpec("top_p", "FP32"),
    TensorSpec("temperature", "FP32"),
    TensorSpec("length_penalty", "FP32"),
    TensorSpec("repetition_penalty", "FP32"),
    TensorSpec("presence_penalty", "FP32"),
    TensorSpec("frequency_penalty", "FP32"),
    TensorSpec("min_length", "INT32"),
    TensorSpec("min_tokens", "INT32"),
    TensorSpec("random_seed", "UINT64"),
    TensorSpec("seed", "UINT64"),
    TensorSpec("stream", "BOOL"),
    TensorSpec("exclude_input_in_output", "BOOL"),
    TensorSpec("return_log_probs", "BOOL"),
    TensorSpec("return_perf_metrics", "BOOL"),
    TensorSpec("return_num_input_tokens", "BOOL"),
    TensorSpec("return_num_output_tokens", "BOOL"),
    TensorSpec("num_draft_tokens", "INT32"),
    TensorSpec("use_draft_logits", "BOOL"),
    # Known to tensorrtllm_backend, refused by name here.
    TensorSpec("return_context_logits", "BOOL", refuse=_only_false("returning logits")),
    TensorSpec("return_generation_logits", "BOOL", refuse=_only_false("returning logits")),
    TensorSpec("num_return_sequences", "INT32", refuse=_only(1, "more than one sequence")),
    TensorSpec("beam_width", "INT32", refuse=_only(1, "beam search")),
    TensorSpec("decoder_text_input", "STRING", refuse=_unsupported("an encoder-decoder model")),
    TensorSpec("guided_decoding_guide_type", "STRING", refuse=_GUIDED),
    TensorSpec("guided_decoding_guide", "STRING", refuse=_GUIDED),
    TensorSpec("prompt_embedding_table", "FP16", (-1, 1), refuse=_PROMPT_TABLE),
    TensorSpec("prompt_vocab_size", "INT32", refuse=_PROMPT_TABLE),
    TensorSpec("prompt_table_extra_id", "UINT64", refuse=_PROMPT_TABLE),
    TensorSpec("lora_task_id", "UINT64", refuse=_LORA),
    TensorSpec("lora_weights", "FP16", (-1, 1), refuse=_LORA),
    TensorSpec("lora_config", "INT32", (-1, 3), refuse=_LORA),
    TensorSpec("image_input", "FP16", (-1, 3, 1, 1), refuse=_IMAGES),
    TensorSpec("image_sizes_input", "INT64", (-1, 2), refuse=_IMAGES),
    TensorSpec("image_bytes_input", "UINT8", (-1, 1, 1, 1), refuse=_IMAGES),
    TensorSpec("video_bytes_input", "UINT8", (-1, 1, 1, 1), refuse=_IMAGES),
    TensorSpec("image_url_input", "STRING", refuse=_IMAGES),
    # SpecServe's own.
    TensorSpec("min_p", "FP32"),
    TensorSpec("logit_bias_token_ids", "INT32", (-1,)),
    TensorSpec("logit_bias_values", "FP32", (-1,)),
    TensorSpec("return_finish_reason", "BOOL"),
    TensorSpec("return_token_ids", "BOOL"),
    TensorSpec("slo_ttft_ms", "FP32"),
    TensorSpec("slo_tpot_ms", "FP32"),
    TensorSpec("priority_class", "STRING"),
    TensorSpec("max_draft_tokens", "INT32"),
    TensorSpec("draft_source", "STRING"),
    TensorSpec("stop", "BOOL"),
)

OUTPUTS: tuple[TensorSpec, ...] = (
    TensorSpec("text_output", "STRING", (-1,)),
    TensorSpec("cum_log_probs", "FP32", (-1,)),
    TensorSpec("output_log_probs", "FP32", (-1, -1)),
    TensorSpec("context_logits", "FP32", (-1, -1)),
    TensorSpec("generation_logits", "FP32", (-1, -1, -1)),
    TensorSpec("batch_index", "INT32"),
    TensorSpec("sequence_index", "INT32"),
    TensorSpec("kv_cache_alloc_new_blocks", "INT32"),
    TensorSpec("kv_cache_reused_blocks", "INT32"),
    TensorSpec("kv_cache_alloc_total_blocks", "INT32"),
    TensorSpec("arrival_time_ns", "INT64"),
    TensorSpec("first_scheduled_time_ns", "INT64"),
    TensorSpec("first_token_time_ns", "INT64"),
    TensorSpec("last_token_time_ns", "INT64"),
    TensorSpec("acceptance_rate", "FP32"),
    TensorSpec("total_accepted_draft_tokens", "INT32"),
    TensorSpec("total_draft_tokens", "INT32"),
    TensorSpec("num_input_tokens", "INT32"),
    TensorSpec("num_output_tokens", "INT32"),
    # SpecServe's own, with return_perf_metrics: a JSON list with an object for each step.
    TensorSpec("step_trace", "STRING"),
    TensorSpec("finish_reason", "STRING"),
    TensorSpec("output_ids", "INT32", (-1,)),
)

# Of `specserve` alone: what the steps before and after it in an ensemble give and take. A client
# may send input_ids in place of text, and a response's cancel_key with `stop`. Of watched, whatever
# it holds, only counts that it is there: an ensemble can map a tensor to it, but make none.
INTERNAL_INPUTS: tuple[TensorSpec, ...] = (
    TensorSpec("input_ids", "INT32", (-1,)),
    TensorSpec("cancel_key", "INT64"),
    TensorSpec("watched", "INT32"),
)
INTERNAL_OUTPUTS: tuple[TensorSpec, ...] = (TensorSpec("cancel_key", "INT64"),)
