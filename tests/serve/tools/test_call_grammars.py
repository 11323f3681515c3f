"""Whatever a grammar lets a model write is a call that its parser reads, with right arguments."""

from __future__ import annotations

import json
import random
from functools import lru_cache
from typing import Any

import jsonschema
import pytest
from byte_tokens import byte_tokenizer
from hypothesis import given
from hypothesis import strategies as st
from llguidance import LLMatcher, LLTokenizer
from tokenizers import AddedToken, Tokenizer
from tool_templates import FORM_OF, NAMES, NESTED, NOW, TOOLS, WEATHER

from qaic_ray.serve.api_errors import ApiError
from qaic_ray.serve.tools.call_reader import parse_answer
from qaic_ray.serve.tools.forms import CallForm, call_form
from qaic_ray.serve.tools.grammar import guard_for, schema_for
from qaic_ray.serve.tools.models import ToolFunction, read_tools

MAX_STEPS = 800
END = "<|end|>"
MARKERS = ("[TOOL_CALLS]", "[ARGS]", "<tool_call>", "</tool_call>")
SCHEMAS = {tool["function"]["name"]: tool["function"].get("parameters") for tool in TOOLS}
FORMS = [name for name in FORM_OF if name != "plain"]


def functions(*tools: dict[str, Any]) -> list[ToolFunction]:
    return [tool.function for tool in read_tools(tools)]


def form_of(name: str) -> CallForm:
    template, form = FORM_OF[name]
    assert form is not None
    return call_form(form, template)


@lru_cache
def vocabulary(kind: str) -> tuple[Tokenizer, LLTokenizer]:
    """A token a byte, and the markers as special tokens, as added ones, or as letters."""
    tokenizer = byte_tokenizer(END)
    if kind != "letters":
        is_special = kind == "special"
        added = [AddedToken(text, special=is_special, normalized=False) for text in MARKERS]
        (tokenizer.add_special_tokens if is_special else tokenizer.add_tokens)(added)
    end = tokenizer.token_to_id(END)
    return tokenizer, LLTokenizer(tokenizer.to_str(), eos_token=end)


def ids_of(kind: str) -> dict[str, int]:
    tokenizer, _ = vocabulary(kind)
    return {text: id_ for text in MARKERS if (id_ := tokenizer.token_to_id(text)) is not None}


def walked(grammar: str, kind: str, seed: int) -> str:
    """A text of a model that draws any token that the grammar allows, in a hurry to end."""
    tokenizer, backend = vocabulary(kind)
    draw = random.Random(seed)
    matcher = LLMatcher(backend, grammar)
    assert not matcher.is_error(), matcher.get_error()
    ids: list[int] = []
    end = tokenizer.token_to_id(END)
    closing = [tokenizer.token_to_id(letter) for letter in '"}],0']
    while len(ids) < MAX_STEPS:
        mask = matcher.compute_bitmask()
        allowed = [id_ for id_ in range(backend.vocab_size) if mask[id_ // 8] >> (id_ % 8) & 1]
        assert allowed, tokenizer.decode(ids)
        if end in allowed and (len(allowed) == 1 or draw.random() < 0.5):
            return str(tokenizer.decode(ids, skip_special_tokens=False))
        allowed = [id_ for id_ in allowed if id_ != end]
        soon = [id_ for id_ in closing if id_ in allowed]
        ids.append(draw.choice(soon if soon and draw.random() < 0.4 else allowed))
        assert matcher.consume_token(ids[-1])
    raise AssertionError(f"no end: {tokenizer.decode(ids)!r}")


@given(
    name=st.sampled_from(FORMS),
    kind=st.sampled_from(["special", "added", "letters"]),
    chosen=st.sets(st.sampled_from(sorted(NAMES)), min_size=1),
    parallel=st.booleans(),
    seed=st.integers(0, 2**32),
)
def test_every_walk_is_calls_that_keep_their_schemas(
    name: str, kind: str, chosen: set[str], parallel: bool, seed: int
) -> None:
    form = form_of(name)
    offered = functions(*[tool for tool in TOOLS if tool["function"]["name"] in chosen])
    sort, grammar = schema_for(offered, form, ids_of(kind), parallel=parallel)
    assert sort == "grammar"
    answer = parse_answer(walked(grammar, kind, seed), form, NAMES)
    assert answer.content is None
    assert len(answer.calls) >= 1
    if not parallel or form.one_call:
        assert len(answer.calls) == 1
    for call in answer.calls:
        assert call.name in chosen
        arguments = json.loads(call.arguments)
        jsonschema.validate(arguments, SCHEMAS[call.name] or {"maxProperties": 0})


def accepts(grammar: str, kind: str, text: str) -> bool:
    tokenizer, backend = vocabulary(kind)
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    matcher = LLMatcher(backend, grammar)
    return bool(matcher.validate_tokens(ids) == len(ids) and _ends(matcher, ids))


def _ends(matcher: LLMatcher, ids: list[int]) -> bool:
    assert matcher.consume_tokens(ids)
    return matcher.is_accepting()


WRITTEN = {
    "llama": '{"name": "weather", "parameters": {"city": "Köln", "days": 2}}',
    "hermes": '<tool_call>\n{"name": "weather", "arguments": {"city": "Köln", "days": 2}}\n'
    "</tool_call>",
    "mistral": '[TOOL_CALLS] [{"name": "weather", "arguments": {"city": "Köln", "days": 2}}]',
    "named": '[TOOL_CALLS]weather[ARGS]{"city": "Köln", "days": 2}',
}


@pytest.mark.parametrize("kind", ["special", "added", "letters"])
@pytest.mark.parametrize("name", FORMS)
def test_what_a_model_was_taught_is_allowed_and_other_tools_are_not(name: str, kind: str) -> None:
    _, grammar = schema_for(functions(WEATHER), form_of(name), ids_of(kind))
    assert accepts(grammar, kind, WRITTEN[name])
    assert not accepts(grammar, kind, WRITTEN[name].replace("weather", "now"))
    assert not accepts(grammar, kind, WRITTEN[name].replace('"days": 2', '"days": 20'))
    assert not accepts(grammar, kind, f"I see. {WRITTEN[name]}")


@pytest.mark.parametrize("name", ["hermes", "mistral", "named"])
def test_several_calls_only_where_they_are_wanted(name: str) -> None:
    form, one = form_of(name), WRITTEN[name]
    two = f"{one[:-1]}, {one[one.index('{') :]}" if name == "mistral" else f"{one}\n{one}"
    two = two.replace("\n[TOOL", "[TOOL")
    _, many = schema_for(functions(WEATHER), form, ids_of("special"))
    _, single = schema_for(functions(WEATHER), form, ids_of("special"), parallel=False)
    assert accepts(many, "special", two)
    assert accepts(many, "special", one)
    assert not accepts(single, "special", two)


def test_a_tool_without_parameters_is_called_without_arguments() -> None:
    _, grammar = schema_for(functions(NOW), form_of("hermes"), {})
    text = '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'
    assert accepts(grammar, "letters", text)
    assert not accepts(grammar, "letters", text.replace("{}", '{"a": 1}'))


def test_definitions_in_a_schema_are_found() -> None:
    _, grammar = schema_for(functions(NESTED), form_of("named"), ids_of("added"))
    text = '[TOOL_CALLS]search.deep-1[ARGS]{"where": {"deep": true}}'
    assert accepts(grammar, "added", text)
    assert not accepts(grammar, "added", text.replace("true", "1"))


# -- an answer that may be a call


@given(
    name=st.sampled_from(FORMS),
    kind=st.sampled_from(["special", "added", "letters"]),
    parallel=st.booleans(),
    seed=st.integers(0, 2**32),
)
def test_in_a_guarded_walk_calls_keep_their_schemas(
    name: str, kind: str, parallel: bool, seed: int
) -> None:
    form = form_of(name)
    _, grammar = guard_for(functions(*TOOLS), form, ids_of(kind), parallel=parallel)
    answer = parse_answer(walked(grammar, kind, seed), form, NAMES)
    assert len(answer.calls) <= (99 if parallel and not form.one_call else 1)
    for call in answer.calls:
        jsonschema.validate(json.loads(call.arguments), SCHEMAS[call.name] or {"maxProperties": 0})


@pytest.mark.parametrize("kind", ["special", "added", "letters"])
@pytest.mark.parametrize("name", FORMS)
def test_a_guarded_answer_may_be_text_and_a_call_only_a_right_one(name: str, kind: str) -> None:
    form = form_of(name)
    _, grammar = guard_for(functions(WEATHER), form, ids_of(kind))
    assert accepts(grammar, kind, "It {rains}, I <think>.\n")
    assert accepts(grammar, kind, WRITTEN[name])
    assert not accepts(grammar, kind, WRITTEN[name].replace("weather", "now"))
    assert not accepts(grammar, kind, WRITTEN[name].replace('"days": 2', '"days": 20'))
    if not form.is_bare:
        assert accepts(grammar, kind, f"I see.\n{WRITTEN[name]}")
        assert not accepts(grammar, kind, f"I see.\n{WRITTEN[name].replace('weather', 'now')}")


def test_a_guarded_answer_may_have_other_added_tokens_where_it_may() -> None:
    tokenizer, _ = vocabulary("added")
    other = tokenizer.token_to_id("</tool_call>")  # any that is no marker of this form
    form = form_of("named")
    text = f"a</tool_call>b{WRITTEN['named']}"
    _, strict = guard_for(functions(WEATHER), form, ids_of("added"))
    assert not accepts(strict, "added", text)
    _, grammar = guard_for(functions(WEATHER), form, ids_of("added"), text_ids=[other])
    assert accepts(grammar, "added", text)


@pytest.mark.parametrize("kind", ["special", "added", "letters"])
@pytest.mark.parametrize("name", ["hermes", "mistral", "named"])
def test_an_answer_is_a_call_or_of_a_schema(name: str, kind: str) -> None:
    schema = json.dumps({"type": "object", "properties": {"name": {"type": "string"}}})
    _, grammar = schema_for(functions(WEATHER), form_of(name), ids_of(kind), otherwise=schema)
    assert accepts(grammar, kind, WRITTEN[name])
    assert accepts(grammar, kind, '{"name": "weather"}')
    assert not accepts(grammar, kind, '{"name": 1}')
    assert not accepts(grammar, kind, "It rains.")


ODD = {"type": "object", "properties": {"a": {"type": "string", "format": "flower"}}}


def test_what_the_library_does_not_know_is_left_out_and_refused_where_it_is_promised() -> None:
    function = {"name": "odd", "parameters": ODD}
    _, grammar = schema_for(
        functions({"type": "function", "function": function}), form_of("hermes"), {}
    )
    assert accepts(
        grammar,
        "letters",
        '<tool_call>\n{"name": "odd", "arguments": {"a": "rose"}}\n</tool_call>',
    )
    strict = functions({"type": "function", "function": function | {"strict": True}})
    with pytest.raises(
        ApiError, match=r"the tool 'odd' cannot be kept to \(Unknown format: flower"
    ):
        schema_for(strict, form_of("hermes"), {})


@pytest.mark.parametrize("schema", [{"$ref": "https://example.com/x"}, {"properties": {"a": 1}}])
def test_a_schema_that_is_none_is_refused(schema: dict[str, Any]) -> None:
    tools = functions({"type": "function", "function": {"name": "odd", "parameters": schema}})
    with pytest.raises(ApiError, match="'odd' cannot be kept to") as caught:
        schema_for(tools, form_of("hermes"), {})
    assert caught.value.param == "tools"
    assert "\n" not in str(caught.value)
