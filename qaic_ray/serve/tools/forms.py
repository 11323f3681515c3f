"""The forms in which models write tool calls, and which of them a chat template asks for."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass

LLAMA3_JSON = "llama3_json"
HERMES = "hermes"
MISTRAL = "mistral"
FORMS = (LLAMA3_JSON, HERMES, MISTRAL)
"""All that are known; vLLM has the same names for them."""

AUTO = "auto"
NONE = "none"
OPTION_VALUES = (AUTO, *FORMS, NONE)
"""What a server may be told: to look at the template, one form, or that there are no tools."""

_PYTHON_TAG = "<|python_tag|>"
_TOOL_CALL = "<tool_call>"
_TOOL_CALLS = "[TOOL_CALLS]"
_ARGS = "[ARGS]"
# Models of these write arguments as XML between the same tags as hermes.
_XML = ("<function=", "<parameter=", "<arg_key>")
_PARAMETERS = re.compile(r'\\?"parameters\\?"')


@dataclass(frozen=True)
class CallForm:
    """How one model writes tool calls.

    Attributes:
        name: one of `FORMS`.
        opening: the text or special token before calls.
        closing: the same behind a call; empty where there is none.
        is_bare: whether a call may come without its opening, as an object that names a tool.
        key: of the arguments, as the model was taught it.
        separator: between name and arguments, where a call is these two and no JSON object.
        short_ids: whether the template wants call ids of nine letters and digits.
        one_call: whether the template takes one call a message only.
    """

    name: str
    opening: str
    closing: str = ""
    is_bare: bool = False
    key: str = "arguments"
    separator: str = ""
    short_ids: bool = False
    one_call: bool = False

    @property
    def markers(self) -> tuple[str, ...]:
        """Texts that may be special tokens, which a decoder then leaves out."""
        return tuple(filter(None, (self.opening, self.closing, self.separator)))


def template_with_tools(templates: str | Mapping[str, str] | None) -> str:
    """The template that conversations with tools are rendered with; empty where there is none."""
    if templates is None or isinstance(templates, str):
        return templates or ""
    return templates.get("tool_use") or templates.get("default") or ""


def find_form(template: str, special_tokens: Collection[str] = ()) -> str | None:
    """The form that a chat template's model was taught.

    Args:
        template: the Jinja text.
        special_tokens: the tokenizer's, written out. They decide where a template shows tools
            and not what a call looks like.

    Returns:
        One of `FORMS`, or None: the template shows no tools, or calls of another form.
    """
    if not shows_tools(template):
        return None
    if _TOOL_CALLS in template:
        return MISTRAL
    if _TOOL_CALL in template:
        return None if any(mark in template for mark in _XML) else HERMES
    if ("ipython" in template or _PYTHON_TAG in template) and _PARAMETERS.search(template):
        return LLAMA3_JSON
    if "tool_calls" not in template and "tool_call" not in template:
        return MISTRAL if _TOOL_CALLS in special_tokens else None
    return None


def shows_tools(template: str) -> bool:
    """Whether a template tells the model of tools at all."""
    return re.search(r"\btools\b", template) is not None


def call_form(name: str, template: str) -> CallForm:
    """The form of a name, in the variant of a template."""
    if name == HERMES:
        return CallForm(HERMES, _TOOL_CALL, "</tool_call>")
    if name == MISTRAL:
        separator = _ARGS if _ARGS in template else ""
        return CallForm(MISTRAL, _TOOL_CALLS, separator=separator, short_ids=True)
    key = "arguments" if template and not _PARAMETERS.search(template) else "parameters"
    return CallForm(LLAMA3_JSON, _PYTHON_TAG, is_bare=True, key=key, one_call=True)
