"""What the endpoint does with a request: prompt, generations, answer."""

import asyncio
import secrets
from collections.abc import Awaitable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from fastapi import Request, Response

from specserve.openai.answer import Answer, EventStream, json_response
from specserve.openai.chat_template import ChatTemplate
from specserve.openai.errors import ApiError, bad_request
from specserve.openai.generations import Generations
from specserve.openai.schema import ChatRequest, CompletionRequest, Generation, Message
from specserve.openai.shapes import ChatShape, CompletionShape, Shape
from specserve.openai.translate import (
    DEFAULT_MAX_TOKENS,
    Prompt,
    choices_of,
    common_tensors,
    prompts_of,
    with_slo_headers,
)
from specserve.openai.triton_client import TritonClient
from specserve.openai.vocabulary import Vocabulary

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Service:
    """One model behind the endpoint.

    Attributes:
        max_model_len: prompt and output tokens that one generation may have.
        max_choices: generations behind one request.
    """

    client: TritonClient
    vocabulary: Vocabulary
    template: ChatTemplate
    model: str
    max_model_len: int
    max_choices: int

    async def complete(self, body: CompletionRequest, request: Request) -> Response:
        """Answer /v1/completions."""
        prompts, with_logprobs = prompts_of(body), body.logprobs is not None
        if body.echo and with_logprobs:
            raise bad_request(
                "echo with logprobs is not supported, prompt tokens have none: leave one out",
                "echo",
            )
        num_choices = body.n or 1
        prefixes = [self._text(one) for one in prompts for _ in range(num_choices) if body.echo]
        shape = CompletionShape(self.vocabulary, with_logprobs, prefixes)
        max_tokens = body.max_tokens or DEFAULT_MAX_TOKENS
        return await self._answer(body, request, prompts, max_tokens, shape, "cmpl")

    async def chat(self, body: ChatRequest, request: Request) -> Response:
        """Answer /v1/chat/completions."""
        asked = {n for n in (body.max_tokens, body.max_completion_tokens) if n is not None}
        if len(asked) > 1:
            raise bad_request(
                "max_tokens and max_completion_tokens are two names of one thing: give one of them",
                "max_tokens",
            )
        prompt = await asyncio.to_thread(self._chat_prompt, body.messages)
        max_tokens = asked.pop() if asked else max(1, self.max_model_len - len(prompt))
        shape = ChatShape(self.vocabulary, bool(body.logprobs))
        return await self._answer(body, request, [prompt], max_tokens, shape, "chatcmpl")

    def check_model(self, model: str) -> None:
        """Refuse any model but ours.

        Raises:
            ApiError: naming the one there is.
        """
        if model != self.model:
            raise ApiError(
                404,
                f"model {model[:80]!r} does not exist: there is '{self.model}'",
                code="model_not_found",
                param="model",
            )

    async def _answer(
        self,
        body: Generation,
        request: Request,
        prompts: Sequence[Prompt],
        max_tokens: int,
        shape: Shape,
        kind: str,
    ) -> Response:
        self.check_model(body.model)
        num_choices = body.n or 1
        if len(prompts) * num_choices > self.max_choices:
            raise bad_request(
                f"{len(prompts)} prompts times n = {num_choices} are "
                f"{len(prompts) * num_choices} choices: the limit is {self.max_choices}",
                "n",
            )
        common = common_tensors(body, max_tokens, with_slo_headers(body, request.headers))
        choices = choices_of(prompts, num_choices, body.seed, common)
        response_id = f"{kind}-{secrets.token_hex(16)}"
        answer = Answer(
            response_id,
            self.model,
            shape,
            Generations(self.client, response_id, choices),
            num_choices=num_choices,
            include_usage=bool(body.stream_options and body.stream_options.include_usage),
        )
        return await _respond(answer, request, is_stream=bool(body.stream))

    def _chat_prompt(self, messages: Sequence[Message]) -> list[int]:
        return self.vocabulary.encode(self.template.render(messages))

    def _text(self, prompt: Prompt) -> str:
        return prompt if isinstance(prompt, str) else self.vocabulary.decode(prompt)


async def _respond(answer: Answer, request: Request, *, is_stream: bool) -> Response:
    """Generate; whatever happens on the way to a response, nothing is left running."""
    answer.generations.start()
    try:
        if is_stream:
            await _unless_gone(request, answer.generations.wait_for_first())
            return EventStream(answer)
        whole = await _unless_gone(request, answer.whole())
        return json_response(whole, headers=answer.headers)
    except BaseException:
        answer.generations.abandon()
        raise


async def _unless_gone(request: Request, work: Awaitable[T]) -> T:
    """Wait for work, but not for a client who has left."""
    working = asyncio.ensure_future(work)
    leaving = asyncio.create_task(_gone(request))
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ApiError(499, "the client has gone")
        return working.result()
    finally:
        working.cancel()
        leaving.cancel()


async def _gone(request: Request) -> None:
    message: Mapping[str, object] = {}
    while message.get("type") != "http.disconnect":
        message = await request.receive()
