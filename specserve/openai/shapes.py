"""Choices in the shapes of OpenAI's API: one sent whole, and the pieces of one in a stream."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

from specserve.openai.answers import (
    ChatChoice,
    ChatDelta,
    ChatLogprobs,
    CompletionChoice,
    CompletionLogprobs,
    TokenLogprob,
)
from specserve.openai.piece import Piece
from specserve.openai.vocabulary import Vocabulary


class Shape(Protocol):
    """One kind of answer; an instance lives as long as the answer.

    Attributes:
        kind, chunk_kind: the `object` of an answer, and of the events of a stream.
    """

    kind: str
    chunk_kind: str

    def choice(self, index: int, piece: Piece) -> Mapping[str, Any]:
        """Return a choice of which the piece says everything."""

    def deltas(self, index: int, piece: Piece) -> Iterable[Mapping[str, Any]]:
        """Return what a stream says on the next piece of a choice, an event each."""


class CompletionShape:
    """/v1/completions, where a choice and a piece of one look the same.

    Args:
        prefixes: what each choice's text starts with.
    """

    kind = chunk_kind = "text_completion"

    def __init__(
        self, vocabulary: Vocabulary, with_logprobs: bool, prefixes: Sequence[str] = ()
    ) -> None:
        self._vocabulary = vocabulary
        self._with_logprobs = with_logprobs
        self._prefixes = dict(enumerate(prefixes))
        self._offsets: dict[int, int] = {}

    def choice(self, index: int, piece: Piece) -> CompletionChoice:
        """Return a choice or the next piece of it."""
        choice: CompletionChoice = {
            "index": index,
            "text": self._prefixes.pop(index, "") + piece.text,
            "logprobs": self._logprobs(index, piece) if self._with_logprobs else None,
            "finish_reason": piece.finish_reason,
        }
        if piece.speculation is not None:
            choice["speculation"] = piece.speculation
        return choice

    def deltas(self, index: int, piece: Piece) -> Iterable[CompletionChoice]:
        """Return one event."""
        return [self.choice(index, piece)]

    def _logprobs(self, index: int, piece: Piece) -> CompletionLogprobs:
        tokens = [self._vocabulary.text(token_id) for token_id in piece.token_ids]
        offsets, offset = [], self._offsets.get(index, 0)
        for token in tokens:
            offsets.append(offset)
            offset += len(token)
        self._offsets[index] = offset
        return {
            "tokens": tokens,
            "token_logprobs": list(piece.log_probs),
            "top_logprobs": None,
            "text_offset": offsets,
        }


class ChatShape:
    """/v1/chat/completions."""

    kind, chunk_kind = "chat.completion", "chat.completion.chunk"

    def __init__(self, vocabulary: Vocabulary, with_logprobs: bool) -> None:
        self._vocabulary = vocabulary
        self._with_logprobs = with_logprobs
        self._begun: set[int] = set()

    def choice(self, index: int, piece: Piece) -> ChatChoice:
        """Return a message."""
        assert piece.finish_reason is not None, "a whole choice has ended"
        choice: ChatChoice = {
            "index": index,
            "message": {"role": "assistant", "content": piece.text, "refusal": None},
            "logprobs": self._logprobs(piece),
            "finish_reason": piece.finish_reason,
        }
        if piece.speculation is not None:
            choice["speculation"] = piece.speculation
        return choice

    def deltas(self, index: int, piece: Piece) -> Iterable[ChatDelta]:
        """Return one event, before the first of a choice one that names the role."""
        if index not in self._begun:
            self._begun.add(index)
            yield {
                "index": index,
                "delta": {"role": "assistant", "content": ""},
                "logprobs": None,
                "finish_reason": None,
            }
        delta: ChatDelta = {
            "index": index,
            "delta": {"content": piece.text},
            "logprobs": self._logprobs(piece),
            "finish_reason": piece.finish_reason,
        }
        if piece.speculation is not None:
            delta["speculation"] = piece.speculation
        yield delta

    def _logprobs(self, piece: Piece) -> ChatLogprobs | None:
        if not self._with_logprobs:
            return None
        content: list[TokenLogprob] = [
            {
                "token": self._vocabulary.text(token_id),
                "logprob": log_prob,
                "bytes": self._vocabulary.bytes(token_id),
                "top_logprobs": [],
            }
            for token_id, log_prob in zip(piece.token_ids, piece.log_probs, strict=True)
        ]
        return {"content": content, "refusal": None}
