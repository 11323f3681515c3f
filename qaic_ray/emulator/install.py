"""Lays an emulated SDK folder down: `python -m qaic_ray.emulator.install PREFIX`.

The folder has the vendor's layout, and one file more, `emulated-sdk.json`, which marks it. It may
be moved; its commands find it by their own place. A folder that this tool did not make, or that
holds other files too, is never touched. With `--under` the folder's name is made of all that it
depends on, so that two versions of this package each have their own.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import errno
import fcntl
import fnmatch
import hashlib
import json
import os
import platform
import shlex
import shutil
import sys
import tempfile
from itertools import islice
from pathlib import Path
from typing import Dict, Iterator, Mapping, Optional, Sequence

from . import wheel
from .card.sku import SKUS
from .documents import parse_json, read_text
from .folder import MARKER, ROOT_VARIABLE, FolderError

# Here and no second time: who offers these choices reads them from the same file.
_LIMITS_FILE = Path(__file__).with_name("limits.json")
_LIMITS = parse_json(read_text(str(_LIMITS_FILE), FolderError), str(_LIMITS_FILE), FolderError)

APPS_VERSIONS = tuple(_LIMITS["apps_version"]["known"])
DEFAULT_APPS_VERSION = _LIMITS["apps_version"]["default"]
"""The newest widely used one that takes flat specializations and has `qaic-exec`."""

DEFAULT_CARDS = _LIMITS["cards"]["default"]
DEFAULT_SKU = _LIMITS["sku"]["default"]
NUMERICS = tuple(_LIMITS["numerics"]["known"])
DEFAULT_NUMERICS = _LIMITS["numerics"]["default"]
PACKAGE = "qaic_emulated_sdk"
PYTHON_VARIABLE = "QAIC_EMULATOR_PYTHON"

_MAX_CARDS = _LIMITS["cards"]["most"]
_MAX_NAMED = 3
_NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.EBADF)
_QAIC_COMPILE_SINCE = (1, 21, 6)
_TOOLS = {
    "exec/qaic-exec": "compiler",
    "exec/qaic-runner": "runner",
    "exec/qaic-api-test": "runner.api_test",
    "exec/qaic-opstats": "tools.qaic_opstats",
    "tools/qaic-util": "tools.qaic_util",
    "tools/qaic-qpc": "tools.qaic_qpc",
    "tools/qaic-device-partition": "tools.qaic_device_partition",
    "tools/qaic-dev-partition": "tools.qaic_device_partition",
    "tools/qaic-version-util": "tools.qaic_version_util",
}
_SCRIPTS = {"scripts/qaic-model-configurator/model_configurator.py": "configurator"}
"""Commands that programs give to a Python of theirs."""

_OURS = (
    MARKER,
    *_TOOLS,
    *_SCRIPTS,
    "exec/qaic-compile",
    "versions/apps.xml",
    "versions/platform.xml",
    "dev/python/QAicApi_pb2.py",
    "dev/lib/*/qaicrt.py",
    "dev/lib/*/qaic.py",
    "dev/lib/*/qaic-*.whl",
    f"dev/lib/*/{PACKAGE}/*.py",
    "dev/*/__pycache__/*.pyc",
)
"""All that any version of this installer has put into a folder, and what Python adds.

A `*` stands for folders too, as `fnmatch` has it.
"""
_COMMAND = """\
#!/bin/sh
root=$(dirname "$(dirname "$(readlink -f "$0")")")
{root_variable}=$root
export {root_variable}
lib=$(set -- "$root"/dev/lib/*/{package}; dirname "$1")
exec "${{{python_variable}:-{python}}}" -E -c 'import sys
sys.path[:] = [sys.argv.pop(1)] + [p for p in sys.path if p]
from {package}.{module} import main
sys.exit(main(sys.argv[1:]))' "$lib" "$@"
"""
_SCRIPT = """\
#!/usr/bin/env python3
import glob
import os
import sys

root = os.path.realpath(__file__)
for _ in range(3):
    root = os.path.dirname(root)
os.environ["{root_variable}"] = root
lib = os.path.dirname(glob.glob(os.path.join(root, "dev", "lib", "*", "{package}"))[0])
python = os.environ.get("{python_variable}") or {python!r}
code = (
    "import sys; sys.path[:] = [sys.argv.pop(1)] + [p for p in sys.path if p]; "
    "from {package}.{module} import main; sys.exit(main(sys.argv[1:]))"
)
os.execv(python, [python, "-E", "-c", code, lib] + sys.argv[1:])
"""
_VERSIONS_XML = """\
<?xml version="1.0"?>
<versions>
        <ci_build>
                <base_version>{base}</base_version>
                <build_id>0</build_id>
        </ci_build>
</versions>
"""
_NAME_DIGITS = 12
_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


class InstallError(ValueError):
    """The folder cannot be laid down there; the message says why and what to do."""


def install(
    prefix: Path,
    *,
    apps_version: str = DEFAULT_APPS_VERSION,
    cards: int = DEFAULT_CARDS,
    sku: str = DEFAULT_SKU,
    numerics: str = DEFAULT_NUMERICS,
) -> bool:
    """Make `prefix` an emulated SDK; False when it is already this very one.

    Raises:
        InstallError: for an unknown version or SKU, for a folder that is not ours, and where
            nothing can be written.
    """
    wanted = _wanted(apps_version, cards, sku, numerics)
    sources = _sources()
    return _install(prefix, sources, _marker(sources, wanted))


def install_under(
    parent: Path,
    *,
    apps_version: str = DEFAULT_APPS_VERSION,
    cards: int = DEFAULT_CARDS,
    sku: str = DEFAULT_SKU,
    numerics: str = DEFAULT_NUMERICS,
) -> Path:
    """As `install`, in a folder below `parent` that is named by all that it is made of."""
    wanted = _wanted(apps_version, cards, sku, numerics)
    sources = _sources()
    marker = _marker(sources, wanted)
    kind = sku if numerics == DEFAULT_NUMERICS else f"{sku}-{numerics}"
    prefix = parent / f"{apps_version}-{cards}x{kind}-{_digest(sources)[:_NAME_DIGITS]}"
    _install(prefix, sources, marker)
    return prefix


def _marker(sources: Mapping[str, bytes], wanted: Mapping[str, object]) -> Dict[str, object]:
    version = wanted["apps_version"]
    marker: Dict[str, object] = {"emulated": True, "apps_version": version}
    return {**marker, "platform_version": version, **wanted, "digest": _digest(sources)}


def _install(prefix: Path, sources: Mapping[str, bytes], marker: Mapping[str, object]) -> bool:
    prefix = Path(os.path.realpath(prefix))
    try:
        prefix.parent.mkdir(parents=True, exist_ok=True)
        with _only_installer(prefix.parent):
            if _existing(prefix) == marker:
                return False
            _replace(prefix, sources, marker)
    except (OSError, ValueError) as error:
        if isinstance(error, InstallError):
            raise
        reason = getattr(error, "strerror", None) or error
        raise InstallError(f"cannot write {prefix}: {reason}; choose another") from error
    return True


def _wanted(apps_version: str, cards: int, sku: str, numerics: str) -> Dict[str, object]:
    """What is asked for, checked."""
    if apps_version not in APPS_VERSIONS:
        raise InstallError(
            f"unknown Apps version {apps_version}: one of {', '.join(APPS_VERSIONS)}"
        )
    if not 1 <= cards <= _MAX_CARDS:
        raise InstallError(f"{cards} cards: between 1 and {_MAX_CARDS}")
    if sku not in SKUS:
        raise InstallError(f"unknown SKU {sku}: one of {', '.join(SKUS)}")
    if numerics not in NUMERICS:
        raise InstallError(f"unknown numerics {numerics}: one of {', '.join(NUMERICS)}")
    return {"apps_version": apps_version, "cards": cards, "sku": sku, "numerics": numerics}


@contextlib.contextmanager
def _only_installer(parent: Path) -> Iterator[None]:
    descriptor = os.open(parent, os.O_RDONLY | os.O_CLOEXEC)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            print(f"warning: {parent} has no locks ({error.strerror})", file=sys.stderr)
        yield
    finally:
        os.close(descriptor)


def _existing(prefix: Path) -> Optional[Dict[str, object]]:
    """The marker of the SDK at `prefix`, None when there is nothing; refuses what is not ours."""
    try:
        content = sorted(os.listdir(prefix))
    except FileNotFoundError:
        return None
    except NotADirectoryError:
        raise InstallError(f"{prefix} is a file; name a folder") from None
    if not content:
        return None
    refusal = InstallError(
        f"{prefix} was not made by this tool (no {MARKER}); choose another folder"
    )
    if MARKER not in content:
        raise refusal
    path = str(prefix / MARKER)
    try:
        marker = parse_json(read_text(path, InstallError), path, InstallError)
    except InstallError as error:
        raise refusal from error
    if not isinstance(marker, dict) or marker.get("emulated") is not True:
        raise refusal
    others = list(islice(_others(prefix), _MAX_NAMED))
    if others:
        raise InstallError(
            f"{prefix} holds what this tool did not put there ({', '.join(others)}); "
            "move it away, or choose another folder"
        )
    return marker


def _others(prefix: Path) -> Iterator[str]:
    """Files in an SDK folder of ours that no installer put there; no link is followed."""
    for folder, folders, files in os.walk(prefix):
        links = [name for name in folders if os.path.islink(os.path.join(folder, name))]
        for name in sorted(files) + links:
            relative = os.path.relpath(os.path.join(folder, name), prefix)
            if not any(fnmatch.fnmatchcase(relative, pattern) for pattern in _OURS):
                yield relative


def _replace(prefix: Path, sources: Mapping[str, bytes], marker: Mapping[str, object]) -> None:
    built = Path(tempfile.mkdtemp(prefix=f".{prefix.name}.installing-", dir=prefix.parent))
    try:
        _build(built, sources, marker, prefix)
        built.chmod(0o755)
        if prefix.exists() and any(prefix.iterdir()):
            _exchange(built, prefix)
        else:
            built.replace(prefix)
    finally:
        shutil.rmtree(built, ignore_errors=True)


def _exchange(built: Path, prefix: Path) -> None:
    """Swap the two folders, so that at no moment there is no SDK."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is not None:
        paths = os.fsencode(built), os.fsencode(prefix)
        if rename(_AT_FDCWD, paths[0], _AT_FDCWD, paths[1], _RENAME_EXCHANGE) == 0:
            return
    # An older kernel or another file system: the SDK is away between two renames.
    aside = built.with_name(f"{built.name}.old")
    prefix.replace(aside)
    built.replace(prefix)
    aside.replace(built)


def _build(
    root: Path, sources: Mapping[str, bytes], marker: Mapping[str, object], prefix: Path
) -> None:
    """Write the folder to `root`; `prefix` is where it will lie."""
    apps_version = str(marker["apps_version"])
    library = root / "dev" / "lib" / platform.machine()
    for name, content in sources.items():
        _write(library / PACKAGE / name, content)
    door = sources["door.py"]
    _write(library / "qaicrt.py", door)
    _write(library / "qaic.py", door)
    at_home = door.replace(b'_LAID_DOWN = ""', f"_LAID_DOWN = {str(prefix)!r}".encode())
    _write(library / wheel.NAME, wheel.build(at_home))
    _write(root / "dev" / "python" / "QAicApi_pb2.py", sources["container/aicapi.py"])
    tools = dict(_TOOLS)
    if tuple(int(part) for part in apps_version.split(".")) >= _QAIC_COMPILE_SINCE:
        tools["exec/qaic-compile"] = "compiler"
    names = {
        "root_variable": ROOT_VARIABLE, "package": PACKAGE, "python_variable": PYTHON_VARIABLE,
    }  # fmt: skip
    for name, module in tools.items():
        script = _COMMAND.format(python=shlex.quote(sys.executable), module=module, **names)
        _write(root / name, script.encode(), mode=0o755)
    for name, module in _SCRIPTS.items():
        script = _SCRIPT.format(python=sys.executable, module=module, **names)
        _write(root / name, script.encode(), mode=0o755)
    for name, key in (("apps.xml", "apps_version"), ("platform.xml", "platform_version")):
        _write(root / "versions" / name, _VERSIONS_XML.format(base=marker[key]).encode())
    _write(root / MARKER, (json.dumps(marker, indent=1) + "\n").encode())


def _write(path: Path, content: bytes, mode: int = 0o644) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "wb") as file:
        file.write(content)
        os.fchmod(file.fileno(), mode)
        os.fsync(file.fileno())


def _sources() -> Dict[str, bytes]:
    here = Path(__file__).resolve().parent
    files = sorted(here.rglob("*.py"))
    return {path.relative_to(here).as_posix(): path.read_bytes() for path in files}


def _digest(sources: Mapping[str, bytes]) -> str:
    digest = hashlib.sha256(f"{sys.prefix}\n{platform.machine()}\n".encode())
    for name, content in sources.items():
        digest.update(f"{name}\n{len(content)}\n".encode())
        digest.update(content)
    return digest.hexdigest()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="install", description="Lay an emulated SDK folder down.")
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("prefix", type=Path, nargs="?")
    where.add_argument("--under", type=Path, help="a folder; the name below it is printed")
    parser.add_argument("--apps-version", default=DEFAULT_APPS_VERSION, choices=APPS_VERSIONS)
    parser.add_argument("--cards", type=int, default=DEFAULT_CARDS)
    parser.add_argument("--sku", default=DEFAULT_SKU, choices=sorted(SKUS))
    parser.add_argument("--numerics", default=DEFAULT_NUMERICS, choices=NUMERICS)
    return parser


def main(arguments: Optional[Sequence[str]] = None) -> int:
    """The command; 2 when the request cannot be met."""
    asked = _parser().parse_args(arguments)
    names = ("apps_version", "cards", "sku", "numerics")
    what = {name: getattr(asked, name) for name in names}
    try:
        if asked.under is not None:
            print(install_under(asked.under, **what))
            return 0
        is_new = install(asked.prefix, **what)
    except (InstallError, FolderError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{asked.prefix}: {'installed' if is_new else 'already installed'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
