"""What rows ask for, in the words of every program: done, refused by name, or the user's own."""

from __future__ import annotations

import io
import json
import sys
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qaic_ray.cluster.ray_data import CardPredictor
from qaic_ray.formats.json_rows import prompts_from_json
from qaic_ray.formats.prompts import prompts_from_file
from qaic_ray.formats.row_fields import (
    ALIASES,
    CHAT,
    MAYBE_NESTED,
    NESTED,
    NO_EFFECT,
    NOT_OFFERED,
    RESPONSE_FORMAT,
    STRUCTURED,
    mistake,
)
from qaic_ray.formats.row_reader import Draft, OwnFields, read_fields
from qaic_ray.formats.tables import prompts_from_parquet
from qaic_ray.option_types import PromptFormat
from qaic_ray.rows import ChatOptions, Prompt, Row
from qaic_ray.sampling_params import FIELDS, SamplingParams

RUN = SamplingParams(temperature=0.5, max_tokens=9)


def read(fields: dict[str, Any], run: SamplingParams = RUN) -> Prompt | Row:
    document = {"prompt": "a", **fields}
    if "messages" in document:
        del document["prompt"]
    (item,) = prompts_from_json("p line", [json.dumps(document).encode()], OwnFields(run))
    return item


def sampling(fields: dict[str, Any], run: SamplingParams = RUN) -> SamplingParams | None:
    item = read(fields, run)
    assert isinstance(item, Prompt), item.error
    return item.sampling


def error(fields: dict[str, Any], run: SamplingParams = RUN) -> str:
    item = read(fields, run)
    assert isinstance(item, Row), item
    return str(item.error).removeprefix("p line 1: ")


# -- done


@pytest.mark.parametrize(
    ("fields", "ours"),
    [
        ({"max_new_tokens": 5}, {"max_tokens": 5}),
        ({"n_predict": 5}, {"max_tokens": 5}),
        ({"num_predict": -1}, {"max_tokens": None}),
        ({"n_predict": -2}, {"max_tokens": None}),
        ({"max_gen_len": 5, "max_tokens": 5, "max_completion_tokens": 5}, {"max_tokens": 5}),
        ({"min_new_tokens": 2}, {"min_tokens": 2}),
        ({"stop_sequences": ["x"]}, {"stop": ("x",)}),
        ({"stop_strings": "x"}, {"stop": ("x",)}),
        ({"repeat_penalty": 1.3}, {"repetition_penalty": 1.3}),
        ({"num_return_sequences": 2}, {"n": 2}),
        ({"num_return_sequences": 2, "best_of": 2}, {"n": 2}),
        ({"do_sample": False}, {"temperature": 0}),
        ({"do_sample": False, "temperature": 0.7}, {"temperature": 0}),
        ({"do_sample": True, "temperature": 0.7}, {"temperature": 0.7}),
        ({"options": {"temperature": 1, "num_ctx": 4096}}, {"temperature": 1}),
        ({"parameters": {"max_new_tokens": 3, "details": True}}, {"max_tokens": 3}),
        ({"sampling_params": {"top_k": 3, "seed": None, "best_of": 1}}, {"top_k": 3}),
        ({"extra_body": {"sampling_params": {"top_k": 3}}}, {"top_k": 3}),
        ({"n_probs": 3}, {"logprobs": 3}),
        ({"logprobs": True}, {"logprobs": 0}),
        ({"logprobs": True, "top_logprobs": 3}, {"logprobs": 3}),
        ({"logprobs": False, "top_logprobs": 0}, {"logprobs": None}),
        ({"random_seed": 7}, {"seed": 7}),
    ],
)
def test_a_field_of_ours_is_done_by_whatever_name(
    fields: dict[str, Any], ours: dict[str, Any]
) -> None:
    assert sampling(fields) == RUN.updated(ours)


def test_the_runs_logprobs_can_be_left_out_by_a_row() -> None:
    run = SamplingParams(logprobs=3)
    assert sampling({"logprobs": False}, run) == SamplingParams()
    assert sampling({"logprobs": None}, run) is None


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"n_predict": 0}, '"n_predict" is wrong: max_tokens is 0; allowed is'),
        ({"options": {"repeat_penalty": 0}}, '"options.repeat_penalty" is wrong: repetition_pe'),
        ({"max_tokens": 5, "n_predict": 6}, "max_tokens and n_predict are the same: give one"),
        ({"do_sample": "yes"}, '"do_sample" is a string, not true or false.'),
        ({"best_of": 3, "n": 2}, '"best_of" is not offered (given: 3)'),
        ({"top_logprobs": 3}, '"top_logprobs" needs "logprobs": true.'),
        ({"logprobs": 3, "top_logprobs": 4}, '"logprobs" and "top_logprobs" say different'),
        ({"sampling_params": [1]}, '"sampling_params" is a list, not an object.'),
        ({"sampling_params": {"mine": 1}}, '"sampling_params.mine" is not offered'),
        ({"options": {"temperature": 1, "mine": 1}}, '"options.mine" is not offered'),
        ({"options": {"temprature": 1}, "options2": 1}, None),
        ({"stop": ["a"] * 65}, "stop is a list of 65; allowed is"),
    ],
)
def test_a_field_of_ours_that_is_wrong_is_named_as_the_row_has_it(
    fields: dict[str, Any], words: str | None
) -> None:
    if words is None:  # no key of it is known: the user's own
        assert sampling(fields) is None
    else:
        assert error(fields).startswith(words)


def test_drawing_needs_a_temperature() -> None:
    assert "do_sample" in error({"do_sample": True}, SamplingParams())
    assert sampling({"do_sample": True}) is None  # the run has one
    assert "do_sample" in error({"do_sample": True, "temperature": 0})


# -- of the chat template

MESSAGES = [{"role": "user", "content": "a"}]


@pytest.mark.parametrize(
    ("fields", "options"),
    [
        ({}, None),
        ({"continue_final_message": False, "add_generation_prompt": True}, None),
        ({"add_generation_prompt": False}, ChatOptions(add_generation_prompt=False)),
        (
            {"continue_final_message": True},
            ChatOptions(add_generation_prompt=False, continue_final_message=True),
        ),
        (
            {"chat_template_kwargs": {"enable_thinking": False}},
            ChatOptions(template_kwargs={"enable_thinking": False}),
        ),
    ],
)
def test_options_of_the_chat_template(fields: dict[str, Any], options: ChatOptions | None) -> None:
    item = read({"messages": MESSAGES, **fields})
    assert isinstance(item, Prompt)
    assert item.chat == options


def test_a_rows_options_of_the_template_go_over_the_runs() -> None:
    run = ChatOptions(template_kwargs={"enable_thinking": True, "date": "x"})
    own = OwnFields(RUN, run)
    asked = read_fields({"chat_template_kwargs": {"enable_thinking": False}}, is_chat=True)
    assert own.chat(asked) == ChatOptions(template_kwargs={"enable_thinking": False, "date": "x"})
    assert own.chat(read_fields({"add_generation_prompt": True}, is_chat=True)) is None


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"continue_final_message": True, "add_generation_prompt": True}, "are both true"),
        ({"continue_final_message": 1}, '"continue_final_message" is a number, not true or false'),
        ({"chat_template_kwargs": "x"}, '"chat_template_kwargs" is a string, not an object'),
        ({"chat_template_kwargs": {"a": "\ud800"}}, "half of a surrogate pair"),
        ({"chat_template": "{{ x }}"}, '"chat_template" is not offered'),
        ({"chat_template_kwarg": {}}, 'write "chat_template_kwargs"'),
    ],
)
def test_options_of_the_template_that_are_wrong(fields: dict[str, Any], words: str) -> None:
    assert words in error({"messages": MESSAGES, **fields})


def test_a_templates_variables_are_no_deeper_than_a_process_can_pass_on() -> None:
    kwargs: dict[str, Any] = {}
    for _ in range(33):
        kwargs = {"a": kwargs}
    assert "nested more than 32 levels deep" in error({"chat_template_kwargs": kwargs})


# -- the form of an answer

OBJECT = {"type": "object"}
FORMS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"structured_outputs": {"json": OBJECT}}, {"json": OBJECT}),
    ({"guided_json": OBJECT}, {"json": OBJECT}),
    ({"guided_json": json.dumps(OBJECT)}, {"json": OBJECT}),
    ({"guided_json_object": True}, {"json_object": True}),
    ({"guided_regex": "a+"}, {"regex": "a+"}),
    ({"guided_choice": ["a", "b"]}, {"choice": ["a", "b"]}),
    ({"guided_grammar": 'start: "a"'}, {"grammar": 'start: "a"'}),
    ({"extra_body": {"guided_regex": "a+"}}, {"regex": "a+"}),
    ({"response_format": {"type": "json_object"}}, {"json_object": True}),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"schema": OBJECT}}},
        {"json": OBJECT},
    ),
    ({"guided_regex": "a+", "guided_json": None, "guided_choice": []}, {"regex": "a+"}),
    ({"structured_outputs": {"regex": "a"}, "response_format": {"type": "text"}}, {"regex": "a"}),
]


@pytest.mark.parametrize(("fields", "document"), FORMS)
def test_the_form_of_an_answer_in_every_programs_words(
    fields: dict[str, Any], document: dict[str, Any]
) -> None:
    params = sampling(fields)
    assert params is not None
    assert params.structured_outputs is not None
    assert params.structured_outputs.document() == document
    assert params.temperature == RUN.temperature


def test_response_format_text_asks_for_nothing() -> None:
    assert sampling({"response_format": {"type": "text"}}) is None
    assert sampling({"response_format": {}}) is None


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"guided_regex": "("}, "structured_outputs.regex cannot be followed: unclosed group."),
        ({"guided_regex": "a", "guided_choice": ["b"]}, "guided_choice and guided_regex all say"),
        (
            {"structured_outputs": {"regex": "a"}, "response_format": {"type": "json_object"}},
            "response_format and structured_outputs all say the form of the answer: give one",
        ),
        ({"response_format": {"type": "grammar"}}, "response_format is an object"),
        ({"response_format": "json"}, "response_format is 'json'; allowed"),
        ({"structured_outputs": "json"}, "structured_outputs is 'json'; allowed"),
    ],
)
def test_a_form_that_cannot_be_is_the_rows_error(fields: dict[str, Any], words: str) -> None:
    assert words in error(fields)


def test_limits_of_tokens_are_read() -> None:
    params = sampling(
        {
            "logit_bias": {"5": -1, "3": 100},
            "bad_words": ["x"],
            "allowed_token_ids": [3, 5],
            "prompt_logprobs": 2,
        }
    )
    assert params == SamplingParams(
        temperature=0.5,
        max_tokens=9,
        logit_bias=((3, 100.0), (5, -1.0)),
        bad_words=("x",),
        allowed_token_ids=(3, 5),
        prompt_logprobs=2,
    )


# -- refused by name, and what asks for nothing

CHANGES = {
    "num_beams": 4, "use_beam_search": True, "guided_decoding": {"json": {}},
    "structural_tag": "x", "ebnf": "x", "guided_whitespace_pattern": "x",
    "grammar": "x", "json_schema": {"a": 1}, "max_length": 5,
    "typical_p": 0.5, "mirostat": 2, "tfs_z": 0.5, "dry_multiplier": 0.8, "xtc_probability": 0.5,
    "no_repeat_ngram_size": 3, "length_penalty": 2.0, "bad_words_ids": [[1]],
    "logits_processors": ["x"], "truncate_prompt_tokens": 5,
    "image": "a.png", "images": ["a"], "input_ids": [1, 2], "prompt_token_ids": [1],
    "suffix": "x", "lora": "x", "adapter_id": "x", "echo": True, "stream": True,
    "add_special_tokens": False, "sequence_bias": {"1": 5},
    "best_of": 2, "tools": [{}], "tool_choice": "required", "format": "json",
    "system": "Be brief.", "template": "{{ .Prompt }}", "raw": True, "context": [1, 2],
    "think": True, "enable_thinking": False, "reasoning_effort": "low", "watermark": True,
    "return_full_text": True, "eos_token_id": 2, "negative_prompt": "x", "guidance_scale": 1.5,
    "documents": [{"text": "x"}], "min_length": 5, "repeat_last_n": 64, "detokenize": False,
}  # fmt: skip
NOTHING = {
    "num_beams": 1, "use_beam_search": False, "response_format": {"type": "text"},
    "typical_p": 1.0, "mirostat": 0, "mirostat_tau": 5, "tfs_z": 1, "dry_multiplier": 0,
    "dry_base": 1.75, "xtc_probability": 0, "xtc_threshold": 0.1, "no_repeat_ngram_size": 0,
    "length_penalty": 1.0, "structured_outputs": None, "suffix": "", "echo": False, "stream": False,
    "add_special_tokens": True, "guided_json": None, "best_of": 1,
    "tools": [], "tool_choice": "auto", "keep_alive": "5m", "user": "me", "metadata": {"a": 1},
    "model": "m", "use_cache": True, "pad_token_id": 0, "watermark": False, "num_ctx": 4096,
    "return_full_text": False, "guidance_scale": 1, "prompt_logprobs": None, "detokenize": True,
}  # fmt: skip
MINE = {
    "my_note": "x", "label": 1, "answer": {"a": 1}, "source": "x", "options": ["A", "B"],
    "parameters": {"type": "object"}, "context": "some text", "format": "multiple choice",
    "stream": "science", "echo": "x", "system": 5, "template": "qa-1", "raw": "x", "name": "x",
    "documents": ["a"], "think": "hm", "reasoning": "because", "thinking": "long text",
    "max_length": "long", "verbosity": 3, "details": "x", "temp": 1, "language": "de",
    "question": "x", "choices": ["a"], "n_shots": 5, "top": 1, "score": 0.5, "domain": "x",
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGES)
def test_what_would_change_the_answer_is_refused_by_its_name(name: str) -> None:
    assert error({name: CHANGES[name]}).startswith(f'"{name}" is not offered')


@pytest.mark.parametrize("name", NOTHING)
def test_what_asks_for_nothing_passes(name: str) -> None:
    assert sampling({name: NOTHING[name]}) is None


@pytest.mark.parametrize("name", MINE)
def test_a_key_of_the_users_own_passes(name: str) -> None:
    assert sampling({name: MINE[name]}) is None


def test_options_of_a_question_are_its_own() -> None:
    for options in (
        {"A": "Paris", "B": "Rome"},
        {"n": "north", "s": "south"},
        {"model": "x", "user": "y"},
        "x",
        None,
    ):
        assert sampling({"options": options}) is None


def test_what_begins_a_conversation_is_the_templates_matter() -> None:
    chat = {"messages": MESSAGES}
    assert sampling({**chat, "add_special_tokens": False}) is None
    assert error({**chat, "add_special_tokens": True}).startswith('"add_special_tokens"')


def test_no_name_is_in_two_lists_and_none_is_taken_for_a_mistake() -> None:
    lists = [set(FIELDS), set(ALIASES), set(CHAT), NESTED, MAYBE_NESTED, NO_EFFECT]
    lists += [set(NOT_OFFERED), {*STRUCTURED, RESPONSE_FORMAT}]
    names = [name for some in lists for name in some]
    assert len(names) == len(set(names))
    assert [name for name in names if mistake(name)] == []
    assert set(ALIASES.values()) <= set(FIELDS)


@pytest.mark.parametrize(
    ("key", "name"),
    [
        ("topK", "top_k"),
        ("max-new-tokens", "max_tokens"),
        ("temprature", "temperature"),
        ("add_generation_prompts", "add_generation_prompt"),
    ],
)
def test_a_misspelt_name_is_told_from_the_users_own(key: str, name: str) -> None:
    assert f'write "{name}"' in error({key: 1})


def test_a_name_of_a_megabyte_is_the_users_own() -> None:
    assert sampling({"temperatur" * 100_000: 1}) is None


def test_values_of_a_table_that_are_texts_are_read_as_numbers() -> None:
    assert sampling({"num_beams": "1"}) is None
    assert error({"num_beams": "4"}).startswith('"num_beams" is not offered')


# -- every door, whatever comes

NAMES = st.sampled_from([
    *FIELDS, *ALIASES, *CHAT, *NESTED, *MAYBE_NESTED, *NOT_OFFERED, *STRUCTURED,
    RESPONSE_FORMAT, "prompt", "messages", "id",
    "custom_id", "body", "method", "url", "do_sample", "top_logprobs", "add_special_tokens",
])  # fmt: skip
TEXTS = st.text(max_size=8) | st.sampled_from(["\ud800", "x" * 5000, "user", "POST", "text", "1"])
NUMBERS = st.integers() | st.floats() | st.sampled_from([10**400, -(2**63), 2**31, 1e308, -1, 0, 1])
VALUES: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | NUMBERS | TEXTS,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(NAMES | TEXTS | st.just("role") | st.just("content"), inner, max_size=4)
    ),
    max_leaves=8,
)
MESSAGE = st.fixed_dictionaries({"role": VALUES, "content": VALUES}, optional={"name": VALUES})
DOCUMENTS = st.dictionaries(NAMES | TEXTS, VALUES, max_size=6) | st.fixed_dictionaries(
    {}, optional={"prompt": VALUES, "messages": st.lists(MESSAGE) | VALUES, "id": VALUES}
).flatmap(lambda some: st.dictionaries(NAMES, VALUES, max_size=3).map(lambda more: more | some))


def check(items: list[Prompt | Row], num_rows: int) -> None:
    """A prompt or an error row for each row, in order, and each can be written and digested."""
    assert [item.index for item in items] == list(range(num_rows))
    for item in items:
        if isinstance(item, Row):
            assert item.error
            assert len(item.error) < 1000
            assert "a fault of qaic-ray's" not in item.error
            json.dumps(item.to_json(), ensure_ascii=False).encode()


@given(st.lists(DOCUMENTS, min_size=1, max_size=4))
def test_any_json_objects_are_prompts_or_error_rows(documents: list[dict[str, Any]]) -> None:
    own = OwnFields(RUN)
    lines = [json.dumps(document).encode() for document in documents]
    check(list(prompts_from_json("p", lines, own)), len(lines))
    requests = [
        json.dumps({"custom_id": f"{i}", "method": "POST", "url": url, "body": document}).encode()
        for i, (document, url) in enumerate(
            zip(documents, ["/v1/completions", "/v1/chat/completions"] * 2, strict=False)
        )
    ]
    check(list(prompts_from_json("p", requests, own)), len(lines))
    with pytest.MonkeyPatch.context() as patch:
        array = b"[" + b",\n".join(lines) + b"]"
        patch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(array)))
        check(list(prompts_from_file("-", sampling=RUN)), len(lines))


@given(
    header=st.lists(NAMES, max_size=4, unique=True),
    rows=st.lists(st.lists(TEXTS | VALUES.map(json.dumps), max_size=5), min_size=1, max_size=4),
    tabs=st.booleans(),
)
def test_any_table_of_texts_is_prompts_or_error_rows(
    header: list[str], rows: list[list[str]], tabs: bool
) -> None:
    import csv

    columns = ["prompt", *(name for name in header if name != "prompt")]
    text = io.StringIO()
    writer = csv.writer(text, delimiter="\t" if tabs else ",", quoting=csv.QUOTE_ALL)
    writer.writerow(columns)
    filled = [row or [""] for row in rows]
    for row in filled:
        writer.writerow([cell.replace("\0", "") for cell in row])
    data = io.BytesIO(text.getvalue().encode("utf-8", "surrogatepass"))
    form = PromptFormat.TSV if tabs else PromptFormat.CSV
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdin", io.TextIOWrapper(data))
        check(list(prompts_from_file("-", form, RUN)), len(filled))


def column(values: list[Any]) -> pa.Array | None:
    """As a table would have them; None where it could not."""
    try:
        array = pa.array(values)
    except (pa.ArrowException, OverflowError, UnicodeError, TypeError):
        return None
    return None if pa.types.is_struct(array.type) and array.type.num_fields == 0 else array


@given(names=st.lists(NAMES, max_size=4, unique=True), data=st.data(), num=st.integers(1, 3))
def test_any_columns_are_prompts_or_error_rows(
    names: list[str], data: st.DataObject, num: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    columns: dict[str, Any] = {"prompt": pa.array(["a"] * num)}
    for name in names:
        kind = data.draw(st.sampled_from([VALUES, NUMBERS, TEXTS, st.binary(), st.datetimes()]))
        array = column(data.draw(st.lists(kind, min_size=num, max_size=num)))
        if name not in ("prompt", "messages") and array is not None:
            columns[name] = array
    path = tmp_path_factory.mktemp("p") / "p.parquet"
    try:
        pq.write_table(pa.table(columns), path)
    except (pa.ArrowException, UnicodeError):
        return
    check(list(prompts_from_parquet(str(path), OwnFields(RUN))), num)


@given(st.dictionaries(NAMES, st.lists(VALUES, min_size=2, max_size=2), max_size=4))
def test_any_batch_is_prompts_or_error_rows(columns: dict[str, list[Any]]) -> None:
    one = object.__new__(CardPredictor)  # no card: only its reading
    one._sampling, one._prompt_column, one._prefix = RUN, "prompt", "answer_"
    one._read_row = OwnFields(RUN).read_row
    batch = {"prompt": ["a", "b"]} | columns
    arrays = {}
    for name, values in batch.items():
        arrays[name] = np.empty(2, object)
        for at, value in enumerate(values):
            arrays[name][at] = value
    documents = enumerate(one._documents(arrays))
    check([Draft(number, "").read(one._prompt, document) for number, document in documents], 2)


def test_times_that_python_has_not_are_error_rows(tmp_path: Any) -> None:
    ids = pa.array([1, 10**18 + 1], pa.int64()).cast(pa.timestamp("ns"))
    path = tmp_path / "p.parquet"
    pq.write_table(pa.table({"prompt": ["a", "b"], "id": ids}), path)
    check(list(prompts_from_file(path)), 2)


def test_reading_stops_at_what_is_no_rows_fault() -> None:
    def interrupted(*_: object) -> Any:
        raise KeyboardInterrupt

    own = OwnFields(RUN)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(own, "sampling", interrupted)
        with pytest.raises(KeyboardInterrupt):
            list(prompts_from_json("p", [b'{"prompt": "a"}'], own))
        patch.setattr(own, "sampling", lambda _: 1 // 0)
        (row,) = prompts_from_json("p", [b'{"prompt": "a"}'], own)
    assert isinstance(row, Row)
    assert "ZeroDivisionError" in str(row.error)
