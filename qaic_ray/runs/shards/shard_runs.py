"""The run folders of shards: that they are all of one whole, and that each is complete."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qaic_ray.errors import UsageError
from qaic_ray.files.documents import checked, differences, read_object
from qaic_ray.formats.inputs.many_files import FILES, NAME, NUM_BYTES, PART, SHA256
from qaic_ray.runs.delivery import Proof
from qaic_ray.runs.intake import INPUT, Fingerprint
from qaic_ray.runs.journal import is_held, last_fingerprint
from qaic_ray.runs.report import REPORT_NAME

SHARD = "shard"
_MAX_NAMED = 5
# A run without a date takes the time of its beginning; two shards never begin at the same second.
_OF_EACH = (INPUT, "date")


@dataclass(frozen=True)
class ShardRun:
    """The run of one shard of several, which is complete."""

    folder: Path
    number: int
    count: int
    fingerprint: Fingerprint
    proof: Proof
    model: str
    qpc: str

    @property
    def shard(self) -> str:
        """As `--shard` takes it."""
        return f"{self.number}/{self.count}"

    @property
    def files(self) -> Sequence[Mapping[str, Any]]:
        """All files of the whole input; those that it has read with what is known of them."""
        found: Sequence[Mapping[str, Any]] = self.fingerprint[INPUT][FILES]
        return found


def shard_runs(folders: Iterable[Path]) -> list[ShardRun]:
    """The runs of all shards of one whole, in their order.

    Raises:
        UsageError: one is no shard, is not complete, is there twice, or is missing; or they are not
            of the same program, model, options and files. It says what to do.
    """
    lacks: list[str] = []
    found: dict[int, Path] = {}
    runs: list[ShardRun] = []
    count = 0
    for folder in folders:
        fingerprint, number, of = _shard_of(folder)
        count = count or of
        if of != count:
            raise UsageError(
                f"{folder} is a shard of {of}, and the first one is of {count}: merge the shards "
                "of one whole."
            )
        if number in found:
            raise UsageError(
                f"Shard {number}/{of} is there twice, in {found[number]} and {folder}: leave one "
                "of them out."
            )
        found[number] = folder
        if lack := _unfinished(folder, f"{number}/{of}"):
            lacks.append(lack)
        else:
            runs.append(_complete(folder, fingerprint, (number, of)))
    lacks += [
        f"shard {number}/{count} is missing: run it with --shard {number}/{count}, or name its "
        "run folder"
        for number in range(1, count + 1)
        if number not in found
    ]
    if lacks:
        more = f"; and {len(lacks) - _MAX_NAMED} more" if len(lacks) > _MAX_NAMED else ""
        text = "; ".join(lacks[:_MAX_NAMED])
        raise UsageError(f"{text[:1].upper()}{text[1:]}{more}.")
    runs.sort(key=lambda run: run.number)
    for run in runs[1:]:
        _check_same(runs[0], run)
    return runs


def known_files(runs: Sequence[ShardRun]) -> list[dict[str, Any]]:
    """The files of the whole, each with what the shards that read it know of it."""
    return [
        {key: value for entry in entries for key, value in entry.items()}
        for entries in zip(*(run.files for run in runs), strict=True)
    ]


def _shard_of(folder: Path) -> tuple[Fingerprint, int, int]:
    fingerprint = last_fingerprint(folder)
    if fingerprint is None:
        raise UsageError(
            f"{folder} has no row yet: go on with `qaic-ray run --resume {folder}`, then merge."
        )
    shard = fingerprint[INPUT].get(PART, {}).get(SHARD)
    if shard is None:
        raise UsageError(
            f"{folder} is not the run of a shard: it answers its whole input, and its "
            "outputs.jsonl needs no merge."
        )
    number, _, count = shard.partition("/")
    return fingerprint, int(number), int(count)


def _unfinished(folder: Path, shard: str) -> str:
    """Why a shard's run is not complete, and what to do; empty where it is."""
    if is_held(folder):
        return f"shard {shard} is being run in {folder}: wait for its end"
    goes_on = f"go on with `qaic-ray run --resume {folder}`, then merge again"
    if not (folder / REPORT_NAME).exists():
        return f"shard {shard} is unfinished: {goes_on}"
    report = read_object(folder / REPORT_NAME)
    if report.get("goes_on"):
        return f"shard {shard} is unfinished: {goes_on}"
    proof = report.get("proof") or {}
    if not proof.get("complete", True) or report.get("error"):
        return f"shard {shard} in {folder} is not complete ({report.get('error')}): run it anew"
    return ""


def _complete(folder: Path, fingerprint: Fingerprint, shard: tuple[int, int]) -> ShardRun:
    report = read_object(folder / REPORT_NAME)
    proof = checked(Proof, report.get("proof"), f"the proof in {folder / REPORT_NAME}")
    if not proof.holds:
        raise UsageError(
            f"The proof in {folder / REPORT_NAME} does not hold: {proof.rows_in} rows in are not "
            f"{proof.rows_ok} + {proof.rows_error}; run shard {shard[0]}/{shard[1]} anew."
        )
    names = str(report.get("model", "")), str(report.get("qpc", ""))
    return ShardRun(folder, *shard, fingerprint, proof, *names)


def _check_same(first: ShardRun, run: ShardRun) -> None:
    """See that two shards are of one whole.

    Raises:
        UsageError: they are not; it says what differs.
    """
    of = f"{run.folder} is not of the same whole as {first.folder}"
    ours, theirs = (
        {key: value for key, value in one.fingerprint.items() if key not in _OF_EACH}
        for one in (first, run)
    )
    if changes := differences(ours, theirs):
        raise UsageError(f"{of}: {', '.join(changes)[:800]}. Run that shard as the others were.")
    parts = [
        {key: value for key, value in one.fingerprint[INPUT][PART].items() if key != SHARD}
        for one in (first, run)
    ]
    if changes := differences(*parts):
        raise UsageError(f"{of}: {', '.join(changes)}. Run that shard as the others were.")
    lists = [[(file[NAME], file[NUM_BYTES]) for file in one.files] for one in (first, run)]
    if lists[0] != lists[1]:
        pairs = zip(*lists, strict=False)
        other = next((pair for pair in pairs if pair[0] != pair[1]), None)
        what = f"they have {len(lists[0])} and {len(lists[1])} files"
        if other is not None:
            (name, size), (its_name, its_size) = other
            what = f"one has {name} of {size} bytes where the other has {its_name} of {its_size}"
        raise UsageError(f"{of}: {what}. Run that shard with the input of the others.")
    for file, other_file in zip(first.files, run.files, strict=True):
        known = {file.get(SHA256), other_file.get(SHA256)} - {None}
        if len(known) > 1:
            raise UsageError(
                f"{of}: {file[NAME]} had other content. Run that shard with the input of the "
                "others."
            )
