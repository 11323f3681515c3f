"""Step 3: prompts through one QPC on some cards, into a run folder."""

from __future__ import annotations

import secrets
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from qaic_ray.compile.compiler import QPC_FILE
from qaic_ray.errors import RowError, UsageError
from qaic_ray.pipeline.devices import choose_devices
from qaic_ray.pipeline.listener import Listener
from qaic_ray.sampling_params import SamplingParams
from qaic_ray.sdk import Sdk

if TYPE_CHECKING:
    from qaic_ray.fleet.cluster import Cluster
    from qaic_ray.fleet.report import RunSummary
    from qaic_ray.fleet.worker import WorkerSpec
    from qaic_ray.rows import Prompt, Row


def drawn_seed() -> int:
    """A run's seed, where none is given."""
    return secrets.randbits(32)


@dataclass(frozen=True)
class RunRequest:
    """Prompts for one QPC on some cards; `devices` None means all of the machine's.

    `sampling` and `generation_len` (its `max_tokens`) are for rows that say nothing else; `seed` is
    what rows without a seed get theirs from. `drafts` and `draft_qpc` are those of `Speculation`.
    `input_len` and `ctx_len`, where given, must be what the QPC was compiled for. `job_text` is the
    job that this is a part of, for the run folder's job.yaml; without one the request itself.
    """

    name: str
    model: str
    qpc: Path
    devices: tuple[int, ...] | None
    prompt: str | None
    prompts_file: str | None
    input_len: int | None = None
    ctx_len: int | None = None
    generation_len: int | None = None
    sampling: SamplingParams = field(default_factory=SamplingParams)
    seed: int = field(default_factory=drawn_seed)
    chat: bool = False
    system: str | None = None
    max_stall_s: float | None = None
    prefix_reuse: bool = True
    drafts: str = "auto"
    draft_qpc: Path | None = None
    output: Path = Path("runs")
    ray_address: str | None = None
    job_text: str = ""

    def on(self, qpc: Path) -> RunRequest:
        """The same request for another QPC."""
        return replace(self, qpc=qpc)

    @property
    def defaults(self) -> SamplingParams:
        """The parameters of a row that brings none.

        Raises:
            UsageError: where those of the run do not go together.
        """
        try:
            return replace(self.sampling, max_tokens=self.generation_len)
        except RowError as error:
            raise UsageError(str(error)) from error

    def open_prompts(self) -> Iterator[Prompt | Row]:
        """The prompts; a file is opened now and read as it is needed.

        Raises:
            UsageError: where there are none, or two sources of them, or parameters that no row
                could be answered with.
        """
        from qaic_ray.fleet.prompts import prompts_from_file, prompts_from_text

        defaults = self.defaults
        if self.system is not None and not self.chat:
            raise UsageError(
                "A system prompt (--system, run.system) has its place in the chat template: give "
                "--chat (run.chat) too, or leave it out."
            )
        if self.prompt is not None and self.prompts_file is not None:
            raise UsageError("Give one of --prompt and --prompts-file, not both.")
        if self.prompt is not None:
            return prompts_from_text(self.prompt)
        if self.prompts_file is not None:
            return prompts_from_file(self.prompts_file, sampling=defaults)
        raise UsageError('There is nothing to answer: give --prompt "a|b" or --prompts-file FILE.')


def run_step(request: RunRequest, sdk: Sdk, listener: Listener) -> RunSummary:
    """Answer prompts on a Ray that is started, or joined, for it.

    Raises:
        UsageError: for a QPC, cards or prompts that are not there.
    """
    if not (request.qpc / QPC_FILE).is_file():
        raise UsageError(
            f"{request.qpc} holds no {QPC_FILE}: give the folder of a compiled variant, like "
            "qpc/<base>-kv-32pl-512cl-14c-1BS-mx6."
        )
    devices = choose_devices(sdk, request.devices)
    prompts = request.open_prompts()
    from qaic_ray.fleet.cluster import Cluster

    listener.began("Ray")
    with Cluster(len(devices), address=request.ray_address) as cluster:
        listener.ended("Ray")
        request = replace(request, devices=devices)
        return run_on(cluster, request, prompts, sdk=sdk, listener=listener)


def run_on(
    cluster: Cluster,
    request: RunRequest,
    prompts: Iterator[Prompt | Row],
    *,
    sdk: Sdk,
    listener: Listener,
) -> RunSummary:
    """Answer prompts on a cluster; the request's devices are chosen, its QPC is there."""
    from qaic_ray.fleet.driver import Audience
    from qaic_ray.fleet.outputs import OUTPUTS_NAME, row_writer
    from qaic_ray.fleet.report import RunSummary, write_report
    from qaic_ray.fleet.worker import CardWorker

    folder = _new_run_folder(request)
    try:
        with row_writer(folder) as write:

            def on_row(row: Row) -> None:
                write(row)
                listener.answered(row)

            audience = Audience(on_row=on_row, on_worker_ready=listener.card_ready)
            specs = _worker_specs(request, sdk)
            result = cluster.run_prompts(prompts, specs, worker_class=CardWorker, audience=audience)
    except UsageError:
        if not (folder / OUTPUTS_NAME).stat().st_size:
            shutil.rmtree(folder)  # the request was wrong, and nothing was answered
        raise
    summary = RunSummary(
        result,
        job=request.name,
        sdk=next((worker.info.sdk for worker in result.workers if worker.info), sdk.label),
        folder=folder,
        model=request.model,
        qpc=request.qpc.name,
    )
    write_report(summary)
    return summary


def _worker_specs(request: RunRequest, sdk: Sdk) -> list[WorkerSpec]:
    from qaic_ray.fleet.answers import Generation
    from qaic_ray.fleet.speculation import Drafts, Speculation
    from qaic_ray.fleet.worker import WorkerSpec

    model = Path(request.model).expanduser()
    generation = Generation(
        sampling=request.defaults,
        chat=request.chat,
        system=request.system,
        run_seed=request.seed,
        max_stall_s=request.max_stall_s,
        prefix_reuse=request.prefix_reuse,
        speculation=Speculation(
            Drafts(request.drafts),
            None if request.draft_qpc is None else str(request.draft_qpc.absolute()),
        ),
        prompt_len=request.input_len,
        ctx_len=request.ctx_len,
    )
    return [
        WorkerSpec(
            name=f"card {device}",
            device_ids=(device,),
            sdk_root=str(sdk.root),
            qpc=str(request.qpc.absolute()),
            # A path means the same file to every process; a name is looked up by each.
            model=str(model.absolute()) if model.exists() else request.model,
            generation=generation,
        )
        for device in request.devices or ()
    ]


def _new_run_folder(request: RunRequest) -> Path:
    """`<output>/<name>-<UTC time>`, with a number behind it where that is taken."""
    stamp = datetime.now(timezone.utc).strftime("%Y%m%d-%H%M%S")
    name = f"{request.name}-{stamp}"
    for number in range(2, 1000):
        folder = request.output.absolute() / name
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            name = f"{request.name}-{stamp}-{number}"
            continue
        except OSError as error:
            raise UsageError(f"Cannot write to {folder.parent}: {error.strerror}.") from error
        (folder / "logs").mkdir()
        (folder / "job.yaml").write_text(request.job_text or _own_text(request), encoding="utf-8")
        return folder
    raise UsageError(f"{request.output} has a thousand runs of this second: use another --output.")


def _own_text(request: RunRequest) -> str:
    fields = asdict(request) | {"qpc": str(request.qpc), "output": str(request.output)}
    fields["devices"] = list(request.devices or ())
    fields["draft_qpc"] = None if request.draft_qpc is None else str(request.draft_qpc)
    del fields["job_text"], fields["sampling"]["max_tokens"]
    return yaml.safe_dump(fields, sort_keys=False, allow_unicode=True)
