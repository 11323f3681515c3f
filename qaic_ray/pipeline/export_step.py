"""Step 1: a checkpoint to a model folder, in a process of its own."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import active_children
from multiprocessing.context import SpawnContext, SpawnProcess
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from qaic_ray import interruption
from qaic_ray.errors import ExportError
from qaic_ray.model.checkpoint import Checkpoint, open_checkpoint
from qaic_ray.options import EmulatorOptions, ExportOptions, ModelOptions
from qaic_ray.pipeline.request import Listener
from qaic_ray.sdk import SDK_VARIABLE, VENDOR_ROOT, Sdk, find_sdk
from qaic_ray.weight_files.tensors import ITEM_BYTES, read_entries

if TYPE_CHECKING:
    from qaic_ray.export.export import ExportResult

CLEAN_UP_S = 8.0
"""How long an export that is interrupted may still be in a call that computes."""


def export_step(
    model: ModelOptions, options: ExportOptions, listener: Listener, *, sdk: Sdk | None = None
) -> ExportResult:
    """Export a model; a folder that is still right is kept as it is.

    One that is made runs in a process of its own: checking against PyTorch takes gigabytes, and the
    driver of a fleet should not keep them.

    Args:
        model: a checkpoint.
        options: of the export.
        listener: who is told.
        sdk: what will compile the model, where that is known.

    Raises:
        UsageError: the model is to point at its weights, and the SDK does not read them there.
    """
    if options.weights == "reference":
        _check_sdk(model, sdk or _installed_sdk())
    listener.began(f"export {model.name}")
    result = _kept(model, options) or _made(model, options)
    listener.ended(f"export {result.folder.name} {'kept' if result.reused else 'written'}")
    return result


def _check_sdk(model: ModelOptions, sdk: Sdk | None) -> None:
    """What is not known now is found out when the model is compiled."""
    from qaic_ray.compile.probe import check_reads_weights

    if sdk is not None:
        entries = read_entries(open_model(model).weight_files)
        check_reads_weights(sdk, {e.dtype for e in entries.values()} & ITEM_BYTES.keys())


def _installed_sdk() -> Sdk | None:
    """The SDK that this machine compiles with; None where the emulated one would be laid down."""
    if os.environ.get(SDK_VARIABLE) or VENDOR_ROOT.is_dir():
        return find_sdk(None, EmulatorOptions())
    return None


def _kept(model: ModelOptions, options: ExportOptions) -> ExportResult | None:
    from qaic_ray.export.export import kept_export

    return kept_export(open_model(model), options, **_asked(options))


def _made(model: ModelOptions, options: ExportOptions) -> ExportResult:
    context = _KnownProcesses()
    try:
        with _one_process(context) as pool:
            with _no_main_program():
                made = pool.submit(_export, model, options)
            return made.result()
    except BrokenProcessPool as error:  # the pool has waited for it
        end = _end_of(next((process.exitcode for process in context.made), None))
        raise ExportError(f"The process that exported {model.name} {end}.") from error


class _KnownProcesses(SpawnContext):
    """Makes processes, and knows them still when they have ended."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[SpawnProcess] = []

    def Process(  # type: ignore[override]  # noqa: N802 - the pool calls it so
        self, *args: Any, **more: Any
    ) -> SpawnProcess:
        """As any context's."""
        self.made.append(SpawnProcess(*args, **more))
        return self.made[-1]


@contextmanager
def _one_process(context: SpawnContext) -> Iterator[ProcessPoolExecutor]:
    """A process beside this one, which an interruption of this one ends."""
    with ProcessPoolExecutor(
        max_workers=1, mp_context=context, initializer=_begin, initargs=(os.getpid(),)
    ) as pool:
        try:
            yield pool
        except KeyboardInterrupt:
            for child in active_children():
                child.terminate()  # it is waited for below, and cleans up
            raise


def _end_of(exit_code: int | None) -> str:
    """How a process ended that should not have; `exit_code` is multiprocessing's, None unknown."""
    again = "before it was done: give the command again"
    if exit_code is None or exit_code >= 0:
        return f"ended{'' if exit_code is None else f' with exit code {exit_code}'} {again}"
    name = signal.Signals(-exit_code).name
    if exit_code == -signal.SIGKILL:
        return (
            f"was ended by {name}, most often of a machine that is out of memory: try --verify "
            "quick, or off"
        )
    return f"was ended by {name} {again}"


@contextmanager
def _no_main_program() -> Iterator[None]:
    """Let a process begin without the program that runs.

    Python would import that there, as what is called might be in it; a program that calls this with
    no `if __name__ == "__main__"` around it would begin again.
    """
    own, sys.modules["__main__"] = sys.modules["__main__"], ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = own


def _begin(parent: int) -> None:
    """In the new process: it ends with the one that waits for it."""
    interruption.die_with_parent(parent)
    interruption.listen(first_grace_s=CLEAN_UP_S)


def _export(model: ModelOptions, options: ExportOptions) -> ExportResult:
    from qaic_ray.export.export import export_model

    return export_model(open_model(model), options, **_asked(options))


def open_model(model: ModelOptions, *, weights: bool = True) -> Checkpoint:
    """The checkpoint that a job, or a command, names."""
    return open_checkpoint(model.name, trust_remote_code=model.trust_remote_code, weights=weights)


def _asked(options: ExportOptions) -> dict[str, Any]:
    return {
        "output": None if options.output is None else Path(options.output),
        "verify": None if options.verify == "auto" else options.verify,
    }
