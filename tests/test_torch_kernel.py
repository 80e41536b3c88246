"""The kernels of GPUs: a GPU runs them, or Triton's interpreter; its compiler compiles them.

The reference of attention is what the engine does on a CPU; `test_torch.py` holds that against
transformers.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Executor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytestmark = pytest.mark.torch
torch = pytest.importorskip("torch")
triton = pytest.importorskip("triton")
pytest.importorskip("transformers")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from specserve.engines.paged_model import FlatBatch, Span  # noqa: E402
from specserve.engines.torch import kernel, value_kernel  # noqa: E402
from specserve.engines.torch.attention import attend_plainly  # noqa: E402
from specserve.engines.torch.inputs import Inputs, Layout  # noqa: E402

CPU = torch.device("cpu")
BLOCK_SIZE, NUM_BLOCKS, NUM_TOKENS = 8, 40, 12


def attend(num_splits: int, arrays: Sequence[np.ndarray], *options: Any) -> np.ndarray:
    """Run the kernel, in that process."""
    kernel._num_splits = lambda *_: num_splits
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    query, keys, values = (torch.from_numpy(array).to(device) for array in arrays)
    group_size = kernel.queries_per_program(query.shape[1] // keys.shape[2])
    return kernel.attend(query, keys, values, layout(group_size, device), *options).cpu().numpy()


def layout(group_size: int, device: torch.device = CPU) -> Layout:
    """Lay out a chunk across a tile's border, a single token, a new prompt, and two of padding."""
    blocks = np.random.default_rng(0).permutation(NUM_BLOCKS).tolist()
    spans = [
        Span(range(7), 60, blocks[:12]),
        Span(range(1), 94, blocks[12:24]),
        Span(range(2), 0, blocks[24:25]),
    ]
    batch, inputs = FlatBatch.pack(spans), Inputs(NUM_TOKENS, 12, device)
    inputs.load_tables(batch)
    inputs.load_tokens(
        batch, 0, 10, num_padded=NUM_TOKENS, group_size=group_size, wanted=np.arange(0)
    )
    return inputs.layout(NUM_TOKENS, BLOCK_SIZE, NUM_BLOCKS - 1)


@pytest.mark.parametrize("num_splits", [1, 4])
@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads", "head_dim", "window", "softcap", "dtype"),
    [
        (4, 4, 40, 20, None, "float32"),
        (20, 1, 16, None, 3.0, "float32"),
        (8, 4, 32, 5, 3.0, "float16"),
    ],
)
@pytest.mark.slow
def test_the_kernel_attends_as_the_reference_does(
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    window: int | None,
    softcap: float | None,
    dtype: str,
    num_splits: int,
    triton_process: Executor,
) -> None:
    rng = np.random.default_rng(0)
    shapes = [(NUM_TOKENS, num_heads)] + [(NUM_BLOCKS, BLOCK_SIZE, num_kv_heads)] * 2
    arrays = [rng.normal(size=(*shape, head_dim)).astype(dtype) for shape in shapes]
    options = (0.3, window, softcap)
    found = triton_process.submit(attend, num_splits, arrays, *options).result()
    expected = attend_plainly(*map(torch.from_numpy, arrays), layout(NUM_TOKENS), *options)
    tolerance = 1e-5 if dtype == "float32" else 1e-2
    np.testing.assert_allclose(found[:10], expected[:10], atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize(("capability", "num_splits"), [(80, 1), (90, 8)])
def test_the_kernel_compiles_for_gpus(
    capability: int, num_splits: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kinds = {
        "out": "*bf16" if num_splits == 1 else "*fp32", "weight": "*fp32",
        "query": "*bf16", "keys": "*bf16", "values": "*bf16",
        "positions": "*i32", "rows": "*i32", "groups": "*i32", "tables": "*i32",
        "scale": "fp32", "softcap": "fp32", "window": "i32", "table_stride": "i32",
    }  # fmt: skip
    constants = {
        "BLOCK_SIZE": 32, "NUM_KV_HEADS": 8, "GROUP": 4, "LANES": 16, "HEAD_DIM": 128, "DIM": 128,
        "TILE": kernel.TILE, "NUM_SPLITS": num_splits, "HAS_WINDOW": True, "HAS_SOFTCAP": True,
    }  # fmt: skip
    assert compile_for(capability, kernel._attend, kinds, constants)
    if num_splits > 1:
        kinds = {"out": "*bf16", "partial": "*fp32", "weight": "*fp32"}
        constants = {"HEAD_DIM": 128, "DIM": 128, "NUM_SPLITS": num_splits}
        assert compile_for(capability, kernel._merge, kinds, constants)


@pytest.mark.parametrize("num_rows", [1, 64])
def test_the_stop_rule_compiles_for_gpus(
    num_rows: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it decides is held against numpy in `test_torch_stoppers.py`."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kinds = dict.fromkeys(value_kernel._goes_on.arg_names, "*fp64")
    kinds |= {"on": "*u8", "active": "*u8", "num_rows": "i32", "last_place": "i32"}
    kinds |= {"eps": "fp32", "row_share": "fp32"}
    constants = {"WINDOW": 4, "JUDGE": 5, "SCOUT": 4, "ROWS": num_rows, "TILE": value_kernel.TILE}
    kinds = {name: kind for name, kind in kinds.items() if name not in constants}
    assert compile_for(90, value_kernel._goes_on, kinds, constants)


def compile_for(
    capability: int, function: Any, kinds: dict[str, str], constants: dict[str, Any]
) -> bytes:
    """Return the machine code."""
    names = function.arg_names
    source = ASTSource(
        function,
        signature={name: kinds.get(name, "constexpr") for name in names},
        constexprs={(names.index(name),): value for name, value in constants.items()},
    )
    return triton.compile(source, target=GPUTarget("cuda", capability, 32)).asm["cubin"]
