"""Calls are read out of answers: however the text is cut, and nothing of it is lost."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from jinja2.sandbox import ImmutableSandboxedEnvironment
from openai.types.chat import ChatCompletionMessage
from openai.types.chat.chat_completion_chunk import ChoiceDelta
from tool_templates import BEHIND_ANSWER, FORM_OF, HERMES, LLAMA, MISTRAL, NAMED, NAMES

from qaic_ray.serve.tools.call_reader import CallReader, parse_answer
from qaic_ray.serve.tools.deltas import CallDelta, ContentDelta, joined
from qaic_ray.serve.tools.forms import CallForm, call_form

FORMS = {
    "llama": call_form("llama3_json", LLAMA),
    "hermes": call_form("hermes", HERMES),
    "mistral": call_form("mistral", MISTRAL),
    "named": call_form("mistral", NAMED),
}
SPECIAL = ("<|im_end|>", "<|python_tag|>", "[TOOL_CALLS]", "<|im|>")
ANY_FORM = st.sampled_from(sorted(FORMS))

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=6,
)
ARGUMENTS = st.dictionaries(st.text(max_size=5), VALUES, max_size=3)
CALLS = st.lists(st.tuples(st.sampled_from(sorted(NAMES)), ARGUMENTS), min_size=1, max_size=3)

MARKS = [
    *("<tool_call>", "</tool_call>", "[TOOL_CALLS]", "[ARGS]", "<|python_tag|>", "<|im_end|>"),
    *("<|im|>", "<tool", "[TOOL", "<|", "</", "[CALL_ID]x", "function"),
    *('{"name": "weather", "arguments": {', '"parameters": {', '"name": "now"', '{"type": "'),
    *('{"name": "weather"}', '"arguments": null', '{"function": {"name": "now"', '"id": "a", '),
    *('{"arguments": {"a": 1}, "name": "now"}', '"arguments": "{}"', "weather", "now", "nobody"),
    *("{", "}", "[", "]", ",", ";", ":", '"', "\\", " ", "\n", "a", "1", "ü", "\u2028", "🙂"),
]
NOISE = st.lists(st.sampled_from(MARKS), max_size=14).map("".join)
ANSWERS = NOISE | st.builds("{}{}{}".format, NOISE, st.sampled_from(MARKS), st.text(max_size=10))


def cut(text: str, places: list[int]) -> list[str]:
    at = sorted({place % (len(text) + 1) for place in places})
    return [text[a:b] for a, b in zip([0, *at], [*at, len(text)], strict=True)]


def read(reader: CallReader, pieces: list[str]) -> list[ContentDelta | CallDelta]:
    deltas = [delta for piece in pieces for delta in reader.feed(piece)]
    return [*deltas, *reader.end()]


@given(
    name=ANY_FORM,
    text=ANSWERS,
    places=st.lists(st.integers(0, 200), max_size=20),
    parallel=st.booleans(),
    special=st.sampled_from([(), SPECIAL]),
)
@example(name="hermes", text="<tool_call>{'", places=[], parallel=True, special=())
def test_pieces_are_the_whole_however_the_text_is_cut(
    name: str, text: str, places: list[int], parallel: bool, special: tuple[str, ...]
) -> None:
    options: dict[str, Any] = {"parallel": parallel, "special": special}
    whole = parse_answer(text, FORMS[name], NAMES, **options)
    for pieces in cut(text, places), list(text):
        deltas = read(CallReader(FORMS[name], NAMES, **options), pieces)
        assert joined(deltas) == whole
    assert len(whole.calls) <= (99 if parallel else 1)


@given(name=ANY_FORM, text=ANSWERS, special=st.sampled_from([(), SPECIAL]))
def test_text_without_a_call_is_the_content(name: str, text: str, special: tuple[str, ...]) -> None:
    answer = parse_answer(text, FORMS[name], NAMES, special=special)
    if not answer.calls:
        by_length = sorted(special, key=len, reverse=True)
        shown = re.sub("|".join(map(re.escape, by_length)), "", text) if special else text
        assert answer.content == shown


@given(name=ANY_FORM, text=ANSWERS)
def test_arguments_and_content_stand_in_the_text_in_their_order(name: str, text: str) -> None:
    """Nothing is made up, and a call's syntax is the only thing that goes."""
    deltas = read(CallReader(FORMS[name], NAMES), [text])
    told = [d.text if isinstance(d, ContentDelta) else d.arguments for d in deltas]
    is_verbatim = '"arguments": "' not in text and "null" not in text and "now" not in text
    at = 0
    for piece in filter(None, "".join(told).split() if is_verbatim else ()):
        for character in piece:
            at = text.index(character, at) + 1


def rendered(name: str, content: str, calls: list[tuple[str, dict[str, Any]]]) -> str:
    """An assistant's turn as the template prints it, which is how a model was taught to write."""
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.filters["tojson"] = lambda value, **how: json.dumps(
        value, ensure_ascii=False, **how
    )
    written = [
        {"id": "abcdef123", "function": {"name": tool, "arguments": arguments}}
        for tool, arguments in calls
    ]
    messages = [{"role": "user", "content": "?"}]
    turn = {"role": "assistant", "content": content, "tool_calls": written}
    template = environment.from_string(FORM_OF[name][0])
    how = {"bos_token": "<s>", "eos_token": "</s>", "raise_exception": pytest.fail}
    before = template.render(messages=messages, add_generation_prompt=True, **how)
    after = template.render(messages=[*messages, turn], **how)
    assert after.startswith(before)
    end = BEHIND_ANSWER[name]
    return after[len(before) :].rstrip("\n").removesuffix(end)


@given(name=ANY_FORM, calls=CALLS, places=st.lists(st.integers(0, 500), max_size=9))
def test_calls_that_a_template_prints_are_read_back(
    name: str, calls: list[tuple[str, dict[str, Any]]], places: list[int]
) -> None:
    calls = calls[:1] if FORMS[name].one_call else calls
    text = rendered(name, "", calls)
    deltas = read(CallReader(FORMS[name], NAMES), cut(text, places))
    answer = joined(deltas)
    assert answer.content is None
    assert [(one.name, json.loads(one.arguments)) for one in answer.calls] == calls
    begun = [delta for delta in deltas if isinstance(delta, CallDelta) and delta.id]
    assert [(one.index, one.name) for one in begun] == list(enumerate(tool for tool, _ in calls))


@given(name=ANY_FORM, calls=CALLS, length=st.integers(0, 300))
def test_an_answer_that_was_cut_gives_the_beginning_of_its_calls(
    name: str, calls: list[tuple[str, dict[str, Any]]], length: int
) -> None:
    calls = calls[:1] if FORMS[name].one_call else calls
    text = rendered(name, "", calls)[:length]
    answer = parse_answer(text, FORMS[name], NAMES)
    expected = [(tool, json.dumps(arguments, ensure_ascii=False)) for tool, arguments in calls]
    for one, (tool, arguments) in zip(answer.calls, expected, strict=False):
        assert one.name == tool
        assert arguments.startswith(one.arguments)
    if not answer.calls:
        assert answer.content == text


def parsed(form: CallForm, text: str, **options: Any) -> tuple[str | None, list[tuple[str, str]]]:
    answer = parse_answer(text, form, NAMES, **options)
    return answer.content, [(one.name, one.arguments) for one in answer.calls]


CITY = '{"city": "K}<ö"}'
ASKED = f'{{"name": "weather", "arguments": {CITY}}}'
TABLE: list[tuple[str, str, str | None, list[tuple[str, str]]]] = [
    ("hermes", f"<tool_call>\n{ASKED}\n</tool_call>", None, [("weather", CITY)]),
    ("hermes", f"I look.\n<tool_call>{ASKED}</tool_call>\n", "I look.", [("weather", CITY)]),
    (
        "hermes",
        f"<think>\nhm\n</think>\n\n<tool_call>\n{ASKED}\n</tool_call>",
        "<think>\nhm\n</think>",
        [("weather", CITY)],
    ),
    ("hermes", f"a\n<tool_call>{ASKED}</tool_call>\nb", "a\nb", [("weather", CITY)]),
    (
        "hermes",
        f'<tool_call>[{ASKED}, {{"name": "now", "arguments": {{}}}}]</tool_call>',
        None,
        [("weather", CITY), ("now", "{}")],
    ),
    ("hermes", '<tool_call>{"arguments": {}, "name": "now"}</tool_call>', None, [("now", "{}")]),
    ("hermes", '<tool_call>{"name": "now"}</tool_call>', None, [("now", "{}")]),
    ("hermes", '<tool_call>{"name": "now", "arguments": null}', None, [("now", "{}")]),
    ("hermes", '<tool_call>{"name": "now", "arguments": "{}"}', None, [("now", "{}")]),
    # A bracket that is missing, one that is too many, an answer that was cut.
    ("hermes", '<tool_call>{"name": "now", "arguments": {}\n</tool_call>', None, [("now", "{}")]),
    (
        "hermes",
        '<tool_call>{"name": "now", "arguments": {"a": [1, \n</tool_call> x',
        "x",
        [("now", '{"a": [1, \n')],
    ),
    ("hermes", '<tool_call>{"name": "now", "argum', '<tool_call>{"name": "now", "argum', []),
    ("hermes", '<tool_call>{"name": "now", "arguments": {"a', None, [("now", '{"a')]),
    ("hermes", '<tool_call>{"name": "now", "arguments": {}}\n</tool_c', None, [("now", "{}")]),
    ("hermes", "<tool_call>\nnow()\n</tool_call>", "<tool_call>\nnow()\n</tool_call>", []),
    (
        "hermes",
        '<tool_call>{"name": "who"}</tool_call>',
        '<tool_call>{"name": "who"}</tool_call>',
        [],
    ),
    ("hermes", f"{ASKED}", ASKED, []),
    ("hermes", " \n", " \n", []),
    ("mistral", f"[TOOL_CALLS] [{ASKED}]", None, [("weather", CITY)]),
    ("mistral", f"[TOOL_CALLS]{ASKED}", None, [("weather", CITY)]),
    (
        "mistral",
        '[TOOL_CALLS] [{"name": "now", "arguments": {}, "id": "abcdef123"}]',
        None,
        [("now", "{}")],
    ),
    (
        "mistral",
        f"So: [TOOL_CALLS][{ASKED},\n{{}}]",
        "So:,\n{}]",
        [("weather", CITY)],
    ),
    ("named", f"[TOOL_CALLS]weather[ARGS]{CITY}", None, [("weather", CITY)]),
    ("named", f"[TOOL_CALLS]weather{CITY}", None, [("weather", CITY)]),
    (
        "named",
        f"[TOOL_CALLS]now[CALL_ID]abcdef123[ARGS]{{}}[TOOL_CALLS]weather[ARGS]{CITY}",
        None,
        [("now", "{}"), ("weather", CITY)],
    ),
    ("named", "[TOOL_CALLS]who[ARGS]{}", "[TOOL_CALLS]who[ARGS]{}", []),
    ("llama", f'{{"name": "weather", "parameters": {CITY}}}', None, [("weather", CITY)]),
    (
        "llama",
        f'<|python_tag|>{{"name": "weather", "parameters": {CITY}}}',
        None,
        [("weather", CITY)],
    ),
    (
        "llama",
        f'{{"type": "function", "name": "weather", "parameters": {CITY}}}; {{"name": "now"}}',
        None,
        [("weather", CITY), ("now", "{}")],
    ),
    (
        "llama",
        f'{{"type": "function", "function": {{"name": "weather", "parameters": {CITY}}}}}',
        None,
        [("weather", CITY)],
    ),
    ("llama", '{"name": "Ann", "parameters": {}}', '{"name": "Ann", "parameters": {}}', []),
    ("llama", '{"a": {"name": "b"}} or {', '{"a": {"name": "b"}} or {', []),
    ("llama", 'Call: {"name": "now", "parameters": {}}.', "Call:.", [("now", "{}")]),
]


@pytest.mark.parametrize(("form", "text", "content", "calls"), TABLE)
def test_answers_of_models(
    form: str, text: str, content: str | None, calls: list[tuple[str, str]]
) -> None:
    assert parsed(FORMS[form], text) == (content, calls)


def test_only_the_first_call_is_kept_where_one_is_wanted() -> None:
    text = f"a <tool_call>{ASKED}</tool_call><tool_call>{ASKED}</tool_call> b"
    assert parsed(FORMS["hermes"], text, parallel=False) == ("a b", [("weather", CITY)])


def test_arguments_are_told_as_they_come() -> None:
    reader = CallReader(FORMS["hermes"], NAMES, seed="r")
    told: list[list[dict[str, Any]]] = [
        [delta.document() for delta in reader.feed(piece)]
        for piece in (
            "Well <to",
            'ol_call>{"name": "now", "argu',
            'ments": {"a',
            '": 1',
            "}}</tool_",
        )
    ]
    (call,) = told[2][0]["tool_calls"]
    assert told[:2] == [[{"content": "Well"}], []]
    assert call["function"] == {"name": "now", "arguments": '{"a'}
    assert call["id"].startswith("call_")
    assert told[3] == [{"tool_calls": [{"index": 0, "function": {"arguments": '": 1'}}]}]
    assert told[4] == [{"tool_calls": [{"index": 0, "function": {"arguments": "}"}}]}]
    assert reader.end() == []


def test_text_that_begins_no_call_waits_for_nothing() -> None:
    reader = CallReader(FORMS["llama"], NAMES)
    assert reader.feed('{"answer') == [ContentDelta('{"answer')]
    assert reader.feed('": {"name": "An') == [ContentDelta('": {"name": "An')]


@pytest.mark.parametrize("form", sorted(FORMS))
def test_ids_are_of_the_form_and_made_again(form: str) -> None:
    text = rendered(form, "", [("now", {})])
    ids = [parse_answer(text, FORMS[form], NAMES, seed=s).calls[0].id for s in ("a", "a", "b")]
    assert ids[0] == ids[1] != ids[2]
    if FORMS[form].short_ids:
        assert re.fullmatch("[a-z0-9]{9}", ids[0])


def test_messages_and_deltas_are_the_interfaces() -> None:
    answer = parse_answer(f"a <tool_call>{ASKED}</tool_call>", FORMS["hermes"], NAMES)
    message = ChatCompletionMessage.model_validate(answer.message(), strict=True)
    assert message.tool_calls is not None
    assert message.tool_calls[0].function.arguments == CITY  # type: ignore[union-attr]
    for delta in read(CallReader(FORMS["hermes"], NAMES), list(f"a <tool_call>{ASKED}")):
        ChoiceDelta.model_validate(delta.document(), strict=True)
