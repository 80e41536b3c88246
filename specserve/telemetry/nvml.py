"""NVIDIA's management library as a source of readings, through nvidia-ml-py (`pynvml`).

Owns which devices are ours, MIG, and what a driver may refuse without being broken. Needs no CUDA
context: it works in any process that sees the driver.
"""

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pynvml

from specserve.telemetry.reading import IDLE, Clocks, DeviceReading
from specserve.telemetry.tenants import others_utilization

# What one field of a healthy device may answer. Everything else ends the reading: the device is
# lost, the driver is gone.
ABSENT = {
    pynvml.NVML_ERROR_INVALID_ARGUMENT,  # of a MIG instance, which lacks much of its parent
    pynvml.NVML_ERROR_NOT_SUPPORTED,
    pynvml.NVML_ERROR_NO_PERMISSION,
    pynvml.NVML_ERROR_NOT_FOUND,
    pynvml.NVML_ERROR_FUNCTION_NOT_FOUND,  # the driver is older than the bindings
    pynvml.NVML_ERROR_INSUFFICIENT_SIZE,  # processes came while they were counted
    pynvml.NVML_ERROR_NO_DATA,
    pynvml.NVML_ERROR_DEPRECATED,
}
REASONS = {
    pynvml.nvmlClocksEventReasonGpuIdle: IDLE,
    pynvml.nvmlClocksEventReasonApplicationsClocksSetting: "setting",
    pynvml.nvmlClocksEventReasonSwPowerCap: "power_cap",
    pynvml.nvmlClocksEventReasonHwSlowdown: "slowdown",
    pynvml.nvmlClocksEventReasonSyncBoost: "sync_boost",
    pynvml.nvmlClocksEventReasonSwThermalSlowdown: "thermal",
    pynvml.nvmlClocksEventReasonHwThermalSlowdown: "thermal",
    pynvml.nvmlClocksEventReasonHwPowerBrakeSlowdown: "power_brake",
    pynvml.nvmlClocksEventReasonDisplayClockSetting: "display",
}


@dataclass(frozen=True, slots=True)
class Device:
    """A GPU, or a MIG instance with the GPU it is a part of.

    Attributes:
        handle: has name and memory.
        gpu: has clocks, power and heat; the same handle where there is no MIG.
    """

    handle: Any
    gpu: Any
    index: int
    uuid: str
    gpu_uuid: str

    def is_called(self, name: str) -> bool:
        """Whether an entry of CUDA_VISIBLE_DEVICES means this: an index, or a UUID's beginning."""
        if name.isdecimal():
            return self.index == int(name)
        return self.uuid.startswith(name) or self.gpu_uuid.startswith(name)


class Nvml:
    """The devices that the engines run on.

    Args:
        devices: as in CUDA_VISIBLE_DEVICES; none takes that variable, or else every device.

    NOTE: an index counts as the driver counts. CUDA does so too with CUDA_DEVICE_ORDER=PCI_BUS_ID,
    or where all GPUs are of one kind.
    """

    def __init__(self, devices: Sequence[str] = ()) -> None:
        self._names = list(devices) or _visible()
        self._devices: list[Device] = []
        self._is_open = False
        self._driver = ""
        self._seen_us: dict[str, int] = {}

    def read(self) -> tuple[str, tuple[DeviceReading, ...]]:
        """Read every device.

        Raises:
            pynvml.NVMLError: no driver, no permission, a lost device; the next call starts anew.
            ValueError: a device that was named is not here, or there is none at all.
        """
        try:
            if not self._is_open:
                self._open()
            return self._driver, tuple(self._read(device) for device in self._devices)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Let go of the driver; nothing to do if it is not held."""
        if self._is_open:
            self._is_open = False
            with contextlib.suppress(pynvml.NVMLError):  # it is gone, which is as good
                pynvml.nvmlShutdown()

    def _open(self) -> None:
        pynvml.nvmlInit()
        self._is_open = True
        self._driver = pynvml.nvmlSystemGetDriverVersion()
        found = list(_devices())
        names = self._names
        self._devices = found if names is None else [_called(name, found) for name in names]
        if not self._devices:
            raise ValueError("no device is visible")

    def _read(self, device: Device) -> DeviceReading:
        handle, gpu = device.handle, device.gpu
        memory = _ask(pynvml.nvmlDeviceGetMemoryInfo, handle)
        power_mw = _ask(pynvml.nvmlDeviceGetPowerUsage, gpu)
        limit_mw = _ask(pynvml.nvmlDeviceGetEnforcedPowerLimit, gpu)
        rates = _ask(pynvml.nvmlDeviceGetUtilizationRates, handle)
        return DeviceReading(
            name=pynvml.nvmlDeviceGetName(handle),
            uuid=device.uuid,
            clocks=_clocks(pynvml.nvmlDeviceGetClockInfo, gpu),
            max_clocks=_clocks(pynvml.nvmlDeviceGetMaxClockInfo, gpu),
            clock_reasons=_reasons(_ask(pynvml.nvmlDeviceGetCurrentClocksEventReasons, gpu)),
            power_w=None if power_mw is None else power_mw / 1e3,
            power_limit_w=None if limit_mw is None else limit_mw / 1e3,
            utilization=None if rates is None else rates.gpu / 100.0,
            others_utilization=self._others(device),
            memory_used_bytes=None if memory is None else memory.used,
            memory_total_bytes=None if memory is None else memory.total,
            temperature_c=_ask(pynvml.nvmlDeviceGetTemperature, gpu, pynvml.NVML_TEMPERATURE_GPU),
            pcie_width=_ask(pynvml.nvmlDeviceGetCurrPcieLinkWidth, gpu),
            num_nvlinks=_num_nvlinks(gpu),
        )

    def _others(self, device: Device) -> float:
        """Return what other servers take of the device since the last look."""
        holders = _ask(pynvml.nvmlDeviceGetComputeRunningProcesses_v3, device.handle) or ()
        since_us = self._seen_us.get(device.uuid, 0)
        samples = _ask(_process_utilization, device.handle, since_us) or ()
        if not samples:
            return 0.0
        self._seen_us[device.uuid] = max(sample.timeStamp for sample in samples)
        shares = [(sample.pid, sample.smUtil / 100.0) for sample in samples]
        return others_utilization([holder.pid for holder in holders], shares)


def _visible() -> list[str] | None:
    """Return the entries of CUDA_VISIBLE_DEVICES; None if it is not set."""
    text = os.environ.get("CUDA_VISIBLE_DEVICES")
    return None if text is None else [name.strip() for name in text.split(",") if name.strip()]


def _devices() -> Iterator[Device]:
    """Find every GPU, or where one is divided, its MIG instances."""
    for index in range(pynvml.nvmlDeviceGetCount()):
        gpu = pynvml.nvmlDeviceGetHandleByIndex(index)
        uuid = pynvml.nvmlDeviceGetUUID(gpu)
        mode = _ask(pynvml.nvmlDeviceGetMigMode, gpu)
        if mode is None or mode[0] != pynvml.NVML_DEVICE_MIG_ENABLE:
            yield Device(gpu, gpu, index, uuid, uuid)
            continue
        for slot in range(_ask(pynvml.nvmlDeviceGetMaxMigDeviceCount, gpu) or 0):
            part = _ask(pynvml.nvmlDeviceGetMigDeviceHandleByIndex, gpu, slot)
            if part is not None:
                yield Device(part, gpu, index, pynvml.nvmlDeviceGetUUID(part), uuid)


def _called(name: str, found: Sequence[Device]) -> Device:
    """Return what a name means; of a divided GPU the first instance, which is all CUDA takes."""
    for device in found:
        if device.is_called(name):
            return device
    known = ", ".join(device.uuid for device in found)
    raise ValueError(f"no device is called '{name}': the driver shows {known or 'none'}")


def _ask(function: Callable[..., Any], *args: Any) -> Any:
    """Call; None if the device is well and does not answer this."""
    try:
        return function(*args)
    except pynvml.NVMLError as error:
        if error.value in ABSENT:
            return None
        raise


def _process_utilization(handle: Any, since_us: int) -> Any:
    try:
        return pynvml.nvmlDeviceGetProcessUtilization(handle, since_us)
    except pynvml.NVMLError as error:
        if error.value == pynvml.NVML_SUCCESS:  # how the bindings say "no samples"
            return ()
        raise


def _clocks(function: Callable[..., Any], gpu: Any) -> Clocks | None:
    sm_mhz = _ask(function, gpu, pynvml.NVML_CLOCK_SM)
    memory_mhz = _ask(function, gpu, pynvml.NVML_CLOCK_MEM)
    return Clocks(sm_mhz, memory_mhz) if sm_mhz and memory_mhz else None


def _reasons(bits: int | None) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name for bit, name in REASONS.items() if (bits or 0) & bit))


def _num_nvlinks(gpu: Any) -> int | None:
    """Count the links that are up; None for a device without any."""
    num_up = None
    for link in range(pynvml.NVML_NVLINK_MAX_LINKS):
        is_up = _ask(pynvml.nvmlDeviceGetNvLinkState, gpu, link)
        if is_up is None:
            break
        num_up = (num_up or 0) + is_up
    return num_up
