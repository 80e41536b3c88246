"""What the controller must do whatever the machine says: promises of the design."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import FakeClock, make_core, make_request, step_time
from hypothesis import given
from hypothesis import strategies as st

from specserve.assemble import assemble, profiled
from specserve.batch import Batch, Draft, Row, StepRecord, Verified
from specserve.config import PolicyConfig, SLOConfig, load_config
from specserve.engines import EngineInfo
from specserve.engines.simulated import RecordedAcceptance, SimulatedPair, VirtualClock
from specserve.optimum import _choose_of_many, best_total, choose
from specserve.policies import make_policy
from specserve.policies.fixed import FixedPolicy
from specserve.predictor.measure import QUICK, Effort, measure
from specserve.predictor.profile import Profile
from specserve.predictor.step_time import StepTimeModel
from specserve.rehearsal import NUM_REQUESTS, host_s
from specserve.request import SLO
from specserve.sampling_params import SamplingParams

ASSETS = Path(__file__).parent / "assets"
NUM_ROWS = 4


def make_rows(count: int) -> list[Row]:
    return [
        Row(
            key=key, num_computed_tokens=50, token_ids=[1], samples=True, block_table=[0],
            max_draft_tokens=8, catch_up_token_ids=[1],
        )
        for key in range(count)
    ]  # fmt: skip


# -- measuring a profile -----------------------------------------------------------------------


class Coin:
    """Accepts four tokens, whatever the request."""

    def at(self, key: int, position: int) -> tuple[Sequence[float], int]:
        """See `AcceptanceProcess`."""
        return [0.5] * 8, 4


@pytest.mark.parametrize("slowness", [1.0, 4.0])
def test_profile_of_a_slow_machine_takes_less_than_two_minutes(
    profile: Profile, slowness: float
) -> None:
    slow = scaled(profile, [slowness] * len(profile.verify))
    clock, info = VirtualClock(), EngineInfo(4096, 4096, num_blocks=512, block_size=32)
    pair = SimulatedPair(StepTimeModel(slow), clock, Coin())
    found = StepTimeModel(measure(pair, pair, info, {}, Effort(), clock))
    assert clock() < 120.0
    for size in (1, 8, 64):
        truth = StepTimeModel(slow).verify_s(size, 512)
        assert found.verify_s(size, 512) == pytest.approx(truth, rel=0.1)


def test_a_change_of_shape_is_measured_apart(profile: Profile) -> None:
    clock, info = VirtualClock(), EngineInfo(4096, 4096, num_blocks=512, block_size=32)
    pair = SimulatedPair(StepTimeModel(replace(profile, change_s=0.003)), clock, Coin())
    found = measure(pair, pair, info, {}, Effort(), clock)
    assert found.change_s == pytest.approx(0.003)
    for size in (1, 8, 64):
        truth = StepTimeModel(profile).verify_s(size, 512)
        assert StepTimeModel(found).verify_s(size, 512) == pytest.approx(truth, rel=0.1)


def test_a_draft_forward_of_another_size_is_measured_apart(profile: Profile) -> None:
    clock, info = VirtualClock(), EngineInfo(4096, 4096, num_blocks=512, block_size=32)
    pair = SimulatedPair(StepTimeModel(replace(profile, draft_change_s=0.002)), clock, Coin())
    found = measure(pair, pair, info, {}, Effort(), clock)
    assert found.draft_change_s == pytest.approx(0.002)
    for rows in ([1] * 8, [8] * 4):
        truth = StepTimeModel(profile).draft_s(rows)
        assert StepTimeModel(found).draft_s(rows) == pytest.approx(truth + 0.002, rel=0.1)


def test_what_the_host_takes_of_a_step_is_its_median_beside_the_engines() -> None:
    clock = VirtualClock()

    class Pair(SimulatedPair):
        def verify(self, batch: Batch, chosen: Sequence[Sequence[int]]) -> list[Verified]:
            clock.advance(0.05)
            return super().verify(batch, chosen)

    class Pondering(FixedPolicy):
        def select(self, batch: Batch, confidences: Sequence[Sequence[float]]) -> list[int]:
            clock.advance(0.002)
            return super().select(batch, confidences)

    pair = Pair(step_time(), clock, Coin())
    core = assemble(
        load_config(None, ["telemetry.source=none"]),
        info=EngineInfo(4096, 4096, num_blocks=64, block_size=32),
        draft_engine=pair, target_engine=pair, policy=Pondering(2), clock=clock,
    )  # fmt: skip
    assert host_s(core, vocab_size=4096) == pytest.approx(0.002)
    assert not core.scheduler.has_work


def test_a_profile_counts_the_host_and_leaves_nothing_running() -> None:
    clock, info = VirtualClock(), EngineInfo(4096, 4096, num_blocks=512, block_size=32)
    released: list[int] = []

    class Pair(SimulatedPair):
        def release(self, keys: Sequence[int]) -> None:
            released.extend(keys)

    pair = Pair(step_time(), clock, Coin())
    config = load_config(None, ["telemetry.source=none"])
    found = profiled(config, info, pair, pair, {"device": "test"})
    assert found.host_s > 0.0
    assert found.fingerprint == {"device": "test"}
    assert len([key for key in released if key > 0]) == 2 * NUM_REQUESTS, "both engines, each once"


@pytest.mark.parametrize("num_blocks", [10, 16, 64, 96])
@pytest.mark.parametrize("effort", [QUICK, Effort()])
def test_a_small_kv_cache_can_be_profiled(
    profile: Profile, num_blocks: int, effort: Effort
) -> None:
    clock, info = VirtualClock(), EngineInfo(4096, 4096, num_blocks, block_size=32)
    pair = SimulatedPair(StepTimeModel(profile), clock, Coin())
    found = StepTimeModel(measure(pair, pair, info, {}, effort, clock))
    for size in (1, 8, 64):
        truth = StepTimeModel(profile).verify_s(size, 64)
        assert found.verify_s(size, 64) == pytest.approx(truth, rel=0.15)


class TiringClock(VirtualClock):
    """Of a machine that gets slower: by half in the time that a profile takes."""

    def advance(self, seconds: float) -> None:
        """Let more time pass."""
        super().advance(seconds * (1.0 + self.now_s / 80.0))


def test_a_machine_that_gets_slower_makes_no_context_look_dear(profile: Profile) -> None:
    clock, info = TiringClock(), EngineInfo(4096, 4096, num_blocks=512, block_size=32)
    truth = StepTimeModel(profile)
    pair = SimulatedPair(truth, clock, Coin())
    found = StepTimeModel(measure(pair, pair, info, {}, Effort(), clock))
    for size in (2, 16):
        costs = [model.verify_s(size, 4096) / model.verify_s(size, 256) for model in (truth, found)]
        assert costs[1] == pytest.approx(costs[0], rel=0.05)


# -- a noisy profile ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def profile() -> Profile:
    return Profile.load(ASSETS / "profile_cpu_0.4b.json")


def token_rate(name: str, truth: Profile, believed: Profile) -> float:
    """Return the tokens per second on a device of one profile, for a policy that has another."""
    clock, limits = VirtualClock(), ["scheduler.max_num_seqs=4", "telemetry.source=none"]
    process = RecordedAcceptance.load(ASSETS / "acceptance_demo.npz", seed=3)
    pair = SimulatedPair(StepTimeModel(truth), clock, process)
    core = assemble(
        load_config(None, limits),
        info=EngineInfo(vocab_size=4096, max_seq_len=4096, num_blocks=512, block_size=32),
        draft_engine=pair,
        target_engine=pair,
        policy=make_policy(PolicyConfig(name=name), StepTimeModel(believed)),
        clock=clock,
    )
    for key in range(1, 6 * NUM_ROWS + 1):
        core.scheduler.submit(make_request([1] * 16, 64, key=key))
    while core.scheduler.has_work:
        core.step()
    return core.stats.num_output_tokens / clock()


def disturbed(profile: Profile) -> Iterator[Profile]:
    """Yield profiles 10 % off: by chance, and so that more tokens look dearer than they are."""
    for seed in range(2):
        noise = np.exp(np.random.default_rng(seed).normal(0.0, 0.1, len(profile.verify)))
        yield scaled(profile, noise.tolist())
    yield scaled(profile, [0.9 if s.num_tokens <= NUM_ROWS else 1.1 for s in profile.verify])


def scaled(profile: Profile, factors: Sequence[float]) -> Profile:
    pairs = zip(profile.verify, factors, strict=True)
    return replace(profile, verify=tuple(replace(s, seconds=s.seconds * f) for s, f in pairs))


def test_noise_of_a_tenth_in_the_profile_does_not_keep_speculation_off(profile: Profile) -> None:
    """The paper's gate stayed shut where speculation paid 1.3 times."""
    plain = token_rate("none", profile, profile)
    right = token_rate("specserve", profile, profile)
    assert right > 1.4 * plain
    for noisy in disturbed(profile):
        assert token_rate("specserve", profile, noisy) > 0.9 * right


# -- what is verified --------------------------------------------------------------------------


def test_the_least_likely_tokens_go_whichever_row_has_them() -> None:
    """D2: of A = [.9, .5, .1] and B = [.6, .3, .12] two stay, 1.5 tokens, not .9 as released."""
    policy = make_policy(PolicyConfig(), step_time(num_free_tokens=4, token_s=0.05))
    for source in policy.acceptances.all:
        source.judge.weights = np.eye(len(source.judge.weights))[1]  # confidence is acceptance
    rows = make_rows(2)
    policy.plan(rows)
    assert policy.select(Batch(rows), [[0.9, 0.5 / 0.9, 0.2], [0.6, 0.5, 0.4]]) == [1, 1]


def test_what_the_prompt_repeats_and_what_the_output_repeats_are_learnt_apart() -> None:
    """One request, equally sure copies: those from the prompt fail, those from the output hold."""
    policy = make_policy(PolicyConfig(), step_time(num_free_tokens=1, token_s=0.005))
    (row,) = make_rows(1)
    said = {False: [9], True: [5] * 5}
    lengths = {}
    for step in range(120):
        repeats_output = step % 2 == 1
        copy = Draft([5] * 4, [0.8] * 4, repeats_output)
        batch = Batch([replace(row, lookup=copy)])
        policy.plan(batch.rows)
        (lengths[repeats_output],) = policy.select(batch, [copy.confidences])
        chosen = [copy.token_ids[: lengths[repeats_output]]]
        output = [Verified(said[repeats_output])]
        policy.observe(StepRecord(batch, [copy], chosen, output, 0.0, 0.03))
    assert lengths[False] == 0
    assert lengths[True] >= 3


def test_a_prompt_in_the_step_makes_no_draft_pay() -> None:
    """Its half second is spent either way: it is no reason to spend more on unlikely tokens."""
    policy = make_policy(PolicyConfig(), step_time(num_free_tokens=4, token_s=0.005))
    for source in policy.acceptances.all:
        source.judge.weights = np.eye(len(source.judge.weights))[1]  # confidence is acceptance
    rows, confidences = make_rows(2), [[0.6, 0.6]] * 2
    policy.plan(rows)
    assert policy.select(Batch(rows), confidences) == [1, 1], "two tokens cost nothing"
    prompt = Row(key=9, num_computed_tokens=0, token_ids=[1] * 100, samples=False, block_table=[0])
    policy._num_steps_off = 0  # no step to explore in
    policy.plan([*rows, prompt])
    assert policy.select(Batch([*rows, prompt]), [*confidences, []]) == [0, 0, 0]


def test_few_tokens_are_chosen_as_many_are() -> None:
    """The one in plain Python, the other by array operations; rows of unlike worth and length."""
    rng = np.random.default_rng(0)
    for _ in range(100):
        survival = np.cumprod(rng.uniform(0.1, 1.0, (rng.integers(1, 9), 6)), axis=1)
        survival[np.arange(6) >= rng.integers(0, 7, (len(survival), 1))] = 0.0
        weight = rng.choice([1.0, 2.5], len(survival))
        verify_s = 0.02 + np.cumsum(rng.choice([0.0, 0.002, 0.02], survival.size + 1))
        args = survival, weight, float(weight.sum()), verify_s, 0.003
        assert choose(*args) == _choose_of_many(*args)


def test_the_shape_of_the_last_step_is_kept_unless_another_pays_for_the_change() -> None:
    believed = step_time(num_free_tokens=1, token_s=0.005)
    changing = step_time(num_free_tokens=1, token_s=0.005, change_s=0.004)
    for last, with_change in ((1, 0), (2, 1), (3, 2)):
        lengths = []
        for model in (believed, changing):
            policy = make_policy(PolicyConfig(), model)
            for source in policy.acceptances.all:
                source.judge.weights = np.eye(len(source.judge.weights))[1]
            policy.step_time.has_verified(last)
            policy.plan(make_rows(1))
            lengths += policy.select(Batch(make_rows(1)), [[0.6, 0.8]])
        assert lengths == [1, with_change]


@pytest.mark.parametrize(("temperature", "verified"), [(0.0, 0), (1.0, 1)])
def test_off_looks_again_soon_and_verifies_only_where_nothing_else_would_tell(
    temperature: float, verified: int
) -> None:
    """A greedy row's next token shows whether its draft was right; a sampled one's does not."""
    policy = make_policy(PolicyConfig(), step_time(num_free_tokens=1, token_s=0.05))
    (row,) = make_rows(1)
    row = replace(row, sampling=SamplingParams(temperature=temperature))
    policy._num_steps_off = 0  # it has just gone off
    looked = []
    for step in range(1, 101):
        plan = policy.plan([row])
        drafts = [Draft([5], [0.5]) if plan.max_draft_tokens[0] else Draft([], [])]
        (length,) = policy.select(Batch([row]), [drafts[0].confidences])
        if drafts[0].token_ids:
            looked.append(step)
            assert length == verified
        record = StepRecord(Batch([row]), drafts, [[5][:length]], [Verified([9])], 0.001, 0.01)
        policy.observe(record)
    assert looked == [2, 4, 8, 16, 32, 48, 96]
    history = policy.acceptances.of_model(row).history_of(row.key)
    assert history < 0.0, "what was not verified was learnt from too"


@given(
    st.lists(st.floats(0.0, 1.0), min_size=1, max_size=12),
    st.lists(st.floats(0.001, 5.0), min_size=13, max_size=13),
    st.floats(0.0, 3.0),
    st.floats(0.0, 3.0),
)
def test_dearer_verification_never_verifies_more(
    gains: list[float], steps: list[float], spent_s: float, more_s: float
) -> None:
    """On any staircase, with any time more for each token."""
    gains, verify_s = sorted(gains, reverse=True), np.cumsum(steps)
    cheap = best_total(gains, 2.0, verify_s.tolist(), spent_s)
    dear = best_total(gains, 2.0, (verify_s + more_s * np.arange(13)).tolist(), spent_s)
    assert dear.num_tokens <= cheap.num_tokens


@given(st.lists(st.floats(0.001, 5.0), min_size=9, max_size=9), st.floats(0.0, 3.0))
def test_what_is_never_accepted_is_never_verified(steps: list[float], spent_s: float) -> None:
    assert best_total([0.0] * 8, 1.0, np.cumsum(steps).tolist(), spent_s).num_tokens == 0


# -- on and off --------------------------------------------------------------------------------


def begins(token_s: float, was_on: bool) -> bool:
    """Say whether a batch drafts whose steps take `token_s` more for each token."""
    policy = make_policy(PolicyConfig(), step_time(num_free_tokens=1, token_s=token_s))
    policy._is_on, policy._num_steps_off = was_on, 0
    plan = policy.plan(make_rows(2))
    return bool(any(plan.max_draft_tokens))


def border(was_on: bool, low: float = 3e-3, high: float = 8e-3) -> float:
    """Return the price of a token from which on the batch does not draft, within .2 %."""
    assert begins(low, was_on)
    assert not begins(high, was_on)
    while high > 1.002 * low:
        middle = (low * high) ** 0.5
        low, high = (middle, high) if begins(middle, was_on) else (low, middle)
    return low


def test_the_mode_does_not_change_with_every_breath_of_the_prediction() -> None:
    """D13: prices between the two borders leave on what was on, and off what was off."""
    assert border(was_on=True) > 1.01 * border(was_on=False)


# -- nobody starves ----------------------------------------------------------------------------


def test_best_effort_is_served_under_a_stream_of_deadlines() -> None:
    """One row, and every second a request that has to be quick: as many as can be served."""
    clock = FakeClock()
    core = make_core("specserve", clock=clock, max_num_seqs=1)
    patient = make_request([1, 2], 1)
    core.scheduler.submit(make_request([3], 1, slo=SLO(ttft_s=2.0), arrival_s=clock.now))
    core.scheduler.submit(patient)
    while not patient.is_finished:
        core.step()
        clock.advance(1.0)
        core.scheduler.submit(make_request([3], 1, slo=SLO(ttft_s=2.0), arrival_s=clock.now))
        assert clock.now < 2.0 * SLOConfig().best_effort_ttft_s, "it would never be served"
    assert clock.now > 0.5 * SLOConfig().best_effort_ttft_s, "nobody was ahead of it"
