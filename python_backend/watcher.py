"""The `watcher` model: the step of an ensemble that notices clients who have gone.

Triton 2.51 does not pass a cancellation on to an ensemble step that already runs, but a step that
starts afterwards sees it. This one starts with every response of `specserve`.
"""

import logging
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils
from numpy.typing import NDArray

from python_backend import log

logger = logging.getLogger(__name__)


class WatcherModel:
    """Hands each response's text on; of a client who has gone, it stops the generation."""

    def initialize(self, args: dict[str, str]) -> None:
        """Set up the log."""
        log.configure(args)

    def execute(self, requests: list[Any]) -> list[Any]:
        """Look at each request of an ensemble once more."""
        return [self._answer(request) for request in requests]

    def _answer(self, request: Any) -> Any:
        if request.is_cancelled():
            _stop(pb_utils.get_input_tensor_by_name(request, "cancel_key").as_numpy())
        text = pb_utils.get_input_tensor_by_name(request, "text").as_numpy()
        return pb_utils.InferenceResponse([pb_utils.Tensor("text_output", text)])


def _stop(cancel_key: NDArray[np.int64]) -> None:
    stop = pb_utils.InferenceRequest(
        model_name="specserve",
        requested_output_names=["cancel_key"],
        inputs=[
            pb_utils.Tensor("stop", np.array([[True]])),
            pb_utils.Tensor("cancel_key", cancel_key),
        ],
    )
    for response in stop.exec(decoupled=True):
        if response.has_error():
            logger.error("stopping a request failed: %s", response.error().message())
