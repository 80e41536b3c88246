"""Whatever a client may send by the OpenAPI schema, or against it: no answer is a server's fault.

Quick by default; SPECSERVE_FUZZ_EXAMPLES=20000 tries so many bodies of each kind.
"""

from __future__ import annotations

import os
from typing import Any

import pytest
import schemathesis
from endpoint import MODEL, Endpoint
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode, checks
from server_client import wait_until_idle

from specserve.launch.installation import find_installation

pytestmark = [
    pytest.mark.triton,
    pytest.mark.openvino,
    pytest.mark.skipif(find_installation() is None, reason="nvidia-pytriton is not installed"),
]

NUM_EXAMPLES = int(os.environ.get("SPECSERVE_FUZZ_EXAMPLES", "60"))
FEW_TOKENS = 3
CHECKS = [
    checks.not_a_server_error,
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_schema_conformance,
]
OPERATIONS = [
    ("POST", "/v1/completions", GenerationMode.POSITIVE),
    ("POST", "/v1/completions", GenerationMode.NEGATIVE),
    ("POST", "/v1/chat/completions", GenerationMode.POSITIVE),
    ("POST", "/v1/chat/completions", GenerationMode.NEGATIVE),
    ("GET", "/v1/models/{model_id}", GenerationMode.POSITIVE),
]


@pytest.fixture(scope="module")
def api(endpoint: Endpoint) -> Any:
    return schemathesis.openapi.from_url(f"{endpoint.url}/openapi.json")


def bounded(body: Any) -> Any:
    """Aim what may be valid at our model, and keep it short: length is not what is tried."""
    if not isinstance(body, dict):
        return body
    if isinstance(body.get("model"), str):
        body["model"] = MODEL
    for name in ("max_tokens", "max_completion_tokens", "n"):
        if isinstance(body.get(name), int):
            body[name] = min(FEW_TOKENS, body[name])
    if body.get("max_completion_tokens") is None and body.get("max_tokens") is None:
        body["max_tokens"] = FEW_TOKENS
    return body


@pytest.mark.timeout(0)
@pytest.mark.parametrize(("method", "path", "mode"), OPERATIONS, ids=str)
def test_every_answer_is_one_that_the_schema_knows(
    endpoint: Endpoint, api: Any, method: str, path: str, mode: GenerationMode
) -> None:
    statuses = set()

    @settings(max_examples=NUM_EXAMPLES, suppress_health_check=list(HealthCheck))
    @given(case=api[path][method].as_strategy(generation_mode=mode))
    def ask(case: Any) -> None:
        case.body = bounded(case.body)
        response = case.call(timeout=60.0)
        case.validate_response(response, checks=CHECKS)
        statuses.add(response.status_code)

    ask()
    assert statuses <= {200, 400, 404, 405, 429}
    assert 200 in statuses or mode is GenerationMode.NEGATIVE or method == "GET"


def test_nothing_is_left_of_it(endpoint: Endpoint) -> None:
    wait_until_idle(endpoint.server)
    assert endpoint.server.process.poll() is None
    assert endpoint.process.poll() is None
