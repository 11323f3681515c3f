"""Several files as one input: numbered through, sharded, sampled, and gone on with."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from input_files import KINDS, content

from qaic_ray.errors import QaicRayError, UsageError
from qaic_ray.formats.frozen_file import InputChanged
from qaic_ray.formats.inputs.choice import ROW_BITS, RowChoice
from qaic_ray.formats.inputs.many_files import ManyFiles
from qaic_ray.formats.inputs.named_files import named_files
from qaic_ray.formats.prompts import GREEDY
from qaic_ray.formats.row_reader import DEFAULT_CHAT
from qaic_ray.rows import Prompt, Row

ALL = RowChoice()
FILES = st.lists(st.tuples(st.sampled_from(KINDS), st.integers(0, 9)), min_size=1, max_size=5)


def lay(folder: Path, files: Sequence[tuple[str, int]]) -> list[tuple[str, int]]:
    """Write files; each of their rows: its text and the number that it is known by."""
    folder.mkdir(exist_ok=True)
    rows = []
    number = 0
    for at, (kind, count) in enumerate(files):
        texts = [f"file {at} row {row}" for row in range(count)]
        data = content(kind, texts)
        (folder / f"part-{at:02}.{kind}").write_bytes(data)
        if data:
            rows += [(text, number << ROW_BITS | row) for row, text in enumerate(texts)]
            number += 1
    return rows


def opened(
    folder: Path,
    choice: RowChoice = ALL,
    before: Any = None,
) -> ManyFiles:
    return ManyFiles(named_files(str(folder)), None, choice, before)


def read(files: ManyFiles) -> list[tuple[str, int]]:
    found = []
    for index, item in enumerate(files.prompts(GREEDY, DEFAULT_CHAT)):
        assert isinstance(item, Prompt)
        assert item.index == index
        found.append((item.text, index if item.draw is None else item.draw))
    return found


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("many")


def fresh(folders: Path) -> Path:
    return folders / f"{len(os.listdir(folders))}"


@given(FILES, st.integers(1, 7))
def test_shards_joined_are_the_whole(
    folders: Path, files: list[tuple[str, int]], count: int
) -> None:
    """Texts and draw numbers are those of the files as they were written, in whichever shards."""
    folder = fresh(folders)
    rows = lay(folder, files)
    if not rows:
        with pytest.raises(UsageError, match=r"There (are no|is nothing)"):
            read(opened(folder))
        return
    assert read(opened(folder)) == rows
    joined = []
    for number in range(1, count + 1):
        try:
            joined += read(opened(folder, RowChoice((number, count))))
        except UsageError as error:
            assert "has none" in str(error) or "There are no" in str(error)  # noqa: PT017
    assert joined == rows


@given(FILES, st.integers(1, 30), st.integers(0, 5), st.integers(1, 4))
def test_a_sample_is_the_same_rows_each_time_and_in_shards(
    folders: Path, files: list[tuple[str, int]], size: int, seed: int, count: int
) -> None:
    folder = fresh(folders)
    rows = lay(folder, [*files, ("jsonl", 9)])
    exact = read(opened(folder, RowChoice(sample=size, sample_seed=seed)))
    assert len(exact) == min(size, len(rows))
    assert exact == [row for row in rows if row in exact]
    assert read(opened(folder, RowChoice(sample=size, sample_seed=seed))) == exact

    def share(shard: tuple[int, int] | None, limit: int | None = None) -> list[tuple[str, int]]:
        try:
            return read(opened(folder, RowChoice(shard, 0.5, seed, limit)))
        except UsageError:
            return []

    whole = share(None)
    assert [row for k in range(count) for row in share((k + 1, count))] == whole
    assert share((1, count), 2) == share((1, count))[:2]


def test_rows_are_guessed_where_they_are_known(tmp_path: Path) -> None:
    lay(tmp_path, [("jsonl", 9), ("txt", 4)])
    assert opened(tmp_path).rows_guess == 13
    assert opened(tmp_path, RowChoice(limit=5)).rows_guess == 5
    assert opened(tmp_path, RowChoice(sample=0.5)).rows_guess == 6
    assert opened(tmp_path, RowChoice((3, 3))).rows_guess == 5
    lay(tmp_path, [("jsonl", 9), ("jsonl.gz", 4)])
    assert opened(tmp_path).rows_guess is None


def test_an_error_row_names_its_file_and_line(tmp_path: Path) -> None:
    lay(tmp_path, [("jsonl", 3), ("jsonl", 2), ("parquet", 4)])
    with (tmp_path / "part-01.jsonl").open("a") as file:
        file.write("{no json\n")
    items = list(opened(tmp_path).prompts(GREEDY, DEFAULT_CHAT))
    bad = items[5]
    assert isinstance(bad, Row)
    assert bad.index == 5
    assert bad.error is not None
    assert bad.error.startswith(f"{tmp_path}/part-01.jsonl line 3: Not JSON")
    assert [item.index for item in items] == list(range(10))
    (alone,) = opened(tmp_path, RowChoice(limit=1)).prompts(GREEDY, DEFAULT_CHAT)
    assert alone.index == 0


def test_a_row_of_a_part_keeps_its_line(tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text('{"prompt": "a"}\n' * 5 + "nothing\n")
    *_, bad = opened(tmp_path, RowChoice((2, 2))).prompts(GREEDY, DEFAULT_CHAT)
    assert isinstance(bad, Row)
    assert (bad.index, str(bad.error).partition(":")[0]) == (2, "p.jsonl line 6")


def test_a_later_file_is_opened_when_its_turn_comes(tmp_path: Path) -> None:
    rows = lay(tmp_path, [("jsonl", 3), ("jsonl", 2), ("txt", 2)])
    items = opened(tmp_path).prompts(GREEDY, DEFAULT_CHAT)
    assert [next(items).index for _ in range(2)] == [0, 1]
    (tmp_path / "part-02.txt").unlink()
    (tmp_path / "part-01.jsonl").write_text(json.dumps({"prompt": "another"}) + "\n" * 50)
    found = [next(items)]
    with pytest.raises(InputChanged, match=r"part-01\.jsonl has changed since the run began"):
        found += items
    assert [item.index for item in found] == [2]
    assert len(rows) == 7


def test_a_file_that_vanishes_ends_the_input_there(tmp_path: Path) -> None:
    lay(tmp_path, [("jsonl", 3), ("parquet", 2)])
    items = opened(tmp_path).prompts(GREEDY, DEFAULT_CHAT)
    next(items)
    (tmp_path / "part-01.parquet").unlink()
    with pytest.raises(QaicRayError, match=r"part-01\.parquet.*[Nn]o such file") as caught:
        list(items)
    assert not isinstance(caught.value, UsageError)


def test_files_that_hold_no_prompts_are_refused_before_the_first_row(tmp_path: Path) -> None:
    lay(tmp_path, [("jsonl", 3), ("jsonl", 1)])
    (tmp_path / "part-01.jsonl").write_bytes(b"PK\x03\x04 a zip archive")
    with pytest.raises(UsageError, match="a zip archive"):
        opened(tmp_path)
    # Of a shard's own files only.
    assert len(read(opened(tmp_path, RowChoice((1, 2))))) == 3


def test_more_shards_than_rows(tmp_path: Path) -> None:
    lay(tmp_path, [("jsonl", 3)])
    with pytest.raises(UsageError, match="has 3 rows, so that shard 1/4 has none"):
        opened(tmp_path, RowChoice((1, 4)))


def test_what_came_later_is_not_read_when_a_run_goes_on(tmp_path: Path) -> None:
    rows = lay(tmp_path, [("jsonl", 3), ("jsonl", 3), ("txt", 2)])
    whole = opened(tmp_path)
    second = opened(tmp_path, RowChoice((2, 2)))
    shard = read(second)
    with (tmp_path / "part-01.jsonl").open("a") as file:
        file.write('{"prompt": "later"}\n' * 99)
    (tmp_path / "part-00a.jsonl").write_text('{"prompt": "later"}\n')
    before = json.loads(json.dumps(whole.source))
    again = opened(tmp_path, before=before)
    assert (again.source, read(again)) == (whole.source, rows)
    half = json.loads(json.dumps(second.source))
    again = opened(tmp_path, RowChoice((2, 2)), half)
    assert (again.source, read(again)) == (second.source, shard)
    (tmp_path / "part-00.jsonl").unlink()
    with pytest.raises(UsageError, match=r"no part-00\.jsonl any more"):
        opened(tmp_path, before=before)


def test_a_shard_knows_the_content_of_its_own_files(tmp_path: Path) -> None:
    import hashlib

    lay(tmp_path, [("jsonl", 3), ("txt", 3), ("csv", 4)])
    source = opened(tmp_path, RowChoice((1, 3))).source
    first, second, _ = source["files"]
    data = (tmp_path / "part-00.jsonl").read_bytes()
    assert first == {
        "name": "part-00.jsonl",
        "bytes": len(data),
        "sha256": hashlib.sha256(data).hexdigest(),
    }
    assert second == {"name": "part-01.txt", "bytes": (tmp_path / "part-01.txt").stat().st_size}
    assert source["part"] == {"shard": "1/3"}
