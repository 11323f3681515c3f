"""Which SDK, which cards: chosen, and checked against what is asked of them."""

from __future__ import annotations

from collections.abc import Iterable

from qaic_ray.compile.variant import Variant
from qaic_ray.config import EmulatorPart
from qaic_ray.errors import DeviceError, UsageError
from qaic_ray.pipeline.listener import Listener
from qaic_ray.sdk import EmulatedCards, Sdk, find_sdk


def emulated_cards(part: EmulatorPart) -> EmulatedCards:
    """The job's emulator part as the SDK floor takes it."""
    return EmulatedCards(cards=part.cards, sku=part.sku, apps_version=part.apps_version)


def choose_sdk(name: str, part: EmulatorPart, listener: Listener) -> Sdk:
    """Find the SDK, lay the emulated one down where it is the one, and say which it is."""
    sdk = find_sdk(name, emulated_cards(part))
    listener.sdk_chosen(sdk)
    return sdk


def choose_devices(sdk: Sdk, wanted: tuple[int, ...] | None) -> tuple[int, ...]:
    """The device ids to run on: those asked for, or every card that is ready.

    Raises:
        UsageError: for ids that are not there, or given twice.
        DeviceError: where a card, or every card, is not ready.
    """
    known = {device.qid: device for device in sdk.devices()}
    if wanted is None:
        ready = tuple(qid for qid, device in known.items() if device.ready)
        if not ready:
            raise DeviceError(f"No card is ready on this machine ({len(known)} found).")
        return ready
    for qid in wanted:
        if wanted.count(qid) > 1:
            raise UsageError(f"device {qid} is given twice.")
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
