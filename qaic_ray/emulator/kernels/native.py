"""From a module to machine code for this processor, kept in the user's cache.

The cache is private to the user, as what is in it is run. A file is named by all that it depends
on: the kernels' sources, llvmlite and LLVM, and the processor with its features. It begins with the
digest of its code: what is damaged is not run.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import functools
import hashlib
import logging
import os
import stat
import tempfile
from pathlib import Path
from typing import Any, Iterator, Optional

from . import operations as op
from .machine import features, processor, sources_digest

CACHE_VARIABLES = ("QAIC_EMULATOR_CACHE", "QAIC_RAY_CACHE")
_DIGEST_BYTES = hashlib.sha256().digest_size
_log = logging.getLogger(__name__)


def cache_folder() -> Optional[Path]:
    """The user's folder for what was compiled or measured here; None where it cannot be private."""
    named = next((os.environ[n] for n in CACHE_VARIABLES if os.environ.get(n)), None)
    base = Path(named) if named else _user_cache() / "qaic-ray"
    folder = base / "emulator"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = folder.lstat()
    except OSError:
        return None
    is_ours = stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid()
    return folder if is_ours and not found.st_mode & 0o022 else None


def _user_cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")


@functools.lru_cache(maxsize=None)
def step_function() -> Any:
    """The compiled step, to be called with six addresses or numbers; other threads run meanwhile.

    The first call of a machine compiles, which takes a few seconds; meanwhile others wait for it.
    """
    from llvmlite import binding

    binding.initialize_native_target()
    binding.initialize_native_asmprinter()
    target = binding.Target.from_default_triple()
    machine = target.create_target_machine(
        cpu=_processor_name(), features=features(), opt=3, reloc="default", codemodel="jitdefault"
    )
    with one_at_a_time():
        code = _load() or _compile(binding, machine)
    module = binding.parse_assembly("")
    engine = binding.create_mcjit_compiler(module, machine)
    engine.add_object_file(binding.object_file.ObjectFileRef.from_data(code))
    engine.finalize_object()
    address = engine.get_function_address(op.ENTRY)
    made = ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * 6)(address)
    # The code lives as long as its engine does.
    made.engine = engine  # type: ignore[attr-defined]
    return made


@contextlib.contextmanager
def one_at_a_time() -> Iterator[None]:
    """Of the processes that share the cache, only one compiles."""
    folder = cache_folder()
    if folder is None:
        yield
        return
    try:
        descriptor = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError:  # a cache that cannot be written: each compiles
        yield
        return
    try:
        with contextlib.suppress(OSError):  # a file system without locks: each compiles
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _processor_name() -> str:
    found = processor()
    return "" if found is None else found.name


def _file() -> Optional[Path]:
    import llvmlite

    folder = cache_folder()
    if folder is None:
        return None
    parts = (sources_digest(), llvmlite.__version__, _processor_name(), features())
    return folder / f"step-{hashlib.sha256(repr(parts).encode()).hexdigest()[:32]}.o"


def _load() -> Optional[bytes]:
    path = _file()
    try:
        data = b"" if path is None else path.read_bytes()
    except OSError:
        return None
    digest, code = data[:_DIGEST_BYTES], data[_DIGEST_BYTES:]
    if hashlib.sha256(code).digest() == digest:
        return code
    if data:
        _log.warning("emulated cards: %s is damaged and is compiled again", path)
    return None


def _compile(binding: Any, machine: Any) -> bytes:
    from .interpreter import build_step

    source = build_step()
    source.triple = binding.get_process_triple()
    module = binding.parse_assembly(str(source))
    module.verify()
    options = binding.create_pipeline_tuning_options(speed_level=3)
    builder = binding.create_pass_builder(machine, options)
    builder.getModulePassManager().run(module, builder)
    code: bytes = machine.emit_object(module)
    path = _file()
    if path is not None:
        keep(path, hashlib.sha256(code).digest() + code)
    return code


def keep(path: Path, data: bytes) -> None:
    """Write a file whole or not at all; a cache that cannot be written is done without."""
    try:
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            try:
                file.write(data)
                file.flush()
                os.replace(file.name, path)
            except OSError:
                os.unlink(file.name)
                raise
    except OSError as error:
        _log.warning("emulated cards: %s cannot be written: %s", path, error.strerror)
