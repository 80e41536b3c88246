"""A short history of a server, read while somebody looks and shared by all who do."""

import asyncio
import contextlib
import time
from collections import deque

from specserve.view.frame import Frame, between
from specserve.view.read import read
from specserve.view.samples import Samples

INTERVAL_S = 1.0
KEPT_S = 300.0
LOOK_S = 10.0  # a page asks every second; it has gone when it has not asked for so long


class Watch:
    """Reads the metrics every second, until nobody has looked for `LOOK_S` seconds."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._frames: deque[Frame] = deque(maxlen=int(KEPT_S / INTERVAL_S))
        self._looked_s = 0.0
        self._reading: asyncio.Task[None] | None = None

    async def frames(self, since_s: float = 0.0) -> list[Frame]:
        """Return what is known of the time after `since_s`; the first look starts the reading."""
        self._looked_s = time.monotonic()
        if self._reading is None or self._reading.done():
            self._reading = asyncio.create_task(self._read_on())
        return [frame for frame in self._frames if frame.time_s > since_s]

    async def _read_on(self) -> None:
        before: Samples | None = None
        while time.monotonic() - self._looked_s < LOOK_S:
            with contextlib.suppress(OSError):  # a gap in the history says that there is no server
                after = await asyncio.to_thread(read, self._url)
                if before is not None:
                    self._frames.append(between(before, after))
                before = after
            await asyncio.sleep(INTERVAL_S)
