"""Another model of this server, called with a deadline, and loaded again when it is lost.

Triton 2.51 notices that a model's process has died when it is called, and leaves it at that.
"""

import logging
import threading
import time

import numpy as np

from python_backend import sibling
from python_backend.bls import infer
from specserve.deadline import Deadline
from specserve.engines import LOST, EngineLost
from specserve.engines.triton import Arrays

logger = logging.getLogger(__name__)

WATCH_S = 0.5
MAX_FAILURES = 12  # calls in a row: more than it takes to find one row at fault among a thousand
MAX_WAIT_S = 60.0


class KeptModel:
    """One model, called through BLS by one thread and watched by another.

    The `keeper` model loads it again when it is lost, and with it what its engine kept.

    Attributes:
        is_up: the model may be called.
        num_reloads: how often it has been loaded again.
    """

    def __init__(self, name: str, timeout_s: float) -> None:
        self.name = name
        self.is_up = True
        self.num_reloads = 0
        self._infer = Deadline(infer, timeout_s)
        self._num_failures = 0
        self._pid: int | None = None
        self._had_process = False
        self._is_stopping = False
        self._wake = threading.Event()
        self._thread = threading.Thread(
            target=self._watch, name=f"specserve-keep-{name}", daemon=True
        )

    def start(self) -> None:
        """Watch; not before Triton allows calls between models."""
        self._thread.start()

    def stop(self) -> None:
        """End the watching, when a model may go; loading one does not hold this up."""
        self._is_stopping = True
        self._wake.set()
        self._infer.close()

    def infer(self, model: str, inputs: Arrays) -> Arrays:
        """Run the model once. See `specserve.engines.triton.Infer`.

        Raises:
            EngineLost: if it is not there or gave no answer; it is being loaded again then.
            RuntimeError: what the model answered instead.
        """
        num_reloads = self.num_reloads
        if self.is_up:
            try:
                outputs = self._infer(model, inputs)
                self._num_failures = 0
                return outputs
            except Exception as error:
                self._num_failures += 1
                reason = self._why_lost(error)
                if reason is None:
                    raise
                if num_reloads == self.num_reloads:  # else the watch was faster
                    self.give_up(reason)
        raise EngineLost(f"the {self.name} model is being loaded again: try again in 2000 ms")

    def give_up(self, reason: str) -> None:
        """Have the model's process replaced; returns at once."""
        if self.is_up:
            self.is_up = False
            logger.error("model '%s' %s: it is loaded again", self.name, reason)
            self._wake.set()

    def _why_lost(self, error: Exception) -> str | None:
        """Tell a model that is lost from one that only refused a call."""
        if isinstance(error, TimeoutError):
            return f"gave {error}"
        if LOST in str(error):
            return f"gave up: {error}"
        if "is not healthy" in str(error):  # Triton's words for a stub that died or stands still
            return "has lost its process"
        if self._num_failures >= MAX_FAILURES:
            return f"failed {self._num_failures} times in a row, last with: {error}"
        return None

    def _watch(self) -> None:
        wait_s = 1.0
        self._is_alive()  # now, so that a process is missed which dies before the first look
        while not self._is_stopping:
            self._wake.wait(WATCH_S)
            self._wake.clear()
            if self.is_up and not self._is_alive():
                self.give_up("has lost its process")
            if self.is_up or self._is_stopping:
                continue
            try:
                self._reload()
                wait_s = 1.0
            except Exception:
                logger.exception("model '%s' was not loaded; next try in %g s", self.name, wait_s)
                time.sleep(wait_s)
                wait_s = min(2.0 * wait_s, MAX_WAIT_S)

    def _is_alive(self) -> bool:
        """Say whether the model still has a process, if one was ever found."""
        if self._pid is None or not sibling.runs(self._pid, self.name):
            self._pid = sibling.find(self.name)
        self._had_process = self._had_process or self._pid is not None
        return self._pid is not None or not self._had_process

    def _reload(self) -> None:
        answer = infer("keeper", {"model": np.array([self.name.encode()], dtype=object)})
        self._pid = None
        self._num_failures = 0
        self.num_reloads += 1
        self.is_up = True
        load_s = answer["load_s"].item()
        logger.warning(
            "model '%s' is back, loaded in %.1f s; that is reload %d",
            self.name,
            load_s,
            self.num_reloads,
        )
