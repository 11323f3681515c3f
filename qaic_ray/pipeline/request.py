"""What steps are handed: who listens, which SDK, and what a run is asked to do.

A run's request is kept in its folder, so that it can go on.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import yaml

from qaic_ray.errors import QaicRayError, RowError, UsageError
from qaic_ray.files.documents import checked, read_text, read_yaml, user_path
from qaic_ray.files.folders import write_whole
from qaic_ray.model.chat import check_kwargs
from qaic_ray.model.sources import NAMED_MODELS
from qaic_ray.option_types import is_template
from qaic_ray.options import TYPED_LEN, EmulatorOptions, Generation, RayOptions, RunOptions
from qaic_ray.runs.intake import INPUT, Fingerprint
from qaic_ray.runs.run_input import RunInput, absolute_sources, check_choice, open_run_input
from qaic_ray.sdk import (
    DEFAULT_NUMERICS,
    NUMERICS_VARIABLE,
    SDK_NAMES,
    SDK_VARIABLE,
    Device,
    Sdk,
    find_sdk,
)

if TYPE_CHECKING:
    from qaic_ray.compile.compiler import Variant
    from qaic_ray.compile.store import Build, BuildRequest
    from qaic_ray.rows import Row
    from qaic_ray.runs.run_view import RunFollower, RunView
    from qaic_ray.runs.token_streams import TokenDelta
    from qaic_ray.worker.worker import WorkerInfo

REQUEST_NAME = "request.yaml"
_MAX_REASON_CHARS = 500


class Listener(Protocol):
    """Hears what happens; every method returns at once."""

    def sdk_chosen(self, sdk: Sdk) -> None:
        """Which SDK everything goes through."""

    def began(self, stage: str) -> None:
        """A stage begins."""

    def ended(self, stage: str) -> None:
        """The stage that began last is done; the text says what came of it."""

    def compiling(self, number: int) -> None:
        """So many variants are compiled from now on."""

    def building(self, request: BuildRequest) -> None:
        """The build of one of them begins."""

    def compiled(self, variant: Variant, result: Build | QaicRayError) -> None:
        """One variant is there, or failed."""

    def card_ready(self, info: WorkerInfo) -> None:
        """A card has loaded its program."""

    def note(self, text: str) -> None:
        """Something that was decided, and how to have it otherwise."""

    def remark(self, text: str) -> None:
        """Something that the user may want to mend."""

    def dashboard(self, ways_in: Sequence[str]) -> None:
        """Ray's dashboard is up: its URL, and how to get there, one line each."""

    def run_folder(self, folder: Path) -> None:
        """Where the run that begins, or goes on, keeps everything."""

    def running(self, watch: RunFollower) -> None:
        """A run goes on; how it stands can be asked for at any time, by any thread."""

    def going(self, view: RunView) -> None:
        """Once, when enough rows have ended to tell how the run is going."""

    def answered(self, row: Row) -> None:
        """The next row, in input order."""

    def saved(self, row: Row) -> None:
        """A row is in the journal; they come in the order in which they ended."""

    @property
    def wants_tokens(self) -> bool:
        """Whether `generated` is called."""

    def generated(self, deltas: Sequence[TokenDelta]) -> None:
        """What rows got."""


@dataclass(frozen=True)
class SdkChoice:
    """The SDK of this machine, and what the nodes of a cluster look for: each has its own.

    `name` is as the user gave it, `emulated` what the emulated one is to be where it is the one.
    """

    here: Sdk
    name: str
    emulated: EmulatorOptions

    def tool(self, name: str) -> list[str]:
        """The words by which a shell starts a tool of this SDK, with the same numerics."""
        if self.here.kind != "emulated":
            return [str(self.here.root / "exec" / name)]
        words = ["qaic-ray", "emulator", "run"]
        is_default = self.name in SDK_NAMES and SDK_VARIABLE not in os.environ
        if not is_default or self.emulated != EmulatorOptions():
            words += ["--sdk", str(self.here.root)]
        if self.here.numerics != DEFAULT_NUMERICS:
            words.insert(0, f"{NUMERICS_VARIABLE}={self.here.numerics}")
        return [*words, "--", name]

    @cached_property
    def devices(self) -> tuple[Device, ...]:
        """The cards of this machine, as they were when they were first asked for.

        Raises:
            DeviceError: as `Sdk.devices`.
        """
        return tuple(self.here.devices())


def choose_sdk(name: str, emulated: EmulatorOptions, listener: Listener) -> SdkChoice:
    """Find the SDK, lay the emulated one down where it is the one, and say which it is."""
    sdk = find_sdk(name, emulated)
    _ = sdk.numerics  # a wrong one is refused here, not by every card
    listener.sdk_chosen(sdk)
    return SdkChoice(sdk, name, emulated)


@dataclass(frozen=True)
class RunRequest:
    """Prompts for one QPC on some cards.

    `run` is as `resolved` gives it. `job_text` is the job that this is a part of, for the run
    folder's job.yaml; without one the request itself. `resume` is the folder of a run that is to go
    on, there with its rows of errors again where `retry_errors`, and with another file of prompts
    where `new_input`. With `stop_if_errors` the run ends early when that share of its rows failed.
    """

    name: str
    model: str
    qpc: Path
    run: RunOptions
    ray: RayOptions = field(default_factory=partial(RayOptions, dashboard=False))
    job_text: str = ""
    resume: Path | None = None
    retry_errors: bool = False
    new_input: bool = False
    stop_if_errors: float | None = None

    def with_run(self, **changes: Any) -> RunRequest:
        """The same request with other options of the run."""
        return replace(self, run=self.run.model_copy(update=changes))

    def absolute(self) -> RunRequest:
        """The same request as it is understood in every folder."""
        request = replace(self, model=absolute_model(self.model), qpc=self.qpc.absolute())
        changes: dict[str, Any] = absolute_paths(self.run, "draft_qpc")
        for name in ("prompts", "output_parts"):
            if (named := getattr(self.run, name)) is not None:
                changes[name] = absolute_sources(named)
        return request.with_run(**changes)

    @property
    def generation(self) -> Generation:
        """What of it a worker is handed."""
        return self.run.part(Generation)

    def open_input(self) -> RunInput:
        """The prompts, and what they are known by; a file is read through now, its rows later.

        Raises:
            UsageError: where there are none, or two sources of them, or parameters that no row
                could be answered with.
        """
        self.check_prompts()
        return open_run_input(self.run, self._before())

    def check_prompts(self) -> None:
        """See, before anything is made for them, whether there are prompts.

        Raises:
            UsageError: as `open_input`, but for what a look into a file shows.
        """
        run = self.run
        check_kwargs(run.chat_options.template_kwargs)
        if run.system is not None and not run.chat:
            raise UsageError(
                "A system prompt (--system, run.system) has its place in the chat template: give "
                "--chat (run.chat) too, or leave it out."
            )
        if run.prompt is not None and run.prompts is not None:
            raise UsageError("Give one of --prompt and --input, not both.")
        if run.prompt is None and run.prompts is None:
            raise UsageError(
                'There is nothing to answer: give a prompt, --prompt "a|b" or --input FILE.'
            )
        check_choice(run)

    def check_parts(self) -> None:
        """See, before anything is made for them, that the part files of a new run have a place.

        Raises:
            UsageError: they have none; one sentence.
        """
        if self.run.output_parts is not None and self.resume is None:
            from qaic_ray.runs.shards.part_files import check_part_place

            check_part_place(self.run.output_parts, self.run.shard)

    def _before(self) -> Fingerprint | None:
        """What the input was when the run that is resumed began."""
        from qaic_ray.runs.journal import last_fingerprint

        if self.resume is None or self.new_input:
            return None
        before = last_fingerprint(self.resume)
        return None if before is None else before[INPUT]

    def to_yaml(self) -> str:
        """All of it that belongs to the run."""
        run = self.run.model_dump(mode="json", exclude={"variant", "output"})
        document = {"name": self.name, "model": self.model, "qpc": str(self.qpc), **run}
        return yaml.safe_dump(document, sort_keys=False, allow_unicode=True)


def resolved(run: RunOptions, resume: Path | None = None) -> RunOptions:
    """A run's options with all that is drawn, or read, when it begins.

    Args:
        run: the options as given.
        resume: the folder of a run that goes on: what it drew is kept.

    Raises:
        UsageError: for a chat template that cannot be read, or a folder that is no run's.
    """
    begun = None if resume is None else read_request(resume).run
    changes: dict[str, Any] = {}
    if run.seed is None:
        drawn = 0 if run.shard else secrets.randbits(32)  # shards of one whole have one seed
        changes["seed"] = drawn if begun is None else begun.seed
    if run.date is None:  # local time
        now = datetime.now().isoformat(timespec="seconds")
        changes["date"] = now if begun is None else begun.date
    if run.chat_template is not None and not is_template(run.chat_template):
        changes["chat_template"] = read_text(user_path(run.chat_template, "The chat template"))
    return run.model_copy(update=changes)


def with_typed_bound(run: RunOptions) -> RunOptions:
    """The options, with a bound for the answers to prompts that are typed, where none is said."""
    has_bound = run.generation_len is not None or run.sampling.max_tokens is not None
    if run.prompt is None or has_bound:
        return run
    return run.model_copy(update={"generation_len": TYPED_LEN})


def absolute_paths(section: Any, *names: str) -> dict[str, str]:
    """The paths of a section, those that are given, as they are understood in every folder."""
    given = {name: getattr(section, name) for name in names}
    return {
        name: str(user_path(path, "the path").absolute())
        for name, path in given.items()
        if path is not None
    }


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


def read_request(folder: Path) -> RunRequest:
    """The request of a run folder, to go on with it.

    Raises:
        UsageError: when the folder is not a run's.
    """
    path = folder / REQUEST_NAME
    if not path.exists():
        raise UsageError(f"{folder} is not the folder of a run: it has no {REQUEST_NAME}.")
    try:
        document = checked(dict[str, Any], read_yaml(path), str(path))
        known = document.keys() & {"name", "model", "qpc"}
        whole: dict[str, Any] = {name: document.pop(name) for name in known}
        whole["run"] = _todays(document)
        return replace(checked(RunRequest, whole, str(path)), resume=folder)
    except (UsageError, RowError) as error:
        raise UsageError(
            f"{path} cannot be gone on with: it was written by another version, or changed "
            f"({str(error)[:_MAX_REASON_CHARS].rstrip('.')})."
        ) from error


def resumed(folder: Path, asked: RunOptions) -> RunRequest:
    """The request of a run folder, with what may be said anew."""
    request = read_request(folder)
    anew = asked.model_fields_set & {"devices", "metrics"}
    request = request.with_run(**{name: getattr(asked, name) for name in anew})
    if "prompts" in asked.model_fields_set:
        request = request.with_run(prompt=None, prompts=asked.prompts)
        request = replace(request, new_input=True)
    return request


_OLDER = {"prompts_file": "prompts", "template_kwargs": "chat_template_kwargs"}


def _todays(kept: dict[str, Any]) -> dict[str, Any]:
    """A kept run's options, those of older versions under the names that they have now."""
    chat = checked(dict[str, Any], kept.pop("chat_options", None) or {}, "chat_options")
    flat = {**kept, **chat}
    return {_OLDER.get(name, name): value for name, value in flat.items() if value is not None}
