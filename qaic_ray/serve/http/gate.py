"""What every request goes through: its id, its key, its limits, its line in the log.

Pure ASGI, so that nothing stands between a handler and its client's going.
"""

from __future__ import annotations

import re
import time
import uuid
from collections import Counter
from collections.abc import Callable
from contextlib import suppress

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from qaic_ray.serve.api_errors import BUSY_RETRY_S, CLIENT_GONE, CLOSED_RETRY_S, ApiError
from qaic_ray.serve.http.event_stream import GONE
from qaic_ray.serve.http.keys import ApiKeys
from qaic_ray.serve.http.request_log import RequestRecord

OPEN_PATHS = frozenset({"/health", "/ping", "/ready", "/version", "/metrics"})
"""Routes that need no key: they tell how the server is, and nothing of what it does."""
_NOT_LOGGED = OPEN_PATHS
_REQUEST_ID = re.compile(r"[\x21-\x7e]{1,128}")
_LOCAL_NAMES = frozenset({"localhost", "127.0.0.1", "[::1]"})


class Gate:
    """Lets requests through to the app.

    Args:
        app: behind it.
        keys: who may ask; None for everybody.
        max_per_key: requests at once of one key, or of all where there are no keys.
        is_open: whether new requests are taken; False while the server drains.
        on_done: is told each request.
        local_only: refuse names of the server that are none of this machine's own: a page on the
            web could make one point here.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        keys: ApiKeys | None,
        max_per_key: int,
        is_open: Callable[[], bool],
        on_done: Callable[[RequestRecord], None],
        local_only: bool = False,
    ) -> None:
        self._app = app
        self._keys = keys
        self._max_per_key = max_per_key
        self._is_open = is_open
        self._on_done = on_done
        self._local_only = local_only
        self._running: Counter[str] = Counter()

    @property
    def num_running(self) -> int:
        """Requests that are being answered, but for those that only ask how the server is."""
        return self._running.total()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        record = RequestRecord(_request_id(headers), scope["method"], scope["path"])
        scope.setdefault("state", {})["record"] = record
        begun_s = time.monotonic()

        async def told(message: Message) -> None:
            if message["type"] == "http.response.start":
                record.status = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = record.request_id
            await send(message)

        try:
            await self._let_through(scope, receive, told, record=record)
        except GONE:
            record.status = CLIENT_GONE
        finally:
            record.seconds = time.monotonic() - begun_s
            if scope["path"] not in _NOT_LOGGED:
                self._on_done(record)

    async def _let_through(
        self, scope: Scope, receive: Receive, send: Send, *, record: RequestRecord
    ) -> None:
        if scope["path"] in OPEN_PATHS:
            await self._app(scope, receive, send)
            return
        try:
            self._check(Headers(scope=scope), record)
        except ApiError as error:
            await refuse(error)(scope, receive, send)
            return
        self._running[record.holder] += 1
        try:
            await self._app(scope, receive, send)
        finally:
            self._running[record.holder] -= 1
            if not self._running[record.holder]:
                del self._running[record.holder]

    def _check(self, headers: Headers, record: RequestRecord) -> None:
        if self._local_only and _name(headers) not in _LOCAL_NAMES:
            raise ApiError(
                403, "This server is of this machine alone: reach it by 127.0.0.1 or localhost."
            )
        if self._keys is not None:
            holder = self._keys.holder(headers.get("authorization"))
            if holder is None:
                raise ApiError(
                    401,
                    "The API key is missing or wrong: send it as `Authorization: Bearer KEY`.",
                    code="invalid_api_key",
                )
            record.holder = holder
        if not self._is_open():
            raise ApiError(
                503, "The server is ending: it takes no new requests.", retry_after_s=CLOSED_RETRY_S
            )
        if self._running[record.holder] >= self._max_per_key:
            raise ApiError(
                429,
                f"{self._max_per_key} requests of this key are running, as many as may be: wait "
                "for one to end.",
                code="too_many_requests",
                retry_after_s=BUSY_RETRY_S,
            )


def refuse(error: ApiError) -> JSONResponse:
    """The response of an error."""
    return JSONResponse(error.document(), error.status, headers=error.headers)


def _request_id(headers: Headers) -> str:
    given = headers.get("x-request-id", "")
    return given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex


def _name(headers: Headers) -> str:
    """The server's name as the client has it, without its port."""
    host = headers.get("host", "")
    with suppress(ValueError):
        name, _, port = host.rpartition(":")
        if name and (not port or int(port) >= 0):
            return name.lower()
    return host.lower()
