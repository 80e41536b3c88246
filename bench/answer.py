"""One request as its client saw it, whatever the protocol."""

from dataclasses import dataclass, field
from typing import Any


@dataclass(slots=True)
class Answer:
    """Times are in seconds of `time.perf_counter`.

    Attributes:
        response_s: of each response that had content.
        tensors: the last value of each, scalars where they have one element; text is in `text`.
        error: what the server or the connection said, if it went wrong.
    """

    sent_s: float
    text: str = ""
    response_s: list[float] = field(default_factory=list)
    tensors: dict[str, Any] = field(default_factory=dict)
    error: str | None = None
