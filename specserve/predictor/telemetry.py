"""What the device says of itself, as factors on the step-time model."""

from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class DeviceState:
    """One reading, relative to the state in which the profile was taken.

    Attributes:
        compute_scale: available compute over profiled compute: SM clock, less what co-tenants take.
        memory_scale: available bandwidth over profiled bandwidth: memory clock.
        kv_headroom: share of the KV cache that may be filled, lower when memory is short.
    """

    compute_scale: float = 1.0
    memory_scale: float = 1.0
    kv_headroom: float = 1.0

    def __post_init__(self) -> None:
        for name in ("compute_scale", "memory_scale", "kv_headroom"):
            if not getattr(self, name) > 0.0:
                raise ValueError(f"{name} is {getattr(self, name)}: must be above 0")


class Telemetry(Protocol):
    """Where readings come from; never blocks and never raises."""

    def read(self) -> DeviceState:
        """Return the newest reading; the neutral one if there is none."""


class NoTelemetry:
    """A device that says nothing."""

    def read(self) -> DeviceState:
        """Return the neutral reading."""
        return DeviceState()
