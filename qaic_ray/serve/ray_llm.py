"""Cards in an application of `ray.serve.llm`: an engine, and the server class that names it.

    LLMConfig(
        model_loading_config={"model_id": "llama", "model_source": "/models/llama"},
        server_cls="qaic_ray.serve.ray_llm:QaicServer",
        accelerator_config={"kind": "cpu"},
        placement_group_config={"bundles": [{"CPU": 1, "QAIC": 1}]},
        experimental_configs={"qaic": {"qpc": "/qpcs/llama"}},
    )

What stands under `qaic` are the arguments of `qaic_ray.LLM`. `engine_kwargs` may hold those of them
that are vLLM's own (`max_model_len`, `max_num_seqs`, ...), as Ray takes no others there. The cards
are those of the bundles. It needs a vLLM that can be imported, from which Ray takes the classes of
requests, and `fastapi<0.137` (ray-project/ray #64475). The interface of engines is private to Ray,
as of 2.60.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncGenerator, Mapping
from typing import Any

import ray
from ray.llm._internal.serve.core.configs.llm_config import DiskMultiplexConfig, LLMConfig
from ray.llm._internal.serve.core.configs.openai_api_models import (
    ChatCompletionRequest,
    ChatCompletionResponse,
    CompletionRequest,
    CompletionResponse,
    DetokenizeRequest,
    DetokenizeResponse,
    ErrorInfo,
    ErrorResponse,
    TokenizeRequest,
    TokenizeResponse,
)
from ray.llm._internal.serve.core.engine.protocol import LLMEngine
from ray.llm._internal.serve.core.protocol import RawRequestInfo
from ray.llm._internal.serve.core.server.llm_server import LLMServer

from qaic_ray.api.program import program_of
from qaic_ray.api.quiet import LogListener
from qaic_ray.api.settings import LlmSettings
from qaic_ray.cards.inventory import CARD_RESOURCE
from qaic_ray.cluster.actor_process import card_units
from qaic_ray.cluster.connection import CARD_CPUS
from qaic_ray.errors import FleetClosed, ParameterError, QaicRayError
from qaic_ray.options import ServeOptions
from qaic_ray.pipeline.request import RunRequest, SdkChoice, choose_sdk, resolved
from qaic_ray.sdk import name_for_others
from qaic_ray.serve.api_errors import ApiError
from qaic_ray.serve.http.running import LoopBells, Running
from qaic_ray.serve.protocol.answers import answer_body
from qaic_ray.serve.protocol.asked import CHAT, COMPLETIONS
from qaic_ray.serve.protocol.chunks import chunk_writer, error_event
from qaic_ray.serve.protocol.context import ModelContext
from qaic_ray.serve.protocol.fields import body_of
from qaic_ray.serve.protocol.models import DetokenizeBody, TokenizeBody
from qaic_ray.serve.protocol.requests import read_request
from qaic_ray.serve.protocol.tokens import detokenized, tokenized
from qaic_ray.serve.ray_serve.card_fleet import CardFleet, CardsPlan
from qaic_ray.serve.serving import Served, context_of, with_defaults

KEY = "qaic"
"""Of `experimental_configs`: arguments of ours that vLLM has not."""


class QaicEngine(LLMEngine):  # type: ignore[misc]
    """An engine of Ray Serve LLM: a fleet on the cards of its replica.

    Args:
        llm_config: Ray's.

    Raises:
        ParameterError: for arguments of the engine that cannot be, or no cards in the bundles.
    """

    def __init__(self, llm_config: LLMConfig) -> None:
        self._config = llm_config
        self._settings = _settings(llm_config)
        self._num_cards = _num_cards(llm_config)
        self._cards: CardFleet | None = None
        self._context: ModelContext | None = None
        self._bells: LoopBells | None = None

    async def start(self) -> None:
        """Open the cards, and wait until one is ready.

        Raises:
            QaicRayError: none can be opened, or the program cannot be made.
        """
        self._bells = LoopBells(asyncio.get_running_loop())
        served, cards = await asyncio.to_thread(self._open)
        self._cards = cards
        await asyncio.to_thread(cards.fleet.wait_ready)
        ctx_len = cards.fleet.workers[0].ctx_len
        self._context = await asyncio.to_thread(context_of, served, ctx_len)

    def _open(self) -> tuple[Served, CardFleet]:
        settings = self._settings
        listener = LogListener()
        sdk = choose_sdk(str(settings.sdk), settings.emulator_options, listener)
        qpc = program_of(settings, sdk, listener)
        run = resolved(settings.run_options)
        request = with_defaults(RunRequest(self._name, settings.model, qpc, run)).absolute()
        options = ServeOptions(served_model_name=(self._name,))
        plan = self._plan(request, sdk, options)
        node_id = ray.get_runtime_context().get_node_id()
        return Served(request, options), CardFleet(plan, node_id, card_units())

    def _plan(self, request: RunRequest, sdk: SdkChoice, options: ServeOptions) -> CardsPlan:
        return CardsPlan(
            request=request,
            num_cards=self._num_cards,
            cpus=CARD_CPUS,
            sdk=name_for_others(sdk.name),
            emulated=sdk.emulated,
            kept_slots=options.kept_slots,
        )

    @property
    def _name(self) -> str:
        return str(self._config.model_id)

    # -- requests

    async def chat(
        self, request: ChatCompletionRequest, raw_request_info: RawRequestInfo | None = None
    ) -> AsyncGenerator[str | ChatCompletionResponse | ErrorResponse, None]:
        """See Ray's `LLMEngine`."""
        async for part in self._answer(CHAT, request, ChatCompletionResponse):
            yield part

    async def completions(
        self, request: CompletionRequest, raw_request_info: RawRequestInfo | None = None
    ) -> AsyncGenerator[str | CompletionResponse | ErrorResponse, None]:
        """See Ray's `LLMEngine`."""
        async for part in self._answer(COMPLETIONS, request, CompletionResponse):
            yield part

    async def tokenize(
        self, request: TokenizeRequest, raw_request_info: RawRequestInfo | None = None
    ) -> AsyncGenerator[TokenizeResponse | ErrorResponse, None]:
        """See Ray's `LLMEngine`."""
        try:
            body = body_of(TokenizeBody, _document(request))
            yield TokenizeResponse.model_validate(tokenized(body, self._ready))
        except QaicRayError as error:
            yield _refused(error)

    async def detokenize(
        self, request: DetokenizeRequest, raw_request_info: RawRequestInfo | None = None
    ) -> AsyncGenerator[DetokenizeResponse | ErrorResponse, None]:
        """See Ray's `LLMEngine`."""
        try:
            body = body_of(DetokenizeBody, _document(request))
            yield DetokenizeResponse.model_validate(detokenized(body, self._ready))
        except QaicRayError as error:
            yield _refused(error)

    async def embeddings(
        self, request: Any, raw_request_info: RawRequestInfo | None = None
    ) -> AsyncGenerator[ErrorResponse, None]:
        """There are none."""
        yield _refused(ApiError(400, "Embeddings are not offered: answers are texts."))

    async def transcriptions(
        self, request: Any, raw_request_info: RawRequestInfo | None = None
    ) -> AsyncGenerator[ErrorResponse, None]:
        """There are none."""
        yield _refused(ApiError(400, "Transcriptions are not offered: only text is answered."))

    async def _answer(self, endpoint: str, request: Any, answer: Any) -> AsyncGenerator[Any, None]:
        """The answer as one object, or its events as texts while they come."""
        assert self._cards is not None
        assert self._bells is not None
        created, request_id = int(time.time()), uuid.uuid4().hex
        try:
            context = self._ready
            asked = await asyncio.to_thread(read_request, endpoint, _document(request), context)
            running = Running(asked.prompts, self._cards.fleet, self._bells, on_close=lambda: None)
        except QaicRayError as error:
            yield _refused(error)
            return
        try:
            if not asked.stream:
                rows = await running.rows()
                yield answer.model_validate(
                    answer_body(asked, rows, context, request_id=request_id, created=created)
                )
                return
            writer = chunk_writer(asked, context, request_id=request_id, created=created)
            if begun := writer.begin():
                yield begun.decode()
            async for told in running.deltas():
                if sent := b"".join(writer.take(number, delta) for number, delta in told):
                    yield sent.decode()
            yield writer.end(await running.rows()).decode()
        except QaicRayError as error:
            yield error_event(error).decode() if asked.stream else _refused(error)
        finally:
            running.close()

    @property
    def _ready(self) -> ModelContext:
        if self._context is None:
            raise ApiError(503, "The cards are opening: try again soon.")
        return self._context

    # -- its life

    async def check_health(self) -> None:
        """See Ray's `LLMEngine`: where this raises, the replica is made anew.

        Raises:
            FleetClosed: every card was lost.
        """
        if self._cards is not None and self._cards.fleet.is_closed:
            raise FleetClosed("The cards of this replica are lost.")

    def routing_stats(self) -> dict[str, Any]:
        """Nothing: Ray's own routers choose by load."""
        return {}

    async def resolve_lora(self, lora_model: DiskMultiplexConfig) -> None:
        """There are none.

        Raises:
            ParameterError: always.
        """
        raise ParameterError("Adapters are not offered: merge the adapter into the model.")

    async def reset_prefix_cache(self) -> None:
        """Nothing: what a slot holds is used only by a prompt that begins with it."""

    async def shutdown(self) -> None:
        """Give the cards back; what is open is cancelled."""
        if self._cards is not None:
            await asyncio.to_thread(self._cards.close)


class QaicServer(LLMServer):  # type: ignore[misc]
    """The server class for `LLMConfig(server_cls=...)`."""

    _default_engine_cls = QaicEngine

    async def __del__(self) -> None:
        """See Ray Serve: called once, when nothing runs here any more."""
        engine = getattr(self, "engine", None)
        if engine is not None:
            await engine.shutdown()


def _settings(config: LLMConfig) -> LlmSettings:
    """The engine's arguments, which are those of `qaic_ray.LLM`."""
    ours_alone = config.experimental_configs.get(KEY) or {}
    if not isinstance(ours_alone, Mapping):
        raise ParameterError(f"experimental_configs[{KEY!r}] holds arguments of qaic_ray.LLM.")
    given = {**config.engine_kwargs, **ours_alone}
    ours = LlmSettings.__dataclass_fields__.keys() - {"others", "model"}
    said = {name: given.pop(name) for name in list(given) if name in ours}
    for name in ("folder", "address", "keep_ray", "max_open"):
        if name in said:
            raise ParameterError(f"{name} is given, which Ray Serve decides: leave it out.")
    source = config.model_loading_config.model_source
    model = source if isinstance(source, str) else config.model_id
    return LlmSettings(model=model, others=given, **said)


def _num_cards(config: LLMConfig) -> int:
    """The cards of a replica, by its placement group.

    Raises:
        ParameterError: it has none.
    """
    group = config.placement_group_config or {}
    bundles: list[Mapping[str, float]] = group.get("bundles", [])
    number = int(sum(bundle.get(CARD_RESOURCE, 0) for bundle in bundles))
    if number < 1:
        raise ParameterError(
            f"placement_group_config has no cards: write bundles like "
            f'[{{"CPU": 1, "{CARD_RESOURCE}": 1}}].'
        )
    return number


def _document(request: Any) -> dict[str, Any]:
    """A request of Ray's as the JSON that its client sent."""
    document: dict[str, Any] = request.model_dump(exclude_unset=True, exclude_none=True)
    return document


def _refused(error: QaicRayError) -> ErrorResponse:
    known = error if isinstance(error, ApiError) else ApiError(500, str(error))
    return ErrorResponse(
        error=ErrorInfo(message=str(known), type=known.type, param=known.param, code=known.status)
    )
