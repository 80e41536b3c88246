"""One response of the model server, read from its tensors."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tritonclient.grpc import service_pb2
from tritonclient.utils import deserialize_bytes_tensor, triton_to_np_dtype

from specserve.openai.answers import FinishReason, Speculation

_LENGTH = "length"


@dataclass(frozen=True, slots=True)
class Piece:
    """What one response says; of a call that does not stream, everything.

    Attributes:
        finish_reason: of the last piece; only that one has counts and speculation.
        speculation: if it was asked for.
    """

    text: str = ""
    token_ids: tuple[int, ...] = ()
    log_probs: tuple[float, ...] = ()
    finish_reason: FinishReason | None = None
    num_input_tokens: int = 0
    num_output_tokens: int = 0
    speculation: Speculation | None = None


def read_piece(response: service_pb2.ModelInferResponse) -> Piece:
    """Decode a response; tensors that are not there are empty."""
    tensors = dict(_tensors(response))

    def values(name: str) -> list[Any]:
        return tensors[name].reshape(-1).tolist() if name in tensors else []

    def one(name: str, default: Any) -> Any:
        return next(iter(values(name)), default)

    reason = one("finish_reason", b"").decode()
    return Piece(
        text=one("text_output", b"").decode(),
        token_ids=tuple(values("output_ids")),
        log_probs=tuple(values("output_log_probs")),
        finish_reason=None if not reason else "length" if reason == _LENGTH else "stop",
        num_input_tokens=one("num_input_tokens", 0),
        num_output_tokens=one("num_output_tokens", 0),
        speculation=_speculation(tensors),
    )


def _tensors(response: service_pb2.ModelInferResponse) -> Any:
    for output, raw in zip(response.outputs, response.raw_output_contents, strict=True):
        if output.datatype == "BYTES":
            yield output.name, deserialize_bytes_tensor(raw)
        else:
            yield output.name, np.frombuffer(raw, triton_to_np_dtype(output.datatype))


def _speculation(tensors: Mapping[str, NDArray[Any]]) -> Speculation | None:
    if "acceptance_rate" not in tensors:
        return None

    def milliseconds(start: str, end: str) -> float:
        nanoseconds = [int(tensors[f"{name}_time_ns"][0]) for name in (start, end)]
        return round(max(0, nanoseconds[1] - nanoseconds[0]) / 1e6, 3)

    num_gaps = max(1, int(tensors["num_output_tokens"][0]) - 1)
    return {
        "verified_draft_tokens": int(tensors["total_draft_tokens"][0]),
        "accepted_draft_tokens": int(tensors["total_accepted_draft_tokens"][0]),
        "acceptance_rate": round(float(tensors["acceptance_rate"][0]), 4),
        "queue_ms": milliseconds("arrival", "first_scheduled"),
        "ttft_ms": milliseconds("arrival", "first_token"),
        "tpot_ms": round(milliseconds("first_token", "last_token") / num_gaps, 3),
    }
