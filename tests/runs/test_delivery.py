"""Results: input order whatever the order of arrival, in little memory, and files to follow."""

from __future__ import annotations

import hashlib
import json
import os
import resource
import tracemalloc
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qaic_ray.errors import QaicRayError
from qaic_ray.rows import FinishReason, Prompt, Row
from qaic_ray.runs.delivery import MAX_SHOWN_AT_ONCE, Delivery, InputOrder, Proof, RowWriter
from qaic_ray.runs.journal import Journal, Place, safe_rows


def row(index: int, text: str = "") -> Row:
    return Row(index=index, prompt="p", text=text, finish_reason=FinishReason.STOP)


def place(index: int, num_bytes: int = 100) -> Place:
    """Where `read_back` finds the row `index`."""
    return Place(index % 3, index + 1, num_bytes)


def read_back(segment: int, offset: int) -> Row:
    assert segment == (offset - 1) % 3
    return row(offset - 1)


@given(st.permutations(range(12)), st.integers(0, 12), st.integers(0, 5))
def test_any_order_in_input_order_out_and_at_once(
    order: list[int], max_held_rows: int, num_taken_late: int
) -> None:
    rows = InputOrder(read_back, max_held_rows=max_held_rows)
    out: list[int] = []
    for count, index in enumerate(order, 1):
        rows.push(row(index), place(index))
        if count <= num_taken_late:
            continue
        out += [ready.index for ready in rows.ready()]
        seen = set(order[:count])
        assert out == list(range(next(i for i in range(13) if i not in seen)))
        assert len(rows._held) <= max_held_rows + num_taken_late
        assert not rows.is_ready
    assert len(rows._held) == 0
    assert out == list(range(12))


def test_rows_without_a_place_are_held() -> None:
    rows = InputOrder(max_held_rows=1)
    for index in (3, 2, 1):
        rows.push(row(index))
    assert len(rows._held) == 3
    rows.push(row(0))
    assert next(rows.ready()).index == 0
    assert rows.is_ready
    assert [ready.index for ready in rows.ready()] == [1, 2, 3]


def test_large_rows_are_not_held() -> None:
    rows = InputOrder(read_back, max_held_bytes=250)
    for index in range(1, 6):
        rows.push(row(index), place(index))
    assert len(rows._held) == 2
    rows.push(row(0), place(0, num_bytes=10**6))
    assert [ready.index for ready in rows.ready()] == list(range(6))


@pytest.mark.parametrize("before", [[0], [1], [1, 2]])
def test_a_row_that_comes_twice_is_a_bug(before: list[int]) -> None:
    rows = InputOrder(read_back, max_held_rows=1)
    for index in before:
        rows.push(row(index), place(index))
    list(rows.ready())
    with pytest.raises(ValueError, match=r"Row \d came twice"):
        rows.push(row(before[-1]), place(before[-1]))


def test_a_hundred_thousand_rows_behind_one_take_eight_bytes_each() -> None:
    num_rows = 100_000
    only, where = row(0), place(0)  # making as many of them while memory is traced takes seconds
    turns = iter(range(num_rows))

    def row_at(index: int) -> Row:
        vars(only)["index"] = index
        return only

    rows = InputOrder(lambda _, offset: row_at(next(turns)), max_held_rows=0)
    tracemalloc.start()
    try:
        for index in range(num_rows - 1, 0, -1):
            rows.push(row_at(index), where)
        waiting_bytes, peak_bytes = tracemalloc.get_traced_memory()
        assert not rows.is_ready
        turns = iter(range(1, num_rows))
        rows.push(row_at(0), where)
        num_out = sum(1 for _ in rows.ready())
        left_bytes, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert num_out == num_rows
    assert 8 * num_rows < waiting_bytes < 9 * num_rows + 10_000
    assert peak_bytes < 17 * num_rows + 10_000  # the array moves when it grows
    assert left_bytes < 10_000


def test_places_of_rows_that_are_out_are_forgotten() -> None:
    num_rows = 4000
    rows = InputOrder(read_back, max_held_rows=0)
    rows.push(row(1), place(1))
    tracemalloc.start()
    try:
        for index in range(0, num_rows, 2):  # there is always one that waits
            rows.push(row(index + 3), place(index + 3))
            rows.push(row(index), place(index))
            assert [ready.index for ready in rows.ready()] == [index, index + 1]
        left_bytes, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert left_bytes < 8 * num_rows / 2


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[Journal]:
    with Journal(tmp_path, {}) as journal:
        yield journal


class Watch:
    """A clock that is put forward by hand, and by every commit."""

    def __init__(self, journal: Journal, monkeypatch: pytest.MonkeyPatch, commit_s: float) -> None:
        self.now_s = 0.0
        self.num_commits = 0
        commit = journal.commit

        def slow_commit() -> None:
            self.num_commits += 1
            self.now_s += commit_s
            commit()

        monkeypatch.setattr(journal, "commit", slow_commit)

    def __call__(self) -> float:
        return self.now_s


@pytest.mark.parametrize(("commit_s", "pause_s"), [(0.0, 0.05), (0.01, 0.05), (1.0, 4.0)])
def test_rows_are_gathered_for_the_disk_and_shown_when_they_are_on_it(
    journal: Journal, monkeypatch: pytest.MonkeyPatch, commit_s: float, pause_s: float
) -> None:
    shown: list[int] = []
    watch = Watch(journal, monkeypatch, commit_s)
    delivery = Delivery(journal, lambda row: shown.append(row.index), lambda row: None, clock=watch)
    assert delivery.due_in_s() is None
    delivery.add(row(0), 1, 0.0)
    assert delivery.due_in_s() == 0.05
    watch.now_s += 0.04
    delivery.add(row(1), 1, 0.0)
    delivery.flush_due()
    assert (shown, watch.num_commits) == ([], 0)
    watch.now_s += 0.02
    assert delivery.due_in_s() == 0.0
    delivery.flush_due()
    assert (shown, watch.num_commits) == ([0, 1], 1)
    assert delivery.due_in_s() is None
    delivery.add(row(3), 1, 0.0)
    assert delivery.due_in_s() == pytest.approx(pause_s)
    delivery.finish()
    assert (shown, watch.num_commits) == ([0, 1], 2)
    assert delivery.due_in_s() is None


def test_many_rows_whose_turn_has_come_are_shown_a_few_at_a_time(
    journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown: list[int] = []
    watch = Watch(journal, monkeypatch, 0.0)
    delivery = Delivery(journal, lambda row: shown.append(row.index), lambda row: None, clock=watch)
    for index in range(MAX_SHOWN_AT_ONCE + 2):
        delivery.add(row(index), 1, 0.0)
    watch.now_s += 1.0
    delivery.flush_due()
    assert len(shown) == MAX_SHOWN_AT_ONCE
    assert delivery.due_in_s() == 0.0
    delivery.flush_due()
    assert shown == list(range(MAX_SHOWN_AT_ONCE + 2))
    assert delivery.due_in_s() is None


def test_a_row_is_on_disk_when_it_has_been_written(tmp_path: Path) -> None:
    with RowWriter(tmp_path) as write:
        assert (tmp_path / "outputs.jsonl").read_bytes() == b""
        write(row(0, "a"))
        first = (tmp_path / "outputs.jsonl").read_text(encoding="utf-8")
        assert json.loads(first) == row(0, "a").to_json()
        write(Row.failed(Prompt(1, "b"), "no"))
        assert len((tmp_path / "outputs.jsonl").read_text().splitlines()) == 2
        (error,) = (tmp_path / "errors.jsonl").read_text().splitlines()
    assert json.loads(error)["error"] == "no"


def test_texts_survive_and_stay_on_one_line(tmp_path: Path) -> None:
    text = 'naïve 東京 🐈 "quoted" \\ \n \r \u2028\u2029\x85\x1e\x00 end '
    with RowWriter(tmp_path) as write:
        write(row(0, text))
    content = (tmp_path / "outputs.jsonl").read_text(encoding="utf-8")
    assert "東京 🐈" in content
    (line,) = content.splitlines()
    assert json.loads(line)["text"] == text


def test_the_files_of_an_earlier_session_stay_until_all_of_it_is_written_again(
    tmp_path: Path,
) -> None:
    outputs, errors = tmp_path / "outputs.jsonl", tmp_path / "errors.jsonl"
    outputs.write_bytes(b"torn")
    errors.write_bytes(b"")

    def refuse() -> None:
        with RowWriter(tmp_path, resumed=True) as write:
            write.rewrite(row(0))
            raise KeyError

    with pytest.raises(KeyError):
        refuse()
    assert outputs.read_bytes() == b"torn"
    assert sorted(os.listdir(tmp_path)) == ["errors.jsonl", "outputs.jsonl"]
    with RowWriter(tmp_path, resumed=True) as write:
        write.rewrite(Row.failed(Prompt(0, "p"), "no"))
        assert outputs.read_bytes() == b"torn"
        write(row(1))
        assert [json.loads(line)["index"] for line in outputs.read_text().splitlines()] == [0, 1]
        assert errors.read_bytes().count(b"\n") == 1
    with RowWriter(tmp_path, resumed=True) as write:
        write.rewrite(row(0))
    assert json.loads(outputs.read_bytes()) == row(0).to_json()
    assert errors.read_bytes() == b""


def test_the_proof_counts_rows_and_digests_the_very_file(tmp_path: Path) -> None:
    with RowWriter(tmp_path) as write:
        write(row(0, "ü"))
        write(Row.failed(Prompt(1, "p"), "no"))
    digest = hashlib.sha256((tmp_path / "outputs.jsonl").read_bytes()).hexdigest()
    assert write.proof(2, "abc") == Proof(2, 1, 1, "abc", digest)
    assert write.proof(2, "abc").holds
    assert not write.proof(3, "abc").holds
    assert asdict(write.proof(2, "abc"))["rows_error"] == 1


def test_a_full_disk_is_one_sentence(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with RowWriter(tmp_path) as write:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**12, hard))  # as a disk with no more room
        try:
            with pytest.raises(QaicRayError, match=r"cannot be written: File too large\. What"):
                write(row(0, "long " * 2**12))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_rows_are_told_as_they_get_to_the_disk_in_the_order_in_which_they_came(
    tmp_path: Path,
) -> None:
    saved: list[int] = []
    on_disk: list[int] = []

    def on_saved(row: Row) -> None:
        saved.append(row.index)
        on_disk.append(safe_rows(tmp_path))

    with Journal(tmp_path, {}) as journal:
        delivery = Delivery(
            journal, lambda _: None, lambda _: None, on_saved=on_saved, clock=lambda: 0.0
        )
        list(delivery.replay())
        for index in (2, 0, 3):
            delivery.add(Row(index, "p", "x", FinishReason.STOP), 1, 0.0)
        assert not saved
        delivery.save()
        assert saved == [2, 0, 3]
        assert on_disk == [3, 3, 3]
    bare = Delivery(None, lambda _: None, lambda _: None, on_saved=on_saved, clock=lambda: 0.0)
    bare.add(Row(5, "p", "x", FinishReason.STOP), 1, 0.0)
    assert saved == [2, 0, 3, 5]
