"""The way back to one client: responses, errors, and whether it is still there."""

import contextlib
from typing import Any

import triton_python_backend_utils as pb_utils

from python_backend.parameters import read_parameters

FINAL = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL
CODED_ERRORS = "coded_errors"
CODES = ("INVALID_ARG", "UNAVAILABLE", "CANCELLED", "INTERNAL")


class Sender:
    """Triton's response sender, with errors that can say what kind they are.

    A gRPC stream of server 2.51 carries an error's text alone, and asking for its status
    (`triton_grpc_error`) makes the server cancel the stream, which can abort it. A client that
    sends the request parameter `coded_errors` finds the code before the text: "UNAVAILABLE: ...".
    """

    def __init__(self, request: Any) -> None:
        self._sender = request.get_response_sender()
        self._is_coded = False
        with contextlib.suppress(ValueError):  # who reads the request says so, through this sender
            self._is_coded = bool(read_parameters(request).get(CODED_ERRORS))

    def is_cancelled(self) -> bool:
        """Return whether the client has gone."""
        return bool(self._sender.is_cancelled())

    def send(self, response: Any = None, flags: int = 0) -> None:
        """Send a response, or the final flag alone."""
        self._sender.send(response, flags=flags)

    def fail(self, message: str, code: int, name: str = "") -> None:
        """Answer with an error and the final flag; `name` says more than the code's own."""
        text = f"{name or _name_of(code)}: {message}" if self._is_coded else message
        error = pb_utils.TritonError(text, code)
        self._sender.send(pb_utils.InferenceResponse(error=error), flags=FINAL)


def _name_of(code: int) -> str:
    # NOTE: TritonError is not there yet when a model's modules are imported.
    names = (name for name in CODES if getattr(pb_utils.TritonError, name) == code)
    return next(names, "INTERNAL")
