"""The input in a thread of its own: all that is asked for, or what came of a slow input."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qaic_ray.errors import QaicRayError, UsageError
from qaic_ray.rows import Prompt
from qaic_ray.runs.intake import Batch, ThreadedReader


def same(count: int) -> list[Prompt]:
    return [Prompt(i, "same") for i in range(count)]


@contextmanager
def reading(items: Iterable[Prompt], **options: Callable[[], float]) -> Iterator[ThreadedReader]:
    reader = ThreadedReader(items, **options)
    try:
        yield reader
    finally:
        reader.close()


def next_batch(reader: ThreadedReader) -> Batch:
    deadline_s = time.monotonic() + 60
    while time.monotonic() < deadline_s:
        batch = reader.poll()
        if batch is not None:
            return batch
        time.sleep(0.001)
    raise AssertionError("nothing came")


@given(st.integers(0, 40), st.lists(st.integers(1, 20), min_size=1, max_size=60))
def test_every_item_once_in_order_and_no_more_than_was_asked_for(
    count: int, asked: list[int]
) -> None:
    given_items: list[Prompt] = []
    read: list[Prompt] = []

    def source() -> Iterator[Prompt]:
        for prompt in same(count):
            read.append(prompt)
            yield prompt

    with reading(source()) as reader:
        for number in asked:
            reader.ask(number)
            batch = next_batch(reader)
            given_items += batch.items  # type: ignore[arg-type]
            assert len(batch.items) <= number
            assert len(read) <= len(given_items) + number
            if batch.exhausted:
                assert given_items == same(count)
                return
    assert given_items == same(count)[: len(given_items)]


def test_what_came_of_a_slow_input_is_given_while_it_waits_for_more() -> None:
    go_on = threading.Event()

    def typed() -> Iterator[Prompt]:
        yield from same(2)
        assert go_on.wait(60)
        yield Prompt(2, "last")

    with reading(typed()) as reader:
        reader.ask(100)
        assert next_batch(reader) == Batch(tuple(same(2)), exhausted=False)
        reader.ask(100)
        assert reader.poll() is None
        go_on.set()
        batch = next_batch(reader)
        if not batch.exhausted:
            reader.ask(100)
            assert next_batch(reader) == Batch((), exhausted=True)
        assert batch.items == (Prompt(2, "last"),)


def ends_with(error: BaseException) -> Iterator[Prompt]:
    yield from same(3)
    raise error


def test_damage_is_an_end_with_a_reason() -> None:
    error = QaicRayError("damaged")
    with reading(ends_with(error)) as reader:
        reader.ask(10)
        assert next_batch(reader) == Batch(tuple(same(3)), exhausted=True, error=error)


@pytest.mark.parametrize("error", [UsageError("another run's"), ZeroDivisionError("a bug")])
def test_any_other_error_comes_after_all_that_was_read_before_it(error: Exception) -> None:
    with reading(ends_with(error)) as reader:
        reader.ask(10)
        assert next_batch(reader) == Batch(tuple(same(3)), exhausted=False)
        reader.ask(10)
        with pytest.raises(type(error), match=str(error)):
            next_batch(reader)


def test_a_closed_reader_ends_its_thread() -> None:
    before = threading.active_count()
    with reading(same(3)):
        assert threading.active_count() == before + 1
    deadline_s = time.monotonic() + 60
    while threading.active_count() > before and time.monotonic() < deadline_s:
        time.sleep(0.001)
    assert threading.active_count() == before
