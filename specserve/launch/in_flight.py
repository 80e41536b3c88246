"""How many requests a server has in flight, by its own metrics."""

import http.client
import time

from specserve.launch.calls import client_host

SETTLE_S = 0.5  # longer than the orchestrator waits between two publications
GAUGES = ("specserve_requests_running", "specserve_requests_waiting")


class InFlight:
    """Asks the metrics endpoint; a server that does not answer has nothing in flight."""

    def __init__(self, address: str, metrics_port: int) -> None:
        self._host = client_host(address)
        self._port = metrics_port
        self._idle_since_s: float | None = None

    def is_busy(self) -> bool:
        """Return whether requests run or wait, or did a moment ago."""
        if self.num_requests() > 0:
            self._idle_since_s = None
            return True
        now = time.monotonic()
        self._idle_since_s = self._idle_since_s or now
        return now - self._idle_since_s < SETTLE_S

    def num_requests(self) -> float:
        """Return how many run or wait."""
        connection = http.client.HTTPConnection(self._host, self._port, timeout=2.0)
        try:
            connection.request("GET", "/metrics")
            lines = connection.getresponse().read().decode().splitlines()
        except (OSError, http.client.HTTPException):
            return 0.0
        finally:
            connection.close()
        return sum(float(line.split()[-1]) for line in lines if line.startswith(GAUGES))
