"""Prompts files as they come: packed, cut short, of any name, and with thousands of bad rows."""

from __future__ import annotations

import gzip
import io
import json
import os
import random
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pytest
from awaited import joined
from hypothesis import given
from hypothesis import strategies as st

from qaic_ray.errors import QaicRayError, UsageError
from qaic_ray.formats.prompts import prompts_from_file
from qaic_ray.option_types import PromptFormat
from qaic_ray.rows import Prompt, Row

LINES = "".join(f"prompt {index}\n" for index in range(3000)).encode()
PROMPTS = [Prompt(index, f"prompt {index}") for index in range(3000)]


def zstd(data: bytes) -> bytes:
    packed: bytes = pyarrow.compress(data, codec="zstd", asbytes=True)
    return packed


Pack = Callable[[bytes], bytes]
PACKERS: list[Pack] = [gzip.compress, zstd]


def from_stdin(data: bytes, prompt_format: PromptFormat | None = None) -> list[Prompt | Row]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
        return list(prompts_from_file("-", prompt_format))


# -- packed


@pytest.mark.parametrize("pack", PACKERS)
def test_packed_lines_are_read_whatever_the_name(pack: Pack, tmp_path: Path) -> None:
    for data in (pack(LINES), pack(LINES[:1001]) + pack(LINES[1001:])):
        path = tmp_path / "p.txt"
        path.write_bytes(data)
        assert list(prompts_from_file(path)) == PROMPTS
        assert from_stdin(data) == PROMPTS


@pytest.mark.parametrize("pack", PACKERS)
@pytest.mark.parametrize("harm", ["cut", "overwritten", "more"])
def test_damage_in_packed_lines_ends_with_one_sentence_after_the_rows_before_it(
    pack: Pack, harm: str, tmp_path: Path
) -> None:
    noise = random.Random(0).randbytes(200_000).hex().encode()
    packed = pack(LINES) + pack(noise)
    path = tmp_path / "p.gz"
    if harm == "cut":
        path.write_bytes(packed[:-1000])
    elif harm == "overwritten":
        path.write_bytes(packed[:-100_000] + b"\xff" * 100_000)
    else:
        path.write_bytes(pack(LINES) + b"not packed at all")
    read: list[Prompt | Row] = []
    items = map(read.append, prompts_from_file(path))
    with pytest.raises(QaicRayError, match=r"p\.gz cannot be read past line \d+: .+[^.]\.$"):
        list(items)
    # A packed stream is read in blocks, and that with the damage gives nothing.
    assert read == PROMPTS[: len(read)]
    assert len(read) > len(PROMPTS) - 500


# -- which format


REQUEST = b'{"custom_id": "x", "method": "POST", "url": "/v1/completions", "body": {"prompt": "a"}}'


@pytest.mark.parametrize(
    ("name", "line", "expected"),
    [
        ("p.txt", b'{"prompt": "a"}', Prompt(0, '{"prompt": "a"}')),
        ("p.TXT.gz", b'{"prompt": "a"}', Prompt(0, '{"prompt": "a"}')),
        ("p.jsonl.zst", b'{"prompt": "a"}', Prompt(0, "a")),
        ("p.ndjson", b'{"prompt": "a"}', Prompt(0, "a")),
        ("p", b'{"prompt": "a"}', Prompt(0, "a")),
        ("p", b'{"messages": "a"}', "p line 1: "),
        ("p", b'{"answer": "a"}', 'p line 1: There is no "prompt"'),
        ("p", b'{"prompt": "a"', "p line 1: Not JSON: "),
        ("p", b"{name}, hello", Prompt(0, "{name}, hello")),
        ("p", b"[INST] a [/INST]", Prompt(0, "[INST] a [/INST]")),
        ("p", b"[1]", Prompt(0, "[1]")),
        ("p", REQUEST, Prompt(0, "a", "x")),
        ("p.jsonl", REQUEST, Prompt(0, "a", "x")),
        ("p.jsonl", b"[1]", "p.jsonl line 1: Not a JSON object"),
    ],
)
def test_the_format_is_known_by_the_name_and_then_by_the_first_line(
    tmp_path: Path, name: str, line: bytes, expected: Prompt | str
) -> None:
    path = tmp_path / name
    path.write_bytes(line + b"\n")
    (item,) = prompts_from_file(path)
    if isinstance(expected, str):
        assert isinstance(item, Row)
        assert str(item.error).startswith(expected)
    else:
        assert item == expected


def test_a_pipe_is_read_once(tmp_path: Path) -> None:
    path = tmp_path / "pipe"
    os.mkfifo(path)
    writer = threading.Thread(target=path.write_bytes, args=(REQUEST,))
    writer.start()
    assert list(prompts_from_file(path)) == [Prompt(0, "a", "x")]
    joined(writer)


def test_parquet_that_is_no_file_is_one_sentence() -> None:
    for data, prompt_format in ((b"PAR1...", None), (b"a", PromptFormat.PARQUET)):
        with pytest.raises(UsageError, match="stdin are parquet in a stream"):
            from_stdin(data, prompt_format)


# -- what goes in comes out


TEXTS = st.text(st.characters(exclude_categories=("Cs",)), min_size=1)


@given(
    st.lists(
        st.fixed_dictionaries({"prompt": TEXTS}, optional={"id": TEXTS, "mine": st.integers()}),
        min_size=1,
    ),
    st.booleans(),
    st.sampled_from([bytes, gzip.compress, zstd]),
)
def test_any_rows_of_jsonl_come_out_as_they_went_in(
    rows: list[dict[str, str]], ascii_only: bool, pack: Pack
) -> None:
    lines = "\n".join(json.dumps(row, ensure_ascii=ascii_only) for row in rows)
    expected = [Prompt(i, row["prompt"], row.get("id")) for i, row in enumerate(rows)]
    assert from_stdin(pack(lines.encode()), PromptFormat.JSONL) == expected


# -- thousands of malformed rows

TEXT_KINDS = [
    (b"", "The prompt is empty."),
    (b"caf\xe9 au lait", "Not UTF-8: byte 4 is 0xe9."),
    (b"\xff\xfea\x00", "Not UTF-8: byte 1 is 0xff."),
    (b"\xed\xa0\x80", "Not UTF-8: byte 1 is 0xed."),
]

JSONL_KINDS = [
    (b"", "The line is empty."),
    (b" \t ", "The line is empty."),
    (b"\x00\x00", "Not JSON: "),
    (b"a prompt", "Not JSON: Expecting value at character 1."),
    (b'{"prompt": "a"', "Not JSON: "),
    (b'{"prompt": "a",}', "Not JSON: "),
    (b"{'prompt': 'a'}", "Not JSON: "),
    (b'{"prompt": "a"}{"prompt": "b"}', "Not JSON: Extra data"),
    (b'{"prompt": "a\tb"}', "Not JSON: Invalid control character"),
    (b'{"prompt": "\\x"}', "Not JSON: Invalid \\escape"),
    (b'{"prompt": "\xe9"}', "Not UTF-8: byte 13 is 0xe9."),
    (b'{"prompt": "\\udc00"}', "The prompt holds half of a surrogate pair"),
    (b'{"prompt": ' + b"9" * 5000 + b"}", "Not JSON that can be read"),
    (b"[]", "Not a JSON object"),
    (b"NaN", "Not a JSON object"),
    (b"{}", 'There is no "prompt"'),
    (b'{"prompt": null}', '"prompt" is null'),
    (b'{"prompt": []}', '"prompt" is a list'),
    (b'{"prompt": "a", "mine": {"b": 1, "b": 2}}', 'It has "b" twice'),
    (b'{"prompt": ""}', "The prompt is empty."),
    (b'{"prompt": "a", "id": [1]}', '"id" is a list'),
    (b'{"prompt": "a", "messages": [{}]}', "It has both"),
    (b'{"messages": {}}', '"messages" is an object'),
    (b'{"messages": []}', '"messages" is an empty list'),
    (b'{"messages": [{"role": 1, "content": "a"}]}', 'Message 1: "role" is a number'),
    (b'{"messages": [{"role": "user", "content": [{"type": "x"}]}]}', "Message 1: a part"),
    (b'{"messages": [{"role": "user", "content": "a", "\\udc00": 1}]}', 'Message 1 has "?"'),
    (b'{"prompt": "a", "temperature": NaN}', "temperature is nan"),
    (b'{"prompt": "a", "max_tokens": true}', "max_tokens is True"),
    (b'{"prompt": "a", "seed": -1}', "seed is -1"),
    (b'{"prompt": "a", "stop": [""]}', "stop is ('',)"),
    (b'{"prompt": "a", "temprature": 1}', 'Unknown sampling field "temprature"'),
    (b'{"prompt": "a", "logit_bias": {"1": 101}}', "logit_bias is ((1, 101"),
]


def request(body: bytes, *, url: bytes = b"/v1/chat/completions") -> bytes:
    return b'{"custom_id": "#", "method": "POST", "url": "%s", "body": %s}' % (url, body)


def asking(field: bytes) -> bytes:
    return request(b'{"messages": [{"role": "user", "content": "a"}], %s}' % field)


REQUEST_KINDS = [
    (b'{"custom_id": "#"', "Not JSON: "),
    (b'["#"]', "Not a JSON object"),
    (b'{"body": {"prompt": "a"}}', 'There is no "custom_id"'),
    (b'{"custom_id": 7, "body": {}}', '"custom_id" is a number'),
    (b'{"custom_id": "", "body": {}}', '"custom_id" is empty'),
    (b'{"custom_id": "\\ud800", "body": {}}', "The custom_id holds half"),
    (
        b'{"custom_id": "good 0", "body": {}}',
        '"custom_id" is "good 0", and so is that of an earlier line',
    ),
    (b'{"custom_id": "#"}', '"method" is null'),
    (b'{"custom_id": "#", "method": "GET"}', '"method" is "GET"; allowed is "POST".'),
    (b'{"custom_id": "#", "method": "POST", "body": {}}', '"url" is null; allowed are'),
    (request(b"{}", url=b"/v1/embeddings"), '"url" is "/v1/embeddings"; allowed are'),
    (b'{"custom_id": "#", "method": "POST", "url": "/v1/completions"}', '"body" is null'),
    (request(b'"a"'), '"body" is a string, not an object'),
    (request(b"{}"), 'There is no "messages" in the body'),
    (request(b'{"prompt": "a"}'), 'There is no "messages" in the body'),
    (request(b'{"messages": []}', url=b"/v1/completions"), 'There is no "prompt" in the body'),
    (request(b'{"prompt": [1, 2]}', url=b"/v1/completions"), '"prompt" is a list'),
    (request(b'{"prompt": ""}', url=b"/v1/completions"), "The prompt is empty"),
    (asking(b'"prompt": "a"'), "It has both"),
    (asking(b'"model": 4'), '"model" is a number'),
    (asking(b'"model": "other"'), '"model" is "other", and that of the lines before is "mine"'),
    (asking(b'"stream": true'), '"stream" is not offered'),
    (asking(b'"logit_bias": {"50256": -101}'), "logit_bias is ((50256, -101"),
    (asking(b'"tools": [{}]'), '"tools" is not offered'),
    (asking(b'"best_of": 2'), '"best_of" is not offered'),
    (asking(b'"response_format": {"type": "xml"}'), "response_format is an object"),
    (asking(b'"reasoning_effort": "low"'), '"reasoning_effort" is not offered'),
    (asking(b'"temprature": 1'), 'Unknown sampling field "temprature"'),
    (asking(b'"logprobs": 3'), '"logprobs" is a number, not true or false'),
    (asking(b'"top_logprobs": 3'), '"top_logprobs" needs "logprobs": true'),
    (asking(b'"logprobs": true, "top_logprobs": 21'), "logprobs is 21"),
    (asking(b'"max_tokens": 0'), "max_tokens is 0"),
    (asking(b'"max_tokens": 1, "max_completion_tokens": 2'), "max_tokens and max_completion"),
    (asking(b'"n": 2'), "n is 2; allowed is 1 with temperature 0"),
]

GOOD_REQUEST = (
    b'{"custom_id": "good %d", "method": "POST", "url": "/v1/completions", "body": '
    b'{"model": "mine", "prompt": "prompt %d"}}'
)


@pytest.mark.parametrize(
    ("name", "num_malformed", "kinds", "good"),
    [
        ("p.txt", 1000, TEXT_KINDS, b"prompt %d"),
        ("p.jsonl", 4500, JSONL_KINDS, b'{"id": "good %d", "prompt": "prompt %d"}'),
        ("p.jsonl", 4500, REQUEST_KINDS, GOOD_REQUEST),
    ],
    ids=["text", "jsonl", "openai"],
)
def test_ten_thousand_malformed_rows_are_error_rows_and_hurt_no_other(
    tmp_path: Path, name: str, num_malformed: int, kinds: list[tuple[bytes, str]], good: bytes
) -> None:
    chance = random.Random(name)
    lines: list[tuple[bytes, str | None]] = [(good.replace(b"%d", b"0"), None)]
    for number in range(num_malformed):
        lines += [(good.replace(b"%d", b"%d" % len(lines)), None)] * chance.randrange(2)
        line, error = kinds[number % len(kinds)]
        lines.append((line.replace(b"#", b"bad %d" % number), error))
    path = tmp_path / name
    path.write_bytes(b"\n".join(line for line, _ in lines) + b"\n")

    items = list(prompts_from_file(path))
    assert len(items) == len(lines)
    for index, (item, (line, error)) in enumerate(zip(items, lines, strict=True)):
        assert item.index == index
        if error is None:
            id_ = None if name == "p.txt" else f"good {index}"
            assert item == Prompt(index, f"prompt {index}", id_)
        else:
            assert isinstance(item, Row), line
            assert str(item.error).startswith(f"{name} line {index + 1}: {error}"), line
            json.dumps(item.to_json(), ensure_ascii=False).encode()
    assert sum(isinstance(item, Row) for item in items) == num_malformed
