"""What a run is asked to do, and how that is kept in its folder, so that it can go on."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from dataclasses import dataclass, field, fields, replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from qaic_ray.documents import checked, read_yaml, user_path
from qaic_ray.errors import RowError, UsageError
from qaic_ray.folders import write_whole
from qaic_ray.model.sources import NAMED_MODELS
from qaic_ray.rows import ChatOptions
from qaic_ray.sampling_params import SamplingParams

if TYPE_CHECKING:
    from qaic_ray.formats.frozen_file import FrozenFile
    from qaic_ray.rows import Prompt, Row
    from qaic_ray.runs.fingerprint import Fingerprint

REQUEST_NAME = "request.yaml"
STDIN = "-"
_MAX_REASON_CHARS = 500

# Of this process, not of the run.
_NOT_KEPT = ("output", "ray_address", "job_text", "resume", "retry_errors", "new_input")
_PATHS = ("qpc", "draft_qpc")


def drawn_seed() -> int:
    """A run's seed, where none is given."""
    return secrets.randbits(32)


def date_now() -> str:
    """A run's date, where none is given: local time, to the second."""
    return datetime.now().isoformat(timespec="seconds")


@dataclass(frozen=True)
class RunInput:
    """The prompts of a run, which can be read once, and their part of its fingerprint."""

    source: Fingerprint
    prompts: Iterator[Prompt | Row]


@dataclass(frozen=True)
class RunRequest:
    """Prompts for one QPC on some cards; `devices` None means all that there are.

    `sampling` and `generation_len` (its `max_tokens`) are for rows that say nothing else; `seed` is
    what rows without a seed get theirs from. `chat_options` are for conversations that bring none,
    `chat_template` is Jinja text instead of the model's own, and `date` is what a template takes
    for the date. `drafts` and `draft_qpc` are those of `Speculation`.
    `input_len` and `ctx_len`, where given, must be what the QPC was compiled for. A card is shared
    out to `partitions` workers, or `group_size` cards make one. `job_text` is the job that this is
    a part of, for the run folder's job.yaml; without one the request itself. `resume` is the folder
    of a run that is to go on, there with its rows of errors again where `retry_errors`, and with
    another file of prompts where `new_input`.
    """

    name: str
    model: str
    qpc: Path
    devices: tuple[int, ...] | None
    prompt: str | None
    prompts_file: str | None
    prompts_format: str | None = None
    output_formats: tuple[str, ...] = ()
    input_len: int | None = None
    ctx_len: int | None = None
    generation_len: int | None = None
    sampling: SamplingParams = field(default_factory=SamplingParams)
    seed: int = field(default_factory=drawn_seed)
    chat: bool = False
    system: str | None = None
    chat_options: ChatOptions = field(default_factory=ChatOptions)
    chat_template: str | None = None
    date: str = field(default_factory=date_now)
    max_stall_s: float | None = None
    prefix_reuse: bool = True
    drafts: str = "auto"
    draft_qpc: Path | None = None
    partitions: int = 1
    group_size: int = 1
    output: Path = Path("runs")
    ray_address: str | None = None
    job_text: str = ""
    resume: Path | None = None
    retry_errors: bool = False
    new_input: bool = False

    def on(self, qpc: Path) -> RunRequest:
        """The same request for another QPC."""
        return replace(self, qpc=qpc)

    def absolute(self) -> RunRequest:
        """The same request as it is understood in every folder."""
        prompts = self.prompts_file
        return replace(
            self,
            model=absolute_model(self.model),
            qpc=self.qpc.absolute(),
            draft_qpc=None if self.draft_qpc is None else self.draft_qpc.expanduser().absolute(),
            prompts_file=prompts if prompts in (None, STDIN) else absolute_path(prompts),
        )

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

    def open_input(self) -> RunInput:
        """The prompts, and what they are known by; a file is read through now, its rows later.

        Raises:
            UsageError: where there are none, or two sources of them, or parameters that no row
                could be answered with.
        """
        from qaic_ray.formats.prompts import PromptFormat, prompts_from_file, prompts_from_text
        from qaic_ray.model.chat import check_kwargs
        from qaic_ray.runs.fingerprint import STREAM_SOURCE, file_source, text_source

        defaults, chat = self.defaults, self.chat_options
        check_kwargs(chat.template_kwargs)
        if self.system is not None and not self.chat:
            raise UsageError(
                "A system prompt (--system, run.system) has its place in the chat template: give "
                "--chat (run.chat) too, or leave it out."
            )
        if self.prompt is not None and self.prompts_file is not None:
            raise UsageError("Give one of --prompt and --prompts-file, not both.")
        if self.prompt is not None:
            return RunInput(text_source(self.prompt), prompts_from_text(self.prompt))
        path = self.prompts_file
        if path is None:
            raise UsageError(
                'There is nothing to answer: give --prompt "a|b" or --prompts-file FILE.'
            )
        form = None if self.prompts_format is None else PromptFormat(self.prompts_format)
        if path == STDIN or not user_path(path, "--prompts-file").is_file():
            # A pipe can be read only once: its rows' digests are all there is.
            return RunInput(STREAM_SOURCE, prompts_from_file(path, form, defaults, chat))
        frozen = self._frozen(user_path(path, "--prompts-file"))
        prompts = prompts_from_file(frozen.path, form, defaults, chat, frozen=frozen)
        return RunInput(file_source(frozen), prompts)

    def _frozen(self, path: Path) -> FrozenFile:
        """The prompts file as it is, or as much of it as the run that is resumed began with."""
        from qaic_ray.formats.frozen_file import FrozenFile, InputChanged
        from qaic_ray.runs.fingerprint import INPUT
        from qaic_ray.runs.journal import last_fingerprint

        if self.resume is None or self.new_input:
            return FrozenFile.of(path)
        before = last_fingerprint(self.resume)
        try:
            return FrozenFile.of(path, None if before is None else before[INPUT].get("bytes"))
        except InputChanged as error:
            raise UsageError(
                f"{error} Go on with a file whose answered rows are as they were, by "
                "--prompts-file FILE, or begin a new run."
            ) from error

    def to_yaml(self) -> str:
        """All of it that belongs to the run."""
        document: dict[str, Any] = {
            f.name: getattr(self, f.name) for f in fields(self) if f.name not in _NOT_KEPT
        }
        document |= {
            name: None if document[name] is None else str(document[name]) for name in _PATHS
        }
        document["chat_options"] = vars(self.chat_options)
        document["devices"] = None if self.devices is None else list(self.devices)
        document["output_formats"] = list(self.output_formats)
        sampling = {
            k: list(v) if isinstance(v, tuple) else v for k, v in vars(self.sampling).items()
        }
        del sampling["max_tokens"]
        document["sampling"] = sampling
        return yaml.safe_dump(document, sort_keys=False, allow_unicode=True)


def absolute_path(path: str) -> str:
    """A path of the user's as it is understood in every folder."""
    return str(user_path(path, "the path").absolute())


def absolute_model(name: str) -> str:
    """A model's name: a path means the same file everywhere, a name is looked up by each."""
    if name in NAMED_MODELS:
        return name
    path = user_path(name, "the model's name")
    return str(path.absolute()) if path.exists() else name


def write_request(request: RunRequest, folder: Path) -> str:
    """Keep a request in its run folder, whole or not at all; return its text."""
    text = request.absolute().to_yaml()
    write_whole(folder / REQUEST_NAME, text)
    return text


def last_unfinished(output: Path, job: str = "") -> Path | None:
    """The run in `output` that began last, of this job where one is named, and can go on."""
    from qaic_ray.runs.journal import last_unfinished

    return last_unfinished(output, REQUEST_NAME, job)


def read_request(folder: Path) -> RunRequest:
    """The request of a run folder, to go on with it.

    Raises:
        UsageError: when the folder is not a run's.
    """
    path = folder / REQUEST_NAME
    if not path.exists():
        raise UsageError(f"{folder} is not the folder of a run: it has no {REQUEST_NAME}.")
    try:
        document = read_yaml(path)
        known = {f.name for f in fields(RunRequest)} - set(_NOT_KEPT)
        if not isinstance(document, dict) or not document.keys() <= known:
            raise UsageError(f"{path} does not hold the keys of a request.")
        sampling = checked(dict[str, Any], document.get("sampling"), f"{path}: sampling")
        document["sampling"] = SamplingParams().updated(sampling)
        return replace(checked(RunRequest, document, str(path)), resume=folder)
    except (UsageError, RowError) as error:
        raise UsageError(
            f"{path} cannot be gone on with: it was written by another version, or changed "
            f"({str(error)[:_MAX_REASON_CHARS].rstrip('.')})."
        ) from error
