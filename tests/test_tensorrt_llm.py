"""The TensorRT-LLM engines against a strict stand-in of the bindings that runs small models.

What cannot be tested here is that the real bindings behave as documented: no GPU has run this.

Every chi-square check asks for p > 1e-4 over fixed seeds: the result never changes from run to run.
"""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import FakeClock, all_policies, drive, drive_fast, make_request, new_policy, policy_of
from paged_lm import PagedLM, plain_decode
from test_lossless import FALSE_ALARM, chi_square, enumerate_outputs

from specserve import engines, manifest
from specserve.assemble import assemble
from specserve.batch import Batch, Row, Verified
from specserve.config import (
    Config,
    PolicyConfig,
    SchedulerConfig,
    TelemetryConfig,
    TensorRTLLMConfig,
)
from specserve.core import SpecServe
from specserve.engines import EngineLost, wire
from specserve.engines.triton import TritonDraftEngine, TritonTargetEngine
from specserve.manifest import Compiled, Manifest, Source
from specserve.predictor.measure import Effort, measure
from specserve.request import FinishReason, Request
from specserve.sampling_params import SamplingParams
from specserve.stop_rules import SurvivalRule

torch = pytest.importorskip("torch")
fake = pytest.importorskip("fake_tensorrt_llm")

VOCAB_SIZE = 17
PAD = 3  # rows of the logits beyond the vocabulary
BLOCK_SIZE = 8
MAX_DRAFT_LEN = 8
STOPS = ("step", "plan")


class Pair:
    """Two engine folders, the models behind them, and a configuration that names them."""

    def __init__(
        self,
        folder: Path,
        *,
        vocab_size: int = VOCAB_SIZE,
        seed: int = 0,
        pad: int = PAD,
        **compiled: Any,
    ) -> None:
        target = PagedLM(vocab_size=vocab_size, seed=seed)
        draft = PagedLM(vocab_size=vocab_size, seed=seed, noise=1.5)
        self.model = target
        self.target = fake.Engine(target, max_draft_len=MAX_DRAFT_LEN, pad=pad)
        self.draft = fake.Engine(draft, pad=pad)
        self.folder = folder
        for role, max_draft_len in (("draft", 0), ("target", MAX_DRAFT_LEN)):
            rows = vocab_size + pad
            values = {"max_draft_len": max_draft_len, "vocab_rows": rows, **compiled}
            write_engine(folder / role, vocab_size, values)

    @property
    def engines(self) -> dict[str, Any]:
        return {"draft": self.draft, "target": self.target}

    def config(self, policy: PolicyConfig | str = "fixed", **options: Any) -> Config:
        """Return a configuration; fields of `SchedulerConfig` and `TensorRTLLMConfig` by name."""
        limits = {k: options.pop(k) for k in list(options) if k in SchedulerConfig.__slots__}
        config = Config(
            policy=policy_of(policy),
            scheduler=SchedulerConfig(
                **{"max_num_seqs": 16, "kv_cache_tokens": 2048, "max_waiting_requests": 10**6}
                | {"max_waiting_tokens": 10**9}
                | limits
            ),
            tensorrt_llm=TensorRTLLMConfig(**options),
        )
        engine = replace(config.engine, name="tensorrt_llm", dir=str(self.folder))
        return replace(config, engine=engine, telemetry=TelemetryConfig(source="none"))


def write_engine(folder: Path, vocab_size: int, compiled: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("config.json", "rank0.engine"):
        (folder / name).write_text("")
    values: dict[str, Any] = {
        "quantization": "none", "kv_cache": "fp16",
        "max_batch_size": 16, "max_input_len": 512, "max_num_tokens": 2048,
        "tokens_per_block": BLOCK_SIZE, "tp_size": 1, "pp_size": 1,
    }  # fmt: skip
    digest = "0" * 64
    manifest.save(
        Manifest(
            engine="tensorrt_llm",
            precision="fp16",
            vocab_size=vocab_size,
            tokenizer_sha256=digest,
            max_seq_len=520,
            num_parameters=1,
            num_layers=1,
            num_kv_heads=1,
            head_dim=1,
            hidden_size=1,
            source=Source("tiny", digest),
            builder={"tensorrt_llm": "1.2.1"},
            files=("config.json", "rank0.engine"),
            compiled=Compiled(**(values | compiled)),
        ),
        folder,
    )


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Keep torch from waking threads for a handful of numbers."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


@pytest.fixture
def pair(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Pair:
    """Return a pair whose bindings are installed until the test ends."""
    return install(Pair(tmp_path), monkeypatch)


def install(pair: Pair, monkeypatch: pytest.MonkeyPatch, **options: bool) -> Pair:
    fake.install(monkeypatch, fake.make_module(pair.engines, **options))
    return pair


def make_core(pair: Pair, policy: PolicyConfig | str = "fixed", **options: Any) -> SpecServe:
    """Assemble everything as a server does, on a clock that the models move."""
    config = pair.config(policy, **options)
    clock = FakeClock(0.00001)
    pair.target.spend = lambda: clock.advance(0.010)
    pair.draft.spend = lambda: clock.advance(0.0004)
    return assemble(config, policy=new_policy(config.policy), clock=clock)


def plain(pair: Pair, request: Request) -> list[int]:
    return plain_decode(pair.model, request.prompt_token_ids, request.max_tokens, request.sampling)


def check_contexts(pair: Pair, requests: Sequence[Request]) -> None:
    """Assert that every call saw a beginning of some request's tokens, and nothing else.

    The draft model may be sent what it has proposed itself only after it was accepted, so this
    holds for its calls too.
    """
    for engine in (pair.draft, pair.target):
        assert engine.requests
        for call in engine.requests:
            n = len(call.input_token_ids)
            assert any(call.input_token_ids == r.token_ids[:n] for r in requests), (
                f"nobody has the context {call.input_token_ids}"
            )


def finish(core: SpecServe) -> None:
    assert core.draft_engine.num_failures == 0, "the draft engine failed: see the log"
    core.draft_engine.inner.close()  # type: ignore[attr-defined]
    core.target_engine.close()  # type: ignore[attr-defined]


# -- the stand-in ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "args", "values"),
    [
        ("Request", ([1], 1), {"random_seed": 1}),
        ("Request", ([1], 1, True), {}),
        ("Request", ([np.int64(1)], 1), {}),
        ("Request", ([1], 1), {"bad_words": [(1,)]}),
        ("SamplingConfig", (), {"top_k": 1.0}),
        ("SamplingConfig", (), {"prompt_ignore_length": 1}),
        ("TokenRangeRetentionConfig", (0, None, 80), {"duration_ms": 10}),
        ("ExecutorConfig", (), {"kv_cache_config": {}}),
    ],
)
def test_the_stand_in_refuses_what_the_bindings_refuse(
    name: str, args: tuple[Any, ...], values: dict[str, Any]
) -> None:
    with pytest.raises(TypeError):
        getattr(fake.make_module({}), name)(*args, **values)


# -- conversations -----------------------------------------------------------------------------

GREEDY = [
    pytest.param({}, id="plain"),
    pytest.param({"end_id": 3}, id="end"),
    pytest.param({"end_id": 3, "min_tokens": 9}, id="min tokens"),
    pytest.param({"repetition_penalty": 1.7}, id="repetition"),
    pytest.param({"logit_bias": ((3, 4.0), (5, -100.0))}, id="bias"),
    pytest.param({"bad_words": ((3,), *((a, 5) for a in range(9)))}, id="bad words"),
    pytest.param(
        {"end_id": 2, "min_tokens": 5, "repetition_penalty": 1.2, "logit_bias": ((4, 1.0),)}
        | {"bad_words": ((5, 6), (7,))},
        id="together",
    ),
]


@pytest.mark.parametrize("values", GREEDY)
@pytest.mark.parametrize(
    ("policy", "stop"), [("specserve", "step"), ("specserve", "plan"), ("adaptive", "step")]
)
def test_greedy_conversations_are_plain_decodings(
    pair: Pair, policy: str, stop: str, values: dict[str, Any]
) -> None:
    core = make_core(pair, policy, draft_stop=stop, prefill_chunk_tokens=5)
    requests = [make_request([i, 2, 3, 4, 5, 6, 7], 20, **values) for i in range(6)]
    expected = [plain(pair, request) for request in requests]
    assert drive(core, requests, arrivals=[0, 0, 0, 1, 5, 9]) == expected
    check_contexts(pair, requests)
    assert core.stats.num_accepted_tokens > 0, "nothing was speculated: this proves nothing"
    finish(core)


@pytest.mark.parametrize("policy", all_policies())
def test_every_policy_gives_plain_decodings(pair: Pair, policy: PolicyConfig) -> None:
    core = make_core(pair, policy)
    requests = [
        make_request([i, 2, 3], 12, draft_source=("model", "auto")[i % 2]) for i in range(3)
    ]
    assert drive(core, requests) == [plain(pair, request) for request in requests]
    finish(core)


def test_a_draft_may_hold_the_token_that_ends_drafts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without padding in the logits, the last token of the vocabulary has to do."""
    pair = install(Pair(tmp_path, pad=0), monkeypatch)
    core = make_core(pair, PolicyConfig(name="fixed", num_draft_tokens=5))
    requests = [make_request([i, 3], 40) for i in range(6)]
    assert drive(core, requests) == [plain(pair, request) for request in requests]
    drafts = [call.external_draft_tokens_config for call in pair.target.requests]
    last = VOCAB_SIZE - 1
    assert any(last in draft.tokens for draft in drafts if draft)
    finish(core)


@pytest.mark.parametrize("stop", STOPS)
def test_rows_of_one_wave_draft_and_verify_at_lengths_of_their_own(pair: Pair, stop: str) -> None:
    core = make_core(pair, PolicyConfig(name="fixed", num_draft_tokens=4), draft_stop=stop)
    lengths = (0, 1, 3, None)
    requests = [make_request([i, 5], 30, max_draft_tokens=n) for i, n in enumerate(lengths)]
    requests.append(make_request([9, 5], 30, num_draft_tokens=7))
    outputs = drive(core, requests)
    assert outputs == [plain(pair, request) for request in requests]
    by_prompt: dict[int, set[int]] = {}
    for call in pair.target.requests:
        draft = call.external_draft_tokens_config
        assert draft is None or draft.tokens, "an empty draft must be left out"
        length = len(draft.tokens) if draft else 0
        assert call.max_tokens == length + 1
        by_prompt.setdefault(call.input_token_ids[0], set()).add(length)
    assert by_prompt[0] == {0}
    assert {n: max(lengths) for n, lengths in by_prompt.items()} == {0: 0, 1: 1, 2: 3, 3: 4, 9: 7}
    check_contexts(pair, requests)
    finish(core)


@pytest.mark.parametrize("stop", STOPS)
def test_the_stop_rule_ends_drafts_that_the_cap_would_not(pair: Pair, stop: str) -> None:
    """A draft that half agrees is worth two or three tokens, not eight."""
    core = make_core(pair, PolicyConfig(name="adaptive", min_survival=0.5), draft_stop=stop)
    requests = [make_request([i, 5], 40) for i in range(6)]
    drive(core, requests)
    drafted = sum(request.num_drafted_tokens for request in requests)
    steps = sum(request.num_decode_steps for request in requests)
    assert 0 < drafted < 5 * steps
    finish(core)


def test_a_watched_draft_costs_no_pass_beyond_its_last_token(pair: Pair) -> None:
    """And drafts what the draft loop of the other engines drafts, by the same rule."""
    draft = engines.make_draft_engine(pair.config(draft_stop="step"))
    context, rule = [1, 2, 3], SurvivalRule(np.array([0.0, 1.0]), np.array([0.5]))
    row = Row(1, 0, [], True, [], 3, max_draft_tokens=8, catch_up_token_ids=context)
    (proposal,) = draft.draft(Batch([row], rule))
    expected: list[int] = []
    survival = 1.0
    while survival >= 0.5 and len(expected) < 8:
        logits = pair.draft.model.logits([*context, *expected])
        probs = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
        expected.append(int(probs.argmax()))
        survival *= float(probs.max())
    assert proposal.token_ids == expected
    assert 1 <= len(expected) < 8
    assert pair.draft.num_passes == len(expected)
    assert proposal.confidences[0] == pytest.approx(
        float(np.exp(pair.draft.model.logits(context)).max())
        / float(np.exp(pair.draft.model.logits(context)).sum()),
        rel=1e-5,
    )


def test_confidences_are_the_same_whether_a_draft_is_watched_or_planned(pair: Pair) -> None:
    """Planned drafts take theirs from log_probs, which must not be normalised over top-k = 1."""
    proposals = []
    for stop in STOPS:
        draft = engines.make_draft_engine(pair.config(draft_stop=stop))
        row = Row(1, 0, [], True, [], 3, max_draft_tokens=5, catch_up_token_ids=[1, 2, 3])
        proposals += draft.draft(Batch([row]))
    assert proposals[0].token_ids == proposals[1].token_ids
    assert proposals[0].confidences == pytest.approx(proposals[1].confidences, rel=1e-5)
    assert max(proposals[0].confidences) < 0.99


def test_a_row_that_falls_behind_ends_its_draft_and_the_others_do_not_wait(pair: Pair) -> None:
    draft = engines.make_draft_engine(pair.config(draft_stop="step"))
    pair.draft.late = {2}
    rows = [
        Row(key, 0, [], True, [], 3, max_draft_tokens=4, catch_up_token_ids=[key, 2, 3])
        for key in (1, 2, 3)
    ]
    assert [len(d.token_ids) for d in draft.draft(Batch(rows))] == [4, 1, 4]


def test_long_contexts_are_drafted_by_plan(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("specserve.engines.tensorrt_llm.draft.MAX_WATCHED_TOKENS", 10)
    core = make_core(pair, draft_stop="step")
    requests = [make_request([1, 2, 3], 20)]
    assert drive(core, requests) == [plain(pair, requests[0])]
    names = [call.logits_post_processor_name for call in pair.draft.requests]
    assert names[0] is not None
    assert names[-1] is None
    finish(core)


def test_preemption_and_cancellation_change_nobody_elses_text(pair: Pair) -> None:
    core = make_core(
        pair, "adaptive", kv_cache_tokens=10 * BLOCK_SIZE, max_num_seqs=4, prefill_chunk_tokens=6
    )
    requests = [make_request([i, 5, 9], 40) for i in range(5)]
    outputs = drive(core, requests, aborts={7: [requests[1]]})
    assert core.scheduler.num_preemptions > 0
    assert requests[1].finish_reason is FinishReason.CANCELLED
    for request, output in zip(requests, outputs, strict=True):
        assert output == plain(pair, request)[: len(output)]
        assert len(output) == 40 or request is requests[1]
    check_contexts(pair, requests)
    finish(core)


def test_nothing_is_kept_of_requests_that_have_ended(pair: Pair) -> None:
    core = make_core(pair)
    drive(core, [make_request([i, 5], 9, logit_bias=((1, 1.0),)) for i in range(4)])
    core.release_ended()
    assert len(core.target_engine._sequences) == 0  # type: ignore[attr-defined]
    assert len(core.draft_engine.inner._sequences) == 0  # type: ignore[attr-defined]
    assert not core.target_engine._requests._biases  # type: ignore[attr-defined]


# -- sampled requests --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "values",
    [
        {"temperature": 1.0, "top_k": 2},
        {"temperature": 0.7, "repetition_penalty": 1.5},
        {"temperature": 0.7, "presence_penalty": 0.7, "frequency_penalty": 0.4},
        {"temperature": 1.0, "logit_bias": ((1, 2.0),), "bad_words": ((1, 1), (3,))},
    ],
    ids=str,
)
def test_sampled_outputs_are_distributed_as_the_target(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, values: dict[str, Any]
) -> None:
    pair = install(Pair(tmp_path, vocab_size=5, seed=7), monkeypatch, prompt_ignore_length=True)
    core = make_core(pair, prompt_ignore_length=True)
    requests = [make_request([1, 4, 2], 3, seed=i, **values) for i in range(400)]
    counts = Counter(map(tuple, drive_fast(core, requests)))
    probs = enumerate_outputs(pair.model, [1, 4, 2], 3, requests[0].sampling)
    assert chi_square(counts, probs) > FALSE_ALARM
    assert core.stats.num_verified_tokens == 0, "sampled requests are not speculated on"


def test_the_executors_own_verification_of_sampled_drafts_would_fail_that_check(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Why sampled requests have no drafts: after a rejection the executor draws once more."""
    pair = install(Pair(tmp_path, vocab_size=5, seed=7), monkeypatch)
    api = fake.make_module(pair.engines)
    executor = api.Executor(tmp_path / "target", api.ModelType.DECODER_ONLY, api.ExecutorConfig())
    requests = [
        api.Request(
            [1, 4, 2],
            2,
            sampling_config=api.SamplingConfig(top_p=1.0, seed=seed),
            output_config=api.OutputConfig(exclude_input_from_output=True),
            external_draft_tokens_config=api.ExternalDraftTokensConfig([0]),
        )
        for seed in range(1, 1001)
    ]
    executor.enqueue_requests(requests)
    responses = executor.await_responses(timedelta(seconds=1))
    counts = Counter((r.result.output_token_ids[0][0],) for r in responses)
    params = SamplingParams(temperature=1.0)
    probs = enumerate_outputs(pair.model, [1, 4, 2], 1, params)
    assert chi_square(counts, probs) < 1e-9
    p = probs[(0,)]
    assert counts[(0,)] / 1000 == pytest.approx(p + (1 - p) * p, abs=0.05)


def test_a_seed_gives_the_same_text_with_and_without_speculation(pair: Pair) -> None:
    def texts(policy: str, count: int) -> list[list[int]]:
        core = make_core(pair, policy)
        return drive(
            core,
            [make_request([4, 2], 20, temperature=0.9, seed=7)] * 1
            + [make_request([i, 3], 20) for i in range(count)],
        )[:1]

    assert texts("none", 0) == texts("specserve", 5) == texts("fixed", 2)


def test_every_call_of_a_sampled_request_has_a_seed_of_its_own(pair: Pair) -> None:
    core = make_core(pair)
    drive(core, [make_request([1, 2], 30, temperature=1.0, seed=seed) for seed in (0, 1)])
    seeds = [call.sampling_config.seed for call in pair.target.requests]
    assert len(set(seeds)) == len(seeds) == 60


def test_min_tokens_and_penalties_do_not_restart_with_every_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = install(Pair(tmp_path), monkeypatch, prompt_ignore_length=True)
    core = make_core(pair, prompt_ignore_length=True)
    values = {"frequency_penalty": 3.0, "presence_penalty": 1.0, "end_id": 3, "min_tokens": 12}
    requests = [make_request([i, 3, 3, 5], 24, **values) for i in range(6)]
    assert drive(core, requests) == [plain(pair, request) for request in requests]
    assert core.stats.num_accepted_tokens > 0


# -- refused by name ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "name"),
    [
        ({"temperature": 1.0, "num_draft_tokens": 3}, "num_draft_tokens"),
        ({"temperature": 1.0, "min_p": 0.1}, "min_p"),
        ({"temperature": 1.0, "top_k": 2000}, "top_k"),
        ({"return_log_probs": True}, "return_log_probs"),
        ({"presence_penalty": 0.5}, "presence_penalty"),
        ({"frequency_penalty": 0.5}, "frequency_penalty"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_be_kept_is_refused_by_name_before_it_runs(
    pair: Pair, values: dict[str, Any], name: str
) -> None:
    core = make_core(pair)
    with pytest.raises(ValueError, match=f"^{name} is .*tensorrt_llm"):
        core.scheduler.check(make_request([1], 4, **values))
    core.scheduler.check(make_request([1], 4, temperature=1.0, top_p=0.9, top_k=1024))


def test_penalties_are_taken_where_the_bindings_can_keep_them(pair: Pair) -> None:
    info = engines.describe(pair.config(prompt_ignore_length=True))
    assert info.supports(make_request([1], 4, frequency_penalty=0.5)) is None


def test_a_capability_that_the_bindings_lack_fails_at_start(pair: Pair) -> None:
    with pytest.raises(ValueError, match=r"prompt_ignore_length is true: .* set it to false"):
        engines.make_target_engine(pair.config(prompt_ignore_length=True))


def test_the_scheduling_process_imports_neither_bindings_nor_torch(pair: Pair) -> None:
    code = (
        "import sys; from specserve import engines; from specserve.config import load_config; "
        f"info = engines.describe(load_config(None, ['engine.name=tensorrt_llm', "
        f"'engine.dir={pair.folder}', 'scheduler.max_num_seqs=16'])); "
        "assert not info.verifies_sampled; assert 'torch' not in sys.modules; "
        "assert 'tensorrt_llm' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_without_tensorrt_llm_the_start_fails_with_the_fix(tmp_path: Path) -> None:
    pair = Pair(tmp_path)
    with pytest.raises(
        ValueError, match=r"cannot be imported .* run in an image with TensorRT-LLM"
    ):
        engines.make_target_engine(pair.config())


@pytest.mark.parametrize(
    ("compiled", "options", "text"),
    [
        ({}, {"policy": PolicyConfig(max_draft_tokens=9)}, "policy.max_draft_tokens is 9"),
        ({}, {"max_num_seqs": 17}, "scheduler.max_num_seqs is 17: .* for 16"),
        ({}, {"mode": "chief"}, "tensorrt_llm.mode is 'chief'"),
        ({}, {"draft_stop": "soon"}, "tensorrt_llm.draft_stop is 'soon'"),
        ({"tp_size": 2}, {"draft_stop": "step"}, "needs a draft on one GPU"),
        ({}, {"mode": "orchestrator", "draft_stop": "step"}, "needs a draft on one GPU"),
        ({"tp_size": 2}, {"target_devices": (0,)}, "target_devices names 1 GPUs: .* for 2"),
    ],
)
def test_a_configuration_that_the_engines_cannot_keep_fails_at_start(
    tmp_path: Path, compiled: dict[str, Any], options: dict[str, Any], text: str
) -> None:
    with pytest.raises(ValueError, match=text):
        engines.describe(Pair(tmp_path, **compiled).config(**options))


def test_a_pair_of_another_engine_fails_at_start(demo_engines: Path) -> None:
    config = Config()
    config = replace(config, engine=replace(config.engine, name="tensorrt_llm"))
    with pytest.raises(ValueError, match="built for openvino: build a pair with"):
        engines.describe(config)


# -- length limits -----------------------------------------------------------------------------


def test_requests_up_to_the_limit_never_exceed_an_engine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = install(Pair(tmp_path, max_input_len=40), monkeypatch)
    pair.target.max_input_len = pair.draft.max_input_len = 40
    core = make_core(pair, PolicyConfig(name="fixed", num_draft_tokens=8))
    limit = core.scheduler.config.max_seq_len
    assert limit == 41
    request = make_request([1, 2, 3], limit - 3)
    assert drive(core, [request]) == [plain(pair, request)]
    sizes = [
        len(call.input_token_ids) + len(draft.tokens)
        for call in pair.target.requests
        if (draft := call.external_draft_tokens_config)
    ]
    assert max(sizes) == 40
    with pytest.raises(ValueError, match="exceeds the limit of 41"):
        core.scheduler.check(make_request([1, 2, 3], limit - 2))


def test_without_chunked_context_a_prompt_must_fit_one_pass(tmp_path: Path) -> None:
    pair = Pair(tmp_path, max_num_tokens=256)
    assert engines.describe(pair.config()).max_seq_len > 257
    assert engines.describe(pair.config(chunked_context=False)).max_seq_len == 257


def test_a_draft_beyond_the_engines_limits_is_cut_and_a_row_beyond_them_fails(pair: Pair) -> None:
    target = engines.make_target_engine(pair.config())
    pair.target.max_draft_len, pair.target.max_input_len = MAX_DRAFT_LEN, 512
    long_draft = plain_decode(pair.model, [1, 2], 12, SamplingParams())
    rows = [Row(1, 0, [1, 2], True, [], 2), Row(2, 0, [3] * 513, True, [], 513)]
    cut, failed = target.verify(Batch(rows), [long_draft, []])
    assert cut.output_token_ids == long_draft[:9]
    assert failed.failed


# -- prompts -----------------------------------------------------------------------------------


def test_an_incomplete_prompt_is_only_remembered_and_goes_out_whole(pair: Pair) -> None:
    core = make_core(pair, prefill_chunk_tokens=4)
    core.scheduler.submit(make_request(list(range(10)), 2))
    core.step()
    core.step()
    assert not pair.target.requests
    assert core.target_engine.num_computed_tokens == 0  # type: ignore[attr-defined]
    core.step()
    assert [call.input_token_ids for call in pair.target.requests] == [list(range(10))]
    assert core.target_engine.num_computed_tokens == 10  # type: ignore[attr-defined]


def test_chunks_are_computed_as_they_come_where_that_is_wanted(pair: Pair) -> None:
    core = make_core(pair, prefill_chunk_tokens=4, sends_chunks=True)
    request = make_request(list(range(10)), 8)
    core.scheduler.submit(request)
    counts = []
    for _ in range(3):
        core.step()
        counts.append(core.target_engine.num_computed_tokens)  # type: ignore[attr-defined]
    assert counts == [4, 4, 2]
    assert [len(call.input_token_ids) for call in pair.target.requests] == [4, 8, 10]
    drive(core, [])
    assert request.token_ids[10:] == plain(pair, request)


# -- what the executor is told -----------------------------------------------------------------


def test_the_executor_reuses_blocks_and_keeps_those_of_running_requests(pair: Pair) -> None:
    core = make_core(pair)
    drive(core, [make_request([1, 2], 9)])
    for engine in (pair.draft, pair.target):
        (executor,) = engine.executors
        config = executor.config
        assert config.kv_cache_config.enable_block_reuse
        assert config.kv_cache_config.enable_partial_reuse
        assert config.kv_cache_config.max_tokens == 2048 + 16 * BLOCK_SIZE
        assert config.kv_cache_config.free_gpu_memory_fraction is None
        assert config.enable_chunked_context
        assert not config.normalize_log_probs
        assert config.parallel_config is None
        for call in engine.requests:
            assert call.output_config.exclude_input_from_output
            kept = call.kv_cache_retention_config
            (prompt,) = kept.token_range_retention_configs
            assert (prompt.token_start, prompt.token_end) == (0, None)
            assert 35 < prompt.priority == kept.decode_retention_priority <= 100
            assert prompt.duration_ms == kept.decode_duration_ms == timedelta(seconds=10)
    for call in pair.draft.requests:
        assert call.sampling_config.top_k == 1, "drafts are deterministic"


def test_cached_tokens_are_not_counted_as_computed(pair: Pair) -> None:
    core = make_core(pair, PolicyConfig(name="fixed", num_draft_tokens=3))
    core.scheduler.submit(make_request([1, 2, 3], 40))
    counts = []
    for _ in range(6):
        core.step()
        counts.append(core.target_engine.num_computed_tokens)  # type: ignore[attr-defined]
    assert counts == [3, 4, 4, 4, 4, 4]


def test_blocks_that_were_evicted_show_in_what_the_policy_learns_from(pair: Pair) -> None:
    core = make_core(pair, "specserve")
    core.scheduler.submit(make_request([1] * 30, 40))
    seen = []
    observe = core.policy.step_time.observe_verify  # type: ignore[attr-defined]

    def spy(num_tokens: int, predicted_s: float, measured_s: float) -> None:
        seen.append(num_tokens)
        observe(num_tokens, predicted_s, measured_s)

    core.policy.step_time.observe_verify = spy  # type: ignore[attr-defined]
    for _ in range(4):
        core.step()
    pair.target.executors[0]._cached.clear()
    core.step()
    assert max(seen[:-1]) <= 1 + MAX_DRAFT_LEN
    assert seen[-1] > 30


def test_the_engines_can_be_profiled(pair: Pair) -> None:
    config = pair.config(kv_cache_tokens=8192)
    info = engines.describe(config)
    draft, target = engines.make_draft_engine(config), engines.make_target_engine(config)
    effort = Effort(num_rounds=1, num_rows=4, context_tokens=(16,))
    profile = measure(draft, target, info, {}, effort)
    assert {sample.num_tokens for sample in profile.verify} >= {1, 32}
    assert all(sample.seconds > 0 for sample in (*profile.verify, *profile.draft))


def test_orchestrator_mode_starts_ranks_on_the_gpus_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = install(Pair(tmp_path, tp_size=2), monkeypatch)
    config = pair.config(
        mode="orchestrator", worker="/opt/worker", target_devices=(2, 3), draft_devices=(0, 1)
    )
    engines.make_target_engine(config)
    engines.make_draft_engine(config)
    for engine, devices in ((pair.target, [2, 3]), (pair.draft, [0, 1])):
        parallel = engine.executors[0].config.parallel_config
        assert parallel.communication_mode.name == "ORCHESTRATOR"
        assert parallel.device_ids == devices
        assert parallel.orchestrator_config.worker_executable_path == "/opt/worker"
        assert engine.executors[0].config.logits_post_processor_config is None, (
            "ranks in other processes cannot call back"
        )


def test_leader_mode_names_its_gpus_to_ranks_that_are_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = install(Pair(tmp_path, tp_size=2), monkeypatch)
    engines.make_target_engine(pair.config(target_devices=(2, 3)))
    parallel = pair.target.executors[0].config.parallel_config
    assert parallel.communication_mode.name == "LEADER"
    assert parallel.device_ids == [2, 3]
    assert parallel.orchestrator_config is None


# -- errors, time, shutdown --------------------------------------------------------------------


def test_a_request_that_the_executor_refuses_fails_alone(pair: Pair) -> None:
    core = make_core(pair)
    requests = [make_request([i, 2], 12) for i in range(4)]
    pair.target.refuses = lambda call: "no" if call.input_token_ids[0] == 2 else ""
    drive(core, requests)
    reasons = [request.finish_reason for request in requests]
    assert reasons == [FinishReason.LENGTH] * 2 + [FinishReason.ERROR, FinishReason.LENGTH]
    for request in requests[:2] + requests[3:]:
        assert request.token_ids[2:] == plain(pair, request)


def test_an_executor_that_refuses_everything_is_lost(pair: Pair) -> None:
    target = engines.make_target_engine(pair.config())
    pair.target.refuses = lambda call: "broken"
    row = Row(1, 0, [1, 2], True, [], 2)
    assert [target.verify(Batch([row]), [[]]) for _ in range(2)] == [[Verified(failed=True)]] * 2
    with pytest.raises(EngineLost, match="fails at every request"):
        target.verify(Batch([row]), [[]])


@pytest.mark.parametrize("fault", ["is_dead", "is_silent"])
def test_a_target_without_answers_is_lost_and_what_runs_is_cancelled(
    pair: Pair, fault: str
) -> None:
    config = pair.config()
    config = replace(config, server=replace(config.server, target_timeout_s=0.05))
    target = engines.make_target_engine(config)
    rows = [Row(key, 0, [key, 2], True, [], 2) for key in (1, 2)]
    setattr(pair.target, fault, True)
    with pytest.raises(EngineLost, match="try again"):
        target.verify(Batch(rows), [[], []])
    (executor,) = pair.target.executors
    assert max(executor.timeouts) <= timedelta(seconds=0.05)
    assert executor.cancelled == ([1, 2] if fault == "is_silent" else [])


def test_answers_of_a_wave_that_was_given_up_are_not_taken_for_others(pair: Pair) -> None:
    config = pair.config()
    config = replace(config, server=replace(config.server, target_timeout_s=0.02))
    target = engines.make_target_engine(config)
    pair.target.is_silent = True
    pair.target.executors[0].cancel_request = lambda id: None  # too late to be heeded
    with pytest.raises(EngineLost):
        target.verify(Batch([Row(1, 0, [1, 2], True, [], 2)]), [[]])
    pair.target.is_silent = False
    (output,) = target.verify(Batch([Row(2, 0, [4, 5], True, [], 2)]), [[]])
    assert output.output_token_ids == plain_decode(pair.model, [4, 5], 1, SamplingParams())


def test_a_draft_that_fails_costs_nobody_a_token_and_comes_back(pair: Pair) -> None:
    core = make_core(pair)
    core.draft_engine._retry_s = core.draft_engine._wait_s = 0.05
    requests = [make_request([i, 2], 40) for i in range(3)]
    for request in requests:
        core.scheduler.submit(request)
    for _ in range(3):
        core.step()
    pair.draft.refuses = lambda call: "no memory"
    core.step()
    pair.draft.refuses = lambda call: ""
    while core.scheduler.has_work:
        core.step()
    assert core.draft_engine.num_failures == 1
    assert [r.token_ids[2:] for r in requests] == [plain(pair, request) for request in requests]
    check_contexts(pair, requests)


def test_an_error_in_the_post_processor_is_the_draft_engines(pair: Pair) -> None:
    class Broken:
        def start(self) -> Any:
            return self

        def begins(self) -> Any:
            return np.ones(1, dtype=bool)

        def goes_on(self, rows: Any, confidences: Any) -> Any:
            raise ZeroDivisionError("in the executor's thread")

    draft = engines.make_draft_engine(pair.config(draft_stop="step"))
    row = Row(1, 0, [], True, [], 2, max_draft_tokens=2, catch_up_token_ids=[1, 2])
    with pytest.raises(ZeroDivisionError, match="executor's thread"):
        draft.draft(Batch([row], Broken()))  # type: ignore[arg-type]


def test_a_new_engine_never_guesses_the_tokens_it_has_not_seen(pair: Pair) -> None:
    target = engines.make_target_engine(pair.config())
    known = Row(1, 0, [1, 2], True, [], 2)
    lost = Row(2, 5, [7], True, [], 3)
    outputs = target.verify(Batch([known, lost]), [[], []])
    assert [output.failed for output in outputs] == [False, True]
    assert [call.input_token_ids for call in pair.target.requests] == [[1, 2]]
    draft = engines.make_draft_engine(pair.config())
    row = Row(2, 0, [], True, [], 3, max_draft_tokens=2, catch_up_token_ids=[7])
    row.num_draft_computed_tokens = 5
    assert draft.draft(Batch([row]))[0].token_ids == []
    assert not pair.draft.requests


def test_shutting_down_cancels_what_runs_and_ends_the_executor_once(pair: Pair) -> None:
    core = make_core(pair)
    drive(core, [make_request([1, 2], 5)])
    finish(core)
    finish(core)
    for engine in (pair.draft, pair.target):
        assert engine.executors[0].is_shut_down
    with pytest.raises(EngineLost, match="takes no requests"):
        core.target_engine.verify(Batch([Row(1, 0, [1], True, [], 1)]), [[]])


# -- behind Triton's two models ----------------------------------------------------------------


class Models:
    """The `draft` and `target` models without Triton: decode, run, encode."""

    def __init__(self, pair: Pair, config: Config) -> None:
        self.pair, self.config = pair, config
        self.load()

    def load(self) -> None:
        self.draft = engines.make_draft_engine(self.config)
        self.target = engines.make_target_engine(self.config)
        self.decode = wire.VerifyDecoder()

    def __call__(self, model: str, arrays: wire.Arrays) -> wire.Arrays:
        if model == "draft":
            self.draft.release(wire.decode_released(arrays))
            outputs = wire.encode_drafts(self.draft.draft(wire.decode_draft_request(arrays)))
        else:
            batch, chosen, released = self.decode(arrays)
            self.target.release(released)
            verified = self.target.verify(batch, chosen)
            outputs = wire.encode_verified(verified, self.target.num_computed_tokens)  # type: ignore[attr-defined]
        return {**outputs, "engine_s": np.array([0.0], dtype=np.float32)}


def test_conversations_over_the_wire_are_plain_decodings_and_leave_nothing(pair: Pair) -> None:
    config = pair.config("specserve", kv_cache_tokens=12 * BLOCK_SIZE, max_num_seqs=4)
    models = Models(pair, config)
    core = assemble(
        config,
        draft_engine=TritonDraftEngine(models),
        target_engine=TritonTargetEngine(models),
        policy=new_policy(config.policy),
    )
    requests = [make_request([i, 5, 9], 40) for i in range(5)]
    requests += [make_request([i, 6], 20, temperature=0.8, seed=i) for i in range(2)]
    outputs = drive(core, requests)
    assert outputs[:5] == [plain(pair, request) for request in requests[:5]]
    assert core.scheduler.num_preemptions > 0
    assert core.draft_engine.num_failures == 0
    check_contexts(pair, requests)
    last = make_request([11, 5], 9)
    last.num_draft_tokens = 2  # a draft call: the next one tells what has ended
    drive(core, [last])
    assert len(models.draft._sequences) <= 1  # type: ignore[attr-defined]
    assert len(models.target._sequences) <= 1  # type: ignore[attr-defined]


def test_a_target_loaded_anew_fails_the_rows_it_does_not_know_over_the_wire(pair: Pair) -> None:
    models = Models(pair, pair.config())
    target = TritonTargetEngine(models)
    target.verify(Batch([Row(1, 0, [1, 2], True, [], 2)]), [[]])
    models.target = engines.make_target_engine(models.config)  # but the decoder has the parameters
    rows = [Row(1, 2, [5], True, [], 2), Row(2, 0, [3, 4], True, [], 2)]
    outputs = target.verify(Batch(rows), [[], []])
    assert [output.failed for output in outputs] == [True, False]
