"""The program of a run: which folder it is, and whether it is what the request says."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from qaic_ray.compile.recipe_names import led_to
from qaic_ray.compile.store import SPECIALIZATIONS_FILE, check_kept, read_record
from qaic_ray.contract import Specializations
from qaic_ray.pipeline.request import Listener, RunRequest
from qaic_ray.worker.checks import check_shapes


def with_program(request: RunRequest, listener: Listener) -> RunRequest:
    """The request with the folder of the variant itself, checked before anything is started.

    Raises:
        UsageError: for a QPC that is not there, not whole, or of other shapes than is said.
    """
    if (qpc := led_to(request.qpc)) is not None:
        # By the link's name a later compile would change what the run goes on with.
        listener.remark(f"{request.qpc} leads to {qpc.name}.")
        request = replace(request, qpc=qpc)
    check_kept(request.qpc)
    if request.run.draft_qpc is not None:
        check_kept(Path(request.run.draft_qpc))
    # Of other programs, and where the file was edited, each worker reads the shapes on its card.
    record = read_record(request.qpc)
    kept = [file for file in record.files if file.name == SPECIALIZATIONS_FILE] if record else []
    if kept and not kept[0].fault(request.qpc):
        shapes = Specializations.load(request.qpc / SPECIALIZATIONS_FILE)
        check_shapes(request.generation, str(request.qpc), shapes)
    return request
