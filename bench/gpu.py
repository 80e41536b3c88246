"""What a result line says of the GPU it was measured on."""

from dataclasses import asdict
from typing import Any

from specserve.telemetry.state import Telemetry


def describe_gpu(telemetry: Telemetry) -> dict[str, Any] | None:
    """Return driver, devices as NVML last saw them, and clocks under load; None without a GPU."""
    reading = telemetry.reading
    if reading is None:
        return None
    clocks = telemetry.clocks
    return {
        "driver": reading.driver,
        "devices": [asdict(device) for device in reading.devices],
        "clocks_under_load": clocks and clocks._asdict(),
    }
