"""A run that is killed anywhere and goes on: every row once, in order, the same file."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from simulated_cards import DirectReader, SimulatedCards, answer

from qaic_ray.dispatch.dispatcher import Event, RowsFinished
from qaic_ray.errors import QaicRayError, UsageError
from qaic_ray.metrics import Span
from qaic_ray.rows import Prompt, Row
from qaic_ray.runs.delivery import Proof, RowWriter
from qaic_ray.runs.driver import Audience, Driver, Progress
from qaic_ray.runs.intake import Fingerprint, row_digest
from qaic_ray.runs.journal import Journal
from qaic_ray.runs.result import FleetResult

RUN: Fingerprint = {"qpc": "q"}

Items = Sequence[Prompt | Row]


@pytest.fixture(autouse=True, scope="module")
def no_waiting_for_the_disk() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda fd: None)
        patch.setattr(os, "fdatasync", lambda fd: None)
        yield


class Killed(BaseException):
    """The process ends here."""


def some(count: int) -> list[Prompt | Row]:
    """Prompts, some with an id, and some rows that cannot be answered."""
    items: list[Prompt | Row] = []
    for i in range(count):
        prompt = Prompt(i, f"p{i % 5}", str(i) if i % 3 else None)
        items.append(Row.failed(prompt, "no", attempts=0) if i % 11 == 7 else prompt)
    return items


def one_card(**options: Any) -> SimulatedCards:
    # Rows end in another order than they came in.
    return SimulatedCards([0.0], seconds_of=lambda p: 1.0 + p.index * 7 % 5, **options)


def drive(
    folder: Path,
    items: Items,
    cards: SimulatedCards | None = None,
    *,
    retry_errors: bool = False,
    **audience: Any,
) -> tuple[FleetResult, Proof]:
    """One process of a run, wired as the run step does it."""
    cards = cards or one_card()
    with (
        Journal(folder, RUN, retry_errors=retry_errors, segment_bytes=5000) as journal,
        RowWriter(folder, resumed=True) as write,
    ):
        seen: Callable[[Row], None] = audience.pop("on_row", lambda row: None)

        def on_row(row: Row) -> None:
            write(row)
            seen(row)

        listeners = Audience(on_row=on_row, on_earlier_row=write.rewrite, **audience)
        driver = Driver(
            cards, iter(items), listeners, clock=cards.clock, journal=journal, reader=DirectReader
        )
        result = driver.run()
    return result, write.proof(result.rows_in, result.inputs_sha256)


def killed(folder: Path, items: Items, cards: SimulatedCards, *, after: int) -> None:
    """A process that ends when `after` rows have been shown."""

    def on_row(row: Row) -> None:
        if row.index + 1 == after:
            raise Killed

    with pytest.raises(Killed):
        drive(folder, items, cards, on_row=on_row)


def outputs(folder: Path) -> bytes:
    return (folder / "outputs.jsonl").read_bytes()


def segments(folder: Path) -> list[Path]:
    return sorted((folder / "journal").iterdir())


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 200 rows that nothing disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    result, proof = drive(folder, some(200))
    assert result.rows_in == 200
    assert proof.holds
    assert len(segments(folder)) > 3
    return folder


def cut_to(folder: Path, contents: Sequence[bytes], num_bytes: int) -> None:
    """Make the journal the first so many bytes of another one."""
    (folder / "journal").mkdir(exist_ok=True)
    for path in segments(folder):
        path.unlink()
    for number, content in enumerate(contents):
        if num_bytes <= 0 and number:
            break
        path = folder / "journal" / f"{number:06}.jsonl"
        path.write_bytes(content[: max(0, num_bytes)])
        num_bytes -= len(content)


def line_ends(contents: Sequence[bytes]) -> list[int]:
    joined = b"".join(contents)
    return [at + 1 for at, byte in enumerate(joined) if byte == 0x0A]


def check_resume(folder: Path, whole: Path) -> None:
    result, proof = drive(folder, some(200))
    digests = b"".join(map(row_digest, some(200)))
    assert proof.inputs_sha256 == hashlib.sha256(digests).hexdigest()
    assert outputs(folder) == outputs(whole)
    assert (folder / "errors.jsonl").read_bytes() == (whole / "errors.jsonl").read_bytes()
    assert result.total.rows == 200
    assert proof.holds


def test_resume_from_prefixes_of_a_journal(whole: Path, tmp_path: Path) -> None:
    contents = [path.read_bytes() for path in segments(whole)]
    ends = line_ends(contents)
    assert len(ends) == 200 + len(contents)
    for num_bytes in [
        0,
        *(end - offset for end, offset in zip(ends[::9], range(99), strict=False)),
    ]:
        cut_to(tmp_path, contents, num_bytes)
        check_resume(tmp_path, whole)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_resume_from_every_byte_prefix_of_a_journal(whole: Path, tmp_path: Path) -> None:
    """Opening makes of every prefix the one that ends with its last whole line; resuming is tried
    from all of those."""
    contents = [path.read_bytes() for path in segments(whole)]
    joined = b"".join(contents)
    starts = [0, *(len(b"".join(contents[: n + 1])) for n in range(len(contents)))]
    last_end = 0
    for num_bytes in range(len(joined) + 1):
        cut_to(tmp_path, contents, num_bytes)
        if joined[:num_bytes].endswith(b"\n") or num_bytes == 0:
            last_end = num_bytes
            check_resume(tmp_path, whole)
            continue
        num_segments = sum(1 for start in starts if start < last_end)
        Journal(tmp_path, RUN).close()
        left = b"".join(path.read_bytes() for path in segments(tmp_path)[:num_segments])
        assert left == joined[:last_end]
        assert len(segments(tmp_path)) == num_segments + 1


# -- kills


class Bomb:
    """Counts calls, and kills at one of them: before it, in its middle or after it."""

    def __init__(self, at: int, when: str) -> None:
        self.calls_left = at
        self.when = when

    def wrap(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **keywords: Any) -> Any:
            self.calls_left -= 1
            if self.calls_left != 0:
                return call(*args, **keywords)
            if self.when == "midway" and call is os_write:
                call(args[0], bytes(args[1])[: len(args[1]) // 2])
            elif self.when == "after":
                call(*args, **keywords)
            raise Killed

        return wrapped


os_write = os.write
KILLS = st.tuples(st.integers(1, 120), st.sampled_from(["before", "midway", "after"]))


@given(kills=st.lists(KILLS, max_size=5), num_cards=st.integers(1, 3))
def test_killed_at_any_call_any_number_of_times(
    kills: list[tuple[int, str]], num_cards: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("run")
    items = some(40)
    shown: list[int] = []

    def cards() -> SimulatedCards:
        return SimulatedCards([0.0] * num_cards, seconds_of=lambda p: 1.0 + p.index * 7 % 5)

    for at, when in kills:
        bomb, doomed = Bomb(at, when), cards()
        doomed.wait = bomb.wrap(doomed.wait)  # type: ignore[method-assign]
        with pytest.MonkeyPatch.context() as patch:
            for name in ("open", "write", "fsync", "fdatasync", "truncate", "replace", "unlink"):
                patch.setattr(os, name, bomb.wrap(getattr(os, name)))
            try:
                drive(folder, items, doomed, on_row=lambda row: shown.append(row.index))
            except Killed:
                continue
    result, proof = drive(folder, items, cards(), on_row=lambda row: shown.append(row.index))

    expected = [item if isinstance(item, Row) else answer(item) for item in items]
    found = [json.loads(line) | {"worker": ""} for line in outputs(folder).splitlines()]
    assert found == [row.to_json() for row in expected]
    errors = (folder / "errors.jsonl").read_bytes().splitlines()
    assert [json.loads(line)["index"] for line in errors] == [
        row.index for row in expected if not row.ok
    ]
    assert proof.holds
    assert result.total.rows == 40
    assert shown == sorted(set(shown)), "a row was shown twice"


def test_what_was_shown_is_not_shown_again(tmp_path: Path) -> None:
    killed(tmp_path, some(60), one_card(), after=25)
    shown: list[int] = []
    drive(tmp_path, some(60), on_row=lambda row: shown.append(row.index))
    assert shown == list(range(shown[0], 60))
    assert 25 <= shown[0] < 40
    shown.clear()
    drive(tmp_path, some(60), on_row=lambda row: shown.append(row.index))
    assert shown == []
    assert len(outputs(tmp_path).splitlines()) == 60


def test_a_run_that_no_card_is_left_for_goes_on_where_there_are_cards(
    whole: Path, tmp_path: Path
) -> None:
    killed(tmp_path, some(200), one_card(), after=90)
    result, proof = drive(tmp_path, some(200), SimulatedCards([None]))
    assert result.broken_off is not None
    assert not result.ok
    assert not proof.holds
    assert outputs(whole).startswith(outputs(tmp_path))
    assert outputs(tmp_path).count(b"\n") >= 90
    check_resume(tmp_path, whole)


def test_an_error_that_quotes_what_no_file_can_hold_ends_no_run(tmp_path: Path) -> None:
    items = [Row.failed(Prompt(0, "p"), 'Unknown field "\ud83d".', attempts=0), Prompt(1, "p")]
    killed(tmp_path, items, one_card(), after=1)
    first = outputs(tmp_path)
    drive(tmp_path, items)
    assert outputs(tmp_path).startswith(first)
    assert json.loads(first)["error"] == 'Unknown field "\\ud83d".'


# -- what is counted


def test_rates_and_counts_are_of_the_whole_run_and_its_working_time(tmp_path: Path) -> None:
    items = [Prompt(i, "same") for i in range(40)]
    first = SimulatedCards([3.0, 3.0], now_s=100.0)
    killed(tmp_path, items, first, after=20)
    second = SimulatedCards([7.0], now_s=5000.0)
    heard: list[Progress] = []
    result, proof = drive(tmp_path, items, second, on_progress=heard.append)
    expected = [answer(item) for item in items]
    tokens = sum(row.generated_tokens for row in expected)
    assert result.total.rows == result.rows_in == proof.rows_ok == 40
    assert result.total.generated_tokens == tokens
    assert [worker.name for worker in result.workers] == ["card 0", "card 1"]
    assert result.workers[1].info is None
    assert result.workers[1].measurement.decode_steps == 0
    assert result.workers[1].measurement.rows > 0
    # A second for each round of eight rows on two cards, and then of four rows on one.
    num_earlier = heard[0].rows_done
    earlier_s, later_s = -(-num_earlier // 8), -(-(40 - num_earlier) // 4)
    assert 20 < num_earlier < 40
    assert result.span == Span(5007.0 - earlier_s, 5007.0 + later_s)
    assert result.tokens_per_s == pytest.approx(tokens / (earlier_s + later_s))
    assert heard[0].rows_read == num_earlier
    assert heard[-1] == Progress(
        rows_read=40, rows_done=40, generated_tokens=tokens, input_exhausted=True
    )


def test_a_run_that_was_done_is_reported_again_without_a_card(tmp_path: Path) -> None:
    before, proof = drive(tmp_path, some(30))
    files = outputs(tmp_path)
    cards = SimulatedCards([None])
    after, again = drive(tmp_path, some(30), cards)
    assert cards.ran == []
    assert (again, outputs(tmp_path)) == (proof, files)
    assert after.total.generated_tokens == before.total.generated_tokens
    assert after.tokens_per_s == pytest.approx(before.tokens_per_s)


# -- inputs


@pytest.mark.parametrize(
    "changed", [Prompt(12, "other"), Prompt(12, "p2", id="new"), Row.failed(Prompt(12, "p2"), "no")]
)
def test_an_input_that_changed_is_refused_naming_the_row(
    tmp_path: Path, changed: Prompt | Row
) -> None:
    killed(tmp_path, some(60), one_card(), after=20)
    before = outputs(tmp_path)
    items = some(60)
    items[12] = changed
    with pytest.raises(UsageError, match=r"Row 12 of the input .* is not the one"):
        drive(tmp_path, items)
    assert outputs(tmp_path) == before
    drive(tmp_path, some(60))


def test_an_input_that_got_shorter_is_refused_and_one_that_got_longer_is_a_stream(
    tmp_path: Path,
) -> None:
    drive(tmp_path, some(20))
    with pytest.raises(UsageError, match=r"ends after 15 rows, .* answered row 19 "):
        drive(tmp_path, some(15))
    result, _ = drive(tmp_path, some(25))
    assert result.total.rows == 25
    whole = tmp_path / "whole"
    whole.mkdir()
    drive(whole, some(25))
    assert outputs(tmp_path) == outputs(whole)


def test_a_row_that_the_journal_has_twice_is_damage(tmp_path: Path) -> None:
    with Journal(tmp_path, RUN) as journal:
        for _ in range(2):
            journal.append(answer(Prompt(3, "p")), 1, 0.0)
        journal.commit()
    with pytest.raises(QaicRayError, match="answers row 3 twice"):
        drive(tmp_path, some(5))


# -- retrying errors


class Failing(SimulatedCards):
    """Every third row is an error."""

    def wait(self, *args: Any) -> Event:
        event = super().wait(*args)
        if not isinstance(event, RowsFinished):
            return event
        return replace(event, rows=tuple(map(self._spoilt, event.rows)))

    def _spoilt(self, row: Row) -> Row:
        if row.index % 3:
            return row
        return Row.failed(Prompt(row.index, row.prompt, row.id), "bad luck", worker=row.worker)


def test_retried_errors_take_their_place(tmp_path: Path) -> None:
    items = [Prompt(i, "same") for i in range(30)]
    failed, proof = drive(tmp_path, items, Failing([0.0]))
    assert (failed.total.failed_rows, proof.rows_error) == (10, 10)
    assert not failed.ok
    cards = SimulatedCards([0.0])
    drive(tmp_path, items, cards)
    assert cards.ran == []
    with pytest.raises(Killed):  # a retry goes on as a retry
        drive(tmp_path, items, retry_errors=True, on_row=_kill_at(12))
    cards = SimulatedCards([0.0])
    result, proof = drive(tmp_path, items, cards)
    answered = sum(len(shard.prompts) for shard in cards.ran)
    assert 0 < answered < 10
    assert result.ok
    assert (proof.rows_ok, proof.rows_error) == (30, 0)
    whole = tmp_path / "whole"
    whole.mkdir()
    drive(whole, items)
    assert outputs(tmp_path) == outputs(whole)
    assert (tmp_path / "errors.jsonl").read_bytes() == b""


def _kill_at(index: int) -> Callable[[Row], None]:
    def on_row(row: Row) -> None:
        if row.index == index:
            raise Killed

    return on_row
