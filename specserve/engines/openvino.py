"""OpenVINO on the CPU: paged attention from an exported stateful IR."""

from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
from numpy.typing import NDArray
from openvino import opset13 as ops
from openvino._offline_transformations import paged_attention_transformation
from openvino.passes import ConstantFolding, Manager

from specserve import manifest
from specserve.config import Config
from specserve.engines import describe
from specserve.engines.model_draft import ModelDraftEngine
from specserve.engines.model_target import ModelTargetEngine
from specserve.engines.paged_model import FlatBatch

ATTENTION = "PagedAttentionExtension"
BLOCK_SIZE = 32  # what the CPU kernels of paged attention are written for
# Kernels that OpenVINO keeps, by shape. Its own limit of 5000 lets hundreds of MiB fill in an hour
# of steps of all sizes. Each size has some ten, so 500 were few at 16 requests: 1 % slower.
NUM_KEPT_KERNELS = 2000
# A target's pass of up to so many tokens waits for the weights and takes as long as one of a single
# token. After one of another size it prepares its products again, 2 ms of 21 at 0.4 G parameters.
# (A draft model is in the caches: its forwards of one token are shorter than of more.)
NUM_FREE_TOKENS = {"bf16": 6, "f32": 4}


def make_draft(config: Config) -> ModelDraftEngine:
    """Load `draft/` of the pair."""
    return ModelDraftEngine(_load(config, "draft"))


def make_target(config: Config) -> ModelTargetEngine:
    """Load `target/` of the pair."""
    num_free_tokens = NUM_FREE_TOKENS.get(config.engine.precision, 0)
    return ModelTargetEngine(_load(config, "target", num_free_tokens))


@cache
def core() -> ov.Core:
    """Return the one Core of this process, which stays.

    NOTE: a Core brings a signal stack along, and puts back the one it found when it goes. Of two of
    them the later may put back that of the earlier, which is unmapped by then: the next signal ends
    the process.
    """
    return ov.Core()


def supported_precisions() -> list[str]:
    """Return what `engine.precision` may be on this CPU, the fastest last.

    Paged attention takes bf16 only where the CPU computes in it (AVX-512 BF16 or AMX).
    """
    can = core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    return ["f32", *(["bf16"] if "BF16" in can else [])]


def _load(config: Config, role: str, num_free_tokens: int = 0) -> "OpenVINOModel":
    info = describe(config)
    precisions = supported_precisions()
    if config.engine.precision not in precisions:
        raise ValueError(
            f"engine.precision is '{config.engine.precision}': "
            f"openvino supports {' and '.join(precisions)} on this CPU"
        )
    if info.block_size != BLOCK_SIZE:
        raise ValueError(f"engine.block_size is {info.block_size}: openvino needs {BLOCK_SIZE}")
    if config.engine.unpacked_from < 0:
        raise ValueError(
            f"engine.unpacked_from is {config.engine.unpacked_from}: must be at least 0, "
            "which keeps no copy of the weights"
        )
    return OpenVINOModel(
        Path(config.engine.dir) / role,
        num_blocks=info.num_blocks,
        precision=config.engine.precision,
        num_threads=config.engine.num_threads,
        unpacked_from=config.engine.unpacked_from,
        num_free_tokens=num_free_tokens,
    )


class OpenVINOModel:
    """A compiled model and its KV cache, behind the `PagedModel` protocol.

    A pass of a few tokens waits for the weights and reads them as they are stored, in bf16. A
    larger one waits for the arithmetic; it has a copy in f32 that need not be unpacked every time.

    Args:
        engine_dir: folder with `openvino_model.xml` and `manifest.json`.
        num_blocks: of BLOCK_SIZE token slots each.
        precision: of arithmetic and KV cache.
        num_threads: 0 takes all cores.
        unpacked_from: tokens of a pass from which on it uses the copy; 0 keeps none.
        num_free_tokens: up to so many, a pass is padded to the size of the last one.
    """

    def __init__(
        self,
        engine_dir: Path,
        *,
        num_blocks: int,
        precision: str = "f32",
        num_threads: int = 0,
        unpacked_from: int = 0,
        num_free_tokens: int = 0,
    ) -> None:
        info = manifest.load(engine_dir)
        self.vocab_size = info.vocab_size
        properties = {
            "INFERENCE_PRECISION_HINT": precision,
            "KV_CACHE_PRECISION": precision,
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_NUM_THREADS": num_threads,
            "CPU_RUNTIME_CACHE_CAPACITY": NUM_KEPT_KERNELS,
        }
        self._small = self._large = _request(_read(engine_dir), properties)
        self._unpacked_from = unpacked_from
        self._num_free_tokens = num_free_tokens
        self._scratch_block = num_blocks
        self._num_tokens = 0
        if unpacked_from and precision == "f32" != info.precision:
            self._large = _request(_read(engine_dir, unpacks=True), properties)
        self._share_kv_cache(num_blocks + 1)

    def _share_kv_cache(self, num_blocks: int) -> None:
        """Give both forms of the model the same cache."""
        for port in self._small.model_inputs:
            name = port.get_any_name()
            if "_cache." in name:
                shape = [num_blocks, *(d.get_length() for d in list(port.partial_shape)[1:])]
                tensor = ov.Tensor(port.element_type, shape)
                for request in (self._small, self._large):
                    request.set_tensor(name, tensor)

    def forward(self, batch: FlatBatch, logit_rows: NDArray[np.int64]) -> NDArray[np.float32]:
        """Run one pass. See `PagedModel`."""
        batch = self._padded(batch)
        inputs: dict[str, NDArray[Any]] = {
            "input_ids": batch.token_ids,
            "position_ids": batch.positions,
            "past_lens": batch.starts,
            "subsequence_begins": batch.begins,
            "block_indices": batch.block_ids,
            "block_indices_begins": batch.block_begins,
            "max_context_len": np.array(batch.max_context_len, dtype=np.int32),
            "logit_rows": logit_rows,
        }
        is_large = len(batch.token_ids) >= self._unpacked_from
        request = self._large if is_large else self._small
        for name, array in inputs.items():
            request.set_tensor(name, ov.Tensor(array))
        request.infer()
        logits: NDArray[np.float32] = request.get_output_tensor(0).data
        return logits.reshape(-1, self.vocab_size)

    def _padded(self, batch: FlatBatch) -> FlatBatch:
        """Make a small pass as large as the last one, if that costs nothing: its shape is there."""
        num_tokens = len(batch.token_ids)
        if num_tokens < self._num_tokens <= self._num_free_tokens:
            batch = batch.padded(self._num_tokens - num_tokens, self._scratch_block)
        self._num_tokens = len(batch.token_ids)
        return batch


def _read(engine_dir: Path, *, unpacks: bool = False) -> ov.Model:
    """Read the IR and give it paged attention, its weights unpacked to f32 or as stored."""
    model = core().read_model(engine_dir / "openvino_model.xml")
    if unpacks:
        passes = Manager()
        passes.register_pass(ConstantFolding())
        passes.run_passes(model)
    paged_attention_transformation(model)
    _compute_only(model, "logit_rows")
    return model


def _request(model: ov.Model, properties: Mapping[str, Any]) -> ov.InferRequest:
    return core().compile_model(model, "CPU", dict(properties)).create_infer_request()


def _compute_only(model: Any, name: str) -> None:
    """Gather the tokens that logits are asked of, as early as can be.

    The others are in the KV cache once the last attention has seen them, and nobody reads on: the
    rest of that layer, most of its arithmetic, is left out for them. Where more than attention's
    result and the residual enters that rest, only the logits are.
    """
    rows = ops.parameter([-1], np.int64, name)
    rows.output(0).set_names({name})
    result = next(r for r in model.get_results() if "logits" in r.output(0).get_names())
    attention = [n for n in model.get_ordered_ops() if n.get_type_name() == ATTENTION][-1]
    entries = _entries(_downstream(_next_matmul(attention)))
    if len(entries) != 2:
        entries = _entries(_downstream(_last_matmul(result)))
    assert entries, "nothing before the logits has a row for every token"
    for source, inputs in entries.values():
        gather = ops.gather(source, rows, ops.constant(np.int64(0)))
        for one in inputs:
            one.replace_source_output(gather.output(0))
    model.add_parameters([rows])
    model.validate_nodes_and_infer_types()


def _next_matmul(node: Any) -> Any:
    """Return the first product that a node's first output goes to."""
    while node.get_type_name() != "MatMul":
        node = next(iter(node.output(0).get_target_inputs())).get_node()
    return node


def _last_matmul(node: Any) -> Any:
    """Return the last product before a node."""
    while node.get_type_name() != "MatMul":
        node = node.input_value(0).get_node()
    return node


def _downstream(first: Any) -> list[Any]:
    """Return a node and all that depend on it."""
    found, waiting = {first.get_friendly_name(): first}, [first]
    while waiting:
        for output in waiting.pop().outputs():
            for target in output.get_target_inputs():
                node = target.get_node()
                if node.get_friendly_name() not in found:
                    found[node.get_friendly_name()] = node
                    waiting.append(node)
    return list(found.values())


def _entries(nodes: Sequence[Any]) -> dict[tuple[str, int], tuple[Any, list[Any]]]:
    """Return what has a row for every token and enters these nodes from outside, and where."""
    names = {node.get_friendly_name() for node in nodes}
    entries: dict[tuple[str, int], tuple[Any, list[Any]]] = {}
    for one in (one for node in nodes for one in node.inputs()):
        source = one.get_source_output()
        key = source.get_node().get_friendly_name(), source.get_index()
        shape = source.get_partial_shape()
        has_tokens = shape.rank.is_static and len(shape) > 0 and shape[0].is_dynamic
        if key[0] not in names and has_tokens:
            entries.setdefault(key, (source, []))[1].append(one)
    return entries
