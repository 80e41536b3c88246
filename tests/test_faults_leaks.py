"""Nothing stays behind: blocks, shared memory, threads, descriptors and memory, after clients that
come, change their minds and go. SPECSERVE_LONG=1 sends 10,000 of them.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from server_client import (
    MODELS,
    STREAMS,
    Reference,
    events,
    generate,
    generate_stream,
    http_post,
    text_of,
    wait_until,
    wait_until_idle,
)

from bench.holdings import holdings, shared_bytes
from bench.served import Served, serving
from specserve.launch.installation import find_installation

IS_LONG = os.environ.get("SPECSERVE_LONG") == "1"
NUM_WARM_UP = 150
NUM_REQUESTS = 10_000 if IS_LONG else 300
MAX_GROWTH_MIB = 24
# OpenVINO keeps a kernel for each shape it has seen, so that its processes grow for a while.
ENGINES = ("draft", "target")

pytestmark = [
    pytest.mark.triton,
    pytest.mark.openvino,
    pytest.mark.skipif(find_installation() is None, reason="nvidia-pytriton is not installed"),
    pytest.mark.timeout(3600 if IS_LONG else 300),
]

PROMPT = "import os\nimport sys\n\ndef main(argv):\n    "
BAD: list[dict[str, Any]] = [
    {"temperature": -1.0}, {"max_tokens": 0}, {"beam_width": 2}, {"text_input": ""},
    {"text_input": "x" * 300_000}, {"max_tokens": 10**6}, {"temprature": 0.5},
]  # fmt: skip


class ServerHoldings(NamedTuple):
    """What the processes of a server hold on to, together; memory of each."""

    num_threads: int
    num_descriptors: int
    shared_bytes: int
    memory_mib: dict[str, float]


def held_by(served: Served) -> ServerHoldings:
    """Count what the server and its models hold."""
    pids = served.process.model_pids()
    pids["tritonserver"] = min(served.process.pids())
    found = {name: holdings(pid) for name, pid in pids.items()}
    return ServerHoldings(
        num_threads=sum(one.num_threads for one in found.values()),
        num_descriptors=sum(one.num_descriptors for one in found.values()),
        shared_bytes=shared_bytes(served.process.server_id),
        memory_mib={name: one.memory_mib for name, one in found.items()},
    )


@pytest.fixture(scope="module")
def server(demo_engines: Path) -> Iterator[Served]:
    overrides = ["scheduler.kv_cache_tokens=8192", "scheduler.max_waiting_requests=12"]
    with serving([f"engine.dir={demo_engines}", *overrides]) as served:
        yield served


class Crowd:
    """Clients of every kind, each chosen by chance."""

    def __init__(self, served: Served, seed: int) -> None:
        self._served = served
        self._random = random.Random(seed)

    def visit(self, count: int) -> None:
        """Send so many requests, `STREAMS` at a time; fail if one of them fares as none should."""
        with ThreadPoolExecutor(STREAMS) as pool:
            for _ in pool.map(self._one, [self._random.random() for _ in range(count)]):
                pass

    def _one(self, chance: float) -> None:
        rng = random.Random(chance)
        model = rng.choice(MODELS)
        body: dict[str, Any] = {"text_input": PROMPT, "max_tokens": rng.randint(1, 60)}
        body |= rng.choice([{}, {"temperature": 0.8}, {"num_draft_tokens": 3}, {"end_id": -1}])
        kind = rng.choice(["whole", "stream", "leaves", "leaves", "stops", "bad", "impatient"])
        if kind == "whole":
            expect(generate(self._served, model, **body), 200)
        elif kind == "stream":
            assert generate_stream(self._served, model, **body, stream=True)
        elif kind == "leaves":
            self._leave(model, body, rng.randint(0, 5))
        elif kind == "stops":
            self._stop(model, body, f"request {chance}")
        elif kind == "bad":
            status, _ = generate(self._served, model, **{**body, **rng.choice(BAD)})
            assert status == 400
        else:
            body |= {"max_tokens": 2000, "end_id": -1, "timeout": rng.randint(1, 50_000)}
            status, answer = generate(self._served, model, **body)
            assert status == 400
            assert "its timeout of" in answer["error"] or "queue is full" in answer["error"]

    def _leave(self, model: str, body: dict[str, Any], num_events: int) -> None:
        """Open a long stream and close the connection after a few events."""
        body |= {"max_tokens": 2000, "end_id": -1, "stream": True}
        with http_post(self._served, model, "generate_stream", body) as response:
            for _ in zip(range(num_events), events(response), strict=False):
                pass

    def _stop(self, model: str, body: dict[str, Any], name: str) -> None:
        """Stop a long stream by its name."""
        body |= {"max_tokens": 2000, "end_id": -1, "stream": True, "id": name}
        with http_post(self._served, model, "generate_stream", body) as response:
            found = events(response)
            next(found)
            generate(self._served, "specserve", stop=True, id=name)
            for _ in found:
                pass


def expect(answer: tuple[int, dict[str, Any]], status: int) -> None:
    """Assert a status, unless the queue was full."""
    assert answer[0] == status or "the queue is full" in answer[1].get("error", ""), answer


def test_crowd_leaves_nothing_behind(server: Served, demo_engines: Path) -> None:
    crowd = Crowd(server, seed=7)
    crowd.visit(NUM_WARM_UP)
    wait_until_idle(server)
    before = held_by(server)
    crowd.visit(NUM_REQUESTS)
    wait_until_idle(server)
    after = held_by(server)
    # gRPC and HTTP threads come and go with connections; nothing may go with requests.
    wait_until(lambda: held_by(server).num_descriptors <= before.num_descriptors + 8, "closed")
    assert after.num_threads <= before.num_threads + 8
    assert after.shared_bytes == before.shared_bytes
    for name, memory_mib in after.memory_mib.items():
        if name not in ENGINES:
            assert memory_mib < before.memory_mib[name] + MAX_GROWTH_MIB, name
    metrics = server.metrics()
    assert metrics["specserve_kv_blocks_used"] == 0
    assert metrics["specserve_draft_failures_total"] == 0
    stream = generate_stream(server, "ensemble", text_input=PROMPT, max_tokens=40, stream=True)
    assert text_of(stream) == Reference(demo_engines).texts([PROMPT], 40)[0]
