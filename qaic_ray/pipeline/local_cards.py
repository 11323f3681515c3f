"""Which cards of this machine a run opens: those asked for, or no more than its prompts fill."""

from __future__ import annotations

import math
from contextlib import suppress
from pathlib import Path

from qaic_ray.compile.store import SPECIALIZATIONS_FILE
from qaic_ray.contract import Specializations
from qaic_ray.errors import DeviceError, UsageError
from qaic_ray.pipeline.request import Listener, RunRequest, SdkChoice
from qaic_ray.worker.survey import count_sequences


def on_local_cards(
    request: RunRequest, sdk: SdkChoice, slots: int | None, listener: Listener
) -> tuple[RunRequest, int]:
    """The request on cards of this machine, and how many; 0 for a cluster's.

    They are those asked for, or as many of those that are ready as the prompts fill.

    Args:
        request: what is run.
        sdk: whose cards.
        slots: prompts that a worker answers side by side; None where nobody knows.
        listener: told of cards that are left alone.

    Raises:
        UsageError: for ids that are not there.
        DeviceError: where a card, or every card, is not ready.
    """
    if request.ray.address is not None:
        return request, 0
    known = {device.qid: device for device in sdk.devices}
    wanted = request.run.devices
    if wanted == "all":
        ready = tuple(qid for qid, device in known.items() if device.ready)
        if not ready:
            raise DeviceError(f"No card is ready on this machine ({len(known)} found).")
        wanted = _as_many_as_needed(ready, request, slots)
        if len(wanted) < len(ready):
            are = "is" if len(wanted) == 1 else "are"
            listener.note(
                f"{len(wanted)} of {len(ready)} cards {are} enough for these prompts; --device-id "
                "opens others"
            )
    check_named(wanted, sdk)
    return request.with_run(devices=wanted), len(wanted)


def check_named(wanted: tuple[int, ...], sdk: SdkChoice) -> None:
    """Refuse cards of this machine that a run names and cannot have.

    Raises:
        UsageError: for ids that are not there.
        DeviceError: where a card is not ready.
    """
    known = {device.qid: device for device in sdk.devices}
    for qid in wanted:
        if qid not in known:
            there = ", ".join(map(str, known)) or "none"
            raise UsageError(f"There is no device {qid}: the cards here are {there}.")
        if not known[qid].ready:
            raise DeviceError(f"Device {qid} is not ready: its status is {known[qid].status}.")


def slots_of(qpc: Path) -> int | None:
    """Prompts that a QPC answers side by side; None where its folder does not say."""
    with suppress(UsageError):
        return Specializations.load(qpc / SPECIALIZATIONS_FILE).batch_size
    return None


def _as_many_as_needed(
    ready: tuple[int, ...], request: RunRequest, slots: int | None
) -> tuple[int, ...]:
    """The first of the cards, no more than have a slot for each answer that is wanted."""
    run = request.run
    if slots is None or request.resume is not None:
        return ready  # how many rows are left is not known yet
    per_card = slots * run.partitions / run.group_size
    number = count_sequences(run, math.floor(len(ready) * per_card))
    if number is None:
        return ready
    num_workers = max(1, math.ceil(number / slots))
    return ready[: math.ceil(num_workers / run.partitions) * run.group_size]
