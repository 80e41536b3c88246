"""The generations behind one HTTP request, and their pieces in the order in which they come."""

import asyncio
from collections.abc import Sequence
from functools import partial

from specserve.openai.errors import ApiError
from specserve.openai.piece import Piece
from specserve.openai.translate import Tensors
from specserve.openai.triton_client import TritonClient


class Generations:
    """Iterates over (index of the choice, piece) until every choice has ended.

    An error of one choice ends all. Whoever starts generations abandons them in the end.
    """

    def __init__(self, client: TritonClient, response_id: str, choices: Sequence[Tensors]) -> None:
        self._client = client
        self._choices = {f"{response_id}-{index}": one for index, one in enumerate(choices)}
        self._running = set(self._choices)
        self._events: asyncio.Queue[tuple[int, str, Piece | ApiError | None]] = asyncio.Queue()
        self._first: tuple[int, Piece] | None = None

    def start(self) -> None:
        """Send all choices to the server."""
        for index, (request_id, tensors) in enumerate(self._choices.items()):
            self._client.generate(request_id, tensors, partial(self._put, index, request_id))

    async def wait_for_first(self) -> None:
        """Return when the first piece is there, so that an error before it can be a status.

        Raises:
            ApiError: what the server answered instead.
        """
        self._first = await self.__anext__()

    def abandon(self) -> None:
        """Stop what still runs; after the end this does nothing."""
        for request_id in self._running:
            self._client.stop(request_id)
        self._running.clear()

    def _put(self, index: int, request_id: str, event: Piece | ApiError | None) -> None:
        self._events.put_nowait((index, request_id, event))

    def __aiter__(self) -> "Generations":
        return self

    async def __anext__(self) -> tuple[int, Piece]:
        if self._first is not None:
            first, self._first = self._first, None
            return first
        while self._running:
            index, request_id, event = await self._events.get()
            if isinstance(event, Piece):
                return index, event
            self._running.discard(request_id)
            if event is not None:
                raise event
        raise StopAsyncIteration
