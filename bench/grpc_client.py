"""KServe gRPC streaming, asynchronous: one stream per request, times of every response."""

import contextlib
import time
from collections.abc import AsyncIterator, Mapping
from typing import Any

import grpc
import numpy as np
import tritonclient.grpc.aio as triton
from numpy.typing import NDArray
from tritonclient.utils import InferenceServerException, np_to_triton_dtype

from bench.answer import Answer

DTYPES: dict[str, Any] = {
    "max_tokens": np.int32,
    "min_tokens": np.int32,
    "end_id": np.int32,
    "top_k": np.int32,
    "seed": np.uint64,
    "input_ids": np.int32,
    "max_draft_tokens": np.int32,
    "num_draft_tokens": np.int32,
}


class GrpcClient:
    """One channel to one model of a server. See `bench.load_generator.Client`."""

    def __init__(self, client: triton.InferenceServerClient, model: str) -> None:
        self._client = client
        self._model = model

    @classmethod
    @contextlib.asynccontextmanager
    async def connect(cls, address: str, model: str) -> "AsyncIterator[GrpcClient]":
        """Open a channel for the time of the context."""
        async with triton.InferenceServerClient(address) as client:
            yield cls(client, model)

    async def send(self, tensors: Mapping[str, Any]) -> Answer:
        """Stream one request to its end."""
        return await stream(self._client, self._model, tensors)


async def stream(
    client: triton.InferenceServerClient,
    model: str,
    tensors: Mapping[str, Any],
    request_id: str = "",
) -> Answer:
    """Send one request and read its stream to the end."""

    async def requests() -> AsyncIterator[dict[str, Any]]:
        yield {
            "model_name": model,
            "request_id": request_id,
            "inputs": [_input(name, value) for name, value in tensors.items()],
            "enable_empty_final_response": True,
        }

    answer = Answer(sent_s=time.perf_counter())
    async for result, error in _responses(client, requests()):
        if error is not None:
            answer.error = str(error)
            continue  # to the end: a stream that is left early is cancelled
        outputs = [output.name for output in result.get_response().outputs]
        if outputs:
            answer.response_s.append(time.perf_counter())
        for name in outputs:
            array = result.as_numpy(name)
            answer.tensors[name] = array.item() if array.size == 1 else array
        answer.text += answer.tensors.pop("text_output", b"").decode()
    return answer


async def _responses(
    client: triton.InferenceServerClient, requests: AsyncIterator[dict[str, Any]]
) -> AsyncIterator[tuple[Any, Any]]:
    """Yield responses and errors, that of a broken connection too."""
    try:
        async for result, error in client.stream_infer(requests):
            yield result, error
    except (InferenceServerException, grpc.RpcError) as error:
        yield None, error


def _input(name: str, value: Any) -> triton.InferInput:
    array = _array(name, value)
    tensor = triton.InferInput(name, list(array.shape), np_to_triton_dtype(array.dtype))
    tensor.set_data_from_numpy(array)
    return tensor


def _array(name: str, value: Any) -> NDArray[Any]:
    values = value if isinstance(value, list) else [value]
    if isinstance(values[0], str):
        return np.array([[text.encode() for text in values]], dtype=object)
    if isinstance(values[0], bool):
        return np.array([values], dtype=bool)
    return np.array([values], dtype=DTYPES.get(name, np.float32))
