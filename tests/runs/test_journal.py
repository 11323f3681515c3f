"""The journal: rows come back exactly, torn tails go, damage is named, one writer at a time."""

from __future__ import annotations

import dataclasses
import errno
import os
import signal
import subprocess
import sys
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qaic_ray.errors import QaicRayError, UsageError
from qaic_ray.files.documents import differences
from qaic_ray.formats.frozen_file import FrozenFile
from qaic_ray.options import Generation
from qaic_ray.rows import FinishReason, Prompt, Row
from qaic_ray.runs.intake import (
    STREAM_SOURCE,
    Fingerprint,
    file_source,
    fingerprint,
    row_digest,
    text_source,
)
from qaic_ray.runs.journal import (
    MAX_OPEN_SEGMENTS,
    Entry,
    Journal,
    last_fingerprint,
    line_of,
)
from qaic_ray.sampling_params import SamplingParams
from qaic_ray.sampling_params.structured_outputs import StructuredOutputs

RUN: Fingerprint = {"input": {"name": "-"}, "qpc": "q"}

# Whatever fields a row gets: each by its type, but for the mappings, which are dicts in practice.
_HINTS = typing.get_type_hints(Row)
_FIELDS = {field.name: st.from_type(_HINTS[field.name]) for field in dataclasses.fields(Row)}
_FIELDS["messages"] = st.none() | st.lists(st.dictionaries(st.text(), st.text())).map(tuple)
ROWS = st.builds(Row, **_FIELDS)


@pytest.fixture(autouse=True, scope="module")
def no_waiting_for_the_disk() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda fd: None)
        patch.setattr(os, "fdatasync", lambda fd: None)
        yield


def row(index: int, text: str = "text") -> Row:
    return Row(index, "prompt", text, FinishReason.STOP)


def error_row(index: int) -> Row:
    return Row.failed(Prompt(index, "prompt"), "no")


def write(folder: Path, rows: Sequence[Row], **options: typing.Any) -> None:
    with Journal(folder, RUN, **options) as journal:
        for each in rows:
            journal.append(each, each.index + 1, 0.5)
        journal.commit()


def read(folder: Path, **options: typing.Any) -> list[Entry]:
    with Journal(folder, RUN, **options) as journal:
        return list(journal.replay())


def rows_of(folder: Path, **options: typing.Any) -> list[Row]:
    return [entry.row for entry in read(folder, **options)]


def segment(folder: Path, number: int = 0) -> Path:
    return folder / "journal" / f"{number:06}.jsonl"


@given(rows=st.lists(ROWS, min_size=1, max_size=3))
def test_every_field_of_a_row_comes_back(
    rows: list[Row], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("run")
    with Journal(folder, RUN) as journal:
        places = [journal.append(each, 2**32 - 1, 1.5) for each in rows]
        journal.commit()
        at_once = [journal.read(place.segment, place.offset) for place in places]
    later = read(folder)
    for row_there in (at_once, [entry.row for entry in later]):
        # repr: a NaN is equal to no NaN. Zero has one sign less in the journal.
        assert repr(row_there).replace("-0.0", "0.0") == repr(rows).replace("-0.0", "0.0")
    assert [(entry.digest, entry.span_s, entry.place) for entry in later] == [
        (2**32 - 1, 1.5, place) for place in places
    ]


def test_a_commit_is_on_the_disk_whole_when_it_returns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[int] = []
    with Journal(tmp_path, RUN) as journal:
        path = segment(tmp_path)
        monkeypatch.setattr(os, "fdatasync", lambda fd: synced.append(path.stat().st_size))
        header_bytes = path.stat().st_size
        for index in range(3):
            place = journal.append(row(index), 1, 0.0)
        assert path.stat().st_size == header_bytes
        journal.commit()
        assert synced == [path.stat().st_size] == [place.offset + place.num_bytes]
        journal.commit()
        assert len(synced) == 1
        journal.append(row(3), 1, 0.0)
    assert len(rows_of(tmp_path)) == 3


def test_segments_rotate_and_are_read_in_any_order(tmp_path: Path) -> None:
    rows = [row(index, "x" * 300) for index in range(60)]
    with Journal(tmp_path, RUN, segment_bytes=1000) as journal:
        places = [journal.append(each, 1, 0.0) for each in rows]
        journal.commit()
        assert len({place.segment for place in places}) > MAX_OPEN_SEGMENTS
        for each, place in reversed(list(zip(rows, places, strict=True))):
            assert journal.read(place.segment, place.offset) == each
        if Path("/proc/self/fd").exists():
            open_files = [os.path.realpath(path) for path in Path("/proc/self/fd").iterdir()]
            reading = [name for name in open_files if name.startswith(str(tmp_path / "journal"))]
            assert len(reading) <= MAX_OPEN_SEGMENTS + 1
    assert max(path.stat().st_size for path in (tmp_path / "journal").iterdir()) < 1500
    assert rows_of(tmp_path) == rows


def test_a_torn_tail_is_cut_wherever_it_is_torn(tmp_path: Path) -> None:
    rows = [row(index) for index in range(3)]
    write(tmp_path, rows)
    content = segment(tmp_path).read_bytes()
    for num_bytes in range(len(content)):
        for number in (0, 1):
            segment(tmp_path, number).unlink(missing_ok=True)
        segment(tmp_path).write_bytes(content[:num_bytes])
        num_lines = content[:num_bytes].count(b"\n")
        assert rows_of(tmp_path) == rows[: max(0, num_lines - 1)]
        if num_lines:
            assert segment(tmp_path).read_bytes() == content[: content[:num_bytes].rfind(b"\n") + 1]


@pytest.mark.parametrize("tail", [b"\0" * 5000, b"deadbeef {}\n" * 3, b"\n\n", b"\xff" * 10])
def test_a_tail_of_anything_is_cut(tmp_path: Path, tail: bytes) -> None:
    write(tmp_path, [row(0)])
    with segment(tmp_path).open("ab") as stream:
        stream.write(tail)
    assert rows_of(tmp_path) == [row(0)]
    assert rows_of(tmp_path) == [row(0)]


@pytest.mark.parametrize("is_last", [True, False])
def test_damage_before_the_end_is_named_and_what_is_said_helps(
    tmp_path: Path, is_last: bool
) -> None:
    rows = [row(index) for index in range(9)]
    write(tmp_path, rows)
    if not is_last:
        write(tmp_path, [row(9)])
        rows.append(row(9))
    lines = segment(tmp_path).read_bytes().splitlines(keepends=True)
    lines[4] = lines[4].replace(b"text", b"tent")
    segment(tmp_path).write_bytes(b"".join(lines))
    with pytest.raises(QaicRayError, match=r"000000\.jsonl is damaged at line 5: delete that line"):
        read(tmp_path)
    assert segment(tmp_path).read_bytes() == b"".join(lines)
    del lines[4]
    segment(tmp_path).write_bytes(b"".join(lines))
    assert rows_of(tmp_path) == rows[:3] + rows[4:]


def test_a_damaged_header_costs_its_segment(tmp_path: Path) -> None:
    write(tmp_path, [row(0)])
    write(tmp_path, [row(1)])
    segment(tmp_path).write_bytes(b"x" + segment(tmp_path).read_bytes())
    with pytest.raises(QaicRayError, match="at line 1: delete the file"):
        read(tmp_path)
    segment(tmp_path).unlink()
    assert rows_of(tmp_path) == [row(1)]


def test_sessions_are_counted(tmp_path: Path) -> None:
    for index in range(3):
        write(tmp_path, [row(index)])
    assert [(entry.row.index, entry.session) for entry in read(tmp_path)] == [
        (0, 0),
        (1, 1),
        (2, 2),
    ]


def test_error_rows_from_before_a_retry_are_void_for_good(tmp_path: Path) -> None:
    write(tmp_path, [row(0), error_row(1), error_row(2)])
    assert rows_of(tmp_path) == [row(0), error_row(1), error_row(2)]
    write(tmp_path, [row(1)], retry_errors=True)
    assert rows_of(tmp_path) == [row(0), row(1)]
    write(tmp_path, [error_row(2)])
    assert rows_of(tmp_path) == [row(0), row(1), error_row(2)]
    assert rows_of(tmp_path, retry_errors=True) == [row(0), row(1)]


def test_a_folder_is_written_by_one_at_a_time(tmp_path: Path) -> None:
    with (
        Journal(tmp_path, RUN),
        pytest.raises(UsageError, match=r"Another process is writing to .*: wait for it to end"),
    ):
        Journal(tmp_path, RUN)
    write(tmp_path, [])


def test_a_folder_is_free_when_its_process_is_killed(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from qaic_ray.runs.journal import Journal\n"
        "journal = Journal(Path(sys.argv[1]), {}); print(flush=True); sys.stdin.read()"
    )
    argv = [sys.executable, "-c", code, str(tmp_path)]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"\n"
        with pytest.raises(UsageError, match="Another process"):
            Journal(tmp_path, {})
        process.send_signal(signal.SIGKILL)
    Journal(tmp_path, {}).close()


def test_another_job_another_version_and_another_run_are_refused(tmp_path: Path) -> None:
    write(tmp_path, [row(0)])
    with pytest.raises(UsageError, match='cannot go on: qpc was "q" and is "r"'):
        Journal(tmp_path, {**RUN, "qpc": "r"})
    other = tmp_path / "other"
    other.mkdir()
    write(other, [row(1)])
    segment(other).rename(segment(tmp_path, 7))
    with pytest.raises(UsageError, match="segments of several runs"):
        Journal(tmp_path, RUN)
    segment(tmp_path, 7).unlink()
    written = segment(tmp_path).read_bytes()
    header, rest = written.split(b"\n", 1)
    later = line_of(header.split(b" ", 1)[1].replace(b'"format": 2', b'"format": 3'))
    segment(tmp_path).write_bytes(later + rest)
    with pytest.raises(UsageError, match="journal format 3, and this version writes 2"):
        Journal(tmp_path, RUN)
    segment(tmp_path).write_bytes(written)
    assert rows_of(tmp_path) == [row(0)]


def test_a_full_disk_is_one_sentence_and_nothing_half_written_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_all = os.write

    def write_half(fd: int, data: memoryview) -> int:
        if len(data) < 50:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write_all(fd, data[: len(data) // 2])

    with Journal(tmp_path, RUN) as journal:
        journal.append(row(0), 1, 0.0)
        journal.commit()
        monkeypatch.setattr(os, "write", write_half)
        journal.append(row(1), 1, 0.0)
        with pytest.raises(QaicRayError) as raised:
            journal.commit()
        monkeypatch.setattr(os, "write", write_all)
        with pytest.raises(QaicRayError):
            journal.commit()
    assert str(raised.value) == (
        f"{tmp_path} cannot be written: No space left on device. What was answered is kept: put "
        f"that right, then go on with `qaic-ray run --resume {tmp_path}`."
    )
    assert not segment(tmp_path).read_bytes().endswith(b"\n")
    assert rows_of(tmp_path) == [row(0)]


# -- fingerprints


def made(source: Fingerprint = STREAM_SOURCE, **changes: typing.Any) -> Fingerprint:
    names = {"qpc": "q", "model": {"text": "m", "eos_ids": [2]}}
    names |= {key: changes.pop(key) for key in names if key in changes}
    return fingerprint(source, generation=Generation(**{"seed": 0, **changes}), **names)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"qpc": "r"}, 'qpc was "q" and is "r"'),
        ({"model": {"text": "n", "eos_ids": [2]}}, 'model.text was "m" and is "n"'),
        ({"sampling": SamplingParams(temperature=0.8)}, "sampling.temperature was 0.0 and is 0.8"),
        ({"sampling": SamplingParams(max_tokens=9)}, "sampling.max_tokens was not set and is 9"),
        ({"sampling": SamplingParams(stop=("x",))}, 'sampling.stop was [] and is ["x"]'),
        ({"seed": 3}, "run_seed was 0 and is 3"),
        ({"chat": True}, "chat was false and is true"),
        ({"system": "s" * 99}, f'system was not set and is "{"s" * 79}...'),
        ({"ctx_len": 512}, "ctx_len was not set and is 512"),
        ({"source": text_source("a|b")}, "input.stream was true and is not set"),
    ],
)
def test_each_part_of_a_fingerprint_is_named(changes: dict[str, typing.Any], said: str) -> None:
    assert differences(made(), made()) == []
    first, *_ = found = differences(made(), made(**changes))
    assert first.startswith(said)
    assert len(found) == (3 if "source" in changes else 1)


def test_every_field_of_a_generation_is_in_the_fingerprint_but_those_of_speed() -> None:
    other = {
        "chat": True,
        "system": "s",
        "chat_template": "{{ x }}",
        "chat_template_kwargs": {"x": 1},
        "continue_final_message": True,
        "add_generation_prompt": False,
        "date": "2031-02-03T04:05:06",
        "sampling": SamplingParams(top_k=3),
        "seed": 1,
        "generation_len": 9,
        "drafts": "none",
        "draft_qpc": "/d",
        "max_stall_s": 9.0,
        "prefix_reuse": False,
        "input_len": 32,
        "ctx_len": 64,
    }
    assert other.keys() == Generation.model_fields.keys()
    same = {name for name, value in other.items() if made(**{name: value}) == made()}
    assert same == {"max_stall_s", "prefix_reuse", "drafts", "draft_qpc"}


def test_a_fingerprint_has_the_names_of_the_first_journals() -> None:
    names = "chat system chat_options chat_template date run_seed prompt_len ctx_len sampling"
    assert made().keys() == {"input", "qpc", "model", *names.split()}
    options = {"add_generation_prompt", "continue_final_message", "template_kwargs"}
    assert made()["chat_options"].keys() == options
    assert made()["sampling"].keys() == {field.name for field in dataclasses.fields(SamplingParams)}


def test_an_input_file_is_known_by_content_whatever_its_name(tmp_path: Path) -> None:
    paths = [tmp_path / "a", tmp_path / "b.txt"]
    for path in paths:
        path.write_bytes(b"one\ntwo\n")
    first, second = (file_source(FrozenFile.of(path)) for path in paths)
    assert first == second
    paths[1].write_bytes(b"one\ntwx\n")
    changed = file_source(FrozenFile.of(paths[1]))
    assert [part.split()[0] for part in differences(first, changed)] == ["sha256"]


def test_only_the_input_of_a_run_may_be_given_anew(tmp_path: Path) -> None:
    before, after = made(text_source("a")), made(text_source("b"))
    Journal(tmp_path, before).close()
    with pytest.raises(UsageError, match=r"cannot go on: input\.sha256 was"):
        Journal(tmp_path, after)
    with pytest.raises(UsageError, match="cannot go on: qpc was"):
        Journal(tmp_path, made(text_source("b"), qpc="r"), new_input=True)
    Journal(tmp_path, after, new_input=True).close()
    Journal(tmp_path, after).close()  # it is the run's from now on
    with pytest.raises(UsageError, match=r"cannot go on: input\.sha256 was"):
        Journal(tmp_path, before)


def test_all_that_an_answer_depends_on_is_in_the_digest_and_its_place_is_not() -> None:
    sampling = SamplingParams()
    different = [
        Prompt(0, "a"),
        Prompt(0, "b"),
        Prompt(0, "a", id="1"),
        Prompt(0, "a", messages=({"role": "user", "content": "a"},)),
        Prompt(0, "a", sampling=sampling),
        Prompt(0, "a", sampling=SamplingParams(seed=1)),
        Prompt(0, "a", sampling=SamplingParams(structured_outputs=StructuredOutputs(regex="a"))),
        Prompt(0, "a", sampling=SamplingParams(structured_outputs=StructuredOutputs(regex="b"))),
        Prompt(0, "a", sampling=SamplingParams(logit_bias=((1, 2.0),))),
        Row.failed(Prompt(0, "a"), "no"),
        Row.failed(Prompt(0, "b"), "no"),
    ]
    assert len({row_digest(item) for item in different}) == len(different)
    assert row_digest(Prompt(0, "a")) == row_digest(Prompt(5, "a"))
    assert row_digest(Prompt(0, "a")) == row_digest(Prompt(0, "a", stream=True, background=True))
    # The values are part of the format: a run that was begun before an update can go on after it.
    assert (
        row_digest(Prompt(0, "a", "1", sampling=SamplingParams(top_k=5))).hex()[:16]
        == "a96caccf95e187bf"
    )


def test_a_run_of_very_many_files_goes_on(tmp_path: Path) -> None:
    """Every segment names them all."""
    files = [{"name": f"dt={n % 365}/part-{n:06}.parquet", "bytes": n} for n in range(30_000)]
    same = {"input": {"files": files}}
    Journal(tmp_path, same).close()
    assert last_fingerprint(tmp_path) == same
    Journal(tmp_path, same).close()
    with pytest.raises(UsageError, match="cannot go on") as caught:
        Journal(tmp_path, {"input": {"files": files[1:]}})
    assert len(str(caught.value)) < 1200
