"""Headless Chromium, driven over its DevTools protocol: pages, their text, pictures of them."""

from __future__ import annotations

import asyncio
import base64
import json
import shutil
import subprocess
import time
from pathlib import Path
from types import TracebackType
from typing import Any

import aiohttp
from awaited import ended

PROGRAM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)
REMEDY = "Needs headless Chromium: `apt install chromium`."


class PageChangedError(Exception):
    """Another page came in the middle of a command."""


class HeadlessChromium:
    """One page of a Chromium that ends with the block.

    Args:
        folder: is empty, for its profile.
        width, height: of its window, in pixels.
    """

    def __init__(self, folder: Path, *, width: int = 1280, height: int = 800) -> None:
        assert PROGRAM is not None, REMEDY
        self._folder = folder
        self._loop = asyncio.new_event_loop()
        self._next_id = 0
        flags = ("--headless=new", "--no-sandbox", "--disable-gpu", "--remote-debugging-port=0")
        self._process = subprocess.Popen(
            [
                *(PROGRAM, *flags, f"--user-data-dir={folder}", f"--window-size={width},{height}"),
                *("--no-first-run", "--disable-dev-shm-usage", "--lang=en-US", "about:blank"),
            ],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        self._size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}

    def __enter__(self) -> HeadlessChromium:
        try:
            self._loop.run_until_complete(self._connect())
            self.call("Page.enable")
            self.call("Emulation.setDeviceMetricsOverride", **self._size)
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if hasattr(self, "_socket"):
            self._loop.run_until_complete(self._socket.close())
            self._loop.run_until_complete(self._session.close())
        self._process.terminate()
        ended(self._process)
        self._loop.close()

    async def _connect(self) -> None:
        port_file = self._folder / "DevToolsActivePort"
        deadline_s = time.monotonic() + 60
        while not (port_file.exists() and port_file.read_text().count("\n")):
            assert self._process.poll() is None, "Chromium has ended"
            assert time.monotonic() < deadline_s, "Chromium did not start in time"
            await asyncio.sleep(0.05)
        port = port_file.read_text().split("\n")[0]
        self._session = aiohttp.ClientSession()
        while True:
            async with self._session.get(f"http://127.0.0.1:{port}/json/list") as answer:
                pages = [page for page in await answer.json() if page["type"] == "page"]
            if pages:
                break
            await asyncio.sleep(0.05)
        url = pages[0]["webSocketDebuggerUrl"]
        self._socket = await self._session.ws_connect(url, max_msg_size=0)

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """One command of the protocol, and its result."""
        return self._loop.run_until_complete(self._call(method, parameters))

    async def _call(self, method: str, parameters: dict[str, Any]) -> dict[str, Any]:
        self._next_id += 1
        await self._socket.send_json({"id": self._next_id, "method": method, "params": parameters})
        while True:
            message = json.loads(await self._socket.receive_str(timeout=60))
            if message.get("id") == self._next_id:
                if "navigated" in message.get("error", {}).get("message", ""):
                    raise PageChangedError
                assert "error" not in message, message
                found: dict[str, Any] = message["result"]
                return found

    def go_to(self, url: str) -> None:
        """Open a page; what it shows comes later, see `until`."""
        self.call("Page.navigate", url=url)

    def evaluate(self, script: str) -> Any:
        """The value of a JavaScript expression in the page."""
        result = self.call("Runtime.evaluate", expression=script, returnByValue=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def text(self) -> str:
        """What a person reads on the page; nothing while another one comes."""
        try:
            return str(self.evaluate("document.body ? document.body.innerText : ''"))
        except PageChangedError:
            return ""

    def until(self, *words: str, timeout_s: float = 90.0) -> str:
        """Wait until the page shows all of the words; return its text.

        Raises:
            AssertionError: it did not in time; says what it shows.
        """
        deadline_s = time.monotonic() + timeout_s
        while not all(word in (text := self.text()) for word in words):
            assert time.monotonic() < deadline_s, f"{words} are not all in: {text}"
            time.sleep(0.2)
        return text

    def write(self, selector: str, text: str) -> None:
        """Put text into the field of a form, as typing does."""
        self.evaluate(f"document.querySelector({json.dumps(selector)}).focus()")
        self.call("Input.insertText", text=text)

    def click(self, words: str, selector: str = "button") -> None:
        """Click the first element of a selector that shows these words."""
        chosen = f"[...document.querySelectorAll({json.dumps(selector)})]"
        has = f"element => element.innerText.includes({json.dumps(words)})"
        self.evaluate(f"{chosen}.find({has}).click()")

    def write_last(self, selector: str, text: str) -> None:
        """Put text in the place of what the last field of a selector holds."""
        chosen = f"[...document.querySelectorAll({json.dumps(selector)})].pop()"
        self.evaluate(f"{chosen}.focus(), document.activeElement.select()")
        self.call("Input.insertText", text=text)

    def scroll_to(self, words: str, selector: str, where: str = "start") -> None:
        """Have the first element of a selector that shows these words in the window.

        Args:
            words, selector: as in `click`.
            where: `start` for the top of the window, `center`.
        """
        chosen = f"[...document.querySelectorAll({json.dumps(selector)})]"
        has = f"element => element.innerText.includes({json.dumps(words)})"
        self.evaluate(f"{chosen}.find({has}).scrollIntoView({{block: '{where}'}})")

    def replace(self, texts: dict[str, str]) -> None:
        """Write other texts in place of these, in what the page shows now."""
        self.evaluate(
            f"""(texts => {{
                const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
                while (walker.nextNode())
                    for (const [text, other] of Object.entries(texts))
                        walker.currentNode.data = walker.currentNode.data.replaceAll(text, other);
            }})({json.dumps(texts)})"""
        )

    def picture(self, path: Path, height: int | None = None) -> None:
        """Write what the window shows as a PNG, from its top to `height` where that is given."""
        shown = self.call("Page.getLayoutMetrics")["cssVisualViewport"]
        clip = {"x": 0, "y": shown["pageY"], "width": shown["clientWidth"], "scale": 1}
        clip["height"] = height or shown["clientHeight"]
        result = self.call("Page.captureScreenshot", format="png", clip=clip)
        path.write_bytes(base64.b64decode(result["data"]))
