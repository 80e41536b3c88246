"""The executor's requests, from rows.

Sampling follows TensorRT-LLM's kernels of the 1.2 era: bias, temperature, repetition penalty, then
presence and frequency, so that the last two are divided by the temperature here to mean what they
mean before it; filters after that, in the executor's own definition. Stop words are no business of
an engine here: they are matched in the text.
"""

from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch

from specserve.batch import Row
from specserve.sampling_params import SamplingParams

KEEP_PRIORITY = 80  # 35 is what blocks have by themselves, 100 the most
KEEP = timedelta(seconds=10)  # far longer than a step; what has finished is evictable after it
MASK64 = 2**64 - 1
GOLDEN = 0x9E3779B97F4A7C15


def fresh_seed(seed: int, position: int) -> int:
    """Return the seed of the call that samples output `position` of a request.

    A generator that starts anew with every call needs another seed each time, or every token of a
    request would be drawn with the same number.

    Source: splitmix64 (Steele et al. 2014), whose outputs for a seed are distinct.
    """
    z = (seed + (position + 1) * GOLDEN) & MASK64
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK64
    return z ^ (z >> 31)


class Requests:
    """Makes the requests of one engine.

    Args:
        api: the module of the bindings.
        num_rows: of the engine's logits.
        prompt_ignore_length: the bindings have this sampling parameter.
    """

    def __init__(self, api: Any, num_rows: int, prompt_ignore_length: bool = False) -> None:
        self._api = api
        self._num_rows = num_rows
        self._prompt_ignore_length = prompt_ignore_length
        self._biases: dict[int, torch.Tensor] = {}

    def check(self) -> None:
        """Try the sampling parameter that not every version has.

        Raises:
            ValueError: with the fix.
        """
        if not self._prompt_ignore_length:
            return
        try:
            self._api.SamplingConfig(prompt_ignore_length=1)
        except TypeError as error:
            raise ValueError(
                "tensorrt_llm.prompt_ignore_length is true: this TensorRT-LLM has no such sampling "
                "parameter; set it to false"
            ) from error

    def verify(self, row: Row, token_ids: list[int], draft: Sequence[int]) -> Any:
        """Make the request that verifies a draft after a sequence, and adds one token.

        Args:
            token_ids: the whole sequence up to the draft.
            draft: [k], k may be 0.
        """
        params = row.sampling
        external = self._api.ExternalDraftTokensConfig(list(draft)) if draft else None
        return self._api.Request(
            token_ids,
            len(draft) + 1,
            sampling_config=self._sampling(row, len(token_ids)),
            output_config=self._api.OutputConfig(exclude_input_from_output=True),
            end_id=params.end_id,
            bad_words=[list(word) for word in params.bad_words] or None,
            embedding_bias=self._bias(row),
            external_draft_tokens_config=external,
            kv_cache_retention_config=self._retention(),
        )

    def compute(self, token_ids: list[int]) -> Any:
        """Make the request that computes a part of a prompt; its token means nothing."""
        return self._api.Request(
            token_ids,
            1,
            sampling_config=self._api.SamplingConfig(top_k=1),
            output_config=self._api.OutputConfig(exclude_input_from_output=True),
            kv_cache_retention_config=self._retention(),
        )

    def draft(self, token_ids: list[int], length: int) -> Any:
        """Make the request that drafts `length` tokens and says how likely each of them was."""
        return self._api.Request(
            token_ids,
            length,
            sampling_config=self._api.SamplingConfig(top_k=1),
            output_config=self._api.OutputConfig(
                return_log_probs=True, exclude_input_from_output=True
            ),
            kv_cache_retention_config=self._retention(),
        )

    def watched_draft(self, token_ids: list[int], length: int, client_id: int, stop_id: int) -> Any:
        """Make the request that drafts until the logits post-processor wants `stop_id`."""
        return self._api.Request(
            token_ids,
            length,
            sampling_config=self._api.SamplingConfig(top_k=1),
            output_config=self._api.OutputConfig(exclude_input_from_output=True),
            end_id=stop_id,
            client_id=client_id,
            logits_post_processor_name=self._api.Request.BATCHED_POST_PROCESSOR_NAME,
            kv_cache_retention_config=self._retention(),
        )

    def release(self, keys: Sequence[int]) -> None:
        """Forget requests; unknown keys are ignored."""
        for key in keys:
            self._biases.pop(key, None)

    def _sampling(self, row: Row, num_tokens: int) -> Any:
        params = row.sampling
        position = num_tokens - row.num_prompt_tokens
        values: dict[str, Any] = {"top_k": 1}
        if not params.is_greedy:
            values = {
                "top_k": params.top_k,
                "top_p": params.top_p,
                "temperature": params.temperature,
                "seed": fresh_seed(params.seed, position),
            }
        if params.min_tokens > position:
            values["min_tokens"] = params.min_tokens - position
        return self._api.SamplingConfig(**values, **self._penalties(params, row.num_prompt_tokens))

    def _penalties(self, params: SamplingParams, num_prompt_tokens: int) -> dict[str, float]:
        """Return penalties that count as if all output tokens had come from one call."""
        values: dict[str, float] = {}
        temperature = 1.0 if params.is_greedy else params.temperature
        if params.repetition_penalty != 1.0:
            values["repetition_penalty"] = params.repetition_penalty
        for name in ("presence_penalty", "frequency_penalty"):
            penalty = getattr(params, name)
            if penalty != 0.0:
                values[name] = penalty / temperature
                values["prompt_ignore_length"] = num_prompt_tokens
        return values

    def _bias(self, row: Row) -> torch.Tensor | None:
        """Return what is added to the logits, made once and sent with every call."""
        if not row.sampling.logit_bias:
            return None
        if row.key not in self._biases:
            bias = torch.zeros(self._num_rows, dtype=torch.float32)
            for token_id, value in row.sampling.logit_bias:
                bias[token_id] += value
            self._biases[row.key] = bias
        return self._biases[row.key]

    def _retention(self) -> Any:
        """Return what keeps a sequence's blocks until its next call, before those of others."""
        prompt = self._api.TokenRangeRetentionConfig(0, None, KEEP_PRIORITY, KEEP)
        return self._api.KvCacheRetentionConfig([prompt], KEEP_PRIORITY, KEEP)
