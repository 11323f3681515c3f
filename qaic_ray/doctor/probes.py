"""Gathers the facts of the machine that it runs on; what cannot be found out is left empty."""

from __future__ import annotations

import ctypes
import grp
import importlib.metadata
import os
import platform
import pwd
import shutil
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from qaic_ray.cards.lease import card_scope, held_cards
from qaic_ray.doctor import host_checks
from qaic_ray.doctor.facts import (
    CardFacts,
    DeviceNode,
    Disk,
    MachineFacts,
    Port,
    RayFacts,
    SdkFacts,
)
from qaic_ray.errors import CompileError, DeviceError, QaicRayError, SdkNotFound
from qaic_ray.files.documents import read_object, read_text
from qaic_ray.files.folders import cache_folder
from qaic_ray.limits import CARDS
from qaic_ray.options import EmulatorOptions
from qaic_ray.sdk import EMULATED_MARKER, Sdk, find_sdk

PORTS = {
    6379: "a head's own port",
    8265: "the dashboard's",
    10001: "that of Ray Client",
}
CARD_ON_BUS = ("0x17cb", "0xa100")
"""PCI vendor and device of a Cloud AI 100 SoC."""

_NODE_PATTERNS = ("dev/accel/accel*", "dev/qaic_aic100_*")
_STA_UNSYNC = 0x40
_ADJTIMEX_BYTES = 256
_LISTENS = "0A"


def machine_facts(
    sdk: str | None,
    emulated: EmulatorOptions,
    folder: Path,
    *,
    tries_cards: bool = False,
    root: Path = Path("/"),
) -> MachineFacts:
    """All facts of this machine.

    Args:
        sdk: as `find_sdk` takes it.
        emulated: what the emulated SDK is to be, where it is the one.
        folder: where runs would write.
        tries_cards: run a tiny program on every card that is free.
        root: holds `dev`, `sys` and `proc`.
    """
    sdk_facts, found = _sdk(sdk, emulated)
    memory = _memory(root)
    return MachineFacts(
        host=os.uname().nodename,
        python=platform.python_version(),
        sdk=sdk_facts,
        cards=_cards(found, root, tries_cards),
        ray=ray_facts(Path.home()),
        ports=tuple(ports(root)),
        disks=tuple(_disks(folder)),
        memory_bytes=memory.get("MemTotal", 0),
        free_memory_bytes=memory.get("MemAvailable", 0),
        time_s=time.time(),
        is_synced=_is_synced(),
    )


def _sdk(name: str | None, emulated: EmulatorOptions) -> tuple[SdkFacts, Sdk | None]:
    try:
        sdk = find_sdk(name, emulated)
    except SdkNotFound as error:
        return SdkFacts(error=str(error)), None
    return sdk_facts(sdk), sdk


def sdk_facts(sdk: Sdk) -> SdkFacts:
    """What is in an SDK folder."""
    library, modules = sdk.python_paths
    bindings = sorted(path.name for path in library.glob("qaicrt*") if path.is_file())
    commands = [sdk.compiler, sdk.root / "tools" / "qaic-util"]
    broken = [path for path in commands if not os.access(path, os.X_OK)]
    broken += [path for path in (modules / "QAicApi_pb2.py",) if not path.is_file()]
    return SdkFacts(
        root=str(sdk.root),
        kind=sdk.kind,
        apps=sdk.apps_version,
        platform=_platform_version(sdk.root / "versions" / "platform.xml"),
        broken=tuple(str(path.relative_to(sdk.root)) for path in broken),
        bindings=tuple(bindings),
        cards=_emulated_cards(sdk),
    )


def _platform_version(path: Path) -> str:
    try:
        tree = ElementTree.fromstring(read_text(path, raises=SdkNotFound, max_bytes=2**20))
    except (SdkNotFound, ElementTree.ParseError, ValueError, LookupError):
        return ""
    element = next(tree.iter("base_version"), None)
    return "" if element is None else (element.text or "").strip()[:80]


def _emulated_cards(sdk: Sdk) -> int:
    if sdk.kind != "emulated":
        return 0
    try:
        marker = read_object(sdk.root / EMULATED_MARKER)
    except QaicRayError:
        return 0
    number, kind = marker.get("cards"), str(marker.get("sku"))
    socs = next((card.socs for card in CARDS.values() if card.name.lower() == kind), 1)
    return number * socs if isinstance(number, int) else 0


def _cards(sdk: Sdk | None, root: Path, tries_cards: bool) -> CardFacts:
    facts = CardFacts(
        nodes=tuple(_device_nodes(root)),
        on_bus=_on_bus(root),
        parameters=_parameters(root),
        in_group=_groups(),
    )
    if sdk is None:
        return facts
    try:
        if tries_cards:
            facts = _tried(facts, sdk)
        devices = tuple(sdk.devices())  # last: a trial may have found a card to be in error
    except DeviceError as error:
        return replace(facts, error=str(error))
    held = held_cards(card_scope(sdk))
    who = {qid: " and ".join(map(str, holders)) for qid, holders in held.items()}
    return replace(facts, devices=devices, held=who)


def _tried(facts: CardFacts, sdk: Sdk) -> CardFacts:
    from qaic_ray.doctor.card_trial import try_cards

    ready = [device.qid for device in sdk.devices() if device.ready]
    with tempfile.TemporaryDirectory(prefix="qaic-ray-doctor-") as made:
        try:
            return replace(facts, trials=tuple(try_cards(sdk, ready, Path(made))))
        except CompileError as error:
            return replace(facts, trial_error=str(error))


def _device_nodes(root: Path) -> Iterator[DeviceNode]:
    for path in (path for pattern in _NODE_PATTERNS for path in sorted(root.glob(pattern))):
        with suppress(OSError):  # it went just now
            group = path.stat().st_gid
            yield DeviceNode(
                f"/{path.relative_to(root)}", _group_name(group), os.access(path, os.R_OK | os.W_OK)
            )


def _group_name(number: int) -> str:
    try:
        return grp.getgrgid(number).gr_name
    except KeyError:
        return str(number)


def _groups() -> frozenset[str]:
    """The groups of this user by the system's list, not those of this login."""
    try:
        user = pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        return frozenset()
    return frozenset(group.gr_name for group in grp.getgrall() if user in group.gr_mem)


def _on_bus(root: Path) -> int:
    names = ("vendor", "device")
    functions = root.glob("sys/bus/pci/devices/*")
    return sum(tuple(_line(path / n) for n in names) == CARD_ON_BUS for path in functions)


def _parameters(root: Path) -> dict[str, int] | None:
    folder = root / "sys/module/qaic"
    if not folder.is_dir():
        return None
    lines = {path.name: _line(path) for path in folder.glob("parameters/*")}
    return {name: int(line) for name, line in lines.items() if line.isdecimal()}


def _line(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii", errors="replace").strip()
    except OSError:
        return ""


def ray_facts(home: Path) -> RayFacts:
    """The installed Ray, without importing it."""
    try:
        version = importlib.metadata.version("ray")
    except importlib.metadata.PackageNotFoundError:
        version = ""
    named = os.environ.get("RAY_AUTH_TOKEN_PATH")
    token = Path(named) if named else home / ".ray" / "auth_token"
    is_there = token.is_file()
    return RayFacts(
        version=version,
        auth_mode=os.environ.get("RAY_AUTH_MODE", "").lower(),
        token_file=str(token) if is_there else "",
        token_is_open=is_there and bool(token.stat().st_mode & 0o044),
    )


def ports(root: Path, numbers: Iterable[int] = tuple(PORTS)) -> Iterator[Port]:
    """Ray's ports, and which process listens on each."""
    sockets = dict(_listening(root))
    for number in numbers:
        inode = sockets.get(number)
        owner = "" if inode is None else _owner(root, inode)
        yield Port(number, PORTS.get(number, "asked about"), inode is not None, owner)


def _listening(root: Path) -> Iterator[tuple[int, str]]:
    """Port -> inode of its socket."""
    for name in ("tcp", "tcp6"):
        with suppress(OSError):
            for line in (root / "proc/net" / name).read_text(encoding="ascii").splitlines()[1:]:
                words = line.split()
                if len(words) > 9 and words[3] == _LISTENS:
                    yield int(words[1].rpartition(":")[2], 16), words[9]


def _owner(root: Path, inode: str) -> str:
    wanted = f"socket:[{inode}]"
    for folder in root.glob("proc/[0-9]*"):
        with suppress(OSError):
            if any(os.readlink(link) == wanted for link in (folder / "fd").iterdir()):
                return _line(folder / "comm")
    return ""


def _disks(folder: Path) -> Iterator[Disk]:
    yield _disk("runs and QPCs", folder)
    yield _disk("cache", cache_folder())
    yield _disk("Ray", Path(tempfile.gettempdir()))
    shared = Path("/dev/shm")
    if shared.is_dir():
        yield _disk(host_checks.SHM, shared)


def _disk(purpose: str, folder: Path) -> Disk:
    there = next((path for path in (folder, *folder.absolute().parents) if path.exists()), folder)
    try:
        usage = shutil.disk_usage(there)
    except OSError as error:
        return Disk(purpose, str(folder), error=error.strerror or "it cannot be looked at")
    is_open = os.access(there, os.W_OK | os.X_OK)
    refusal = "" if is_open else "this user may not write there"
    return Disk(purpose, str(folder), usage.total, usage.free, refusal)


def _memory(root: Path) -> dict[str, int]:
    """The lines of /proc/meminfo that are in kB, in bytes."""
    pairs = (line.split() for line in _line(root / "proc/meminfo").splitlines())
    return {words[0].rstrip(":"): int(words[1]) * 1024 for words in pairs if words[2:] == ["kB"]}


def _is_synced() -> bool | None:
    """Whether the kernel's clock follows a server; None where it does not tell."""
    buffer = ctypes.create_string_buffer(_ADJTIMEX_BYTES)  # modes 0: nothing is changed
    try:
        if ctypes.CDLL(None).adjtimex(buffer) < 0:
            return None
    except (OSError, AttributeError):
        return None
    # struct timex: unsigned modes; long offset, freq, maxerror, esterror; int status
    longs = ctypes.sizeof(ctypes.c_long)
    start = 5 * longs  # `modes` is padded to a long
    status = int.from_bytes(buffer.raw[start : start + 4], "little", signed=True)
    return not status & _STA_UNSYNC
