"""`qaic_ray.LLM`: prompts in, answers out, over every card, in vLLM's names."""

from __future__ import annotations

import atexit
import itertools
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, TypeVar

from qaic_ray.api.outputs import (
    BegunAnswer,
    GenerationError,
    RequestOutput,
    StreamedOutput,
    output_of,
)
from qaic_ray.api.program import program_of
from qaic_ray.api.progress import UseTqdm, progress
from qaic_ray.api.prompts import (
    Conversation,
    PromptType,
    chat_options,
    chat_prompt,
    conversations,
    is_conversation,
    one_prompt,
    paired,
    prompt_list,
    refuse_lora,
)
from qaic_ray.api.quiet import LogListener
from qaic_ray.api.sampling import RequestOutputKind, VllmSampling
from qaic_ray.api.settings import LlmSettings
from qaic_ray.errors import FleetClosed, ParameterError, RowError
from qaic_ray.files.documents import shown
from qaic_ray.fleet.folder_fleet import FolderFleet
from qaic_ray.fleet.open_fleet import OpenFleet
from qaic_ray.fleet.pending_row import PendingRow
from qaic_ray.model.checkpoint import Checkpoint, load_tokenizer, open_checkpoint
from qaic_ray.model.tokenizer import object_if_there, transformers_tokenizer
from qaic_ray.pipeline.request import RunRequest, choose_sdk
from qaic_ray.rows import Prompt
from qaic_ray.worker.prompt_encoder import PromptEncoder

T = TypeVar("T")

_MODEL_DEFAULTS = {
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "max_new_tokens": "max_tokens",
}
"""Keys of a generation_config.json, and the parameters that they are."""


class LLM(AbstractContextManager["LLM"]):
    """A model on every card, until it is closed; any thread may use it.

    What is missing is exported and compiled into the user's cache, where the next program finds it.
    Arguments that vLLM has for GPUs change nothing here and are passed over; those that would
    change the answers, and cannot be had, are refused by their names.

    Attributes:
        qpc: the folder of the program that runs.
        fleet: what answers; see `OpenFleet`.

    Args:
        model: local folder, hub id, .gguf file, or `smollm2-135m`.
        qpc: the folder of a compiled program, in place of one that is made.
        folder: keeps every answer. The same program, started again with it, gets the answers that
            it has, in whatever order the prompts come, and the others run.
        devices: ids of cards, or `all`.
        partitions: workers of one card, each with as many of its NSPs.
        group_size: cards of one worker, for a `qpc` that was compiled for a group.
        precision: how weights are kept: `mx6`, `fp16` or `fp32`.
        num_cores: NSPs of the program; all of a card's where it is not said.
        prompt_len: tokens of a prefill.
        max_model_len: tokens of a context; vLLM's name for `ctx_len`.
        max_num_seqs: prompts side by side on a card; vLLM's name for `batch_size`.
        dtype: `auto`, or `float16` for weights as fp16.
        quantization: None, or `mxfp6`.
        seed: what seeds of prompts without one are made from; drawn where it is not given.
        enable_prefix_caching: start a prompt from what a slot's cache holds of it; on.
        trust_remote_code: let transformers run code that the checkpoint brings.
        generation_config: where `get_default_sampling_params` looks: `auto` for the model's
            generation_config.json, `vllm` for nowhere, or a folder.
        sdk: `auto`, `real`, `emulated`, or an SDK folder.
        emulator: what the emulated SDK is to be: `{"cards": 2}`.
        address: a running Ray cluster, in place of a Ray of this machine.
        keep_ray: leave the Ray up; the next program starts at once.
        dashboard: start the Ray with its dashboard.
        metrics: export metrics through Ray.
        max_open: prompts that may be open at once; more wait.
        others: any other option of a job's `run` by its name (`system`, `drafts`, ...), and
            arguments of vLLM.

    Raises:
        ParameterError: for an argument; also a ValueError.
        UsageError: for a model, a program, cards or a folder that do not fit.
        DeviceError: where no card can be opened.
    """

    def __init__(
        self,
        model: str,
        *,
        qpc: str | Path | None = None,
        folder: str | Path | None = None,
        devices: str | int | Sequence[int] = "all",
        partitions: int = 1,
        group_size: int = 1,
        precision: str | None = None,
        num_cores: int | None = None,
        prompt_len: int | str | None = None,
        max_model_len: int | None = None,
        max_num_seqs: int | None = None,
        dtype: str = "auto",
        quantization: str | None = None,
        seed: int | None = None,
        enable_prefix_caching: bool | None = None,
        trust_remote_code: bool = False,
        generation_config: str = "auto",
        sdk: str | Path = "auto",
        emulator: Mapping[str, Any] | None = None,
        address: str | None = None,
        keep_ray: bool = False,
        dashboard: bool = False,
        metrics: bool = True,
        max_open: int | None = None,
        **others: Any,
    ) -> None:
        said = {name: value for name, value in locals().items() if name != "self"}
        settings = self._settings = LlmSettings(**said)
        self._request_ids = itertools.count()
        listener = LogListener()
        found = choose_sdk(str(settings.sdk), settings.emulator_options, listener)
        self.qpc = program_of(settings, found, listener)
        self._checkpoint: Checkpoint = open_checkpoint(
            model, weights=False, trust_remote_code=trust_remote_code
        )
        run, ray = settings.run_options, settings.ray_options
        self._own = FolderFleet(
            RunRequest("llm", model, self.qpc, run, ray=ray),
            found,
            listener,
            folder=None if folder is None else Path(folder),
            max_open=max_open,
        )
        self.fleet: OpenFleet = self._own.fleet
        self._end = weakref.finalize(self, self._own.close, drain=False)
        self._end.atexit = False  # that would come after Ray's own end
        self._await_cards()

    def _await_cards(self) -> None:
        try:
            tokenizer = load_tokenizer(self._checkpoint)
            self.encoder = PromptEncoder(tokenizer, self._own.request.generation)
            self.fleet.wait_ready()
        except BaseException:
            self._end()
            raise
        atexit.register(self._end)

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Give the cards back; after an error nothing that is open is waited for."""
        self.close(drain=kind is None)

    def close(self, *, drain: bool = True) -> None:
        """Give the cards back, once what is open is answered; any number of calls.

        Args:
            drain: False to cancel what is open.
        """
        if self._end.detach() is not None:
            atexit.unregister(self._end)
            self._own.close(drain=drain)

    # -- answers

    def generate(
        self,
        prompts: PromptType | Sequence[PromptType] | None = None,
        sampling_params: VllmSampling | Sequence[VllmSampling] | None = None,
        *,
        use_tqdm: UseTqdm = True,
        prompt_token_ids: Sequence[int] | Sequence[Sequence[int]] | None = None,
        lora_request: None = None,
        priority: Sequence[int] | None = None,
        errors: Literal["raise", "return"] = "raise",
    ) -> list[RequestOutput]:
        """Answer prompts, all of them; the answers are in their order.

        Args:
            prompts: one, or a list: texts, token ids, dictionaries with `prompt` or
                `prompt_token_ids`.
            sampling_params: for all, or one for each; None: the model's own defaults.
            use_tqdm: a bar on stderr, if that is a terminal; or what makes one.
            prompt_token_ids: older name of prompts that are token ids.
            lora_request: there is none.
            priority: changes no answer.
            errors: what becomes of prompts without an answer: `raise`, or `return` outputs that
                have `error`.

        Raises:
            ParameterError: for prompts or parameters that are none; nothing has run then.
            GenerationError: once all are done, if some have no answer (too long for the context,
                or a card failed at each attempt); it has the answers of the others.
            FleetClosed: after `close`.
        """
        refuse_lora(lora_request)
        asked = prompt_list(prompts, prompt_token_ids)
        return self._answer(asked, sampling_params, use_tqdm, errors)

    def chat(
        self,
        messages: Conversation | Sequence[Conversation],
        sampling_params: VllmSampling | Sequence[VllmSampling] | None = None,
        use_tqdm: UseTqdm = True,
        *,
        lora_request: None = None,
        chat_template: str | None = None,
        chat_template_content_format: str = "auto",
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        errors: Literal["raise", "return"] = "raise",
    ) -> list[RequestOutput]:
        """Answer conversations through the model's chat template; see `generate`.

        Args:
            messages: one conversation, or a list of them.
            sampling_params: for all, or one for each.
            use_tqdm: as in `generate`.
            lora_request: there is none.
            chat_template: Jinja text in place of the model's own.
            chat_template_content_format: changes no answer: texts are joined.
            add_generation_prompt: end with the beginning of the assistant's answer.
            continue_final_message: go on with the last message.
            tools: for templates that show tools; none is called.
            chat_template_kwargs: variables for the template.
            errors: as in `generate`.
        """
        refuse_lora(lora_request)
        options = chat_options(
            add_generation_prompt, continue_final_message, tools, chat_template_kwargs
        )
        asked = [
            self._rendered(chat_prompt(number, one, options), number, chat_template)
            for number, one in enumerate(conversations(messages))
        ]
        return self._answer(asked, sampling_params, use_tqdm, errors)

    def stream(
        self,
        prompt: PromptType | Conversation,
        sampling_params: VllmSampling | None = None,
        **chat: Any,
    ) -> Iterator[RequestOutput]:
        """Answer one prompt, or one conversation, while its tokens come.

        Each output has all that came so far, unless `output_kind` says otherwise; the last one is
        finished. Leaving the loop early cancels the rest.

        Args:
            prompt: as in `generate`; or messages, as in `chat`.
            sampling_params: None: the model's own defaults.
            chat: for messages, the arguments of `chat` about the template.

        Raises:
            ParameterError: for a prompt or parameters that are none.
            GenerationError: at the end, if there is no answer.
        """
        with closing(self.begin(prompt, sampling_params, **chat)) as begun:
            for delta in begun.pending.deltas():
                if (output := begun.take(delta)) is not None:
                    yield output

    def begin(
        self,
        prompt: PromptType | Conversation,
        sampling_params: VllmSampling | None = None,
        *,
        request_id: str | None = None,
        wait: bool = True,
        **chat: Any,
    ) -> BegunAnswer:
        """Give a prompt to the fleet, to be streamed; what `stream` and `AsyncLLM` are made of.

        Args:
            prompt: as in `stream`.
            sampling_params: as in `stream`.
            request_id: of the outputs; None for a number.
            wait: for room, where `max_open` prompts are open.
            chat: as in `stream`.
        """
        params = sampling_params or self.get_default_sampling_params()
        template = chat.pop("chat_template", None)
        if is_conversation(prompt):
            asked = self._rendered(chat_prompt(0, prompt, chat_options(**chat)), 0, template)
        elif chat or template:
            raise ParameterError("Arguments of the chat template are for messages.")
        else:
            asked = one_prompt(0, prompt)
        asked = replace(asked, sampling=params.to_run(), stream=True)
        pending = self.fleet.submit(asked, wait=wait)
        name = request_id or str(next(self._request_ids))
        made = StreamedOutput(
            name,
            asked,
            self.encoder,
            is_delta=params.output_kind is RequestOutputKind.DELTA,
            has_text=params.detokenize,
        )
        is_last_only = params.output_kind is RequestOutputKind.FINAL_ONLY
        return BegunAnswer(pending, made, is_last_only=is_last_only)

    # -- the model

    def get_tokenizer(self) -> Any:
        """The model's tokenizer, of transformers."""
        return transformers_tokenizer(
            self._checkpoint.folder, trust_remote_code=self._checkpoint.trust_remote_code
        )

    def get_default_sampling_params(self) -> VllmSampling:
        """New parameters with the defaults of the model's generation_config.json, or of vLLM."""
        where = self._settings.generation_config
        if where == "vllm":
            return VllmSampling()
        folder = self._checkpoint.folder if where == "auto" else Path(where)
        document = object_if_there(folder / "generation_config.json")
        said = {ours: document.get(theirs) for theirs, ours in _MODEL_DEFAULTS.items()}
        return VllmSampling(**{name: value for name, value in said.items() if value is not None})

    # -- inside

    def _answer(
        self,
        prompts: Sequence[Prompt],
        given: VllmSampling | Sequence[VllmSampling] | None,
        use_tqdm: UseTqdm,
        errors: str,
    ) -> list[RequestOutput]:
        if errors not in ("raise", "return"):
            raise ParameterError(f"errors is {shown(errors)}: it is raise or return.")
        default = self.get_default_sampling_params() if given is None else VllmSampling()
        params = paired(len(prompts), given, default)
        as_run = {id(one): one.to_run() for one in params}
        asked = [
            replace(prompt, sampling=as_run[id(how)])
            for prompt, how in zip(prompts, params, strict=True)
        ]
        rows: list[PendingRow] = []
        try:
            with progress(len(asked), use_tqdm) as advance:
                for prompt in asked:
                    rows.append(self.fleet.submit(prompt))
                    rows[-1].listen(advance)
                outputs = [
                    self._output(row, has_text=how.detokenize)
                    for row, how in zip(rows, params, strict=True)
                ]
        except BaseException:
            for row in rows:
                row.cancel()
            raise
        if errors == "raise" and any(output.error for output in outputs):
            raise GenerationError(outputs)
        return outputs

    def _output(self, pending: PendingRow, *, has_text: bool) -> RequestOutput:
        request_id = str(next(self._request_ids))
        try:
            row = pending.row()
        except FleetClosed as error:
            return RequestOutput(request_id, pending.prompt, self.encoder, [], error=str(error))
        return output_of(request_id, pending.prompt, self.encoder, row, has_text=has_text)

    def _rendered(self, prompt: Prompt, number: int, template: str | None) -> Prompt:
        """A conversation as it is, or, with a template of its own, as its tokens."""
        if template is None:
            return prompt
        generation = self._own.request.generation
        own = generation.model_copy(update={"chat_template": template})
        encoder = PromptEncoder(self.encoder.tokenizer, own)
        try:
            text, ids = encoder.text(prompt), encoder.ids(prompt)
        except RowError as error:
            raise ParameterError(f"Prompt {number}: {error}") from error
        return Prompt(number, text, token_ids=tuple(ids))
