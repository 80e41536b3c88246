"""The OpenVINO engine's own limits; what every paged engine does is in `test_paged_engines.py`."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from specserve.config import Config
from specserve.engines import describe
from specserve.engines.paged_model import FlatBatch, Span
from specserve.text import load_tokenizer

pytestmark = pytest.mark.openvino
ov = pytest.importorskip("openvino")
ops = pytest.importorskip("openvino.opset13")
openvino = pytest.importorskip("specserve.engines.openvino")


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("precision", "int3", r"engine\.precision is 'int3': openvino supports f32"),
        ("block_size", 16, r"engine\.block_size is 16: openvino needs 32"),
        ("unpacked_from", -1, r"engine\.unpacked_from is -1: must be at least 0"),
    ],
)
def test_what_the_engine_cannot_do_is_refused(
    demo_engines: Path, name: str, value: object, message: str
) -> None:
    from specserve.engines.openvino import make_target

    config = Config()
    config = replace(config, engine=replace(config.engine, **{name: value}))
    with pytest.raises(ValueError, match=message):
        make_target(config)


def test_the_demo_pair_describes_itself(demo_engines: Path) -> None:
    info = describe(Config())
    assert info.num_blocks * info.block_size == Config().scheduler.kv_cache_tokens
    assert info.vocab_size == load_tokenizer(demo_engines / "target").get_vocab_size()


@pytest.mark.parametrize("first", [1, 2, 8])
def test_a_copy_of_the_weights_changes_no_answer(demo_engines: Path, first: int) -> None:
    """Some passes below use the copy and some do not, all on one KV cache."""
    from specserve.engines.openvino import OpenVINOModel

    answers = []
    for unpacked_from in (0, first):
        folder = demo_engines / "target"
        model = OpenVINOModel(folder, num_blocks=4, unpacked_from=unpacked_from)
        logits, start = [], 0
        for length in (40, 1, 2, 5, 8, 1):
            span = Span([7 + start + i for i in range(length)], start, [2, 0, 1])
            logits.append(model.forward(FlatBatch.pack([span]), np.arange(length)).copy())
            start += length
        answers.append(np.concatenate(logits))
    np.testing.assert_allclose(answers[0], answers[1], atol=1e-3)


def test_logits_of_some_tokens_are_those_of_all(demo_engines: Path) -> None:
    """The others end at the last attention; what later passes read of them is there."""
    from specserve.engines.openvino import OpenVINOModel

    def logits(rows_of: list[list[int]]) -> list[NDArray[np.float32]]:
        model = OpenVINOModel(demo_engines / "target", num_blocks=4)
        answers = []
        for i, rows in enumerate(rows_of):
            spans = [Span(list(range(7, 27)), 20 * i, [2, 0]), Span([9, 8, 7], 3 * i, [1])]
            answers.append(model.forward(FlatBatch.pack(spans), np.array(rows, dtype=int)).copy())
        return answers

    everything = list(range(23))
    full = logits([everything, everything])
    some = logits([[], [3, 19, 22]])
    assert some[0].shape == (0, full[0].shape[1])
    np.testing.assert_allclose(some[1], full[1][[3, 19, 22]], atol=1e-4)


def test_a_small_pass_in_the_shape_of_the_last_one_gives_the_same_answers(
    demo_engines: Path,
) -> None:
    from specserve.engines.openvino import OpenVINOModel

    folder, num_blocks = demo_engines / "target", 4
    padded = OpenVINOModel(folder, num_blocks=num_blocks, num_free_tokens=6)
    exact = OpenVINOModel(folder, num_blocks=num_blocks)
    start, sizes = 0, []
    for length in (40, 3, 6, 2, 5, 1, 7, 1):
        span = Span([7 + start + i for i in range(length)], start, [3, 0, 1])
        batch, rows = FlatBatch.pack([span]), np.arange(length)
        np.testing.assert_allclose(
            padded.forward(batch, rows), exact.forward(batch, rows), atol=1e-3
        )
        sizes.append(padded._small.get_tensor("input_ids").shape[0])
        start += length
    assert sizes == [40, 3, 6, 6, 6, 6, 7, 1]


def graph(*, has_more: bool) -> Any:
    """Make attention (a sigmoid), a residual, a product, and perhaps what else knows tokens."""
    tokens, extra = (ops.parameter([-1, 4], np.float32) for _ in range(2))
    tokens.output(0).set_names({"tokens"})
    extra.output(0).set_names({"extra"})
    weight = ops.constant(np.eye(4, dtype=np.float32))
    added = ops.add(tokens, ops.matmul(ops.sigmoid(tokens), weight, False, False))
    head = ops.matmul(ops.multiply(added, extra) if has_more else added, weight, False, False)
    head.output(0).set_names({"logits"})
    return ov.Model([head], [tokens, extra] if has_more else [tokens])


@pytest.mark.parametrize(("has_more", "num_gathers"), [(False, 2), (True, 1)])
def test_what_nobody_asks_for_is_not_computed_where_that_is_sure(
    monkeypatch: pytest.MonkeyPatch, has_more: bool, num_gathers: int
) -> None:
    monkeypatch.setattr(openvino, "ATTENTION", "Sigmoid")
    model = graph(has_more=has_more)
    openvino._compute_only(model, "logit_rows")
    names = [node.get_type_name() for node in model.get_ordered_ops()]
    assert names.count("Gather") == num_gathers
    rng = np.random.default_rng(0)
    inputs = {p.get_any_name(): rng.random((5, 4), dtype=np.float32) for p in model.inputs[:-1]}
    x, extra = inputs["tokens"], inputs.get("extra", 1.0)
    rows = np.array([4, 1])
    compiled = openvino.core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    result = compiled({**inputs, "logit_rows": rows})[0]
    np.testing.assert_allclose(result, ((x + 1 / (1 + np.exp(-x))) * extra)[rows], rtol=1e-5)


def test_a_signal_after_two_engines_have_gone_ends_nothing(demo_engines: Path) -> None:
    """Each had a Core of its own, and the signal stack of one that was gone: SIGSEGV."""
    code = f"""
import gc, os, signal
from pathlib import Path
from specserve.engines.openvino import OpenVINOModel
signal.signal(signal.SIGTERM, lambda *_: print("handled"))
folder = Path({str(demo_engines / "draft")!r})
first = OpenVINOModel(folder, num_blocks=4)
second = OpenVINOModel(folder, num_blocks=4)
del first
gc.collect()
del second
gc.collect()
os.kill(os.getpid(), signal.SIGTERM)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "handled\n")
