"""The `specserve` model, the BLS orchestrator: wires requests, the step loop and replies."""

import json
import logging
import os
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils
from numpy.typing import NDArray

from python_backend import log
from python_backend.call import CallParser
from python_backend.kept_model import KeptModel
from python_backend.metrics import Metrics
from python_backend.parameters import read_id, read_parameters
from python_backend.reply import Reply, send_done
from python_backend.responder import Responder
from python_backend.sender import Sender
from specserve import engines
from specserve.assemble import assemble, prepare
from specserve.config import Config, load_config
from specserve.engines.triton import TritonDraftEngine, TritonTargetEngine
from specserve.loop import Loop
from specserve.policies.fixed import FixedPolicy
from specserve.stats import Outcomes
from specserve.text import load_tokenizer

logger = logging.getLogger(__name__)

END_FILE = os.environ.get("SPECSERVE_END_FILE", "")


class OrchestratorModel:
    """Decoupled; one instance serves all requests in one step loop."""

    def initialize(self, args: dict[str, str]) -> None:
        """Read the configuration, check the pair, start the threads."""
        log.configure(args)
        config = load_config()
        engine_dir = Path(config.engine.dir) / "target"
        info = engines.describe(config)
        self._tokenizer = load_tokenizer(engine_dir)
        self._parse = CallParser(config, self._tokenizer, info.vocab_size, _end_id(engine_dir))
        self._start(config, info)

    def _start(self, config: Config, info: engines.EngineInfo) -> None:
        kept_draft = KeptModel("draft", config.server.draft_timeout_s)
        kept_target = KeptModel("target", config.server.target_timeout_s)
        self._kept_models = (kept_draft, kept_target)
        draft = TritonDraftEngine(kept_draft.infer)
        target = TritonTargetEngine(kept_target.infer)
        core = assemble(
            config,
            info=info,
            draft_engine=draft,
            target_engine=target,
            draft_keeper=kept_draft,
            policy=FixedPolicy(0),  # until the other two models can be called
        )

        outcomes = Outcomes()
        self._metrics = Metrics(core, draft, target, outcomes)
        self._responder = Responder(outcomes, self._tick)
        self._loop = Loop(
            core,
            self._responder.put,
            self._responder.put_failure,
            lambda: prepare(core, config, info),
        )
        self._responder.start(self._loop)
        self._is_started = False

    def execute(self, requests: list[Any]) -> None:
        """Take requests in; answers come from the responder's thread."""
        if not self._is_started:  # not earlier: Triton allows no BLS before the first request
            self._is_started = True
            for model in self._kept_models:
                model.start()
            self._loop.start()
        for request in requests:
            sender = Sender(request)
            try:
                self._take(request, sender)
            except ValueError as error:
                sender.fail(str(error), pb_utils.TritonError.INVALID_ARG)
            except Exception:
                logger.exception("taking a request failed")
                sender.fail("internal error", pb_utils.TritonError.INTERNAL)

    def finalize(self) -> None:
        """Stop the threads; Triton has waited for running requests before this."""
        for model in self._kept_models:
            model.stop()
        if self._is_started:
            self._loop.stop()
        self._responder.stop()

    def _tick(self) -> None:
        self._metrics.publish()
        if END_FILE and os.path.exists(END_FILE):  # the launcher's drain has run out of time
            self._responder.turn_away()

    def _take(self, request: Any, sender: Sender) -> None:
        tensors = {tensor.name(): tensor.as_numpy() for tensor in request.inputs()}
        if "stop" in tensors and tensors["stop"].any():
            self._stop(read_id(request), tensors.get("cancel_key"))
            send_done(sender)
            return
        parameters = read_parameters(request)
        call = self._parse(tensors, parameters, read_id(request), request.timeout())
        reply = Reply(call, sender, self._tokenizer)
        self._responder.add(reply)
        try:
            self._loop.submit(call.request)
        except Exception:
            self._responder.remove(reply)
            raise

    def _stop(self, request_id: str, cancel_key: NDArray[np.int64] | None) -> None:
        if cancel_key is not None and cancel_key.size == 1:
            key = int(cancel_key.flat[0])
            self._responder.cancel(lambda reply: reply.cancel_key == key)
        elif request_id:
            self._responder.cancel(lambda reply: reply.request.request_id == request_id)
        else:
            raise ValueError("stop needs the id of the request to stop: set the request id")


def _end_id(engine_dir: Path) -> int | None:
    """Return the end token of the checkpoint's generation config, if it has one."""
    path = engine_dir / "generation_config.json"
    end_id = json.loads(path.read_text())["eos_token_id"] if path.is_file() else None
    return end_id[0] if isinstance(end_id, list) else end_id
