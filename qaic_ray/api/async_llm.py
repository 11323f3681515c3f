"""`qaic_ray.AsyncLLM`: the same for asyncio, as vLLM's class of that name is used."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterable
from contextlib import AbstractAsyncContextManager, aclosing
from typing import Any

from qaic_ray.api.llm import LLM
from qaic_ray.api.outputs import BegunAnswer, RequestOutput
from qaic_ray.api.prompts import Conversation, PromptType, refuse_lora
from qaic_ray.api.sampling import VllmSampling
from qaic_ray.errors import ParameterError


class EngineArgs:
    """Arguments of an LLM, kept for `from_engine_args`, or for `LLM(**vars(args))`."""

    def __init__(self, model: str, **others: Any) -> None:
        self.__dict__.update(model=model, **others)


class AsyncLLM(AbstractAsyncContextManager["AsyncLLM"]):
    """A model on every card, for coroutines; the arguments are those of `LLM`.

    Making one blocks until a card is ready. Its outputs come in the loop that asks for them, and
    every loop may ask.

    Attributes:
        llm: the same for threads.
    """

    def __init__(self, model: str, **arguments: Any) -> None:
        self.llm = LLM(model, **arguments)
        self._begun: dict[str, BegunAnswer] = {}

    @classmethod
    def from_engine_args(cls, engine_args: EngineArgs) -> AsyncLLM:
        """One with these arguments."""
        return cls(**vars(engine_args))

    async def __aexit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Give the cards back; after an error nothing that is open is waited for."""
        await asyncio.to_thread(self.llm.close, drain=kind is None)

    def shutdown(self) -> None:
        """Cancel what is open, and give the cards back."""
        self.llm.close(drain=False)

    async def generate(
        self,
        prompt: PromptType | Conversation,
        sampling_params: VllmSampling | None = None,
        request_id: str | None = None,
        *,
        lora_request: None = None,
        **chat: Any,
    ) -> AsyncGenerator[RequestOutput, None]:
        """Answer one prompt, or one conversation, while its tokens come.

        Each output has all that came so far, unless `output_kind` says otherwise; the last one is
        finished. Closing the generator, or cancelling its task, cancels the rest.

        Args:
            prompt: a text, token ids, a dictionary; or messages.
            sampling_params: None: the model's own defaults.
            request_id: a name, for `abort`; None for a number.
            lora_request: there is none.
            chat: for messages, the arguments of `LLM.chat` about the template.

        Raises:
            ParameterError: for a prompt or parameters that are none, or a name that is in use.
            GenerationError: at the end, if there is no answer.
            FleetBusy: `max_open` prompts are open.
        """
        refuse_lora(lora_request)
        if request_id in self._begun:
            raise ParameterError(f"The request_id {request_id!r} is in use: choose another one.")
        begun = self.llm.begin(prompt, sampling_params, request_id=request_id, wait=False, **chat)
        if request_id is not None:
            self._begun[request_id] = begun
        try:
            async with aclosing(begun.pending.async_deltas()) as deltas:
                async for delta in deltas:
                    if (output := begun.take(delta)) is not None:
                        yield output
        finally:
            begun.close()
            self._begun.pop(request_id or "", None)

    async def abort(self, request_id: str | Iterable[str]) -> None:
        """Cancel what is left of one, or several; the last output of each says abort."""
        names = [request_id] if isinstance(request_id, str) else request_id
        for name in names:
            if (begun := self._begun.get(name)) is not None:
                begun.close()

    async def get_tokenizer(self) -> Any:
        """The model's tokenizer, of transformers."""
        return await asyncio.to_thread(self.llm.get_tokenizer)

    async def get_default_sampling_params(self) -> VllmSampling:
        """See `LLM.get_default_sampling_params`."""
        return self.llm.get_default_sampling_params()

    async def check_health(self) -> None:
        """Raise what ended the fleet, if it has ended."""
        self.llm.fleet.wait_ready(0.0)

    @property
    def is_running(self) -> bool:
        """Whether it takes prompts."""
        return not self.llm.fleet.is_closed

    @property
    def errored(self) -> bool:
        """Whether it has ended."""
        return self.llm.fleet.is_closed
