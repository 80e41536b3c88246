"""The `watcher` model: the step of an ensemble that notices clients who have gone.

Triton 2.51 does not pass a cancellation on to an ensemble step that already runs, but a step that
starts afterwards sees it. This one starts with every response of `specserve`. It is decoupled, so
that a response which only asks about the client can end here.
"""

import logging
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils
from numpy.typing import NDArray

from python_backend import log
from python_backend.sender import FINAL

logger = logging.getLogger(__name__)


class WatcherModel:
    """Hands each response on; of a client who has gone, it stops the generation."""

    def initialize(self, args: dict[str, str]) -> None:
        """Set up the log."""
        log.configure(args)

    def execute(self, requests: list[Any]) -> None:
        """Look at each request of an ensemble once more."""
        for request in requests:
            self._answer(request)

    def _answer(self, request: Any) -> None:
        tensors = {tensor.name(): tensor for tensor in request.inputs()}
        cancel_key = tensors.pop("cancel_key").as_numpy()
        if request.is_cancelled():
            _stop(cancel_key)
        response = pb_utils.InferenceResponse(list(tensors.values())) if tensors else None
        request.get_response_sender().send(response, flags=FINAL)


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
