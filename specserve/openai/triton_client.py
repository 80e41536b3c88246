"""gRPC to the Triton server: one connection, one stream for each generation.

NOTE: no stream is ever cancelled or left before its end, because that can abort server 2.51, nor is
`triton_grpc_error` sent, with which the server cancels streams itself. A generation that nobody
wants any more is stopped by its request id, and its stream is read to the end in the background.
"""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable

import grpc
from tritonclient.grpc import service_pb2, service_pb2_grpc
from tritonclient.utils import np_to_triton_dtype, serialize_byte_tensor

from specserve.openai.errors import ApiError, from_server, unavailable
from specserve.openai.piece import Piece, read_piece
from specserve.openai.translate import Tensors, tensor

logger = logging.getLogger(__name__)

MODEL = "specserve"
READY_TIMEOUT_S = 2.0
STOP_AGAIN_S = 0.1
_OPTIONS = (
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_reconnect_backoff_ms", 1000),  # gRPC's own limit is two minutes
    ("grpc.enable_http_proxy", 0),
)

# Takes each piece, then None or what went wrong; must not block.
Put = Callable[[Piece | ApiError | None], None]


class TritonClient:
    """Generations on one server, for one event loop."""

    def __init__(self, address: str) -> None:
        """Connect lazily; `address` is host:port of Triton's gRPC service."""
        self._channel = grpc.aio.insecure_channel(address, options=_OPTIONS)
        self._stub = service_pb2_grpc.GRPCInferenceServiceStub(self._channel)
        self._reading: dict[str, asyncio.Task[None]] = {}
        self._stopping: set[asyncio.Task[None]] = set()

    async def is_ready(self) -> bool:
        """Return whether the server takes generations."""
        request = service_pb2.ModelReadyRequest(name=MODEL)
        try:
            answer = await self._stub.ModelReady(request, timeout=READY_TIMEOUT_S)
        except grpc.aio.AioRpcError:
            return False
        return bool(answer.ready)

    def generate(self, request_id: str, tensors: Tensors, put: Put) -> None:
        """Start a generation; `put` gets its pieces, and None or an error at its end."""
        task = asyncio.create_task(self._read(_request(request_id, tensors), put))
        self._reading[request_id] = task
        task.add_done_callback(lambda _: self._reading.pop(request_id))

    def stop(self, request_id: str) -> None:
        """End a generation in the background; one that has ended is left alone."""
        if reading := self._reading.get(request_id):
            task = asyncio.create_task(self._stop(request_id, reading))
            self._stopping.add(task)
            task.add_done_callback(self._stopping.discard)

    async def close(self) -> None:
        """Stop what still runs, wait for it, disconnect."""
        for request_id in list(self._reading):
            self.stop(request_id)
        while tasks := [*self._reading.values(), *self._stopping]:
            await asyncio.wait(tasks)
        await self._channel.close()

    async def _read(self, request: service_pb2.ModelInferRequest, put: Put) -> None:
        """Read a stream to its end, whoever still listens and whatever it says."""
        end: ApiError | None = None
        try:
            async for message in self._stub.ModelStreamInfer(_only(request)):
                event = _event(request.id, message)
                if isinstance(event, Piece):
                    put(event)
                else:
                    end = end or event
        except grpc.aio.AioRpcError as error:
            logger.warning(
                "request %s: no answer, gRPC %s",
                request.id,
                error.code().name,
                extra={"request_id": request.id},
            )
            end = unavailable()
        put(end)

    async def _stop(self, request_id: str, reading: asyncio.Task[None]) -> None:
        """Ask until it has ended: a stop may overtake the request it is for."""
        wait_s = STOP_AGAIN_S
        tensors = {"stop": tensor("stop", True)}
        while not reading.done():
            with contextlib.suppress(grpc.aio.AioRpcError):
                async for _ in self._stub.ModelStreamInfer(_only(_request(request_id, tensors))):
                    pass
            await asyncio.wait([reading], timeout=wait_s)
            wait_s *= 2


def _event(request_id: str, message: service_pb2.ModelStreamInferResponse) -> Piece | ApiError:
    if message.error_message:
        extra = {"request_id": request_id}
        logger.info("request %s: %s", request_id, message.error_message, extra=extra)
        return from_server(message.error_message)
    try:
        return read_piece(message.infer_response)
    except Exception:
        logger.exception(
            "request %s: unreadable response", request_id, extra={"request_id": request_id}
        )
        return ApiError(500, "internal error", code="internal_error")


async def _only(
    request: service_pb2.ModelInferRequest,
) -> AsyncIterator[service_pb2.ModelInferRequest]:
    yield request


def _request(request_id: str, tensors: Tensors) -> service_pb2.ModelInferRequest:
    request = service_pb2.ModelInferRequest(model_name=MODEL, id=request_id)
    request.parameters["coded_errors"].bool_param = True
    for name, array in tensors.items():
        datatype = np_to_triton_dtype(array.dtype)
        request.inputs.add(name=name, datatype=datatype, shape=array.shape)
        data = serialize_byte_tensor(array).item() if datatype == "BYTES" else array.tobytes()
        request.raw_input_contents.append(data)
    return request
