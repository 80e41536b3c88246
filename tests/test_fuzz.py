"""Tensors, JSON, protobuf and HTTP that make no sense: refused, and nothing is left of them.

A short mode of `python -m bench.fuzz`; OpenAI's schema has `test_openai_fuzz.py`.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import math
from collections.abc import Iterator

import grpc
import pytest
from endpoint import Endpoint
from server_client import MODELS, generate, wait_until_idle
from tritonclient.grpc import service_pb2, service_pb2_grpc

from bench.fuzz_targets import INTERNAL, Target, ways
from specserve.launch.installation import find_installation

pytestmark = [
    pytest.mark.triton,
    pytest.mark.openvino,
    pytest.mark.skipif(find_installation() is None, reason="nvidia-pytriton is not installed"),
]

NUM_INPUTS = 60
KINDS = ["tensors", "json", "openai json", "protobuf", "connections"]


@pytest.fixture(scope="module")
def target(endpoint: Endpoint) -> Iterator[Target]:
    with grpc.insecure_channel(f"127.0.0.1:{endpoint.server.grpc_port}") as channel:
        yield Target(endpoint.server.http_port, endpoint.port, channel)


@pytest.mark.parametrize("index", range(len(KINDS)), ids=KINDS)
def test_bad_input_is_refused_and_tells_nothing_internal(target: Target, index: int) -> None:
    before = len(target.findings.examples)
    ways(target)[index](NUM_INPUTS)
    assert target.findings.examples[before:] == []


@pytest.mark.parametrize("model", [*MODELS, "preprocessing", "watcher", "draft", "target"])
def test_a_shape_without_content_does_not_end_a_process(endpoint: Endpoint, model: str) -> None:
    """[0, 2^62] has no bytes, as it should: server 2.51's stub died of it, and all with it."""
    before = endpoint.server.process.model_pids()
    with grpc.insecure_channel(f"127.0.0.1:{endpoint.server.grpc_port}") as channel:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        ports = stub.ModelMetadata(service_pb2.ModelMetadataRequest(name=model)).inputs
        for port in ports:
            for place in range(len(port.shape)):
                shape = [2**62 if at == place else 0 for at in range(len(port.shape))]
                request = service_pb2.ModelInferRequest(model_name=model)
                request.inputs.add(name=port.name, datatype=port.datatype, shape=shape)
                request.raw_input_contents.append(b"")
                (answer,) = stub.ModelStreamInfer(iter([request]), timeout=60.0)
                assert answer.error_message, (port.name, shape)
    assert endpoint.server.process.model_pids() == before


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("body", [
    b'{"text_input": "x", "max_tokens": 2, "na\xffme": "x"}',
    b'{"text_input": "x", "max_tokens": 2, "id": "on\xffe"}',
])  # fmt: skip
def test_names_that_are_not_text_are_refused_in_words(
    endpoint: Endpoint, model: str, body: bytes
) -> None:
    """HTTP lets any bytes through, and the stub decodes them when a model asks for them."""
    for path in ("generate", "generate_stream"):
        status, text = _post(endpoint, f"/v2/models/{model}/{path}", body)
        assert "is not UTF-8: " in text, (status, text)
        assert not INTERNAL.search(text), text


@pytest.mark.parametrize("model", ["draft", "target"])
def test_models_of_the_inside_refuse_parameters_that_are_not_text(
    endpoint: Endpoint, model: str
) -> None:
    with grpc.insecure_channel(f"127.0.0.1:{endpoint.server.grpc_port}") as channel:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        ports = stub.ModelMetadata(service_pb2.ModelMetadataRequest(name=model)).inputs
    inputs = [
        {"name": one.name, "datatype": one.datatype, "shape": [max(1, n) for n in one.shape]}
        for one in ports
    ]
    for one in inputs:
        one["data"] = ["" if one["datatype"] == "BYTES" else 0] * math.prod(one["shape"])
    body = json.dumps({"parameters": {"@": 1}, "inputs": inputs}).encode()
    path = f"/v2/models/{model}/infer"
    status, text = _post(endpoint, path, body.replace(b"@", b"\xff"))
    assert (status, "call 'ensemble'" in text) == (400, True), text


def _post(endpoint: Endpoint, path: str, body: bytes) -> tuple[int, str]:
    connection = http.client.HTTPConnection("127.0.0.1", endpoint.server.http_port, timeout=60.0)
    with contextlib.closing(connection):
        connection.request("POST", path, body, {"Content-Type": "application/json"})
        response = connection.getresponse()
        return response.status, response.read().decode(errors="replace")


def test_every_way_in_was_tried_and_the_server_is_as_it_was(
    endpoint: Endpoint, target: Target
) -> None:
    tried = target.findings.answers
    assert {kind for kind, answers in tried.items() if answers.total() > 5} >= {
        "tensors", "json", "openai json", "protobuf", "http", "openai http"
    }  # fmt: skip
    assert any(answers.keys() & {"INVALID_ARG", "400"} for answers in tried.values())
    wait_until_idle(endpoint.server)
    assert endpoint.server.process.poll() is None
    assert endpoint.process.poll() is None
    assert generate(endpoint.server, "ensemble", text_input="x", max_tokens=2)[0] == 200
