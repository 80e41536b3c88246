"""Triton's HTTP `generate_stream`, asynchronous: server-sent events, times of every one."""

import contextlib
import json
import time
from collections.abc import AsyncIterator, Mapping
from typing import Any

import aiohttp

from bench.answer import Answer

EVENT = b"data:"


class HttpClient:
    """One session with one model of a server. See `bench.load_generator.Client`."""

    def __init__(self, session: aiohttp.ClientSession, url: str) -> None:
        self._session = session
        self._url = url

    @classmethod
    @contextlib.asynccontextmanager
    async def connect(cls, address: str, model: str) -> "AsyncIterator[HttpClient]":
        """Open a session for the time of the context, with as many connections as it takes."""
        connector = aiohttp.TCPConnector(limit=0)
        forever = aiohttp.ClientTimeout(total=None)
        async with aiohttp.ClientSession(connector=connector, timeout=forever) as session:
            yield cls(session, f"http://{address}/v2/models/{model}/generate_stream")

    async def send(self, tensors: Mapping[str, Any]) -> Answer:
        """Stream one request to its end."""
        answer = Answer(sent_s=time.perf_counter())
        try:
            async with self._session.post(self._url, json=dict(tensors)) as response:
                if response.status != 200:
                    answer.error = await response.text()
                    return answer
                async for line in response.content:
                    if line.startswith(EVENT):
                        _take(answer, json.loads(line[len(EVENT) :]))
        except aiohttp.ClientError as error:
            answer.error = f"the connection failed: {error}"
        return answer


def _take(answer: Answer, event: dict[str, Any]) -> None:
    if "error" in event:
        answer.error = event["error"]
        return
    answer.response_s.append(time.perf_counter())
    answer.text += event.pop("text_output", "")
    answer.tensors |= event
