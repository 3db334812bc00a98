"""A headless Chromium of the test's own, driven over the DevTools protocol.

    async with chromium(folder) as browser, browser.page(width=360) as page:
        await page.open(url)
        await page.until("document.title.includes('main')")

Whatever the page logs, fails to load or is forbidden by its policy is in `page.complaints`.
Source: Chrome DevTools Protocol (Page, Runtime, Log, Emulation, Input, Network).
"""

from __future__ import annotations

import base64
import contextlib
import itertools
import json
import shutil
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import anyio

from bridge.embedded import until
from tests import servers

NAMES = ("chromium", "chromium-browser", "google-chrome")
FLAGS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--remote-debugging-port=0",
    "--hide-scrollbars",
)  # fmt: skip


class Page:
    """One tab."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self._socket = socket
        self._numbers = itertools.count(1)
        self._answers: dict[int, dict[str, Any]] = {}
        self._news = anyio.Event()
        self.complaints: list[str] = []

    async def listen(self) -> None:
        """Take answers and events until the tab is closed."""
        async for message in self._socket:
            told = json.loads(message.data)
            if "id" in told:
                self._answers[told["id"]] = told
            self._complain(told.get("method", ""), told.get("params", {}))
            self._news.set()
            self._news = anyio.Event()

    def _complain(self, method: str, params: dict[str, Any]) -> None:
        if method == "Log.entryAdded":
            self.complaints.append(f"{params['entry']['source']}: {params['entry']['text']}")
        elif method == "Runtime.exceptionThrown":
            details = params["exceptionDetails"]
            self.complaints.append(f"{details['text']} {details.get('exception', {}).get('description', '')}")
        elif method == "Runtime.consoleAPICalled":
            self.complaints.append(f"console: {[one.get('value') for one in params['args']]}")

    async def call(self, method: str, **params: Any) -> dict[str, Any]:
        """One command of the protocol; its result."""
        number = next(self._numbers)
        await self._socket.send_json({"id": number, "method": method, "params": params})
        with anyio.fail_after(20):
            while number not in self._answers:
                await self._news.wait()
        answer = self._answers.pop(number)
        assert "error" not in answer, answer
        result: dict[str, Any] = answer["result"]
        return result

    async def open(self, url: str) -> None:
        """Go there, and wait until it is loaded."""
        await self.call("Page.navigate", url=url)
        await self.until("location.href !== 'about:blank' && document.readyState === 'complete'")

    async def value(self, expression: str) -> Any:
        """What a JavaScript expression gives."""
        found = await self.call(
            "Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True, userGesture=True
        )
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    async def until(self, expression: str, seconds: float = 10) -> None:
        """Wait until an expression is true."""

        async def true() -> bool:
            return bool(await self.value(expression))

        try:
            await until(true, seconds, expression)
        except TimeoutError as error:
            error.add_note(str(await self.value("document.body.innerText.slice(0, 1500)")))
            error.add_note(str(self.complaints))
            raise

    async def press(self, key: str, code: int = 0) -> None:
        """One key, as the keyboard sends it."""
        text = {"Enter": "\r"}.get(key, key if len(key) == 1 else "")
        await self.call("Input.dispatchKeyEvent", type="keyDown", key=key, text=text, windowsVirtualKeyCode=code)
        await self.call("Input.dispatchKeyEvent", type="keyUp", key=key, windowsVirtualKeyCode=code)

    async def write(self, text: str) -> None:
        """Text into what has the focus, key by key."""
        for letter in text:
            await self.press(letter)

    async def scheme(self, name: str) -> None:
        """light or dark, as the system would prefer it."""
        await self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": name}])

    async def width(self, pixels: int, height: int = 800) -> None:
        """The window's width; a phone's below 500."""
        await self.call(
            "Emulation.setDeviceMetricsOverride", width=pixels, height=height, deviceScaleFactor=1, mobile=pixels < 500
        )

    async def picture(self) -> bytes:
        """What is seen, as PNG."""
        return base64.b64decode((await self.call("Page.captureScreenshot", format="png"))["data"])


class Browser:
    """A running Chromium; `url` is where its protocol is spoken."""

    def __init__(self, session: aiohttp.ClientSession, url: str) -> None:
        self._session = session
        self._url = url

    @contextlib.asynccontextmanager
    async def page(self) -> AsyncIterator[Page]:
        """A tab of its own."""
        async with self._session.put(f"{self._url}/json/new?about:blank") as answer:
            target = await answer.json()
        async with (
            self._session.ws_connect(target["webSocketDebuggerUrl"], max_msg_size=0) as socket,
            anyio.create_task_group() as tasks,
        ):
            made = Page(socket)
            tasks.start_soon(made.listen)
            for domain in ("Page", "Runtime", "Log"):
                await made.call(f"{domain}.enable")
            yield made
            tasks.cancel_scope.cancel()


def program() -> str:
    """Where Chromium is; the test is skipped where it is not installed, but not in CI."""
    found = next((path for name in NAMES if (path := shutil.which(name))), None)
    if found is None:
        servers.missing("Chromium is not installed; scripts/setup --tests installs it")
    return found


@contextlib.asynccontextmanager
async def chromium(folder: Path) -> AsyncIterator[Browser]:
    """Runs while the block does, with a profile of its own in `folder`."""
    profile = folder / "chromium"
    port = profile / "DevToolsActivePort"
    command = [program(), *FLAGS, f"--user-data-dir={profile}", "about:blank"]
    async with await anyio.open_process(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            await until(port.exists, 30, "Chromium listens")
            await until(lambda: "\n" in port.read_text(), 10, "Chromium has written its port")
            async with aiohttp.ClientSession() as session:
                yield Browser(session, f"http://127.0.0.1:{port.read_text().splitlines()[0]}")
        finally:
            process.kill()
