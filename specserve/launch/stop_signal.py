"""SIGINT, SIGTERM and SIGHUP turned into a question that the serving loop asks."""

import signal
import time
from types import FrameType, TracebackType
from typing import Any

SECOND_SIGNAL_AFTER_S = 1.0  # make forwards a SIGTERM that its group got too: two at once are one
POLL_S = 0.05


class StopSignal:
    """Asked to stop, once or insistently; a context manager that restores the old handlers.

    SIGHUP that is ignored already (nohup) stays ignored. Must be entered in the main thread.
    """

    def __init__(self) -> None:
        self.requested = False
        self.insistent = False  # a second signal came, clearly later than the first
        self._first_s = 0.0
        self._previous: dict[signal.Signals, Any] = {}

    def wait(self, timeout_s: float) -> bool:
        """Wait for a request to stop and say whether there is one."""
        deadline = time.monotonic() + timeout_s
        # NOTE: sleeps, because setting a threading.Event inside a handler can deadlock with wait.
        while not self.requested and time.monotonic() < deadline:
            time.sleep(POLL_S)
        return self.requested

    def __enter__(self) -> "StopSignal":
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if number is signal.SIGHUP and signal.getsignal(number) is signal.SIG_IGN:
                continue
            self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        now_s = time.monotonic()
        if not self.requested:
            self.requested, self._first_s = True, now_s
        elif now_s - self._first_s > SECOND_SIGNAL_AFTER_S:
            self.insistent = True
