"""The `keeper` model: loads another model again, whatever state its process is in.

A model of its own because `load_model` keeps Python's lock until the engine is loaded: in the
orchestrator it would stop every request.
"""

import logging
import time
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

from python_backend import internal, log, sibling

logger = logging.getLogger(__name__)

MODELS = ("draft", "target")


class KeeperModel:
    """Needs a server started with `--model-control-mode=explicit --load-model=*`."""

    def initialize(self, args: dict[str, str]) -> None:
        """Set up the log."""
        log.configure(args)

    def execute(self, requests: list[Any]) -> list[Any]:
        """Load the model that each request names; answer when it is there."""
        return [self._answer(request) for request in requests]

    def _answer(self, request: Any) -> Any:
        refusal = internal.refusal(request)
        if refusal is not None:
            return refusal
        model = pb_utils.get_input_tensor_by_name(request, "model").as_numpy()[0].decode()
        started_s = time.monotonic()
        try:
            _reload(model)
        except Exception as error:
            return pb_utils.InferenceResponse(error=pb_utils.TritonError(str(error)))
        load_s = np.array([time.monotonic() - started_s], dtype=np.float32)
        return pb_utils.InferenceResponse([pb_utils.Tensor("load_s", load_s)])


def _reload(model: str) -> None:
    if model not in MODELS:
        raise ValueError(f"model is '{model}': known are {', '.join(MODELS)}")
    sibling.kill(model)
    pb_utils.unload_model(model)  # else Triton finds nothing changed, and loads nothing
    pb_utils.load_model(model)
