"""A QPC for an ONNX file, compiled once: kept beside the file, or where the caller wants it.

The cache is named by all that a compile depends on: the bytes of the model and of its weights, the
flags, and the SDK. It is made whole or not at all, and two processes may want it at once.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import stat
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, Dict, Iterator, Sequence

import onnx
from google.protobuf.message import DecodeError

from ..compiler import extdata
from ..container import FILE_NAME
from ..folder import Folder, current

CACHE_NAME = ".qaic-cache"
KEY_NAME = "qaic-session.json"

_CHUNK_BYTES = 1 << 22
_ALWAYS = ("-aic-hw", "-aic-hw-version=2.0", "-compile-only")
_PYTHON_VARIABLE = "QAIC_EMULATOR_PYTHON"


def compiled(model: Path, flags: Sequence[str], output_dir: str) -> Path:
    """The `programqpc.bin` of that model with these flags of the compiler.

    Args:
        model: an ONNX file.
        flags: more of the compiler's arguments.
        output_dir: where the QPC is to lie; empty: in a cache beside the model.

    Raises:
        RuntimeError: where the compiler refuses it, with its words.
        OSError: where the model cannot be read or the QPC cannot be written.
    """
    sdk = current()
    key = _key(model, flags, sdk)
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    target = Path(output_dir) if output_dir else _cache_of(model) / f"{model.stem}-{digest[:16]}"
    if not _is_of(target, key):
        _compile(sdk, model, flags, target=target, key=key)
    return target / FILE_NAME


def _key(model: Path, flags: Sequence[str], sdk: Folder) -> Dict[str, Any]:
    files = {name: _sha256(model.parent / name) for name in sorted(set(_weight_files(model)))}
    return {
        "model": _sha256(model),
        "weights": files,
        "flags": sorted(flags),
        "sdk": [sdk.apps_version, _sha256(sdk.root / "emulated-sdk.json")],
    }


def _weight_files(model: Path) -> Iterator[str]:
    try:
        graph = onnx.load(str(model), load_external_data=False)
    except DecodeError as error:
        raise RuntimeError(f"{model} is not an ONNX model") from error
    try:
        yield from extdata.files_of(graph, str(model.parent.absolute()))
    except extdata.ExternalDataError as error:
        raise RuntimeError(f"{model} cannot be compiled: {error}") from error
    for tensor in onnx.external_data_helper._get_all_tensors(graph):
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            for entry in tensor.external_data:
                if entry.key == "location":
                    yield entry.value


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        for chunk in iter(lambda: file.read(_CHUNK_BYTES), b""):
            digest.update(chunk)
    return digest.hexdigest()


def _cache_of(model: Path) -> Path:
    """A folder beside the model; where none can be written, the user's own among temporary ones.

    Raises:
        RuntimeError: where that one is another user's.
    """
    beside = model.parent / CACHE_NAME
    if os.access(beside if beside.is_dir() else model.parent, os.W_OK | os.X_OK):
        return beside
    apart = Path(tempfile.gettempdir(), f"qaic-cache-{os.getuid()}")
    apart.mkdir(mode=0o700, exist_ok=True)
    found = apart.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
        raise RuntimeError(f"{apart} belongs to someone else; name an output_dir of yours")
    return apart


def _is_of(target: Path, key: Dict[str, Any]) -> bool:
    """Whether the QPC there is finished and was compiled from just this.

    Raises:
        RuntimeError: where the folder holds what no session put there.
    """
    if not target.is_dir() or not any(target.iterdir()):
        return False
    try:
        found = json.loads((target / KEY_NAME).read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise RuntimeError(
            f"{target} was not made by a session; remove it, or choose another output_dir"
        ) from error
    return bool(found == key) and (target / FILE_NAME).is_file()


def _compile(
    sdk: Folder, model: Path, flags: Sequence[str], *, target: Path, key: Dict[str, Any]
) -> None:
    target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{target.name}.tmp-", dir=target.parent))
    try:
        built = work / "qpc"
        command = [str(sdk.root / "exec" / "qaic-exec"), f"-m={model}", *_ALWAYS, *flags]
        done = subprocess.run(
            [*command, f"-aic-binary-dir={built}"],
            env={_PYTHON_VARIABLE: sys.executable, **os.environ},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            check=False,
        )
        said = done.stdout.decode("utf-8", "replace").strip()
        if done.returncode or not (built / FILE_NAME).is_file():
            raise RuntimeError(f"compiling {model} failed ({done.returncode}):\n{said}")
        (built / KEY_NAME).write_text(json.dumps(key, indent=1) + "\n", "utf-8")
        _put(built, target, key)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _put(built: Path, target: Path, key: Dict[str, Any]) -> None:
    """Move the finished folder to its place; another process may have been faster."""
    if target.is_dir() and any(target.iterdir()):
        if _is_of(target, key):
            return
        shutil.rmtree(target)
    try:
        os.replace(built, target)
    except OSError:
        if not _is_of(target, key):
            raise
