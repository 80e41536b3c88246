"""A log file moved to a stream while it grows, for whoever collects the logs of containers."""

import contextlib
import threading
from pathlib import Path
from types import TracebackType
from typing import TextIO

POLL_S = 0.2
MAX_BYTES = 16 * 2**20


class LogTail:
    """A context within which what is appended to `path` also goes to `stream`.

    The file is emptied when it has reached `max_bytes`, so that a server may run for months.
    """

    def __init__(self, path: Path, stream: TextIO, max_bytes: int = MAX_BYTES) -> None:
        self._path = path
        self._stream = stream
        self._max_bytes = max_bytes
        self._position = 0
        self._is_ending = threading.Event()
        self._thread = threading.Thread(target=self._run, name="specserve-log", daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._is_ending.set()
        self._thread.join()
        self._copy()

    def _run(self) -> None:
        while not self._is_ending.wait(POLL_S):
            self._copy()

    def _copy(self) -> None:
        # The file may not be there yet; a reader that left must not keep us from serving.
        with contextlib.suppress(OSError), self._path.open("r+b") as file:
            file.seek(self._position)
            data = file.read()
            self._position += len(data)
            if self._position >= self._max_bytes:
                file.truncate(0)
                self._position = 0
            self._stream.write(data.decode(errors="replace"))
            self._stream.flush()
