"""Calls that may never return, made in a thread that can be left behind. Knows nothing of them."""

import queue
import threading
from collections.abc import Callable
from typing import Generic, ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")

_Answers = queue.SimpleQueue[tuple[R | None, BaseException | None]]
_Inbox = queue.SimpleQueue[tuple[_Answers[R], Callable[[], R]] | None]


class Deadline(Generic[P, R]):
    """A callable that is given up after a while; to be called by one thread.

    Calls run in a thread of their own. One that is late keeps that thread, for ever perhaps, and
    what it returns is dropped; the next call gets a new thread.
    """

    def __init__(self, call: Callable[P, R], timeout_s: float) -> None:
        self._call = call
        self._timeout_s = timeout_s
        self._inbox: _Inbox[R] | None = None

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """Call, and wait for the result.

        Raises:
            TimeoutError: if it has not come in time; else whatever the call raises.
        """
        if self._inbox is None:
            self._inbox = _start()
        answers: _Answers[R] = queue.SimpleQueue()
        self._inbox.put((answers, lambda: self._call(*args, **kwargs)))
        try:
            result, error = answers.get(timeout=self._timeout_s)
        except queue.Empty:
            self.close()
            raise TimeoutError(f"no answer in {self._timeout_s:g} s") from None
        if error is not None:
            raise error
        return result  # type: ignore[return-value]  # None only if the call returned it

    def close(self) -> None:
        """Let the thread end when it has nothing left to do."""
        if self._inbox is not None:
            self._inbox.put(None)
            self._inbox = None


def _start() -> _Inbox[R]:
    inbox: _Inbox[R] = queue.SimpleQueue()
    threading.Thread(target=_run, args=(inbox,), name="specserve-call", daemon=True).start()
    return inbox


def _run(inbox: _Inbox[R]) -> None:
    while (item := inbox.get()) is not None:
        answers, call = item
        try:
            answers.put((call(), None))
        except Exception as error:
            answers.put((None, error))
