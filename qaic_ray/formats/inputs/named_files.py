"""The files that an input names, in their order.

Each part of an input is a file, a folder (its prompt files, those of its subfolders too), a glob
(`parts/*.jsonl.gz`, `**` for any depth), or a URI of one of these. The parts come in the order in
which they are given, and within each the files by name. Names that begin with a dot or an
underscore, as `_SUCCESS` does, are left out of folders and globs.
"""

from __future__ import annotations

import glob
import os
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from urllib.parse import unquote, urlsplit

from qaic_ray.errors import UsageError
from qaic_ray.files.documents import user_path
from qaic_ray.formats.inputs.filesystems import (
    RemoteFile,
    is_uri,
    remote_files,
    remote_place,
)
from qaic_ray.formats.lines import STDIN, check_readable
from qaic_ray.formats.prompts import has_known_name

OPTION = "--input"

_MAGIC = re.compile(r"[*?\[]")
_HIDDEN = (".", "_")
_ANY_DEPTH = "**"
_MAX_NAMED = 3
MAX_FILES = 200_000
"""Files of one input; each segment of a run's journal names them all."""


@dataclass(frozen=True)
class NamedFile:
    """A file of an input.

    Attributes:
        path: of the file, as it is shown; a URI of a remote one.
        name: below the folder or glob that named it, which may lie elsewhere when a run goes on;
            longer by as many folders as tell it from others.
        num_bytes: as it was when it was found.
        remote: the file where it is at a URI; else None.
    """

    path: str
    name: str
    num_bytes: int
    remote: RemoteFile | None = None


def parts_of(given: str | Sequence[str] | None) -> tuple[str, ...]:
    """The parts of an input."""
    if given is None:
        return ()
    return (given,) if isinstance(given, str) else tuple(given)


def is_stream(given: str | Sequence[str] | None) -> bool:
    """Whether an input can be read only once: stdin, or a pipe.

    Raises:
        UsageError: it is one beside others.
    """
    parts = parts_of(given)
    streams = [part for part in parts if part == STDIN or _is_pipe(part)]
    if streams and len(parts) > 1:
        what = "stdin (-)" if STDIN in streams else streams[0]
        raise UsageError(f"{what} can be read only once: give it alone, without other inputs.")
    return bool(streams)


def _is_pipe(part: str) -> bool:
    path = Path(part).expanduser()
    return not is_uri(part) and path.exists() and not (path.is_file() or path.is_dir())


def is_plain_file(given: str | Sequence[str] | None) -> bool:
    """Whether an input is one file of this machine, named by its path."""
    parts = parts_of(given)
    return len(parts) == 1 and not is_uri(parts[0]) and user_path(parts[0], OPTION).is_file()


def named_files(given: str | Sequence[str], *, any_name: bool = False) -> list[NamedFile]:
    """The files that an input names; a remote folder is listed, and no file is read.

    Args:
        given: the input's parts; none is a stream.
        any_name: folders hold prompts in every file, whatever its name ends in; else in those that
            end as a format, packed or not, or in nothing.

    Raises:
        UsageError: one sentence for a part that names nothing, or what cannot be read, and for a
            file that is named twice.
    """
    found: list[NamedFile] = []
    for part in parts_of(given):
        local = _local_path(part)
        found += _remote(part, any_name) if local is None else _local(local, any_name)
    if len(found) > MAX_FILES:
        raise UsageError(
            f"The input has {len(found):,} files, and a run takes {MAX_FILES:,}: join them to "
            "larger ones, or make a run for each folder."
        )
    seen: set[str] = set()
    for file in found:
        place = file.path if file.remote else os.path.realpath(file.path)
        if place in seen:
            raise UsageError(f"{file.path} is named twice by the input: its rows would be too.")
        seen.add(place)
    return _told_apart(found)


def _told_apart(files: list[NamedFile]) -> list[NamedFile]:
    """The same files; those of one name have more of their path in it."""
    counts = Counter(file.name for file in files)
    if len(counts) == len(files):
        return files
    longer = []
    for file in files:
        whole = file.path if file.remote is None else file.remote.place.path
        path, size = PurePosixPath(whole).parts, len(PurePosixPath(file.name).parts)
        has_more = counts[file.name] > 1 and size < len(path)
        name = str(PurePosixPath(*path[-size - 1 :])) if has_more else file.name
        longer.append(replace(file, name=name))
    return _told_apart(longer) if longer != files else files


def _local_path(part: str) -> str | None:
    """The path of a part on this machine; None for one that is elsewhere."""
    if not is_uri(part):
        return str(user_path(part, OPTION))
    if part.lower().startswith("file://"):
        return unquote(urlsplit(part).path)
    return None


# -- on this machine


def _local(path: str, any_name: bool) -> list[NamedFile]:
    if os.path.isdir(path):
        return _in_folder(path, any_name)
    if os.path.exists(path) or not _MAGIC.search(path):
        check_readable(path)
        return [_local_file(path, os.path.basename(path))]
    base = _fixed_part(path)
    found: list[NamedFile] = []
    for match in sorted(glob.glob(path, recursive=True), key=_by_name):
        name = os.path.relpath(match, base or ".")
        if _is_hidden(name, path[len(base) :]):
            continue
        if os.path.isfile(match):
            check_readable(match)
            found.append(_local_file(match, name))
        elif os.path.isdir(match) and _ANY_DEPTH not in path:
            found += [
                NamedFile(inner.path, os.path.join(name, inner.name), inner.num_bytes)
                for inner in _in_folder(match, any_name, needed=False)
            ]
    if not found:
        raise UsageError(f"No file matches {path}: give a pattern of prompt files that are there.")
    return found


def _in_folder(folder: str, any_name: bool, *, needed: bool = True) -> list[NamedFile]:
    def refuse(error: OSError) -> None:
        raise UsageError(f"{error.filename} cannot be looked into: {error.strerror}.") from error

    names = []
    for parent, folders, files in os.walk(folder, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith(_HIDDEN)]
        names += [os.path.relpath(os.path.join(parent, name), folder) for name in files]
    kept = _prompt_files(names, any_name)
    if needed and not kept:
        raise _no_prompts(folder, names)
    for name in kept:
        check_readable(os.path.join(folder, name))
    return [_local_file(os.path.join(folder, name), name) for name in kept]


def _local_file(path: str, name: str) -> NamedFile:
    try:
        return NamedFile(path, name, os.stat(path).st_size)
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}.") from error


# -- at URIs


def _remote(uri: str, any_name: bool) -> list[NamedFile]:
    start, query, after = uri.partition("?")
    base = _fixed_part(start) if _MAGIC.search(start) else start
    place = remote_place(f"{base.rstrip('/')}{query}{after}")
    found = remote_files(place)
    if found is None:
        raise UsageError(
            f"There is nothing at {uri}: look at the name, the bucket, and the account whose "
            "credentials are in the environment."
        )
    files = {
        at.path.removeprefix(place.path).lstrip("/"): RemoteFile(at, status) for at, status in found
    }
    if "" in files:  # the URI is that of a file
        return [_remote_file(files[""], PurePosixPath(place.path).name)]
    if base == start:
        kept = _prompt_files(files, any_name)
        if not kept:
            raise _no_prompts(uri, files)
    else:
        pattern = start[len(base) :]
        matches = re.compile(_pattern(pattern))
        kept = [
            name
            for name in sorted(files, key=_by_name)
            if matches.fullmatch(name) and not _is_hidden(name, pattern)
        ]
        if not kept:
            raise UsageError(
                f"No file matches {uri}: give a pattern of prompt files that are there."
            )
    return [_remote_file(files[name], name) for name in kept]


def _remote_file(file: RemoteFile, name: str) -> NamedFile:
    return NamedFile(file.path, name, file.status.num_bytes, file)


def _pattern(text: str) -> str:
    """A glob as a regular expression of paths, as `glob.glob` takes it."""
    pieces = []
    for piece in re.findall(r"\*\*/|\*\*|\*|\[!?[^]]+\]|.", text):
        known = {"**/": "(?:[^/]+/)*", "**": ".*", "*": "[^/]*"}.get(piece)
        if known is None and len(piece) > 1:
            known = f"[^{piece[2:]}" if piece[1] == "!" else piece
        pieces.append(known or re.escape(piece))
    return "".join(pieces)


# -- names


def _fixed_part(path: str) -> str:
    """The folders of a glob before its first that varies, with the slash behind them."""
    found = _MAGIC.search(path)
    return path[: path.rfind("/", 0, found.start()) + 1] if found else path


def _prompt_files(names: Iterable[str], any_name: bool) -> list[str]:
    """Those of the files below a folder that hold prompts, by name."""
    kept = [
        name
        for name in names
        if not any(part.startswith(_HIDDEN) for part in PurePosixPath(name).parts)
        and (any_name or has_known_name(name))
    ]
    return sorted(kept, key=_by_name)


def _is_hidden(name: str, pattern: str) -> bool:
    """Whether a part of the name begins as hidden ones do, and none of the pattern does."""
    if any(part.startswith(_HIDDEN) for part in PurePosixPath(pattern).parts):
        return False
    return any(part.startswith(_HIDDEN) for part in PurePosixPath(name).parts)


def _by_name(name: str) -> tuple[str, ...]:
    return PurePosixPath(name).parts


def _no_prompts(folder: str, names: Iterable[str]) -> UsageError:
    others = sorted(names)[:_MAX_NAMED]
    has = f"it has {', '.join(others)}" if others else "it is empty"
    return UsageError(
        f"There are no prompt files in {folder}: {has}. Files that end in .txt, .jsonl, .json, "
        ".csv, .tsv or .parquet are read, packed or not; --prompts-format takes any."
    )
