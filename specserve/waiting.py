"""The requests that wait: in which order, how many, and whose turn it is.

Order within a class is by deadline; between classes it is by their shares.
"""

from bisect import insort
from collections import Counter
from collections.abc import Callable, Iterator, Mapping

from specserve.request import Request

DEFAULT = ""  # the class of requests whose own class has no share


class WaitingQueue:
    """A queue with one place for each waiting request.

    Turns go by start-time fair queueing (Goyal et al. 1996) over prompt and output tokens: a class
    with twice the share gets twice the tokens while both wait, and what one does not use is the
    others'. Who was preempted comes before everybody.

    Args:
        deadline_s: when the first token of a request is due.
        shares: weight of each class; the other classes share one place with weight 1.

    Raises:
        ValueError: a share that is not above 0 and finite.
    """

    def __init__(
        self, deadline_s: Callable[[Request], float], shares: Mapping[str, float] | None = None
    ) -> None:
        for name, share in (shares or {}).items():
            if not 0.0 < share < float("inf"):
                raise ValueError(f"slo.shares.{name} is {share}: must be above 0 and finite")
        self._deadline_s = deadline_s
        self._shares = {DEFAULT: 1.0, **(shares or {})}
        self._requests: list[Request] = []
        self._counts: Counter[str] = Counter()
        self._tokens: Counter[str] = Counter()
        self._served: dict[str, float] = dict.fromkeys(self._shares, 0.0)  # tokens per share
        self._now = 0.0  # what the class served last had got when its turn came

    def __len__(self) -> int:
        return len(self._requests)

    def __iter__(self) -> Iterator[Request]:
        return iter(self._requests)

    @property
    def num_tokens(self) -> int:
        """Tokens that wait to be computed."""
        return self._tokens.total()

    def put(self, request: Request) -> None:
        """Take a request in behind those that are due earlier."""
        self._count(request, 1)
        insort(self._requests, request, key=self._deadline_s)

    def put_first(self, request: Request) -> None:
        """Take a request in before all others."""
        self._count(request, 1)
        self._requests.insert(0, request)

    def remove(self, request: Request) -> None:
        """Let a request go.

        Raises:
            ValueError: if it is not here.
        """
        self._requests.remove(request)
        self._count(request, -1)

    def next(self) -> Request:
        """Return the request whose turn it is; there must be one."""
        first = self._requests[0]
        if first.num_preemptions or len(self._shares) == 1:
            return first
        name = min(+self._counts, key=self._served.__getitem__)
        return next(r for r in self._requests if self.class_of(r) == name)

    def take(self, request: Request) -> None:
        """Let a request go because its turn has come, at the expense of its class."""
        self.remove(request)
        name = self.class_of(request)
        self._now = self._served[name]
        self._served[name] += (request.num_prompt_tokens + request.max_tokens) / self._shares[name]

    def usage_of(self, request: Request) -> tuple[int, int, float]:
        """Return how many of the request's class wait, their tokens, and its part of all shares."""
        name = self.class_of(request)
        share = self._shares[name] / sum(self._shares.values())
        return self._counts[name], self._tokens[name], share

    def class_of(self, request: Request) -> str:
        """Return the class that a request's turn counts for."""
        name = request.priority_class
        return name if name in self._shares else DEFAULT

    def _count(self, request: Request, change: int) -> None:
        name = self.class_of(request)
        if change > 0 and not self._counts[name]:  # a class saves up nothing while it is away
            self._served[name] = max(self._served[name], self._now)
        self._counts[name] += change
        self._tokens[name] += change * request.num_uncomputed_tokens
