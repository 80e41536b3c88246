"""Clients of every kind, each chosen by chance, and what became of each: see `bench.soak`.

A client comes over gRPC, HTTP or the OpenAI endpoint, greedy or sampled, with or without
objectives, class and draft options, and may change its mind: it closes its HTTP connection or has
itself stopped by its request id. gRPC streams are always read to their end: cancelling one can
abort server 2.51.
"""

import asyncio
import contextlib
import json
import random
import re
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import openai
import tritonclient.grpc.aio as triton

from bench.grpc_client import stream as grpc_stream
from bench.http_client import EVENT
from bench.reference_texts import Reference
from specserve.openai.chat_template import ChatTemplate
from specserve.openai.schema import Message

MODELS = ("ensemble", "tensorrt_llm_bls", "specserve")
HUNG_S = 180.0  # the longest that any request may take, faults included
MAX_TOKENS = 48
MAX_EXAMPLES = 20
MAX_ERROR = 120
_NUMBER = re.compile(r"\d[\d.,]*")
_RETRIABLE = re.compile(r"try again")
_LOST = re.compile(r"the connection failed|Connection error|UNAVAILABLE|not ready|Socket closed")


@dataclass(slots=True)
class Visit:
    """One request on its way.

    Attributes:
        num_pieces: leave, or be stopped, after so many; None reads to the end.
        is_stopped: by its request id; else it leaves by closing its connection.
        has_left: before the end.
    """

    reference: Reference
    max_tokens: int
    request_id: str
    options: dict[str, Any]
    num_pieces: int | None = None
    is_stopped: bool = False
    has_left: bool = False
    text: str = ""
    error: str | None = None


@dataclass(slots=True)
class Tally:
    """What became of all requests.

    Attributes:
        errors: what they were told, numbers left out.
        examples: of those that fared as none should.
    """

    outcomes: Counter[str] = field(default_factory=Counter)
    errors: Counter[str] = field(default_factory=Counter)
    kinds: Counter[str] = field(default_factory=Counter)
    examples: list[str] = field(default_factory=list)

    def add(self, kind: str, visit: Visit) -> str:
        """Judge one request; return the outcome."""
        outcome = judge(visit)
        self.kinds[kind] += 1
        self.outcomes[outcome] += 1
        if visit.error is not None:
            self.errors[_NUMBER.sub("#", visit.error)[:MAX_ERROR]] += 1
        if outcome in ("wrong", "broken", "hung") and len(self.examples) < MAX_EXAMPLES:
            expected = visit.reference.text(visit.max_tokens)
            self.examples.append(
                f"{outcome} {kind} {visit.options}: {visit.error} {visit.text!r} not {expected!r}"
            )
        return outcome


def judge(visit: Visit) -> str:
    """Say what became of a request; whatever text it got must be right."""
    expected = visit.reference.text(visit.max_tokens)
    if visit.error == "hung":
        return "hung"
    if not expected.startswith(visit.text):
        return "wrong"
    if visit.error is None:
        is_whole = visit.text == expected
        return "finished" if is_whole else "cancelled" if visit.has_left else "wrong"
    if visit.is_stopped and "cancelled by a stop request" in visit.error:
        return "cancelled"
    if _RETRIABLE.search(visit.error):
        return "told to try again"
    return "connection lost" if _LOST.search(visit.error) else "broken"


class Crowd:
    """Sends requests over all ways into one server."""

    def __init__(
        self,
        references: Sequence[Reference],
        chats: Sequence[Reference],
        seed: int,
        ports: dict[str, int],
    ) -> None:
        self.tally = Tally()
        self._references, self._chats = references, chats
        self._random = random.Random(seed)
        self._http_url = f"http://127.0.0.1:{ports['http']}/v2/models"
        self._grpc_address = f"127.0.0.1:{ports['grpc']}"
        self._openai_url = f"http://127.0.0.1:{ports['openai']}/v1"

    async def visit(self, num_clients: int, until_s: float) -> None:
        """Be so many clients, each with one request after the other, until the loop's time."""
        no_limit = aiohttp.TCPConnector(limit=0)
        async with (
            triton.InferenceServerClient(self._grpc_address) as self._grpc,
            aiohttp.ClientSession(connector=no_limit) as self._http,
            openai.AsyncOpenAI(
                base_url=self._openai_url, api_key="-", max_retries=0, timeout=HUNG_S
            ) as self._openai,
        ):
            await asyncio.gather(*(self._client(until_s) for _ in range(num_clients)))

    async def _client(self, until_s: float) -> None:
        ways = {"grpc": self._by_grpc, "http": self._by_http, "completion": self._by_completion}
        ways |= {"whole": self._by_http_whole, "chat": self._by_chat}
        while asyncio.get_running_loop().time() < until_s:
            kind = self._random.choice(list(ways))
            visit = self._new_visit(self._chats if kind == "chat" else self._references)
            try:
                await asyncio.wait_for(ways[kind](visit), HUNG_S)
            except TimeoutError:
                visit.error = "hung"
            outcome = self.tally.add(kind, visit)
            if outcome in ("connection lost", "told to try again"):
                await asyncio.sleep(self._random.uniform(0.2, 1.0))

    def _new_visit(self, references: Sequence[Reference]) -> Visit:
        rng = self._random
        options = rng.choice(
            [{}, {}, {"slo_ttft_ms": 500.0, "slo_tpot_ms": 40.0}, {"slo_tpot_ms": 100.0}]
        ) | rng.choice(
            [{}, {"draft_source": "ngram"}, {"draft_source": "none"}, {"max_draft_tokens": 2}]
        )  # fmt: skip
        name = rng.choice(["", "interactive", "batch"])
        reference = rng.choice(references)
        request_id = f"soak-{rng.getrandbits(64):x}"
        visit = Visit(reference, rng.randint(1, MAX_TOKENS), request_id, options)
        if name:
            visit.options["class"] = name
        if rng.random() < 0.3:
            visit.num_pieces, visit.is_stopped = rng.randint(0, 6), rng.random() < 0.5
        return visit

    # -- Triton's own protocols --------------------------------------------------------------

    async def _by_grpc(self, visit: Visit) -> None:
        stopping = asyncio.create_task(self._stop_later(visit))
        tensors = self._tensors(visit) | {"stream": True}
        answer = await grpc_stream(
            self._grpc, self._random.choice(MODELS), tensors, request_id=visit.request_id
        )
        visit.text, visit.error = answer.text, answer.error
        stopping.cancel()

    async def _stop_later(self, visit: Visit) -> None:
        """Stop a gRPC request whose pieces are not counted, after a while."""
        if visit.num_pieces is None:
            return
        visit.is_stopped = True
        await asyncio.sleep(0.05 * visit.num_pieces)
        await self._stop(visit)

    async def _by_http_whole(self, visit: Visit) -> None:
        visit.num_pieces = None
        body = self._tensors(visit) | {"id": visit.request_id}
        url = f"{self._http_url}/{self._random.choice(MODELS)}/generate"
        with _connection(visit):
            async with self._http.post(url, json=body) as response:
                answer = await response.json(content_type=None)
                visit.text = answer.get("text_output", "")
                visit.error = answer.get("error")

    async def _by_http(self, visit: Visit) -> None:
        body = self._tensors(visit) | {"stream": True, "id": visit.request_id}
        url = f"{self._http_url}/{self._random.choice(MODELS)}/generate_stream"
        with _connection(visit):
            async with self._http.post(url, json=body) as response:
                await self._read(visit, _events(response), self._take_event)
                if visit.has_left:
                    response.close()

    @staticmethod
    def _take_event(visit: Visit, event: dict[str, Any]) -> None:
        visit.text += event.get("text_output", "")
        visit.error = event.get("error", visit.error)

    @staticmethod
    def _tensors(visit: Visit) -> dict[str, Any]:
        sampling, options = visit.reference.sampling, dict(visit.options)
        tensors = {"text_input": visit.reference.prompt, "max_tokens": visit.max_tokens, **options}
        if name := tensors.pop("class", ""):
            tensors["priority_class"] = name
        if sampling.temperature:
            tensors |= {"temperature": sampling.temperature, "seed": sampling.seed}
        return tensors

    # -- OpenAI's ----------------------------------------------------------------------------

    async def _by_completion(self, visit: Visit) -> None:
        await self._by_openai(visit, self._openai.completions, {"prompt": visit.reference.prompt})

    async def _by_chat(self, visit: Visit) -> None:
        messages = [{"role": "user", "content": message_of(visit.reference)}]
        await self._by_openai(visit, self._openai.chat.completions, {"messages": messages})

    async def _by_openai(self, visit: Visit, api: Any, prompt: dict[str, Any]) -> None:
        visit.is_stopped = False  # its generations have names that only the endpoint knows
        sampling = visit.reference.sampling
        body = {
            "model": "specserve",
            "max_tokens": visit.max_tokens,
            "temperature": sampling.temperature,
            "seed": sampling.seed,
            "extra_body": _extra_body(visit.options),
            **prompt,
        }
        with _connection(visit):
            if visit.num_pieces is None and self._random.random() < 0.5:
                answer = await api.create(**body)
                visit.text = _text_of(answer.choices[0])
                return
            async with await api.create(**body, stream=True) as chunks:
                await self._read(visit, chunks, self._take_chunk)

    @staticmethod
    def _take_chunk(visit: Visit, chunk: Any) -> None:
        visit.text += _text_of(chunk.choices[0])

    # -- both --------------------------------------------------------------------------------

    async def _read(self, visit: Visit, pieces: AsyncIterator[Any], take: Any) -> None:
        """Read pieces until the end, or until this client has had enough."""
        num_pieces = 0
        if visit.num_pieces == 0 and not visit.is_stopped:
            visit.has_left = True
            return
        async for piece in pieces:
            take(visit, piece)
            num_pieces += 1
            if num_pieces == max(1, visit.num_pieces or 0) and visit.num_pieces is not None:
                if not visit.is_stopped:
                    visit.has_left = True
                    return
                await self._stop(visit)

    async def _stop(self, visit: Visit) -> None:
        body = {"stop": True, "id": visit.request_id}
        with contextlib.suppress(aiohttp.ClientError, TimeoutError):
            async with self._http.post(f"{self._http_url}/specserve/generate", json=body) as told:
                await told.read()


def render(template: ChatTemplate, message: str) -> str:
    """Return the prompt that a chat with one message leads to."""
    return template.render([Message(role="user", content=message)])


def message_of(chat: Reference) -> str:
    """Return the message that `render` put into the demo pair's plain template."""
    return chat.prompt.removeprefix("user: ").removesuffix("\nassistant:")


@contextlib.contextmanager
def _connection(visit: Visit) -> Any:
    """Note what the server or the connection said in place of an answer."""
    try:
        yield
    except aiohttp.ClientError as error:
        visit.error = f"the connection failed: {error!r}"
    except openai.APIError as error:
        visit.error = str(error)


async def _events(response: aiohttp.ClientResponse) -> AsyncIterator[dict[str, Any]]:
    if response.status != 200:
        yield {"error": await response.text()}
        return
    async for line in response.content:
        if line.startswith(EVENT):
            yield json.loads(line[len(EVENT) :])


def _extra_body(options: dict[str, Any]) -> dict[str, Any]:
    return {"slo_class" if name == "class" else name: value for name, value in options.items()}


def _text_of(choice: Any) -> str:
    if hasattr(choice, "text"):
        return choice.text
    return (choice.delta if hasattr(choice, "delta") else choice.message).content or ""
