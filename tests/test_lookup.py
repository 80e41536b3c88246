"""Prompt lookup: what it proposes, how sure it is, and that it is chosen where it pays."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from conftest import drive, make_core, make_request
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from paged_lm import PagedLM

from specserve.batch import Draft
from specserve.core import SpecServe
from specserve.engines.paged_model import FlatBatch
from specserve.lookup import NGRAMS, PromptLookup
from specserve.policies.source_choice import Proposals


@pytest.mark.parametrize(
    ("token_ids", "max_tokens", "expected"),
    [
        pytest.param([1, 2, 3, 4, 1, 2], 3, [3, 4, 1], id="what followed the same two tokens"),
        pytest.param([1, 2, 3, 4, 1, 2], 1, [3], id="no more than asked for"),
        pytest.param([1, 2, 7, 1, 2, 8, 1, 2], 1, [8], id="the latest place counts"),
        pytest.param([5, 1, 2, 3, 7, 6, 1, 2, 3, 8, 5, 1, 2, 3], 1, [7], id="a longer match first"),
        pytest.param([9, 4, 1, 2, 3, 1, 2], 7, [3, 1, 2, 3, 1, 2, 3], id="a text that repeats"),
        pytest.param([1, 1, 1, 1], 3, [1, 1, 1], id="one token over and over"),
        pytest.param([1, 2, 3, 4], 3, None, id="nothing stood before"),
        pytest.param([1, 2, 1], 3, None, id="one token is no match"),
        pytest.param([1, 2, 3, 1, 2], 0, None, id="no room"),
        pytest.param([], 3, None, id="no tokens"),
    ],
)
def test_proposes_what_followed_the_same_tokens(
    token_ids: list[int], max_tokens: int, expected: list[int] | None
) -> None:
    draft = PromptLookup().propose(1, token_ids, max_tokens, len(token_ids))
    assert (draft and draft.token_ids) == expected


def test_a_longer_match_is_surer() -> None:
    lookup = PromptLookup()
    short = lookup.propose(1, [9, 1, 2, 5, 8, 1, 2], 1, 7)
    long = lookup.propose(2, [8, 1, 2, 5, 8, 1, 2], 1, 7)
    assert short is not None
    assert long is not None
    assert short.confidences == [3 / 4]  # two tokens agreed
    assert long.confidences == [4 / 5]


def test_if_the_tokens_before_are_right_the_next_one_is_surer() -> None:
    draft = PromptLookup().propose(1, [9, 1, 2, 5, 8, 7, 1, 2], 3, 8)
    assert draft == Draft([5, 8, 7], [3 / 4, 4 / 5, 5 / 6])


def test_a_draft_says_whether_it_repeats_the_prompt_or_the_output() -> None:
    """Where the copy begins decides: here with the third token, whose index is 2."""
    for num_prompt_tokens, repeats_output in ((2, True), (3, False), (5, False)):
        draft = PromptLookup().propose(1, [1, 2, 3, 1, 2], 3, num_prompt_tokens)
        assert draft is not None
        assert draft.repeats_output == draft.first(1).repeats_output == repeats_output


def propose_slowly(token_ids: list[int], max_tokens: int) -> list[int] | None:
    for n in NGRAMS:
        for end in range(len(token_ids) - 1, n - 1, -1):
            if token_ids[end - n : end] == token_ids[-n:]:
                text = list(token_ids)
                for i in range(end, end + max_tokens):
                    text.append(text[i])
                return text[len(token_ids) :]
    return None


@given(
    st.lists(st.integers(0, 3), min_size=1, max_size=60),
    st.lists(st.integers(1, 9), min_size=1, max_size=20),
)
def test_tokens_that_arrive_in_pieces_are_found_as_in_one(
    token_ids: list[int], pieces: list[int]
) -> None:
    lookup, known = PromptLookup(), 0
    for size in [*pieces, len(token_ids)]:
        known = min(known + size, len(token_ids))
        draft = lookup.propose(1, token_ids[:known], 4, 1)
        assert (draft and draft.token_ids) == propose_slowly(token_ids[:known], 4)


def test_requests_do_not_see_each_others_tokens_and_are_forgotten() -> None:
    lookup = PromptLookup()
    assert lookup.propose(1, [1, 2, 3, 1, 2], 1, 5) == Draft([3], [3 / 4])
    assert lookup.propose(2, [1, 2], 1, 2) is None
    lookup.release([1, 99])
    assert lookup.propose(1, [1, 2], 1, 2) is None


# -- in a core ---------------------------------------------------------------------------------


class MarkovLM(PagedLM):
    """Looks at the last token only, so its greedy text soon goes round in a circle."""

    def _read(self, batch: FlatBatch, i: int) -> NDArray[np.uint64]:
        super()._read(batch, i)
        last = batch.token_ids[batch.begins[i] : batch.begins[i + 1]].astype(np.uint64)
        return (last + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)


def circling_core(draft: PagedLM) -> SpecServe:
    return make_core("specserve", target=MarkovLM(), draft=draft)


def test_ngram_never_asks_the_draft_model() -> None:
    draft = PagedLM()
    core = circling_core(draft)
    request = make_request([1, 2, 3], 200, draft_source="ngram")
    drive(core, [request])
    assert draft.num_calls == 0
    assert request.num_accepted_tokens > 50


def test_model_never_looks_up() -> None:
    core = circling_core(PagedLM(noise=1.5))
    core.scheduler.submit(make_request([1, 2, 3] * 4, 40, draft_source="model"))
    while core.scheduler.has_work:
        assert all(row.lookup is None for row in core.scheduler.schedule(0.0).rows)
        core.step()


def test_auto_turns_to_the_lookup_when_the_draft_model_knows_nothing() -> None:
    draft = PagedLM(noise=8.0, scale=-1.0)
    core = circling_core(draft)
    request = make_request([1, 2, 3], 240, draft_source="auto")
    drive(core, [request])
    assert request.num_accepted_tokens > 150
    assert draft.num_calls <= 2 * core.scheduler.max_draft_tokens  # two drafts at most


def test_auto_is_never_worse_than_either_source_alone() -> None:
    """In steps, on a text that circles and with a draft model that agrees half the time."""

    def steps(source: str) -> int:
        core = circling_core(PagedLM(noise=1.5))
        drive(core, [make_request([i, 2, 3], 120, draft_source=source) for i in range(4)])
        return core.stats.num_steps

    assert steps("auto") <= 1.1 * min(steps("ngram"), steps("model"))


def longest_draft(source: str, policy: str = "specserve", **wishes: int) -> int:
    """Return the longest draft that is verified of a request on a text that circles."""
    core = make_core(policy, target=MarkovLM(), draft=PagedLM(noise=8.0, scale=-1.0))
    core.scheduler.submit(make_request([1, 2, 3], 240, draft_source=source, **wishes))
    longest = 0
    while core.scheduler.has_work:
        before = core.stats.num_verified_tokens
        core.step()
        longest = max(longest, core.stats.num_verified_tokens - before)
    return longest


def test_lookups_may_be_longer_than_drafts_of_the_model() -> None:
    assert longest_draft("auto") == 16
    assert longest_draft("ngram") == 16
    assert longest_draft("model") <= 8


def test_a_request_and_other_policies_keep_lookups_to_their_own_caps() -> None:
    assert longest_draft("ngram", max_draft_tokens=3) == 3
    assert longest_draft("ngram", num_draft_tokens=12) == 8
    assert longest_draft("ngram", policy="threshold") <= 8


def test_after_steps_that_brought_much_the_lookup_is_still_chosen() -> None:
    """Found in a run where each step took the last one's rate for what every token has to pay."""
    core = circling_core(PagedLM(noise=1.5))
    for i in range(4):
        core.scheduler.submit(make_request([i, 2, 3], 120, draft_source="auto"))
    chosen = []
    while core.scheduler.has_work:
        core.step()
        chosen.append(core.stats.num_accepted_tokens)
    steps = [later - earlier for earlier, later in itertools.pairwise(chosen)]
    first = next(i for i, accepted in enumerate(steps) if accepted)
    assert 0 not in steps[first : first + 6]


def test_sources_mix_in_a_batch() -> None:
    core = circling_core(PagedLM(noise=0.5))
    requests = [
        make_request([5, 6, 5, 6], 80, draft_source=source)
        for source in ("model", "ngram", "auto", "none")
    ]
    outputs = drive(core, requests)
    assert all(output == outputs[0] for output in outputs)
    drafted = {r.draft_source: r.num_drafted_tokens for r in requests}
    assert min(drafted["model"], drafted["ngram"], drafted["auto"]) > 0
    assert drafted["none"] == 0


# -- the choice between the sources ------------------------------------------------------------

FLAT = np.full(30, 0.02)  # seconds to verify with 0, 1, ... draft tokens
STEEP = np.concatenate((np.full(7, 0.02), 0.02 + 0.02 * np.arange(1, 24)))  # dear from the 7th on


def is_better(
    lookup: list[list[float]],
    model: list[list[float]],
    verify_s: NDArray[np.float64],
    forward_s: float = 0.0,
) -> list[bool]:
    proposals = Proposals(np.array(lookup), np.array(model), np.ones(len(lookup)))
    better: list[bool] = proposals.lookup_is_better(len(lookup), verify_s, forward_s).tolist()
    return better


def test_of_two_that_promise_the_same_the_one_without_forwards_is_better() -> None:
    same = [[0.9, 0.8]]
    assert is_better(same, same, FLAT, forward_s=0.0) == [False]
    assert is_better(same, same, FLAT, forward_s=0.001) == [True]


def test_a_long_lookup_beats_a_short_sure_draft_only_where_its_tokens_are_not_too_dear() -> None:
    long, sure = [[0.7] * 16], [[0.95] * 6]
    assert is_better(long, sure, FLAT) == [True]
    assert is_better(long, sure, STEEP) == [False]


def test_each_row_has_a_source_of_its_own() -> None:
    lookup, model = [[0.9] * 4, [0.1] * 4, [0.0] * 4], [[0.5] * 4, [0.5] * 4, [0.5] * 4]
    assert is_better(lookup, model, FLAT) == [True, False, False]
