"""Finds and opens a Cloud AI SDK folder: its version, commands, modules and devices.

An SDK is a folder (`/opt/qti-aic` on a machine with cards). The emulated SDK is another such
folder, made by its own installer; no other file asks which of the two it is, except to print it.
"""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from qaic_ray.errors import DeviceError, SdkNotFound, UsageError
from qaic_ray.files.documents import read_object, read_text, shown, user_path
from qaic_ray.files.folders import cache_folder
from qaic_ray.limits import AI100_HW_VERSION_FROM, NAMED_SPECIALIZATIONS_FROM
from qaic_ray.options import EmulatorOptions
from qaic_ray.options.machine import LIMITS

VENDOR_ROOT = Path("/opt/qti-aic")
SDK_VARIABLE = "QAIC_RAY_SDK"
SDK_NAMES = ("auto", "real", "emulated")
"""Names that `find_sdk` takes in place of a folder."""
EMULATED_MARKER = "emulated-sdk.json"
NUMERICS_VARIABLE = "QAIC_EMULATOR_NUMERICS"
DEFAULT_NUMERICS = EmulatorOptions().numerics
QAIC_UTIL_TIMEOUT_S = 30.0

_MAX_XML_BYTES = 2**20
_MAX_WORDS = 500
_NUMBER = re.compile(r"[0-9]{1,18}")
_VERSION = re.compile(r"[0-9]{1,6}(\.[0-9A-Za-z_-]{1,20}){0,9}")


@dataclass(frozen=True)
class Device:
    """One Cloud AI 100 SoC as `qaic-util -q` shows it; `qid` is the id that qaicrt takes.

    `board` is the serial number of its board, empty where nobody says. The SoCs of a board are
    peers: an Ultra board has four.
    """

    qid: int
    status: str
    sku: str
    nsp_total: int
    nsp_free: int
    dram_total_bytes: int
    dram_free_bytes: int
    board: str = ""

    @property
    def ready(self) -> bool:
        """Whether programs can be loaded on it."""
        return self.status.lower() == "ready"


@dataclass(frozen=True)
class Sdk:
    """An SDK folder that exists. `kind` is "real" or "emulated"."""

    root: Path
    kind: str
    apps_version: str

    @property
    def label(self) -> str:
        """How reports name it."""
        return f"{self.kind} SDK {self.apps_version}"

    @property
    def numerics(self) -> str | None:
        """How emulated cards compute, `exact` or `fast`; None for real ones.

        The variable counts on every node, as it does for the emulated SDK itself.

        Raises:
            UsageError: where the variable says neither.
        """
        if self.kind != "emulated":
            return None
        made_for = read_object(self.root / EMULATED_MARKER, raises=SdkNotFound).get("numerics")
        named = os.environ.get(NUMERICS_VARIABLE) or str(made_for or DEFAULT_NUMERICS)
        if named not in LIMITS["numerics"]["known"]:
            known = " or ".join(LIMITS["numerics"]["known"])
            raise UsageError(f"{NUMERICS_VARIABLE} is {shown(named)}: give {known}.")
        return named

    @property
    def description(self) -> str:
        """The label, and how its cards compute where that is not the default."""
        is_plain = self.numerics in (None, DEFAULT_NUMERICS)
        return self.label if is_plain else f"{self.label}, {self.numerics} numerics"

    @property
    def version(self) -> tuple[int, ...]:
        """Apps version as numbers, for comparisons."""
        return tuple(int(part) for part in re.findall(r"\d+", self.apps_version))

    @property
    def compiler(self) -> Path:
        """`qaic-compile` where the SDK has it, else `qaic-exec`."""
        newer = self.root / "exec" / "qaic-compile"
        return newer if newer.exists() else self.root / "exec" / "qaic-exec"

    @property
    def hw_version(self) -> str:
        """Value of `-aic-hw-version` that this generation's recipes pass."""
        return "ai100" if self.version >= AI100_HW_VERSION_FROM else "2.0"

    @property
    def compile_only(self) -> bool:
        """Whether `-compile-only` must be said; qaic-compile does nothing else."""
        return self.compiler.name == "qaic-exec"

    @property
    def named_specializations(self) -> bool:
        """Whether the compiler reads `{name, symbols}` specializations; older ones exit 255."""
        return self.version >= NAMED_SPECIALIZATIONS_FROM

    @property
    def python_paths(self) -> tuple[Path, Path]:
        """Folders that hold `qaicrt` and `QAicApi_pb2`."""
        return self.root / "dev" / "lib" / platform.machine(), self.root / "dev" / "python"

    def environment(self) -> dict[str, str]:
        """This process's environment variables, with the SDK's folders before their paths."""
        paths = {
            "PYTHONPATH": [*map(str, self.python_paths)],
            "PATH": [str(self.root / "exec"), str(self.root / "tools")],
        }
        for name, folders in paths.items():
            folders += filter(None, os.environ.get(name, "").split(os.pathsep))
        joined = {name: os.pathsep.join(folders) for name, folders in paths.items()}
        return {**os.environ, **joined, SDK_VARIABLE: str(self.root)}

    def devices(self) -> list[Device]:
        """The machine's cards, by `qaic-util -q`.

        Raises:
            DeviceError: when the tool is missing, fails or does not answer.
        """
        return parse_devices(self._query())

    def card_lines(self) -> dict[str, dict[str, str]]:
        """All that `qaic-util -q` says of each card, as `parse_lines` does; raises as `devices`."""
        return parse_lines(self._query())

    def _query(self) -> str:
        command = [str(self.root / "tools" / "qaic-util"), "-q"]
        try:
            result = subprocess.run(
                command,
                capture_output=True,
                encoding="utf-8",
                errors="replace",
                timeout=QAIC_UTIL_TIMEOUT_S,
                check=False,
            )
        except OSError as error:
            raise DeviceError(f"Cannot run {command[0]}: {error.strerror}.") from error
        except subprocess.TimeoutExpired as error:
            raise DeviceError(
                f"{command[0]} did not answer within {QAIC_UTIL_TIMEOUT_S:.0f} s."
            ) from error
        if result.returncode != 0:
            words = (result.stderr.strip() or result.stdout.strip())[-_MAX_WORDS:]
            raise DeviceError(f"{command[0]} failed: {words or 'it printed nothing'}")
        return result.stdout


def has_cards() -> bool:
    """Whether the kernel shows a Cloud AI 100 device node, new style or old."""
    return any(any(Path("/dev").glob(nodes)) for nodes in ("accel/accel*", "qaic_aic100_*"))


def find_sdk(
    name: str | None,
    emulated: EmulatorOptions,
    *,
    vendor_root: Path = VENDOR_ROOT,
    has_cards: Callable[[], bool] = has_cards,
) -> Sdk:
    """Choose the SDK and open its folder.

    Args:
        name: "real", "emulated", a folder, or None (or "auto"): then the variable QAIC_RAY_SDK,
            then /opt/qti-aic, then, on a machine with neither SDK nor card, the emulated one.
        emulated: what the emulated SDK should be, where it is the one chosen.
        vendor_root: where the vendor's SDK would be.
        has_cards: whether this machine has a card.

    Raises:
        SdkNotFound: where the SDK that was asked for is not there.
    """
    if name in (None, "auto"):
        name = os.environ.get(SDK_VARIABLE) or _default_name(vendor_root, has_cards)
    if name == "emulated":
        # By its name there, an SDK in use is never changed under its users.
        folder = cache_folder() / "emulated-sdk"
        return open_sdk(install_emulated(folder, emulated, below=True))
    if name == "real":
        if not vendor_root.is_dir():
            raise SdkNotFound(
                f"There is no Cloud AI SDK at {vendor_root}: install the Platform and Apps SDK, "
                "or ask for its folder, or for `emulated`, in place of `real`."
            )
        sdk = open_sdk(vendor_root)
        if sdk.kind != "real":
            raise SdkNotFound(
                f"The SDK at {vendor_root} is the emulated one, and the real one was asked for."
            )
        return sdk
    try:
        return open_sdk(user_path(str(name), "The SDK"))
    except UsageError as error:
        raise SdkNotFound(str(error)) from error


def name_for_others(name: str) -> str:
    """A name for `find_sdk` that means the same on every node: a folder's path is absolute."""
    return name if name in SDK_NAMES else str(Path(name).expanduser().absolute())


def install_emulated(place: Path, wanted: EmulatorOptions, *, below: bool = False) -> Path:
    """Lay the emulated SDK down, and say where; does nothing where the same one stands already.

    Args:
        place: its folder.
        wanted: what it should be.
        below: its folder is below `place` instead, and named by all that it is made of.

    Raises:
        SdkNotFound: with the installer's own sentence.
    """
    command = [
        *(sys.executable, "-m", "qaic_ray.emulator.install"),
        *(["--under", str(place)] if below else [str(place)]),
        *("--apps-version", wanted.apps_version),
        *("--cards", str(wanted.cards), "--sku", wanted.sku, "--numerics", wanted.numerics),
    ]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        said = result.stderr.strip().removeprefix("error: ").rstrip(".")
        raise SdkNotFound(f"{said or 'The emulated SDK could not be laid down'}.")
    return Path(result.stdout.rstrip("\n").rpartition("\n")[2]) if below else place


def open_sdk(root: Path) -> Sdk:
    """Open an SDK folder.

    Raises:
        SdkNotFound: naming the folder and what it lacks.
    """
    if not root.is_dir():
        raise SdkNotFound(
            f"There is no Cloud AI SDK folder {root}: name the one that is there, or give "
            "--sdk emulated."
        )
    has_compiler = any((root / "exec" / name).exists() for name in ("qaic-compile", "qaic-exec"))
    versions = root / "versions" / "apps.xml"
    if not has_compiler or not versions.is_file():
        lacking = "versions/apps.xml" if has_compiler else "exec/qaic-exec and exec/qaic-compile"
        raise SdkNotFound(f"{root} is not a Cloud AI SDK folder: it has no {lacking}.")
    kind = "emulated" if (root / EMULATED_MARKER).is_file() else "real"
    return Sdk(root=root.resolve(), kind=kind, apps_version=_base_version(versions))


def parse_lines(text: str) -> dict[str, dict[str, str]]:
    """Read `qaic-util -q`: a card's id -> what stands before a line's colon -> what stands behind.

    A line may have nothing behind it.
    """
    found = {}
    for block in re.split(r"(?m)^QID ", text)[1:]:
        qid, _, body = block.partition("\n")
        lines = re.findall(r"(?m)^[ \t]*([^:\n]+?)[ \t]*:[ \t]*(.*?)[ \t\r]*$", body)
        found[qid.strip()] = dict(lines)
    return found


def parse_devices(text: str) -> list[Device]:
    """Read `qaic-util -q`: both the open tool's MB and the 1.21 tool's KB.

    Raises:
        DeviceError: for a number that is none.
    """
    devices = []
    for qid, fields in parse_lines(text).items():
        devices.append(
            Device(
                qid=_number(qid, "QID"),
                status=fields.get("Status", "Unknown"),
                sku=fields.get("Sku Type", "Unknown"),
                nsp_total=_number(fields.get("Nsp Total", "0"), "Nsp Total"),
                nsp_free=_number(fields.get("Nsp Free", "0"), "Nsp Free"),
                dram_total_bytes=_dram_bytes(fields.get("Dram Total", "0 MB")),
                dram_free_bytes=_dram_bytes(fields.get("Dram Free", "0 MB")),
                board=fields.get("Board serial", ""),
            )
        )
    return devices


def boards(devices: Iterable[Device]) -> list[list[Device]]:
    """The devices by board: those of one serial number, each list and all of them by QID.

    A device of which no serial number is known is on a board of its own.
    """
    found: dict[str, list[Device]] = {}
    for device in sorted(devices, key=lambda device: device.qid):
        found.setdefault(device.board or f"QID {device.qid}", []).append(device)
    return list(found.values())


def qids_text(qids: Sequence[int]) -> str:
    """`3`, `0-3` or `0,2,5`."""
    if len(qids) > 1 and list(qids) == list(range(qids[0], qids[-1] + 1)):
        return f"{qids[0]}-{qids[-1]}"
    return ",".join(map(str, qids))


def _default_name(vendor_root: Path, has_cards: Callable[[], bool]) -> str:
    if vendor_root.is_dir():
        return str(vendor_root)
    if has_cards():
        raise SdkNotFound(
            f"This machine has Cloud AI 100 cards but no SDK at {vendor_root}: install the Apps "
            f"SDK, or let {SDK_VARIABLE} name its folder."
        )
    return "emulated"


def compiler_digest(sdk: Sdk) -> str:
    """The compiler's identity, for cache keys.

    The emulated SDK's is the digest of its sources, so its QPCs are rebuilt when it changes; the
    vendor's is the size and time of its binary, beside the version that the key names anyway.
    """
    marker = sdk.root / EMULATED_MARKER
    if marker.is_file():
        return str(read_object(marker, raises=SdkNotFound).get("digest"))[:_MAX_WORDS]
    try:
        binary = sdk.compiler.stat()
    except OSError as error:
        raise SdkNotFound(f"{sdk.compiler} cannot be looked at: {error.strerror}.") from error
    return f"{binary.st_size} {binary.st_mtime_ns}"


def _base_version(path: Path) -> str:
    try:
        text = read_text(path, raises=SdkNotFound, max_bytes=_MAX_XML_BYTES)
        tree = ElementTree.fromstring(text)
    except (ElementTree.ParseError, ValueError, LookupError) as error:
        raise SdkNotFound(f"{path} is not XML: {str(error)[:_MAX_WORDS]}.") from error
    element = next(tree.iter("base_version"), None)
    if element is None or not (element.text or "").strip():
        raise SdkNotFound(f"{path} has no base_version element.")
    version = str(element.text).strip()
    if not _VERSION.fullmatch(version):
        raise SdkNotFound(f"{path} has the base_version {shown(version)}, which is no version.")
    return version


def _number(text: str, what: str) -> int:
    if not _NUMBER.fullmatch(text.strip()):
        raise DeviceError(f"qaic-util tells of {what} {shown(text.strip())}, which is no number.")
    return int(text)


def _dram_bytes(text: str) -> int:
    number, _, unit = text.partition(" ")
    scale = {"KB": 2**10, "MB": 2**20, "GB": 2**30}.get(unit.strip(), 2**20)
    return _number(number, "Dram") * scale
