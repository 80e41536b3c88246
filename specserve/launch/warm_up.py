"""The first request: it makes the orchestrator measure its engines, which may take seconds."""

import http.client
import json

from specserve.launch.calls import client_host

MODEL = "specserve"


def warm_up(address: str, http_port: int, timeout_s: float = 120.0) -> None:
    """Generate one token and wait for it.

    Raises:
        RuntimeError: if the server does not answer it, with what it said.
    """
    # NOTE: http.client goes straight to the server; urllib would ask a configured proxy.
    connection = http.client.HTTPConnection(client_host(address), http_port, timeout=timeout_s)
    body = json.dumps({"text_input": "a", "max_tokens": 1})
    try:
        connection.request("POST", f"/v2/models/{MODEL}/generate", body)
        response = connection.getresponse()
        text = response.read().decode(errors="replace")
    except (OSError, http.client.HTTPException) as error:
        raise RuntimeError(f"the first request failed: {error}") from error
    finally:
        connection.close()
    if response.status != http.HTTPStatus.OK:
        raise RuntimeError(f"the first request failed: {text}")
