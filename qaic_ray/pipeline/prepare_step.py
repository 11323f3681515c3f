"""Steps 1 and 2 for a run that names no QPC: what is missing is made, and kept for the next run.

Everything is in the user's cache: a folder for each model and SDK, with the model folder and the
QPCs in it.
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

from qaic_ray.compile.store import Build
from qaic_ray.contract import IoContract
from qaic_ray.errors import DeviceError, UsageError
from qaic_ray.files.documents import checked
from qaic_ray.files.folders import cache_folder
from qaic_ray.limits import CACHE_INDEX_BEFORE, CARDS
from qaic_ray.option_types import Precision
from qaic_ray.options import CompileOptions, ExportOptions, ModelOptions, RunOptions, VariantChoice
from qaic_ray.pipeline.compile_step import compile_step, requested_builds
from qaic_ray.pipeline.export_step import export_step, open_model
from qaic_ray.pipeline.request import Listener, SdkChoice, absolute_model
from qaic_ray.sdk import Sdk
from qaic_ray.worker.survey import Survey, survey

PROGRAMS_FOLDER = "programs"
"""Of the cache."""

PREFILL_LENS = (32, 128, 256)
"""A prefill is as long as the longest prompt, of these; longer prompts take several."""
LEAST_CONTEXT = 512
USUAL_CONTEXT = 2048
"""Tokens of a context for prompts that nobody has seen: the published recipe's."""
ANSWER_ROOM = 256
"""Tokens of a context that are left for an answer that has no bound."""
SLOTS = 8
"""Prompts side by side, where there is more than one."""


def prepare_for(
    model: ModelOptions,
    run: RunOptions,
    shapes: VariantChoice,
    *,
    sdk: SdkChoice,
    listener: Listener,
) -> Path:
    """The folder of a QPC that fits a run's prompts and cards; see `prepare`.

    Args:
        model: whose program.
        run: as `resolved` gives it.
        shapes: those that the user chose.
        sdk: compiles it.
        listener: who is told.

    Raises:
        UsageError: for a model, prompts or shapes that cannot be.
    """
    if run.group_size > 1:
        raise UsageError(
            "A program for a group of cards is not made by itself: compile one for the group, and "
            "give it by --qpc."
        )
    devices = None if run.devices == "all" else run.devices
    said = {
        "num_cores": cores_here(sdk, devices, run.partitions),
        "prompt_len": run.input_len,
        "ctx_len": run.ctx_len,
        **shapes.model_dump(exclude_none=True),
    }
    shapes = checked(VariantChoice, said, "the program")
    found = survey(run, open_model(model, weights=False))
    return prepare(model, shapes, sdk, listener, found=found)


def prepare(
    model: ModelOptions,
    shapes: VariantChoice,
    sdk: SdkChoice,
    listener: Listener,
    *,
    found: Survey = Survey(),  # noqa: B008  # frozen
) -> Path:
    """Export and compile a model, as far as that is not done; the QPC's folder.

    Args:
        model: whose program.
        shapes: of the program; what is None is chosen by `found`.
        sdk: compiles it.
        listener: who is told.
        found: what is known of the prompts.

    Raises:
        UsageError: for a model or shapes that cannot be.
        ExportError: the export failed.
        CompileError: the compiler failed.
    """
    place = program_folder(model, sdk.here)
    checkpoint = open_model(model, weights=False)
    output = str(place / f"{checkpoint.base}-kv")
    how = export_options(sdk.here).model_copy(update={"output": output})
    exported = export_step(model, how, listener)
    shapes = shapes_for(shapes, found, max_position=exported.manifest.max_position)
    said = {name: value for name, value in shapes if value is not None}
    whole = {"num_cores": cores_here(sdk), **said, "output": str(place / "qpc")}
    grid = CompileOptions.model_validate(whole)
    (request,) = requested_builds(exported.folder, grid, sdk.here)
    ((_, built),) = compile_step([request], None, listener)
    if not isinstance(built, Build):
        raise built
    listener.note(f"program {request.label}, kept in {built.path.parent.parent}")
    listener.note(
        "other shapes: --precision --num-cores --batch-size --input-len --ctx-len; your own: --qpc"
    )
    return built.path


def program_folder(model: ModelOptions, sdk: Sdk) -> Path:
    """Where the programs of a model for an SDK are kept."""
    name = absolute_model(model.name)
    base = Path(name).stem if name.endswith(".gguf") else Path(name).name
    base = re.sub(r"[^A-Za-z0-9._-]", "_", base)[:60]
    key = json.dumps([name, export_options(sdk).model_dump(mode="json"), sdk.label])
    digest = hashlib.sha256(key.encode()).hexdigest()[:8]
    return cache_folder() / PROGRAMS_FOLDER / f"{base}-{digest}"


def shapes_for(shapes: VariantChoice, found: Survey, *, max_position: int) -> VariantChoice:
    """Shapes for prompts: those that are said, and the others by what was found.

    A context has room for the longest prompt and answer, and is 512 tokens times a power of two, so
    that other prompts find the same program; no more than the model was made for.
    """
    batch_size = shapes.batch_size or (1 if found.num_sequences == 1 else SLOTS)
    longest = found.longest_prompt
    if longest is None:
        prompt_len, needed = PREFILL_LENS[1], USUAL_CONTEXT
    else:
        prompt_len = next((size for size in PREFILL_LENS if size >= longest), PREFILL_LENS[-1])
        needed = longest + (found.longest_answer or ANSWER_ROOM)
    ctx_len = LEAST_CONTEXT
    while ctx_len < needed:
        ctx_len *= 2
    ctx_len = shapes.ctx_len or min(ctx_len, max_position)
    return VariantChoice(
        precision=shapes.precision or Precision.MX6,
        num_cores=shapes.num_cores,
        batch_size=batch_size,
        prompt_len=shapes.prompt_len or min(prompt_len, 1 << (ctx_len.bit_length() - 1)),
        ctx_len=ctx_len,
    )


def cores_here(sdk: SdkChoice, devices: tuple[int, ...] | None = None, partitions: int = 1) -> int:
    """NSPs of a program for a part of the cards of this machine; a Standard card's without one."""
    try:
        cards = [
            device
            for device in sdk.devices
            if device.nsp_total and (devices is None or device.qid in devices)
        ]
    except DeviceError:
        cards = []  # a machine that only compiles needs no card and no driver
    least = min((card.nsp_total for card in cards), default=CARDS["PCIe"].nsps)
    return max(1, least // partitions)


def export_options(sdk: Sdk) -> ExportOptions:
    """How a model is exported for an SDK, where nobody says it."""
    if sdk.version < CACHE_INDEX_BEFORE:
        return ExportOptions(io=IoContract.CACHE_INDEX, continuous_batching=False)
    return ExportOptions()
