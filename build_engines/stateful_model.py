"""The IR as exported, run as it is: what checks, measurements and distillation need, no serving."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

IR_FILE = "openvino_model.xml"
OPTIONS = {
    "INFERENCE_PRECISION_HINT": "f32",
    "KV_CACHE_PRECISION": "f32",  # the exporter writes f16 into the IR
    "PERFORMANCE_HINT": "LATENCY",
}


class StatefulModel:
    """An OpenVINO engine in f32: rows of equal length, no rollback."""

    def __init__(self, engine_dir: str | Path) -> None:
        from specserve.engines.openvino import core  # so that importing the builders needs none

        model = core().read_model(Path(engine_dir) / IR_FILE)
        self._request = core().compile_model(model, "CPU", OPTIONS).create_infer_request()
        self._num_computed_tokens = 0

    def reset(self) -> None:
        """Forget every token."""
        self._request.reset_state()
        self._num_computed_tokens = 0

    def forward(self, token_ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """Append tokens and return what follows each of them.

        Args:
            token_ids: [num_rows, n]; num_rows stays the same until `reset`.

        Returns:
            Logits, float32 [num_rows, n, vocab_size], a copy.
        """
        num_rows, n = token_ids.shape
        start, end = self._num_computed_tokens, self._num_computed_tokens + n
        self._request.infer(
            {
                "input_ids": token_ids.astype(np.int64),
                "attention_mask": np.ones((num_rows, end), np.int64),
                "position_ids": np.tile(np.arange(start, end, dtype=np.int64), (num_rows, 1)),
                "beam_idx": np.arange(num_rows, dtype=np.int32),
            }
        )
        self._num_computed_tokens = end
        return np.array(self._request.get_output_tensor(0).data)
