"""Part files of a run: every row once, whatever stops the run and however often."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import dataset, parquet
from s3_here import BUCKET, objects, s3_server, set_environment
from simulated_cards import answer

from qaic_ray.errors import QaicRayError, Unfinished, UsageError
from qaic_ray.formats.part_places import LocalFolder, PartPlace, part_place
from qaic_ray.rows import FinishReason, Prompt, Row
from qaic_ray.runs.delivery import RowWriter
from qaic_ray.runs.shards.part_files import (
    PARTS_NAME,
    PartFiles,
    PartNames,
    check_part_place,
)

ROWS = [
    replace(answer(Prompt(n, f"row {n}"), "card 0"), stop_reason=n % 3 or "x") for n in range(50)
]


class Killed(BaseException):
    """The process ends here."""


@dataclass(frozen=True)
class FailingFolder(LocalFolder):
    """A folder whose n-th put fails, before or after the file is there."""

    fails_at: int = -1
    is_there: bool = False
    puts: list[str] = field(default_factory=list)

    def put(self, name: str, file: Path) -> None:
        self.puts.append(name)
        if len(self.puts) == self.fails_at:
            if self.is_there:
                super().put(name, file)
            raise QaicRayError(f"{name}: no room.")
        super().put(name, file)


def session(
    folder: Path,
    place: PartPlace,
    *,
    rows: list[Row] = ROWS,
    part_rows: int = 7,
    names: PartNames = PartNames(),  # noqa: B008
    earlier: int = 0,
    killed_at: int | None = None,
    is_drained: bool = False,
) -> list[str]:
    """One session of a run that has `earlier` rows in its journal; `is_drained`: it is killed when
    the parts that are full have been looked at."""
    folder.mkdir(exist_ok=True)
    resumed = (folder / "outputs.jsonl").exists()
    with (
        RowWriter(folder, resumed=resumed) as write,
        PartFiles(folder, place, names, part_rows=part_rows, lines=write.open_lines()) as parts,
    ):
        write.on_line = parts.take
        for number, row in enumerate(rows):
            if number == killed_at:
                deadline_s = time.monotonic() + 20
                while is_drained and len(parts._made) < number // part_rows:
                    assert time.monotonic() < deadline_s
                    time.sleep(0.001)
                raise Killed
            (write.rewrite if number < earlier else write)(row)
        return [part.name for part in parts.finish(write.proof(len(rows), "in"))]


def table_of(folder: Path) -> list[dict[str, Any]]:
    files = sorted(path for path in folder.iterdir() if path.suffix == ".parquet")
    return [row for file in files for row in parquet.read_table(file).to_pylist()]


def as_read(rows: list[Row]) -> list[tuple[int, str, Any]]:
    return [(row.index, row.text, row.stop_reason) for row in rows]


def found(folder: Path) -> list[tuple[int, str, Any]]:
    return [
        (row["index"], row["text"], row["stop_reason"] or row["stop_reason_token"])
        for row in table_of(folder)
    ]


def digests(folder: Path) -> dict[str, str]:
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.iterdir()
        if path.is_file()
    }


@pytest.fixture(autouse=True, scope="module")
def _no_waiting_for_the_disk() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda fd: None)
        yield


def test_parts_hold_the_rows_in_order_and_the_end_mark_has_the_proof(tmp_path: Path) -> None:
    parts = tmp_path / "parts"
    made = session(tmp_path / "run", part_place(str(parts)))
    assert made == [f"part-{n:05}.parquet" for n in range(8)]
    assert found(parts) == as_read(ROWS)
    said = json.loads((parts / "_SUCCESS").read_text())
    lines = (tmp_path / "run" / "outputs.jsonl").read_bytes()
    assert said["proof"]["outputs_sha256"] == hashlib.sha256(lines).hexdigest()
    assert said["proof"]["rows_in"] == 50
    assert {part["name"]: part["sha256"] for part in said["parts"]} == {
        name: digest for name, digest in digests(parts).items() if name != "_SUCCESS"
    }
    assert [(p["first"], p["rows"]) for p in said["parts"][-2:]] == [(42, 7), (49, 1)]
    # Readers of folders of parts leave the mark out by themselves.
    assert dataset.dataset(str(parts), format="parquet").count_rows() == 50


def test_shards_share_a_folder(tmp_path: Path) -> None:
    place = part_place(str(tmp_path / "parts"))
    for number in range(1, 13):
        check_part_place(str(tmp_path / "parts"), f"{number}/12")
        rows = [replace(row, index=at) for at, row in enumerate(ROWS[number * 2 : number * 2 + 2])]
        session(tmp_path / f"run{number}", place, rows=rows, names=PartNames(f"{number}/12"))
    assert [text for _, text, _ in found(tmp_path / "parts")] == [r.text for r in ROWS[2:26]]
    assert (tmp_path / "parts" / "_SUCCESS-03-of-12").exists()
    with pytest.raises(UsageError, match=r"holds parts of another run \(_SUCCESS-03-of-12\)"):
        check_part_place(str(tmp_path / "parts"), "3/12")
    check_part_place(str(tmp_path / "parts"), None)


KILLS = st.lists(
    st.one_of(
        st.tuples(st.just("row"), st.integers(0, 49)),
        st.tuples(st.just("drained"), st.integers(0, 49)),
        st.tuples(st.just("before"), st.integers(1, 8)),
        st.tuples(st.just("after"), st.integers(1, 8)),
    ),
    max_size=4,
)


@settings(max_examples=settings().max_examples // 2)
@given(KILLS, st.integers(1, 20))
def test_whatever_ends_it_every_row_is_there_once(
    tmp_path_factory: pytest.TempPathFactory, kills: list[tuple[str, int]], part_rows: int
) -> None:
    """Killed at a row, or where a part cannot be put, or was and is not noted: and gone on with."""
    here = tmp_path_factory.mktemp("killed")
    run, parts = here / "run", here / "parts"
    parts.mkdir()
    earlier, seen = 0, {}
    for what, at in [*kills, ("row", 50)]:
        place = FailingFolder(parts)
        if what in ("before", "after"):
            place = FailingFolder(parts, fails_at=at, is_there=what == "after")
        killed_at = at if what in ("row", "drained") else None
        with suppress(Killed, Unfinished):
            session(
                *(run, place),
                part_rows=part_rows,
                earlier=earlier,
                killed_at=killed_at,
                is_drained=what == "drained",
            )
        earlier = max(earlier, 50 if killed_at is None else killed_at)
        assert not [path for path in run.iterdir() if path.name.endswith(".parquet.unfinished")]
        there = digests(parts)
        assert {name: there.get(name) for name in seen} == seen
        seen = {name: digest for name, digest in there.items() if name.startswith("part")}
    assert found(parts) == as_read(ROWS)
    said = json.loads((parts / "_SUCCESS").read_text())
    assert {part["name"]: part["sha256"] for part in said["parts"]} == seen


def test_a_finished_part_is_not_written_again(tmp_path: Path) -> None:
    parts, place = tmp_path / "parts", FailingFolder(tmp_path / "parts")
    parts.mkdir()
    with suppress(Killed):
        session(tmp_path / "run", place, killed_at=40, is_drained=True)
    assert len(place.puts) == 5
    again = FailingFolder(parts)
    session(tmp_path / "run", again, earlier=40)
    assert set(place.puts).isdisjoint(again.puts)
    assert len(again.puts) == 4  # the last two rows of parts, the rest, and the mark


def test_what_was_lost_or_torn_is_written_again(tmp_path: Path) -> None:
    parts, place = tmp_path / "parts", part_place(str(tmp_path / "parts"))
    session(tmp_path / "run", place)
    before = digests(parts)
    (parts / "part-00002.parquet").unlink()
    (parts / "part-00003.parquet").write_bytes(b"PAR1")
    ledger = tmp_path / "run" / PARTS_NAME
    ledger.write_bytes(ledger.read_bytes()[:-10])
    session(tmp_path / "run", place, earlier=50)
    assert digests(parts) == before


def test_rows_that_were_tried_again_change_their_part_alone(tmp_path: Path) -> None:
    parts, place = tmp_path / "parts", part_place(str(tmp_path / "parts"))
    failed = replace(ROWS[15], finish_reason=FinishReason.ERROR, error="no", text="")
    session(tmp_path / "run", place, rows=[*ROWS[:15], failed, *ROWS[16:]])
    before = digests(parts)
    session(tmp_path / "run", place, earlier=15)
    changed = {name for name, digest in digests(parts).items() if before[name] != digest}
    assert changed == {"part-00002.parquet", "_SUCCESS"}
    assert found(parts) == as_read(ROWS)


def test_a_run_that_is_not_complete_has_no_last_part_and_no_mark(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    place = part_place(str(tmp_path / "parts"))
    with (
        RowWriter(folder) as write,
        PartFiles(folder, place, PartNames(), part_rows=7, lines=write.open_lines()) as parts,
    ):
        write.on_line = parts.take
        for row in ROWS[:10]:
            write(row)
        assert len(parts.finish(write.proof(10, "in", complete=False))) == 1
    assert set(digests(tmp_path / "parts")) == {"part-00000.parquet"}


def test_a_place_that_refuses_ends_the_run_to_be_gone_on_with(tmp_path: Path) -> None:
    (tmp_path / "parts").mkdir()
    with pytest.raises(Unfinished, match=r"no room\. What was answered is kept.*--resume"):
        session(tmp_path / "run", FailingFolder(tmp_path / "parts", fails_at=2))
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="cannot be made a folder"):
        part_place(str(tmp_path / "file" / "parts"))


def test_parts_in_a_bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with s3_server() as url:
        set_environment(monkeypatch, url)
        uri = f"s3://{BUCKET}/out/parts"
        check_part_place(uri, None)
        with suppress(Killed):
            session(tmp_path / "run", part_place(uri), killed_at=30)
        session(tmp_path / "run", part_place(uri), earlier=30)
        with pytest.raises(UsageError, match="holds parts of another run"):
            check_part_place(uri, None)
        client = objects()
        keys = client.list_objects_v2(Bucket=BUCKET, Prefix="out/")["Contents"]
        local = tmp_path / "parts"
        local.mkdir()
        for key in keys:
            body = client.get_object(Bucket=BUCKET, Key=key["Key"])["Body"].read()
            (local / key["Key"].removeprefix("out/parts/")).write_bytes(body)
        assert client.list_multipart_uploads(Bucket=BUCKET).get("Uploads") is None
        gone = f"s3://no-such-bucket/{uri[-5:]}"
        with pytest.raises(UsageError, match=r"There is no no-such-bucket for s3://no-such"):
            check_part_place(gone, None)
        with pytest.raises(Unfinished, match=r"s3://no-such-bucket/parts/part-00000\.parquet"):
            session(tmp_path / "other", part_place(gone))
    assert found(local) == as_read(ROWS)
    said = json.loads((local / "_SUCCESS").read_text())
    assert {p["name"]: p["sha256"] for p in said["parts"]} | {"_SUCCESS": None} == (
        digests(local) | {"_SUCCESS": None}
    )
