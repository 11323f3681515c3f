"""The process that serves: its socket, its signals, and how it ends."""

from __future__ import annotations

import asyncio
import signal
import socket
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import uvicorn
from starlette.types import ASGIApp

from qaic_ray.errors import UsageError
from qaic_ray.serve.http.app import create_app
from qaic_ray.serve.http.service import Service

BACKLOG = 2048
KEEP_ALIVE_S = 75
LOOK_S = 0.5
"""Interval at which the server looks whether its fleet has ended."""
_POLL_S = 0.05
_SIGNALS = (signal.SIGTERM, signal.SIGINT)


def listening_socket(host: str, port: int) -> socket.socket:
    """A socket that listens.

    Raises:
        UsageError: the address is none of this machine's, or in use.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        opened = socket.socket(family, kind, protocol)
    except OSError as error:
        raise UsageError(f"--host {host} is no address of this machine ({error}).") from error
    try:
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        opened.bind(address)
        opened.listen(BACKLOG)
    except OSError as error:
        opened.close()
        raise UsageError(
            f"{host}:{port} cannot be listened at ({error.strerror}): choose another --port, or 0 "
            "for a free one."
        ) from error
    return opened


class _Server(uvicorn.Server):
    """uvicorn's server, without its signals: `serve` ends it when what runs has ended."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave signals to `serve`."""
        yield

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Never called, as no signal is captured."""


def run_in_loop(work: Coroutine[Any, Any, None]) -> None:
    """Run a coroutine in a new event loop, of uvloop where that is installed.

    Signals wake this process afterwards as they did before.
    """
    wakeup = signal.set_wakeup_fd(-1)
    try:
        loop = _new_loop()
        try:
            loop.run_until_complete(work)
        finally:
            loop.close()
    finally:
        signal.set_wakeup_fd(wakeup, warn_on_full_buffer=False)


def _new_loop() -> asyncio.AbstractEventLoop:
    try:
        import uvloop
    except ImportError:
        return asyncio.new_event_loop()
    loop: asyncio.AbstractEventLoop = uvloop.new_event_loop()
    return loop


def quiet_server(app: ASGIApp) -> uvicorn.Server:
    """A server of an app that hears no signals and logs no requests."""
    return _Server(
        uvicorn.Config(
            app,
            lifespan="off",
            ws="none",
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_keep_alive=KEEP_ALIVE_S,
            timeout_graceful_shutdown=1,
        )
    )


async def serve(
    service: Service, opened: socket.socket, make_ready: Callable[[], Awaitable[None]]
) -> None:
    """Serve until a signal, or until the fleet ends by itself.

    The first SIGTERM or SIGINT ends it gently: /ready says 503 and new requests are refused, those
    that run may end for `drain_s`. The second one ends it at once.

    Args:
        service: what is served.
        opened: a socket that listens.
        make_ready: runs beside the server, which says until its end that it is not ready.

    Raises:
        QaicRayError: what `make_ready` raises.
    """
    server = quiet_server(create_app(service))
    ending, at_once = asyncio.Event(), asyncio.Event()

    def on_signal() -> None:
        (at_once if ending.is_set() else ending).set()

    with heard(on_signal):
        serving = asyncio.create_task(server.serve(sockets=[opened]))
        readying = asyncio.ensure_future(make_ready())
        waiting = asyncio.create_task(ending.wait())
        try:
            while not (ending.is_set() or serving.done() or service.has_ended):
                if readying.done():
                    readying.result()
                await asyncio.wait(
                    {serving, waiting}, timeout=LOOK_S, return_when=asyncio.FIRST_COMPLETED
                )
            service.is_draining = True
            await _drained(service, at_once)
        finally:
            readying.cancel()
            waiting.cancel()
            server.should_exit = True
            await asyncio.gather(serving, readying, waiting, return_exceptions=True)


async def _drained(service: Service, at_once: asyncio.Event) -> None:
    """Wait until nothing runs, the time for it is over, or nobody wants to wait any more."""
    until_s = time.monotonic() + service.options.drain_s
    while service.num_running() and time.monotonic() < until_s and not at_once.is_set():
        await asyncio.sleep(_POLL_S)


@contextmanager
def heard(on_signal: Callable[[], None]) -> Iterator[None]:
    """Have signals that end a server call a function; afterwards they are heard as before."""
    loop = asyncio.get_running_loop()
    before = {number: signal.getsignal(number) for number in _SIGNALS}
    for number in _SIGNALS:
        loop.add_signal_handler(number, on_signal)
    try:
        yield
    finally:
        for number, handler in before.items():
            loop.remove_signal_handler(number)
            signal.signal(number, handler)
