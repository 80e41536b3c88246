"""A stand-in for libnvidia-ml, at the level of the C functions that `pynvml` calls.

What stands above it is NVIDIA's own binding, which fixes names, argument counts and types. A
function that is not here does not exist in this driver; one called with other arguments fails.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pynvml

GIB = 1 << 30
OK = pynvml.NVML_SUCCESS
NOT_SUPPORTED = pynvml.NVML_ERROR_NOT_SUPPORTED


@dataclass
class FakeGpu:
    """One GPU or MIG instance.

    Attributes:
        errors: C function name -> what it answers instead of a value.
        parts: MIG instances; None for a GPU that cannot be divided, empty for one that is not.
    """

    uuid: str = "GPU-00000000-aaaa"
    name: str = "NVIDIA H200"
    sm_mhz: int = 1980
    memory_mhz: int = 3201
    max_sm_mhz: int = 1980
    max_memory_mhz: int = 3201
    reasons: int = 0
    power_mw: int = 500_000
    limit_mw: int = 700_000
    utilization: int = 95
    used_bytes: int = 100 * GIB
    total_bytes: int = 141 * GIB
    temperature_c: int = 60
    num_nvlinks: int = 18
    holders: tuple[int, ...] = ()
    shares: tuple[tuple[int, int], ...] = ()  # process id, percent
    errors: dict[str, int] = field(default_factory=dict)
    parts: list[FakeGpu] | None = None
    parent: FakeGpu | None = None


class FakeNvml:
    """The library: what `ctypes.CDLL("libnvidia-ml.so.1")` would return."""

    def __init__(self, *gpus: FakeGpu, init_error: int = OK) -> None:
        self.gpus = list(gpus)
        self.init_error = init_error
        self.num_open = 0
        for gpu in gpus:
            for part in gpu.parts or ():
                part.parent = gpu
        every = [one for gpu in gpus for one in (gpu, *(gpu.parts or ()))]
        self._by_handle = {0xA000 + i: gpu for i, gpu in enumerate(every)}

    def __getattr__(self, name: str) -> Any:
        method = type(self).__dict__.get(f"c_{name}")
        if method is None:
            raise AttributeError(name)

        def call(*args: Any) -> int:
            if self.num_open == 0 and name != "nvmlInitWithFlags":
                return int(pynvml.NVML_ERROR_UNINITIALIZED)
            if not args or not isinstance(args[0], pynvml.c_nvmlDevice_t):
                return int(method(self, *args))
            gpu = self._by_handle[ctypes.cast(args[0], ctypes.c_void_p).value]
            return gpu.errors[name] if name in gpu.errors else int(method(self, gpu, *args[1:]))

        return call

    def _handle(self, gpu: FakeGpu) -> int:
        return next(handle for handle, one in self._by_handle.items() if one is gpu)

    # -- the library and its devices -----------------------------------------------------------

    def c_nvmlInitWithFlags(self, flags: int) -> int:
        self.num_open += self.init_error == OK
        return self.init_error

    def c_nvmlShutdown(self) -> int:
        self.num_open -= 1
        return OK

    def c_nvmlSystemGetDriverVersion(self, text: Any, size: Any) -> int:
        text.value = b"590.44.01"
        return OK

    def c_nvmlDeviceGetCount_v2(self, count: Any) -> int:
        return _set(count, len(self.gpus))

    def c_nvmlDeviceGetHandleByIndex_v2(self, index: Any, device: Any) -> int:
        return _point(device, self._handle(self.gpus[index.value]))

    def c_nvmlDeviceGetUUID(self, gpu: FakeGpu, text: Any, size: Any) -> int:
        text.value = gpu.uuid.encode()
        return OK

    def c_nvmlDeviceGetName(self, gpu: FakeGpu, text: Any, size: Any) -> int:
        text.value = gpu.name.encode()
        return OK

    def c_nvmlDeviceGetMigMode(self, gpu: FakeGpu, current: Any, pending: Any) -> int:
        if gpu.parts is None:
            return NOT_SUPPORTED
        return _set(current, bool(gpu.parts)) or _set(pending, bool(gpu.parts))

    def c_nvmlDeviceGetMaxMigDeviceCount(self, gpu: FakeGpu, count: Any) -> int:
        return _set(count, 7)

    def c_nvmlDeviceGetMigDeviceHandleByIndex(self, gpu: FakeGpu, index: Any, part: Any) -> int:
        if gpu.parts is None or index.value >= len(gpu.parts):
            return int(pynvml.NVML_ERROR_NOT_FOUND)
        return _point(part, self._handle(gpu.parts[index.value]))

    # -- one device's fields -------------------------------------------------------------------

    def c_nvmlDeviceGetClockInfo(self, gpu: FakeGpu, kind: Any, mhz: Any) -> int:
        return _clock(gpu, kind, mhz, {1: gpu.sm_mhz, 2: gpu.memory_mhz})

    def c_nvmlDeviceGetMaxClockInfo(self, gpu: FakeGpu, kind: Any, mhz: Any) -> int:
        return _clock(gpu, kind, mhz, {1: gpu.max_sm_mhz, 2: gpu.max_memory_mhz})

    def c_nvmlDeviceGetCurrentClocksEventReasons(self, gpu: FakeGpu, reasons: Any) -> int:
        return _set(reasons, gpu.reasons, of_gpu=gpu)

    def c_nvmlDeviceGetPowerUsage(self, gpu: FakeGpu, power: Any) -> int:
        return _set(power, gpu.power_mw, of_gpu=gpu)

    def c_nvmlDeviceGetEnforcedPowerLimit(self, gpu: FakeGpu, limit: Any) -> int:
        return _set(limit, gpu.limit_mw, of_gpu=gpu)

    def c_nvmlDeviceGetTemperature(self, gpu: FakeGpu, sensor: Any, temperature: Any) -> int:
        return _set(temperature, gpu.temperature_c, of_gpu=gpu)

    def c_nvmlDeviceGetCurrPcieLinkWidth(self, gpu: FakeGpu, width: Any) -> int:
        return _set(width, 16, of_gpu=gpu)

    def c_nvmlDeviceGetNvLinkState(self, gpu: FakeGpu, link: int, state: Any) -> int:
        if link >= gpu.num_nvlinks:
            return int(pynvml.NVML_ERROR_INVALID_ARGUMENT)
        return _set(state, 1, of_gpu=gpu)

    def c_nvmlDeviceGetUtilizationRates(self, gpu: FakeGpu, rates: Any) -> int:
        if gpu.parent is not None:
            return NOT_SUPPORTED
        rates._obj.gpu = gpu.utilization
        return OK

    def c_nvmlDeviceGetMemoryInfo(self, gpu: FakeGpu, memory: Any) -> int:
        memory._obj.total, memory._obj.used = gpu.total_bytes, gpu.used_bytes
        memory._obj.free = gpu.total_bytes - gpu.used_bytes
        return OK

    def c_nvmlDeviceGetComputeRunningProcesses_v3(
        self, gpu: FakeGpu, count: Any, infos: Any
    ) -> int:
        for i, pid in enumerate(gpu.holders if infos is not None else ()):
            infos[i].pid = pid
        _set(count, len(gpu.holders))
        is_short = infos is None and gpu.holders
        return int(pynvml.NVML_ERROR_INSUFFICIENT_SIZE if is_short else OK)

    def c_nvmlDeviceGetProcessUtilization(
        self, gpu: FakeGpu, samples: Any, count: Any, since: Any
    ) -> int:
        if not gpu.shares:
            return int(pynvml.NVML_ERROR_NOT_FOUND)
        for i, (pid, percent) in enumerate(gpu.shares if samples is not None else ()):
            samples[i].pid, samples[i].smUtil = pid, percent
            samples[i].timeStamp = since.value + 1
        _set(count, len(gpu.shares))
        return int(OK if samples is not None else pynvml.NVML_ERROR_INSUFFICIENT_SIZE)


def _set(reference: Any, value: int, of_gpu: FakeGpu | None = None) -> int:
    """Write through a pointer, unless a MIG instance is asked for what only its GPU has."""
    if of_gpu is not None and of_gpu.parent is not None:
        return int(pynvml.NVML_ERROR_INVALID_ARGUMENT)
    reference._obj.value = value
    return OK


def _clock(gpu: FakeGpu, kind: Any, mhz: Any, clocks: Mapping[int, int]) -> int:
    return _set(mhz, clocks[kind.value], of_gpu=gpu)


def _point(device: Any, handle: int) -> int:
    ctypes.cast(device, ctypes.POINTER(ctypes.c_void_p)).contents.value = handle
    return OK


@contextmanager
def loaded(library: Any) -> Iterator[None]:
    """Make a library the one that `pynvml` has loaded."""
    before = pynvml.nvmlLib
    pynvml.nvmlLib = library
    pynvml._nvmlGetFunctionPointer_cache.clear()
    try:
        yield
    finally:
        pynvml.nvmlLib = before
        pynvml._nvmlGetFunctionPointer_cache.clear()
