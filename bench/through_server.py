"""Windows replayed through a real server, started anew for each of them.

A start takes some four seconds and leaves nothing of the policy before; the profile that policies
predict from is measured once and kept by the server itself.
"""

import asyncio
from collections.abc import Sequence

from bench.grpc_client import GrpcClient
from bench.http_client import HttpClient
from bench.load_generator import replay
from bench.outcome import Outcome, Run
from bench.served import Served, serving
from bench.step_traces import merged
from bench.workloads.plan import Plan

HOST = "127.0.0.1"
MODEL = "specserve"  # the one that takes token ids, so that prompts have the planned length


class ThroughServer:
    """Replays windows on fresh servers. See `bench.grid.Runner`.

    Args:
        overrides: `section.key=value` of every server.
        protocol: `grpc` or `http`.
    """

    def __init__(self, overrides: Sequence[str], protocol: str = "grpc") -> None:
        self._overrides = overrides
        self._protocol = protocol

    def run(self, overrides: Sequence[str], warm_up: Plan | None, plan: Plan) -> Run:
        """Start a server, warm it up, replay the plan, stop the server."""
        with serving([*self._overrides, *overrides]) as server:
            outcomes = asyncio.run(self._replay(server, warm_up, plan))
        return Run(outcomes, merged(step for outcome in outcomes for step in outcome.steps))

    async def _replay(self, server: Served, warm_up: Plan | None, plan: Plan) -> list[Outcome]:
        connection = (
            GrpcClient.connect(f"{HOST}:{server.grpc_port}", MODEL)
            if self._protocol == "grpc"
            else HttpClient.connect(f"{HOST}:{server.http_port}", MODEL)
        )
        async with connection as client:
            if warm_up is not None:
                await replay(client, warm_up.requests)
            return await replay(client, plan.requests, with_steps=True)
