"""`specserve openai`: put the endpoint together from the configuration and run it until stopped."""

import logging
import math
from dataclasses import dataclass
from pathlib import Path

import uvicorn
from fastapi import FastAPI
from uvicorn.config import LOGGING_CONFIG

from specserve import engines, json_log
from specserve.config import Config
from specserve.openai.app import make_app
from specserve.openai.chat_template import load_chat_template
from specserve.openai.guard import read_keys
from specserve.openai.service import Service
from specserve.openai.triton_client import TritonClient
from specserve.openai.vocabulary import Vocabulary
from specserve.text import load_tokenizer
from specserve.view.watch import Watch


@dataclass(frozen=True, slots=True)
class Listen:
    """Where the endpoint listens, and where its server does.

    Attributes:
        drain_timeout_s: how long requests in flight may hold up the end.
    """

    address: str
    port: int
    triton_host: str
    grpc_port: int
    metrics_port: int
    drain_timeout_s: float


def serve(config: Config, listen: Listen) -> None:
    """Serve until SIGINT or SIGTERM; requests in flight finish first.

    Raises:
        ValueError: a configuration that cannot work, naming the value and the fix.
    """
    options = config.openai
    if bool(options.tls_cert_file) != bool(options.tls_key_file):
        raise ValueError("openai.tls_cert_file and openai.tls_key_file go together: give both")
    keys = read_keys(options.api_key_file)
    folder = Path(config.engine.dir) / "target"
    info = engines.describe(config)
    vocabulary = Vocabulary(load_tokenizer(folder))
    template = load_chat_template(folder, options.chat_template)
    limit = min(config.scheduler.max_seq_len or info.max_seq_len, info.num_blocks * info.block_size)

    as_json = config.server.json_logs
    json_log.configure("specserve.openai", as_json=as_json)
    logging.getLogger("uvicorn.access").addFilter(_is_worth_a_line)

    def app() -> FastAPI:  # made in the event loop, to which the gRPC channel belongs
        service = Service(
            client=TritonClient(f"{listen.triton_host}:{listen.grpc_port}"),
            vocabulary=vocabulary,
            template=template,
            model=options.model_name,
            max_model_len=limit,
            max_choices=options.max_choices,
        )
        watch = Watch(f"http://{listen.triton_host}:{listen.metrics_port}/metrics")
        return make_app(service, watch, options, keys)

    uvicorn.run(
        app,
        factory=True,
        host=listen.address,
        port=listen.port,
        ssl_certfile=options.tls_cert_file or None,
        ssl_keyfile=options.tls_key_file or None,
        timeout_graceful_shutdown=math.ceil(listen.drain_timeout_s),
        server_header=False,
        log_config=None if as_json else LOGGING_CONFIG,
    )


def _is_worth_a_line(record: logging.LogRecord) -> bool:
    """Leave out of the log what pages and probes ask every second."""
    message = record.getMessage()
    return '"GET /live' not in message and '"GET /health' not in message
