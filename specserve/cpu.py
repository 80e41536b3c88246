"""What this machine's CPU is called, and what it can do that step times depend on."""

import platform
from pathlib import Path

ARITHMETIC = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")  # rising


def cpu_name() -> str:
    """Return the model's name and its best arithmetic: the same name is sold with several."""
    name, best = platform.machine(), ""
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        key, _, value = line.partition(":")
        if key.strip() == "model name":
            name = value.strip()
        elif key.strip() == "flags":
            best = max(set(ARITHMETIC) & set(value.split()), key=ARITHMETIC.index, default="")
            break
    return f"{name}, {best}" if best else name
