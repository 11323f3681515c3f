"""Step 1: a job's checkpoint to a model folder."""

from __future__ import annotations

import os
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import active_children, get_context
from pathlib import Path
from typing import TYPE_CHECKING

from qaic_ray import interruption
from qaic_ray.errors import ExportError
from qaic_ray.options import ExportOptions, ModelOptions
from qaic_ray.pipeline.steps import Listener

if TYPE_CHECKING:
    from qaic_ray.export.export import ExportResult


CLEAN_UP_S = 8.0
"""How long an export that is interrupted may still be in a call that computes."""


def export_step(model: ModelOptions, options: ExportOptions, listener: Listener) -> ExportResult:
    """Export a model; a folder that is still right is kept as it is.

    Runs in a process of its own: checking against PyTorch takes gigabytes, and the driver of a
    fleet should not keep them.
    """
    listener.began(f"export {model.name}")
    with ProcessPoolExecutor(
        max_workers=1, mp_context=get_context("spawn"), initializer=_begin, initargs=(os.getpid(),)
    ) as pool:
        try:
            result = pool.submit(_export, model, options).result()
        except KeyboardInterrupt:
            for child in active_children():
                child.terminate()  # it is waited for below, and cleans up
            raise
        except BrokenProcessPool as error:
            raise ExportError(
                f"The process that exported {model.name} died: most often the machine ran out of "
                "memory; try --verify quick, or off."
            ) from error
    listener.ended(f"export {result.folder.name} {'kept' if result.reused else 'written'}")
    return result


def _begin(parent: int) -> None:
    """In the new process: it ends with the one that waits for it."""
    interruption.die_with_parent(parent)
    interruption.listen(first_grace_s=CLEAN_UP_S)


def _export(model: ModelOptions, options: ExportOptions) -> ExportResult:
    from qaic_ray.export.export import export_model
    from qaic_ray.model.checkpoint import open_checkpoint

    checkpoint = open_checkpoint(model.name, trust_remote_code=model.trust_remote_code)
    return export_model(
        checkpoint,
        options,
        output=None if options.output is None else Path(options.output),
        verify=None if options.verify == "auto" else options.verify,
    )
