"""Documents of strangers: the type that was asked for, or one sentence that names the file."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, ConfigDict, Field

from qaic_ray.errors import CheckpointError, UsageError
from qaic_ray.files.documents import (
    MAX_SHOWN_CHARS,
    checked,
    json_text,
    parse_json,
    parse_yaml,
    read_object,
    read_text,
    read_yaml,
    shown,
    user_path,
)

BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{name}: &{name} [{','.join([f'*{before}'] * 9)}]\n"
    for before, name in zip("abcdefghi", "bcdefghij", strict=True)
)


def file(tmp_path: Path, content: bytes) -> Path:
    path = tmp_path / "document"
    path.write_bytes(content)
    return path


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is not JSON"),
        (b"\xff\xfe{\x00}\x00", "is UTF-16"),
        (b'{"a": "\xff"}', "is not UTF-8: byte 7 is 0xff"),
        (b"[" * 100_000, "nested too deep"),
        (b"9" * 5_000, "is not JSON"),
        (b'{"a": 1', "is not JSON"),
        (b"[]", "must hold a JSON object"),
        (b"null", "must hold a JSON object"),
    ],
)
def test_json_that_no_parser_can_read(tmp_path: Path, content: bytes, words: str) -> None:
    path = file(tmp_path, content)
    with pytest.raises(CheckpointError) as caught:
        read_object(path, raises=CheckpointError)
    assert str(path) in str(caught.value)
    assert words in str(caught.value)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"a: [" * 3_000, "nested too deep"),
        (b"a: " + b"9" * 5_000, "is not YAML"),
        (b"a: 1\na: 2\n", "'a' is given twice"),
        (b"a: !!python/object/apply:os.system [true]\n", "is not YAML"),
        (b"a: \x00\n", "is not YAML"),
        (BOMB.encode(), "aliases"),
        (b"a: &a [*a]\n", "aliases"),
        (b"? [a, {b: c}]\n: d\n", "is not YAML"),
    ],
)
def test_yaml_that_no_parser_can_read(tmp_path: Path, content: bytes, words: str) -> None:
    path = file(tmp_path, content)
    with pytest.raises(UsageError) as caught:
        read_yaml(path)
    assert str(path) in str(caught.value)
    assert words in str(caught.value)
    assert len(str(caught.value)) < 500


def test_yaml_dates_are_text_and_merged_keys_may_be_given_anew() -> None:
    text = "base: &base {a: 1, b: 2}\nown:\n  <<: *base\n  a: 3\nday: 2020-13-45\n"
    assert parse_yaml(text, "x") == {
        "base": {"a": 1, "b": 2},
        "own": {"a": 3, "b": 2},
        "day": "2020-13-45",
    }


def test_a_byte_order_mark_is_no_character(tmp_path: Path) -> None:
    assert read_object(file(tmp_path, b'\xef\xbb\xbf{"a": 1}')) == {"a": 1}


def test_what_is_no_file_is_said(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe", tmp_path / "absent", tmp_path / ("x" * 5_000)):
        with pytest.raises(UsageError):
            read_text(path)


def test_what_is_too_long_is_not_read(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="more than"):
        read_text(file(tmp_path, b"x" * (2**20 + 1)), max_bytes=2**20)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("misprint.yaml", "; did you mean {0}/misprints.yaml?"),
        ("misprints.yml", "; did you mean {0}/misprints.yaml?"),
        ("a.yaml", ": check its path."),  # what all suffixes have in common is no near word
        ("none/a.yaml", ", since there is no folder {0}/none."),
        ("link", "{0}/link is a link to 'gone', which is not there."),
    ],
)
def test_a_file_that_is_not_there(tmp_path: Path, name: str, words: str) -> None:
    (tmp_path / "misprints.yaml").write_text("a: 1")
    (tmp_path / "link").symlink_to("gone")
    with pytest.raises(UsageError) as caught:
        read_yaml(tmp_path / name)
    assert str(caught.value).endswith(words.format(tmp_path))
    with pytest.raises(UsageError, match=r"no file .*b\.txt: `make it` makes one\.$"):
        read_text(tmp_path / "b.txt", makes="make it")


class Inner(BaseModel):
    """Fields of each kind that a document can have wrong."""

    model_config = ConfigDict(extra="forbid")

    number: int = 0
    share: float = 0.0
    flag: bool = False
    text: str = ""
    word: Literal["a", "b"] = "a"
    few: Annotated[list[int], Field(max_length=2)] = []
    names: dict[str, int] = {}
    inner: dict[str, Inner] = {}


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(st.sampled_from([*Inner.model_fields, "other"]), inner)
        ),
    )
)
def test_no_word_of_pydantic_reaches_anybody(value: Any) -> None:
    try:
        checked(Inner, value, "x")
    except UsageError as error:
        said = str(error)
        assert said.startswith("x: ")
        assert said.endswith(".")
        for word in ("Input", "should", "valid", "Field required", "Extra", "given: "):
            assert word not in said.partition("not '")[0].partition("key '")[0]


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ({"few": [1, "x"]}, "few[1]: must be a whole number, not 'x'."),
        ({"few": [1, 2, 3]}, "few: must be at most 2 long, not [1, 2, 3]."),
        ({"inner": {"a": {"names": [1]}}}, "inner.a.names: must be an object, not [1]."),
        ({"flag": "x"}, "flag: must be true or false, not 'x'."),
        ({"share": "x"}, "share: must be a number, not 'x'."),
        ({"text": 3}, "text: must be a text, not 3."),
        ({"word": 3}, "word: must be 'a' or 'b', not 3."),
        ({"other": 3}, "there is no key 'other' here: leave it out."),
        ([3], "must be an object, not [3]."),
    ],
)
def test_what_a_value_must_be_is_said(value: Any, words: str) -> None:
    with pytest.raises(UsageError) as caught:
        checked(Inner, value, "x")
    assert str(caught.value) == f"x: {words}"


@pytest.mark.parametrize("text", ["a\0b", "x" * 5_000, "~nosuchuser/x", "\ud800"])
def test_what_is_no_path(text: str) -> None:
    with pytest.raises(UsageError, match=r"^--output is .* no path"):
        user_path(text, "--output")


def test_a_path_of_the_user(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert user_path("~/x", "--output") == tmp_path / "x"


def test_checked_names_key_and_value() -> None:
    assert checked(dict[str, int], {"a": 1}, "x") == {"a": 1}
    with pytest.raises(UsageError, match=r"^x: a: must be a whole number, not 'one'\.$"):
        checked(dict[str, int], {"a": "one"}, "x")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


@given(JSON)
def test_what_json_wrote_is_read(value: Any) -> None:
    text = json.dumps(value)
    assert json.dumps(parse_json(text, "x")) == text


@given(JSON)
def test_what_we_write_is_json_for_every_reader(value: Any) -> None:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    text = json_text(value)
    assert "\n" not in text
    read = json.loads(text, parse_constant=refuse)
    if all(map(math.isfinite, floats_of(value))):
        assert read == value
    else:
        assert "null" in text


def floats_of(value: Any) -> Iterator[float]:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        for inner in value:
            yield from floats_of(inner)
    elif isinstance(value, float):
        yield value


@given(JSON | st.integers(10**5_000, 10**5_001))
def test_what_is_shown_is_a_short_line(value: Any) -> None:
    text = shown(value)
    assert len(text) <= MAX_SHOWN_CHARS + 3
    assert "\n" not in text


@given(st.text())
def test_any_text_is_yaml_or_one_sentence(text: str) -> None:
    said = ""
    try:
        parse_yaml(text, "x")
    except UsageError as error:
        said = str(error)
    assert "\n" not in said
