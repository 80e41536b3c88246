"""One client's side of a request: text, responses, final flag."""

import dataclasses
import json
import math
import secrets
import time
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils
from numpy.typing import NDArray
from tokenizers import Tokenizer

from python_backend.call import Call
from python_backend.sender import FINAL, Sender
from specserve.request import FinishReason, Request
from specserve.scheduler import StepOutput
from specserve.text import TextStream
from specserve.trace import StepTrace

PROBE_S = 0.2  # of silence


class Reply:
    """Turn step outputs into responses: one per step when streaming, else one at the end.

    The final flag is sent exactly once, whatever happens.

    Attributes:
        cancel_key: in the first response, for the `watcher` of an ensemble in every one; whoever
            knows it may stop this request. Nobody can guess it.
    """

    def __init__(self, call: Call, sender: Sender, tokenizer: Tokenizer) -> None:
        self.call = call
        self.cancel_key = secrets.randbits(63)
        self.is_done = False
        self._sender = sender
        self._text = TextStream(tokenizer, call.stop_words, call.request.sampling.end_id)
        self._pending = call.prefix
        self._token_ids: list[int] = []
        self._log_probs: list[float] = []
        self._sum_log_probs = 0.0
        self._has_sent = False
        self._sent_s = time.monotonic()

    @property
    def request(self) -> Request:
        """The scheduler's request."""
        return self.call.request

    @property
    def num_output_tokens(self) -> int:
        """Tokens behind the text, up to a stop word."""
        return self._text.num_tokens

    def push(self, output: StepOutput) -> FinishReason | None:
        """Take one step's tokens; respond if there is something to say.

        Returns:
            Why the request ended with this step, or None.
        """
        before = self._text.num_tokens
        self._pending += self._text.push(output.token_ids)
        num_taken = self._text.num_tokens - before
        log_probs = output.log_probs[:num_taken]
        self._token_ids += output.token_ids[:num_taken]
        self._log_probs += log_probs
        self._sum_log_probs += sum(log_probs)
        reason = FinishReason.STOP_WORD if self._text.is_stopped else output.finish_reason
        if reason is not None:
            self._pending += self._text.finish()
            self._send(reason)
        elif self.call.stream and self._pending:
            self._send(None)
        return reason

    def cancel(self) -> bool:
        """Send the final flag if the client has gone; return whether it has."""
        if not self.is_done and self._sender.is_cancelled():
            self.is_done = True
            self._sender.send(flags=FINAL)
        return self.is_done

    def probe_due_s(self) -> float:
        """Return when to `probe`, by `time.monotonic()`; infinity if Triton tells us anyway."""
        return self._sent_s + PROBE_S if self.call.is_watched else math.inf

    def probe(self) -> None:
        """Start the `watcher` of an ensemble, which is told whether the client has gone.

        A response without text ends there: the client sees nothing of it.
        """
        self._sent_s = time.monotonic()
        self._sender.send(_response({"cancel_key": _long(self.cancel_key)}))

    def fail(self, message: str, code: int) -> None:
        """End with an error."""
        if not self.is_done:
            self.is_done = True
            is_rejected = self.request.finish_reason is FinishReason.REJECTED
            self._sender.fail(message, code, "REJECTED" if is_rejected else "")

    def _send(self, reason: FinishReason | None) -> None:
        tensors = {"text_output": np.array([[self._pending.encode()]], dtype=object)}
        if self.call.is_watched or not self._has_sent:
            tensors["cancel_key"] = _long(self.cancel_key)
        if self.call.return_log_probs:
            tensors["cum_log_probs"] = _floats(self._sum_log_probs)
            tensors["output_log_probs"] = np.array([[self._log_probs]], dtype=np.float32)
        if self.call.return_token_ids:
            tensors["output_ids"] = np.array([self._token_ids], dtype=np.int32)
        if reason is not None:
            tensors |= self._summary(reason)
        self._pending, self._token_ids, self._log_probs = "", [], []
        self._sent_s = time.monotonic()
        self._has_sent = True
        self.is_done = reason is not None
        self._sender.send(_response(tensors), flags=FINAL if self.is_done else 0)

    def _summary(self, reason: FinishReason) -> dict[str, NDArray[Any]]:
        """Return what the last response adds, if the client asked for it."""
        request, tensors = self.request, {}
        if self.call.return_finish_reason:
            tensors["finish_reason"] = np.array([[reason.value.encode()]], dtype=object)
        if self.call.return_num_input_tokens:
            tensors["num_input_tokens"] = _int(request.num_prompt_tokens)
        if self.call.return_num_output_tokens:
            tensors["num_output_tokens"] = _int(self.num_output_tokens)
        if self.call.return_perf_metrics:
            verified = request.num_verified_tokens
            rate = request.num_accepted_tokens / verified if verified else 0.0
            tensors |= {
                "acceptance_rate": _floats(rate),
                "total_accepted_draft_tokens": _int(request.num_accepted_tokens),
                "total_draft_tokens": _int(verified),
                "arrival_time_ns": _nanoseconds(request.arrival_s),
                "first_scheduled_time_ns": _nanoseconds(request.first_scheduled_s),
                "first_token_time_ns": _nanoseconds(request.first_token_s),
                "last_token_time_ns": _nanoseconds(request.last_token_s),
                "step_trace": _steps(request.trace or []),
            }
        return tensors


def send_done(sender: Sender) -> None:
    """Answer a call that generates nothing: an empty text and the final flag."""
    tensors = {"text_output": np.array([[b""]], dtype=object), "cancel_key": _long(0)}
    sender.send(_response(tensors), flags=FINAL)


def _response(tensors: dict[str, NDArray[Any]]) -> Any:
    return pb_utils.InferenceResponse(
        [pb_utils.Tensor(name, array) for name, array in tensors.items()]
    )


def _int(value: int) -> NDArray[np.int32]:
    return np.array([[value]], dtype=np.int32)


def _steps(trace: list[StepTrace]) -> NDArray[np.object_]:
    steps = [dataclasses.asdict(step) for step in trace]
    text = json.dumps(steps, default=float, separators=(",", ":"))
    return np.array([[text.encode()]], dtype=object)


def _long(value: int) -> NDArray[np.int64]:
    return np.array([[value]], dtype=np.int64)


def _floats(value: float) -> NDArray[np.float32]:
    return np.array([[value]], dtype=np.float32)


def _nanoseconds(seconds: float | None) -> NDArray[np.int64]:
    return _long(round((seconds or 0.0) * 1e9))
