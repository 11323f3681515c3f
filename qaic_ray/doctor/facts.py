"""What `doctor` knows of a machine: plain data that crosses processes; and what a check finds."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import Enum

from qaic_ray.sdk import Device


class Verdict(str, Enum):
    """How bad it is."""

    OK = "ok"
    WARN = "warn"
    """It works, but not as it could, or only so far."""
    FAIL = "fail"
    """Something of this machine cannot be used until it is mended."""


@dataclass(frozen=True)
class Finding:
    """One line of the result: what was looked at, how it is, and what to do about it.

    `node` is the name of the machine; empty for what concerns several of them.
    """

    check: str
    verdict: Verdict
    says: str
    remedy: str = ""
    node: str = ""


def ok(check: str, says: str) -> Finding:
    """All is well."""
    return Finding(check, Verdict.OK, says)


def warn(check: str, says: str, remedy: str) -> Finding:
    """Something may be mended."""
    return Finding(check, Verdict.WARN, says, remedy)


def fail(check: str, says: str, remedy: str) -> Finding:
    """Something must be mended."""
    return Finding(check, Verdict.FAIL, says, remedy)


@dataclass(frozen=True)
class SdkFacts:
    """An SDK folder.

    Attributes:
        error: why it could not be found or opened; nothing else is known then.
        platform: version of the Platform SDK; empty where its file cannot be read.
        broken: parts that are missing or cannot be run, as paths inside of it.
        bindings: names of the files of the Python module `qaicrt`.
        cards: how many SoCs the emulated SDK was laid down with; 0 for the vendor's.
    """

    error: str = ""
    root: str = ""
    kind: str = ""
    apps: str = ""
    platform: str = ""
    broken: tuple[str, ...] = ()
    bindings: tuple[str, ...] = ()
    cards: int = 0

    @property
    def is_emulated(self) -> bool:
        """Whether it is ours, which needs neither driver nor device nodes."""
        return self.kind == "emulated"


@dataclass(frozen=True)
class DeviceNode:
    """A file of the driver in /dev; `group` owns it, `usable` says whether this user may."""

    path: str
    group: str
    usable: bool


@dataclass(frozen=True)
class CardTrial:
    """What became of a program with a known answer on one card.

    Attributes:
        outcome: right, wrong, refused, hung, died, or busy: somebody else holds the card.
        says: a sentence, where it is not right.
        open_s: seconds that loading took.
        run_s: seconds of its quickest execution.
    """

    qid: int
    outcome: str
    says: str = ""
    open_s: float = 0.0
    run_s: float = 0.0


SLOW = 2.5
"""A card that takes so many times as long as the quickest one is slow."""
SLOW_S = 0.005
"""Differences below this are the host's."""


def quickest_and_slow(trials: Iterable[CardTrial]) -> tuple[float, list[CardTrial]]:
    """Seconds of an execution on the quickest card, and the trials of slow ones."""
    right = [trial for trial in trials if trial.outcome == "right"]
    least_s = min((trial.run_s for trial in right), default=0.0)
    limit_s = max(SLOW * least_s, least_s + SLOW_S)
    return least_s, [trial for trial in right if trial.run_s > limit_s]


@dataclass(frozen=True)
class CardFacts:
    """The cards as the SDK's tool tells of them, and as the kernel does.

    Attributes:
        error: why the tool told nothing.
        held: id of a card -> who holds it.
        on_bus: Cloud AI 100 functions on the PCI bus.
        parameters: of the kernel module; None where it is not loaded.
        trials: of a program that was run on the cards; none where that was not asked for.
        trial_error: why there is no such program.
        in_group: groups that the user is a member of, by the system's list; a login that is older
            than the membership does not have it.
    """

    devices: tuple[Device, ...] = ()
    error: str = ""
    held: Mapping[int, str] = field(default_factory=dict)
    nodes: tuple[DeviceNode, ...] = ()
    on_bus: int = 0
    parameters: Mapping[str, int] | None = None
    trials: tuple[CardTrial, ...] = ()
    trial_error: str = ""
    in_group: frozenset[str] = frozenset()


@dataclass(frozen=True)
class RayFacts:
    """The Ray that is installed, and how it would let others in.

    Attributes:
        version: empty where Ray cannot be imported.
        auth_mode: RAY_AUTH_MODE; empty where it is not set.
        token_file: path of the user's token; empty where there is none.
        token_is_open: whether others than the user can read it.
    """

    version: str = ""
    auth_mode: str = ""
    token_file: str = ""
    token_is_open: bool = False


@dataclass(frozen=True)
class Port:
    """A port of Ray's; `owner` is the name of the process that listens on it, if any does."""

    number: int
    purpose: str
    is_taken: bool = False
    owner: str = ""


@dataclass(frozen=True)
class Disk:
    """The file system of a folder; `error` says why it cannot be written to."""

    purpose: str
    path: str
    total_bytes: int = 0
    free_bytes: int = 0
    error: str = ""


@dataclass(frozen=True)
class MachineFacts:
    """All that is looked at on one machine.

    `time_s` is its clock, a Unix time; `is_synced` whether that follows a server, None where the
    kernel does not tell.
    """

    host: str
    python: str = ""
    sdk: SdkFacts = SdkFacts()
    cards: CardFacts = field(default_factory=CardFacts)
    ray: RayFacts = RayFacts()
    ports: tuple[Port, ...] = ()
    disks: tuple[Disk, ...] = ()
    memory_bytes: int = 0
    free_memory_bytes: int = 0
    time_s: float = 0.0
    is_synced: bool | None = None


@dataclass(frozen=True)
class NodeFacts:
    """What a node of a cluster tells.

    Attributes:
        facts: None where it did not answer, and `error` says why.
        skew_s: by how much its clock is ahead of this machine's; None where that is not known.
        skew_error_s: by how much `skew_s` may be wrong.
        shared: what it found in the place of a file of this machine: "seen", "absent" or "other".
    """

    name: str
    facts: MachineFacts | None = None
    error: str = ""
    skew_s: float | None = None
    skew_error_s: float = 0.0
    shared: str = ""
