"""What every step needs: who listens, which SDK, which cards."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

from qaic_ray.compile.compiler import Variant
from qaic_ray.compile.store import Build
from qaic_ray.errors import DeviceError, QaicRayError, UsageError
from qaic_ray.options import EmulatorOptions
from qaic_ray.sdk import Sdk, find_sdk

if TYPE_CHECKING:
    from qaic_ray.rows import Row
    from qaic_ray.worker.worker import WorkerInfo


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


@dataclass(frozen=True)
class SdkChoice:
    """The SDK of this machine, and what the nodes of a cluster look for: each has its own.

    `name` is as the user gave it, `emulated` what the emulated one is to be where it is the one.
    """

    here: Sdk
    name: str
    emulated: EmulatorOptions


def choose_sdk(name: str, emulated: EmulatorOptions, listener: Listener) -> SdkChoice:
    """Find the SDK, lay the emulated one down where it is the one, and say which it is."""
    sdk = find_sdk(name, emulated)
    listener.sdk_chosen(sdk)
    return SdkChoice(sdk, name, emulated)


def choose_devices(sdk: Sdk, wanted: Literal["all"] | tuple[int, ...]) -> tuple[int, ...]:
    """The device ids to run on: those asked for, or every card that is ready.

    Raises:
        UsageError: for ids that are not there.
        DeviceError: where a card, or every card, is not ready.
    """
    known = {device.qid: device for device in sdk.devices()}
    if wanted == "all":
        ready = tuple(qid for qid, device in known.items() if device.ready)
        if not ready:
            raise DeviceError(f"No card is ready on this machine ({len(known)} found).")
        return ready
    for qid in wanted:
        if qid not in known:
            there = ", ".join(map(str, known)) or "none"
            raise UsageError(f"There is no device {qid}: the cards here are {there}.")
        if not known[qid].ready:
            raise DeviceError(f"Device {qid} is not ready: its status is {known[qid].status}.")
    return wanted


def check_cores(variants: Iterable[Variant], sdk: Sdk) -> None:
    """A program may not need more NSPs than the cards of this machine have.

    Raises:
        UsageError: naming both numbers.
    """
    try:
        devices = sdk.devices()
    except DeviceError:
        return  # a machine that only compiles needs no card and no driver
    most = max((device.nsp_total for device in devices), default=0)
    for variant in variants:
        if most and variant.num_cores > most:
            raise UsageError(
                f"The variant needs {variant.num_cores} NSPs, and the cards here have {most}: "
                f"compile with at most {most}."
            )
