"""What readings mean for the step: factors on the step-time model and a bound on the KV cache."""

from dataclasses import dataclass
from typing import Protocol

from specserve.telemetry.reading import Clocks, Reading

LEAST = 0.1  # a factor below this is taken for a misreading


@dataclass(frozen=True, slots=True)
class DeviceState:
    """What a step has now, relative to the state in which the profile was taken.

    Attributes:
        compute_scale: available compute over profiled compute: SM clock, less what others take.
        memory_scale: available bandwidth over profiled bandwidth: memory clock, less what others
            take.
        kv_headroom: share of the KV cache that may be filled, lower when memory is short.
    """

    compute_scale: float = 1.0
    memory_scale: float = 1.0
    kv_headroom: float = 1.0

    def __post_init__(self) -> None:
        for name in ("compute_scale", "memory_scale", "kv_headroom"):
            if not getattr(self, name) > 0.0:
                raise ValueError(f"{name} is {getattr(self, name)}: must be above 0")


NEUTRAL = DeviceState()


class Telemetry(Protocol):
    """Where readings come from; never blocks and never raises."""

    def read(self, profiled: Clocks | None = None) -> DeviceState:
        """Return the newest state; the neutral one if nothing is known.

        Args:
            profiled: clocks at which the profile was taken; None takes the device's highest.
        """

    @property
    def clocks(self) -> Clocks | None:
        """Clocks under load of late, to be kept with a profile; None if nothing is known."""

    @property
    def reading(self) -> Reading | None:
        """The newest reading, however old; None before the first and without a device."""

    @property
    def is_stale(self) -> bool:
        """Whether a device should speak and has not done so of late."""


class ScriptedTelemetry:
    """A device that is in the state it is told to be in."""

    reading: Reading | None = None
    is_stale = False

    def __init__(self, state: DeviceState = NEUTRAL, clocks: Clocks | None = None) -> None:
        self.state = state
        self.clocks = clocks

    def read(self, profiled: Clocks | None = None) -> DeviceState:
        """Return the scripted state."""
        return self.state


class NoTelemetry(ScriptedTelemetry):
    """A device that says nothing."""

    def __init__(self) -> None:
        super().__init__()


def state_of(
    reading: Reading, clocks: Clocks | None, profiled: Clocks | None, min_free_bytes: int
) -> DeviceState:
    """Turn a reading into factors.

    Processes on a device take turns unless they share it through MPS, so what others take is taken
    from compute and bandwidth alike. The KV cache itself is allocated at start: what runs short
    later is what a step needs beside it, which grows with its rows, so fewer are let in.

    Args:
        clocks: under load; None leaves them out of it.
        profiled: clocks that count as 1; None takes the device's highest.
        min_free_bytes: with less free memory than this, the headroom falls in proportion.
    """
    ours = 1.0 - reading.others_utilization
    base = profiled or reading.max_clocks
    ratios = (1.0, 1.0)
    if clocks and base:
        ratios = (clocks.sm_mhz / base.sm_mhz, clocks.memory_mhz / base.memory_mhz)
    free = reading.memory_free_bytes
    headroom = 1.0 if free is None or free >= min_free_bytes else free / min_free_bytes
    return DeviceState(
        compute_scale=max(LEAST, ours * ratios[0]),
        memory_scale=max(LEAST, ours * ratios[1]),
        kv_headroom=max(LEAST, headroom),
    )
