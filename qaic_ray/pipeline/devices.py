"""Which SDK, which cards: chosen, and checked against what is asked of them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from qaic_ray.compile.variant import Variant
from qaic_ray.errors import DeviceError, UsageError
from qaic_ray.options import EmulatorOptions
from qaic_ray.pipeline.listener import Listener
from qaic_ray.sdk import Sdk, find_sdk


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
