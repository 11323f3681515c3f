"""What is checked of a run's program and tokenizer: before it begins, and on each worker's node."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from qaic_ray.compile.store import SPECIALIZATIONS_FILE, check_kept, read_record
from qaic_ray.contract import Specializations
from qaic_ray.errors import UsageError
from qaic_ray.files.documents import differences
from qaic_ray.model.tokenizer import text_parts
from qaic_ray.options import Generation


def check_text(expected: Mapping[str, str], folder: Path) -> None:
    """Check that a folder has the tokenizer that the run began with.

    Args:
        expected: its parts' digests; none where they are not known.
        folder: of the checkpoint, on this node.

    Raises:
        UsageError: it has another one.
    """
    changes = differences(expected, text_parts(folder)) if expected else []
    if changes:
        raise UsageError(
            f"The tokenizer in {folder} on {os.uname().nodename} is not the one that the run "
            f"began with ({', '.join(changes)}): one run has one tokenizer."
        )


def check_program(generation: Generation, qpc: Path) -> None:
    """Check a run's programs, before anything is started, as far as their folders tell of them.

    Raises:
        UsageError: for a QPC that is not there, not whole, or of other shapes than is said.
    """
    check_kept(qpc)
    if generation.draft_qpc is not None:
        check_kept(Path(generation.draft_qpc))
    # Of other programs, and where the file was edited, each worker reads the shapes on its card.
    record = read_record(qpc)
    kept = [file for file in record.files if file.name == SPECIALIZATIONS_FILE] if record else []
    if kept and not kept[0].fault(qpc):
        check_shapes(generation, str(qpc), Specializations.load(qpc / SPECIALIZATIONS_FILE))


def check_shapes(generation: Generation, qpc: str, shapes: Specializations) -> None:
    """Check that a QPC was compiled for what the run says it was.

    Raises:
        UsageError: naming the option and both numbers.
    """
    for option, wanted, compiled in (
        ("--input-len", generation.input_len, shapes.prompt_len),
        ("--ctx-len", generation.ctx_len, shapes.ctx_len),
    ):
        if wanted not in (None, compiled):
            raise UsageError(
                f"{option} is {wanted}, but {qpc} was compiled for {compiled}: give {compiled}, "
                "or compile another variant."
            )
