"""The server's app asked without a socket, and served on one by a thread."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import uvicorn

from qaic_ray.serve.http.app import create_app
from qaic_ray.serve.http.server import listening_socket
from qaic_ray.serve.http.service import Service

JSON = "application/json"
Message = dict[str, Any]


@dataclass
class Told:
    """What an app sent."""

    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    is_whole: bool = False

    def json(self) -> Any:
        return json.loads(self.body)

    def events(self) -> list[str]:
        """The data of each server-sent event."""
        return [
            line.removeprefix("data: ")
            for line in self.body.decode().split("\n")
            if line.startswith("data: ")
        ]


def scope_of(method: str, path: str, headers: Sequence[tuple[bytes, bytes]]) -> Message:
    """A request as an ASGI server gives it."""
    where, _, query = path.partition("?")
    return {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.4"},
        "http_version": "1.1",
        "method": method,
        "scheme": "http",
        "path": where,
        "raw_path": where.encode(),
        "query_string": query.encode(),
        "root_path": "",
        "headers": [(b"host", b"127.0.0.1:8000"), *headers],
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 8000),
    }


async def ask(
    app: Any,
    path: str,
    body: bytes | None = None,
    *,
    kind: str | None = JSON,
    method: str | None = None,
    headers: Sequence[tuple[bytes, bytes]] = (),
    timeout_s: float = 60.0,
) -> Told:
    """One request, to its end.

    Raises:
        TimeoutError: the app hangs.
    """
    pieces: list[Message] = [{"type": "http.request", "body": body or b"", "more_body": False}]
    told, over = Told(), asyncio.Event()

    async def receive() -> Message:
        if pieces:
            return pieces.pop(0)
        await over.wait()
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        if message["type"] == "http.response.start":
            told.status = message["status"]
            told.headers = {k.decode(): v.decode() for k, v in message["headers"]}
        else:
            told.body += message.get("body", b"")
            told.is_whole = not message.get("more_body", False)
            if told.is_whole:
                over.set()

    if kind is not None:
        headers = [(b"content-type", kind.encode("latin-1", "replace")), *headers]
    scope = scope_of(method or ("GET" if body is None else "POST"), path, headers)
    async with asyncio.timeout(timeout_s):
        await app(scope, receive, send)
    return told


@contextmanager
def serving(service: Service) -> Iterator[str]:
    """The address of a service on a port of its own, served by a thread."""
    opened = listening_socket("127.0.0.1", 0)
    server = uvicorn.Server(
        uvicorn.Config(
            create_app(service),
            lifespan="off",
            ws="none",
            log_config=None,
            access_log=False,
            timeout_graceful_shutdown=1,
        )
    )
    thread = threading.Thread(target=server.run, args=([opened],), daemon=True)
    thread.start()
    until(lambda: server.started)
    try:
        yield f"http://127.0.0.1:{opened.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(30.0)
        opened.close()


def until(condition: Callable[[], bool], timeout_s: float = 30.0) -> None:
    """Wait until it is true.

    Raises:
        AssertionError: it did not come true in time.
    """
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s, "it did not come true in time"
        time.sleep(0.005)
