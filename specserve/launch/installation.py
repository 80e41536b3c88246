"""Where the Triton server is, in nvidia-pytriton or in NVIDIA's container; paths only."""

import importlib.util
import os
import sys
import sysconfig
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

CONTAINER_DIR = Path("/opt/tritonserver")
SYSTEM_LIBRARY_DIRS = (
    "/usr/lib/x86_64-linux-gnu",
    "/usr/lib/aarch64-linux-gnu",
    "/usr/lib64",
    "/usr/lib",
    "/usr/local/lib",
)


@dataclass(frozen=True, slots=True)
class TritonInstallation:
    """The files of an installed nvidia-pytriton; `folder` is the site-packages that holds it."""

    folder: Path

    @property
    def server_dir(self) -> Path:
        return self.folder / "pytriton" / "tritonserver"

    @property
    def binary(self) -> Path:
        return self.server_dir / "bin" / "tritonserver"

    @property
    def python_backend(self) -> Path:
        return self.server_dir / "backends" / "python"

    @property
    def libraries(self) -> Path:
        return self.folder / "nvidia_pytriton.libs"

    def stub(self, python_version: tuple[int, int] = sys.version_info[:2]) -> Path:
        """Return the stub for a Python version; the file need not exist."""
        name = "{}.{}".format(*python_version)
        return self.server_dir / "python_backend_stubs" / name / "triton_python_backend_stub"


@dataclass(frozen=True, slots=True)
class ContainerInstallation(TritonInstallation):
    """The files of NVIDIA's Triton container; `folder` is its /opt/tritonserver.

    It has one stub, beside the backend, for the Python of the image.
    """

    @property
    def server_dir(self) -> Path:
        return self.folder

    @property
    def libraries(self) -> Path:
        return self.folder / "lib"

    def stub(self, python_version: tuple[int, int] = sys.version_info[:2]) -> Path:
        """Return the stub, whatever the version."""
        return self.python_backend / "triton_python_backend_stub"


def find_installation(container_dir: Path = CONTAINER_DIR) -> TritonInstallation | None:
    """Locate the container's server, else nvidia-pytriton's without importing it, or None."""
    container = ContainerInstallation(container_dir)
    if container.binary.is_file():
        return container
    spec = importlib.util.find_spec("pytriton")
    if spec is None or not spec.submodule_search_locations:
        return None
    installation = TritonInstallation(Path(next(iter(spec.submodule_search_locations))).parent)
    return installation if installation.binary.is_file() else None


def libpython_name(python_version: tuple[int, int] = sys.version_info[:2]) -> str:
    """Name the shared library that the stub asks the dynamic linker for."""
    return "libpython{}.{}.so.1.0".format(*python_version)


def library_dirs() -> list[Path]:
    """List the folders that may hold libpython, the running Python's own first."""
    inherited = os.environ.get("LD_LIBRARY_PATH", "").split(":")
    # NOTE: a relocated Python (uv) has a LIBDIR that does not exist; base_prefix is true there.
    own = [sysconfig.get_config_var("LIBDIR") or "", f"{sys.base_prefix}/lib"]
    return [Path(entry) for entry in [*own, *inherited, *SYSTEM_LIBRARY_DIRS] if entry]


def find_libpython(dirs: Iterable[Path] | None = None, name: str = libpython_name()) -> Path | None:
    """Return the shared libpython of the running Python, or None if it has none."""
    candidates = (folder / name for folder in (library_dirs() if dirs is None else dirs))
    return next((path for path in candidates if path.is_file()), None)
