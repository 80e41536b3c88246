"""Tensors, JSON, protobuf and HTTP that make no sense: refused, and nothing is left of them.

A short mode of `python -m bench.fuzz`; OpenAI's schema has `test_openai_fuzz.py`.
"""

from __future__ import annotations

from collections.abc import Iterator

import grpc
import pytest
from endpoint import Endpoint
from server_client import MODELS, generate, wait_until_idle
from tritonclient.grpc import service_pb2, service_pb2_grpc

from bench.fuzz_targets import Target, ways
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
