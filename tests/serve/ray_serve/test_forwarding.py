"""Requests about files and batches that are passed on: whole, both ways, by httpx over sockets."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import httpx
from fastapi import FastAPI, Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from qaic_ray.serve.http.gate import Gate
from qaic_ray.serve.http.server import listening_socket, quiet_server
from qaic_ray.serve.ray_serve.forwarding import SECRET_HEADER, Desk, for_desk, forwarding_router

SECRET = "s3cret"


def there() -> FastAPI:
    """What has the files."""
    app = FastAPI()

    @app.post("/v1/files")
    async def create(request: Request) -> JSONResponse:
        digest, size = hashlib.sha256(), 0
        async for piece in request.stream():
            digest.update(piece)
            size += len(piece)
        headers = {key: request.headers.get(key, "") for key in ("authorization", "x-request-id")}
        return JSONResponse({"size": size, "sha256": digest.hexdigest(), **headers})

    @app.post("/v1/batches")
    async def refuse(request: Request) -> Response:
        return JSONResponse({"error": {"message": "no"}}, 413, headers={"retry-after": "7"})

    @app.get("/v1/files/{name}/content")
    async def content(name: str, after: str = "") -> StreamingResponse:
        async def pieces() -> AsyncIterator[bytes]:
            for number in range(50):
                yield f"{name} {after} {number}\n".encode() * 100

        return StreamingResponse(pieces())

    return app


def run(work: Callable[[httpx.AsyncClient, Desk], Awaitable[None]], **changes: Any) -> None:
    async def main() -> None:
        inner = listening_socket("127.0.0.1", 0)
        outer = listening_socket("127.0.0.1", 0)
        desk = Desk("127.0.0.1", changes.get("port", inner.getsockname()[1]), SECRET)

        async def find() -> Desk:
            return desk

        app = FastAPI()
        app.include_router(forwarding_router(find))
        gate = Gate(app, keys=None, max_per_key=9, is_open=lambda: True, on_done=lambda _: None)
        servers = [quiet_server(for_desk(there(), SECRET)), quiet_server(gate)]
        tasks = [
            asyncio.ensure_future(server.serve(sockets=[opened]))
            for server, opened in zip(servers, (inner, outer), strict=True)
        ]
        url = f"http://127.0.0.1:{outer.getsockname()[1]}"
        async with httpx.AsyncClient(base_url=url, timeout=60) as client:
            await work(client, desk)
        for server in servers:
            server.should_exit = True
        await asyncio.gather(*tasks)

    asyncio.run(main())


def test_a_body_arrives_whole_with_and_without_its_length() -> None:
    body = bytes(range(256)) * 20_000

    async def pieces() -> AsyncIterator[bytes]:
        for begin in range(0, len(body), 99_999):
            yield body[begin : begin + 99_999]

    async def work(client: httpx.AsyncClient, _: Desk) -> None:
        headers = {"authorization": "Bearer key", "x-request-id": "mine"}
        for content in (body, pieces()):
            answer = await client.post("/v1/files", content=content, headers=headers)
            assert answer.json() == {
                "size": len(body),
                "sha256": hashlib.sha256(body).hexdigest(),
                "authorization": "",
                "x-request-id": "mine",
            }
            assert answer.headers["x-request-id"] == "mine"

    run(work)


def test_an_answer_comes_back_whole_with_its_path_and_query() -> None:
    async def work(client: httpx.AsyncClient, _: Desk) -> None:
        answer = await client.get("/v1/files/file-1/content", params={"after": "ä"})
        lines = answer.text.splitlines()
        assert len(lines) == 5000
        assert set(lines) == {f"file-1 ä {number}" for number in range(50)}
        many = [client.get(f"/v1/files/{i}/content") for i in range(8)]
        assert [one.text.split()[0] for one in await asyncio.gather(*many)] == list("01234567")

    run(work)


def test_a_refusal_comes_back_before_the_body_is_read() -> None:
    async def work(client: httpx.AsyncClient, _: Desk) -> None:
        answer = await client.post("/v1/batches", content=b"{}")
        assert (answer.status_code, answer.headers["retry-after"]) == (413, "7")
        assert answer.json() == {"error": {"message": "no"}}

    run(work)


def test_nobody_else_is_answered_there() -> None:
    async def work(client: httpx.AsyncClient, desk: Desk) -> None:
        url = f"http://{desk.host}:{desk.port}/v1/files/a/content"
        assert (await client.get(url)).status_code == 401
        assert (await client.get(url, headers={SECRET_HEADER: "other"})).status_code == 401
        assert (await client.get(url, headers={SECRET_HEADER: SECRET})).status_code == 200

    run(work)


def test_a_desk_that_is_gone_is_a_503_to_come_again() -> None:
    with listening_socket("127.0.0.1", 0) as opened:
        port = opened.getsockname()[1]

    async def work(client: httpx.AsyncClient, _: Desk) -> None:
        answer = await client.get("/v1/files/a/content")
        assert answer.status_code == 503
        assert answer.json()["error"]["type"] == "service_unavailable_error"
        assert int(answer.headers["retry-after"]) > 0

    run(work, port=port)
