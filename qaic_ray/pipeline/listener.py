"""What the user is told while a job runs, and the outcome of one compile."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from qaic_ray.compile.store import Build
from qaic_ray.compile.variant import Variant
from qaic_ray.errors import QaicRayError
from qaic_ray.sdk import Sdk

if TYPE_CHECKING:
    from qaic_ray.rows import Row
    from qaic_ray.worker.spec import WorkerInfo


@dataclass(frozen=True)
class CompileOutcome:
    """What came of one variant: a build, or the error in its place."""

    variant: Variant
    result: Build | QaicRayError

    @property
    def ok(self) -> bool:
        """Whether there is a QPC."""
        return isinstance(self.result, Build)


class Listener(Protocol):
    """Hears what happens; every method returns at once."""

    def sdk_chosen(self, sdk: Sdk) -> None:
        """Which SDK everything goes through."""

    def began(self, stage: str) -> None:
        """A stage begins."""

    def ended(self, stage: str) -> None:
        """The stage that began last is done; the text says what came of it."""

    def compiled(self, outcome: CompileOutcome) -> None:
        """One variant is there, or failed."""

    def card_ready(self, info: WorkerInfo) -> None:
        """A card has loaded its program."""

    def remark(self, text: str) -> None:
        """Something that the user may want to mend."""

    def run_folder(self, folder: Path) -> None:
        """Where the run that begins, or goes on, keeps everything."""

    def answered(self, row: Row) -> None:
        """The next row, in input order."""
