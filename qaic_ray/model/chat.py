"""Conversations to prompt texts: a checkpoint's chat templates, rendered by transformers.

transformers is loaded with the first conversation, without torch. A template is a program of an
unknown author, so it is first rendered in a child process.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from datetime import datetime
from functools import lru_cache
from importlib.metadata import version
from typing import Any

from qaic_ray.errors import UsageError
from qaic_ray.files.folders import cache_folder
from qaic_ray.model import transformers_child
from qaic_ray.rows import ChatOptions

RESERVED = frozenset(
    {
        *("conversation", "conversations", "messages", "chat_template", "add_generation_prompt"),
        *("continue_final_message", "tokenize", "tokenizer_kwargs", "sanitize_control_tokens"),
        *("padding", "truncation", "max_length", "return_tensors", "return_dict"),
        *("return_assistant_tokens_mask", "self"),
    }
)
"""Parameters of `apply_chat_template`, which are not variables of a template."""

_moment: ContextVar[datetime | None] = ContextVar("moment of a run", default=None)


@dataclass(frozen=True)
class ChatTemplate:
    """A checkpoint's chat templates, and what they are rendered with; threads may share it.

    Args:
        templates: Jinja text; or several by name, of which `tool_use` is for conversations with
            tools and `default` for the others; None where the model is not a chat model.
        special_tokens: texts by name, like `bos_token`.
        moment: the time that a template is given (`strftime_now`); None: that of rendering.
        trial_cpu_s: the most CPU time of the first rendering, in a child.
    """

    templates: str | Mapping[str, str] | None
    special_tokens: Mapping[str, str] = field(default_factory=dict)
    moment: datetime | None = None
    trial_cpu_s: int = transformers_child.RENDER_CPU_S

    def of_run(self, template: str | None, date: str | None) -> ChatTemplate:
        """A copy with the run's template, where it has one, and with the run's date."""
        moment = None if date is None else datetime.fromisoformat(date)
        templates = self.templates if template is None else template
        return replace(self, templates=templates, moment=moment)

    def render(self, messages: Sequence[Mapping[str, Any]], options: ChatOptions) -> str:
        """The prompt text of a conversation, special tokens written out.

        Args:
            messages: `{"role": ..., "content": ...}` in order.
            options: the row's.

        Raises:
            UsageError: the model has no chat template, or its template refuses these messages.
        """
        template, variables = self.try_out(messages, options)
        from transformers.utils import chat_template_utils

        # The library keeps what it compiled, and renders with that.
        try:
            compiled = chat_template_utils._compile_jinja_template(template)
            compiled.globals["strftime_now"] = _strftime
            token = _moment.set(self.moment)
            try:
                return str(
                    _renderer().apply_chat_template(
                        list(messages),
                        chat_template=template,
                        tokenize=False,
                        continue_final_message=options.continue_final_message,
                        **variables,
                    )
                )
            finally:
                _moment.reset(token)
        except Exception as error:  # a template is a program: it may raise anything
            reason = transformers_child.reason(error)
            raise UsageError(
                f"The model's chat template refuses these messages: {reason}."
            ) from error

    def try_out(
        self, messages: Sequence[Mapping[str, Any]], options: ChatOptions
    ) -> tuple[str, dict[str, Any]]:
        """Check that conversations can be rendered, with these messages as an example.

        A template is rendered in a child the first time; the cache folder remembers that.

        Returns:
            The template, and the variables to render it with.

        Raises:
            UsageError: the template does not compile, or takes too long; or there is none.
        """
        variables = self._variables(options)
        template = self._chosen(variables.get("tools"))

        def render() -> None:
            transformers_child.render(
                template,
                [dict(message) for message in messages],
                variables,
                continue_final=options.continue_final_message,
                cpu_s=self.trial_cpu_s,
            )

        with _trying:
            if template not in _tried:
                _tried[template] = _why_never(template, render)
            reason = _tried[template]
        if reason is not None:
            raise UsageError(
                f"The model's chat template cannot be used: {reason}. Give another one "
                "(--chat-template FILE, run.chat_template), or send plain prompts."
            )
        return template, variables

    def _variables(self, options: ChatOptions) -> dict[str, Any]:
        check_kwargs(options.template_kwargs)
        begins_answer = options.add_generation_prompt and not options.continue_final_message
        given = {**self.special_tokens, **options.template_kwargs}
        return {**given, "add_generation_prompt": begins_answer}

    def _chosen(self, tools: object) -> str:
        templates = self.templates
        if isinstance(templates, str):
            return templates
        if not templates:
            raise UsageError(
                "This model has no chat template; send plain prompts, give one "
                "(--chat-template FILE, run.chat_template), or use an instruct model."
            )
        chosen = "tool_use" if tools is not None and "tool_use" in templates else "default"
        if chosen not in templates:
            raise UsageError(
                f"This model has several chat templates ({', '.join(sorted(templates))}) and none "
                "of them is the default: give one (--chat-template FILE, run.chat_template)."
            )
        return templates[chosen]


def check_kwargs(template_kwargs: Mapping[str, Any]) -> None:
    """Check that a template's variables have allowed names and are plain data.

    Raises:
        UsageError: one is a parameter of `apply_chat_template`, or not JSON.
    """
    if reserved := RESERVED.intersection(template_kwargs):
        raise UsageError(
            f"chat_template_kwargs holds {min(reserved)!r}, which is no variable of a template."
        )
    try:
        json.dumps(template_kwargs, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise UsageError(f"chat_template_kwargs holds what is not JSON: {error}.") from error


@lru_cache(maxsize=1)
def _renderer() -> Any:
    """A tokenizer of the library's without tokens, which applies chat templates."""
    from transformers import PreTrainedTokenizerBase

    return PreTrainedTokenizerBase()


def _strftime(form: str) -> str:
    return (_moment.get() or datetime.now()).strftime(form)


_trying = threading.Lock()
_tried: dict[str, str | None] = {}  # template -> why it can never be rendered


def _why_never(template: str, render: Callable[[], None]) -> str | None:
    """Why a template can never be rendered; None where it can."""
    parts = [template, version("transformers"), version("jinja2")]
    digest = hashlib.sha256(json.dumps(parts).encode()).hexdigest()
    mark = cache_folder() / "templates" / digest[:32]
    if mark.is_file():
        return None
    try:
        render()
    except transformers_child.ChildFailed as error:
        if error.is_final:
            return str(error)
    with suppress(OSError):  # without the mark, the next process renders it in a child again
        mark.parent.mkdir(parents=True, exist_ok=True)
        mark.touch()
    return None
