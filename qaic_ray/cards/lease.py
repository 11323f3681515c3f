"""Cards in this process's hands: locked, ready, and with a QPC loaded.

Each card of a machine has a lock file, so that no card is opened twice. The kernel frees a lock
with the process that holds it, whatever signal that dies of. Parts of a card share its lock with
each other, and with nobody who wants the whole card.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import re
import time
from collections.abc import Iterable
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path

from qaic_ray.engine.session import Session
from qaic_ray.errors import DeviceBusy, DeviceError, UsageError
from qaic_ray.files.documents import checked, parse_json, shown
from qaic_ray.files.folders import CACHE_VARIABLE, cache_folder, open_lock
from qaic_ray.sdk import Sdk
from qaic_ray.timeouts import DEFAULT_TIMEOUTS, Timeouts, tries

LOCKS_VARIABLE = "QAIC_RAY_LOCKS"
# Not the user's temporary folder: all users of this machine have to look in the same place.
SHARED_FOLDER = Path("/tmp/qaic-ray-locks")

_MAX_HOLDER_BYTES = 4096
_MAX_WORDS = 80
_LOCK_NAME = re.compile(r"([0-9]{1,6})(\.[0-9]+-of-[0-9]+)?\.lock")


def locks_folder(shared_folder: Path = SHARED_FOLDER) -> Path:
    """The folder of the lock files.

    It is `QAIC_RAY_LOCKS`, or in the cache folder if `QAIC_RAY_CACHE` names one, or the folder that
    all users of the machine share.
    """
    chosen = os.environ.get(LOCKS_VARIABLE)
    if chosen:
        return Path(chosen).expanduser()
    return cache_folder() / "cards" if os.environ.get(CACHE_VARIABLE) else shared_folder


@dataclass(frozen=True)
class Part:
    """Part `number` (from 1) of the `count` equal parts of a card."""

    number: int
    count: int

    def __str__(self) -> str:
        return f"part {self.number}/{self.count}"


@dataclass(frozen=True)
class Holder:
    """The process that holds a card or a part of it; `since` is an ISO time of UTC.

    `started` is when the process began, in the kernel's ticks: a process id alone may be reused.
    """

    pid: int
    started: str
    since: str
    what: str

    @classmethod
    def here(cls, what: str) -> Holder:
        """This process, from now on."""
        since = datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
        return cls(os.getpid(), _started(os.getpid()), since, what)

    def __str__(self) -> str:
        what, since = self.what[:_MAX_WORDS], self.since[:_MAX_WORDS]
        words = f"process {self.pid} ({what}) holds it since {since}"
        return words if words.isprintable() else shown(words)

    @property
    def lives(self) -> bool:
        """Whether the process still runs."""
        return bool(self.started) and _started(self.pid) == self.started


class CardLocks:
    """Cards of this machine that this process holds, until `release` or until it ends.

    Args:
        device_ids: the cards.
        part: the part of each that is wanted; None for the whole card.
        scope: tells apart cards of the same id that are not the same card.
        what: the holder's name, for the message that others get.
        shared_folder: the one that all users share; it may not be a link.
    """

    def __init__(
        self,
        device_ids: Iterable[int],
        *,
        part: Part | None = None,
        scope: str = "",
        what: str = "a run",
        shared_folder: Path = SHARED_FOLDER,
    ) -> None:
        self._names = [f"{_prefix(scope)}{device_id}" for device_id in sorted(device_ids)]
        self._part = part
        self._what = what
        self._shared_folder = shared_folder
        self._held: list[int] = []
        self._deadline_s = self._poll_s = 0.0

    def acquire(
        self, timeout_s: float = 0.0, *, poll_s: float = DEFAULT_TIMEOUTS.lock_poll_s
    ) -> None:
        """Take all of them, or none; try every `poll_s` until `timeout_s` is over.

        Raises:
            DeviceBusy: naming who holds one of them after `timeout_s`.
            DeviceError: where the lock files cannot be written.
        """
        self._deadline_s, self._poll_s = time.monotonic() + timeout_s, poll_s
        folder = locks_folder(self._shared_folder)
        try:
            with ExitStack() as undo:
                undo.callback(self.release)
                _make_shared(folder, may_be_link=folder != self._shared_folder)
                for name in self._names:
                    self._take_card(folder, name)
                undo.pop_all()
        except OSError as error:
            raise DeviceError(
                f"The lock files of the cards cannot be written in {folder} ({error.strerror}): "
                f"let {LOCKS_VARIABLE} name a folder that all users of this machine can write to."
            ) from error

    def release(self) -> None:
        """Give them back; a second call does nothing."""
        for descriptor in reversed(self._held):
            with suppress(OSError):  # a file that names a process that has ended is ignored anyway
                os.ftruncate(descriptor, 0)
            os.close(descriptor)
        self._held.clear()

    def _take_card(self, folder: Path, name: str) -> None:
        card = folder / f"{name}.lock"
        if self._part is None:
            self._take(card, fcntl.LOCK_EX, f"{name}.*lock")
        else:
            own = folder / f"{name}.{self._part.number}-of-{self._part.count}.lock"
            self._take(card, fcntl.LOCK_SH, card.name)
            self._take(own, fcntl.LOCK_EX, own.name)
        text = json.dumps(asdict(Holder.here(self._what))).encode()
        os.pwrite(self._held[-1], text, 0)
        os.ftruncate(self._held[-1], len(text))

    def _take(self, path: Path, kind: int, signed: str) -> None:
        """Lock a file; the files that match `signed` name who else may hold it."""
        descriptor = open_lock(path, for_all=True)
        if descriptor is None:
            raise OSError(errno.EINVAL, f"{path.name} is no lock file: remove it", str(path))
        self._held.append(descriptor)
        for _ in tries(self._deadline_s - time.monotonic(), self._poll_s):
            with suppress(BlockingIOError):
                fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
                return
        self._held.remove(descriptor)  # what stays in it is the holder's
        os.close(descriptor)
        holders = _read(sorted(path.parent.glob(signed)))
        named = " and ".join(map(str, holders)) or "another process holds it"
        part = "" if self._part is None else f", {self._part}"
        raise DeviceBusy(
            f"Card {_device_id(path)}{part} is in use: {named}; wait for its end, or run on "
            "other cards."
        )


def open_session(
    sdk: Sdk,
    qpc: Path,
    device_ids: tuple[int, ...],
    *,
    what: str,
    part: Part | None,
    is_used: bool,
    timeouts: Timeouts,
) -> tuple[Session, ExitStack]:
    """Lock the cards and load the QPC; the stack, when it is closed, gives all of that back.

    Args:
        sdk: the cards'.
        qpc: the folder.
        device_ids: the cards.
        what: the holder's name, for others that want the cards.
        part: the part of the card that is wanted; None for whole cards.
        is_used: whether another process had them until now, and did not end well.
        timeouts: those of cards are used.

    Raises:
        DeviceBusy: for cards that somebody else holds; naming them, where that is known.
        DeviceError: for cards that are not ready, and from the runtime.
        UsageError: for a QPC that cannot be run.
    """
    with ExitStack() as held:
        locks = CardLocks(device_ids, part=part, scope=card_scope(sdk), what=what)
        locks.acquire(timeouts.lock_s, poll_s=timeouts.lock_poll_s)
        held.callback(locks.release)
        if is_used:
            await_ready(sdk, device_ids, timeouts)
        for is_last in tries(timeouts.ready_s if is_used else 0.0, timeouts.poll_s):
            try:
                session = Session(sdk, qpc, device_ids)
                break
            except DeviceBusy:
                if is_last:
                    raise
        held.callback(session.close)
        return session, held.pop_all()


def await_ready(sdk: Sdk, device_ids: Iterable[int], timeouts: Timeouts) -> None:
    """Wait until cards that another process has just left take work again.

    Args:
        sdk: theirs.
        device_ids: the cards.
        timeouts: `cool_down_s`, `ready_s` and `poll_s` are used.

    Raises:
        DeviceError: for a card that is in error, is gone, or does not get ready in time.
    """
    if sdk.kind == "real":
        time.sleep(timeouts.cool_down_s)
    for is_last in tries(timeouts.ready_s, timeouts.poll_s):
        statuses = {device.qid: device.status for device in sdk.devices()}
        waiting = {qid: statuses.get(qid, "Absent") for qid in device_ids}
        waiting = {qid: status for qid, status in waiting.items() if status.lower() != "ready"}
        if not waiting:
            return
        hopeless = any(status.lower() != "initializing" for status in waiting.values())
        if hopeless or is_last:
            named = ", ".join(f"{qid} is {status}" for qid, status in waiting.items())
            raise DeviceError(
                f"Not ready: card {named}; `qaic-util -q` says more, and `qaic-util -s` resets."
            )


def card_scope(sdk: Sdk) -> str:
    """The `scope` for `CardLocks`: it tells apart cards of one machine that have the same id.

    Real cards belong to the machine, emulated ones to an SDK folder and a user.
    """
    if sdk.kind == "real":
        return ""
    digest = hashlib.sha256(f"{os.getuid()} {sdk.root}".encode()).hexdigest()
    return f"emulated-{digest[:12]}"


def held_cards(scope: str = "") -> dict[int, list[Holder]]:
    """The cards of this machine that are held, whole or in parts, with their holders."""
    folder = locks_folder()
    found: dict[int, list[Holder]] = {}
    for path in sorted(folder.glob(f"{_prefix(scope)}*.lock")):
        if name := _LOCK_NAME.fullmatch(path.name.removeprefix(_prefix(scope))):
            found.setdefault(int(name[1]), []).extend(_read([path]))
    return {device_id: some for device_id, some in found.items() if some}


def _prefix(scope: str) -> str:
    # A folder that several machines see (a home on a server) holds the cards of each.
    return f"{os.uname().nodename}{f'-{scope}' if scope else ''}-card-"


def _device_id(path: Path) -> int:
    return int(path.name.rpartition("-card-")[2].split(".")[0])


def _read(paths: Iterable[Path]) -> list[Holder]:
    found = []
    for path in paths:
        # Any user may write there: read a regular file only, only its start, only a valid holder.
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError:
            continue  # gone, or no file
        try:
            text = os.pread(descriptor, _MAX_HOLDER_BYTES, 0).decode(errors="replace")
            holder = checked(Holder, parse_json(text, str(path)), str(path))
        except (OSError, UsageError):
            continue  # it names no holder, or is being written
        finally:
            os.close(descriptor)
        if holder.lives:
            found.append(holder)
    return found


def _started(pid: int) -> str:
    """When a process began, in the kernel's ticks; empty for one that has ended."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    return status.rpartition(")")[2].split()[19]


def _make_shared(folder: Path, *, may_be_link: bool) -> None:
    # Any user can create the shared folder, and could make it a link to a folder of ours.
    if folder.is_symlink() and not may_be_link:
        raise NotADirectoryError(errno.ENOTDIR, "it is a link", str(folder))
    if folder.is_dir():
        return
    folder.mkdir(parents=True, exist_ok=True)
    with suppress(PermissionError):  # another user was quicker
        folder.chmod(0o1777)
