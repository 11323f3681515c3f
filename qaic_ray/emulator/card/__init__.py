"""The cards of this machine: NSPs, DRAM and virtual channels, counted across all processes.

A claim is what a process holds of the cards: a file in the state folder that the process keeps
locked. The kernel drops that lock when the process dies, by whatever signal, so what it held is
free at the next look, with no guess about process ids. All counting happens under one lock of the
machine.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import weakref
from pathlib import Path
from typing import Any, Dict, Iterator, List, Mapping, NamedTuple, Optional, Tuple

from .. import folder
from . import faults
from .sku import FIRST_DERIVED_QID, NUM_VCS, SKUS, Sku, Telemetry, telemetry

READY = 1
ERROR = 2
"""`QDevStatus` of a card."""


class NoDevice(LookupError):
    """There is no card with this QID."""


class Exhausted(RuntimeError):
    """A card has too little left of `resource` ("nsp", "dram" or "vc")."""

    def __init__(self, qid: int, resource: str) -> None:
        super().__init__(f"device {qid} has not enough {resource}")
        self.qid = qid
        self.resource = resource


class Demand(NamedTuple):
    """What a program takes of one card."""

    num_nsps: int = 0
    dram_bytes: int = 0
    num_vcs: int = 0


class Card(NamedTuple):
    """One device at one moment; `parent` is the physical card that a derived device lives on.

    `num_board_nsps` are the NSPs that are held on all SoCs of its board.
    """

    qid: int
    sku: Sku
    total: Demand
    free: Demand
    num_loaded: int
    num_active: int
    status: int
    parent: Optional[int] = None
    num_board_nsps: int = 0

    @property
    def num_busy_nsps(self) -> int:
        """NSPs that programs or derived devices hold."""
        return self.total.num_nsps - self.free.num_nsps

    def telemetry(self, now_s: float) -> Telemetry:
        """Simulated sensor readings at `now_s` seconds of the clock."""
        qid = self.qid if self.parent is None else self.parent
        board = self.num_board_nsps
        return telemetry(self.sku, qid, self.num_busy_nsps, now_s, num_board_nsps=board)


class Claim:
    """Resources held by this process until `release`, or until it dies."""

    def __init__(self, machine: Machine, path: Path, descriptor: int) -> None:
        self._machine = machine
        self._path = path
        self._descriptor = descriptor
        self._finalizer = weakref.finalize(self, _discard, path, descriptor)
        _open_claims.add(self)

    @property
    def held(self) -> bool:
        """Whether this process still holds the claim; not once it ends, in whichever order."""
        return self._finalizer.alive

    def change(self, demands: Mapping[int, Demand]) -> None:
        """Hold `demands` (by QID) instead of what is held now, all or nothing."""
        if not self.held:
            raise RuntimeError("this claim was released")
        self._machine.change(self._path, self._descriptor, demands)

    def release(self) -> None:
        """Give everything back; a second call does nothing."""
        self._finalizer()

    def disown(self) -> None:
        """Forget the claim in a forked child: it stays the parent's."""
        if self._finalizer.detach() is not None:
            os.close(self._descriptor)


def _discard(path: Path, descriptor: int) -> None:
    # Unlinked before the lock goes, so that no one else can take this file for a living claim.
    with contextlib.suppress(FileNotFoundError):
        path.unlink()
    os.close(descriptor)


_open_claims: weakref.WeakSet[Claim] = weakref.WeakSet()


def _disown_claims() -> None:
    for claim in list(_open_claims):
        claim.disown()


# A child shares its parent's locks: left open, they would outlive the parent.
os.register_at_fork(after_in_child=_disown_claims)


class Machine:
    """All cards of one emulated SDK on this machine."""

    def __init__(self, sdk: folder.Folder) -> None:
        self.folder = sdk
        self.sku = SKUS[sdk.sku]
        self.state = sdk.state_dir()
        self.faults = faults.from_environment(self.state)
        self._claims = self.state / "claims"
        self._claims.mkdir(mode=0o700, exist_ok=True)
        self._failed = str(self.state / "failed.json")
        self._serial = 0

    @classmethod
    def here(cls) -> Machine:
        """The machine of the SDK folder that this process belongs to."""
        return cls(folder.current())

    @property
    def physical_qids(self) -> List[int]:
        """QIDs of the SoCs that are there: one a card, four on an Ultra board."""
        qids = range(self.folder.num_cards * self.sku.num_socs)
        return [qid for qid in qids if not self.faults.is_absent(qid)]

    def cards(self) -> List[Card]:
        """Every device as it is now, physical ones first."""
        with self._locked():
            return list(self._count(self._living()).values())

    def card(self, qid: int) -> Card:
        """Device `qid` as it is now; `NoDevice` when there is none."""
        for card in self.cards():
            if card.qid == qid:
                return card
        raise NoDevice(qid)

    def claim(self, demands: Mapping[int, Demand]) -> Claim:
        """Hold `demands` (by QID), all or nothing: `Exhausted` or `NoDevice` when refused."""
        with self._locked():
            self._check(demands, self._living())
            return self._write_claim({"takes": _as_json(demands)})

    def reserve(self, parent: int, demand: Demand) -> Tuple[int, Claim]:
        """Make a derived device of part of card `parent`; it lives as long as the claim."""
        with self._locked():
            living = self._living()
            self._check({parent: demand}, living)
            known = {entry.get("derived") for entry in living.values()}
            # Programs of a derived device that is gone still name it: its QID is not given again.
            known.update(int(qid) for entry in living.values() for qid in entry["takes"])
            qid = next(q for q in range(FIRST_DERIVED_QID, 1 << 16) if q not in known)
            return qid, self._write_claim({"takes": _as_json({parent: demand}), "derived": qid})

    def change(self, path: Path, descriptor: int, demands: Mapping[int, Demand]) -> None:
        """Rewrite a living claim; only `Claim.change` calls this."""
        with self._locked():
            living = self._living()
            entry = living.pop(path)
            self._check(demands, living)
            _write_entry(descriptor, {**entry, "takes": _as_json(demands)})

    def set_status(self, qid: int, status: int) -> None:
        """Put a physical card into `READY` or `ERROR`, for all processes."""
        with self._locked():
            statuses = {**self._statuses(), qid: status}
            failed = sorted(q for q, value in statuses.items() if value != READY)
            temporary = self._failed + ".new"
            with open(temporary, "w", encoding="utf-8") as file:
                json.dump(failed, file)
            os.replace(temporary, self._failed)

    def is_ready(self, qid: int) -> bool:
        """Whether card `qid` takes work; for a physical card, cheap enough to ask every time."""
        if qid < FIRST_DERIVED_QID:
            return qid not in self._statuses()
        return any(card.qid == qid and card.status == READY for card in self.cards())

    def _statuses(self) -> Dict[int, int]:
        if not os.path.exists(self._failed):
            return {}
        with open(self._failed, encoding="utf-8") as file:
            return dict.fromkeys(json.load(file), ERROR)

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        descriptor = os.open(self.state / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            # Unlocked by name: a child forked meanwhile shares the lock and would keep it.
            fcntl.flock(descriptor, fcntl.LOCK_UN)
            os.close(descriptor)

    def _living(self) -> Dict[Path, Dict[str, Any]]:
        """Claims whose process is alive; those of the dead are removed."""
        living = {}
        for name in os.listdir(self._claims):
            path = self._claims / name
            try:
                descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
            except FileNotFoundError:  # released while we looked
                continue
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                living[path] = json.loads(os.pread(descriptor, 1 << 16, 0))
            else:
                with contextlib.suppress(FileNotFoundError):
                    path.unlink()
            finally:
                os.close(descriptor)
        return living

    def _count(self, living: Mapping[Path, Mapping[str, Any]]) -> Dict[int, Card]:
        failed = self._statuses()
        cards: Dict[int, Card] = {}
        whole = Demand(self.sku.num_nsps, self.sku.dram_bytes, NUM_VCS)
        for qid in self.physical_qids:
            cards[qid] = Card(qid, self.sku, whole, whole, 0, 0, failed.get(qid, READY))
        derived = sorted(
            (entry["derived"], int(parent), Demand(*demand))
            for entry in living.values()
            if "derived" in entry
            for parent, demand in entry["takes"].items()
        )
        for qid, parent, total in derived:
            if parent in cards:
                status = cards[parent].status
                cards[qid] = Card(qid, self.sku, total, total, 0, 0, status, parent)
        for entry in living.values():
            for qid_text, demand in entry["takes"].items():
                self._subtract(cards, int(qid_text), Demand(*demand), "derived" in entry)
        return self._with_boards(cards)

    def _with_boards(self, cards: Mapping[int, Card]) -> Dict[int, Card]:
        """Each card with what is held on its board: of the SoCs that share its serial."""
        busy: Dict[int, int] = {}
        for card in cards.values():
            if card.parent is None:
                board = card.qid // self.sku.num_socs
                busy[board] = busy.get(board, 0) + card.num_busy_nsps
        return {
            qid: card._replace(num_board_nsps=busy[soc // self.sku.num_socs])
            for qid, card in cards.items()
            for soc in [qid if card.parent is None else card.parent]
        }

    def _subtract(
        self, cards: Dict[int, Card], qid: int, taken: Demand, is_reservation: bool
    ) -> None:
        card = cards.get(qid)
        if card is None:  # its derived device is gone with the process that made it
            return
        free = Demand(*(have - take for have, take in zip(card.free, taken)))
        cards[qid] = card._replace(
            free=free,
            num_loaded=card.num_loaded + (taken.dram_bytes > 0 and not is_reservation),
            num_active=card.num_active + (0 if is_reservation else taken.num_vcs),
        )

    def _check(
        self, demands: Mapping[int, Demand], living: Mapping[Path, Mapping[str, Any]]
    ) -> None:
        cards = self._count(living)
        for qid, demand in demands.items():
            if qid not in cards:
                raise NoDevice(qid)
            free = cards[qid].free
            for resource, have, want in zip(("nsp", "dram", "vc"), free, demand):
                if want > have:
                    raise Exhausted(qid, resource)

    def _write_claim(self, entry: Mapping[str, Any]) -> Claim:
        self._serial += 1
        path = self._claims / f"{os.getpid()}-{id(self):x}-{self._serial}"
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        descriptor = os.open(path, flags, 0o600)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        _write_entry(descriptor, entry)
        return Claim(self, path, descriptor)


def _as_json(demands: Mapping[int, Demand]) -> Dict[str, List[int]]:
    return {str(qid): list(demand) for qid, demand in demands.items()}


def _write_entry(descriptor: int, entry: Mapping[str, Any]) -> None:
    text = json.dumps(entry).encode()
    os.pwrite(descriptor, text, 0)
    os.ftruncate(descriptor, len(text))
