"""A model served: its cards opened, the interface in front of them, until it is told to end."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from qaic_ray.errors import FleetClosed, UsageError
from qaic_ray.fleet.folder_fleet import FolderFleet
from qaic_ray.model.checkpoint import Checkpoint, load_tokenizer, open_checkpoint
from qaic_ray.model.tokenizer import object_if_there
from qaic_ray.options import ServeOptions
from qaic_ray.pipeline.request import Listener, RunRequest, SdkChoice
from qaic_ray.pipeline.run_step import content_parts
from qaic_ray.runs.intake import INPUT, OPEN_SOURCE, fingerprint
from qaic_ray.sampling_params import SamplingParams
from qaic_ray.sdk import Sdk
from qaic_ray.serve.api_errors import ApiError
from qaic_ray.serve.batches.open_batches import BatchManager
from qaic_ray.serve.batches.request_lines import Answering
from qaic_ray.serve.batches.routes import batch_router
from qaic_ray.serve.http.counted_fleet import CountedFleet
from qaic_ray.serve.http.keys import ApiKeys
from qaic_ray.serve.http.request_log import logging_to_stderr
from qaic_ray.serve.http.server import listening_socket, run_in_loop, serve
from qaic_ray.serve.http.service import LOCAL_HOSTS, Service
from qaic_ray.serve.protocol.answers import answer_body
from qaic_ray.serve.protocol.asked import CHAT, ENDPOINTS
from qaic_ray.serve.protocol.context import ModelContext
from qaic_ray.serve.protocol.requests import read_request
from qaic_ray.serve.tools.calling import support_of
from qaic_ray.worker.prompt_encoder import PromptEncoder

MAX_STALL_S = 0.0
"""Seconds that running rows may wait for others' prefill, where nobody says: one chunk."""

CONTEXTS_HELD = 8
"""Of batches that were made at other times; each has a chat template of its own."""

TEMPERATURE = 1.0
"""Of requests that say none, where neither the job nor the model's files do: the interface's own
default."""

_FROM_FILES = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
"""Keys of a generation_config.json that are defaults of requests, as in vLLM's server."""


@dataclass(frozen=True)
class Served:
    """What is served.

    Attributes:
        request: model, QPC, cards and how answers are made, as a run has it, but for prompts.
        options: of the server.
    """

    request: RunRequest
    options: ServeOptions

    @property
    def names(self) -> tuple[str, ...]:
        """The model's, for clients."""
        return self.options.served_model_name or (model_id(self.request.model),)


def model_id(name: str) -> str:
    """The name of a model for clients: a hub id, or of a path its last part."""
    path = Path(name)
    return (path.stem if path.suffix == ".gguf" else path.name) if path.exists() else name


def serve_model(
    served: Served,
    sdk: SdkChoice,
    listener: Listener,
    *,
    on_ready: Callable[[str], None],
    log_json: bool = False,
) -> None:
    """Serve a model until a signal ends it.

    Args:
        served: what.
        sdk: whose cards.
        listener: who is told of the cards.
        on_ready: is called with the interface's address once a card is ready.
        log_json: whether lines of the log are objects of JSON.

    Raises:
        UsageError: for an address, keys, cards or a model that cannot be.
        DeviceError: no card could be opened.
        FleetClosed: every card was lost.
    """
    options = served.options
    keys = keys_of(options)
    with ExitStack() as held:
        opened = listening_socket(options.host, options.port)
        held.callback(opened.close)
        address = address_of(options.host, opened.getsockname()[1])
        held.enter_context(logging_to_stderr(as_json=log_json))
        request = with_defaults(served.request)
        cards = FolderFleet(request, sdk, listener, kept_slots=options.kept_slots)
        held.callback(cards.close, drain=False)
        service = Service(options, served.names, cards.fleet, keys=keys)
        counted = CountedFleet(cards.fleet, service.metrics)
        batches = held.enter_context(BatchManager(Path(options.folder), counted))
        service.routers.append(batch_router(batches, stall_s=options.client_stall_s))

        async def make_ready() -> None:
            await asyncio.to_thread(cards.fleet.wait_ready)
            ctx_len = cards.fleet.workers[0].ctx_len
            context = await asyncio.to_thread(context_of, served, ctx_len)
            service.became_ready(context)
            batches.start(
                await asyncio.to_thread(answering_of, served, context, cards.request, sdk.here)
            )
            on_ready(address)

        run_in_loop(serve(service, opened, make_ready))
        if service.has_ended:
            cards.fleet.wait_ready()  # raises what ended it
            raise FleetClosed("The cards were lost.")


def check_door(options: ServeOptions) -> None:
    """See, before anything is made for it, that a server may listen where it is told to.

    Raises:
        UsageError: for keys or an address that cannot be.
    """
    keys_of(options)
    listening_socket(options.host, options.port).close()


def keys_of(options: ServeOptions) -> ApiKeys | None:
    """The keys that requests need.

    Raises:
        UsageError: strangers would reach a server without keys, and nobody said that they may.
    """
    if options.api_keys is not None:
        if options.no_auth:
            raise UsageError("--api-keys and --no-auth say opposite things: keep one.")
        return ApiKeys.read(Path(options.api_keys))
    if options.host not in LOCAL_HOSTS and not options.no_auth:
        raise UsageError(
            f"--host {options.host} lets other machines in: give --api-keys FILE (`qaic-ray key` "
            "makes keys), or --no-auth to let everybody use it."
        )
    return None


def with_defaults(request: RunRequest) -> RunRequest:
    """A request with what a server does where nobody says otherwise."""
    if "max_stall_s" in request.run.model_fields_set:
        return request
    return request.with_run(max_stall_s=MAX_STALL_S)


def context_of(served: Served, ctx_len: int) -> ModelContext:
    """What requests are read with.

    Args:
        served: what is served.
        ctx_len: tokens of a context, as the program has it.
    """
    checkpoint = open_checkpoint(served.request.model, weights=False)
    # A conversation is rendered on the day on which it comes, and not on that of the beginning.
    generation = served.request.generation.model_copy(update={"date": None})
    tokenizer = load_tokenizer(checkpoint)
    encoder = PromptEncoder(tokenizer, generation)
    tools = support_of(served.options.tool_form, encoder.tokenizer)
    context = ModelContext(
        names=served.names,
        encoder=encoder,
        tools=tools,
        ctx_len=ctx_len,
        vocab_size=int(checkpoint.config.get("vocab_size") or tokenizer.vocab_size),
        defaults=_defaults(served.request, checkpoint),
        allow_unknown=served.options.allow_unknown_fields,
    )
    if tokenizer.chat_template.templates is not None:
        try:  # a template's first rendering takes seconds
            read_request(CHAT, {"messages": [{"role": "user", "content": "Hello"}]}, context)
        except ApiError as error:
            logging.getLogger("qaic_ray.serve").warning("%s", error)
    return context


def answering_of(served: Served, context: ModelContext, request: RunRequest, sdk: Sdk) -> Answering:
    """How batches are answered, and what their answers depend on beside their requests."""
    generation = request.generation
    same = dict(fingerprint(OPEN_SOURCE, generation=generation, **content_parts(request, sdk)))
    for name in (INPUT, "run_seed", "date"):  # a prompt of a batch has its own seed and date
        same.pop(name)
    same["sampling"] = asdict(context.defaults)
    same["names"] = context.names
    same["allow_unknown_fields"] = context.allow_unknown
    same["tool_form"] = served.options.tool_form

    @lru_cache(CONTEXTS_HELD)
    def of(at: int) -> ModelContext:
        date = datetime.fromtimestamp(at).isoformat(timespec="seconds")
        dated = generation.model_copy(update={"date": date})
        encoder = PromptEncoder(context.encoder.tokenizer, dated)
        return replace(context, encoder=encoder)

    return Answering(
        endpoints=ENDPOINTS,
        read=lambda endpoint, body, at: read_request(endpoint, body, of(at)),
        body=partial(answer_body, context=context),
        model=context.names[0],
        program=same,
    )


def _defaults(request: RunRequest, checkpoint: Checkpoint) -> SamplingParams:
    """Parameters of requests that say nothing: the job's, else those of the model's files."""
    run = request.run
    if run.sampling != SamplingParams() or "sampling" in run.model_fields_set:
        return run.defaults
    document = object_if_there(checkpoint.folder / "generation_config.json")
    said: dict[str, Any] = {"temperature": TEMPERATURE}
    said |= {name: document[name] for name in _FROM_FILES if document.get(name) is not None}
    return run.defaults.updated(said)


def address_of(host: str, port: int) -> str:
    """The interface's address, as clients write it."""
    shown = "127.0.0.1" if host in ("0.0.0.0", "") else host
    return f"http://[{shown}]:{port}/v1" if ":" in shown else f"http://{shown}:{port}/v1"
