"""What a request body may say: names, types, ranges. What it leads to is in `translate`.

Names and meanings are OpenAI's; below them those that vLLM and others added, and our own. A field
typed None or with one value is known and not served: giving another value is refused by name.
"""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

MAX_INT32 = 2**31 - 1


def _encodable(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:  # JSON can say \ud800 alone, UTF-8 cannot
        raise ValueError("half a surrogate pair is no character: send valid Unicode") from None
    return text


Bias = Annotated[float, Field(ge=-100.0, le=100.0)]
Count = Annotated[int, Field(ge=0, le=MAX_INT32)]
Length = Annotated[int, Field(ge=1, le=MAX_INT32)]
Milliseconds = Annotated[float, Field(gt=0.0, le=1e9)]
Text = Annotated[str, AfterValidator(_encodable)]
Penalty = Annotated[float, Field(ge=-2.0, le=2.0)]
TokenId = Annotated[int, Field(ge=0, le=MAX_INT32)]
TokenKey = Annotated[str, Field(pattern=r"^[0-9]{1,9}$")]
TokenIds = Annotated[list[TokenId], Field(min_length=1)]


class Strict(BaseModel):
    """Takes what it declares, as the type it declares."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class StreamOptions(Strict):
    """How a stream reports."""

    include_usage: bool | None = None


class Generation(Strict):
    """What both kinds of completion share."""

    model: Text
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1, le=128)] | None = None
    temperature: Annotated[float, Field(ge=0.0, le=2.0)] | None = None
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    logit_bias: dict[TokenKey, Bias] | None = None
    stop: Text | list[Text] | None = None
    seed: int | None = None

    # Accepted, and without effect on what is generated.
    user: Text | None = None

    # Added by vLLM and others.
    top_k: Annotated[int, Field(ge=-1, le=MAX_INT32)] | None = None
    min_p: Annotated[float, Field(ge=0.0, le=1.0)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100.0)] | None = None
    min_tokens: Count | None = None
    ignore_eos: bool | None = None

    # Our own.
    slo_ttft_ms: Milliseconds | None = None
    slo_tpot_ms: Milliseconds | None = None
    slo_class: Text | None = None
    max_draft_tokens: Count | None = None
    draft_source: Text | None = None
    speculation: bool | None = None


class CompletionRequest(Generation):
    """The body of /v1/completions; a prompt is a text or its token ids, one or several."""

    prompt: Text | TokenIds | Annotated[list[Text] | list[TokenIds], Field(min_length=1)]
    max_tokens: Length | None = None
    echo: bool | None = None
    logprobs: Literal[0] | None = None
    best_of: Literal[1] | None = None
    suffix: Literal[""] | None = None


class TextPart(Strict):
    """A piece of a message."""

    type: Literal["text"]
    text: Text


class Message(Strict):
    """One turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Text | list[TextPart]
    name: Text | None = None

    @property
    def text(self) -> str:
        """The content, its parts joined."""
        if isinstance(self.content, str):
            return self.content
        return "".join(part.text for part in self.content)


class TextFormat(Strict):
    """The one response format there is."""

    type: Literal["text"]


class ChatRequest(Generation):
    """The body of /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Length | None = None
    max_tokens: Length | None = None
    logprobs: bool | None = None
    top_logprobs: Literal[0] | None = None
    response_format: TextFormat | None = None
    tools: Annotated[list[Any], Field(max_length=0)] | None = None
    tool_choice: Literal["none", "auto"] | None = None

    # Accepted, and without effect on what is generated.
    metadata: dict[str, str] | None = None
    store: Literal[False] | None = None
    parallel_tool_calls: bool | None = None
