"""Token ids as clients see them: one text for each."""

from collections.abc import Sequence

from tokenizers import Tokenizer

_INCOMPLETE = "\ufffd"


class Vocabulary:
    """The tokenizer's side of prompts and log probabilities."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def encode(self, text: str) -> list[int]:
        """Tokenize a text that brings its own special tokens, as chat templates do."""
        token_ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return token_ids

    def decode(self, token_ids: Sequence[int]) -> str:
        """Return the text of token ids."""
        text: str = self._tokenizer.decode(list(token_ids), skip_special_tokens=False)
        return text

    def text(self, token_id: int) -> str:
        """Return the text of one token; U+FFFD stands for part of a character."""
        piece: str | None = self._tokenizer.id_to_token(token_id)
        if piece is not None and "\u2581" in piece:  # decoding it alone would drop the space
            return piece.replace("\u2581", " ")
        return self.decode([token_id])

    def bytes(self, token_id: int) -> list[int] | None:
        """Return the UTF-8 of one token, None for part of a character."""
        text = self.text(token_id)
        return None if _INCOMPLETE in text else list(text.encode())
