"""Who may come in, and with how much: checked before anything is read or parsed."""

import secrets
from collections.abc import Sequence
from pathlib import Path

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from specserve.openai.answer import json_response
from specserve.openai.errors import ApiError

_SCHEME = "bearer "


class Guard:
    """Asks for a bearer token, if there are any, and bounds request bodies.

    Args:
        keys: tokens that are let in; none lets everybody in.
        open_paths: need no token.
    """

    def __init__(
        self, app: ASGIApp, keys: Sequence[str], max_body_bytes: int, open_paths: Sequence[str]
    ) -> None:
        self._app = app
        self._keys = [key.encode() for key in keys]
        self._max_body_bytes = max_body_bytes
        self._open_paths = frozenset(open_paths)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on what is allowed."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        if scope["path"] not in self._open_paths and not self._is_known(headers):
            error = ApiError(
                401,
                "a valid API key is needed: send the header Authorization: Bearer KEY",
                code="invalid_api_key",
            )
            await json_response(error.body, 401, error.headers)(scope, receive, send)
            return
        await self._app(scope, self._bounded(receive, headers), send)

    def _is_known(self, headers: Headers) -> bool:
        given = headers.get("authorization", "")
        token = given[len(_SCHEME) :].strip().encode("latin-1")  # as headers are decoded
        is_bearer = given[: len(_SCHEME)].lower() == _SCHEME
        found = [secrets.compare_digest(token, key) for key in self._keys]  # no early end
        return not self._keys or (is_bearer and any(found))

    def _bounded(self, receive: Receive, headers: Headers) -> Receive:
        declared = headers.get("content-length", "0")
        num_bytes = 0

        async def bounded() -> Message:
            nonlocal num_bytes
            if declared.isdigit() and int(declared[:20]) > self._max_body_bytes:
                raise self._too_large(f"{declared[:20]} bytes")
            message = await receive()
            num_bytes += len(message.get("body", b""))
            if num_bytes > self._max_body_bytes:
                raise self._too_large(f"at least {num_bytes} bytes")
            return message

        return bounded

    def _too_large(self, size: str) -> HTTPException:
        limit = self._max_body_bytes
        return HTTPException(413, f"the body has {size}: the limit is {limit}, send less")


def read_keys(path: str) -> list[str]:
    """Read the tokens of a file, one in each line; no path is no tokens.

    Raises:
        ValueError: if the file cannot be read or holds none, which would let everybody in.
    """
    if not path:
        return []
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read openai.api_key_file: {error}") from error
    keys = [line.strip() for line in lines if line.strip()]
    if not keys:
        raise ValueError(f"openai.api_key_file {path} holds no key: write one in each line")
    return keys
