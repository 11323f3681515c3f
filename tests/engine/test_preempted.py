"""Rows that give their slots and go on later are as if nothing had happened.

Each is held against the same row alone on a card of its own, which nobody disturbs.
"""

from __future__ import annotations

import random
from collections.abc import Sequence as Listed
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import pytest
from byte_tokens import byte_tokenizer
from formula_program import FormulaProgram
from hypothesis import given
from hypothesis import strategies as st

from qaic_ray.contract import Specialization, Specializations
from qaic_ray.engine.batching.batcher import MAX_PREEMPTED, Batcher
from qaic_ray.engine.drafts import PromptLookup
from qaic_ray.engine.engine import Engine, Finished
from qaic_ray.engine.limits.grammars import Grammars
from qaic_ray.engine.steps import ProgramShapes, Sequence
from qaic_ray.metrics import Durations
from qaic_ray.rows import FinishReason
from qaic_ray.sampling_params import SamplingParams
from qaic_ray.sampling_params.structured_outputs import StructuredOutputs

TOKENIZER = byte_tokenizer("<eos>", "<other>")
EOS, VOCAB, CTX_LEN = 256, 300, 64
GRAMMARS = Grammars(TOKENIZER.to_str, [EOS], VOCAB)


class ReadsAlong:
    """Ends a row behind the first token that `ends` says, and notes all that it is given."""

    def __init__(self, modulus: int) -> None:
        self.seen: list[int] = []
        self._modulus = modulus

    def read(self, token_ids: Listed[int]) -> int | None:
        for token in token_ids:
            self.seen.append(token)
            if token % self._modulus == 0:
                return len(self.seen)
        return None


@dataclass(frozen=True)
class Asked:
    """One row: what makes it, as often as it is wanted."""

    key: int
    prompt: tuple[int, ...]
    limit: int
    background: bool
    fields: dict[str, Any]
    modulus: int | None = None
    regex: str | None = None

    def row(self) -> Sequence:
        form = None if self.regex is None else StructuredOutputs.read({"regex": self.regex})
        params = SamplingParams(structured_outputs=form, **self.fields)
        return Sequence(
            self.key,
            self.prompt,
            self.limit,
            frozenset({EOS}),
            params,
            seed=77 + self.key,
            guide=None if form is None else GRAMMARS.guide(form),
            bad_ids=((7,), (8, 9)),
            prompt_logprobs=[] if params.prompt_logprobs is not None else None,
            background=self.background,
        )

    def reader(self) -> ReadsAlong | None:
        return None if self.modulus is None else ReadsAlong(self.modulus)


@dataclass
class Card:
    """An engine whose steps take a second, and that is watched from outside."""

    slots: int
    decode_len: int = 1
    prefill_rows: int = 1
    kept: int = 0
    options: dict[str, Any] = field(default_factory=dict)
    now_s: float = 0.0
    num_preempted: int = 0
    came_s: dict[int, list[float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        is_drafted = self.decode_len > 1
        keeps = (1, self.decode_len) if is_drafted else (None, None)
        entries = (
            Specialization(self.prefill_rows, 4, CTX_LEN, self.slots, keeps[0]),
            Specialization(self.slots, self.decode_len, CTX_LEN, self.slots, keeps[1]),
        )
        program = FormulaProgram(
            Specializations(entries), every_token=not is_drafted, vocab=VOCAB, memory=3
        )
        run = program.run

        def timed(*inputs: Any) -> Any:
            self.now_s += 1.0
            return run(*inputs)

        program.run = timed  # type: ignore[method-assign]
        self.engine = Engine(program, clock=lambda: self.now_s, max_stall_s=0.0, **self.options)
        assert isinstance(self.engine.batcher, Batcher)
        self.batcher = self.engine.batcher
        self.batcher.kept_slots = self.kept

    def also_preempt(self, draw: random.Random, chance: float) -> None:
        """Have rows of the background lose their slots at any time, whoever waits."""
        make_room = self.batcher.make_room

        def any_time() -> list[Sequence]:
            lost = make_room()
            for row in list(self.batcher.running.values()):
                if row.background and draw.random() < chance:
                    self.batcher._preempt(row)
                    lost.append(row)
            self.num_preempted += len(lost)
            return lost

        self.batcher.make_room = any_time  # type: ignore[method-assign]

    def run(self, asked: list[tuple[int, Asked]]) -> dict[int, tuple[Finished, list[int] | None]]:
        """Each row comes at its step; what became of it, and what its reader was given."""
        arrivals = sorted(asked, key=lambda one: one[0])
        rows: dict[Sequence, ReadsAlong | None] = {}
        done: dict[int, tuple[Finished, list[int] | None]] = {}
        for step in range(10_000):
            while arrivals and arrivals[0][0] <= step:
                one = arrivals.pop(0)[1]
                row, reader = one.row(), one.reader()
                rows[row] = reader
                self.came_s[row.key] = [self.now_s]
                self.engine.add(row, reader)
            if not (arrivals or self.engine.busy):
                return done
            before = {row: len(row.output_ids) for row in rows}
            for finished in self.engine.step():
                reader = rows[finished.sequence]
                done[finished.sequence.key] = (finished, None if reader is None else reader.seen)
            self.batcher.check()
            failed = {key for key, (one, _) in done.items() if one.error is not None}
            counted = sum(len(row.output_ids) for row in rows if row.key not in failed)
            assert self.engine.state().generated_tokens == counted
            for row, number in before.items():
                self.came_s[row.key] += [self.now_s] * (len(row.output_ids) - number)
        raise AssertionError("rows run for ever")


def outcome(found: tuple[Finished, list[int] | None]) -> tuple[Any, ...]:
    done, seen = found
    row = done.sequence
    error = None if done.error is None else str(done.error)
    return (
        row.output_ids, row.logprobs, row.prompt_logprobs, row.finish_reason, error, seen,
    )  # fmt: skip


FIELDS = st.fixed_dictionaries(
    {
        "temperature": st.sampled_from([0.0, 0.0, 0.7, 3.0]),
        "top_p": st.sampled_from([1.0, 0.9]),
        "repetition_penalty": st.sampled_from([1.0, 1.4]),
        "frequency_penalty": st.sampled_from([0.0, 0.8]),
        "min_tokens": st.sampled_from([0, 0, 4]),
        "logprobs": st.sampled_from([None, 2]),
        "prompt_logprobs": st.sampled_from([None, None, 1]),
    }
)
ROW = st.tuples(
    st.integers(0, 40),  # when it comes
    st.lists(st.integers(10, 13), min_size=1, max_size=24),
    st.integers(1, 30),
    st.booleans(),
    FIELDS,
    st.sampled_from([None, None, 5, 23]),
    st.sampled_from([None, None, None, r"[0-9]{3}-[a-f]{4}x*", r"(ab|cd){2,9}"]),
)


@given(
    rows=st.lists(ROW, min_size=1, max_size=9),
    slots=st.integers(1, 4),
    decode_len=st.sampled_from([1, 1, 3]),
    prefill_rows=st.integers(1, 2),
    kept=st.integers(0, 2),
    reuse=st.booleans(),
    chance=st.sampled_from([0.0, 0.05, 0.2]),
    seed=st.integers(0, 5),
)
def test_any_schedule_of_preemptions_gives_the_rows_of_an_undisturbed_engine(
    rows: list[tuple[int, list[int], int, bool, dict[str, Any], int | None, str | None]],
    slots: int,
    decode_len: int,
    prefill_rows: int,
    kept: int,
    reuse: bool,
    chance: float,
    seed: int,
) -> None:
    asked = [
        (step, Asked(key, tuple(prompt), limit, *rest))
        for key, (step, prompt, limit, *rest) in enumerate(rows)
    ]
    options: dict[str, Any] = {"prefix_reuse": reuse}
    if decode_len > 1:
        options["proposer"] = PromptLookup()
        for _, one in asked:
            one.fields["prompt_logprobs"] = None  # no such program keeps all logits
    card = Card(slots, decode_len, min(slots, prefill_rows), kept, options)
    card.also_preempt(random.Random(seed), chance)
    found = card.run(asked)
    assert found.keys() == {one.key for _, one in asked}
    for _, one in asked:
        assert outcome(found[one.key]) == outcome(Card(1).run([(0, one)])[one.key])
        finished, times = found[one.key][0], card.came_s[one.key]
        assert finished.entered_s == times[0]
        if finished.error is None:
            assert finished.ttft_s == times[1] - times[0], "the time to its first token"
            assert finished.scheduled_s < times[1]
    work = card.engine.measurement
    good = [done for done, _ in found.values() if done.error is None]
    assert work.rows == len(good)
    assert work.generated_tokens == sum(len(done.sequence.output_ids) for done in good)
    assert not any(vars(card.engine._times)[name] for name in TABLES)
    assert not card.engine._picker._in_selector
    assert not card.engine._picker._guided


TABLES = ("_awaiting", "_first", "_scheduled", "_prefilled_s", "_preempted_s")


@given(st.lists(ROW, min_size=1, max_size=9), st.integers(1, 4), st.integers(0, 5))
def test_every_gap_is_counted_once_and_a_pause_is_one(
    rows: list[Any], slots: int, seed: int
) -> None:
    asked = [
        (step, Asked(key, tuple(prompt), limit, background, {}))
        for key, (step, prompt, limit, background, *_) in enumerate(rows)
    ]
    card = Card(slots)
    card.also_preempt(random.Random(seed), 0.1)
    card.run(asked)
    gaps = [
        after - before for times in card.came_s.values() for before, after in pairwise(times[1:])
    ]
    assert card.engine.measurement.inter_token == Durations.of(gaps)


# -- who gives its slot, and when


def shapes(slots: int, *, rows: int | None = None) -> ProgramShapes:
    return ProgramShapes(slots, rows or slots, 1, (4,), CTX_LEN, CTX_LEN, 1, continuous=True)


def given_rows(batcher: Batcher, *lengths: int, background: bool = True) -> list[Sequence]:
    """Rows of prompts of so many tokens, each prefilled."""
    rows = [
        Sequence(i, tuple(range(100 * i, 100 * i + n)), 20, background=background)
        for i, n in enumerate(lengths)
    ]
    for row in rows:
        batcher.add(row)
    while (step := batcher.plan()) is not None and step.is_prefill:
        batcher.commit(step, [[1]] * len(step.rows))
    return rows


def test_the_row_that_loses_least_gives_its_slot_before_the_next_step() -> None:
    batcher = Batcher(shapes(3))
    late = given_rows(batcher, 12, 4, 8)
    online = Sequence(9, (1, 2, 3), 5)
    batcher.add(online)
    assert batcher.make_room() == [late[1]]
    step = batcher.plan()
    assert step is not None
    assert [row for _, row in step.rows] == [online]
    assert late[1].output_ids == [1], "what it has it keeps"
    assert list(batcher.waiting) == [late[1]]
    batcher.check()


def test_no_row_gives_its_slot_to_the_background_or_while_one_is_free() -> None:
    batcher = Batcher(shapes(3))
    given_rows(batcher, 4, 4)
    batcher.add(Sequence(8, (1, 2), 5))
    assert batcher.make_room() == []
    batcher.admit()
    batcher.add(Sequence(9, (1, 2), 5, background=True))
    assert batcher.make_room() == []
    others = Batcher(shapes(2))
    given_rows(others, 4, 4, background=False)
    others.add(Sequence(9, (1, 2), 5))
    assert others.make_room() == []


def test_a_row_is_computed_from_where_a_slot_still_holds_it() -> None:
    """More slots than rows: the slot that it gave remembers, until another needs it."""
    batcher = Batcher(shapes(3, rows=1))
    (row,) = given_rows(batcher, 8)
    online = Sequence(9, (1, 2, 3), 1)
    batcher.add(online)
    assert batcher.make_room() == [row]
    while online.finish_reason is None:
        step = batcher.plan()
        assert step is not None
        batcher.commit(step, [[5]])
    batcher.admit()
    assert row.slot is not None
    assert (row.num_computed, row.num_reused) == (8, 0)


def test_those_that_gave_their_slots_go_on_before_others_and_leave_what_is_kept() -> None:
    batcher = Batcher(shapes(3))
    batcher.kept_slots = 1
    late = given_rows(batcher, 4, 8)
    online = [Sequence(20 + i, (i, 2, 3), 1) for i in range(3)]
    for row in online:
        batcher.add(row)
    assert set(batcher.make_room()) == set(late)
    batcher.add(Sequence(30, (4, 4), 5, background=True))
    while any(row.finish_reason is None for row in online):
        step = batcher.plan()
        assert step is not None
        batcher.commit(step, [[5]] * len(step.rows))
    batcher.admit()
    assert [row.key for row in batcher.running.values()] == [late[1].key, late[0].key]


def test_a_row_that_lost_its_slot_too_often_keeps_it_until_it_has_a_token() -> None:
    batcher = Batcher(shapes(1))
    row = Sequence(0, tuple(range(8)), 5, background=True)
    batcher.add(row)
    for key in range(1, MAX_PREEMPTED + 1):
        step = batcher.plan()
        assert step is not None
        assert step.rows[0][1] is row
        batcher.commit(step, [[5]])
        batcher.add(Sequence(key, (key, 99), 1))
        assert batcher.make_room() == [row]
        step = batcher.plan()
        assert step is not None
        batcher.commit(step, [[5]])
    assert batcher.plan() is not None
    batcher.add(Sequence(100, (1, 99), 1))
    while not row.output_ids:
        assert batcher.make_room() == []
        step = batcher.plan()
        assert step is not None
        batcher.commit(step, [[5]])
    assert batcher.make_room() == [row]


@pytest.mark.parametrize("ends", ["reader", "abort"])
def test_a_row_can_end_while_it_waits_for_its_slot_again(ends: str) -> None:
    """By its reader, which has the last tokens only now; or because nobody wants it any more."""
    card = Card(1)
    row = Asked(0, (1, 2, 3), 20, background=True, fields={}).row()
    card.engine.add(row, ReadsAlong(1) if ends == "reader" else None)
    card.engine.step()
    card.engine.add(Asked(1, (4, 5, 6), 3, background=False, fields={}).row())
    done = card.engine.step()
    assert row.slot is None
    if ends == "reader":
        assert [one.sequence for one in done] == [row]
        assert row.finish_reason is FinishReason.STOP
        assert len(row.output_ids) == 1
    else:
        assert row in card.batcher.waiting
        card.engine.abort(row)
        assert row.finish_reason is FinishReason.ABORT
    assert not card.batcher.waiting
    while card.engine.busy:
        card.engine.step()
    assert not any(vars(card.engine._times)[name] for name in TABLES)


@pytest.mark.parametrize("reuse", [True, False])
def test_a_prompt_that_is_scored_is_scored_once_however_often_it_is_computed(reuse: bool) -> None:
    fields = {"prompt_logprobs": 1, "temperature": 0.0}
    asked = Asked(0, tuple(range(10, 33)), 3, background=True, fields=fields)
    card = Card(2, options={"prefix_reuse": reuse})
    # What another row left in a slot has no logits for this one.
    card.run([(0, Asked(5, asked.prompt, 3, background=False, fields={}))])
    row = asked.row()
    card.engine.add(row)
    assert row.prompt_logprobs is not None
    for _ in range(5):
        card.engine.step()
        card.batcher._preempt(row)
        card.engine._picker.preempt(row)
        card.engine._times.preempt(row)
        card.batcher.admit()
        assert row.num_computed <= len(row.prompt_logprobs) < len(row.prompt_ids)
        assert not reuse or row.num_computed == len(row.prompt_logprobs)
        if reuse and len(row.prompt_logprobs) > 12:
            break
    while card.engine.busy:
        card.engine.step()
    alone = Card(1).run([(0, asked)])[0][0].sequence
    assert row.prompt_logprobs == alone.prompt_logprobs
    assert row.output_ids == alone.output_ids
