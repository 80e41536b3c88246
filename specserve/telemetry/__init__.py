"""What the device says of itself, sampled beside the step loop; knows no engine and no request."""

import atexit

from specserve.config import Config
from specserve.telemetry.sampler import Sampler
from specserve.telemetry.state import NoTelemetry, Telemetry

SOURCES = ("auto", "nvml", "none")
GPU_ENGINES = ("tensorrt_llm",)


def make_telemetry(config: Config) -> Telemetry:
    """Start the configured telemetry; where a device should speak and does not, it is stale.

    Raises:
        ValueError: unknown source, or times that make no sense.
    """
    settings = config.telemetry
    if settings.source not in SOURCES:
        raise ValueError(f"telemetry.source is '{settings.source}': known are {', '.join(SOURCES)}")
    if not 0.0 < settings.interval_s < settings.stale_after_s:
        raise ValueError(
            f"telemetry.interval_s is {settings.interval_s}: must be above 0 and below "
            f"telemetry.stale_after_s ({settings.stale_after_s})"
        )
    if not uses_gpu(config):
        return NoTelemetry()
    from specserve.telemetry.nvml import Nvml

    sampler = Sampler(Nvml(settings.devices), settings)
    sampler.start()
    atexit.register(sampler.stop)
    return sampler


def uses_gpu(config: Config) -> bool:
    """Return whether step times depend on a GPU."""
    source, engine = config.telemetry.source, config.engine
    is_on_gpu = engine.name in GPU_ENGINES or engine.device == "cuda"
    return source == "nvml" or (source == "auto" and is_on_gpu)
