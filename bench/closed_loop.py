"""A closed loop of requests on one core, run in turns with others, and what it has measured."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from specserve.core import SpecServe
from specserve.request import Request


class Stopwatch:
    """A clock that runs only while it is told to: of loops that take turns, each has its own."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._elapsed_s = 0.0
        self._started: float | None = None

    def __call__(self) -> float:
        """Return the seconds that it has run."""
        running_s = 0.0 if self._started is None else self._clock() - self._started
        return self._elapsed_s + running_s

    @contextmanager
    def running(self) -> Iterator[None]:
        """Let it run."""
        self._started = self._clock()
        try:
            yield
        finally:
            self._elapsed_s, self._started = self(), None


@dataclass(slots=True)
class ClosedLoop:
    """So many requests at once for as long as there are enough of them.

    Attributes:
        clock: the core's.
        num_tokens, seconds: of the steps in which every row decoded, without prompt tokens.
    """

    core: SpecServe
    clock: Stopwatch
    concurrency: int
    num_tokens: int = 0
    seconds: float = 0.0

    def submit(self, requests: Iterable[Request]) -> None:
        """Take requests of equal length."""
        for request in requests:
            self.core.scheduler.submit(request, self.clock())

    def advance(self, num_steps: int) -> bool:
        """Run so many steps, fewer if the loop is not full any more; return whether it is."""
        with self.clock.running():
            while num_steps and len(self.core.scheduler.requests) >= self.concurrency:
                self._step()
                num_steps -= 1
        return not num_steps

    @property
    def rate(self) -> float:
        """Output tokens per second of pure decoding.

        Raises:
            ValueError: there was none.
        """
        if not self.seconds:
            raise ValueError(
                f"in no step did all {self.concurrency} rows decode: rows end before the last one "
                "has its prompt; raise --requests or --max-tokens"
            )
        return self.num_tokens / self.seconds

    @property
    def rate_with_prompts(self) -> float:
        """Output tokens per second of everything."""
        return self.core.stats.num_output_tokens / self.clock()

    def _step(self) -> None:
        stats, before_s = self.core.stats, self.clock()
        num_base, num_output = stats.num_base_tokens, stats.num_output_tokens
        self.core.step()
        if stats.num_base_tokens - num_base == self.concurrency:  # one each: no prompt in the step
            self.num_tokens += stats.num_output_tokens - num_output
            self.seconds += self.clock() - before_s
