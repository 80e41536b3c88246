"""The module of the executor's bindings, which is imported here and nowhere else."""

from importlib import import_module
from typing import Any

NAME = "tensorrt_llm.bindings.executor"


def load() -> Any:
    """Import the bindings.

    Raises:
        ValueError: if they are not installed or do not load, with the fix.
    """
    try:
        return import_module(NAME)
    except ImportError as error:
        raise ValueError(
            f"engine.name is 'tensorrt_llm', and {NAME} cannot be imported ({error}): run in an "
            "image with TensorRT-LLM 1.2.1, as docker/ builds it, or choose another engine"
        ) from error
