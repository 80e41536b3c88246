"""Text in and out: prompts to token ids, output tokens to text that never breaks a character."""

from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

__all__ = ["TextStream", "encode", "load_tokenizer"]


def load_tokenizer(engine_dir: Path) -> Tokenizer:
    """Read `tokenizer.json` of an engine folder.

    Raises:
        ValueError: if it is missing or cannot be read.
    """
    path = engine_dir / "tokenizer.json"
    if not path.is_file():
        raise ValueError(f"{engine_dir} has no tokenizer.json: build the engine again")
    return Tokenizer.from_file(str(path))


def encode(tokenizer: Tokenizer, text: str) -> list[int]:
    """Return the tokens of a prompt, leaving Python to other threads meanwhile.

    NOTE: `Tokenizer.encode` keeps Python's lock, for seconds if the prompt is a megabyte.
    """
    token_ids: list[int] = tokenizer.encode_batch_fast([text])[0].ids
    return token_ids


class TextStream:
    """Turn a request's output tokens into text, step by step, and end at a stop word.

    Text is given out as soon as no stop word can begin in it any more. The stop word itself is not
    part of the text, nor is the end token. A character whose bytes are not complete yet is held
    back; if the output ends there, it is dropped.

    Attributes:
        num_tokens: tokens taken, up to and including the one that completed a stop word.
    """

    def __init__(
        self, tokenizer: Tokenizer, stop_words: Sequence[str] = (), end_id: int | None = None
    ) -> None:
        self._tokenizer = tokenizer
        self._end_id = end_id
        self._stop_words = [word for word in stop_words if word]
        self._decoder = DecodeStream(skip_special_tokens=True)
        self._held = ""
        self._undecoded: list[int] = []  # tokens since the last character that was complete
        self.num_tokens = 0
        self.is_stopped = False

    def push(self, token_ids: Sequence[int]) -> str:
        """Take tokens; return the text they settle, possibly empty."""
        settled = ""
        for token_id in token_ids:
            if self.is_stopped:
                break
            self.num_tokens += 1
            if token_id == self._end_id:
                continue
            self._undecoded.append(token_id)
            piece = self._decoder.step(self._tokenizer, token_id)
            if piece:
                self._undecoded.clear()
                settled += self._settle(piece)
        return settled

    def finish(self) -> str:
        """Return the text held back: for a stop word that did not come, or before a character."""
        if self.is_stopped:
            return ""
        text: str = self._tokenizer.decode(self._undecoded, skip_special_tokens=True)
        settled = self._settle(text.rstrip("\ufffd"))
        held, self._held = self._held, ""
        return settled if self.is_stopped else settled + held

    def _settle(self, piece: str) -> str:
        self._held += piece
        found = [at for word in self._stop_words if (at := self._held.find(word)) >= 0]
        if found:
            self.is_stopped = True
            return self._held[: min(found)]
        keep = max((_overlap(self._held, word) for word in self._stop_words), default=0)
        settled, self._held = (
            self._held[: len(self._held) - keep],
            self._held[len(self._held) - keep :],
        )
        return settled


def _overlap(text: str, word: str) -> int:
    """Return the length of the longest proper prefix of `word` that `text` ends with."""
    longest = min(len(text), len(word) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(word[:n])), 0)
