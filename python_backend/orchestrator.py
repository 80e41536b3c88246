"""The `specserve` model, the BLS orchestrator: wires requests, the step loop and replies."""

import json
import logging
from pathlib import Path
from typing import Any

import triton_python_backend_utils as pb_utils

from python_backend import log
from python_backend.bls import infer
from python_backend.call import CallParser
from python_backend.metrics import Metrics
from python_backend.reply import FINAL, Reply, send_error
from python_backend.responder import Responder
from specserve import engines
from specserve.assemble import assemble, prepare
from specserve.config import Config, load_config
from specserve.engines.triton import TritonDraftEngine, TritonTargetEngine
from specserve.loop import Loop
from specserve.policies.fixed import FixedPolicy
from specserve.text import load_tokenizer

logger = logging.getLogger(__name__)


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
        draft, target = TritonDraftEngine(infer), TritonTargetEngine(infer)
        core = assemble(
            config,
            info=info,
            draft_engine=draft,
            target_engine=target,
            policy=FixedPolicy(0),  # until the other two models can be called
        )

        self._responder = Responder(tick=Metrics(core, draft, target).publish)
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
            self._loop.start()
        for request in requests:
            sender = request.get_response_sender()
            try:
                self._take(request, sender)
            except ValueError as error:
                send_error(sender, str(error), pb_utils.TritonError.INVALID_ARG)
            except Exception:
                logger.exception("taking a request failed")
                send_error(sender, "internal error", pb_utils.TritonError.INTERNAL)

    def finalize(self) -> None:
        """Stop the threads; Triton has waited for running requests before this."""
        if self._is_started:
            self._loop.stop()
        self._responder.stop()

    def _take(self, request: Any, sender: Any) -> None:
        tensors = {tensor.name(): tensor.as_numpy() for tensor in request.inputs()}
        if "stop" in tensors and tensors["stop"].any():
            self._stop(request.request_id(), sender)
            return
        call = self._parse(tensors, request.parameters(), request.request_id())
        reply = Reply(call, sender, self._tokenizer)
        self._responder.add(reply)
        try:
            self._loop.submit(call.request)
        except ValueError:
            self._responder.remove(reply)
            raise

    def _stop(self, request_id: str, sender: Any) -> None:
        if not request_id:
            raise ValueError("stop needs the id of the request to stop: set the request id")
        self._responder.cancel(request_id)
        sender.send(pb_utils.InferenceResponse([]), flags=FINAL)


def _end_id(engine_dir: Path) -> int | None:
    """Return the end token of the checkpoint's generation config, if it has one."""
    path = engine_dir / "generation_config.json"
    end_id = json.loads(path.read_text())["eos_token_id"] if path.is_file() else None
    return end_id[0] if isinstance(end_id, list) else end_id
