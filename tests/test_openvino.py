"""The OpenVINO engine's own limits; what every paged engine does is in `test_paged_engines.py`."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from specserve.config import Config
from specserve.engines import describe
from specserve.engines.paged_model import FlatBatch, Span
from specserve.text import load_tokenizer

pytestmark = pytest.mark.openvino
pytest.importorskip("openvino")


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
