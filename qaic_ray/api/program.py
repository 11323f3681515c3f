"""The program that an LLM runs: the one that is given, or one that is made."""

from __future__ import annotations

from pathlib import Path

from qaic_ray.api.settings import LlmSettings
from qaic_ray.errors import UsageError
from qaic_ray.pipeline.prepare_step import cores_here, prepare
from qaic_ray.pipeline.request import Listener, SdkChoice


def program_of(settings: LlmSettings, sdk: SdkChoice, listener: Listener) -> Path:
    """The folder of a QPC.

    Raises:
        UsageError: for a model or shapes that cannot be, and where it cannot be made by itself.
        ExportError, CompileError: it could not be made.
    """
    if settings.qpc is not None:
        return Path(settings.qpc).expanduser()
    run, shapes = settings.run_options, settings.shapes
    if run.group_size > 1:
        raise UsageError(
            "A program for a group of cards is not made by itself: compile one for the group, and "
            "give it by qpc."
        )
    if settings.address is not None:
        raise UsageError(
            "The nodes of a cluster need the program at one path: compile it there, and give it by "
            "qpc."
        )
    if shapes.num_cores is None:
        devices = None if run.devices == "all" else run.devices
        shapes = shapes.model_copy(update={"num_cores": cores_here(sdk, devices, run.partitions)})
    return prepare(settings.model_options, shapes, sdk, listener)
