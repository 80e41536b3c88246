"""The OpenVINO engine's own limits; what every paged engine does is in `test_paged_engines.py`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from specserve.config import Config
from specserve.engines import describe
from specserve.text import load_tokenizer

pytestmark = pytest.mark.openvino
pytest.importorskip("openvino")


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("precision", "int3", r"engine\.precision is 'int3': openvino supports f32"),
        ("block_size", 16, r"engine\.block_size is 16: openvino needs 32"),
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
