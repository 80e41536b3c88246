"""Tensors, JSON, protobuf and HTTP that make no sense: refused, and nothing is left of them.

A short mode of `python -m bench.fuzz`; OpenAI's schema has `test_openai_fuzz.py`.
"""

from __future__ import annotations

from collections.abc import Iterator

import grpc
import pytest
from endpoint import Endpoint
from server_client import generate, wait_until_idle

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
