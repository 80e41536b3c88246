"""Prompt lookup: what followed the same tokens earlier in the request is proposed again, for free.

Knows token ids only. Source: Saxena 2023, "Prompt Lookup Decoding".
"""

from collections.abc import Sequence

from specserve.batch import Draft

NGRAMS = (4, 3, 2)  # tokens of the end that must have been seen, the longest first
MAX_MATCH = 64  # tokens compared backwards, to say how sure a proposal is


class PromptLookup:
    """The n-grams of each request, indexed as its tokens arrive."""

    def __init__(self) -> None:
        self._requests: dict[int, _Index] = {}

    def propose(
        self, key: int, token_ids: Sequence[int], max_tokens: int, num_prompt_tokens: int
    ) -> Draft | None:
        """Continue as after the latest place where the last tokens stood before.

        Of `match` tokens in a row that agreed, Laplace's rule of succession expects the next to
        agree with probability (match + 1) / (match + 2); for the tokens after it, the proposed ones
        before them count as agreed.

        Args:
            token_ids: all known tokens of the request; those seen before must not have changed.
            num_prompt_tokens: of these, the first ones that are the prompt.

        Returns:
            At most `max_tokens` tokens, or None if nothing stood before.
        """
        index = self._requests.setdefault(key, _Index())
        index.extend(token_ids)
        start = index.find(token_ids)
        if start is None or max_tokens < 1:
            return None
        proposed = _copy(token_ids, start, max_tokens)
        match = _match(token_ids, start)
        sure = [(n + 1) / (n + 2) for n in range(match, match + len(proposed))]
        return Draft(proposed, sure, repeats_output=start >= num_prompt_tokens)

    def release(self, keys: Sequence[int]) -> None:
        """Forget requests; unknown keys are ignored."""
        for key in keys:
            self._requests.pop(key, None)


class _Index:
    """Where each n-gram of one request ended last; the one at the very end is not in it yet."""

    def __init__(self) -> None:
        self._ends: dict[tuple[int, ...], int] = {}
        self._num_indexed = 0

    def extend(self, token_ids: Sequence[int]) -> None:
        for end in range(self._num_indexed + 1, len(token_ids)):
            for n in NGRAMS:
                if n <= end:
                    self._ends[tuple(token_ids[end - n : end])] = end
        self._num_indexed = max(self._num_indexed, len(token_ids) - 1)

    def find(self, token_ids: Sequence[int]) -> int | None:
        """Return where the text went on after an earlier copy of its last tokens."""
        for n in NGRAMS:
            end = self._ends.get(tuple(token_ids[-n:])) if len(token_ids) > n else None
            if end is not None:
                return end
        return None


def _copy(token_ids: Sequence[int], start: int, count: int) -> list[int]:
    """Copy from `start` on; past the end, what was copied: a text that repeats itself goes on."""
    copied = list(token_ids[start : start + count])
    period = len(copied)
    return [copied[i % period] for i in range(count)]


def _match(token_ids: Sequence[int], start: int) -> int:
    """Count the tokens before `start` that also end the text."""
    longest = min(start, MAX_MATCH)
    for n in range(longest):
        if token_ids[start - 1 - n] != token_ids[-1 - n]:
            return n
    return longest
