"""What tells calls between the models of this server from those of clients.

`draft`, `target` and `keeper` trust what they are told, block numbers above all, and Triton 2.51
lets every client call every model. So the launcher gives all of them a key that clients have not.
"""

import contextlib
import hmac
import os
from typing import Any

import triton_python_backend_utils as pb_utils

from python_backend.parameters import read_parameters

KEY_ENV = "SPECSERVE_INTERNAL_KEY"
_KEY = os.environ.get(KEY_ENV, "")

PARAMETERS = {"internal_key": _KEY} if _KEY else None  # of every call between models


def refusal(request: Any) -> Any:
    """Return the response to a call that is not one of ours, or None; without a key all are."""
    if not _KEY:
        return None
    given = None
    with contextlib.suppress(ValueError):
        given = read_parameters(request).get("internal_key")
    if isinstance(given, str) and hmac.compare_digest(given.encode(), _KEY.encode()):
        return None
    message = "this model serves other models only: call 'ensemble'"
    code = pb_utils.TritonError.INVALID_ARG
    return pb_utils.InferenceResponse(error=pb_utils.TritonError(message, code))
