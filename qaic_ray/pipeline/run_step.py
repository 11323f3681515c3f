"""Step 3: prompts through one QPC on some cards, into a run folder; or on with one that stopped."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qaic_ray import interruption
from qaic_ray.bundles.record import Recording, replay_command
from qaic_ray.compile.recipe_names import led_to
from qaic_ray.compile.store import content_key
from qaic_ray.errors import QaicRayError, Unfinished, UsageError
from qaic_ray.model.checkpoint import (
    Checkpoint,
    load_chat_template,
    load_tokenizer,
    open_checkpoint,
)
from qaic_ray.model.tokenizer import text_parts
from qaic_ray.pipeline.early_warning import EarlyWarning
from qaic_ray.pipeline.local_cards import on_local_cards, slots_of
from qaic_ray.pipeline.request import (
    Listener,
    RunRequest,
    SdkChoice,
    absolute_model,
    write_request,
)
from qaic_ray.pipeline.run_record import Compiles, RunRecording, recorded
from qaic_ray.rows import Prompt, Row
from qaic_ray.runs.run_input import STDIN, RunInput
from qaic_ray.sdk import DEFAULT_NUMERICS, NUMERICS_VARIABLE, Sdk, name_for_others
from qaic_ray.worker.checks import check_program

BUNDLES_FOLDER = "bundles"
"""Of a run folder, on the machine of each card; has what `--record` dumps."""
LOGS_FOLDER = "logs"
"""Of a run folder; has what each card's process has printed."""

if TYPE_CHECKING:
    from qaic_ray.cards.inventory import NodeCards
    from qaic_ray.cluster.cluster import Cluster
    from qaic_ray.runs.delivery import Proof
    from qaic_ray.runs.report import RunSummary
    from qaic_ray.runs.result import FleetResult
    from qaic_ray.telemetry.recorder import RunRecorder
    from qaic_ray.worker.worker import WorkerSpec


def run_step(request: RunRequest, sdk: SdkChoice, listener: Listener) -> RunSummary:
    """Answer prompts on a Ray that is started, or joined, for it.

    Raises:
        UsageError: for a QPC, cards or prompts that are not there.
    """
    if (qpc := led_to(request.qpc)) is not None:
        # By the link's name a later compile would change what the run goes on with.
        listener.note(f"{request.qpc} leads to {qpc.name}")
        request = replace(request, qpc=qpc)
    check_program(request.generation, request.qpc)
    request, num_cards = on_local_cards(request, sdk, slots_of(request.qpc), listener)
    run_input = request.open_input()
    _checkpoint(request)  # a model that is none is said before Ray starts
    check_chat_template(request)
    request.check_parts()
    from qaic_ray.pipeline.open_ray import open_ray

    with (
        resuming(request, sdk),
        open_ray(request.ray, num_cards, name=request.name, sdk=sdk.here, listener=listener) as ray,
    ):
        return run_on(ray, request, run_input, sdk=sdk, listener=listener)


def check_chat_template(request: RunRequest) -> None:
    """Find out, before Ray starts, whether prompts can be put into the model's chat template.

    Raises:
        UsageError: they cannot; one sentence.
    """
    from qaic_ray.worker.text import check_chat

    is_wanted = request.run.chat or request.run.chat_template is not None
    checkpoint = _checkpoint(request) if is_wanted else None
    if checkpoint is not None:  # else each worker finds out when it is opened
        check_chat(load_chat_template(checkpoint), request.generation, request.model)


def run_on(
    cluster: Cluster,
    request: RunRequest,
    run_input: RunInput,
    *,
    sdk: SdkChoice,
    listener: Listener,
    compiles: Compiles = (),
) -> RunSummary:
    """Answer prompts on a cluster; the request's QPC is there, and `compiles` are its job's.

    Raises:
        UsageError: where the request does not fit the QPC, the cards, or the run that it resumes.
    """
    from qaic_ray.report.document import write_report
    from qaic_ray.runs.delivery import export_outputs
    from qaic_ray.runs.report import RunSummary

    specs = worker_specs(cluster, request, sdk, listener)
    folder = request.resume.absolute() if request.resume else _new_run_folder(request)
    listener.run_folder(folder)
    cluster.write_logs_to(folder / LOGS_FOLDER, listener.remark)
    if request.run.record is not None:
        recording_to = Recording(str(folder / BUNDLES_FOLDER), request.run.record)
        specs = [replace(spec, recording=recording_to) for spec in specs]

    def run_prompts(prompts: Iterator[Prompt | Row], **how: Any) -> FleetResult:
        return cluster.run_prompts(prompts, specs, **how)

    with nullcontext() if request.resume else _kept(folder, request, sdk):
        with recorded(folder, request, sdk, listener=listener, compiles=compiles) as recording:
            result, proof = _answer(
                *(run_prompts, request, sdk),
                run_input=run_input,
                folder=folder,
                listener=listener,
                recording=recording,
            )
            recording.history.ended(result)
        if formats := request.run.output_formats:
            tokenizer = load_tokenizer(open_checkpoint(request.model, weights=False))
            for output_format in formats:
                export_outputs(
                    folder,
                    output_format,
                    model=request.model,
                    token_text=lambda token: tokenizer.decode((token,)),
                )
        summary = RunSummary(
            result,
            job=request.name,
            sdk=next(
                (worker.info.sdk for worker in result.workers if worker.info), sdk.here.description
            ),
            folder=folder,
            model=request.model,
            qpc=request.qpc.name,
            proof=proof,
            replay=None
            if request.run.record is None
            else replay_command(folder / BUNDLES_FOLDER, request.qpc, sdk.tool("qaic-runner")),
        )
        write_report(summary, recording.statistics)  # last: by it a run is known as done
        return summary


def resuming(request: RunRequest, sdk: SdkChoice) -> AbstractContextManager[None]:
    """Say what is safe of the run that goes on, whatever ends it from here on; see `_kept`."""
    return _kept(request.resume.absolute(), request, sdk) if request.resume else nullcontext()


@contextmanager
def _kept(folder: Path, request: RunRequest, sdk: SdkChoice) -> Iterator[None]:
    """Say, whatever ends a run before its end, how many rows are safe and what goes on with it.

    Raises:
        UsageError: as it came; a run that is new and has no row is gone then.
        KeyboardInterrupt: with the sentence.
        Unfinished: for all else.
    """
    from qaic_ray.runs.journal import safe_rows

    command = _resume_command(request, sdk, folder)

    def sentence(why: str) -> str:
        rows = safe_rows(folder)
        return f"{why}: {rows:,} rows are safe in {folder}; go on with `{command}`."

    def stopped() -> str:
        number = interruption.received()
        by = "" if number is None else f" by {signal.Signals(number).name}"
        return sentence(interruption.loss() or f"stopped{by}")

    try:
        with interruption.last_words(stopped):
            yield
    except UsageError as error:
        if request.resume is not None:
            raise
        if safe_rows(folder):
            raise UsageError(sentence(_unended(error))) from error
        shutil.rmtree(folder)  # the request was wrong, and nothing was answered
        raise
    except KeyboardInterrupt as error:
        error.args = (stopped(),)
        raise
    except Unfinished as error:
        raise Unfinished(f"{error} ({safe_rows(folder):,} rows are safe.)") from error
    except Exception as error:
        raise Unfinished(sentence(_unended(error))) from error


def _unended(error: Exception) -> str:
    """What an error says, to be gone on with."""
    text = " ".join(str(error).split()).rstrip(".")
    return text if isinstance(error, QaicRayError) else f"{type(error).__name__}: {text[:300]}"


def _resume_command(request: RunRequest, sdk: SdkChoice, folder: Path) -> str:
    """What a shell goes on with the run by."""
    words = ["qaic-ray", "run", "--resume", str(folder)]
    if sdk.here.numerics not in (None, DEFAULT_NUMERICS):
        words.insert(0, f"{NUMERICS_VARIABLE}={sdk.here.numerics}")
    if request.ray.address is not None:
        words += ["--address", request.ray.address]
    if sdk.name != "auto":
        words += ["--sdk", sdk.name]
    stdin = " < the same input" if request.run.prompts == STDIN else ""
    return shlex.join(words) + stdin


def _answer(
    run_prompts: Callable[..., FleetResult],
    request: RunRequest,
    sdk: SdkChoice,
    *,
    run_input: RunInput,
    folder: Path,
    listener: Listener,
    recording: RunRecording,
) -> tuple[FleetResult, Proof]:
    """All rows that have no answer yet, journaled and written."""
    from qaic_ray.dispatch.policy import text_work
    from qaic_ray.files.documents import differences
    from qaic_ray.runs.delivery import RowWriter
    from qaic_ray.runs.intake import fingerprint
    from qaic_ray.runs.journal import Journal
    from qaic_ray.runs.metering import metered
    from qaic_ray.runs.result import BrokenOff, Cause
    from qaic_ray.runs.run_view import RunFollower
    from qaic_ray.runs.shards.part_files import part_files
    from qaic_ray.worker.worker import CardWorker

    parts = content_parts(request, sdk.here)
    same = fingerprint(run_input.source, generation=request.generation, **parts)
    resumed = request.resume is not None
    with (
        Journal(
            folder, same, retry_errors=request.retry_errors, new_input=request.new_input
        ) as journal,
        RowWriter(folder, resumed=resumed) as write,
        part_files(request.run, folder, write) as part_writer,
        recorder_of(request, folder.name, listener.remark) as recorder,
    ):
        if request.new_input:
            write_request(request, folder)
        watch = RunFollower(run_input.rows_guess)
        early = EarlyWarning(watch, listener, request.stop_if_errors)
        listener.running(watch)
        prompts = run_input.prompts
        result = run_prompts(
            map(_streamed, prompts) if listener.wants_tokens else prompts,
            worker_class=CardWorker,
            audience=early.audience(metered(recording.audience(write, listener), recorder)),
            journal=journal,
            work_of=partial(text_work, defaults=request.run.defaults),
        )
        if changes := differences(parts, content_parts(request, sdk.here)):
            error = f"While the run went, {' and '.join(changes)}: its rows may be of either."
            result = replace(result, broken_off=BrokenOff(Cause.CHANGED, error))
        complete = result.broken_off is None
        proof = write.proof(result.rows_in, result.inputs_sha256, complete=complete)
        if part_writer is not None:
            made = part_writer.finish(proof)
            listener.note(f"{len(made)} parts in {request.run.output_parts}")
    return result, proof


def _streamed(item: Prompt | Row) -> Prompt | Row:
    return item if isinstance(item, Row) else replace(item, stream=True)


def recorder_of(
    request: RunRequest, name: str, on_fault: Callable[[str], None]
) -> AbstractContextManager[RunRecorder]:
    """The run's recorder, for Ray to export what it is told, if that is wanted.

    Args:
        request: says whether it is.
        name: of the run.
        on_fault: is told, in a sentence, why there are no metrics.
    """
    from qaic_ray.telemetry.recorder import NoSink, RunRecorder

    if not request.run.metrics:
        return nullcontext(RunRecorder(NoSink()))
    from qaic_ray.cluster.monitoring.ray_metrics import recorded_run

    return recorded_run(name, on_fault)


def content_parts(request: RunRequest, sdk: Sdk) -> dict[str, Any]:
    """What an answer depends on beside its prompt and the request, by content.

    An emulated card's arithmetic is a part, a real one's is its program's. A model that only the
    nodes of a cluster have is known by its name.
    """
    model: dict[str, Any] = {"name": request.model}
    if checkpoint := _checkpoint(request):
        model = {**text_parts(checkpoint.folder), "eos_ids": list(checkpoint.eos_ids)}
    parts = {"qpc": content_key(request.qpc), "model": model}
    return parts if sdk.numerics is None else {**parts, "numerics": sdk.numerics}


def _checkpoint(request: RunRequest) -> Checkpoint | None:
    """The model, without its weights; None where only the nodes of a cluster have its files."""
    is_here = request.ray.address is None or Path(request.model).expanduser().exists()
    return open_checkpoint(request.model, weights=False) if is_here else None


def worker_specs(
    cluster: Cluster, request: RunRequest, sdk: SdkChoice, listener: Listener
) -> list[WorkerSpec]:
    """What each worker is given, its cards above all."""
    here = request.ray.address is None
    sdk_name = str(sdk.here.root) if here else name_for_others(sdk.name)
    nodes = cluster.inventory(sdk_name, sdk.emulated)
    for problem in cluster.problems(nodes):
        listener.remark(problem)
    return specs_on(nodes, request)


def specs_on(nodes: Sequence[NodeCards], request: RunRequest) -> list[WorkerSpec]:
    """What each worker is given on these nodes, whose cards were looked for."""
    from qaic_ray.cards.inventory import place, qpc_cores
    from qaic_ray.worker.worker import WorkerSpec

    places = place(
        nodes,
        devices=None if request.run.devices == "all" else request.run.devices,
        group_size=request.run.group_size,
        partitions=request.run.partitions,
        num_cores=qpc_cores(request.qpc),
    )
    checkpoint = _checkpoint(request)
    text = text_parts(checkpoint.folder) if checkpoint else {}
    qpc, model = str(request.qpc.absolute()), absolute_model(request.model)
    generation = request.generation
    return [
        WorkerSpec(
            **vars(where),
            qpc=qpc,
            model=model,
            generation=generation,
            text=text,
            metrics=request.run.metrics,
        )
        for where in places
    ]


def _new_run_folder(request: RunRequest) -> Path:
    """`<output>/<name>-<UTC time>` and its shard, with a number behind it where that is taken."""
    output = Path(request.run.output).absolute()
    name = f"{request.name}-{datetime.now(timezone.utc).strftime('%Y%m%d-%H%M%S')}"
    if request.run.shard is not None:
        name += f"-shard-{request.run.shard.replace('/', '-of-')}"
    for number in range(1, 1000):
        folder = output / (f"{name}-{number}" if number > 1 else name)
        try:
            os.makedirs(output, exist_ok=True)
            folder.mkdir(mode=0o700)  # prompts and answers are their user's
            break
        except FileExistsError:
            if not output.is_dir():
                raise UsageError(f"{output} is not a folder.") from None
        except OSError as error:
            raise UsageError(f"Cannot write to {output}: {error.strerror}.") from error
    else:
        raise UsageError(
            f"{request.run.output} has a thousand runs of this second: use another --output."
        )
    try:
        (folder / LOGS_FOLDER).mkdir()
        text = write_request(request, folder)
        (folder / "job.yaml").write_text(request.job_text or text, encoding="utf-8")
    except OSError as error:
        raise QaicRayError(f"Cannot write to {folder}: {error.strerror}.") from error
    return folder
