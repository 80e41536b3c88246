"""Log records as JSON, one a line, in the fields of OpenTelemetry's log data model."""

import json
import logging
import re
import time
import traceback
from typing import Any

LINE = "%(asctime)s %(levelname)s %(name)s: %(message)s"
# A W3C traceparent, or anything that ends in or holds 32 hexadecimal digits, as our own ids do.
_TRACE = re.compile(r"(?<![0-9a-f])([0-9a-f]{32})(?![0-9a-f])(?:-([0-9a-f]{16})(?![0-9a-f]))?")


class JsonFormatter(logging.Formatter):
    """One object a record; what `extra` names `request_id` is an attribute.

    A request id that holds a trace id, or a W3C `traceparent`, also gives `trace_id` and `span_id`,
    by which OpenTelemetry's collectors join the lines with the spans of a gateway.

    Args:
        service: the `service.name` of the resource.
    """

    def __init__(self, service: str) -> None:
        super().__init__()
        self._service = service

    def format(self, record: logging.LogRecord) -> str:
        """Return the line, without its end."""
        request_id = str(getattr(record, "request_id", ""))
        attributes = {"logger": record.name}
        if request_id:
            attributes["request_id"] = request_id
        if record.exc_info:
            attributes["exception"] = "".join(traceback.format_exception(*record.exc_info))
        entry: dict[str, Any] = {
            "timestamp": f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(record.created))}"
            f".{int(record.msecs):03d}Z",
            "severity_text": record.levelname,
            "body": record.getMessage(),
            "resource": {"service.name": self._service},
            "attributes": attributes,
            **_trace(request_id),
        }
        return json.dumps(entry)


def configure(service: str, *, as_json: bool, line: str = LINE) -> None:
    """Send this process's records to standard error, once."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter(service) if as_json else logging.Formatter(line))
    logging.basicConfig(level=logging.INFO, handlers=[handler])


def _trace(request_id: str) -> dict[str, str]:
    match = _TRACE.search(request_id)
    if match is None or match[1] == "0" * 32:
        return {}
    return {"trace_id": match[1]} | ({"span_id": match[2]} if match[2] else {})
