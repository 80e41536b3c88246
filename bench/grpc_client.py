"""KServe gRPC streaming, asynchronous: one stream per request, times of every response."""

import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import tritonclient.grpc.aio as triton
from tritonclient.utils import np_to_triton_dtype

DTYPES = {
    "max_tokens": np.int32,
    "min_tokens": np.int32,
    "end_id": np.int32,
    "top_k": np.int32,
    "seed": np.uint64,
    "input_ids": np.int32,
    "max_draft_tokens": np.int32,
    "num_draft_tokens": np.int32,
}


@dataclass(slots=True)
class Answer:
    """One request as its client saw it; times in seconds of `time.perf_counter`."""

    sent_s: float
    text: str = ""
    response_s: list[float] = field(default_factory=list)
    tensors: dict[str, Any] = field(default_factory=dict)
    error: str | None = None


async def stream(
    client: triton.InferenceServerClient, model: str, tensors: Mapping[str, Any]
) -> Answer:
    """Send one request and read its stream to the end."""

    async def requests() -> AsyncIterator[dict[str, Any]]:
        yield {
            "model_name": model,
            "inputs": [_input(name, value) for name, value in tensors.items()],
            "enable_empty_final_response": True,
        }

    answer = Answer(sent_s=time.perf_counter())
    async for result, error in client.stream_infer(requests()):
        if error is not None:
            answer.error = str(error)
            break
        answer.response_s.append(time.perf_counter())
        for output in result.get_response().outputs:
            answer.tensors[output.name] = result.as_numpy(output.name)
        text = result.as_numpy("text_output")
        if text is not None:
            answer.text += text.reshape(-1)[0].decode()
    return answer


def _input(name: str, value: Any) -> triton.InferInput:
    array = _array(name, value)
    tensor = triton.InferInput(name, list(array.shape), np_to_triton_dtype(array.dtype))
    tensor.set_data_from_numpy(array)
    return tensor


def _array(name: str, value: Any) -> np.ndarray:
    values = value if isinstance(value, list) else [value]
    if isinstance(values[0], str):
        return np.array([[text.encode() for text in values]], dtype=object)
    if isinstance(values[0], bool):
        return np.array([values], dtype=bool)
    return np.array([values], dtype=DTYPES.get(name, np.float32))
