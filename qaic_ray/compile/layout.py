"""`--layout qefficient`: a variant's folder as QEfficient's commands want to be given one.

They take a folder that holds the program, and read `specializations.json` in the one above it. So
`<variant>/qpc` holds the same file as the variant's folder, by a second name, and `<variant>` what
it was compiled with. Our own commands take `<variant>`, as ever.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from qaic_ray.compile.compiler import QPC_FILE
from qaic_ray.errors import CompileError

QEFFICIENT_FOLDER = "qpc"
CUSTOM_IO_FILE = "custom_io.yaml"
LAID_OUT = frozenset({f"{QEFFICIENT_FOLDER}/{QPC_FILE}", CUSTOM_IO_FILE})
"""Files of a variant's folder that only this layout has."""


def lay_out(folder: Path, custom_io: Path | None) -> Path:
    """Give a variant's folder QEfficient's layout; does nothing where it has it.

    Args:
        folder: the variant's, which is whole.
        custom_io: the file that says how its cache is kept, None where there is none.

    Returns:
        The folder that QEfficient's commands are given.

    Raises:
        CompileError: where nothing can be written there.
    """
    program, inner = folder / QPC_FILE, folder / QEFFICIENT_FOLDER
    second = inner / QPC_FILE
    try:
        inner.mkdir(exist_ok=True)
        if not (second.exists() and second.samefile(program)):
            second.unlink(missing_ok=True)
            _link(program, second)
        if custom_io is not None and not (folder / CUSTOM_IO_FILE).exists():
            shutil.copyfile(custom_io, folder / CUSTOM_IO_FILE)
    except OSError as error:
        raise CompileError(
            f"{folder} cannot be laid out for QEfficient: {error.strerror}."
        ) from error
    return inner


def _link(program: Path, second: Path) -> None:
    try:
        os.link(program, second)
    except OSError:
        # A file system without hard links: a copy takes its space twice, and is right.
        shutil.copyfile(program, second)
