"""The ASGI app: the routes of the OpenAI interface over an open fleet."""

from __future__ import annotations

import asyncio
import json
import logging
import re
import time
from collections.abc import Mapping
from typing import Any

import anyio
from fastapi import APIRouter, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp

from qaic_ray import __version__
from qaic_ray.files.documents import must_be
from qaic_ray.serve.api_errors import CLIENT_GONE, ApiError, bad_request
from qaic_ray.serve.http.event_stream import GONE, ClientGone, EventStream, gone, too_long
from qaic_ray.serve.http.gate import Gate, refuse
from qaic_ray.serve.http.request_log import RequestRecord
from qaic_ray.serve.http.running import Running
from qaic_ray.serve.http.server_metrics import CONTENT_TYPE
from qaic_ray.serve.http.service import Service
from qaic_ray.serve.protocol import chunks
from qaic_ray.serve.protocol.answers import answer_body
from qaic_ray.serve.protocol.asked import CHAT, COMPLETIONS, RESPONSES
from qaic_ray.serve.protocol.fields import body_of
from qaic_ray.serve.protocol.models import (
    ChatBody,
    CompletionBody,
    DetokenizeBody,
    ResponseBody,
    TokenizeBody,
)
from qaic_ray.serve.protocol.requests import read_request
from qaic_ray.serve.protocol.tokens import detokenized, tokenized

log = logging.getLogger("qaic_ray.serve")

_MAYBE_HALF = re.compile(r"\\u[dD][89a-fA-F]")
"""An escape that stands for half of a surrogate pair, or seems to."""
_BODIES: dict[str, type[BaseModel]] = {
    COMPLETIONS: CompletionBody,
    CHAT: ChatBody,
    RESPONSES: ResponseBody,
}


def create_app(service: Service) -> ASGIApp:
    """The app of a service.

    Args:
        service: what answers; it may not be ready yet.
    """
    app = routes_of(service)
    options = service.options
    gate = Gate(
        app,
        keys=service.keys,
        max_per_key=options.max_per_key,
        is_open=lambda: not service.is_draining,
        on_done=service.logged,
        local_only=service.is_local_only,
    )
    service.num_running = lambda: gate.num_running
    return gate


def routes_of(service: Service) -> FastAPI:
    """The routes alone, without what stands before them."""
    app = FastAPI(title="qaic-ray", version=__version__, openapi_url="/openapi.json")
    app.include_router(_about(service))
    app.include_router(_answering(service))
    app.include_router(_tokens(service))
    for router in service.routers:
        app.include_router(router)
    app.add_exception_handler(ApiError, _of_api)
    app.add_exception_handler(HTTPException, _of_http)
    app.add_exception_handler(RequestValidationError, _of_validation)
    app.add_exception_handler(Exception, _of_fault)
    return app


# -- how the server is


def _about(service: Service) -> APIRouter:
    router = APIRouter()

    @router.get("/health")
    @router.get("/ping", include_in_schema=False)
    async def health() -> Response:
        """200 while the server can go on; 503 once its fleet has ended."""
        return Response(status_code=503 if service.has_ended else 200)

    @router.get("/ready")
    @router.get("/readyz", include_in_schema=False)
    async def ready() -> Response:
        """200 while requests are taken; 503 before a card is ready, and while it drains."""
        return Response(status_code=200 if service.is_ready else 503)

    @router.get("/version")
    async def version() -> dict[str, str]:
        """The version of qaic-ray."""
        return {"version": __version__}

    @router.get("/metrics")
    async def metrics() -> Response:
        """What Prometheus reads, under vLLM's names."""
        return Response(service.exposition(), media_type=CONTENT_TYPE)

    @router.get("/v1/models")
    async def models() -> dict[str, Any]:
        """The model, by each of its names."""
        return {"object": "list", "data": [service.model_object(n) for n in service.names]}

    @router.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        """The model of a name."""
        service.context.check_model(name)
        return service.model_object(name)

    return router


# -- answers


def _answering(service: Service) -> APIRouter:
    router = APIRouter()

    def add(endpoint: str, body: type[BaseModel]) -> None:
        async def answered(request: Request) -> Response:
            return await _answer(service, endpoint, request)

        answered.__doc__ = (body.__doc__ or "").strip()
        schema = body.model_json_schema()
        router.add_api_route(
            endpoint,
            answered,
            methods=["POST"],
            name=endpoint.rpartition("/v1/")[2].replace("/", "_"),
            openapi_extra={
                "requestBody": {
                    "required": True,
                    "content": {"application/json": {"schema": schema}},
                }
            },
        )

    for endpoint, body in _BODIES.items():
        add(endpoint, body)
    return router


async def _answer(service: Service, endpoint: str, request: Request) -> Response:
    arrived_at = time.time()
    record: RequestRecord = request.state.record
    body = await read_body(request, service)
    context = service.context
    asked = await asyncio.to_thread(read_request, endpoint, body, context)
    service.note_prompts(record, asked, body)
    created = int(arrived_at)
    running = service.run(asked)
    if asked.stream:
        writer = chunks.chunk_writer(asked, context, request_id=record.request_id, created=created)
        return EventStream(
            running,
            writer,
            timeout_s=service.options.request_timeout_s,
            stall_s=service.options.client_stall_s,
            on_rows=lambda rows: service.ended(record, rows, arrived_at),
        )
    rows = await _rows_for(request, running, service.options.request_timeout_s)
    service.ended(record, rows, arrived_at)
    answer = answer_body(asked, rows, context, request_id=record.request_id, created=created)
    return JSONResponse(answer)


async def _rows_for(request: Request, running: Running, timeout_s: float) -> list[Any]:
    """The rows of a request whose client is there until they come."""
    watcher = asyncio.ensure_future(gone(request.receive))
    rows = asyncio.ensure_future(running.rows())
    try:
        with anyio.fail_after(timeout_s):
            await asyncio.wait({watcher, rows}, return_when=asyncio.FIRST_COMPLETED)
        if not rows.done():
            raise ClientGone
        return rows.result()
    except TimeoutError as error:
        raise too_long(timeout_s) from error
    finally:
        running.close()
        for task in (watcher, rows):
            task.cancel()
        await asyncio.gather(watcher, rows, return_exceptions=True)


# -- tokens


def _tokens(service: Service) -> APIRouter:
    router = APIRouter()

    @router.post("/tokenize")
    async def tokenize(request: Request) -> dict[str, Any]:
        """Token ids of a text, or of a conversation."""
        body = body_of(TokenizeBody, await read_body(request, service))
        return await asyncio.to_thread(tokenized, body, service.context)

    @router.post("/detokenize")
    async def detokenize(request: Request) -> dict[str, Any]:
        """The text of token ids."""
        body = body_of(DetokenizeBody, await read_body(request, service))
        return await asyncio.to_thread(detokenized, body, service.context)

    return router


# -- bodies and errors


async def read_body(request: Request, service: Service) -> Mapping[str, Any]:
    """The JSON object that a request brings.

    Raises:
        ApiError: there is none, it is too long, or comes too slowly.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json" and not kind.endswith("+json"):
        raise bad_request("The body is JSON: send `Content-Type: application/json` with it.")
    most = service.options.max_body_mib << 20
    pieces, size = [], 0
    try:
        with anyio.fail_after(service.options.client_stall_s):
            async for piece in request.stream():
                size += len(piece)
                if size > most:
                    raise ApiError(
                        413, f"The body is longer than {most >> 20} MiB: send less at once."
                    )
                pieces.append(piece)
    except TimeoutError as error:
        raise ApiError(408, "The body did not come in time: send it faster.") from error
    return _document(b"".join(pieces))


def _document(body: bytes) -> dict[str, Any]:
    """The JSON object of a body, whose texts can be written again."""
    try:
        text = body.decode("utf-8-sig")
        document = json.loads(text, parse_constant=_no_number)
        if _MAYBE_HALF.search(text):
            json.dumps(document, ensure_ascii=False).encode()
    except RecursionError as error:
        raise bad_request("The body is nested too deep.") from error
    except UnicodeEncodeError as error:
        raise bad_request("The body holds half of a surrogate pair, not a character.") from error
    except ValueError as error:
        raise bad_request(f"The body is no JSON of UTF-8: {error}.") from error
    if not isinstance(document, dict):
        raise bad_request("The body is no JSON object.")
    return document


def _no_number(word: str) -> Any:
    raise ValueError(f"{word} is no number of JSON")


async def _of_api(_: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return refuse(error)


async def _of_http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    known = ApiError(error.status_code, f"{request.method} {request.url.path}: {error.detail}.")
    response = refuse(known)
    response.headers.update(error.headers or {})
    return response


async def _of_validation(_: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    name = str(first["loc"][-1])
    return refuse(bad_request(f"{name}: {must_be(first) or first['msg']}.", name))


async def _of_fault(request: Request, error: Exception) -> Response:
    if isinstance(error, GONE):
        return Response(status_code=CLIENT_GONE)  # nobody reads it
    record: RequestRecord = request.state.record
    log.error("%s: a fault of qaic-ray", record.request_id, exc_info=error)
    return refuse(ApiError(500, f"A fault of qaic-ray ({type(error).__name__}): please report it."))
