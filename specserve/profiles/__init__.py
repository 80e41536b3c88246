"""Profiles that come with SpecServe: three measured, the others estimates from datasheets.

Besides step times, a profile's fingerprint may say which scheduler limits go with the device, under
the names the configuration has for them (`scheduler.kv_cache_tokens`).
"""

from pathlib import Path

from specserve.predictor.profile import Profile

FOLDER = Path(__file__).parent
ESTIMATE = "estimate"  # what the source of an estimate begins with


def shipped() -> list[str]:
    """Return the names of the profiles that come with SpecServe."""
    return sorted(path.stem for path in FOLDER.glob("*.json"))


def find(name: str) -> Profile:
    """Read a profile.

    Args:
        name: a shipped one, or a file written by `specserve profile`.

    Raises:
        ValueError: neither, naming the shipped ones; or a file that cannot be read.
    """
    if name in shipped():
        return Profile.load(FOLDER / f"{name}.json")
    if not Path(name).is_file():
        raise ValueError(f"profile '{name}' is not a file, nor one of {', '.join(shipped())}")
    return Profile.load(Path(name))


def is_estimate(profile: Profile) -> bool:
    """Say whether nobody has measured it."""
    return profile.source.startswith(ESTIMATE)


def limits(profile: Profile) -> list[str]:
    """Return the scheduler limits that go with the device, as configuration overrides."""
    return [f"{k}={v}" for k, v in profile.fingerprint.items() if k.startswith("scheduler.")]
