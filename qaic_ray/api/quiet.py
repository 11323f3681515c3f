"""Who listens to a program's steps: its log, and nothing is printed."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from qaic_ray.errors import QaicRayError

if TYPE_CHECKING:
    from qaic_ray.compile.compiler import Variant
    from qaic_ray.compile.store import Build, BuildRequest
    from qaic_ray.rows import Row
    from qaic_ray.runs.run_view import RunFollower, RunView
    from qaic_ray.runs.token_streams import TokenDelta
    from qaic_ray.sdk import Sdk
    from qaic_ray.worker.worker import WorkerInfo

log = logging.getLogger("qaic_ray")
"""What is worth mending is a warning, all else is information: a program that sets up no logging
sees the former on stderr."""


class LogListener:
    """A listener of steps that writes to the log `qaic_ray`."""

    wants_tokens = False

    def sdk_chosen(self, sdk: Sdk) -> None:
        """Which SDK everything goes through."""
        log.info("the %s, in %s", sdk.label, sdk.root)

    def began(self, stage: str) -> None:
        """A stage begins."""
        log.info("%s begins", stage)

    def ended(self, stage: str) -> None:
        """The stage that began last is done."""
        log.info("%s", stage)

    def compiling(self, number: int) -> None:
        """So many variants are compiled from now on."""

    def building(self, request: BuildRequest) -> None:
        """The build of one of them begins."""
        log.info("compile %s begins", request.label)

    def compiled(self, variant: Variant, result: Build | QaicRayError) -> None:
        """One variant is there, or failed."""
        if isinstance(result, QaicRayError):
            log.warning("%s: %s", variant.name, result)
        else:
            log.info("%s %s", variant.name, "kept" if result.reused else "compiled")

    def card_ready(self, info: WorkerInfo) -> None:
        """A card has loaded its program."""
        log.info("%s is ready: %d slots, %d tokens", info.name, info.slots, info.ctx_len)

    def note(self, text: str) -> None:
        """Something that was decided, and how to have it otherwise."""
        log.info("%s", text)

    def remark(self, text: str) -> None:
        """Something that the user may want to mend."""
        log.warning("%s", text)

    def dashboard(self, ways_in: Sequence[str]) -> None:
        """Ray's dashboard is up."""
        log.info("Ray's dashboard: %s", "; ".join(ways_in))

    def run_folder(self, folder: Path) -> None:
        """Where everything is kept."""
        log.info("everything is kept in %s", folder)

    def running(self, watch: RunFollower) -> None:
        """A run goes on."""

    def going(self, view: RunView) -> None:
        """How the run is going."""

    def answered(self, row: Row) -> None:
        """The next row, in input order."""

    def saved(self, row: Row) -> None:
        """A row is in the journal."""

    def generated(self, deltas: Sequence[TokenDelta]) -> None:
        """What rows got."""
