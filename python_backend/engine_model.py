"""The `draft` and `target` models: an engine in a process of its own, one call per step."""

import logging
import time
from abc import ABC, abstractmethod
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

from python_backend import internal, log
from specserve import engines
from specserve.config import load_config
from specserve.engines import wire

logger = logging.getLogger(__name__)


class _EngineModel(ABC):
    """What both roles share: one ragged step per call, errors answered, time measured inside."""

    _engine: Any

    def execute(self, requests: list[Any]) -> list[Any]:
        """Answer each request; a failure is answered, not raised."""
        return [self._answer(request) for request in requests]

    def _answer(self, request: Any) -> Any:
        refusal = internal.refusal(request)
        if refusal is not None:
            return refusal
        try:
            arrays = {tensor.name(): tensor.as_numpy() for tensor in request.inputs()}
            started = time.perf_counter()
            outputs = self.run(arrays)
            engine_s = np.array([time.perf_counter() - started], dtype=np.float32)
            tensors = {**outputs, "engine_s": engine_s}
            return pb_utils.InferenceResponse([pb_utils.Tensor(n, a) for n, a in tensors.items()])
        except Exception as error:
            logger.exception("engine call failed")
            text = f"{engines.LOST if isinstance(error, engines.EngineLost) else ''}{error}"
            return pb_utils.InferenceResponse(error=pb_utils.TritonError(text))

    def finalize(self) -> None:
        """Let the engine go; one with threads or processes of its own has them end."""
        close = getattr(self._engine, "close", None)
        if close is not None:
            close()

    @abstractmethod
    def run(self, arrays: wire.Arrays) -> wire.Arrays:
        """Decode, run, encode."""


class DraftModel(_EngineModel):
    """Hosts the draft engine."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load the engine that the configuration names."""
        log.configure(args)
        self._engine = engines.make_draft_engine(load_config())

    def run(self, arrays: wire.Arrays) -> wire.Arrays:
        """Run the draft loop of one step."""
        self._engine.release(wire.decode_released(arrays))
        return wire.encode_drafts(self._engine.draft(wire.decode_draft_request(arrays)))


class TargetModel(_EngineModel):
    """Hosts the target engine."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load the engine that the configuration names."""
        log.configure(args)
        self._engine = engines.make_target_engine(load_config())
        self._decode = wire.VerifyDecoder()

    def run(self, arrays: wire.Arrays) -> wire.Arrays:
        """Verify one step."""
        batch, chosen, released = self._decode(arrays)
        self._engine.release(released)
        outputs = self._engine.verify(batch, chosen)
        counted = getattr(self._engine, "num_computed_tokens", None)
        return wire.encode_verified(outputs, counted)
