"""Steps that cross a process border arrive as they left, parameters travelling once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
from conftest import drive, make_core, make_request
from hypothesis import given
from hypothesis import strategies as st
from paged_lm import PagedLM, plain_decode

from specserve.batch import Batch, Draft, Row, Verified
from specserve.config import PolicyConfig
from specserve.engines import wire
from specserve.engines.model_draft import ModelDraftEngine
from specserve.engines.model_target import ModelTargetEngine
from specserve.engines.triton import TritonDraftEngine, TritonTargetEngine
from specserve.request import FinishReason
from specserve.sampling_params import MAX_SEED, SamplingParams
from specserve.stop_rules import RULES, StopRule, SurvivalRule, decode_rule, encode_rule

ids = st.lists(st.integers(0, 2**31 - 1), max_size=6)
some_ids = st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=6)
f32 = st.floats(width=32, allow_nan=False)
unit = st.floats(0.0, 1.0, width=32)

samplings = st.builds(
    SamplingParams,
    logit_bias=st.lists(
        st.tuples(st.integers(0, 9999), st.floats(-50, 50) | st.just(-math.inf)), max_size=3
    ).map(tuple),
    min_tokens=st.integers(0, 99),
    bad_words=st.lists(some_ids.map(tuple), max_size=3).map(tuple),
    repetition_penalty=st.floats(0.1, 9.0),
    presence_penalty=st.floats(-9.0, 9.0),
    frequency_penalty=st.floats(-9.0, 9.0),
    temperature=st.floats(0.0, 9.0),
    min_p=st.floats(0.0, 1.0),
    top_k=st.integers(0, 99),
    top_p=st.floats(0.1, 1.0),
    seed=st.integers(0, MAX_SEED),
    end_id=st.none() | st.integers(0, 9999),
    return_log_probs=st.booleans(),
)
target_rows = st.builds(
    Row,
    key=st.just(0),
    num_computed_tokens=st.integers(0, 9999),
    token_ids=some_ids,
    samples=st.booleans(),
    block_table=some_ids,
    num_prompt_tokens=st.integers(1, 9999),
    sampling=samplings,
)
draft_rows = st.builds(
    Row,
    key=st.just(0),
    num_computed_tokens=st.just(0),
    token_ids=st.just([]),
    samples=st.just(True),
    block_table=some_ids,
    max_draft_tokens=st.integers(1, 99),
    num_draft_computed_tokens=st.integers(0, 9999),
    catch_up_token_ids=some_ids,
    num_prompt_tokens=st.integers(1, 9999),
)
draft_samplings = st.builds(
    SamplingParams,
    temperature=unit.filter(bool),
    min_p=unit,
    top_k=st.integers(2, 2**24),
    top_p=unit.filter(bool),
    seed=st.integers(0, MAX_SEED),
)
sampled_draft_rows = st.builds(
    lambda row, sampling: replace(row, sampling=sampling, is_draft_sampled=True),
    draft_rows,
    draft_samplings,
)


def with_keys(rows: Sequence[Row]) -> list[Row]:
    for key, row in enumerate(rows, start=10):
        row.key = key
    return list(rows)


# -- round trips -------------------------------------------------------------------------------


@given(rows=st.lists(target_rows, min_size=1, max_size=4).map(with_keys), data=st.data())
def test_verification_arrives_as_it_left(rows: list[Row], data: st.DataObject) -> None:
    chosen = [data.draw(ids) if row.samples else [] for row in rows]
    released = data.draw(ids)
    new_keys = {row.key for row in rows}
    arrays = wire.encode_verify_request(Batch(rows), chosen, new_keys, released)
    assert wire.VerifyDecoder()(arrays) == (Batch(rows), chosen, released)


@given(
    rows=st.lists(draft_rows | sampled_draft_rows, min_size=1, max_size=4).map(with_keys),
    data=st.data(),
)
def test_draft_request_arrives_as_it_left(rows: list[Row], data: st.DataObject) -> None:
    rule = data.draw(st.none() | survival_rules(len(rows)))
    batch = wire.decode_draft_request(wire.encode_draft_request(rows, rule))
    assert batch.rows == rows
    assert_same_rule(batch.stop_rule, rule)


def survival_rules(num_rows: int) -> st.SearchStrategy[SurvivalRule]:
    def numbers(count: int) -> st.SearchStrategy[Any]:
        return st.lists(unit, min_size=count, max_size=count).map(np.array)

    return st.builds(SurvivalRule, bias_slope=numbers(2), min_survival=numbers(num_rows))


def assert_same_rule(rule: StopRule | None, expected: StopRule | None) -> None:
    assert type(rule) is type(expected)
    if rule is not None and expected is not None:
        for mine, theirs in zip(rule.encode(), expected.encode(), strict=True):
            np.testing.assert_allclose(mine, theirs, rtol=1e-6)


def test_every_kind_of_stop_rule_arrives_as_it_left() -> None:
    """Parts may have any length, also none."""
    for kind, cls in RULES.items():
        parts = [np.arange(n) + 0.5 for n, _ in enumerate(fields(cls))]
        rule = cls(*parts)
        assert rule.kind == kind
        assert_same_rule(decode_rule(encode_rule(rule)), rule)


@given(lengths=st.lists(st.integers(0, 5), min_size=1, max_size=5), data=st.data())
def test_drafts_arrive_as_they_left(lengths: list[int], data: st.DataObject) -> None:
    drafts = [
        Draft(
            data.draw(st.lists(st.integers(0, 9999), min_size=n, max_size=n)),
            data.draw(st.lists(unit, min_size=n, max_size=n)),
        )
        for n in lengths
    ]
    assert wire.decode_drafts(wire.encode_drafts(drafts)) == drafts


@given(lengths=st.lists(st.integers(0, 5), min_size=1, max_size=5), data=st.data())
def test_results_arrive_as_they_left(lengths: list[int], data: st.DataObject) -> None:
    outputs = []
    for n in lengths:
        log_probs = data.draw(st.just([]) | st.lists(f32, min_size=n, max_size=n))
        outputs.append(Verified(data.draw(ids.filter(len) if n else st.just([])), log_probs))
    outputs.insert(len(outputs) // 2, Verified(failed=True))
    assert wire.decode_verified(wire.encode_verified(outputs)) == outputs


@pytest.mark.parametrize("count", [None, 0, 7])
def test_what_the_target_counted_arrives_as_it_left(count: int | None) -> None:
    assert wire.decode_count(wire.encode_verified([Verified()], count)) == count


# -- what the decoder remembers ----------------------------------------------------------------


def make_row(key: int, **values: Any) -> Row:
    fields = {"num_computed_tokens": 0, "token_ids": [1], "samples": True, "block_table": [0]}
    return Row(key=key, **{**fields, **values})


def test_parameters_travel_once() -> None:
    decode, params = wire.VerifyDecoder(), SamplingParams(temperature=0.5, seed=7)
    row = make_row(5, sampling=params, num_prompt_tokens=3)
    first = wire.encode_verify_request(Batch([row]), [[]], {5}, [])
    later = wire.encode_verify_request(Batch([row]), [[2]], set(), [])
    assert "new_requests" not in later
    decode(first)
    batch, chosen, released = decode(later)
    assert batch.rows[0].sampling == params
    assert batch.rows[0].num_prompt_tokens == 3
    assert (chosen, released) == ([[2]], [])


def test_a_row_of_an_unknown_request_is_an_error_that_says_why() -> None:
    arrays = wire.encode_verify_request(Batch([make_row(5)]), [[]], set(), [])
    with pytest.raises(ValueError, match="request 5 is unknown here: the engine was restarted"):
        wire.VerifyDecoder()(arrays)


def test_a_released_request_is_forgotten() -> None:
    decode = wire.VerifyDecoder()
    decode(wire.encode_verify_request(Batch([make_row(5)]), [[]], {5}, []))
    decode(wire.encode_verify_request(Batch([make_row(6)]), [[]], {6}, [5]))
    with pytest.raises(ValueError, match="request 5 is unknown"):
        decode(wire.encode_verify_request(Batch([make_row(5)]), [[]], set(), []))


def test_a_preempted_request_may_return_in_the_call_that_releases_it() -> None:
    decode = wire.VerifyDecoder()
    row = make_row(5, sampling=SamplingParams(temperature=0.5))
    decode(wire.encode_verify_request(Batch([row]), [[]], {5}, []))
    batch, _, released = decode(wire.encode_verify_request(Batch([row]), [[]], {5}, [5]))
    assert released == [5]
    assert batch.rows[0].sampling.temperature == 0.5
    decode(wire.encode_verify_request(Batch([row]), [[]], set(), []))


# -- a whole core behind the wire --------------------------------------------------------------


class Loopback:
    """Both engine models as Triton would host them, in this process: arrays in, arrays out."""

    def __init__(self, target: PagedLM, draft: PagedLM) -> None:
        self.target = ModelTargetEngine(target)
        self.draft = ModelDraftEngine(draft)
        self.decode = wire.VerifyDecoder()
        self.fails = False
        self.num_calls = {"draft": 0, "target": 0}
        self.drafts_released: list[int] = []

    def __call__(self, model: str, arrays: wire.Arrays) -> wire.Arrays:
        """Serve one call."""
        self.num_calls[model] += 1
        for name, array in arrays.items():
            assert array.dtype in (np.int32, np.float32, np.uint64, object), name
        if self.fails:
            raise RuntimeError("the model is gone")
        if model == "draft":
            self.drafts_released += wire.decode_released(arrays)
            outputs = wire.encode_drafts(self.draft.draft(wire.decode_draft_request(arrays)))
        else:
            batch, chosen, released = self.decode(arrays)
            self.target.release(released)
            outputs = wire.encode_verified(self.target.verify(batch, chosen))
        return {**outputs, "engine_s": np.array([0.25], dtype=np.float32)}


def make_wired_core(policy: PolicyConfig | str, num_blocks: int) -> tuple[Any, Loopback]:
    infer = Loopback(PagedLM(num_blocks), PagedLM(num_blocks, noise=1.5))
    core = make_core(
        policy,
        target_engine=TritonTargetEngine(infer),
        draft_engine=TritonDraftEngine(infer),
        num_blocks=num_blocks,
        prefill_chunk_tokens=5,
    )
    return core, infer


@pytest.mark.parametrize(
    "policy", ["specserve", "adaptive", PolicyConfig(name="fixed", num_draft_tokens=3)]
)
def test_output_behind_the_wire_is_plain_decoding_with_preemption_too(policy: Any) -> None:
    core, infer = make_wired_core(policy, num_blocks=12)
    values: list[dict[str, Any]] = [
        {},
        {"temperature": 0.9, "seed": MAX_SEED, "top_p": 0.9},
        {"repetition_penalty": 1.4, "bad_words": ((3,), (5, 6)), "logit_bias": ((2, 1.5),)},
        {"max_draft_tokens": 0},
        {"num_draft_tokens": 2, "temperature": 0.4, "frequency_penalty": 0.5},
    ]
    requests = [make_request([i, 5, 9, 2, 4, 4, 1], 30, **v) for i, v in enumerate(values)]
    outputs = drive(core, requests)
    assert core.scheduler.num_preemptions > 0
    assert core.stats.num_accepted_tokens > 0
    assert infer.num_calls["target"] == core.stats.num_steps, "more than one call in a step"
    assert core.draft_engine.num_failures == 0
    for request, output in zip(requests, outputs, strict=True):
        prompt = request.prompt_token_ids
        assert output == plain_decode(infer.target.model, prompt, 30, request.sampling)


def test_the_model_forgets_finished_requests() -> None:
    core, infer = make_wired_core("adaptive", num_blocks=64)
    drive(core, [make_request([i, 2], 8, temperature=0.8) for i in range(4)])
    drive(core, [make_request([1, 2], 2)])
    assert len(infer.decode._known) == 1
    assert infer.target._histories == {}


def test_parameters_are_sent_again_after_a_call_that_never_arrived() -> None:
    core, infer = make_wired_core("none", num_blocks=64)
    request = make_request([1, 2], 9, temperature=0.8, seed=4)
    core.scheduler.submit(request)
    infer.fails = True
    with pytest.raises(RuntimeError, match="the model is gone"):
        core.step()
    infer.fails = False
    while core.scheduler.has_work:
        core.step()
    expected = plain_decode(infer.target.model, [1, 2], 9, request.sampling)
    assert request.token_ids[2:] == expected


def test_target_that_lost_its_kv_never_goes_on_with_the_requests_it_had() -> None:
    """Guards against a restarted target model: it knows nothing of the requests in flight."""
    core, infer = make_wired_core("none", num_blocks=64)
    old, new = make_request([1, 2], 9), make_request([3, 4], 9)
    core.scheduler.submit(old)
    core.step()
    infer.target, infer.decode = ModelTargetEngine(PagedLM(64)), wire.VerifyDecoder()
    core.scheduler.submit(new)
    while core.scheduler.has_work:
        core.step()
    assert (old.finish_reason, old.num_output_tokens) == (FinishReason.ERROR, 1)
    assert new.token_ids[2:] == plain_decode(infer.target.model, [3, 4], 9, new.sampling)


def test_engine_time_is_what_the_models_say() -> None:
    core, infer = make_wired_core(PolicyConfig(name="fixed", num_draft_tokens=2), num_blocks=64)
    drive(core, [make_request([1, 2], 9)])
    assert core.target_engine.engine_s == 0.25 * infer.num_calls["target"]
    assert core.draft_engine.inner.engine_s == 0.25 * infer.num_calls["draft"]


def test_a_step_without_drafts_does_not_call_the_draft_model() -> None:
    core, infer = make_wired_core("none", num_blocks=64)
    drive(core, [make_request([1, 2], 9)])
    assert infer.num_calls["draft"] == 0
