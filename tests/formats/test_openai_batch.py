"""The OpenAI batch format: requests in, output and error files out, by the documented fields."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, ConfigDict

from qaic_ray.errors import QaicRayError, RowError
from qaic_ray.formats.json_rows import BatchRequests, is_request, prompts_from_json
from qaic_ray.formats.prompts import prompts_from_file
from qaic_ray.formats.row_reader import Draft, OwnFields
from qaic_ray.option_types import OutputFormat, PromptFormat
from qaic_ray.rows import ErrorClass, FinishReason, Prompt, Row, Sample
from qaic_ray.runs.delivery import RowWriter, export_outputs
from qaic_ray.sampling_params import SamplingParams, TokenLogprob

RUN = SamplingParams(temperature=0.5, top_p=0.9, max_tokens=9)
MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "東京?"}]


def request(body: dict[str, Any], custom_id: str = "x") -> dict[str, Any]:
    url = "/v1/chat/completions" if "messages" in body else "/v1/completions"
    return {"custom_id": custom_id, "method": "POST", "url": url, "body": body}


def read(body: dict[str, Any], sampling: SamplingParams = RUN) -> Prompt:
    return BatchRequests(OwnFields(sampling)).read(Draft(0, b""), request(body))


# -- requests


def test_a_completion_is_a_text() -> None:
    assert read({"model": "m", "prompt": "東京"}) == Prompt(0, "東京", "x")


def test_a_chat_completion_is_a_conversation() -> None:
    expected = Prompt(0, "東京?", "x", tuple(MESSAGES))
    assert read({"model": "m", "messages": MESSAGES}) == expected


@pytest.mark.parametrize(
    ("asked", "params"),
    [
        ({}, None),
        ({"max_tokens": 3, "seed": 1}, {"max_tokens": 3, "seed": 1}),
        ({"max_completion_tokens": 3, "max_tokens": None}, {"max_tokens": 3}),
        ({"temperature": 1, "top_p": 0.5, "n": 2}, {"temperature": 1, "top_p": 0.5, "n": 2}),
        ({"stop": "\n"}, {"stop": ("\n",)}),
        ({"stop": ["a", "b"]}, {"stop": ("a", "b")}),
        ({"presence_penalty": 1, "frequency_penalty": -1}, None),
        ({"top_k": 5, "min_p": 0.1}, {"top_k": 5, "min_p": 0.1}),
        ({"user": "me", "metadata": {"a": "b"}, "store": True, "service_tier": "flex"}, {}),
        ({"stream": False, "tools": [], "tool_choice": "auto"}, {}),
        ({"logit_bias": {"7": -100}}, {"logit_bias": ((7, -100.0),)}),
        ({"response_format": {"type": "text"}, "best_of": 1, "echo": False, "suffix": None}, {}),
    ],
)
def test_fields_of_both_bodies(asked: dict[str, Any], params: dict[str, Any] | None) -> None:
    for body in ({"prompt": "a"}, {"messages": MESSAGES}):
        fields = asked if params is None else params
        expected = RUN.updated(fields) if fields else None
        assert read({**body, **asked}).sampling == expected


@pytest.mark.parametrize(
    ("body", "logprobs"),
    [
        ({"prompt": "a", "logprobs": 5}, 5),
        ({"prompt": "a", "logprobs": 0}, 0),
        ({"messages": MESSAGES, "logprobs": True}, 0),
        ({"messages": MESSAGES, "logprobs": True, "top_logprobs": 5}, 5),
        ({"messages": MESSAGES, "logprobs": True, "top_logprobs": None}, 0),
        ({"messages": MESSAGES, "logprobs": False, "top_logprobs": None, "seed": 1}, None),
    ],
)
def test_logprobs_are_asked_for_in_two_ways(body: dict[str, Any], logprobs: int | None) -> None:
    sampling = read(body).sampling
    assert sampling is not None
    assert sampling.logprobs == logprobs


def test_equal_numbers_of_different_types_are_not_taken_for_each_other() -> None:
    requests = BatchRequests(OwnFields(SamplingParams()))
    body = {"prompt": "a", "max_tokens": 1}
    assert requests.read(Draft(0, b""), request(body, "0")).sampling == SamplingParams(max_tokens=1)
    for number, value in enumerate((True, 1.0, "1"), start=1):
        with pytest.raises(RowError, match="max_tokens is"):
            requests.read(Draft(0, b""), request({**body, "max_tokens": value}, str(number)))


@given(st.lists(st.text(st.characters(exclude_categories=("Cs",)), min_size=1), max_size=20))
def test_a_custom_id_is_good_once(ids: list[str]) -> None:
    lines = "\n".join(json.dumps(request({"prompt": "a"}, id_)) for id_ in ids)
    items = list(prompts_from_json("b", lines.encode().split(b"\n"), OwnFields(RUN)))[: len(ids)]
    assert [item.id for item in items] == ids
    assert [isinstance(item, Prompt) for item in items] == [
        id_ not in ids[:number] for number, id_ in enumerate(ids)
    ]


def test_a_bad_request_keeps_what_could_be_read_of_it(tmp_path: Path) -> None:
    path = tmp_path / "b.jsonl"
    path.write_text(json.dumps(request({"messages": MESSAGES, "stream": True})))
    (row,) = prompts_from_file(path)
    assert isinstance(row, Row)
    assert (row.id, row.prompt, row.messages) == ("x", "東京?", tuple(MESSAGES))


def test_only_requests_where_that_was_said(tmp_path: Path) -> None:
    path = tmp_path / "b.jsonl"
    path.write_text(json.dumps(request({"prompt": "a"})) + '\n{"prompt": "b"}')
    assert list(prompts_from_file(path)) == [Prompt(0, "a", "x"), Prompt(1, "b")]
    first, second = prompts_from_file(path, PromptFormat.OPENAI)
    assert first == Prompt(0, "a", "x")
    assert isinstance(second, Row)
    assert second.error == 'b.jsonl line 2: There is no "custom_id" in it.'


def test_a_row_with_a_prompt_is_no_request() -> None:
    assert is_request({"custom_id": "x"})
    assert is_request({"body": {}})
    assert not is_request({"prompt": "a", "custom_id": "x", "body": "mine"})
    assert not is_request({"messages": [], "custom_id": "x"})


# -- responses, by the fields of the API reference


class Documented(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class Usage(Documented):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class TopToken(Documented):
    token: str
    logprob: float
    bytes: list[int] | None


class Token(TopToken):
    top_logprobs: list[TopToken]


class ChatLogprobs(Documented):
    content: list[Token] | None
    refusal: list[Token] | None


class Message(Documented):
    role: Literal["assistant"]
    content: str | None
    refusal: str | None


class ChatChoice(Documented):
    index: int
    message: Message
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length"]


class TextLogprobs(Documented):
    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class TextChoice(Documented):
    index: int
    text: str
    logprobs: TextLogprobs | None
    finish_reason: Literal["stop", "length"]


class ChatCompletion(Documented):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class TextCompletion(Documented):
    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[TextChoice]
    usage: Usage


class Response(Documented):
    status_code: int
    request_id: str
    body: ChatCompletion | TextCompletion


class Failure(Documented):
    code: str
    message: str


class Line(Documented):
    id: str
    custom_id: str
    response: Response | None
    error: Failure | None


LOGPROBS = (
    TokenLogprob(1, -0.5, ((1, -0.5), (2, -1.5))),
    TokenLogprob(3, float("-inf"), ((4, -0.1), (5, -2.0))),
)
TOKEN_TEXTS = ["", "東", " a", "\ufffd", "b", "b"]


def answer(index: int, **fields: Any) -> Row:
    return Row(
        **{
            "index": index,
            "prompt": "p",
            "text": "東\n",
            "finish_reason": FinishReason.STOP,
            "token_ids": (1, 3),
            "prompt_tokens": 7,
            **fields,
        }
    )


def export(folder: Path, *rows: Row) -> tuple[list[Line], list[Line]]:
    with RowWriter(folder) as write:
        for row in rows:
            write(row)
    paths = export_outputs(
        folder, OutputFormat.OPENAI, model="m", token_text=TOKEN_TEXTS.__getitem__
    )
    assert [path.name for path in paths] == ["openai_output.jsonl", "openai_error.jsonl"]
    output, errors = (
        [Line.model_validate_json(line) for line in path.read_text().splitlines()] for path in paths
    )
    return output, errors


def test_answers_and_errors_have_their_files(tmp_path: Path) -> None:
    rows = [
        answer(0, id="a"),
        Row.failed(
            Prompt(1, "q", "b"), "It killed.", worker="card 0", error_class=ErrorClass.DEVICE
        ),
        Row.failed(Prompt(2, "q"), "Not JSON.", attempts=0),
        answer(3, id="d", messages=({"role": "user", "content": "p"},)),
    ]
    output, errors = export(tmp_path, *rows)
    assert [line.custom_id for line in output] == ["a", "d"]
    assert [line.custom_id for line in errors] == ["b", "row-2"]
    text, chat = (line.response.body for line in output if line.response)
    assert isinstance(text, TextCompletion)
    assert isinstance(chat, ChatCompletion)
    assert text.choices[0].text == chat.choices[0].message.content == "東\n"
    assert text.usage == Usage(prompt_tokens=7, completion_tokens=2, total_tokens=9)
    assert {text.model, chat.model} == {"m"}
    assert all(line.response is None for line in errors)
    assert [line.error for line in errors] == [
        Failure(code="request_failed", message="It killed."),
        Failure(code="invalid_request", message="Not JSON."),
    ]
    assert len({line.id for line in (*output, *errors)}) == 4


def test_several_samples_are_choices_and_all_are_counted(tmp_path: Path) -> None:
    choices = (
        Sample("a", (1,), FinishReason.LENGTH),
        Sample("b", (2, 3), FinishReason.STOP, stop_reason="."),
    )
    ((line,), _) = export(tmp_path, answer(0, choices=choices))
    assert line.response is not None
    body = line.response.body
    assert isinstance(body, TextCompletion)
    assert [(c.index, c.text, c.finish_reason) for c in body.choices] == [
        (0, "a", "length"),
        (1, "b", "stop"),
    ]
    assert body.usage.completion_tokens == 3


def test_logprobs_have_the_texts_of_their_tokens(tmp_path: Path) -> None:
    messages = ({"role": "user", "content": "p"},)
    rows = answer(0, logprobs=LOGPROBS), answer(1, logprobs=LOGPROBS, messages=messages)
    output, _ = export(tmp_path, *rows)
    text, chat = (line.response.body.choices[0].logprobs for line in output if line.response)
    assert text == TextLogprobs(
        tokens=["東", "\ufffd"],
        token_logprobs=[-0.5, -9999.0],
        top_logprobs=[{"東": -0.5, " a": -1.5}, {"b": -0.1}],
        text_offset=[0, 1],
    )
    assert isinstance(chat, ChatLogprobs)
    assert chat.content is not None
    first, second = chat.content
    assert bytes(first.bytes or ()) == "東".encode()
    assert [(top.token, top.logprob) for top in first.top_logprobs] == [("東", -0.5), (" a", -1.5)]
    assert second.bytes is None


def test_without_a_tokenizer_tokens_have_numbers(tmp_path: Path) -> None:
    with RowWriter(tmp_path) as write:
        write(answer(0, logprobs=LOGPROBS))
    path, _ = export_outputs(tmp_path, OutputFormat.OPENAI, model="m")
    line = Line.model_validate_json(path.read_text())
    assert line.response is not None
    logprobs = line.response.body.choices[0].logprobs
    assert isinstance(logprobs, TextLogprobs)
    assert logprobs.tokens == ["token_id:1", "token_id:3"]


def test_export_is_the_same_every_time_and_leaves_a_torn_line_out(tmp_path: Path) -> None:
    export(tmp_path, answer(0), answer(1))
    path = tmp_path / "openai_output.jsonl"
    before = path.read_bytes()
    with (tmp_path / "outputs.jsonl").open("r+b") as stream:
        stamp = os.stat(stream.fileno())
        stream.seek(0, 2)
        stream.write(b'{"index": 2, "id')
    os.utime(tmp_path / "outputs.jsonl", ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    export_outputs(tmp_path, OutputFormat.OPENAI, model="m")
    assert path.read_bytes() == before


@pytest.mark.parametrize("output_format", [OutputFormat.OPENAI, OutputFormat.PARQUET])
def test_what_the_disk_refuses_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, output_format: OutputFormat
) -> None:
    with RowWriter(tmp_path) as write:
        write(answer(0))
    paths = export_outputs(tmp_path, output_format, model="m")
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}

    def refuse(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", refuse)
    with pytest.raises(QaicRayError, match="No space left on device"):
        export_outputs(tmp_path, output_format, model="other")
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert set(paths) <= set(before)
