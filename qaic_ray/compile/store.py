"""Compiled folders, kept by content: looked up, or built once for all who ask at the same time.

`variant.json` in a QPC folder lists every input of the compile, and the digests of what was made. A
folder whose key differs, or whose files have changed, is not a result. Folders are built in a
temporary sibling and renamed, so a killed compile leaves nothing that looks finished; a folder that
is not ours is never replaced.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass
from difflib import get_close_matches
from functools import lru_cache
from pathlib import Path
from typing import Any

from qaic_ray.compile.compiler import (
    QPC_FILE,
    Variant,
    check_qpc,
    key_digest,
    program_fault,
    run_compiler,
)
from qaic_ray.compile.layout import LAID_OUT, lay_out
from qaic_ray.errors import CompileError, UsageError
from qaic_ray.files.documents import checked, read_object, shown
from qaic_ray.files.folders import (
    KeptFile,
    SourceFile,
    being_built,
    building,
    first_fault,
    foreign_files,
    locked,
    sha256_of,
    write_whole,
)
from qaic_ray.option_types import Layout
from qaic_ray.sdk import Sdk, compiler_digest

CompilerCall = Callable[[list[str], Path], None]
KeyEntries = list[tuple[str, str]]

VARIANT_FILE = "variant.json"
SPECIALIZATIONS_FILE = "specializations.json"
LOG_FILE = "compile.log"

_OURS = {VARIANT_FILE, SPECIALIZATIONS_FILE, LOG_FILE, QPC_FILE, *LAID_OUT}
_MARKS = (VARIANT_FILE, LOG_FILE)
"""One of them is in every folder of ours, and in no QPC folder of others."""


@dataclass(frozen=True)
class BuildRequest:
    """One variant to compile with one SDK, under one store folder."""

    variant: Variant
    sdk: Sdk
    store: Path
    layout: Layout = Layout.RECIPE

    @property
    def label(self) -> str:
        """Short name for tables and the Ray dashboard."""
        return self.variant.label

    @property
    def target(self) -> Path:
        """The variant's folder."""
        return self.store.absolute() / self.variant.name

    @property
    def entries(self) -> KeyEntries:
        """All inputs of the compile, by name."""
        return self.variant.key_entries(self.sdk, compiler_digest(self.sdk))


@dataclass(frozen=True)
class Build:
    """A finished QPC folder, whether it was there already, and the time it took."""

    path: Path
    name: str
    reused: bool
    seconds: float
    qpc_bytes: int


@dataclass(frozen=True)
class Record:
    """The fields of `variant.json` that are read; `files` is empty in those of older versions."""

    num_cores: int
    key: str = ""
    files: tuple[KeptFile, ...] = ()


def build(request: BuildRequest, compiler: CompilerCall | None = None) -> Build:
    """Give the variant's QPC folder, compiling it if it is not there.

    Concurrent callers of one variant, in any process of any machine that sees the store, compile
    once: the others wait and reuse.

    Args:
        request: the variant, the SDK and the store.
        compiler: runs the compiler's argv with a log file, where not `run_compiler`.

    Raises:
        CompileError: from the compiler, with its log.
        UsageError: for a folder of the variant's name that is not ours.
    """
    start_s = time.monotonic()
    target, entries = request.target, request.entries
    # Without the lock, which a store that one may only read does not give.
    reused = is_current(target, entries)
    if reused:
        _remember_anew(target)
    else:
        check_ours(target)
        with locked(target):
            reused = is_current(target, entries)
            if not reused:
                check_ours(target)
                try:
                    with building(target) as folder:
                        _compile_into(folder, request, entries, compiler or run_compiler)
                except OSError as error:
                    raise CompileError(f"Cannot write {target}: {error.strerror}.") from error
    if request.layout is Layout.QEFFICIENT:
        lay_out(target, request.variant.source.custom_io)
    size = sum(file.stat().st_size for file in _files(target))
    return Build(target, request.variant.name, reused, time.monotonic() - start_s, size)


def build_log(request: BuildRequest) -> Path | None:
    """The compiler's log while a variant is built; None where nothing is, on this machine."""
    return next((folder / LOG_FILE for folder in being_built(request.target)), None)


def check_request(request: BuildRequest) -> None:
    """See, before anything is compiled, whether the variant's folder is there or may be made.

    Raises:
        UsageError: for a folder of the variant's name that is not ours.
    """
    if not is_current(request.target, request.entries):
        check_ours(request.target)


def is_current(folder: Path, entries: KeyEntries) -> bool:
    """Whether a folder holds the whole result of exactly these key entries."""
    record = read_record(folder)
    if record is None or record.key != key_digest(entries) or program_fault(folder):
        return False
    return not first_fault(folder, record.files)


def check_ours(target: Path) -> None:
    """Refuse to replace what is not a compile of ours.

    Raises:
        UsageError: naming what is there.
    """
    if not os.path.lexists(target):
        return
    remedy = "choose another --output (compile.output), or move it away"
    if target.is_symlink() or not target.is_dir():
        raise UsageError(f"{target} is not a folder, and the variant's name: {remedy}.")
    record = read_record(target)
    names = _OURS.union(file.name for file in record.files) if record else _OURS
    try:
        rest = foreign_files(target, names.__contains__)
        if not rest and not any(os.path.lexists(target / mark) for mark in _MARKS):
            rest = sorted(os.listdir(target))  # another tool's QPC
    except OSError as error:
        raise UsageError(f"{target} cannot be looked through: {error.strerror}.") from error
    if rest:
        raise UsageError(
            f"{target} would be replaced by the variant of its name, and holds what was not "
            f"compiled there ({', '.join(map(shown, rest[:3]))}): {remedy}."
        )


def check_kept(folder: Path) -> None:
    """Refuse a QPC that is not whole, or no longer what was compiled.

    Raises:
        UsageError: naming what is wrong.
    """
    if not os.path.lexists(folder / QPC_FILE):
        like = _closest(folder) or "qpc/<base>-kv-32pl-512cl-14c-1BS-mx6"
        raise UsageError(
            f"{folder} holds no {QPC_FILE}: give the folder of a compiled variant, like {like}."
        )
    fault = program_fault(folder)
    program = _program(folder)
    if not fault and program is not None and content_key(folder) != program.sha256:
        fault = f"{folder / QPC_FILE} has changed since it was compiled"
    if fault:
        raise UsageError(f"{fault}: compile it again.")


def _closest(folder: Path) -> Path | None:
    """The QPC whose name is most like that of a folder that holds none, beside it or in `qpc`."""
    known: dict[str, Path] = {}
    for store in (folder.parent / "qpc", folder.parent):
        with suppress(OSError):
            known |= {p.name: p for p in store.iterdir() if (p / QPC_FILE).is_file()}
    names = get_close_matches(folder.name, sorted(known), n=1)
    return known[names[0]] if names else None


def content_key(folder: Path) -> str:
    """The SHA-256 of a QPC folder's program, also where another tool compiled it.

    It is read only where its status changed.
    """
    program = _program(folder)
    if program is not None and program.is_untouched(folder):
        return program.sha256
    return _digest_of(folder / QPC_FILE, SourceFile.of(folder / QPC_FILE))


def read_record(folder: Path) -> Record | None:
    """What `variant.json` says; None where there is none that is whole and as it was written."""
    path = folder / VARIANT_FILE
    try:
        document = read_object(path)
        record = checked(Record, document, str(path))
    except UsageError:
        return None
    is_sealed = document.pop("seal", None) == _seal(document)
    return record if is_sealed or not record.files else None


def program_facts(folder: Path) -> dict[str, Any]:
    """What a QPC folder says of itself, for people: nothing of one that another tool compiled.

    The names are `precision`, `num_cores`, `model_sha256` (of the ONNX model), `compile_s` and
    `specializations`, a list of shapes.
    """
    facts: dict[str, Any] = {}
    with suppress(UsageError, ValueError, AttributeError):
        document = read_object(folder / VARIANT_FILE)
        known = ("precision", "num_cores", "compile_s")
        facts = {name: document[name] for name in known if name in document}
        entries = dict(document["entries"]) if "entries" in document else {}
        if "model" in entries:
            facts["model_sha256"] = str(entries["model"])
    with suppress(UsageError):
        shapes = read_object(folder / SPECIALIZATIONS_FILE).get("specializations")
        if isinstance(shapes, list):
            facts["specializations"] = shapes
    return facts


def _compile_into(
    folder: Path, request: BuildRequest, entries: KeyEntries, compiler: CompilerCall
) -> None:
    variant, sdk = request.variant, request.sdk
    log = folder / LOG_FILE
    specializations = folder / SPECIALIZATIONS_FILE
    text = variant.specializations.to_json(named=sdk.named_specializations)
    specializations.write_text(text, encoding="utf-8")
    binary_dir = folder / "qpc"
    start_s = time.monotonic()
    _check_unchanged(variant)
    compiler(variant.argv(sdk, specializations, binary_dir), log)
    check_qpc(binary_dir, log)
    _check_unchanged(variant)  # the key is of the bytes that were looked at
    for produced in binary_dir.iterdir():
        os.replace(produced, folder / produced.name)
    binary_dir.rmdir()
    document = {
        "key": key_digest(entries),
        "entries": dict(entries),
        "model": variant.source.name,
        "precision": variant.precision.value,
        "num_cores": variant.num_cores,
        "sdk": sdk.label,
        "compile_s": round(time.monotonic() - start_s, 3),
    }
    _remember(folder, document, [path.relative_to(folder).as_posix() for path in _files(folder)])


def _check_unchanged(variant: Variant) -> None:
    external = variant.source.external
    change = "" if external is None else external.change()
    if change:
        raise CompileError(f"{change}: compile again, and export again where it is another model.")


def _files(folder: Path) -> list[Path]:
    """The files of a compile; a second name of one of them is none."""
    found = sorted(path for path in folder.rglob("*") if path.is_file())
    return [path for path in found if path.relative_to(folder).as_posix() not in LAID_OUT]


def _remember_anew(folder: Path) -> None:
    """Record a copy's files, or an older version's, so that they are not read through again."""
    record = read_record(folder)
    names = [file.name for file in record.files] if record else []
    if record is None or (names and all(file.is_untouched(folder) for file in record.files)):
        return
    # A store that may only be read is read through every time.
    with suppress(UsageError, OSError), locked(folder):
        document = read_object(folder / VARIANT_FILE)
        _remember(folder, document, names or [n for n in sorted(_OURS) if (folder / n).is_file()])


def _remember(folder: Path, document: dict[str, Any], names: Iterable[str]) -> None:
    """Write `variant.json`: a document, and what the files of these names are."""
    document = {key: value for key, value in document.items() if key != "seal"}
    # Nothing depends on the log, and people may delete it.
    kept = [KeptFile.of(folder, name) for name in names if name not in _MARKS]
    document["files"] = [asdict(file) for file in kept]
    document["seal"] = _seal(document)
    write_whole(folder / VARIANT_FILE, json.dumps(document, indent=2) + "\n")


def _seal(document: dict[str, Any]) -> str:
    """A digest of the document, which an edit does not update."""
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()


def _program(folder: Path) -> KeptFile | None:
    record = read_record(folder)
    files = record.files if record else ()
    return next((file for file in files if file.name == QPC_FILE), None)


@lru_cache(maxsize=16)
def _digest_of(path: Path, status: SourceFile) -> str:
    return sha256_of(path)
