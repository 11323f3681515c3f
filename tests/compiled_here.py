"""The emulated compiler in this process: a start of Python and onnx a QPC takes half a second."""

from __future__ import annotations

from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest

from qaic_ray.emulator import compiler, folder


def compile_here(argv: list[str], log: Path, **_: object) -> None:
    """In the place of `run_compiler`, for a test of what the compiler makes, not of its process."""
    command = Path(argv[0])
    with pytest.MonkeyPatch.context() as patch, log.open("w", encoding="utf-8") as output:
        patch.setenv(folder.ROOT_VARIABLE, str(command.parents[1]))
        with redirect_stdout(output), redirect_stderr(output):
            status = compiler.main(argv[1:])
    assert status == 0, log.read_text(encoding="utf-8")
