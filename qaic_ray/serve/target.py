"""What `serve` was told to serve: a model, a QPC or a job; what is missing is made."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from qaic_ray.compile.store import Build
from qaic_ray.errors import UsageError
from qaic_ray.options import Job, ModelOptions, RayOptions, RunOptions, ServeOptions, VariantChoice
from qaic_ray.pipeline.compile_step import compile_step, requested_builds
from qaic_ray.pipeline.export_step import export_step
from qaic_ray.pipeline.job import beside_prepared, chosen_index, load_job, run_request
from qaic_ray.pipeline.prepare_step import prepare_for
from qaic_ray.pipeline.request import Listener, RunRequest, SdkChoice, resolved
from qaic_ray.serve.serving import Served
from qaic_ray.shipped.jobs import shipped_jobs

QPC_FILE = "programqpc.bin"
NAME = "serve"
"""Of what is served, in Ray's dashboard, where no job names it."""


@dataclass(frozen=True)
class ServeCall:
    """What the command line says.

    Attributes:
        target: a job file or a job's name, the folder of a QPC, or a model.
        model: of a QPC.
        overrides: `key=value` of a job.
        run: cards, and how answers are made.
        shapes: of a program that is made.
        options: of the server.
        ray: which.
    """

    target: str
    model: str | None
    overrides: Iterable[str]
    run: RunOptions
    shapes: VariantChoice
    options: ServeOptions
    ray: RayOptions

    @property
    def is_job(self) -> bool:
        """Whether the target is a job."""
        path = Path(self.target)
        is_name = self.target in shipped_jobs() and not path.exists()
        return is_name or path.suffix in (".yaml", ".yml")

    def job(self) -> Job:
        """The job that the target is, with what the command line says of serving it.

        Raises:
            JobError: for a file that is none.
        """
        job = beside_prepared(load_job(Path(self.target), self.overrides))
        said = {name: getattr(self.options, name) for name in self.options.model_fields_set}
        job = job.changed("serve", **said)
        said = {name: getattr(self.run, name) for name in self.run.model_fields_set}
        job = job.changed("run", prompt=None, prompts=None, **said)
        return job.changed("ray", **{n: getattr(self.ray, n) for n in self.ray.model_fields_set})


def served_job(job: Job, sdk: SdkChoice, listener: Listener) -> Served:
    """A job's model on the program of its variant, exported and compiled where it is missing.

    Raises:
        UsageError: for a job that cannot be.
        ExportError, CompileError: it could not be made.
    """
    chosen_at = chosen_index(job)
    request = run_request(job)
    exported = export_step(job.model, job.export, listener, sdk=sdk.here)
    builds = requested_builds(exported.folder, job.compile, sdk.here)
    _, chosen = compile_step([builds[chosen_at]], None, listener)[0]
    if not isinstance(chosen, Build):
        raise chosen
    return Served(replace(request, qpc=chosen.path), job.serve)


def served_model(asked: ServeCall, sdk: SdkChoice, listener: Listener) -> Served:
    """A model on a program that is given, or made.

    Raises:
        UsageError: for a model, shapes or cards that cannot be.
        ExportError, CompileError: it could not be made.
    """
    for override in asked.overrides:
        raise UsageError(f"--set {override} changes a job, and {asked.target} is none.")
    run = resolved(asked.run)
    is_qpc = (Path(asked.target) / QPC_FILE).is_file()
    model = asked.model if is_qpc else asked.target
    if model is None:
        raise UsageError(
            f"{asked.target} is the folder of a QPC: say whose, with -m and the model."
        )
    if not is_qpc and asked.model not in (None, asked.target):
        raise UsageError(
            f"{asked.target} is no QPC, as it holds no {QPC_FILE}: leave out -m to serve the model."
        )
    request = RunRequest(NAME, model, Path(asked.target), run, ray=asked.ray)
    if is_qpc:
        if said := ", ".join(
            f"--{name.replace('_', '-')}" for name in asked.shapes.model_fields_set
        ):
            raise UsageError(f"{said} is of a program that is made, and a QPC is given.")
        return Served(request, asked.options)
    qpc = prepare_for(ModelOptions(name=model), run, asked.shapes, sdk=sdk, listener=listener)
    return Served(replace(request, qpc=qpc), asked.options)
