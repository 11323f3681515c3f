"""What a worker checks when it is opened: that its node has what the run began with."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

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
