"""A load on a server of the OpenAI interface, by one light process: times of every token.

    python load.py ADDRESS < PLAN > FIGURES

HTTP/1.1 by hand over asyncio's protocols, one connection a client, kept; server-sent events are
counted where they arrive, and their JSON is not parsed but for the first and the last. The plan and
the figures are JSON objects: `Plan` and `measured`.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

_EVENT = b"\ndata: {"
_LENGTH = re.compile(rb"(?i)\r\ncontent-length: *(\d+)")
_TOKENS = re.compile(rb'"completion_tokens":(\d+)')


@dataclass(frozen=True)
class Plan:
    """What is asked, and when.

    Attributes:
        path: of the route.
        bodies: of the requests, in their order.
        clients: that ask one request after the other; None where each begins at its time.
        at_s: when each request begins, where there are no such clients.
        quiet_s: requests that begin before this are not in the figures.
    """

    path: str
    bodies: Sequence[dict[str, Any]]
    clients: int | None = None
    at_s: Sequence[float] = ()
    quiet_s: float = 0.0


@dataclass
class Request:
    """What became of one request; times are seconds of `time.perf_counter`."""

    begun_s: float
    status: int = 0
    events_s: list[float] = field(default_factory=list)
    ended_s: float = 0.0
    tokens: int = 0
    error: str = ""


class Connection(asyncio.Protocol):
    """One connection, one request at a time; an event of text is a token's."""

    def __init__(self) -> None:
        self.is_open = True
        self._transport: Any = None
        self._request: Request | None = None
        self._done: asyncio.Future[None] | None = None
        self._head = b""
        self._tail = b""
        self._has_head = False
        self._left: int | None = None

    def connection_made(self, transport: Any) -> None:
        """See `asyncio.Protocol`."""
        self._transport = transport

    def ask(self, raw: bytes, request: Request) -> asyncio.Future[None]:
        """Send a request; the future is done with its answer's end."""
        self._request, self._has_head, self._head, self._tail = request, False, b"", b""
        self._done = asyncio.get_running_loop().create_future()
        self._transport.write(raw)
        return self._done

    def data_received(self, data: bytes) -> None:
        """Count the events of what came."""
        now_s = time.perf_counter()
        request = self._request
        if request is None:
            return
        if not self._has_head:
            self._head += data
            head, found, data = self._head.partition(b"\r\n\r\n")
            if not found:
                return
            self._has_head = True
            request.status = int(head[9:12])
            length = _LENGTH.search(head)
            self._left = None if length is None else int(length[1])
        # An event is never longer than a piece, but for the one that a piece ends in.
        joined = self._tail + data
        number = joined.count(_EVENT) - self._tail.count(_EVENT)
        request.events_s.extend([now_s] * number)
        self._tail = joined[-4096:]
        if self._left is not None:
            self._left -= len(data)
        if self._tail.endswith(b"0\r\n\r\n") if self._left is None else self._left <= 0:
            self._end(now_s)

    def connection_lost(self, error: Exception | None) -> None:
        """See `asyncio.Protocol`."""
        self.is_open = False
        if self._request is not None:
            self._request.error = f"the connection was lost ({error})"
            self._end(time.perf_counter())

    def _end(self, now_s: float) -> None:
        request, self._request = self._request, None
        assert request is not None
        assert self._done is not None
        request.ended_s = now_s
        if not request.error and (request.status != 200 or b"[DONE]" not in self._tail):
            request.error = f"{request.status}: {self._tail[-300:]!r}"
        told = _TOKENS.findall(self._tail)
        request.tokens = int(told[-1]) if told else 0
        if not self._done.done():
            self._done.set_result(None)

    def close(self) -> None:
        """Leave the server."""
        self._request = None
        self._transport.close()


def raw_request(address: str, path: str, body: dict[str, Any]) -> bytes:
    """A request as it is sent."""
    asked = {**body, "stream": True, "stream_options": {"include_usage": True}}
    payload = json.dumps(asked).encode()
    host = urlsplit(address).netloc
    head = f"POST {path} HTTP/1.1\r\nhost: {host}\r\ncontent-type: application/json\r\n"
    return f"{head}content-length: {len(payload)}\r\n\r\n".encode() + payload


class Asker:
    """Asks a server over connections that are kept.

    Attributes:
        found: the requests so far, in the order in which they began.
    """

    def __init__(self, address: str) -> None:
        parts = urlsplit(address)
        self._where = parts.hostname, parts.port
        self._free: list[Connection] = []
        self.found: list[Request] = []

    async def one(self, raw: bytes) -> None:
        """A request, to its end."""
        request = Request(time.perf_counter())
        self.found.append(request)
        connection = self._kept()
        if connection is not None:
            await connection.ask(raw, request)
            if request.error and not request.status:  # it was closed while it was idle
                request.error, connection = "", None
        if connection is None:
            loop = asyncio.get_running_loop()
            _, connection = await loop.create_connection(Connection, *self._where)
            await connection.ask(raw, request)
        if request.error:
            connection.close()
        else:
            self._free.append(connection)

    def _kept(self) -> Connection | None:
        while self._free:
            if (connection := self._free.pop()).is_open:
                return connection
        return None

    def close(self) -> None:
        """Leave the server."""
        for connection in self._free:
            connection.close()


async def run(address: str, plan: Plan) -> list[Request]:
    """Ask it all; the requests in the order in which they began."""
    raws = [raw_request(address, plan.path, body) for body in plan.bodies]
    asker = Asker(address)
    begun_s = time.perf_counter()

    async def client(todo: Iterator[bytes]) -> None:
        for raw in todo:
            await asker.one(raw)

    if plan.clients is not None:
        todo = iter(raws)
        await asyncio.gather(*(client(todo) for _ in range(plan.clients)))
    else:
        async with asyncio.TaskGroup() as group:
            for at_s, raw in zip(plan.at_s, raws, strict=True):
                await asyncio.sleep(max(0.0, begun_s + at_s - time.perf_counter()))
                group.create_task(asker.one(raw))
    asker.close()
    return asker.found


def quantiles(values: Sequence[float]) -> dict[str, float]:
    """Milliseconds of a list of seconds."""
    if not values:
        return {}
    ordered = sorted(values)
    return {
        "p50": 1e3 * statistics.median(ordered),
        "p99": 1e3 * ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))],
        "most": 1e3 * ordered[-1],
    }


def measured(found: Sequence[Request], quiet_s: float) -> dict[str, Any]:
    """The figures of requests that began after `quiet_s`: milliseconds, tokens, errors."""
    first_s = min(request.begun_s for request in found)
    counted = [request for request in found if request.begun_s - first_s >= quiet_s]
    good = [request for request in counted if not request.error]
    gaps = [
        later - earlier
        for request in good
        # The last events are the end and the usage, which come with the last token.
        for earlier, later in zip(
            request.events_s, request.events_s[1 : request.tokens], strict=False
        )
    ]
    last_s = max(request.ended_s for request in found)
    cpu = os.times()
    return {
        "requests": len(found),
        "errors": sum(bool(request.error) for request in found),
        "first_error": next((request.error for request in found if request.error), ""),
        "tokens": sum(request.tokens for request in found),
        "seconds": last_s - first_s,
        "tokens_per_s": sum(request.tokens for request in found) / (last_s - first_s),
        "inter_token_ms": quantiles(gaps),
        "ttft_ms": quantiles([r.events_s[0] - r.begun_s for r in good if r.events_s]),
        "client_cpu_s": cpu.user + cpu.system,
    }


if __name__ == "__main__":
    given = Plan(**json.load(sys.stdin))
    requests = asyncio.run(run(sys.argv[1], given))
    json.dump(measured(requests, given.quiet_s), sys.stdout)
