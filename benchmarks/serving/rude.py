"""Clients that vanish, stall, dribble and send too much, one connection each."""

from __future__ import annotations

import asyncio
import json
import random
import socket
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from typing import Any

Body = dict[str, Any]
MOST_S = 0.15
"""A client vanishes within this time after it has sent something."""
ANSWER_S = 120.0


class Client:
    """A connection to a server, and how its requests look.

    Args:
        host, port: of the server.
        path: of the route.
        body: of the request.
        chance: every draw.
    """

    def __init__(
        self, host: str, port: int, *, path: str, body: Body, chance: random.Random
    ) -> None:
        self._where = host, port
        self._path = path
        self._body = body
        self._chance = chance
        self._reader: asyncio.StreamReader
        self._writer: asyncio.StreamWriter

    async def vanish_before_the_request(self) -> None:
        """Connect, and go."""
        await self._open()
        self._leave()

    async def vanish_in_the_head(self) -> None:
        """Send a part of the head, and go."""
        await self._open()
        head, _ = self._request()
        await self._send(head[: self._chance.randrange(len(head))])
        await self._wait()
        self._leave()

    async def vanish_in_the_body(self) -> None:
        """Send a part of the body, and go."""
        await self._open()
        head, body = self._request()
        await self._send(head + body[: self._chance.randrange(len(body))])
        await self._wait()
        self._leave()

    async def vanish_while_waiting(self) -> None:
        """Ask for an answer in one piece, and go."""
        await self._open()
        await self._send(b"".join(self._request()))
        await self._wait()
        self._leave()

    async def vanish_in_the_stream(self) -> None:
        """Go after some events."""
        await self._open()
        await self._send(b"".join(self._request(stream=True)))
        for _ in range(self._chance.randrange(6)):
            await self._reader.readline()
        self._leave()

    async def half_close(self) -> None:
        """Say that nothing more will be sent, and read on until the server closes."""
        await self._open()
        await self._send(b"".join(self._request(stream=True)))
        self._writer.write_eof()
        await self._reader.read(100_000)
        self._leave()

    async def stay_open(self) -> None:
        """Ask for nothing, and stay for a while."""
        await self._open()
        await asyncio.sleep(4 * MOST_S)
        self._leave()

    async def read_slowly(self) -> None:
        """Read a little of a stream, now and then."""
        await self._open(receive_bytes=4096)
        await self._send(b"".join(self._request(stream=True)))
        for _ in range(4):
            await self._reader.read(64)
            await self._wait()
        self._leave()

    async def send_slowly(self) -> None:
        """Send a request in many pieces, and get the whole answer."""
        await self._open()
        raw = b"".join(self._request())
        size = max(1, len(raw) // 8)
        for at in range(0, len(raw), size):
            await self._send(raw[at : at + size])
            await asyncio.sleep(self._chance.random() * 0.02)
        status, _ = await self._answer()
        assert status == 200, status
        self._leave()

    async def send_too_much(self) -> None:
        """Send a body that is longer than the server takes; it must say so."""
        await self._open()
        head, _ = self._request(length=2**30)
        await self._send(head)
        with suppress(ConnectionError):  # it may close while we send
            for _ in range(64):
                await self._send(b" " * 2**16)
        with suppress(ConnectionError):
            status, _ = await self._answer()
            assert status == 413, status
        self._leave()

    async def behave(self) -> bytes:
        """Get a whole answer; its body."""
        await self._open()
        await self._send(b"".join(self._request()))
        status, body = await self._answer()
        assert status == 200, (status, body[:300])
        self._leave()
        return body

    # -- parts

    async def _open(self, receive_bytes: int = 0) -> None:
        opened = socket.socket()
        if receive_bytes:
            opened.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
        opened.setblocking(False)
        await asyncio.get_running_loop().sock_connect(opened, self._where)
        self._reader, self._writer = await asyncio.open_connection(sock=opened)

    def _request(self, *, stream: bool = False, length: int | None = None) -> tuple[bytes, bytes]:
        payload = json.dumps({**self._body, "stream": stream}).encode()
        size = len(payload) if length is None else length
        host, port = self._where
        head = f"POST {self._path} HTTP/1.1\r\nhost: {host}:{port}\r\nconnection: close\r\n"
        head += f"content-type: application/json\r\ncontent-length: {size}\r\n\r\n"
        return head.encode(), payload

    async def _send(self, data: bytes) -> None:
        self._writer.write(data)
        await self._writer.drain()

    async def _answer(self) -> tuple[int, bytes]:
        async with asyncio.timeout(ANSWER_S):
            raw = await self._reader.read(-1)
        head, _, body = raw.partition(b"\r\n\r\n")
        return int(head[9:12] or 0), body

    async def _wait(self) -> None:
        await asyncio.sleep(self._chance.random() * MOST_S)

    def _leave(self) -> None:
        """Close as a program does that ends, or as one that is killed."""
        if self._chance.random() < 0.5:
            self._writer.transport.abort()
        else:
            self._writer.close()


KINDS: Sequence[Callable[[Client], Awaitable[object]]] = (
    Client.vanish_before_the_request,
    Client.vanish_in_the_head,
    Client.vanish_in_the_body,
    Client.vanish_while_waiting,
    Client.vanish_in_the_stream,
    Client.vanish_in_the_stream,
    Client.half_close,
    Client.stay_open,
    Client.read_slowly,
    Client.send_slowly,
    Client.send_too_much,
    Client.behave,
)


async def crowd(
    host: str,
    port: int,
    *,
    path: str,
    bodies: Sequence[Body],
    at_once: int,
    seed: int = 0,
    is_quick: bool = False,
) -> tuple[Counter[str], dict[int, bytes]]:
    """So many clients as there are bodies, each of a kind that is drawn.

    Args:
        host, port: of the server.
        path: of the route.
        bodies: of the requests.
        at_once: clients that are there at the same time.
        seed: of all draws.
        is_quick: whether kinds that wait for long are left out.

    Returns:
        How many there were of each kind, and of those that behaved the answers, by their number.
    """
    kinds = [k for k in KINDS if not is_quick or k not in (Client.stay_open, Client.send_too_much)]
    chance = random.Random(seed)
    drawn = [(chance.choice(kinds), random.Random(chance.random())) for _ in bodies]
    turns = asyncio.Semaphore(at_once)
    counts: Counter[str] = Counter()
    answers: dict[int, bytes] = {}

    async def one(number: int) -> None:
        kind, own = drawn[number]
        client = Client(host, port, path=path, body=bodies[number], chance=own)
        async with turns:
            try:
                found = await kind(client)
            except ConnectionError as error:
                raise AssertionError(f"{kind.__name__}: {error!r}") from error
        counts[kind.__name__] += 1
        if isinstance(found, bytes):
            answers[number] = found

    await asyncio.gather(*(one(number) for number in range(len(bodies))))
    return counts, answers
