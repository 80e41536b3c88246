"""SpecServe as users have it: a real Triton server, one gRPC stream per request.

Answers come step by step, or whole with the last step, as users ask for them.
"""

import asyncio
import time

import tritonclient.grpc.aio as triton

from bench.answer import Answer
from bench.grpc_client import stream
from bench.peers import Load, Run
from bench.served import Served

NO_END = -1


class SpecServeServer:
    """A running server; its policy decides the draft lengths, so there is one arm.

    Args:
        streams: a response with every step; else one, with the last.
    """

    max_concurrency = 64

    def __init__(self, server: Served, *, streams: bool = True) -> None:
        self.arms = ("specserve" if streams else "specserve_whole",)
        self._streams = streams
        self._address = f"127.0.0.1:{server.grpc_port}"

    def run(self, arm: str, load: Load) -> Run:
        """Serve a load. See `Peer`."""
        return asyncio.run(self._run(load))

    async def _run(self, load: Load) -> Run:
        answers: list[Answer | None] = [None] * len(load.prompts)
        waiting = iter(range(len(load.prompts)))
        async with triton.InferenceServerClient(self._address) as client:

            async def serve_in_turn() -> None:
                for i in waiting:
                    tensors = {
                        "input_ids": load.prompts[i],
                        "max_tokens": load.max_tokens,
                        "end_id": NO_END,
                        "stream": self._streams,
                        "return_num_output_tokens": True,
                    }
                    answers[i] = await stream(client, "specserve", tensors)

            started = time.perf_counter()
            await asyncio.gather(*(serve_in_turn() for _ in range(load.concurrency)))
            seconds = time.perf_counter() - started
        done = [answer for answer in answers if answer is not None]
        for answer in done:
            if answer.error:
                raise RuntimeError(answer.error)
        num_tokens = sum(answer.tensors["num_output_tokens"] for answer in done)
        return Run(num_tokens, seconds, [answer.text for answer in done])
