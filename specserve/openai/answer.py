"""One answer, whole or as a stream of events: envelope, usage, errors on the way."""

import json
import time
from collections.abc import AsyncIterator, Mapping
from typing import Any

from fastapi.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from specserve.openai.answers import Usage
from specserve.openai.errors import ApiError
from specserve.openai.generations import Generations
from specserve.openai.piece import Piece
from specserve.openai.shapes import Shape

DONE = b"data: [DONE]\n\n"


class Answer:
    """Makes JSON of generations.

    Args:
        num_choices: choices of each prompt, whose tokens are counted once.
        include_usage: whether a stream ends with the usage.
    """

    def __init__(
        self,
        response_id: str,
        model: str,
        shape: Shape,
        generations: Generations,
        *,
        num_choices: int,
        include_usage: bool,
    ) -> None:
        self.generations = generations
        self.headers = {"X-Request-Id": response_id}  # the server logs it too, with the choice
        self._head = {"id": response_id, "created": int(time.time()), "model": model}
        self._shape = shape
        self._num_choices = num_choices
        self._include_usage = include_usage
        self._last: dict[int, Piece] = {}  # by choice; holds the counts

    async def whole(self) -> dict[str, Any]:
        """Return the answer when every choice is there.

        Raises:
            ApiError: what the server answered instead.
        """
        async for index, piece in self.generations:
            self._last[index] = piece
        choices = [self._shape.choice(i, piece) for i, piece in sorted(self._last.items())]
        head = {**self._head, "object": self._shape.kind}
        return {**head, "choices": choices, "usage": self._usage()}

    async def events(self) -> AsyncIterator[bytes]:
        """Yield server-sent events, an error among them; [DONE] ends what went well."""
        usage = {"usage": None} if self._include_usage else {}
        head = {**self._head, "object": self._shape.chunk_kind}
        try:
            async for index, piece in self.generations:
                self._last[index] = piece
                for delta in self._shape.deltas(index, piece):
                    yield _event({**head, "choices": [delta], **usage})
        except ApiError as error:
            yield _event(error.body)
            return
        if self._include_usage:
            yield _event({**head, "choices": [], "usage": self._usage()})
        yield DONE

    def _usage(self) -> Usage:
        num_input = sum(
            piece.num_input_tokens
            for index, piece in self._last.items()
            if index % self._num_choices == 0
        )
        num_output = sum(piece.num_output_tokens for piece in self._last.values())
        return {
            "prompt_tokens": num_input,
            "completion_tokens": num_output,
            "total_tokens": num_input + num_output,
        }


class EventStream(StreamingResponse):
    """A streamed answer whose generations end with it, also when the client leaves."""

    media_type = "text/event-stream"

    def __init__(self, answer: Answer) -> None:
        super().__init__(answer.events(), headers={**answer.headers, "Cache-Control": "no-cache"})
        self._generations = answer.generations

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._generations.abandon()


def json_response(
    content: Mapping[str, Any], status: int = 200, headers: Mapping[str, str] | None = None
) -> Response:
    """Answer in ASCII, which also carries the half characters that a bad request can name."""
    return Response(_json(content), status, dict(headers or {}), "application/json")


def _event(content: Mapping[str, Any]) -> bytes:
    return b"data: " + _json(content) + b"\n\n"


def _json(content: Mapping[str, Any]) -> bytes:
    return json.dumps(content, separators=(",", ":"), allow_nan=False).encode()
