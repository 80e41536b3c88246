"""What stands between a step and engines that fail: deadlines, checks, and rows tried alone."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest
from conftest import FakeClock, drive, make_core, make_request
from hypothesis import given
from hypothesis import strategies as st
from paged_lm import PagedLM, plain_decode

from specserve.batch import Batch, Draft, Row, Verified
from specserve.config import PolicyConfig
from specserve.deadline import Deadline
from specserve.engines import EngineLost, isolated
from specserve.engines.guarded import GuardedDraftEngine
from specserve.engines.model_target import ModelTargetEngine
from specserve.request import FinishReason

VOCAB_SIZE = 64
FIXED = PolicyConfig(name="fixed", num_draft_tokens=3)


# -- deadlines ---------------------------------------------------------------------------------


def test_call_in_time_gives_its_result_or_its_error() -> None:
    divide = Deadline(lambda a, b: a / b, 10.0)
    assert divide(6, b=3) == 2
    with pytest.raises(ZeroDivisionError):
        divide(1, 0)
    assert divide(8, 2) == 4
    divide.close()


def test_late_call_is_given_up_and_the_next_one_is_not_held_up_by_it() -> None:
    release = threading.Event()
    waits = Deadline(lambda is_late: release.wait(30.0) if is_late else "in time", 0.2)
    started_s = time.monotonic()
    with pytest.raises(TimeoutError, match=r"no answer in 0\.2 s"):
        waits(True)
    assert time.monotonic() - started_s < 20.0
    assert waits(False) == "in time", "it got the answer to another call"
    release.set()
    waits.close()


def test_threads_of_late_calls_end_with_them() -> None:
    before, release = set(threading.enumerate()), threading.Event()
    waits = Deadline(release.wait, 0.01)
    for _ in range(5):
        with pytest.raises(TimeoutError):
            waits()
    late = set(threading.enumerate()) - before
    assert len(late) == 5
    release.set()
    for thread in late:
        thread.join(10.0)
        assert not thread.is_alive()


# -- the draft side ----------------------------------------------------------------------------


class Says:
    """A draft engine that says what it is told."""

    def __init__(self, draft: Draft) -> None:
        self.said = draft

    def draft(self, batch: Batch) -> list[Draft]:
        """Say it for every row."""
        return [self.said for _ in batch.rows]

    def release(self, keys: Sequence[int]) -> None:
        """Keep nothing."""


@dataclass
class Keeps:
    """A keeper that notes why it was called."""

    is_up: bool = True
    num_reloads: int = 0
    reasons: list[str] = field(default_factory=list)

    def give_up(self, reason: str) -> None:
        """Note it."""
        self.reasons.append(reason)


def one_row() -> Batch:
    """Return a batch of one row that may draft three tokens."""
    row = Row(key=1, num_computed_tokens=0, token_ids=[1], samples=True, block_table=[0])
    row.max_draft_tokens = 3
    return Batch([row])


NONSENSE = {
    "NaN": Draft([1], [math.nan]),
    "infinite": Draft([1], [math.inf]),
    "negative": Draft([1], [-0.1]),
    "more than sure": Draft([1], [1.5]),
    "no such token": Draft([VOCAB_SIZE], [0.5]),
    "negative token": Draft([-1], [0.5]),
    "too many": Draft([1] * 4, [0.5] * 4),
    "confidences missing": Draft([1, 2], [0.5]),
}


@pytest.mark.parametrize("nonsense", NONSENSE.values(), ids=NONSENSE)
def test_nonsense_is_no_draft_and_the_engine_is_replaced(nonsense: Draft) -> None:
    keeper = Keeps()
    guard = GuardedDraftEngine(Says(nonsense), VOCAB_SIZE, 5.0, FakeClock(), keeper)
    assert guard.draft(one_row()) == [Draft()]
    assert (guard.num_failures, len(keeper.reasons)) == (1, 1)
    assert not guard.is_available


def test_sense_passes() -> None:
    said = Draft([0, VOCAB_SIZE - 1, 3], [0.0, 1.0, 0.5])
    guard = GuardedDraftEngine(Says(said), VOCAB_SIZE, 5.0, FakeClock(), Keeps())
    assert guard.draft(one_row()) == [said]
    assert not guard.take_lost_kv()


def test_engine_that_is_being_replaced_is_not_asked() -> None:
    keeper = Keeps(is_up=False)
    guard = GuardedDraftEngine(Says(Draft([1], [0.5])), VOCAB_SIZE, 0.0, FakeClock(), keeper)
    assert guard.draft(one_row()) == [Draft()]
    assert guard.num_failures == 0
    keeper.is_up, keeper.num_reloads = True, 1
    assert guard.draft(one_row()) == [Draft([1], [0.5])]
    assert (guard.take_lost_kv(), guard.take_lost_kv()) == (True, False)
    assert guard.num_reloads == 1


def test_replaced_draft_engine_catches_up_with_what_it_lost() -> None:
    """Guards against drafts on an empty cache: nothing is lost by them but every acceptance."""
    target, draft, keeper = PagedLM(), PagedLM(), Keeps()
    core = make_core(FIXED, target=target, draft=draft)
    core.draft_engine._keeper = keeper
    request = make_request([1, 2, 3], 60)
    core.scheduler.submit(request)
    for _ in range(5):
        core.step()
    draft.scrub(range(64))  # a slot that is read before it is written fails the draft
    keeper.num_reloads += 1
    while core.scheduler.has_work:
        core.step()
    assert core.draft_engine.num_failures == 0
    assert request.num_accepted_tokens == request.num_verified_tokens > 40
    assert request.token_ids[3:] == plain_decode(target, [1, 2, 3], 60, request.sampling)


# -- the target side ---------------------------------------------------------------------------


class Picky:
    """A target engine that cannot stand some rows, or is not there."""

    def __init__(self, bad_keys: set[int], error: Exception) -> None:
        self.bad_keys = bad_keys
        self.error = error
        self.num_calls = 0

    def verify(self, batch: Batch, chosen: Sequence[Sequence[int]]) -> list[Verified]:
        """Return the key of each row as its token."""
        self.num_calls += 1
        if self.bad_keys & {row.key for row in batch.rows}:
            raise self.error
        return [Verified([*draft, row.key]) for row, draft in zip(batch.rows, chosen, strict=True)]

    def release(self, keys: Sequence[int]) -> None:
        """Keep nothing."""


def batch_of(size: int) -> Batch:
    """Return rows with keys from 0."""
    values = {"num_computed_tokens": 0, "token_ids": [1], "samples": True, "block_table": [0]}
    return Batch([Row(key=key, **values) for key in range(size)])


@given(size=st.integers(1, 40), bad_keys=st.sets(st.integers(0, 39)))
def test_exactly_the_rows_at_fault_fail(size: int, bad_keys: set[int]) -> None:
    bad_keys &= set(range(size))
    engine = Picky(bad_keys, ValueError("no"))
    chosen = [[100 + key] for key in range(size)]
    if len(bad_keys) == size:
        with pytest.raises(ValueError, match="no"):
            isolated.verify(engine, batch_of(size), chosen)
        return
    outputs = isolated.verify(engine, batch_of(size), chosen)
    for key, output in enumerate(outputs):
        assert output.failed == (key in bad_keys)
        assert output.output_token_ids == ([] if output.failed else [100 + key, key])
    assert engine.num_calls <= 1 + 2 * len(bad_keys) * math.ceil(math.log2(size + 1))


def test_lost_engine_is_asked_once() -> None:
    engine = Picky({3}, EngineLost("gone"))
    with pytest.raises(EngineLost):
        isolated.verify(engine, batch_of(8), [[] for _ in range(8)])
    assert engine.num_calls == 1


class NanLM(PagedLM):
    """Not a number wherever a context begins with token 7."""

    def forward(self, batch, logit_rows):  # type: ignore[no-untyped-def]
        """Run, and spoil those rows."""
        logits = super().forward(batch, logit_rows)
        for i, begin in enumerate(batch.begins[:-1]):
            first_block = batch.block_ids[batch.block_begins[i]]
            if self._token_ids[first_block, 0] == 7:
                rows = (logit_rows >= begin) & (logit_rows < batch.begins[i + 1])
                logits[rows] = math.nan
        return logits


@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.8, "seed": 3}], ids=str)
def test_request_whose_logits_are_nan_ends_and_those_beside_it_do_not(
    sampling: dict[str, float],
) -> None:
    core = make_core(FIXED, target=NanLM())
    requests = [make_request([i, 5, 2], 20, **sampling) for i in (6, 7, 8, 9)]
    outputs = drive(core, requests)
    reasons = [request.finish_reason for request in requests]
    assert reasons == [FinishReason.LENGTH, FinishReason.ERROR] + [FinishReason.LENGTH] * 2
    for request, output in zip(requests, outputs, strict=True):
        if request.finish_reason is FinishReason.LENGTH:
            prompt = request.prompt_token_ids
            assert output == plain_decode(PagedLM(), prompt, 20, request.sampling)


def test_engine_refuses_logits_that_are_not_finite() -> None:
    engine = ModelTargetEngine(NanLM())
    row = Row(key=1, num_computed_tokens=0, token_ids=[7], samples=True, block_table=[0])
    with pytest.raises(ValueError, match="not finite"):
        engine.verify(Batch([row]), [[]])
