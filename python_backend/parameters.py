"""A request's parameters and its id, which clients write as they like."""

import json
from typing import Any


def read_parameters(request: Any) -> dict[str, Any]:
    """Return a request's parameters by name.

    Raises:
        ValueError: a name or a value is not UTF-8; over HTTP server 2.51 lets that through.
    """
    try:
        return dict(json.loads(request.parameters() or "{}"))
    except UnicodeDecodeError as error:
        raise ValueError("a request parameter is not UTF-8: name it in UTF-8") from error


def read_id(request: Any) -> str:
    """Return a request's id, empty if it has none.

    Raises:
        ValueError: it is not UTF-8.
    """
    try:
        return str(request.request_id())
    except UnicodeDecodeError as error:
        raise ValueError("the request id is not UTF-8: send one that is") from error
