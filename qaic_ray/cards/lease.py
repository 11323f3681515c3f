"""Cards in this process's hands: locked, ready, and with a QPC loaded. No Ray, no prompts."""

from __future__ import annotations

import time
from collections.abc import Iterable
from pathlib import Path

from qaic_ray.cards.inventory import card_scope
from qaic_ray.cards.locks import CardLocks, Part
from qaic_ray.engine.session import Session
from qaic_ray.errors import DeviceBusy, DeviceError
from qaic_ray.sdk import Sdk

LOCK_TIMEOUT_S = 20.0
"""How long a card may still be held by whoever had it before."""
COOL_DOWN_S = 5.0
"""What a card is left to settle after its process died, as in the vendor's own scheduler."""
READY_TIMEOUT_S = 30.0
"""How long it may then take to be ready, and to have its NSPs and DRAM back."""

_POLL_S = 0.2


class CardLease:
    """Holds cards from `open` until `release`, or until this process dies.

    Args:
        what: who this is, for others that want the cards.
        part: the part of the card that is wanted; None for whole cards.
        is_used: whether another process had them until now, and did not end well.
    """

    def __init__(self, what: str, *, part: Part | None = None, is_used: bool = False) -> None:
        self._what = what
        self._part = part
        self._is_used = is_used
        self._locks: CardLocks | None = None

    def open(self, sdk: Sdk, qpc: Path, device_ids: tuple[int, ...]) -> Session:
        """Lock the cards and load the QPC.

        Raises:
            DeviceBusy: for cards that somebody else holds; naming them, where that is known.
            DeviceError: for cards that are not ready, and from the runtime.
            UsageError: for a QPC that cannot be run.
        """
        scope = card_scope(sdk)
        self._locks = CardLocks(device_ids, part=self._part, scope=scope, what=self._what)
        self._locks.acquire(LOCK_TIMEOUT_S)
        try:
            if self._is_used:
                await_ready(sdk, device_ids)
            return self._load(sdk, qpc, device_ids)
        except BaseException:
            self.release()
            raise

    def release(self) -> None:
        """Give the cards back, after the session is closed; a second call does nothing."""
        locks, self._locks = self._locks, None
        if locks is not None:
            locks.release()

    def _load(self, sdk: Sdk, qpc: Path, device_ids: tuple[int, ...]) -> Session:
        deadline_s = time.monotonic() + (READY_TIMEOUT_S if self._is_used else 0.0)
        while True:
            try:
                return Session(sdk, qpc, device_ids)
            except DeviceBusy:
                if time.monotonic() >= deadline_s:
                    raise
            time.sleep(_POLL_S)


def await_ready(sdk: Sdk, device_ids: Iterable[int]) -> None:
    """Wait until cards that another process has just left take work again.

    Raises:
        DeviceError: for a card that is in error, is gone, or does not get ready in time.
    """
    if sdk.kind == "real":
        time.sleep(COOL_DOWN_S)
    deadline_s = time.monotonic() + READY_TIMEOUT_S
    while True:
        statuses = {device.qid: device.status for device in sdk.devices()}
        waiting = {qid: statuses.get(qid, "Absent") for qid in device_ids}
        waiting = {qid: status for qid, status in waiting.items() if status.lower() != "ready"}
        if not waiting:
            return
        hopeless = any(status.lower() != "initializing" for status in waiting.values())
        if hopeless or time.monotonic() >= deadline_s:
            named = ", ".join(f"{qid} is {status}" for qid, status in waiting.items())
            raise DeviceError(
                f"Not ready: card {named}; `qaic-util -q` says more, and `qaic-util -s` resets."
            )
        time.sleep(_POLL_S)
