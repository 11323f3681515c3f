"""A prompts file that changes under its run: the rows of one content, and a way to go on."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from simulated_cards import DirectReader, SimulatedCards

from qaic_ray.dispatch.dispatcher import Dispatcher
from qaic_ray.dispatch.policy import Policy
from qaic_ray.errors import UsageError
from qaic_ray.formats.frozen_file import BLOCK_BYTES
from qaic_ray.options import RunOptions
from qaic_ray.pipeline.request import RunRequest
from qaic_ray.rows import Row
from qaic_ray.runs.delivery import Proof, RowWriter
from qaic_ray.runs.driver import Audience, Driver
from qaic_ray.runs.journal import Journal
from qaic_ray.runs.result import Cause, FleetResult

NUM_ROWS = 120
TEXT = "x" * (BLOCK_BYTES // 40)  # three blocks


def line(index: int, text: str = TEXT) -> bytes:
    return json.dumps({"prompt": f"{index} {text}"}).encode() + b"\n"


CONTENT = b"".join(map(line, range(NUM_ROWS)))


@pytest.fixture(autouse=True, scope="module")
def _no_waiting_for_the_disk() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda fd: None)
        patch.setattr(os, "fdatasync", lambda fd: None)
        yield


@pytest.fixture
def request_of(tmp_path: Path) -> RunRequest:
    path = tmp_path / "p.jsonl"
    path.write_bytes(CONTENT)
    return RunRequest("r", "m", Path("q"), RunOptions(prompts=str(path), seed=0))


def run(
    request: RunRequest, folder: Path, meanwhile: Callable[[], object] = lambda: None
) -> tuple[FleetResult, Proof]:
    """A run, in the middle of which something happens: when its first row is shown."""
    entered = request.open_input()
    shown: list[Row] = []

    def on_row(row: Row) -> None:
        if not shown:
            meanwhile()
        shown.append(row)
        write(row)

    folder.mkdir(exist_ok=True)
    resumed = request.resume is not None
    with (
        Journal(folder, {"input": entered.source}, new_input=request.new_input) as journal,
        RowWriter(folder, resumed=resumed) as write,
    ):
        cards = SimulatedCards([0.0], slots=2)
        result = Driver(
            cards,
            entered.prompts,
            Audience(on_row=on_row, on_earlier_row=write.rewrite),
            dispatcher=Dispatcher(policy=Policy(read_ahead=8)),
            clock=cards.clock,
            journal=journal,
            reader=DirectReader,
        ).run()
    complete = result.broken_off is None
    return result, write.proof(result.rows_in, result.inputs_sha256, complete=complete)


def prompts_of(folder: Path) -> list[str]:
    lines = (folder / "outputs.jsonl").read_text().splitlines()
    return [json.loads(line)["prompt"] for line in lines]


def original() -> list[str]:
    return [json.loads(one)["prompt"] for one in CONTENT.splitlines()]


def shorten(path: Path) -> None:
    os.truncate(path, len(CONTENT) // 2)


def overwrite(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(len(CONTENT) * 2 // 3)
        file.write(b"y")


@pytest.mark.parametrize("change", [shorten, overwrite])
def test_rows_of_one_content_are_published_and_the_run_goes_on_with_it(
    change: Callable[[Path], None], request_of: RunRequest, tmp_path: Path
) -> None:
    path, folder = tmp_path / "p.jsonl", tmp_path / "run"
    result, proof = run(request_of, folder, lambda: change(path))
    assert result.broken_off is not None
    assert result.broken_off.cause is Cause.INPUT
    assert "has changed since the run began" in result.broken_off.error
    assert not proof.holds
    published = prompts_of(folder)
    assert 0 < len(published) < NUM_ROWS
    assert published == original()[: len(published)]

    again = replace(request_of, resume=folder)
    with pytest.raises(UsageError, match="--input"):
        run(again, folder)

    moved = tmp_path / "elsewhere"
    moved.write_bytes(CONTENT)
    again = replace(again, new_input=True).with_run(prompts=str(moved), prompts_format="jsonl")
    result, proof = run(again, folder)
    assert result.ok
    assert proof.holds
    assert prompts_of(folder) == original()


def test_a_file_that_was_mended_behind_the_answered_rows_is_gone_on_with(
    request_of: RunRequest, tmp_path: Path
) -> None:
    path, folder = tmp_path / "p.jsonl", tmp_path / "run"
    run(request_of, folder, lambda: shorten(path))
    answered = CONTENT.splitlines(keepends=True)[: len(prompts_of(folder))]
    path.write_bytes(b"".join(answered) + line(999))
    result, proof = run(replace(request_of, resume=folder, new_input=True), folder)
    assert result.ok
    assert proof.holds
    assert prompts_of(folder) == [*original()[: len(answered)], f"999 {TEXT}"]


def test_a_file_with_other_answered_rows_is_refused(request_of: RunRequest, tmp_path: Path) -> None:
    path, folder = tmp_path / "p.jsonl", tmp_path / "run"
    run(request_of, folder, lambda: shorten(path))
    path.write_bytes(line(999) + CONTENT)
    with pytest.raises(UsageError, match="Row 0 of the input"):
        run(replace(request_of, resume=folder, new_input=True), folder)


def test_what_is_appended_is_not_of_the_run_nor_of_its_resumption(
    request_of: RunRequest, tmp_path: Path
) -> None:
    path, folder = tmp_path / "p.jsonl", tmp_path / "run"

    def append() -> None:
        with path.open("ab") as file:
            file.write(line(999))

    result, proof = run(request_of, folder, append)
    assert result.ok
    assert proof.holds
    result, proof = run(replace(request_of, resume=folder), folder)
    assert result.ok
    assert proof.holds
    assert prompts_of(folder) == original()
