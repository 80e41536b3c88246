"""Other servers on the same job: what a peer is, and what is compared."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol


@dataclass(frozen=True, slots=True)
class Load:
    """Greedy requests of one length, `concurrency` of them at a time.

    Attributes:
        prompts: token ids of each request's prompt.
        max_tokens: that each request outputs exactly; end tokens are ignored.
    """

    prompts: Sequence[list[int]]
    concurrency: int
    max_tokens: int


class Run(NamedTuple):
    """A load that was served.

    Attributes:
        seconds: from the first request sent to the last token received, prompts included.
        texts: in the order of the prompts.
    """

    num_tokens: int
    seconds: float
    texts: list[str]


class Peer(Protocol):
    """A way to serve the pair, with its model loaded.

    Attributes:
        arms: its settings, by name.
        max_concurrency: what it can serve at a time.
    """

    @property
    def arms(self) -> tuple[str, ...]: ...
    @property
    def max_concurrency(self) -> int: ...

    def run(self, arm: str, load: Load) -> Run:
        """Serve a load."""
