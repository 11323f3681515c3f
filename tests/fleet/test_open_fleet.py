"""An open fleet over simulated cards: submit, stream, cancel, lose cards, close, in any order."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from awaited import joined
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from invariants import check
from simulated_cards import answer
from stepped_cards import Stepped, SteppedCards

from qaic_ray.errors import FleetBusy, FleetClosed, QaicRayError, UsageError
from qaic_ray.fleet import folder_fleet
from qaic_ray.fleet.open_fleet import OpenFleet
from qaic_ray.fleet.pending_row import PendingRow
from qaic_ray.rows import FinishReason, Prompt
from qaic_ray.runs.journal import Journal
from qaic_ray.runs.token_streams import TokenDelta


def text_of(deltas: list[TokenDelta]) -> str:
    """What a reader has who begins anew where it is told to."""
    text = ""
    for delta in deltas:
        text = delta.text if delta.restarted else text + delta.text
    return text


class AnyOrder(RuleBasedStateMachine):
    """Each prompt ends exactly once, whatever happens; nothing is left of one that has."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[PendingRow] = []
        self.cancelled: set[int] = set()
        self.ends: dict[int, int] = {}
        self.is_closing = self.is_broken = False

    @initialize(
        num_cards=st.integers(1, 3),
        slots=st.integers(1, 4),
        max_open=st.none() | st.integers(1, 6),
        ends_after=st.sampled_from([0, 3, 10, 20]),
    )
    def begin(self, num_cards: int, slots: int, max_open: int | None, ends_after: int) -> None:
        self.ends_after = ends_after
        self.cards = SteppedCards([0.5 * i for i in range(num_cards)], slots=slots)
        self.max_open = max_open
        self.stepped = Stepped(self.cards, max_open=max_open)
        self.fleet = self.stepped.fleet
        self.cards.settle()

    @rule(text=st.sampled_from(["a", "some words", "longer " * 9]), stream=st.booleans())
    def submit(self, text: str, stream: bool) -> None:
        is_full = self.max_open is not None and self.fleet.num_open >= self.max_open
        try:
            pending = self.fleet.submit(Prompt(99, text, stream=stream), wait=False)
        except FleetBusy:
            assert is_full
        except FleetClosed:
            assert self.fleet.is_closed
        else:
            assert not is_full
            assert pending.prompt.index == len(self.rows)
            self.rows.append(pending)
            self._count_ends(pending)
        self.cards.settle()

    def _count_ends(self, pending: PendingRow) -> None:
        def count() -> None:
            self.ends[pending.prompt.index] += pending.done

        self.ends[pending.prompt.index] = 0
        pending.listen(count)

    @precondition(lambda self: self.rows)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        pending = data.draw(st.sampled_from(self.rows))
        self.cancelled.add(pending.prompt.index)
        pending.cancel()
        self.cards.settle()

    @rule(seconds=st.sampled_from([0.1, 0.5, 1.0, 40.0]))
    def time_passes(self, seconds: float) -> None:
        self.cards.pass_time(seconds)

    @rule(number=st.integers(0, 2))
    def lose_a_card(self, number: int) -> None:
        self.cards.lose(f"card {number}")

    @precondition(lambda self: len(self.rows) >= self.ends_after)
    @rule(drain=st.booleans())
    def close(self, drain: bool) -> None:
        self.is_closing = True
        self.fleet.close(drain=drain, timeout_s=0.0)
        self.cards.settle()
        assert drain or all(pending.done for pending in self.rows)

    @precondition(lambda self: len(self.rows) >= max(1, self.ends_after))
    @rule()
    def the_request_is_wrong(self) -> None:
        is_over = self.cards.is_over
        self.is_broken = self.cards.fails = True
        self.cards.pass_time(0.0)
        if not is_over:
            self.fleet._thread.join(60.0)
            assert self.fleet.num_open == 0
            assert all(pending.done for pending in self.rows)

    @invariant()
    def what_is_open_is_known(self) -> None:
        if not hasattr(self, "stepped") or self.stepped.driver is None:
            return
        still = {pending.prompt.index for pending in self.rows if not pending.done}
        assert set(self.fleet._open) == still
        assert self.fleet.num_running + self.fleet.num_waiting == len(still)
        driver = self.stepped.driver
        if not self.fleet.is_closed:
            assert set(driver._intake.open) == still
            assert driver._cancelled <= still
            assert set(driver._streams) <= still
            check(self.stepped.dispatcher)

    def teardown(self) -> None:
        if not hasattr(self, "stepped"):
            return
        self.cards.let_run()
        self.fleet.close()
        assert not self.fleet._thread.is_alive()
        for pending in self.rows:
            assert self.ends[pending.prompt.index] == 1
            self._check_end(pending)
        assert self.fleet.num_open == 0
        with pytest.raises(FleetClosed):
            self.fleet.submit(Prompt(0, "too late"))

    def _check_end(self, pending: PendingRow) -> None:
        index, is_streamed = pending.prompt.index, pending.prompt.stream
        try:
            row = pending.row(0.0)
        except FleetClosed:
            assert self.is_broken or set(self.cards.quarantined) == set(self.cards.names)
            with pytest.raises(FleetClosed):
                list(pending.deltas())
            return
        deltas = list(pending.deltas())
        assert [delta.row for delta in deltas if delta.row] == ([row] if is_streamed else [])
        if row.ok:
            assert row.text == answer(pending.prompt).text
            assert text_of(deltas) == (row.text if is_streamed else "")
        elif row.finish_reason is FinishReason.ABORT:
            assert index in self.cancelled or self.is_closing
        else:
            assert "Given up" in (row.error or "")


TestAnyOrder = AnyOrder.TestCase


@pytest.fixture
def stepped() -> Iterator[Stepped]:
    made = Stepped(SteppedCards([0.0, 0.0], slots=2))
    yield made
    made.cards.let_run()
    made.fleet.close(drain=False)


def test_prompts_that_come_together_are_shared_out(stepped: Stepped) -> None:
    cards, fleet = stepped.cards, stepped.fleet
    cards.pass_time(0.0)
    cards.pass_time(0.0)
    for _ in range(2):
        fleet.submit(Prompt(0, "one"))
    cards.settle()
    assert sorted(shard.worker for shard in cards.ran) == ["card 0", "card 1"]


def test_a_row_does_not_wait_for_an_earlier_one() -> None:
    cards = SteppedCards([0.0], slots=2, seconds_of=lambda p: 9.0 if p.text == "slow" else 1.0)
    stepped = Stepped(cards)
    slow = stepped.fleet.submit(Prompt(0, "slow"))
    quick = stepped.fleet.submit(Prompt(0, "quick"))
    cards.pass_time(0.0)
    cards.pass_time(2.0)
    assert quick.done
    assert not slow.done
    cards.let_run()
    stepped.fleet.close()
    assert slow.row().text == "SLOW"


def test_a_million_prompts_would_leave_nothing_behind(stepped: Stepped) -> None:
    stepped.cards.let_run()
    for number in range(300):
        pending = stepped.fleet.submit(Prompt(0, f"p{number % 7}", stream=bool(number % 2)))
        if number % 3 == 0:
            pending.cancel()
        pending.row(60.0)
        pending.cancel()  # it is done
    stepped.fleet.close()
    driver, table = stepped.driver, stepped.dispatcher._table
    assert driver is not None
    order = driver._delivery._order
    left = (
        *(driver._intake.open, driver._intake._done, driver._cancelled, driver._streams),
        *(driver._to_cancel, table.open, table.shards, table.foreground.fresh.entries),
        *(order._held, order._spilled._packed, stepped.fleet._open, stepped.fleet._input._waiting),
    )
    assert [len(each) for each in left] == [0] * len(left)
    assert set(driver._tally._meters) <= {"card 0", "card 1", ""}


def test_a_reader_in_a_thread_gets_tokens_while_the_row_runs(stepped: Stepped) -> None:
    pending = stepped.fleet.submit(Prompt(0, "some words", stream=True))
    seen: list[TokenDelta] = []
    reader = threading.Thread(target=lambda: seen.extend(pending.deltas()))
    reader.start()
    for _ in range(6):
        stepped.cards.pass_time(0.6)
    reader.join(60.0)
    assert len(seen) == 2
    assert "".join(delta.text for delta in seen) == "SOME WORDS"
    assert seen[-1].row is pending.row()


def test_a_coroutine_waits_without_a_thread(stepped: Stepped) -> None:
    async def both() -> tuple[str, list[str]]:
        plain = stepped.fleet.submit(Prompt(0, "plain"))
        streamed = stepped.fleet.submit(Prompt(0, "streamed", stream=True))
        stepped.cards.let_run()
        texts = [delta.text async for delta in streamed.async_deltas()]
        return (await plain.async_row()).text, texts

    text, texts = asyncio.run(both())
    assert text == "PLAIN"
    assert "".join(texts) == "STREAMED"
    assert len(texts) == 2


def test_a_full_fleet_makes_room_when_a_row_is_done() -> None:
    stepped = Stepped(SteppedCards([0.0], slots=2), max_open=2)
    fleet = stepped.fleet
    for _ in range(2):
        fleet.submit(Prompt(0, "first"))
    with pytest.raises(FleetBusy, match="2 prompts are open"):
        fleet.submit(Prompt(0, "refused"), wait=False)
    with pytest.raises(FleetBusy):
        fleet.submit(Prompt(0, "refused"), timeout_s=0.01)
    stepped.cards.let_run()
    assert fleet.submit(Prompt(0, "third"), timeout_s=60.0).row(60.0).text == "THIRD"
    fleet.close()


def test_all_cards_lost_ends_every_prompt_and_says_why(stepped: Stepped) -> None:
    dead = Stepped(SteppedCards([None, None]))
    waiting = dead.fleet.submit(Prompt(0, "never"))
    dead.cards.let_run()
    with pytest.raises(FleetClosed, match=r"Every card was lost.*card 1: DeviceError: no"):
        waiting.row(60.0)
    with pytest.raises(FleetClosed, match="Every card was lost"):
        dead.fleet.submit(Prompt(0, "later"))
    with pytest.raises(FleetClosed, match="Every card was lost"):
        dead.fleet.wait_ready(60.0)


def test_all_cards_lost_is_said_before_anybody_asks_for_something() -> None:
    dead = Stepped(SteppedCards([None]))
    dead.cards.let_run()
    with pytest.raises(FleetClosed, match="Every card was lost"):
        dead.fleet.wait_ready(60.0)


def test_what_a_worker_finds_wrong_with_the_request_is_raised_as_it_is() -> None:
    def wrong() -> None:
        raise UsageError("The QPC is for another model.")

    stepped = Stepped(SteppedCards([0.0]), on_drive=wrong)
    with pytest.raises(UsageError, match="another model"):
        stepped.fleet.wait_ready(60.0)
    with pytest.raises(FleetClosed, match="another model"):
        stepped.fleet.submit(Prompt(0, "later"))


def test_a_bug_of_ours_hangs_nobody() -> None:
    def bug() -> None:
        time.sleep(0.05)
        raise KeyError("a bug")

    stepped = Stepped(SteppedCards([0.0]), on_drive=bug)
    try:
        pending = stepped.fleet.submit(Prompt(0, "waits"))
    except FleetClosed:
        return
    with pytest.raises(FleetClosed, match="a bug") as caught:
        pending.row(60.0)
    cause = caught.value.__cause__
    assert cause is not None
    assert isinstance(cause.__cause__, KeyError)


def test_a_prompt_that_is_cancelled_before_the_cards_are_there_does_not_run() -> None:
    gate = threading.Event()
    stepped = Stepped(SteppedCards([0.0]), on_drive=lambda: gate.wait(60.0) and None)
    pending = stepped.fleet.submit(Prompt(0, "unwanted"))
    pending.cancel()
    gate.set()
    stepped.cards.let_run()
    assert pending.row(60.0).finish_reason is FinishReason.ABORT
    stepped.fleet.close()
    assert stepped.cards.ran == []


# -- with a folder


def journal_of(folder: Path, **same: object) -> Journal:
    return Journal(folder, {"input": {"open": True}, "qpc": "q", **same})


def run_all(folder: Path, texts: list[str]) -> tuple[list[str], int]:
    """Answer these in a session of their own; the answers, and how many ran."""
    with journal_of(folder) as journal:
        stepped = Stepped(SteppedCards([0.0], slots=3), journal=journal)
        stepped.cards.let_run()
        rows = [stepped.fleet.submit(Prompt(0, text, stream=True)) for text in texts]
        answers = ["".join(delta.text for delta in row.deltas()) for row in rows]
        assert answers == [row.row(0.0).text for row in rows]
        stepped.fleet.close()
        return answers, sum(len(shard.prompts) for shard in stepped.cards.ran)


def test_a_folder_answers_what_it_has_in_any_order_and_each_row_once(tmp_path: Path) -> None:
    assert run_all(tmp_path, ["a", "b", "a", "c"]) == (["A", "B", "A", "C"], 4)
    assert run_all(tmp_path, ["c", "a", "d", "a", "a"]) == (["C", "A", "D", "A", "A"], 2)
    assert run_all(tmp_path, ["a", "a", "a", "b", "c", "d"])[1] == 0


def test_the_same_text_with_other_parameters_is_another_prompt(tmp_path: Path) -> None:
    run_all(tmp_path, ["a"])
    with journal_of(tmp_path) as journal:
        stepped = Stepped(SteppedCards([0.0]), journal=journal)
        stepped.fleet.submit(Prompt(0, "a", token_ids=(1, 2)))
        stepped.fleet.submit(Prompt(0, "a", id="mine"))
        stepped.cards.let_run()
        stepped.fleet.close()
        assert sum(len(shard.prompts) for shard in stepped.cards.ran) == 2


def test_a_row_is_on_the_disk_before_anybody_has_it(tmp_path: Path) -> None:
    with journal_of(tmp_path) as journal:
        stepped = Stepped(SteppedCards([0.0]), journal=journal)
        pending = stepped.fleet.submit(Prompt(0, "durable", stream=True))
        seen: list[bool] = []

        def look() -> None:
            if pending.done:
                text = (tmp_path / "journal" / "000000.jsonl").read_text()
                seen.append("DURABLE" in text)

        pending.listen(look)
        stepped.cards.let_run()
        pending.row(60.0)
        stepped.fleet.close()
    assert seen == [True]


def test_what_was_cancelled_or_failed_runs_again(tmp_path: Path) -> None:
    with journal_of(tmp_path) as journal:
        stepped = Stepped(SteppedCards([0.0]), journal=journal)
        pending = stepped.fleet.submit(Prompt(0, "again"))
        pending.cancel()
        stepped.cards.let_run()
        assert pending.row(60.0).finish_reason is FinishReason.ABORT
        stepped.fleet.close()
    assert run_all(tmp_path, ["again"]) == (["AGAIN"], 1)
    assert run_all(tmp_path, ["again"]) == (["AGAIN"], 0)


def test_a_folder_of_another_program_is_refused(tmp_path: Path) -> None:
    run_all(tmp_path, ["a"])
    with pytest.raises(UsageError, match="cannot go on: qpc"):
        journal_of(tmp_path, qpc="another")


def test_a_journal_may_be_closed_by_another_thread(tmp_path: Path) -> None:
    journal = journal_of(tmp_path)
    thread = threading.Thread(target=journal.close)
    thread.start()
    joined(thread)
    journal_of(tmp_path).close()


def test_a_second_fleet_of_a_program_is_refused_before_it_does_anything(
    stepped: Stepped, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folder_fleet, "_hosts", {stepped.fleet})
    nothing: Any = None
    with pytest.raises(UsageError, match="Another LLM of this program is open"):
        folder_fleet.FolderFleet(nothing, nothing, nothing)
    stepped.cards.let_run()
    stepped.fleet.close()
    with pytest.raises(AttributeError):  # it goes on to the request
        folder_fleet.FolderFleet(nothing, nothing, nothing)


def test_a_fleet_is_a_context_that_cancels_after_an_error() -> None:
    stepped = Stepped(SteppedCards([0.0]))
    fleet: OpenFleet = stepped.fleet
    given: list[PendingRow] = []

    def use() -> None:
        with fleet:
            given.append(fleet.submit(Prompt(0, "unwanted")))
            stepped.cards.let_run()
            raise QaicRayError("mine")

    with pytest.raises(QaicRayError, match="mine"):
        use()
    assert given[0].done
    assert fleet.is_closed
