"""The torch engine's own parts: model families, the loop and the draws on the device, refusals.

What every paged engine must do is in `test_paged_engines.py`. On a machine with a GPU these tests
run there, and capture graphs where they ask for sizes; on a CPU passes are only padded to them.
"""

from __future__ import annotations

import ast
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import pytest
from scipy import stats

pytestmark = pytest.mark.torch
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from conftest import drive, make_core, make_request, new_policy  # noqa: E402

import specserve  # noqa: E402
from specserve.batch import Batch, Row  # noqa: E402
from specserve.config import CHECKPOINTS, PolicyConfig, load_config  # noqa: E402
from specserve.engines import ENGINES, make_target_engine  # noqa: E402
from specserve.engines.captured_sizes import captured_sizes  # noqa: E402
from specserve.engines.model_draft import ModelDraftEngine  # noqa: E402
from specserve.engines.model_target import ModelTargetEngine  # noqa: E402
from specserve.engines.paged_model import FlatBatch, Span  # noqa: E402
from specserve.engines.sampler import HostSampler  # noqa: E402
from specserve.engines.torch import captured, sampling  # noqa: E402
from specserve.engines.torch.captured import WARM_UPS, Captured  # noqa: E402
from specserve.engines.torch.draft import TorchDraftEngine  # noqa: E402
from specserve.engines.torch.model import TorchModel  # noqa: E402
from specserve.engines.torch.sampler import DeviceSampler  # noqa: E402
from specserve.engines.torch.stoppers import CapStopper  # noqa: E402
from specserve.policies import POLICIES  # noqa: E402
from specserve.sampling_params import SamplingParams  # noqa: E402
from specserve.stop_rules import SurvivalRule  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
VOCAB_SIZE = 64
TINY = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 256,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
GROUPED = {**TINY, "num_key_value_heads": 2, "head_dim": 8}
WINDOW = {"sliding_window": 7}
FAMILIES = {
    "llama": GROUPED,
    "qwen2": {**GROUPED, **WINDOW, "use_sliding_window": True, "max_window_layers": 1},
    "qwen3": GROUPED,
    "mistral": {**GROUPED, **WINDOW},
    "gpt_neox": TINY,
    "gpt2": {**TINY, "n_inner": 48},
    "gemma2": {**GROUPED, **WINDOW, "query_pre_attn_scalar": 8, "final_logit_softcapping": 2.0},
    "gemma3_text": {**GROUPED, **WINDOW, "query_pre_attn_scalar": 8, "sliding_window_pattern": 2},
}
REFUSED = {
    "llama": {**GROUPED, "rope_parameters": {"rope_type": "dynamic", "factor": 2.0}},
    "bloom": {"vocab_size": VOCAB_SIZE, "hidden_size": 32, "n_layer": 1, "n_head": 4},
    "gpt_oss": {**GROUPED, "num_local_experts": 2, "num_experts_per_tok": 1},
}


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Any:
    """Models this small only wait for each other's threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Save random models, each once, with weights large enough to have opinions."""

    @functools.cache
    def save(family: str, seed: int = 0, shapes: str = "FAMILIES") -> Path:
        config = transformers.AutoConfig.for_model(family, **globals()[shapes][family])
        torch.manual_seed(seed)
        model = transformers.AutoModelForCausalLM.from_config(config)
        for weight in model.parameters():
            weight.data += 0.2 * torch.randn_like(weight)
        folder = tmp_path_factory.mktemp(family)
        model.save_pretrained(folder)
        return folder

    return save


def load(folder: Path, **options: Any) -> TorchModel:
    options = {"num_blocks": 64, "block_size": 4, "max_seq_len": 256, "device": DEVICE, **options}
    return TorchModel(folder, **options)


def random_text(length: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(0, VOCAB_SIZE, length).tolist()


def one_shot(model: TorchModel, token_ids: Sequence[int]) -> np.ndarray:
    batch = FlatBatch.pack([Span(token_ids, 0, range(40, 64))])
    return model.forward(batch, np.arange(len(token_ids)))


# -- model families ----------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_transformers(family: str, checkpoint: Any) -> None:
    """Chunks, a rollback and a ragged batch, past the window of those that have one."""
    folder = checkpoint(family)
    model = load(folder)
    reference = transformers.AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="eager"
    ).eval()
    texts = [random_text(n, seed) for seed, n in enumerate((30, 17, 1))]
    tables = [list(range(8)), list(range(15, 9, -1)), [20]]
    model.forward(FlatBatch.pack([Span(texts[0][:9], 0, tables[0])]), np.arange(0))
    wrong = Span(random_text(6, 9), 5, tables[1])
    model.forward(
        FlatBatch.pack([Span(texts[1][:5], 0, tables[1]), Span([3], 40, range(30, 41))]),
        np.arange(0),
    )
    model.forward(FlatBatch.pack([wrong]), np.arange(0))
    spans = [Span(t[n:], n, b) for t, n, b in zip(texts, (9, 5, 0), tables, strict=True)]
    logits = model.forward(FlatBatch.pack(spans), np.arange(21 + 12 + 1))
    with torch.no_grad():
        expected = [
            reference(torch.tensor([text])).logits[0, start:].numpy()
            for text, start in zip(texts, (9, 5, 0), strict=True)
        ]
    np.testing.assert_allclose(logits, np.concatenate(expected), atol=1e-4)


@pytest.mark.parametrize(
    ("family", "message"),
    [
        ("llama", "rope_type is dynamic"),
        ("bloom", "BloomForCausalLM has an attention of its own"),
        ("gpt_oss", "GptOssAttention uses s_aux"),
    ],
)
def test_a_model_that_cannot_be_served_is_refused(
    family: str, message: str, checkpoint: Any
) -> None:
    with pytest.raises(ValueError, match=message):
        load(checkpoint(family, shapes="REFUSED"))


# -- padding, windows, compiled layers ---------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"sizes": (1, 4, 64), "max_tokens": 64},
        {"max_tokens": 8},
        {"sizes": (3, 8), "max_tokens": 8},
        {"compiler": "eager"},
    ],
    ids=["padded", "in several passes", "padded, in several passes", "compiled layers"],
)
@pytest.mark.slow
def test_how_a_pass_runs_does_not_change_its_logits(
    options: dict[str, Any], checkpoint: Any
) -> None:
    folder = checkpoint("mistral")
    spans = [
        Span(random_text(n, n), 0, range(8 * i, 8 * i + 8)) for i, n in enumerate((21, 1, 9, 2))
    ]
    batch, tokens = FlatBatch.pack(spans), np.array([0, 5, 20, 21, 22, 30, 32])
    expected = load(folder).forward(batch, tokens)
    np.testing.assert_allclose(load(folder, **options).forward(batch, tokens), expected, atol=1e-5)


def test_half_precision_is_close(checkpoint: Any) -> None:
    folder, text = checkpoint("llama"), random_text(40)
    exact = one_shot(load(folder), text)
    for dtype in (torch.bfloat16, torch.float16):
        model = load(folder, dtype=dtype)
        np.testing.assert_allclose(one_shot(model, text), exact, atol=0.03 * np.ptp(exact))


def test_sizes_rise_to_the_largest_step() -> None:
    for max_tokens in (1, 7, 64, 512, 700, 2048):
        sizes = captured_sizes(max_tokens)
        assert list(sizes) == sorted(set(sizes))
        assert sizes[-1] == max_tokens
        padded = [Captured(print, sizes, torch.device("cpu")).padded(n) for n in sizes]
        assert padded == list(sizes)


# -- the draft loop ----------------------------------------------------------------------------


class DeviceNoise:
    """The torch engine's noise, for the engines that draw on the host."""

    def rows(self, seed: int, start: int, stop: int) -> np.ndarray:
        """Return what `specserve.sampling.Noise` would, from the other generator."""
        seeds = torch.from_numpy(np.full(stop - start, seed, dtype=np.uint64).view(np.int64))
        return sampling.exponential(seeds, torch.arange(start, stop), VOCAB_SIZE).numpy()


def draft_batch(rule: Any = None, **params: Any) -> Batch:
    """Rows that draft, that may not, and that catch up on little or much; the last may be drawn."""
    rows = []
    shapes = [(9, 3, 5), (6, 5, 0), (20, 0, 6), (4, 3, 1), (8, 7, 6)]
    for i, (known, seen, cap) in enumerate(shapes):
        text = random_text(known, i)
        row = Row(i, known - 1, text[-1:], True, list(range(8 * i, 8 * i + 8)))
        row.max_draft_tokens, row.num_draft_computed_tokens = cap, seen
        row.catch_up_token_ids = text[seen:]
        rows.append(row)
    if params:
        for row in rows[2:]:
            row.is_draft_sampled, row.num_prompt_tokens = True, 3
            row.sampling = SamplingParams(seed=row.key, **params)
    return Batch(rows, rule)


def plan_rule(policy: PolicyConfig | str) -> Any:
    """Return the rule that a policy makes for the rows above."""
    return new_policy(policy).plan(draft_batch().rows).stop_rule


@pytest.mark.parametrize("sizes", [(), (2, 8, 32)], ids=["as they are", "padded"])
@pytest.mark.parametrize(
    ("policy", "params"),
    [
        ("fixed", {}),
        ("adaptive", {}),
        ("specserve", {}),
        ("threshold", {}),
        ("adaspec_repaired", {}),
        ("fixed", {"temperature": 1.0}),
        ("specserve", {"temperature": 0.8, "top_k": 20, "top_p": 0.9}),
    ],
)
def test_the_loop_on_the_device_drafts_what_the_host_would(
    policy: str, params: dict[str, Any], sizes: tuple[int, ...], checkpoint: Any
) -> None:
    folder = checkpoint("llama")
    batch = draft_batch(plan_rule(policy), **params)
    host = ModelDraftEngine(load(folder))
    host._noise = DeviceNoise()
    expected = host.draft(batch)
    model = load(folder, sizes=sizes, max_tokens=32)
    engine = TorchDraftEngine(model, max_draft_tokens=6, max_rows=8)
    for _ in range(2):  # nothing of the first step remains in the second
        drafts = engine.draft(batch)
        assert [d.token_ids for d in drafts] == [d.token_ids for d in expected]
        for draft, other in zip(drafts, expected, strict=True):
            assert draft.confidences == pytest.approx(other.confidences, rel=1e-4)


def test_drafting_ends_with_the_last_row(checkpoint: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rule that stops everybody at once costs one forward, not as many as the longest cap."""
    passes, run = [], TorchModel._run
    monkeypatch.setattr(TorchModel, "_run", lambda model, n: (passes.append(n), run(model, n)))
    engine = TorchDraftEngine(load(checkpoint("llama")), max_draft_tokens=6, max_rows=8)
    rule = SurvivalRule(np.array([-30.0, 0.0]), np.full(5, 0.5))
    assert [len(d.token_ids) for d in engine.draft(draft_batch(rule))] == [1, 0, 1, 1, 1]
    assert len(passes) == 1


def test_a_graph_is_captured_after_warm_ups(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("Stream", "current_stream", "stream", "graph", "CUDAGraph"):
        monkeypatch.setattr(torch.cuda, name, lambda *_, **__: MagicMock())
    done: list[int] = []
    work = Captured(done.append, (), torch.device("cpu"))
    work._graphs[4] = work._capture(4, None)
    assert done == [4] * (WARM_UPS + 1)
    work(4)
    assert work._graphs[4].replay.called
    assert len(done) == WARM_UPS + 1


def test_sizes_slower_than_a_larger_one_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = {512: 12.0, 448: 13.0, 384: 10.0, 320: 13.0, 256: 8.0, 240: 8.1, 1: 7.0}
    monkeypatch.setattr(captured, "_seconds", seconds.__getitem__)
    work = Captured(lambda _: None, sorted(seconds), torch.device("cpu"))
    work._graphs = {size: size for size in seconds}
    work.leave_out_slow()
    assert work.sizes == (1, 240, 256, 384, 512)
    assert work.padded(257) == 384


def test_a_pass_that_samples_nothing_is_waited_for(
    checkpoint: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A clock beside it would else see a launch, and take prompts for free."""
    waits: list[TorchModel] = []
    monkeypatch.setattr(TorchModel, "wait", lambda model: waits.append(model))
    model = load(checkpoint("llama"))
    engine, row = ModelTargetEngine(model, DeviceSampler(model)), sampling_row(0, {}, 0)
    row.samples = False
    engine.verify(Batch([row]), [[]])
    assert waits == [model]


def test_a_step_may_be_captured_between_two_drafts(checkpoint: Any) -> None:
    """Which runs it with nobody drafting, again and again, and must leave nothing behind."""
    model = load(checkpoint("llama"), sizes=(8, 32), max_tokens=32)
    engine, batch = TorchDraftEngine(model, max_draft_tokens=6, max_rows=8), draft_batch()
    expected = engine.draft(batch)
    for _ in range(20):
        engine._take(CapStopper(8, 6, model.device), 8)
    assert (model.inputs.positions[:8] == -1).all()
    assert engine.draft(batch) == expected


# -- the target's own tokens -------------------------------------------------------------------

SAMPLINGS = [
    {"temperature": 0.7},
    {"temperature": 1.0, "top_k": 5},
    {"temperature": 1.3, "top_p": 0.8},
    {"temperature": 0.9, "min_p": 0.1, "top_k": 9, "top_p": 0.9, "return_log_probs": True},
    {"return_log_probs": True},
    {"repetition_penalty": 1.4, "presence_penalty": 0.3, "frequency_penalty": 0.2},
    {"temperature": 1.0, "logit_bias": ((3, 2.0), (5, -np.inf), (3, 1.0)), "top_k": 20},
    {"min_tokens": 9, "end_id": 7, "logit_bias": ((7, 100.0),)},
    {"bad_words": ((5,), (3, 4)), "repetition_penalty": 0.7, "temperature": 1.0},
    {},
]


def test_the_device_says_what_the_host_says(checkpoint: Any) -> None:
    """Every parameter, in one batch and in turn, with drafts, after a few tokens of output."""
    model = load(checkpoint("llama"))
    host = HostSampler(model)
    host._noise = DeviceNoise()
    engines = [ModelTargetEngine(model, host), ModelTargetEngine(model, DeviceSampler(model))]
    rng = np.random.default_rng(0)
    for step in range(12):
        rows = [sampling_row(i, values, step) for i, values in enumerate(SAMPLINGS)]
        chosen = [rng.integers(0, 8, rng.integers(0, 4)).tolist() for _ in rows]
        expected, outputs = (engine.verify(Batch(rows), chosen) for engine in engines)
        assert [v.output_token_ids for v in outputs] == [v.output_token_ids for v in expected]
        for output, other in zip(outputs, expected, strict=True):
            assert output.log_probs == pytest.approx(other.log_probs, abs=1e-4)
        for engine in engines:
            engine.release([row.key for row in rows])


def test_noise_is_exponential_and_differs_with_seed_position_and_token() -> None:
    """The odds of a false alarm are 1e-4 for each of the tests."""
    seeds = torch.tensor([0, 1, 2, 2**63 - 1, -1] * 8)
    noise = sampling.exponential(seeds, torch.arange(8).repeat_interleave(5), 500).numpy()
    assert len(np.unique(noise)) == noise.size
    assert stats.kstest(noise.ravel(), "expon").pvalue > 1e-4
    for one, other in ((noise[:-5], noise[5:]), (noise[:, :-1], noise[:, 1:])):
        assert stats.spearmanr(one.ravel(), other.ravel()).pvalue > 1e-4


def sampling_row(key: int, values: dict[str, Any], seed: int) -> Row:
    """Make a row that has 6 prompt and 5 output tokens, all of them new to the engine."""
    params = SamplingParams(seed=seed, **values)
    text = np.random.default_rng([key, seed]).integers(0, 8, 11).tolist()
    return Row(key, 0, text, True, list(range(6 * key, 6 * key + 6)), 6, params)


# -- the whole loop ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pair(checkpoint: Any) -> tuple[TorchModel, TorchModel]:
    """A target, and a draft of the same weights, both padded."""
    options = {"sizes": (2, 8, 32), "max_tokens": 32}
    return load(checkpoint("mistral"), **options), load(checkpoint("mistral"), **options)


def generate(
    policy: PolicyConfig | str, models: tuple[TorchModel, TorchModel], **limits: int
) -> tuple[list[list[int]], Any]:
    """Continue eight prompts, half of them sampled."""
    core = make_core(
        policy,
        target_engine=ModelTargetEngine(models[0], DeviceSampler(models[0])),
        draft_engine=TorchDraftEngine(models[1], max_rows=8),
        max_num_batched_tokens=32,
        **{"num_blocks": 64, "max_num_seqs": 8, **limits},
    )
    requests = [
        make_request(random_text(5 + 3 * i, i), 12, temperature=0.8 * (i % 2), seed=i)
        for i in range(8)
    ]
    outputs = drive(core, requests)
    assert core.draft_engine.num_failures == 0
    return outputs, core


@pytest.fixture(scope="module")
def plain_outputs(checkpoint: Any) -> list[list[int]]:
    """One request at a time, without padding."""
    return generate("none", (load(checkpoint("mistral")),) * 2, max_num_seqs=1)[0]


@pytest.mark.parametrize("policy", [name for name in POLICIES if name != "none"])
def test_every_policy_writes_what_plain_decoding_writes(
    policy: str, pair: tuple[TorchModel, TorchModel], plain_outputs: list[list[int]]
) -> None:
    outputs, core = generate(policy, pair)
    assert core.stats.num_accepted_tokens > 0
    assert outputs == plain_outputs


def test_chunks_and_preemption_change_no_token(
    pair: tuple[TorchModel, TorchModel], plain_outputs: list[list[int]]
) -> None:
    policy = PolicyConfig(name="fixed", num_draft_tokens=2)
    outputs, core = generate(policy, pair, num_blocks=11, prefill_chunk_tokens=7)
    assert core.scheduler.num_preemptions > 0
    assert outputs == plain_outputs


# -- configuration -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("engine.precision=int3", "'int3': torch supports f32, bf16, f16"),
        ("scheduler.max_num_batched_tokens=40", "is 40: torch needs 64"),
        ("engine.device=tpu", "'tpu': known are cpu, cuda"),
        (f"engine.dir={CHECKPOINTS / 'openvino'}", "built for openvino"),
        pytest.param(
            "engine.device=cuda", "no CUDA GPU",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is one"),
        ),
    ],
)  # fmt: skip
def test_what_the_engine_cannot_do_is_refused(override: str, message: str) -> None:
    config = load_config(None, ["engine.name=torch", override])
    with pytest.raises(ValueError, match=message):
        make_target_engine(config)


def test_nothing_imports_torch_but_engines_that_need_it() -> None:
    root = Path(specserve.__file__).parent
    found = {
        path.relative_to(root).parts[:2]
        for path in root.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        for name in imported(node)
        if name.split(".")[0] in ("torch", "transformers") or name.startswith(ENGINES["torch"])
    }
    assert found == {("engines", "torch"), ("engines", "tensorrt_llm")}


def imported(node: ast.AST) -> list[str]:
    if isinstance(node, ast.ImportFrom):
        return [node.module or ""]
    return [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
