"""The answer to a request that streams: events as they come, until its client goes."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable
from contextlib import suppress

import anyio
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from qaic_ray.errors import QaicRayError
from qaic_ray.rows import Row
from qaic_ray.serve.api_errors import ApiError
from qaic_ray.serve.http.running import Running
from qaic_ray.serve.protocol.chunks import ChunkWriter, error_event

_HEADERS = {
    "content-type": "text/event-stream; charset=utf-8",
    "cache-control": "no-cache",
    "x-accel-buffering": "no",  # a proxy must not gather events
}

_LOOK_SHARE = 0.25
"""Of the time after which a client is given up: how often it is looked at."""


class ClientGone(Exception):
    """Nobody reads the answer any more."""


GONE = (ClientGone, ClientDisconnect)
"""Errors of a client that is no more: ours, and that of who reads its body."""


class EventStream(Response):
    """Sends what a request's writer makes of its tokens.

    It begins with the first of them: a request that fails before has a status of its own, as one
    that does not stream.

    Args:
        running: the request's prompts.
        writer: makes the events.
        timeout_s: how long an answer may take.
        stall_s: how long a client may take to read on.
        on_rows: is told the rows, once they are there.
    """

    def __init__(
        self,
        running: Running,
        writer: ChunkWriter,
        *,
        timeout_s: float,
        stall_s: float,
        on_rows: Callable[[list[Row]], None],
    ) -> None:
        super().__init__(headers=_HEADERS)
        del self.headers["content-length"]
        self._running = running
        self._writer = writer
        self._timeout_s = timeout_s
        self._stall_s = stall_s
        self._on_rows = on_rows
        self._has_begun = False
        self._head = b""
        self._writing_since_s = math.inf

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it; the prompts are cancelled where their client goes."""
        watcher = asyncio.ensure_future(gone(receive))
        sender = asyncio.ensure_future(self._send(send))
        try:
            while not (sender.done() or watcher.done() or self._is_stalled()):
                await asyncio.wait(
                    {watcher, sender},
                    timeout=self._stall_s * _LOOK_SHARE,
                    return_when=asyncio.FIRST_COMPLETED,
                )
            if not sender.done():
                raise ClientGone
            sender.result()
        finally:
            self._running.close()
            for task in (watcher, sender):
                task.cancel()
            await asyncio.gather(watcher, sender, return_exceptions=True)

    async def _send(self, send: Send) -> None:
        try:
            with anyio.fail_after(self._timeout_s):
                self._head = self._writer.begin()
                async for told in self._running.deltas():
                    sent = [self._writer.take(number, delta) for number, delta in told]
                    await self._write(send, b"".join(sent))
                rows = await self._running.rows()
                self._on_rows(rows)
                await self._write(send, self._writer.end(rows))
        except QaicRayError as error:
            await self._fail(send, error)
        except TimeoutError:
            await self._fail(send, too_long(self._timeout_s))
        if self._has_begun:
            await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _fail(self, send: Send, error: QaicRayError) -> None:
        if self._has_begun:
            await self._write(send, error_event(error))
        else:
            await _refuse(send, error if isinstance(error, ApiError) else ApiError(500, str(error)))

    async def _write(self, send: Send, body: bytes) -> None:
        if not self._has_begun:
            self._has_begun = True
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            body = self._head + body
        if body:
            self._writing_since_s = time.monotonic()
            await send({"type": "http.response.body", "body": body, "more_body": True})
            self._writing_since_s = math.inf

    def _is_stalled(self) -> bool:
        """Whether the client has not read for too long.

        A time-out around every write would cost a fifth of the server's CPU.
        """
        return time.monotonic() - self._writing_since_s > self._stall_s


async def _refuse(send: Send, error: ApiError) -> None:
    answer = JSONResponse(error.document(), error.status, headers=error.headers)
    await send(
        {
            "type": "http.response.start",
            "status": answer.status_code,
            "headers": answer.raw_headers,
        }
    )
    await send({"type": "http.response.body", "body": answer.body})


def too_long(timeout_s: float) -> ApiError:
    """The error of an answer that takes longer than the server lets one."""
    return ApiError(
        408,
        f"The answer took more than {timeout_s:g} s, which is the server's limit: ask for fewer "
        "tokens.",
        code="request_timeout",
    )


async def gone(receive: Receive) -> None:
    """Wait until the client is gone."""
    with suppress(OSError):
        while (await receive())["type"] != "http.disconnect":
            pass
