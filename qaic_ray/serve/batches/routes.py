"""The routes of `/v1/files` and `/v1/batches`. Whatever reads or writes a disk is in a thread."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from typing import Any, BinaryIO

import anyio
from fastapi import APIRouter, Request
from fastapi.concurrency import iterate_in_threadpool, run_in_threadpool
from fastapi.responses import JSONResponse, StreamingResponse
from pydantic import BaseModel, ConfigDict
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from qaic_ray.errors import QaicRayError
from qaic_ray.files.documents import as_object, parse_json, shown
from qaic_ray.serve.api_errors import CLIENT_GONE, ApiError, bad_request
from qaic_ray.serve.batches.batch_record import WINDOW, NewBatch, checked_metadata
from qaic_ray.serve.batches.file_store import FileStore, kept_seconds, too_large
from qaic_ray.serve.batches.open_batches import BatchManager
from qaic_ray.serve.batches.pages import read_paging
from qaic_ray.serve.batches.uploads import FORM_BYTES, UploadForm
from qaic_ray.serve.body_model import BodyModel
from qaic_ray.serve.protocol.fields import body_of
from qaic_ray.serve.protocol.models import said

FILES_A_PAGE, BATCHES_A_PAGE, BATCHES_BY_DEFAULT = 10_000, 100, 20
STALL_S = 60.0
_BODY_BYTES = 2**17
_FED_BYTES = 2**18
_READ_BYTES = 2**18


class ExpiresAfter(BaseModel):
    """When something expires."""

    model_config = ConfigDict(extra="forbid")

    anchor: str = said("created_at: the time counts from there.", "created_at", default=...)
    seconds: int = said("So many seconds.", 86400, default=...)


class BatchBody(BodyModel):
    """POST /v1/batches."""

    model_config = ConfigDict(extra="forbid")

    input_file_id: str = said("Id of a file whose lines are requests.", "file-1f2e", default=...)
    endpoint: str = said("The route that answers them.", "/v1/chat/completions", default=...)
    completion_window: str = said("24h; nothing depends on it.", "24h", default=...)
    metadata: dict[str, str] | None = said("Texts of yours, which the batch keeps.", {"by": "me"})
    output_expires_after: ExpiresAfter | None = said(
        "When the files of answers are removed.", {"anchor": "created_at", "seconds": 86400}
    )


_BODY_PAGE = {
    "requestBody": {
        "required": True,
        "content": {"application/json": {"schema": BatchBody.model_json_schema()}},
    }
}
_FORM_PAGE = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["file", "purpose"],
                    "properties": {
                        "file": {"type": "string", "format": "binary"},
                        "purpose": {"type": "string", "enum": ["batch"]},
                        "expires_after[anchor]": {"type": "string", "enum": ["created_at"]},
                        "expires_after[seconds]": {"type": "integer"},
                    },
                }
            }
        },
    }
}


def batch_router(manager: BatchManager, *, stall_s: float = STALL_S) -> APIRouter:
    """The routes of a server's files and batches; they raise ApiError.

    Args:
        manager: has them.
        stall_s: seconds that a client may take to send the next piece of a body.
    """
    router = APIRouter(prefix="/v1")
    _add_file_routes(router, manager.files, stall_s)
    _add_batch_routes(router, manager, stall_s)
    return router


def _add_file_routes(router: APIRouter, files: FileStore, stall_s: float) -> None:
    @router.post("/files", openapi_extra=_FORM_PAGE)
    async def create_file(request: Request) -> JSONResponse:
        """Give a file whose lines are requests."""
        return JSONResponse(await _received(request, files, stall_s))

    @router.get("/files")
    async def list_files(request: Request) -> JSONResponse:
        """The files, a page at a time."""
        query = request.query_params
        paging = read_paging(query, default=FILES_A_PAGE, most=FILES_A_PAGE)
        return JSONResponse(await run_in_threadpool(files.list, paging, query.get("purpose")))

    @router.get("/files/{file_id}")
    async def retrieve_file(file_id: str) -> JSONResponse:
        """What a file is."""
        return JSONResponse(files.get(file_id).document())

    @router.delete("/files/{file_id}")
    async def delete_file(file_id: str) -> JSONResponse:
        """Remove a file; batches that read it go on."""
        return JSONResponse(await run_in_threadpool(files.delete, file_id))

    @router.get("/files/{file_id}/content")
    async def file_content(file_id: str) -> ContentResponse:
        """The bytes of a file."""
        record = files.get(file_id)
        stream = await run_in_threadpool(files.open, file_id)
        return ContentResponse(stream, record.num_bytes)


def _add_batch_routes(router: APIRouter, manager: BatchManager, stall_s: float) -> None:
    @router.post("/batches", openapi_extra=_BODY_PAGE)
    async def create_batch(request: Request) -> JSONResponse:
        """Have the requests of a file answered."""
        asked = _new_batch(await _object(request, stall_s))
        return JSONResponse(await run_in_threadpool(manager.create, asked))

    @router.get("/batches")
    async def list_batches(request: Request) -> JSONResponse:
        """The batches, the newest first, a page at a time."""
        query = {name: request.query_params.get(name) for name in ("after", "limit")}
        given = {name: value for name, value in query.items() if value is not None}
        paging = read_paging(given, default=BATCHES_BY_DEFAULT, most=BATCHES_A_PAGE)
        return JSONResponse(await run_in_threadpool(manager.list, paging))

    @router.get("/batches/{batch_id}")
    async def retrieve_batch(batch_id: str) -> JSONResponse:
        """How a batch stands."""
        return JSONResponse(manager.get(batch_id))

    @router.post("/batches/{batch_id}/cancel")
    async def cancel_batch(batch_id: str) -> JSONResponse:
        """Have a batch end with the answers that it has."""
        return JSONResponse(await run_in_threadpool(manager.cancel, batch_id))


def _new_batch(document: dict[str, Any]) -> NewBatch:
    """What a body asks for.

    Raises:
        ApiError: 400, by the field.
    """
    checked_metadata(document.get("metadata"))
    body = body_of(BatchBody, document)
    if body.completion_window != WINDOW:
        raise bad_request(
            f"completion_window is {shown(body.completion_window)}: it is {WINDOW}.",
            "completion_window",
        )
    kept_s = None
    if (after := body.output_expires_after) is not None:
        kept_s = kept_seconds("output_expires_after", after.anchor, after.seconds)
    return NewBatch(body.endpoint, body.input_file_id, body.metadata, kept_s)


async def _sent(request: Request, stall_s: float) -> AsyncIterator[bytes]:
    """A body as it comes.

    Raises:
        ApiError: 408, nothing came for too long; 499, nothing ever will.
    """
    stream = request.stream()
    while True:
        try:
            with anyio.fail_after(stall_s):
                piece = await anext(stream)
        except StopAsyncIteration:
            return
        except ClientDisconnect as error:
            raise ApiError(CLIENT_GONE, "The client went away.", code="cancelled") from error
        except TimeoutError as error:
            raise ApiError(408, "The body did not come in time: send it faster.") from error
        yield piece


async def _object(request: Request, stall_s: float) -> dict[str, Any]:
    """The JSON object of a short body."""
    data = bytearray()
    async for piece in _sent(request, stall_s):
        data += piece
        if len(data) > _BODY_BYTES:
            raise ApiError(413, f"The body is longer than {_BODY_BYTES:,} bytes.")
    try:
        text = data.decode()
        return as_object(parse_json(text, "The body"), "The body")
    except (QaicRayError, UnicodeDecodeError) as error:
        why = str(error) if isinstance(error, QaicRayError) else "The body is not UTF-8."
        raise bad_request(why) from error


async def _received(request: Request, files: FileStore, stall_s: float) -> dict[str, Any]:
    """The file of a form, on the disk; nothing is left of one that is refused or cut off."""
    length = request.headers.get("content-length", "")
    if length.isascii() and length.isdigit() and int(length[:18]) > files.max_bytes + FORM_BYTES:
        raise too_large(files.max_bytes)
    with UploadForm(files, request.headers.get("content-type", "")) as form:
        pieces = bytearray()
        async for piece in _sent(request, stall_s):
            pieces += piece
            if len(pieces) >= _FED_BYTES:
                await run_in_threadpool(form.feed, bytes(pieces))
                pieces.clear()
        await run_in_threadpool(form.feed, bytes(pieces))
        record = await run_in_threadpool(form.finish)
    return record.document()


class ContentResponse(StreamingResponse):
    """The bytes of a file, which is closed whatever ends the answer.

    Args:
        stream: open.
        num_bytes: that it has.
    """

    def __init__(self, stream: BinaryIO, num_bytes: int) -> None:
        super().__init__(
            iterate_in_threadpool(_pieces(stream)),
            media_type="application/octet-stream",
            headers={"content-length": str(num_bytes)},
        )
        self._stream = stream

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._stream.close()


def _pieces(stream: BinaryIO) -> Iterator[bytes]:
    while piece := stream.read(_READ_BYTES):
        yield piece
