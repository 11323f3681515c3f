"""The page of the server: its routes, and the fields of their bodies."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, cast

from pydantic import BaseModel

from qaic_ray.option_types import OptionValue, options_of
from qaic_ray.options import ServeOptions
from qaic_ray.reference.markdown import code, page, section, table, value
from qaic_ray.sampling_params import SamplingParams
from qaic_ray.serve.batches.routes import BatchBody, ExpiresAfter, batch_router
from qaic_ray.serve.http.app import routes_of
from qaic_ray.serve.http.gate import OPEN_PATHS
from qaic_ray.serve.protocol.models import (
    ChatBody,
    CompletionBody,
    DetokenizeBody,
    ResponseBody,
    SamplingBody,
    StreamOptions,
    TokenizeBody,
)
from qaic_ray.shipped.job_schema import sample_of

BODIES: dict[str, tuple[type[BaseModel], ...]] = {
    "/v1/completions": (CompletionBody, StreamOptions),
    "/v1/chat/completions": (ChatBody, StreamOptions),
    "/v1/responses": (ResponseBody,),
    "/tokenize": (TokenizeBody,),
    "/detokenize": (DetokenizeBody,),
    "/v1/batches": (BatchBody, ExpiresAfter),
}
"""The models of bodies, by their routes."""
FORM = {
    "file": ("The file: each line is a request.", "@requests.jsonl"),
    "purpose": ("What it is for.", "batch"),
    "expires_after[anchor]": ("created_at: the time counts from there.", "created_at"),
    "expires_after[seconds]": ("The file is removed after so many seconds.", "86400"),
}
"""Fields of the form of POST /v1/files."""


def http_page() -> str:
    """docs/reference/http.md."""
    return page(
        "HTTP routes of the server",
        "`qaic-ray serve` has these routes. `GET /openapi.json` gives the same for programs, and "
        "`GET /docs` shows it in a browser. A request that is wrong gets one of the statuses of "
        "[errors](errors.md#errors-of-the-server). Every answer has the header `X-Request-Id`.",
        section("Routes", table(("route", "what it does", "key needed"), _routes())),
        section(
            "Fields of completions and chats",
            "Fields that say how tokens are chosen have the names and meanings of vLLM. Where a "
            "request says nothing, the job's `run.sampling` holds, else the model's "
            "`generation_config.json`, else temperature 1.",
            _fields(SamplingBody),
        ),
        *(
            section(f"POST {route}", *(_own(kind) for kind in kinds))
            for route, kinds in BODIES.items()
        ),
        section(
            "POST /v1/files",
            "A form (`multipart/form-data`).",
            table(
                ("field", "meaning", "example"),
                ((code(name), *_told(told)) for name, told in FORM.items()),
            ),
        ),
    )


def _told(told: tuple[str, str]) -> tuple[str, str]:
    return told[0], code(told[1])


def routes() -> Iterator[tuple[str, str, str]]:
    """Method, path and what it does, of each route."""
    nothing = SimpleNamespace(files=None)
    service: Any = SimpleNamespace(
        routers=[batch_router(cast(Any, nothing))], options=ServeOptions()
    )
    for path, methods in routes_of(service).openapi()["paths"].items():
        for method, about in methods.items():
            yield method.upper(), path, about.get("description", "")


def _routes() -> Iterator[tuple[str, str, str]]:
    for method, path, about in routes():
        if path in BODIES and method == "POST" and about.startswith("POST"):
            about = _ANSWERS[path]
        yield code(f"{method} {path}"), about, "no" if path in OPEN_PATHS else "yes"


_ANSWERS = {
    "/v1/completions": "Go on from texts or token ids.",
    "/v1/chat/completions": "Answer a conversation.",
    "/v1/responses": "Answer a text or a conversation, in the newer form. Nothing is stored.",
}


def _own(kind: type[BaseModel]) -> Iterator[str]:
    """The table of a body's fields, without those that all completions have."""
    if issubclass(kind, SamplingBody):
        yield "Beside the fields above:"
        yield ""
    elif kind in (StreamOptions, ExpiresAfter):
        name = "stream_options" if kind is StreamOptions else "output_expires_after"
        yield f"Inside {code(name)}:"
        yield ""
    yield from _fields(kind, leave_out=SamplingBody if kind is not SamplingBody else None)


def _fields(kind: type[BaseModel], leave_out: type[BaseModel] | None = None) -> Iterator[str]:
    left_out = leave_out.model_fields if leave_out and issubclass(kind, leave_out) else {}
    names = [name for name in kind.model_fields if name not in left_out]
    return table(
        ("field", "meaning", "default", "example"), (field_row(kind, name) for name in names)
    )


def field_row(kind: type[BaseModel], name: str) -> tuple[str, ...]:
    """A field of a body: its name, default, meaning and an example.

    Raises:
        LookupError: nothing says what it means, or shows a value.
    """
    field = kind.model_fields[name]
    default = "required" if field.is_required() else value(field.default)
    if field.description and field.examples:
        return code(name), field.description, default, value(field.examples[0])
    known = options_of(SamplingParams)
    if name not in known:
        raise LookupError(f"{kind.__name__}.{name} has no meaning and example: write `said(...)`.")
    own = SamplingParams.__pydantic_fields__[name]  # type: ignore[attr-defined]
    example = sample_of(known[name], OptionValue(own), own.default)
    return code(name), known[name].help, default, value(example)
