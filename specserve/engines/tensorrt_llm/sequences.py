"""The tokens of each request, kept because the executor wants all of them with every call."""

from collections.abc import Sequence


class Sequences:
    """What is known of each sequence, by request key.

    A row names the position of its first token. What stands before is what this object was told
    earlier, or it is missing and the row cannot run: a request's context is never guessed.
    """

    def __init__(self) -> None:
        self._token_ids: dict[int, list[int]] = {}

    def __len__(self) -> int:
        return len(self._token_ids)

    def put(self, key: int, start: int, token_ids: Sequence[int]) -> list[int] | None:
        """Put tokens at [start, start + len(token_ids)), forgetting what stood there and after.

        Returns:
            The whole sequence; None if tokens before `start` were never seen, as after a restart of
            this process.
        """
        known = self._token_ids.setdefault(key, [])
        if len(known) < start:
            del self._token_ids[key]
            return None
        known[start:] = token_ids
        return known[:]

    def append(self, key: int, token_ids: Sequence[int]) -> None:
        """Add tokens that may turn out to follow; the next `put` says which of them do."""
        self._token_ids[key].extend(token_ids)

    def release(self, keys: Sequence[int]) -> None:
        """Forget requests; unknown keys are ignored."""
        for key in keys:
            self._token_ids.pop(key, None)
