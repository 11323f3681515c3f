"""Compiled folders, kept by content: looked up, or built once however many ask.

A QPC folder is named for people and known by its key: `variant.json` lists every input of the
compile by name. A folder whose key differs, or that lacks the file, is not a result. Folders are
built in a temporary sibling and renamed, so a killed compile leaves nothing that looks finished.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from dataclasses import dataclass
from pathlib import Path

from qaic_ray.compile.compiler import QPC_FILE, check_qpc, run_compiler
from qaic_ray.compile.variant import Variant, key_digest
from qaic_ray.errors import CompileError
from qaic_ray.folders import building, locked
from qaic_ray.sdk import Sdk, compiler_digest

VARIANT_FILE = "variant.json"
SPECIALIZATIONS_FILE = "specializations.json"
LOG_FILE = "compile.log"

_CHUNK_BYTES = 2**20


@dataclass(frozen=True)
class BuildRequest:
    """One variant to be had from one SDK under one store folder."""

    variant: Variant
    sdk: Sdk
    store: Path

    @property
    def label(self) -> str:
        """Short name for tables and the Ray dashboard."""
        return self.variant.label


@dataclass(frozen=True)
class Build:
    """A finished QPC folder: where it is, whether it was there already, and what it took."""

    path: Path
    name: str
    reused: bool
    seconds: float
    qpc_bytes: int


def build(request: BuildRequest) -> Build:
    """Give the variant's QPC folder, compiling it if it is not there.

    Concurrent callers of one variant, in any process of the machine, compile once: the others
    wait and reuse.

    Raises:
        CompileError: from the compiler, with its log.
    """
    variant, sdk = request.variant, request.sdk
    start_s = time.monotonic()
    target = request.store.absolute() / variant.name
    entries = variant.key_entries(sdk, compiler_digest(sdk))
    with locked(target):
        reused = is_current(target, entries)
        if not reused:
            try:
                with building(target) as folder:
                    _compile_into(folder, variant, sdk, entries)
            except OSError as error:
                raise CompileError(f"Cannot write {target}: {error.strerror}.") from error
    size = sum(file.stat().st_size for file in target.rglob("*") if file.is_file())
    return Build(target, variant.name, reused, time.monotonic() - start_s, size)


def is_current(folder: Path, entries: list[tuple[str, str]]) -> bool:
    """Whether a folder holds the result of exactly these key entries."""
    try:
        document = json.loads((folder / VARIANT_FILE).read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError):
        return False
    return bool(document.get("key") == key_digest(entries))


def content_key(folder: Path) -> str:
    """What a QPC folder is known by: its key, or for a QPC of others a digest of its program."""
    try:
        return str(json.loads((folder / VARIANT_FILE).read_text(encoding="utf-8"))["key"])
    except (OSError, ValueError, KeyError, TypeError):
        digest = hashlib.sha256()
        with (folder / QPC_FILE).open("rb") as program:
            while chunk := program.read(_CHUNK_BYTES):
                digest.update(chunk)
        return digest.hexdigest()


def _compile_into(folder: Path, variant: Variant, sdk: Sdk, entries: list[tuple[str, str]]) -> None:
    log = folder / LOG_FILE
    specializations = folder / SPECIALIZATIONS_FILE
    text = variant.specializations.to_json(named=sdk.named_specializations)
    specializations.write_text(text, encoding="utf-8")
    binary_dir = folder / "qpc"
    run_compiler(variant.argv(sdk, specializations, binary_dir), log)
    check_qpc(binary_dir, log)
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
    }
    (folder / VARIANT_FILE).write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
