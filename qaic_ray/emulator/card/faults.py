"""Faults on demand: cards that are absent, fail, hang, lie or are slow, the same way every time.

`QAIC_EMULATOR_FAULTS` names a YAML or JSON file with a `seed` and a list of `faults`; each has a
`kind`, a `device` and what it fires at. `docs/emulated-sdk/faults.md` shows one of each kind.
Events are numbered from 1 for each card, over all processes, for as long as the state folder lives.
"""

from __future__ import annotations

import difflib
import fcntl
import hashlib
import os
from pathlib import Path
from typing import Any, Dict, FrozenSet, Iterable, List, Mapping, NamedTuple, Optional, Union

from ..documents import is_number, parse_mapping, read_text, shown

VARIABLE = "QAIC_EMULATOR_FAULTS"

LOAD = "load"
ACTIVATE = "activate"
ENQUEUE = "enqueue"
INFERENCE = "inference"

_KIND_TO_EVENT: Dict[str, Optional[str]] = {
    "absent": None,
    "error": INFERENCE,
    "hang": INFERENCE,
    "data_path_timeout": INFERENCE,
    "load_out_of_memory": LOAD,
    "nsp_allocation_failure": ACTIVATE,
    "again": ENQUEUE,
    "kill": INFERENCE,
    "corrupt": INFERENCE,
    "slow": INFERENCE,
}
_TRIGGERS = {"at", "after", "probability"}
_KIND_TO_KEYS = {
    "absent": set(),
    "data_path_timeout": {"wait_ms", *_TRIGGERS},
    "again": {"call", *_TRIGGERS},
    "slow": {"factor", *_TRIGGERS},
}


class FaultFileError(ValueError):
    """The fault file cannot be used; the message says where and why."""


class Fault(NamedTuple):
    """One entry of the file; `devices` is None for all, `event` is what it waits for."""

    order: int
    kind: str
    devices: Optional[FrozenSet[int]]
    event: Optional[str]
    at: Optional[FrozenSet[int]]
    after: Optional[int]
    probability: Optional[float]
    wait_ms: Optional[float]
    factor: float

    def concerns(self, qid: int) -> bool:
        """Whether card `qid` has this fault."""
        return self.devices is None or qid in self.devices


class Firing(NamedTuple):
    """A fault that fires now: on which card, in its how-manyth event, with which seed."""

    fault: Fault
    qid: int
    number: int
    seed: int


class Faults:
    """What the fault file asks for; counts events in the state folder where it must."""

    def __init__(self, faults: Iterable[Fault], seed: int, counters: Path) -> None:
        self._faults = tuple(faults)
        self._seed = seed
        self._counters = counters

    def is_absent(self, qid: int) -> bool:
        """Whether card `qid` is to be missing."""
        return any(fault.kind == "absent" and fault.concerns(qid) for fault in self._faults)

    def firing(self, event: str, qids: Iterable[int]) -> List[Firing]:
        """Count one `event` on each of the cards and tell which faults it sets off, in order."""
        if not self._faults:
            return []
        fired = []
        for qid in qids:
            waiting = [f for f in self._faults if f.event == event and f.concerns(qid)]
            if waiting:
                number = _count(self._counters.with_name(f"{self._counters.name}-{qid}-{event}"))
                fired += [
                    Firing(fault, qid, number, self._draw(fault, qid, number))
                    for fault in waiting
                    if self._fires(fault, qid, number)
                ]
        return fired

    def _fires(self, fault: Fault, qid: int, number: int) -> bool:
        if fault.at is not None and number not in fault.at:
            return False
        if fault.after is not None and number <= fault.after:
            return False
        if fault.probability is None:
            return True
        return self._draw(fault, qid, number) / 2.0**64 < fault.probability

    def _draw(self, fault: Fault, qid: int, number: int) -> int:
        text = f"{self._seed}/{fault.order}/{qid}/{number}".encode()
        return int.from_bytes(hashlib.sha256(text).digest()[:8], "big")


def from_environment(state: Path) -> Faults:
    """The faults of the file that `QAIC_EMULATOR_FAULTS` names; none when it is not set."""
    named = os.environ.get(VARIABLE)
    if not named:
        return Faults((), 0, state)
    text = read_text(named, FaultFileError, VARIABLE)
    seed, faults = parse(text, named)
    digest = hashlib.sha256(text.encode()).hexdigest()[:12]
    return Faults(faults, seed, state / f"events-{digest}")


def parse(text: str, name: str) -> tuple[int, List[Fault]]:
    """Seed and faults of a file's text; `name` is for the messages."""
    content = parse_mapping(text, name, FaultFileError)
    unknown = set(content) - {"seed", "faults"}
    if unknown:
        raise FaultFileError(
            f"{name}: unknown key {_suggest(min(map(str, unknown)), ('seed', 'faults'))}"
        )
    entries = content.get("faults", [])
    if not isinstance(entries, list):
        raise FaultFileError(f"{name}: `faults` must be a list")
    seed = content.get("seed", 0)
    if not isinstance(seed, int) or not is_number(seed):
        raise FaultFileError(f"{name}: `seed` must be an integer, not {shown(seed)}")
    return seed, [_fault(i, entry, f"{name}: fault {i + 1}") for i, entry in enumerate(entries)]


def _fault(order: int, entry: Any, where: str) -> Fault:
    if not isinstance(entry, dict) or "kind" not in entry:
        raise FaultFileError(f"{where} must be a mapping with a `kind`")
    kind = entry["kind"]
    if not isinstance(kind, str) or kind not in _KIND_TO_EVENT:
        raise FaultFileError(f"{where}: unknown kind {_suggest(kind, _KIND_TO_EVENT)}")
    allowed = _KIND_TO_KEYS.get(kind, _TRIGGERS) | {"kind", "device"}
    for key in entry:
        if key not in allowed:
            raise FaultFileError(f"{where}: a {kind} fault has no {_suggest(key, allowed)}")
    event = _KIND_TO_EVENT[kind]
    if kind == "again":
        event = entry.get("call", event)
        if event not in (LOAD, ACTIVATE, ENQUEUE):
            raise FaultFileError(
                f"{where}: `call` must be load, activate or enqueue, not {shown(event)}"
            )
    at = entry.get("at", 1 if kind == "again" and not _TRIGGERS & set(entry) else None)
    if kind == "kill" and not _TRIGGERS & set(entry):
        raise FaultFileError(f"{where}: a kill fault needs `at`, `after` or `probability`")
    return Fault(
        order=order,
        kind=kind,
        devices=_devices(entry.get("device", "all"), where),
        event=event,
        at=None if at is None else _numbers(at, f"{where}: `at`"),
        after=None if "after" not in entry else _number(entry["after"], f"{where}: `after`"),
        probability=_fraction(entry.get("probability"), f"{where}: `probability`"),
        wait_ms=_positive(entry.get("wait_ms"), f"{where}: `wait_ms`"),
        factor=_positive(entry.get("factor"), f"{where}: `factor`") or 2.0,
    )


def _devices(value: Any, where: str) -> Optional[FrozenSet[int]]:
    return None if value == "all" else _numbers(value, f"{where}: `device`")


def _numbers(value: Any, where: str) -> FrozenSet[int]:
    values = value if isinstance(value, list) else [value]
    return frozenset(_number(each, where) for each in values)


def _number(value: Any, where: str) -> int:
    if not isinstance(value, int) or not is_number(value) or value < 0:
        raise FaultFileError(f"{where} must be a number of 0 or more, not {shown(value)}")
    return value


def _positive(value: Any, where: str) -> Optional[float]:
    if value is None:
        return None
    if not is_number(value) or not value > 0:
        raise FaultFileError(f"{where} must be a positive number, not {shown(value)}")
    return float(value)


def _fraction(value: Any, where: str) -> Optional[float]:
    number = _positive(value, where)
    if number is not None and number > 1:
        raise FaultFileError(f"{where} must be between 0 and 1, not {shown(value)}")
    return number


def _suggest(word: Any, known: Union[Iterable[str], Mapping[str, Any]]) -> str:
    close = difflib.get_close_matches(str(word)[:40], sorted(known), 1)
    return shown(word) + (f"; did you mean {close[0]!r}?" if close else "")


def _count(path: Path) -> int:
    """One more event; the kernel's lock makes numbers unique over all processes."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        number = int(os.pread(descriptor, 20, 0) or b"0") + 1
        os.pwrite(descriptor, b"%d" % number, 0)
        return number
    finally:
        fcntl.flock(descriptor, fcntl.LOCK_UN)
        os.close(descriptor)
