"""One blocking call from this model to another: arrays in, arrays out."""

from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils
from numpy.typing import NDArray

from python_backend import internal
from specserve.engines.triton import Arrays

OUTPUTS = {
    "draft": ["num_tokens", "token_ids", "confidences", "engine_s"],
    "target": [
        "num_tokens", "token_ids", "num_log_probs", "log_probs", "computed_tokens", "engine_s",
    ],
    "keeper": ["load_s"],
}  # fmt: skip


def infer(model: str, inputs: Arrays) -> Arrays:
    """Run `model` once, blocking; safe from any thread between initialize and finalize.

    Raises:
        RuntimeError: what the model answered instead.
    """
    request = pb_utils.InferenceRequest(
        model_name=model,
        requested_output_names=OUTPUTS[model],
        inputs=[pb_utils.Tensor(name, array) for name, array in inputs.items()],
        preferred_memory=pb_utils.PreferredMemory(pb_utils.TRITONSERVER_MEMORY_CPU),
        parameters=internal.PARAMETERS,
    )
    response = request.exec()
    if response.has_error():
        raise RuntimeError(f"model '{model}': {response.error().message()}")
    return {tensor.name(): _array(tensor) for tensor in response.output_tensors()}


def _array(tensor: Any) -> NDArray[Any]:
    array: NDArray[Any] = np.asarray(tensor.as_numpy())
    return array
