"""Batches through deaths at any change of the disk: nothing is lost, nothing comes twice."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from batch_places import (
    BROKEN,
    Clock,
    Death,
    HeldFleet,
    Killed,
    completion,
    content,
    death,
    ended,
    given,
    jsonl,
    lines_of,
    model_context,
    opened,
    text_of,
    until,
)
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule

from qaic_ray.serve.api_errors import ApiError
from qaic_ray.serve.batches import request_lines
from qaic_ray.serve.batches.batch_record import NewBatch
from qaic_ray.serve.batches.outputs import INPUTS_SHA256, OUTPUTS_SHA256
from qaic_ray.serve.batches.pages import Paging
from qaic_ray.worker.text import mixed_seed

COMPLETIONS = "/v1/completions"
DAY_S = 24 * 3600
ENDED = ("completed", "expired", "cancelled", "failed")
RANK = {"validating": 0, "in_progress": 1, "finalizing": 2, "cancelling": 2}
RANK |= dict.fromkeys(ENDED, 3)
CONTEXT = model_context()


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(request_lines, "GIVE_WAY_S", 0.0)


def tokens(text: str) -> tuple[int, ...]:
    return tuple(CONTEXT.encoder.tokenizer.encode(text))


class Lines:
    """The requests of a batch, and what each must be answered with."""

    def __init__(self, kinds: list[str]) -> None:
        self.kinds = kinds
        self.lines = []
        for number, kind in enumerate(kinds):
            prompt: object = {"list": ["a", f"b{number}"], "long": "x" * 99, "broken": BROKEN}.get(
                kind, f"text {number % 3}"
            )
            fields: dict[str, Any] = {"seed": number} if kind == "seed" else {}
            fields |= {"temperature": 1.0, "n": 2} if kind == "two" else {}
            self.lines.append(completion(f"c{number}", prompt, **fields))

    def texts(self, batch_id: str) -> dict[str, list[str]]:
        """custom_id -> the texts of its choices; nothing for a request that fails."""
        texts, index = {}, 0
        for number, kind in enumerate(self.kinds):
            prompts = ["a", f"b{number}"] if kind == "list" else [f"text {number % 3}"]
            found = []
            for prompt in prompts:
                seed = number if kind == "seed" else mixed_seed("batch", batch_id, index)
                samples = range(2 if kind == "two" else 1)
                found += [text_of(tokens(prompt), seed, sample) for sample in samples]
                index += 1
            if kind not in ("long", "broken"):
                texts[f"c{number}"] = found
        return texts


KINDS = st.sampled_from(["plain", "plain", "plain", "seed", "two", "list", "long", "broken"])


class AnyDeath(RuleBasedStateMachine):
    """Clients, cards, time and deaths in any order; at the end every batch is as it should be.

    Threads decide what a death meets, so nothing that is drawn may depend on that.
    """

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(prefix="qaic-ray-batches-"))
        self.clock = Clock()
        self.batches: dict[str, Lines] = {}
        self.cancelled: set[str] = set()
        self.told: dict[str, dict[str, Any]] = {}
        self.most_places = 0
        self.dying = death()
        self.death: Death = self.dying.__enter__()
        self._open()

    def _open(self) -> None:
        """A new process; it may die before it is up."""
        self.fleet = HeldFleet(is_free=False)
        try:
            self.manager = opened(self.folder, self.fleet, clock=self.clock)
        except Killed:
            self.death.undo()
            self._open()

    def _restart(self) -> None:
        """A death: nothing changes the disk any more, then a new process begins."""
        self.death.bury(self.manager)
        self.most_places = max(self.most_places, self.fleet.most)
        self._open()
        self._look()

    def _living(self, do: Callable[[], None]) -> None:
        with suppress(Killed):
            do()
        if self.death.has_come:
            self._restart()
        else:
            self._look()

    def _look(self) -> None:
        """Nothing that was told is taken back."""
        for id_ in self.batches:
            batch, before = self.manager.get(id_), self.told.get(id_)
            counts = batch["request_counts"]
            assert counts["completed"] + counts["failed"] <= max(counts["total"], 0)
            if before is not None:
                assert RANK[before["status"]] <= RANK[batch["status"]]
                if before["status"] in ENDED:
                    assert batch == before
                elif before["status"] == batch["status"]:
                    assert counts["completed"] >= before["request_counts"]["completed"]
            self.told[id_] = batch

    @rule(kinds=st.lists(KINDS, min_size=1, max_size=6))
    def create(self, kinds: list[str]) -> None:
        def do() -> None:
            lines = Lines(kinds)
            file_id = given(self.manager, jsonl(lines.lines))
            batch = self.manager.create(NewBatch(COMPLETIONS, file_id))
            self.batches[batch["id"]] = lines

        if len(self.batches) < 4:
            self._living(do)

    @rule(num_rows=st.integers(1, 6))
    def cards_answer(self, num_rows: int) -> None:
        self._living(lambda: self.fleet.answer(num_rows) and None)

    @rule(number=st.integers(0, 3))
    def cancel(self, number: int) -> None:
        id_ = next(iter(list(self.batches)[number:]), None)
        if id_ is None or len(self.cancelled) > 1:
            return

        def do() -> None:
            # What has ended, or is about to, refuses.
            with suppress(ApiError):
                self.manager.cancel(id_)

        self.cancelled.add(id_)
        self._living(do)

    @rule(num_changes=st.integers(0, 40))
    def die_soon(self, num_changes: int) -> None:
        self.death.after(num_changes)
        if self.death.has_come:
            self._restart()

    @rule(is_lost=st.booleans())
    def end_and_begin(self, is_lost: bool) -> None:
        """The server is told to end, or its last card was lost."""
        if is_lost:
            self.fleet.close()
        with suppress(Killed):
            self.manager.close()
        self._restart()

    @rule(hours=st.sampled_from([1, 13]))
    def time_passes(self, hours: int) -> None:
        self.clock.now_s += 3600 * hours
        self._living(lambda: None)

    @rule()
    def others_work(self) -> None:
        """The batches' own threads get time."""
        until(lambda: self.death.has_come or self.fleet.num_open or not self.manager.num_open)
        self._living(lambda: None)

    def teardown(self) -> None:
        try:
            self._check()
        finally:
            self.death.bury(self.manager)
            self.dying.__exit__(None, None, None)
            shutil.rmtree(self.folder)

    def _check(self) -> None:
        # A thread that met its death is of a dead process: only a new one goes on.
        self._restart()
        self.fleet.let_run()
        files = set()
        # A client that saw the server die as it made a batch finds that one in the list.
        every = [batch["id"] for batch in self.manager.list(Paging(100))["data"]]
        assert set(self.batches) <= set(every)
        for id_ in every:
            batch = ended(self.manager, id_)
            files |= {batch["input_file_id"], batch["output_file_id"], batch["error_file_id"]}
            if id_ in self.batches:
                self._check_batch(batch, self.batches[id_])
        assert self.fleet.most <= 2 * self.fleet.slots
        assert self.most_places <= 2 * self.fleet.slots
        kept = {path.name for path in (self.folder / "files").iterdir()}
        told = files - {None}
        outputs = {name for name in kept if self.manager.files.get(name).purpose == "batch_output"}
        assert outputs == told & outputs
        assert told <= kept
        # Nothing half made is left, either.
        assert kept == {each["id"] for each in self.manager.files.list(Paging(1000))["data"]}
        assert {path.name for path in (self.folder / "batches").iterdir()} == set(every)

    def _check_batch(self, batch: dict[str, Any], lines: Lines) -> None:
        output = lines_of(self.manager, batch["output_file_id"])
        errors = lines_of(self.manager, batch["error_file_id"])
        named = [line["custom_id"] for line in output + errors]
        assert len(named) == len(set(named))
        every = [line["custom_id"] for line in lines.lines]
        expected = lines.texts(batch["id"])
        for line in output:
            choices = line["response"]["body"]["choices"]
            assert [choice["text"] for choice in choices] == expected[line["custom_id"]]
        if batch["status"] == "completed":
            assert sorted(named) == sorted(every)
            assert {line["custom_id"] for line in output} == set(expected)
        elif batch["status"] == "expired":
            assert sorted(named) == sorted(every)
            assert self.clock.now_s >= batch["created_at"] + DAY_S
        else:
            assert batch["status"] == "cancelled"
            assert batch["id"] in self.cancelled
            assert set(named) <= set(every)
        counts = batch["request_counts"]
        assert (counts["completed"], counts["failed"]) == (len(output), len(errors))
        digest = hashlib.sha256(
            content(self.manager, batch["output_file_id"])
            + content(self.manager, batch["error_file_id"])
        )
        assert batch["metadata"] == {
            INPUTS_SHA256: hashlib.sha256(jsonl(lines.lines)).hexdigest(),
            OUTPUTS_SHA256: digest.hexdigest(),
        }


TestAnyDeath = AnyDeath.TestCase
TestAnyDeath.settings = settings(
    max_examples=max(5, settings().max_examples // 2), stateful_step_count=25
)


@pytest.mark.parametrize("every", [5, pytest.param(1, marks=pytest.mark.slow)])
def test_a_death_at_any_change_of_the_disk_leaves_a_batch_that_goes_on(
    tmp_path: Path, every: int
) -> None:
    """From the first change of a batch's life to the last, one death each."""
    data = jsonl(Lines(["plain", "list", "long", "two"]).lines)
    with death() as dying:

        def life(folder: Path) -> dict[str, Any] | None:
            fleet = HeldFleet()
            manager = opened(folder, fleet)
            try:
                file_id = given(manager, data)
                batch = manager.create(NewBatch(COMPLETIONS, file_id))
                until(lambda: dying.has_come or manager.get(batch["id"])["status"] == "completed")
                return batch
            except Killed:
                return None
            finally:
                dying.bury(manager)

        life(tmp_path / "whole")
        num_changes = dying.num_changes
        assert num_changes > 30
        for number in range(1, num_changes, every):
            folder = tmp_path / str(number)
            folder.mkdir()
            dying.after(number)
            batch = None
            with suppress(Killed):  # before there was a place to work at
                batch = life(folder)
            dying.undo()
            with opened(folder, HeldFleet()) as manager:
                page = manager.list(Paging(100))
                ids = [each["id"] for each in page["data"]]
                assert len(ids) <= 1
                assert batch is None or ids == [batch["id"]]
                assert os.listdir(folder / "batches") == ids
                for id_ in ids:
                    done = ended(manager, id_)
                    assert done["request_counts"] == {"total": 4, "completed": 3, "failed": 1}
                    for line in lines_of(manager, done["output_file_id"]):
                        choices = line["response"]["body"]["choices"]
                        texts = Lines(["plain", "list", "long", "two"]).texts(id_)
                        assert [each["text"] for each in choices] == texts[line["custom_id"]]
                    outputs = [done["output_file_id"], done["error_file_id"]]
                    kept = manager.files.list(Paging(100), "batch_output")["data"]
                    assert sorted(each["id"] for each in kept) == sorted(outputs)
                files = [each["id"] for each in manager.files.list(Paging(100))["data"]]
                assert sorted(os.listdir(folder / "files")) == sorted(files)
            shutil.rmtree(folder)
