"""The shapes of what clients get: the same dictionaries that are sent, described for OpenAPI."""

from typing import Literal, NotRequired

from typing_extensions import TypedDict  # pydantic asks for it before Python 3.12

FinishReason = Literal["stop", "length"]


class Usage(TypedDict):
    """Tokens of a whole response."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class Speculation(TypedDict):
    """How speculation went for one choice; times by the server's clock."""

    verified_draft_tokens: int
    accepted_draft_tokens: int
    acceptance_rate: float
    queue_ms: float
    ttft_ms: float
    tpot_ms: float


class CompletionLogprobs(TypedDict):
    """Log probabilities of the tokens of a text; offsets count characters."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: None
    text_offset: list[int]


class CompletionChoice(TypedDict):
    """A text, or the next piece of it."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason | None
    speculation: NotRequired[Speculation]


class Completion(TypedDict):
    """The answer of /v1/completions, and each event of its stream."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: NotRequired[Usage | None]


class TokenLogprob(TypedDict):
    """One token of a message; `bytes` is null for a token that is part of a character."""

    token: str
    logprob: float
    bytes: list[int] | None
    top_logprobs: list[None]


class ChatLogprobs(TypedDict):
    """Log probabilities of the tokens of a message."""

    content: list[TokenLogprob]
    refusal: None


class AssistantMessage(TypedDict):
    """What the model said."""

    role: Literal["assistant"]
    content: str
    refusal: None


class Delta(TypedDict):
    """The next piece of a message; the first names the role."""

    role: NotRequired[Literal["assistant"]]
    content: NotRequired[str]


class ChatChoice(TypedDict):
    """A message."""

    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason
    speculation: NotRequired[Speculation]


class ChatDelta(TypedDict):
    """A piece of a message."""

    index: int
    delta: Delta
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason | None
    speculation: NotRequired[Speculation]


class ChatCompletion(TypedDict):
    """The answer of /v1/chat/completions."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class ChatChunk(TypedDict):
    """Each event of the stream of /v1/chat/completions."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChatDelta]
    usage: NotRequired[Usage | None]


class Model(TypedDict):
    """An entry of /v1/models."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: int


class ModelList(TypedDict):
    """The answer of /v1/models."""

    object: Literal["list"]
    data: list[Model]


class ErrorBody(TypedDict):
    """What went wrong, in OpenAI's words for it."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorAnswer(TypedDict):
    """The answer of everything that failed."""

    error: ErrorBody


class Health(TypedDict):
    """The answer of /health."""

    status: Literal["ok"]
