"""A thread that reads the devices, so that the step loop never waits for a driver.

Owns the rhythm, what counts as load, staleness, and the one log line when readings stop or return.
"""

import logging
import statistics
import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import fields
from typing import Protocol

from specserve.config import TelemetryConfig
from specserve.telemetry.reading import Clocks, DeviceReading, Reading
from specserve.telemetry.state import NEUTRAL, DeviceState, state_of

logger = logging.getLogger(__name__)

MAX_RETRY_S = 30.0
STOP_S = 1.0
NUM_SAMPLES = 5  # a median of so many: one reading while the clocks rise says little


class Source(Protocol):
    """A driver."""

    def read(self) -> tuple[str, tuple[DeviceReading, ...]]:
        """Return the driver's version and every device, or raise; may be called again after."""

    def close(self) -> None:
        """Let go of the driver."""


class Sampler:
    """Reads a source every `interval_s`; after a failure later and later, up to `MAX_RETRY_S`.

    A device's clocks count only while it works: an idle GPU lowers its own, which says nothing
    about the next step.
    """

    def __init__(
        self,
        source: Source,
        settings: TelemetryConfig,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._source = source
        self._settings = settings
        self._clock = clock
        self._reading: Reading | None = None
        self._under_load: deque[Clocks] = deque(maxlen=NUM_SAMPLES)
        self._clocks: tuple[Clocks, float] | None = None  # under load, and when that was
        self._states: dict[Clocks | None, DeviceState] = {}  # of the newest reading
        self._failure: str | None = None
        self._is_short = False
        self._is_stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="specserve-telemetry", daemon=True)

    def start(self) -> None:
        """Take a first reading here, so that whoever asks next has one, then go on in a thread."""
        self.sample()
        self._thread.start()

    def stop(self) -> None:
        """End the thread and let go of the driver, unless the driver does not let go of it."""
        self._is_stopping.set()
        self._thread.join(timeout=STOP_S)
        if not self._thread.is_alive():
            self._source.close()

    def read(self, profiled: Clocks | None = None) -> DeviceState:
        """Return the newest state; the neutral one without a fresh reading."""
        reading = self._reading
        if reading is None or self._is_old(reading.taken_s):
            return NEUTRAL
        states = self._states
        if profiled not in states:
            least = self._settings.min_free_bytes
            states[profiled] = state_of(reading, self.clocks, profiled, least)
        return states[profiled]

    @property
    def clocks(self) -> Clocks | None:
        """Median of the last few readings under load; None if the last of them is too old."""
        found = self._clocks
        return found[0] if found and not self._is_old(found[1]) else None

    @property
    def reading(self) -> Reading | None:
        """The newest reading, however old."""
        return self._reading

    @property
    def is_stale(self) -> bool:
        """Whether the newest reading is missing or too old."""
        reading = self._reading
        return reading is None or self._is_old(reading.taken_s)

    def sample(self) -> bool:
        """Read once; return whether the devices answered."""
        try:
            driver, devices = self._source.read()
        except Exception as error:  # a driver in trouble raises what it likes
            self._say(f"{type(error).__name__}: {error}")
            return False
        self._say(None)
        reading = Reading(devices, driver, self._clock())
        if reading.clocks_under_load:
            if self.clocks is None:
                self._under_load.clear()
            self._under_load.append(reading.clocks_under_load)
            median = Clocks(*map(statistics.median, zip(*self._under_load, strict=True)))
            self._clocks = median, reading.taken_s
        if self._reading is None:
            logger.info("device telemetry: %s", describe(reading))
        self._say_memory(reading.memory_free_bytes)
        self._reading, self._states = reading, {}
        return True

    def _run(self) -> None:
        pause_s = self._settings.interval_s
        while not self._is_stopping.wait(pause_s):
            is_well = self.sample()
            pause_s = self._settings.interval_s if is_well else min(MAX_RETRY_S, 2.0 * pause_s)

    def _say(self, failure: str | None) -> None:
        """Log a failure when it begins or changes, and its end."""
        if failure == self._failure:
            return
        if failure is None:
            logger.info("device telemetry is back")
        else:
            logger.warning("no device telemetry, predictions go on without it: %s", failure)
        self._failure = failure

    def _say_memory(self, free_bytes: int | None) -> None:
        """Log when memory becomes short, for fewer requests come in from then on, and its end."""
        least = self._settings.min_free_bytes
        is_short = free_bytes is not None and free_bytes < least
        if is_short != self._is_short:
            logger.warning(
                "device memory is %s: %d MiB are free, telemetry.min_free_bytes is %d MiB",
                "short, fewer requests are let in" if is_short else "no longer short",
                (free_bytes or 0) // 2**20,
                least // 2**20,
            )
        self._is_short = is_short

    def _is_old(self, taken_s: float) -> bool:
        return self._clock() - taken_s > self._settings.stale_after_s


def describe(reading: Reading) -> str:
    """Name the devices and what they do not report."""
    names = Counter(device.name for device in reading.devices)
    devices = ", ".join(f"{count} x {name}" for name, count in names.items())
    missing = [
        field.name
        for field in fields(DeviceReading)
        if any(getattr(device, field.name) is None for device in reading.devices)
    ]
    silent = f", which do not report {', '.join(missing)}" if missing else ""
    return f"{devices}{silent}, driver {reading.driver}"
