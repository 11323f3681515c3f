"""Who holds which card of this machine: a lock file for each, so that none is opened twice.

The kernel drops a lock with the process that holds it, by whatever signal it dies. Parts of a card
share it with each other and with nobody who wants it whole. Knows nothing of Ray or of SDKs.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import stat
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path

from qaic_ray.documents import checked, parse_json, shown
from qaic_ray.errors import DeviceBusy, DeviceError, UsageError
from qaic_ray.folders import CACHE_VARIABLE, cache_folder

LOCKS_VARIABLE = "QAIC_RAY_LOCKS"
# Not the user's temporary folder: whoever works on this machine has to look in the same place.
SHARED_FOLDER = Path("/tmp/qaic-ray-locks")

_POLL_S = 0.1
_MAX_HOLDER_BYTES = 4096
_MAX_WORDS = 80
_LOCK_NAME = re.compile(r"[0-9]{1,6}(\.[0-9]+-of-[0-9]+)?\.lock")


def locks_folder() -> Path:
    """Where the lock files are.

    `QAIC_RAY_LOCKS`; else in the cache folder, where one was chosen by `QAIC_RAY_CACHE`; else a
    folder that all users of the machine share.
    """
    chosen = os.environ.get(LOCKS_VARIABLE)
    if chosen:
        return Path(chosen).expanduser()
    return cache_folder() / "cards" if os.environ.get(CACHE_VARIABLE) else SHARED_FOLDER


@dataclass(frozen=True)
class Part:
    """Part `number` (from 1) of the `count` equal parts of a card."""

    number: int
    count: int

    def __str__(self) -> str:
        return f"part {self.number}/{self.count}"


@dataclass(frozen=True)
class Holder:
    """Who holds a card, or a part of it; `since` is an ISO time of UTC.

    `started` is the kernel's word for when the process began: a process id alone is used again.
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
        """Whether the process is still there."""
        return bool(self.started) and _started(self.pid) == self.started


class CardLocks:
    """Cards of this machine that this process holds, until `release` or until it dies.

    Args:
        device_ids: the cards.
        part: the part of each that is wanted; None for the whole card.
        scope: tells apart cards of the same id that are not the same card.
        what: who this is, for the message that others get.
    """

    def __init__(
        self,
        device_ids: Iterable[int],
        *,
        part: Part | None = None,
        scope: str = "",
        what: str = "a run",
    ) -> None:
        self._names = [_name(device_id, scope) for device_id in sorted(device_ids)]
        self._part = part
        self._what = what
        self._held: list[int] = []

    def acquire(self, timeout_s: float = 0.0) -> None:
        """Take all of them, or none.

        Raises:
            DeviceBusy: naming who holds one of them after `timeout_s`.
            DeviceError: where the lock files cannot be written.
        """
        deadline_s = time.monotonic() + timeout_s
        folder = locks_folder()
        try:
            _make_shared(folder)
            for name in self._names:
                self._take_card(folder, name, deadline_s)
        except OSError as error:
            self.release()
            raise DeviceError(
                f"The lock files of the cards cannot be written in {folder} ({error.strerror}): "
                f"let {LOCKS_VARIABLE} name a folder that all users of this machine can write to."
            ) from error
        except DeviceBusy:
            self.release()
            raise

    def release(self) -> None:
        """Give them back; a second call does nothing."""
        for descriptor in reversed(self._held):
            with suppress(OSError):  # what a file says of a holder that is gone is never believed
                os.ftruncate(descriptor, 0)
            os.close(descriptor)
        self._held.clear()

    def _take_card(self, folder: Path, name: str, deadline_s: float) -> None:
        card = folder / f"{name}.lock"
        if self._part is None:
            self._take(card, fcntl.LOCK_EX, deadline_s, lambda: holders(folder, name))
            self._sign()
            return
        own = folder / f"{name}.{self._part.number}-of-{self._part.count}.lock"
        self._take(card, fcntl.LOCK_SH, deadline_s, lambda: _read([card]))
        self._take(own, fcntl.LOCK_EX, deadline_s, lambda: _read([own]))
        self._sign()

    def _take(
        self, path: Path, kind: int, deadline_s: float, who: Callable[[], Sequence[Holder]]
    ) -> None:
        descriptor = _open_shared(path)
        self._held.append(descriptor)
        while True:
            try:
                fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                if time.monotonic() >= deadline_s:
                    break
                time.sleep(_POLL_S)
        self._held.remove(descriptor)  # what stays in it is the holder's
        os.close(descriptor)
        named = " and ".join(map(str, who())) or "another process holds it"
        part = "" if self._part is None else f", {self._part}"
        raise DeviceBusy(
            f"Card {_device_id(path)}{part} is in use: {named}; wait for its end, or run on "
            "other cards."
        )

    def _sign(self) -> None:
        text = json.dumps(asdict(Holder.here(self._what))).encode()
        os.pwrite(self._held[-1], text, 0)
        os.ftruncate(self._held[-1], len(text))


def holders(folder: Path, name: str) -> list[Holder]:
    """Who holds a card or parts of it, by what the living of them have written."""
    return _read(sorted(folder.glob(f"{name}.*lock")))


def held_cards(scope: str = "") -> dict[int, list[Holder]]:
    """The cards of this machine that somebody holds, whole or in parts."""
    folder = locks_folder()
    found: dict[int, list[Holder]] = {}
    for path in sorted(folder.glob(f"{_prefix(scope)}*.lock")):
        if not _LOCK_NAME.fullmatch(path.name.removeprefix(_prefix(scope))):
            continue
        found.setdefault(_device_id(path), []).extend(_read([path]))
    return {device_id: some for device_id, some in found.items() if some}


def _prefix(scope: str) -> str:
    # A folder that several machines see (a home on a server) holds the cards of each.
    return f"{os.uname().nodename}{f'-{scope}' if scope else ''}-card-"


def _name(device_id: int, scope: str) -> str:
    return f"{_prefix(scope)}{device_id}"


def _device_id(path: Path) -> int:
    return int(path.name.rpartition("-card-")[2].split(".")[0])


def _read(paths: Iterable[Path]) -> list[Holder]:
    found = []
    for path in paths:
        # Anybody may write there: only a file, only its begin, and only what is a holder.
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError:
            continue  # gone, or no file
        try:
            text = os.pread(descriptor, _MAX_HOLDER_BYTES, 0).decode(errors="replace")
            holder = checked(Holder, parse_json(text, str(path)), str(path))
        except (OSError, UsageError):
            continue  # of nobody, or being written just now
        finally:
            os.close(descriptor)
        if holder.lives:
            found.append(holder)
    return found


def _started(pid: int) -> str:
    """When a process began, in the kernel's ticks; nothing for one that is gone."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    return status.rpartition(")")[2].split()[19]


def _make_shared(folder: Path) -> None:
    # Anybody may make that one, and lead it into a folder of ours.
    if folder == SHARED_FOLDER and folder.is_symlink():
        raise NotADirectoryError(errno.ENOTDIR, "it is a link", str(folder))
    if folder.is_dir():
        return
    folder.mkdir(parents=True, exist_ok=True)
    with suppress(PermissionError):  # another user was quicker
        folder.chmod(0o1777)


def _open_shared(path: Path) -> int:
    """Open a lock file that every user may open; the kernel lets nobody create what is there."""
    flags = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
    try:
        descriptor = os.open(path, flags)
    except FileNotFoundError:
        try:
            descriptor = os.open(path, flags | os.O_CREAT | os.O_EXCL, 0o666)
            os.fchmod(descriptor, 0o666)  # past the umask
        except FileExistsError:
            descriptor = os.open(path, flags)
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode) or status.st_nlink > 1:
        os.close(descriptor)
        raise OSError(errno.EINVAL, f"{path.name} is no lock file: remove it", str(path))
    return descriptor
