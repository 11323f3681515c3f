"""What batches are made of, each alone: states, lines, places, pages, ids."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from batch_places import HeldFleet
from hypothesis import given
from hypothesis import strategies as st
from openai.types import Batch

from qaic_ray.dispatch.dispatcher import RowsFinished, RunShard, ShardFinished, WorkerReady
from qaic_ray.rows import FinishReason, Prompt, Row
from qaic_ray.serve.api_errors import ApiError
from qaic_ray.serve.batches import disk
from qaic_ray.serve.batches.batch_record import (
    BatchRecord,
    BatchStatus,
    BatchUsage,
    LineError,
    Outcome,
    RequestCounts,
)
from qaic_ray.serve.batches.fleet_cards import BatchLane, FleetAsCards, Places, RunStopped
from qaic_ray.serve.batches.pages import ASCENDING, DESCENDING, Paging, page_of
from qaic_ray.serve.batches.request_lines import LineTable
from qaic_ray.serve.batches.runner import BatchProgress

RESERVED = "file-output", "file-error"
OUTCOME = Outcome(
    counts=RequestCounts(3, 2, 1),
    usage=BatchUsage(5, 1, 2),
    output_file_id=RESERVED[0],
    error_file_id=RESERVED[1],
    proof={"qaic_ray.outputs_sha256": "00"},
)
NEW = BatchRecord(
    id="batch_1",
    endpoint="/v1/completions",
    input_file_id="file-1",
    created_at=100,
    expires_at=200,
    model="m",
    program={},
    input_bytes=1,
    input_sha256="ab",
)
STEPS: dict[str, Any] = {
    "validated": lambda batch, now: batch.validated(3, now),
    "failed": lambda batch, now: batch.failed([LineError("code", "message", 1)], now),
    "cancelled": lambda batch, now: batch.cancelled(now),
    "complete": lambda batch, now: batch.ending_as(BatchStatus.COMPLETED, RESERVED, now),
    "expire": lambda batch, now: batch.ending_as(BatchStatus.EXPIRED, RESERVED, now),
    "ended": lambda batch, now: batch.ended(OUTCOME, now),
}
AFTER = {
    "validating": {"validating", "in_progress", "failed", "cancelling"},
    "in_progress": {"in_progress", "finalizing", "expired", "cancelling"},
    "finalizing": {"finalizing", "completed"},
    "cancelling": {"cancelling", "cancelled"},
    **{name: {name} for name in ("completed", "expired", "cancelled", "failed")},
}
"""The interface's states, and which may follow on which."""


@given(st.lists(st.sampled_from(sorted(STEPS)), max_size=8))
def test_a_batch_goes_only_where_the_interface_says(names: list[str]) -> None:
    batch = NEW
    for now, name in enumerate(names, start=101):
        try:
            after = STEPS[name](batch, now)
        except (ApiError, ValueError):
            continue
        document = after.document()
        Batch.model_validate(document)
        assert after.status.value in AFTER[batch.status.value]
        if after.status is not batch.status:
            assert document[f"{after.status.value}_at"] == now
        for status, at in batch.times.items():
            assert after.times[status] == at
        if batch.reserved:
            assert after.reserved == batch.reserved
        assert (after.outcome is not None) == (after.is_ended and after.status.value != "failed")
        assert (document["output_file_id"] is None) == (after.outcome is None)
        batch = after


def test_each_state_can_be_reached() -> None:
    found = {"validating": NEW}
    for names in itertools.product(STEPS, repeat=4):
        batch = NEW
        for name in names:
            try:
                batch = STEPS[name](batch, 1)
            except (ApiError, ValueError):
                continue
            found[batch.status.value] = batch
    assert set(found) == set(AFTER)


@given(st.lists(st.integers(1, 4), max_size=30))
def test_a_line_table_is_the_counting_of_prompts(widths: list[int]) -> None:
    several = {ordinal: width for ordinal, width in enumerate(widths) if width != 1}
    table = LineTable(len(widths), several)
    whose = [ordinal for ordinal, width in enumerate(widths) for _ in range(width)]
    assert table.num_prompts == len(whose)
    assert [table.line_of(index) for index in range(len(whose))] == whose
    for ordinal in range(len(widths)):
        expected = [index for index, owner in enumerate(whose) if owner == ordinal]
        assert list(table.prompts_of(ordinal)) == expected


@given(st.lists(st.lists(st.booleans(), min_size=1, max_size=3), max_size=12), st.randoms())
def test_progress_counts_a_line_when_its_last_row_is_there(
    lines: list[list[bool]], any_: Any
) -> None:
    table = LineTable(len(lines), {n: len(line) for n, line in enumerate(lines) if len(line) != 1})
    flat = [is_ok for line in lines for is_ok in line]
    order = list(range(len(flat)))
    any_.shuffle(order)
    progress, told = BatchProgress(table), set()
    for index in order:
        row = Row(index, "", "", FinishReason.STOP if flat[index] else FinishReason.ERROR)
        progress.add(replace(row, prompt_tokens=2, reused_tokens=1, token_ids=(1, 2, 3)))
        told.add(index)
        done = [n for n in range(len(lines)) if set(table.prompts_of(n)) <= told]
        good = sum(all(lines[n]) for n in done)
        assert progress.counts == RequestCounts(len(lines), good, len(done) - good)
        assert progress.usage == BatchUsage(2 * len(told), len(told), 3 * len(told))


@given(st.lists(st.sampled_from("abcdefgh"), unique=True), st.integers(1, 4), st.booleans())
def test_pages_have_everything_once_though_things_go(
    names: list[str], limit: int, down: bool
) -> None:
    order = DESCENDING if down else ASCENDING
    left, found, after = set(names), [], ""
    while True:
        ids, has_more = page_of(sorted(left), Paging(limit, after, order))
        found += ids
        left -= set(ids)  # each page is removed as soon as it was read
        if not has_more:
            break
        after = ids[-1]
    assert found == sorted(names, reverse=down)


def test_ids_rise_whatever_the_clock_does() -> None:
    ids = disk.Ids()
    made = [ids.new(disk.BATCH, now_s) for now_s in (5.0, 5.0, 4.0, 6.0, 0.0)]
    assert made == sorted(made)
    assert all(disk.is_id(id_, disk.BATCH) for id_ in made)
    later = disk.Ids()
    later.seen(made[-1])
    assert later.new(disk.BATCH, 0.0) > made[-1]


@pytest.mark.parametrize(
    "text", ["", "file-", "file-../x", "batch_" + "g" * 36, "file-" + "0" * 37]
)
def test_what_is_no_id_never_becomes_a_path(text: str) -> None:
    assert not disk.is_id(text, disk.FILE)


def test_a_folder_that_is_replaced_by_one_that_was_left_is_whole(tmp_path: Path) -> None:
    for content in ("old", "new"):
        made = disk.workspace(tmp_path)
        disk.write_private(made / "file", content)
        disk.publish(made, tmp_path / "name")
    assert (tmp_path / "name" / "file").read_text() == "new"
    disk.workspace(tmp_path)
    disk.sweep(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["name"]


# -- places


@given(
    st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from(["want", "done", "close"]))),
    st.integers(1, 3),
)
def test_the_oldest_lane_never_waits_while_a_younger_one_takes(
    steps: list[tuple[str, str]], slots: int
) -> None:
    fleet = HeldFleet(slots=slots)
    places = Places(fleet)
    woken: list[str] = []
    lanes = {name: places.lane(name, lambda name=name: woken.append(name)) for name in "abc"}
    for name, step in steps:
        lane: BatchLane = lanes[name]
        woken.clear()
        if step == "want":
            is_blocked = any(lanes[older].is_waiting for older in "abc" if older < name)
            has_room = sum(each.num_taken for each in lanes.values()) < 2 * slots
            assert lane.take() == (has_room and not is_blocked and not lane.is_closed)
        elif step == "done" and lane.num_taken:
            lane.give_back(1)
            waiting = [each for each in "abc" if lanes[each].is_waiting]
            assert woken == waiting[:1]
        elif step == "close" and not lane.is_closed:
            lane.close()
            assert lane.num_taken == 0
        assert places._num_taken == sum(each.num_taken for each in lanes.values()) <= 2 * slots


def shard(*indexes: int, number: int = 0) -> RunShard:
    return RunShard("fleet", number, tuple(Prompt(i, "", token_ids=(1,)) for i in indexes), 1)


def test_the_fleet_is_a_worker_that_is_ready_and_answers() -> None:
    fleet = HeldFleet()
    cards = FleetAsCards(fleet, Places(fleet), "batch_1")
    assert isinstance(cards.wait(0.0), WorkerReady)
    assert cards.info("fleet").slots == fleet.slots
    cards.run(shard(5, 7))
    events = [cards.wait(1.0) for _ in range(2)]
    assert [type(event) for event in events] == [RowsFinished, ShardFinished]
    assert isinstance(events[0], RowsFinished)
    assert [row.index for row in events[0].rows] == [5, 7]
    cards.close()


def test_a_run_that_is_stopped_takes_its_prompts_back() -> None:
    fleet = HeldFleet(is_free=False)
    places = Places(fleet)
    cards = FleetAsCards(fleet, places, "batch_1")
    cards.wait(0.0)
    cards.run(shard(*range(9)))
    assert cards.wait(0.0) is None
    assert fleet.num_open == 2 * fleet.slots
    cards.cancel("fleet", [0, 8])
    assert fleet.num_open == 2 * fleet.slots - 1
    cards.stop("enough")
    with pytest.raises(RunStopped, match="enough"):
        cards.wait(None)
    cards.close()
    assert fleet.num_open == 0
    assert places._num_taken == 0


def test_a_fleet_without_workers_is_waited_for() -> None:
    fleet = HeldFleet()
    fleet.workers, workers = (), fleet.workers
    cards = FleetAsCards(fleet, Places(fleet), "batch_1")
    assert cards.info("fleet").slots > 0
    cards.wait(0.0)
    cards.run(shard(0))
    assert cards.wait(0.01) is None
    assert fleet.prompts == []
    fleet.workers = workers
    assert isinstance(cards.wait(10.0), RowsFinished)
    cards.close()
