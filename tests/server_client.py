"""Clients of a running server, tritonclient's gRPC and raw HTTP, and the plain decoding to compare.

NOTE: gRPC streams here are read to their end, but for `grpc_leaving`. Leaving one early cancels it,
and cancelling a stream of a decoupled model while it answers can abort server 2.51.
"""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import queue
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import tritonclient.grpc as triton
import tritonclient.grpc.aio as triton_aio
from numpy.typing import NDArray
from tritonclient.grpc import service_pb2, service_pb2_grpc
from tritonclient.utils import np_to_triton_dtype, serialize_byte_tensor

from bench.served import Served
from python_backend.tensors import INPUTS
from specserve.assemble import assemble
from specserve.config import load_config
from specserve.engines.paged_model import FlatBatch, Span
from specserve.request import Request
from specserve.sampling_params import SamplingParams
from specserve.text import load_tokenizer

Tensors = Mapping[str, Any]

MODELS = ("ensemble", "tensorrt_llm_bls", "specserve")
STREAMS = 16
TIMEOUT_S = 60.0
POLL_S = 0.05
NUMPY_DTYPES = {
    "STRING": object,
    "INT32": np.int32,
    "INT64": np.int64,
    "UINT64": np.uint64,
    "UINT8": np.uint8,
    "FP16": np.float16,
    "FP32": np.float32,
    "BOOL": np.bool_,
}
_DTYPES = {spec.name: NUMPY_DTYPES[spec.dtype] for spec in INPUTS} | {"input_ids": np.int32}


@dataclass(slots=True)
class Answer:
    """What one gRPC request got: the tensors of each response, and which carried the final flag."""

    responses: list[dict[str, NDArray[Any]]] = field(default_factory=list)
    finals: list[bool] = field(default_factory=list)
    error: str | None = None

    @property
    def texts(self) -> list[str]:
        """The text of each response; raises if a response is not UTF-8 by itself."""
        found = [r["text_output"] for r in self.responses if "text_output" in r]
        return [array.reshape(-1)[0].decode() for array in found]

    @property
    def text(self) -> str:
        """The whole text; the error, if there is one, so that a comparison shows it."""
        return "".join(self.texts) if self.error is None else f"error: {self.error}"

    def last(self, name: str) -> Any:
        """Return the single value of a tensor of the last response that has it."""
        found = [response[name] for response in self.responses if name in response]
        return found[-1].item()

    def all(self, name: str) -> list[Any]:
        """Return the values of a tensor in all responses, end to end."""
        found = [response[name] for response in self.responses if name in response]
        return [value for array in found for value in array.reshape(-1).tolist()]


# -- gRPC --------------------------------------------------------------------------------------


def as_array(name: str, value: Any) -> NDArray[Any]:
    """Make the tensor of a value or a list of them, shape [1, n]; an array stays as it is."""
    if isinstance(value, np.ndarray):
        return value
    values = value if isinstance(value, list) else [value]
    values = [v.encode() if isinstance(v, str) else v for v in values]
    return np.array([values], dtype=_DTYPES[name])


def grpc_many(
    server: Served, model: str, requests: Sequence[Tensors], concurrency: int = STREAMS
) -> list[Answer]:
    """Send requests over asynchronous streams of their own, so many at a time."""

    async def run() -> list[Answer]:
        slots = asyncio.Semaphore(concurrency)
        async with triton_aio.InferenceServerClient(_grpc_address(server)) as client:

            async def one(tensors: Tensors) -> Answer:
                async with slots:
                    return await _stream(client, model, tensors)

            return await asyncio.gather(*map(one, requests))

    return asyncio.run(run())


def grpc_one(server: Served, model: str, **tensors: Any) -> Answer:
    """Send one request over a stream of its own; `timeout_us` is Triton's, not a tensor."""
    return grpc_many(server, model, [tensors])[0]


async def _stream(client: triton_aio.InferenceServerClient, model: str, tensors: Tensors) -> Answer:
    tensors = dict(tensors)
    request = {
        "model_name": model,
        "timeout": tensors.pop("timeout_us", None),
        "inputs": _inputs(tensors),
        "enable_empty_final_response": True,
    }

    async def requests() -> AsyncIterator[dict[str, Any]]:
        yield request

    answer = Answer()
    async for result, error in client.stream_infer(requests(), stream_timeout=TIMEOUT_S):
        _take(answer, result, error)
    return answer


def grpc_one_stream(server: Served, model: str, requests: Sequence[Tensors]) -> list[Answer]:
    """Send all requests at once over a single stream of the synchronous client."""
    answers = [Answer() for _ in requests]
    events: queue.Queue[tuple[Any, Any]] = queue.Queue()
    with triton.InferenceServerClient(_grpc_address(server)) as client:
        client.start_stream(lambda result, error: events.put((result, error)))
        for i, tensors in enumerate(requests):
            client.async_stream_infer(
                model, _inputs(tensors), request_id=str(i), enable_empty_final_response=True
            )
        while not all(answer.finals and answer.finals[-1] for answer in answers):
            result, error = events.get(timeout=TIMEOUT_S)
            assert error is None, error
            _take(answers[int(result.get_response().id)], result, error)
        client.stop_stream()
    return answers


@contextlib.contextmanager
def grpc_leaving(server: Served, model: str, requests: Sequence[Tensors]) -> Iterator[None]:
    """Send requests that do not stream, all at once; leaving cancels them."""
    with triton.InferenceServerClient(_grpc_address(server)) as client:
        client.start_stream(lambda result, error: None)
        for tensors in requests:
            client.async_stream_infer(model, _inputs(tensors))
        try:
            yield
        finally:
            client.stop_stream(cancel_requests=True)


def grpc_raw(server: Served, model: str, tensors: Tensors) -> Answer:
    """Send one request through the generated stub, which shows the flags of errors too."""
    answer = Answer()
    with grpc.insecure_channel(_grpc_address(server)) as channel:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        request = raw_request(model, tensors)
        for message in stub.ModelStreamInfer(iter([request]), timeout=TIMEOUT_S):
            answer.error = message.error_message or answer.error
            parameters = message.infer_response.parameters
            answer.finals.append(parameters["triton_final_response"].bool_param)
    return answer


def grpc_status(server: Served, model: str, tensors: Tensors) -> grpc.StatusCode:
    """Send one request that asks for errors as a gRPC status; return the status."""
    metadata = (("triton_grpc_error", "true"),)
    with grpc.insecure_channel(_grpc_address(server)) as channel:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        requests = iter([raw_request(model, tensors)])
        call = stub.ModelStreamInfer(requests, metadata=metadata, timeout=TIMEOUT_S)
        with contextlib.suppress(grpc.RpcError):
            list(call)
        return call.code()


def _grpc_address(server: Served) -> str:
    return f"127.0.0.1:{server.grpc_port}"


def _inputs(tensors: Tensors) -> list[triton.InferInput]:
    inputs = []
    for name, value in tensors.items():
        array = as_array(name, value)
        inputs.append(triton.InferInput(name, list(array.shape), np_to_triton_dtype(array.dtype)))
        inputs[-1].set_data_from_numpy(array)
    return inputs


def raw_request(model: str, tensors: Tensors) -> service_pb2.ModelInferRequest:
    request = service_pb2.ModelInferRequest(model_name=model)
    request.parameters["triton_enable_empty_final_response"].bool_param = True
    for name, value in tensors.items():
        array = as_array(name, value)
        datatype = np_to_triton_dtype(array.dtype)
        request.inputs.add(name=name, datatype=datatype, shape=list(array.shape))
        data = serialize_byte_tensor(array).item() if datatype == "BYTES" else array.tobytes()
        request.raw_input_contents.append(data)
    return request


def _take(answer: Answer, result: Any, error: Any) -> None:
    if error is not None:
        answer.error = str(error)
        return
    response = result.get_response()
    answer.responses.append({o.name: result.as_numpy(o.name) for o in response.outputs})
    answer.finals.append(response.parameters["triton_final_response"].bool_param)


# -- HTTP --------------------------------------------------------------------------------------


def generate(server: Served, model: str, **body: Any) -> tuple[int, dict[str, Any]]:
    """POST to `generate`; return status and JSON."""
    with http_post(server, model, "generate", body) as response:
        return response.status, json.loads(response.read())


def generate_stream(server: Served, model: str, **body: Any) -> list[dict[str, Any]]:
    """POST to `generate_stream`; return every event."""
    with http_post(server, model, "generate_stream", body) as response:
        return list(events(response))


def http_many(server: Served, model: str, bodies: Sequence[Tensors]) -> list[str]:
    """Read so many `generate_stream` texts at a time."""

    def one(body: Tensors) -> str:
        return text_of(generate_stream(server, model, **body))

    with ThreadPoolExecutor(STREAMS) as pool:
        return list(pool.map(one, bodies))


def text_of(stream: Sequence[Mapping[str, Any]]) -> str:
    """Join the events of a stream; the error, if there is one, so that a comparison shows it."""
    return "".join(event.get("text_output", f"error: {event.get('error')}") for event in stream)


def events(response: http.client.HTTPResponse) -> Iterator[dict[str, Any]]:
    """Parse server-sent events as they come."""
    for line in response:
        if line.startswith(b"data: "):
            yield json.loads(line.removeprefix(b"data: "))


@contextlib.contextmanager
def http_post(
    server: Served, model: str, endpoint: str, body: Tensors
) -> Iterator[http.client.HTTPResponse]:
    """POST; leaving closes the connection, whatever is still to come."""
    connection = http.client.HTTPConnection("127.0.0.1", server.http_port, timeout=TIMEOUT_S)
    headers = {"Content-Type": "application/json"}
    connection.request("POST", f"/v2/models/{model}/{endpoint}", json.dumps(body), headers)
    response = connection.getresponse()
    try:
        yield response
    finally:
        response.close()
        connection.close()


# -- metrics -----------------------------------------------------------------------------------


def wait_until(is_true: Callable[[], bool], what: str, timeout_s: float = 20.0) -> None:
    """Poll until something is so.

    Raises:
        AssertionError: if it is not in time.
    """
    deadline = time.monotonic() + timeout_s
    while not is_true():
        assert time.monotonic() < deadline, f"not within {timeout_s:g} s: {what}"
        time.sleep(POLL_S)


def is_idle(metrics: Mapping[str, float]) -> bool:
    """Whether nothing runs, waits or holds a block."""
    names = ("requests_running", "requests_waiting", "kv_blocks_used")
    return not any(metrics[f"specserve_{name}"] for name in names)


def wait_until_idle(server: Served) -> None:
    """Wait until the server is idle, and still so after the next time it publishes metrics."""
    looks: list[bool] = []

    def stays_idle() -> bool:
        looks.append(is_idle(server.metrics()))
        return len(looks) > 8 and all(looks[-8:])

    wait_until(stays_idle, "no request runs or waits, no block is held")


# -- what is right -----------------------------------------------------------------------------


class Reference:
    """Plain decoding of the same target engine in f32, in this process."""

    def __init__(self, engine_dir: Path, *overrides: str) -> None:
        config = [
            f"engine.dir={engine_dir}", "policy.name=none", "scheduler.kv_cache_tokens=8192",
            f"scheduler.max_num_seqs={STREAMS}", *overrides,
        ]  # fmt: skip
        self._core = assemble(load_config(None, config))
        self.tokenizer = load_tokenizer(engine_dir / "target")

    def texts(self, prompts: Sequence[str], max_tokens: int, **sampling: Any) -> list[str]:
        """Return the text that follows each prompt."""
        outputs = [request_output(r) for r in self.run(prompts, max_tokens, **sampling)]
        return [self.tokenizer.decode(token_ids).rstrip("\ufffd") for token_ids in outputs]

    def run(self, prompts: Sequence[str], max_tokens: int, **sampling: Any) -> list[Request]:
        """Return the finished requests; the end token is the pair's own unless given."""
        params = SamplingParams(**{"end_id": 1, **sampling})
        requests = [Request(self.encode(prompt), max_tokens, params) for prompt in prompts]
        for request in requests:
            self._core.scheduler.submit(request)
        while self._core.scheduler.has_work:
            self._core.step()
        return requests

    def encode(self, text: str) -> list[int]:
        """Tokenize."""
        token_ids: list[int] = self.tokenizer.encode(text).ids
        return token_ids

    def text_probs(
        self, prompt: str, max_tokens: int, top_k: int, temperature: float
    ) -> dict[str, float]:
        """Return the exact distribution of texts, by walking the tree of all outputs."""
        outputs: dict[tuple[int, ...], float] = {(): 1.0}
        for _ in range(max_tokens):
            outputs = {
                (*head, token_id): p * q
                for head, p in outputs.items()
                for token_id, q in self.next_probs(
                    [*self.encode(prompt), *head], top_k, temperature
                )
            }
        texts = {self.tokenizer.decode(list(ids)).rstrip("\ufffd"): 0.0 for ids in outputs}
        for ids, p in outputs.items():
            texts[self.tokenizer.decode(list(ids)).rstrip("\ufffd")] += p
        return texts

    def next_probs(
        self, token_ids: list[int], k: int, temperature: float
    ) -> list[tuple[int, float]]:
        """Return the k most likely next tokens and their probabilities among themselves."""
        blocks = range(len(token_ids) // 32 + 1)
        flat = FlatBatch.pack([Span(token_ids, 0, blocks)])
        logits = self._core.target_engine.model.forward(flat, np.array([len(token_ids) - 1]))[0]
        best = np.argsort(logits)[-k:]
        weights = np.exp((logits[best].astype(np.float64) - logits.max()) / temperature)
        return list(zip(best.tolist(), (weights / weights.sum()).tolist(), strict=True))


def request_output(request: Request) -> list[int]:
    """Return a request's output tokens."""
    return request.token_ids[request.num_prompt_tokens :]


def cut_at(text: str, stop_words: Sequence[str]) -> str:
    """Return the text before the first stop word."""
    found = [at for word in stop_words if (at := text.find(word)) >= 0]
    return text[: min(found, default=len(text))]
