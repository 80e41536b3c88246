"""Packages that only some commands need, and what to do where they are missing."""

from importlib.util import find_spec

REPORT = ("jinja2", "matplotlib", "scipy")
PEERS = ("openvino_genai", "openvino_tokenizers", "transformers", "torch")


def require(extras: str, modules: tuple[str, ...]) -> None:
    """Refuse to go on without modules that an extra of this package brings.

    Raises:
        ValueError: naming the missing ones and how to install them.
    """
    missing = [name for name in modules if find_spec(name) is None]
    if missing:
        raise ValueError(
            f"{', '.join(missing)} not installed: run "
            f".venv/bin/python -m pip install -c constraints.txt -e '.[{extras}]'"
        )
