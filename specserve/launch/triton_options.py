"""What a Triton server is told on its command line; no process is started here."""

import math
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from specserve.launch.installation import TritonInstallation

ADMIN_HEADER = "specserve-admin-key"  # over gRPC: triton-grpc-protocol-specserve-admin-key
ADMIN_APIS = "model-repository,shared-memory,trace,logging"
EXIT_GRACE_S = 5.0  # after its own timeout Triton drops clients without a word: ours comes first
NVIDIA_DRIVER = (Path("/proc/driver/nvidia/version"), Path("/dev/nvidiactl"))


@dataclass(frozen=True, slots=True)
class TritonOptions:
    """What to serve and where. Addresses are loopback unless told otherwise.

    Attributes:
        exit_timeout_s: how long requests in flight may take to finish after `stop`. An HTTP
            connection that a client keeps open, even idle, makes Triton wait that long.
        admin_key: value of the header that opens the APIs which change the server; as it is made up
            here, normally nobody has it. Empty leaves them open to every client.
        backend_config: further values of --backend-config, such as "python,key=value".
        extra_args: further arguments of tritonserver, placed last.
        env: variables that the server and its models get on top of ours.
    """

    model_repository: Path
    http_port: int = 8000
    grpc_port: int = 8001
    metrics_port: int = 8002
    address: str = "127.0.0.1"
    exit_timeout_s: float = 30.0
    log_verbose: int = 0
    admin_key: str = field(default_factory=secrets.token_urlsafe, repr=False)
    backend_config: tuple[str, ...] = ()
    extra_args: tuple[str, ...] = ()
    env: Mapping[str, str] = field(default_factory=dict)

    def command(
        self, installation: TritonInstallation, backend_dir: Path, shm_prefix: str
    ) -> list[str]:
        """Write the command line; `shm_prefix` begins the names of the shared memory regions."""
        values = {
            "model-repository": self.model_repository,
            "backend-directory": backend_dir,
            "http-address": self.address,
            "http-port": self.http_port,
            "grpc-address": self.address,
            "grpc-port": self.grpc_port,
            "metrics-address": self.address,
            "metrics-port": self.metrics_port,
            "allow-gpu-metrics": str(any(path.exists() for path in NVIDIA_DRIVER)).lower(),
            "exit-timeout-secs": math.ceil(self.exit_timeout_s + EXIT_GRACE_S),
            "log-verbose": int(self.log_verbose),
            "model-control-mode": "explicit",  # for the `keeper` model, which loads lost ones again
            "load-model": "*",
        }
        if self.admin_key:
            restriction = f"{ADMIN_APIS}:{ADMIN_HEADER}={self.admin_key}"
            values["http-restricted-api"] = values["grpc-restricted-protocol"] = restriction
        backend_config = (f"python,shm-region-prefix-name={shm_prefix}", *self.backend_config)
        return [
            str(installation.binary),
            *(f"--{name}={value}" for name, value in values.items()),
            *(f"--backend-config={value}" for value in backend_config),
            *self.extra_args,
        ]
