"""Tokens from a replica of cards to one of the interface: one connection a pair.

All that the prompts of a pair got in a step is one message. A message is a length of four bytes and
JSON: a list of `[call, choice, text, token_ids, logprobs, restarted]`. Whoever connects sends the
inbox's secret first, so nothing is read of anybody else. Messages hold no code, as pickles do.

A connection that breaks loses tokens on their way, and no answer: rows go through Ray.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import secrets
import struct
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from qaic_ray.runs.token_streams import TokenDelta
from qaic_ray.sampling_params import TokenLogprob
from qaic_ray.serve.ray_serve.question import Inbox

MAX_MESSAGE_BYTES = 64 * 2**20
HELLO_S = 10.0
"""How long a connection may take to show its secret."""
_LENGTH = struct.Struct(">I")
_SECRET_BYTES = 32

log = logging.getLogger("qaic_ray.serve")


@dataclass(frozen=True)
class Told:
    """What one choice of a question got.

    Attributes:
        call: of the question.
        delta: its index is the row's at the sender, and means nothing here.
    """

    call: int
    delta: TokenDelta


OnTold = Callable[[Sequence[Told]], None]


def packed(told: Sequence[Told]) -> bytes:
    """A message of what was told; a delta's row is left out."""
    body = json.dumps([_document(one) for one in told], separators=(",", ":")).encode()
    return _LENGTH.pack(len(body)) + body


def unpacked(body: bytes) -> list[Told]:
    """What a message tells."""
    return [
        Told(
            call,
            TokenDelta(
                index=-1,
                choice=choice,
                text=text,
                token_ids=tuple(ids),
                logprobs=tuple(_logprob(*one) for one in logprobs),
                restarted=restarted,
            ),
        )
        for call, choice, text, ids, logprobs, restarted in json.loads(body)
    ]


class TokenInbox:
    """Listens for tokens, in the loop of whoever opened it.

    Args:
        on_told: gets every message.
    """

    def __init__(self, on_told: OnTold) -> None:
        self._on_told = on_told
        self._secret = secrets.token_hex(_SECRET_BYTES)
        self._server: asyncio.Server | None = None
        self._readers: set[asyncio.Task[None]] = set()
        self.where: Inbox | None = None

    async def open(self, host: str) -> Inbox:
        """Listen at an address of this node, on any free port."""
        self._server = await asyncio.start_server(self._connected, host, 0)
        port = self._server.sockets[0].getsockname()[1]
        self.where = Inbox(host, port, self._secret)
        return self.where

    async def close(self) -> None:
        """Listen no more."""
        if self._server is not None:
            self._server.close()
        for reader in tuple(self._readers):
            reader.cancel()
        await asyncio.gather(*self._readers, return_exceptions=True)

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._readers.add(task)
        try:
            with suppress(asyncio.IncompleteReadError, OSError, TimeoutError):
                shown = await asyncio.wait_for(
                    reader.readexactly(2 * _SECRET_BYTES), timeout=HELLO_S
                )
                if hmac.compare_digest(shown, self._secret.encode()):
                    await self._read(reader)
                else:
                    log.warning("A connection without this inbox's secret was refused.")
        finally:
            self._readers.discard(task)
            writer.close()

    async def _read(self, reader: asyncio.StreamReader) -> None:
        while True:
            (length,) = _LENGTH.unpack(await reader.readexactly(_LENGTH.size))
            if length > MAX_MESSAGE_BYTES:
                log.error("A message of %d bytes came with tokens: its connection ends.", length)
                return
            self._on_told(unpacked(await reader.readexactly(length)))


class TokenOutbox:
    """Sends tokens to one inbox; what comes while a message is on its way is in the next.

    Args:
        inbox: whose.
    """

    def __init__(self, inbox: Inbox) -> None:
        self._inbox = inbox
        self._waiting: list[Told] = []
        self._bell = asyncio.Event()
        self._task = asyncio.ensure_future(self._send())

    @property
    def is_broken(self) -> bool:
        """Whether the connection has ended, so that nothing is told any more."""
        return self._task.done()

    def put(self, told: Sequence[Told]) -> None:
        """Send these, soon."""
        if not self.is_broken:
            self._waiting += told
            self._bell.set()

    async def close(self) -> None:
        """End the connection."""
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    async def _send(self) -> None:
        try:
            reader, writer = await asyncio.open_connection(self._inbox.host, self._inbox.port)
            try:
                writer.write(self._inbox.secret.encode())
                await self._send_while_read(reader, writer)
            finally:
                writer.close()
        except OSError as error:
            log.warning("Tokens cannot be sent to %s (%s).", self._inbox.host, error)

    async def _send_while_read(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        gone = asyncio.ensure_future(reader.read(1))  # the inbox says nothing, until it ends
        gone.add_done_callback(lambda _: self._bell.set())
        try:
            while not gone.done():
                self._bell.clear()
                told, self._waiting = self._waiting, []
                if told:
                    writer.write(packed(told))
                    await writer.drain()
                else:
                    await self._bell.wait()
        finally:
            gone.cancel()
            await asyncio.gather(gone, return_exceptions=True)


def _document(told: Told) -> list[Any]:
    delta = told.delta
    return [
        told.call,
        delta.choice,
        delta.text,
        delta.token_ids,
        [(one.token_id, one.logprob, one.top) for one in delta.logprobs],
        delta.restarted,
    ]


def _logprob(token_id: int, logprob: float, top: Sequence[tuple[int, float]]) -> TokenLogprob:
    return TokenLogprob(token_id, logprob, tuple((int(i), float(p)) for i, p in top))
