"""/v1/files and /v1/batches over HTTP: driven by openai-python's own client, and by strangers."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import httpx
import openai
import pytest
from batch_places import CTX_LEN, Clock, HeldFleet, completion, jsonl, opened, until
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from hypothesis import example, given
from hypothesis import strategies as st
from openai.types import Batch, FileObject

from qaic_ray.serve.api_errors import ApiError
from qaic_ray.serve.batches import file_store, request_lines, routes
from qaic_ray.serve.batches.open_batches import BatchManager
from qaic_ray.serve.batches.routes import batch_router

COMPLETIONS = "/v1/completions"
MAX_BYTES, MAX_LINES = 4000, 50
T = TypeVar("T")


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(request_lines, "GIVE_WAY_S", 0.0)


@pytest.fixture
def fleet() -> HeldFleet:
    return HeldFleet()


@pytest.fixture
def manager(tmp_path: Path, fleet: HeldFleet) -> Iterator[BatchManager]:
    limits = {"max_file_bytes": MAX_BYTES, "max_lines": MAX_LINES}
    with opened(tmp_path, fleet, clock=Clock(), **limits) as made:
        yield made


def app_of(manager: BatchManager, **how: Any) -> FastAPI:
    app = FastAPI()
    app.include_router(batch_router(manager, **how))

    async def refused(_: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, ApiError)
        return JSONResponse(error.document(), error.status, headers=error.headers)

    app.add_exception_handler(ApiError, refused)
    return app


def http(manager: BatchManager) -> httpx.AsyncClient:
    transport = httpx.ASGITransport(app_of(manager))
    return httpx.AsyncClient(transport=transport, base_url="http://server")


def asked(manager: BatchManager, do: Callable[[openai.AsyncOpenAI], Awaitable[T]]) -> T:
    """What openai-python's client gets."""

    async def ask() -> T:
        async with openai.AsyncOpenAI(
            base_url="http://server/v1", api_key="none", http_client=http(manager), max_retries=0
        ) as client:
            return await do(client)

    return asyncio.run(ask())


def answered(manager: BatchManager, method: str, path: str, **more: Any) -> httpx.Response:
    async def ask() -> httpx.Response:
        async with http(manager) as client:
            return await client.request(method, path, **more)

    return asyncio.run(ask())


def test_openai_python_drives_files_and_a_batch(manager: BatchManager) -> None:
    data = jsonl([completion("a"), completion("b", "x" * CTX_LEN * 2)])

    async def do(client: openai.AsyncOpenAI) -> None:
        file = await client.files.create(file=("in.jsonl", data), purpose="batch")
        assert FileObject.model_validate(file.model_dump()).bytes == len(data)
        assert file.expires_at == file.created_at + 30 * 24 * 3600
        assert (await client.files.retrieve(file.id)) == file
        assert (await client.files.content(file.id)).content == data
        batch = await client.batches.create(
            input_file_id=file.id,
            endpoint=COMPLETIONS,
            completion_window="24h",
            metadata={"who": "me"},
        )
        assert Batch.model_validate(batch.model_dump()).status == "validating"
        while batch.status != "completed":
            batch = await client.batches.retrieve(batch.id)
            Batch.model_validate(batch.model_dump())
            await asyncio.sleep(0.001)
        counts = batch.request_counts
        assert counts is not None
        assert (counts.total, counts.completed, counts.failed) == (2, 1, 1)
        assert batch.usage is not None
        assert batch.usage.total_tokens == len("hello") + 3
        assert batch.model == "tiny"
        times = [batch.created_at, batch.in_progress_at, batch.finalizing_at, batch.completed_at]
        assert all(times)
        assert batch.output_file_id is not None
        assert batch.error_file_id is not None
        assert b'"custom_id": "a"' in (await client.files.content(batch.output_file_id)).content
        assert b'"status_code": 400' in (await client.files.content(batch.error_file_id)).content
        (listed,) = [each async for each in client.batches.list()]
        assert listed == batch
        for id_ in (file.id, batch.output_file_id, batch.error_file_id):
            assert (await client.files.delete(id_)).deleted
        assert [each async for each in client.files.list()] == []
        with pytest.raises(openai.NotFoundError):
            await client.files.content(file.id)

    asked(manager, do)


def test_openai_python_cancels(tmp_path: Path) -> None:
    fleet = HeldFleet(is_free=False)
    with opened(tmp_path, fleet) as manager:

        async def do(client: openai.AsyncOpenAI) -> None:
            data = jsonl([completion(f"c{number}") for number in range(9)])
            file = await client.files.create(file=data, purpose="batch")
            batch = await client.batches.create(
                input_file_id=file.id, endpoint=COMPLETIONS, completion_window="24h"
            )
            while batch.status == "validating":
                batch = await client.batches.retrieve(batch.id)
                await asyncio.sleep(0.001)
            assert (await client.batches.cancel(batch.id)).status in ("cancelling", "cancelled")
            while batch.status != "cancelled":
                batch = await client.batches.retrieve(batch.id)
                await asyncio.sleep(0.001)
            assert batch.output_file_id is None

        asked(manager, do)


def test_a_failed_batch_says_why_in_the_clients_types(manager: BatchManager) -> None:
    async def do(client: openai.AsyncOpenAI) -> None:
        file = await client.files.create(file=b"bad\n", purpose="batch")
        batch = await client.batches.create(
            input_file_id=file.id, endpoint=COMPLETIONS, completion_window="24h"
        )
        while batch.status != "failed":
            batch = await client.batches.retrieve(batch.id)
            await asyncio.sleep(0.001)
        assert batch.errors is not None
        assert batch.errors.data is not None
        (error,) = batch.errors.data
        assert (error.code, error.line) == ("invalid_json_line", 1)

    asked(manager, do)


def test_openai_pythons_pager_gets_every_file_once_while_they_are_deleted(
    manager: BatchManager,
) -> None:
    async def do(client: openai.AsyncOpenAI) -> None:
        made = [await client.files.create(file=b"{}\n", purpose="batch") for _ in range(7)]
        every = [file.id for file in made]
        down = [file.id async for file in client.files.list(limit=2)]
        up = [file.id async for file in client.files.list(limit=3, order="asc")]
        assert down == every[::-1]
        assert up == every
        assert [file.id async for file in client.files.list(purpose="batch_output")] == []
        async for file in client.files.list(limit=2):
            await client.files.delete(file.id)
        assert [file.id async for file in client.files.list()] == []

    asked(manager, do)


def test_batches_are_listed_the_newest_first_a_page_at_a_time(manager: BatchManager) -> None:
    async def do(client: openai.AsyncOpenAI) -> None:
        file = await client.files.create(file=jsonl([completion("a")]), purpose="batch")
        made = [
            await client.batches.create(
                input_file_id=file.id, endpoint=COMPLETIONS, completion_window="24h"
            )
            for _ in range(5)
        ]
        page = await client.batches.list(limit=2)
        assert [batch.id for batch in page.data] == [made[4].id, made[3].id]
        assert page.has_next_page()
        found = [batch.id async for batch in client.batches.list(limit=2)]
        assert found == [batch.id for batch in made[::-1]]

    asked(manager, do)


def test_a_file_expires_when_it_was_asked_to(manager: BatchManager) -> None:
    async def do(client: openai.AsyncOpenAI) -> None:
        file = await client.files.create(
            file=b"{}\n", purpose="batch", expires_after={"anchor": "created_at", "seconds": 3600}
        )
        assert file.expires_at == file.created_at + 3600

    asked(manager, do)


FORMS: dict[str, tuple[dict[str, str], dict[str, Any], int, str | None]] = {
    "no file": ({"purpose": "batch"}, {"other": b"x"}, 400, "other"),
    "no purpose": ({}, {"file": ("f", b"{}")}, 400, "purpose"),
    "other purpose": ({"purpose": "vision"}, {"file": ("f", b"{}")}, 400, "purpose"),
    "empty": ({"purpose": "batch"}, {"file": ("f", b"")}, 400, "file"),
    "too large": ({"purpose": "batch"}, {"file": ("f", b"x" * (MAX_BYTES + 1))}, 413, "file"),
    "too many lines": (
        {"purpose": "batch"},
        {"file": ("f", b"\n" * MAX_LINES + b"x")},
        400,
        "file",
    ),
    "unknown field": ({"purpose": "batch", "magic": "1"}, {"file": ("f", b"{}")}, 400, "magic"),
    "no seconds": (
        {"purpose": "batch", "expires_after[anchor]": "created_at"},
        {"file": ("f", b"{}")},
        400,
        "expires_after[seconds]",
    ),
    "short": (
        {"purpose": "batch", "expires_after[anchor]": "created_at", "expires_after[seconds]": "9"},
        {"file": ("f", b"{}")},
        400,
        "expires_after[seconds]",
    ),
    "no anchor": (
        {"purpose": "batch", "expires_after[seconds]": "3600"},
        {"file": ("f", b"{}")},
        400,
        "expires_after[anchor]",
    ),
    "long field": ({"purpose": "x" * 2000}, {"file": ("f", b"{}")}, 400, "purpose"),
}


@pytest.mark.parametrize("name", FORMS)
def test_a_form_that_is_wrong_is_refused_and_leaves_nothing(
    manager: BatchManager, name: str
) -> None:
    fields, files, status, param = FORMS[name]
    answer = answered(manager, "POST", "/v1/files", data=fields, files=files)
    assert answer.status_code == status, answer.text
    assert answer.json()["error"]["param"] == param
    assert os.listdir(manager.files.folder) == []


@pytest.mark.parametrize(
    ("content_type", "body"),
    [
        ("application/json", b"{}"),
        ("multipart/form-data", b"--x--"),
        ("multipart/form-data; boundary=x", b"nonsense"),
        (
            "multipart/form-data; boundary=x",
            b'--x\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n{}',
        ),
        ("multipart/form-data; boundary=x", b""),
    ],
)
def test_what_is_no_form_is_refused_and_leaves_nothing(
    manager: BatchManager, content_type: str, body: bytes
) -> None:
    headers = {"content-type": content_type}
    answer = answered(manager, "POST", "/v1/files", content=body, headers=headers)
    assert answer.status_code == 400
    assert os.listdir(manager.files.folder) == []


def test_a_body_that_says_that_it_is_too_large_is_not_read(manager: BatchManager) -> None:
    read = []

    async def body() -> AsyncIterator[bytes]:
        read.append(1)
        yield b"x"

    headers = {
        "content-type": "multipart/form-data; boundary=x",
        "content-length": str(MAX_BYTES + routes.FORM_BYTES + 1),
    }
    answer = answered(manager, "POST", "/v1/files", content=body(), headers=headers)
    assert answer.status_code == 413


@pytest.mark.parametrize("end", ["disconnect", "silence"])
def test_an_upload_that_is_cut_off_leaves_nothing(manager: BatchManager, end: str) -> None:
    app = app_of(manager, stall_s=0.02)
    sent: list[Any] = []
    begun = (
        b'--x\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nbatch\r\n'
        b'--x\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n' + b"{}\n" * 99
    )
    scope = {
        "type": "http",
        "method": "POST",
        "path": "/v1/files",
        "raw_path": b"/v1/files",
        "query_string": b"",
        "headers": [(b"content-type", b"multipart/form-data; boundary=x")],
        "http_version": "1.1",
        "scheme": "http",
        "server": ("server", 80),
        "client": ("client", 1),
    }
    messages = [
        {"type": "http.request", "body": begun, "more_body": True},
        {"type": f"http.{end}"},
    ]

    async def receive() -> dict[str, Any]:
        if len(messages) == 1 and end == "silence":
            await asyncio.sleep(60.0)
        return messages.pop(0)

    async def send(message: Any) -> None:
        sent.append(message.get("status"))

    async def upload() -> None:
        await app(scope, receive, send)

    asyncio.run(upload())
    assert sent[0] == (408 if end == "silence" else 499)
    assert os.listdir(manager.files.folder) == []


@given(pieces=st.lists(st.integers(1, 40), min_size=1, max_size=60), name=st.text(max_size=30))
@example(pieces=[1], name="../../etc/passwd")
@example(pieces=[3], name="\x00\n")
def test_a_form_may_come_in_any_pieces(
    tmp_path_factory: pytest.TempPathFactory, pieces: list[int], name: str
) -> None:
    from qaic_ray.serve.batches import disk
    from qaic_ray.serve.batches.uploads import UploadForm

    data = jsonl([completion("a", "ü" * 20)])
    store = file_store.FileStore(tmp_path_factory.mktemp("files"), disk.Ids(), clock=Clock())
    # Only the request is of another's making: a name in it is written as browsers write it.
    request = httpx.Request(
        "POST", "http://x", data={"purpose": "batch"}, files={"file": (name or "f", data)}
    )
    body, kind = request.read(), request.headers["content-type"]
    with UploadForm(store, kind) as form:
        at = 0
        while at < len(body):
            size = pieces[at % len(pieces)]
            form.feed(body[at : at + size])
            at += size
        record = form.finish()
    with store.open(record.id) as stream:
        assert stream.read() == data
    assert record.filename
    assert record.filename.isprintable()
    assert sorted(os.listdir(store.folder)) == [record.id]


NEW_BATCHES: dict[str, tuple[dict[str, Any], str | None]] = {
    "no endpoint": ({"endpoint": None}, "endpoint"),
    "unknown endpoint": ({"endpoint": "/v1/embeddings"}, "endpoint"),
    "no file": ({"input_file_id": "file-none"}, "input_file_id"),
    "window": ({"completion_window": "1h"}, "completion_window"),
    "unknown field": ({"hurry": True}, "hurry"),
    "metadata is a list": ({"metadata": [1]}, "metadata"),
    "metadata of numbers": ({"metadata": {"a": 1}}, "metadata"),
    "too many pairs": ({"metadata": {str(number): "" for number in range(17)}}, "metadata"),
    "long key": ({"metadata": {"k" * 65: ""}}, "metadata"),
    "long value": ({"metadata": {"k": "v" * 513}}, "metadata"),
    "our key": ({"metadata": {"qaic_ray.outputs_sha256": "0"}}, "metadata"),
    "expires too soon": (
        {"output_expires_after": {"anchor": "created_at", "seconds": 1}},
        "output_expires_after[seconds]",
    ),
    "anchor": (
        {"output_expires_after": {"anchor": "now", "seconds": 3600}},
        "output_expires_after[anchor]",
    ),
}


@pytest.mark.parametrize("name", NEW_BATCHES)
def test_a_batch_that_is_wrong_is_refused_by_its_field(manager: BatchManager, name: str) -> None:
    changed, param = NEW_BATCHES[name]
    files = {"file": ("f", jsonl([completion("a")]))}
    file = answered(manager, "POST", "/v1/files", data={"purpose": "batch"}, files=files).json()
    body = {"input_file_id": file["id"], "endpoint": COMPLETIONS, "completion_window": "24h"}
    body = {key: value for key, value in {**body, **changed}.items() if value is not None}
    answer = answered(manager, "POST", "/v1/batches", json=body)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == param
    assert answered(manager, "GET", "/v1/batches").json()["data"] == []


def test_metadata_at_its_limits_is_kept(manager: BatchManager) -> None:
    files = {"file": ("f", jsonl([completion("a")]))}
    file = answered(manager, "POST", "/v1/files", data={"purpose": "batch"}, files=files).json()
    metadata = {f"{number:064}": "v" * 512 for number in range(16)}
    body = {"input_file_id": file["id"], "endpoint": COMPLETIONS, "completion_window": "24h"}
    batch = answered(manager, "POST", "/v1/batches", json={**body, "metadata": metadata}).json()
    assert batch["metadata"] == metadata
    until(lambda: not manager.num_open)
    done = answered(manager, "GET", f"/v1/batches/{batch['id']}").json()
    assert {key: done["metadata"][key] for key in metadata} == metadata


@pytest.mark.parametrize("body", [b"", b"[]", b"{", b"\xff", b"[" * 5000, b"x" * 2**18])
def test_a_body_that_is_no_object_is_refused(manager: BatchManager, body: bytes) -> None:
    assert answered(manager, "POST", "/v1/batches", content=body).status_code in (400, 413)


@pytest.mark.parametrize(
    "path",
    [
        "/v1/files?limit=0",
        "/v1/files?limit=10001",
        "/v1/files?limit=x",
        "/v1/files?limit=²",
        "/v1/files?order=up",
        "/v1/batches?limit=101",
        "/v1/batches?limit=-1",
    ],
)
def test_a_page_that_cannot_be_is_refused(manager: BatchManager, path: str) -> None:
    assert answered(manager, "GET", path).status_code == 400


@pytest.mark.parametrize(
    "id_", ["file-none", "..%2F..%2Fetc", "file-" + "0" * 36, "batch_x", "%00"]
)
def test_what_is_not_there_is_a_404(manager: BatchManager, id_: str) -> None:
    for method, path in (
        ("GET", f"/v1/files/{id_}"),
        ("GET", f"/v1/files/{id_}/content"),
        ("DELETE", f"/v1/files/{id_}"),
        ("GET", f"/v1/batches/{id_}"),
        ("POST", f"/v1/batches/{id_}/cancel"),
    ):
        assert answered(manager, method, path).status_code == 404


def test_the_interface_says_what_the_routes_take(manager: BatchManager) -> None:
    page = app_of(manager).openapi()["paths"]
    batch = page["/v1/batches"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert "input_file_id" in batch["properties"]
    assert "multipart/form-data" in page["/v1/files"]["post"]["requestBody"]["content"]
