"""What happens to requests when a process behind them dies, stands still, or talks nonsense.

Real processes of a real server. The engines of the draft and target models can be told to misbehave
by a file, for what no signal can cause.
"""

from __future__ import annotations

import os
import resource
import shutil
import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest
from server_client import (
    TIMEOUT_S,
    Reference,
    events,
    generate,
    grpc_one,
    grpc_status,
    http_post,
    text_of,
    wait_until,
    wait_until_idle,
)

from bench.served import REPOSITORY, Served, serving
from specserve.launch.installation import find_installation

pytestmark = [
    pytest.mark.triton,
    pytest.mark.openvino,
    pytest.mark.skipif(find_installation() is None, reason="nvidia-pytriton is not installed"),
]

Streams = list[Future[list[dict[str, Any]]]]

PROMPT = "import os\nimport sys\n\ndef main(argv):\n    "
NUM_STREAMS = 4
MAX_TOKENS = 240
SPECULATE = {"num_draft_tokens": 3, "return_perf_metrics": True}

# The shipped class, told by a file what to do in its next call.
MISBEHAVING = """
import pathlib, time
from python_backend.engine_model import {base} as _Base

FAULT = pathlib.Path({fault!r})

class TritonPythonModel(_Base):
    def run(self, arrays):
        fault = FAULT.read_text() if FAULT.exists() else ""
        if fault:
            FAULT.unlink()
        if fault == "hang":
            time.sleep(3600)
        if fault == "nan":
            forward = self._engine.model.forward
            self._engine.model.forward = lambda *args: forward(*args) * float("nan")
        return super().run(arrays)
"""

POISON = """

class TritonPythonModel(TritonPythonModel):
    def initialize(self, args):
        super().initialize(args)
        verify = self._engine.verify

        def picky(batch, chosen):
            assert all(row.sampling.seed != 666 for row in batch.rows), "a row at fault"
            return verify(batch, chosen)

        self._engine.verify = picky
"""


class Faults:
    """A server, and the ways to break it."""

    def __init__(self, served: Served, folder: Path, text: str) -> None:
        self.served = served
        self.text = text
        self._folder = folder
        self._num_returns: Counter[str] = Counter()

    def signal(self, model: str, number: signal.Signals) -> int:
        """Send a signal to a model's process and return its id."""
        pid = self.served.process.model_pids()[model]
        os.kill(pid, number)
        return pid

    def tell(self, model: str, fault: str) -> int:
        """Have a model misbehave at its next call."""
        pid = self.served.process.model_pids()[model]  # first: the fault may end it at once
        (self._folder / model).write_text(fault)
        return pid

    def starve(self, model: str) -> int:
        """Leave a model's process no more memory than it has, and give it a long prompt."""
        pid = self.served.process.model_pids()[model]
        used = int(Path(f"/proc/{pid}/statm").read_text().split()[0]) * resource.getpagesize()
        resource.prlimit(pid, resource.RLIMIT_AS, (used, used))
        tensors = {"text_input": "x = 1\n" * 900, "max_tokens": 8, "num_draft_tokens": 3}
        assert grpc_one(self.served, "ensemble", **tensors).error is None
        return pid

    def stream(self, on_the_way: threading.Event | None = None) -> list[dict[str, Any]]:
        """Generate a long text with speculation; return the events of its stream."""
        body = {"text_input": PROMPT, "max_tokens": MAX_TOKENS, "stream": True, "end_id": -1}
        found = []
        with http_post(self.served, "ensemble", "generate_stream", body | SPECULATE) as response:
            for event in events(response):
                found.append(event)
                if on_the_way is not None and len(found) == 3:
                    on_the_way.set()
        return found

    def works(self) -> bool:
        """Whether a text is what it should be, with accepted drafts in it."""
        found = self.stream()
        accepted = found[-1].get("total_accepted_draft_tokens", 0)
        return text_of(found) == self.text and accepted > MAX_TOKENS / 3

    def metric(self, name: str) -> float:
        """Read one of our metrics."""
        return self.served.metrics()[f"specserve_{name}"]

    def wait_until_back(self, model: str, old_pid: int) -> None:
        """Wait until the log says that a model is back, in another process."""
        back = f"model '{model}' is back"
        self._num_returns[model] += 1
        wait_until(lambda: self._lines_with(back) == self._num_returns[model], back)
        assert self.served.process.model_pids()[model] != old_pid

    def _lines_with(self, words: str) -> int:
        return sum(words in line for line in self.served.process.log.lines())


@pytest.fixture(scope="module")
def faults(demo_engines: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Faults]:
    folder = tmp_path_factory.mktemp("faults")
    repository = shutil.copytree(REPOSITORY, folder / "models")
    for model, base in (("draft", "DraftModel"), ("target", "TargetModel")):
        code = MISBEHAVING.format(base=base, fault=str(folder / model))
        code += POISON if model == "target" else ""
        (repository / model / "1" / "model.py").write_text(code)
    overrides = [f"engine.dir={demo_engines}", "server.draft_retry_s=0.1"]
    overrides += ["server.draft_timeout_s=1.5", "server.target_timeout_s=3"]
    reference = Reference(demo_engines)
    text = reference.texts([PROMPT], MAX_TOKENS, end_id=None)[0]
    with serving(overrides, repository=repository) as served:
        yield Faults(served, folder, text)


@pytest.fixture
def streams(faults: Faults) -> Iterator[Streams]:
    """Long texts on their way."""
    on_the_way = [threading.Event() for _ in range(NUM_STREAMS)]
    with ThreadPoolExecutor(NUM_STREAMS) as pool:
        futures = [pool.submit(faults.stream, event) for event in on_the_way]
        assert all(event.wait(TIMEOUT_S) for event in on_the_way)
        yield futures
    wait_until_idle(faults.served)


# -- the draft model ---------------------------------------------------------------------------

DRAFT_FAULTS: dict[str, Callable[[Faults], int]] = {
    "killed": lambda faults: faults.signal("draft", signal.SIGKILL),
    "stopped": lambda faults: faults.signal("draft", signal.SIGSTOP),
    "hanging": lambda faults: faults.tell("draft", "hang"),
    "out of memory": lambda faults: faults.starve("draft"),
    "not a number": lambda faults: faults.tell("draft", "nan"),
}


@pytest.mark.parametrize("fault", DRAFT_FAULTS.values(), ids=DRAFT_FAULTS)
def test_draft_fault_costs_no_request_a_token_and_speculation_returns(
    faults: Faults, streams: Streams, fault: Callable[[Faults], int]
) -> None:
    failures = faults.metric("draft_failures_total")
    pid = fault(faults)
    assert [text_of(future.result()) for future in streams] == [faults.text] * NUM_STREAMS
    faults.wait_until_back("draft", pid)
    wait_until(faults.works, "speculation is back")
    assert faults.metric("draft_failures_total") == failures + 1


def test_draft_killed_while_nobody_asks_is_back_before_somebody_does(faults: Faults) -> None:
    failures = faults.metric("draft_failures_total")
    pid = faults.signal("draft", signal.SIGKILL)
    faults.wait_until_back("draft", pid)
    wait_until(faults.works, "speculation is back")
    assert faults.metric("draft_failures_total") == failures


# -- the target model --------------------------------------------------------------------------

TARGET_FAULTS: dict[str, Callable[[Faults], int]] = {
    "killed": lambda faults: faults.signal("target", signal.SIGKILL),
    "stopped": lambda faults: faults.signal("target", signal.SIGSTOP),
    "hanging": lambda faults: faults.tell("target", "hang"),
}


@pytest.mark.parametrize("fault", TARGET_FAULTS.values(), ids=TARGET_FAULTS)
def test_target_fault_fails_requests_in_flight_and_the_server_recovers(
    faults: Faults, streams: Streams, fault: Callable[[Faults], int]
) -> None:
    pid = fault(faults)
    for future in streams:
        *texts, last = future.result()
        assert "the target model is being loaded again: try again in" in last["error"]
        assert faults.text.startswith(text_of(texts)), "a wrong token went out"
    faults.wait_until_back("target", pid)
    wait_until(faults.works, "the server serves again")


def test_target_that_is_not_there_is_unavailable(faults: Faults) -> None:
    pid = faults.signal("target", signal.SIGKILL)
    tensors = {"text_input": "x", "max_tokens": 2}
    assert grpc_status(faults.served, "specserve", tensors) is grpc.StatusCode.UNAVAILABLE
    faults.wait_until_back("target", pid)
    wait_until(faults.works, "the server serves again")


def test_row_at_fault_fails_alone(faults: Faults, streams: Streams) -> None:
    tensors: dict[str, Any] = {"text_input": PROMPT, "max_tokens": 5, "temperature": 1.0}
    status, answer = generate(faults.served, "specserve", **tensors, seed=666)
    assert (status, answer["error"]) == (400, "a step failed on this request")
    assert [text_of(future.result()) for future in streams] == [faults.text] * NUM_STREAMS
    assert generate(faults.served, "specserve", **tensors, seed=665)[0] == 200


def test_target_that_returns_nan_fails_requests_and_recovers(faults: Faults) -> None:
    pid = faults.tell("target", "nan")
    (event,) = faults.stream()
    assert event["error"].endswith("a step failed: try again")
    wait_until(faults.works, "the server serves again")
    faults.wait_until_back("target", pid)
