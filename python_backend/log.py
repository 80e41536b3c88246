"""Log lines of the model processes: to standard error, where Triton's own log goes."""

from specserve import json_log
from specserve.config import load_config


def configure(args: dict[str, str]) -> None:
    """Format this process's records once; `args` are those of `initialize`."""
    name = args["model_name"]
    line = f"%(asctime)s {name} %(levelname)s %(name)s: %(message)s"
    as_json = load_config().server.json_logs
    json_log.configure(f"specserve.{name}", as_json=as_json, line=line)
