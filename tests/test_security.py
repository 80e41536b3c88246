"""Who may do what: the promises of SECURITY.md, on a real server, and what we depend on."""

from __future__ import annotations

import http.client
import json
import os
import re
import stat
import tomllib
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc as triton
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from server_client import (
    TIMEOUT_S,
    events,
    generate,
    generate_stream,
    grpc_one,
    grpc_raw,
    http_post,
    wait_until_idle,
)
from tritonclient.utils import InferenceServerException

from bench.record import ROOT
from bench.served import Served, serving
from specserve.launch.installation import find_installation
from specserve.launch.triton_options import ADMIN_HEADER, TritonOptions

INTERNAL = re.compile(
    r"Traceback|\.py\b|line \d+|(?<![\w/])/(?:\w+/)|specserve-[0-9a-f]{6}|/dev/shm|0x[0-9a-f]{6}"
    r"|python_backend|object at|Errno|[Ss]tub"
)
SECRET = "correct-horse-battery-staple"


@pytest.fixture(scope="module")
def server(demo_engines: Path) -> Iterator[Served]:
    if find_installation() is None:
        pytest.skip("nvidia-pytriton is not installed")
    with serving([f"engine.dir={demo_engines}"]) as served:
        yield served


def call(
    served: Served, method: str, path: str, body: Any = None, key: str = ""
) -> tuple[int, str]:
    """Call Triton's HTTP API; return status and body."""
    connection = http.client.HTTPConnection("127.0.0.1", served.http_port, timeout=TIMEOUT_S)
    headers = {ADMIN_HEADER: key} if key else {}
    try:
        connection.request(method, path, None if body is None else json.dumps(body), headers)
        response = connection.getresponse()
        return response.status, response.read().decode()
    finally:
        connection.close()


# -- what clients may not do -------------------------------------------------------------------

ADMIN_CALLS: list[tuple[str, str, Any]] = [
    ("POST", "/v2/repository/index", {}),
    ("POST", "/v2/repository/models/draft/load", {}),
    ("POST", "/v2/repository/models/draft/unload", {}),
    ("GET", "/v2/systemsharedmemory/status", None),
    ("POST", "/v2/systemsharedmemory/region/x/register", {"key": "/x", "byte_size": 1}),
    ("POST", "/v2/systemsharedmemory/unregister", {}),
    ("GET", "/v2/cudasharedmemory/status", None),
    ("GET", "/v2/trace/setting", None),
    ("POST", "/v2/trace/setting", {"trace_level": ["TENSORS"]}),
    ("POST", "/v2/models/ensemble/trace/setting", {"trace_level": ["TENSORS"]}),
    ("GET", "/v2/logging", None),
    ("POST", "/v2/logging", {"log_verbose_level": 9}),
]


@pytest.mark.triton
@pytest.mark.openvino
@pytest.mark.parametrize(("method", "path", "body"), ADMIN_CALLS, ids=lambda v: str(v)[:40])
@pytest.mark.parametrize("key", ["", "guess"])
def test_api_that_changes_the_server_is_closed(
    server: Served, method: str, path: str, body: Any, key: str
) -> None:
    status, text = call(server, method, path, body, key)
    assert status == 403
    assert not INTERNAL.search(text)


@pytest.mark.triton
@pytest.mark.openvino
def test_key_opens_what_it_guards_and_the_rest_needs_none(server: Served) -> None:
    key = server.process.options.admin_key
    assert len(key) > 30
    assert call(server, "POST", "/v2/repository/index", {}, key)[0] == 200
    assert call(server, "GET", "/v2/trace/setting", key=key)[0] == 200
    for path in ("/v2", "/v2/health/ready", "/v2/models/ensemble", "/v2/models/ensemble/config"):
        assert call(server, "GET", path)[0] == 200


@pytest.mark.triton
@pytest.mark.openvino
def test_grpc_is_closed_in_the_same_places(server: Served) -> None:
    with triton.InferenceServerClient(f"127.0.0.1:{server.grpc_port}") as client:
        for ask in (
            client.get_model_repository_index,
            client.get_system_shared_memory_status,
            client.get_trace_settings,
            client.get_log_settings,
        ):
            with pytest.raises(InferenceServerException, match="restricted"):
                ask()
            assert ask(headers={f"triton-grpc-protocol-{ADMIN_HEADER}": admin_key(server)})


def admin_key(served: Served) -> str:
    return served.process.options.admin_key


def test_open_apis_are_a_choice() -> None:
    def restrictions(options: TritonOptions) -> list[str]:
        installation = find_installation()
        if installation is None:
            pytest.skip("nvidia-pytriton is not installed")
        command = options.command(installation, Path("/run"), "prefix-")
        return [argument for argument in command if "restricted" in argument]

    assert restrictions(TritonOptions(Path("/models"), admin_key="")) == []
    first, second = (restrictions(TritonOptions(Path("/models"))) for _ in range(2))
    assert len(first) == 2
    assert first != second, "every server has a key of its own"
    assert "key" not in repr(TritonOptions(Path("/models"))), "a key must not get into logs"


@pytest.mark.triton
@pytest.mark.openvino
@pytest.mark.parametrize("parameters", [{}, {"internal_key": "guess"}, {"internal_key": 7}])
@pytest.mark.parametrize("model", ["draft", "target"])
def test_models_behind_the_orchestrator_serve_no_clients(
    server: Served, model: str, parameters: dict[str, Any]
) -> None:
    """They believe every block number: a client could read and spoil other requests' caches."""
    inputs = json.loads(call(server, "GET", f"/v2/models/{model}/config")[1])["input"]
    tensors = []
    for spec in inputs:
        if not spec["optional"]:
            shape = [max(1, int(size)) for size in spec["dims"]]
            data = [0] * int(np.prod(shape))
            tensors.append(
                {"name": spec["name"], "shape": shape, "datatype": "INT32", "data": data}
            )
    body = {"inputs": tensors, "parameters": parameters}
    status, text = call(server, "POST", f"/v2/models/{model}/infer", body)
    assert (status, json.loads(text)["error"]) == (
        400,
        "this model serves other models only: call 'ensemble'",
    )


@pytest.mark.triton
@pytest.mark.openvino
def test_keeper_loads_nothing_for_clients(server: Served) -> None:
    pids = server.process.model_pids()
    tensor = {"name": "model", "shape": [1], "datatype": "BYTES", "data": ["target"]}
    status, text = call(server, "POST", "/v2/models/keeper/infer", {"inputs": [tensor]})
    assert (status, "other models only" in text) == (400, True)
    assert server.process.model_pids() == pids


# -- who may listen and read -------------------------------------------------------------------


@pytest.mark.triton
@pytest.mark.openvino
def test_every_socket_listens_on_loopback(server: Served) -> None:
    inodes = {
        os.readlink(entry)
        for pid in server.process.pids()
        for entry in Path(f"/proc/{pid}/fd").iterdir()
        if entry.is_symlink()
    }
    listening = [
        fields[1].partition(":")[0]
        for name in ("tcp", "tcp6")
        for line in Path("/proc/net", name).read_text().splitlines()[1:]
        if (fields := line.split())[3] == "0A" and f"socket:[{fields[9]}]" in inodes
    ]
    assert len(listening) >= 3
    assert set(listening) <= {"0100007F", f"{'0' * 16}FFFF00000100007F"}, "not 127.0.0.1"


@pytest.mark.triton
@pytest.mark.openvino
def test_shared_memory_and_keys_are_for_this_user_only(server: Served) -> None:
    regions = server.process.shared_memory()
    assert regions
    for region in regions:
        assert stat.S_IMODE(region.stat().st_mode) & 0o077 == 0, region
    for pid in server.process.pids():
        assert stat.S_IMODE(Path(f"/proc/{pid}/environ").stat().st_mode) & 0o077 == 0


# -- what is written down and told -------------------------------------------------------------


def provoke(served: Served) -> list[str]:
    """Send what may go right and wrong, the secret in all of it; return what clients are told."""
    text = f"password = '{SECRET}' # "
    requests: list[dict[str, Any]] = [
        {},
        {"stop_words": [SECRET], "bad_words": [SECRET], "return_log_probs": True},
        {"embedding_bias_words": [SECRET], "embedding_bias_weights": [1.0]},
        {"priority_class": SECRET, "exclude_input_in_output": False},
        {"temperature": -1.0},
        {"max_tokens": 10**6},
        {"stop_words": [SECRET * 100]},
        {"draft_source": SECRET},
        {"text_input": text * 20_000},
        {"bogus_tensor": SECRET},
        {"embedding_bias_words": [SECRET] * 65, "embedding_bias_weights": [1.0] * 65},
        {"guided_decoding_guide": SECRET},
        {"timeout": 1},
        {"timeout": SECRET},
    ]
    told = []
    for tensors in requests:
        body = {"text_input": text, "max_tokens": 8, **tensors}
        for model in ("ensemble", "specserve"):
            told.append(generate(served, model, **body)[1].get("error", ""))
            told += [e.get("error", "") for e in generate_stream(served, model, **body)]
    wrong = np.array([[b"\xff" + SECRET.encode()]], object)
    told.append(grpc_raw(served, "ensemble", {"text_input": wrong, "max_tokens": 1}).error or "")
    long = {"text_input": text, "max_tokens": 2000, "end_id": -1, "stream": True}
    with http_post(served, "ensemble", "generate_stream", long) as response:
        next(events(response))
    wait_until_idle(served)
    return [message for message in told if message]


@pytest.mark.triton
@pytest.mark.openvino
def test_prompts_are_not_in_the_log_and_errors_tell_nothing_internal(server: Served) -> None:
    told = provoke(server)
    assert len(told) > 20
    assert not [message for message in told if INTERNAL.search(message)]
    log = "\n".join(server.process.log.lines())
    assert "drafts accepted" in log, "the log of the requests is elsewhere"
    for part in (SECRET, SECRET[:7], "password"):
        assert part not in log


@pytest.mark.triton
@pytest.mark.openvino
def test_request_id_cannot_forge_a_line_of_the_log(server: Served) -> None:
    name = "mine\n2026-11-24 00:00:00,000 specserve ERROR forged\x1b[2J" + "x" * 500
    assert generate(server, "specserve", text_input="x", max_tokens=1, id=name)[0] == 200
    wait_until_idle(server)
    lines = server.process.log.lines()
    assert not [line for line in lines if line.startswith("2026-11-24 00:00:00,000")]
    assert not [line for line in lines if "\x1b" in line or "x" * 100 in line]


@pytest.mark.triton
@pytest.mark.openvino
def test_body_of_many_megabytes_is_refused_and_forgotten(server: Served) -> None:
    for model in ("ensemble", "specserve"):
        status, answer = generate(server, model, text_input="x" * 2**24, max_tokens=1)
        assert (status, "limit is 262144" in answer["error"]) == (400, True)
    many = {f"parameter_{i}": i for i in range(20_000)}
    status, answer = generate(server, "specserve", text_input="x", max_tokens=1, **many)
    assert (status, "limit is 64" in answer["error"]) == (400, True)
    assert grpc_one(server, "ensemble", text_input="x", max_tokens=2).error is None


# -- what we depend on -------------------------------------------------------------------------


def pins() -> dict[str, str]:
    """Return the version of every package in constraints.txt."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    wanted = [Requirement(line) for line in lines if line.strip() and not line.startswith("#")]
    found = {}
    for requirement in wanted:
        (specifier,) = requirement.specifier
        assert specifier.operator == "==", f"{requirement} is not pinned"
        found[canonicalize_name(requirement.name)] = specifier.version
    return found


def declared() -> list[Requirement]:
    """Return what pyproject.toml asks for."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    groups = [project["dependencies"], *project["optional-dependencies"].values()]
    found = [Requirement(text) for group in groups for text in group]
    return [requirement for requirement in found if requirement.name != "specserve"]


def test_every_dependency_is_pinned_to_one_version() -> None:
    pinned = pins()
    for requirement in declared():
        assert [s.operator for s in requirement.specifier] == ["=="], requirement
        version = pinned.get(canonicalize_name(requirement.name), "")
        assert version.partition("+")[0] in requirement.specifier, requirement


def test_what_is_pulled_in_is_pinned_too() -> None:
    todo, seen = declared(), set()
    while todo:
        requirement = todo.pop()
        name = canonicalize_name(requirement.name)
        if (name, frozenset(requirement.extras)) in seen:
            continue
        seen.add((name, frozenset(requirement.extras)))
        try:
            pulled_in = metadata.requires(name) or []
        except metadata.PackageNotFoundError:
            continue  # asked for by optimum, which is installed without what it asks for
        for text in pulled_in:
            one = Requirement(text)
            environments = [{"extra": extra} for extra in (*requirement.extras, "")]
            if one.marker is None or any(one.marker.evaluate(e) for e in environments):
                todo.append(one)
    installed = {canonicalize_name(d.metadata["Name"]) for d in metadata.distributions()}
    missing = {name for name, _ in seen} & installed - pins().keys() - {"setuptools"}
    assert not missing, f"add to constraints.txt: {sorted(missing)}"


def test_no_pinned_version_has_a_known_vulnerability() -> None:
    advisories = tomllib.loads((ROOT / ".ci" / "advisories.toml").read_text())["advisory"]
    pinned = pins()
    for advisory in advisories:
        version = pinned.get(canonicalize_name(advisory["package"]))
        affected = SpecifierSet(advisory["affected"], prereleases=True)
        if version is not None and version in affected:
            assert advisory.get("accepted"), f"{advisory['package']} {version}: {advisory}"
