"""Conversations with tools become the prompts that transformers makes of them."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tool_templates import FORM_OF, NAMES, TOOLS

from qaic_ray.errors import UsageError
from qaic_ray.model import chat
from qaic_ray.model.chat import ChatTemplate
from qaic_ray.rows import ChatOptions
from qaic_ray.serve.tools.calling import ToolSupport, read_calling
from qaic_ray.serve.tools.forms import call_form

Message = dict[str, Any]
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
ARGUMENTS = st.dictionaries(TEXT, TEXT | st.integers() | st.none() | st.lists(TEXT, max_size=2))
ID = st.text("abcdef0123", min_size=9, max_size=9)  # mistral's; others take any


@st.composite
def conversations(draw: st.DrawFn) -> list[Message]:
    """Messages as transformers takes them: arguments are objects, contents texts."""
    messages: list[Message] = []
    if draw(st.booleans()):
        messages.append({"role": "system", "content": draw(TEXT)})
    for _ in range(draw(st.integers(1, 2))):
        messages.append({"role": "user", "content": draw(TEXT)})
        if draw(st.booleans()):
            calls = draw(
                st.lists(st.tuples(ID, st.sampled_from(sorted(NAMES)), ARGUMENTS), max_size=2)
            )
            if calls:
                written = [
                    {"id": id_, "type": "function", "function": {"name": name, "arguments": given_}}
                    for id_, name, given_ in calls
                ]
                messages.append({"role": "assistant", "content": "", "tool_calls": written})
                messages += [
                    {"role": "tool", "content": draw(TEXT), "tool_call_id": id_}
                    for id_, _, _ in calls
                ]
        messages.append({"role": "assistant", "content": draw(TEXT)})
    return [*messages, {"role": "user", "content": draw(TEXT)}]


def as_sent(messages: list[Message], *, in_parts: bool) -> list[Message]:
    """The same as a client of the interface sends them."""
    sent = copy.deepcopy(messages)
    for message in sent:
        if message.get("tool_calls"):
            message["content"] = None
        elif in_parts:
            text = message["content"]
            parts = [{"type": "text", "text": one} for one in (text[:2], text[2:])]
            message["content"] = parts
        for call in message.get("tool_calls") or ():
            call["function"]["arguments"] = json.dumps(call["function"]["arguments"])
        message |= {"tool_calls": None} if "tool_calls" not in message else {}
    return sent


def library_text(template: str, messages: list[Message], tools: Any) -> str | None:
    from transformers import PreTrainedTokenizerBase

    try:
        return str(
            PreTrainedTokenizerBase(chat_template=template).apply_chat_template(
                messages, tools=tools, tokenize=False, add_generation_prompt=True, **SPECIAL
            )
        )
    except Exception:  # noqa: BLE001  # a template is a program
        return None


def our_text(name: str, messages: list[Message], tools: Any) -> str | None:
    template, form = FORM_OF[name]
    support = ToolSupport(template, call_form(form, template) if form else None)
    calling = read_calling({"messages": messages, "tools": tools}, support)
    options = ChatOptions(template_kwargs=calling.template_kwargs)
    try:
        return ChatTemplate(template, SPECIAL).render(calling.messages, options)
    except UsageError:
        return None


@given(
    name=st.sampled_from(sorted(FORM_OF)),
    messages=conversations(),
    has_tools=st.booleans(),
    in_parts=st.booleans(),
)
def test_prompts_are_the_librarys(
    name: str, messages: list[Message], has_tools: bool, in_parts: bool
) -> None:
    tools = TOOLS if has_tools and name != "plain" else None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chat, "_why_never", lambda *_: None)
        ours = our_text(name, as_sent(messages, in_parts=in_parts), tools)
    assert ours == library_text(FORM_OF[name][0], messages, tools)


ASKED: list[Message] = [
    {"role": "user", "content": "?"},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {
                "id": "abcdef012",
                "type": "function",
                "function": {"arguments": '{"city":"Köln"}', "name": "weather"},
            }
        ],
    },
    {"role": "tool", "tool_call_id": "abcdef012", "content": "rain"},
]


@pytest.mark.parametrize(
    ("name", "written"),
    [
        ("llama", '{"name": "weather", "parameters": {"city": "Köln"}}'),
        ("hermes", '<tool_call>\n{"name": "weather", "arguments": {"city": "Köln"}}\n</tool_call>'),
        ("mistral", '[TOOL_CALLS] [{"name": "weather", "arguments": {"city": "Köln"}, "id": "ab'),
        ("named", '[TOOL_CALLS]weather[ARGS]{"city": "Köln"}</s>'),
    ],
)
def test_a_call_is_printed_as_an_object(
    monkeypatch: pytest.MonkeyPatch, name: str, written: str
) -> None:
    monkeypatch.setattr(chat, "_why_never", lambda *_: None)
    text = our_text(name, ASKED, TOOLS)
    assert text is not None
    assert written in text
    assert "weather" in text.replace(written, "")  # the tool is shown
    assert "weather" not in (our_text(name, ASKED[:1], None) or "")
