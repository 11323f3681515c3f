"""The runs of shards joined: one `outputs.jsonl`, one `errors.jsonl`, one proof.

    outputs.jsonl    the shards' rows in the order of the input, numbered through
    errors.jsonl     those of them that failed
    proof.json       what went in and came out, with digests; the same for the same shards

The folder appears whole, in place of an earlier merge. Rows are copied line by line, and each
shard's lines are compared with its own proof.
"""

from __future__ import annotations

import hashlib
import json
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from qaic_ray.errors import QaicRayError, UsageError
from qaic_ray.files.documents import json_text
from qaic_ray.files.folders import building, foreign_files, locked, sha256_of
from qaic_ray.formats.inputs.many_files import PART
from qaic_ray.formats.part_places import PartPlace, part_place
from qaic_ray.runs.delivery import ERRORS_NAME, OUTPUTS_NAME, Proof
from qaic_ray.runs.intake import INPUT
from qaic_ray.runs.shards.part_files import PARTS_NAME, PartFiles, PartNames
from qaic_ray.runs.shards.shard_runs import SHARD, ShardRun, known_files, shard_runs

FORMAT = 1
PROOF_NAME = "proof.json"
MERGE_NAME = "_MERGE"
"""Beside part files: says which merge they are of."""
_OURS = frozenset({OUTPUTS_NAME, ERRORS_NAME, PROOF_NAME, PARTS_NAME})
_PART_OF_A_MERGE = re.compile(r"(?:.*/)?(?:part-\d{5,}\.parquet|_SUCCESS|_MERGE)")

_INDEX = re.compile(rb'\{"index": (\d+), ')
# Inside a JSON text every quote is escaped: this is a key of the row.
_FAILED = re.compile(rb'"finish_reason": "(?:error|abort)"')


@dataclass
class _Merged:
    """What has been written so far."""

    outputs: BinaryIO
    errors: BinaryIO
    rows: int = 0
    failed: int = 0
    sha256: Any = field(default_factory=hashlib.sha256)

    def add(self, run: ShardRun) -> dict[str, Any]:
        """Copy a shard's rows; what the proof says of it.

        Raises:
            UsageError: they are not those of its proof.
        """
        first, failed, digest = self.rows, self.failed, hashlib.sha256()
        path = run.folder / OUTPUTS_NAME
        with path.open("rb") as lines:
            for line in lines:
                digest.update(line)
                self._write(line, path, self.rows - first)
        of = run.proof
        counts = self.rows - first, self.failed - failed
        if digest.hexdigest() != of.outputs_sha256 or counts != (of.rows_in, of.rows_error):
            raise UsageError(
                f"{path} is not what its run wrote: its digest or its rows are not those of the "
                f"proof. `qaic-ray run --resume {run.folder}` writes it again from the journal."
            )
        return {
            SHARD: run.shard,
            "run": run.folder.name,
            "first_row": first,
            "rows_in": of.rows_in,
            "rows_ok": of.rows_ok,
            "rows_error": of.rows_error,
            "inputs_sha256": of.inputs_sha256,
            "outputs_sha256": of.outputs_sha256,
        }

    def _write(self, line: bytes, path: Path, number: int) -> None:
        found = _INDEX.match(line)
        if found is None or int(found[1]) != number or not line.endswith(b"}\n"):
            raise UsageError(f"{path} is damaged: its line {number + 1} is not row {number}.")
        line = b'{"index": %d, %s' % (self.rows, line[found.end() :])
        self.outputs.write(line)
        self.sha256.update(line)
        self.rows += 1
        if _FAILED.search(line):
            self.errors.write(line)
            self.failed += 1


def merge(
    folders: Sequence[Path], target: Path, *, parts: str | None = None, part_rows: int
) -> dict[str, Any]:
    """Join the runs of all shards of one whole into a folder; its proof.

    Args:
        folders: of the runs, in any order.
        target: the folder; an earlier merge there is replaced.
        parts: a folder or URI that gets the rows as parquet part files too.
        part_rows: rows of each.

    Raises:
        UsageError: they are not all of one whole, or not complete; the target or the place of the
            parts holds something else. It says what to do.
        QaicRayError: the disk, or the place of the parts, refuses.
    """
    runs = shard_runs(folders)
    _check_target(target)
    key = _key(runs, part_rows)
    if parts is not None:
        _check_place(part_place(parts), parts, key)
    try:
        with locked(target), building(target) as fresh:
            document = _joined(runs, fresh)
            (fresh / PROOF_NAME).write_text(json_text(document, indent=2) + "\n")
        if parts is not None:
            _write_parts(target, part_place(parts), document, key=key, part_rows=part_rows)
    except OSError as error:
        raise QaicRayError(f"{target} cannot be written: {error.strerror}.") from error
    return document


def _joined(runs: Sequence[ShardRun], folder: Path) -> dict[str, Any]:
    with (folder / OUTPUTS_NAME).open("wb") as outputs, (folder / ERRORS_NAME).open("wb") as errors:
        merged = _Merged(outputs, errors)
        shards = [merged.add(run) for run in runs]
    inputs = hashlib.sha256(b"".join(bytes.fromhex(run.proof.inputs_sha256) for run in runs))
    first = runs[0]
    dates = sorted({str(run.fingerprint.get("date")) for run in runs})
    part = {key: value for key, value in first.fingerprint[INPUT][PART].items() if key != SHARD}
    return {
        "format": FORMAT,
        "rows_in": merged.rows,
        "rows_ok": merged.rows - merged.failed,
        "rows_error": merged.failed,
        "inputs_sha256": inputs.hexdigest(),
        "outputs_sha256": merged.sha256.hexdigest(),
        "errors_sha256": sha256_of(folder / ERRORS_NAME),
        "model": first.model,
        "qpc": first.qpc,
        "qpc_sha256": first.fingerprint.get("qpc"),
        "run_seed": first.fingerprint.get("run_seed"),
        "dates": dates,
        "chosen": part,
        "shards": shards,
        "files": known_files(runs),
    }


def _check_target(target: Path) -> None:
    """See that a merge may take the place of what is there.

    Raises:
        UsageError: it may not.
    """
    if target.exists() and not target.is_dir():
        raise UsageError(f"{target} is not a folder: name another one.")
    if not target.exists():
        return
    foreign = foreign_files(
        target, lambda name: name in _OURS or _PART_OF_A_MERGE.fullmatch(name) is not None
    )
    is_merge = (target / PROOF_NAME).exists() or not any(target.iterdir())
    if foreign or not is_merge:
        what = foreign[0] if foreign else "files of something else"
        raise UsageError(f"{target} holds {what}, and is not replaced: name another folder.")


# -- as part files


def _key(runs: Sequence[ShardRun], part_rows: int) -> str:
    """What the parts of these shards are known by."""
    digests = b"".join(bytes.fromhex(run.proof.outputs_sha256) for run in runs)
    return hashlib.sha256(b"merge %d " % part_rows + digests).hexdigest()


def _check_place(place: PartPlace, named: str, key: str) -> None:
    """See that the place holds no parts but those of this merge, which may be written again.

    Raises:
        UsageError: it does.
    """
    place.check()
    taken = sorted(filter(PartNames().are_of, place.sizes()))
    if taken and key not in (place.read(MERGE_NAME) or b"").decode(errors="replace"):
        raise UsageError(f"{named} holds other parts ({taken[0]}): name another folder.")


def _write_parts(
    target: Path, place: PartPlace, document: dict[str, Any], *, key: str, part_rows: int
) -> None:
    mark = target / f".{MERGE_NAME}.unfinished"
    try:
        mark.write_text(json.dumps({"merge": key}) + "\n")
        place.put(MERGE_NAME, mark)
    finally:
        mark.unlink(missing_ok=True)
    counts = {name: document[name] for name in ("rows_in", "rows_ok", "rows_error")}
    digests = {name: document[name] for name in ("inputs_sha256", "outputs_sha256")}
    with (
        (target / OUTPUTS_NAME).open("rb") as lines,
        PartFiles(
            *(target, place, PartNames()),
            part_rows=part_rows,
            lines=(target / OUTPUTS_NAME).open("rb"),
            again=f"merge again with -o {shlex.quote(str(target))}",
        ) as writer,
    ):
        for line in lines:
            writer.take(line)
        writer.finish(Proof(**counts, **digests))
    (target / PARTS_NAME).unlink()
