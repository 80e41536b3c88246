"""Fetching /metrics, once."""

import http.client
import time
from urllib.parse import urlsplit

from specserve.view.samples import Samples, parse

TIMEOUT_S = 2.0


def read(url: str) -> Samples:
    """Read a server's metrics now.

    Raises:
        OSError: if it does not answer, or not with metrics.
    """
    parts = urlsplit(url)
    # NOTE: http.client goes straight to the server; urllib would ask a configured proxy.
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=TIMEOUT_S)
    try:
        connection.request("GET", parts.path)
        response = connection.getresponse()
        text = response.read().decode(errors="replace")
        if response.status != http.HTTPStatus.OK:
            raise OSError(f"{url} answers {response.status}")
        return parse(text, time.monotonic())
    except (http.client.HTTPException, ValueError) as error:
        raise OSError(f"{url} does not answer with metrics: {error}") from error
    finally:
        connection.close()
