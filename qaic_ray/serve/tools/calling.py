"""Tools of a chat request, from its body to its answer.

Before the prompt is made: `support_of` once a model, then `read_calling` a request. What it gives
has the template's messages and variables, and the sampling fields. After it: `Calling.message` for
a whole answer, `Calling.reader` for one that streams.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from qaic_ray.errors import RowError, UsageError
from qaic_ray.model.tokenizer import Tokenizer
from qaic_ray.sampling_params.structured_outputs import (
    StructuredOutputs,
    document_of_response_format,
)
from qaic_ray.serve.api_errors import bad_request
from qaic_ray.serve.tools.call_reader import CallReader, parse_answer
from qaic_ray.serve.tools.conversation import template_messages, template_tools
from qaic_ray.serve.tools.deltas import ContentDelta, Delta, ParsedAnswer
from qaic_ray.serve.tools.forms import (
    AUTO,
    NONE,
    OPTION_VALUES,
    CallForm,
    call_form,
    find_form,
    shows_tools,
    template_with_tools,
)
from qaic_ray.serve.tools.grammar import guard_for, schema_for
from qaic_ray.serve.tools.models import (
    NamedChoice,
    ToolBody,
    read_choice,
    read_messages,
    read_tools,
)


@dataclass(frozen=True)
class ToolSupport:
    """How a served model calls tools.

    Attributes:
        template: the chat template of conversations with tools; empty where there is none.
        form: of calls; None where tools are not offered.
        token_ids: added tokens of the vocabulary by their texts.
        special: those of them that a decoder leaves out.
    """

    template: str = ""
    form: CallForm | None = None
    token_ids: Mapping[str, int] = field(default_factory=dict)
    special: frozenset[str] = frozenset()

    @property
    def keeps_special_tokens(self) -> bool:
        """Whether calls can only be read in text that has the special tokens written out."""
        return self.form is not None and not self.special.isdisjoint(self.form.markers)


def support_of(option: str, tokenizer: Tokenizer) -> ToolSupport:
    """How a model calls tools.

    Args:
        option: one of `OPTION_VALUES`.
        tokenizer: the model's, with the chat template that is used.

    Raises:
        UsageError: the option is none of these, or the template shows no tools.
    """
    if option not in OPTION_VALUES:
        raise UsageError(f"The form of tool calls is {option!r}: it is {', '.join(OPTION_VALUES)}.")
    template = template_with_tools(tokenizer.chat_template.templates)
    special = frozenset(tokenizer.special.values())
    name = find_form(template, special) if option == AUTO else option
    if option not in (AUTO, NONE) and not shows_tools(template):
        raise UsageError(
            f"The form of tool calls is {option}, and the model's chat template shows no tools: "
            "give another one (--chat-template FILE)."
        )
    form = None if name in (None, NONE) else call_form(str(name), template)
    return ToolSupport(template, form, tokenizer.added_tokens, special)


@dataclass(frozen=True)
class Calling:
    """A chat request's conversation and tools, and what they mean for the answer.

    Attributes:
        messages: for the chat template.
        template_kwargs: variables of the template.
        sampling_fields: of `SamplingParams`.
        names: of the tools that may be called; none where answers are plain text.
        parallel: whether an answer may have several calls.
        support: the model's.
    """

    messages: tuple[Mapping[str, Any], ...]
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    sampling_fields: Mapping[str, Any] = field(default_factory=dict)
    names: frozenset[str] = frozenset()
    parallel: bool = True
    support: ToolSupport = ToolSupport()

    def reader(self, seed: str) -> CallReader | TextReader:
        """What reads one streamed answer; see `CallReader` for `seed`."""
        form = self.support.form
        if form is None or not self.names:
            return TextReader()
        return CallReader(
            form, self.names, parallel=self.parallel, seed=seed, special=self._special
        )

    def answer(self, text: str, seed: str) -> ParsedAnswer:
        """A whole answer's text and calls."""
        form = self.support.form
        if form is None or not self.names:
            return ParsedAnswer(text)
        return parse_answer(
            text, form, self.names, parallel=self.parallel, seed=seed, special=self._special
        )

    def message(self, text: str, finish: str, seed: str) -> tuple[dict[str, Any], str]:
        """The message of a whole answer, and its `finish_reason`.

        Args:
            text: of the answer, with special tokens where `sampling_fields` ask for them.
            finish: why it ended, without regard to calls.
            seed: see `call_id`.
        """
        parsed = self.answer(text, seed)
        return parsed.message(), finish_reason(finish, len(parsed.calls))

    @property
    def _special(self) -> Collection[str]:
        return self.support.special if self.support.keeps_special_tokens else ()


class TextReader:
    """Reads an answer that can have no calls: all of it is content, at once."""

    num_calls = 0

    def feed(self, text: str) -> list[Delta]:
        """See `CallReader.feed`."""
        return [ContentDelta(text)] if text else []

    def end(self) -> list[Delta]:
        """See `CallReader.end`."""
        return []


def finish_reason(finish: str, num_calls: int) -> str:
    """Why an answer ended: by itself, its calls being what it has to say, or as `finish` says."""
    return "tool_calls" if num_calls and finish == "stop" else finish


def read_calling(
    body: Mapping[str, Any], support: ToolSupport, *, allow_unknown: bool = False
) -> Calling:
    """The conversation and the tools of a chat request.

    Args:
        body: its `messages`, `tools`, `tool_choice`, `parallel_tool_calls`, and whether it has a
            `response_format` or `structured_outputs` of its own.
        support: the model's.
        allow_unknown: whether fields that nobody knows pass.

    Raises:
        ApiError: 400; one of them is wrong, or the model cannot call tools.
    """
    messages = read_messages(body["messages"], allow_unknown=allow_unknown)
    tools = read_tools(body.get("tools") or (), allow_unknown=allow_unknown)
    choice = read_choice(body.get("tool_choice"), [tool.function.name for tool in tools])
    form = support.form
    short_ids = form is not None and form.short_ids
    shown = tuple(template_messages(messages, support.template, short_ids=short_ids))
    if choice == "none" or not tools:
        return Calling(shown, support=support)
    if form is None:
        raise bad_request(
            "This model calls no tools: its chat template has no form of calls that is known here "
            f"({', '.join(OPTION_VALUES[1:-1])}). Leave tools out, or start the server with "
            "a template and a form of calls.",
            "tools",
        )
    parallel = body.get("parallel_tool_calls") is not False
    fields: dict[str, Any] = {}
    structured = _structured(body, tools, choice, support, parallel=parallel)
    if structured is not None:
        kind, text = structured
        fields["structured_outputs"] = {kind: text}
    if support.keeps_special_tokens:
        fields["skip_special_tokens"] = False
    names = frozenset(tool.function.name for tool in tools)
    kwargs = {"tools": template_tools(tools)}
    return Calling(shown, kwargs, fields, names, parallel, support)


def _structured(
    body: Mapping[str, Any],
    tools: Sequence[ToolBody],
    choice: str | NamedChoice,
    support: ToolSupport,
    *,
    parallel: bool,
) -> tuple[str, str] | None:
    """What an answer must be, by its tools and its form; None where it is free."""
    assert support.form is not None
    form, ids = support.form, support.token_ids
    functions = [tool.function for tool in tools]
    asked = _asked_form(body)
    if choice != "auto":
        if asked is not None:
            raise bad_request(
                "tool_choice asks for a call, and the answer's form for another text: keep one.",
                "tool_choice",
            )
        if isinstance(choice, NamedChoice):
            functions = [one for one in functions if one.name == choice.function.name]
        return schema_for(functions, form, ids, parallel=parallel and choice == "required")
    if asked is not None:
        schema = '{"type": "object"}' if asked.json_object else asked.json
        if schema is None or form.is_bare:
            what = "such a form" if schema is None else f"calls of the form {form.name}"
            raise bad_request(
                f"An answer's form and tools are not offered together with {what}: keep one, or "
                "set tool_choice to none.",
                "tools",
            )
        return schema_for(functions, form, ids, parallel=parallel, otherwise=schema)
    if not any(function.strict for function in functions):
        return None
    marks = support.special.union(form.markers)
    text_ids = [id_ for text, id_ in ids.items() if text not in marks]
    return guard_for(functions, form, ids, parallel=parallel, text_ids=text_ids)


def _asked_form(body: Mapping[str, Any]) -> StructuredOutputs | None:
    """The form of the answer that a request asks for itself.

    Raises:
        ApiError: it is none.
    """
    document = body.get("structured_outputs")
    name = "structured_outputs"
    try:
        if document is None:
            name = "response_format"
            document = document_of_response_format(body.get(name))
        return StructuredOutputs.read(document)
    except RowError as error:
        raise bad_request(str(error), name) from error
