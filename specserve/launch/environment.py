"""The environment of a Triton server whose Python models run in the launcher's own Python."""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from specserve.launch.installation import TritonInstallation, find_libpython

# The weights lie in memory from malloc and are read from end to end in every step: with huge pages
# a verification of 8 to 256 tokens takes 1 to 3 % less (0.4 G parameters in bf16, two cores).
TUNABLES = "glibc.malloc.hugetlb=1"


def server_environment(
    installation: TritonInstallation, base: Mapping[str, str], extra: Mapping[str, str]
) -> dict[str, str]:
    """Extend `base` by what the server and its stubs need, then by `extra`, which wins.

    The stub embeds Python and ignores PYTHONPATH. It takes its site-packages, editable installs
    included, from the first `python3` on PATH, so the folder of the running interpreter leads.
    """
    libpython = find_libpython()
    libraries = [libpython.parent] if libpython else []
    return {
        **base,
        "PATH": _prepend([Path(sys.executable).parent], base.get("PATH", "")),
        "LD_LIBRARY_PATH": _prepend(
            [*libraries, installation.libraries], base.get("LD_LIBRARY_PATH", "")
        ),
        "GLIBC_TUNABLES": _prepend([TUNABLES], base.get("GLIBC_TUNABLES", "")),
        **extra,
    }


def _prepend(first: Sequence[object], rest: str) -> str:
    return ":".join([*map(str, first), *([rest] if rest else [])])
