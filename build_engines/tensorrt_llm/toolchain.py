"""TensorRT-LLM as it is installed: found, its version checked, its commands run."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from build_engines.tensorrt_llm.plan import Command, EnginePlan

VERSION = "1.2.1"
IMAGE = "nvcr.io/nvidia/tritonserver:26.07-trtllm-python-py3"
PACKAGES = ("tensorrt-llm", "tensorrt", "torch", "transformers", "nvidia-modelopt")
VERSIONS = f"""
import json
from importlib.metadata import PackageNotFoundError, version
found = {{}}
for name in {PACKAGES!r}:
    try:
        found[name] = version(name)
    except PackageNotFoundError:
        pass
print(json.dumps(found))
"""


def check_toolchain(plans: Sequence[EnginePlan]) -> dict[str, str]:
    """Find everything that the commands of these plans start.

    Returns:
        Package name to version, of what builds.

    Raises:
        ValueError: in one line, on what is missing or of another version than VERSION.
    """
    versions = _check_python(plans[0].options.python)
    for plan in plans:
        for command in (*plan.commands, plan.self_check):
            _find(command[0])
        script = Path(plan.commands[0][1])
        if not script.is_file():
            raise ValueError(
                f"{script} is not there: give --examples, the examples folder of TensorRT-LLM "
                f"{VERSION} ({IMAGE} has it in /app/examples)"
            )
    _check_builder()
    return versions


def run(command: Command) -> None:
    """Run a command; what it prints goes where ours does.

    Raises:
        ValueError: if it fails.
    """
    line = shlex.join(command)
    print(f"$ {line}", flush=True)
    status = subprocess.run(command, check=False).returncode
    if status:
        raise ValueError(f"{Path(command[0]).name} ended with status {status}: {line}")


def _check_python(python: str) -> dict[str, str]:
    path = _find(python)
    answer = _output((path, "-c", VERSIONS))
    versions: dict[str, str] = json.loads(answer.splitlines()[-1])
    found = versions.get("tensorrt-llm", "")
    if not found:
        raise ValueError(
            f"{path} has no tensorrt-llm: build in {IMAGE}, or give --python with the interpreter "
            f"that has tensorrt-llm {VERSION}"
        )
    _check_version(f"tensorrt-llm of {path}", found)
    _output((path, "-c", "import build_engines.tensorrt_llm.self_check"))
    return versions


def _check_builder() -> None:
    """Start trtllm-build: only importing TensorRT-LLM shows that it can, and prints its version."""
    answer = _output((_find("trtllm-build"), "--help"))
    found = re.search(r"version: (\S+)", answer)
    if found:
        _check_version("trtllm-build", found[1])


def _check_version(what: str, found: str) -> None:
    if found != VERSION:
        raise ValueError(
            f"{what} is {found}, must be {VERSION}, the last one with compiled engines: "
            f"build in {IMAGE}"
        )


def _find(program: str) -> str:
    path = shutil.which(program)
    if path is None:
        raise ValueError(f"{program} is not on PATH: build in {IMAGE}, or add it to PATH")
    return path


def _output(command: Command) -> str:
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip() or done.stdout.strip() or "no output").splitlines()[-1]
        raise ValueError(f"{shlex.join(command[:2])} fails: {last}")
    return done.stdout
