"""What must hold before Triton can start; each check returns one line with the fix, or None.

Nothing is started or changed here. Every check takes what it looks at, so that a test can show it
a machine that lacks it.
"""

import ipaddress
import os
import platform
import re
import socket
import sys
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path

from specserve.launch.installation import (
    ContainerInstallation,
    TritonInstallation,
    find_installation,
    find_libpython,
    libpython_name,
)

MIN_GLIBC = (2, 35)
MIN_SHM_BYTES = 256 * 2**20
MAX_PORT = 65535


def find_problems(
    address: str, ports: Mapping[str, int], model_repository: Path, engine_dir: Path
) -> list[str]:
    """Run every check and return all problems at once, an empty list if Triton can start.

    Args:
        address: the IPv4 address to listen on.
        ports: by the name of what listens there: "http", "grpc", "metrics".
        model_repository: must hold at least one model.
        engine_dir: must hold something; what, the models check.
    """
    installation = find_installation()
    checks = [
        check_platform(platform.system(), _glibc_version()),
        check_cpu(platform.machine(), Path("/proc/cpuinfo")),
        check_pytriton(installation),
        check_stub(installation, sys.version_info[:2]),
        check_libpython(find_libpython()),
        check_numpy(_installed_version("numpy")),
        check_address(address),
        *(check_port(name, address, port) for name, port in ports.items()),
        check_distinct(ports),
        check_shared_memory(Path("/dev/shm")),
        check_model_repository(model_repository),
        check_engine_dir(engine_dir),
    ]
    return [problem for problem in checks if problem]


def check_platform(system: str, glibc: str | None) -> str | None:
    """Check that the binary's C library is there; `glibc` is "2.36", None on musl."""
    if system != "Linux":
        return f"{system} is not supported: the embedded Triton server is built for Linux"
    needed = ".".join(map(str, MIN_GLIBC))
    if glibc is None:
        return f"no glibc found (musl?): use a distribution with glibc {needed} or newer"
    if tuple(map(int, glibc.split(".")[:2])) < MIN_GLIBC:
        return (
            f"glibc {glibc} is too old, the Triton binary needs {needed}: "
            "use Ubuntu 22.04, Debian 12 or newer, or a container of one"
        )
    return None


def check_cpu(machine: str, cpuinfo: Path) -> str | None:
    """Check for AVX2, which OpenVINO needs on x86-64."""
    if machine != "x86_64" or not cpuinfo.exists():
        return None
    if re.search(r"^flags\s*:.*\bavx2\b", cpuinfo.read_text(), re.MULTILINE):
        return None
    return "this CPU has no AVX2, which OpenVINO needs: use a CPU from 2013 or later"


def check_pytriton(installation: TritonInstallation | None) -> str | None:
    """Check that the embedded Triton server is installed."""
    if installation is not None:
        return None
    return "nvidia-pytriton, which holds the Triton server, is missing: pip install '.[serve]'"


def check_stub(
    installation: TritonInstallation | None, python_version: tuple[int, int]
) -> str | None:
    """Check that Triton's Python backend was built for this Python."""
    if installation is None or installation.stub(python_version).is_file():
        return None
    if isinstance(installation, ContainerInstallation):
        return f"{installation.python_backend} has no stub: use an image with the Python backend"
    return "nvidia-pytriton has no stub for Python {}.{}: use Python 3.11 or 3.12".format(
        *python_version
    )


def check_libpython(libpython: Path | None) -> str | None:
    """Check that Python's shared library, which the stub links to, was found."""
    if libpython is not None:
        return None
    version = "{}.{}".format(*sys.version_info[:2])
    return (
        f"{libpython_name()} not found: Debian and Ubuntu: apt-get install libpython{version}; "
        f"pyenv: PYTHON_CONFIGURE_OPTS=--enable-shared pyenv install --force {version}; "
        f"conda: conda install -c conda-forge python={version}"
    )


def check_numpy(version: str | None) -> str | None:
    """Check for numpy 1; with numpy 2 the stub of Triton 2.51 corrupts string tensors."""
    if version is None:
        return "numpy is missing: pip install 'numpy<2'"
    if int(version.split(".")[0]) >= 2:
        return f"numpy {version} corrupts Triton's string tensors: pip install 'numpy<2'"
    return None


def check_address(address: str) -> str | None:
    """Check that Triton's HTTP server understands the address; it resolves no names."""
    try:
        ipaddress.IPv4Address(address)
    except ValueError:
        return f"address {address!r} is not an IPv4 address: set ADDRESS=127.0.0.1 (--address)"
    return None


def check_port(name: str, address: str, port: int) -> str | None:
    """Check by binding that the port is free; `name` is "http", "grpc" or "metrics"."""
    setting = f"set another {name.upper()}_PORT (--{name}-port)"
    if not 0 < port <= MAX_PORT:
        return f"{name} port {port} is not between 1 and {MAX_PORT}: {setting}"
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as Triton does
        try:
            listener.bind((address, port))
        except OSError as error:
            reason = os.strerror(error.errno) if error.errno else str(error)
            return f"{name} port {port} on {address} cannot be used ({reason}): {setting}"
    return None


def check_distinct(ports: Mapping[str, int]) -> str | None:
    """Check that no two services share a port."""
    if len(set(ports.values())) == len(ports):
        return None
    shown = ", ".join(f"{name.upper()}_PORT={port}" for name, port in ports.items())
    return f"each service needs a port of its own, not {shown}"


def check_shared_memory(folder: Path, min_bytes: int = MIN_SHM_BYTES) -> str | None:
    """Check that the regions of the model processes fit."""
    status = os.statvfs(folder)
    num_free_bytes = status.f_bavail * status.f_frsize
    if num_free_bytes >= min_bytes:
        return None
    return (
        f"{folder} has {num_free_bytes // 2**20} MiB free, {min_bytes // 2**20} MiB are needed: "
        "free some, or in a container: docker run --shm-size=1g"
    )


def check_model_repository(folder: Path) -> str | None:
    """Check that the folder holds at least one model."""
    if any(folder.glob("*/config.pbtxt")):
        return None
    return f"no model in {folder}: run from the repository, or name it with --model-repository"


def check_engine_dir(folder: Path) -> str | None:
    """Check that the folder exists and is not empty."""
    if folder.is_dir() and any(folder.iterdir()):
        return None
    return f"no engines in {folder}: name an engine directory that exists with --engine-dir"


def _glibc_version() -> str | None:
    try:
        name, _, version = (os.confstr("CS_GNU_LIBC_VERSION") or "").partition(" ")
    except (OSError, ValueError):
        return None
    return version if name == "glibc" else None


def _installed_version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
