"""Log lines of the model processes: to standard error, where Triton's own log goes."""

import logging


def configure(args: dict[str, str]) -> None:
    """Format this process's records once; `args` are those of `initialize`."""
    name = args["model_name"]
    logging.basicConfig(
        level=logging.INFO, format=f"%(asctime)s {name} %(levelname)s %(name)s: %(message)s"
    )
