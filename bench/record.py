"""What every result line carries: machine, commit, command."""

import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from specserve import manifest
from specserve.cpu import cpu_name

ROOT = Path(__file__).resolve().parent.parent
NOT_CODE = (":!bench/results", ":!*.md")  # what a benchmark itself may change


def _commit() -> str:
    """Ask git, unless SPECSERVE_COMMIT says it: to a copy of the tree on a GPU machine."""
    if said := os.environ.get("SPECSERVE_COMMIT"):
        return said

    def git(*args: str) -> str:
        return subprocess.run(
            ["git", "-C", str(ROOT), *args], capture_output=True, text=True, check=False
        ).stdout.strip()

    changes = git("status", "--porcelain", "--untracked-files=no", "--", *NOT_CODE)
    dirty = "-dirty" if changes else ""
    return (git("rev-parse", "--short=12", "HEAD") or "unknown") + dirty


COMMIT = _commit()  # of the code that runs, not of what is there when it ends


def context() -> dict[str, Any]:
    """Describe where and how this benchmark runs."""
    return {
        "machine": {
            "cpu": cpu_name(),
            "num_cores": len(os.sched_getaffinity(0)),
            "memory_gib": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30),
            "python": platform.python_version(),
        },
        "commit": COMMIT,
        "command": " ".join(["python", *sys.orig_argv[1:]]),
        "time_utc": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def made_of(engine_dir: str | Path) -> dict[str, str]:
    """Name and print what a pair was made from: an inflated one has the text of a smaller model."""
    pair = {r: manifest.load(Path(engine_dir) / r).source.name for r in ("target", "draft")}
    for role, source in pair.items():
        print(f"{role}: {source}")
    return pair


def emit(result: Mapping[str, Any], path: Path | None = None) -> None:
    """Print the result as one JSON line, the last of the output, and append it to a file."""
    line = portable(json.dumps({**result, **context()}, default=str))
    if path is not None:
        if path.is_absolute() and not path.is_relative_to(ROOT):
            line = line.replace(str(path), path.name)  # a folder of this machine
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
    print(line, flush=True)


def portable(line: str) -> str:
    """Name files from the repository's root, not from this machine's."""
    return line.replace(f"{ROOT}/", "")
