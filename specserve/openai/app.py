"""The routes, and the one place where errors become answers."""

import contextlib
import logging
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse
from starlette.exceptions import HTTPException

from specserve.config import OpenAIConfig
from specserve.openai.answer import json_response
from specserve.openai.answers import (
    ChatCompletion,
    Completion,
    ErrorAnswer,
    Health,
    Model,
    ModelList,
)
from specserve.openai.errors import ApiError, from_validation, unavailable
from specserve.openai.guard import Guard
from specserve.openai.schema import ChatRequest, CompletionRequest
from specserve.openai.service import Service
from specserve.view.watch import Watch

logger = logging.getLogger(__name__)

PAGE = Path(__file__).parent / "page"
PAGE_FILES = {"/": "live.html", "/live.css": "live.css", "/live.js": "live.js"}
# The page loads nothing from elsewhere, and nothing may put it into a frame.
PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; img-src data:; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-cache",
}
ERRORS: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": ErrorAnswer},
    "5XX": {"model": ErrorAnswer},
}
EVENT = {
    "type": "object",
    "properties": {
        "data": {"type": "string", "description": "JSON of a chunk or an error, or [DONE]"}
    },
    "required": ["data"],
}
STREAM: dict[int | str, dict[str, Any]] = {
    200: {"content": {"text/event-stream": {"schema": EVENT}}}
}


def make_app(service: Service, watch: Watch, config: OpenAIConfig, keys: Sequence[str]) -> FastAPI:
    """Put the endpoint together.

    Args:
        keys: bearer tokens that are let in; none lets everybody in.
    """

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await service.client.close()

    app = FastAPI(
        title="SpecServe",
        description="OpenAI's API on a SpecServe server.",
        version="1",
        docs_url=None,  # its page loads scripts from elsewhere
        redoc_url=None,
        lifespan=lifespan,
        responses=ERRORS,
    )
    app.add_middleware(
        Guard,
        keys=keys,
        max_body_bytes=config.max_body_bytes,
        open_paths=["/health", *PAGE_FILES],
    )
    _add_error_handlers(app)
    _add_api(app, service)
    _add_page(app, watch)
    return app


def _add_api(app: FastAPI, service: Service) -> None:
    model: Model = {
        "id": service.model,
        "object": "model",
        "created": int(time.time()),
        "owned_by": "specserve",
        "max_model_len": service.max_model_len,
    }

    @app.get("/health", response_model=Health)
    async def health() -> Mapping[str, str]:
        if not await service.client.is_ready():
            raise unavailable("the model server is not ready: try again")
        return {"status": "ok"}

    @app.get("/v1/models", response_model=ModelList)
    async def list_models() -> Mapping[str, Any]:
        return {"object": "list", "data": [model]}

    @app.get("/v1/models/{model_id:path}", response_model=Model)
    async def get_model(model_id: str) -> Model:
        service.check_model(model_id)
        return model

    @app.post("/v1/completions", response_model=Completion, responses=STREAM)
    async def complete(body: CompletionRequest, request: Request) -> Response:
        return await service.complete(body, request)

    @app.post("/v1/chat/completions", response_model=ChatCompletion, responses=STREAM)
    async def chat(body: ChatRequest, request: Request) -> Response:
        return await service.chat(body, request)


def _add_page(app: FastAPI, watch: Watch) -> None:
    @app.get("/live/data", include_in_schema=False)
    async def data(since: float = 0.0) -> Response:
        return json_response({"frames": [frame.as_json() for frame in await watch.frames(since)]})

    async def page(request: Request) -> Response:
        return FileResponse(PAGE / PAGE_FILES[request.url.path], headers=PAGE_HEADERS)

    for path in PAGE_FILES:
        app.add_route(path, page)


def _add_error_handlers(app: FastAPI) -> None:
    @app.exception_handler(ApiError)
    async def on_api_error(request: Request, error: ApiError) -> Response:
        return json_response(error.body, error.status, error.headers)

    @app.exception_handler(RequestValidationError)
    async def on_invalid(request: Request, error: RequestValidationError) -> Response:
        return await on_api_error(request, from_validation(error.errors()))

    @app.exception_handler(HTTPException)
    async def on_http_error(request: Request, error: HTTPException) -> Response:
        told = ApiError(error.status_code, str(error.detail))
        return json_response(told.body, told.status, error.headers)

    @app.exception_handler(Exception)
    async def on_bug(request: Request, error: Exception) -> Response:
        logger.exception("%s %s failed", request.method, request.url.path)
        return await on_api_error(request, ApiError(500, "internal error", code="internal_error"))
