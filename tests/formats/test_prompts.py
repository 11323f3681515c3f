"""Prompt sources: what the user wrote is what the card gets, and nothing is lost or made up."""

from __future__ import annotations

import io
import json
import os
import re
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qaic_ray.errors import QaicRayError, UsageError
from qaic_ray.formats import lines
from qaic_ray.formats.prompts import (
    prompts_from_file,
    prompts_from_text,
    split_prompts,
)
from qaic_ray.option_types import PromptFormat
from qaic_ray.rows import Prompt, Row
from qaic_ray.sampling_params import FIELDS, SamplingParams

TEXTS = st.text(st.characters(exclude_categories=("Cs",)) | st.sampled_from("|\\\n \"'"))


def escaped(text: str) -> str:
    """A prompt as a user must write it to have it between two pipes."""
    before_pipe = re.sub(r"(\\*)\|", lambda run: run[1] * 2 + r"\|", text)
    return re.sub(r"(\\+)\Z", lambda run: run[1] * 2, before_pipe)


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


# -- --prompt


@pytest.mark.parametrize(
    ("argument", "prompts"),
    [
        ("My name is|The capital of France is", ["My name is", "The capital of France is"]),
        ("one", ["one"]),
        ("", [""]),
        ("|", ["", ""]),
        ("a||b", ["a", "", "b"]),
        (r"a\|b", ["a|b"]),
        (r"a\\|b", ["a\\", "b"]),
        (r"a\\\|b", [r"a\|b"]),
        (r"a\\\\|b", [r"a\\", "b"]),
        (r"\|", ["|"]),
        (r"\|\||\|", ["||", "|"]),
        (r"C:\new|\d+\s", [r"C:\new", r"\d+\s"]),
        (r"ends in \ ", [r"ends in \ "]),
        ("ends in \\\\", ["ends in \\\\"]),
        ("  two spaces  | one", ["  two spaces  ", " one"]),
        ("line\nline|\t\r\n", ["line\nline", "\t\r\n"]),
        ("\"quoted\"|'it''s'", ['"quoted"', "'it''s'"]),
        ("naïve 東京 🐈|e\u0301\u200b\u2028", ["naïve 東京 🐈", "e\u0301\u200b\u2028"]),
    ],
)
def test_split(argument: str, prompts: list[str]) -> None:
    assert split_prompts(argument) == prompts


@given(st.lists(TEXTS, min_size=1, max_size=5))
def test_any_list_of_prompts_can_be_written(prompts: list[str]) -> None:
    # The last piece has no pipe behind it, so its closing backslashes are themselves.
    *others, last = prompts
    argument = "|".join([*map(escaped, others), re.sub(r"(\\+)\Z", "", escaped(last))])
    last_backslashes = re.search(r"(\\*)\Z", last)
    assert last_backslashes is not None
    assert split_prompts(argument + last_backslashes[1]) == prompts


def test_many_backslashes_take_no_time() -> None:
    assert split_prompts("\\" * 200_000 + "x") == ["\\" * 200_000 + "x"]


def test_an_empty_piece_is_an_error_row_in_its_place() -> None:
    first, second, third = prompts_from_text("a|| ")
    assert first == Prompt(0, "a")
    assert isinstance(second, Row)
    assert (second.index, second.ok, second.error) == (1, False, "The prompt is empty.")
    assert second.attempts == 0
    assert third == Prompt(2, " ")


def test_an_argument_that_was_not_utf8_is_an_error_row_that_can_be_written() -> None:
    (row,) = prompts_from_text(b"caf\xe9".decode("utf-8", "surrogateescape"))
    assert isinstance(row, Row)
    assert row.prompt == "caf?"
    json.dumps(row.to_json(), ensure_ascii=False).encode()


# -- text files


def test_text_lines_lose_their_line_end_and_nothing_else(tmp_path: Path) -> None:
    path = write(tmp_path / "p.txt", "a \r\n  b\n\tc\rd\u2028e\u0085f\x0bg\n|x".encode())
    assert list(prompts_from_file(path)) == [
        Prompt(0, "a "),
        Prompt(1, "  b"),
        Prompt(2, "\tc\rd\u2028e\u0085f\x0bg"),
        Prompt(3, "|x"),
    ]


@given(
    st.lists(
        TEXTS.filter(lambda t: "\n" not in t and "\r" not in t and "\0" not in t and t),
        min_size=1,
        max_size=6,
    )
)
def test_a_text_file_gives_back_what_was_written(prompts: list[str]) -> None:
    # hypothesis runs this many times, so the file is stdin.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("\n".join(prompts).encode())))
        bom = prompts[0].startswith("\ufeff")
        expected = [prompts[0][1:], *prompts[1:]] if bom else prompts
        read = prompts_from_file("-", PromptFormat.TEXT)
        assert [getattr(p, "text", "") for p in read] == expected


@pytest.mark.parametrize("end", [b"", b"\n", b"\r\n"])
def test_a_final_newline_begins_no_prompt(tmp_path: Path, end: bytes) -> None:
    assert list(prompts_from_file(write(tmp_path / "p", b"a\nb" + end))) == [
        Prompt(0, "a"),
        Prompt(1, "b"),
    ]


def test_an_empty_file_says_so_at_once(tmp_path: Path) -> None:
    for name in ("p", "p.txt", "p.jsonl", "p.csv"):
        with pytest.raises(UsageError, match=rf"There is nothing in {name}: give prompts."):
            prompts_from_file(write(tmp_path / name, b""))


def test_an_empty_line_is_an_error_row(tmp_path: Path) -> None:
    _, row, last = prompts_from_file(write(tmp_path / "p", b"a\n\nb\n"))
    assert isinstance(row, Row)
    assert (row.index, row.error) == (1, "p line 2: The prompt is empty.")
    assert last == Prompt(2, "b")


def test_a_byte_order_mark_is_no_part_of_the_first_prompt(tmp_path: Path) -> None:
    assert list(prompts_from_file(write(tmp_path / "p", b"\xef\xbb\xbfa\n\xef\xbb\xbfb"))) == [
        Prompt(0, "a"),
        Prompt(1, "\ufeffb"),
    ]


def test_a_line_that_is_not_utf8_stops_no_other(tmp_path: Path) -> None:
    first, row, last = prompts_from_file(write(tmp_path / "p", b"a\ncaf\xe9\nb"))
    assert (first, last) == (Prompt(0, "a"), Prompt(2, "b"))
    assert isinstance(row, Row)
    assert (row.prompt, row.error) == ("caf\ufffd", "p line 2: Not UTF-8: byte 4 is 0xe9.")


def test_lines_are_read_when_they_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    reading, writing = os.pipe()
    with open(reading, "rb") as terminal, open(writing, "wb", buffering=0) as keyboard:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(terminal))
        prompts = prompts_from_file("-")
        for index, text in enumerate(["a", "again", "b"]):
            keyboard.write(text.encode() + b"\n")
            assert next(prompts) == Prompt(index, text)


def test_a_line_without_end_is_an_error_row_and_does_not_fill_the_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit = 2**20
    monkeypatch.setattr(lines, "MAX_LINE_BYTES", limit)
    allowed = b"x" * limit
    data = b"\n".join([b"a", allowed, allowed + b"x\r", b"b", allowed * 2])
    path = write(tmp_path / "p", data)
    first, longest, long, second, last = prompts_from_file(path)
    assert (first, second) == (Prompt(0, "a"), Prompt(3, "b"))
    assert isinstance(longest, Prompt)
    assert len(longest.text) == limit
    assert isinstance(long, Row)
    assert isinstance(last, Row)
    assert long.error == "p line 3: The line is longer than 1 MiB."
    assert (last.index, len(last.prompt)) == (4, 2**16)


# -- JSONL


def test_jsonl_has_prompts_and_ids(tmp_path: Path) -> None:
    path = write(
        tmp_path / "p.JSONL",
        b'{"prompt": " a\\n\\u6771 |", "id": "x", "answer": [1]}\r\n{"id": 7, "prompt": "b"}\n'
        b'{"prompt": "c", "id": null}',
    )
    assert list(prompts_from_file(path)) == [
        Prompt(0, " a\n東 |", "x"),
        Prompt(1, "b", "7"),
        Prompt(2, "c"),
    ]


@pytest.mark.parametrize(
    ("line", "error"),
    [
        (b"", "The line is empty."),
        (b"   ", "The line is empty."),
        (b'{"prompt": "a"', "Not JSON: Expecting ',' delimiter at character 15."),
        (b"hello", "Not JSON: Expecting value at character 1."),
        (b'{"prompt": "a"} {"prompt": "b"}', "Not JSON: Extra data at character 17."),
        (b'{"prompt": "\xff"}', "Not UTF-8: byte 13 is 0xff."),
        (b'"prompt"', 'Not a JSON object: write {"prompt": "..."}.'),
        (b"[]", 'Not a JSON object: write {"prompt": "..."}.'),
        (b"null", 'Not a JSON object: write {"prompt": "..."}.'),
        (b'{"text": "a"}', 'There is no "prompt" and no "messages" in it.'),
        (b'{"prompt": null}', '"prompt" is null, not a string.'),
        (b'{"prompt": ["a", "b"]}', '"prompt" is a list: give each of its texts a row of its own.'),
        (b'{"prompt": [1, 2]}', '"prompt" is a list: give each'),
        (b'{"prompt": "a", "prompt": "b"}', 'It has "prompt" twice: keep one of them.'),
        (b'{"prompt": 1.5}', '"prompt" is a number, not a string.'),
        (b'{"prompt": "a", "id": true}', '"id" is a boolean, not a string or a whole number.'),
        (b'{"prompt": "a", "id": {}}', '"id" is an object, not a string or a whole number.'),
        (b'{"prompt": "a", "id": 1.5}', '"id" is a number, not a string or a whole number.'),
        (b'{"prompt": "a", "id": NaN}', '"id" is a number, not a string or a whole number.'),
        (b'{"prompt": "a", "id": 1e300}', '"id" is a number, not a string or a whole number.'),
        (b'{"prompt": "a", "id": "\\ud800"}', "The id holds half of a surrogate pair"),
        (b'{"prompt": "\\ud83d"}', "The prompt holds half of a surrogate pair"),
        (b'{"prompt": ""}', "The prompt is empty."),
        (b'{"prompt": "a", "messages": []}', 'It has both "prompt" and "messages"'),
        (b'{"messages": "a"}', '"messages" is a string, not a list.'),
        (b'{"messages": []}', '"messages" is an empty list.'),
        (b'{"messages": ["a"]}', "Message 1 is a string, not an object"),
        (b'{"messages": [{"content": "a"}]}', 'Message 1: "role" is null, not a string.'),
        (b'{"messages": [{"role": "user"}]}', 'Message 1: "content" is null, not a string.'),
        (b'{"messages": [{"role": "user", "content": "\\ud83d"}]}', "The message 1 holds half"),
        (
            b'{"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}',
            "Message 1: a part of its",
        ),
        (
            b'{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b",'
            b' "tool_calls": [1]}]}',
            'Message 2 has "tool_calls"',
        ),
        (b'{"prompt": "a", "temperature": "1"}', "temperature is '1'; allowed is a number"),
        (b'{"prompt": "a", "max_tokens": 0}', "max_tokens is 0; allowed is a whole number from 1"),
        (b'{"prompt": "a", "n": 2}', "n is 2; allowed is 1 with temperature 0"),
        (b'{"prompt": "a", "temprature": 1}', 'Unknown sampling field "temprature": write "temp'),
        (b'{"prompt": "a", "topK": 1}', 'Unknown sampling field "topK": write "top_k"'),
        (
            b'{"prompt": "a", "maxNewTokens": 1}',
            'Unknown sampling field "maxNewTokens": write "max_to',
        ),
        (b'{"prompt": ' + b"9" * 5000 + b"}", "Not JSON that can be read: "),
        (b"[" * 100_000, "Not JSON that can be read: "),
    ],
    ids=lambda value: str(value[:24]),
)
def test_a_malformed_line_is_an_error_row_with_its_number(
    tmp_path: Path, line: bytes, error: str
) -> None:
    path = write(tmp_path / "p.jsonl", b'{"prompt": "a"}\n' + line + b'\n{"prompt": "b"}\n')
    first, row, last = prompts_from_file(path)
    assert (first, last) == (Prompt(0, "a"), Prompt(2, "b"))
    assert isinstance(row, Row)
    assert not row.ok
    assert row.index == 1
    assert row.error is not None
    assert row.error.startswith(f"p.jsonl line 2: {error}")
    json.dumps(row.to_json(), ensure_ascii=False).encode()


def test_a_conversation_is_read_and_its_row_shows_what_the_user_said_last(tmp_path: Path) -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        {
            "role": "user",
            "content": [{"type": "text", "text": "東"}, {"type": "text", "text": "京"}],
        },
        {"role": "assistant", "content": "", "refusal": None},
    ]
    lines = [
        {"messages": messages, "id": 3},
        {"messages": messages[:1], "prompt": None},
        {"messages": [{**messages[0], "role": 1}], "id": 4},
        {"messages": messages, "id": 5, "seed": -1},
    ]
    path = write(tmp_path / "p.jsonl", "\n".join(map(json.dumps, lines)).encode())
    first, second, third, fourth = prompts_from_file(path)
    assert first == Prompt(
        0,
        "東京",
        "3",
        (
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "東京"},
            {"role": "assistant", "content": ""},
        ),
    )
    assert isinstance(second, Prompt)
    assert second.text == "Be brief."
    assert isinstance(third, Row)
    assert third.error == 'p.jsonl line 3: Message 1: "role" is a number, not a string.'
    assert isinstance(fourth, Row)
    assert (fourth.id, fourth.prompt, fourth.messages) == ("5", "東京", first.messages)


def test_fields_of_a_row_go_before_those_of_the_run(tmp_path: Path) -> None:
    lines = (
        b'{"prompt": "a", "seed": 3, "stop": "\\n", "max_completion_tokens": 5, "top_p": null}\n'
        b'{"prompt": "b"}\n{"prompt": "c", "temperature": null}'
    )
    run = SamplingParams(temperature=0.5, top_p=0.9, max_tokens=9)
    first, *others = prompts_from_file(write(tmp_path / "p.jsonl", lines), sampling=run)
    own = SamplingParams(temperature=0.5, top_p=0.9, max_tokens=5, seed=3, stop=("\n",))
    assert first == Prompt(0, "a", sampling=own)
    assert others == [Prompt(1, "b"), Prompt(2, "c")]


def test_keys_of_the_users_own_are_not_looked_at(tmp_path: Path) -> None:
    # Those of our own outputs too, so that a run's answers can be a run's prompts.
    names = [
        *("answer", "category", "question", "topic", "step", "tokens", "text", "temp", "model"),
        *("index", "token_ids", "finish_reason", "stop_reason", "prompt_tokens", "ttft_s"),
        *("generated_tokens", "decode_s", "worker", "attempts", "choices", "source", "language"),
        *("queue_s", "started_at", "ended_at"),
    ]
    assert not set(names) & set(FIELDS)
    line = json.dumps({"prompt": "a"} | {name: [{"x": 1}] for name in names})
    assert list(prompts_from_file(write(tmp_path / "p.jsonl", line.encode()))) == [Prompt(0, "a")]


def test_an_error_row_keeps_the_id(tmp_path: Path) -> None:
    (row,) = prompts_from_file(write(tmp_path / "p.jsonl", b'{"prompt": "", "id": "x"}'))
    assert isinstance(row, Row)
    assert (row.id, row.prompt) == ("x", "")


def test_the_format_can_be_said(tmp_path: Path) -> None:
    line = b'{"prompt": "a"}'
    path = write(tmp_path / "p.txt", line)
    assert list(prompts_from_file(path)) == [Prompt(0, line.decode())]
    assert list(prompts_from_file(path, PromptFormat.JSONL)) == [Prompt(0, "a")]


# -- files that are none


def test_no_such_file_is_said_at_once(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"There is no prompts file .*p\.txt\."):
        prompts_from_file(tmp_path / "p.txt")


def test_a_folder_is_said_at_once(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is a folder"):
        prompts_from_file(tmp_path)


def test_a_prompt_given_as_a_file_name_is_no_crash() -> None:
    with pytest.raises(UsageError, match="There is no prompts file"):
        prompts_from_file("The capital of France is " * 500)


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_a_file_that_may_not_be_read_is_said_at_once(tmp_path: Path) -> None:
    path = write(tmp_path / "p", b"a")
    path.chmod(0)
    with pytest.raises(UsageError, match="permissions"):
        prompts_from_file(path)


def test_a_file_that_goes_away_is_one_sentence(tmp_path: Path) -> None:
    path = write(tmp_path / "p", b"a")
    prompts = prompts_from_file(path)
    path.unlink()
    with pytest.raises(QaicRayError, match="cannot be read: No such file"):
        next(prompts)
