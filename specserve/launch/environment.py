"""The environment of a Triton server whose Python models run in the launcher's own Python."""

import sys
from collections.abc import Mapping
from pathlib import Path

from specserve.launch.installation import TritonInstallation, find_libpython


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
        **extra,
    }


def _prepend(folders: list[Path], search_path: str) -> str:
    return ":".join([*map(str, folders), *([search_path] if search_path else [])])
