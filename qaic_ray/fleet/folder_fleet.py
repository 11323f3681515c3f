"""A QPC on some cards for prompts that come at any time: an open fleet on Ray."""

from __future__ import annotations

import shutil
import weakref
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from qaic_ray.compile.store import check_kept
from qaic_ray.dispatch.policy import DEFAULT_POLICY, text_work
from qaic_ray.errors import QaicRayError, UsageError
from qaic_ray.files.documents import differences, user_path
from qaic_ray.fleet.kept_rows import KeptRows
from qaic_ray.fleet.open_fleet import OpenFleet
from qaic_ray.pipeline.local_cards import on_local_cards, slots_of
from qaic_ray.pipeline.request import (
    REQUEST_NAME,
    Listener,
    RunRequest,
    SdkChoice,
    resolved,
    write_request,
)
from qaic_ray.pipeline.run_step import (
    LOGS_FOLDER,
    check_chat_template,
    content_parts,
    recorder_of,
    worker_specs,
)
from qaic_ray.runs.driver import Audience
from qaic_ray.runs.history import RunHistory
from qaic_ray.runs.intake import OPEN_SOURCE, fingerprint
from qaic_ray.runs.journal import JOURNAL_NAME, Journal, is_held, last_fingerprint, safe_rows
from qaic_ray.runs.metering import metered

if TYPE_CHECKING:
    from qaic_ray.runs.open_input import OpenInput
    from qaic_ray.runs.result import FleetResult

SHARDS_BESIDE = 8
"""A prompt that comes alone is a shard of its own: a worker may have two for each of its slots, of
which one waits until it has its slot again, and so many beside them, queued or left with a last
row."""


class FolderFleet:
    """An open fleet, and what it keeps in a folder.

    Attributes:
        fleet: takes prompts, once this is made; its cards open meanwhile.
        request: with what was drawn, or read from the folder.
        num_kept: answers that the folder had when it was opened.

    Args:
        request: what prompts are answered with and how, but for prompts.
        sdk: of this machine.
        listener: who is told.
        folder: keeps every answer, and what was drawn; made where it is not there.
        max_open: see `OpenFleet`.
        kept_slots: slots of each card that prompts with `background` leave to the others, of all
            but one.

    Raises:
        UsageError: for a QPC, cards or a model that do not fit, or a folder of something else.
        DeviceError: where no card is ready.
    """

    def __init__(
        self,
        request: RunRequest,
        sdk: SdkChoice,
        listener: Listener,
        *,
        folder: Path | None = None,
        max_open: int | None = None,
        kept_slots: int = 0,
    ) -> None:
        is_guest = _joins_a_programs_own_ray()
        check_kept(request.qpc)
        if request.run.draft_qpc is not None:
            check_kept(Path(request.run.draft_qpc))
        self._folder = None if folder is None else user_path(folder, "The folder").absolute()
        has_begun = self._folder is not None and (self._folder / REQUEST_NAME).exists()
        run = resolved(request.run, self._folder if has_begun else None)
        self._given = replace(request, run=run)
        self.request, self._num_cards = on_local_cards(self._given, sdk, None, listener)
        check_chat_template(self.request)
        self._sdk, self._listener = sdk, listener
        self._kept_slots = kept_slots
        self._journal: Journal | None = None
        self._history: RunHistory | None = None
        kept = None
        with ExitStack() as undo:
            if self._folder is not None:
                kept = self._open_folder(self._folder, undo)
            self.num_kept = 0 if kept is None else len(kept)
            self._held = undo.pop_all()
        audience = Audience(on_worker_ready=listener.card_ready, on_wait=listener.remark)
        self.fleet = OpenFleet(self._drive, kept=kept, max_open=max_open, audience=audience)
        if not is_guest:
            _hosts.add(self.fleet)

    def close(self, *, drain: bool = True) -> None:
        """End the fleet, and give the folder back; see `OpenFleet.close`."""
        try:
            self.fleet.close(drain=drain)
        finally:
            self._held.close()

    def _open_folder(self, folder: Path, undo: ExitStack) -> KeptRows:
        """Hold the folder for this process; the answers that it has."""
        try:
            (folder / LOGS_FOLDER).mkdir(mode=0o700, parents=True, exist_ok=True)
            folder.chmod(0o700)  # prompts and answers are their user's
        except OSError as error:
            raise UsageError(f"{folder} cannot be used ({error.strerror}).") from error
        if not is_held(folder) and not safe_rows(folder):
            # Nothing was answered: it is not bound to what it was begun with.
            if (folder / JOURNAL_NAME).exists():
                shutil.rmtree(folder / JOURNAL_NAME)
            (folder / REQUEST_NAME).unlink(missing_ok=True)
        parts = content_parts(self._given, self._sdk.here)
        same = fingerprint(OPEN_SOURCE, generation=self._given.generation, **parts)
        before = last_fingerprint(folder)
        if before is not None and (named := differences(before, same)):
            raise UsageError(
                f"The answers in {folder} are not of this program: {', '.join(named)}. Give the "
                "arguments that it was begun with, or another folder."
            )
        self._journal = undo.enter_context(Journal(folder, same))
        if not (folder / REQUEST_NAME).exists():
            try:
                write_request(self._given, folder)
            except OSError as error:
                raise QaicRayError(f"Cannot write to {folder}: {error.strerror}.") from error
        self._history = undo.enter_context(RunHistory(folder, self._listener.remark))
        self._listener.run_folder(folder)
        return KeptRows(self._journal)

    def _drive(self, prompts: OpenInput, audience: Audience) -> FleetResult:
        """Answer prompts on a Ray that is started, or joined, for it; in the fleet's thread.

        What Ray's end interrupts is this thread alone.
        """
        from qaic_ray.pipeline.open_ray import open_ray
        from qaic_ray.worker.worker import CardWorker

        request, sdk, listener = self.request, self._sdk, self._listener
        slots = slots_of(request.qpc) or 1
        policy = replace(
            DEFAULT_POLICY,
            max_shards=max(DEFAULT_POLICY.max_shards, 2 * slots + SHARDS_BESIDE),
            kept_slots=self._kept_slots,
            block_tokens=DEFAULT_POLICY.block_tokens if request.run.prefix_reuse else 0,
        )
        with (
            open_ray(
                request.ray, self._num_cards, name=request.name, sdk=sdk.here, listener=listener
            ) as cluster,
            recorder_of(request, request.name, listener.remark) as recorder,
        ):
            if self._folder is not None:
                cluster.write_logs_to(self._folder / LOGS_FOLDER, listener.remark)
            result = cluster.run_prompts(
                prompts,
                [
                    replace(spec, kept_slots=self._kept_slots)
                    for spec in worker_specs(cluster, request, sdk, listener)
                ],
                worker_class=CardWorker,
                audience=metered(self._recorded(audience), recorder),
                journal=self._journal,
                work_of=partial(text_work, defaults=request.run.defaults),
                policy=policy,
            )
        if self._history is not None:
            self._history.ended(result)
        return result

    def _recorded(self, audience: Audience) -> Audience:
        history = self._history
        if history is None:
            return audience
        return replace(
            audience,
            on_event=_both(audience.on_event, history.happened),
            on_worker_ready=_both(audience.on_worker_ready, history.worker_ready),
        )


_hosts: weakref.WeakSet[OpenFleet] = weakref.WeakSet()
"""Fleets that started, or joined, the Ray of this process, and leave it when they are closed."""


def _joins_a_programs_own_ray() -> bool:
    """Whether the program has joined a Ray itself, which any number of fleets may use.

    Raises:
        UsageError: a fleet has, which takes it along when it is closed.
    """
    from qaic_ray.cluster.cluster import is_joined

    if any(not fleet.is_closed for fleet in _hosts):
        raise UsageError(
            "Another LLM of this program is open, and the Ray is its own: close that first, or "
            "call ray.init(address=...) before both, on a Ray that has the cards."
        )
    return is_joined()


def _both(first: Callable[..., None], second: Callable[..., None]) -> Callable[..., None]:
    def call(value: object) -> None:
        first(value)
        second(value)

    return call
