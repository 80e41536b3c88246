"""Where profiles live, and which one belongs to this pair on this machine."""

import hashlib
import json
import logging
import os
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

from specserve import manifest
from specserve.config import Config
from specserve.cpu import cpu_name
from specserve.predictor.measure import points_mark
from specserve.predictor.profile import Profile
from specserve.telemetry import uses_gpu
from specserve.telemetry.reading import Reading

logger = logging.getLogger(__name__)


def fingerprint(config: Config, reading: Reading | None = None) -> dict[str, str]:
    """Say what step times depend on: device, engine, precision, threads, versions, pair.

    And at which points they were measured: a profile of an older version may lack some.

    Args:
        reading: of the GPUs that the engines run on.
    """
    engine = config.engine
    pair = {role: manifest.load(Path(engine.dir) / role) for role in ("draft", "target")}
    return {
        **(_gpus(reading) if uses_gpu(config) else {"device": cpu_name()}),
        "num_cores": str(len(os.sched_getaffinity(0))),
        "engine": engine.name,
        "engine_version": _version(engine.name),
        "precision": engine.precision,
        "compile": str(engine.compile),
        "num_threads": str(engine.num_threads),
        "unpacked_from": str(engine.unpacked_from),
        "block_size": str(engine.block_size),
        "points": points_mark(),
        **{f"{role}_source": m.source.sha256 for role, m in pair.items()},
        **{f"{role}_parameters": str(m.num_parameters) for role, m in pair.items()},
        **{f"{role}_weights": m.precision for role, m in pair.items()},
    }


def path_of(marks: dict[str, str]) -> Path:
    """Return where the profile with this fingerprint is kept, whether or not it exists."""
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    digest = hashlib.sha256(json.dumps(marks, sort_keys=True).encode()).hexdigest()[:16]
    return cache / "specserve" / "profiles" / f"{digest}.json"


def load_or_measure(
    config: Config,
    measure: Callable[[dict[str, str]], Profile],
    reading: Reading | None = None,
) -> Profile:
    """Return the configured profile, the stored one, or a new one, which is then stored.

    Raises:
        ValueError: the configuration names a profile of something else.
    """
    marks = fingerprint(config, reading)
    if config.policy.profile:
        profile = Profile.load(Path(config.policy.profile))
        profile.check(marks)
        return profile
    path = path_of(marks)
    if path.is_file():
        try:
            profile = Profile.load(path)
            profile.check(marks)
            return profile
        except ValueError as error:
            logger.warning("%s; measuring again", error)
    profile = measure(marks)
    try:
        profile.save(path)
    except OSError as error:
        logger.warning("profile not stored: %s", error.strerror)
    return profile


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "unknown"


def _gpus(reading: Reading | None) -> dict[str, str]:
    if reading is None:
        return {"device": "a GPU that does not say its name"}
    names = sorted(device.name for device in reading.devices)
    return {
        "device": names[0],
        "num_devices": str(len(names)),
        "other_devices": ", ".join(sorted({*names} - {names[0]})),
        "driver": reading.driver,
    }
