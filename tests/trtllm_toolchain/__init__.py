"""A stand-in for TensorRT-LLM's scripts, commands and Executor, for tests without a GPU.

Real processes, and strict: a flag or keyword that TensorRT-LLM 1.2.1 does not document fails. They
write files of the form of the real ones, and know the builder's silent changes. Source: the parsers
of examples/models/core/{llama,qwen}/convert_checkpoint.py, examples/quantization/quantize.py and
tensorrt_llm/commands/build.py, and the signatures in cpp/tensorrt_llm/nanobind/executor.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pytest  # the stand-ins themselves start without installed packages

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
EXAMPLES, SITE = HERE / "examples", HERE / "site"
PROGRAMS = {"python3": "", "trtllm-build": HERE / "trtllm_build.py", "mpirun": HERE / "mpirun.py"}


class Toolchain:
    """The stand-in, first on PATH.

    Args:
        folder: for its programs and its log.
        version: that the package claims to have.
    """

    def __init__(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch, version: str = "1.2.1"
    ) -> None:
        self._bin, self._log = folder / "bin", folder / "log.jsonl"
        self._bin.mkdir(parents=True)
        for name, script in PROGRAMS.items():
            program = self._bin / name
            program.write_text(f'#!/bin/sh\nexec {sys.executable} -S {script} "$@"\n')
            program.chmod(0o755)
        self._site = folder / "site"
        self.set_version(version)
        path = os.pathsep.join([str(self._site), str(SITE), str(HERE.parent), str(ROOT)])
        monkeypatch.setenv("PATH", f"{self._bin}{os.pathsep}{os.environ['PATH']}")
        monkeypatch.setenv("PYTHONPATH", path)
        monkeypatch.setenv("STAND_IN_LOG", str(self._log))
        monkeypatch.setenv("STAND_IN_VERSION", version)

    def set_version(self, version: str) -> None:
        """Install the package's metadata."""
        info = self._site / "tensorrt_llm.dist-info"
        info.mkdir(parents=True, exist_ok=True)
        text = f"Metadata-Version: 2.1\nName: tensorrt-llm\nVersion: {version}\n"
        (info / "METADATA").write_text(text)

    def remove_package(self) -> None:
        (self._site / "tensorrt_llm.dist-info" / "METADATA").unlink()

    def remove_program(self, name: str) -> None:
        (self._bin / name).unlink()

    @property
    def calls(self) -> list[list[str]]:
        """Return what was called, the program's name first, in order."""
        if not self._log.is_file():
            return []
        return [json.loads(line) for line in self._log.read_text().splitlines()]
