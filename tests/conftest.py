"""What the tests share: requests, schedulers, cores around a tiny model, and the demo engines."""

from __future__ import annotations

import copy
import functools
import itertools
import multiprocessing
import sysconfig
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from endpoint import endpoint  # noqa: F401 - a fixture
from hypothesis import settings
from paged_lm import PagedLM
from typer.testing import CliRunner

from specserve.assemble import assemble
from specserve.block_manager import BlockManager
from specserve.cli import app
from specserve.config import DEMO_PAIR, Config, PolicyConfig, SchedulerConfig
from specserve.core import SpecServe
from specserve.engines import DraftEngine, EngineInfo, TargetEngine
from specserve.engines.guarded import GuardedDraftEngine
from specserve.engines.model_draft import ModelDraftEngine
from specserve.engines.model_target import ModelTargetEngine
from specserve.policies import POLICIES, Policy, make_policy, needs_profile
from specserve.predictor.profile import DraftSample, Profile, VerifySample
from specserve.predictor.step_time import StepTimeModel
from specserve.request import Request
from specserve.sampling_params import SamplingParams
from specserve.scheduler import Scheduler

settings.register_profile("quick", deadline=None, derandomize=True, database=None)
settings.load_profile("quick")

MAX_SEQ_LEN = 512
STEP_LIMIT = 5000
NO_QUEUE_LIMIT = {"max_waiting_requests": 10**6, "max_waiting_tokens": 10**9}

# (draft, the target's own token at each draft position and one more, output tokens)
ACCEPTANCE_TABLE = [
    pytest.param([], [7], [7], id="no draft: one token"),
    pytest.param([1], [1, 2], [1, 2], id="accepted: and a bonus token"),
    pytest.param([1], [9, 2], [9], id="rejected: the recovered token only"),
    pytest.param([1, 2, 3], [1, 2, 3, 4], [1, 2, 3, 4], id="all accepted"),
    pytest.param([1, 2, 3], [9, 2, 3, 4], [9], id="first rejected: later matches do not count"),
    pytest.param([1, 2, 3], [1, 9, 3, 4], [1, 9], id="middle rejected"),
    pytest.param([1, 2, 3], [1, 2, 9, 4], [1, 2, 9], id="last rejected: no bonus token"),
    pytest.param([5, 5, 5], [5, 5, 5, 5], [5, 5, 5, 5], id="repeated token"),
    pytest.param([0], [0, 0], [0, 0], id="token id 0"),
]


class FakeClock:
    """Seconds that pass only when told, or a fixed time with every look."""

    def __init__(self, tick_s: float = 0.0) -> None:
        self.now = 0.0
        self.tick_s = tick_s

    def __call__(self) -> float:
        """Look at the clock."""
        self.now += self.tick_s
        return self.now

    def advance(self, seconds: float) -> None:
        """Let time pass."""
        self.now += seconds


def make_request(prompt: Sequence[int] = (1, 2, 3), max_tokens: int = 8, **values: Any) -> Request:
    """Make a request; sampling parameters and fields of `Request` go by name."""
    fields = {name: values.pop(name) for name in list(values) if name in Request.__slots__}
    sampling = fields.pop("sampling", None) or SamplingParams(**values)
    return Request(list(prompt), max_tokens, sampling, **fields)


def make_scheduler(
    policy: PolicyConfig | str = "none", *, num_blocks: int = 64, block_size: int = 4, **limits: int
) -> Scheduler:
    """Make a scheduler of its own; `limits` are fields of `SchedulerConfig`."""
    config = SchedulerConfig(**{"max_seq_len": MAX_SEQ_LEN, **NO_QUEUE_LIMIT, **limits})
    return Scheduler(config, BlockManager(num_blocks, block_size), new_policy(policy))


def make_core(
    policy: PolicyConfig | str = "none",
    *,
    target: PagedLM | None = None,
    draft: PagedLM | None = None,
    target_engine: TargetEngine | None = None,
    draft_engine: DraftEngine | None = None,
    policy_object: Policy | None = None,
    clock: Callable[[], float] | None = None,
    draft_retry_s: float = 0.0,
    num_blocks: int = 64,
    block_size: int = 4,
    **limits: int,
) -> SpecServe:
    """Assemble a core around a tiny target and, unless told otherwise, a draft that half agrees.

    Without a clock of the caller's, a target pass takes 10 ms and a draft pass 0.4 ms.
    """
    scheduler = SchedulerConfig(**{**NO_QUEUE_LIMIT, **limits})
    config = Config(policy=policy_of(policy), scheduler=scheduler)
    config = replace(config, server=replace(config.server, draft_retry_s=draft_retry_s))
    target = target or PagedLM(num_blocks, block_size)
    draft = draft or PagedLM(num_blocks, block_size, vocab_size=target.vocab_size, noise=1.5)
    served = target_engine.model if isinstance(target_engine, ModelTargetEngine) else target
    if clock is None:
        clock = virtual = FakeClock(0.00001)
        target.spend = functools.partial(virtual.advance, 0.010)
        draft.spend = functools.partial(virtual.advance, 0.0004)
    return assemble(
        config,
        info=EngineInfo(served.vocab_size, MAX_SEQ_LEN, num_blocks, block_size),
        draft_engine=draft_engine or ModelDraftEngine(draft),
        target_engine=target_engine or ModelTargetEngine(target),
        policy=policy_object or new_policy(config.policy),
        clock=clock,
    )


def new_policy(policy: PolicyConfig | str) -> Policy:
    """Make a policy; one that weighs time against tokens gets the step times of `step_time`."""
    config = policy_of(policy)
    return make_policy(config, step_time() if needs_profile(config.name) else None)


def step_time(
    num_free_tokens: int = 32, token_s: float = 0.001, change_s: float = 0.0
) -> StepTimeModel:
    """Return a predictor of its own.

    A verification takes 10 ms up to `num_free_tokens`, then `token_s` more for each token, and
    `change_s` after one of another number of tokens.
    """
    return copy.deepcopy(_step_time(num_free_tokens, token_s, change_s))


@functools.cache
def _step_time(num_free_tokens: int, token_s: float, change_s: float) -> StepTimeModel:
    verify = [
        VerifySample(n, n, context, 0.010 + token_s * max(0, n - num_free_tokens))
        for n in sorted({1, 2, 4, 8, 16, 32, 33, 40, 48, 64, 128, num_free_tokens})
        for context in (64, 512)
    ]
    draft = [
        DraftSample(rows, k, rows, 64 * rows, 0.0003 + k * (0.0004 + 0.00001 * rows))
        for rows in (1, 4, 16, 32)
        for k in (1, 4, 8)
    ]
    return StepTimeModel(Profile({}, tuple(verify), tuple(draft), change_s=change_s))


def policy_of(policy: PolicyConfig | str) -> PolicyConfig:
    """Make a configuration of a policy's name."""
    return PolicyConfig(name=policy) if isinstance(policy, str) else policy


def all_policies() -> list[Any]:
    """Return a parameter for every policy there is, the fixed one at each length from 1 to 8."""
    configs = [PolicyConfig(name=name) for name in POLICIES if name != "fixed"]
    configs += [PolicyConfig(name="fixed", num_draft_tokens=k) for k in range(1, 9)]
    return [
        pytest.param(c, id=f"{c.name}-{c.num_draft_tokens}" if c.name == "fixed" else c.name)
        for c in configs
    ]


def drive(
    core: SpecServe,
    requests: Iterable[Request],
    *,
    arrivals: Sequence[int] = (),
    aborts: Mapping[int, Sequence[Request]] | None = None,
) -> list[list[int]]:
    """Step until every request has finished; return the output of each.

    After each step, integrity is checked and everything that no request claims to be valid is
    erased from the models' caches, so that nothing can live on what was rejected or given back.

    Args:
        arrivals: the step before which each request arrives; 0 for those not named.
        aborts: step -> requests that are aborted before it.
    """
    requests = list(requests)
    order = list(itertools.zip_longest(arrivals, requests, fillvalue=0))
    for step in itertools.count():
        for arrival, request in order:
            if arrival == step:
                core.scheduler.submit(request)
        for request in (aborts or {}).get(step, ()):
            core.scheduler.abort(request.key)
        core.scheduler.check_integrity()
        if core.scheduler.has_work:
            core.step()
            core.scheduler.check_integrity()
            check_draft_engine(core)
            scrub(core)
        elif step >= max(arrivals, default=0):
            break
        assert step < STEP_LIMIT, "the requests never finish"
    assert core.scheduler.blocks.num_used_blocks == 0, "a finished request holds blocks"
    return [request.token_ids[request.num_prompt_tokens :] for request in requests]


def drive_fast(core: SpecServe, requests: Sequence[Request]) -> list[list[int]]:
    """Step until every request has finished, checking nothing on the way; return the outputs."""
    for request in requests:
        core.scheduler.submit(request)
    while core.scheduler.has_work:
        core.step()
    return [request.token_ids[request.num_prompt_tokens :] for request in requests]


def check_draft_engine(core: SpecServe) -> None:
    """Assert that the draft failed only where it meant to: the guard hides every other failure."""
    guard = core.draft_engine
    model = getattr(getattr(guard, "inner", None), "model", None)
    if isinstance(guard, GuardedDraftEngine) and isinstance(model, PagedLM):
        assert guard.num_failures == model.num_failures, "the draft engine failed: see the log"


def scrub(core: SpecServe) -> None:
    """Erase from both models' caches what no request claims to be valid."""
    requests = core.scheduler.requests
    held = {block_id for request in requests for block_id in request.block_table}
    free = set(range(core.scheduler.blocks.num_blocks)) - held
    for engine, counter in (
        (core.target_engine, "num_computed_tokens"),
        (getattr(core.draft_engine, "inner", None), "num_draft_computed_tokens"),
    ):
        model = getattr(engine, "model", None)
        if isinstance(model, PagedLM):
            model.scrub(free)
            for request in requests:
                model.scrub(request.block_table, getattr(request, counter))


@pytest.fixture(scope="session")
def demo_engines() -> Path:
    """Return the folder of the demo pair's OpenVINO engines."""
    if not (DEMO_PAIR / "target" / "manifest.json").is_file():
        pytest.skip("the demo engines are not built: python -m build_engines")
    return DEMO_PAIR


@pytest.fixture(scope="session")
def held_out_texts() -> list[str]:
    """Return texts that the demo pair was not trained on: this Python's own tests."""
    folder = Path(sysconfig.get_paths()["stdlib"]) / "test"
    return list(itertools.islice(_texts(folder), 24)) or pytest.skip(f"{folder} holds no tests")


def _texts(folder: Path) -> Iterator[str]:
    for path in sorted(folder.glob("test_*.py")):
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:  # a few are in other encodings on purpose
            continue
        if len(text) > 4000:
            yield text[1000:2000]


@pytest.fixture(scope="session")
def simulated_cells(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the result lines of a small grid: one trace, 3 policies, 2 loads, 2 SLO scales."""
    path = tmp_path_factory.mktemp("grid") / "cells.jsonl"
    arguments = (
        f"bench --output {path} --mode simulated --trace poisson --load 0.3 --load 0.8 "
        "--slo-scale 0.8 --slo-scale 1.2 --policy none --policy specserve --policy fixed_4 "
        "--window-s 4 --warm-up-s 1 --length-scale 0.25 --flood-requests 24 --low-requests 8 "
        "--set scheduler.max_num_seqs=16"
    )
    result = CliRunner().invoke(app, arguments.split())
    assert result.exit_code == 0, result.output
    return path


@pytest.fixture(scope="session")
def simulated_report(simulated_cells: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a report on them."""
    folder = tmp_path_factory.mktemp("report")
    arguments = ["report", str(simulated_cells), "--output", str(folder)]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    return folder


@pytest.fixture(scope="session")
def triton_process() -> Iterator[Executor]:
    """Give a process in which Triton interprets, or not: it decides that when it is imported."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("triton")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "0" if torch.cuda.is_available() else "1")
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            yield pool
