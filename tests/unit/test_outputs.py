"""Results: input order whatever the order of arrival, and files that can be followed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qaic_ray.fleet.outputs import InputOrder, row_writer
from qaic_ray.rows import FinishReason, Prompt, Row


def row(index: int, text: str = "") -> Row:
    return Row(index=index, prompt="p", text=text, finish_reason=FinishReason.STOP)


@given(st.permutations(range(12)))
def test_any_order_in_input_order_out_and_at_once(order: list[int]) -> None:
    rows = InputOrder()
    out: list[int] = []
    for count, index in enumerate(order, 1):
        out += [ready.index for ready in rows.push(row(index))]
        seen = set(order[:count])
        assert out == list(range(next(i for i in range(13) if i not in seen)))
        assert rows.num_held == count - len(out)
    assert rows.num_held == 0


@pytest.mark.parametrize("before", [[0], [1]])
def test_a_row_that_comes_twice_is_a_bug(before: list[int]) -> None:
    rows = InputOrder()
    for index in before:
        rows.push(row(index))
    with pytest.raises(ValueError, match=r"Row \d came twice"):
        rows.push(row(before[0]))


def test_a_row_is_on_disk_when_it_has_been_written(tmp_path: Path) -> None:
    with row_writer(tmp_path) as write:
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
    with row_writer(tmp_path) as write:
        write(row(0, text))
    content = (tmp_path / "outputs.jsonl").read_text(encoding="utf-8")
    assert "東京 🐈" in content
    (line,) = content.splitlines()
    assert json.loads(line)["text"] == text
