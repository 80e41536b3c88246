"""One client call, parsed: the request for the scheduler, and what the client wants back."""

import difflib
import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tokenizers import Tokenizer

from python_backend.reader import Reader, Tensors
from python_backend.tensors import INPUTS
from specserve.config import Config
from specserve.request import SLO, Request
from specserve.sampling_params import MAX_SEED, SamplingParams
from specserve.text import encode

NO_END = -1  # an end_id that no token has
DRAFT_SOURCES = ("auto", "model", "ngram", "none")
# A class becomes a label of a metric, where a line break would end the line.
PRIORITY_CLASS = re.compile(r"[\w.-]{0,64}", re.ASCII)
_REFUSALS = {spec.name: spec.refuse for spec in INPUTS if spec.refuse}


@dataclass(frozen=True, slots=True)
class Call:
    """A parsed call.

    Attributes:
        prefix: what the text starts with: the prompt, unless it is excluded.
        is_watched: the call came through an ensemble, which ends with the `watcher` step.
    """

    request: Request
    stop_words: list[str]
    stream: bool
    prefix: str
    return_log_probs: bool
    return_perf_metrics: bool
    return_num_input_tokens: bool
    return_num_output_tokens: bool
    return_finish_reason: bool
    return_token_ids: bool
    is_watched: bool


class CallParser:
    """Read tensors with the limits, the tokenizer and the end token of one server.

    Args:
        end_id: what ends an output unless a request says otherwise; None is nothing.
    """

    def __init__(
        self, config: Config, tokenizer: Tokenizer, vocab_size: int, end_id: int | None
    ) -> None:
        self._config = config
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._end_id = end_id

    def __call__(
        self,
        tensors: Tensors,
        parameters: Mapping[str, Any],
        request_id: str,
        timeout_us: int = 0,
    ) -> Call:
        """Parse one call.

        Args:
            tensors: with a leading batch dimension of 1.
            parameters: the request's, by name.
            timeout_us: Triton's own timeout, 0 for none; over HTTP it is among the parameters.

        Raises:
            ValueError: with the value, the limit and the fix.
        """
        limit = self._config.limits.max_parameters
        if len(parameters) > limit:
            raise ValueError(
                f"{len(parameters)} request parameters are given: the limit is {limit}"
            )
        _refuse_typos(parameters)
        for name, array in tensors.items():
            if array.shape[:1] != (1,):
                raise ValueError(
                    f"{name} has shape {list(array.shape)}: one request per call, shape [1, ...]"
                )
            reason = _REFUSALS[name](array) if name in _REFUSALS and array.size else None
            if reason:
                raise ValueError(f"{name} {reason}")
        read = Reader(tensors, self._config.limits)
        text, prompt_token_ids = self._prompt(read)
        request = Request(
            prompt_token_ids=prompt_token_ids,
            max_tokens=read.required_int("max_tokens"),
            sampling=self._sampling(read),
            request_id=request_id,
            slo=SLO(read.seconds("slo_ttft_ms"), read.seconds("slo_tpot_ms")),
            priority_class=self._priority_class(read),
            timeout_s=self._timeout_s(parameters.get("timeout", timeout_us)),
            max_draft_tokens=read.count("max_draft_tokens"),
            num_draft_tokens=read.count("num_draft_tokens"),
            draft_source=self._draft_source(read),
            trace=[] if read.flag("return_perf_metrics", False) else None,
        )
        exclude = read.flag("exclude_input_in_output", self._config.server.exclude_input_in_output)
        stream = read.flag("stream", False)
        return Call(
            request=request,
            stop_words=read.words("stop_words"),
            stream=stream,
            prefix="" if exclude or stream else text,
            return_log_probs=request.sampling.return_log_probs,
            return_perf_metrics=read.flag("return_perf_metrics", False),
            return_num_input_tokens=read.flag("return_num_input_tokens", False),
            return_num_output_tokens=read.flag("return_num_output_tokens", False),
            return_finish_reason=read.flag("return_finish_reason", False),
            return_token_ids=read.flag("return_token_ids", False),
            is_watched="watched" in tensors,
        )

    def _prompt(self, read: Reader) -> tuple[str, list[int]]:
        if "input_ids" in read:
            token_ids = [int(token_id) for token_id in read.array("input_ids")]
            self._check_ids("input_ids", token_ids)
            text = read.text("text_input")
            return self._tokenizer.decode(token_ids) if text is None else text, token_ids
        text = read.text("text_input")
        if text is None:
            raise ValueError("text_input is missing: give the prompt")
        return text, encode(self._tokenizer, text)

    def _sampling(self, read: Reader) -> SamplingParams:
        top_k = read.integer("top_k", 0)
        top_p = read.number("top_p", 1.0)
        default = 1.0 if top_k > 1 or "top_p" in read or "min_p" in read else 0.0
        end_id = read.integer("end_id", NO_END if self._end_id is None else self._end_id)
        if end_id != NO_END:
            self._check_ids("end_id", [end_id])
        seed = read.either("random_seed", "seed")
        return SamplingParams(
            logit_bias=self._logit_bias(read),
            min_tokens=read.either("min_length", "min_tokens") or 0,
            bad_words=self._bad_words(read),
            repetition_penalty=read.number("repetition_penalty", 1.0),
            presence_penalty=read.number("presence_penalty", 0.0),
            frequency_penalty=read.number("frequency_penalty", 0.0),
            temperature=read.number("temperature", default),
            min_p=read.number("min_p", 0.0),
            top_k=top_k,
            top_p=top_p,
            seed=secrets.randbelow(MAX_SEED) if seed is None else seed,
            end_id=None if end_id == NO_END else end_id,
            return_log_probs=read.flag("return_log_probs", False),
        )

    def _logit_bias(self, read: Reader) -> tuple[tuple[int, float], ...]:
        words = read.words("embedding_bias_words")
        weights = read.array("embedding_bias_weights").tolist()
        if len(words) != len(weights):
            raise ValueError(
                f"embedding_bias_words has {len(words)} entries and embedding_bias_weights "
                f"{len(weights)}: give one weight for each word"
            )
        of_words = tuple(
            (token_id, float(weight))
            for word, weight in zip(words, weights, strict=True)
            for token_id in self._encode_word(word)
        )
        of_ids = self._logit_bias_of_ids(read)
        limit = self._config.limits.max_logit_bias
        for name, bias in (("embedding_bias_words", of_words), ("logit_bias_token_ids", of_ids)):
            if len(bias) > limit:
                raise ValueError(f"{name} are {len(bias)} tokens: the limit is {limit}, give fewer")
        return of_words + of_ids

    def _logit_bias_of_ids(self, read: Reader) -> tuple[tuple[int, float], ...]:
        token_ids = [int(token_id) for token_id in read.array("logit_bias_token_ids")]
        values = [float(value) for value in read.array("logit_bias_values")]
        if len(token_ids) != len(values):
            raise ValueError(
                f"logit_bias_token_ids has {len(token_ids)} entries and logit_bias_values "
                f"{len(values)}: give one value for each token id"
            )
        self._check_ids("logit_bias_token_ids", token_ids)
        return tuple(zip(token_ids, values, strict=True))

    def _bad_words(self, read: Reader) -> tuple[tuple[int, ...], ...]:
        """Tokenize each word as it stands and after a space, which byte-level BPE tells apart."""
        variants = [v for w in read.words("bad_words") if w for v in (w, f" {w.lstrip()}")]
        return tuple(dict.fromkeys(tuple(self._encode_word(word)) for word in variants))

    def _encode_word(self, word: str) -> list[int]:
        token_ids: list[int] = self._tokenizer.encode(word, add_special_tokens=False).ids
        return token_ids

    def _draft_source(self, read: Reader) -> str:
        source = read.text("draft_source") or self._config.policy.draft_source
        if source not in DRAFT_SOURCES:
            raise ValueError(f"draft_source is '{source}': known are {', '.join(DRAFT_SOURCES)}")
        return source

    def _priority_class(self, read: Reader) -> str:
        name = read.text("priority_class") or ""
        if not PRIORITY_CLASS.fullmatch(name):
            raise ValueError(
                f"priority_class is {name[:80]!r}: give up to 64 of A-Z, a-z, 0-9, '_', '.' and '-'"
            )
        return name

    def _timeout_s(self, value: Any) -> float:
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise ValueError(
                f"timeout is {value!r}: must be a whole number of microseconds, 0 for none"
            )
        limit = self._config.limits.max_request_s
        return min(value / 1e6, limit) if value else limit

    def _check_ids(self, name: str, token_ids: list[int]) -> None:
        wrong = next((t for t in token_ids if not 0 <= t < self._vocab_size), None)
        if wrong is not None:
            raise ValueError(f"{name} has {wrong}: token ids are in [0, {self._vocab_size})")


def _refuse_typos(parameters: Mapping[str, Any]) -> None:
    """Refuse a request parameter that is nearly the name of a tensor: HTTP sends typos that way."""
    names = [spec.name for spec in INPUTS]
    for name in parameters:
        snake = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).replace("-", "_").lower()
        near = difflib.get_close_matches(snake, names, n=1, cutoff=0.8)
        if near:
            raise ValueError(f"unknown parameter '{name}': did you mean '{near[0]}'?")
