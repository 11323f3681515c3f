"""Which files an input names: folders, globs and lists of them, on this machine."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from qaic_ray.errors import UsageError
from qaic_ray.formats.inputs.named_files import (
    _pattern,
    is_plain_file,
    is_stream,
    named_files,
)

LAID = [
    "b.jsonl", "a.jsonl.gz", "_SUCCESS", ".hidden.jsonl", "notes.md", "part-00000",
    "dt=1/p.parquet", "dt=1/_temporary/0/q.parquet", "dt=2/p.parquet", "dt=2/deep/z.csv",
    "other/p[1].txt",
]  # fmt: skip


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in LAID:
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).write_text("x\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def paths(*given: str, any_name: bool = False) -> list[str]:
    return [file.path for file in named_files(given, any_name=any_name)]


@pytest.mark.parametrize(
    ("given", "found"),
    [
        (
            ["in"],
            ["in/a.jsonl.gz", "in/b.jsonl", "in/dt=1/p.parquet", "in/dt=2/deep/z.csv",
             "in/dt=2/p.parquet", "in/other/p[1].txt", "in/part-00000"],
        ),
        (["in/*.jsonl*"], ["in/a.jsonl.gz", "in/b.jsonl"]),
        (["in/dt=*"], ["in/dt=1/p.parquet", "in/dt=2/deep/z.csv", "in/dt=2/p.parquet"]),
        (["in/**/*.parquet"], ["in/dt=1/p.parquet", "in/dt=2/p.parquet"]),
        (["in/b.jsonl", "in/a.jsonl.gz"], ["in/b.jsonl", "in/a.jsonl.gz"]),
        (["in/other/p[1].txt"], ["in/other/p[1].txt"]),
        (["in/.hidden.jsonl"], ["in/.hidden.jsonl"]),
        (["in/.*.jsonl"], ["in/.hidden.jsonl"]),
        (["in/dt=1/_temporary/0/*"], ["in/dt=1/_temporary/0/q.parquet"]),
        (["in/notes.md", "in/dt=1"], ["in/notes.md", "in/dt=1/p.parquet"]),
    ],
)  # fmt: skip
def test_files_come_as_given_and_by_name_within(
    given: list[str], found: list[str], here: Path
) -> None:
    assert paths(*given) == found


def test_any_file_of_a_folder_counts_where_the_format_is_said(here: Path) -> None:
    assert "in/notes.md" in paths("in", any_name=True)
    assert "in/_SUCCESS" not in paths("in", any_name=True)


def test_a_file_uri_is_a_path(here: Path) -> None:
    (here / "a b.txt").write_text("x\n")
    assert paths(f"file://{here}/a%20b.txt") == [f"{here}/a b.txt"]


def test_names_are_those_below_what_was_given(here: Path) -> None:
    names = {file.path: file.name for file in named_files(["in/dt=*", "in/b.jsonl"])}
    assert names["in/dt=2/deep/z.csv"] == "dt=2/deep/z.csv"
    assert names["in/b.jsonl"] == "b.jsonl"
    assert [file.name for file in named_files(str(here / "in" / "dt=2"))] == [
        "deep/z.csv",
        "p.parquet",
    ]


def test_files_of_one_name_are_told_apart_by_their_folders(here: Path) -> None:
    for name in ("x/a/p.txt", "x/b/p.txt", "y/a/p.txt", "y/q.txt"):
        (here / name).parent.mkdir(parents=True, exist_ok=True)
        (here / name).write_text("1\n")
    given = ["x/a", "x/b/p.txt", "y/a", "y/q.txt"]
    files = {file.path: file.name for file in named_files(given)}
    assert files == {
        "x/a/p.txt": "x/a/p.txt",
        "x/b/p.txt": "b/p.txt",
        "y/a/p.txt": "y/a/p.txt",
        "y/q.txt": "q.txt",
    }


def refused(*given: str) -> str:
    with pytest.raises(UsageError) as caught:
        named_files(given)
    said = str(caught.value)
    assert "\n" not in said
    return said


def test_what_names_nothing_is_refused_in_one_sentence(here: Path) -> None:
    (here / "empty").mkdir()
    assert (
        refused("in/*.xml")
        == "No file matches in/*.xml: give a pattern of prompt files that are there."
    )
    assert "no prompts file in/gone.jsonl" in refused("in/gone.jsonl")
    assert "no prompt files in empty: it is empty" in refused("empty")
    (here / "empty" / "_SUCCESS").touch()
    assert "it has _SUCCESS" in refused("empty")
    assert "named twice" in refused("in/b.jsonl", "in/*.jsonl")
    os.symlink("b.jsonl", here / "in" / "link.jsonl")
    assert "named twice" in refused("in")
    assert "names no bucket" in refused("s3:///x")
    assert "hunter2" not in refused("s3://key:hunter2@bucket/x")
    assert "s4://bucket/x cannot be reached" in refused("s4://bucket/x")


def test_a_stream_stands_alone(here: Path) -> None:
    os.mkfifo(here / "pipe")
    assert is_stream("-")
    assert is_stream("pipe")
    assert not is_stream(["in", "in/b.jsonl"])
    with pytest.raises(UsageError, match=r"stdin.*give it alone"):
        is_stream(["-", "in"])
    assert is_plain_file("in/b.jsonl")
    assert not is_plain_file(["in/b.jsonl", "in/a.jsonl.gz"])
    assert not is_plain_file("in")


@pytest.mark.parametrize(
    ("pattern", "name", "matches"),
    [
        ("*.jsonl", "a.jsonl", True),
        ("*.jsonl", "d/a.jsonl", False),
        ("**/*.jsonl", "a.jsonl", True),
        ("**/*.jsonl", "d/e/a.jsonl", True),
        ("dt=*/part-[0-9][!x].gz", "dt=1/part-3a.gz", True),
        ("dt=*/part-[0-9][!x].gz", "dt=1/part-3x.gz", False),
        ("a.b", "a_b", False),
    ],
)
def test_a_glob_of_uris_means_what_it_means_here(
    pattern: str, name: str, matches: bool, tmp_path: Path
) -> None:
    import glob
    import re

    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).touch()
    theirs = glob.glob(pattern, root_dir=tmp_path, recursive=True) == [name]
    assert (re.fullmatch(_pattern(pattern), name) is not None) is theirs is matches


def test_a_folder_that_may_not_be_looked_into(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real: Callable[..., object] = os.scandir

    def scandir(path: str) -> object:
        if str(path).endswith("dt=2"):
            raise PermissionError(13, "Permission denied", path)
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    assert "in/dt=2 cannot be looked into: Permission denied." in refused("in")
