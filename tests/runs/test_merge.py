"""Shards of a run, run by drivers of their own and joined: the rows of the undivided run."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet
from shard_drivers import Killed, drive, resumed_run, run_of

from qaic_ray.errors import QaicRayError, UsageError
from qaic_ray.pipeline.request import RunRequest
from qaic_ray.rows import Row
from qaic_ray.runs.shards import merge as merging
from qaic_ray.runs.shards.merge import merge
from qaic_ray.runs.shards.shard_runs import shard_runs


@pytest.fixture(autouse=True, scope="module")
def _no_waiting_for_the_disk() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda fd: None)
        patch.setattr(os, "fdatasync", lambda fd: None)
        yield


def lay(folder: Path, counts: list[int]) -> Path:
    """Files of so many rows; a few rows are none, or are refused."""
    folder.mkdir(parents=True)
    number = 0
    for file, count in enumerate(counts):
        with (folder / f"p{file:03}.jsonl").open("w") as lines:
            for _ in range(count):
                words = "fail" if number % 11 == 5 else "row"
                row = {"id": f"r{number}", "prompt": f"{words} {number} \u2028é"}
                lines.write("nothing\n" if number % 13 == 7 else json.dumps(row) + "\n")
                number += 1
    return folder


def shards_of(here: Path, count: int, **options: Any) -> list[Path]:
    """The run folders of all shards, each run to its end."""
    folders = []
    for number in range(1, count + 1):
        request = run_of(here, prompts=str(here / "in"), shard=f"{number}/{count}", **options)
        folders.append(drive(request).folder)
    return folders


def rows_in(path: Path) -> list[dict[str, Any]]:
    """Rows without what depends on the card that answered."""
    kept = []
    for line in path.read_text().split("\n")[:-1]:
        row = json.loads(line)
        named = ("index", "id", "prompt", "text", "finish_reason", "error", "token_ids")
        kept.append({name: row.get(name) for name in named})
    return kept


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An undivided run of 100 rows in 5 files, and its shards."""
    here = tmp_path_factory.mktemp("done")
    lay(here / "in", [30, 10, 20, 25, 15])
    drive(run_of(here / "whole", prompts=str(here / "in"), seed=0))
    shards_of(here, 4)
    return here


def runs_in(here: Path) -> list[Path]:
    return sorted((here / "runs").iterdir())


def whole_outputs(here: Path) -> Path:
    (folder,) = (here / "whole" / "runs").iterdir()
    return folder / "outputs.jsonl"


def test_merged_rows_are_those_of_the_undivided_run(done: Path, tmp_path: Path) -> None:
    proof = merge(runs_in(done)[::-1], tmp_path / "all", part_rows=30)
    outputs = tmp_path / "all" / "outputs.jsonl"
    assert rows_in(outputs) == rows_in(whole_outputs(done))
    assert [row["index"] for row in rows_in(outputs)] == list(range(100))
    errors = [row for row in rows_in(outputs) if row["error"] is not None]
    assert rows_in(tmp_path / "all" / "errors.jsonl") == errors
    assert json.loads((tmp_path / "all" / "proof.json").read_text()) == proof


def test_the_proof_is_what_a_third_party_counts(done: Path, tmp_path: Path) -> None:
    """As docs/how-to/many-rows.md checks it, with sha256 and a count of lines."""
    merge(runs_in(done), tmp_path / "all", part_rows=30)
    proof = json.loads((tmp_path / "all" / "proof.json").read_text())
    data = (tmp_path / "all" / "outputs.jsonl").read_bytes()
    assert hashlib.sha256(data).hexdigest() == proof["outputs_sha256"]
    assert data.count(b"\n") == proof["rows_in"] == proof["rows_ok"] + proof["rows_error"] == 100
    errors = (tmp_path / "all" / "errors.jsonl").read_bytes()
    assert hashlib.sha256(errors).hexdigest() == proof["errors_sha256"]
    assert errors.count(b"\n") == proof["rows_error"]
    digests = b"".join(bytes.fromhex(shard["inputs_sha256"]) for shard in proof["shards"])
    assert hashlib.sha256(digests).hexdigest() == proof["inputs_sha256"]
    for file in proof["files"]:
        content = (done / "in" / file["name"]).read_bytes()
        assert file == {
            "name": file["name"],
            "bytes": len(content),
            "sha256": hashlib.sha256(content).hexdigest(),
        }
    assert [shard["first_row"] for shard in proof["shards"]] == [0, 30, 60, 85]


def test_merged_again_it_is_the_same_bytes(done: Path, tmp_path: Path) -> None:
    target, parts = tmp_path / "all", tmp_path / "all" / "parts"

    def all_bytes() -> dict[str, bytes]:
        return {
            str(p.relative_to(target)): p.read_bytes() for p in target.rglob("*") if p.is_file()
        }

    merge(runs_in(done), target, parts=str(parts), part_rows=30)
    before = all_bytes()
    assert set(before) == {
        *("outputs.jsonl", "errors.jsonl", "proof.json", "parts/_SUCCESS", "parts/_MERGE"),
        *(f"parts/part-{n:05}.parquet" for n in range(4)),
    }
    merge(runs_in(done), target, parts=str(parts), part_rows=30)
    assert all_bytes() == before
    read = [
        row for n in range(4) for row in parquet.read_table(parts / f"part-{n:05}.parquet")["id"]
    ]
    assert [str(value) for value in read] == [
        str(r["id"]) for r in rows_in(target / "outputs.jsonl")
    ]
    with pytest.raises(UsageError, match=r"holds other parts \(_SUCCESS\)"):
        merge(runs_in(done), tmp_path / "other", parts=str(parts), part_rows=31)


@settings(max_examples=settings().max_examples // 2)
@given(st.integers(0, 200), st.booleans())
def test_whatever_ends_a_merge_nothing_half_written_has_its_name(
    done: Path, tmp_path_factory: pytest.TempPathFactory, at: int, has_old: bool
) -> None:
    """Killed at its n-th line, or while the parts are written; then done again."""
    here = tmp_path_factory.mktemp("killed")
    target, parts = here / "all", here / "parts"
    if has_old:
        merge(runs_in(done), target, part_rows=7)
    old = (target / "proof.json").read_bytes() if has_old else None
    num_lines = 0
    real = merging._Merged._write

    def write(merged: Any, line: bytes, path: Path, number: int) -> None:
        nonlocal num_lines
        num_lines += 1
        if num_lines > at:
            raise Killed
        real(merged, line, path, number)

    class Dying(merging.PartFiles):
        def take(self, line: bytes) -> None:
            nonlocal num_lines
            num_lines += 1
            if num_lines > at:
                raise Killed
            super().take(line)

    def finished() -> bool:
        return (parts / "_SUCCESS").exists()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(merging._Merged, "_write", write)
        patch.setattr(merging, "PartFiles", Dying)
        try:
            merge(runs_in(done), target, parts=str(parts), part_rows=7)
        except Killed:
            assert not finished()
    if at < 100:
        assert target.exists() is has_old
    if target.exists():
        data = (target / "outputs.jsonl").read_bytes()
        proof = json.loads((target / "proof.json").read_bytes())
        assert hashlib.sha256(data).hexdigest() == proof["outputs_sha256"]
        assert old in (None, (target / "proof.json").read_bytes())
    for part in parts.glob("*.parquet"):
        assert parquet.read_metadata(part).num_rows in (7, 2)
    merge(runs_in(done), target, parts=str(parts), part_rows=7)
    assert rows_in(target / "outputs.jsonl") == rows_in(whole_outputs(done))
    files = [parts / f"part-{n:05}.parquet" for n in range(15)]
    assert sum(parquet.read_metadata(file).num_rows for file in files) == 100
    assert finished()


@settings(max_examples=settings().max_examples // 3)  # of up to a dozen runs each
@given(
    st.lists(st.integers(1, 20), min_size=1, max_size=6),
    st.integers(1, 4),
    st.lists(st.tuples(st.integers(1, 4), st.integers(0, 30)), max_size=4),
)
def test_killed_and_resumed_shards_are_the_undivided_run(
    tmp_path_factory: pytest.TempPathFactory,
    counts: list[int],
    count: int,
    kills: list[tuple[int, int]],
) -> None:
    here = tmp_path_factory.mktemp("shards")
    lay(here / "in", counts)
    count = min(count, sum(counts))
    drive(run_of(here / "whole", prompts=str(here / "in"), seed=0))
    folders = []
    for number in range(1, count + 1):
        options = {"output_parts": str(here / "parts"), "part_rows": 4}
        request = run_of(here, prompts=str(here / "in"), shard=f"{number}/{count}", **options)
        for at in [*(at for shard, at in kills if shard == number), 10**9]:
            folder, ended = killed_after(request, at)
            request = resumed_run(folder)
            if ended:
                break
        folders.append(folder)
    proof = merge(folders, here / "all", part_rows=100)
    assert rows_in(here / "all" / "outputs.jsonl") == rows_in(whole_outputs(here))
    assert proof["rows_in"] == sum(counts)
    parts = sorted((here / "parts").glob("*.parquet"))
    texts = [text for part in parts for text in parquet.read_table(part)["text"].to_pylist()]
    assert texts == [row["text"] for row in rows_in(whole_outputs(here))]


def killed_after(request: RunRequest, num_rows: int) -> tuple[Path, bool]:
    """The folder of a run that is killed when it has shown so many rows, and whether it ended."""
    told = 0

    def die(row: Row) -> None:
        nonlocal told
        told += 1
        if told > num_rows:
            raise Killed

    try:
        return drive(request, on_row=die).folder, True
    except Killed:
        runs = Path(request.run.output) if request.resume is None else request.resume.parent
        begun = sorted(runs.iterdir(), key=lambda run: (run / "request.yaml").stat().st_mtime_ns)
        return request.resume or begun[-1], False


# -- what does not fit together


@pytest.fixture
def two(tmp_path: Path) -> Path:
    lay(tmp_path / "in", [4, 4])
    shards_of(tmp_path, 2)
    return tmp_path


def refused(folders: list[Path]) -> str:
    with pytest.raises(UsageError) as caught:
        shard_runs(folders)
    return str(caught.value)


def test_what_is_missing_is_said_with_what_to_do(two: Path) -> None:
    first, second = runs_in(two)
    assert "Shard 2/2 is missing: run it with --shard 2/2" in refused([first])
    assert "Shard 1/2 is there twice" in refused([first, first])
    (second / "report.json").unlink()
    said = refused([first, second])
    assert said.startswith("Shard 2/2 is unfinished: go on with `qaic-ray run --resume ")
    assert str(second) in said
    drive(resumed_run(second))
    assert len(shard_runs([second, first])) == 2
    whole = drive(run_of(two / "whole", prompts=str(two / "in"))).folder
    assert "is not the run of a shard" in refused([whole])


def test_a_run_that_still_goes_on_is_waited_for(two: Path) -> None:
    from filelock import FileLock

    first, second = runs_in(two)
    with FileLock(second / ".lock"):
        assert f"Shard 2/2 is being run in {second}" in refused([first, second])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"qpc": "another"}, 'qpc was "q" and is "another"'),
        ({"seed": 4}, "run_seed was 0 and is 4"),
        ({"generation_len": 9}, "sampling.max_tokens was not set and is 9"),
        ({"sample": "50%"}, "sample was not set and is 0.5"),
        ({"prompts": "other"}, "one has p001.jsonl of 144 bytes where the other has p001.jsonl of"),
        ({"prompts": "edited"}, "p001.jsonl had other content"),
    ],
)
def test_shards_of_different_wholes_are_not_merged(
    two: Path, changes: dict[str, Any], words: str
) -> None:
    first, _ = runs_in(two)
    lay(two / "other", [4, 5])
    shutil.copytree(two / "in", two / "edited")
    edited = two / "edited" / "p001.jsonl"
    edited.write_text(edited.read_text().replace("row 4", "ROW 4"))
    changes = dict(changes)
    qpc = changes.pop("qpc", "q")
    name = changes.pop("prompts", "in")
    options = {"prompts": str(two / name), "shard": "2/2", **changes}
    if name == "edited":  # both read it, as there are fewer files than shards
        options["prompts"] = str(two / "edited" / "p001.jsonl")
        alone = run_of(two, prompts=str(two / "in" / "p001.jsonl"), shard="1/2")
        first = drive(alone).folder
    request = run_of(two, **options)
    other = drive(request, qpc=qpc).folder
    said = refused([first, other])
    assert f"{other} is not of the same whole as {first}: " in said
    assert words in said


def test_outputs_that_were_touched_are_not_merged(two: Path, tmp_path: Path) -> None:
    folders = runs_in(two)
    path = folders[1] / "outputs.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    for damaged, words in [
        ([*lines[:-1], lines[-1].replace("Not", "not")], "is not what its run wrote"),
        (lines[:-1], "is not what its run wrote"),
        ([lines[1], lines[0], *lines[2:]], "its line 1 is not row 0"),
        ([*lines[:-1], lines[-1][:-1]], "is damaged"),
    ]:
        path.write_text("".join(damaged))
        with pytest.raises(UsageError, match=words):
            merge(folders, tmp_path / "all", part_rows=9)
        assert not (tmp_path / "all").exists()
    drive(resumed_run(folders[1]))
    merge(folders, tmp_path / "all", part_rows=9)


def test_a_folder_of_something_else_is_not_replaced(two: Path, tmp_path: Path) -> None:
    target = tmp_path / "mine"
    target.mkdir()
    (target / "thesis.tex").write_text("precious")
    with pytest.raises(UsageError, match=r"holds thesis\.tex, and is not replaced"):
        merge(runs_in(two), target, part_rows=9)
    (target / "thesis.tex").rename(target / "outputs.jsonl")
    with pytest.raises(UsageError, match="is not replaced"):
        merge(runs_in(two), target, part_rows=9)
    with pytest.raises(UsageError, match="is not a folder"):
        merge(runs_in(two), target / "outputs.jsonl", part_rows=9)


def test_a_disk_that_refuses_is_one_sentence(
    two: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(merging._Merged, "_write", full)
    with pytest.raises(QaicRayError, match=r"all cannot be written: No space left on device\."):
        merge(runs_in(two), tmp_path / "all", part_rows=9)
    assert not (tmp_path / "all").exists()
