"""A headless Chromium for the time of a test, driven over its DevTools protocol."""

from __future__ import annotations

import asyncio
import base64
import itertools
import os
import shutil
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome")
TIMEOUT_S = 60.0
POLL_S = 0.05
COMPLAINTS = ("Runtime.exceptionThrown", "Log.entryAdded", "Runtime.consoleAPICalled")


class Page:
    """One page; what the browser has to complain of it is kept."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self.complaints: list[str] = []
        self._socket = socket
        self._ids = itertools.count(1)

    async def call(self, method: str, **params: Any) -> dict[str, Any]:
        """Call a method of the protocol and wait for its result."""
        number = next(self._ids)
        await self._socket.send_json({"id": number, "method": method, "params": params})
        while True:
            message = await self._socket.receive_json(timeout=TIMEOUT_S)
            if message.get("method") in COMPLAINTS:
                self.complaints.append(str(message["params"]))
            if message.get("id") == number:
                assert "error" not in message, message
                return dict(message["result"])

    async def text(self, element: str) -> str:
        """Return the text of an element as it is seen."""
        return str(await self.value(f"document.getElementById('{element}').innerText"))

    async def value(self, expression: str) -> Any:
        """Evaluate an expression in the page."""
        result = await self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        return result["result"].get("value")

    async def wait_for(self, element: str, text: str) -> None:
        """Wait until an element has some text in it."""

        async def wait() -> None:
            while text not in await self.text(element):
                await asyncio.sleep(POLL_S)

        try:
            await asyncio.wait_for(wait(), TIMEOUT_S)
        except TimeoutError:
            pytest.fail(f"{element} is '{await self.text(element)}', never '{text}'")

    async def picture(self) -> bytes:
        """Return the page as a PNG."""
        return base64.b64decode((await self.call("Page.captureScreenshot"))["data"])


@asynccontextmanager
async def browsing(url: str, profile: Path) -> AsyncIterator[Page]:
    """Open a page in a browser of its own."""
    given = os.environ.get("CHROMIUM")
    chromium = given or next(filter(None, map(shutil.which, NAMES)), None)
    if chromium is None:
        pytest.skip("no Chromium: apt-get install chromium, or set CHROMIUM")
    options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--no-proxy-server"]
    options += ["--remote-debugging-port=0", f"--user-data-dir={profile}", "about:blank"]
    with subprocess.Popen(
        [chromium, *options], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as process:
        try:
            port = await asyncio.wait_for(_port(profile), TIMEOUT_S)
            async with aiohttp.ClientSession() as session:
                (target,) = [one for one in await _targets(session, port) if one["type"] == "page"]
                async with session.ws_connect(target["webSocketDebuggerUrl"]) as socket:
                    page = Page(socket)
                    for domain in ("Page", "Runtime", "Log"):
                        await page.call(f"{domain}.enable")
                    await page.call("Page.navigate", url=url)
                    while await page.value("document.readyState") != "complete":
                        await asyncio.sleep(POLL_S)
                    yield page
                    await page.call("Browser.close")
        finally:
            process.terminate()


async def _port(profile: Path) -> int:
    """Wait for the file in which the browser says where it listens."""
    path = profile / "DevToolsActivePort"
    while not path.is_file() or not path.read_text():
        await asyncio.sleep(POLL_S)
    return int(path.read_text().split()[0])


async def _targets(session: aiohttp.ClientSession, port: int) -> list[dict[str, Any]]:
    async with session.get(f"http://127.0.0.1:{port}/json") as answer:
        return list(await answer.json())
