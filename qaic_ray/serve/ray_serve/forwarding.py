"""Requests about files and batches, which one replica alone has, passed on to it by HTTP."""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from urllib.parse import quote

import h11
from fastapi import APIRouter, Request
from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from qaic_ray.serve.api_errors import CLOSED_RETRY_S, ApiError
from qaic_ray.serve.http.event_stream import ClientGone
from qaic_ray.serve.http.gate import refuse
from qaic_ray.serve.http.request_log import RequestRecord

SECRET_HEADER = "x-qaic-ray-secret"
PATHS = ("/v1/files", "/v1/batches")
_METHODS = ["GET", "POST", "DELETE"]
_PIECE_BYTES = 2**16
_NOT_PASSED_ON = frozenset(
    {b"connection", b"keep-alive", b"transfer-encoding", b"authorization", b"x-request-id"}
)
"""Headers of one connection, and the client's key, which has been looked at."""


@dataclass(frozen=True)
class Desk:
    """Where files and batches are.

    Attributes:
        host, port: of the replica that has them.
        secret: requests to it show it.
    """

    host: str
    port: int
    secret: str = field(repr=False)


def for_desk(app: ASGIApp, secret: str) -> ASGIApp:
    """The app of the replica that has them: it answers those who show the secret."""

    async def guarded(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            shown = Headers(scope=scope).get(SECRET_HEADER, "")
            if not hmac.compare_digest(shown.encode(), secret.encode()):
                await refuse(ApiError(401, "This address is the server's own."))(
                    scope, receive, send
                )
                return
        await app(scope, receive, send)

    return guarded


def forwarding_router(find_desk: Callable[[], Awaitable[Desk]]) -> APIRouter:
    """The routes of files and batches, for a replica that has none.

    Args:
        find_desk: says where they are now.
    """
    router = APIRouter()
    for path in PATHS:

        async def pass_on(request: Request) -> Response:
            return _Forwarded(await find_desk())

        name = path.rpartition("/")[2]
        router.add_api_route(path, pass_on, methods=_METHODS, name=name)
        router.add_api_route(
            path + "/{rest:path}", pass_on, methods=_METHODS, name=f"one of {name}"
        )
    return router


def not_there() -> ApiError:
    """The error while the replica that has them is made anew."""
    return ApiError(
        503,
        "Files and batches are not there now: try again soon.",
        retry_after_s=CLOSED_RETRY_S,
    )


class _Forwarded(Response):
    """The answer of somebody else to the same request."""

    def __init__(self, desk: Desk) -> None:
        super().__init__()
        self._desk = desk

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on while it comes, and the answer back."""
        try:
            reader, writer = await asyncio.open_connection(self._desk.host, self._desk.port)
        except OSError:
            await refuse(not_there())(scope, receive, send)
            return
        connection = h11.Connection(h11.CLIENT)
        record: RequestRecord = scope["state"]["record"]
        head = _head(scope, secret=self._desk.secret, request_id=record.request_id)
        asking = asyncio.ensure_future(_ask(connection, writer, head, receive))
        answering = asyncio.ensure_future(_answer(connection, reader, send))
        try:
            await asyncio.wait({asking, answering}, return_when=asyncio.FIRST_COMPLETED)
            if not answering.done():
                await asking
            await answering
        except (h11.RemoteProtocolError, OSError) as error:
            raise ClientGone from error  # the answer has begun, perhaps: nothing can be added
        finally:
            for task in (asking, answering):
                task.cancel()
            await asyncio.gather(asking, answering, return_exceptions=True)
            writer.close()


def _head(scope: Scope, *, secret: str, request_id: str) -> h11.Request:
    """The request as it is passed on, but for its body."""
    headers = [(name, value) for name, value in scope["headers"] if name not in _NOT_PASSED_ON]
    if scope["method"] == "POST" and not any(name == b"content-length" for name, _ in headers):
        headers.append((b"transfer-encoding", b"chunked"))
    headers += [
        (SECRET_HEADER.encode(), secret.encode()),
        (b"x-request-id", request_id.encode()),
        (b"connection", b"close"),
    ]
    query = scope["query_string"]
    target = quote(scope["path"]).encode() + (b"?" + query if query else b"")
    return h11.Request(method=scope["method"], target=target, headers=headers)


async def _ask(
    connection: h11.Connection, writer: asyncio.StreamWriter, head: h11.Request, receive: Receive
) -> None:
    """Pass a request on while it comes.

    Raises:
        ClientGone: it does not come whole.
    """
    writer.write(connection.send(head) or b"")
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientGone
        if body := message.get("body", b""):
            writer.write(connection.send(h11.Data(body)) or b"")
            await writer.drain()
        if not message.get("more_body", False):
            break
    writer.write(connection.send(h11.EndOfMessage()) or b"")
    await writer.drain()


async def _answer(connection: h11.Connection, reader: asyncio.StreamReader, send: Send) -> None:
    """Pass an answer back while it comes."""
    while True:
        event = connection.next_event()
        match event:
            case h11.NEED_DATA:
                connection.receive_data(await reader.read(_PIECE_BYTES))
            case h11.Response():
                headers = [(k, v) for k, v in event.headers if k not in _NOT_PASSED_ON]
                await send(
                    {
                        "type": "http.response.start",
                        "status": event.status_code,
                        "headers": headers,
                    }
                )
            case h11.Data():
                body = {"type": "http.response.body", "body": bytes(event.data)}
                await send({**body, "more_body": True})
            case h11.EndOfMessage():
                await send({"type": "http.response.body", "body": b"", "more_body": False})
                return
            case h11.ConnectionClosed():
                raise h11.RemoteProtocolError("The connection ended before the answer.")
