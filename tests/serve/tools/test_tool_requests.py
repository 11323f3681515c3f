"""Tools, choices and messages of requests: what is taken, and one sentence for what is not."""

from __future__ import annotations

from typing import Any

import pytest
from byte_tokens import byte_tokenizer
from hypothesis import given
from hypothesis import strategies as st
from openai.types.chat import ChatCompletionMessage
from tool_templates import FORM_OF, HERMES, LLAMA, MISTRAL, NAMED, NOW, PLAIN, TOOLS, WEATHER

from qaic_ray.model.tokenizer import Tokenizer
from qaic_ray.serve.api_errors import ApiError
from qaic_ray.serve.tools.calling import Calling, read_calling, support_of
from qaic_ray.serve.tools.deltas import ContentDelta

Body = dict[str, Any]
ASK: Body = {"role": "user", "content": "?"}
CALL: Body = {
    "id": "call_1",
    "type": "function",
    "function": {"name": "weather", "arguments": '{"city": "Köln"}'},
}
CALLED: Body = {"role": "assistant", "content": None, "tool_calls": [CALL]}
RESULT: Body = {"role": "tool", "tool_call_id": "call_1", "content": "rain"}


def support(template: str = HERMES, option: str = "auto", special: tuple[str, ...] = ()) -> Any:
    return support_of(option, Tokenizer(byte_tokenizer(*special), {"chat_template": template}, ()))


def calling(body: Body, template: str = HERMES, **how: Any) -> Calling:
    allow_unknown = how.pop("allow_unknown", False)
    body = {"messages": [ASK]} | body
    return read_calling(body, support(template, **how), allow_unknown=allow_unknown)


def tool(**function: Any) -> Body:
    return {"type": "function", "function": {"name": "t"} | function}


REFUSED: list[tuple[Body, str]] = [
    ({"tools": ["x"]}, r"^tools\[0\] is 'x': give an object\.$"),
    ({"tools": [{}]}, r"^tools\[0\]\.type is missing\.$"),
    ({"tools": [{"type": "custom"}]}, r"^tools\[0\] is of the type 'custom': offered is function"),
    ({"tools": [{"type": "function"}]}, r"^tools\[0\]\.function is missing\.$"),
    ({"tools": [tool(name="a b")]}, r"^tools\[0\]\.function\.name is 'a b': a name has 1 to 64"),
    ({"tools": [tool(name="")]}, r"^tools\[0\]\.function\.name is '': a name has 1 to 64"),
    ({"tools": [tool(parameters=[])]}, r"parameters is \[\]: it must be an object\.$"),
    (
        {"tools": [tool(parameters={"type": "array"})]},
        "parameters is a schema of 'array': arguments are an object",
    ),
    ({"tools": [tool(parameters={"a": float("nan")})]}, "parameters is no JSON schema"),
    ({"tools": [tool(parameters={"a": "\ud83d"})]}, "parameters is no JSON schema"),
    ({"tools": [tool(returns=1)]}, r"function has the unknown field 'returns': leave it out"),
    ({"tools": [WEATHER, NOW, WEATHER]}, r"^tools\[2\] has the name 'weather' of an earlier tool"),
    ({"tool_choice": "maybe"}, '^tool_choice is \'maybe\': it is "none", "auto", "required" or'),
    ({"tool_choice": 1}, "^tool_choice is 1: it is"),
    ({"tool_choice": {"type": "allowed_tools"}}, "^tool_choice is an object of 1 keys: it is"),
    ({"tool_choice": "required"}, "^tool_choice is required and the request has no tools"),
    (
        {"tool_choice": {"type": "function", "function": {"name": "x"}}, "tools": [NOW, WEATHER]},
        "^tool_choice names the tool 'x': there are now, weather",
    ),
    (
        {"tool_choice": {"type": "function", "function": {"name": "x"}}},
        "^tool_choice names the tool 'x': the request has no tools",
    ),
    ({"tool_choice": {"type": "function"}}, r"^tool_choice\.function is missing\.$"),
    (
        {"tools": [NOW], "tool_choice": "required", "response_format": {"type": "json_object"}},
        "tool_choice asks for a call, and the answer's form for another text",
    ),
    ({"messages": ["x"]}, r"^messages\[0\] is 'x': give an object\.$"),
    ({"messages": [{"content": "x"}]}, r"^messages\[0\]\.role is missing\.$"),
    ({"messages": [{"role": "robot", "content": "x"}]}, r"role is 'robot': roles are system,"),
    ({"messages": [{"role": "user"}]}, r"^messages\[0\]\.content is missing: give a text"),
    (
        {"messages": [{"role": "user", "content": 1}]},
        r"^messages\[0\]\.content is 1: it must be a text\.$",
    ),
    ({"messages": [{"role": "user", "content": "\ud83d"}]}, "half of a surrogate pair"),
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
        r"^messages\[0\]\.content\[0\] is of the type 'image_url': the model reads text only",
    ),
    ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, r"content\[0\] has no text"),
    ({"messages": [ASK | {"mood": "good"}]}, r"^messages\[0\] has the unknown field 'mood'"),
    ({"messages": [ASK | {"tool_calls": [CALL]}]}, "has tool_calls: only the assistant calls"),
    ({"messages": [{"role": "function", "name": "f", "content": ""}]}, "the older form of calls"),
    (
        {"messages": [{"role": "assistant", "function_call": {"name": "f"}}]},
        "the older form of calls",
    ),
    (
        {"messages": [CALLED | {"tool_calls": [CALL | {"function": {"name": "f"}}]}]},
        r"^messages\[0\]\.tool_calls\[0\]\.function\.arguments is missing",
    ),
    (
        {
            "messages": [
                CALLED | {"tool_calls": [CALL | {"function": {"name": "f", "arguments": "[1]"}}]}
            ]
        },
        r"tool_calls\[0\]\.function\.arguments is no JSON object: '\[1\]'",
    ),
    ({"messages": [RESULT]}, r"^messages\[0\] answers the call 'call_1', which the assistant's"),
    ({"messages": [CALLED, ASK, RESULT]}, r"^messages\[2\] answers the call 'call_1'"),
    ({"messages": [CALLED, {"role": "tool", "content": ""}]}, r"\]\.tool_call_id is missing"),
]


@pytest.mark.parametrize(("body", "said"), REFUSED)
def test_what_is_wrong_is_said_in_one_sentence(body: Body, said: str) -> None:
    with pytest.raises(ApiError, match=said) as caught:
        calling(body)
    assert caught.value.status == 400
    assert caught.value.param in {"tools", "tool_choice", "messages"}
    assert "\n" not in str(caught.value)
    assert str(caught.value).endswith(".")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=5,
)
KEYS = st.sampled_from(
    [
        *("role", "content", "tool_calls", "tool_call_id", "type", "function", "name", "arguments"),
        *("parameters", "id", "text", "strict", "description"),
    ]
)
WORDS = st.sampled_from(["user", "assistant", "tool", "function", "text", "{}", "now", "\ud83d"])
NEAR = st.recursive(
    JSON | WORDS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=4),
    max_leaves=12,
)


@given(messages=st.lists(NEAR, max_size=3), tools=st.lists(NEAR, max_size=3), choice=NEAR)
def test_any_body_is_taken_or_refused(messages: Any, tools: Any, choice: Any) -> None:
    body = {"messages": messages, "tools": tools, "tool_choice": choice}
    try:
        read_calling(body, support())
    except ApiError as error:
        refused = error
    else:
        return
    assert refused.status == 400
    str(refused).encode()


def test_unknown_fields_pass_where_the_server_lets_them() -> None:
    messages = [ASK | {"mood": "good"}]
    body = {"messages": messages, "tools": [tool(returns=1)]}
    assert calling(body, allow_unknown=True).names == {"t"}


def test_messages_are_what_templates_take() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    developer = {"role": "developer", "content": "Be brief."}
    given = [developer, {"role": "user", "content": parts, "name": "Ann"}, CALLED, RESULT]
    taken = calling({"messages": given}).messages
    call = {"name": "weather", "arguments": {"city": "Köln"}}
    assert taken == (
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "ab", "name": "Ann"},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"id": "call_1", "type": "function", "function": call}],
        },
        {"role": "tool", "content": "rain", "tool_call_id": "call_1"},
    )
    (function,) = (one["function"] for one in taken[2]["tool_calls"])
    assert list(function) == ["name", "arguments"]  # in the order that a model was taught
    aware = calling(
        {"messages": [developer]}, "{% if m.role == 'developer' %}{{ tools }}{% endif %}"
    )
    assert aware.messages[0]["role"] == "developer"


def test_an_answers_message_may_be_sent_back_as_the_client_dumps_it() -> None:
    message = calling({"tools": TOOLS}).message(
        '<tool_call>{"name": "now", "arguments": {}}</tool_call>', "stop", "s"
    )[0]
    dumped = ChatCompletionMessage.model_validate(message).model_dump()
    assert dumped["function_call"] is None
    id_ = dumped["tool_calls"][0]["id"]
    result = {"role": "tool", "tool_call_id": id_, "content": "9 am"}
    again = calling({"messages": [ASK, dumped, result], "tools": TOOLS})
    assert "refusal" not in again.messages[1]
    assert again.messages[2]["tool_call_id"] == id_


def test_ids_become_what_mistral_takes_and_stay_together() -> None:
    taken = calling({"messages": [ASK, CALLED, RESULT]}, MISTRAL).messages
    id_ = taken[1]["tool_calls"][0]["id"]
    assert len(id_) == 9
    assert id_.isalnum()
    assert taken[2]["tool_call_id"] == id_
    own = [ASK, CALLED | {"tool_calls": [CALL | {"id": "Abc123456"}]}]
    assert calling({"messages": own}, MISTRAL).messages[1]["tool_calls"][0]["id"] == "Abc123456"


def test_tools_are_shown_as_models_were_taught() -> None:
    strict = {"function": {"strict": True, **WEATHER["function"]}, "type": "function"}
    (shown,) = calling({"tools": [strict]}).template_kwargs["tools"]
    assert shown == WEATHER
    assert list(shown) == ["type", "function"]
    assert list(shown["function"]) == ["name", "description", "parameters"]


@pytest.mark.parametrize("body", [{}, {"tools": []}, {"tools": TOOLS, "tool_choice": "none"}])
def test_without_tools_an_answer_is_text(body: Body) -> None:
    plain = calling(body)
    text = ' <tool_call>{"name": "now", "arguments": {}}</tool_call>\n'
    assert plain.template_kwargs == plain.sampling_fields == {}
    message, finish = plain.message(text, "stop", "s")
    assert (message["content"], finish) == (text, "stop")
    assert "tool_calls" not in message
    reader = plain.reader("s")
    assert [*reader.feed(text), *reader.feed(""), *reader.end()] == [ContentDelta(text)]


def test_auto_leaves_the_answer_free() -> None:
    free = calling({"tools": TOOLS})
    assert free.sampling_fields == {}
    text = '<tool_call>{"name": "now", "arguments": {}}</tool_call>'
    assert free.message(text, "stop", "s")[1] == "tool_calls"
    assert free.message(text, "length", "s")[1] == "length"
    assert free.message("No.", "stop", "s")[1] == "stop"


def test_a_call_is_asked_for() -> None:
    required = calling({"tools": TOOLS, "tool_choice": "required"})
    assert all(t["function"]["name"] in _grammar(required) for t in TOOLS)
    named = {"type": "function", "function": {"name": "now"}}
    one = calling({"tools": TOOLS, "tool_choice": named})
    assert "weather" not in _grammar(one)
    assert one.template_kwargs["tools"] == required.template_kwargs["tools"]
    single = calling({"tools": TOOLS, "tool_choice": "required", "parallel_tool_calls": False})
    assert _grammar(single) != _grammar(required)
    assert not single.parallel


def test_a_strict_tool_is_kept_to_where_a_call_is_free() -> None:
    strict = {"type": "function", "function": {"strict": True, **WEATHER["function"]}}
    guarded = calling({"tools": [strict, NOW]})
    assert "TEXT" in _grammar(guarded)
    assert "weather" in _grammar(guarded)


def test_an_answer_may_be_a_call_or_of_the_form_that_is_asked_for() -> None:
    schema = {"type": "object", "properties": {"mark": {"type": "integer"}}}
    asked = {"type": "json_schema", "json_schema": {"name": "s", "schema": schema}}
    for form in ({"response_format": asked}, {"structured_outputs": {"json": schema}}):
        assert "answer: %json" in _grammar(calling({"tools": TOOLS} | form))
        assert calling({"tools": TOOLS, "tool_choice": "none"} | form).sampling_fields == {}
    text = {"response_format": {"type": "text"}}
    assert calling({"tools": TOOLS} | text).sampling_fields == {}


@pytest.mark.parametrize(
    ("template", "form"),
    [
        (LLAMA, {"response_format": {"type": "json_object"}}),
        (HERMES, {"structured_outputs": {"regex": "a"}}),
    ],
)
def test_forms_that_calls_do_not_go_with_are_refused(template: str, form: Body) -> None:
    with pytest.raises(ApiError, match="not offered together with") as caught:
        calling({"tools": TOOLS} | form, template)
    assert caught.value.param == "tools"


def test_a_form_that_is_none_is_refused() -> None:
    with pytest.raises(ApiError, match="response_format is") as caught:
        calling({"tools": TOOLS, "response_format": {"type": "xml"}})
    assert caught.value.param == "response_format"


def _grammar(one: Calling) -> str:
    return str(one.sampling_fields["structured_outputs"]["grammar"])


def test_special_tokens_are_asked_for_where_they_mark_calls() -> None:
    marked = calling({"tools": TOOLS}, NAMED, special=("[TOOL_CALLS]", "[ARGS]", "</s>"))
    assert marked.sampling_fields == {"skip_special_tokens": False}
    message, _ = marked.message("[TOOL_CALLS]now[ARGS]{}</s>", "stop", "s")
    assert message["content"] is None
    assert message["tool_calls"][0]["function"] == {"name": "now", "arguments": "{}"}
    assert marked.message("Hi</s>", "stop", "s")[0]["content"] == "Hi"
    assert calling({}, NAMED, special=("[TOOL_CALLS]",)).sampling_fields == {}


def test_a_model_without_tools_says_so() -> None:
    for how in ({"template": PLAIN}, {"option": "none"}):
        with pytest.raises(ApiError, match="This model calls no tools") as caught:
            calling({"tools": TOOLS}, **how)
        assert caught.value.param == "tools"
        assert calling({"tools": TOOLS, "tool_choice": "none"}, **how).names == frozenset()
    assert FORM_OF["plain"][1] is None
