"""The `preprocessing` model: prompt text to token ids."""

from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

from python_backend import log
from python_backend.reader import decode_text
from specserve.config import load_config
from specserve.text import encode, load_tokenizer


class PreprocessingModel:
    """Stateless, so any number of instances may run beside the orchestrator."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load the target's tokenizer."""
        log.configure(args)
        config = load_config()
        self._limits = config.limits
        self._tokenizer = load_tokenizer(Path(config.engine.dir) / "target")

    def execute(self, requests: list[Any]) -> list[Any]:
        """Tokenize each request, an empty text to no tokens; refuse what is not text."""
        return [self._answer(request) for request in requests]

    def _answer(self, request: Any) -> Any:
        query = pb_utils.get_input_tensor_by_name(request, "QUERY").as_numpy()
        try:
            if query.shape != (1, 1):
                raise ValueError(
                    f"text_input has shape {list(query.shape)}: one request per call, shape [1, 1]"
                )
            text = decode_text(query[0, 0], "text_input", self._limits)
            token_ids = encode(self._tokenizer, text)
        except ValueError as error:
            code = pb_utils.TritonError.INVALID_ARG
            return pb_utils.InferenceResponse(error=pb_utils.TritonError(str(error), code))
        return pb_utils.InferenceResponse(
            [
                pb_utils.Tensor("INPUT_ID", np.array([token_ids], dtype=np.int32)),
                pb_utils.Tensor("REQUEST_INPUT_LEN", np.array([[len(token_ids)]], dtype=np.int32)),
            ]
        )
