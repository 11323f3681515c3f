"""What a run is asked to do, and how that is kept in its folder, so that it can go on."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from qaic_ray.documents import checked, read_yaml
from qaic_ray.errors import RowError, UsageError
from qaic_ray.sampling_params import SamplingParams

if TYPE_CHECKING:
    from qaic_ray.fleet.fingerprint import Fingerprint
    from qaic_ray.rows import Prompt, Row

REQUEST_NAME = "request.yaml"
STDIN = "-"
_MAX_REASON_CHARS = 500

# Of this process, not of the run.
_NOT_KEPT = ("output", "ray_address", "job_text", "resume", "retry_errors")
_PATHS = ("qpc", "draft_qpc")


def drawn_seed() -> int:
    """A run's seed, where none is given."""
    return secrets.randbits(32)


@dataclass(frozen=True)
class RunRequest:
    """Prompts for one QPC on some cards; `devices` None means all that there are.

    `sampling` and `generation_len` (its `max_tokens`) are for rows that say nothing else; `seed` is
    what rows without a seed get theirs from. `drafts` and `draft_qpc` are those of `Speculation`.
    `input_len` and `ctx_len`, where given, must be what the QPC was compiled for. A card is shared
    out to `partitions` workers, or `group_size` cards make one. `job_text` is the job that this is
    a part of, for the run folder's job.yaml; without one the request itself. `resume` is the folder
    of a run that is to go on, there with its rows of errors again where `retry_errors`.
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
        from qaic_ray.fleet.prompts import PromptFormat, prompts_from_file, prompts_from_text

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
            form = None if self.prompts_format is None else PromptFormat(self.prompts_format)
            return prompts_from_file(self.prompts_file, form, sampling=defaults)
        raise UsageError('There is nothing to answer: give --prompt "a|b" or --prompts-file FILE.')

    def source(self) -> Fingerprint:
        """The fingerprint of the input; a file is read through for it."""
        from qaic_ray.fleet.fingerprint import STREAM_SOURCE, file_source, text_source

        if self.prompt is not None:
            return text_source(self.prompt)
        path = self.prompts_file or STDIN
        # A pipe can be read only once.
        return file_source(Path(path)) if os.path.isfile(path) else STREAM_SOURCE

    def to_yaml(self) -> str:
        """All of it that belongs to the run."""
        document: dict[str, Any] = {
            f.name: getattr(self, f.name) for f in fields(self) if f.name not in _NOT_KEPT
        }
        document |= {
            name: None if document[name] is None else str(document[name]) for name in _PATHS
        }
        document["devices"] = None if self.devices is None else list(self.devices)
        document["output_formats"] = list(self.output_formats)
        sampling = {
            k: list(v) if isinstance(v, tuple) else v for k, v in vars(self.sampling).items()
        }
        del sampling["max_tokens"]
        document["sampling"] = sampling
        return yaml.safe_dump(document, sort_keys=False, allow_unicode=True)


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
