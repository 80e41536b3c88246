"""Whether a running server still serves: its process, its models' processes, and its answers."""

import http.client
import json
import signal
import time
from collections.abc import Callable

from specserve.launch.calls import client_host
from specserve.launch.triton_process import TritonProcess

PROBE_S = 2.0
SILENT_S = 20.0  # a busy server answers late, and a loaded machine later still


class Watch:
    """Looks after one ready server.

    Args:
        probed_model: asked now and then to stop a request that does not exist, which it answers at
            once whatever it has to do; None asks nobody.
        reloaded: models that the server loads again by itself when their process is gone.
        reload_timeout_s: how long that may take.
        say: told what happens, once each.
    """

    def __init__(
        self,
        triton: TritonProcess,
        probed_model: str | None,
        reloaded: tuple[str, ...],
        reload_timeout_s: float,
        say: Callable[[str], None],
    ) -> None:
        self._triton = triton
        self._probed_model = probed_model
        self._reloaded = reloaded
        self._reload_timeout_s = reload_timeout_s
        self._say = say
        self._dead_since_s: dict[str, float] = {}
        self._answered_s = self._probed_s = time.monotonic()

    def failure(self) -> str | None:
        """Look once; return why the server must be started anew, or None."""
        status = self._triton.poll()
        if status is not None:
            return f"tritonserver {_ending(status)}"
        self._triton.close_shared_memory()  # of models that were loaded again
        return self._dead_model() or self._silence()

    def _dead_model(self) -> str | None:
        now = time.monotonic()
        dead = self._triton.dead_models()
        for model in dead:
            if model not in self._reloaded:
                return f"the process of model {model!r} died"
            if model not in self._dead_since_s:
                self._say(f"The process of model {model!r} died; the server loads it again.")
            if now - self._dead_since_s.setdefault(model, now) > self._reload_timeout_s:
                return f"model {model!r} was not back after {self._reload_timeout_s:g} s"
        for model in self._dead_since_s.keys() - set(dead):
            time_s = now - self._dead_since_s.pop(model)
            self._say(f"Model {model!r} has a process again after {time_s:.1f} s.")
        return None

    def _silence(self) -> str | None:
        now = time.monotonic()
        if self._probed_model is None or now - self._probed_s < PROBE_S:
            return None
        self._probed_s = now
        if self._answers(self._probed_model):
            self._answered_s = time.monotonic()
        elif now - self._answered_s > SILENT_S:
            return f"model {self._probed_model!r} has given no answer for {SILENT_S:g} s"
        return None

    def _answers(self, model: str) -> bool:
        options = self._triton.options
        # NOTE: http.client goes straight to the server; urllib would ask a configured proxy.
        connection = http.client.HTTPConnection(
            client_host(options.address), options.http_port, timeout=PROBE_S
        )
        body = json.dumps({"stop": True, "id": "specserve-probe"})
        try:
            connection.request("POST", f"/v2/models/{model}/generate", body)
            return connection.getresponse().status == http.HTTPStatus.OK
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()


def _ending(status: int) -> str:
    if status < 0:
        return f"was ended by {signal.Signals(-status).name}"
    return f"ended by itself with status {status}"
