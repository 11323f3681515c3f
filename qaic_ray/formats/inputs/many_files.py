"""The prompts of several files as one input, or of a shard or a sample of it, read file by file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from qaic_ray.errors import QaicRayError, UsageError
from qaic_ray.formats.frozen_file import FrozenFile
from qaic_ray.formats.inputs.choice import (
    RowChoice,
    bound_of_count,
    bound_of_share,
    bounds_by_size,
    draw_number,
    rows_of_shard,
    sampled,
)
from qaic_ray.formats.inputs.filesystems import RemoteFile, RemoteStatus
from qaic_ray.formats.inputs.named_files import NamedFile
from qaic_ray.formats.lines import EmptyInput
from qaic_ray.formats.prompts import check_prompts_file, count_rows, has_lines, prompts_from_file
from qaic_ray.formats.row_range import RowRange
from qaic_ray.option_types import PromptFormat
from qaic_ray.rows import ChatOptions, Prompt, Row
from qaic_ray.sampling_params import SamplingParams

FILES, PART = "files", "part"
NUM_BYTES, SHA256, MTIME, NAME = "bytes", "sha256", "mtime_ns", "name"
"""Keys of an input in a fingerprint, and of one of its files."""
_MAX_NAMED = 3


@dataclass(frozen=True)
class _FileRows:
    """The rows of one file that are read: all, or those from `first` to before `end`."""

    number: int
    file: NamedFile
    known: FrozenFile | RemoteFile
    first: int = 0
    end: int | None = None


class ManyFiles:
    """Files as one input, each known by its content or, at a URI, by its size and time of change.

    Files of this machine are read through now; those that a shard has no row of are not. Empty
    ones count as none, if there are others.

    Args:
        files: in their order.
        form: of all of them; None: each has its own.
        choice: which rows are answered.
        before: what `source` was when the run began that now goes on.

    Raises:
        UsageError: a file cannot be read, holds no prompts, or is not what it was; the choice
            leaves no row.
    """

    def __init__(
        self,
        files: Sequence[NamedFile],
        form: PromptFormat | None,
        choice: RowChoice,
        before: Mapping[str, Any] | None = None,
    ) -> None:
        self._form, self._choice = form, choice
        self._before = {} if before is None else {f[NAME]: f for f in before[FILES]}
        files = [file for file in files if file.num_bytes] or list(files)
        self._files = files if before is None else _as_before(files, before[FILES])
        self._own = self._of_shard()
        self._look()
        self._bound = self._sample_bound()

    @property
    def source(self) -> Mapping[str, Any]:
        """Of the run's fingerprint."""
        known = {part.number: part.known for part in self._own}
        files = [
            {NAME: file.name, NUM_BYTES: file.num_bytes, **_content(known.get(number))}
            for number, file in enumerate(self._files)
        ]
        said = self._choice.to_json()
        return {FILES: files, **({PART: said} if said else {})}

    @property
    def rows_guess(self) -> int | None:
        """About how many rows they are; None where only reading tells."""
        total, choice = 0, self._choice
        for part in self._own:
            if part.end is not None:
                total += part.end - part.first
            elif isinstance(part.known, FrozenFile) and has_lines(part.file.name):
                total += part.known.num_lines
            else:
                return None
        if isinstance(choice.sample, float):
            total = round(total * choice.sample)
        elif choice.sample is not None:
            total = min(total, choice.sample)
        return total if choice.limit is None else min(total, choice.limit)

    def prompts(self, sampling: SamplingParams, chat: ChatOptions) -> Iterator[Prompt | Row]:
        """The rows, numbered from 0 through all files; read as they are asked for.

        Raises:
            UsageError: while reading, where there is none at all.
            QaicRayError: while reading, when that fails, and for a later file that holds none.
        """
        return islice(self._items(sampling, chat), self._choice.limit)

    def _items(self, sampling: SamplingParams, chat: ChatOptions) -> Iterator[Prompt | Row]:
        index = 0
        for part in self._own:
            try:
                for item in self._items_of(part, sampling, chat):
                    yield _numbered(item, index, draw_number(part.number, item.index))
                    index += 1
            except EmptyInput:
                continue
            except UsageError as error:
                if not index:
                    raise
                raise QaicRayError(str(error)) from error
        if not index:
            whose = "the sample of " if self._choice.sample is not None else ""
            raise UsageError(f"There are no prompts in {whose}{_named(self._files)}: give some.")

    def _items_of(
        self, part: _FileRows, sampling: SamplingParams, chat: ChatOptions
    ) -> Iterator[Prompt | Row]:
        keeps = None
        if self._bound is not None:
            keeps = sampled(part.number, self._choice.sample_seed, self._bound)
        return prompts_from_file(
            *(part.file.path, self._form, sampling, chat),
            frozen=part.known,
            name=part.file.path if len(self._files) > 1 else part.file.name,
            rows=RowRange(part.first, part.end, keeps),
        )

    def _of_shard(self) -> list[_FileRows]:
        """What the shard has of each file."""
        numbers = range(len(self._files))
        shard = self._choice.shard
        if shard is not None and shard[1] <= len(self._files):
            number, count = shard
            bounds = bounds_by_size([file.num_bytes for file in self._files], count)
            return [self._whole(file) for file in numbers[bounds[number - 1] : bounds[number]]]
        whole = [self._whole(file) for file in numbers]
        if shard is None:
            return whole
        counts = list(map(self._count, whole))
        rows = rows_of_shard(counts, shard)
        if not rows:
            raise UsageError(
                f"The input has {sum(counts)} rows, so that shard {shard[0]}/{shard[1]} has none: "
                "make fewer shards."
            )
        return [replace(whole[file], first=first, end=end) for file, first, end in rows]

    def _whole(self, number: int) -> _FileRows:
        file = self._files[number]
        if file.remote is not None:
            return _FileRows(number, file, file.remote)
        known = FrozenFile.of(Path(file.path), file.num_bytes if self._before else None)
        return _FileRows(number, file, known)

    def _count(self, part: _FileRows) -> int:
        try:
            return count_rows(part.file.path, self._form, part.known)
        except EmptyInput:
            return 0

    def _look(self) -> None:
        """See that files of this machine hold prompts, and the first of others.

        Raises:
            UsageError: one does not.
        """
        for part in [self._own[0], *(p for p in self._own[1:] if p.file.remote is None)]:
            try:
                check_prompts_file(part.file.path, self._form, part.known)
            except EmptyInput:
                if len(self._own) == 1:
                    raise

    def _sample_bound(self) -> int | None:
        choice = self._choice
        if choice.sample is None:
            return None
        if isinstance(choice.sample, float):
            return bound_of_share(choice.sample)
        rows = [
            (part.number, part.first, self._count(part) if part.end is None else part.end)
            for part in self._own
        ]
        return bound_of_count(rows, choice.sample_seed, choice.sample)


def _content(known: FrozenFile | RemoteFile | None) -> dict[str, Any]:
    """What is known of a file's content; nothing of one that is not read."""
    if known is None:
        return {}
    return (
        {SHA256: known.sha256} if isinstance(known, FrozenFile) else {MTIME: known.status.mtime_ns}
    )


def _as_before(files: Sequence[NamedFile], before: Sequence[Mapping[str, Any]]) -> list[NamedFile]:
    """The files that the run began with, as large as they were; later ones are not read.

    Raises:
        UsageError: one is gone, or is at a URI and has changed.
    """
    found = {file.name: file for file in files}
    gone = [one[NAME] for one in before if one[NAME] not in found]
    if gone:
        raise UsageError(
            f"The input has no {', '.join(gone[:_MAX_NAMED])} any more: resume the run with the "
            "input it had, or begin a new run."
        )
    kept = []
    for one in before:
        file, size = found[one[NAME]], one[NUM_BYTES]
        if file.remote is not None:
            was = RemoteStatus(size, one.get(MTIME, file.remote.status.mtime_ns))
            if file.remote.status != was:
                raise UsageError(
                    f"{file.path} has changed since the run began: resume the run with the input "
                    "it had, or begin a new run."
                )
        kept.append(replace(file, num_bytes=size))
    return kept


def _named(files: Sequence[NamedFile]) -> str:
    some = ", ".join(file.path for file in files[:_MAX_NAMED])
    return f"{some}, ..." if len(files) > _MAX_NAMED else some


def _numbered(item: Prompt | Row, index: int, draw: int) -> Prompt | Row:
    if isinstance(item, Row):
        return item if item.index == index else replace(item, index=index)
    return item if draw == index else replace(item, index=index, draw=draw)
