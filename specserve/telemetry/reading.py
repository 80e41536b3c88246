"""One look at the devices: plain numbers, no driver."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

IDLE = "idle"
LIMITS = ("power_cap", "slowdown", "thermal", "power_brake")


class Clocks(NamedTuple):
    """SM and memory clock; of several devices the lowest, for a step waits for the slowest."""

    sm_mhz: float
    memory_mhz: float


@dataclass(frozen=True, slots=True)
class DeviceReading:
    """One GPU or MIG instance; None is what it does not report.

    Attributes:
        name: as the driver spells it; a MIG instance's ends in its profile.
        clock_reasons: why the clocks are not higher: "idle", an entry of `LIMITS`, or another.
        utilization: share of the last moments in which a kernel ran, of anybody.
        others_utilization: share in which one of another server ran; 0 where that is not known.
        num_nvlinks: links that are up.
    """

    name: str
    uuid: str
    clocks: Clocks | None = None
    max_clocks: Clocks | None = None
    clock_reasons: tuple[str, ...] = ()
    power_w: float | None = None
    power_limit_w: float | None = None
    utilization: float | None = None
    others_utilization: float = 0.0
    memory_used_bytes: int | None = None
    memory_total_bytes: int | None = None
    temperature_c: int | None = None
    pcie_width: int | None = None
    num_nvlinks: int | None = None

    @property
    def is_idle(self) -> bool:
        """Whether the clocks are low because nobody needs them."""
        return IDLE in self.clock_reasons or self.utilization == 0.0

    @property
    def is_throttled(self) -> bool:
        """Whether power or heat keeps the clocks down."""
        return any(reason in LIMITS for reason in self.clock_reasons)


@dataclass(frozen=True, slots=True)
class Reading:
    """All devices of the engines at one moment.

    Attributes:
        devices: at least one.
        taken_s: on the sampler's clock.
    """

    devices: tuple[DeviceReading, ...]
    driver: str
    taken_s: float

    @property
    def clocks(self) -> Clocks | None:
        """The lowest clocks; None if a device does not report its own."""
        return _lowest(device.clocks for device in self.devices)

    @property
    def clocks_under_load(self) -> Clocks | None:
        """The lowest clocks of devices that work; None if none does."""
        return _lowest(device.clocks for device in self.devices if not device.is_idle)

    @property
    def max_clocks(self) -> Clocks | None:
        """What the clocks could be at most."""
        return _lowest(device.max_clocks for device in self.devices)

    @property
    def sm_clock_ratio(self) -> float | None:
        """SM clock over its maximum, of the slowest device."""
        now, most = self.clocks, self.max_clocks
        return now.sm_mhz / most.sm_mhz if now and most else None

    @property
    def memory_clock_ratio(self) -> float | None:
        """Memory clock over its maximum, of the slowest device."""
        now, most = self.clocks, self.max_clocks
        return now.memory_mhz / most.memory_mhz if now and most else None

    @property
    def power_w(self) -> float | None:
        """Power of all devices that report theirs."""
        known = [device.power_w for device in self.devices if device.power_w is not None]
        return sum(known) if known else None

    @property
    def memory_used_bytes(self) -> int | None:
        """Used memory of all devices that report theirs, whoever uses it."""
        known = [d.memory_used_bytes for d in self.devices if d.memory_used_bytes is not None]
        return sum(known) if known else None

    @property
    def memory_free_bytes(self) -> int | None:
        """Free memory of the fullest device."""
        return min(
            (
                device.memory_total_bytes - device.memory_used_bytes
                for device in self.devices
                if device.memory_total_bytes is not None and device.memory_used_bytes is not None
            ),
            default=None,
        )

    @property
    def others_utilization(self) -> float:
        """Share of the time that other servers take, on the device where they take most."""
        return max(device.others_utilization for device in self.devices)

    @property
    def is_throttled(self) -> bool:
        """Whether power or heat keeps some device's clocks down."""
        return any(device.is_throttled for device in self.devices)


def _lowest(clocks: Iterable[Clocks | None]) -> Clocks | None:
    every = list(clocks)
    known = [one for one in every if one is not None]
    if not known or len(known) < len(every):
        return None
    return Clocks(min(one.sm_mhz for one in known), min(one.memory_mhz for one in known))
