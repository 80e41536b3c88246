"""What a GPU can do by its data sheet, from which a step-time model starts unmeasured."""

import re
from dataclasses import dataclass

_MIG = re.compile(r"MIG (?P<slices>\d+)g\.(?P<memory_gb>\d+)gb")
_NUM_MIG_SLICES = 7


@dataclass(frozen=True, slots=True)
class Peak:
    """Of one device: memory bandwidth, dense bf16 matrix rate with f32 sums, memory size."""

    bytes_s: float
    flops: float
    memory_gb: float


# Vendor's data sheets; names as the driver spells them, of which the longest that fits counts.
_PEAKS = {
    "NVIDIA A10": Peak(600e9, 125e12, 24),
    "NVIDIA A10G": Peak(600e9, 70e12, 24),
    "NVIDIA A30": Peak(933e9, 165e12, 24),
    "NVIDIA A40": Peak(696e9, 150e12, 48),
    "NVIDIA A100-PCIE-40GB": Peak(1555e9, 312e12, 40),
    "NVIDIA A100-SXM4-40GB": Peak(1555e9, 312e12, 40),
    "NVIDIA A100 80GB PCIe": Peak(1935e9, 312e12, 80),
    "NVIDIA A100-SXM4-80GB": Peak(2039e9, 312e12, 80),
    "NVIDIA B200": Peak(8000e9, 2250e12, 180),
    "NVIDIA GH200": Peak(4000e9, 990e12, 96),
    "NVIDIA GeForce RTX 3090": Peak(936e9, 71e12, 24),
    "NVIDIA GeForce RTX 4090": Peak(1008e9, 165e12, 24),
    "NVIDIA H100": Peak(3350e9, 990e12, 80),
    "NVIDIA H100 NVL": Peak(3900e9, 835e12, 94),
    "NVIDIA H100 PCIe": Peak(2000e9, 756e12, 80),
    "NVIDIA H200": Peak(4800e9, 990e12, 141),
    "NVIDIA H200 NVL": Peak(4800e9, 835e12, 141),
    "NVIDIA L4": Peak(300e9, 121e12, 24),
    "NVIDIA L40": Peak(864e9, 181e12, 48),
    "NVIDIA L40S": Peak(864e9, 362e12, 48),
    "NVIDIA RTX 6000 Ada": Peak(960e9, 364e12, 48),
    "NVIDIA RTX A6000": Peak(768e9, 155e12, 48),
}


def peak_of(name: str) -> Peak | None:
    """Return what the device of this name can do, a MIG instance its share; None if unknown."""
    known = [key for key in _PEAKS if name == key or name.startswith(f"{key} ")]
    if not known:
        return None
    whole = _PEAKS[max(known, key=len)]
    part = _MIG.search(name)
    if part is None:
        return whole
    memory_gb = float(part["memory_gb"])
    compute, memory = int(part["slices"]) / _NUM_MIG_SLICES, memory_gb / whole.memory_gb
    return Peak(whole.bytes_s * memory, whole.flops * compute, memory_gb)
